//! The audit journal: append-only segment files, in which every record names the one before it by its hash.
//!
//! **Shape:** `<root>/<stream>/<first seq>.seg`; a stream is one boot of one broker; sequence numbers begin at 1 and
//! have no hole. A frame is length u32, crc32c u32 (over length and record), record; all integers are big-endian.
//!
//! **Invariant:** a record is reported durable only after its bytes and all before it were synced.
//! **Invariant:** what is on disk is changed in two ways only: whole sealed segments go, and an end that a crash cut
//! is removed when nothing readable stands behind it.
//!
//! This module does not know what a body means, nor who receives it.

mod journal;
mod reader;
mod record;
mod recover;
mod segment;
#[cfg(test)]
mod tests;
mod verify;

pub use journal::{Journal, Options, Ticket};
pub use reader::Reader;
pub use record::{Record, StreamId};
pub use segment::streams;
pub use verify::{Broken, Report, StreamReport, verify, verify_stream};

/// Size of a record's body at most.
pub const BODY_BYTES_MAX: usize = 1 << 20;
/// Bytes that may wait for the disk; beyond it the journal refuses.
pub const PENDING_BYTES_MAX: usize = 16 << 20;
/// Size from which on a segment is sealed.
pub const SEGMENT_BYTES: u64 = 64 << 20;
/// Age at which a segment is sealed.
pub const SEGMENT_AGE_MS: u64 = 3_600_000;
/// Bytes of all segments on this disk; beyond it the journal refuses.
pub const QUOTA_BYTES: u64 = 10 << 30;
