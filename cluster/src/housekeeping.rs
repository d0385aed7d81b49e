//! What runs beside: snapshots and the log's length, the end of suspicion, gauges.

use std::sync::Arc;
use std::time::Duration;

use openraft::async_runtime::WatchReceiver as _;

use selvedge_proto::peer as wire;

use crate::core::Core;
use crate::dial::Purpose;
use crate::metrics::LOG_SINCE_SNAPSHOT_BYTES;
use crate::status::Gauges;

const INTERVAL: Duration = Duration::from_millis(250);
const CONNECTED_INTERVAL: Duration = Duration::from_secs(1);

/// Watches Raft and the membership.
pub(crate) async fn watch(core: Arc<Core>) {
    let mut gauges = Gauges::new(&core);
    while core.pause(INTERVAL).await.is_ok() {
        let metrics = core.metrics();
        gauges.set(&core);
        if let Err(fatal) = metrics.running_state {
            core.fail(core.why_raft_stopped(&fatal));
            return;
        }
        // Remembers who is a member now.
        core.counted();
        core.longest_lease_ms();

        end_suspicion(&core);
    }
}

/// A broker that lost the end of its log stands again when a leader has brought it past that end.
fn end_suspicion(core: &Core) {
    let Some(suspect) = core.log.log().suspect() else { return };
    let committed = core.raft.data_metrics().borrow_watched().local_committed.as_ref().map(|id| id.index);
    // Alone, there is nobody to whom the lost end was acknowledged.
    let alone = core.voters() == [core.node];
    if alone || committed.is_some_and(|committed| committed > suspect) {
        tracing::info!(
            suspect,
            "a leader has brought this broker past the end of the log that it lost, or it is alone"
        );
        core.log.log().clear_suspect(Box::new(|_| ()));
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
    let log = core.log.log();
    // What was there at the start beyond what is kept anyway has no snapshot any more.
    let mut snapshot_at_bytes = log.written_bytes().min(core.limits.keep_bytes);
    let mut next_bytes = core.limits.snapshot_bytes + stagger(&core);
    while core.pause(Duration::from_secs(1)).await.is_ok() {
        let written = log.written_bytes();
        ::metrics::gauge!(LOG_SINCE_SNAPSHOT_BYTES).set((written - snapshot_at_bytes) as f64);
        if written - snapshot_at_bytes < next_bytes {
            continue;
        }
        (snapshot_at_bytes, next_bytes) = (written, core.limits.snapshot_bytes);
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

/// All logs grow alike: each broker waits a little longer than the one before, once, so that one at a time is busy.
fn stagger(core: &Core) -> u64 {
    let mut members = core.members();
    members.sort_unstable();
    let place = members.iter().position(|node| *node == core.node).unwrap_or(0);
    core.limits.snapshot_bytes / members.len().max(1) as u64 * place as u64
}

/// Cuts the log behind the snapshot and what of the state is durable, less what followers may still want.
async fn purge(core: &Core) {
    let durable = (*core.published.applied().borrow()).saturating_sub(1);
    let store = core.store.clone();
    if let Err(error) = core.blocking.run(move || store.sync().map_err(std::io::Error::other)).await {
        tracing::warn!(%error, "the state cannot be synced; the log is not cut");
        return;
    }
    let Some(snapshot) = core.metrics().snapshot.map(|id| id.index) else { return };
    let behind = core.log.log().index_behind(core.limits.keep_bytes);
    if let Some(upto) = cut_upto(snapshot, durable, behind, core.limits.keep_entries) {
        tracing::info!(upto, "cutting the log");
        if let Err(error) = core.raft.trigger().purge_log(upto).await {
            tracing::warn!(%error, "the log cannot be cut");
        }
    }
}

/// Up to where the log may be cut: never beyond the snapshot or the durable state, and so that either enough entries
/// or enough bytes (`behind`) are left.
fn cut_upto(snapshot: u64, durable: u64, behind: Option<u64>, keep_entries: u64) -> Option<u64> {
    let bound = snapshot.min(durable);
    bound.checked_sub(keep_entries).max(behind.map(|behind| behind.min(bound)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_is_cut_behind_snapshot_and_durable_state_and_keeps_entries_or_bytes() {
        assert_eq!(cut_upto(500, 400, None, 100), Some(300), "what is not durable is needed again");
        assert_eq!(cut_upto(400, 500, None, 100), Some(300), "what is in no snapshot is needed by others");
        assert_eq!(cut_upto(50, 50, None, 100), None, "not enough to cut");
        assert_eq!(cut_upto(50, 50, Some(20), 100), Some(20), "large entries are cut sooner");
        assert_eq!(cut_upto(500, 500, Some(20), 100), Some(400), "small ones by their number");
        assert_eq!(cut_upto(500, 400, Some(450), 1_000), Some(400), "never beyond what is safe");
    }
}
