//! What a request says, read with limits and refused as a problem.

use axum::body::{Body, HttpBody as _};
use axum::extract::{FromRequest, FromRequestParts, Query, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, header};
use bytes::Bytes;
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use serde::de::DeserializeOwned;

use super::Problem;
use super::metrics::REQUESTS_REFUSED_TOTAL;
use super::router::BODY_TIMEOUT;

/// How many bytes the body of a route may have.
#[derive(Clone, Copy, Debug)]
pub(super) struct BodyLimit(pub(super) usize);

/// The whole body.
pub(super) struct Whole(pub(super) Bytes);

impl<S: Send + Sync> FromRequest<S> for Whole {
    type Rejection = Problem;

    async fn from_request(request: Request, _: &S) -> Result<Self, Problem> {
        let limit = request.extensions().get::<BodyLimit>().map_or(0, |limit| limit.0);
        check_encoding(request.headers())?;
        read(request.into_body(), limit).await.map(Self).inspect_err(|_| {
            ::metrics::counter!(REQUESTS_REFUSED_TOTAL, "reason" => "body").increment(1);
        })
    }
}

/// A JSON body. Unknown fields and wrong types are refused by the type.
pub(super) struct Input<T>(pub(super) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Input<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, state: &S) -> Result<Self, Problem> {
        let Whole(bytes) = Whole::from_request(request, state).await?;
        json(&bytes).map(Self)
    }
}

/// The query.
pub(super) struct Params<T>(pub(super) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Params<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let read = Query::<T>::from_request_parts(parts, state).await;
        read.map(|Query(params)| Self(params)).map_err(|error| Problem::invalid(error.body_text()))
    }
}

/// Reads JSON: what is not JSON is malformed, what is JSON of another shape is invalid.
pub(super) fn json<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Problem> {
    serde_json::from_slice(bytes).map_err(|error| {
        let message = error.to_string();
        match error.classify() {
            serde_json::error::Category::Data => Problem::invalid(message),
            _ => Problem::malformed(message),
        }
    })
}

fn check_encoding(headers: &HeaderMap) -> Result<(), Problem> {
    let encoded = headers.get(header::CONTENT_ENCODING).is_some_and(|encoding| encoding != "identity");
    if encoded { Err(Problem::malformed("compressed bodies are not read")) } else { Ok(()) }
}

async fn read(body: Body, limit_bytes: usize) -> Result<Bytes, Problem> {
    if body.size_hint().lower() > limit_bytes as u64 {
        return Err(Problem::too_large(limit_bytes));
    }
    match tokio::time::timeout(BODY_TIMEOUT, Limited::new(body, limit_bytes).collect()).await {
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(Problem::too_large(limit_bytes)),
        Ok(Err(_)) => Err(Problem::malformed("the body ended too early")),
        Err(_) => Err(Problem::new(
            http::StatusCode::REQUEST_TIMEOUT,
            "too_slow",
            "the body took too long",
            format!("at most {} s", BODY_TIMEOUT.as_secs()),
        )),
    }
}
