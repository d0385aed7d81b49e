//! The administrators' API: one file for each resource, one table of routes.

mod access;
mod audit;
mod brokers;
mod config;
mod ends;
mod event_json;
mod events;
mod explain;
pub(super) mod keys;
mod people;

use std::sync::Arc;

use selvedge_cluster::Mode;
use selvedge_domain::Id;
use selvedge_domain::rows::AdminRole;
use utoipa::openapi::RefOr;
use utoipa::openapi::path::Paths;
use utoipa::openapi::schema::Schema;
use utoipa_axum::router::UtoipaMethodRouter;
use utoipa_axum::routes;

use super::auth::Need;
use super::router::Route;
use super::{Context, Problem};

/// A route of the API with its description.
pub(super) struct Described {
    /// The route.
    pub route: Route,
    /// Its schemas.
    pub schemas: Vec<(String, RefOr<Schema>)>,
    /// Its paths.
    pub paths: Paths,
}

/// Every route of the API and the role that it needs. A handler that is not here is not served.
pub(super) fn routes() -> Vec<Described> {
    use AdminRole::{Admin, Auditor, Owner};
    vec![
        local(entry(Auditor, routes!(openapi))),
        cut_off(local(entry(Auditor, routes!(brokers::show)))),
        entry(Owner, routes!(brokers::settings)),
        entry(Owner, routes!(brokers::raise_version)),
        entry(Admin, routes!(brokers::drain)),
        entry(Owner, routes!(brokers::promote)),
        entry(Owner, routes!(brokers::remove)),
        entry(Owner, routes!(brokers::transfer)),
        entry(Owner, routes!(brokers::set_time)),
        entry(Auditor, routes!(config::list)),
        entry(Admin, routes!(config::apply)),
        entry(Owner, routes!(access::list_tokens)),
        entry(Owner, routes!(access::create_token)),
        entry(Owner, routes!(access::revoke_token)),
        entry(Auditor, routes!(access::list_directories)),
        entry(Admin, routes!(access::put_directory)),
        entry(Auditor, routes!(keys::list)),
        entry(Admin, routes!(keys::create)),
        entry(Admin, routes!(keys::revoke)),
        entry(Auditor, routes!(people::users)),
        entry(Auditor, routes!(people::groups)),
        entry(Auditor, routes!(ends::devices)),
        entry(Auditor, routes!(ends::workloads)),
        entry(Auditor, routes!(ends::connectors)),
        entry(Admin, routes!(ends::revoke)),
        entry(Admin, routes!(ends::release)),
        entry(Auditor, routes!(explain::explain)),
        local(entry(Auditor, routes!(explain::path))),
        local(entry(Auditor, routes!(explain::sessions))),
        local(entry(Auditor, routes!(audit::tail))),
        local(entry(Auditor, routes!(audit::streams))),
        local(entry(Auditor, routes!(events::watch))),
    ]
}

/// A route that needs a role, and reads what was committed before it was asked.
fn entry(role: AdminRole, (schemas, paths, handlers): UtoipaMethodRouter<Arc<Context>>) -> Described {
    let path = paths.paths.keys().next().cloned().unwrap_or_default();
    Described {
        route: Route { path, need: Need::Role(role), read: Some(Mode::Linearizable), handlers },
        schemas,
        paths,
    }
}

/// The same, about the answering broker itself: it reads what that has.
fn local(mut described: Described) -> Described {
    described.route.read = Some(Mode::Local);
    described
}

/// The same, also on a broker that has lost touch with the cluster.
fn cut_off(mut described: Described) -> Described {
    if let Need::Role(role) = described.route.need {
        described.route.need = Need::RoleWhenCutOff(role);
    }
    described
}

/// The OpenAPI document of this API.
#[utoipa::path(get, path = "/api/v1/openapi.json", tag = "api", responses((status = 200, description = "OpenAPI 3.1")))]
async fn openapi() -> axum::Json<utoipa::openapi::OpenApi> {
    axum::Json(super::openapi::document())
}

/// Rows of one answer at most.
const ROWS_MAX: usize = 1_000;

/// An id in a path or query.
fn id_of(text: &str) -> Result<Id, Problem> {
    text.parse().map_err(|error: selvedge_domain::id::ParseError| Problem::invalid(error.to_string()))
}

/// A node id in a path.
fn node_of(text: &str) -> Result<u64, Problem> {
    text.parse().map_err(|_| Problem::invalid("a node id is a decimal number"))
}

fn no_randomness() -> Problem {
    Problem::unavailable("no_randomness", "the system gives no randomness")
}
