//! Why someone may or may not reach something, and on which path.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use selvedge_domain::name::Host;
use selvedge_domain::path::{BetterBroker, Candidate, Cost, Pair};
use selvedge_domain::policy::{Context as Circumstances, Explanation, Principal};
use selvedge_domain::rows::{Transport, Workload};
use selvedge_domain::segment::Endpoint;
use selvedge_domain::state::{IndexKey, Unnamed};
use selvedge_domain::{Id, State as Applied};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::{IntoParams, ToSchema};

use super::audit;
use crate::edge::SessionInfo;
use crate::web::input::Params;
use crate::web::read::Seen;
use crate::web::{Context, Problem};

/// Characters of a denial's id.
const DENIAL_CHARS: std::ops::RangeInclusive<usize> = 8..=64;

/// Who wants to reach what.
#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(super) struct Asked {
    /// `userName`, or `directory/userName`.
    user: Option<String>,
    /// Name of a workload.
    workload: Option<String>,
    /// The id that a refused caller was told; everything else is then taken from its record.
    denial: Option<String>,
    /// Host.
    host: Option<String>,
    /// Port.
    port: Option<u16>,
    /// `tcp` (default) or `udp`.
    transport: Option<String>,
}

/// Why.
#[derive(Serialize, ToSchema)]
pub(super) struct Explained {
    /// What the policy says now.
    explanation: Explanation,
    /// For a denial: its audit record, with the position and the revision that it was decided on.
    recorded: Option<Value>,
}

/// Explains a verdict: the segment, each policy with its first unmet condition, the deciding one.
#[utoipa::path(get, path = "/api/v1/explain", tag = "policy", params(Asked),
    responses((status = 200, body = Explained), (status = 404, body = Problem), (status = 422, body = Problem)))]
pub(super) async fn explain(
    State(context): State<Arc<Context>>,
    Seen(state): Seen,
    Params(asked): Params<Asked>,
) -> Result<Json<Explained>, Problem> {
    let (asked, recorded) = match asked.denial {
        None => (asked, None),
        Some(denial) => {
            let (asked, record) = of_denial(&context, denial).await?;
            (asked, Some(record))
        }
    };
    let (principal, endpoint) = (principal(&state, &asked)?, endpoint(&asked)?);
    let circumstances = circumstances(&context, &state);
    let decider = context.decider.clone();
    let explained =
        tokio::task::spawn_blocking(move || decider.explain(&state, principal, &endpoint, &circumstances)).await;
    Ok(Json(Explained { explanation: explained.map_err(|error| Problem::internal(&error))?, recorded }))
}

/// Paths of a session, with what became of each.
#[derive(Serialize, ToSchema)]
pub(super) struct PathView {
    /// The policy allows it.
    allowed: bool,
    /// Why.
    reason: String,
    /// The segment that gives connectors.
    segment: Option<String>,
    /// Node id of the broker that answers; paths are weighed as for a client that is attached here.
    broker: String,
    /// What would carry the session.
    chosen: Option<PairView>,
    /// What would be tried next.
    second: Option<PairView>,
    /// A broker that the client should rather use.
    better_broker: Option<BetterView>,
    /// Every pair, the best first.
    candidates: Vec<CandidateView>,
}

/// A broker and a connector.
#[derive(Serialize, ToSchema)]
pub(super) struct PairView {
    /// Node id.
    broker: String,
    /// Connector's id.
    connector: String,
}

/// A better broker.
#[derive(Serialize, ToSchema)]
pub(super) struct BetterView {
    /// Node id.
    broker: String,
    /// Saved per round trip, milliseconds.
    saves_ms: f64,
}

/// A pair that was weighed.
#[derive(Serialize, ToSchema)]
pub(super) struct CandidateView {
    /// Node id.
    broker: String,
    /// Broker's name.
    broker_name: String,
    /// Connector's id.
    connector: String,
    /// Connector's name.
    connector_name: String,
    /// What it costs.
    cost: Cost,
    /// `chosen`, `second`, or why it lost.
    fate: String,
    /// The same in words.
    why: String,
}

/// The paths that a session would have, their costs, and why the losers lose.
#[utoipa::path(get, path = "/api/v1/path", tag = "policy", params(Asked),
    responses((status = 200, body = PathView), (status = 404, body = Problem), (status = 503, body = Problem)))]
pub(super) async fn path(
    State(context): State<Arc<Context>>,
    Seen(state): Seen,
    Params(asked): Params<Asked>,
) -> Result<Json<PathView>, Problem> {
    let routing = context
        .routing
        .as_ref()
        .ok_or_else(|| Problem::unavailable("no_edge", "this broker has no edge; ask another"))?;
    let (principal, endpoint) = (principal(&state, &asked)?, endpoint(&asked)?);
    let verdict = context.decider.decide(&state, principal, &endpoint, &circumstances(&context, &state));
    // Paths are shown for a denied request too: the segment that the host has, if any.
    let segment = verdict.segment.or_else(|| verdict.matched.first().map(|matched| matched.segment));
    let ends = ends(&context, &state, principal);
    let choice =
        segment.map(|segment| routing.candidates(&state, segment, &endpoint, ends.first().map(String::as_str), 0));
    let pair = |pair: Pair| PairView { broker: pair.broker.to_string(), connector: pair.connector.to_string() };
    let better = |better: BetterBroker| BetterView { broker: better.node.to_string(), saves_ms: better.saves_ms };
    Ok(Json(PathView {
        allowed: verdict.allowed,
        reason: verdict.reason.to_string(),
        segment: segment.and_then(|id| state.by_id::<selvedge_domain::rows::Segment>(id)).map(|row| row.name),
        broker: context.cluster.node().to_string(),
        chosen: choice.as_ref().and_then(|choice| choice.chosen).map(pair),
        second: choice.as_ref().and_then(|choice| choice.second).map(pair),
        better_broker: choice.as_ref().and_then(|choice| choice.better_broker).map(better),
        candidates: choice.into_iter().flat_map(|choice| choice.candidates).map(candidate).collect(),
    }))
}

fn candidate(candidate: Candidate) -> CandidateView {
    let tagged = serde_json::to_value(&candidate.fate).unwrap_or_default();
    CandidateView {
        broker: candidate.pair.broker.to_string(),
        broker_name: candidate.broker_name,
        connector: candidate.pair.connector.to_string(),
        connector_name: candidate.connector_name,
        cost: candidate.cost,
        fate: tagged["fate"].as_str().unwrap_or_default().to_owned(),
        why: candidate.fate.to_string(),
    }
}

/// Sessions.
#[derive(Serialize, ToSchema)]
pub(super) struct SessionList {
    /// Sessions that this broker stitches, the oldest first.
    sessions: Vec<SessionInfo>,
}

/// The sessions that this broker stitches now.
#[utoipa::path(get, path = "/api/v1/sessions", tag = "sessions", responses((status = 200, body = SessionList)))]
pub(super) async fn sessions(State(context): State<Arc<Context>>) -> Json<SessionList> {
    Json(SessionList { sessions: context.edge.as_ref().map(|edge| edge.sessions()).unwrap_or_default() })
}

/// The principal and endpoint of a recorded denial, and its record.
async fn of_denial(context: &Context, denial: String) -> Result<(Asked, Value), Problem> {
    if !DENIAL_CHARS.contains(&denial.len()) || !denial.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-') {
        return Err(Problem::invalid("`denial` is the id that a refused caller was told"));
    }
    let line = audit::denial(context, denial).await?;
    let line =
        line.ok_or_else(|| Problem::not_found("no journal of this broker has this denial; ask another broker"))?;
    let record = &line["record"];
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let (mut user, mut workload) = (None, None);
    match record["party"]["principal"].as_str().and_then(|principal| principal.split_once('/')) {
        Some(("user", id)) => user = Some(id.to_owned()),
        Some(("workload", id)) => workload = Some(id.to_owned()),
        _ => return Err(Problem::invalid("the denied one is neither a user nor a workload")),
    }
    let asked = Asked {
        user,
        workload,
        denial: None,
        host: text(&record["host"]),
        port: record["port"].as_u64().and_then(|port| u16::try_from(port).ok()),
        transport: text(&record["transport"]),
    };
    Ok((asked, line))
}

/// By name, or by id as records have it.
fn principal(state: &Applied, asked: &Asked) -> Result<Principal, Problem> {
    match (&asked.user, &asked.workload) {
        (Some(name), None) => match (state.user_named(name), name.parse::<Id>()) {
            (Ok(user), _) => Ok(Principal::User(user.id())),
            (Err(_), Ok(id)) => Ok(Principal::User(id)),
            (Err(Unnamed::Unknown), _) => {
                Err(Problem::not_found(format!("there is no user `{}`", crate::audit::clipped(name))))
            }
            (Err(Unnamed::Ambiguous), _) => {
                Err(Problem::invalid("several directories have this user: write `directory/userName`"))
            }
        },
        (None, Some(name)) => {
            let found = state.find::<Workload>(IndexKey::name(name)).map(|workload| workload.id());
            let found = found.or_else(|| name.parse().ok());
            let missing = || Problem::not_found(format!("there is no workload `{}`", crate::audit::clipped(name)));
            found.map(Principal::Workload).ok_or_else(missing)
        }
        _ => Err(Problem::invalid("give `user` or `workload`, or `denial` alone")),
    }
}

fn endpoint(asked: &Asked) -> Result<Endpoint, Problem> {
    let host = asked.host.as_deref().ok_or_else(|| Problem::invalid("`host` is needed"))?;
    let host = Host::parse(host).map_err(|error| Problem::invalid(error.to_string()))?;
    let port = asked.port.filter(|port| *port != 0).ok_or_else(|| Problem::invalid("`port` is 1 to 65535"))?;
    let transport = match asked.transport.as_deref() {
        None | Some("tcp") => Transport::Tcp,
        Some("udp") => Transport::Udp,
        Some(_) => return Err(Problem::invalid("`transport` is `tcp` or `udp`")),
    };
    Ok(Endpoint { host, port, transport })
}

/// As of someone who logged in just now, without a device that anything is known of.
fn circumstances(context: &Context, state: &Applied) -> Circumstances {
    let now_ms = context.cluster.now_ms();
    Circumstances {
        now_ms,
        broker_region: state.broker(context.cluster.node()).map(|broker| broker.region).unwrap_or_default(),
        auth_time_ms: Some(now_ms),
        ..Circumstances::default()
    }
}

/// SPIFFE ids of the ends that this principal may use, by which an RTT may have been measured.
fn ends(context: &Context, state: &Applied, principal: Principal) -> Vec<String> {
    let domain = context.anchors.trust_domain();
    match principal {
        Principal::User(id) => {
            let devices = state.devices_of(id).filter(|device| !device.revoked);
            devices.map(|device| format!("spiffe://{domain}/client/{}", device.id())).collect()
        }
        Principal::Workload(id) => vec![format!("spiffe://{domain}/workload/{id}")],
        Principal::Device(id) => vec![format!("spiffe://{domain}/client/{id}")],
    }
}
