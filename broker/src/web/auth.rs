//! Who calls: bearer tokens, looked up by hash in the state. What they may do is decided again with each change.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use axum::http::{HeaderMap, Method, header};
use selvedge_domain::rows::{AdminRole, Directory, Token};
use selvedge_domain::{Actor, ActorKind, Asker, Credential, Id, State};

use super::bearer::{BEARER_CHARS_MAX, DIRECTORY_PREFIX, TOKEN_PREFIX};
use super::limit::{Who, prefix};
use super::metrics::REQUESTS_REFUSED_TOTAL;
use super::{Context, Problem};
use crate::audit::{AdminChange, Record, clipped};

/// A token that was made a moment ago on another broker is waited for so long.
const LOOKUP_WAIT: Duration = Duration::from_secs(2);

/// A broker without a freshness lease waits so long for one before it says that it is stale.
const FRESH_WAIT: Duration = Duration::from_secs(2);

/// The credential that a route needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Need {
    /// None; the handler looks at a secret in the body.
    Nothing,
    /// An administrator's token with at least this role.
    Role(AdminRole),
    /// The same, also on a broker that has lost touch with the cluster: what it knows of itself, to see what is wrong.
    RoleWhenCutOff(AdminRole),
    /// A directory's token.
    Directory,
}

/// Who calls.
#[derive(Clone, Debug)]
pub(crate) struct Caller {
    /// As the log knows them.
    pub actor: Actor,
    /// What they showed: the leader looks at it again.
    pub credential: Credential,
    /// Name of the token or directory.
    pub name: String,
    /// The directory, when it is one.
    pub directory: Option<Id>,
    /// Their address.
    pub source: SocketAddr,
}

impl Caller {
    /// As whom they ask for a change.
    pub fn asker(&self) -> Asker {
        Asker::holder(self.actor.clone(), self.credential.clone())
    }

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
    if !matches!(need, Need::RoleWhenCutOff(_)) && !fresh(context).await {
        let detail = "this broker has lost touch with the others and may hold what was revoked; ask another";
        return Err(refused("stale", Problem::unavailable("stale", detail)));
    }
    let credential = Credential::new(secret);
    let Some(known) = look_up(context, &credential).await else {
        // Only guesses cost; who has none is just told.
        let _ = context.limiter.take(strangers, Instant::now());
        return Err(refused("credential", Problem::unauthenticated("the token is not known or was revoked")));
    };
    let (caller, role) = known.caller(credential, source);
    let who = match caller.directory {
        Some(id) => Who::Directory(id),
        None => Who::Token(caller.actor.id.unwrap_or_default()),
    };
    context.limiter.take(who, Instant::now()).map_err(rate)?;
    let fits = match need {
        Need::Nothing => true,
        Need::Role(needed) | Need::RoleWhenCutOff(needed) => caller.directory.is_none() && role >= needed,
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
        Need::Role(role) | Need::RoleWhenCutOff(role) => {
            format!("a token with the role `{}` is needed", role_name(role))
        }
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
    fn caller(self, credential: Credential, source: SocketAddr) -> (Caller, AdminRole) {
        match self {
            Self::Token(token) => {
                let role = token.role();
                let actor = Actor::token(token.id(), token.generation);
                (Caller { actor, credential, name: token.name, directory: None, source }, role)
            }
            Self::Directory(directory) => {
                let id = directory.id();
                let actor = Actor::directory(id, directory.generation);
                let (name, directory) = (directory.name, Some(id));
                (Caller { actor, credential, name, directory, source }, AdminRole::Unspecified)
            }
        }
    }
}

/// Whether this broker's state may be believed: it holds a freshness lease, or gets one in a moment.
async fn fresh(context: &Context) -> bool {
    let lease = context.cluster.lease();
    let mut renewed = lease.changed();
    let deadline = tokio::time::Instant::now() + FRESH_WAIT;
    while !lease.open() {
        if !matches!(tokio::time::timeout_at(deadline, renewed.changed()).await, Ok(Ok(()))) {
            return lease.open();
        }
    }
    true
}

/// For whom a credential stands, in this broker's state or, when that does not know it, in one that holds everything
/// committed before; and that state.
///
/// **Errors** without a leader that has a quorum.
pub(super) async fn whose(
    context: &Context,
    credential: &Credential,
) -> Result<(Arc<State>, Option<Actor>), selvedge_cluster::Error> {
    let state = context.cluster.state();
    if let Some(actor) = credential.actor(&state) {
        return Ok((state, Some(actor)));
    }
    let state = context.cluster.linearizable(LOOKUP_WAIT).await?;
    let actor = credential.actor(&state);
    Ok((state, actor))
}

async fn look_up(context: &Context, credential: &Credential) -> Option<Known> {
    let secret = credential.reveal();
    if !secret.starts_with(TOKEN_PREFIX) && !secret.starts_with(DIRECTORY_PREFIX) {
        return None;
    }
    // The broker that made it may be ahead of this one.
    let (state, actor) = whose(context, credential).await.ok()?;
    let actor = actor?;
    let id = actor.id?;
    match actor.kind {
        ActorKind::Token => state.by_id(id).map(Known::Token),
        ActorKind::Directory => state.by_id(id).map(Known::Directory),
        _ => None,
    }
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
