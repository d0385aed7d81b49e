//! The disks' watchdog: what is done about one that does not answer, and about one that is nearly full.
//!
//! A leader whose disk hangs still sends heartbeats, so that nobody else would lead. Here its writes are refused, it
//! hands leadership over, falls silent, and at last stops.

use std::sync::Arc;
use std::time::Duration;

use crate::core::{Core, NoWrites};
use crate::error::Fatal;
use crate::membership;
use crate::metrics::{DISK_USED_PERCENT, DISK_WAITING_SECONDS};

const INTERVAL: Duration = Duration::from_millis(250);
const MEASURE_INTERVAL: Duration = Duration::from_secs(1);
/// Between two attempts of a leader without room to hand leadership over.
const HAND_OVER_INTERVAL: Duration = Duration::from_secs(5);
/// While a write of log or state is older, new ones are refused, and a leader hands over.
pub const DISK_STALL_TRANSFER_MS: u64 = 2_000;
/// A little later it stops its heartbeats, so that another is elected.
pub const DISK_STALL_SILENT_MS: u64 = 2_500;
/// And any broker stops.
pub const DISK_STALL_FATAL_MS: u64 = 5_000;

/// Watches for writes that do not come back.
pub(crate) async fn watch_writes(core: Arc<Core>) {
    let mut silent = false;
    let mut stalled = false;
    while core.pause(INTERVAL).await.is_ok() {
        let log = ("log", core.log.log().oldest_unsynced_ms());
        let state = ("state", core.store.oldest_write_ms());
        let (what, waiting_ms) = if log.1 >= state.1 { log } else { state };
        ::metrics::gauge!(DISK_WAITING_SECONDS).set(waiting_ms as f64 / 1_000.0);
        if waiting_ms >= DISK_STALL_FATAL_MS {
            core.fail(Fatal::DiskStalled { what, waiting_ms });
            return;
        }
        if waiting_ms >= DISK_STALL_SILENT_MS && !silent {
            silent = true;
            core.raft.runtime_config().heartbeat(false);
        } else if waiting_ms == 0 && silent {
            silent = false;
            core.raft.runtime_config().heartbeat(true);
        }
        if waiting_ms < DISK_STALL_TRANSFER_MS {
            if std::mem::take(&mut stalled) {
                core.reopen_to_writes(NoWrites::Stalled);
            }
        } else if !stalled {
            stalled = true;
            tracing::warn!(code = "SE0112", what, waiting_ms, "a disk is slow");
            core.close_to_writes(NoWrites::Stalled);
            if let Err(error) = membership::transfer(&core, None).await {
                tracing::warn!(%error, "leadership cannot be handed over");
            }
        }
    }
}

/// Watches how full the disks are.
pub(crate) async fn watch_room(core: Arc<Core>) {
    let Some(room) = core.room.clone() else { return };
    let mut handed_over = None::<tokio::time::Instant>;
    let mut full = false;
    loop {
        let measured = room.clone();
        match core.blocking.run(move || measured.fullest().map_err(std::io::Error::other)).await {
            Ok(usage) => {
                ::metrics::gauge!(DISK_USED_PERCENT).set(usage.percent as f64);
                if usage.is_full() && !full {
                    let path = usage.path.display();
                    tracing::warn!(code = "SE0110", %path, percent = usage.percent, "a disk is nearly full; writes are refused");
                    core.close_to_writes(NoWrites::NoRoom);
                } else if !usage.is_full() && full {
                    tracing::info!(percent = usage.percent, "there is room again");
                    core.reopen_to_writes(NoWrites::NoRoom);
                }
                full = usage.is_full();
            }
            Err(error) => tracing::warn!(%error, "the disks cannot be measured"),
        }
        if full && core.leads() && handed_over.is_none_or(|at| at.elapsed() >= HAND_OVER_INTERVAL) {
            handed_over = Some(tokio::time::Instant::now());
            let roomy = core.reports.lock().roomy(&core.voters());
            if let Some(to) = roomy
                && let Err(error) = membership::transfer(&core, Some(to)).await
            {
                tracing::warn!(%error, "leadership cannot be handed over");
            }
        }
        if core.pause(MEASURE_INTERVAL).await.is_err() {
            return;
        }
    }
}

impl Core {
    /// Refuses new writes; a disk that does not answer comes before one that is full.
    fn close_to_writes(&self, why: NoWrites) {
        let mut closed = self.closed_to_writes.lock();
        if *closed != Some(NoWrites::Stalled) {
            *closed = Some(why);
        }
    }

    /// Takes new writes again, unless they are refused for another reason.
    fn reopen_to_writes(&self, why: NoWrites) {
        let mut closed = self.closed_to_writes.lock();
        if *closed == Some(why) {
            *closed = None;
        }
    }

    /// What a stop of Raft is to an operator.
    pub(crate) fn why_raft_stopped(&self, error: &impl std::fmt::Display) -> Fatal {
        if self.room.as_ref().is_some_and(|room| room.ran_out()) {
            Fatal::NoSpace(error.to_string())
        } else {
            Fatal::Raft(error.to_string())
        }
    }
}
