//! Errors as callers see them: `application/problem+json` with a code from a closed set.
//!
//! **Source** RFC 9457.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use selvedge_cluster::ProposeError;
use selvedge_domain::{Rejected, RejectedCode};
use serde::Serialize;
use utoipa::ToSchema;

/// What went wrong, for programs (`code`) and for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct Problem {
    /// Closed set: `invalid`, `not_found`, `conflict`, `unauthenticated`, ...
    pub code: &'static str,
    /// What the code means.
    pub title: &'static str,
    /// What it means here.
    pub detail: String,
    /// HTTP status.
    pub status: u16,
    /// `unknown` when the change may have been applied, or may still be.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub outcome: Option<&'static str>,
    /// When to try again.
    #[serde(skip)]
    pub retry_after_s: Option<u64>,
}

impl Problem {
    /// A problem.
    pub fn new(status: StatusCode, code: &'static str, title: &'static str, detail: impl Into<String>) -> Self {
        Self { code, title, detail: detail.into(), status: status.as_u16(), outcome: None, retry_after_s: None }
    }

    /// 400: the request cannot be read.
    pub fn malformed(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "malformed", "the request cannot be read", detail)
    }

    /// 401.
    pub fn unauthenticated(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "unauthenticated", "a valid credential is needed", detail)
    }

    /// 403.
    pub fn forbidden(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, "forbidden", "the credential may not do this", detail)
    }

    /// 404.
    pub fn not_found(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "not_found", "it is not there", detail)
    }

    /// 409.
    pub fn conflict(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, "conflict", "something stands in the way", detail)
    }

    /// 413.
    pub fn too_large(limit_bytes: usize) -> Self {
        let detail = format!("the body may have at most {limit_bytes} bytes");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "too_large", "the body is too large", detail)
    }

    /// 422.
    pub fn invalid(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::UNPROCESSABLE_ENTITY, "invalid", "a value is not acceptable", detail)
    }

    /// 429.
    pub fn too_many(retry_after_s: u64) -> Self {
        let detail = format!("try again in {retry_after_s} s");
        Self {
            retry_after_s: Some(retry_after_s),
            ..Self::new(StatusCode::TOO_MANY_REQUESTS, "too_many", "too many requests", detail)
        }
    }

    /// 503.
    pub fn unavailable(code: &'static str, detail: impl Into<String>) -> Self {
        Self {
            retry_after_s: Some(1),
            ..Self::new(StatusCode::SERVICE_UNAVAILABLE, code, "not possible at the moment", detail)
        }
    }

    /// 500: a defect or a broken machine; details stay in the log.
    pub fn internal(error: &dyn std::error::Error) -> Self {
        let mut chain = error.to_string();
        let mut source = error.source();
        while let Some(cause) = source {
            chain = format!("{chain}: {cause}");
            source = cause.source();
        }
        tracing::error!(error = %chain, "a web request failed");
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", "the broker failed", "see the broker's log")
    }
}

impl From<Rejected> for Problem {
    fn from(rejected: Rejected) -> Self {
        let (status, title) = match rejected.code {
            RejectedCode::Invalid | RejectedCode::None => {
                (StatusCode::UNPROCESSABLE_ENTITY, "a value is not acceptable")
            }
            RejectedCode::NotFound => (StatusCode::NOT_FOUND, "it is not there"),
            RejectedCode::Conflict | RejectedCode::InUse => (StatusCode::CONFLICT, "something stands in the way"),
            RejectedCode::VersionMismatch => (StatusCode::PRECONDITION_FAILED, "it was changed meanwhile"),
            RejectedCode::Forbidden => (StatusCode::FORBIDDEN, "the credential may not do this"),
            RejectedCode::Unauthenticated => (StatusCode::UNAUTHORIZED, "a valid credential is needed"),
            RejectedCode::Limit => (StatusCode::UNPROCESSABLE_ENTITY, "a limit is reached"),
            RejectedCode::KeyUnknown
            | RejectedCode::KeyVoid
            | RejectedCode::KeyExhausted
            | RejectedCode::KeyMismatch => (StatusCode::FORBIDDEN, "the enrolment secret does not allow this"),
            RejectedCode::NotInitialised => (StatusCode::SERVICE_UNAVAILABLE, "the cluster is not initialised"),
            _ => (StatusCode::CONFLICT, "refused"),
        };
        Self::new(status, rejected_code(rejected.code), title, rejected.message)
    }
}

impl From<ProposeError> for Problem {
    fn from(error: ProposeError) -> Self {
        match error {
            ProposeError::Refused(rejected) => rejected.into(),
            ProposeError::Unknown => Self {
                outcome: Some("unknown"),
                ..Self::new(
                    StatusCode::GATEWAY_TIMEOUT,
                    "outcome_unknown",
                    "the change may have been applied, or may still be",
                    "repeat the request with the same Idempotency-Key to learn what became of it",
                )
            },
            ProposeError::Busy { retry_after_ms } => Self {
                retry_after_s: Some(retry_after_ms.div_ceil(1_000).max(1)),
                ..Self::unavailable("busy", "too many changes wait already; nothing was changed")
            },
            ProposeError::NoRoom => Self::new(
                StatusCode::INSUFFICIENT_STORAGE,
                "SE0110",
                "no room",
                "the leader's disk is nearly full; nothing was changed",
            ),
            ProposeError::Unavailable => {
                Self::unavailable("no_leader", "no leader with a quorum can be reached; nothing was changed")
            }
        }
    }
}

impl From<selvedge_cluster::Error> for Problem {
    fn from(error: selvedge_cluster::Error) -> Self {
        match error {
            selvedge_cluster::Error::Unavailable | selvedge_cluster::Error::TimedOut => {
                Self::unavailable("no_leader", "no leader with a quorum can be reached")
            }
            selvedge_cluster::Error::Compacted { upto } => Self::new(
                StatusCode::GONE,
                "compacted",
                "the journal does not go back that far",
                format!("it begins after {upto}"),
            ),
            selvedge_cluster::Error::Reset { position } => Self::new(
                StatusCode::GONE,
                "reset",
                "the log began another epoch",
                format!("the position is {position}; read everything again"),
            ),
            selvedge_cluster::Error::Elsewhere { upto, brokers } => {
                let brokers: Vec<String> = brokers.iter().map(ToString::to_string).collect();
                let have =
                    if brokers.is_empty() { "no broker says it has".into() } else { brokers.join(", ") + " have" };
                let detail = format!("this broker does not have the events up to {upto} yet; {have} them");
                Self::unavailable("elsewhere", detail)
            }
            selvedge_cluster::Error::Behind { position, seen } => {
                let detail = format!("this broker is at {position} and has not applied {seen} yet; ask another");
                Self::unavailable("stale", detail)
            }
            selvedge_cluster::Error::Slow { resume } => {
                Self::unavailable("slow", format!("the reader took nothing for too long; it resumes at {resume}"))
            }
            selvedge_cluster::Error::Refused(rejected) => rejected.into(),
            selvedge_cluster::Error::Membership(message) => Self::conflict(message),
            other => Self::internal(&other),
        }
    }
}

/// The code of a refusal, as programs see it.
pub(crate) fn rejected_code(code: RejectedCode) -> &'static str {
    match code {
        RejectedCode::None => "none",
        RejectedCode::Invalid => "invalid",
        RejectedCode::NotFound => "not_found",
        RejectedCode::Conflict => "conflict",
        RejectedCode::VersionMismatch => "version_mismatch",
        RejectedCode::Forbidden => "forbidden",
        RejectedCode::Unauthenticated => "unauthenticated",
        RejectedCode::Limit => "limit",
        RejectedCode::KeyUnknown => "key_unknown",
        RejectedCode::KeyVoid => "key_void",
        RejectedCode::KeyExhausted => "key_exhausted",
        RejectedCode::KeyMismatch => "key_mismatch",
        RejectedCode::InUse => "in_use",
        RejectedCode::Before => "refused_before",
        RejectedCode::NotInitialised => "not_initialised",
        RejectedCode::AlreadyInitialised => "already_initialised",
        RejectedCode::DedupeUnknown | RejectedCode::DedupeWindow => "retry_unknown",
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let retry_after_s = self.retry_after_s;
        let mut response = (status, Json(self)).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        if let Some(seconds) = retry_after_s {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer realm=\"selvedge\""));
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_refusal_has_its_status() {
        for (code, status) in [
            (RejectedCode::Invalid, 422),
            (RejectedCode::NotFound, 404),
            (RejectedCode::Conflict, 409),
            (RejectedCode::InUse, 409),
            (RejectedCode::VersionMismatch, 412),
            (RejectedCode::Forbidden, 403),
            (RejectedCode::Unauthenticated, 401),
            (RejectedCode::Limit, 422),
            (RejectedCode::KeyExhausted, 403),
            (RejectedCode::KeyUnknown, 403),
            (RejectedCode::NotInitialised, 503),
        ] {
            assert_eq!(Problem::from(Rejected::new(code, "x")).status, status, "{code:?}");
        }
    }

    #[test]
    fn an_unknown_outcome_is_said_and_no_leader_says_when_to_try_again() {
        let unknown = Problem::from(ProposeError::Unknown);
        assert_eq!((unknown.status, unknown.outcome), (504, Some("unknown")));
        let answer = Problem::from(ProposeError::Unavailable).into_response();
        assert_eq!(answer.status(), StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(answer.headers()[header::RETRY_AFTER], "1");
        assert_eq!(answer.headers()[header::CONTENT_TYPE], "application/problem+json");
    }
}
