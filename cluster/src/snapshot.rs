//! Snapshots of the state: a checkpoint that shares files with the database, or a stream that was received.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use openraft::storage::RaftSnapshotBuilder;
use parking_lot::Mutex;
use prost::Message as _;
use selvedge_domain::state::{Meta, StateHash, Table};
use selvedge_domain::{Id, rows};
use selvedge_proto::peer as wire;
use selvedge_storage::inspect;
use selvedge_storage::state::{self, StateStore};
use serde::Serialize;

use crate::blocking::Blocking;
use crate::convert;
use crate::metrics::SNAPSHOTS_TOTAL;
use crate::raft_types::{Snapshot, SnapshotMeta, TypeConfig};

/// The rows of a snapshot. Clones share it; what lies on disk goes with the last one.
#[derive(Clone)]
pub enum SnapshotData {
    /// Made here.
    Checkpoint(Arc<Checkpoint>),
    /// Received.
    File(Arc<SnapshotFile>),
}

/// A checkpoint of the database.
pub struct Checkpoint {
    store: Arc<StateStore>,
    snapshot: state::Snapshot,
    dir: PathBuf,
}

impl Drop for Checkpoint {
    fn drop(&mut self) {
        if let Err(error) = self.store.remove_checkpoint(&self.dir) {
            tracing::warn!(%error, path = %self.dir.display(), "an old snapshot is removed at the next start");
        }
    }
}

/// An exported stream in a file.
pub struct SnapshotFile {
    path: PathBuf,
}

impl SnapshotFile {
    /// Takes over a file, which is removed with it.
    pub(crate) fn new(path: PathBuf) -> Self {
        Self { path }
    }
}

impl Drop for SnapshotFile {
    fn drop(&mut self) {
        remove(&self.path, fs::remove_file(&self.path));
    }
}

fn remove(path: &Path, result: io::Result<()>) {
    if let Err(error) = result
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(%error, path = %path.display(), "an old snapshot is removed at the next start");
    }
}

impl SnapshotData {
    /// Writes the rows as one stream. Blocks.
    pub(crate) fn write_to(&self, mut to: impl Write) -> io::Result<()> {
        match self {
            Self::Checkpoint(checkpoint) => checkpoint.snapshot.export(to).map(drop).map_err(io::Error::other),
            Self::File(file) => io::copy(&mut BufReader::new(File::open(&file.path)?), &mut to).map(drop),
        }
    }
}

impl SnapshotData {
    /// Reads all of a received stream and checks it and that it is what its sender said; changes nothing. Blocks.
    pub(crate) fn verify(&self, said: &SnapshotMeta) -> io::Result<()> {
        let Self::File(file) = self else { return Ok(()) };
        let (_, meta, _) = read(&file.path)?;
        if snapshot_meta(&meta)? == *said {
            Ok(())
        } else {
            Err(convert::invalid("a snapshot that is not what its sender said"))
        }
    }
}

/// Where snapshots lie, and the current one.
#[derive(Clone)]
pub struct Snapshots {
    store: Arc<StateStore>,
    dir: PathBuf,
    blocking: Blocking,
    inner: Arc<Mutex<Inner>>,
}

#[derive(Default)]
struct Inner {
    made: u64,
    current: Option<Snapshot>,
}

impl Snapshots {
    /// Uses a directory, and empties it.
    pub(crate) fn new(store: Arc<StateStore>, dir: PathBuf, blocking: Blocking) -> io::Result<Self> {
        match fs::remove_dir_all(&dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        fs::create_dir_all(&dir)?;
        Ok(Self { store, dir, blocking, inner: Arc::default() })
    }

    pub(crate) fn blocking(&self) -> &Blocking {
        &self.blocking
    }

    pub(crate) fn current(&self) -> Option<Snapshot> {
        self.inner.lock().current.clone()
    }

    /// A path that nothing uses.
    pub(crate) fn new_path(&self) -> PathBuf {
        let mut inner = self.inner.lock();
        inner.made += 1;
        self.dir.join(inner.made.to_string())
    }

    fn build(&self) -> io::Result<Snapshot> {
        let dir = self.new_path();
        if let Err(error) = self.store.checkpoint(&dir) {
            // What a full disk left of it.
            let _ = self.store.remove_checkpoint(&dir);
            return Err(io::Error::other(error));
        }
        let snapshot = self.store.open_checkpoint(&dir).map_err(io::Error::other)?;
        let meta = snapshot.meta().map_err(io::Error::other)?.unwrap_or_default();
        let meta = snapshot_meta(&decode_meta(&meta)?)?;
        let made = Snapshot {
            meta,
            snapshot: SnapshotData::Checkpoint(Arc::new(Checkpoint { store: self.store.clone(), snapshot, dir })),
        };
        self.inner.lock().current = Some(made.clone());
        ::metrics::counter!(SNAPSHOTS_TOTAL, "kind" => "built").increment(1);
        Ok(made)
    }

    /// Replaces the state by a snapshot; returns its meta. Blocks.
    pub(crate) fn install(&self, data: &SnapshotData) -> io::Result<wire::StateMeta> {
        let file = match data {
            SnapshotData::File(file) => file.clone(),
            SnapshotData::Checkpoint(_) => {
                let path = self.new_path();
                let file = Arc::new(SnapshotFile::new(path.clone()));
                let mut writer = BufWriter::new(File::create(&path)?);
                data.write_to(&mut writer)?;
                writer.flush()?;
                file
            }
        };
        let meta = self.store.install(open(&file.path)?).map_err(io::Error::other)?;
        let meta = decode_meta(&meta)?;
        self.inner.lock().current = Some(Snapshot { meta: snapshot_meta(&meta)?, snapshot: SnapshotData::File(file) });
        ::metrics::counter!(SNAPSHOTS_TOTAL, "kind" => "installed").increment(1);
        Ok(meta)
    }
}

impl RaftSnapshotBuilder<TypeConfig> for Snapshots {
    type SnapshotData = SnapshotData;

    async fn build_snapshot(&mut self) -> Result<Snapshot, io::Error> {
        let this = self.clone();
        self.blocking.run(move || this.build()).await
    }
}

/// What a snapshot in a file is of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SnapshotHead {
    /// The cluster, in hex; empty when it was not initialised.
    pub cluster_id: String,
    /// Position of the log.
    pub position: Id,
    /// Cluster time, milliseconds.
    pub time_ms: u64,
    /// Hash of the state, in hex.
    pub state_hash: String,
    /// Term of the last entry applied.
    pub term: u64,
    /// Index of the last entry applied.
    pub index: u64,
    /// Voters.
    pub voters: Vec<u64>,
    /// Learners.
    pub learners: Vec<u64>,
    /// Rows of the state.
    pub rows: u64,
    /// Rows of each table that has any, by its name.
    pub tables: BTreeMap<String, u64>,
    /// Length of the file.
    pub bytes: u64,
}

impl SnapshotHead {
    /// Reads a whole snapshot from a file and checks it. Blocks; needs no cluster.
    ///
    /// **Errors**: the file, or that it is no whole snapshot.
    pub fn read(path: &Path) -> io::Result<Self> {
        let mut tables = BTreeMap::new();
        let (head, meta, cluster) = read_rows(path, |table, _, _| *tables.entry(table).or_default() += 1)?;
        let tables = tables.into_iter().map(|(table, rows)| match Table::from_number(table) {
            Some(table) => Ok((table.name(), rows)),
            None => Err(convert::invalid("a snapshot of a later version")),
        });
        let domain = Meta::decode(&*meta.domain).map_err(|_| convert::invalid("the snapshot's meta is none"))?;
        let membership = convert::stored_membership_back(meta.membership.as_ref())?;
        let last = meta.last_applied.unwrap_or_default();
        Ok(Self {
            cluster_id: cluster.map(|cluster| hex::encode(cluster.cluster_id)).unwrap_or_default(),
            position: domain.position.unwrap_or_default(),
            time_ms: domain.time_ms,
            state_hash: hex::encode(domain.state_hash),
            term: last.term,
            index: last.index,
            voters: membership.membership().voter_ids().collect(),
            learners: membership.membership().learner_ids().collect(),
            rows: head.rows,
            tables: tables.collect::<io::Result<_>>()?,
            bytes: fs::metadata(path)?.len(),
        })
    }
}

/// Reads a whole stream and checks that its rows add up to the hash that it names.
fn read(path: &Path) -> io::Result<(state::Head, wire::StateMeta, Option<rows::Cluster>)> {
    read_rows(path, |_, _, _| ())
}

/// The same, and shows each row's table, key and value; what is done with them before an error must be undone.
pub(crate) fn read_rows(
    path: &Path,
    mut visit: impl FnMut(u8, &[u8], &[u8]),
) -> io::Result<(state::Head, wire::StateMeta, Option<rows::Cluster>)> {
    let mut hash = StateHash::default();
    let mut cluster = None;
    let head = state::verify(open(path)?, |table, key, value| {
        hash.add(table, key, value);
        visit(table, key, value);
        if table == Table::Cluster as u8 {
            cluster = rows::Cluster::decode(value).ok();
        }
    });
    let head = head.map_err(io::Error::other)?;
    let meta = decode_meta(&head.meta)?;
    let domain = Meta::decode(&*meta.domain).map_err(|_| convert::invalid("the snapshot's meta is none"))?;
    if !domain.state_hash.is_empty() && domain.state_hash != hash.to_array() {
        return Err(convert::invalid("a snapshot whose rows do not add up to its hash"));
    }
    Ok((head, meta, cluster))
}

/// Writes the state as it stands to a new file, durably. Blocks.
pub(crate) fn save(store: &StateStore, path: &Path) -> io::Result<SnapshotHead> {
    write(path, |to| store.export(to).map(drop))
}

/// Writes the state of a data directory to a new file, durably, whether its broker runs or not. Blocks.
///
/// **Errors**: the directory, the file; one that is there already is left alone.
pub fn save_at_rest(dir: &Path, path: &Path) -> io::Result<SnapshotHead> {
    let mut attempts = 1;
    loop {
        match write(path, |to| inspect::export(dir, to).map(drop)) {
            // A broker that writes may take a file away while it is looked at: then the rows do not add up.
            Err(error) if error.kind() == io::ErrorKind::InvalidData && attempts < AT_REST_ATTEMPTS => attempts += 1,
            done => return done,
        }
    }
}

/// How often the state of a broker that runs is read when its rows do not add up.
const AT_REST_ATTEMPTS: u32 = 5;

/// Writes a snapshot to a new file, reads it back, and only then gives it its name.
fn write(
    path: &Path,
    export: impl FnOnce(&mut BufWriter<File>) -> Result<(), selvedge_storage::Error>,
) -> io::Result<SnapshotHead> {
    let file_name = path.file_name().ok_or_else(|| convert::invalid("a path that names no file"))?;
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if path.exists() {
        return Err(io::ErrorKind::AlreadyExists.into());
    }
    let mut temporary = file_name.to_owned();
    temporary.push(".new");
    let temporary = dir.join(temporary);
    let written = (|| {
        let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
        let mut to = BufWriter::with_capacity(1 << 20, file);
        export(&mut to).map_err(io::Error::other)?;
        to.into_inner()?.sync_all()?;
        let head = SnapshotHead::read(&temporary)?;
        fs::hard_link(&temporary, path)?;
        File::open(dir)?.sync_all()?;
        Ok(head)
    })();
    remove(&temporary, fs::remove_file(&temporary));
    written
}

pub(crate) fn decode_meta(bytes: &[u8]) -> io::Result<wire::StateMeta> {
    wire::StateMeta::decode(bytes).map_err(|_| convert::invalid("the stored meta of the state is none"))
}

fn snapshot_meta(meta: &wire::StateMeta) -> io::Result<SnapshotMeta> {
    Ok(SnapshotMeta {
        last_log_id: meta.last_applied.as_ref().map(convert::log_id_back),
        last_membership: convert::stored_membership_back(meta.membership.as_ref())?,
    })
}

fn open(path: &Path) -> io::Result<impl Read> {
    Ok(BufReader::with_capacity(1 << 20, File::open(path)?))
}
