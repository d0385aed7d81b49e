//! Names of the metrics of this crate, with their units last.

use std::time::Duration;

use metrics::{Unit, describe_counter, describe_gauge, describe_histogram};
use tokio::time::Instant;

/// How long one synced write of the log took.
pub const LOG_SYNC_SECONDS: &str = "selvedge_log_sync_seconds";
/// The longest of these in the last one to two minutes.
pub const LOG_SYNC_MAX_SECONDS: &str = "selvedge_log_sync_max_seconds";
/// Requests waiting for the log's thread.
pub const LOG_QUEUE_REQUESTS: &str = "selvedge_log_queue_requests";
/// Requests that shared one write of the log.
pub const LOG_BATCH_REQUESTS: &str = "selvedge_log_batch_requests";
/// Bytes of one write of the log.
pub const LOG_BATCH_BYTES: &str = "selvedge_log_batch_bytes";
/// How often an append waited because the log's queue was full.
pub const LOG_QUEUE_FULL_TOTAL: &str = "selvedge_log_queue_full_total";
/// How long one write of the state took.
pub const STATE_WRITE_SECONDS: &str = "selvedge_state_write_seconds";
/// How long one sync of the audit journal took.
pub const AUDIT_SYNC_SECONDS: &str = "selvedge_audit_sync_seconds";
/// Records that shared one sync of the audit journal.
pub const AUDIT_BATCH_RECORDS: &str = "selvedge_audit_batch_records";
/// Bytes that wait for the audit journal's thread.
pub const AUDIT_QUEUE_BYTES: &str = "selvedge_audit_queue_bytes";
/// Bytes of all audit segments on this disk.
pub const AUDIT_DISK_BYTES: &str = "selvedge_audit_disk_bytes";
/// Records that the audit journal refused or lost before they were durable; each was reported to its caller.
pub const AUDIT_REFUSED_TOTAL: &str = "selvedge_audit_refused_total";

/// Audit streams on this disk that were found broken.
pub const AUDIT_BROKEN_STREAMS: &str = "selvedge_audit_broken_streams";

/// Describes the metrics to the installed recorder.
pub fn describe() {
    describe_histogram!(LOG_SYNC_SECONDS, Unit::Seconds, "time of one synced write of the log");
    describe_gauge!(LOG_SYNC_MAX_SECONDS, Unit::Seconds, "longest synced write of the log in the last minutes");
    describe_gauge!(LOG_QUEUE_REQUESTS, "requests waiting for the log's thread");
    describe_histogram!(LOG_BATCH_REQUESTS, "requests that shared one write of the log");
    describe_histogram!(LOG_BATCH_BYTES, Unit::Bytes, "bytes of one write of the log");
    describe_counter!(LOG_QUEUE_FULL_TOTAL, "appends that waited because the log's queue was full");
    describe_histogram!(STATE_WRITE_SECONDS, Unit::Seconds, "time of one write of the state");
    describe_histogram!(AUDIT_SYNC_SECONDS, Unit::Seconds, "time of one sync of the audit journal");
    describe_histogram!(AUDIT_BATCH_RECORDS, "records that shared one sync of the audit journal");
    describe_gauge!(AUDIT_QUEUE_BYTES, Unit::Bytes, "bytes that wait for the audit journal's thread");
    describe_gauge!(AUDIT_DISK_BYTES, Unit::Bytes, "bytes of all audit segments on this disk");
    describe_gauge!(AUDIT_BROKEN_STREAMS, Unit::Count, "audit streams on this disk that were found broken");
    describe_counter!(AUDIT_REFUSED_TOTAL, "audit records refused or lost before they were durable");
    // Counted from the start, so that the first of them is seen as a rise.
    for name in [LOG_QUEUE_FULL_TOTAL, AUDIT_REFUSED_TOTAL] {
        metrics::counter!(name).increment(0);
    }
    metrics::gauge!(AUDIT_BROKEN_STREAMS).increment(0.0);
}

/// How long the longest of some measurements was, and of those of the minute before.
#[derive(Debug, Default)]
pub(crate) struct RecentMax {
    begun: Option<Instant>,
    now: Duration,
    before: Duration,
}

impl RecentMax {
    const SPAN: Duration = Duration::from_secs(60);

    /// Takes one more; answers the longest of the last one to two minutes.
    pub(crate) fn take(&mut self, one: Duration, now: Instant) -> Duration {
        let begun = *self.begun.get_or_insert(now);
        let passed = now.saturating_duration_since(begun);
        if passed >= Self::SPAN {
            self.before = if passed < 2 * Self::SPAN { self.now } else { Duration::ZERO };
            (self.begun, self.now) = (Some(now), Duration::ZERO);
        }
        self.now = self.now.max(one);
        self.now.max(self.before)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_is_forgotten_after_two_minutes_at_most() {
        let (mut max, start) = (RecentMax::default(), Instant::now());
        let mut take =
            |one_ms, at_s| max.take(Duration::from_millis(one_ms), start + Duration::from_secs(at_s)).as_millis();
        assert_eq!(take(5, 0), 5);
        assert_eq!(take(9, 30), 9);
        assert_eq!(take(1, 61), 9, "of the minute before");
        assert_eq!(take(2, 122), 2);
        assert_eq!(take(7, 130), 7);
        assert_eq!(take(1, 400), 1);
    }
}
