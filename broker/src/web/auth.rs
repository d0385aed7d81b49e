//! Who calls: bearer tokens, looked up by hash in the state. What they may do is decided again with each change.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use axum::http::{HeaderMap, Method, header};
use selvedge_domain::rows::{AdminRole, Directory, Token};
use selvedge_domain::state::IndexKey;
use selvedge_domain::{Actor, Id, State};

use super::bearer::{BEARER_CHARS_MAX, DIRECTORY_PREFIX, TOKEN_PREFIX, sha256};
use super::limit::{Who, prefix};
use super::metrics::REQUESTS_REFUSED_TOTAL;
use super::{Context, Problem};
use crate::audit::{AdminChange, Record, clipped};

/// A token that was made a moment ago on another broker is waited for so long.
const LOOKUP_WAIT: Duration = Duration::from_secs(2);

/// The credential that a route needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Need {
    /// None; the handler looks at a secret in the body.
    Nothing,
    /// An administrator's token with at least this role.
    Role(AdminRole),
    /// A directory's token.
    Directory,
}

/// Who calls.
#[derive(Clone, Debug)]
pub(crate) struct Caller {
    /// As the log knows them.
    pub actor: Actor,
    /// Name of the token or directory.
    pub name: String,
    /// The directory, when it is one.
    pub directory: Option<Id>,
    /// Their address.
    pub source: SocketAddr,
}

impl Caller {
    /// `token/1-2`, `directory/1-7`.
    pub fn label(&self) -> String {
        let kind = if self.directory.is_some() { "directory" } else { "token" };
        format!("{kind}/{}", self.actor.id.unwrap_or_default())
    }
}

impl FromRequestParts<Arc<Context>> for Caller {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &Arc<Context>) -> Result<Self, Problem> {
        parts.extensions.get::<Self>().cloned().ok_or_else(|| Problem::unauthenticated("a bearer token is needed"))
    }
}

/// Admits a request to a route, or says why not.
pub(crate) async fn admit(
    context: &Context,
    need: Need,
    headers: &HeaderMap,
    source: SocketAddr,
    method: &Method,
    path: &str,
) -> Result<Option<Caller>, Problem> {
    if need == Need::Nothing {
        return Ok(None);
    }
    let strangers = Who::Failures(prefix(source.ip()));
    context.limiter.peek(strangers, Instant::now()).map_err(rate)?;
    let secret =
        bearer(headers).ok_or_else(|| refused("credential", Problem::unauthenticated("a bearer token is needed")))?;
    let Some(known) = look_up(context, secret).await else {
        // Only guesses cost; who has none is just told.
        let _ = context.limiter.take(strangers, Instant::now());
        return Err(refused("credential", Problem::unauthenticated("the token is not known or was revoked")));
    };
    let (caller, role) = known.caller(source);
    let who = match caller.directory {
        Some(id) => Who::Directory(id),
        None => Who::Token(caller.actor.id.unwrap_or_default()),
    };
    context.limiter.take(who, Instant::now()).map_err(rate)?;
    let fits = match need {
        Need::Nothing => true,
        Need::Role(needed) => caller.directory.is_none() && role >= needed,
        Need::Directory => caller.directory.is_some(),
    };
    if fits {
        return Ok(Some(caller));
    }
    let record = AdminChange {
        actor: caller.label(),
        actor_name: caller.name.clone(),
        action: format!("{method} {}", clipped(path)),
        target: String::new(),
        outcome: "forbidden".to_owned(),
        position: None,
        source: source.to_string(),
    };
    // When the journal does not accept it, the attempt is refused all the same; the log says why.
    let _ = context.audit.append_durable(&Record::AdminChange(record)).await;
    let needed = match need {
        Need::Role(role) => format!("a token with the role `{}` is needed", role_name(role)),
        _ => "a directory's token is needed".to_owned(),
    };
    Err(refused("role", Problem::forbidden(needed)))
}

/// A role, as callers write it.
pub(crate) fn role_name(role: AdminRole) -> &'static str {
    match role {
        AdminRole::Unspecified => "none",
        AdminRole::Auditor => "auditor",
        AdminRole::Admin => "admin",
        AdminRole::Owner => "owner",
    }
}

enum Known {
    Token(Token),
    Directory(Directory),
}

impl Known {
    fn caller(self, source: SocketAddr) -> (Caller, AdminRole) {
        match self {
            Self::Token(token) => {
                let role = token.role();
                let actor = Actor::token(token.id(), token.generation);
                (Caller { actor, name: token.name, directory: None, source }, role)
            }
            Self::Directory(directory) => {
                let id = directory.id();
                let actor = Actor::directory(id, directory.generation);
                (Caller { actor, name: directory.name, directory: Some(id), source }, AdminRole::Unspecified)
            }
        }
    }
}

async fn look_up(context: &Context, secret: &str) -> Option<Known> {
    if !secret.starts_with(TOKEN_PREFIX) && !secret.starts_with(DIRECTORY_PREFIX) {
        return None;
    }
    let hash = sha256(secret);
    if let Some(known) = find(&context.cluster.state(), &hash) {
        return Some(known);
    }
    // This broker may be behind the one that made it.
    let state = context.cluster.linearizable(LOOKUP_WAIT).await.ok()?;
    find(&state, &hash)
}

fn find(state: &State, hash: &[u8; 32]) -> Option<Known> {
    let token = state.find::<Token>(IndexKey::secret(hash)).filter(|token| !token.revoked);
    let directory = || state.find::<Directory>(IndexKey::secret(hash)).map(Known::Directory);
    token.map(Known::Token).or_else(directory)
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, secret) = value.split_once(' ')?;
    let secret = secret.trim();
    (scheme.eq_ignore_ascii_case("bearer") && !secret.is_empty() && secret.len() <= BEARER_CHARS_MAX).then_some(secret)
}

fn rate(retry_after_s: u64) -> Problem {
    refused("rate", Problem::too_many(retry_after_s))
}

fn refused(reason: &'static str, problem: Problem) -> Problem {
    ::metrics::counter!(REQUESTS_REFUSED_TOTAL, "reason" => reason).increment(1);
    problem
}
