//! Errors as SCIM says them.
//!
//! **Source** RFC 7644, section 3.12.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::json;

use crate::web::Problem;

/// Why a SCIM request was refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Error {
    /// HTTP status.
    pub status: StatusCode,
    /// `invalidFilter`, `uniqueness`, ...; none where the RFC has none.
    pub scim_type: Option<&'static str>,
    /// For people.
    pub detail: String,
    /// When to try again.
    pub retry_after_s: Option<u64>,
}

impl Error {
    pub fn bad(scim_type: &'static str, detail: impl Into<String>) -> Self {
        let (status, detail) = (StatusCode::BAD_REQUEST, detail.into());
        Self { status, scim_type: Some(scim_type), detail, retry_after_s: None }
    }

    pub fn filter(detail: impl Into<String>) -> Self {
        Self::bad("invalidFilter", detail)
    }

    pub fn path(detail: impl Into<String>) -> Self {
        Self::bad("invalidPath", detail)
    }

    pub fn value(detail: impl Into<String>) -> Self {
        Self::bad("invalidValue", detail)
    }

    pub fn syntax(detail: impl Into<String>) -> Self {
        Self::bad("invalidSyntax", detail)
    }

    pub fn not_found(what: &str, id: &str) -> Self {
        let detail = format!("{what} `{}` is not there", id.chars().take(64).collect::<String>());
        Self { status: StatusCode::NOT_FOUND, scim_type: None, detail, retry_after_s: None }
    }

    pub fn precondition(version: u64) -> Self {
        let detail = format!("the version is W/\"{version}\"");
        Self { status: StatusCode::PRECONDITION_FAILED, scim_type: None, detail, retry_after_s: None }
    }
}

impl From<Problem> for Error {
    fn from(problem: Problem) -> Self {
        let (status, scim_type) = match problem.code {
            "invalid" | "limit" => (400, Some("invalidValue")),
            "malformed" => (400, Some("invalidSyntax")),
            "conflict" => (409, Some("uniqueness")),
            _ => (problem.status, None),
        };
        let detail = match problem.outcome {
            Some(_) => format!("{}: {}", problem.title, problem.detail),
            None => problem.detail,
        };
        let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        Self { status, scim_type, detail, retry_after_s: problem.retry_after_s }
    }
}

impl IntoResponse for Error {
    fn into_response(self) -> Response {
        let mut body = json!({
            "schemas": ["urn:ietf:params:scim:api:messages:2.0:Error"],
            "status": self.status.as_u16().to_string(),
            "detail": self.detail,
        });
        if let Some(scim_type) = self.scim_type {
            body["scimType"] = scim_type.into();
        }
        let mut response = super::scim_json(self.status, &body);
        if let Some(seconds) = self.retry_after_s {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            response
                .headers_mut()
                .insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer realm=\"selvedge scim\""));
        }
        response
    }
}
