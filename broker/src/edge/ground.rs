//! What the edge stands on: the few things that it needs of the cluster.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use selvedge_cluster::{Cluster, PeerChannel};
use selvedge_domain::{Asker, Body, Id, State};
use selvedge_proto::relay::relay_client::RelayClient;
use tokio::sync::watch;

use crate::relay::Gate;

/// How long a held flow sleeps at most before it asks the lease again; a step of the wall clock also closes it.
const GATE_POLL: Duration = Duration::from_millis(250);

/// The replicated state, the freshness lease, and the way to the other brokers.
#[async_trait]
pub trait Ground: Send + Sync + 'static {
    /// This broker's node id.
    fn node(&self) -> u64;

    /// Cluster time. **Units**: milliseconds since the Unix epoch.
    fn now_ms(&self) -> u64;

    /// The newest state applied here.
    fn state(&self) -> Arc<State>;

    /// Each state, as it is applied.
    fn subscribe(&self) -> watch::Receiver<Arc<State>>;

    /// Whether this broker may admit and forward now. Asked before each forward.
    fn lease_open(&self) -> bool;

    /// What is left of the lease, in milliseconds; 0 when it has ended.
    fn lease_left_ms(&self) -> u64;

    /// After so many milliseconds nobody acts any more on what was said, until now, of what is left of the lease.
    fn lease_told_over_ms(&self) -> u64;

    /// Changes with each renewal of the lease.
    fn lease_renewed(&self) -> watch::Receiver<u64>;

    /// Proposes something that the broker says for itself.
    ///
    /// **Errors**: for the log of the operator; the caller tries again.
    async fn propose(&self, body: Body) -> Result<(), String>;

    /// Hands leadership over to one that does not drain, if this broker leads. What goes wrong is tried again.
    async fn hand_over(&self);

    /// The relay service of another broker; none when there is no way to it.
    fn relay(&self, node: u64) -> Option<RelayClient<PeerChannel>>;
}

#[async_trait]
impl Ground for Cluster {
    fn node(&self) -> u64 {
        Cluster::node(self)
    }

    fn now_ms(&self) -> u64 {
        Cluster::now_ms(self)
    }

    fn state(&self) -> Arc<State> {
        Cluster::state(self)
    }

    fn subscribe(&self) -> watch::Receiver<Arc<State>> {
        Cluster::subscribe(self)
    }

    fn lease_open(&self) -> bool {
        self.lease().open()
    }

    fn lease_left_ms(&self) -> u64 {
        if self.lease().open() { self.lease().left_ms() } else { 0 }
    }

    fn lease_told_over_ms(&self) -> u64 {
        Cluster::lease_told_over_ms(self)
    }

    fn lease_renewed(&self) -> watch::Receiver<u64> {
        self.lease().changed()
    }

    async fn propose(&self, body: Body) -> Result<(), String> {
        Cluster::propose(self, Asker::BROKER, body, None).await.map(drop).map_err(|error| error.to_string())
    }

    async fn hand_over(&self) {
        if !self.leads() {
            return;
        }
        // Not to one that would hand it over again.
        let (status, state) = (self.status(), self.state());
        let stays = |node| state.broker(node).is_some_and(|broker| !broker.draining && !broker.removed);
        let others =
            status.members.iter().filter(|other| other.voter && other.node != self.node() && stays(other.node));
        let next = others.min_by_key(|other| other.lag_entries.unwrap_or(u64::MAX));
        if let Some(next) = next
            && let Err(error) = Cluster::hand_over(self, Some(next.node)).await
        {
            tracing::debug!(%error, "leadership was not handed over");
        }
    }

    fn relay(&self, node: u64) -> Option<RelayClient<PeerChannel>> {
        Some(RelayClient::new(self.channel(node)))
    }
}

/// Waits until this broker has applied `position`; false when it did not within `wait`.
pub(super) async fn applied(ground: &dyn Ground, position: Id, wait: Duration) -> bool {
    let mut states = ground.subscribe();
    let reached = states.wait_for(|state| state.position() >= position);
    matches!(tokio::time::timeout(wait, reached).await, Ok(Ok(_)))
}

/// The lease as the relay asks for it.
pub(super) struct LeaseGate(pub(super) Arc<dyn Ground>);

#[async_trait]
impl Gate for LeaseGate {
    fn open(&self) -> bool {
        self.0.lease_open()
    }

    async fn wait_open(&self) {
        let mut renewed = self.0.lease_renewed();
        if !self.0.lease_open() {
            let _ = tokio::time::timeout(GATE_POLL, renewed.changed()).await;
        }
    }
}
