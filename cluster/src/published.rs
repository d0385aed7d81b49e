//! What the state machine publishes after each batch of entries, for readers that never lock.

use std::collections::VecDeque;
use std::sync::Arc;

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use selvedge_domain::{Envelope, State};
use tokio::sync::{mpsc, watch};

use crate::clock::{Clock, ClusterTime};

/// Hashes of recent entries that are kept to be compared with what other brokers report.
const HASHES_MAX: usize = 4_096;
/// Published changes that wait to be enforced; when it is full, applying waits.
pub(crate) const ENFORCE_QUEUE_MAX: usize = 1_024;

/// The hashes after an entry, by which two brokers are compared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HashesAt {
    /// Index of the entry.
    pub index: u64,
    /// Over all rows of the state.
    pub state: [u8; 32],
    /// Over the journal's events.
    pub journal: Vec<u8>,
}

/// What there is to enforce.
pub(crate) struct ToEnforce {
    pub(crate) index: u64,
    pub(crate) state: Arc<State>,
    pub(crate) events: Vec<Envelope>,
    /// The state was replaced as a whole: which events led to it is not known.
    pub(crate) replaced: bool,
}

pub(crate) struct Published {
    clock: Arc<dyn Clock>,
    /// Entries up to here were in the log when this process started.
    old_log_index: u64,
    state: ArcSwap<State>,
    states: watch::Sender<Arc<State>>,
    /// Index after the last entry applied.
    applied: watch::Sender<u64>,
    time: Mutex<ClusterTime>,
    hashes: Mutex<VecDeque<HashesAt>>,
    to_enforce: mpsc::Sender<ToEnforce>,
}

impl Published {
    pub(crate) fn new(clock: Arc<dyn Clock>, old_log_index: u64) -> (Arc<Self>, mpsc::Receiver<ToEnforce>) {
        let state = Arc::new(State::default());
        let (to_enforce, queue) = mpsc::channel(ENFORCE_QUEUE_MAX);
        let published = Self {
            clock,
            old_log_index,
            state: ArcSwap::new(state.clone()),
            states: watch::Sender::new(state),
            applied: watch::Sender::new(0),
            time: Mutex::default(),
            hashes: Mutex::default(),
            to_enforce,
        };
        (Arc::new(published), queue)
    }

    /// Publishes a state that was loaded or installed.
    pub(crate) async fn replace(&self, state: Arc<State>, index: Option<u64>) {
        self.hashes.lock().clear();
        self.publish(state, index.map_or(0, |index| index + 1), Vec::new(), true).await;
    }

    /// Publishes the state after a batch whose last entry is `index`.
    pub(crate) async fn advance(&self, state: Arc<State>, index: u64, events: Vec<Envelope>, hashes: Vec<HashesAt>) {
        {
            let mut kept = self.hashes.lock();
            kept.extend(hashes);
            let excess = kept.len().saturating_sub(HASHES_MAX);
            kept.drain(..excess);
        }
        self.publish(state, index + 1, events, false).await;
    }

    async fn publish(&self, state: Arc<State>, next_index: u64, events: Vec<Envelope>, replaced: bool) {
        let of_this_boot = next_index > self.old_log_index + 1 && state.time_ms() > self.state.load().time_ms();
        self.time.lock().applied(state.time_ms(), &*self.clock, of_this_boot && !replaced);
        self.state.store(state.clone());
        self.states.send_replace(state.clone());
        self.applied.send_replace(next_index);
        let change = ToEnforce { index: next_index.saturating_sub(1), state, events, replaced };
        // The receiver is gone only when this broker is shutting down.
        let _ = self.to_enforce.send(change).await;
    }

    pub(crate) fn state(&self) -> Arc<State> {
        self.state.load_full()
    }

    pub(crate) fn subscribe(&self) -> watch::Receiver<Arc<State>> {
        self.states.subscribe()
    }

    /// Index after the last entry applied.
    pub(crate) fn applied(&self) -> watch::Receiver<u64> {
        self.applied.subscribe()
    }

    pub(crate) fn time(&self) -> ClusterTime {
        *self.time.lock()
    }

    pub(crate) fn now_ms(&self) -> u64 {
        self.time().now_ms(&*self.clock)
    }

    pub(crate) fn hashes_at(&self, index: u64) -> Option<HashesAt> {
        let hashes = self.hashes.lock();
        let at = hashes.binary_search_by_key(&index, |hashes| hashes.index).ok()?;
        hashes.get(at).cloned()
    }

    pub(crate) fn hashes_from(&self, index: u64) -> Vec<HashesAt> {
        let hashes = self.hashes.lock();
        let first = hashes.partition_point(|hashes| hashes.index < index);
        hashes.iter().skip(first).cloned().collect()
    }

    pub(crate) fn last_hashes(&self) -> Option<HashesAt> {
        self.hashes.lock().back().cloned()
    }
}
