//! What brokers ask each other about the log.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::{Stream, StreamExt as _};
use prost::Message as _;
use selvedge_domain::state::Table;
use selvedge_domain::{Asker, Credential, Id};
use selvedge_proto::peer as wire;
use selvedge_proto::peer::change_request::Change;
use selvedge_proto::peer::peer_server;
use tonic::{Code, Request, Response, Status};

use crate::convert;
use crate::core::Core;
use crate::error::{Error, Fatal};
use crate::events::{self, Frame};
use crate::journal;
use crate::leader::{Answer, BUSY_RETRY_AFTER_MS};
use crate::listen::Caller;
use crate::membership::{self, Attempt};
use crate::propose_stream;
use crate::read::{Mode, NoReadIndex, Read};

/// Longest wait of a linearizable read.
const READ_WAIT: Duration = Duration::from_secs(5);

/// Metadata of `RESOURCE_EXHAUSTED`: when to try again, milliseconds.
const RETRY_AFTER_MS: &str = "selvedge-retry-after-ms";

pub(crate) struct PeerService(pub(crate) Arc<Core>);

fn not_leader(leader: Option<u64>) -> wire::NotLeader {
    wire::NotLeader { leader: leader.unwrap_or(0) }
}

#[tonic::async_trait]
impl peer_server::Peer for PeerService {
    async fn propose(&self, request: Request<wire::ProposeRequest>) -> Result<Response<wire::ProposeReply>, Status> {
        let caller = Caller::of(&request)?;
        match self.0.take_proposal(caller.node, request.into_inner()).await? {
            Answer::Busy => {
                let mut status = Status::resource_exhausted("too many proposals wait already");
                status.metadata_mut().insert(RETRY_AFTER_MS, BUSY_RETRY_AFTER_MS.into());
                Err(status)
            }
            answer => Ok(Response::new(propose_stream::reply(answer))),
        }
    }

    type ProposeStreamStream = Pin<Box<dyn Stream<Item = Result<wire::ProposeAnswer, Status>> + Send>>;

    async fn propose_stream(
        &self,
        request: Request<tonic::Streaming<wire::ProposeFrame>>,
    ) -> Result<Response<Self::ProposeStreamStream>, Status> {
        let caller = Caller::of(&request)?;
        Ok(Response::new(Box::pin(propose_stream::serve(self.0.clone(), caller.node, request.into_inner()))))
    }

    async fn read_index(
        &self,
        request: Request<wire::ReadIndexRequest>,
    ) -> Result<Response<wire::ReadIndexReply>, Status> {
        let caller = Caller::of(&request)?;
        use wire::read_index_reply::Result as Reply;
        let index = match request.into_inner().for_lease {
            true => self.0.lease_index_here(caller.node).await,
            false => self.0.read_index_here().await,
        };
        let result = match index {
            Ok(index) => Reply::Index(index),
            Err(NoReadIndex::NotLeader(leader)) => Reply::NotLeader(not_leader(leader)),
            Err(NoReadIndex::NoQuorum) => Reply::NoQuorum(wire::Empty {}),
        };
        Ok(Response::new(wire::ReadIndexReply { result: Some(result) }))
    }

    async fn read(&self, request: Request<wire::ReadRequest>) -> Result<Response<wire::ReadReply>, Status> {
        let request = request.into_inner();
        let table = u8::try_from(request.table).ok().and_then(Table::from_number);
        let table = table.ok_or_else(|| Status::invalid_argument("no such table"))?;
        let seen = request.seen.map(|seen| convert::position_back(Some(seen)));
        let mode = match request.mode() {
            wire::ReadMode::Linearizable => Mode::Linearizable,
            wire::ReadMode::Local => Mode::Local,
        };
        let read = self.0.read(mode, seen, READ_WAIT).await;
        let Read { state, age_ms } = read.map_err(|error| match error {
            Error::Reset { .. } => Status::failed_precondition(error.to_string()),
            other => Status::unavailable(other.to_string()),
        })?;
        let row = state.stored(table, &request.key).map(|row| row.to_vec());
        Ok(Response::new(wire::ReadReply { position: Some(convert::position(state.position())), row, age_ms }))
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
        let request = request.into_inner();
        let from = Id::new(request.epoch, request.from_seq);
        let frames = events::watch(self.0.clone(), from).map(|frame| match frame {
            Ok(Frame::Events { position, events, last }) => Ok(wire::EventsFrame {
                position: Some(convert::position(position)),
                events: events.iter().map(|event| event.encode_to_vec()).collect(),
                last,
                ..wire::EventsFrame::default()
            }),
            Ok(Frame::Bookmark { position, state_hash, journal_hash }) => Ok(wire::EventsFrame {
                position: Some(convert::position(position)),
                events: Vec::new(),
                last: true,
                state_hash: state_hash.to_vec(),
                journal_hash,
            }),
            Err(error) => {
                let code = match error {
                    Error::Compacted { .. } => Code::OutOfRange,
                    Error::Reset { .. } => Code::FailedPrecondition,
                    Error::Elsewhere { .. } => Code::Unavailable,
                    Error::Slow { .. } => Code::ResourceExhausted,
                    _ => Code::Internal,
                };
                Err(Status::new(code, error.to_string()))
            }
        });
        Ok(Response::new(Box::pin(frames)))
    }

    type JournalStream = Pin<Box<dyn Stream<Item = Result<wire::JournalPart, Status>> + Send>>;

    async fn journal(&self, request: Request<wire::JournalRequest>) -> Result<Response<Self::JournalStream>, Status> {
        Ok(Response::new(Box::pin(journal::serve(self.0.clone(), request.into_inner().upto_seq))))
    }

    async fn clock(&self, _request: Request<wire::ClockRequest>) -> Result<Response<wire::ClockReply>, Status> {
        Ok(Response::new(wire::ClockReply { wall_ms: self.0.clock.wall_ms() }))
    }

    async fn join(&self, request: Request<wire::JoinRequest>) -> Result<Response<wire::ChangeReply>, Status> {
        let caller = Caller::of(&request)?;
        let wire::JoinRequest { address, version } = request.into_inner();
        use wire::change_reply::Result as Reply;
        let in_force = self.0.published.state().version();
        if version.max(1) < in_force {
            // It would stop as soon as it had caught up.
            let newer = Fatal::Newer { what: format!("version {in_force} of the rules"), known: version.max(1) };
            let reply = Reply::Failed(Error::Fatal(newer).to_string());
            return Ok(Response::new(wire::ChangeReply { result: Some(reply) }));
        }
        let add = wire::AddLearner { node: caller.node, address };
        let result = match membership::change(&self.0, &Asker::BROKER, Change::AddLearner(add)).await {
            Ok(()) => Reply::Done(wire::Empty {}),
            Err(error) => Reply::Later(error.to_string()),
        };
        Ok(Response::new(wire::ChangeReply { result: Some(result) }))
    }

    async fn change(&self, request: Request<wire::ChangeRequest>) -> Result<Response<wire::ChangeReply>, Status> {
        let caller = Caller::of(&request)?;
        let wire::ChangeRequest { change, credential } = request.into_inner();
        let change = change.ok_or_else(|| Status::invalid_argument("no change"))?;
        let credential = (!credential.is_empty()).then(|| Credential::new(credential));
        use wire::change_reply::Result as Reply;
        let result = match membership::change_here(&self.0, caller.node, credential.as_ref(), &change).await {
            Attempt::Done => Reply::Done(wire::Empty {}),
            Attempt::NotLeader(leader) => Reply::NotLeader(not_leader(leader)),
            Attempt::Later(why) => Reply::Later(why),
            Attempt::Failed(why) => Reply::Failed(why),
            Attempt::Refused(rejected) => Reply::Refused(convert::rejected(rejected)),
        };
        Ok(Response::new(wire::ChangeReply { result: Some(result) }))
    }
}
