//! The consensus library's own suite for stores.

use std::sync::Arc;

use openraft::StorageError;
use openraft::testing::log::{StoreBuilder, Suite};
use selvedge_cluster::store::{self, LogStore, Machine, TypeConfig};
use selvedge_storage::engine::{Engine, mem::Mem, rocks::Rocks};
use tempfile::TempDir;

#[derive(Clone, Copy)]
enum Kind {
    Rocks,
    Mem,
}

struct Builder(Kind);

impl StoreBuilder<TypeConfig, LogStore, Machine, TempDir> for Builder {
    async fn build(&self) -> Result<(TempDir, LogStore, Machine), StorageError<TypeConfig>> {
        let dir = TempDir::new().unwrap();
        let (log, state): (Arc<dyn Engine>, Arc<dyn Engine>) = match self.0 {
            Kind::Rocks => (
                Arc::new(Rocks::open_log(&dir.path().join("log")).unwrap()),
                Arc::new(Rocks::open_state(&dir.path().join("state")).unwrap()),
            ),
            Kind::Mem => (Arc::new(Mem::new()), Arc::new(Mem::new())),
        };
        let (log, machine) = store::open(log, state, dir.path().join("snapshots")).await.unwrap();
        Ok((dir, log, machine))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_suite_passes_on_rocksdb() {
    Suite::test_all(Builder(Kind::Rocks)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_suite_passes_on_memory() {
    Suite::test_all(Builder(Kind::Mem)).await.unwrap();
}
