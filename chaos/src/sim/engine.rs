//! An engine with a planted bug.

use std::path::Path;
use std::sync::Arc;

use selvedge_storage::Error;
use selvedge_storage::engine::{Engine, Pair, Space, View, Visit, WriteBatch};

/// Says that it has synced, and has not.
pub(super) struct Forgetful(pub(super) Arc<dyn Engine>);

impl View for Forgetful {
    fn read(&self, space: Space, key: &[u8]) -> Result<Option<Vec<u8>>, Error> {
        self.0.read(space, key)
    }

    fn iterate(&self, space: Space, from: &[u8], to: Option<&[u8]>, visit: &mut Visit<'_>) -> Result<(), Error> {
        self.0.iterate(space, from, to, visit)
    }

    fn last(&self, space: Space) -> Result<Option<Pair>, Error> {
        self.0.last(space)
    }
}

impl Engine for Forgetful {
    fn write(&self, batch: WriteBatch, _sync: bool) -> Result<(), Error> {
        self.0.write(batch, false)
    }

    fn sync(&self) -> Result<(), Error> {
        Ok(())
    }

    fn view(&self, with: &mut dyn FnMut(&dyn View) -> Result<(), Error>) -> Result<(), Error> {
        self.0.view(with)
    }

    fn checkpoint(&self, dir: &Path) -> Result<(), Error> {
        self.0.checkpoint(dir)
    }

    fn remove_checkpoint(&self, dir: &Path) -> Result<(), Error> {
        self.0.remove_checkpoint(dir)
    }

    fn open_checkpoint(&self, dir: &Path) -> Result<Arc<dyn Engine>, Error> {
        self.0.open_checkpoint(dir)
    }
}
