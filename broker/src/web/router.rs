//! Which routes there are, what each needs, and what every request passes.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::{Request, State};
use axum::http::{HeaderValue, Method, StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::MethodRouter;
use selvedge_cluster::Mode;

use super::auth::{self, Need};
use super::input::BodyLimit;
use super::listener::Source;
use super::metrics::{REQUEST_SECONDS, REQUESTS_REFUSED_TOTAL, REQUESTS_TOTAL};
use super::read::Reading;
use super::{Context, Problem, api, enrol, renew, scim};

/// Bytes of an enrolment's body.
pub const ENROL_BODY_BYTES_MAX: usize = 64 * 1024;
/// Bytes of a SCIM body: 100,000 members fit.
pub const SCIM_BODY_BYTES_MAX: usize = 4 << 20;
/// Bytes of the body of an administrator's request.
pub const ADMIN_BODY_BYTES_MAX: usize = 8 << 20;
/// For a whole body.
pub const BODY_TIMEOUT: Duration = Duration::from_secs(30);
/// For a whole request; longer than `Prefer: enforced` may wait.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(150);
/// Requests that are worked on at once.
pub const REQUESTS_MAX: usize = 1_024;

/// How a surface says that something went wrong.
type Shape = fn(Problem) -> Response;

/// A route with what it needs.
pub(super) struct Route {
    /// Path, with `{name}` for a part that varies.
    pub path: String,
    /// The credential that it needs.
    pub need: Need,
    /// How it reads when the caller does not say; none when it reads nothing of the log.
    pub read: Option<Mode>,
    /// Its handlers.
    pub handlers: MethodRouter<Arc<Context>>,
}

#[derive(Clone)]
struct Guard {
    context: Arc<Context>,
    need: Need,
    read: Option<Mode>,
    limit: BodyLimit,
    shape: Shape,
}

/// Everything that is served.
pub(super) fn router(context: Arc<Context>) -> Router {
    let mut router = Router::new();
    let surfaces: [(Vec<Route>, usize, Shape); 4] = [
        (api::routes().into_iter().map(|route| route.route).collect(), ADMIN_BODY_BYTES_MAX, Problem::into_response),
        (scim::routes(), SCIM_BODY_BYTES_MAX, scim::problem),
        (enrol::routes(), ENROL_BODY_BYTES_MAX, Problem::into_response),
        (renew::routes(), ENROL_BODY_BYTES_MAX, Problem::into_response),
    ];
    for (routes, limit_bytes, shape) in surfaces {
        for route in routes {
            let (need, read) = (route.need, route.read);
            let guard = Guard { context: context.clone(), need, read, limit: BodyLimit(limit_bytes), shape };
            router = router.route(&route.path, route.handlers.route_layer(from_fn_with_state(guard, admit)));
        }
    }
    router
        .fallback(nothing_here)
        .method_not_allowed_fallback(wrong_method)
        .with_state(context.clone())
        .layer(from_fn_with_state(context, every_request))
}

async fn nothing_here(request: Request) -> Response {
    let problem = Problem::not_found("there is nothing at this path");
    if request.uri().path().starts_with("/scim/") { scim::problem(problem) } else { problem.into_response() }
}

async fn wrong_method() -> Problem {
    let (code, title) = ("method", "the method is not possible here");
    Problem::new(StatusCode::METHOD_NOT_ALLOWED, code, title, "see the list of routes")
}

/// Lets in who has the credential that the route needs, and finds the state that is read.
async fn admit(State(guard): State<Guard>, mut request: Request, next: Next) -> Response {
    let Some(Source(source)) = request.extensions().get().copied() else {
        return (guard.shape)(Problem::unauthenticated("the caller's address is not known"));
    };
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    match auth::admit(&guard.context, guard.need, request.headers(), source, &method, &path).await {
        Ok(caller) => {
            if let Some(caller) = caller {
                request.extensions_mut().insert(caller);
            }
            request.extensions_mut().insert(guard.limit);
            let read = match guard.read.filter(|_| method == Method::GET || method == Method::HEAD) {
                Some(mode) => match Reading::begin(&guard.context, request.headers(), mode).await {
                    Ok(read) => Some(read),
                    Err(problem) => return (guard.shape)(problem),
                },
                None => None,
            };
            if let Some(read) = &read {
                request.extensions_mut().insert(read.seen());
            }
            let mut response = next.run(request).await;
            if let Some(read) = read {
                read.mark(response.headers_mut());
            }
            response
        }
        Err(problem) => (guard.shape)(problem),
    }
}

/// What every request passes, whatever its route.
async fn every_request(State(context): State<Arc<Context>>, request: Request, next: Next) -> Response {
    let begun = Instant::now();
    let (surface, shape) = surface(request.uri().path());
    let mut response = if context.cluster.state().cluster().is_none() {
        shape(Problem::unavailable("not_initialised", "this broker has no cluster yet, or has not caught up with it"))
    } else if let Ok(_place) = context.requests.clone().try_acquire_owned() {
        match tokio::time::timeout(REQUEST_TIMEOUT, next.run(request)).await {
            Ok(response) => response,
            Err(_) => {
                let outcome = Some("unknown");
                let title = "the request took too long";
                let problem = Problem::new(StatusCode::GATEWAY_TIMEOUT, "outcome_unknown", title, "it was given up");
                shape(Problem { outcome, ..problem })
            }
        }
    } else {
        ::metrics::counter!(REQUESTS_REFUSED_TOTAL, "reason" => "busy").increment(1);
        shape(Problem::unavailable("busy", "too many requests at once"))
    };
    let headers = response.headers_mut();
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    let class = match response.status().as_u16() {
        200..=299 => "2xx",
        300..=399 => "3xx",
        400..=499 => "4xx",
        _ => "5xx",
    };
    ::metrics::counter!(REQUESTS_TOTAL, "surface" => surface, "class" => class).increment(1);
    ::metrics::histogram!(REQUEST_SECONDS, "surface" => surface).record(begun.elapsed());
    response
}

fn surface(path: &str) -> (&'static str, Shape) {
    if path.starts_with("/api/") {
        ("api", Problem::into_response)
    } else if path.starts_with("/scim/") {
        ("scim", scim::problem)
    } else if path.starts_with("/enrol/") {
        ("enrol", Problem::into_response)
    } else {
        ("other", Problem::into_response)
    }
}
