//! What an end keeps on disk: `identity.pem` (certificate chain and key) and `state.json` (everything else).
//!
//! Invariants: the directory is 0700 and its files 0600; a file is replaced whole, after it was synced.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use parking_lot::Mutex;
use rustix::fs::{FlockOperation, flock};
use selvedge_proto::identity::{Anchors, SpiffeId};
use selvedge_proto::private_file;
use selvedge_proto::tls::{self, Identity};
use serde::{Deserialize, Serialize};

/// Version of `state.json` that this build writes and reads.
pub const STATE_VERSION: u32 = 1;
/// Longest `state.json` that is read.
const STATE_BYTES_MAX: u64 = 4 * 1024 * 1024;

const STATE_FILE: &str = "state.json";
const IDENTITY_FILE: &str = "identity.pem";
const LOCK_FILE: &str = "lock";

/// Why the state could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is none.
    #[error("nothing is enrolled in `{0}`: enrol first")]
    NotEnrolled(String),
    /// A file could not be read or written.
    #[error("file `{path}`: {source}")]
    File {
        /// Which file.
        path: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Others than its owner may use the directory.
    #[error("directory `{path}` may be used by others than its owner (mode {mode:o}): `chmod 700` it")]
    Exposed {
        /// Which directory.
        path: String,
        /// Its permission bits.
        mode: u32,
    },
    /// The file is not what this build writes.
    #[error("file `{path}` cannot be read: {reason}")]
    Malformed {
        /// Which file.
        path: String,
        /// What is wrong.
        reason: String,
    },
    /// Another process uses it.
    #[error("another process uses `{0}`")]
    InUse(String),
    /// The identity cannot be used.
    #[error("identity")]
    Identity(#[from] tls::Error),
}

/// What an enrolled end knows. `Debug` leaves the secrets out.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// [`STATE_VERSION`].
    pub version: u32,
    /// What was enrolled: `connector`, `workload` or `device`.
    pub kind: String,
    /// The name that was asked for.
    pub name: String,
    /// The cluster's id for it.
    pub id: String,
    /// Its identity.
    pub spiffe: SpiffeId,
    /// `host:port` of the web listener it enrolled at.
    pub web: String,
    /// What it trusts.
    pub anchors: Anchors,
    /// Keys under which knocks are made, base64; the first is used.
    pub knock_keys: Vec<String>,
    /// The last list of brokers.
    pub brokers: SignedBrokers,
    /// Login grants, base64.
    pub grants: Vec<String>,
    /// How long sessions are held when a broker's lease runs out.
    pub hold_ms: u64,
    /// SHA-256 of the enrolment secret, so that a repeated enrolment is recognised.
    pub secret_sha256: String,
    /// The last stream number used.
    #[serde(default)]
    pub stream: u64,
}

/// A list of brokers as it was signed; base64.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignedBrokers {
    /// An encoded `BrokerList`.
    pub list: String,
    /// The signature over it; empty when it came without one.
    #[serde(default)]
    pub signature: String,
    /// Certificate of the signer, DER.
    #[serde(default)]
    pub signer: String,
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("State")
            .field("name", &self.name)
            .field("spiffe", &self.spiffe.to_string())
            .field("web", &self.web)
            .finish_non_exhaustive()
    }
}

impl State {
    /// Reads `state.json` of a directory.
    ///
    /// **Errors**: [`Error::NotEnrolled`] when there is none; any but [`Error::InUse`].
    pub fn load(dir: &Path) -> Result<Self, Error> {
        let path = dir.join(STATE_FILE);
        let file = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(Error::NotEnrolled(dir.display().to_string()));
            }
            other => other.map_err(|source| file_error(&path, source))?,
        };
        let malformed = |reason: String| Error::Malformed { path: path.display().to_string(), reason };
        let mut text = String::new();
        file.take(STATE_BYTES_MAX + 1).read_to_string(&mut text).map_err(|source| file_error(&path, source))?;
        if text.len() as u64 > STATE_BYTES_MAX {
            return Err(malformed(format!("longer than {STATE_BYTES_MAX} bytes")));
        }
        let state: Self = serde_json::from_str(&text).map_err(|error| malformed(error.to_string()))?;
        if state.version != STATE_VERSION {
            return Err(malformed(format!("version {} is not known to this build", state.version)));
        }
        Ok(state)
    }

    /// Writes `state.json` of a directory.
    ///
    /// **Durability**: synced, then renamed over the old one.
    pub fn save(&self, dir: &Path) -> Result<(), Error> {
        let path = dir.join(STATE_FILE);
        let text = serde_json::to_string_pretty(self)
            .map_err(|error| Error::Malformed { path: path.display().to_string(), reason: error.to_string() })?;
        write_private(&path, text.as_bytes())
    }
}

/// Where an end's certificate chain and key are.
pub fn identity_path(dir: &Path) -> PathBuf {
    dir.join(IDENTITY_FILE)
}

/// Makes the directory with mode 0700, or checks that an existing one is its owner's alone.
pub fn prepare_dir(dir: &Path) -> Result<(), Error> {
    DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(|source| file_error(dir, source))?;
    let mode = fs::metadata(dir).map_err(|source| file_error(dir, source))?.permissions().mode();
    if mode & 0o077 != 0 {
        return Err(Error::Exposed { path: dir.display().to_string(), mode: mode & 0o7777 });
    }
    Ok(())
}

/// Writes a file that only its owner may read.
///
/// **Durability**: as [`private_file::replace`].
pub(crate) fn write_private(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    private_file::replace(path, bytes).map_err(|source| file_error(path, source))
}

/// The right to use a state directory, held as long as this lives. Two processes with one identity would replace
/// each other's control streams.
#[derive(Debug)]
pub(crate) struct Lock(#[expect(dead_code, reason = "held, never read")] File);

impl Lock {
    /// Takes the lock.
    ///
    /// **Errors**: [`Error::InUse`] when another process has it.
    pub(crate) fn take(dir: &Path) -> Result<Self, Error> {
        let path = dir.join(LOCK_FILE);
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(|source| file_error(&path, source))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Self(file)),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(Error::InUse(dir.display().to_string())),
            Err(errno) => Err(file_error(&path, errno.into())),
        }
    }
}

/// The state of a running end: in memory, and on disk after each change.
pub(crate) struct Store {
    dir: PathBuf,
    state: Mutex<State>,
}

impl Store {
    /// Reads state and identity of a directory.
    pub(crate) fn open(dir: &Path) -> Result<(Self, Identity), Error> {
        prepare_dir(dir)?;
        let state = State::load(dir)?;
        let identity = Identity::load(&identity_path(dir))?;
        Ok((Self { dir: dir.to_owned(), state: Mutex::new(state) }, identity))
    }

    /// Changes the state and writes it; blocks for the disk's sync, so call it where blocking is allowed.
    pub(crate) fn update(&self, change: impl FnOnce(&mut State)) -> Result<(), Error> {
        let mut state = self.state.lock();
        change(&mut state);
        state.save(&self.dir)
    }

    /// Reads something of the state.
    pub(crate) fn with<T>(&self, read: impl FnOnce(&State) -> T) -> T {
        read(&self.state.lock())
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }
}

fn file_error(path: &Path, source: io::Error) -> Error {
    Error::File { path: path.display().to_string(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_directory_is_its_owners_alone() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("a/b");
        prepare_dir(&dir).unwrap();
        assert_eq!(fs::metadata(&dir).unwrap().permissions().mode() & 0o777, 0o700);
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o750)).unwrap();
        assert!(matches!(prepare_dir(&dir), Err(Error::Exposed { mode: 0o750, .. })));
    }

    #[test]
    fn a_directory_without_state_says_so() {
        let temp = tempfile::tempdir().unwrap();
        assert!(matches!(State::load(temp.path()), Err(Error::NotEnrolled(_))));
        fs::write(temp.path().join(STATE_FILE), "{}").unwrap();
        assert!(matches!(State::load(temp.path()), Err(Error::Malformed { .. })));
    }

    #[test]
    fn a_second_process_does_not_get_the_lock() {
        let temp = tempfile::tempdir().unwrap();
        let first = Lock::take(temp.path()).unwrap();
        assert!(matches!(Lock::take(temp.path()), Err(Error::InUse(_))));
        drop(first);
        Lock::take(temp.path()).unwrap();
    }
}
