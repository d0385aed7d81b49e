//! What this broker knows of connectors, clients and other brokers right now, and the choice of a path from it.
//!
//! Soft state: measured here or told by the other brokers each second, never in the log. Only transitions of
//! availability are proposed ([`availability`]).
//!
//! **Invariant:** a broker that was not heard for [`BROKER_HEARD_MAX`] counts for nothing: neither it nor the connectors
//! that only it has.

pub mod availability;
mod exchange;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use selvedge_domain::path::{self, Choice, Place};
use selvedge_domain::rows::{self, Availability};
use selvedge_domain::segment::Endpoint;
use selvedge_domain::{Id, State};
use selvedge_proto::control::{Health, TargetRtt};
use selvedge_proto::relay::{Attached, EndRtt, NodeRtt, SoftState};
use tokio::sync::Notify;

pub(crate) use exchange::exchange;

/// Another broker that was not heard for so long is taken for dead.
pub const BROKER_HEARD_MAX: Duration = Duration::from_secs(4);
/// Ends whose RTT is told to the other brokers.
pub const ENDS_TOLD_MAX: usize = 10_000;
/// Targets that one connector may report.
pub const TARGETS_REPORTED_MAX: usize = 1_000;
/// How much a new sample moves a smoothed RTT: 1 / 2^3.
const RTT_SMOOTHING: u32 = 3;

/// Soft state of one broker. Shared.
pub struct Routing {
    node: u64,
    fresh: AtomicBool,
    load: Mutex<Load>,
    soft: Mutex<Soft>,
    /// Availability may have changed.
    changed: Notify,
}

#[derive(Default)]
struct Soft {
    connectors: BTreeMap<Id, Here>,
    brokers: BTreeMap<u64, Heard>,
    ends: BTreeMap<String, Duration>,
}

/// A connector whose control stream ends here.
struct Here {
    stream: u64,
    since: Instant,
    /// The last time that a target stopped or began to answer.
    health_since: Instant,
    heard: Instant,
    rtt: Option<Duration>,
    load_permille: u32,
    down: BTreeSet<String>,
    app_rtts: Vec<TargetRtt>,
}

/// What a broker says of its sessions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// It takes no new ones.
    pub draining: bool,
    /// Sessions that it stitches.
    pub sessions: u64,
    /// Sessions that were cut since it began to drain.
    pub sessions_cut: u64,
}

/// Another broker.
struct Heard {
    at: Instant,
    rtt: Option<Duration>,
    state: SoftState,
}

impl Heard {
    fn alive(&self) -> bool {
        self.at.elapsed() <= BROKER_HEARD_MAX
    }
}

/// Where a connector's control stream ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Via {
    /// At this broker.
    Here,
    /// At another one, which relays.
    Broker(u64),
}

impl Routing {
    /// The soft state of the broker `node`, which has heard nobody.
    pub fn new(node: u64) -> std::sync::Arc<Self> {
        std::sync::Arc::new(Self {
            node,
            fresh: AtomicBool::new(false),
            load: Mutex::default(),
            soft: Mutex::default(),
            changed: Notify::new(),
        })
    }

    /// What this broker says of itself from now on.
    pub(crate) fn set_own(&self, fresh: bool, load: Load) {
        self.fresh.store(fresh, Ordering::Relaxed);
        *self.load.lock() = load;
    }

    /// What a broker says of its sessions; none of one that was not heard lately.
    pub fn load(&self, node: u64) -> Option<Load> {
        if node == self.node {
            return Some(*self.load.lock());
        }
        let soft = self.soft.lock();
        let told = &soft.brokers.get(&node).filter(|heard| heard.alive())?.state;
        Some(Load { draining: told.draining, sessions: told.sessions, sessions_cut: told.sessions_cut })
    }

    pub(crate) fn attach(&self, connector: Id, stream: u64) {
        let now = Instant::now();
        let here = Here {
            stream,
            since: now,
            health_since: now,
            heard: now,
            rtt: None,
            load_permille: 0,
            down: BTreeSet::new(),
            app_rtts: Vec::new(),
        };
        self.soft.lock().connectors.insert(connector, here);
        self.changed.notify_one();
    }

    /// The connector's stream ended; a later stream of it stays.
    pub(crate) fn detach(&self, connector: Id, stream: u64) {
        let mut soft = self.soft.lock();
        if soft.connectors.get(&connector).is_some_and(|here| here.stream == stream) {
            soft.connectors.remove(&connector);
            self.changed.notify_one();
        }
    }

    pub(crate) fn connector_answered(&self, connector: Id, rtt: Duration) {
        if let Some(here) = self.soft.lock().connectors.get_mut(&connector) {
            here.heard = Instant::now();
            here.rtt = Some(smoothed(here.rtt, rtt));
        }
    }

    /// What a connector says of itself. **Shape**: cut to [`TARGETS_REPORTED_MAX`].
    pub(crate) fn health(&self, connector: Id, health: &Health) {
        let mut soft = self.soft.lock();
        let Some(here) = soft.connectors.get_mut(&connector) else { return };
        here.load_permille = health.load_permille.min(1_000);
        here.app_rtts = health.rtts.iter().take(TARGETS_REPORTED_MAX).cloned().collect();
        let down: BTreeSet<String> = health.down.iter().take(TARGETS_REPORTED_MAX).cloned().collect();
        if here.down != down {
            here.down = down;
            here.health_since = Instant::now();
            self.changed.notify_one();
        }
    }

    pub(crate) fn end_answered(&self, end: &str, rtt: Duration) {
        let mut soft = self.soft.lock();
        let before = soft.ends.get(end).copied();
        soft.ends.insert(end.to_owned(), smoothed(before, rtt));
    }

    pub(crate) fn end_gone(&self, end: &str) {
        self.soft.lock().ends.remove(end);
    }

    /// Takes what another broker says; `rtt` is of the call that brought it.
    pub(crate) fn hear(&self, state: SoftState, rtt: Option<Duration>) {
        let mut soft = self.soft.lock();
        let before = soft.brokers.get(&state.node).and_then(|heard| heard.rtt);
        let rtt = match (before, rtt) {
            (before, Some(rtt)) => Some(smoothed(before, rtt)),
            (before, None) => before,
        };
        soft.brokers.insert(state.node, Heard { at: Instant::now(), rtt, state });
    }

    /// What this broker tells the others.
    pub(crate) fn tell(&self) -> SoftState {
        let Load { draining, sessions, sessions_cut } = *self.load.lock();
        let soft = self.soft.lock();
        SoftState {
            node: self.node,
            draining,
            sessions,
            sessions_cut,
            fresh: self.fresh.load(Ordering::Relaxed),
            connectors: soft
                .connectors
                .iter()
                .map(|(id, here)| Attached {
                    connector: id.to_string(),
                    stream: here.stream,
                    rtt_us: here.rtt.map_or(0, micros),
                    load_permille: here.load_permille,
                    down: here.down.iter().cloned().collect(),
                    rtts: here.app_rtts.clone(),
                })
                .collect(),
            nodes: soft
                .brokers
                .iter()
                .filter_map(|(node, heard)| Some(NodeRtt { node: *node, rtt_us: micros(heard.rtt?) }))
                .collect(),
            ends: soft
                .ends
                .iter()
                .take(ENDS_TOLD_MAX)
                .map(|(end, rtt)| EndRtt { end: end.clone(), rtt_us: micros(*rtt) })
                .collect(),
        }
    }

    /// Whether another broker was heard lately.
    pub fn alive(&self, node: u64) -> bool {
        node == self.node || self.soft.lock().brokers.get(&node).is_some_and(Heard::alive)
    }

    /// Where a connector's control stream ends; this broker first, then the nearest one that is alive and stays.
    pub fn via(&self, connector: Id) -> Option<Via> {
        let soft = self.soft.lock();
        if soft.connectors.contains_key(&connector) {
            return Some(Via::Here);
        }
        let id = connector.to_string();
        soft.brokers
            .iter()
            .filter(|(_, heard)| heard.alive() && heard.state.connectors.iter().any(|there| there.connector == id))
            .min_by_key(|(_, heard)| (heard.state.draining, heard.rtt.unwrap_or(Duration::MAX)))
            .map(|(node, _)| Via::Broker(*node))
    }

    /// Whether some connector of these groups could take a session now.
    pub fn any_healthy(&self, state: &State, groups: &[Id]) -> bool {
        let soft = self.soft.lock();
        let reaches = |id: Id| {
            let connector = state.by_id::<rows::Connector>(id);
            connector.is_some_and(|c| !c.revoked && c.group.is_some_and(|group| groups.contains(&group)))
        };
        soft.connectors.keys().any(|id| reaches(*id))
            || soft.brokers.values().filter(|heard| heard.alive()).any(|heard| {
                heard.state.connectors.iter().filter_map(|there| there.connector.parse().ok()).any(reaches)
            })
    }

    /// Weighs every path of a session to `endpoint` in `segment`.
    ///
    /// `end` is the SPIFFE id of the client or workload, when there is one whose RTT may have been measured. `seed` draws
    /// between equals.
    pub fn candidates(&self, state: &State, segment: Id, endpoint: &Endpoint, end: Option<&str>, seed: u64) -> Choice {
        let groups = state.by_id::<rows::Segment>(segment).map(|s| s.connector_groups).unwrap_or_default();
        let soft = self.soft.lock();
        let brokers: Vec<path::Broker> = state
            .rows::<rows::Broker>()
            .filter(|broker| !broker.removed && (broker.node == self.node || !broker.edge.is_empty()))
            .filter_map(|broker| self.broker(&soft, state, broker, end))
            .collect();
        let target = format!("{}:{}", endpoint.host, endpoint.port);
        let connectors = state
            .rows::<rows::Connector>()
            .filter(|connector| !connector.revoked && connector.group.is_some_and(|group| groups.contains(&group)))
            .map(|connector| self.connector(&soft, state, connector, &target))
            .collect();
        drop(soft);
        path::choose(&path::Question { at: self.node, client: None, brokers, connectors, seed })
    }

    fn broker(&self, soft: &Soft, state: &State, broker: rows::Broker, end: Option<&str>) -> Option<path::Broker> {
        let own = broker.node == self.node;
        let heard = soft.brokers.get(&broker.node).filter(|heard| heard.alive());
        let (fresh, draining) = match heard {
            _ if own => (self.fresh.load(Ordering::Relaxed), self.load.lock().draining),
            Some(heard) => (heard.state.fresh, heard.state.draining),
            None => (false, false),
        };
        let client_rtt_ms = end.and_then(|end| {
            if own {
                return soft.ends.get(end).map(|rtt| millis(*rtt));
            }
            let there = heard?.state.ends.iter().find(|there| there.end == end)?;
            Some(there.rtt_us as f64 / 1_000.0)
        });
        Some(path::Broker {
            node: broker.node,
            name: broker.name,
            place: place_of(state, &broker.region),
            draining: draining || broker.draining,
            fresh,
            client_rtt_ms,
        })
    }

    fn connector(&self, soft: &Soft, state: &State, connector: rows::Connector, target: &str) -> path::Connector {
        let (id, group) = (connector.id(), connector.group.unwrap_or_default());
        let region = state.by_id::<rows::ConnectorGroup>(group).map(|group| group.region).unwrap_or_default();
        let mut found = path::Connector {
            id,
            name: connector.name,
            group,
            place: place_of(state, &region),
            unhealthy: None,
            links: Vec::new(),
            app_rtt_ms: None,
            load: 0.0,
        };
        let mut answers = false;
        let mut take = |link: path::Link, load: u32, down: bool, rtt: Option<&TargetRtt>| {
            found.links.push(link);
            found.load = found.load.max(f64::from(load) / 1_000.0);
            found.app_rtt_ms = found.app_rtt_ms.or(rtt.map(|rtt| rtt.rtt_us as f64 / 1_000.0));
            answers |= !down;
        };
        let of_target = |rtts: &'_ [TargetRtt]| {
            rtts.iter().position(|rtt| {
                target.rsplit_once(':').is_some_and(|(host, port)| host == rtt.host && port == rtt.port.to_string())
            })
        };
        if let Some(here) = soft.connectors.get(&id) {
            let heard_age_ms = here.heard.elapsed().as_millis() as u64;
            let link = path::Link { broker: self.node, heard_age_ms, rtt_ms: here.rtt.map(millis) };
            let rtt = of_target(&here.app_rtts).map(|at| &here.app_rtts[at]);
            take(link, here.load_permille, here.down.contains(target), rtt);
        }
        let text = id.to_string();
        for (node, heard) in soft.brokers.iter().filter(|(_, heard)| heard.alive()) {
            let Some(there) = heard.state.connectors.iter().find(|there| there.connector == text) else { continue };
            let heard_age_ms = heard.at.elapsed().as_millis() as u64;
            let rtt_ms = (there.rtt_us > 0).then_some(there.rtt_us as f64 / 1_000.0);
            let rtt = of_target(&there.rtts).map(|at| &there.rtts[at]);
            let down = there.down.iter().any(|down| down == target);
            take(path::Link { broker: *node, heard_age_ms, rtt_ms }, there.load_permille, down, rtt);
        }
        found.unhealthy = if found.links.is_empty() {
            let was = state.rows_under::<Availability>(&id.key()).any(|row| row.up);
            Some(if was { "its broker does not answer" } else { "not connected" }.into())
        } else {
            (!answers).then(|| "target does not answer".into())
        };
        found
    }
}

fn place_of(state: &State, region: &str) -> Option<Place> {
    let region = state.find::<rows::Region>(selvedge_domain::state::IndexKey::name(region))?;
    Some(Place { latitude: region.latitude, longitude: region.longitude })
}

fn smoothed(before: Option<Duration>, sample: Duration) -> Duration {
    match before {
        Some(before) => before - before / (1 << RTT_SMOOTHING) + sample / (1 << RTT_SMOOTHING),
        None => sample,
    }
}

fn micros(rtt: Duration) -> u64 {
    u64::try_from(rtt.as_micros()).unwrap_or(u64::MAX).max(1)
}

fn millis(rtt: Duration) -> f64 {
    rtt.as_secs_f64() * 1_000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(node: u64, connector: Id) -> SoftState {
        let connectors =
            vec![Attached { connector: connector.to_string(), stream: 1, rtt_us: 900, ..Default::default() }];
        SoftState { node, fresh: true, connectors, ..Default::default() }
    }

    #[test]
    fn a_connector_here_is_dialed_here_and_one_elsewhere_through_its_broker() {
        let routing = Routing::new(1);
        let (near, far) = (Id::new(1, 5), Id::new(1, 6));
        routing.attach(near, 10);
        routing.hear(told(2, near), None);
        routing.hear(told(3, far), None);
        assert_eq!(routing.via(near), Some(Via::Here));
        assert_eq!(routing.via(far), Some(Via::Broker(3)));
        assert_eq!(routing.via(Id::new(1, 7)), None);
        routing.detach(near, 9);
        assert_eq!(routing.via(near), Some(Via::Here), "an older stream's end changes nothing");
        routing.detach(near, 10);
        assert_eq!(routing.via(near), Some(Via::Broker(2)));
        routing.hear(SoftState { draining: true, ..told(2, near) }, None);
        routing.hear(told(3, near), None);
        assert_eq!(routing.via(near), Some(Via::Broker(3)), "the other one is about to go");
    }

    #[test]
    fn a_smoothed_rtt_follows_slowly() {
        let ms = Duration::from_millis;
        assert_eq!(smoothed(None, ms(80)), ms(80));
        assert_eq!(smoothed(Some(ms(80)), ms(160)), ms(90));
    }
}
