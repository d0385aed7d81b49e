//! A data directory as it lies there, for whoever looks at it without being its broker.
//!
//! **Invariant:** nothing is written, locked or mended; a broker that uses the directory does not notice.

use std::{
    fs,
    io::Write,
    ops::ControlFlow,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::Duration,
};

use crate::{
    Error, dir,
    engine::{Engine, View, rocks::Rocks},
    log::{self, Inspection},
    state::{self, RowChange},
};

/// How often a database that is being written is opened anew when a file went away meanwhile.
const ATTEMPTS: u32 = 5;
/// Between two attempts.
const PAUSE: Duration = Duration::from_millis(100);

/// Who a data directory says its node is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Node id.
    pub node_id: u64,
    /// The cluster that it is a member of.
    pub cluster_id: Option<u128>,
    /// How often it was opened.
    pub boot: u64,
}

/// Who a data directory says its node is.
///
/// **Errors:** [`Error::IdentityMissing`] when it says nothing; [`Error::MetaDamaged`].
pub fn identity(path: &Path) -> Result<Identity, Error> {
    let text = dir::read_small(&path.join(dir::NODE_FILE))?;
    let text = text.ok_or_else(|| Error::IdentityMissing { path: path.to_owned(), file: dir::NODE_FILE })?;
    let (node_id, cluster_id) = dir::parse_identity(&text)?;
    let boot = dir::read_small(&path.join(dir::BOOT_FILE))?.and_then(|text| text.trim().parse().ok()).unwrap_or(0);
    Ok(Identity { node_id, cluster_id, boot })
}

/// The process that uses a data directory.
///
/// **Source** proc_locks(5).
pub fn holder(path: &Path) -> Option<u32> {
    let lock = path.join(dir::LOCK_FILE);
    let found = fs::metadata(&lock).ok()?;
    let device = format!("{:02x}:{:02x}", rustix::fs::major(found.dev()), rustix::fs::minor(found.dev()));
    let inode = found.ino().to_string();
    let written: Option<u32> = fs::read_to_string(&lock).ok()?.trim().parse().ok();
    let locks = fs::read_to_string("/proc/locks").ok()?;
    locks.lines().find_map(|line| {
        let mut words = line.split_whitespace().skip(1);
        let (kind, pid, place) = (words.next()?, words.nth(2)?, words.next()?);
        let (on, of) = place.rsplit_once(':')?;
        // Some file systems say another device here; who holds the lock wrote its number into the file.
        let pid = pid.parse::<u32>().ok().filter(|pid| *pid > 0);
        let is_it = kind == "FLOCK" && of == inode && (on == device || (pid.is_some() && pid == written));
        // A process in another namespace has no number here.
        is_it.then(|| pid.or(written)).flatten()
    })
}

/// The Raft log, every record checked.
pub fn log(path: &Path) -> Result<Inspection, Error> {
    again(|| log::inspect(&Rocks::look_at(&path.join(dir::LOG_DIR))?))
}

/// The records of the Raft log from an index on, in order, up to the end or a damaged end.
pub fn records(path: &Path, from: u64, visit: impl FnMut(log::Record) -> ControlFlow<()>) -> Result<(), Error> {
    let engine = again(|| Rocks::look_at(&path.join(dir::LOG_DIR)))?;
    log::walk(&engine, from, visit)
}

/// Streams the state as it stands; returns its meta.
pub fn export(path: &Path, mut to: impl Write) -> Result<Vec<u8>, Error> {
    let engine = again(|| Rocks::look_at(&path.join(dir::STATE_DIR)))?;
    let mut meta = Vec::new();
    engine.view(&mut |view: &dyn View| {
        meta = state::export(view, &mut to)?;
        Ok(())
    })?;
    Ok(meta)
}

/// The state: its meta, its rows of some tables, and how far its journal goes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StateAtRest {
    /// The meta of the last write; none when there was none.
    pub meta: Option<Vec<u8>>,
    /// Rows of the tables that were asked for.
    pub rows: Vec<RowChange>,
    /// Last sequence number of the journal.
    pub journal_last: u64,
}

/// Reads the state; of rows those of `tables`.
pub fn state(path: &Path, tables: &[u8]) -> Result<StateAtRest, Error> {
    again(|| {
        let engine = Rocks::look_at(&path.join(dir::STATE_DIR))?;
        let mut found = StateAtRest::default();
        engine.view(&mut |view: &dyn View| {
            let (side, meta, journal_last) = state::head(view)?;
            found = StateAtRest { meta, rows: Vec::new(), journal_last };
            for &table in tables {
                view.iterate(side, &[table], Some(&[table.saturating_add(1)]), &mut |key, value| {
                    let key = key.get(1..).unwrap_or_default().to_vec();
                    found.rows.push(RowChange { table, key, value: Some(value.into()) });
                    ControlFlow::Continue(())
                })?;
            }
            Ok(())
        })?;
        Ok(found)
    })
}

/// Where the log's and the state's databases lie.
pub fn databases(path: &Path) -> [PathBuf; 2] {
    [path.join(dir::LOG_DIR), path.join(dir::STATE_DIR)]
}

/// Where the audit journal lies.
pub fn audit(path: &Path) -> PathBuf {
    path.join(dir::AUDIT_DIR)
}

/// A broker that writes may take away a file between two steps of opening.
fn again<T>(look: impl Fn() -> Result<T, Error>) -> Result<T, Error> {
    let mut attempts = 1;
    loop {
        match look() {
            Err(Error::Engine { .. }) if attempts < ATTEMPTS => std::thread::sleep(PAUSE),
            done => return done,
        }
        attempts += 1;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{DataDir, log::Log, state::StateStore};

    fn record(index: u64) -> log::Record {
        log::Record { id: log::LogId { term: 1, node: 1, index }, payload: log::Payload::Normal(vec![7; 9].into()) }
    }

    #[test]
    fn a_directory_in_use_is_read_and_left_as_it_is() {
        let holder = tempfile::tempdir().expect("a directory");
        let path = holder.path().join("data");
        let dir = DataDir::open(&path).expect("opens");
        dir.join_cluster(7).expect("joins");
        let log = Log::open(Arc::new(Rocks::open_log(&dir.log_path()).expect("opens"))).expect("opens");
        let (done, was_done) = std::sync::mpsc::sync_channel(1);
        log.append((1..=3).map(record).collect(), Box::new(move |result| drop(done.send(result))));
        was_done.recv().expect("called").expect("written");
        let store = StateStore::open(Arc::new(Rocks::open_state(&dir.state_path()).expect("opens"))).expect("opens");
        let row = |table, key: u8| RowChange { table, key: vec![key], value: Some([key; 4].as_slice().into()) };
        store.write(&[row(3, 1), row(4, 2), row(4, 3)], &[], b"meta", true).expect("writes");

        let files = |path: &Path| {
            let names = fs::read_dir(path).expect("reads").map(|entry| entry.expect("reads").file_name());
            let mut names: Vec<_> = names.collect();
            names.sort();
            names
        };
        let before = [files(&path), files(&dir.log_path()), files(&dir.state_path())];
        let found = identity(&path).expect("reads");
        assert_eq!(found, Identity { node_id: dir.node_id(), cluster_id: Some(7), boot: 1 });
        assert_eq!(super::holder(&path), Some(std::process::id()));
        let inspection = super::log(&path).expect("reads");
        assert_eq!(inspection.bounds.last.map(|id| id.index), Some(3));
        assert_eq!(inspection.damaged_end, None);
        let state = state(&path, &[4]).expect("reads");
        assert_eq!((state.meta.as_deref(), state.rows.len()), (Some(b"meta".as_slice()), 2));
        assert_eq!(before, [files(&path), files(&dir.log_path()), files(&dir.state_path())], "no file came or went");
        store.write(&[row(3, 9)], &[], b"meta", true).expect("still writes");
        drop(dir);
        assert_eq!(super::holder(&path), None);
    }

    #[test]
    fn what_is_not_there_is_not_made() {
        let holder = tempfile::tempdir().expect("a directory");
        let path = holder.path().join("data");
        assert!(matches!(identity(&path), Err(Error::IdentityMissing { .. })));
        assert_eq!(super::holder(&path), None);
        assert!(super::log(&path).is_err() && state(&path, &[]).is_err());
        assert!(!path.exists());
    }
}
