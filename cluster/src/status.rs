//! How the cluster looks from this broker.

use openraft::Instant as _;
use serde::Serialize;

use crate::core::Core;

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
    /// Index of the last entry applied here.
    pub applied: Option<u64>,
    /// Index of the last entry enforced here.
    pub enforced: Option<u64>,
    /// Position of the state here.
    pub position: selvedge_domain::Id,
    /// Hash of the state here, in hex.
    pub state_hash: String,
    /// Voters and learners.
    pub members: Vec<Member>,
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
        let last_contact_ms = heard.map(|at| u64::try_from(at.elapsed().as_millis()).unwrap_or(u64::MAX));
        Member {
            node,
            voter: voters.contains(&node),
            matched,
            lag_entries: matched.filter(|_| leads).map(|at| metrics.last_log_index.unwrap_or(0).saturating_sub(at)),
            last_contact_ms: if own { Some(0) } else { last_contact_ms },
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
        applied: before(*core.published.applied().borrow()),
        enforced: before(core.enforced.borrow().next_index),
        position: state.position(),
        state_hash: hex::encode(state.state_hash()),
        members: membership.nodes().map(|(node, _)| member(*node)).collect(),
        lease_left_ms: core.lease.left_ms(),
        now_ms: core.published.now_ms(),
    }
}
