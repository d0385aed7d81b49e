//! What all parts of this crate share.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use openraft::async_runtime::WatchReceiver as _;
use parking_lot::Mutex;
use selvedge_domain::{Id, State, limits, rows};
use selvedge_proto::peer::peer_client::PeerClient;
use selvedge_storage::DataDir;
use selvedge_storage::room::Room;
use selvedge_storage::state::StateStore;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::acquaintance::Acquaintances;
use crate::blocking::Blocking;
use crate::clock::Clock;
use crate::config::LogLimits;
use crate::dial::{Dialer, PeerChannel, Purpose};
use crate::enforce::Reports;
use crate::error::{Error, Fatal};
use crate::leader::{Holders, PeerClocks, Pending};
use crate::lease::{Lease, surely_over_ms};
use crate::log_store::LogStore;
use crate::network::MESSAGE_BYTES_MAX;
use crate::propose::Sessions;
use crate::propose_stream::Streams;
use crate::published::Published;
use crate::raft_types::{Raft, TypeConfig};
use crate::read::Rounds;

pub(crate) struct Core {
    pub(crate) node: u64,
    pub(crate) boot: u64,
    pub(crate) cluster_id: [u8; 16],
    pub(crate) limits: LogLimits,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) blocking: Blocking,
    pub(crate) raft: Raft,
    pub(crate) acquaintances: Acquaintances,
    /// The disks, where there are any.
    pub(crate) room: Option<Arc<Room>>,
    /// Why this broker takes no new writes.
    pub(crate) closed_to_writes: Mutex<Option<NoWrites>>,
    pub(crate) log: LogStore,
    pub(crate) store: Arc<StateStore>,
    pub(crate) dialer: Dialer,
    pub(crate) published: Arc<Published>,
    pub(crate) lease: Arc<Lease>,
    /// Index after the last entry enforced; the freshness lease follows it.
    pub(crate) enforced: watch::Sender<u64>,
    /// What counts as enforced for others: confirmed from afar too, so never ahead of it.
    pub(crate) confirmed: watch::Sender<Id>,
    pub(crate) reports: Mutex<Reports>,
    /// Counts reports received.
    pub(crate) reported: watch::Sender<u64>,
    pub(crate) holders: Mutex<Holders>,
    pub(crate) clocks: Mutex<PeerClocks>,
    pub(crate) sessions: Sessions,
    /// Proposals on their way to the leader.
    pub(crate) streams: Streams,
    pub(crate) rounds: Rounds,
    /// Commands that this broker, if it leads, puts into entries.
    pub(crate) queue: mpsc::Sender<Pending>,
    /// Held while this broker, as the leader, changes the membership: one change at a time.
    pub(crate) changing: tokio::sync::Mutex<()>,
    /// When nodes were last seen as members, boottime in milliseconds.
    pub(crate) seen: Mutex<BTreeMap<u64, u64>>,
    /// The longest lease that may still run somewhere, and until when it counts (boottime, milliseconds).
    pub(crate) longest_lease: Mutex<(u64, u64)>,
    pub(crate) started_ms: u64,
    /// From then on a lease is given, boottime in milliseconds: those of the epoch before this one are over.
    pub(crate) leases_from_ms: u64,
    /// It will stop once it has handed leadership over.
    pub(crate) leaving: AtomicBool,
    pub(crate) fatal: watch::Sender<Option<Fatal>>,
    pub(crate) stop: CancellationToken,
    pub(crate) tasks: TaskTracker,
    /// Locked while this lives.
    pub(crate) dir: Arc<DataDir>,
}

/// How long a leader that must stop waits for another.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(2);

/// Why a broker takes no new writes for the time being.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NoWrites {
    /// A disk is nearly full.
    NoRoom,
    /// A disk does not answer.
    Stalled,
}

/// This broker is stopping.
pub(crate) struct Stopping;

impl Core {
    pub(crate) fn metrics(&self) -> openraft::RaftMetrics<TypeConfig> {
        self.raft.metrics().borrow_watched().clone()
    }

    pub(crate) fn leader(&self) -> Option<u64> {
        self.raft.server_metrics().borrow_watched().current_leader
    }

    pub(crate) fn leads(&self) -> bool {
        self.raft.is_leader()
    }

    /// Voters and learners.
    pub(crate) fn members(&self) -> Vec<u64> {
        let metrics = self.raft.server_metrics();
        let metrics = metrics.borrow_watched();
        metrics.membership_config.membership().nodes().map(|(node, _)| *node).collect()
    }

    pub(crate) fn voters(&self) -> Vec<u64> {
        let metrics = self.raft.server_metrics();
        let metrics = metrics.borrow_watched();
        metrics.membership_config.membership().voter_ids().collect()
    }

    /// Members, and who was one so recently that it may hold a lease.
    pub(crate) fn counted(&self) -> Vec<u64> {
        let now_ms = self.clock.boottime_ms();
        let over_ms = surely_over_ms(self.longest_lease_ms());
        let mut seen = self.seen.lock();
        for node in self.members() {
            seen.insert(node, now_ms);
        }
        seen.retain(|_, at_ms| now_ms < *at_ms + over_ms);
        let mut counted: Vec<u64> = seen.keys().copied().collect();
        drop(seen);
        if now_ms < self.started_ms + over_ms {
            // What happened before this process started is not known: who is in the registry may have been a member.
            counted.extend(self.published.state().rows::<rows::Broker>().map(|broker| broker.node));
            counted.sort_unstable();
            counted.dedup();
        }
        counted
    }

    /// The freshness lease in force, milliseconds.
    pub(crate) fn lease_ms(&self) -> u64 {
        self.published.state().cluster().map_or(limits::LEASE_MS_DEFAULT, |cluster| cluster.lease_ms)
    }

    /// The longest lease that anyone may still hold: when it was lowered, the old one counts for as long as it lasts.
    pub(crate) fn longest_lease_ms(&self) -> u64 {
        let (lease_ms, now_ms) = (self.lease_ms(), self.clock.boottime_ms());
        let mut longest = self.longest_lease.lock();
        if lease_ms >= longest.0 || now_ms >= longest.1 {
            longest.0 = lease_ms;
        }
        if longest.0 == lease_ms {
            // Brokers that are behind go on with it until they learn of a change, twice over.
            longest.1 = now_ms + 2 * surely_over_ms(lease_ms);
        }
        longest.0
    }

    pub(crate) fn peer_client(&self, node: u64, purpose: Purpose) -> PeerClient<PeerChannel> {
        PeerClient::new(self.dialer.channel(node, purpose))
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX)
    }

    /// Whether leases of the epoch before this one may still run somewhere.
    pub(crate) fn waits(&self) -> bool {
        self.clock.boottime_ms() < self.leases_from_ms
    }

    /// Notes that they do not.
    pub(crate) async fn has_waited(&self) -> std::io::Result<()> {
        let dir = self.dir.clone();
        self.blocking.run(move || crate::restore::has_waited(dir.path())).await
    }

    /// Waits until this broker has applied a position.
    pub(crate) async fn wait_applied(&self, position: Id) -> Result<Arc<State>, Error> {
        let mut states = self.published.subscribe();
        loop {
            let state = states.borrow_and_update().clone();
            if state.position() >= position {
                return Ok(state);
            }
            tokio::select! {
                changed = states.changed() => changed.map_err(|_| Error::Unavailable)?,
                () = self.stop.cancelled() => return Err(Error::Unavailable),
            }
        }
    }

    /// Waits for a while, or until this broker stops.
    pub(crate) async fn pause(&self, time: Duration) -> Result<(), Stopping> {
        tokio::select! {
            () = self.stop.cancelled() => Err(Stopping),
            () = tokio::time::sleep(time) => Ok(()),
        }
    }

    /// Says that this broker must stop, once it has handed leadership over if it has it.
    pub(crate) fn fail_after_transfer(self: &Arc<Self>, fatal: Fatal) {
        if self.leaving.swap(true, Ordering::AcqRel) {
            return;
        }
        let core = self.clone();
        self.tasks.spawn(async move {
            if core.leads() {
                tracing::error!(code = fatal.code(), reason = %fatal, "this leader hands over before it stops");
                if let Err(error) = crate::membership::transfer(&core, None).await {
                    tracing::warn!(%error, "leadership cannot be handed over");
                }
                let deadline = tokio::time::Instant::now() + LEAVE_TIMEOUT;
                while core.leads() && tokio::time::Instant::now() < deadline {
                    tokio::time::sleep(LEAVE_TIMEOUT / 100).await;
                }
            }
            core.fail(fatal);
        });
    }

    /// Says that this broker must stop; the first reason stays.
    pub(crate) fn fail(&self, fatal: Fatal) {
        fatal.report(&self.fatal);
    }
}
