//! The cluster and its brokers.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use selvedge_domain::command::{Body, PutBroker};
use selvedge_domain::limits::DRAIN_MS_DEFAULT;
use selvedge_domain::rows::{Broker, BrokerRole};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::node_of;
use crate::web::auth::Caller;
use crate::web::change::{ChangedInfo, Wanted};
use crate::web::input::Input;
use crate::web::read::Seen;
use crate::web::{Context, Problem};

/// A leader that is to be removed has so long to hand over.
const HAND_OVER_WAIT: Duration = Duration::from_secs(10);
const HAND_OVER_POLL: Duration = Duration::from_millis(50);
/// Cluster time is set no further ahead of a broker's own clock than this.
const AHEAD_MS_MAX: u64 = 60_000;

/// The cluster as the answering broker sees it.
#[derive(Serialize, ToSchema)]
pub(super) struct ClusterView {
    /// Hex.
    cluster_id: String,
    /// Trust domain of every id.
    trust_domain: String,
    /// SHA-256 of the issuer's key, hex.
    pin: String,
    /// Version of the rules in force.
    version: u32,
    /// The newest version that a member knows, when it is not in force: all must know it before it is raised.
    version_next: Option<u32>,
    /// Epoch of the log.
    epoch: u32,
    /// Users, devices, workloads and connectors of epochs before this one are held until somebody vouches for them; 0
    /// when nobody is.
    held_before_epoch: u32,
    /// Position of the state here.
    position: String,
    /// Hash of the state here, hex.
    state_hash: String,
    /// Policy revision.
    revision: u64,
    /// Freshness lease, milliseconds.
    lease_ms: u64,
    /// Hold, milliseconds.
    hold_ms: u64,
    /// How long the event journal is kept, milliseconds.
    journal_keep_ms: u64,
    /// Cluster time, milliseconds.
    now_ms: u64,
    /// Node id of the answering broker.
    this: String,
    /// Node id of the leader, as this broker knows it.
    leader: Option<String>,
    /// Raft's term.
    term: u64,
    /// Index of the last entry applied here.
    applied: Option<u64>,
    /// Index of the last entry in this broker's log.
    last_log: Option<u64>,
    /// Index of the last entry enforced here.
    enforced: Option<u64>,
    /// What is left of this broker's lease, milliseconds.
    lease_left_ms: u64,
    /// This broker may admit and forward.
    lease_open: bool,
    /// All brokers, those of the past included.
    brokers: Vec<BrokerView>,
}

/// A broker.
#[derive(Serialize, ToSchema)]
pub(super) struct BrokerView {
    /// Node id.
    node: String,
    /// Name.
    name: String,
    /// Region.
    region: String,
    /// Name in TLS.
    host: String,
    /// `host:port` of the edge.
    edge: String,
    /// `host:port` of the web listener.
    web: String,
    /// `host:port` for brokers.
    peer: String,
    /// `voter`, `issuer`, `web`, `edge`.
    roles: Vec<&'static str>,
    /// `voter`, `learner` or `none`.
    raft: &'static str,
    /// It leads.
    leader: bool,
    /// It answered this request.
    this: bool,
    /// It was told to take no new sessions.
    draining: bool,
    /// When what is left of its sessions is cut, cluster time in milliseconds.
    drain_until_ms: Option<u64>,
    /// It takes no new sessions, as it says itself; unknown when it was not heard lately, like the next two.
    drains: Option<bool>,
    /// Sessions that it stitches.
    sessions: Option<u64>,
    /// Sessions that were cut since it began to drain.
    sessions_cut: Option<u64>,
    /// It was removed for ever.
    removed: bool,
    /// Entries that its log is behind; known to the leader only.
    lag_entries: Option<u64>,
    /// Since it last answered the leader, milliseconds; known to the leader only.
    last_contact_ms: Option<u64>,
    /// Its build; unknown when it was not heard lately, like the next one.
    build: Option<String>,
    /// The newest version of the rules that it knows.
    version: Option<u32>,
    /// It is a member that is not known to know `version_next`.
    holds_raise_back: bool,
    /// Since when it is a member, cluster time in milliseconds.
    joined_ms: u64,
}

/// Members, roles, leader, lag.
#[utoipa::path(get, path = "/api/v1/cluster", tag = "cluster", responses((status = 200, body = ClusterView)))]
pub(super) async fn show(State(context): State<Arc<Context>>, Seen(state): Seen) -> Json<ClusterView> {
    let status = context.cluster.status();
    let cluster = state.cluster().unwrap_or_default();
    let newest = status.members.iter().filter_map(|member| member.version).max();
    let version_next = newest.filter(|newest| *newest > cluster.version);
    let broker = |row: Broker| {
        let load = context.routing.as_ref().and_then(|routing| routing.load(row.node));
        let member = status.members.iter().find(|member| member.node == row.node);
        BrokerView {
            node: row.node.to_string(),
            roles: row.roles().map(BrokerRole::name).collect(),
            raft: member.map_or("none", |member| if member.voter { "voter" } else { "learner" }),
            leader: status.leader == Some(row.node),
            this: status.node == row.node,
            lag_entries: member.and_then(|member| member.lag_entries),
            last_contact_ms: member.and_then(|member| member.last_contact_ms),
            build: member.and_then(|member| member.build.clone()),
            version: member.and_then(|member| member.version),
            holds_raise_back: version_next.is_some() && member.is_some_and(|member| member.version < version_next),
            name: row.name,
            region: row.region,
            host: row.host,
            edge: row.edge,
            web: row.web,
            peer: row.peer,
            draining: row.draining,
            drain_until_ms: row.draining.then_some(row.drain_until_ms),
            drains: load.map(|load| load.draining),
            sessions: load.map(|load| load.sessions),
            sessions_cut: load.map(|load| load.sessions_cut),
            removed: row.removed,
            joined_ms: row.joined_ms,
        }
    };
    Json(ClusterView {
        journal_keep_ms: cluster.journal_keep_ms(),
        cluster_id: hex::encode(&cluster.cluster_id),
        trust_domain: cluster.trust_domain.clone(),
        pin: context.anchors.pin().to_string(),
        version: cluster.version,
        version_next,
        epoch: status.epoch,
        held_before_epoch: cluster.held_before_epoch,
        position: state.position().to_string(),
        state_hash: status.state_hash.clone(),
        revision: cluster.policy_revision,
        lease_ms: cluster.lease_ms,
        hold_ms: cluster.hold_ms,
        now_ms: status.now_ms,
        this: status.node.to_string(),
        leader: status.leader.map(|node| node.to_string()),
        term: status.term,
        applied: status.applied,
        last_log: status.last_log,
        enforced: status.enforced,
        lease_left_ms: status.lease_left_ms,
        lease_open: context.cluster.lease().open(),
        brokers: state.rows::<Broker>().map(broker).collect(),
    })
}

/// What the whole cluster is set to. What is absent stays as it is.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Settings {
    /// Freshness lease, milliseconds.
    lease_ms: Option<u64>,
    /// Hold, milliseconds.
    hold_ms: Option<u64>,
    /// How long the event journal is kept, milliseconds.
    journal_keep_ms: Option<u64>,
}

/// Changes settings of the cluster: lease and hold, or how long events are kept.
#[utoipa::path(put, path = "/api/v1/cluster/settings", tag = "cluster", request_body = Settings,
    responses((status = 200, body = ChangedInfo), (status = 422, body = Problem)))]
pub(super) async fn settings(
    State(context): State<Arc<Context>>,
    caller: Caller,
    wanted: Wanted,
    Input(settings): Input<Settings>,
) -> Result<Response, Problem> {
    let now = context.cluster.state().cluster().unwrap_or_default();
    let body = match settings {
        Settings { lease_ms: None, hold_ms: None, journal_keep_ms: Some(keep_ms) } => Body::KeepJournal { keep_ms },
        Settings { lease_ms, hold_ms, journal_keep_ms: None } if lease_ms.or(hold_ms).is_some() => {
            let (lease_ms, hold_ms) = (lease_ms.unwrap_or(now.lease_ms), hold_ms.unwrap_or(now.hold_ms));
            Body::PutSettings { lease_ms, hold_ms }
        }
        _ => return Err(Problem::invalid("either `lease_ms` and `hold_ms`, or `journal_keep_ms`")),
    };
    let changed = context.change(&caller, &wanted, "cluster.settings", "cluster", body).await?;
    Ok(changed.answer(StatusCode::OK, changed.info(&context)))
}

/// The version of the rules that is to be in force.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Version {
    /// Every member must know it.
    version: u32,
}

/// Raises the version of the rules in force, for ever: older builds do not start any more.
#[utoipa::path(put, path = "/api/v1/cluster/version", tag = "cluster", request_body = Version,
    responses((status = 200, body = ChangedInfo), (status = 409, body = Problem), (status = 422, body = Problem)))]
pub(super) async fn raise_version(
    State(context): State<Arc<Context>>,
    caller: Caller,
    wanted: Wanted,
    Input(Version { version }): Input<Version>,
) -> Result<Response, Problem> {
    let body = Body::RaiseMinVersion { version };
    let changed = context.change(&caller, &wanted, "cluster.raise_version", "cluster", body).await?;
    Ok(changed.answer(StatusCode::OK, changed.info(&context)))
}

/// Whether a broker drains.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Drain {
    /// It takes no new sessions.
    draining: bool,
    /// What is left of its sessions after so many milliseconds is cut; 8 hours when absent.
    deadline_ms: Option<u64>,
}

/// Begins or ends draining a broker.
#[utoipa::path(post, path = "/api/v1/cluster/brokers/{node}/drain", tag = "cluster", request_body = Drain,
    params(("node" = String, Path, description = "node id")),
    responses((status = 200, body = ChangedInfo), (status = 404, body = Problem)))]
pub(super) async fn drain(
    State(context): State<Arc<Context>>,
    Path(node): Path<String>,
    caller: Caller,
    wanted: Wanted,
    Input(drain): Input<Drain>,
) -> Result<Response, Problem> {
    let action = if drain.draining { "broker.drain" } else { "broker.undrain" };
    let within_ms = drain.deadline_ms.unwrap_or(DRAIN_MS_DEFAULT);
    let body = Body::DrainBroker { node: node_of(&node)?, draining: drain.draining, within_ms };
    let changed = context.change(&caller, &wanted, action, &format!("broker/{node}"), body).await?;
    Ok(changed.answer(StatusCode::OK, changed.info(&context)))
}

/// Makes a learner a voter, once it has caught up, and gives it the role if it lacks it.
#[utoipa::path(post, path = "/api/v1/cluster/brokers/{node}/promote", tag = "cluster",
    params(("node" = String, Path, description = "node id")),
    responses((status = 204), (status = 404, body = Problem), (status = 409, body = Problem)))]
pub(super) async fn promote(
    State(context): State<Arc<Context>>,
    Path(node): Path<String>,
    caller: Caller,
    wanted: Wanted,
) -> Result<Response, Problem> {
    let number = node_of(&node)?;
    let row = context.cluster.state().broker(number);
    let row = row.ok_or_else(|| Problem::not_found(format!("broker `{number}` is not there")))?;
    if !row.has(BrokerRole::Voter) {
        let put = PutBroker {
            node: number,
            roles: [row.roles.clone(), vec![BrokerRole::Voter as i32]].concat(),
            name: row.name,
            region: row.region,
            host: row.host,
            edge: row.edge,
            web: row.web,
            peer: row.peer,
        };
        context.change(&caller, &wanted, "broker.role", &format!("broker/{node}"), Body::PutBroker(put)).await?;
    }
    let result = context.cluster.promote(&caller.asker(), number).await.map_err(Problem::from);
    membership_record(&context, &caller, "broker.promote", &node, &result).await;
    result?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// Removes a broker for ever: its identity is void at once, and it leaves the membership. Leadership is handed over
/// before, if it leads. Asking again goes on where it was cut short.
#[utoipa::path(delete, path = "/api/v1/cluster/brokers/{node}", tag = "cluster",
    params(("node" = String, Path, description = "node id")),
    responses((status = 200, body = ChangedInfo), (status = 404, body = Problem), (status = 409, body = Problem)))]
pub(super) async fn remove(
    State(context): State<Arc<Context>>,
    Path(node): Path<String>,
    caller: Caller,
    wanted: Wanted,
) -> Result<Response, Problem> {
    let number = node_of(&node)?;
    let members = context.cluster.status().members;
    if members.iter().any(|member| member.node == number && member.voter)
        && members.iter().filter(|member| member.voter).count() == 1
    {
        return Err(Problem::conflict("the last voter cannot be removed"));
    }
    if context.cluster.status().leader == Some(number) {
        let result = hand_over_from(&context, &caller, number).await;
        membership_record(&context, &caller, "cluster.transfer", &node, &result).await;
        result?;
    }
    let body = Body::RemoveBroker { node: number };
    let changed = context.change(&caller, &wanted, "broker.remove", &format!("broker/{node}"), body).await?;
    // From here on the others take no call of a broker that removed itself; whoever leads lets go of it.
    if number != context.cluster.node() {
        let result = context.cluster.remove(&caller.asker(), number).await.map_err(Problem::from);
        membership_record(&context, &caller, "broker.leave", &node, &result).await;
        result?;
    }
    Ok(changed.answer(StatusCode::OK, changed.info(&context)))
}

/// Hands leadership over to whoever is best, and waits until somebody else leads.
async fn hand_over_from(context: &Context, caller: &Caller, leader: u64) -> Result<(), Problem> {
    context.cluster.transfer_leader(&caller.asker(), None).await?;
    let deadline = tokio::time::Instant::now() + HAND_OVER_WAIT;
    while context.cluster.status().leader.is_none_or(|now| now == leader) {
        if tokio::time::Instant::now() >= deadline {
            return Err(Problem::unavailable("no_leader", "leadership was not handed over in time; ask again"));
        }
        tokio::time::sleep(HAND_OVER_POLL).await;
    }
    Ok(())
}

/// To whom leadership goes.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Transfer {
    /// Node id; the voter that has the most of the log when absent.
    #[serde(default)]
    to: Option<String>,
}

/// Hands leadership over.
#[utoipa::path(post, path = "/api/v1/cluster/transfer", tag = "cluster", request_body = Transfer,
    responses((status = 204), (status = 409, body = Problem)))]
pub(super) async fn transfer(
    State(context): State<Arc<Context>>,
    caller: Caller,
    Input(transfer): Input<Transfer>,
) -> Result<Response, Problem> {
    let to = transfer.to.as_deref().map(node_of).transpose()?;
    let result = context.cluster.transfer_leader(&caller.asker(), to).await.map_err(Problem::from);
    let target = transfer.to.unwrap_or_default();
    membership_record(&context, &caller, "cluster.transfer", &target, &result).await;
    result?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// What cluster time is to be.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct NewTime {
    /// Milliseconds since the Unix epoch.
    time_ms: u64,
}

/// Sets cluster time forward, after the voters' clocks stepped by more than it follows by itself. It never goes back, so
/// a time that this broker's own clock does not show is refused.
#[utoipa::path(post, path = "/api/v1/cluster/time", tag = "cluster", request_body = NewTime,
    responses((status = 200, body = ChangedInfo), (status = 422, body = Problem)))]
pub(super) async fn set_time(
    State(context): State<Arc<Context>>,
    caller: Caller,
    wanted: Wanted,
    Input(new): Input<NewTime>,
) -> Result<Response, Problem> {
    let wall_ms = context.cluster.wall_ms();
    if new.time_ms > wall_ms.saturating_add(AHEAD_MS_MAX) {
        let detail = format!("the clock of this broker is at {wall_ms} ms, and cluster time never goes back");
        return Err(Problem::invalid(detail));
    }
    let (target, body) = (new.time_ms.to_string(), Body::SetTime { time_ms: new.time_ms });
    let changed = context.change(&caller, &wanted, "cluster.set-time", &target, body).await?;
    Ok(changed.answer(StatusCode::OK, changed.info(&context)))
}

/// Membership is Raft's own and no command of the log, so its record is written here.
async fn membership_record(context: &Context, caller: &Caller, action: &str, node: &str, result: &Result<(), Problem>) {
    let record = crate::audit::AdminChange {
        actor: caller.label(),
        actor_name: caller.name.clone(),
        action: action.to_owned(),
        target: format!("broker/{node}"),
        outcome: result.as_ref().map_or_else(|problem| problem.code, |()| "done").to_owned(),
        position: None,
        source: caller.source.to_string(),
    };
    let _ = context.audit.append_durable(&crate::audit::Record::AdminChange(record)).await;
}
