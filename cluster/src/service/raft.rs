//! Raft's calls.

use std::io::Write as _;

use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, TransferLeaderError, TransferLeaderRequest, VoteRequest, VoteResponse,
};
use selvedge_proto::peer as wire;
use selvedge_proto::peer::raft_server;
use tonic::{Request, Response, Status, Streaming};

use crate::acquaintance::Acquaintances;
use crate::convert;
use crate::listen::Caller;
use crate::network::SNAPSHOT_IDLE_TIMEOUT;
use crate::raft_types::{Raft, Snapshot, SnapshotMeta, TypeConfig, Vote};
use crate::snapshot::{SnapshotData, SnapshotFile, Snapshots};

pub(crate) struct RaftService {
    pub(crate) raft: Raft,
    pub(crate) acquaintances: Acquaintances,
    pub(crate) snapshots: Snapshots,
}

fn bad(error: std::io::Error) -> Status {
    Status::invalid_argument(error.to_string())
}

fn stopped(error: impl std::fmt::Display) -> Status {
    Status::unavailable(format!("raft: {error}"))
}

impl RaftService {
    /// A caller speaks for itself only: the vote in its message is its own.
    fn vote_of(&self, caller: &Caller, vote: Option<&wire::Vote>) -> Result<Vote, Status> {
        let vote = convert::vote_back(vote).map_err(bad)?;
        if vote.leader_id.node_id == caller.node {
            Ok(vote)
        } else {
            Err(Status::permission_denied("the vote is another node's"))
        }
    }

    /// The caller, which has met this process.
    fn known<T>(&self, request: &Request<T>) -> Result<Caller, Status> {
        let caller = Caller::of(request)?;
        if self.acquaintances.has_met(caller.node) {
            Ok(caller)
        } else {
            Err(Status::failed_precondition("these two have not met"))
        }
    }

    fn vote_request(&self, request: Request<wire::VoteRequest>) -> Result<VoteRequest<TypeConfig>, Status> {
        let caller = self.known(&request)?;
        let request = request.into_inner();
        self.acquaintances.judge_candidate(request.last.as_ref())?;
        let vote = self.vote_of(&caller, request.vote.as_ref())?;
        let mut rpc = VoteRequest::new(vote, request.last.as_ref().map(convert::log_id_back));
        rpc.leadership_transfer = request.leadership_transfer;
        Ok(rpc)
    }
}

/// A leader has nothing of a later term than its own.
fn not_beyond(vote: &Vote, id: Option<&wire::LogId>) -> Result<(), Status> {
    match id {
        Some(id) if id.term > vote.leader_id.term => {
            Err(Status::invalid_argument("an entry of a later term than the vote of its sender"))
        }
        _ => Ok(()),
    }
}

/// Raft takes it for granted, and a broker would end by anything else.
fn follow_each_other<'a>(
    mut before: Option<&'a wire::LogId>,
    ids: impl Iterator<Item = Option<&'a wire::LogId>>,
) -> Result<(), Status> {
    for id in ids {
        let follows = id.is_some_and(|id| match before {
            Some(before) => before.index.checked_add(1) == Some(id.index) && id.term >= before.term,
            None => id.index == 0,
        });
        if !follows {
            return Err(Status::invalid_argument("entries that do not follow each other"));
        }
        before = id;
    }
    Ok(())
}

async fn next_chunk(chunks: &mut Streaming<wire::SnapshotChunk>) -> Result<Option<wire::SnapshotChunk>, Status> {
    let next = tokio::time::timeout(SNAPSHOT_IDLE_TIMEOUT, chunks.message()).await;
    next.map_err(|_| Status::deadline_exceeded("the snapshot does not move"))?
}

fn vote_reply(reply: &VoteResponse<TypeConfig>) -> Response<wire::VoteReply> {
    Response::new(wire::VoteReply {
        vote: Some(convert::vote(&reply.vote)),
        granted: reply.vote_granted,
        last: reply.last_log_id.as_ref().map(convert::log_id),
    })
}

#[tonic::async_trait]
impl raft_server::Raft for RaftService {
    async fn greet(&self, request: Request<wire::GreetRequest>) -> Result<Response<wire::GreetReply>, Status> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        if request.own.as_ref().is_some_and(|own| own.suspect) {
            // What it lost is sent to it again, if this broker leads.
            let allowed = self.raft.trigger().allow_next_revert(&caller.node, true).await;
            tracing::debug!(node = caller.node, ?allowed, "met a broker that lost the end of its log");
        }
        self.acquaintances.greeted(caller.node, request).map(Response::new)
    }

    async fn append(&self, request: Request<wire::AppendRequest>) -> Result<Response<wire::AppendReply>, Status> {
        let caller = self.known(&request)?;
        let request = request.into_inner();
        let vote = self.vote_of(&caller, request.vote.as_ref())?;
        let ids = request.entries.iter().map(|entry| entry.id.as_ref());
        ids.clone().chain([request.prev.as_ref()]).try_for_each(|id| not_beyond(&vote, id))?;
        follow_each_other(request.prev.as_ref(), ids)?;
        let rpc = AppendEntriesRequest {
            vote,
            prev_log_id: request.prev.as_ref().map(convert::log_id_back),
            entries: request.entries.into_iter().map(convert::entry_back).collect::<Result<_, _>>().map_err(bad)?,
            leader_commit: request.leader_commit.as_ref().map(convert::log_id_back),
        };
        use wire::append_reply::Result as Reply;
        let result = match self.raft.append_entries(rpc).await.map_err(stopped)? {
            AppendEntriesResponse::Success => Reply::Success(wire::Empty {}),
            AppendEntriesResponse::PartialSuccess(upto) => {
                Reply::Partial(wire::PartialSuccess { upto: upto.as_ref().map(convert::log_id) })
            }
            AppendEntriesResponse::Conflict => Reply::Conflict(wire::Empty {}),
            AppendEntriesResponse::HigherVote(vote) => Reply::HigherVote(convert::vote(&vote)),
        };
        Ok(Response::new(wire::AppendReply { result: Some(result) }))
    }

    async fn vote(&self, request: Request<wire::VoteRequest>) -> Result<Response<wire::VoteReply>, Status> {
        let rpc = self.vote_request(request)?;
        Ok(vote_reply(&self.raft.vote(rpc).await.map_err(stopped)?))
    }

    async fn pre_vote(&self, request: Request<wire::VoteRequest>) -> Result<Response<wire::VoteReply>, Status> {
        // A pre-vote asks for the term after the caller's; it is the caller's all the same.
        let rpc = self.vote_request(request)?;
        Ok(vote_reply(&self.raft.pre_vote(rpc).await.map_err(stopped)?))
    }

    async fn snapshot(
        &self,
        request: Request<Streaming<wire::SnapshotChunk>>,
    ) -> Result<Response<wire::SnapshotReply>, Status> {
        let caller = self.known(&request)?;
        let mut chunks = request.into_inner();
        // What is judged by its head is refused before anything of it is kept.
        let first = next_chunk(&mut chunks).await?.unwrap_or_default();
        let head = first.head.ok_or_else(|| Status::invalid_argument("a snapshot without its head"))?;
        let vote = self.vote_of(&caller, head.vote.as_ref())?;
        not_beyond(&vote, head.last.as_ref())?;
        let path = self.snapshots.new_path();
        let mut file = std::fs::File::create(&path).map_err(|error| Status::internal(error.to_string()))?;
        let data = SnapshotData::File(std::sync::Arc::new(SnapshotFile::new(path)));
        let mut next = Some(first.data);
        while let Some(bytes) = next {
            let write = move || file.write_all(&bytes).map(|()| file);
            let written = self.snapshots.blocking().run(write).await;
            file = written.map_err(|error| Status::internal(error.to_string()))?;
            next = next_chunk(&mut chunks).await?.map(|chunk| chunk.data);
        }
        let meta = SnapshotMeta {
            last_log_id: head.last.as_ref().map(convert::log_id_back),
            last_membership: convert::stored_membership_back(head.membership.as_ref()).map_err(bad)?,
        };
        let (checked, said) = (data.clone(), meta.clone());
        self.snapshots.blocking().run(move || checked.verify(&said)).await.map_err(bad)?;
        let reply = self.raft.install_full_snapshot(vote, Snapshot { meta, snapshot: data }).await.map_err(stopped)?;
        Ok(Response::new(wire::SnapshotReply { vote: Some(convert::vote(&reply.vote)) }))
    }

    async fn transfer_leader(
        &self,
        request: Request<wire::TransferRequest>,
    ) -> Result<Response<wire::TransferReply>, Status> {
        let caller = self.known(&request)?;
        let request = request.into_inner();
        let from = self.vote_of(&caller, request.from.as_ref())?;
        let rpc = TransferLeaderRequest::new(from, request.to, request.last.as_ref().map(convert::log_id_back));
        use wire::transfer_reply::Result as Reply;
        let result = match self.raft.handle_transfer_leader(rpc).await.map_err(stopped)? {
            Ok(()) => Reply::Accepted(wire::Empty {}),
            Err(TransferLeaderError::VoteChanged { expected, actual }) => Reply::VoteChanged(wire::VoteChanged {
                expected: Some(convert::vote(&expected)),
                actual: Some(convert::vote(&actual)),
            }),
            Err(TransferLeaderError::LogNotFlushed { expected, actual }) => Reply::NotFlushed(wire::NotFlushed {
                expected: expected.as_ref().map(convert::log_id),
                actual: actual.as_ref().map(convert::log_id),
            }),
        };
        Ok(Response::new(wire::TransferReply { result: Some(result) }))
    }
}
