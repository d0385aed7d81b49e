//! Between the consensus library's types, the bytes that are stored and sent, and the records of `storage`.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use openraft::EmptyNode;
use prost::Message as _;
use selvedge_domain::{Id, Outcome, Rejected, RejectedCode};
use selvedge_proto::peer as wire;
use selvedge_storage::log::{self, Record};

use crate::raft_types::{Batch, Entry, LeaderId, LogId, Membership, Payload, StoredMembership, Vote};

/// Bytes that are not what they should be.
pub(crate) fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

pub(crate) fn log_id(id: &LogId) -> wire::LogId {
    wire::LogId { term: id.leader_id.term, node: id.leader_id.node_id, index: id.index }
}

pub(crate) fn log_id_back(id: &wire::LogId) -> LogId {
    LogId { leader_id: LeaderId { term: id.term, node_id: id.node }, index: id.index }
}

pub(crate) fn stored_log_id(id: &LogId) -> log::LogId {
    log::LogId { term: id.leader_id.term, node: id.leader_id.node_id, index: id.index }
}

pub(crate) fn stored_log_id_back(id: &log::LogId) -> LogId {
    LogId { leader_id: LeaderId { term: id.term, node_id: id.node }, index: id.index }
}

pub(crate) fn vote(vote: &Vote) -> wire::Vote {
    wire::Vote { term: vote.leader_id.term, node: vote.leader_id.node_id, committed: vote.committed }
}

pub(crate) fn vote_back(vote: Option<&wire::Vote>) -> Result<Vote, io::Error> {
    let vote = vote.ok_or_else(|| invalid("a message without its vote"))?;
    Ok(Vote { leader_id: LeaderId { term: vote.term, node_id: vote.node }, committed: vote.committed })
}

pub(crate) fn stored_vote(vote: &Vote) -> log::Vote {
    log::Vote { term: vote.leader_id.term, node: vote.leader_id.node_id, committed: vote.committed }
}

pub(crate) fn stored_vote_back(vote: &log::Vote) -> Vote {
    Vote { leader_id: LeaderId { term: vote.term, node_id: vote.node }, committed: vote.committed }
}

pub(crate) fn membership(membership: &Membership) -> wire::Membership {
    let set = |nodes: &BTreeSet<u64>| wire::NodeSet { nodes: nodes.iter().copied().collect() };
    wire::Membership {
        configs: membership.get_joint_config().iter().map(set).collect(),
        nodes: membership.nodes().map(|(node, _)| *node).collect(),
    }
}

pub(crate) fn membership_back(membership: &wire::Membership) -> Result<Membership, io::Error> {
    let configs: Vec<BTreeSet<u64>> =
        membership.configs.iter().map(|set| set.nodes.iter().copied().collect()).collect();
    if configs.is_empty() && membership.nodes.is_empty() {
        return Ok(Membership::default());
    }
    let nodes: BTreeMap<u64, EmptyNode> = membership.nodes.iter().map(|node| (*node, EmptyNode::new())).collect();
    Membership::new(configs, nodes).map_err(|_| invalid("a membership that is none"))
}

pub(crate) fn stored_membership(stored: &StoredMembership) -> wire::StoredMembership {
    wire::StoredMembership {
        log_id: stored.log_id().as_ref().map(log_id),
        membership: Some(membership(stored.membership())),
    }
}

pub(crate) fn stored_membership_back(stored: Option<&wire::StoredMembership>) -> Result<StoredMembership, io::Error> {
    let Some(stored) = stored else { return Ok(StoredMembership::default()) };
    let membership = stored.membership.as_ref().map_or_else(|| Ok(Membership::default()), membership_back)?;
    Ok(StoredMembership::new(stored.log_id.as_ref().map(log_id_back), membership))
}

pub(crate) fn record(entry: Entry) -> Record {
    let payload = match entry.payload {
        Payload::Blank => log::Payload::Blank,
        Payload::Normal(batch) => log::Payload::Normal(batch.0),
        Payload::Membership(change) => log::Payload::Membership(membership(&change).encode_to_vec().into()),
    };
    Record { id: stored_log_id(&entry.log_id), payload }
}

pub(crate) fn record_back(record: Record) -> Result<Entry, io::Error> {
    let payload = match record.payload {
        log::Payload::Blank => Payload::Blank,
        log::Payload::Normal(bytes) => Payload::Normal(Batch(bytes)),
        log::Payload::Membership(bytes) => {
            let change = wire::Membership::decode(bytes).map_err(|_| invalid("a stored membership that is none"))?;
            Payload::Membership(membership_back(&change)?)
        }
    };
    Ok(Entry { log_id: stored_log_id_back(&record.id), payload })
}

pub(crate) fn entry(entry: &Entry) -> wire::Entry {
    let payload = match &entry.payload {
        Payload::Blank => None,
        Payload::Normal(batch) => Some(wire::entry::Payload::Normal(batch.0.clone())),
        Payload::Membership(change) => Some(wire::entry::Payload::Membership(membership(change))),
    };
    wire::Entry { id: Some(log_id(&entry.log_id)), payload }
}

pub(crate) fn entry_back(entry: wire::Entry) -> Result<Entry, io::Error> {
    let id = entry.id.ok_or_else(|| invalid("an entry without its id"))?;
    let payload = match entry.payload {
        None => Payload::Blank,
        Some(wire::entry::Payload::Normal(bytes)) => Payload::Normal(Batch(bytes)),
        Some(wire::entry::Payload::Membership(change)) => Payload::Membership(membership_back(&change)?),
    };
    Ok(Entry { log_id: log_id_back(&id), payload })
}

pub(crate) fn position(id: Id) -> wire::Position {
    wire::Position { epoch: id.epoch, seq: id.seq }
}

pub(crate) fn position_back(position: Option<wire::Position>) -> Id {
    position.map(|position| Id::new(position.epoch, position.seq)).unwrap_or_default()
}

pub(crate) fn outcome(outcome: Outcome) -> wire::propose_reply::Result {
    match outcome {
        Outcome::Done { position: at, ids } => wire::propose_reply::Result::Done(wire::Done {
            position: Some(position(at)),
            ids: ids.into_iter().map(position).collect(),
        }),
        Outcome::Refused(refused) => wire::propose_reply::Result::Refused(rejected(refused)),
    }
}

pub(crate) fn done_back(done: wire::Done) -> Outcome {
    Outcome::Done {
        position: position_back(done.position),
        ids: done.ids.into_iter().map(|id| position_back(Some(id))).collect(),
    }
}

pub(crate) fn refused_back(refused: wire::Refused) -> Outcome {
    Outcome::Refused(rejected_back(refused))
}

pub(crate) fn rejected(rejected: Rejected) -> wire::Refused {
    wire::Refused { code: rejected.code as i32, message: rejected.message }
}

pub(crate) fn rejected_back(refused: wire::Refused) -> Rejected {
    let code = RejectedCode::try_from(refused.code).unwrap_or(RejectedCode::Before);
    Rejected::new(code, refused.message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_joint_membership_comes_back_as_it_was() {
        let joint = Membership::new(
            vec![BTreeSet::from([1, 2]), BTreeSet::from([2, 3])],
            BTreeMap::from([1, 2, 3, 9].map(|node| (node, EmptyNode::new()))),
        )
        .unwrap();
        assert_eq!(membership_back(&membership(&joint)).unwrap(), joint);
        let id = LogId { leader_id: LeaderId { term: 3, node_id: 2 }, index: 7 };
        let stored = StoredMembership::new(Some(id), joint.clone());
        assert_eq!(stored_membership_back(Some(&stored_membership(&stored))).unwrap(), stored);
        for payload in [Payload::Blank, Payload::Normal(Batch("hi".into())), Payload::Membership(joint)] {
            let made = Entry { log_id: id, payload };
            assert_eq!(record_back(record(made.clone())).unwrap(), made);
            assert_eq!(entry_back(entry(&made)).unwrap(), made);
        }
    }
}
