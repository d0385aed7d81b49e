//! The edge: accepts connections of clients, workloads and connectors, decides sessions, stitches them.
//!
//! **Invariants**:
//! - a connection that shows neither a current knock nor a live ticket is closed without a byte and without cryptography;
//! - nothing is admitted or forwarded without the freshness lease;
//! - a session is in its indexes before the state that it is decided on is taken;
//! - its open record is durable before its first byte is forwarded, a refusal's before it is answered.
//!
//! This module does not know what the bytes of a session mean.

mod carry;
mod control;
mod dial;
mod drain;
mod ends;
mod enforce;
mod ground;
mod judge;
pub mod knock;
mod lease;
mod limits;
mod listener;
mod metrics;
mod opens;
mod owed;
pub mod push;
mod relay_service;
mod resolve;
mod sessions;
pub(crate) mod standing;
mod strangers;
mod stream;
#[cfg(test)]
mod tests;
mod tickets;
mod trace;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use rustix::time::{ClockId, clock_gettime};
use selvedge_domain::rows::Broker;
use selvedge_domain::{Id, State};
use selvedge_proto::identity::Anchors;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::audit::Log;
use crate::decision::Decider;
use crate::issuer::Issuer;
use crate::relay::Relay;
use crate::routing::{self, Load, Routing};

pub use dial::{CONFIRM_TIMEOUT, READY_TIMEOUT};
pub use ends::{CONTROL_QUEUE_MAX, OPENS_IN_FLIGHT_MAX};
pub use enforce::Hook;
pub use ground::Ground;
pub use limits::Limits;
pub use listener::{HANDSHAKES_MAX, PENDING_MAX, PENDING_PER_PREFIX_MAX, SHOW_TIMEOUT};
pub use opens::REFUSAL_FLOOR;
pub use sessions::SessionInfo;
pub use tickets::{PARKED_HOPS_MAX, TICKETS_PER_STREAM_MAX};

/// What the other brokers know is known here so long after the start.
const WARMING: Duration = Duration::from_secs(3);

/// What an edge is made of.
pub struct Parts {
    /// This broker's name.
    pub name: String,
    /// Name of its region.
    pub region: String,
    /// The state, the lease, and the other brokers.
    pub ground: Arc<dyn Ground>,
    /// What the cluster trusts.
    pub anchors: Arc<Anchors>,
    /// `selvedge_proto::tls::edge_server` with [`selvedge_proto::tls::CONTROL_ALPN`]; replaced when this broker's
    /// certificate is.
    pub tls: watch::Receiver<Arc<rustls::ServerConfig>>,
    /// Where decisions are recorded.
    pub audit: Log,
    /// Signs lists of brokers and renewals; brokers without it leave both to others.
    pub issuer: Option<Arc<Issuer>>,
    /// Asks the policy.
    pub decider: Arc<Decider>,
    /// What is measured.
    pub routing: Arc<Routing>,
    /// Moves bytes.
    pub relay: Relay,
    /// What it admits at most, to begin with.
    pub limits: Limits,
}

/// The edge of this broker.
pub struct Edge {
    name: String,
    region: String,
    ground: Arc<dyn Ground>,
    anchors: Arc<Anchors>,
    tls: watch::Receiver<Arc<rustls::ServerConfig>>,
    audit: Log,
    issuer: Option<Arc<Issuer>>,
    decider: Arc<Decider>,
    routing: Arc<Routing>,
    relay: Relay,
    gate: Arc<ground::LeaseGate>,
    runtime: tokio::runtime::Handle,
    ends: ends::Ends,
    tickets: Arc<tickets::Tickets>,
    sessions: Arc<sessions::Sessions>,
    dials: dial::Dials,
    owed: Arc<owed::Owed>,
    knocks: knock::Knocks,
    strangers: strangers::Counted,
    brokers: watch::Sender<Option<selvedge_proto::control::Brokers>>,
    draining: AtomicBool,
    cut_by_drain: AtomicU64,
    started: Instant,
    limits: ArcSwap<Limits>,
}

impl Edge {
    /// An edge that serves nobody yet. To be called on the runtime that it will use.
    pub fn new(parts: Parts) -> Arc<Self> {
        metrics::describe();
        let Parts { name, region, ground, anchors, tls, audit, issuer, decider, routing, relay, limits } = parts;
        Arc::new(Self {
            name,
            region,
            gate: Arc::new(ground::LeaseGate(ground.clone())),
            ground,
            anchors,
            tls,
            audit,
            issuer,
            decider,
            routing,
            relay,
            runtime: tokio::runtime::Handle::current(),
            ends: ends::Ends::default(),
            tickets: Arc::default(),
            sessions: Arc::default(),
            dials: dial::Dials::default(),
            owed: Arc::default(),
            knocks: knock::Knocks::default(),
            strangers: strangers::Counted::default(),
            brokers: watch::Sender::new(None),
            draining: AtomicBool::new(false),
            cut_by_drain: AtomicU64::new(0),
            started: Instant::now(),
            limits: ArcSwap::from_pointee(limits),
        })
    }

    /// Serves the edge listener and everything beside it until `stop`.
    ///
    /// **Errors**: when the listener fails for good.
    pub async fn serve(self: &Arc<Self>, listener: TcpListener, stop: CancellationToken) -> std::io::Result<()> {
        self.background(&stop);
        listener::serve(self.clone(), listener, stop).await
    }

    /// What runs also on a broker whose edge listener is off: exchange with the other brokers, availability, the lease.
    pub fn background(self: &Arc<Self>, stop: &CancellationToken) {
        let edge = self.clone();
        let load = move || Load {
            draining: edge.is_draining(),
            sessions: edge.session_count() as u64,
            sessions_cut: edge.cut_by_drain.load(Ordering::Relaxed),
        };
        tokio::spawn(routing::exchange(self.routing.clone(), self.ground.clone(), load, stop.clone()));
        tokio::spawn(routing::availability::run(self.routing.clone(), self.ground.clone(), stop.clone()));
        tokio::spawn(push::keep_list(self.clone(), stop.clone()));
        tokio::spawn(lease::watch(self.clone(), stop.clone()));
        tokio::spawn(drain::follow(self.clone(), stop.clone()));
        tokio::spawn(strangers::report(self.clone(), stop.clone()));
    }

    /// The sessions that there are now, the oldest first.
    pub fn sessions(&self) -> Vec<SessionInfo> {
        let mut sessions: Vec<SessionInfo> = self.sessions.all().iter().map(|s| SessionInfo::from(&**s)).collect();
        sessions.sort_by_key(|session| session.started_ms);
        sessions
    }

    /// How many sessions there are now.
    pub fn session_count(&self) -> usize {
        self.sessions.len()
    }

    /// What it admits at most.
    pub fn limits(&self) -> Limits {
        **self.limits.load()
    }

    /// Admits as much from now on. What is there already stays.
    pub fn set_limits(&self, limits: Limits) {
        self.limits.store(Arc::new(limits));
    }

    /// The signed list of brokers that ends are given; none before an issuer signed one.
    pub fn broker_list(&self) -> Option<selvedge_proto::control::Brokers> {
        self.brokers.borrow().clone()
    }

    /// A broker that has just begun does not know yet who reaches what: others may.
    fn is_warming(&self, state: &State) -> bool {
        let unheard = |broker: &Broker| !broker.removed && !self.routing.alive(broker.node);
        self.started.elapsed() < WARMING && state.rows::<Broker>().any(|broker| unheard(&broker))
    }

    /// What a connector is told is left of the lease.
    fn lease_left_for(&self, connector: Id) -> u64 {
        self.owed.left_ms(connector, boottime_ms(), self.ground.lease_left_ms())
    }
}

/// Milliseconds on a clock that a pause does not stop.
fn boottime_ms() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    now.tv_sec as u64 * 1_000 + now.tv_nsec as u64 / 1_000_000
}

/// 16 random bytes as a number.
fn random_u128() -> Option<u128> {
    let mut bytes = [0; 16];
    aws_lc_rs::rand::fill(&mut bytes).ok()?;
    Some(u128::from_be_bytes(bytes))
}
