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

use crate::acquaintance::{Acquaintances, GREET_TIMEOUT};
use crate::blocking::Blocking;
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
    pub(crate) acquaintances: Acquaintances,
    /// An append call that is not answered for so long is given up. Longer than a heartbeat: entries take time.
    pub(crate) append_timeout: Duration,
    pub(crate) blocking: Blocking,
}

impl Network {
    fn client(&self, target: u64, purpose: Purpose) -> Client {
        let raft = RaftClient::new(self.dialer.channel(target, purpose))
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
        Client {
            raft,
            target,
            acquaintances: self.acquaintances.clone(),
            append_timeout: self.append_timeout,
            blocking: self.blocking.clone(),
        }
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
    target: u64,
    acquaintances: Acquaintances,
    append_timeout: Duration,
    blocking: Blocking,
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

impl Client {
    /// Greets the other side unless both have met.
    async fn meet(&mut self, timeout: Duration) -> RpcResult<()> {
        if self.acquaintances.has_met(self.target) {
            return Ok(());
        }
        let greeting = timed(self.acquaintances.greeting(self.target), timeout);
        let reply = call(self.raft.greet(greeting), timeout).await?;
        self.acquaintances.answered(self.target, reply).map_err(|status| rpc_error(&status))
    }

    /// Waits for an answer, after a greeting where it is due.
    async fn ask<T>(
        &mut self,
        timeout: Duration,
        answer: impl Future<Output = Result<Response<T>, Status>>,
    ) -> RpcResult<T> {
        self.meet(timeout).await?;
        let parted = async {
            answer.await.inspect_err(|status| {
                if status.code() == Code::FailedPrecondition {
                    // It has started again since.
                    self.acquaintances.part(self.target);
                }
            })
        };
        call(parted, timeout).await
    }
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
        let held = rpc.entries.last().map(|entry| entry.log_id).or(rpc.prev_log_id);
        let mut raft = self.raft.clone();
        let reply = self.ask(timeout, raft.append(timed(request, timeout))).await?;
        let holds = |upto| self.acquaintances.holds(self.target, upto, rpc.leader_commit);
        use wire::append_reply::Result as Reply;
        match reply.result {
            Some(Reply::Success(_)) => {
                holds(held);
                Ok(AppendEntriesResponse::Success)
            }
            Some(Reply::Partial(partial)) => {
                let upto = partial.upto.as_ref().map(convert::log_id_back);
                holds(upto);
                Ok(AppendEntriesResponse::PartialSuccess(upto))
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
        let mut raft = self.raft.clone();
        let reply = vote_reply(&self.ask(timeout, raft.vote(timed(vote_request(&rpc), timeout))).await?)?;
        if reply.vote_granted {
            self.acquaintances.granted(self.target, &rpc.vote);
        }
        Ok(reply)
    }

    async fn pre_vote(
        &mut self,
        rpc: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> RpcResult<VoteResponse<TypeConfig>> {
        let timeout = option.soft_ttl();
        let mut raft = self.raft.clone();
        vote_reply(&self.ask(timeout, raft.pre_vote(timed(vote_request(&rpc), timeout))).await?)
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: Snapshot,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> {
        self.meet(GREET_TIMEOUT).await?;
        let installed = snapshot.meta.last_log_id;
        let (chunks, stream) = mpsc::channel(SNAPSHOT_CHUNKS_MAX);
        let head = wire::SnapshotHead {
            vote: Some(convert::vote(&vote)),
            last: snapshot.meta.last_log_id.as_ref().map(convert::log_id),
            membership: Some(convert::stored_membership(&snapshot.meta.last_membership)),
        };
        let exported = tokio::spawn(export(self.blocking.clone(), snapshot, head, chunks));
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
        self.acquaintances.holds(self.target, installed, installed);
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
        let mut raft = self.raft.clone();
        let reply = self.ask(timeout, raft.transfer_leader(timed(request, timeout))).await?;
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

/// Sends a snapshot's rows in chunks.
async fn export(
    blocking: Blocking,
    snapshot: Snapshot,
    head: wire::SnapshotHead,
    chunks: mpsc::Sender<wire::SnapshotChunk>,
) -> io::Result<()> {
    let gone = || io::Error::from(io::ErrorKind::BrokenPipe);
    let write = move |send: &mut dyn FnMut(wire::SnapshotChunk) -> io::Result<()>| {
        let mut to = ChunkWriter { send, head: Some(head), data: Vec::new() };
        snapshot.snapshot.write_to(&mut to)?;
        to.send()
    };
    match &blocking {
        Blocking::Threads => {
            blocking.run(move || write(&mut |chunk| chunks.blocking_send(chunk).map_err(|_| gone()))).await
        }
        // Whoever takes the chunks from the queue needs this thread, too.
        Blocking::Inline(_) => {
            let mut all = Vec::new();
            write(&mut |chunk| {
                all.push(chunk);
                Ok(())
            })?;
            for chunk in all {
                chunks.send(chunk).await.map_err(|_| gone())?;
            }
            Ok(())
        }
    }
}

/// Cuts what is written into chunks.
struct ChunkWriter<'a> {
    send: &'a mut dyn FnMut(wire::SnapshotChunk) -> io::Result<()>,
    head: Option<wire::SnapshotHead>,
    data: Vec<u8>,
}

impl ChunkWriter<'_> {
    fn send(&mut self) -> io::Result<()> {
        (self.send)(wire::SnapshotChunk { head: self.head.take(), data: std::mem::take(&mut self.data) })
    }
}

impl Write for ChunkWriter<'_> {
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
