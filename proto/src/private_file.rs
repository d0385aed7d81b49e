//! Files that hold a key, a token or a secret: only their owner may read them, and they are there whole or not at all.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

/// Writes a file with mode 0600, in place of the one that is there.
///
/// **Durability**: written beside `path`, synced, then renamed over it, and the directory synced: after a crash either
/// the old file or the new one is there.
/// **Errors**: the file system's.
pub fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    write(path, bytes, |beside| fs::rename(beside, path))
}

/// Writes a file with mode 0600 where there is none.
///
/// **Durability**: as [`replace`].
/// **Errors**: [`io::ErrorKind::AlreadyExists`] when there is one, which is left as it is; the file system's.
pub fn create(path: &Path, bytes: &[u8]) -> io::Result<()> {
    // A link fails where a rename would replace.
    write(path, bytes, |beside| {
        let linked = fs::hard_link(beside, path);
        fs::remove_file(beside)?;
        linked
    })
}

fn write(path: &Path, bytes: &[u8], put: impl FnOnce(&Path) -> io::Result<()>) -> io::Result<()> {
    // Nobody else in this process writes under the same name, and no other living process has this id.
    static WRITES: AtomicU64 = AtomicU64::new(0);
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut beside = name.to_owned();
    beside.push(format!(".{}-{}.new", std::process::id(), WRITES.fetch_add(1, Ordering::Relaxed)));
    let beside = directory.join(beside);
    // What a crashed process of the same id left may have another mode or be a link.
    match fs::remove_file(&beside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let written = || {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&beside)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        put(&beside)?;
        File::open(directory)?.sync_all()
    };
    written().inspect_err(|_| {
        // What is left of the attempt holds a secret; most often nothing is.
        let _ = fs::remove_file(&beside);
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn a_file_is_replaced_whole_and_is_its_owners_alone() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("key.pem");
        fs::write(&path, "old and longer").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        replace(&path, b"new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(names(temp.path()), ["key.pem"], "nothing is left beside it");
    }

    #[test]
    fn a_link_is_replaced_and_not_followed() {
        let temp = tempfile::tempdir().unwrap();
        let (path, elsewhere) = (temp.path().join("key.pem"), temp.path().join("elsewhere"));
        fs::write(&elsewhere, "untouched").unwrap();
        symlink(&elsewhere, &path).unwrap();
        replace(&path, b"new").unwrap();
        assert_eq!(fs::read(&elsewhere).unwrap(), b"untouched");
        assert_eq!(fs::read(&path).unwrap(), b"new");
    }

    #[test]
    fn what_may_not_be_replaced_stays_and_no_attempt_leaves_its_secret_behind() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("seal.key");
        create(&path, b"first").unwrap();
        assert_eq!(create(&path, b"second").unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(fs::read(&path).unwrap(), b"first");
        let directory = temp.path().join("a directory");
        fs::create_dir(&directory).unwrap();
        fs::write(directory.join("full"), "").unwrap();
        replace(&directory, b"secret").unwrap_err();
        let mut left = names(temp.path());
        left.sort();
        assert_eq!(left, ["a directory", "seal.key"]);
    }
}
