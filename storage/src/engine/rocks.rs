//! RocksDB as an engine.
//!
//! Two databases with their own rules: the log, whose every write is synced and where a write cut by a crash is
//! dropped; and the state, whose writes are not synced and which recovers to one consistent point.

use std::{
    ops::ControlFlow,
    path::{Path, PathBuf},
    sync::Arc,
};

use rocksdb::{
    ColumnFamily, DB, DBCompressionType, DBRawIterator, DBRecoveryMode, InfoLogger, LogLevel, MemtableFactory, Options,
    ReadOptions, Snapshot, WriteOptions, checkpoint::Checkpoint,
};

use super::{Engine, Op, Pair, Space, View, Visit, WriteBatch};
use crate::Error;

/// Size of one memory table.
const WRITE_BUFFER_BYTES: usize = 32 << 20;
/// Size of the write-ahead logs together, from which on memory tables are flushed.
const WAL_BYTES_MAX: u64 = 256 << 20;
/// RocksDB's own log files that are kept.
const INFO_LOG_FILES: usize = 4;
/// Threads for flushes and compactions.
const BACKGROUND_JOBS: i32 = 2;
/// Files that RocksDB keeps open.
const OPEN_FILES_MAX: i32 = 512;

/// A RocksDB database.
pub struct Rocks {
    db: DB,
    path: PathBuf,
}

impl Rocks {
    /// Opens or creates the log's database.
    pub fn open_log(path: &Path) -> Result<Rocks, Error> {
        let mut options = options();
        options.set_wal_recovery_mode(DBRecoveryMode::TolerateCorruptedTailRecords);
        Rocks::open(path, &options, Space::LOG)
    }

    /// Opens or creates the state's database.
    pub fn open_state(path: &Path) -> Result<Rocks, Error> {
        let mut options = options();
        options.set_wal_recovery_mode(DBRecoveryMode::PointInTime);
        Rocks::open(path, &options, Space::STATE)
    }

    /// Opens a database to read what stands in it now: takes no lock and writes no file, its own log neither.
    pub fn look_at(path: &Path) -> Result<Rocks, Error> {
        let mut options = Options::default();
        options.set_info_logger(InfoLogger::new_callback_logger(LogLevel::Fatal, |_, _| ()));
        let opened = DB::list_cf(&options, path)
            .and_then(|names| DB::open_cf_for_read_only(&options, path, names, false))
            .map_err(|error| failed("read the database", path, error))?;
        Ok(Rocks { db: opened, path: path.to_owned() })
    }

    fn open(path: &Path, options: &Options, spaces: &[Space]) -> Result<Rocks, Error> {
        std::fs::create_dir_all(path).map_err(Error::io("create", path))?;
        let families = spaces.iter().map(|space| {
            let mut options = options.clone();
            if matches!(space, Space::StateA | Space::StateB) {
                // Rows are written all the time and read at a start: they are sorted when they are flushed.
                options.set_memtable_factory(MemtableFactory::Vector);
            }
            (space.name(), options)
        });
        let db =
            DB::open_cf_with_opts(options, path, families).map_err(|error| failed("open the database", path, error))?;
        Ok(Rocks { db, path: path.to_owned() })
    }

    fn family(&self, space: Space) -> Result<&ColumnFamily, Error> {
        self.db.cf_handle(space.name()).ok_or_else(|| Error::Engine {
            what: "find a column family",
            source: Arc::from(Box::from(format!("`{}` is not in `{}`", space.name(), self.path.display()))),
        })
    }

    fn failed(&self, what: &'static str) -> impl FnOnce(rocksdb::Error) -> Error + '_ {
        move |error| failed(what, &self.path, error)
    }
}

impl View for Rocks {
    fn read(&self, space: Space, key: &[u8]) -> Result<Option<Vec<u8>>, Error> {
        self.db.get_cf(self.family(space)?, key).map_err(self.failed("read"))
    }

    fn iterate(&self, space: Space, from: &[u8], to: Option<&[u8]>, visit: &mut Visit<'_>) -> Result<(), Error> {
        let rows = self.db.raw_iterator_cf_opt(self.family(space)?, bounded(to));
        walk(rows, from, visit).map_err(self.failed("iterate"))
    }

    fn last(&self, space: Space) -> Result<Option<Pair>, Error> {
        last_of(self.db.raw_iterator_cf(self.family(space)?)).map_err(self.failed("find the last key"))
    }
}

impl Engine for Rocks {
    fn write(&self, batch: WriteBatch, sync: bool) -> Result<(), Error> {
        let mut native = rocksdb::WriteBatch::default();
        for op in batch.ops() {
            match op {
                Op::Put { space, key, value } => native.put_cf(self.family(space)?, key, value),
                Op::Delete { space, key } => native.delete_cf(self.family(space)?, key),
                Op::DeleteRange { space, from, to } => native.delete_range_cf(self.family(space)?, from, to),
            }
        }
        let mut options = WriteOptions::default();
        options.set_sync(sync);
        self.db.write_opt(native, &options).map_err(self.failed("write"))
    }

    fn sync(&self) -> Result<(), Error> {
        self.db.flush_wal(true).map_err(self.failed("sync"))
    }

    fn view(&self, with: &mut dyn FnMut(&dyn View) -> Result<(), Error>) -> Result<(), Error> {
        with(&Moment { rocks: self, at: self.db.snapshot() })
    }

    fn checkpoint(&self, dir: &Path) -> Result<(), Error> {
        Checkpoint::new(&self.db)
            .and_then(|checkpoint| checkpoint.create_checkpoint(dir))
            .map_err(|error| failed("make a checkpoint", dir, error))
    }

    fn open_checkpoint(&self, dir: &Path) -> Result<Arc<dyn Engine>, Error> {
        Ok(Arc::new(Rocks::look_at(dir)?))
    }

    fn remove_checkpoint(&self, dir: &Path) -> Result<(), Error> {
        match std::fs::remove_dir_all(dir) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::io("remove", dir)(error)),
            _ => Ok(()),
        }
    }
}

/// The database as it stood at one moment.
struct Moment<'a> {
    rocks: &'a Rocks,
    at: Snapshot<'a>,
}

impl View for Moment<'_> {
    fn read(&self, space: Space, key: &[u8]) -> Result<Option<Vec<u8>>, Error> {
        self.at.get_cf(self.rocks.family(space)?, key).map_err(self.rocks.failed("read"))
    }

    fn iterate(&self, space: Space, from: &[u8], to: Option<&[u8]>, visit: &mut Visit<'_>) -> Result<(), Error> {
        let rows = self.at.raw_iterator_cf_opt(self.rocks.family(space)?, bounded(to));
        walk(rows, from, visit).map_err(self.rocks.failed("iterate"))
    }

    fn last(&self, space: Space) -> Result<Option<Pair>, Error> {
        last_of(self.at.raw_iterator_cf(self.rocks.family(space)?)).map_err(self.rocks.failed("find the last key"))
    }
}

fn options() -> Options {
    let mut options = Options::default();
    options.create_if_missing(true);
    options.create_missing_column_families(true);
    options.set_recycle_log_file_num(0);
    options.set_paranoid_checks(true);
    options.set_write_buffer_size(WRITE_BUFFER_BYTES);
    options.set_max_total_wal_size(WAL_BYTES_MAX);
    options.set_max_background_jobs(BACKGROUND_JOBS);
    // There is one writer at a time.
    options.set_allow_concurrent_memtable_write(false);
    options.set_max_open_files(OPEN_FILES_MAX);
    options.set_keep_log_file_num(INFO_LOG_FILES);
    options.set_log_level(LogLevel::Warn);
    options.set_compression_type(DBCompressionType::Lz4);
    options
}

fn bounded(to: Option<&[u8]>) -> ReadOptions {
    let mut options = ReadOptions::default();
    if let Some(to) = to {
        options.set_iterate_upper_bound(to);
    }
    options
}

fn walk(mut rows: DBRawIterator<'_>, from: &[u8], visit: &mut Visit<'_>) -> Result<(), rocksdb::Error> {
    rows.seek(from);
    while let Some((key, value)) = rows.item() {
        if let ControlFlow::Break(()) = visit(key, value) {
            return Ok(());
        }
        rows.next();
    }
    rows.status()
}

fn last_of(mut rows: DBRawIterator<'_>) -> Result<Option<Pair>, rocksdb::Error> {
    rows.seek_to_last();
    if let Some((key, value)) = rows.item() {
        return Ok(Some((key.to_vec(), value.to_vec())));
    }
    rows.status().map(|()| None)
}

/// RocksDB tells a full disk, a read-only one and a held lock only in its text.
fn failed(what: &'static str, path: &Path, error: rocksdb::Error) -> Error {
    let text = error.as_ref();
    if text.contains("No space left") {
        return Error::NoSpace { path: path.to_owned() };
    }
    if text.contains("Read-only file system") {
        return Error::ReadOnly { path: path.to_owned() };
    }
    if text.contains("lock hold by current process") || (text.contains("/LOCK") && text.contains("unavailable")) {
        return Error::Locked { path: path.to_owned(), holder: String::new() };
    }
    Error::Engine { what, source: Arc::new(error) }
}
