//! Administrators' tokens and directories.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::Response;
use selvedge_domain::command::Body;
use selvedge_domain::rows::{AdminRole, Directory, Group, Token, User};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{id_of, no_randomness};
use crate::web::auth::{Caller, role_name};
use crate::web::change::{ChangedInfo, Wanted};
use crate::web::input::Input;
use crate::web::read::Seen;
use crate::web::{Context, DIRECTORY_PREFIX, Problem, TOKEN_PREFIX, new_secret, sha256};

/// What an administrator may do.
#[derive(Clone, Copy, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum Role {
    /// Reads everything but secrets.
    Auditor,
    /// Changes policy, identity and keys.
    Admin,
    /// Also makes and revokes administrators and changes the cluster.
    Owner,
}

/// A new token.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct NewToken {
    /// Unique name.
    name: String,
    /// Role.
    role: Role,
}

/// A token that was made.
#[derive(Serialize, ToSchema)]
pub(super) struct TokenMade {
    /// Id.
    id: String,
    /// Name.
    name: String,
    /// Role.
    role: &'static str,
    /// The token; it is not shown again.
    token: String,
    #[serde(flatten)]
    changed: ChangedInfo,
}

/// A token, without its secret.
#[derive(Serialize, ToSchema)]
pub(super) struct TokenView {
    /// Id.
    id: String,
    /// Name.
    name: String,
    /// Role.
    role: &'static str,
    /// Revoked.
    revoked: bool,
}

/// Tokens.
#[derive(Serialize, ToSchema)]
pub(super) struct TokenList {
    /// Tokens.
    tokens: Vec<TokenView>,
}

/// All administrators' tokens, without secrets.
#[utoipa::path(get, path = "/api/v1/tokens", tag = "access", responses((status = 200, body = TokenList)))]
pub(super) async fn list_tokens(Seen(state): Seen) -> Json<TokenList> {
    let view = |token: Token| TokenView {
        id: token.id().to_string(),
        role: role_name(token.role()),
        revoked: token.revoked,
        name: token.name,
    };
    Json(TokenList { tokens: state.rows::<Token>().map(view).collect() })
}

/// Makes an administrator's token.
#[utoipa::path(post, path = "/api/v1/tokens", tag = "access", request_body = NewToken,
    responses((status = 201, body = TokenMade), (status = 409, body = Problem)))]
pub(super) async fn create_token(
    State(context): State<Arc<Context>>,
    caller: Caller,
    wanted: Wanted,
    Input(new): Input<NewToken>,
) -> Result<Response, Problem> {
    let token = new_secret(TOKEN_PREFIX).ok_or_else(no_randomness)?;
    let role = match new.role {
        Role::Auditor => AdminRole::Auditor,
        Role::Admin => AdminRole::Admin,
        Role::Owner => AdminRole::Owner,
    };
    let body = Body::CreateToken { name: new.name.clone(), role: role as i32, secret_sha256: sha256(&token) };
    let changed = context.change(&caller, &wanted, "token.create", &new.name, body).await?;
    let id = changed.done.ids.last().copied().unwrap_or_default();
    let row = context.cluster.state().by_id::<Token>(id);
    if row.is_some_and(|row| row.secret_sha256 != sha256(&token)) {
        return Err(shown_before());
    }
    let (id, role) = (id.to_string(), role_name(role));
    let made = TokenMade { id, name: new.name, role, token, changed: changed.info(&context) };
    Ok(changed.answer(StatusCode::CREATED, made))
}

/// Revokes an administrator's token.
#[utoipa::path(delete, path = "/api/v1/tokens/{id}", tag = "access", params(("id" = String, Path, description = "id")),
    responses((status = 200, body = ChangedInfo), (status = 404, body = Problem)))]
pub(super) async fn revoke_token(
    State(context): State<Arc<Context>>,
    Path(id): Path<String>,
    caller: Caller,
    wanted: Wanted,
) -> Result<Response, Problem> {
    let body = Body::RevokeToken { id: id_of(&id)? };
    let changed = context.change(&caller, &wanted, "token.revoke", &format!("token/{id}"), body).await?;
    Ok(changed.answer(StatusCode::OK, changed.info(&context)))
}

/// A directory.
#[derive(Serialize, ToSchema)]
pub(super) struct DirectoryView {
    /// Id.
    id: String,
    /// Name.
    name: String,
    /// Raised when its token is replaced.
    generation: u64,
    /// Users that it pushed.
    users: usize,
    /// Groups that it pushed.
    groups: usize,
}

/// Directories.
#[derive(Serialize, ToSchema)]
pub(super) struct DirectoryList {
    /// Directories.
    directories: Vec<DirectoryView>,
}

/// All directories.
#[utoipa::path(get, path = "/api/v1/directories", tag = "access", responses((status = 200, body = DirectoryList)))]
pub(super) async fn list_directories(Seen(state): Seen) -> Json<DirectoryList> {
    let view = |directory: Directory| DirectoryView {
        id: directory.id().to_string(),
        generation: directory.generation,
        users: state.rows::<User>().filter(|user| user.directory == directory.id).count(),
        groups: state.rows::<Group>().filter(|group| group.directory == directory.id).count(),
        name: directory.name,
    };
    Json(DirectoryList { directories: state.rows::<Directory>().map(view).collect() })
}

/// A directory to make, or whose token is to be replaced.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct NewDirectory {
    /// Unique name.
    name: String,
}

/// A directory's new token.
#[derive(Serialize, ToSchema)]
pub(super) struct DirectoryMade {
    /// Id.
    id: String,
    /// Name.
    name: String,
    /// Generation of the token.
    generation: u64,
    /// The SCIM token; it is not shown again.
    token: String,
    /// Where its SCIM endpoint is on this broker.
    scim_path: &'static str,
    #[serde(flatten)]
    changed: ChangedInfo,
}

/// Makes a directory, or replaces its SCIM token; the old one is void at once.
#[utoipa::path(post, path = "/api/v1/directories", tag = "access", request_body = NewDirectory,
    responses((status = 201, body = DirectoryMade), (status = 422, body = Problem)))]
pub(super) async fn put_directory(
    State(context): State<Arc<Context>>,
    caller: Caller,
    wanted: Wanted,
    Input(new): Input<NewDirectory>,
) -> Result<Response, Problem> {
    let token = new_secret(DIRECTORY_PREFIX).ok_or_else(no_randomness)?;
    let body = Body::PutDirectory { name: new.name.clone(), token_sha256: sha256(&token) };
    let changed = context.change(&caller, &wanted, "directory.put", &new.name, body).await?;
    let id = changed.done.ids.last().copied().unwrap_or_default();
    let row = context.cluster.state().by_id::<Directory>(id).unwrap_or_default();
    if row.token_sha256 != sha256(&token) {
        return Err(shown_before());
    }
    let made = DirectoryMade {
        id: id.to_string(),
        name: row.name,
        generation: row.generation,
        token,
        scim_path: crate::web::scim::BASE,
        changed: changed.info(&context),
    };
    Ok(changed.answer(StatusCode::CREATED, made))
}

/// A retry found what the first attempt made; its secret was shown then, or is lost.
pub(super) fn shown_before() -> Problem {
    Problem::conflict(
        "an earlier attempt with this key made it, or another caller replaced it since; the secret is not shown again",
    )
}
