//! Snapshots of the state: a checkpoint that shares files with the database, or a stream that was received.

use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use openraft::storage::RaftSnapshotBuilder;
use parking_lot::Mutex;
use prost::Message as _;
use selvedge_proto::peer as wire;
use selvedge_storage::state::{self, StateStore};

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
    snapshot: state::Snapshot,
    dir: PathBuf,
}

impl Drop for Checkpoint {
    fn drop(&mut self) {
        remove(&self.dir, fs::remove_dir_all(&self.dir));
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
        let meta = state::verify(open(&file.path)?).map_err(io::Error::other)?;
        if snapshot_meta(&decode_meta(&meta)?)? == *said {
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
    inner: Arc<Mutex<Inner>>,
}

#[derive(Default)]
struct Inner {
    made: u64,
    current: Option<Snapshot>,
}

impl Snapshots {
    /// Uses a directory, and empties it.
    pub(crate) fn new(store: Arc<StateStore>, dir: PathBuf) -> io::Result<Self> {
        match fs::remove_dir_all(&dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        fs::create_dir_all(&dir)?;
        Ok(Self { store, dir, inner: Arc::default() })
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
        self.store.checkpoint(&dir).map_err(io::Error::other)?;
        let snapshot = self.store.open_checkpoint(&dir).map_err(io::Error::other)?;
        let meta = snapshot.meta().map_err(io::Error::other)?.unwrap_or_default();
        let meta = snapshot_meta(&decode_meta(&meta)?)?;
        let made = Snapshot { meta, snapshot: SnapshotData::Checkpoint(Arc::new(Checkpoint { snapshot, dir })) };
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
        blocking(move || this.build()).await
    }
}

/// Runs what blocks off the runtime's own threads.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(_) => Err(io::Error::other("the work panicked or the runtime is shutting down")),
    }
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
