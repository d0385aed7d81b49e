//! Frees the journal of what is old, or of what every receiver has when the disk's share runs low.

use std::collections::BTreeMap;
use std::time::Duration;

use selvedge_cluster::Cluster;
use selvedge_domain::State;
use selvedge_domain::rows::{Cursor, Receiver};
use selvedge_storage::audit::{Journal, StreamId};
use tokio_util::sync::CancellationToken;

use super::log::Log;
use super::metrics;

/// Records are kept for so long once every receiver has them.
pub const RETENTION: Duration = Duration::from_secs(90 * 24 * 3_600);
/// From this share of the quota on, whatever every receiver has goes, however young.
const QUOTA_LOW_PERCENT: u64 = 80;
const INTERVAL: Duration = Duration::from_secs(600);

/// Deletes whole sealed segments, every ten minutes until `stop`.
///
/// A segment stays while a receiver lacks any of its records, however old it is: then the quota ends new sessions, and
/// the operator decides (see the runbook SE0201).
pub async fn run(cluster: Cluster, log: Log, stop: CancellationToken) {
    loop {
        let (state, now_ms, journal) = (cluster.state(), cluster.now_ms(), log.journal().clone());
        let swept = tokio::task::spawn_blocking(move || sweep(&state, now_ms, &journal)).await;
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

/// Deletes what may go now; returns the bytes that came free.
pub(super) fn sweep(state: &State, now_ms: u64, journal: &Journal) -> Result<u64, selvedge_storage::Error> {
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
    let keep_ms = u64::try_from(RETENTION.as_millis()).unwrap_or(u64::MAX);
    let low = journal.disk_bytes() >= journal.quota_bytes() / 100 * QUOTA_LOW_PERCENT;
    let before_ms = if low && receivers > 0 { u64::MAX } else { now_ms.saturating_sub(keep_ms) };
    journal.delete_sealed_before(before_ms, needed_from)
}
