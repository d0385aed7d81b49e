//! Raft's network: one client for each broker, over gRPC.

use std::future::Future;
use std::io::{self, Write};
use std::time::Duration;

use futures::StreamExt as _;
use openraft::errors::{NetworkError, RPCError, ReplicationClosed, StreamingError, Unreachable};
use openraft::network::RPCOption;
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, TransferLeaderError, TransferLeaderRequest,
    TransferLeaderResponse, VoteRequest, VoteResponse,
};
use openraft::{EmptyNode, OptionalSend, RaftNetworkFactory, RaftNetworkV2};
use selvedge_proto::peer as wire;
use selvedge_proto::peer::raft_client::RaftClient;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status};

use crate::convert;
use crate::dial::{Dialer, PeerChannel, Purpose};
use crate::metrics::SNAPSHOTS_TOTAL;
use crate::raft_types::{Snapshot, TypeConfig, Vote};
use crate::snapshot::SnapshotData;

/// Bytes of one message between brokers; larger ones are refused.
pub const MESSAGE_BYTES_MAX: usize = 16 << 20;
/// Bytes of one chunk of a snapshot.
pub const SNAPSHOT_CHUNK_BYTES: usize = 1 << 20;
/// Chunks of a snapshot that wait to be sent.
const SNAPSHOT_CHUNKS_MAX: usize = 4;
/// A snapshot of which nothing moves for so long is given up.
pub(crate) const SNAPSHOT_IDLE_TIMEOUT: Duration = Duration::from_secs(30);

/// Makes the clients.
#[derive(Clone)]
pub(crate) struct Network {
    pub(crate) dialer: Dialer,
    /// An append call that is not answered for so long is given up. Longer than a heartbeat: entries take time.
    pub(crate) append_timeout: Duration,
}

impl Network {
    fn client(&self, target: u64, purpose: Purpose) -> Client {
        let raft = RaftClient::new(self.dialer.channel(target, purpose))
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
        Client { raft, append_timeout: self.append_timeout }
    }
}

impl RaftNetworkFactory<TypeConfig> for Network {
    type Network = Client;

    async fn new_client(&mut self, target: u64, _node: &EmptyNode) -> Client {
        self.client(target, Purpose::Raft)
    }

    async fn new_snapshot_client(&mut self, target: u64, _node: &EmptyNode) -> Client {
        self.client(target, Purpose::Snapshot)
    }
}

/// Calls one broker.
pub(crate) struct Client {
    raft: RaftClient<PeerChannel>,
    append_timeout: Duration,
}

type RpcResult<T> = Result<T, RPCError<TypeConfig>>;

/// Waits for an answer no longer than Raft would.
async fn call<T>(answer: impl Future<Output = Result<Response<T>, Status>>, timeout: Duration) -> RpcResult<T> {
    match tokio::time::timeout(timeout, answer).await {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) => Err(rpc_error(&status)),
        Err(_) => Err(RPCError::Network(NetworkError::from_string("no answer in time"))),
    }
}

fn rpc_error(status: &Status) -> RPCError<TypeConfig> {
    match status.code() {
        // Refused or nobody there: wait before the next try.
        Code::Unavailable | Code::PermissionDenied | Code::Unauthenticated | Code::Unimplemented => {
            RPCError::Unreachable(Unreachable::new(status))
        }
        _ => RPCError::Network(NetworkError::new(status)),
    }
}

fn malformed(error: &io::Error) -> RPCError<TypeConfig> {
    RPCError::Network(NetworkError::new(error))
}

fn timed<T>(message: T, timeout: Duration) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(timeout);
    request
}

pub(crate) fn vote_request(rpc: &VoteRequest<TypeConfig>) -> wire::VoteRequest {
    wire::VoteRequest {
        vote: Some(convert::vote(&rpc.vote)),
        last: rpc.last_log_id.as_ref().map(convert::log_id),
        leadership_transfer: rpc.leadership_transfer,
    }
}

fn vote_reply(reply: &wire::VoteReply) -> RpcResult<VoteResponse<TypeConfig>> {
    let vote = convert::vote_back(reply.vote.as_ref()).map_err(|error| malformed(&error))?;
    Ok(VoteResponse::new(vote, reply.last.as_ref().map(convert::log_id_back), reply.granted))
}

impl RaftNetworkV2<TypeConfig> for Client {
    type SnapshotData = SnapshotData;

    async fn append_entries(
        &mut self,
        rpc: AppendEntriesRequest<TypeConfig>,
        option: RPCOption,
    ) -> RpcResult<AppendEntriesResponse<TypeConfig>> {
        let request = wire::AppendRequest {
            vote: Some(convert::vote(&rpc.vote)),
            prev: rpc.prev_log_id.as_ref().map(convert::log_id),
            entries: rpc.entries.iter().map(convert::entry).collect(),
            leader_commit: rpc.leader_commit.as_ref().map(convert::log_id),
        };
        // Heartbeats are cut by Raft itself.
        let timeout = option.soft_ttl().max(self.append_timeout);
        let reply = call(self.raft.append(timed(request, timeout)), timeout).await?;
        use wire::append_reply::Result as Reply;
        match reply.result {
            Some(Reply::Success(_)) => Ok(AppendEntriesResponse::Success),
            Some(Reply::Partial(partial)) => {
                Ok(AppendEntriesResponse::PartialSuccess(partial.upto.as_ref().map(convert::log_id_back)))
            }
            Some(Reply::Conflict(_)) => Ok(AppendEntriesResponse::Conflict),
            Some(Reply::HigherVote(vote)) => {
                let vote = convert::vote_back(Some(&vote)).map_err(|error| malformed(&error))?;
                Ok(AppendEntriesResponse::HigherVote(vote))
            }
            None => Err(malformed(&convert::invalid("an append reply without its result"))),
        }
    }

    async fn vote(&mut self, rpc: VoteRequest<TypeConfig>, option: RPCOption) -> RpcResult<VoteResponse<TypeConfig>> {
        let timeout = option.soft_ttl();
        vote_reply(&call(self.raft.vote(timed(vote_request(&rpc), timeout)), timeout).await?)
    }

    async fn pre_vote(
        &mut self,
        rpc: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> RpcResult<VoteResponse<TypeConfig>> {
        let timeout = option.soft_ttl();
        vote_reply(&call(self.raft.pre_vote(timed(vote_request(&rpc), timeout)), timeout).await?)
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: Snapshot,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> {
        let (chunks, stream) = mpsc::channel(SNAPSHOT_CHUNKS_MAX);
        let head = wire::SnapshotHead {
            vote: Some(convert::vote(&vote)),
            last: snapshot.meta.last_log_id.as_ref().map(convert::log_id),
            membership: Some(convert::stored_membership(&snapshot.meta.last_membership)),
        };
        let exported = tokio::task::spawn_blocking(move || {
            let mut to = ChunkWriter { chunks, head: Some(head), data: Vec::new() };
            snapshot.snapshot.write_to(&mut to)?;
            to.send()
        });
        let (progress, mut moved) = tokio::sync::watch::channel(());
        let stream = ReceiverStream::new(stream).inspect(move |_| progress.send_modify(|()| ()));
        let answer = self.raft.snapshot(stream);
        tokio::pin!(answer, cancel);
        let reply = loop {
            tokio::select! {
                closed = &mut cancel => return Err(closed.into()),
                reply = &mut answer => break reply.map_err(|status| rpc_error(&status))?.into_inner(),
                result = tokio::time::timeout(SNAPSHOT_IDLE_TIMEOUT, moved.changed()) => match result {
                    Ok(Ok(())) => {}
                    // All is sent: the other side installs, for as long as it takes within one more pause.
                    Ok(Err(_)) => {
                        let last = tokio::time::timeout(SNAPSHOT_IDLE_TIMEOUT, &mut answer);
                        break last.await
                            .map_err(|_| RPCError::Network(NetworkError::from_string("the snapshot was not installed in time")))?
                            .map_err(|status| rpc_error(&status))?
                            .into_inner();
                    }
                    Err(_) => {
                        return Err(RPCError::Network(NetworkError::from_string("the snapshot does not move")).into());
                    }
                },
            }
        };
        if let Ok(Err(error)) = exported.await {
            tracing::debug!(%error, "the snapshot was answered before it was sent whole");
        }
        ::metrics::counter!(SNAPSHOTS_TOTAL, "kind" => "sent").increment(1);
        let vote = convert::vote_back(reply.vote.as_ref()).map_err(|error| malformed(&error))?;
        Ok(SnapshotResponse::new(vote))
    }

    async fn transfer_leader(
        &mut self,
        req: TransferLeaderRequest<TypeConfig>,
        option: RPCOption,
    ) -> RpcResult<TransferLeaderResponse<TypeConfig>> {
        let request = wire::TransferRequest {
            from: Some(convert::vote(req.from_leader())),
            to: *req.to_node_id(),
            last: req.last_log_id().map(convert::log_id),
        };
        let timeout = option.soft_ttl();
        let reply = call(self.raft.transfer_leader(timed(request, timeout)), timeout).await?;
        use wire::transfer_reply::Result as Reply;
        let vote = |vote: Option<wire::Vote>| convert::vote_back(vote.as_ref()).map_err(|error| malformed(&error));
        match reply.result {
            Some(Reply::Accepted(_)) => Ok(Ok(())),
            Some(Reply::VoteChanged(changed)) => Ok(Err(TransferLeaderError::VoteChanged {
                expected: vote(changed.expected)?,
                actual: vote(changed.actual)?,
            })),
            Some(Reply::NotFlushed(not)) => Ok(Err(TransferLeaderError::LogNotFlushed {
                expected: not.expected.as_ref().map(convert::log_id_back),
                actual: not.actual.as_ref().map(convert::log_id_back),
            })),
            None => Err(malformed(&convert::invalid("a transfer reply without its result"))),
        }
    }
}

/// Cuts what is written into chunks. Blocks while the queue is full.
struct ChunkWriter {
    chunks: mpsc::Sender<wire::SnapshotChunk>,
    head: Option<wire::SnapshotHead>,
    data: Vec<u8>,
}

impl ChunkWriter {
    fn send(&mut self) -> io::Result<()> {
        let chunk = wire::SnapshotChunk { head: self.head.take(), data: std::mem::take(&mut self.data) };
        self.chunks.blocking_send(chunk).map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))
    }
}

impl Write for ChunkWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = bytes.len().min(SNAPSHOT_CHUNK_BYTES - self.data.len());
        self.data.extend_from_slice(&bytes[..taken]);
        if self.data.len() == SNAPSHOT_CHUNK_BYTES {
            self.send()?;
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
