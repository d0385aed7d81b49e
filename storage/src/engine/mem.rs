//! A memory that behaves like a disk, and breaks on demand.
//!
//! A [`Disk`] outlives the engine that is opened on it, as a real one does: after [`Disk::cut_power`] the old engine
//! only fails, and a new one finds what was synced and, as chosen, a prefix of what was not.

use std::{
    collections::BTreeMap,
    io,
    ops::ControlFlow,
    path::{Path, PathBuf},
    sync::Arc,
};

use parking_lot::{Condvar, Mutex, MutexGuard};

use super::{Engine, Op, Pair, Space, View, Visit, WriteBatch};
use crate::Error;

type Tables = BTreeMap<Space, BTreeMap<Vec<u8>, Vec<u8>>>;

/// What goes wrong at a chosen write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The write fails and changes nothing.
    Io,
    /// The write fails because the disk is full.
    NoSpace,
    /// Power is lost before the write; all that was not synced is gone.
    PowerLoss,
}

/// Something that an engine is about to do, for a trap to look at.
#[derive(Debug, Clone, Copy)]
pub enum Step<'a> {
    /// A write; a mere sync is an empty batch.
    Write {
        /// What is written.
        batch: &'a WriteBatch,
        /// Whether it is synced.
        sync: bool,
    },
    /// A checkpoint.
    Checkpoint,
}

/// Which side of a step a trap cuts the power on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// The step is not done.
    Before,
    /// The step is done, and durable if it was to be; whoever asked for it never hears.
    After,
}

/// Says whether a step is the one to crash at.
type Trap = Box<dyn FnMut(&Step<'_>) -> bool + Send>;

/// The disk under a memory engine. Clones share it.
#[derive(Clone, Default)]
pub struct Disk {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    inner: Mutex<Inner>,
    resumed: Condvar,
}

#[derive(Default)]
struct Inner {
    durable: Tables,
    live: Tables,
    unsynced: Vec<WriteBatch>,
    /// Raised by each loss of power; an engine of an older life only fails.
    life: u64,
    opened: bool,
    writes: u64,
    faults: BTreeMap<u64, Fault>,
    full: bool,
    stalled: bool,
    checkpoints: BTreeMap<PathBuf, Tables>,
    trap: Option<(Moment, Trap)>,
    /// Disks of the same machine: they lose their power together.
    beside: Vec<Disk>,
}

impl Disk {
    /// An empty disk.
    pub fn new() -> Disk {
        Disk::default()
    }

    /// Starts an engine on this disk. **Errors:** [`Error::Locked`] while another one lives.
    pub fn open(&self) -> Result<Mem, Error> {
        let mut inner = self.shared.inner.lock();
        if inner.opened {
            return Err(Error::Locked { path: PathBuf::from("memory"), holder: String::new() });
        }
        inner.opened = true;
        inner.checkpoints.clear();
        Ok(Mem { disk: self.clone(), life: inner.life })
    }

    /// Cuts the power: of the unsynced batches only the first `keep` survive. Planned faults are forgotten.
    pub fn cut_power(&self, keep: usize) {
        self.shared.inner.lock().cut_power(keep);
        self.shared.resumed.notify_all();
    }

    /// Cuts the power of both disks at the first step on this one that `trap` names.
    pub fn set_trap(&self, moment: Moment, beside: &Disk, trap: impl FnMut(&Step<'_>) -> bool + Send + 'static) {
        let mut inner = self.shared.inner.lock();
        inner.trap = Some((moment, Box::new(trap)));
        inner.beside = vec![beside.clone()];
    }

    /// Whether a trap is still waiting.
    pub fn has_trap(&self) -> bool {
        self.shared.inner.lock().trap.is_some()
    }

    /// Takes an unsprung trap away.
    pub fn clear_trap(&self) {
        self.shared.inner.lock().trap = None;
    }

    /// Does a step of the engine of `life`, or crashes on one side of it.
    fn step(
        &self,
        mut inner: MutexGuard<'_, Inner>,
        life: u64,
        step: &Step<'_>,
        work: impl FnOnce(&mut Inner) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let sprung = inner.trap.as_mut().is_some_and(|(_, trap)| trap(step));
        let moment = if sprung { inner.trap.take().map(|(moment, _)| moment) } else { None };
        if moment != Some(Moment::Before) {
            work(&mut inner)?;
        }
        if moment.is_some() && inner.life == life {
            inner.cut_power(0);
            let beside = std::mem::take(&mut inner.beside);
            drop(inner);
            self.shared.resumed.notify_all();
            for disk in beside {
                disk.cut_power(0);
            }
            return Err(Error::Closed);
        }
        Ok(())
    }

    /// How many batches a loss of power could take.
    pub fn unsynced_batches(&self) -> usize {
        self.shared.inner.lock().unsynced.len()
    }

    /// Makes the `nth` write from now (1 is the next) go wrong.
    pub fn fail_write(&self, nth: u64, fault: Fault) {
        let mut inner = self.shared.inner.lock();
        let at = inner.writes + nth;
        inner.faults.insert(at, fault);
    }

    /// Refuses all writes for want of space, or accepts them again.
    pub fn set_full(&self, full: bool) {
        self.shared.inner.lock().full = full;
    }

    /// Lets synced writes hang, or go on.
    pub fn set_stalled(&self, stalled: bool) {
        self.shared.inner.lock().stalled = stalled;
        self.shared.resumed.notify_all();
    }

    /// Changes a stored value behind the engine's back, as a decaying disk does.
    pub fn corrupt(&self, space: Space, key: &[u8], change: impl Fn(&mut Vec<u8>)) {
        let mut inner = self.shared.inner.lock();
        let Inner { durable, live, .. } = &mut *inner;
        for tables in [durable, live] {
            if let Some(value) = tables.get_mut(&space).and_then(|table| table.get_mut(key)) {
                change(value);
            }
        }
    }
}

impl Inner {
    fn cut_power(&mut self, keep: usize) {
        let mut durable = std::mem::take(&mut self.durable);
        for batch in self.unsynced.drain(..).take(keep) {
            apply(&mut durable, &batch);
        }
        self.unsynced.clear();
        self.live = durable.clone();
        self.durable = durable;
        self.life += 1;
        self.opened = false;
        self.stalled = false;
        self.faults.clear();
    }

    fn sync(&mut self) {
        for batch in std::mem::take(&mut self.unsynced) {
            apply(&mut self.durable, &batch);
        }
    }
}

/// An engine in memory.
pub struct Mem {
    disk: Disk,
    life: u64,
}

impl Mem {
    /// An engine on a disk of its own, for tests that break nothing.
    pub fn new() -> Mem {
        Disk::new().open().expect("a new disk is not open")
    }

    fn with<R>(&self, use_it: impl FnOnce(&Inner) -> R) -> Result<R, Error> {
        let inner = self.disk.shared.inner.lock();
        if inner.life != self.life { Err(Error::Closed) } else { Ok(use_it(&inner)) }
    }
}

impl Default for Mem {
    fn default() -> Mem {
        Mem::new()
    }
}

impl Drop for Mem {
    fn drop(&mut self) {
        let mut inner = self.disk.shared.inner.lock();
        if inner.life == self.life {
            inner.opened = false;
        }
    }
}

impl View for Mem {
    fn read(&self, space: Space, key: &[u8]) -> Result<Option<Vec<u8>>, Error> {
        self.with(|inner| inner.live.get(&space).and_then(|table| table.get(key)).cloned())
    }

    fn iterate(&self, space: Space, from: &[u8], to: Option<&[u8]>, visit: &mut Visit<'_>) -> Result<(), Error> {
        let rows = self.with(|inner| range(&inner.live, space, from, to))?;
        walk(&rows, visit);
        Ok(())
    }

    fn last(&self, space: Space) -> Result<Option<Pair>, Error> {
        self.with(|inner| last_of(&inner.live, space))
    }
}

impl Engine for Mem {
    fn write(&self, batch: WriteBatch, sync: bool) -> Result<(), Error> {
        let path = || PathBuf::from("memory");
        let mut inner = self.disk.shared.inner.lock();
        while sync && inner.stalled && inner.life == self.life {
            self.disk.shared.resumed.wait(&mut inner);
        }
        if inner.life != self.life {
            return Err(Error::Closed);
        }
        inner.writes += 1;
        let at = inner.writes;
        match inner.faults.remove(&at) {
            Some(Fault::Io) => return Err(Error::io("write", path())(io::Error::other("injected"))),
            Some(Fault::NoSpace) => return Err(Error::NoSpace { path: path() }),
            Some(Fault::PowerLoss) => {
                inner.cut_power(0);
                return Err(Error::Closed);
            }
            None if inner.full => return Err(Error::NoSpace { path: path() }),
            None => {}
        }
        let step = Step::Write { batch: &batch, sync };
        self.disk.step(inner, self.life, &step, |inner| {
            apply(&mut inner.live, &batch);
            inner.unsynced.push(batch.clone());
            if sync {
                inner.sync();
            }
            Ok(())
        })
    }

    fn sync(&self) -> Result<(), Error> {
        self.write(WriteBatch::new(), true)
    }

    fn view(&self, with: &mut dyn FnMut(&dyn View) -> Result<(), Error>) -> Result<(), Error> {
        let moment = Frozen(self.with(|inner| inner.live.clone())?);
        with(&moment)
    }

    fn checkpoint(&self, dir: &Path) -> Result<(), Error> {
        let inner = self.disk.shared.inner.lock();
        if inner.life != self.life {
            return Err(Error::Closed);
        }
        self.disk.step(inner, self.life, &Step::Checkpoint, |inner| {
            if inner.checkpoints.contains_key(dir) {
                return Err(Error::io("make a checkpoint in", dir)(io::ErrorKind::AlreadyExists.into()));
            }
            let copy = inner.live.clone();
            inner.checkpoints.insert(dir.to_owned(), copy);
            Ok(())
        })
    }

    fn open_checkpoint(&self, dir: &Path) -> Result<Arc<dyn Engine>, Error> {
        let tables = self.with(|inner| inner.checkpoints.get(dir).cloned())?;
        let tables = tables.ok_or_else(|| Error::io("open the checkpoint", dir)(io::ErrorKind::NotFound.into()))?;
        let disk = Disk::new();
        {
            let mut inner = disk.shared.inner.lock();
            inner.live = tables.clone();
            inner.durable = tables;
            inner.full = true;
        }
        Ok(Arc::new(disk.open()?))
    }

    fn remove_checkpoint(&self, dir: &Path) -> Result<(), Error> {
        self.disk.shared.inner.lock().checkpoints.remove(dir);
        Ok(())
    }
}

struct Frozen(Tables);

impl View for Frozen {
    fn read(&self, space: Space, key: &[u8]) -> Result<Option<Vec<u8>>, Error> {
        Ok(self.0.get(&space).and_then(|table| table.get(key)).cloned())
    }

    fn iterate(&self, space: Space, from: &[u8], to: Option<&[u8]>, visit: &mut Visit<'_>) -> Result<(), Error> {
        walk(&range(&self.0, space, from, to), visit);
        Ok(())
    }

    fn last(&self, space: Space) -> Result<Option<Pair>, Error> {
        Ok(last_of(&self.0, space))
    }
}

fn apply(tables: &mut Tables, batch: &WriteBatch) {
    for op in batch.ops() {
        match op {
            Op::Put { space, key, value } => {
                tables.entry(space).or_default().insert(key.to_vec(), value.to_vec());
            }
            Op::Delete { space, key } => {
                tables.entry(space).or_default().remove(key);
            }
            Op::DeleteRange { space, from, to } => {
                tables.entry(space).or_default().retain(|key, _| key.as_slice() < from || key.as_slice() >= to);
            }
        }
    }
}

fn range(tables: &Tables, space: Space, from: &[u8], to: Option<&[u8]>) -> Vec<Pair> {
    let Some(table) = tables.get(&space) else { return Vec::new() };
    table
        .range(from.to_vec()..)
        .take_while(|(key, _)| to.is_none_or(|to| key.as_slice() < to))
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect()
}

fn walk(rows: &[Pair], visit: &mut Visit<'_>) {
    for (key, value) in rows {
        if let ControlFlow::Break(()) = visit(key, value) {
            return;
        }
    }
}

fn last_of(tables: &Tables, space: Space) -> Option<Pair> {
    let (key, value) = tables.get(&space)?.last_key_value()?;
    Some((key.clone(), value.clone()))
}
