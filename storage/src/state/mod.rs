//! The replicated state on disk: rows, the event journal, and what belongs to both.
//!
//! Rows live on one of two sides. A snapshot is installed on the other side, and one synced batch then changes the
//! side, the meta and the journal together; so a crash leaves the old state or the new, whole.
//!
//! **Invariant:** rows, journal rows and meta of one [`StateStore::write`] survive together or not at all.
//!
//! This module does not know what is inside a row, an event or the meta.

mod block;
mod snapshot;
#[cfg(test)]
mod tests;

use std::{
    io::{Read, Write},
    ops::ControlFlow,
    path::Path,
    sync::Arc,
    time::Instant,
};

use parking_lot::Mutex;

pub use selvedge_domain::{JournalRow, RowChange};
pub(crate) use snapshot::export;
pub use snapshot::{Head, Snapshot, verify};

use crate::{
    Error,
    engine::{END, Engine, Space, View, WriteBatch},
    metrics::STATE_WRITE_SECONDS,
};

/// The table number that no row may have, so that a key above all rows exists.
pub const RESERVED_TABLE: u8 = 0xff;
/// Bytes of one write while a snapshot is installed.
const INSTALL_BATCH_BYTES: usize = 4 << 20;

const META: &[u8] = b"meta";
const SIDE: &[u8] = b"side";
const COMPACTED: &[u8] = b"compacted";
/// Before a sequence number: the journal's hash after that row.
const MARK: &[u8] = b"mark";

/// What the journal holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct JournalBounds {
    /// The last sequence number that is gone; 0 when nothing was compacted.
    pub compacted: u64,
    /// The last sequence number; equal to `compacted` when the journal is empty.
    pub last: u64,
}

/// The durable state.
pub struct StateStore {
    engine: Arc<dyn Engine>,
    /// The side in use; held while writing, so that an install is not overtaken.
    side: Mutex<Space>,
    writing: Writing,
}

/// The calls of the engine that have not come back.
#[derive(Default)]
struct Writing {
    begun: Mutex<Vec<Instant>>,
}

impl Writing {
    /// Counts a call as under way while it lasts.
    fn watch<T>(&self, call: impl FnOnce() -> T) -> T {
        let begun = Instant::now();
        self.begun.lock().push(begun);
        let done = call();
        let mut under_way = self.begun.lock();
        if let Some(at) = under_way.iter().position(|other| *other == begun) {
            under_way.swap_remove(at);
        }
        done
    }
}

impl StateStore {
    /// Opens the state, and clears what an interrupted install left behind.
    pub fn open(engine: Arc<dyn Engine>) -> Result<StateStore, Error> {
        let side = side_of(&*engine)?;
        let store = StateStore { engine, side: Mutex::new(side), writing: Writing::default() };
        store.clear(other(side))?;
        Ok(store)
    }

    /// Writes one apply batch. **Durability:** with `sync`, or after a later [`StateStore::sync`]; without, a loss of
    /// power may take it and all after it.
    pub fn write(&self, rows: &[RowChange], journal: &[JournalRow], meta: &[u8], sync: bool) -> Result<(), Error> {
        let begun = Instant::now();
        let side = self.side.lock();
        let mut batch = WriteBatch::new();
        for row in rows {
            if row.table == RESERVED_TABLE {
                return Err(Error::ReservedTable { table: row.table });
            }
            let key = row_key(row.table, &row.key);
            match &row.value {
                Some(value) => batch.put(*side, key, value),
                None => batch.delete(*side, key),
            }
        }
        for row in journal {
            batch.put(Space::Journal, row.seq.to_be_bytes(), &row.bytes);
        }
        batch.put(Space::StateMeta, META, meta);
        self.put(batch, sync)?;
        metrics::histogram!(STATE_WRITE_SECONDS).record(begun.elapsed());
        Ok(())
    }

    /// Makes durable all that was written.
    pub fn sync(&self) -> Result<(), Error> {
        self.writing.watch(|| self.engine.sync())
    }

    /// Visits all rows in order of table and key; returns the meta of the last write, `None` if there was none.
    pub fn load(&self, mut visit: impl FnMut(u8, &[u8], &[u8])) -> Result<Option<Vec<u8>>, Error> {
        let side = self.side.lock();
        self.engine.iterate(*side, &[], None, &mut |key, value| {
            if let Some((&table, key)) = key.split_first() {
                visit(table, key, value);
            }
            ControlFlow::Continue(())
        })?;
        self.engine.read(Space::StateMeta, META)
    }

    /// Journal rows from `from_seq` on, at least one if there is one, and no more than `max_bytes` beyond it.
    ///
    /// **Errors:** [`Error::Compacted`] when `from_seq` is gone.
    pub fn journal(&self, from_seq: u64, max_bytes: usize) -> Result<Vec<JournalRow>, Error> {
        let mut rows = Vec::new();
        let mut room = max_bytes;
        self.engine.iterate(Space::Journal, &from_seq.to_be_bytes(), None, &mut |key, value| {
            let Ok(seq) = key.try_into().map(u64::from_be_bytes) else { return ControlFlow::Break(()) };
            if !rows.is_empty() && value.len() > room {
                return ControlFlow::Break(());
            }
            room = room.saturating_sub(value.len());
            rows.push(JournalRow { seq, bytes: Arc::from(value) });
            ControlFlow::Continue(())
        })?;
        // Looked at after the reading, so that a compaction that overtook it is noticed.
        let upto = compacted(&*self.engine)?;
        if from_seq <= upto && upto > 0 {
            return Err(Error::Compacted { upto });
        }
        Ok(rows)
    }

    /// Where the journal begins and ends.
    pub fn journal_bounds(&self) -> Result<JournalBounds, Error> {
        bounds(&*self.engine)
    }

    /// Remembers the journal's hash after some rows.
    pub fn mark_journal(&self, marks: &[(u64, [u8; 32])]) -> Result<(), Error> {
        if marks.is_empty() {
            return Ok(());
        }
        let mut batch = WriteBatch::new();
        for (seq, hash) in marks {
            batch.put(Space::StateMeta, mark_key(*seq), hash);
        }
        self.put(batch, false)
    }

    /// The hash that was remembered for a row.
    pub fn journal_mark(&self, seq: u64) -> Result<Option<Vec<u8>>, Error> {
        self.engine.read(Space::StateMeta, &mark_key(seq))
    }

    /// Puts rows in front of the journal; nobody sees them before [`StateStore::lower_journal`].
    pub fn put_before_journal(&self, rows: &[JournalRow]) -> Result<(), Error> {
        let _side = self.side.lock();
        let begin = compacted(&*self.engine)?;
        let mut batch = WriteBatch::new();
        for row in rows.iter().filter(|row| row.seq <= begin) {
            batch.put(Space::Journal, row.seq.to_be_bytes(), &row.bytes);
        }
        self.put(batch, false)
    }

    /// Lets a journal that begins behind `from_seq` begin behind `to_seq`, with the hash there: the rows between were
    /// put there and are what they should be. False when it begins elsewhere by now.
    pub fn lower_journal(&self, from_seq: u64, to_seq: u64, hash: &[u8]) -> Result<bool, Error> {
        let _side = self.side.lock();
        if compacted(&*self.engine)? != from_seq || to_seq > from_seq {
            return Ok(false);
        }
        let mut batch = WriteBatch::new();
        batch.put(Space::StateMeta, COMPACTED, to_seq.to_be_bytes());
        batch.put(Space::StateMeta, mark_key(to_seq), hash);
        self.put(batch, false)?;
        Ok(true)
    }

    /// Removes journal rows up to `upto_seq`, included.
    pub fn compact_journal(&self, upto_seq: u64) -> Result<(), Error> {
        let _side = self.side.lock();
        if upto_seq <= compacted(&*self.engine)? {
            return Ok(());
        }
        let mut batch = WriteBatch::new();
        batch.put(Space::StateMeta, COMPACTED, upto_seq.to_be_bytes());
        batch.delete_range(Space::Journal, 0u64.to_be_bytes(), (upto_seq.saturating_add(1)).to_be_bytes());
        batch.delete_range(Space::StateMeta, mark_key(0), mark_key(upto_seq));
        self.put(batch, false)
    }

    /// Streams all rows as they stand at this moment; writes go on meanwhile. Returns the meta that belongs to them.
    pub fn export(&self, mut to: impl Write) -> Result<Vec<u8>, Error> {
        let mut meta = Vec::new();
        self.engine.view(&mut |view| {
            meta = snapshot::export(view, &mut to)?;
            Ok(())
        })?;
        Ok(meta)
    }

    /// How long the oldest write or sync that has not come back has been under way; 0 when there is none. For the
    /// watchdog.
    pub fn oldest_write_ms(&self) -> u64 {
        let oldest = self.writing.begun.lock().iter().min().copied();
        oldest.map_or(0, |begun| u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX))
    }

    /// Makes a durable copy of the state in a directory that must not exist.
    pub fn checkpoint(&self, dir: &Path) -> Result<(), Error> {
        self.engine.checkpoint(dir)
    }

    /// Removes a copy that nobody reads any more.
    pub fn remove_checkpoint(&self, dir: &Path) -> Result<(), Error> {
        self.engine.remove_checkpoint(dir)
    }

    /// Opens a copy that [`StateStore::checkpoint`] made, to be exported.
    pub fn open_checkpoint(&self, dir: &Path) -> Result<Snapshot, Error> {
        Ok(Snapshot::new(self.engine.open_checkpoint(dir)?))
    }

    /// Replaces the state by an exported one, and empties the journal. Returns the meta.
    ///
    /// All is read and verified before anything changes; a crash leaves the old state or the new.
    /// **Durability:** the new state is durable when this returns.
    pub fn install(&self, from: impl Read) -> Result<Vec<u8>, Error> {
        let mut side = self.side.lock();
        let spare = other(*side);
        self.clear(spare)?;
        let done = self.fill(spare, from).and_then(|head| {
            let mut batch = WriteBatch::new();
            batch.put(Space::StateMeta, SIDE, [side_byte(spare)]);
            batch.put(Space::StateMeta, META, head.meta.clone());
            batch.put(Space::StateMeta, COMPACTED, head.journal_last.to_be_bytes());
            batch.clear(Space::Journal);
            // Synced, and with it every batch of rows before it.
            self.put(batch, true)?;
            Ok(head)
        });
        match done {
            Ok(head) => {
                let old = std::mem::replace(&mut *side, spare);
                if let Err(error) = self.clear(old) {
                    tracing::warn!(%error, "the replaced state is cleared at the next start");
                }
                Ok(head.meta)
            }
            Err(error) => {
                if let Err(error) = self.clear(spare) {
                    tracing::warn!(%error, "what a failed install left is cleared at the next start");
                }
                Err(error)
            }
        }
    }

    fn fill(&self, spare: Space, from: impl Read) -> Result<Head, Error> {
        let mut batch = WriteBatch::new();
        let head = snapshot::read(from, &mut |key, value| {
            batch.put(spare, key, value);
            if batch.size_bytes() >= INSTALL_BATCH_BYTES {
                self.put(std::mem::take(&mut batch), false)?;
            }
            Ok(())
        })?;
        self.put(batch, false)?;
        Ok(head)
    }

    fn put(&self, batch: WriteBatch, sync: bool) -> Result<(), Error> {
        self.writing.watch(|| self.engine.write(batch, sync))
    }

    fn clear(&self, side: Space) -> Result<(), Error> {
        if self.engine.last(side)?.is_none() {
            return Ok(());
        }
        let mut batch = WriteBatch::new();
        batch.clear(side);
        self.put(batch, false)
    }
}

fn row_key(table: u8, key: &[u8]) -> Vec<u8> {
    let mut row_key = Vec::with_capacity(1 + key.len());
    row_key.push(table);
    row_key.extend_from_slice(key);
    debug_assert!(row_key.as_slice() < END, "tables are below the reserved one");
    row_key
}

fn mark_key(seq: u64) -> Vec<u8> {
    [MARK, &seq.to_be_bytes()].concat()
}

fn other(side: Space) -> Space {
    if side == Space::StateA { Space::StateB } else { Space::StateA }
}

fn side_byte(side: Space) -> u8 {
    if side == Space::StateA { b'a' } else { b'b' }
}

fn side_of(view: &dyn View) -> Result<Space, Error> {
    match view.read(Space::StateMeta, SIDE)?.as_deref() {
        None | Some(b"a") => Ok(Space::StateA),
        Some(b"b") => Ok(Space::StateB),
        Some(found) => Err(Error::MetaDamaged { what: "side", why: format!("it is `{}`", hex::encode(found)) }),
    }
}

/// The side in use, the meta, and the last sequence number of the journal.
pub(crate) fn head(view: &dyn View) -> Result<(Space, Option<Vec<u8>>, u64), Error> {
    Ok((side_of(view)?, view.read(Space::StateMeta, META)?, bounds(view)?.last))
}

fn compacted(view: &dyn View) -> Result<u64, Error> {
    let Some(bytes) = view.read(Space::StateMeta, COMPACTED)? else { return Ok(0) };
    let bytes = bytes.as_slice().try_into();
    bytes
        .map(u64::from_be_bytes)
        .map_err(|_| Error::MetaDamaged { what: "compacted", why: "it is not eight bytes".to_owned() })
}

fn bounds(view: &dyn View) -> Result<JournalBounds, Error> {
    let compacted = compacted(view)?;
    let last = view.last(Space::Journal)?.and_then(|(key, _)| key.as_slice().try_into().ok().map(u64::from_be_bytes));
    // Rows that were put before the journal do not count yet.
    Ok(JournalBounds { compacted, last: last.unwrap_or(compacted).max(compacted) })
}
