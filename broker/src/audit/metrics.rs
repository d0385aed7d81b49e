//! Names of the audit part's metrics.

use metrics::{Unit, describe_counter, describe_gauge};

/// Records appended, by kind.
pub const RECORDS: &str = "selvedge_audit_records_total";
/// Records sent to receivers.
pub const SENT: &str = "selvedge_audit_sent_total";
/// Connections to receivers that failed or broke.
pub const CONNECTION_FAILURES: &str = "selvedge_audit_connection_failures_total";
/// Gaps in what a receiver gets, by cause.
pub const GAPS: &str = "selvedge_audit_export_gaps_total";
/// Records that the slowest receiver has not acknowledged, of this broker's streams.
pub const BACKLOG_RECORDS: &str = "selvedge_audit_backlog_records";
/// Bytes of old segments that were deleted.
pub const FREED_BYTES: &str = "selvedge_audit_freed_bytes_total";

/// Describes them to the recorder.
pub fn describe() {
    describe_counter!(RECORDS, Unit::Count, "audit records appended, by kind");
    describe_counter!(SENT, Unit::Count, "audit records sent to log receivers");
    describe_counter!(CONNECTION_FAILURES, Unit::Count, "connections to log receivers that failed or broke");
    describe_counter!(FREED_BYTES, Unit::Bytes, "bytes of old audit segments that were deleted");
    describe_counter!(GAPS, Unit::Count, "gaps in what a log receiver gets, by cause");
    describe_gauge!(BACKLOG_RECORDS, Unit::Count, "audit records that the slowest log receiver has not acknowledged");
}
