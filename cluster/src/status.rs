//! How the cluster looks from this broker.

use std::collections::BTreeSet;

use ::metrics::gauge;
use openraft::Instant as _;
use serde::Serialize;

use crate::core::Core;
use crate::metrics::{
    ENFORCED_LAG_ENTRIES, LEADER, LEASE_LEFT_SECONDS, PEER_LAG_ENTRIES, PEER_SILENT_SECONDS, RESTORED_HELD,
    SNAPSHOT_AGE_SECONDS, TERM, TIME_SKEW_SECONDS,
};

/// How the cluster looks from this broker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Status {
    /// The cluster, in hex.
    pub cluster_id: String,
    /// Epoch of the log.
    pub epoch: u32,
    /// This broker.
    pub node: u64,
    /// Who leads.
    pub leader: Option<u64>,
    /// Raft's term.
    pub term: u64,
    /// Index of the last entry in this broker's log.
    pub last_log: Option<u64>,
    /// Index up to which this broker's log is cut.
    pub purged: Option<u64>,
    /// Index of the last entry applied here.
    pub applied: Option<u64>,
    /// Index of the last entry enforced here.
    pub enforced: Option<u64>,
    /// Position of the state here.
    pub position: selvedge_domain::Id,
    /// Hash of the state here, in hex.
    pub state_hash: String,
    /// Version of the rules in force.
    pub version: u32,
    /// Voters and learners.
    pub members: Vec<Member>,
    /// A change of the voters is under way: two sets of them decide together.
    pub joint: bool,
    /// What is left of this broker's freshness lease, milliseconds.
    pub lease_left_ms: u64,
    /// Cluster time, milliseconds.
    pub now_ms: u64,
}

/// A voter or learner.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Member {
    /// Node id.
    pub node: u64,
    /// Votes; a learner otherwise.
    pub voter: bool,
    /// Index up to which its log is known to be the leader's; on the leader only.
    pub matched: Option<u64>,
    /// Entries that it is behind; on the leader only.
    pub lag_entries: Option<u64>,
    /// Since it last answered, milliseconds; on the leader only.
    pub last_contact_ms: Option<u64>,
    /// The newest version of the rules that its build knows; none when it was not heard lately.
    pub version: Option<u32>,
    /// Its build.
    pub build: Option<String>,
}

pub(crate) fn status(core: &Core) -> Status {
    let metrics = core.metrics();
    let leads = metrics.current_leader == Some(core.node);
    let membership = metrics.membership_config.membership();
    let voters: Vec<u64> = membership.voter_ids().collect();
    let member = |node: u64| {
        let own = leads && node == core.node;
        let matched = if own {
            metrics.last_log_index
        } else {
            let matched = metrics.replication.as_ref().and_then(|nodes| nodes.get(&node).copied().flatten());
            matched.map(|id| id.index)
        };
        let heard = metrics.heartbeat.as_ref().and_then(|nodes| nodes.get(&node).copied().flatten());
        let build = core.build_of(node);
        let last_contact_ms = heard.map(|at| u64::try_from(at.elapsed().as_millis()).unwrap_or(u64::MAX));
        Member {
            node,
            voter: voters.contains(&node),
            matched,
            lag_entries: matched.filter(|_| leads).map(|at| metrics.last_log_index.unwrap_or(0).saturating_sub(at)),
            last_contact_ms: if own { Some(0) } else { last_contact_ms },
            version: build.as_ref().map(|build| build.version),
            build: build.map(|build| build.name),
        }
    };
    let state = core.published.state();
    let before = |next: u64| next.checked_sub(1);
    Status {
        cluster_id: hex::encode(core.cluster_id),
        epoch: state.position().epoch,
        node: core.node,
        leader: metrics.current_leader,
        term: metrics.current_term,
        last_log: metrics.last_log_index,
        purged: metrics.purged.map(|id| id.index),
        applied: before(*core.published.applied().borrow()),
        enforced: before(*core.enforced.borrow()),
        position: state.position(),
        state_hash: hex::encode(state.state_hash()),
        version: state.version(),
        joint: membership.get_joint_config().len() > 1,
        members: membership.nodes().map(|(node, _)| member(*node)).collect(),
        lease_left_ms: core.lease.left_ms(),
        now_ms: core.published.now_ms(),
    }
}

/// Sets what can be read at any time into gauges; to be called a few times a second.
pub(crate) struct Gauges {
    /// Members that have gauges; those of one that left, or of a broker that no longer leads, go to 0.
    peers: BTreeSet<u64>,
    snapshot: Option<u64>,
    snapshot_at_ms: u64,
}

impl Gauges {
    pub(crate) fn new(core: &Core) -> Self {
        Self { peers: BTreeSet::new(), snapshot: None, snapshot_at_ms: core.clock.boottime_ms() }
    }

    pub(crate) fn set(&mut self, core: &Core) {
        let Status { node, leader, term, last_log, applied, enforced, members, lease_left_ms, now_ms, .. } =
            status(core);
        let seconds = |ms: u64| ms as f64 / 1_000.0;
        gauge!(LEADER).set(f64::from(u8::from(leader == Some(node))));
        gauge!(TERM).set(term as f64);
        gauge!(LEASE_LEFT_SECONDS).set(seconds(lease_left_ms));
        let (applied, enforced) = (applied.unwrap_or(0), enforced.unwrap_or(0));
        gauge!(ENFORCED_LAG_ENTRIES).set(applied.saturating_sub(enforced) as f64);
        let (wall_ms, boottime_ms) = (core.clock.wall_ms(), core.clock.boottime_ms());
        let skew = seconds(wall_ms.abs_diff(now_ms));
        gauge!(TIME_SKEW_SECONDS).set(if wall_ms < now_ms { -skew } else { skew });

        let held = core.published.state().cluster().is_some_and(|cluster| cluster.held_before_epoch != 0);
        gauge!(RESTORED_HELD).set(f64::from(u8::from(held)));
        let snapshot = core.metrics().snapshot.map(|id| id.index);
        if snapshot != self.snapshot {
            (self.snapshot, self.snapshot_at_ms) = (snapshot, boottime_ms);
        }
        gauge!(SNAPSHOT_AGE_SECONDS).set(seconds(boottime_ms.saturating_sub(self.snapshot_at_ms)));

        let others: Vec<Member> = members.into_iter().filter(|member| member.node != node).collect();
        for gone in self.peers.iter().filter(|peer| others.iter().all(|other| other.node != **peer)) {
            peer(*gone, 0.0, 0.0);
        }
        self.peers = others.iter().map(|other| other.node).collect();
        for other in others {
            // One that has never answered has nothing.
            let lag = if leader == Some(node) { other.lag_entries.or(last_log).unwrap_or(0) } else { 0 };
            let silent_ms = other.last_contact_ms.unwrap_or(0);
            peer(other.node, lag as f64, seconds(silent_ms));
        }
    }
}

fn peer(node: u64, lag_entries: f64, silent_seconds: f64) {
    let node = node.to_string();
    gauge!(PEER_LAG_ENTRIES, "node" => node.clone()).set(lag_entries);
    gauge!(PEER_SILENT_SECONDS, "node" => node).set(silent_seconds);
}
