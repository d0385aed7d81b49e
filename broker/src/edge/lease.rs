//! What happens to live sessions when this broker's lease ends: held by the relay at once, cut after the hold.

use std::sync::Arc;
use std::time::{Duration, Instant};

use selvedge_domain::limits::HOLD_MS_DEFAULT;
use selvedge_proto::frame::SessionCode;
use tokio_util::sync::CancellationToken;

use super::Edge;

/// Sessions that were held to the end are cut over so long, so that not all clients come back at once.
pub const CUT_SPREAD: Duration = Duration::from_secs(5);
const LOOK_INTERVAL: Duration = Duration::from_millis(200);

/// Watches the lease until `stop`.
pub(super) async fn watch(edge: Arc<Edge>, stop: CancellationToken) {
    let mut closed_since: Option<Instant> = None;
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(LOOK_INTERVAL) => {}
        }
        if edge.ground.lease_open() {
            if let Some(since) = closed_since.take() {
                tracing::info!(
                    held_ms = since.elapsed().as_millis() as u64,
                    "the freshness lease is back; sessions go on"
                );
                judge_all(&edge).await;
            }
            continue;
        }
        let since = *closed_since.get_or_insert_with(|| {
            tracing::warn!(sessions = edge.sessions.len(), "the freshness lease has ended; sessions are held");
            Instant::now()
        });
        let hold_ms = edge.ground.state().cluster().map_or(HOLD_MS_DEFAULT, |cluster| cluster.hold_ms);
        let over = since.elapsed().saturating_sub(Duration::from_millis(hold_ms));
        if over.is_zero() {
            continue;
        }
        for session in edge.sessions.all() {
            // Each session has its own moment in the spread, which its random id says.
            let part = (session.id as u64) as f64 / u64::MAX as f64;
            if over >= CUT_SPREAD.mul_f64(part) {
                session.cut_for(SessionCode::LeaseOver);
            }
        }
    }
}

/// Changes were enforced before the lease came back; what time alone ended meanwhile is found here.
async fn judge_all(edge: &Arc<Edge>) {
    let judging = edge.clone();
    let judged = tokio::task::spawn_blocking(move || {
        let state = judging.ground.state();
        for session in judging.sessions.all() {
            judging.judge_again(&session, &state, true);
        }
    });
    if judged.await.is_err() {
        tracing::error!("judging the held sessions again panicked; they are cut");
        edge.sessions.all().iter().for_each(|session| session.cut_for(SessionCode::Internal));
    }
}
