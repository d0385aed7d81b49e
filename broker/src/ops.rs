//! The `ops` listener: whether the broker lives, whether it serves, and its metrics. HTTP, on loopback.

use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::get;
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use selvedge_cluster::Cluster;
use tokio_util::sync::CancellationToken;

/// What the listener answers from.
#[derive(Clone)]
pub struct Ops {
    cluster: Cluster,
    metrics: PrometheusHandle,
}

impl Ops {
    /// Answers for this broker.
    pub fn new(cluster: Cluster, metrics: PrometheusHandle) -> Self {
        Self { cluster, metrics }
    }

    /// Serves until `stop`.
    pub async fn serve(self, listener: tokio::net::TcpListener, stop: CancellationToken) -> std::io::Result<()> {
        let router = Router::new()
            .route("/livez", get(|| async { "ok\n" }))
            .route("/readyz", get(ready))
            .route("/metrics", get(metrics))
            .with_state(Arc::new(self));
        axum::serve(listener, router).with_graceful_shutdown(stop.cancelled_owned()).await
    }
}

/// Installs the process's metrics recorder.
///
/// **Errors** when one is installed already.
pub fn install_metrics() -> Result<PrometheusHandle, metrics_exporter_prometheus::BuildError> {
    let handle = PrometheusBuilder::new().install_recorder()?;
    Ok(handle)
}

/// Ready: the cluster is initialised, this broker follows or leads, and its freshness lease is open.
async fn ready(State(ops): State<Arc<Ops>>) -> (StatusCode, &'static str) {
    if ops.cluster.state().cluster().is_none() {
        (StatusCode::SERVICE_UNAVAILABLE, "not initialised\n")
    } else if !ops.cluster.lease().open() {
        (StatusCode::SERVICE_UNAVAILABLE, "no freshness lease\n")
    } else {
        (StatusCode::OK, "ready\n")
    }
}

async fn metrics(State(ops): State<Arc<Ops>>) -> String {
    ops.metrics.run_upkeep();
    ops.metrics.render()
}
