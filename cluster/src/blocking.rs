//! How work that blocks is run.

use std::io;
use std::sync::Arc;

use selvedge_storage::engine::Engine;
use selvedge_storage::log::{Driver, Log};

/// How work that blocks is run. A simulation has one thread and its own time: nothing may happen beside them.
#[derive(Clone)]
pub enum Blocking {
    /// On threads beside the runtime's own; the log has one for itself.
    Threads,
    /// At once, by whoever wants it done. The log's writes are made by whoever this gives its driver to.
    Inline(Arc<dyn Fn(Driver) + Send + Sync>),
}

/// The work panicked, or the runtime is shutting down.
#[derive(Debug)]
pub(crate) struct Abandoned;

impl Blocking {
    pub(crate) async fn call<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Abandoned> {
        match self {
            Self::Threads => tokio::task::spawn_blocking(work).await.map_err(|_| Abandoned),
            Self::Inline(_) => Ok(work()),
        }
    }

    /// [`Blocking::call`] for work that may fail by itself.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let abandoned = |_| io::Error::other("the work panicked or the runtime is shutting down");
        self.call(work).await.map_err(abandoned)?
    }

    /// Opens Raft's log.
    pub(crate) async fn open_log(&self, engine: Arc<dyn Engine>) -> io::Result<Result<Log, selvedge_storage::Error>> {
        match self {
            Self::Threads => self.run(move || Ok(Log::open(engine))).await,
            Self::Inline(drive) => Ok(Log::open_driven(engine).map(|(log, driver)| {
                drive(driver);
                log
            })),
        }
    }
}
