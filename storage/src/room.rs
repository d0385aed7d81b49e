//! Room on the disks under the databases: how full they are, and the ballast that a full one is relieved of.
//!
//! A disk that is full takes a broker down, and a database that cannot write a byte cannot be opened either. So each
//! disk carries a file of zeros that is given up at the first write that found no room, for the restart to have some.

use std::{
    fs::{self, File, OpenOptions},
    io::Write,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use rustix::fs::{FallocateFlags, fallocate, statvfs};

use crate::{
    Error,
    dir::sync_dir,
    engine::{Engine, Pair, Space, View, Visit, WriteBatch},
};

/// A disk that is fuller takes no new writes.
pub const FULL_PERCENT: u64 = 95;
/// Bytes of ballast on each disk.
pub const BALLAST_BYTES: u64 = 256 << 20;
/// Ballast is only laid where the disk stays emptier than this.
const BALLAST_PERCENT_MAX: u64 = 90;
/// Ballast takes at most this part of a small disk.
const BALLAST_PART: u64 = 20;
const BALLAST_FILE: &str = "ballast";
static ZEROS: [u8; 1 << 16] = [0; 1 << 16];

/// How full a disk is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Usage {
    /// A directory on it.
    pub path: PathBuf,
    /// Used, of what its users may use; rounded up.
    pub percent: u64,
    /// What is left for its users, bytes.
    pub free_bytes: u64,
    /// Its size for its users, bytes.
    pub total_bytes: u64,
}

impl Usage {
    /// How full the disk of a directory is.
    pub fn of(path: &Path) -> Result<Usage, Error> {
        let stat = statvfs(path).map_err(|errno| Error::io("measure the disk of", path)(errno.into()))?;
        let used = stat.f_blocks.saturating_sub(stat.f_bfree);
        let total = (used + stat.f_bavail).max(1);
        Ok(Usage {
            path: path.to_owned(),
            percent: (used * 100).div_ceil(total),
            free_bytes: stat.f_bavail * stat.f_frsize,
            total_bytes: total * stat.f_frsize,
        })
    }

    /// Whether new writes are refused.
    pub fn is_full(&self) -> bool {
        self.percent >= FULL_PERCENT
    }
}

/// The disks of some directories, each once.
pub struct Room {
    dirs: Vec<PathBuf>,
    ballast_bytes: u64,
    ran_out: AtomicBool,
}

impl Room {
    /// Looks after the disks of these directories; those that share a disk share one ballast, in the first of them.
    pub fn new(dirs: &[&Path], ballast_bytes: u64) -> Result<Room, Error> {
        let mut disks = Vec::new();
        let mut room = Room { dirs: Vec::new(), ballast_bytes, ran_out: AtomicBool::new(false) };
        for dir in dirs {
            let disk = fs::metadata(dir).map_err(Error::io("read", *dir))?.dev();
            if !disks.contains(&disk) {
                disks.push(disk);
                room.dirs.push((*dir).to_owned());
            }
        }
        Ok(room)
    }

    /// Lays ballast on each disk that has room for it and none yet; says where there is none.
    ///
    /// **Durability:** none needed: what a crash leaves is completed at the next start.
    pub fn lay_ballast(&self) -> Result<(), Error> {
        for dir in &self.dirs {
            let usage = Usage::of(dir)?;
            let bytes = self.ballast_bytes.min(usage.total_bytes / BALLAST_PART);
            let path = dir.join(BALLAST_FILE);
            let there = fs::metadata(&path).map_or(0, |found| found.len());
            let missing = bytes.saturating_sub(there);
            if missing == 0 {
                continue;
            }
            let used_after = (usage.total_bytes - usage.free_bytes).saturating_add(missing);
            if used_after * 100 >= usage.total_bytes * BALLAST_PERCENT_MAX {
                tracing::warn!(path = %dir.display(), percent = usage.percent, "no room for ballast on this disk");
                continue;
            }
            lay(&path, bytes)?;
        }
        Ok(())
    }

    /// Gives the ballast up; whether there was any.
    pub fn release_ballast(&self) -> bool {
        let mut released = false;
        for dir in &self.dirs {
            match fs::remove_file(dir.join(BALLAST_FILE)) {
                Ok(()) => {
                    released = true;
                    tracing::warn!(path = %dir.display(), "the disk is full; its ballast was given up");
                    if let Err(error) = sync_dir(dir) {
                        tracing::warn!(%error, "the ballast may come back after a loss of power");
                    }
                }
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => tracing::warn!(%error, path = %dir.display(), "the ballast cannot be given up"),
            }
        }
        released
    }

    /// Whether a write has found no room.
    pub fn ran_out(&self) -> bool {
        self.ran_out.load(Ordering::Acquire)
    }

    /// The disk that is fullest.
    pub fn fullest(&self) -> Result<Usage, Error> {
        let mut fullest: Option<Usage> = None;
        for dir in &self.dirs {
            let usage = Usage::of(dir)?;
            if fullest.as_ref().is_none_or(|most| most.percent < usage.percent) {
                fullest = Some(usage);
            }
        }
        fullest.ok_or(Error::Closed)
    }
}

/// An engine that gives the ballast up when it finds no room.
pub struct Roomy {
    engine: Arc<dyn Engine>,
    room: Arc<Room>,
}

impl Roomy {
    /// Over another engine.
    pub fn shared(engine: Arc<dyn Engine>, room: &Arc<Room>) -> Arc<dyn Engine> {
        Arc::new(Roomy { engine, room: room.clone() })
    }

    fn noticed<T>(&self, result: Result<T, Error>) -> Result<T, Error> {
        if result.as_ref().is_err_and(Error::is_no_space) && !self.room.ran_out.swap(true, Ordering::AcqRel) {
            self.room.release_ballast();
        }
        result
    }
}

impl View for Roomy {
    fn read(&self, space: Space, key: &[u8]) -> Result<Option<Vec<u8>>, Error> {
        self.engine.read(space, key)
    }

    fn iterate(&self, space: Space, from: &[u8], to: Option<&[u8]>, visit: &mut Visit<'_>) -> Result<(), Error> {
        self.engine.iterate(space, from, to, visit)
    }

    fn last(&self, space: Space) -> Result<Option<Pair>, Error> {
        self.engine.last(space)
    }
}

impl Engine for Roomy {
    fn write(&self, batch: WriteBatch, sync: bool) -> Result<(), Error> {
        self.noticed(self.engine.write(batch, sync))
    }

    fn sync(&self) -> Result<(), Error> {
        self.noticed(self.engine.sync())
    }

    fn view(&self, with: &mut dyn FnMut(&dyn View) -> Result<(), Error>) -> Result<(), Error> {
        self.engine.view(with)
    }

    fn checkpoint(&self, dir: &Path) -> Result<(), Error> {
        self.noticed(self.engine.checkpoint(dir))
    }

    fn open_checkpoint(&self, dir: &Path) -> Result<Arc<dyn Engine>, Error> {
        self.engine.open_checkpoint(dir)
    }

    fn remove_checkpoint(&self, dir: &Path) -> Result<(), Error> {
        self.engine.remove_checkpoint(dir)
    }
}

fn lay(path: &Path, bytes: u64) -> Result<(), Error> {
    let open = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path);
    let mut file = open.map_err(Error::io("create", path))?;
    match fallocate(&file, FallocateFlags::empty(), 0, bytes) {
        Ok(()) => Ok(()),
        // A file system that cannot reserve: the zeros are written.
        Err(rustix::io::Errno::OPNOTSUPP) => fill(&mut file, bytes).map_err(Error::io("write", path)),
        Err(errno) => Err(Error::io("reserve", path)(errno.into())),
    }
}

fn fill(file: &mut File, bytes: u64) -> std::io::Result<()> {
    let mut left = bytes;
    while left > 0 {
        let part = left.min(ZEROS.len() as u64);
        file.write_all(&ZEROS[..part as usize])?;
        left -= part;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ballast_is_laid_once_for_each_disk_and_given_up_once() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let (log, state) = (dir.path().join("log"), dir.path().join("state"));
        fs::create_dir(&log).expect("creates");
        fs::create_dir(&state).expect("creates");
        let room = Room::new(&[&log, &state], 1 << 20).expect("measures");
        room.lay_ballast().expect("lays");
        room.lay_ballast().expect("what is there is enough");
        assert_eq!(fs::metadata(log.join(BALLAST_FILE)).expect("there").len(), 1 << 20);
        assert!(fs::metadata(log.join(BALLAST_FILE)).expect("there").blocks() * 512 >= 1 << 20, "it takes its room");
        assert!(!state.join(BALLAST_FILE).exists(), "one disk, one ballast");
        assert!(room.release_ballast());
        assert!(!log.join(BALLAST_FILE).exists());
        assert!(!room.release_ballast(), "there was none any more");
    }

    #[test]
    fn the_first_write_that_finds_no_room_gives_the_ballast_up() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let room = Arc::new(Room::new(&[dir.path()], 1 << 20).expect("measures"));
        room.lay_ballast().expect("lays");
        let disk = crate::engine::mem::Disk::new();
        let engine = Roomy::shared(Arc::new(disk.open().expect("free")), &room);
        engine.write(WriteBatch::new(), true).expect("there is room");
        assert!(dir.path().join(BALLAST_FILE).exists() && !room.ran_out());
        disk.set_full(true);
        engine.write(WriteBatch::new(), true).expect_err("no room");
        assert!(!dir.path().join(BALLAST_FILE).exists() && room.ran_out());
    }

    #[test]
    fn ballast_that_a_crash_left_half_laid_is_completed() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        fs::write(dir.path().join(BALLAST_FILE), [0; 100]).expect("writes");
        Room::new(&[dir.path()], 1 << 20).expect("measures").lay_ballast().expect("lays");
        assert_eq!(fs::metadata(dir.path().join(BALLAST_FILE)).expect("there").len(), 1 << 20);
    }

    #[test]
    fn a_disk_is_full_from_its_last_twentieth_on() {
        let usage = |percent| Usage { path: PathBuf::new(), percent, free_bytes: 1, total_bytes: 100 };
        assert!(!usage(FULL_PERCENT - 1).is_full());
        assert!(usage(FULL_PERCENT).is_full());
        let here = Usage::of(&std::env::temp_dir()).expect("measures");
        assert!((1..=100).contains(&here.percent) && here.free_bytes < here.total_bytes, "{here:?}");
    }
}
