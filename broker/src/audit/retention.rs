//! Frees the journal of what is old, or of what every receiver has when the disk's share runs low.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use selvedge_cluster::Cluster;
use selvedge_domain::rows::{Cursor, Receiver};
use selvedge_storage::audit::{QUOTA_BYTES, StreamId};
use tokio_util::sync::CancellationToken;

use super::log::Log;
use super::metrics;

/// Records are kept for so long once every receiver has them.
pub const RETENTION: Duration = Duration::from_secs(90 * 24 * 3_600);
/// From this share of the quota on, whatever every receiver has may go, however young.
const QUOTA_LOW_BYTES: u64 = QUOTA_BYTES / 10 * 8;
const INTERVAL: Duration = Duration::from_secs(600);

/// Deletes whole sealed segments, every ten minutes until `stop`.
///
/// A segment stays while a receiver lacks any of its records, however old it is: then the quota ends new sessions, and
/// the operator decides (see the runbook SE0201).
pub async fn run(cluster: Cluster, log: Log, stop: CancellationToken) {
    loop {
        let (cluster, log) = (cluster.clone(), log.clone());
        let swept = tokio::task::spawn_blocking(move || sweep(&cluster, &log)).await;
        match swept {
            Ok(Ok(freed)) => ::metrics::counter!(metrics::FREED_BYTES).increment(freed),
            Ok(Err(error)) => tracing::warn!(%error, "old audit segments were not deleted"),
            Err(error) => tracing::error!(%error, "deleting old audit segments panicked"),
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(INTERVAL) => {}
        }
    }
}

fn sweep(cluster: &Cluster, log: &Log) -> Result<u64, selvedge_storage::Error> {
    let state = cluster.state();
    let receivers = state.rows::<Receiver>().count();
    let mut delivered: BTreeMap<StreamId, Vec<u64>> = BTreeMap::new();
    for cursor in
        state.rows::<Cursor>().filter(|cursor| cursor.receiver.is_some_and(|id| state.by_id::<Receiver>(id).is_some()))
    {
        let stream = StreamId { broker: cursor.broker, boot: cursor.boot };
        delivered.entry(stream).or_default().push(cursor.next_seq);
    }
    let needed_from = |stream: StreamId| match delivered.get(&stream) {
        _ if receivers == 0 => u64::MAX,
        Some(cursors) if cursors.len() == receivers => cursors.iter().copied().min().unwrap_or(1),
        _ => 1,
    };
    let used = used_bytes(log.journal().root());
    let keep_ms = u64::try_from(RETENTION.as_millis()).unwrap_or(u64::MAX);
    let before_ms =
        if used >= QUOTA_LOW_BYTES && receivers > 0 { u64::MAX } else { cluster.now_ms().saturating_sub(keep_ms) };
    log.journal().delete_sealed_before(before_ms, needed_from)
}

fn used_bytes(root: &Path) -> u64 {
    let entries = |path: &Path| std::fs::read_dir(path).into_iter().flatten().flatten().collect::<Vec<_>>();
    entries(root)
        .iter()
        .flat_map(|stream| entries(&stream.path()))
        .filter_map(|segment| segment.metadata().ok())
        .map(|metadata| metadata.len())
        .sum()
}
