//! Limits that `decide` enforces. A change of any of them travels behind `RaiseMinVersion`.

/// Characters in the name of an object.
pub const NAME_CHARS_MAX: usize = 128;
/// Bytes of one Cedar policy.
pub const POLICY_BYTES_MAX: usize = 32 * 1024;
/// Policies in a cluster.
pub const POLICIES_MAX: usize = 100_000;
/// Host patterns and networks in one segment.
pub const SEGMENT_TARGETS_MAX: usize = 1_000;
/// Port ranges in one segment.
pub const SEGMENT_PORTS_MAX: usize = 100;
/// Objects in one `Apply`.
pub const APPLY_OBJECTS_MAX: usize = 10_000;
/// Bytes of the SCIM attributes kept of one user or group.
pub const SCIM_BYTES_MAX: usize = 64 * 1024;
/// Members added or removed by one command.
pub const MEMBERS_CHANGE_MAX: usize = 100_000;
/// Users in one row of a group's members.
pub const MEMBERS_ROW_MAX: usize = 1_024;
/// Uses of one provisioning key.
pub const KEY_USES_MAX: u32 = 100_000;
/// Longest life of a provisioning key or code, in milliseconds (400 days).
pub const KEY_LIFE_MS_MAX: u64 = 400 * 24 * 3_600_000;
/// Outcomes kept per proposing client for retries.
pub const DEDUPE_WINDOW: u64 = 1_024;
/// A proposing client that was idle for so long is forgotten, in milliseconds.
pub const CLIENT_IDLE_MS_MAX: u64 = 24 * 3_600_000;
/// Proposing clients remembered.
pub const CLIENTS_MAX: usize = 10_000;
/// Availability transitions in one command.
pub const AVAILABILITY_CHANGES_MAX: usize = 1_000;
/// Cursors in one command.
pub const CURSORS_MAX: usize = 256;
/// Log receivers in a cluster.
pub const RECEIVERS_MAX: usize = 32;
/// Shortest freshness lease that may be set, in milliseconds: `4 x election_timeout_max + 1.5 s` of the `lan` preset.
pub const LEASE_MS_MIN: u64 = 2_700;
/// Longest freshness lease, in milliseconds.
pub const LEASE_MS_MAX: u64 = 120_000;
/// The freshness lease of a new cluster, in milliseconds.
pub const LEASE_MS_DEFAULT: u64 = 10_000;
/// How long flows are held after the lease ended, in milliseconds.
pub const HOLD_MS_DEFAULT: u64 = 30_000;
/// How long a broker drains when nobody says, in milliseconds: 8 hours.
pub const DRAIN_MS_DEFAULT: u64 = 8 * 3_600_000;
/// Longest time that a broker may be given to drain, in milliseconds: 30 days.
pub const DRAIN_MS_MAX: u64 = 30 * 24 * 3_600_000;
/// How long the event journal is kept, in milliseconds: 30 days.
pub const JOURNAL_KEEP_MS_DEFAULT: u64 = 30 * 24 * 3_600_000;
/// Shortest time that the event journal may be kept, in milliseconds.
pub const JOURNAL_KEEP_MS_MIN: u64 = 60_000;
/// The chained hash of the journal is remembered at each event whose number this divides.
pub const JOURNAL_MARK_EVERY: u64 = 256;
