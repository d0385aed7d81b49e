//! A state becomes the next epoch: a snapshot that was saved, or what is left of a cluster that lost its majority.
//!
//! **Invariant:** sources are only read. The new data directory is one that nobody opens before it is whole.
//! **Invariant:** a survivor's whole log is applied, committed or not: what was acknowledged is in it.
//!
//! It does not know who signs the new broker's certificate; the caller puts that beside.

mod beyond;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};

use prost::Message as _;
use selvedge_domain::decide::BeginEpoch;
use selvedge_domain::state::{Meta, Table};
use selvedge_domain::{Changes, Id, Rejected, RowChange, State};
use selvedge_proto::peer as wire;
use selvedge_storage::engine::rocks::Rocks;
use selvedge_storage::log::{self, Log, Record};
use selvedge_storage::state::StateStore;
use selvedge_storage::{DataDir, inspect};
use serde::Serialize;

pub use beyond::in_directory;

use crate::convert;
use crate::raft_types::{LeaderId, LogId, Membership, StoredMembership};
use crate::{machine, snapshot, version};

/// Stands in a data directory that has begun an epoch and has not served yet.
const WAITS_FILE: &str = "waits";
/// Bytes of rows in one write.
const WRITE_BYTES: usize = 4 << 20;

/// Why nothing is restored.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read, is no whole snapshot, or its rows do not add up.
    #[error("`{path}` is no snapshot that can be used (SE0120)")]
    Snapshot {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: io::Error,
    },
    /// The broker of a directory runs.
    #[error("`{path}` is in use by process {pid}; stop that broker first (SE0116)")]
    InUse {
        /// The directory.
        path: PathBuf,
        /// The process.
        pid: u32,
    },
    /// None of the directories can be used.
    #[error("no data directory that was given can be used (SE0120): {0}")]
    NoSurvivor(String),
    /// What stands in a directory cannot be used.
    #[error("`{path}` cannot be used (SE0120)")]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: io::Error,
    },
    /// The directories are of two clusters.
    #[error("`{path}` is of cluster `{found}`, the others are of `{expected}` (SE0120)")]
    OtherCluster {
        /// The directory.
        path: PathBuf,
        /// Its cluster.
        found: String,
        /// That of the others.
        expected: String,
    },
    /// There is no cluster in it.
    #[error("it is the state of no cluster (SE0120)")]
    NoCluster,
    /// The state cannot go on so.
    #[error("{0} (SE0120)")]
    Refused(#[from] Rejected),
    /// The new directory.
    #[error(transparent)]
    Storage(#[from] selvedge_storage::Error),
    /// The new directory could not be written.
    #[error("the new data directory cannot be written")]
    Write(#[source] io::Error),
}

/// A state that an epoch may begin from, all of it read and checked.
pub struct Source {
    state: State,
    last: LogId,
    whole: bool,
}

/// A data directory that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Survivor {
    /// Where it is.
    pub path: PathBuf,
    /// Node id.
    pub node: u64,
    /// Term of the last entry of its log.
    pub term: u64,
    /// Index of the last entry of its log.
    pub index: u64,
    /// The end of its log was lost: it may have acknowledged what it no longer has.
    pub lost_end: bool,
    /// Its state is the one that goes on.
    pub chosen: bool,
    /// Why it does not count.
    pub unusable: Option<String>,
}

impl Source {
    /// A snapshot that was saved. Blocks.
    ///
    /// **Errors**: [`Error::Snapshot`], [`Error::NoCluster`].
    pub fn snapshot(path: &Path) -> Result<Self, Error> {
        let failed = |source| Error::Snapshot { path: path.to_owned(), source };
        let mut rows = Vec::new();
        let (_, meta, _) = snapshot::read_rows(path, |table, key, value| {
            rows.push(RowChange { table, key: key.to_vec(), value: Some(value.into()) });
        })
        .map_err(failed)?;
        let (state, _) = load(&meta, rows).map_err(failed)?;
        let last = meta.last_applied.as_ref().map(convert::log_id_back).ok_or(Error::NoCluster)?;
        Self { state, last, whole: false }.of_a_cluster()
    }

    /// Of the data directories that are left of a cluster, the one with the highest last entry; its whole log applied.
    /// Blocks.
    ///
    /// **Errors**: [`Error::InUse`], [`Error::OtherCluster`], [`Error::NoSurvivor`], [`Error::Directory`] when the one
    /// with the highest last entry cannot be used: whoever leaves it out loses what only it has.
    pub fn survivors(paths: &[PathBuf]) -> Result<(Self, Vec<Survivor>), Error> {
        let mut cluster = None;
        let mut survivors = Vec::new();
        for path in paths {
            let survivor = look_at(path, &mut cluster)?;
            survivors.push(survivor);
        }
        let usable = survivors.iter_mut().filter(|survivor| survivor.unusable.is_none());
        let best = usable.max_by_key(|survivor| (survivor.term, survivor.index, !survivor.lost_end));
        let Some(best) = best else {
            let why: Vec<_> = survivors.iter().map(|s| s.unusable.clone().unwrap_or_default()).collect();
            return Err(Error::NoSurvivor(why.join("; ")));
        };
        best.chosen = true;
        let path = best.path.clone();
        let (state, last, membership) = replayed(&path)?;
        // Whatever a majority acknowledged stands in the best log of any majority.
        let voters: BTreeSet<u64> = survivors
            .iter()
            .filter(|survivor| survivor.unusable.is_none() && !survivor.lost_end)
            .map(|survivor| survivor.node)
            .collect();
        let majority = |config: &BTreeSet<u64>| config.intersection(&voters).count() > config.len() / 2;
        let configs = membership.get_joint_config();
        let whole = !configs.is_empty() && configs.iter().all(majority);
        Ok((Self { state, last, whole }.of_a_cluster()?, survivors))
    }

    fn of_a_cluster(self) -> Result<Self, Error> {
        if self.state.cluster().is_some() { Ok(self) } else { Err(Error::NoCluster) }
    }

    /// The state.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// The cluster.
    pub fn cluster_id(&self) -> [u8; 16] {
        let row = self.state.cluster().unwrap_or_default();
        row.cluster_id.try_into().unwrap_or_default()
    }

    /// Everything that was ever acknowledged is in it, as a majority of its voters shows.
    pub fn is_whole(&self) -> bool {
        self.whole
    }
}

fn look_at(path: &Path, cluster: &mut Option<u128>) -> Result<Survivor, Error> {
    if let Some(pid) = inspect::holder(path) {
        return Err(Error::InUse { path: path.to_owned(), pid });
    }
    let mut survivor =
        Survivor { path: path.to_owned(), node: 0, term: 0, index: 0, lost_end: false, chosen: false, unusable: None };
    let unusable = |survivor: Survivor, why: String| {
        Ok(Survivor { unusable: Some(format!("`{}`: {why}", path.display())), ..survivor })
    };
    let identity = match inspect::identity(path) {
        Ok(identity) => identity,
        Err(error) => return unusable(survivor, chain(&error)),
    };
    survivor.node = identity.node_id;
    let Some(found) = identity.cluster_id else { return unusable(survivor, "it belongs to no cluster".to_owned()) };
    let expected = *cluster.get_or_insert(found);
    if expected != found {
        let (found, expected) = (format!("{found:032x}"), format!("{expected:032x}"));
        return Err(Error::OtherCluster { path: path.to_owned(), found, expected });
    }
    match inspect::log(path) {
        Ok(log) => {
            let last = log.bounds.last.unwrap_or_default();
            (survivor.term, survivor.index) = (last.term, last.index);
            survivor.lost_end = log.suspect.is_some() || log.damaged_end.is_some();
            Ok(survivor)
        }
        Err(error) => unusable(survivor, chain(&error)),
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

/// The state of a directory with its whole log applied, the last entry, and the membership there.
fn replayed(path: &Path) -> Result<(State, LogId, Membership), Error> {
    let failed = |source| Error::Directory { path: path.to_owned(), source };
    let stored = |error: selvedge_storage::Error| failed(io::Error::other(error));
    let tables = Table::ALL.map(|table| table as u8);
    let found = inspect::state(path, &tables).map_err(stored)?;
    let meta = snapshot::decode_meta(&found.meta.unwrap_or_default()).map_err(failed)?;
    let (mut state, mut membership) = load(&meta, found.rows).map_err(failed)?;
    let mut last = meta.last_applied.as_ref().map(convert::log_id_back);
    let bounds = inspect::log(path).map_err(stored)?.bounds;
    if bounds.last_purged.map(|id| id.index) > last.as_ref().map(|id| id.index) {
        return Err(failed(convert::invalid("its log begins behind its state")));
    }
    let mut result = Ok(());
    let mut apply = |record: Record| -> io::Result<()> {
        let entry = convert::record_back(record)?;
        let id = entry.log_id;
        if last.as_ref().is_some_and(|last| last.index + 1 != id.index) {
            return Err(convert::invalid("a record of its log is missing"));
        }
        machine::decide(&mut state, &mut membership, entry, &mut Changes::default()).map_err(|error| match error {
            machine::Undecided::Newer(newer) => io::Error::other(newer),
            machine::Undecided::Damaged(error) => error,
        })?;
        last = Some(id);
        Ok(())
    };
    let from = meta.last_applied.as_ref().map_or(0, |id| id.index + 1);
    let walked = inspect::records(path, from, |record| match apply(record) {
        Ok(()) => ControlFlow::Continue(()),
        Err(error) => {
            result = Err(error);
            ControlFlow::Break(())
        }
    });
    walked.map_err(stored)?;
    result.map_err(failed)?;
    let last = last.filter(|last| bounds.last.is_none_or(|end| end.index <= last.index));
    let last = last.ok_or_else(|| failed(convert::invalid("its log cannot be read to its end")))?;
    Ok((state, last, membership.membership().clone()))
}

/// A state whose rows add up, and the membership that is stored with it.
fn load(meta: &wire::StateMeta, rows: Vec<RowChange>) -> io::Result<(State, StoredMembership)> {
    let domain = Meta::decode(&*meta.domain).map_err(|_| convert::invalid("the stored meta of the state is none"))?;
    let state = State::load(domain, rows);
    version::loaded(&state).map_err(io::Error::other)?;
    let state = state.map_err(io::Error::other)?;
    if !state.adds_up() {
        return Err(convert::invalid("its rows do not add up to its hash"));
    }
    Ok((state, convert::stored_membership_back(meta.membership.as_ref())?))
}

/// What was begun.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Begun {
    /// Position of the state that it was begun from.
    pub from: Id,
    /// Position of the log now.
    pub position: Id,
    /// Node id of the one voter.
    pub node: u64,
}

/// Begins an epoch in a directory of [`DataDir::make`], with its node as the one voter. Blocks.
///
/// **Durability**: when it returns; the caller then calls [`DataDir::finish`].
/// **Errors**: [`Error::Refused`], the directory.
pub fn begin(dir: &DataDir, source: Source, begin: &BeginEpoch, now_ms: u64) -> Result<Begun, Error> {
    let Source { mut state, last, .. } = source;
    let from = state.position();
    let journal_hash = state.meta().journal_hash;
    let mut changes = Changes::default();
    state.begin_epoch(now_ms, begin, &mut changes)?;
    dir.join_cluster(u128::from_be_bytes(begin.cluster_id))?;

    // As if this node had led a further term and all of the log were applied and cut.
    let node = dir.node_id();
    let id = LogId { leader_id: LeaderId { term: last.leader_id.term + 1, node_id: node }, index: last.index + 1 };
    let voters = Membership::new_with_defaults(vec![BTreeSet::from([node])], []);
    let meta = wire::StateMeta {
        last_applied: Some(convert::log_id(&id)),
        membership: Some(convert::stored_membership(&StoredMembership::new(Some(id), voters))),
        domain: state.meta().encode_to_vec(),
    };
    let store = StateStore::open(Arc::new(Rocks::open_state(&dir.state_path())?))?;
    let (mut batch, mut bytes) = (Vec::new(), 0);
    for row in state.all_rows() {
        bytes += row.key.len() + row.value.as_ref().map_or(0, |value| value.len());
        batch.push(row);
        if bytes >= WRITE_BYTES {
            store.write(&std::mem::take(&mut batch), &[], &[], false)?;
            bytes = 0;
        }
    }
    // What was before this epoch nobody has any more.
    store.compact_journal(from.seq)?;
    if let Ok(hash) = <[u8; 32]>::try_from(journal_hash) {
        store.mark_journal(&[(from.seq, hash)])?;
    }
    store.mark_journal(&changes.journal_marks)?;
    store.write(&batch, &changes.journal, &meta.encode_to_vec(), true)?;
    drop(store);

    let log = Log::open(Arc::new(Rocks::open_log(&dir.log_path())?))?;
    let id = convert::stored_log_id(&id);
    durably(|done| log.purge_upto(id, done))?;
    durably(|done| log.save_vote(log::Vote { term: id.term, node, committed: true }, done))?;
    drop(log);
    set_waits(dir.path()).map_err(Error::Write)?;
    Ok(Begun { from, position: state.position(), node })
}

/// Waits for a request of the log.
fn durably(request: impl FnOnce(log::Done)) -> Result<(), Error> {
    let (done, was_done) = mpsc::sync_channel(1);
    // Received below.
    request(Box::new(move |result| drop(done.send(result))));
    let result = was_done.recv().map_err(|_| Error::Write(io::Error::other("the log was closed")))?;
    Ok(result?)
}

/// A broker that starts in this directory serves nothing before every lease of the earlier epoch is over.
fn set_waits(dir: &Path) -> io::Result<()> {
    File::create(dir.join(WAITS_FILE))?.sync_all()?;
    File::open(dir)?.sync_all()
}

/// Whether the broker of this directory has not served since its epoch began.
pub(crate) fn waits(dir: &Path) -> bool {
    dir.join(WAITS_FILE).exists()
}

/// It may serve from now on.
pub(crate) fn has_waited(dir: &Path) -> io::Result<()> {
    fs::remove_file(dir.join(WAITS_FILE))
}
