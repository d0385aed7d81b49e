//! The `web` listener: the administrators' API, SCIM and enrolment over HTTPS.
//!
//! **Invariant:** every route stands in one table with the credential that it needs; what is not there is not served.
//! **Invariant:** rights are decided where the change is: a handler passes on who asked, `decide` says yes or no.
//! **Invariant:** a body is bounded before it is buffered, a caller before it is served.
//!
//! Sessions and paths are known to the edge, what commands mean to `selvedge_domain`.

mod api;
mod auth;
mod bearer;
mod certificate;
mod change;
pub mod enrol;
mod input;
mod limit;
mod listener;
mod metrics;
pub mod openapi;
mod problem;
mod read;
mod renew;
mod router;
mod scim;
#[cfg(test)]
pub(crate) mod tests;

use std::sync::Arc;

use selvedge_cluster::Cluster;
use selvedge_proto::identity::Anchors;
use tokio::sync::Semaphore;

use crate::audit;
use crate::decision::Decider;
use crate::edge::Edge;
use crate::issuer::Issuer;
use crate::routing::Routing;

pub use bearer::{DIRECTORY_PREFIX, EnrolSecret, TOKEN_PREFIX, new_secret, sha256};
pub use certificate::{Certificates, Error as CertificateError, Files};
pub use limit::CALLERS_MAX;
pub use listener::{
    CONNECTIONS_MAX, CONNECTIONS_PER_PREFIX_MAX, HANDSHAKE_TIMEOUT, HEADER_TIMEOUT, STREAMS_PER_CONNECTION_MAX, Web,
};
pub use problem::Problem;
pub use read::READ_WAIT;
pub use router::{
    ADMIN_BODY_BYTES_MAX, BODY_TIMEOUT, ENROL_BODY_BYTES_MAX, REQUEST_TIMEOUT, REQUESTS_MAX, SCIM_BODY_BYTES_MAX,
};

/// Streams (`follow`) that are served at once.
pub const FOLLOWERS_MAX: usize = 64;

/// What the web listener serves from.
pub struct Context {
    /// This broker's part of the cluster.
    pub cluster: Cluster,
    /// Asks the policy.
    pub decider: Arc<Decider>,
    /// Sessions of this broker; none when it has no edge.
    pub edge: Option<Arc<Edge>>,
    /// Paths as this broker sees them; none when it has no edge.
    pub routing: Option<Arc<Routing>>,
    /// Where changes are recorded.
    pub audit: audit::Log,
    /// Signs certificates; none on brokers that are no issuers.
    pub issuer: Option<Arc<Issuer>>,
    /// What this cluster trusts.
    pub anchors: Arc<Anchors>,
    limiter: limit::Limiter,
    followers: Arc<Semaphore>,
    requests: Arc<Semaphore>,
}

/// The handles that a [`Context`] is made of.
pub struct Parts {
    /// This broker's part of the cluster.
    pub cluster: Cluster,
    /// Asks the policy.
    pub decider: Arc<Decider>,
    /// Sessions of this broker; none when it has no edge.
    pub edge: Option<Arc<Edge>>,
    /// Paths as this broker sees them; none when it has no edge.
    pub routing: Option<Arc<Routing>>,
    /// Where changes are recorded.
    pub audit: audit::Log,
    /// Signs certificates; none on brokers that are no issuers.
    pub issuer: Option<Arc<Issuer>>,
    /// What this cluster trusts.
    pub anchors: Arc<Anchors>,
}

impl Context {
    /// A context over these handles.
    pub fn new(parts: Parts) -> Arc<Self> {
        metrics::describe();
        let Parts { cluster, decider, edge, routing, audit, issuer, anchors } = parts;
        Arc::new(Self {
            cluster,
            decider,
            edge,
            routing,
            audit,
            issuer,
            anchors,
            limiter: limit::Limiter::default(),
            followers: Arc::new(Semaphore::new(FOLLOWERS_MAX)),
            requests: Arc::new(Semaphore::new(REQUESTS_MAX)),
        })
    }
}
