//! Names of this crate's metrics.

use metrics::{Unit, describe_counter, describe_gauge, describe_histogram};

/// Commands that this leader refused because their credential did not stand for their actor.
pub const CREDENTIALS_REFUSED_TOTAL: &str = "selvedge_cluster_credentials_refused_total";
/// Commands proposed on this broker, by `outcome` (`done`, `refused`, `unknown`, `busy`, `no_room`, `unavailable`).
pub const PROPOSALS_TOTAL: &str = "selvedge_cluster_proposals_total";
/// From proposal to answer.
pub const PROPOSAL_SECONDS: &str = "selvedge_cluster_proposal_seconds";
/// Commands in one entry.
pub const ENTRY_COMMANDS: &str = "selvedge_cluster_entry_commands";
/// Commands that wait on the leader to be put into an entry.
pub const QUEUE_COMMANDS: &str = "selvedge_cluster_queue_commands";
/// Applying and publishing one batch of entries.
pub const APPLY_SECONDS: &str = "selvedge_cluster_apply_seconds";
/// Index of the last entry applied.
pub const APPLIED_INDEX: &str = "selvedge_cluster_applied_index";
/// Index of the last entry enforced.
pub const ENFORCED_INDEX: &str = "selvedge_cluster_enforced_index";
/// Publish to enforced.
pub const ENFORCE_SECONDS: &str = "selvedge_cluster_enforce_seconds";
/// 1 while this broker leads.
pub const LEADER: &str = "selvedge_cluster_leader";
/// Term of the last leader known.
pub const TERM: &str = "selvedge_cluster_term";
/// What is left of the freshness lease.
pub const LEASE_LEFT_SECONDS: &str = "selvedge_cluster_lease_left_seconds";
/// Renewals of the freshness lease, by `outcome` (`renewed`, `failed`).
pub const LEASE_RENEWALS_TOTAL: &str = "selvedge_cluster_lease_renewals_total";
/// Calls refused on the peer listener, by `reason` (`handshake`, `cluster`, `epoch`, `node`, `removed`, `forgot`, `claim`, `doubt`).
pub const PEER_REFUSED_TOTAL: &str = "selvedge_cluster_peer_refused_total";
/// Snapshots, by `kind` (`built`, `sent`, `installed`).
pub const SNAPSHOTS_TOTAL: &str = "selvedge_cluster_snapshots_total";
/// Entries that another member is behind, by `node`; on the leader, 0 elsewhere. Members are bounded, so this label is.
pub const PEER_LAG_ENTRIES: &str = "selvedge_cluster_peer_lag_entries";
/// Since another member last answered the leader, by `node`; on the leader, 0 elsewhere.
pub const PEER_SILENT_SECONDS: &str = "selvedge_cluster_peer_silent_seconds";
/// Entries applied here and not yet enforced.
pub const ENFORCED_LAG_ENTRIES: &str = "selvedge_cluster_enforced_lag_entries";
/// Since the last snapshot was built or installed here; since the start when there was none.
pub const SNAPSHOT_AGE_SECONDS: &str = "selvedge_cluster_snapshot_age_seconds";
/// What the log has grown by since the last snapshot was begun, or since the start.
pub const LOG_SINCE_SNAPSHOT_BYTES: &str = "selvedge_cluster_log_since_snapshot_bytes";
/// This machine's wall clock minus cluster time.
pub const TIME_SKEW_SECONDS: &str = "selvedge_cluster_time_skew_seconds";
/// How far this leader's wall clock is from the median of the voters', milliseconds.
pub const CLOCK_OFFSET_MS: &str = "selvedge_cluster_clock_offset_milliseconds";

/// Share of the fullest database disk that is used, percent.
pub const DISK_USED_PERCENT: &str = "selvedge_cluster_disk_used_percent";
/// How long the oldest write of log or state has been waiting.
pub const DISK_WAITING_SECONDS: &str = "selvedge_cluster_disk_waiting_seconds";
/// How often another broker's state was found to differ from this one's.
pub const STATE_DIFFERS_TOTAL: &str = "selvedge_cluster_state_differs_total";

/// Watchers of the event stream.
pub const WATCHERS: &str = "selvedge_cluster_watchers";
/// Watchers that were cut because they took nothing for too long.
pub const WATCHERS_CUT_TOTAL: &str = "selvedge_cluster_watchers_cut_total";
/// Events before an installed snapshot that are still to be fetched.
pub const JOURNAL_MISSING_ROWS: &str = "selvedge_cluster_journal_missing_rows";
/// How often another broker's older events were found not to be those of this cluster.
pub const JOURNAL_DIFFERS_TOTAL: &str = "selvedge_cluster_journal_differs_total";
/// Events before an installed snapshot that were fetched.
pub const JOURNAL_FETCHED_ROWS_TOTAL: &str = "selvedge_cluster_journal_fetched_rows_total";

/// 1 while users, devices, workloads or connectors are held since the cluster was restored.
pub const RESTORED_HELD: &str = "selvedge_cluster_restored_held";

/// Describes them to the recorder.
pub fn describe() {
    describe_counter!(
        CREDENTIALS_REFUSED_TOTAL,
        "commands and changes of the membership refused by this leader for their credential"
    );
    describe_counter!(PROPOSALS_TOTAL, "commands proposed on this broker, by outcome");
    describe_histogram!(PROPOSAL_SECONDS, Unit::Seconds, "from proposal to answer");
    describe_histogram!(ENTRY_COMMANDS, Unit::Count, "commands in one entry");
    describe_gauge!(QUEUE_COMMANDS, Unit::Count, "commands that wait to be put into an entry");
    describe_histogram!(APPLY_SECONDS, Unit::Seconds, "applying and publishing one batch of entries");
    describe_gauge!(APPLIED_INDEX, "index of the last entry applied");
    describe_gauge!(ENFORCED_INDEX, "index of the last entry enforced");
    describe_histogram!(ENFORCE_SECONDS, Unit::Seconds, "from publishing a state to having enforced it");
    describe_gauge!(WATCHERS, Unit::Count, "watchers of the event stream");
    describe_counter!(WATCHERS_CUT_TOTAL, "watchers of the event stream that were cut because they were too slow");
    describe_gauge!(JOURNAL_MISSING_ROWS, Unit::Count, "older events that this broker still fetches from others");
    describe_counter!(JOURNAL_FETCHED_ROWS_TOTAL, "older events that this broker fetched from others");
    describe_gauge!(RESTORED_HELD, "1 while identities are held since a restore");
    describe_counter!(JOURNAL_DIFFERS_TOTAL, "how often another broker's older events were not those of this cluster");
    describe_gauge!(LEADER, "1 while this broker leads");
    describe_gauge!(TERM, "term of the last leader known");
    describe_gauge!(LEASE_LEFT_SECONDS, Unit::Seconds, "what is left of the freshness lease");
    describe_counter!(LEASE_RENEWALS_TOTAL, "renewals of the freshness lease, by outcome");
    describe_counter!(PEER_REFUSED_TOTAL, "calls refused on the peer listener, by reason");
    describe_gauge!(DISK_USED_PERCENT, Unit::Percent, "how full the fullest database disk is");
    describe_gauge!(DISK_WAITING_SECONDS, Unit::Seconds, "how long the oldest write of log or state has been waiting");
    describe_counter!(STATE_DIFFERS_TOTAL, "how often another broker's state was found to differ");
    describe_counter!(SNAPSHOTS_TOTAL, "snapshots, by kind");
    describe_gauge!(PEER_LAG_ENTRIES, Unit::Count, "entries that another member is behind, on the leader");
    describe_gauge!(PEER_SILENT_SECONDS, Unit::Seconds, "since another member last answered, on the leader");
    describe_gauge!(ENFORCED_LAG_ENTRIES, Unit::Count, "entries applied here and not yet enforced");
    describe_gauge!(SNAPSHOT_AGE_SECONDS, Unit::Seconds, "since the last snapshot here, or since the start");
    describe_gauge!(LOG_SINCE_SNAPSHOT_BYTES, Unit::Bytes, "what the log has grown by since the last snapshot");
    describe_gauge!(TIME_SKEW_SECONDS, Unit::Seconds, "this machine's wall clock minus cluster time");
    describe_gauge!(CLOCK_OFFSET_MS, Unit::Milliseconds, "distance from the median of the voters' wall clocks");
    // Counted from the start, so that the first of them is seen as a rise.
    metrics::counter!(STATE_DIFFERS_TOTAL).increment(0);
    metrics::counter!(JOURNAL_DIFFERS_TOTAL).increment(0);
    for outcome in ["done", "refused", "unknown", "busy", "unavailable"] {
        metrics::counter!(PROPOSALS_TOTAL, "outcome" => outcome).increment(0);
    }
    for outcome in ["renewed", "failed"] {
        metrics::counter!(LEASE_RENEWALS_TOTAL, "outcome" => outcome).increment(0);
    }
    for reason in ["handshake", "cluster", "epoch", "node", "removed"] {
        metrics::counter!(PEER_REFUSED_TOTAL, "reason" => reason).increment(0);
    }
}
