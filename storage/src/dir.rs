//! The data directory: who this node is, and that only one process uses it.
//!
//! **Shape:** `node.id` (text: node id, cluster id), `boot` (a counter), `LOCK`, and the directories `log/`, `state/`
//! and `audit/`, which their own modules make.

use std::{
    fs::{self, DirBuilder, File, OpenOptions, Permissions},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

use parking_lot::Mutex;
use rustix::fs::{FlockOperation, flock};

use crate::Error;

/// Stands in a directory that [`DataDir::make`] has made and that is not whole yet.
const UNFINISHED_FILE: &str = "unfinished";
pub(crate) const LOCK_FILE: &str = "LOCK";
pub(crate) const NODE_FILE: &str = "node.id";
pub(crate) const BOOT_FILE: &str = "boot";
pub(crate) const LOG_DIR: &str = "log";
pub(crate) const STATE_DIR: &str = "state";
pub(crate) const AUDIT_DIR: &str = "audit";
const FIRST_LINE: &str = "selvedge data directory 1";
const NO_CLUSTER: &str = "none";

/// A data directory that this process alone uses while it holds this.
pub struct DataDir {
    path: PathBuf,
    node_id: u64,
    boot: u64,
    cluster_id: Mutex<Option<u128>>,
    /// Released by the system when the process ends, however it ends.
    _lock: File,
}

impl DataDir {
    /// Opens or makes a data directory, and counts the boot.
    ///
    /// A new one gets a random node id, which is never reused.
    /// **Errors:** [`Error::Locked`] when another process uses it; [`Error::IdentityMissing`] when it holds data
    /// without an identity.
    pub fn open(path: &Path) -> Result<DataDir, Error> {
        DataDir::open_as(path, || rand::random_range(1..=u64::MAX))
    }

    /// [`DataDir::open`] with another source of a new directory's node id, which must not be 0. For simulations.
    pub fn open_as(path: &Path, new_node_id: impl FnOnce() -> u64) -> Result<DataDir, Error> {
        make_private(path)?;
        if DataDir::is_unfinished(path) {
            return Err(Error::Unfinished { path: path.to_owned() });
        }
        DataDir::open_locked(path, lock(path)?, new_node_id)
    }

    /// Makes a new data directory for what is put into it before [`DataDir::finish`]; until then nobody opens it. What
    /// an earlier attempt left there that was cut short is removed.
    ///
    /// **Errors:** [`Error::NotEmpty`] when something else is there; [`Error::Locked`].
    pub fn make(path: &Path) -> Result<DataDir, Error> {
        let there = |path: &Path| match fs::read_dir(path) {
            Ok(entries) => {
                let names = entries.map(|entry| entry.map(|entry| entry.file_name())).collect::<Result<Vec<_>, _>>();
                // Where a disk is mounted.
                Ok(names?.into_iter().filter(|name| name != "lost+found").collect())
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(error),
        };
        let there = |path: &Path| there(path).map_err(Error::io("read", path));
        let names = there(path)?;
        if !names.is_empty() && !names.iter().any(|name| name == UNFINISHED_FILE) {
            return Err(Error::NotEmpty { path: path.to_owned() });
        }
        make_private(path)?;
        // Before the lock file, so that a cut leaves a directory that is known as unfinished.
        replace(path, UNFINISHED_FILE, "")?;
        let lock = lock(path)?;
        for name in there(path)?.iter().filter(|name| *name != UNFINISHED_FILE && *name != LOCK_FILE) {
            let left = path.join(name);
            let removed = if left.is_dir() { fs::remove_dir_all(&left) } else { fs::remove_file(&left) };
            removed.map_err(Error::io("remove", &left))?;
        }
        DataDir::open_locked(path, lock, || rand::random_range(1..=u64::MAX))
    }

    /// Whether [`DataDir::make`] was cut short there, or is under way.
    pub fn is_unfinished(path: &Path) -> bool {
        path.join(UNFINISHED_FILE).exists()
    }

    /// Lets a directory that [`DataDir::make`] made be opened from now on. **Durability:** when it returns.
    pub fn finish(&self) -> Result<(), Error> {
        let marker = self.path.join(UNFINISHED_FILE);
        fs::remove_file(&marker).map_err(Error::io("remove", &marker))?;
        sync_dir(&self.path)
    }

    fn open_locked(path: &Path, lock: File, new_node_id: impl FnOnce() -> u64) -> Result<DataDir, Error> {
        let (node_id, cluster_id) = match read_small(&path.join(NODE_FILE))? {
            Some(text) => parse_identity(&text)?,
            None if [LOG_DIR, STATE_DIR, BOOT_FILE].iter().any(|name| path.join(name).exists()) => {
                return Err(Error::IdentityMissing { path: path.to_owned(), file: NODE_FILE });
            }
            None => {
                let node_id = new_node_id();
                replace(path, NODE_FILE, &identity(node_id, None))?;
                (node_id, None)
            }
        };
        let boot = next_boot(path)?;
        Ok(DataDir { path: path.to_owned(), node_id, boot, cluster_id: Mutex::new(cluster_id), _lock: lock })
    }

    /// Makes this node a member of a cluster, for good.
    ///
    /// **Errors:** [`Error::OtherCluster`] when it belongs to another one.
    pub fn join_cluster(&self, cluster_id: u128) -> Result<(), Error> {
        let mut stored = self.cluster_id.lock();
        match *stored {
            Some(id) if id == cluster_id => Ok(()),
            Some(id) => Err(Error::OtherCluster { stored: format!("{id:032x}"), given: format!("{cluster_id:032x}") }),
            None => {
                replace(&self.path, NODE_FILE, &identity(self.node_id, Some(cluster_id)))?;
                *stored = Some(cluster_id);
                Ok(())
            }
        }
    }

    /// The directory itself.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// This node's id; never 0.
    pub fn node_id(&self) -> u64 {
        self.node_id
    }

    /// How often this directory was opened, this time included; begins at 1.
    pub fn boot(&self) -> u64 {
        self.boot
    }

    /// The cluster that this node is a member of.
    pub fn cluster_id(&self) -> Option<u128> {
        *self.cluster_id.lock()
    }

    /// Where the Raft log's database lies.
    pub fn log_path(&self) -> PathBuf {
        self.path.join(LOG_DIR)
    }

    /// Where the state's database lies.
    pub fn state_path(&self) -> PathBuf {
        self.path.join(STATE_DIR)
    }

    /// Where the audit journal lies.
    pub fn audit_path(&self) -> PathBuf {
        self.path.join(AUDIT_DIR)
    }
}

/// Makes the name of a new or removed file durable.
pub(crate) fn sync_dir(path: &Path) -> Result<(), Error> {
    File::open(path).and_then(|dir| dir.sync_all()).map_err(Error::io("sync", path))
}

/// Makes a directory that only its owner may enter.
pub(crate) fn make_private(path: &Path) -> Result<(), Error> {
    if !path.exists() {
        DirBuilder::new().mode(0o700).recursive(true).create(path).map_err(Error::io("create", path))?;
        if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            sync_dir(parent)?;
        }
        return Ok(());
    }
    let mode = fs::metadata(path).map_err(Error::io("read", path))?.permissions().mode();
    if mode & 0o077 != 0 {
        tracing::warn!(path = %path.display(), "others could enter this directory; only its owner may now");
        fs::set_permissions(path, Permissions::from_mode(0o700)).map_err(Error::io("protect", path))?;
    }
    Ok(())
}

fn lock(path: &Path) -> Result<File, Error> {
    let file_path = path.join(LOCK_FILE);
    let open = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&file_path);
    let mut file = open.map_err(Error::io("open", &file_path))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => {
            let mut pid = String::new();
            // Only to say who; without it the answer is the same.
            let _ = file.read_to_string(&mut pid);
            let holder = pid.trim().parse::<u32>().map_or(String::new(), |pid| format!(" (pid {pid})"));
            return Err(Error::Locked { path: path.to_owned(), holder });
        }
        Err(errno) => return Err(Error::io("lock", &file_path)(errno.into())),
    }
    file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id())).map_err(Error::io("write", &file_path))?;
    Ok(file)
}

fn next_boot(path: &Path) -> Result<u64, Error> {
    let boot = match read_small(&path.join(BOOT_FILE))? {
        None => 1,
        Some(text) => text
            .trim()
            .parse::<u64>()
            .ok()
            .and_then(|boot| boot.checked_add(1))
            .ok_or_else(|| Error::MetaDamaged { what: BOOT_FILE, why: "it is not a number".to_owned() })?,
    };
    replace(path, BOOT_FILE, &format!("{boot}\n"))?;
    Ok(boot)
}

fn identity(node_id: u64, cluster_id: Option<u128>) -> String {
    let cluster = cluster_id.map_or(NO_CLUSTER.to_owned(), |id| format!("{id:032x}"));
    let text = format!("{FIRST_LINE}\nnode {node_id:016x}\ncluster {cluster}\n");
    let crc = crc32c::crc32c(text.as_bytes());
    format!("{text}crc32c {crc:08x}\n")
}

pub(crate) fn parse_identity(text: &str) -> Result<(u64, Option<u128>), Error> {
    let damaged = |why: &str| Error::MetaDamaged { what: NODE_FILE, why: why.to_owned() };
    let lines: Vec<&str> = text.lines().collect();
    let &[FIRST_LINE, node, cluster, _] = lines.as_slice() else {
        return Err(damaged("it is not four lines of this version"));
    };
    let node = node.strip_prefix("node ").and_then(|hex| u64::from_str_radix(hex, 16).ok()).filter(|id| *id != 0);
    let node = node.ok_or_else(|| damaged("its node id is not a number"))?;
    let cluster = match cluster.strip_prefix("cluster ") {
        Some(NO_CLUSTER) => None,
        hex => {
            let id = hex.and_then(|hex| u128::from_str_radix(hex, 16).ok());
            Some(id.ok_or_else(|| damaged("its cluster id is not a number"))?)
        }
    };
    if identity(node, cluster) != text {
        return Err(damaged("its checksum does not match"));
    }
    Ok((node, cluster))
}

pub(crate) fn read_small(path: &Path) -> Result<Option<String>, Error> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io("read", path)(error)),
    }
}

/// Replaces a file whole, durably.
fn replace(dir: &Path, name: &str, text: &str) -> Result<(), Error> {
    let (path, temporary) = (dir.join(name), dir.join(format!("{name}.new")));
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)
        .map_err(Error::io("create", &temporary))?;
    file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(Error::io("write", &temporary))?;
    fs::rename(&temporary, &path).map_err(Error::io("replace", &path))?;
    sync_dir(dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holder() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("data");
        (dir, path)
    }

    #[test]
    fn a_new_directory_is_private_and_keeps_its_identity() {
        let (_holder, path) = holder();
        let first = DataDir::open(&path).expect("opens");
        let (node_id, boot) = (first.node_id(), first.boot());
        assert_eq!((boot, first.cluster_id()), (1, None));
        assert_eq!(fs::metadata(&path).expect("there").permissions().mode() & 0o777, 0o700);
        first.join_cluster(7).expect("joins");
        drop(first);
        let second = DataDir::open(&path).expect("opens again");
        assert_eq!((second.node_id(), second.boot(), second.cluster_id()), (node_id, 2, Some(7)));
        second.join_cluster(7).expect("the same cluster");
        assert!(matches!(second.join_cluster(8), Err(Error::OtherCluster { .. })));
    }

    #[test]
    fn a_second_user_is_refused_and_told_who_holds_it() {
        let (_holder, path) = holder();
        let _first = DataDir::open(&path).expect("opens");
        let refused = DataDir::open(&path).err().expect("refused").to_string();
        assert!(refused.contains(&format!("(pid {})", std::process::id())), "{refused}");
    }

    #[test]
    fn data_without_an_identity_gets_no_new_one() {
        let (_holder, path) = holder();
        drop(DataDir::open(&path).expect("opens"));
        fs::remove_file(path.join(NODE_FILE)).expect("removes");
        assert!(matches!(DataDir::open(&path), Err(Error::IdentityMissing { .. })));
    }

    #[test]
    fn a_directory_that_is_being_made_is_nobodys_until_it_is_finished() {
        let (_holder, path) = holder();
        let making = DataDir::make(&path).expect("makes");
        let node_id = making.node_id();
        assert!(matches!(DataDir::open(&path), Err(Error::Unfinished { .. })));
        assert!(matches!(DataDir::make(&path), Err(Error::Locked { .. })), "somebody is at it");
        fs::create_dir(path.join("state")).expect("makes");
        drop(making);
        let again = DataDir::make(&path).expect("begins anew");
        assert!(!path.join("state").exists() && again.node_id() != node_id, "of the first attempt nothing is left");
        let node_id = again.node_id();
        again.finish().expect("finishes");
        drop(again);
        assert_eq!(DataDir::open(&path).expect("opens").node_id(), node_id);
        assert!(matches!(DataDir::make(&path), Err(Error::NotEmpty { .. })));
    }

    #[test]
    fn nothing_is_made_over_what_is_there() {
        let (_holder, path) = holder();
        fs::create_dir(&path).expect("makes");
        fs::create_dir(path.join("lost+found")).expect("makes");
        fs::write(path.join("notes"), "mine").expect("writes");
        assert!(matches!(DataDir::make(&path), Err(Error::NotEmpty { .. })));
        assert_eq!(fs::read_dir(&path).expect("reads").count(), 2);
        fs::remove_file(path.join("notes")).expect("removes");
        drop(DataDir::make(&path).expect("a mounted disk is empty"));
    }

    #[test]
    fn a_changed_identity_is_refused() {
        let (_holder, path) = holder();
        drop(DataDir::open(&path).expect("opens"));
        let file = path.join(NODE_FILE);
        let bytes = fs::read(&file).expect("reads");
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            fs::write(&file, &changed).expect("writes");
            assert!(DataDir::open(&path).is_err(), "byte {at}");
        }
    }
}
