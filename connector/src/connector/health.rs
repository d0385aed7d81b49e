//! Checks that the applications of this connector's segments answer, and tells the brokers.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt as _;
use parking_lot::Mutex;
use selvedge_domain::name::Host;
use selvedge_proto::control::{Health as Report, Target, TargetRtt, Targets, from_end};
use tokio::sync::Notify;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info};

use super::{Role, parked};
use crate::dial;
use crate::link::Link;

/// Limit of one check.
const CHECK_TIMEOUT: Duration = Duration::from_secs(2);
/// Checks under way at once.
const CHECKS_MAX: usize = 32;
/// Targets of one broker that are checked; what is beyond counts as up.
const TARGETS_MAX: usize = 10_000;
/// A report is sent at least so often.
const REPORT_INTERVAL: Duration = Duration::from_secs(10);

type Key = (String, u16);

/// What is to be checked, and what was found.
#[derive(Default)]
pub(super) struct Health {
    targets: Mutex<BTreeMap<u64, BTreeSet<Key>>>,
    /// Round trip of those that answered, none of those that did not.
    found: Mutex<BTreeMap<Key, Option<u64>>>,
    changed: Notify,
}

impl Health {
    /// Takes the targets that one broker wants checked.
    pub(super) fn take(&self, link: &Link, targets: Targets) {
        let targets = targets.targets.into_iter().take(TARGETS_MAX).filter_map(key).collect();
        self.targets.lock().insert(link.broker.node, targets);
        self.changed();
    }

    /// Forgets what one broker wanted.
    pub(super) fn forget(&self, node: u64) {
        self.targets.lock().remove(&node);
    }

    /// Something is to be reported now.
    pub(super) fn changed(&self) {
        self.changed.notify_one();
    }

    fn wanted(&self) -> BTreeSet<Key> {
        self.targets.lock().values().flatten().cloned().collect()
    }

    fn report(&self, node: u64) -> (Vec<String>, Vec<TargetRtt>) {
        let targets = self.targets.lock();
        let found = self.found.lock();
        let (mut down, mut rtts) = (Vec::new(), Vec::new());
        for key in targets.get(&node).into_iter().flatten() {
            match found.get(key) {
                Some(Some(rtt_us)) => {
                    rtts.push(TargetRtt { host: key.0.clone(), port: u32::from(key.1), rtt_us: *rtt_us })
                }
                Some(None) => down.push(format!("{}:{}", key.0, key.1)),
                // Not looked at yet: neither.
                None => {}
            }
        }
        (down, rtts)
    }
}

/// Checks and reports until `shutdown`.
pub(super) async fn run(role: Arc<Role>, shutdown: CancellationToken) {
    let health = &role.health;
    let mut checked_at: Option<Instant> = None;
    let mut reported: BTreeMap<u64, (Report, Instant)> = BTreeMap::new();
    let mut pause = Duration::ZERO;
    loop {
        let due = checked_at.is_none_or(|at| at.elapsed() >= pause);
        let is_new = health.wanted().iter().any(|key| !health.found.lock().contains_key(key));
        if due || is_new {
            check_all(&role).await;
            role.find_brokers().await;
            checked_at = Some(Instant::now());
            pause = role.config.check.mul_f64(0.8 + 0.4 * rand::random::<f64>());
            for link in role.links.all() {
                if role.parked.sweep(link.broker.node) {
                    link.ask_for_tickets();
                }
                // Tickets that came while nothing was missing.
                tokio::spawn(parked::fill(role.clone(), link));
            }
        }
        report(&role, &mut reported);
        let left = checked_at.map_or(Duration::ZERO, |at| pause.saturating_sub(at.elapsed()));
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = health.changed.notified() => {}
            () = sleep(left.min(REPORT_INTERVAL)) => {}
        }
    }
}

async fn check_all(role: &Arc<Role>) {
    let wanted = role.health.wanted();
    let checks = wanted.into_iter().map(|key| async {
        let rtt_us = check(role, &key).await;
        (key, rtt_us)
    });
    let found: BTreeMap<_, _> = futures::stream::iter(checks).buffer_unordered(CHECKS_MAX).collect().await;
    let mut known = role.health.found.lock();
    for (key, rtt_us) in &found {
        if known.get(key).is_none_or(|old| old.is_some() != rtt_us.is_some()) {
            info!(up = rtt_us.is_some(), "an application was checked and is new or has changed");
            debug!(host = key.0, port = key.1, up = rtt_us.is_some(), "which one");
        }
    }
    *known = found;
}

/// What this connector may not reach is down, as far as its brokers are concerned.
async fn check(role: &Role, (host, port): &Key) -> Option<u64> {
    let host = Host::parse(host).ok()?;
    let address = role.permitted(&host, *port).await.ok()?;
    let began = Instant::now();
    dial::application(address, CHECK_TIMEOUT).await.ok()?;
    Some(u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX).max(1))
}

fn report(role: &Role, reported: &mut BTreeMap<u64, (Report, Instant)>) {
    let links = role.links.all();
    reported.retain(|node, _| links.iter().any(|link| link.broker.node == *node));
    for link in links {
        let node = link.broker.node;
        let (down, rtts) = role.health.report(node);
        let report = Report { down, rtts, load_permille: role.load_permille(), parked: role.parked.tickets(node) };
        let is_due = reported.get(&node).is_none_or(|(last, at)| {
            at.elapsed() >= REPORT_INTERVAL
                || last.down != report.down
                || last.parked != report.parked
                || last.rtts.len() != report.rtts.len()
        });
        if is_due && link.try_send(from_end::Message::Health(report.clone())).is_ok() {
            reported.insert(node, (report, Instant::now()));
        }
    }
}

fn key(target: Target) -> Option<Key> {
    Some((target.host, u16::try_from(target.port).ok().filter(|port| *port > 0)?))
}
