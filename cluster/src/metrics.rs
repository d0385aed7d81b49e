//! Names of this crate's metrics.

use metrics::{Unit, describe_counter, describe_gauge, describe_histogram};

/// Commands that this leader refused because their credential did not stand for their actor.
pub const CREDENTIALS_REFUSED_TOTAL: &str = "selvedge_cluster_credentials_refused_total";
/// Commands proposed on this broker, by `outcome` (`done`, `refused`, `unknown`, `busy`, `unavailable`).
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
/// Calls refused on the peer listener, by `reason` (`handshake`, `cluster`, `epoch`, `node`, `removed`).
pub const PEER_REFUSED_TOTAL: &str = "selvedge_cluster_peer_refused_total";
/// Snapshots, by `kind` (`built`, `sent`, `installed`).
pub const SNAPSHOTS_TOTAL: &str = "selvedge_cluster_snapshots_total";
/// How far this leader's wall clock is from the median of the voters', milliseconds.
pub const CLOCK_OFFSET_MS: &str = "selvedge_cluster_clock_offset_milliseconds";

/// Describes them to the recorder.
pub fn describe() {
    describe_counter!(CREDENTIALS_REFUSED_TOTAL, "commands refused by this leader for a credential that is not their actor's");
    describe_counter!(PROPOSALS_TOTAL, "commands proposed on this broker, by outcome");
    describe_histogram!(PROPOSAL_SECONDS, Unit::Seconds, "from proposal to answer");
    describe_histogram!(ENTRY_COMMANDS, Unit::Count, "commands in one entry");
    describe_gauge!(QUEUE_COMMANDS, Unit::Count, "commands that wait to be put into an entry");
    describe_histogram!(APPLY_SECONDS, Unit::Seconds, "applying and publishing one batch of entries");
    describe_gauge!(APPLIED_INDEX, "index of the last entry applied");
    describe_gauge!(ENFORCED_INDEX, "index of the last entry enforced");
    describe_histogram!(ENFORCE_SECONDS, Unit::Seconds, "from publishing a state to having enforced it");
    describe_gauge!(LEADER, "1 while this broker leads");
    describe_gauge!(TERM, "term of the last leader known");
    describe_gauge!(LEASE_LEFT_SECONDS, Unit::Seconds, "what is left of the freshness lease");
    describe_counter!(LEASE_RENEWALS_TOTAL, "renewals of the freshness lease, by outcome");
    describe_counter!(PEER_REFUSED_TOTAL, "calls refused on the peer listener, by reason");
    describe_counter!(SNAPSHOTS_TOTAL, "snapshots, by kind");
    describe_gauge!(CLOCK_OFFSET_MS, Unit::Milliseconds, "distance from the median of the voters' wall clocks");
}
