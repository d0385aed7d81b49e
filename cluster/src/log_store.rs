//! Raft's log over [`selvedge_storage::log`].

use std::fmt::Debug;
use std::io;
use std::ops::{Bound, RangeBounds};

use openraft::storage::{IOFlushed, RaftLogStorage};
use openraft::{LogState, OptionalSend, RaftLogReader};
use selvedge_storage::log::{Done, Log};
use tokio::sync::oneshot;

use crate::convert;
use crate::raft_types::{Entry, LogId, TypeConfig, Vote};

/// Bytes of entries in one append call between brokers; a single larger entry travels alone.
pub const APPEND_BYTES_MAX: usize = 2 << 20;

/// Raft's log. Clones share it.
#[derive(Clone)]
pub struct LogStore {
    log: Log,
}

impl LogStore {
    /// Over an opened log.
    pub fn new(log: Log) -> Self {
        Self { log }
    }

    /// The log itself.
    pub fn log(&self) -> &Log {
        &self.log
    }

    fn entries(&self, from: u64, to: u64, bytes_max: usize) -> Result<Vec<Entry>, io::Error> {
        let records = self.log.read_limited(from..to, bytes_max).map_err(io::Error::other)?;
        records.into_iter().map(convert::record_back).collect()
    }
}

impl RaftLogReader<TypeConfig> for LogStore {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> Result<Vec<Entry>, io::Error> {
        let from = match range.start_bound() {
            Bound::Included(from) => *from,
            Bound::Excluded(before) => before.saturating_add(1),
            Bound::Unbounded => 0,
        };
        let to = match range.end_bound() {
            Bound::Included(last) => last.saturating_add(1),
            Bound::Excluded(to) => *to,
            Bound::Unbounded => u64::MAX,
        };
        self.entries(from, to, usize::MAX)
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, io::Error> {
        Ok(self.log.vote().as_ref().map(convert::stored_vote_back))
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> Result<Vec<Entry>, io::Error> {
        self.entries(start, end, APPEND_BYTES_MAX)
    }
}

impl RaftLogStorage<TypeConfig> for LogStore {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig>, io::Error> {
        let bounds = self.log.bounds();
        Ok(LogState {
            last_purged_log_id: bounds.last_purged.as_ref().map(convert::stored_log_id_back),
            last_log_id: bounds.last.as_ref().map(convert::stored_log_id_back),
        })
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), io::Error> {
        let vote = convert::stored_vote(vote);
        durable(|done| self.log.save_vote(vote, done)).await
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> Result<(), io::Error> {
        self.log.save_committed(committed.as_ref().map(convert::stored_log_id));
        Ok(())
    }

    async fn read_committed(&mut self) -> Result<Option<LogId>, io::Error> {
        Ok(self.log.committed().as_ref().map(convert::stored_log_id_back))
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<TypeConfig>) -> Result<(), io::Error>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let records = entries.into_iter().map(convert::record).collect();
        self.log.append(records, Box::new(|result| callback.io_completed(result.map_err(io::Error::other))));
        Ok(())
    }

    async fn truncate_after(&mut self, last: Option<LogId>) -> Result<(), io::Error> {
        let from = last.map_or(0, |id| id.index + 1);
        durable(|done| self.log.truncate_from(from, done)).await
    }

    async fn purge(&mut self, upto: LogId) -> Result<(), io::Error> {
        let upto = convert::stored_log_id(&upto);
        durable(|done| self.log.purge_upto(upto, done)).await
    }
}

/// Waits until the log's thread has written a request.
async fn durable(request: impl FnOnce(Done)) -> Result<(), io::Error> {
    let (tx, rx) = oneshot::channel();
    request(Box::new(move |result| {
        // Nobody waits any more when Raft is shutting down.
        let _ = tx.send(result);
    }));
    match rx.await {
        Ok(result) => result.map_err(io::Error::other),
        Err(_) => Err(io::Error::other("the log was closed")),
    }
}
