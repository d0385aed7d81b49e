//! What can go wrong on a disk.

use std::{io, path::PathBuf, sync::Arc};

/// Why storage refused or failed. Cheap to clone, because one failed sync fails every request that shared it.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// A system call on a file failed.
    #[error("cannot {what} `{path}`")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: Arc<io::Error>,
    },
    /// The disk has no room left.
    #[error("no space left on the disk of `{path}` (SE0111)")]
    NoSpace {
        /// The file or directory that was written.
        path: PathBuf,
    },
    /// The disk takes no writes: it is mounted read-only, or became so.
    #[error("the disk of `{path}` is read-only (SE0115)")]
    ReadOnly {
        /// The file or directory that was written.
        path: PathBuf,
    },
    /// Another process holds this directory.
    #[error("`{path}` is in use by another process{holder} (SE0116)")]
    Locked {
        /// The directory.
        path: PathBuf,
        /// Who holds it, where that is known: ` (pid 123)`.
        holder: String,
    },
    /// The key-value engine failed.
    #[error("the storage engine cannot {what}")]
    Engine {
        /// What was tried.
        what: &'static str,
        /// The engine's answer.
        #[source]
        source: Arc<dyn std::error::Error + Send + Sync>,
    },
    /// A log record cannot be trusted; the node must be replaced.
    #[error("log record {index} is damaged: {why} (SE0114)")]
    LogDamaged {
        /// Index of the record.
        index: u64,
        /// What is wrong with it.
        why: String,
    },
    /// A small record (vote, cluster id, ...) cannot be trusted.
    #[error("the stored `{what}` is damaged: {why} (SE0114)")]
    MetaDamaged {
        /// Which one.
        what: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// An append does not continue the log.
    #[error("log append begins at {found} but the log continues at {expected}")]
    LogGap {
        /// The index that would continue the log.
        expected: u64,
        /// The index that was given.
        found: u64,
    },
    /// The store was closed, or its power was cut (memory engine).
    #[error("the store is closed")]
    Closed,
    /// A journal position was asked for that has been compacted away.
    #[error("the journal begins after {upto}")]
    Compacted {
        /// Last sequence number that is gone.
        upto: u64,
    },
    /// A row's table number is reserved.
    #[error("table {table} is reserved")]
    ReservedTable {
        /// The number.
        table: u8,
    },
    /// A snapshot stream is not what its sender wrote.
    #[error("the snapshot is damaged at byte {offset}: {why}")]
    SnapshotDamaged {
        /// Bytes read before the damage was noticed.
        offset: u64,
        /// What is wrong.
        why: String,
    },
    /// The audit journal holds as much as it may, or more waits for the disk than may wait.
    #[error("the audit journal is full: {what}")]
    AuditFull {
        /// Which limit was met.
        what: &'static str,
    },
    /// An audit record is larger than a record may be.
    #[error("an audit record of {bytes} bytes is over the limit of {limit_bytes}")]
    AuditRecordTooLarge {
        /// Size of the body.
        bytes: usize,
        /// The limit.
        limit_bytes: usize,
    },
    /// Audit records were asked for that retention has deleted.
    #[error("audit stream `{stream}` begins at record {first}")]
    AuditGone {
        /// The stream.
        stream: crate::audit::StreamId,
        /// The first record that is still there.
        first: u64,
    },
    /// The audit journal on disk is not what was written.
    #[error(transparent)]
    AuditBroken(#[from] Arc<crate::audit::Broken>),
    /// The data directory holds data but not the identity that was made with it.
    #[error("`{path}` holds data but no `{file}`; it cannot be given a new identity (SE0117)")]
    IdentityMissing {
        /// The data directory.
        path: PathBuf,
        /// The missing file.
        file: &'static str,
    },
    /// A new data directory was to be made where something is.
    #[error("`{path}` is not empty; what is restored needs a directory of its own (SE0120)")]
    NotEmpty {
        /// The directory.
        path: PathBuf,
    },
    /// The making of this data directory was cut short.
    #[error("what was to be restored into `{path}` is not whole; restore it again (SE0120)")]
    Unfinished {
        /// The directory.
        path: PathBuf,
    },
    /// The data directory belongs to another cluster.
    #[error("this data directory belongs to cluster `{stored}`, not to `{given}` (SE0117)")]
    OtherCluster {
        /// The cluster it was made a member of.
        stored: String,
        /// The cluster that was asked for.
        given: String,
    },
}

impl Error {
    /// Wraps a failed system call; a full disk and a read-only one get their own variants.
    pub(crate) fn io(what: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Error {
        let path = path.into();
        move |source| match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Error::NoSpace { path },
            io::ErrorKind::ReadOnlyFilesystem => Error::ReadOnly { path },
            _ => Error::Io { what, path, source: Arc::new(source) },
        }
    }

    /// Whether freeing disk space would help.
    pub fn is_no_space(&self) -> bool {
        matches!(self, Error::NoSpace { .. })
    }

    /// The code that an operator looks up, where there is something to do about it.
    pub fn code(&self) -> Option<&'static str> {
        match self {
            Error::NoSpace { .. } => Some("SE0111"),
            Error::LogDamaged { .. } | Error::MetaDamaged { .. } => Some("SE0114"),
            Error::ReadOnly { .. } => Some("SE0115"),
            Error::Locked { .. } => Some("SE0116"),
            Error::NotEmpty { .. } | Error::Unfinished { .. } => Some("SE0120"),
            Error::IdentityMissing { .. } | Error::OtherCluster { .. } => Some("SE0117"),
            _ => None,
        }
    }
}
