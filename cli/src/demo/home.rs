//! The demo's private directory, and the lock by which a second demo finds the first.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Seek as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use rustix::fs::FlockOperation;

/// The directory of one run; gone when this is dropped, unless it is to be kept.
pub struct Home {
    dir: PathBuf,
    /// Held for as long as the directory is in use, so that a later run can tell it from one that was left behind.
    _in_use: File,
    lock: Option<(PathBuf, File)>,
    keep: bool,
}

impl Home {
    /// Makes the directory, after removing those that killed runs of this user left behind. With `only_one`, takes the
    /// user's lock too. With `keep`, the directory stays.
    ///
    /// **Errors** when another demo of this user runs.
    pub fn make(only_one: bool, keep: bool) -> anyhow::Result<Self> {
        remove_left_behind();
        let lock = only_one.then(take_lock).transpose()?;
        let prefix = if keep { format!("kept-{}", dir_prefix()) } else { dir_prefix() };
        let dir = std::env::temp_dir().join(format!("{prefix}{:08x}", rand::random::<u32>()));
        std::fs::DirBuilder::new()
            .mode(0o700)
            .create(&dir)
            .with_context(|| format!("cannot make `{}`", dir.display()))?;
        let in_use =
            OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(dir.join("in-use"))?;
        rustix::fs::flock(&in_use, FlockOperation::NonBlockingLockExclusive)?;
        let mut home = Self { dir, _in_use: in_use, lock, keep };
        if let Some((_, file)) = &mut home.lock {
            file.set_len(0)?;
            file.rewind()?;
            writeln!(file, "{}", home.dir.display())?;
        }
        Ok(home)
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where the demo listens for `selvedge demo kill` and its like.
    pub fn control(&self) -> PathBuf {
        control(&self.dir)
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        // A process that was just killed may still be writing its last file: once more, then.
        for _ in 0..20 {
            if self.keep || std::fs::remove_dir_all(&self.dir).is_ok() || !self.dir.exists() {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        if let Some((path, _)) = &self.lock {
            // Removed while it is held: who opened it before finds that it is no longer the file of that name.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// The directory of this user's demo that runs now.
pub fn running() -> Option<PathBuf> {
    let mut file = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW).open(lock_path()).ok()?;
    if file.metadata().ok()?.uid() != uid() || rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared).is_ok() {
        return None;
    }
    let mut text = String::new();
    file.read_to_string(&mut text).ok()?;
    let dir = PathBuf::from(text.trim_end());
    dir.is_dir().then_some(dir)
}

/// The control socket of the demo in `dir`.
pub fn control(dir: &Path) -> PathBuf {
    dir.join("control.sock")
}

fn take_lock() -> anyhow::Result<(PathBuf, File)> {
    let path = lock_path();
    loop {
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&path)
            .with_context(|| format!("cannot open the lock `{}`", path.display()))?;
        if rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            let place = running().map_or_else(String::new, |dir| format!(", its data is in `{}`", dir.display()));
            bail!(
                "a demo of yours runs already{place}\n  \
                 see it:    selvedge demo status\n  \
                 break it:  selvedge demo kill frankfurt\n  \
                 end it:    Ctrl-C where it runs"
            );
        }
        // Whoever held it may have removed it between the two calls above.
        let same =
            std::fs::metadata(&path).is_ok_and(|there| file.metadata().is_ok_and(|held| held.ino() == there.ino()));
        if same {
            return Ok((path, file));
        }
    }
}

fn remove_left_behind() {
    let Ok(entries) = std::fs::read_dir(std::env::temp_dir()) else { return };
    for entry in entries.flatten() {
        let ours = entry.file_name().to_str().is_some_and(|name| name.starts_with(&dir_prefix()))
            && entry.metadata().is_ok_and(|meta| meta.is_dir() && meta.uid() == uid());
        if !ours {
            continue;
        }
        let Ok(file) = File::open(entry.path().join("in-use")) else { continue };
        if rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

fn lock_path() -> PathBuf {
    std::env::temp_dir().join(format!("selvedge-demo-{}.lock", uid()))
}

fn dir_prefix() -> String {
    format!("selvedge-demo-{}-", uid())
}

fn uid() -> u32 {
    rustix::process::getuid().as_raw()
}
