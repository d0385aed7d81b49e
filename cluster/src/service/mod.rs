//! What this broker answers on the peer listener.

mod peer;
mod raft;

pub(crate) use peer::PeerService;
pub(crate) use raft::RaftService;
