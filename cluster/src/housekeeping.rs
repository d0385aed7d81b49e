//! What runs beside: snapshots and the log's length, the disk's watchdog, the end of suspicion, gauges.

use std::sync::Arc;
use std::time::Duration;

use openraft::async_runtime::WatchReceiver as _;

use selvedge_proto::peer as wire;

use crate::core::Core;
use crate::dial::Purpose;
use crate::error::Fatal;
use crate::metrics::{LEADER, TERM};
use crate::snapshot::blocking;

const INTERVAL: Duration = Duration::from_millis(250);
const CONNECTED_INTERVAL: Duration = Duration::from_secs(1);
/// A log write that is older makes a leader hand over.
pub const LOG_STALL_TRANSFER_MS: u64 = 2_000;
/// And a little later stop its heartbeats, so that another is elected.
pub const LOG_STALL_SILENT_MS: u64 = 2_500;
/// And any broker stop.
pub const LOG_STALL_FATAL_MS: u64 = 5_000;

/// Watches the disk, Raft and the membership.
pub(crate) async fn watch(core: Arc<Core>) {
    let mut silent = false;
    let mut transferring = false;
    while core.pause(INTERVAL).await.is_ok() {
        let metrics = core.metrics();
        ::metrics::gauge!(LEADER).set(f64::from(u8::from(metrics.current_leader == Some(core.node))));
        ::metrics::gauge!(TERM).set(metrics.current_term as f64);
        if let Err(fatal) = metrics.running_state {
            core.fail(Fatal::Raft(fatal.to_string()));
            return;
        }
        // Remembers who is a member now.
        core.counted();
        core.longest_lease_ms();

        let stalled_ms = core.log.log().oldest_unsynced_ms();
        if stalled_ms >= LOG_STALL_FATAL_MS {
            core.fail(Fatal::Raft(format!("a write of the log has been waiting for {stalled_ms} ms")));
            return;
        }
        if stalled_ms >= LOG_STALL_SILENT_MS && !silent {
            silent = true;
            core.raft.runtime_config().heartbeat(false);
        } else if stalled_ms == 0 && silent {
            silent = false;
            core.raft.runtime_config().heartbeat(true);
        }
        if stalled_ms < LOG_STALL_TRANSFER_MS {
            transferring = false;
        } else if !transferring {
            transferring = true;
            tracing::warn!(stalled_ms, "the disk of the log is slow");
            if let Err(error) = crate::membership::transfer(&core, None).await {
                tracing::warn!(%error, "leadership cannot be handed over");
            }
        }
        end_suspicion(&core);
    }
}

/// A broker that lost the end of its log stands again when a leader has brought it past that end.
fn end_suspicion(core: &Core) {
    let Some(suspect) = core.log.log().suspect() else { return };
    core.raft.runtime_config().elect(false);
    let committed = core.raft.data_metrics().borrow_watched().local_committed.as_ref().map(|id| id.index);
    // Alone, there is nobody to whom the lost end was acknowledged.
    let alone = core.voters() == [core.node];
    if alone || committed.is_some_and(|committed| committed > suspect) {
        tracing::info!(
            suspect,
            "a leader has brought this broker past the end of the log that it lost, or it is alone"
        );
        core.log.log().clear_suspect(Box::new(|_| ()));
        core.raft.runtime_config().elect(true);
    }
}

/// Keeps Raft's connections to the other voters open, also between two followers: a round of votes after the leader's
/// death is over before a connection would stand.
pub(crate) async fn keep_connected(core: Arc<Core>) {
    while core.pause(CONNECTED_INTERVAL).await.is_ok() {
        for voter in core.voters().into_iter().filter(|voter| *voter != core.node) {
            let core = core.clone();
            core.clone().tasks.spawn(async move {
                let mut client = core.peer_client(voter, Purpose::Raft);
                let mut request = tonic::Request::new(wire::ClockRequest {});
                request.set_timeout(CONNECTED_INTERVAL);
                // Whether it answers does not matter here: that the connection stands does.
                let _ = tokio::time::timeout(CONNECTED_INTERVAL, client.clock(request)).await;
            });
        }
    }
}

/// Makes snapshots as the log grows, and cuts the log behind them.
pub(crate) async fn keep_log_short(core: Arc<Core>) {
    let mut snapshot_at_bytes = core.log.appended_bytes();
    while core.pause(Duration::from_secs(1)).await.is_ok() {
        let appended = core.log.appended_bytes();
        if appended - snapshot_at_bytes < core.limits.snapshot_bytes {
            continue;
        }
        snapshot_at_bytes = appended;
        if core.raft.trigger().snapshot().await.is_err() {
            return;
        }
        let applied = core.published.applied();
        let next = *applied.borrow();
        let mut snapshots = core.raft.metrics();
        let made = async {
            while snapshots.borrow_watched().snapshot.as_ref().is_none_or(|id| id.index + 1 < next) {
                if snapshots.changed().await.is_err() {
                    return;
                }
            }
        };
        tokio::select! {
            () = core.stop.cancelled() => return,
            _ = tokio::time::timeout(Duration::from_secs(60), made) => {}
        }
        purge(&core).await;
    }
}

/// Cuts the log behind the snapshot and what of the state is durable, less what followers may still want.
async fn purge(core: &Core) {
    let durable = (*core.published.applied().borrow()).saturating_sub(1);
    let store = core.store.clone();
    if let Err(error) = blocking(move || store.sync().map_err(std::io::Error::other)).await {
        tracing::warn!(%error, "the state cannot be synced; the log is not cut");
        return;
    }
    let Some(snapshot) = core.metrics().snapshot.map(|id| id.index) else { return };
    if let Some(upto) = snapshot.min(durable).checked_sub(core.limits.keep_entries) {
        tracing::info!(upto, "cutting the log");
        if let Err(error) = core.raft.trigger().purge_log(upto).await {
            tracing::warn!(%error, "the log cannot be cut");
        }
    }
}
