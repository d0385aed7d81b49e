//! The small key-value engine under log and state.
//!
//! **Invariant:** a batch is applied whole or not at all, in order; a batch written with `sync` survives a loss of
//! power together with every batch before it; of the unsynced ones after it a prefix survives.

mod batch;
pub mod mem;
#[cfg(feature = "rocksdb")]
pub mod rocks;

use std::{ops::ControlFlow, path::Path, sync::Arc};

pub use batch::{Op, WriteBatch};

use crate::Error;

/// A key above every key that may be stored (keys are at most eight bytes of `0xff` long, or begin lower).
pub const END: &[u8] = &[0xff; 9];

/// A separate range of keys; a column family in RocksDB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Space {
    /// Log records by index.
    Log,
    /// Vote, committed, last purged.
    LogMeta,
    /// Rows of the state, if this is the side in use.
    StateA,
    /// Rows of the state, if this is the side in use.
    StateB,
    /// What belongs to the state but is not a row.
    StateMeta,
    /// Event journal by sequence number.
    Journal,
}

impl Space {
    /// The spaces of the log's database.
    pub const LOG: &[Space] = &[Space::Log, Space::LogMeta];
    /// The spaces of the state's database.
    pub const STATE: &[Space] = &[Space::StateA, Space::StateB, Space::StateMeta, Space::Journal];

    /// The name on disk; never changes.
    pub fn name(self) -> &'static str {
        match self {
            Space::Log => "log",
            Space::LogMeta => "log_meta",
            Space::StateA => "state_a",
            Space::StateB => "state_b",
            Space::StateMeta => "state_meta",
            Space::Journal => "journal",
        }
    }
}

/// A key and its value.
pub type Pair = (Vec<u8>, Vec<u8>);

/// What an iteration calls for each key and value.
pub type Visit<'a> = dyn FnMut(&[u8], &[u8]) -> ControlFlow<()> + 'a;

/// What can be read.
pub trait View {
    /// The value of a key.
    fn read(&self, space: Space, key: &[u8]) -> Result<Option<Vec<u8>>, Error>;
    /// Visits the keys from `from` (included) to `to` (excluded; `None` is the end) in order, until told to break.
    fn iterate(&self, space: Space, from: &[u8], to: Option<&[u8]>, visit: &mut Visit<'_>) -> Result<(), Error>;
    /// The highest key and its value.
    fn last(&self, space: Space) -> Result<Option<Pair>, Error>;
}

/// A store of ordered keys in a few [`Space`]s.
pub trait Engine: View + Send + Sync + 'static {
    /// Applies a batch. **Durability:** with `sync`, this batch and all before it are durable when it returns.
    fn write(&self, batch: WriteBatch, sync: bool) -> Result<(), Error>;
    /// Makes durable all that was written.
    fn sync(&self) -> Result<(), Error>;
    /// Calls `with` once, with what stood at one moment; writes go on meanwhile.
    fn view(&self, with: &mut dyn FnMut(&dyn View) -> Result<(), Error>) -> Result<(), Error>;
    /// Makes a durable copy of all spaces in a directory that must not exist, sharing files where possible.
    fn checkpoint(&self, dir: &Path) -> Result<(), Error>;
    /// Opens a copy that [`Engine::checkpoint`] made; it cannot be written.
    fn open_checkpoint(&self, dir: &Path) -> Result<Arc<dyn Engine>, Error>;
    /// Removes such a copy once nothing reads it; one that is not there is no error.
    fn remove_checkpoint(&self, dir: &Path) -> Result<(), Error>;
}
