//! Enrolment secrets: provisioning keys, one-time codes, join tokens.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::Response;
use selvedge_domain::command::{Body, CreateEnrolKey};
use selvedge_domain::rows::{BrokerRole, ConnectorGroup, EnrolKey, EnrolKind, User, Workload};
use selvedge_domain::{Id, State as Applied};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::access::shown_before;
use super::{id_of, no_randomness};
use crate::web::auth::Caller;
use crate::web::change::{ChangedInfo, Wanted};
use crate::web::input::Input;
use crate::web::read::Seen;
use crate::web::{Context, EnrolSecret, Problem, sha256};

/// What an enrolment secret makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(in crate::web) enum Kind {
    /// A connector, into a connector group.
    Connector,
    /// An instance of a workload.
    Workload,
    /// A person's device.
    Device,
    /// A broker.
    Broker,
}

impl From<Kind> for EnrolKind {
    fn from(kind: Kind) -> Self {
        match kind {
            Kind::Connector => Self::Connector,
            Kind::Workload => Self::Workload,
            Kind::Device => Self::Device,
            Kind::Broker => Self::Broker,
        }
    }
}

/// The kind, as callers write it.
pub(in crate::web) fn kind_name(kind: EnrolKind) -> &'static str {
    match kind {
        EnrolKind::Unspecified => "none",
        EnrolKind::Connector => "connector",
        EnrolKind::Workload => "workload",
        EnrolKind::Device => "device",
        EnrolKind::Broker => "broker",
    }
}

/// A new enrolment secret.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct NewKey {
    /// What it makes.
    kind: Kind,
    /// For people.
    name: String,
    /// Connector group, workload, or `userName` (`directory/userName` when several directories have it); for brokers their
    /// roles (`voter,issuer,web,edge`), all when empty.
    #[serde(default)]
    target: String,
    /// How often it may be used.
    #[serde(default = "one")]
    uses: u32,
    /// Life from now, seconds.
    #[serde(default = "an_hour")]
    life_s: u64,
}

fn one() -> u32 {
    1
}

fn an_hour() -> u64 {
    3_600
}

/// An enrolment secret that was made.
#[derive(Serialize, ToSchema)]
pub(super) struct KeyMade {
    /// Id.
    id: String,
    /// The secret; it is not shown again.
    secret: String,
    /// Void from then on, cluster time in milliseconds.
    expires_ms: u64,
    #[serde(flatten)]
    changed: ChangedInfo,
}

/// An enrolment secret, without the secret.
#[derive(Serialize, ToSchema)]
pub(super) struct KeyView {
    /// Id.
    id: String,
    /// What it makes.
    kind: &'static str,
    /// For people.
    name: String,
    /// Name of what it is bound to; for brokers their roles.
    target: String,
    /// How often it was used.
    uses: u32,
    /// How often it may be used.
    uses_max: u32,
    /// Void from then on, cluster time in milliseconds.
    expires_ms: u64,
    /// Revoked.
    revoked: bool,
}

/// Enrolment secrets.
#[derive(Serialize, ToSchema)]
pub(super) struct KeyList {
    /// Enrolment secrets.
    keys: Vec<KeyView>,
}

/// All enrolment secrets, without the secrets.
#[utoipa::path(get, path = "/api/v1/keys", tag = "enrolment", responses((status = 200, body = KeyList)))]
pub(super) async fn list(Seen(state): Seen) -> Json<KeyList> {
    let view = |key: EnrolKey| KeyView {
        id: key.id().to_string(),
        kind: kind_name(key.kind()),
        target: match key.kind() {
            EnrolKind::Broker => key.roles().map(BrokerRole::name).collect::<Vec<_>>().join(","),
            kind => target_name(&state, kind, key.target.unwrap_or_default()),
        },
        uses: key.uses,
        uses_max: key.uses_max,
        expires_ms: key.expires_ms,
        revoked: key.revoked,
        name: key.name,
    };
    Json(KeyList { keys: state.rows::<EnrolKey>().map(view).collect() })
}

fn target_name(state: &Applied, kind: EnrolKind, target: Id) -> String {
    let name = match kind {
        EnrolKind::Connector => state.by_id::<ConnectorGroup>(target).map(|row| row.name),
        EnrolKind::Workload => state.by_id::<Workload>(target).map(|row| row.name),
        EnrolKind::Device => state.by_id::<User>(target).map(|row| row.user_name),
        EnrolKind::Broker | EnrolKind::Unspecified => None,
    };
    name.unwrap_or_default()
}

/// Makes an enrolment secret; the pin of this cluster's issuer is in it.
#[utoipa::path(post, path = "/api/v1/keys", tag = "enrolment", request_body = NewKey,
    responses((status = 201, body = KeyMade), (status = 404, body = Problem), (status = 422, body = Problem)))]
pub(super) async fn create(
    State(context): State<Arc<Context>>,
    caller: Caller,
    wanted: Wanted,
    Input(new): Input<NewKey>,
) -> Result<Response, Problem> {
    let secret = EnrolSecret::generate(&context.anchors.pin()).ok_or_else(no_randomness)?;
    let secret_sha256 = sha256(secret.reveal());
    let kind = EnrolKind::from(new.kind);
    let life_ms = new.life_s.checked_mul(1_000).ok_or_else(|| Problem::invalid("`life_s` is too large"))?;
    let target = format!("{}:{}", kind_name(kind), new.name);
    let (name, uses_max) = (new.name, new.uses);
    let key = CreateEnrolKey { kind: kind as i32, name, target: new.target, secret_sha256, uses_max, life_ms };
    let changed = context.change(&caller, &wanted, "key.create", &target, Body::CreateEnrolKey(key)).await?;
    let id = changed.done.ids.last().copied().unwrap_or_default();
    let row = context.cluster.state().by_id::<EnrolKey>(id).unwrap_or_default();
    if row.secret_sha256 != secret_sha256 {
        return Err(shown_before());
    }
    let made = KeyMade {
        id: id.to_string(),
        secret: secret.reveal().to_owned(),
        expires_ms: row.expires_ms,
        changed: changed.info(&context),
    };
    Ok(changed.answer(StatusCode::CREATED, made))
}

/// Revokes an enrolment secret. What was enrolled with it stays.
#[utoipa::path(delete, path = "/api/v1/keys/{id}", tag = "enrolment", params(("id" = String, Path, description = "id")),
    responses((status = 200, body = ChangedInfo), (status = 404, body = Problem)))]
pub(super) async fn revoke(
    State(context): State<Arc<Context>>,
    Path(id): Path<String>,
    caller: Caller,
    wanted: Wanted,
) -> Result<Response, Problem> {
    let body = Body::RevokeEnrolKey { id: id_of(&id)? };
    let changed = context.change(&caller, &wanted, "key.revoke", &format!("key/{id}"), body).await?;
    Ok(changed.answer(StatusCode::OK, changed.info(&context)))
}
