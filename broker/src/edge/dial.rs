//! Asks a connector for a session: `Dial`, its answer, its hop; and `Cut`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use selvedge_domain::rows::Segment;
use selvedge_domain::{Id, State};
use selvedge_proto::control::from_broker::Message as Out;
use selvedge_proto::control::{Cut, Dial, DialAnswer};
use selvedge_proto::frame::SessionCode;
use selvedge_proto::hello::Ticket;
use selvedge_proto::relay::{CutRequest, DialRequest};
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep_until, timeout};

use super::ends::End;
use super::sessions::Session;
use super::standing::{self, principal_text};
use super::tickets::{Awaited, Hop};
use super::{Edge, control, metrics, push, trace};
use crate::routing::Via;

/// A connector that has neither answered nor opened its hop by then is given up.
pub const CONFIRM_TIMEOUT: Duration = Duration::from_millis(500);
/// Application and hop must both be there by then; also the time to the connector's first byte.
pub const READY_TIMEOUT: Duration = Duration::from_secs(2);
/// A connector that has not confirmed a cut by then is told again, or left to the reset of its hop.
pub const CUT_TIMEOUT: Duration = Duration::from_secs(2);

/// The id in a message of 16 bytes.
pub(super) fn session_id(bytes: &[u8]) -> Option<u128> {
    Some(u128::from_be_bytes(bytes.try_into().ok()?))
}

type Waiting<T> = Mutex<BTreeMap<(u128, Id), T>>;

/// What connectors here were asked and have not answered.
#[derive(Default)]
pub(super) struct Dials {
    answers: Waiting<oneshot::Sender<DialAnswer>>,
    cuts: Waiting<Vec<oneshot::Sender<()>>>,
}

impl Dials {
    /// An answer counts only from the connector that was asked.
    pub(super) fn answered(&self, connector: Id, answer: &DialAnswer) {
        let waiting = session_id(&answer.session).and_then(|id| self.answers.lock().remove(&(id, connector)));
        if let Some(waiting) = waiting {
            // Whoever asked may have given up.
            let _ = waiting.send(answer.clone());
        }
    }

    pub(super) fn cut_done(&self, connector: Id, session: &[u8]) {
        let waiting = session_id(session).and_then(|id| self.cuts.lock().remove(&(id, connector)));
        for waiting in waiting.into_iter().flatten() {
            let _ = waiting.send(());
        }
    }
}

/// Asks a connector that is attached here, and waits for its answer.
pub(super) async fn ask_here(edge: &Edge, end: &End, dial: Dial) -> Result<DialAnswer, SessionCode> {
    let session = session_id(&dial.session).ok_or(SessionCode::ProtocolError)?;
    // Its certificate may have expired since it attached.
    if let Err(unfit) = standing::check(&edge.ground.state(), &end.peer, edge.ground.now_ms()) {
        edge.expel(end, unfit);
        return Err(SessionCode::Unavailable);
    }
    let (waiting, answer) = oneshot::channel();
    edge.dials.answers.lock().insert((session, end.subject), waiting);
    let asked = end.send(Out::Dial(dial));
    let answer = if asked { timeout(READY_TIMEOUT, answer).await.ok().and_then(Result::ok) } else { None };
    edge.dials.answers.lock().remove(&(session, end.subject));
    answer.ok_or(SessionCode::DialTimeout)
}

/// Dials `connector` for a session and gives back its hop; says why when there is none.
pub(super) async fn dial(
    edge: &Arc<Edge>,
    session: &Arc<Session>,
    segment: &Segment,
    connector: Id,
) -> Result<Hop, SessionCode> {
    let dialed = try_dial(edge, session, segment, connector).await;
    match &dialed {
        Ok(_) => metrics::dial("ready"),
        Err(code) => {
            metrics::dial(code.as_str());
            tracing::info!(%connector, %code, "a connector did not take a session");
            abandon(edge, session, connector, *code);
        }
    }
    dialed
}

async fn try_dial(
    edge: &Arc<Edge>,
    session: &Arc<Session>,
    segment: &Segment,
    connector: Id,
) -> Result<Hop, SessionCode> {
    let begun = Instant::now();
    let state = edge.ground.state();
    // Segment and connector are in the indexes since the first verdict: a change from before is in this state, a later
    // one finds the session.
    if edge.judge_again(session, &state, false) {
        return Err(session.cut_code().unwrap_or(SessionCode::Revoked));
    }
    let via = edge.routing.via(connector).ok_or(SessionCode::Unavailable)?;
    let here = edge.ends.connector(connector);
    // A hop that is parked here serves whoever passes the dial on.
    let parked = here.as_ref().and_then(|end| {
        let parked = edge.tickets.take_parked(end.key);
        end.send_tickets(edge.tickets.mint_parking(end.key));
        parked
    });
    let (ticket, mut hop, mut awaited) = match parked {
        Some((ticket, hop)) => (ticket, Some(hop), None),
        None => {
            let (ticket, awaited) = edge.tickets.mint_dial();
            (ticket, None, Some(awaited))
        }
    };
    let dial = message(edge, &state, session, segment, connector, &ticket, hop.is_some());
    let answer = ask(edge, &state, session, via, connector, dial);
    tokio::pin!(answer);

    let mut answered = false;
    loop {
        if answered && let Some(hop) = hop.take() {
            return Ok(hop);
        }
        let confirmed = answered || (hop.is_some() && awaited.is_some());
        tokio::select! {
            biased;
            () = session.cut.cancelled() => return Err(session.cut_code().unwrap_or(SessionCode::Revoked)),
            result = &mut answer, if !answered => match result {
                Ok(answer) if answer.code == 0 => answered = true,
                Ok(answer) => return Err(failure(answer.code)),
                Err(code) => return Err(code),
            },
            came = hop_of(&mut awaited), if hop.is_none() => match came {
                Some(came) => hop = Some(came),
                None => return Err(SessionCode::HopTimeout),
            },
            () = sleep_until(begun + CONFIRM_TIMEOUT), if !confirmed => return Err(SessionCode::DialTimeout),
            () = sleep_until(begun + READY_TIMEOUT) => {
                return Err(if answered { SessionCode::HopTimeout } else { SessionCode::AppTimeout });
            }
        }
    }
}

async fn hop_of(awaited: &mut Option<Awaited>) -> Option<Hop> {
    match awaited {
        Some(awaited) => awaited.hop().await,
        None => std::future::pending().await,
    }
}

/// Only what a connector may say of an application is passed on; a connector cannot make the broker say anything else.
fn failure(code: u32) -> SessionCode {
    match SessionCode::from_wire(code as i32) {
        code @ (SessionCode::AppRefused
        | SessionCode::AppTimeout
        | SessionCode::AppUnreachable
        | SessionCode::NotAllowed
        | SessionCode::Busy
        | SessionCode::ConnectorDraining
        | SessionCode::HopTimeout) => code,
        _ => SessionCode::Unavailable,
    }
}

fn message(
    edge: &Edge,
    state: &State,
    session: &Session,
    segment: &Segment,
    connector: Id,
    ticket: &Ticket,
    parked: bool,
) -> Dial {
    Dial {
        session: session.id.to_be_bytes().to_vec(),
        ticket: ticket.as_bytes().to_vec(),
        parked,
        broker: state.broker(edge.ground.node()).map(|own| push::wire_broker(state, own)),
        host: session.endpoint.host.to_string(),
        port: session.endpoint.port.into(),
        transport: session.endpoint.transport as u32,
        principal: principal_text(session.caller.principal),
        presenter: session.caller.peer.id.to_string(),
        lease_left_ms: edge.lease_left_for(connector),
        traceparent: trace::onward(&session.traceparent),
        deadline_ms: READY_TIMEOUT.as_millis() as u64,
        idle_ms: segment.idle_ms,
    }
}

async fn ask(
    edge: &Edge,
    state: &State,
    session: &Session,
    via: Via,
    connector: Id,
    dial: Dial,
) -> Result<DialAnswer, SessionCode> {
    match via {
        Via::Here => {
            let end = edge.ends.connector(connector).ok_or(SessionCode::Unavailable)?;
            ask_here(edge, &end, dial).await
        }
        Via::Broker(node) => {
            let mut relay = edge.ground.relay(node).ok_or(SessionCode::Unavailable)?;
            let context = session.caller.context(edge.ground.now_ms(), &edge.region, session.program.clone());
            let request = DialRequest {
                node: edge.ground.node(),
                connector: connector.to_string(),
                principal: dial.principal.clone(),
                position: Some(control::position(state.position())),
                context: serde_json::to_vec(&context).map_err(|_| SessionCode::Internal)?,
                dial: Some(dial),
            };
            let reply = timeout(READY_TIMEOUT, relay.dial(request)).await.map_err(|_| SessionCode::DialTimeout)?;
            let reply = reply.map_err(|status| {
                tracing::info!(node, %status, "a broker did not pass a dial on");
                SessionCode::Unavailable
            })?;
            let reply = reply.into_inner();
            let session = session.id.to_be_bytes().to_vec();
            Ok(DialAnswer { session, code: reply.code, app_rtt_us: reply.app_rtt_us })
        }
    }
}

/// Lets a connector forget a dial, without waiting for it.
pub(super) fn abandon(edge: &Arc<Edge>, session: &Session, connector: Id, code: SessionCode) {
    let (edge, id) = (edge.clone(), session.id);
    tokio::spawn(async move {
        if !cut(&edge, connector, id, code).await {
            metrics::cut_unconfirmed();
        }
    });
}

/// Cuts a session at its connector; true when the connector has confirmed that nothing passes any more.
pub(super) async fn cut(edge: &Edge, connector: Id, session: u128, code: SessionCode) -> bool {
    let message = Cut { session: session.to_be_bytes().to_vec(), code: code as u32 };
    match edge.routing.via(connector) {
        Some(Via::Here) => cut_here(edge, connector, message).await,
        Some(Via::Broker(node)) => match edge.ground.relay(node) {
            Some(mut relay) => {
                let request =
                    CutRequest { node: edge.ground.node(), connector: connector.to_string(), cut: Some(message) };
                let reply = timeout(CUT_TIMEOUT, relay.cut(request)).await;
                matches!(reply, Ok(Ok(reply)) if reply.get_ref().confirmed)
            }
            None => false,
        },
        // Nobody reaches it: its hop was reset, and its fence is the lease that it was told.
        None => false,
    }
}

/// Cuts a session at a connector that is attached here.
pub(super) async fn cut_here(edge: &Edge, connector: Id, message: Cut) -> bool {
    let (Some(end), Some(session)) = (edge.ends.connector(connector), session_id(&message.session)) else {
        return false;
    };
    let (waiting, done) = oneshot::channel();
    edge.dials.cuts.lock().entry((session, connector)).or_default().push(waiting);
    let sent = end.send(Out::Cut(message));
    let confirmed = sent && matches!(timeout(CUT_TIMEOUT, done).await, Ok(Ok(())));
    let mut cuts = edge.dials.cuts.lock();
    if let Some(waiting) = cuts.get_mut(&(session, connector)) {
        waiting.retain(|waiting| !waiting.is_closed());
        if waiting.is_empty() {
            cuts.remove(&(session, connector));
        }
    }
    confirmed
}
