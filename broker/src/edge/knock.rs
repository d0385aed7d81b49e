//! Knock keys: one for each day, derived from the cluster's secret. A filter in front of the handshake, not an identity.

use aws_lc_rs::hmac;
use parking_lot::Mutex;
use selvedge_proto::hello::{Knock, KnockKey};

/// Milliseconds of a day.
pub const DAY_MS: u64 = 86_400_000;
/// Keys of so many past days are admitted, so that an end that slept for a week gets in.
pub const DAYS_BACK_ADMITTED: u64 = 8;

/// The key of a day (cluster time / 86,400,000 ms).
pub fn key_of(secret: &[u8], day: u64) -> KnockKey {
    let key = hmac::Key::new(hmac::HMAC_SHA256, secret);
    let tag = hmac::sign(&key, &[b"selvedge knock" as &[u8], &day.to_be_bytes()].concat());
    KnockKey::from_bytes(tag.as_ref()).expect("an HMAC-SHA256 has the 32 bytes of a key")
}

/// The keys that are handed out at a time: today's, which is used, and tomorrow's.
pub fn keys_at(secret: &[u8], now_ms: u64) -> Vec<Vec<u8>> {
    let day = now_ms / DAY_MS;
    [day, day + 1].map(|day| key_of(secret, day).as_bytes().to_vec()).to_vec()
}

/// The keys that are admitted, made once a day.
#[derive(Default)]
pub(super) struct Knocks {
    kept: Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    secret: Vec<u8>,
    day: u64,
    keys: Vec<KnockKey>,
}

impl Knocks {
    /// Whether the knock was made with a key of these days. Without a secret nothing is admitted.
    pub(super) fn admits(&self, secret: &[u8], now_ms: u64, knock: &Knock) -> bool {
        if secret.is_empty() {
            return false;
        }
        let day = now_ms / DAY_MS;
        let keys = {
            let mut kept = self.kept.lock();
            if kept.keys.is_empty() || kept.day != day || kept.secret != secret {
                let days = day.saturating_sub(DAYS_BACK_ADMITTED)..=day + 1;
                *kept = Kept { secret: secret.to_vec(), day, keys: days.rev().map(|d| key_of(secret, d)).collect() };
            }
            kept.keys.clone()
        };
        // All are tried, so that the time says nothing.
        keys.iter().fold(false, |admitted, key| key.admits(knock) | admitted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_the_last_days_and_of_tomorrow_are_admitted_and_no_others() {
        let (secret, now_ms) = (vec![7; 32], 20_000 * DAY_MS + 5);
        let knocks = Knocks::default();
        let admitted = |day: u64| {
            let knock = Knock::from_alpn(&key_of(&secret, day).knock()).unwrap();
            knocks.admits(&secret, now_ms, &knock)
        };
        assert!(admitted(20_000) && admitted(20_001) && admitted(19_992));
        assert!(!admitted(20_002) && !admitted(19_991));
        let knock = Knock::from_alpn(&key_of(&[8; 32], 20_000).knock()).unwrap();
        assert!(!knocks.admits(&secret, now_ms, &knock));
        assert!(!knocks.admits(&[], now_ms, &Knock::from_alpn(&key_of(&[], 20_000).knock()).unwrap()));
    }
}
