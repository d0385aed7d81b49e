//! What brokers ask each other about the log.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::{Stream, StreamExt as _};
use prost::Message as _;
use selvedge_domain::{ActorKind, Command, Credential};
use selvedge_domain::state::Table;
use selvedge_proto::peer as wire;
use selvedge_proto::peer::change_request::Change;
use selvedge_proto::peer::peer_server;
use tonic::{Request, Response, Status};

use crate::convert;
use crate::core::Core;
use crate::error::Error;
use crate::events::{self, Frame};
use crate::leader::Answer;
use crate::listen::Caller;
use crate::membership::{self, Attempt};
use crate::propose::COMMAND_BYTES_MAX;
use crate::read::NoReadIndex;

/// Longest wait of a linearizable read.
const READ_WAIT: Duration = Duration::from_secs(5);

pub(crate) struct PeerService(pub(crate) Arc<Core>);

fn not_leader(leader: Option<u64>) -> wire::NotLeader {
    wire::NotLeader { leader: leader.unwrap_or(0) }
}

#[tonic::async_trait]
impl peer_server::Peer for PeerService {
    async fn propose(&self, request: Request<wire::ProposeRequest>) -> Result<Response<wire::ProposeReply>, Status> {
        let caller = Caller::of(&request)?;
        let wire::ProposeRequest { command: bytes, credential } = request.into_inner();
        if bytes.len() > COMMAND_BYTES_MAX {
            return Err(Status::invalid_argument("the command is too large"));
        }
        // What an entry holds must be readable by all, and say truly who proposed it.
        let command = Command::decode(&bytes).map_err(|error| Status::invalid_argument(error.to_string()))?;
        if command.proposer != caller.node {
            return Err(Status::permission_denied("the command names another proposer"));
        }
        if command.actor.kind == ActorKind::Bootstrap {
            return Err(Status::permission_denied("the first commands are proposed where they are written"));
        }
        let credential = (!credential.is_empty()).then(|| Credential::new(credential));
        use wire::propose_reply::Result as Reply;
        let result = match self.0.enqueue(&command.actor, credential.as_ref(), bytes.into()).await {
            Answer::Outcome(outcome) => convert::outcome(outcome),
            Answer::NotLeader(leader) => Reply::NotLeader(not_leader(leader)),
            Answer::Busy => Reply::Busy(wire::Busy { retry_after_ms: 100 }),
            Answer::Unknown => Reply::Unknown(wire::Empty {}),
        };
        Ok(Response::new(wire::ProposeReply { result: Some(result) }))
    }

    async fn read_index(
        &self,
        request: Request<wire::ReadIndexRequest>,
    ) -> Result<Response<wire::ReadIndexReply>, Status> {
        let caller = Caller::of(&request)?;
        if request.into_inner().for_lease {
            self.0.note_holder(caller.node);
        }
        use wire::read_index_reply::Result as Reply;
        let result = match self.0.read_index_here().await {
            Ok(index) => Reply::Index(index),
            Err(NoReadIndex::NotLeader(leader)) => Reply::NotLeader(not_leader(leader)),
            Err(NoReadIndex::NoQuorum) => Reply::NoQuorum(wire::Empty {}),
        };
        Ok(Response::new(wire::ReadIndexReply { result: Some(result) }))
    }

    async fn read(&self, request: Request<wire::ReadRequest>) -> Result<Response<wire::ReadReply>, Status> {
        let wire::ReadRequest { table, key } = request.into_inner();
        let table = u8::try_from(table).ok().and_then(Table::from_number);
        let table = table.ok_or_else(|| Status::invalid_argument("no such table"))?;
        let state = self.0.linearizable(READ_WAIT).await.map_err(|error| Status::unavailable(error.to_string()))?;
        let row = state.stored(table, &key).map(|row| row.to_vec());
        Ok(Response::new(wire::ReadReply { position: Some(convert::position(state.position())), row }))
    }

    async fn report(&self, request: Request<wire::ReportRequest>) -> Result<Response<wire::ReportReply>, Status> {
        let caller = Caller::of(&request)?;
        crate::enforce::take_report(&self.0, caller.node, request.into_inner());
        Ok(Response::new(wire::ReportReply {}))
    }

    async fn holders(&self, _request: Request<wire::HoldersRequest>) -> Result<Response<wire::HoldersReply>, Status> {
        use wire::holders_reply::Result as Reply;
        let result = match self.0.read_index_here().await {
            Ok(_) => {
                let holders = self.0.known_holders().into_iter();
                let holders = holders.map(|(node, may_hold)| wire::Holder { node, may_hold }).collect();
                Reply::Holders(wire::Holders { holders })
            }
            Err(NoReadIndex::NotLeader(leader)) => Reply::NotLeader(not_leader(leader)),
            Err(NoReadIndex::NoQuorum) => Reply::NoQuorum(wire::Empty {}),
        };
        Ok(Response::new(wire::HoldersReply { result: Some(result) }))
    }

    type EventsStream = Pin<Box<dyn Stream<Item = Result<wire::EventsFrame, Status>> + Send>>;

    async fn events(&self, request: Request<wire::EventsRequest>) -> Result<Response<Self::EventsStream>, Status> {
        let frames = events::stream(self.0.clone(), request.into_inner().from_seq).map(|frame| match frame {
            Ok(Frame::Events { position, events, last }) => Ok(wire::EventsFrame {
                position: Some(convert::position(position)),
                events: events.iter().map(|event| event.encode_to_vec()).collect(),
                last,
                state_hash: Vec::new(),
            }),
            Ok(Frame::Bookmark { position, state_hash }) => Ok(wire::EventsFrame {
                position: Some(convert::position(position)),
                events: Vec::new(),
                last: true,
                state_hash: state_hash.to_vec(),
            }),
            Err(Error::Compacted { upto }) => Err(Status::out_of_range(format!("the journal begins after {upto}"))),
            Err(error) => Err(Status::internal(error.to_string())),
        });
        Ok(Response::new(Box::pin(frames)))
    }

    async fn clock(&self, _request: Request<wire::ClockRequest>) -> Result<Response<wire::ClockReply>, Status> {
        Ok(Response::new(wire::ClockReply { wall_ms: self.0.clock.wall_ms() }))
    }

    async fn join(&self, request: Request<wire::JoinRequest>) -> Result<Response<wire::ChangeReply>, Status> {
        let caller = Caller::of(&request)?;
        let add = wire::AddLearner { node: caller.node, address: request.into_inner().address };
        let result = match membership::change(&self.0, Change::AddLearner(add)).await {
            Ok(()) => wire::change_reply::Result::Done(wire::Empty {}),
            Err(error) => wire::change_reply::Result::Later(error.to_string()),
        };
        Ok(Response::new(wire::ChangeReply { result: Some(result) }))
    }

    async fn change(&self, request: Request<wire::ChangeRequest>) -> Result<Response<wire::ChangeReply>, Status> {
        let change = request.into_inner().change.ok_or_else(|| Status::invalid_argument("no change"))?;
        use wire::change_reply::Result as Reply;
        let result = match membership::change_here(&self.0, &change).await {
            Attempt::Done => Reply::Done(wire::Empty {}),
            Attempt::NotLeader(leader) => Reply::NotLeader(not_leader(leader)),
            Attempt::Later(why) => Reply::Later(why),
            Attempt::Failed(why) => Reply::Failed(why),
        };
        Ok(Response::new(wire::ChangeReply { result: Some(result) }))
    }
}
