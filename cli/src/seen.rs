//! Where the log stood after the newest change that was made from here: what is read later, from whichever broker, is
//! no older.
//!
//! Kept in `positions/PIN` beside the contexts, since it belongs to the cluster and to no endpoint of it.

use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use selvedge_domain::Id;
use selvedge_proto::identity::Pin;
use selvedge_proto::private_file;

use crate::context;

const DIR: &str = "positions";

/// The position that this user has seen in one cluster. Clones share it.
#[derive(Clone)]
pub struct Seen {
    /// None where no settings are kept.
    path: Option<PathBuf>,
    at: Arc<Mutex<Option<Id>>>,
}

impl Seen {
    /// What was kept for the cluster with this pin.
    pub fn of(pin: Pin) -> Self {
        let path = context::home().ok().map(|home| home.join(DIR).join(pin.to_string()));
        let kept = Self::read(path.as_ref());
        Self { path, at: Arc::new(Mutex::new(kept)) }
    }

    /// The position.
    pub fn position(&self) -> Option<Id> {
        *self.at.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps the position of a change, unless a later one is known.
    pub fn note(&self, position: Id) {
        let mut at = self.at.lock().unwrap_or_else(PoisonError::into_inner);
        // Another process may have been further meanwhile.
        let kept = Self::read(self.path.as_ref());
        let newest = (*at).max(kept).max(Some(position));
        *at = newest;
        if let (Some(path), Some(newest)) = (&self.path, newest)
            && kept != Some(newest)
            && let Err(error) = Self::write(path, newest)
        {
            tracing::warn!(%error, "cannot keep the position of this change: a later read elsewhere may be older");
        }
    }

    /// Forgets it: the cluster was restored and counts in another epoch.
    pub fn forget(&self) {
        *self.at.lock().unwrap_or_else(PoisonError::into_inner) = None;
        if let Some(path) = &self.path {
            // It may not be there.
            let _ = std::fs::remove_file(path);
        }
    }

    fn read(path: Option<&PathBuf>) -> Option<Id> {
        std::fs::read_to_string(path?).ok()?.trim().parse().ok()
    }

    fn write(path: &Path, position: Id) -> std::io::Result<()> {
        if let Some(dir) = path.parent() {
            std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        }
        private_file::replace(path, position.to_string().as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_position_is_kept_and_a_forgotten_one_is_not() {
        let dir = tempfile::TempDir::new().unwrap();
        let path = dir.path().join(DIR).join("pin");
        let seen = Seen { path: Some(path.clone()), at: Arc::default() };
        seen.note(Id::new(1, 7));
        seen.note(Id::new(1, 5));
        assert_eq!((seen.position(), Seen::read(Some(&path))), (Some(Id::new(1, 7)), Some(Id::new(1, 7))));
        let other = Seen { path: Some(path.clone()), at: Arc::default() };
        other.note(Id::new(1, 9));
        seen.note(Id::new(1, 8));
        assert_eq!(Seen::read(Some(&path)), Some(Id::new(1, 9)), "another process was further");
        seen.forget();
        assert_eq!((seen.position(), Seen::read(Some(&path))), (None, None));
    }
}
