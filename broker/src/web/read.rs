//! How fresh what is read must be: the mode that a request names, and the position that its caller has seen.
//!
//! **Invariant:** an answer to a read says from which position it was read, in which mode, and how old that may be.
//! **Invariant:** who passes on the position of an answer never reads an older state, whichever broker is asked.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue};
use selvedge_cluster::Mode;
use selvedge_domain::{Id, State};

use super::{Context, Problem};

/// Names the mode of a read.
const READ_HEADER: &str = "selvedge-read";
/// The position of an answer; in a request the one that the caller has seen.
pub(super) const POSITION_HEADER: &str = "selvedge-position";
/// Nothing that was committed longer ago is missing in an answer, milliseconds.
const AGE_HEADER: &str = "selvedge-age-ms";

/// For a quorum to answer a linearizable read, and for a broker that is behind what its caller has seen to get there.
pub const READ_WAIT: Duration = Duration::from_secs(5);

/// A mode as callers write it.
pub(crate) fn mode_name(mode: Mode) -> &'static str {
    match mode {
        Mode::Local => "local",
        Mode::Linearizable => "linearizable",
    }
}

/// The state that a request reads.
#[derive(Clone)]
pub(super) struct Seen(pub(super) Arc<State>);

impl<S: Send + Sync> FromRequestParts<S> for Seen {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        let seen = parts.extensions.get::<Self>().cloned();
        seen.ok_or_else(|| Problem::internal(&std::io::Error::other("a route reads, and does not say how")))
    }
}

/// What a request reads.
pub(super) struct Reading {
    mode: Mode,
    state: Arc<State>,
    age_ms: Option<u64>,
}

impl Reading {
    /// Finds the state that a request reads: in the mode that it names, or else in this one.
    ///
    /// **Errors**: headers that are none, `no_leader`, `stale`, `reset`.
    pub(super) async fn begin(context: &Context, headers: &HeaderMap, mode: Mode) -> Result<Self, Problem> {
        let mode = match headers.get(READ_HEADER).map(HeaderValue::as_bytes) {
            None => mode,
            Some(b"local") => Mode::Local,
            Some(b"linearizable") => Mode::Linearizable,
            Some(_) => return Err(Problem::malformed("`Selvedge-Read` is `local` or `linearizable`")),
        };
        let seen = headers.get(POSITION_HEADER).map(|value| value.to_str().ok()?.parse::<Id>().ok());
        if seen == Some(None) {
            return Err(Problem::malformed("`Selvedge-Position` is `epoch-seq`"));
        }
        let read = context.cluster.read(mode, seen.flatten(), READ_WAIT).await?;
        Ok(Self { mode, state: read.state, age_ms: read.age_ms })
    }

    /// The state.
    pub(super) fn seen(&self) -> Seen {
        Seen(self.state.clone())
    }

    /// Says in the answer what was read.
    pub(super) fn mark(&self, headers: &mut HeaderMap) {
        headers.insert(READ_HEADER, HeaderValue::from_static(mode_name(self.mode)));
        if let Ok(position) = HeaderValue::from_str(&self.state.position().to_string()) {
            headers.insert(POSITION_HEADER, position);
        }
        if let Some(age_ms) = self.age_ms {
            headers.insert(AGE_HEADER, HeaderValue::from(age_ms));
        }
    }
}
