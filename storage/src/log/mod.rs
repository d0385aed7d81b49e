//! The Raft log: records by index, the vote, and what is committed and purged.
//!
//! One OS thread (or a [`Driver`]) owns the engine's writes: it takes all that waits, in order, writes it as one synced
//! batch, and then calls back. A vote is therefore durable before the records of its term.
//!
//! **Invariant:** a record is readable before [`Log::append`] returns, and reported durable only after the sync.
//! **Invariant:** after a failed write nothing is reported durable any more; the process must be restarted.
//!
//! This module does not know the consensus library; payloads are bytes to it.

mod codec;
mod io;
mod open;
mod sizes;
mod tail;
#[cfg(test)]
mod tests;

use std::{ops::Range, sync::Arc, thread::JoinHandle};

use bytes::Bytes;
use parking_lot::Mutex;

use crate::{Error, engine::Engine};
use io::{Op, Shared};
pub use open::{Inspection, inspect, walk};

/// Requests that may wait for the log's thread; a further one waits for room.
pub const QUEUE_REQUESTS_MAX: usize = 1_024;
/// Bytes that may wait for the log's thread; a further request waits for room.
pub const QUEUE_BYTES_MAX: usize = 64 << 20;
/// Bytes of records that share one write; a larger single request is written alone.
pub const BATCH_BYTES_MAX: usize = 8 << 20;
/// Bytes of recent, durable records that are kept in memory.
pub const CACHE_BYTES_MAX: usize = 32 << 20;

/// Names a log record. **Shape:** ordered by term, node, index.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, bincode::Encode, bincode::Decode)]
pub struct LogId {
    /// Term of the leader that made it.
    pub term: u64,
    /// The leader that made it.
    pub node: u64,
    /// Its place in the log.
    pub index: u64,
}

/// Whom this node voted for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, bincode::Encode, bincode::Decode)]
pub struct Vote {
    /// The term.
    pub term: u64,
    /// The candidate.
    pub node: u64,
    /// Whether a quorum has granted it.
    pub committed: bool,
}

/// What a record carries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Payload {
    /// Nothing; a new leader's first record.
    Blank,
    /// A command or several.
    Normal(Bytes),
    /// A membership.
    Membership(Bytes),
}

impl Payload {
    fn bytes(&self) -> &[u8] {
        match self {
            Payload::Blank => &[],
            Payload::Normal(bytes) | Payload::Membership(bytes) => bytes,
        }
    }
}

/// One entry of the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Its name.
    pub id: LogId,
    /// Its content.
    pub payload: Payload,
}

impl Record {
    /// Bytes that it takes on disk, key included.
    pub fn size_bytes(&self) -> usize {
        codec::HEADER_BYTES + codec::KEY_BYTES + self.payload.bytes().len()
    }
}

/// Where the log begins and ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Bounds {
    /// The last record that was purged.
    pub last_purged: Option<LogId>,
    /// The last record; the last purged one if there is none after it.
    pub last: Option<LogId>,
}

/// Called on the log's thread once a request is durable or has failed. It must not block and not call the log.
pub type Done = Box<dyn FnOnce(Result<(), Error>) + Send>;

/// The log. Clones share it; the last one to go waits until all requests are written, unless a [`Driver`] writes them.
#[derive(Clone)]
pub struct Log {
    owner: Arc<Owner>,
}

struct Owner {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Log {
    /// Opens the log and checks every record.
    ///
    /// **Errors:** [`Error::LogDamaged`] names a record that cannot be trusted and has readable ones behind it.
    pub fn open(engine: Arc<dyn Engine>) -> Result<Log, Error> {
        let shared = Arc::new(Shared::new(engine.clone(), open::recover(&*engine)?, false));
        let theirs = shared.clone();
        let thread = std::thread::Builder::new()
            .name("selvedge-log".to_owned())
            .spawn(move || theirs.run())
            .map_err(Error::io("start the thread of", "log"))?;
        Ok(Log { owner: Arc::new(Owner { shared, thread: Mutex::new(Some(thread)) }) })
    }

    /// Opens the log without a thread: its writes are made by whoever holds the [`Driver`]. For simulations, in which
    /// nothing may happen beside their one thread and their time.
    pub fn open_driven(engine: Arc<dyn Engine>) -> Result<(Log, Driver), Error> {
        let shared = Arc::new(Shared::new(engine.clone(), open::recover(&*engine)?, true));
        let driver = Driver { shared: shared.clone() };
        Ok((Log { owner: Arc::new(Owner { shared, thread: Mutex::new(None) }) }, driver))
    }

    /// Adds records, which must continue the log. They can be read when this returns and are durable at `done`.
    ///
    /// Waits for room while the queue is full.
    pub fn append(&self, records: Vec<Record>, done: Done) {
        self.owner.shared.submit(Op::Append(records), Some(done));
    }

    /// Stores the vote.
    pub fn save_vote(&self, vote: Vote, done: Done) {
        self.owner.shared.submit(Op::Vote(vote), Some(done));
    }

    /// Notes what is known to be committed. **Durability:** none; a crash may bring an older one back.
    pub fn save_committed(&self, id: Option<LogId>) {
        self.owner.shared.submit(Op::Committed(id), None);
    }

    /// Keeps a few bytes of the caller's beside the records, in place of those before. **Durability:** with whatever is
    /// synced next; a crash may bring older ones back.
    pub fn save_note(&self, note: Vec<u8>) {
        self.owner.shared.submit(Op::Note(note), None);
    }

    /// Removes the records from `index` on.
    pub fn truncate_from(&self, index: u64, done: Done) {
        self.owner.shared.submit(Op::Truncate(index), Some(done));
    }

    /// Removes the records up to `id`, included, and remembers it; it may lie beyond the last record.
    pub fn purge_upto(&self, id: LogId, done: Done) {
        self.owner.shared.submit(Op::Purge(id), Some(done));
    }

    /// Ends the suspicion that [`Log::suspect`] tells of.
    pub fn clear_suspect(&self, done: Done) {
        self.owner.shared.submit(Op::ClearSuspect, Some(done));
    }

    /// The records of a range of indices that the log holds, in order and without a hole.
    pub fn read(&self, range: Range<u64>) -> Result<Vec<Record>, Error> {
        self.owner.shared.read(range, usize::MAX)
    }

    /// Like [`Log::read`], but ends before `limit_bytes` are exceeded; the first record is always returned.
    pub fn read_limited(&self, range: Range<u64>, limit_bytes: usize) -> Result<Vec<Record>, Error> {
        self.owner.shared.read(range, limit_bytes)
    }

    /// Where the log begins and ends, requests under way included.
    pub fn bounds(&self) -> Bounds {
        self.owner.shared.inner.lock().bounds
    }

    /// The vote, requests under way included.
    pub fn vote(&self) -> Option<Vote> {
        self.owner.shared.inner.lock().vote
    }

    /// What is known to be committed; never beyond the last record.
    pub fn committed(&self) -> Option<LogId> {
        let inner = self.owner.shared.inner.lock();
        inner.committed.filter(|id| inner.bounds.last.is_some_and(|last| id.index <= last.index))
    }

    /// What [`Log::save_note`] kept.
    pub fn note(&self) -> Option<Vec<u8>> {
        self.owner.shared.inner.lock().note.clone()
    }

    /// Bytes of records that were found at the start or appended since.
    pub fn written_bytes(&self) -> u64 {
        self.owner.shared.inner.lock().sizes.written_bytes()
    }

    /// The highest index that has at least so many bytes of records behind it, to the mebibyte; none when the log is
    /// shorter.
    pub fn index_behind(&self, bytes: u64) -> Option<u64> {
        self.owner.shared.inner.lock().sizes.index_behind(bytes)
    }

    /// The last index of a damaged end that was dropped at this or an earlier start.
    ///
    /// This node may have acknowledged what it no longer has: it must neither vote nor stand until a leader has
    /// brought it past this index or all voters are present; then call [`Log::clear_suspect`].
    pub fn suspect(&self) -> Option<u64> {
        self.owner.shared.inner.lock().suspect
    }

    /// Why the log accepts nothing more, if a write has failed.
    pub fn failure(&self) -> Option<Error> {
        self.owner.shared.inner.lock().failed.clone()
    }

    /// How long the oldest request has been waiting to be durable; 0 when none waits. For the watchdog.
    pub fn oldest_unsynced_ms(&self) -> u64 {
        self.owner.shared.oldest_unsynced_ms()
    }
}

/// Makes the writes of a log that was opened without a thread.
pub struct Driver {
    shared: Arc<Shared>,
}

impl Driver {
    /// Waits until something is to be written. Answers whether the log is still in use; what was queued before it went
    /// out of use may still wait.
    pub async fn wanted(&self) -> bool {
        self.shared.wanted().await
    }

    /// Writes and syncs all that waits, and calls back.
    pub fn write_waiting(&self) {
        self.shared.write_waiting();
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.shared.close();
        if let Some(thread) = self.thread.lock().take()
            && thread.thread().id() != std::thread::current().id()
        {
            // A panic of that thread has been reported by the panic hook; there is nobody left to tell.
            let _ = thread.join();
        }
    }
}
