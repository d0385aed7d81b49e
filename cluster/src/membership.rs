//! Who is a member, and who leads.
//!
//! **Invariant:** a broker brings about for itself only what its place in the registry gives it; anything else is an
//! owner's, whose credential the leader has looked at.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use openraft::errors::{ClientWriteError, ForwardToLeader, RaftError};
use openraft::{ChangeMembers, EmptyNode};
use selvedge_domain::rows::{AdminRole, Broker, BrokerRole};
use selvedge_domain::{Asker, Credential, Rejected, RejectedCode, State};
use selvedge_proto::peer as wire;
use selvedge_proto::peer::change_request::Change;
use tokio::time::Instant;
use tonic::Request;

use crate::convert;
use crate::core::Core;
use crate::dial::Purpose;
use crate::error::{Error, Fatal};
use crate::metrics::CREDENTIALS_REFUSED_TOTAL;
use crate::raft_types::TypeConfig;

/// A change of the membership is retried for so long.
pub const CHANGE_TIMEOUT: Duration = Duration::from_secs(30);
/// Members of a cluster.
pub const MEMBERS_MAX: usize = 30;
/// A learner that is further behind is not made a voter yet.
const PROMOTE_LAG_ENTRIES_MAX: u64 = 1_000;
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(10);
const RETRY_INTERVAL: Duration = Duration::from_millis(100);
const KEEP_INTERVAL: Duration = Duration::from_millis(500);
const FAREWELL: Duration = Duration::from_millis(500);
const REMOVED_GRACE: Duration = Duration::from_secs(2);

/// What became of one attempt.
pub(crate) enum Attempt {
    Done,
    NotLeader(Option<u64>),
    /// It may go another time.
    Later(String),
    Failed(String),
    /// Who asks may not have it.
    Refused(Rejected),
}

type WriteError = RaftError<TypeConfig, ClientWriteError<TypeConfig>>;

/// Changes the membership, here or through the leader. Asking for what is so already changes nothing.
pub(crate) async fn change(core: &Arc<Core>, asker: &Asker, change: Change) -> Result<(), Error> {
    let credential = asker.credential.as_ref();
    let deadline = Instant::now() + CHANGE_TIMEOUT;
    let mut hint = None;
    let mut why = "no leader can be reached".to_owned();
    while Instant::now() < deadline {
        let attempt = match hint.take().or_else(|| core.leader()) {
            None => Attempt::NotLeader(None),
            Some(leader) if leader == core.node => change_here(core, core.node, credential, &change).await,
            Some(leader) => change_through(core, leader, credential, change.clone()).await,
        };
        match attempt {
            Attempt::Done => return Ok(()),
            Attempt::Failed(why) => return Err(Error::Membership(why)),
            Attempt::Refused(rejected) => return Err(Error::Refused(rejected)),
            Attempt::NotLeader(leader) => hint = leader.filter(|leader| *leader != core.node),
            Attempt::Later(reason) => why = reason,
        }
        core.pause(RETRY_INTERVAL).await.map_err(|_| Error::Unavailable)?;
    }
    Err(Error::Membership(why))
}

async fn change_through(core: &Core, leader: u64, credential: Option<&Credential>, change: Change) -> Attempt {
    let credential = credential.map(|credential| credential.reveal().to_owned()).unwrap_or_default();
    let mut request = Request::new(wire::ChangeRequest { change: Some(change), credential });
    request.set_timeout(ATTEMPT_TIMEOUT);
    let mut client = core.peer_client(leader, Purpose::Control);
    use wire::change_reply::Result as Reply;
    match tokio::time::timeout(ATTEMPT_TIMEOUT, client.change(request)).await {
        Ok(Ok(reply)) => match reply.into_inner().result {
            Some(Reply::Done(_)) => Attempt::Done,
            Some(Reply::NotLeader(not)) => Attempt::NotLeader((not.leader != 0).then_some(not.leader)),
            Some(Reply::Failed(why)) => Attempt::Failed(why),
            Some(Reply::Later(why)) => Attempt::Later(why),
            Some(Reply::Refused(refused)) => Attempt::Refused(convert::rejected_back(refused)),
            None => Attempt::Failed("an answer that is none".to_owned()),
        },
        Ok(Err(status)) => Attempt::Later(status.to_string()),
        Err(_) => Attempt::Later("the leader did not answer in time".to_owned()),
    }
}

/// One attempt, as the leader that this broker may be, for a broker that passes on what the holder of a credential asks
/// for, or asks for itself.
pub(crate) async fn change_here(
    core: &Arc<Core>,
    caller: u64,
    credential: Option<&Credential>,
    change: &Change,
) -> Attempt {
    // Who may what, and what the registry says, is judged in a state that nobody is ahead of.
    let state = match core.linearizable(ATTEMPT_TIMEOUT / 2).await {
        Ok(state) if core.leads() => state,
        _ => return Attempt::NotLeader(core.leader().filter(|leader| *leader != core.node)),
    };
    if let Err(rejected) = may_have(&state, caller, credential, change) {
        ::metrics::counter!(CREDENTIALS_REFUSED_TOTAL).increment(1);
        tracing::warn!(caller, ?change, reason = rejected.message, "refused a change of the membership");
        return Attempt::Refused(rejected);
    }
    match change {
        Change::TransferLeader(to) => match transfer(core, (*to != 0).then_some(*to)).await {
            Ok(()) => Attempt::Done,
            Err(error) => Attempt::Failed(error.to_string()),
        },
        change => attempt(core, &state, change).await,
    }
}

/// Whether the holder of a credential, or without one the broker that calls, may have a change.
fn may_have(state: &State, caller: u64, credential: Option<&Credential>, change: &Change) -> Result<(), Rejected> {
    if let Some(credential) = credential {
        let message = "the credential is not known, was revoked, or is somebody else's";
        let actor = credential.actor(state).ok_or_else(|| Rejected::new(RejectedCode::Unauthenticated, message))?;
        return state.need_role(&actor, AdminRole::Owner);
    }
    match change {
        // Its enrolment is what makes a broker a member; others only pass on that it is there.
        Change::AddLearner(_) => Ok(()),
        Change::Promote(node) if *node == caller => Ok(()),
        Change::Promote(_) | Change::Remove(_) | Change::TransferLeader(_) => {
            Err(Rejected::new(RejectedCode::Forbidden, "an owner's credential is needed"))
        }
    }
}

async fn attempt(core: &Arc<Core>, state: &State, change: &Change) -> Attempt {
    let Ok(_one_at_a_time) = core.changing.try_lock() else {
        return Attempt::Later("another change of the membership is under way".to_owned());
    };
    let membership = core.metrics().membership_config;
    let membership = membership.membership();
    if membership.get_joint_config().len() > 1 {
        return Attempt::Later("another change of the membership is under way".to_owned());
    }
    let is_voter = |node: u64| membership.voter_ids().any(|voter| voter == node);
    let row = |node: u64| state.row::<Broker>(&node.to_be_bytes());
    let result = match change {
        Change::AddLearner(add) => {
            core.dialer.learn(add.node, &add.address);
            if membership.get_node(&add.node).is_some() {
                return Attempt::Done;
            }
            match row(add.node) {
                None => return Attempt::Failed(format!("broker `{}` was never enrolled", add.node)),
                Some(row) if row.removed => return Attempt::Failed(format!("broker `{}` was removed", add.node)),
                Some(_) => {}
            }
            if membership.nodes().count() >= MEMBERS_MAX {
                return Attempt::Failed(format!("a cluster has at most {MEMBERS_MAX} members"));
            }
            core.raft.add_learner(add.node, EmptyNode::new(), false).await.map(drop)
        }
        Change::Promote(node) => {
            if is_voter(*node) {
                return Attempt::Done;
            }
            if membership.get_node(node).is_none() {
                return Attempt::Failed(format!("broker `{node}` is not a member"));
            }
            if !row(*node).is_some_and(|row| !row.removed && row.has(BrokerRole::Voter)) {
                return Attempt::Failed(format!("broker `{node}` does not have the role `voter`"));
            }
            // Another leader would not know that it has to wait.
            if core.waits() {
                return Attempt::Later("leases of the epoch before this one may still run".to_owned());
            }
            if !has_caught_up(core, *node) {
                return Attempt::Later(format!("broker `{node}` has not caught up yet"));
            }
            let voters = ChangeMembers::AddVoterIds(BTreeSet::from([*node]));
            core.raft.change_membership(voters, true).await.map(drop)
        }
        Change::Remove(node) => {
            if membership.get_node(node).is_none() {
                return Attempt::Done;
            }
            if !row(*node).is_some_and(|row| row.removed) {
                return Attempt::Failed(format!("broker `{node}` was not removed from the registry"));
            }
            // As long as it is a member it hears of its removal, if it hears at all.
            if core.pause(FAREWELL).await.is_err() {
                return Attempt::Failed("this broker stops".to_owned());
            }
            if is_voter(*node) {
                if membership.voter_ids().count() == 1 {
                    return Attempt::Failed("the last voter cannot be removed".to_owned());
                }
                let voters = ChangeMembers::RemoveVoters(BTreeSet::from([*node]));
                core.raft.change_membership(voters, false).await.map(drop)
            } else {
                let nodes = ChangeMembers::RemoveNodes(BTreeSet::from([*node]));
                core.raft.change_membership(nodes, false).await.map(drop)
            }
        }
        Change::TransferLeader(_) => return Attempt::Failed("that changes no membership".to_owned()),
    };
    match result {
        Ok(()) => Attempt::Done,
        Err(error) => judge(error),
    }
}

/// While this broker leads: finishes a change that a leader before it began, and lets go of members that the registry
/// says are removed. One that is removed itself ends.
pub(crate) async fn keep(core: Arc<Core>) {
    while core.pause(KEEP_INTERVAL).await.is_ok() {
        let state = core.published.state();
        let removed = |node: &u64| state.row::<Broker>(&node.to_be_bytes()).is_some_and(|row| row.removed);
        if removed(&core.node) {
            // Who asked for it through this broker is answered before.
            let _ = core.pause(REMOVED_GRACE).await;
            return core.fail(Fatal::Removed);
        }
        if !core.leads() {
            continue;
        }
        let membership = core.metrics().membership_config;
        let membership = membership.membership();
        if membership.get_joint_config().len() > 1 {
            finish(&core).await;
            continue;
        }
        let Some(node) = membership.nodes().map(|(node, _)| *node).find(removed) else { continue };
        if let Attempt::Later(why) | Attempt::Failed(why) = attempt(&core, &state, &Change::Remove(node)).await {
            tracing::debug!(node, why, "a removed broker is still a member");
        }
    }
}

/// Leads from a joint configuration, which only a leader's end leaves behind, to the one that it leads to.
async fn finish(core: &Core) {
    let Ok(_one_at_a_time) = core.changing.try_lock() else { return };
    tracing::info!("finishing a change of the membership that another leader began");
    // Adding nobody flattens what is there.
    let nobody = ChangeMembers::AddVoterIds(BTreeSet::new());
    if let Err(error) = core.raft.change_membership(nobody, false).await {
        tracing::debug!(%error, "it is not finished yet");
    }
}

fn judge(error: WriteError) -> Attempt {
    match error {
        RaftError::APIError(
            ClientWriteError::ForwardToLeader(ForwardToLeader { leader_id, .. })
            | ClientWriteError::LogEntryDiscarded(ForwardToLeader { leader_id, .. }),
        ) => Attempt::NotLeader(leader_id),
        // One change at a time: whoever leads finishes the one under way.
        RaftError::APIError(error) => Attempt::Later(error.to_string()),
        // This leader stops: whoever leads next may have it already, or does it.
        RaftError::Fatal(error) => Attempt::Later(error.to_string()),
    }
}

fn has_caught_up(core: &Core, node: u64) -> bool {
    let metrics = core.metrics();
    let Some(Some(matched)) = metrics.replication.as_ref().and_then(|nodes| nodes.get(&node)) else { return false };
    metrics.last_log_index.unwrap_or(0).saturating_sub(matched.index) <= PROMOTE_LAG_ENTRIES_MAX
}

/// Hands leadership to a voter, by default the one that has the most of the log. Does nothing when this broker does
/// not lead.
pub(crate) async fn transfer(core: &Core, to: Option<u64>) -> Result<(), Error> {
    let metrics = core.metrics();
    if metrics.current_leader != Some(core.node) {
        return Ok(());
    }
    let voters: BTreeSet<u64> = metrics.membership_config.membership().voter_ids().collect();
    let replication = metrics.replication.unwrap_or_default();
    let most = || {
        let others = replication.iter().filter(|(node, _)| **node != core.node && voters.contains(node));
        others.max_by_key(|(_, matched)| matched.as_ref().map(|id| id.index)).map(|(node, _)| *node)
    };
    let to = match to {
        Some(to) if voters.contains(&to) => to,
        Some(to) => return Err(Error::Membership(format!("broker `{to}` is not a voter"))),
        None => most().ok_or_else(|| Error::Membership("there is no other voter".to_owned()))?,
    };
    if to == core.node {
        return Ok(());
    }
    tracing::info!(to, "handing leadership over");
    core.raft.trigger().transfer_leader(to).await.map_err(|error| Error::Raft(error.to_string()))
}
