//! Devices, workloads, connectors, and revoking them.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use selvedge_domain::command::{Body, Release, Subject};
use selvedge_domain::rows::{Availability, Broker, Connector, ConnectorGroup, Device, User, Workload};
use selvedge_domain::state::IndexKey;
use selvedge_domain::{Id, State as Applied};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::web::auth::Caller;
use crate::web::change::{ChangedInfo, Wanted};
use crate::web::input::Input;
use crate::web::read::Seen;
use crate::web::{Context, Problem};

/// A device.
#[derive(Serialize, ToSchema)]
pub(super) struct DeviceView {
    /// Id.
    id: String,
    /// What its owner calls it.
    name: String,
    /// `userName` of its owner.
    user: String,
    /// Enrolled at, cluster time in milliseconds.
    enrolled_ms: u64,
    /// Revoked.
    revoked: bool,
    /// Held since the cluster was restored, until it is released.
    held: bool,
}

/// Devices.
#[derive(Serialize, ToSchema)]
pub(super) struct DeviceList {
    /// Devices.
    devices: Vec<DeviceView>,
}

/// All devices.
#[utoipa::path(get, path = "/api/v1/devices", tag = "identity", responses((status = 200, body = DeviceList)))]
pub(super) async fn devices(Seen(state): Seen) -> Json<DeviceList> {
    let view = |device: Device| DeviceView {
        id: device.id().to_string(),
        held: !device.revoked && state.is_held(device.id(), device.vouched_epoch),
        user: device.user.and_then(|id| state.by_id::<User>(id)).map(|user| user.user_name).unwrap_or_default(),
        name: device.name,
        enrolled_ms: device.enrolled_ms,
        revoked: device.revoked,
    };
    Json(DeviceList { devices: state.rows::<Device>().map(view).collect() })
}

/// A workload.
#[derive(Serialize, ToSchema)]
pub(super) struct WorkloadView {
    /// Id.
    id: String,
    /// Name.
    name: String,
    /// Instances that were enrolled.
    instances: usize,
    /// Revoked.
    revoked: bool,
    /// Held since the cluster was restored, until it is released.
    held: bool,
}

/// Workloads.
#[derive(Serialize, ToSchema)]
pub(super) struct WorkloadList {
    /// Workloads.
    workloads: Vec<WorkloadView>,
}

/// All workloads.
#[utoipa::path(get, path = "/api/v1/workloads", tag = "identity", responses((status = 200, body = WorkloadList)))]
pub(super) async fn workloads(Seen(state): Seen) -> Json<WorkloadList> {
    let view = |row: Workload| WorkloadView {
        id: row.id().to_string(),
        held: !row.revoked && state.is_held(row.id(), row.vouched_epoch),
        instances: row.keys_sha256.len(),
        revoked: row.revoked,
        name: row.name,
    };
    Json(WorkloadList { workloads: state.rows::<Workload>().map(view).collect() })
}

/// A connector.
#[derive(Serialize, ToSchema)]
pub(super) struct ConnectorView {
    /// Id.
    id: String,
    /// What its operator calls it.
    name: String,
    /// Name of its connector group.
    group: String,
    /// Connected to a broker that is a member.
    up: bool,
    /// Enrolled at, cluster time in milliseconds.
    enrolled_ms: u64,
    /// Revoked.
    revoked: bool,
    /// Held since the cluster was restored, until it is released.
    held: bool,
    /// As each broker sees it.
    seen: Vec<SeenView>,
}

/// A connector as one broker sees it.
#[derive(Serialize, ToSchema)]
pub(super) struct SeenView {
    /// Node id of the broker.
    broker: String,
    /// Name of the broker.
    broker_name: String,
    /// Connected.
    up: bool,
    /// Targets that do not answer.
    down: Vec<String>,
    /// Since when, cluster time in milliseconds.
    since_ms: u64,
}

/// Connectors.
#[derive(Serialize, ToSchema)]
pub(super) struct ConnectorList {
    /// Connectors.
    connectors: Vec<ConnectorView>,
}

/// All connectors and their availability.
#[utoipa::path(get, path = "/api/v1/connectors", tag = "identity", responses((status = 200, body = ConnectorList)))]
pub(super) async fn connectors(Seen(state): Seen) -> Json<ConnectorList> {
    let view = |row: Connector| {
        let prefix = row.id().key();
        let seen: Vec<_> = state.rows_under::<Availability>(&prefix).map(|row| seen(&state, row)).collect();
        ConnectorView {
            id: row.id().to_string(),
            held: !row.revoked && state.is_held(row.id(), row.vouched_epoch),
            group: row.group.and_then(|id| state.by_id::<ConnectorGroup>(id)).map(|row| row.name).unwrap_or_default(),
            up: !row.revoked && seen.iter().any(|seen| seen.up),
            name: row.name,
            enrolled_ms: row.enrolled_ms,
            revoked: row.revoked,
            seen,
        }
    };
    Json(ConnectorList { connectors: state.rows::<Connector>().map(view).collect() })
}

fn seen(state: &Applied, row: Availability) -> SeenView {
    let broker = state.broker(row.broker);
    SeenView {
        broker: row.broker.to_string(),
        // What a removed broker last said does not count.
        up: row.up && broker.is_some(),
        broker_name: broker.map(|broker| broker.name).unwrap_or_default(),
        down: row.down,
        since_ms: row.since_ms,
    }
}

/// What is to be revoked.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Revoke {
    /// `device/1-42`, `workload/billing`, `connector/1-43`, `broker/123`: an id, or a name that is unique.
    subject: String,
}

/// Revokes a device, workload, connector or broker: its certificates are void, its sessions are cut.
#[utoipa::path(post, path = "/api/v1/revoke", tag = "identity", request_body = Revoke,
    responses((status = 200, body = ChangedInfo), (status = 404, body = Problem)))]
pub(super) async fn revoke(
    State(context): State<Arc<Context>>,
    caller: Caller,
    wanted: Wanted,
    Input(revoke): Input<Revoke>,
) -> Result<Response, Problem> {
    let subject = subject(&context.cluster.state(), &revoke.subject)?;
    let changed = context.change(&caller, &wanted, "revoke", &revoke.subject, Body::Revoke { subject }).await?;
    Ok(changed.answer(StatusCode::OK, changed.info(&context)))
}

/// What is to be let be.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct ReleaseAsked {
    /// `device/1-42`, `workload/billing` or `connector/1-43`: an id, or a name that is unique.
    subject: Option<String>,
    /// Instead: everything, users too, of the cluster with this id (hex). Takes an owner.
    cluster_id: Option<String>,
}

/// Lets be what is held since the cluster was restored: one device, workload or connector, or everything.
#[utoipa::path(post, path = "/api/v1/release", tag = "identity", request_body = ReleaseAsked,
    responses((status = 200, body = ChangedInfo), (status = 404, body = Problem), (status = 422, body = Problem)))]
pub(super) async fn release(
    State(context): State<Arc<Context>>,
    caller: Caller,
    wanted: Wanted,
    Input(asked): Input<ReleaseAsked>,
) -> Result<Response, Problem> {
    let (release, target) = match asked {
        ReleaseAsked { subject: Some(text), cluster_id: None } => {
            (Release::Subject(subject(&context.cluster.state(), &text)?), text)
        }
        ReleaseAsked { subject: None, cluster_id: Some(id) } => {
            let bytes = hex::decode(&id).ok().and_then(|bytes| bytes.try_into().ok());
            let cluster_id = bytes.ok_or_else(|| Problem::invalid("a cluster id is 32 hexadecimal digits"))?;
            (Release::Everything { cluster_id }, format!("cluster/{id}"))
        }
        _ => return Err(Problem::invalid("either `subject` or `cluster_id`")),
    };
    let changed = context.change(&caller, &wanted, "release", &target, Body::Release(release)).await?;
    Ok(changed.answer(StatusCode::OK, changed.info(&context)))
}

fn subject(state: &Applied, text: &str) -> Result<Subject, Problem> {
    let wrong = || Problem::invalid("write `device/ID`, `workload/NAME`, `connector/NAME` or `broker/NAME`");
    let (kind, which) = text.split_once('/').ok_or_else(wrong)?;
    let id = which.parse::<Id>().ok();
    let missing =
        || Problem::not_found(format!("`{}` is not there, or the name is not unique", crate::audit::clipped(text)));
    match kind {
        "device" => Ok(Subject::Device(
            id.map_or_else(
                || only(state.rows::<Device>().filter(|d| !d.revoked && d.name == which).map(|d| d.id())),
                Some,
            )
            .ok_or_else(missing)?,
        )),
        "workload" => Ok(Subject::Workload(
            id.or_else(|| state.find::<Workload>(IndexKey::name(which)).map(|w| w.id())).ok_or_else(missing)?,
        )),
        "connector" => Ok(Subject::Connector(
            id.map_or_else(
                || only(state.rows::<Connector>().filter(|c| !c.revoked && c.name == which).map(|c| c.id())),
                Some,
            )
            .ok_or_else(missing)?,
        )),
        "broker" => {
            let named = || only(state.rows::<Broker>().filter(|b| !b.removed && b.name == which).map(|b| b.node));
            Ok(Subject::Broker(which.parse().ok().or_else(named).ok_or_else(missing)?))
        }
        _ => Err(wrong()),
    }
}

fn only<T>(mut found: impl Iterator<Item = T>) -> Option<T> {
    found.next().filter(|_| found.next().is_none())
}
