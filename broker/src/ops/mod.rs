//! The `ops` listener: whether the broker lives, whether it serves, its metrics, and a reload. HTTP, on loopback.

pub mod doctor;
mod reload;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{ConnectInfo, State};
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::{get, post};
use axum::{Json, Router};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use selvedge_cluster::Cluster;
use tokio_util::sync::CancellationToken;

pub use reload::{Change, Configured, Reload, Reloaded, SetLog};

/// What was measured is put in order this often, whether anybody asks for it or not: until then it is kept whole.
const UPKEEP_EVERY: Duration = Duration::from_secs(5);
/// Content type of the metrics.
///
/// **Source** Prometheus text exposition format, 0.0.4.
const TEXT_FORMAT: &str = "text/plain; version=0.0.4; charset=utf-8";
/// Upper bounds of the histograms of times.
///
/// **Units** seconds.
const SECONDS: [f64; 16] =
    [0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

/// What the listener answers from.
#[derive(Clone)]
pub struct Ops {
    cluster: Cluster,
    metrics: PrometheusHandle,
    reload: Arc<Reload>,
}

impl Ops {
    /// Answers for this broker.
    pub fn new(cluster: Cluster, metrics: PrometheusHandle, reload: Arc<Reload>) -> Self {
        Self { cluster, metrics, reload }
    }

    /// Serves until `stop`.
    pub async fn serve(self, listener: tokio::net::TcpListener, stop: CancellationToken) -> std::io::Result<()> {
        let metrics_kept = self.metrics.clone();
        let upkeep = async move {
            loop {
                // A panic of it was reported, and measures nothing.
                let _ = tokio::task::spawn_blocking(crate::metrics::measure).await;
                tokio::time::sleep(UPKEEP_EVERY).await;
                metrics_kept.run_upkeep();
            }
        };
        tokio::spawn(stop.clone().run_until_cancelled_owned(upkeep));
        let router = Router::new()
            .route("/livez", get(|| async { "ok\n" }))
            .route("/readyz", get(ready))
            .route("/metrics", get(metrics))
            .route("/status", get(status))
            .route("/reload", post(reload_now))
            .with_state(Arc::new(self))
            .into_make_service_with_connect_info::<SocketAddr>();
        axum::serve(listener, router).with_graceful_shutdown(stop.cancelled_owned()).await
    }
}

/// Installs the process's metrics recorder. Times are histograms, so that those of several brokers can be added up.
///
/// **Errors** when one is installed already.
pub fn install_metrics() -> Result<PrometheusHandle, metrics_exporter_prometheus::BuildError> {
    let times = Matcher::Suffix("_seconds".to_owned());
    let handle = PrometheusBuilder::new().set_buckets_for_metric(times, &SECONDS)?.install_recorder()?;
    crate::metrics::describe();
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

async fn metrics(State(ops): State<Arc<Ops>>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, TEXT_FORMAT)], ops.metrics.render())
}

/// How the cluster looks from here: what `selvedge cluster doctor` asks a broker that runs.
async fn status(State(ops): State<Arc<Ops>>) -> Json<selvedge_cluster::Status> {
    Json(ops.cluster.status())
}

/// Reads the configuration again; only for this machine, wherever the listener is bound.
async fn reload_now(
    State(ops): State<Arc<Ops>>,
    ConnectInfo(from): ConnectInfo<SocketAddr>,
) -> Result<Json<Reloaded>, (StatusCode, String)> {
    if !from.ip().to_canonical().is_loopback() {
        return Err((StatusCode::FORBIDDEN, "a reload is asked for on the machine itself\n".to_owned()));
    }
    // Files are read.
    let done = tokio::task::spawn_blocking(move || ops.reload.run()).await;
    let done = done.map_err(|error| (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")))?;
    done.map(Json).map_err(|error| (StatusCode::UNPROCESSABLE_ENTITY, format!("{error}\n")))
}
