//! Attempts without a proven identity: counted per address prefix and reason, one record a minute for each.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

use super::{Edge, metrics};
use crate::audit::{Record, Strangers};

/// Prefixes and reasons that are counted apart; what is beyond is counted as `other`.
pub const STRANGERS_MAX: usize = 256;
/// Between two records of the same prefix and reason.
pub const STRANGERS_INTERVAL: Duration = Duration::from_secs(60);

/// The network whose addresses share a budget: /24 or /48.
pub(super) fn prefix_of(address: IpAddr) -> String {
    let address = address.to_canonical();
    let length = if address.is_ipv4() { 24 } else { 48 };
    IpNet::new(address, length).map_or_else(|_| address.to_string(), |network| network.trunc().to_string())
}

#[derive(Default)]
pub(super) struct Counted {
    counts: Mutex<BTreeMap<(String, &'static str), u64>>,
}

impl Counted {
    /// A connection from this address was closed for this reason.
    pub(super) fn count(&self, from: IpAddr, reason: &'static str) {
        metrics::refused(reason);
        let mut counts = self.counts.lock();
        let mut key = (prefix_of(from), reason);
        if counts.len() >= STRANGERS_MAX && !counts.contains_key(&key) {
            key.0 = "other".into();
        }
        *counts.entry(key).or_default() += 1;
    }

    fn take(&self) -> BTreeMap<(String, &'static str), u64> {
        std::mem::take(&mut self.counts.lock())
    }
}

/// Writes the records until `stop`.
pub(super) async fn report(edge: Arc<Edge>, stop: CancellationToken) {
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(STRANGERS_INTERVAL) => {}
        }
        for ((prefix, reason), count) in edge.strangers.take() {
            let record = Record::Strangers(Strangers { prefix, reason: reason.into(), count });
            // A journal that is full has said so; strangers are not worth more.
            let _ = edge.audit.append(&record);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_are_24_and_48_bits() {
        assert_eq!(prefix_of("10.1.2.3".parse().unwrap()), "10.1.2.0/24");
        assert_eq!(prefix_of("::ffff:10.1.2.3".parse().unwrap()), "10.1.2.0/24");
        assert_eq!(prefix_of("2001:db8:1:2::3".parse().unwrap()), "2001:db8:1::/48");
    }

    #[test]
    fn what_is_counted_is_bounded() {
        let counted = Counted::default();
        for n in 0..600_u32 {
            counted.count(IpAddr::from((0x0a00_0000 + n * 256).to_be_bytes()), "no_knock");
        }
        let counts = counted.take();
        assert_eq!(counts.len(), STRANGERS_MAX + 1);
        assert_eq!(counts.values().sum::<u64>(), 600);
    }
}
