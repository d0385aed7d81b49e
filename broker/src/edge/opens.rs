//! `Open`: from a ticket and a name to a session, or to a refusal that says nothing.
//!
//! **Invariant:** what concerns the target is one answer for denied, unknown and wrong port, of one size, not before
//! [`REFUSAL_FLOOR`].

use std::sync::Arc;
use std::time::{Duration, Instant};

use selvedge_domain::State;
use selvedge_domain::name::Host;
use selvedge_domain::path::{Choice, Fate};
use selvedge_domain::policy::{Reason, Verdict};
use selvedge_domain::rows::{Segment, Transport};
use selvedge_domain::segment::{Endpoint, transport_name};
use selvedge_proto::control::from_broker::Message as Out;
use selvedge_proto::control::{Open, OpenRefused};
use selvedge_proto::frame::SessionCode;
use selvedge_proto::hello::Ticket;
use tracing::Instrument as _;

use super::ends::End;
use super::judge::Refusal;
use super::sessions::{Entered, Session};
use super::standing::Caller;
use super::tickets::Awaited;
use super::{Edge, carry, metrics, random_u128, trace};
use crate::audit::{self, Appended, Denied, Record, SessionOpen, clipped};

/// A refusal that concerns the target is answered no sooner after the `Open` than this.
pub const REFUSAL_FLOOR: Duration = Duration::from_millis(25);
/// What a caller that is told `busy` waits at least.
const BUSY_RETRY_MS: u64 = 1_000;
/// Candidates of a path that one record keeps.
const CANDIDATES_RECORDED_MAX: usize = 32;
/// Characters of the program that a caller claims to be.
const PROGRAM_CHARS_MAX: usize = 128;
/// What a refusal about the target is recorded as when there is no connector.
const REASON_UNAVAILABLE: &str = "unavailable";

/// Decides an `Open` in a task of its own.
pub(super) fn open(edge: &Arc<Edge>, end: &Arc<End>, open: Open) {
    let begun = Instant::now();
    let Ok(permit) = end.in_flight.clone().try_acquire_owned() else {
        metrics::limited("opens_in_flight");
        return refuse(end, &open, SessionCode::Busy, String::new(), BUSY_RETRY_MS);
    };
    let per_second = edge.limits().opens_per_second;
    if !end.opens.lock().take(begun, per_second) {
        metrics::limited("opens");
        let wait_ms = end.opens.lock().wait(per_second).as_millis() as u64;
        return refuse(end, &open, SessionCode::Busy, String::new(), wait_ms.max(1));
    }
    let (edge, end) = (edge.clone(), end.clone());
    let span = tracing::info_span!("session", session = tracing::field::Empty, code = tracing::field::Empty);
    let traceparent = trace::accept(&open.traceparent);
    trace::follow(&span, &traceparent);
    let attempt = async move {
        let admitted = admit(&edge, &end, &open, traceparent, begun).await;
        // The one in flight is decided; what it became is no longer the limit's business.
        drop(permit);
        // The ticket is used; the client keeps its number of unused ones.
        end.send_tickets(edge.tickets.mint(end.key));
        match admitted {
            Ok(admitted) => carry::carry(&edge, &end, &open, admitted).await,
            Err(Refused { code, denial, retry_after_ms }) => {
                tracing::Span::current().record("code", code.as_str());
                refuse(&end, &open, code, denial, retry_after_ms);
            }
        }
    };
    tokio::spawn(attempt.instrument(span));
}

/// A session that may be, with what it needs to be carried.
pub(super) struct Admitted {
    pub(super) entered: Entered,
    pub(super) hop: Awaited,
    pub(super) choice: Choice,
    pub(super) segment: Segment,
    pub(super) record: Appended,
    pub(super) begun: Instant,
}

/// What the caller is told.
pub(super) struct Refused {
    pub(super) code: SessionCode,
    pub(super) denial: String,
    pub(super) retry_after_ms: u64,
}

impl Refused {
    fn caller(code: SessionCode) -> Self {
        Self { code, denial: String::new(), retry_after_ms: 0 }
    }

    fn busy() -> Self {
        Self { code: SessionCode::Busy, denial: String::new(), retry_after_ms: BUSY_RETRY_MS }
    }
}

pub(super) fn refuse(end: &End, open: &Open, code: SessionCode, denial: String, retry_after_ms: u64) {
    metrics::open(code.as_str());
    end.send(Out::OpenRefused(OpenRefused { request: open.request, code: code as u32, denial, retry_after_ms }));
}

async fn admit(
    edge: &Arc<Edge>,
    end: &Arc<End>,
    open: &Open,
    traceparent: String,
    begun: Instant,
) -> Result<Admitted, Refused> {
    let ticket = Ticket::from_bytes(&open.ticket);
    let hop = ticket.and_then(|ticket| edge.tickets.expect(end.key, &ticket));
    let hop = hop.ok_or_else(|| Refused::caller(SessionCode::ProtocolError))?;
    if edge.is_draining() {
        return Err(Refused::caller(SessionCode::BrokerDraining));
    }
    if !edge.ground.lease_open() {
        return Err(Refused::caller(SessionCode::Stale));
    }
    let caller = end.caller.clone().ok_or_else(|| Refused::caller(SessionCode::Reauthenticate))?;
    let denial = random_u128().ok_or_else(Refused::busy)?;
    let denial = Denial { edge, caller: &caller, open, trace: trace::trace_id(&traceparent), id: denial, begun };
    let Some(endpoint) = endpoint_of(open) else {
        return Err(denial.no_such_name().await);
    };

    let program = open.claimed.get("program").map(|program| program.chars().take(PROGRAM_CHARS_MAX).collect());
    let id = random_u128().ok_or_else(Refused::busy)?;
    let session = Session::new(id, caller.clone(), endpoint, program, edge.ground.now_ms(), traceparent);
    tracing::Span::current().record("session", session.name());
    let Some(entered) = edge.sessions.enter(&session, edge.limits()) else {
        metrics::limited("sessions");
        return Err(Refused::busy());
    };

    // Entered first: a change that is not in this state finds the session.
    let state = edge.ground.state();
    let verdict = match tracing::debug_span!("policy").in_scope(|| edge.judge(&session, &state)) {
        Ok(verdict) => verdict,
        Err(Refusal::Caller(code)) => return Err(denial.by_caller(&state, code).await),
        Err(Refusal::Policy(verdict)) => return Err(denial.by_policy(&state, &verdict).await),
    };
    let segment = verdict.segment.and_then(|id| state.by_id::<Segment>(id));
    let Some(segment) = segment else { return Err(denial.by_policy(&state, &verdict).await) };
    edge.sessions.set_segment(&session, segment.id());
    let presenter = caller.peer.id.to_string();
    let choice = tracing::debug_span!("path")
        .in_scope(|| edge.routing.candidates(&state, segment.id(), &session.endpoint, Some(&presenter), id as u64));
    let Some(chosen) = choice.chosen else {
        if edge.is_warming(&state) {
            return Err(Refused::caller(SessionCode::Stale));
        }
        return Err(denial.unavailable(&state, &verdict).await);
    };
    edge.sessions.set_connector(&session, chosen.connector);
    tracing::debug!(
        host = %session.endpoint.host,
        port = session.endpoint.port,
        connector = %chosen.connector,
        segment = segment.name,
        "a session is admitted"
    );
    let record = Record::SessionOpen(Box::new(open_record(&session, &state, &verdict, &segment, &choice)));
    let record = edge.audit.append(&record).map_err(|_| Refused::busy())?;
    Ok(Admitted { entered, hop, choice, segment, record, begun })
}

fn endpoint_of(open: &Open) -> Option<Endpoint> {
    let transport = match open.transport {
        0 => Transport::Tcp,
        1 => Transport::Udp,
        _ => return None,
    };
    let port = u16::try_from(open.port).ok().filter(|port| *port != 0)?;
    Some(Endpoint { host: Host::parse(&open.host).ok()?, port, transport })
}

/// Records a refusal, waits for its time, and only then lets it be answered.
struct Denial<'a> {
    edge: &'a Edge,
    caller: &'a Caller,
    open: &'a Open,
    trace: String,
    id: u128,
    begun: Instant,
}

impl Denial<'_> {
    async fn no_such_name(self) -> Refused {
        let state = self.edge.ground.state();
        let record = self.record(&state, Reason::NoSegment.code(), None);
        self.answer(record, SessionCode::Refused).await
    }

    async fn by_policy(self, state: &State, verdict: &Verdict) -> Refused {
        let record = self.record(state, verdict.reason.code(), Some(verdict));
        self.answer(record, SessionCode::Refused).await
    }

    async fn by_caller(self, state: &State, code: SessionCode) -> Refused {
        let record = self.record(state, code.as_str(), None);
        // Whatever is wrong with the caller, logging in again is what can be done about it.
        self.answer(record, SessionCode::Reauthenticate).await
    }

    async fn unavailable(self, state: &State, verdict: &Verdict) -> Refused {
        let record = self.record(state, REASON_UNAVAILABLE, Some(verdict));
        self.answer(record, SessionCode::Unavailable).await
    }

    fn record(&self, state: &State, reason: &str, verdict: Option<&Verdict>) -> Denied {
        let transport = Transport::try_from(self.open.transport as i32).map_or("unknown", transport_name);
        Denied {
            denial: self.name(),
            party: self.caller.party(state),
            host: Host::parse(&self.open.host).map_or_else(|_| clipped(&self.open.host), |host| host.to_string()),
            port: u16::try_from(self.open.port).unwrap_or(0),
            transport: transport.to_owned(),
            reason: reason.to_owned(),
            segment_name: verdict.and_then(|v| v.matched.first()).map(|m| m.name.clone()).unwrap_or_default(),
            policies: verdict.map(policies_of).unwrap_or_default(),
            position: state.position(),
            revision: verdict.map_or_else(|| selvedge_domain::policy::revision(state), |v| v.revision),
            simulated: verdict.and_then(simulated),
            trace: self.trace.clone(),
        }
    }

    fn name(&self) -> String {
        format!("{:032x}", self.id)
    }

    async fn answer(self, record: Denied, code: SessionCode) -> Refused {
        tracing::debug!(host = record.host, port = record.port, reason = record.reason, "a session is refused");
        let denial = self.name();
        let recorded = self.edge.audit.append_durable(&Record::SessionDenied(Box::new(record))).await;
        tokio::time::sleep_until((self.begun + REFUSAL_FLOOR).into()).await;
        match recorded {
            Ok(()) => Refused { code, denial, retry_after_ms: 0 },
            // What cannot be recorded is not answered with a reason either.
            Err(_) => Refused::busy(),
        }
    }
}

fn policies_of(verdict: &Verdict) -> Vec<String> {
    verdict.deciding.iter().map(|policy| policy.name.clone()).collect()
}

/// The verdict with simulated policies counted, when it differs.
fn simulated(verdict: &Verdict) -> Option<bool> {
    verdict.simulated_differs.filter(|differs| *differs).map(|_| !verdict.allowed)
}

fn open_record(session: &Session, state: &State, verdict: &Verdict, segment: &Segment, choice: &Choice) -> SessionOpen {
    let candidates = choice.candidates.iter().take(CANDIDATES_RECORDED_MAX).map(|candidate| audit::Candidate {
        broker: candidate.pair.broker,
        connector: candidate.pair.connector.to_string(),
        cost_ms: candidate.cost.total_ms,
        lost: if candidate.fate == Fate::Chosen { String::new() } else { candidate.fate.to_string() },
    });
    SessionOpen {
        session: session.name(),
        party: session.caller.party(state),
        host: session.endpoint.host.to_string(),
        port: session.endpoint.port,
        transport: transport_name(session.endpoint.transport).to_owned(),
        segment: segment.id().to_string(),
        segment_name: segment.name.clone(),
        policies: policies_of(verdict),
        position: state.position(),
        revision: verdict.revision,
        simulated: simulated(verdict),
        connector: choice.chosen.map(|pair| pair.connector.to_string()).unwrap_or_default(),
        candidates: candidates.collect(),
        trace: session.trace(),
    }
}
