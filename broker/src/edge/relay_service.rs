//! What this broker does for other brokers' sessions: passes dials and cuts to the connectors that are attached here.
//!
//! **Invariant:** a dial is passed on only when this broker's own evaluation allows it, on a state that is at least
//! the caller's.

use std::sync::Arc;
use std::time::Duration;

use selvedge_cluster::Caller;
use selvedge_domain::Id;
use selvedge_domain::name::Host;
use selvedge_domain::policy::Context;
use selvedge_domain::rows::{Connector, Segment, Transport};
use selvedge_domain::segment::Endpoint;
use selvedge_proto::control::Dial;
use selvedge_proto::frame::SessionCode;
use selvedge_proto::relay::{CutReply, CutRequest, DialReply, DialRequest, SoftState, relay_server};
use tonic::{Request, Response, Status};
use tracing::Instrument as _;

use super::enforce::Hook;
use super::standing::parse_principal;
use super::{Edge, dial, ground, trace};

/// How long a relayed dial waits until this broker has applied the state that the caller decided on.
pub const POSITION_WAIT: Duration = Duration::from_secs(1);

/// The service on the peer listener.
pub struct RelayService(pub(super) Hook);

impl RelayService {
    /// The edge, for a call whose claim is that of the caller's certificate.
    fn edge<T>(&self, request: &Request<T>, claimed: u64) -> Result<&Arc<Edge>, Status> {
        if Caller::of(request)?.node != claimed {
            return Err(Status::permission_denied("the certificate is not of the node that the call claims"));
        }
        self.0.edge().ok_or_else(|| Status::unavailable("this broker is starting"))
    }
}

#[tonic::async_trait]
impl relay_server::Relay for RelayService {
    async fn dial(&self, request: Request<DialRequest>) -> Result<Response<DialReply>, Status> {
        let edge = self.edge(&request, request.get_ref().node)?;
        let request = request.into_inner();
        let span = tracing::debug_span!("relay.dial", caller = request.node, connector = request.connector);
        if let Some(dial) = &request.dial {
            trace::follow(&span, &dial.traceparent);
        }
        let reply = match relayed(edge, request).instrument(span).await {
            Ok(reply) => reply,
            Err(code) => DialReply { code: code as u32, app_rtt_us: 0 },
        };
        Ok(Response::new(reply))
    }

    async fn cut(&self, request: Request<CutRequest>) -> Result<Response<CutReply>, Status> {
        let edge = self.edge(&request, request.get_ref().node)?;
        let CutRequest { connector, cut, .. } = request.into_inner();
        let connector: Id = connector.parse().map_err(|_| Status::invalid_argument("connector"))?;
        let cut = cut.ok_or_else(|| Status::invalid_argument("cut"))?;
        Ok(Response::new(CutReply { confirmed: dial::cut_here(edge, connector, cut).await }))
    }

    async fn exchange(&self, request: Request<SoftState>) -> Result<Response<SoftState>, Status> {
        let edge = self.edge(&request, request.get_ref().node)?;
        edge.routing.hear(request.into_inner(), None);
        Ok(Response::new(edge.routing.tell()))
    }
}

async fn relayed(edge: &Edge, request: DialRequest) -> Result<DialReply, SessionCode> {
    let mut asked = request.dial.ok_or(SessionCode::ProtocolError)?;
    asked.traceparent = trace::onward(&asked.traceparent);
    let position = request.position.map(|p| Id::new(p.epoch, p.seq)).ok_or(SessionCode::ProtocolError)?;
    if !ground::applied(&*edge.ground, position, POSITION_WAIT).await || !edge.ground.lease_open() {
        return Err(SessionCode::Stale);
    }
    let connector: Id = request.connector.parse().map_err(|_| SessionCode::ProtocolError)?;
    allowed(edge, connector, &request.principal, &request.context, &asked)?;
    let end = edge.ends.connector(connector).ok_or(SessionCode::Unavailable)?;
    let answer = dial::ask_here(edge, &end, asked).await?;
    Ok(DialReply { code: answer.code, app_rtt_us: answer.app_rtt_us })
}

/// Evaluates what the caller decided, and that the connector belongs to what was asked for.
fn allowed(edge: &Edge, connector: Id, principal: &str, context: &[u8], asked: &Dial) -> Result<(), SessionCode> {
    let malformed = SessionCode::ProtocolError;
    let principal = parse_principal(principal).filter(|_| principal == asked.principal).ok_or(malformed)?;
    let endpoint = Endpoint {
        host: Host::parse(&asked.host).map_err(|_| malformed)?,
        port: u16::try_from(asked.port).map_err(|_| malformed)?,
        transport: Transport::try_from(asked.transport as i32).map_err(|_| malformed)?,
    };
    let context: Context = serde_json::from_slice(context).map_err(|_| malformed)?;
    let context = Context { now_ms: edge.ground.now_ms(), ..context };
    let state = edge.ground.state();
    let verdict = edge.decider.decide(&state, principal, &endpoint, &context);
    let segment = verdict.segment.filter(|_| verdict.allowed).and_then(|id| state.by_id::<Segment>(id));
    let group = state.by_id::<Connector>(connector).filter(|row| !row.revoked).and_then(|row| row.group);
    match (segment, group) {
        (Some(segment), Some(group)) if segment.connector_groups.contains(&group) => Ok(()),
        _ => {
            tracing::warn!(reason = verdict.reason.code(), "a dial that another broker allowed is refused here");
            Err(SessionCode::Refused)
        }
    }
}
