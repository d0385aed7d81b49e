//! What ends are told without asking: brokers, zones, knock keys, targets.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use prost::Message as _;
use selvedge_domain::name::Pattern;
use selvedge_domain::policy::Principal;
use selvedge_domain::rows::{self, Segment, Zone};
use selvedge_domain::{Id, State, policy, state::IndexKey};
use selvedge_proto::control::from_broker::Message as Out;
use selvedge_proto::control::{Broker, BrokerList, Brokers, KnockKeys, Target, Targets, Zones};
use selvedge_proto::identity::Kind;
use tokio_util::sync::CancellationToken;

use super::ends::End;
use super::{Edge, control, knock, resolve};

/// Names outside the zones that one end is told.
pub const NAMES_TOLD_MAX: usize = 1_000;
/// Targets that one connector is told to check.
pub const TARGETS_TOLD_MAX: usize = 1_000;
/// Ports of one range that a connector is told to check.
const PORTS_OF_RANGE_MAX: u32 = 16;
/// A list is signed again after so long, so that ends see that it is current.
const LIST_INTERVAL: Duration = Duration::from_secs(600);
/// Changes of the brokers' rows that come together are told together.
const LIST_PAUSE: Duration = Duration::from_millis(100);

/// The brokers that serve ends, as a state has them.
pub fn broker_list(state: &State, now_ms: u64) -> BrokerList {
    BrokerList { position: Some(control::position(state.position())), time_ms: now_ms, brokers: brokers(state) }
}

fn brokers(state: &State) -> Vec<Broker> {
    let serving = state.rows::<rows::Broker>().filter(|broker| !broker.removed && !broker.edge.is_empty());
    serving.map(|broker| wire_broker(state, broker)).collect()
}

/// A broker as ends are told of it.
pub(super) fn wire_broker(state: &State, broker: rows::Broker) -> Broker {
    let region = state.find::<rows::Region>(IndexKey::name(&broker.region));
    let (latitude, longitude) = region.map(|region| (region.latitude, region.longitude)).unwrap_or_default();
    Broker {
        node: broker.node,
        name: broker.name,
        host: broker.host,
        edge: broker.edge,
        region: broker.region,
        latitude,
        longitude,
        draining: broker.draining,
        web: broker.web,
    }
}

/// Signs a new list whenever the brokers change, until `stop`. Without an issuer here there is none.
pub(super) async fn keep_list(edge: Arc<Edge>, stop: CancellationToken) {
    let Some(issuer) = edge.issuer.clone() else { return };
    let mut states = edge.ground.subscribe();
    let mut signed: Option<Vec<Broker>> = None;
    loop {
        let state = states.borrow_and_update().clone();
        let now = brokers(&state);
        if signed.as_ref() != Some(&now) {
            let list = BrokerList { brokers: now.clone(), ..broker_list(&state, edge.ground.now_ms()) }.encode_to_vec();
            match issuer.sign_list(&list) {
                Ok((signature, signer)) => {
                    edge.brokers.send_replace(Some(Brokers { list, signature, signer }));
                    signed = Some(now);
                }
                Err(error) => tracing::error!(%error, "the list of brokers was not signed"),
            }
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(LIST_INTERVAL) => signed = None,
            changed = states.changed() => {
                if changed.is_err() {
                    return;
                }
                tokio::time::sleep(LIST_PAUSE).await;
            }
        }
    }
}

/// What one end was told last, so that it is told again only what changed.
#[derive(Default)]
pub(super) struct Told {
    keys: Option<(Vec<u8>, u64)>,
    revision: Option<(u64, Vec<u8>)>,
}

impl Told {
    /// Knock keys, when the day or the secret is another.
    pub(super) fn refresh_keys(&mut self, edge: &Edge, end: &End) {
        let now_ms = edge.ground.now_ms();
        let secret = edge.ground.state().cluster().map(|row| row.knock_secret).unwrap_or_default();
        let key = (secret, now_ms / knock::DAY_MS);
        if !key.0.is_empty() && self.keys.as_ref() != Some(&key) {
            end.send(Out::KnockKeys(KnockKeys { keys: knock::keys_at(&key.0, now_ms) }));
            self.keys = Some(key);
        }
    }

    /// Zones and names, or targets, when the policy set or the end's own row changed.
    pub(super) fn refresh(&mut self, edge: &Edge, end: &End, state: &State) {
        self.refresh_keys(edge, end);
        let revision = (policy::revision(state), own_row(state, end));
        if self.revision.as_ref() == Some(&revision) {
            return;
        }
        self.revision = Some(revision);
        if end.kind() == Kind::Connector {
            end.send(Out::Targets(Targets { targets: targets(state, end.subject) }));
        } else {
            let zones = state.rows::<Zone>().map(|zone| zone.name).collect();
            end.send(Out::Zones(Zones { zones, names: names(edge, end, state) }));
        }
    }
}

fn own_row(state: &State, end: &End) -> Vec<u8> {
    match end.caller.as_ref().map(|caller| caller.principal) {
        Some(Principal::User(id)) => encoded(state.by_id::<rows::User>(id)),
        Some(Principal::Workload(id)) => encoded(state.by_id::<rows::Workload>(id)),
        _ if end.kind() == Kind::Connector => encoded(state.by_id::<rows::Connector>(end.subject)),
        _ => Vec::new(),
    }
}

fn encoded<R: rows::Row>(row: Option<R>) -> Vec<u8> {
    row.map(|row| row.encode_to_vec()).unwrap_or_default()
}

/// Exact names outside the zones that this end may use now.
fn names(edge: &Edge, end: &End, state: &State) -> Vec<String> {
    let Some(caller) = &end.caller else { return Vec::new() };
    let indexes = edge.decider.indexes(state);
    let hosts: BTreeSet<String> = state
        .rows::<Segment>()
        .flat_map(|segment| segment.hosts)
        .filter_map(|host| match Pattern::parse(&host) {
            Ok(Pattern::Exact(name)) => Some(name),
            _ => None,
        })
        .filter(|name| !indexes.segments.in_zone(&selvedge_domain::name::Host::Name(name.clone())))
        .take(NAMES_TOLD_MAX)
        .collect();
    let may_use = |name: &String| {
        let host = selvedge_domain::name::Host::Name(name.clone());
        resolve::reachable(edge, state, caller, &host).is_some()
    };
    hosts.into_iter().filter(may_use).collect()
}

/// Exact hosts and ports of the segments that a connector's group reaches.
fn targets(state: &State, connector: Id) -> Vec<Target> {
    let group = state.by_id::<rows::Connector>(connector).and_then(|row| row.group);
    let reached =
        state.rows::<Segment>().filter(|segment| group.is_some_and(|g| segment.connector_groups.contains(&g)));
    let mut targets = Vec::new();
    for segment in reached {
        let exact = segment.hosts.iter().filter(|host| matches!(Pattern::parse(host), Ok(Pattern::Exact(_)))).cloned();
        let single = segment.networks.iter().filter_map(|network| {
            let network = selvedge_domain::segment::parse_network(network)?;
            (network.prefix_len() == network.max_prefix_len()).then(|| network.addr().to_string())
        });
        let tcp = |range: &&rows::PortRange| range.transport == rows::Transport::Tcp as i32;
        for host in exact.chain(single) {
            for range in segment.ports.iter().filter(tcp) {
                let last = range.last.min(range.first.saturating_add(PORTS_OF_RANGE_MAX - 1));
                targets.extend((range.first..=last).map(|port| Target { host: host.clone(), port }));
                if targets.len() >= TARGETS_TOLD_MAX {
                    targets.truncate(TARGETS_TOLD_MAX);
                    return targets;
                }
            }
        }
    }
    targets
}
