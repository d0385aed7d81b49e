//! The queue of requests, the memory that is ahead of the disk, and the thread between them.

use std::{collections::VecDeque, ops::ControlFlow, ops::Range, sync::Arc};

use parking_lot::{Condvar, Mutex, MutexGuard};
// Follows a simulation's time; outside of one it is the system's.
use tokio::{sync::Notify, time::Instant};

use super::{
    BATCH_BYTES_MAX, Bounds, CACHE_BYTES_MAX, Done, LogId, QUEUE_BYTES_MAX, QUEUE_REQUESTS_MAX, Record, Vote, codec,
    open::{COMMITTED, Found, NOTE, PURGED, SUSPECT, VOTE},
    sizes::Sizes,
    tail::Tail,
};
use crate::{
    Error,
    engine::{END, Engine, Space, WriteBatch},
    metrics::{
        LOG_BATCH_BYTES, LOG_BATCH_REQUESTS, LOG_QUEUE_FULL_TOTAL, LOG_QUEUE_REQUESTS, LOG_SYNC_MAX_SECONDS,
        LOG_SYNC_SECONDS, RecentMax,
    },
};

pub(super) enum Op {
    Append(Vec<Record>),
    Vote(Vote),
    Committed(Option<LogId>),
    Note(Vec<u8>),
    Truncate(u64),
    Purge(LogId),
    ClearSuspect,
}

impl Op {
    fn size_bytes(&self) -> usize {
        match self {
            Op::Append(records) => records.iter().map(Record::size_bytes).sum(),
            Op::Note(note) => note.len(),
            _ => codec::HEADER_BYTES,
        }
    }
}

struct Request {
    number: u64,
    op: Op,
    size_bytes: usize,
    done: Option<Done>,
    since: Instant,
}

pub(super) struct Shared {
    engine: Arc<dyn Engine>,
    /// No thread of its own writes: whoever holds the driver does.
    driven: bool,
    pub(super) inner: Mutex<Inner>,
    work: Condvar,
    /// The same for a driver.
    wanted: Notify,
    room: Condvar,
}

#[derive(Default)]
pub(super) struct Inner {
    queue: VecDeque<Request>,
    queue_bytes: usize,
    /// Since when the requests that are being written have waited.
    writing_since: Option<Instant>,
    requests: u64,
    slowest: RecentMax,
    tail: Tail,
    pub(super) sizes: Sizes,
    /// Raised by each truncation, so that a reader notices one that overtook it.
    truncations: u64,
    closing: bool,
    /// The first index that the log holds, or would hold.
    begin: u64,
    pub(super) bounds: Bounds,
    pub(super) vote: Option<Vote>,
    pub(super) committed: Option<LogId>,
    pub(super) suspect: Option<u64>,
    pub(super) note: Option<Vec<u8>>,
    pub(super) failed: Option<Error>,
}

impl Inner {
    /// The part of a range that the log holds.
    fn clip(&self, range: &Range<u64>) -> (u64, u64) {
        let Some(last) = self.bounds.last else { return (0, 0) };
        (range.start.max(self.begin), range.end.min(last.index.saturating_add(1)))
    }

    fn has_room(&self, size_bytes: usize) -> bool {
        let fits = self.queue_bytes + size_bytes <= QUEUE_BYTES_MAX || self.queue.is_empty();
        fits && self.queue.len() < QUEUE_REQUESTS_MAX
    }
}

impl Shared {
    pub(super) fn new(engine: Arc<dyn Engine>, found: Found, driven: bool) -> Shared {
        let inner = Inner {
            begin: found.begin,
            bounds: found.bounds,
            vote: found.vote,
            committed: found.committed,
            suspect: found.suspect,
            note: found.note,
            sizes: found.sizes,
            ..Inner::default()
        };
        Shared {
            engine,
            driven,
            inner: Mutex::new(inner),
            work: Condvar::new(),
            wanted: Notify::new(),
            room: Condvar::new(),
        }
    }

    /// Changes the memory and queues the write, in one step, so that both see the same order.
    pub(super) fn submit(&self, mut op: Op, done: Option<Done>) {
        let size_bytes = op.size_bytes();
        let mut inner = self.inner.lock();
        if self.driven && !inner.has_room(size_bytes) {
            drop(inner);
            self.write_waiting();
            inner = self.inner.lock();
        }
        if matches!(op, Op::Purge(id) if inner.bounds.last_purged.is_some_and(|purged| purged.index >= id.index)) {
            // Already done; an empty request keeps its place in the order.
            op = Op::Append(Vec::new());
        }
        let refused = match self.wait_for_room(&mut inner, size_bytes) {
            Ok(()) => self.change(&mut inner, &op).err(),
            Err(error) => Some(error),
        };
        if let Some(error) = refused {
            drop(inner);
            if let Some(done) = done {
                done(Err(error));
            }
            return;
        }
        let number = inner.requests;
        inner.queue_bytes += size_bytes;
        inner.queue.push_back(Request { number, op, size_bytes, done, since: Instant::now() });
        metrics::gauge!(LOG_QUEUE_REQUESTS).set(inner.queue.len() as f64);
        drop(inner);
        if self.driven {
            self.wanted.notify_one();
        } else {
            self.work.notify_one();
        }
    }

    /// Writes all that waits.
    pub(super) fn write_waiting(&self) {
        loop {
            let batch = self.take(&mut self.inner.lock());
            let Some(batch) = batch else { return };
            self.commit(batch);
        }
    }

    /// Waits until something is to be written; whether there will be more.
    pub(super) async fn wanted(&self) -> bool {
        loop {
            {
                let inner = self.inner.lock();
                if !inner.queue.is_empty() || inner.closing {
                    return !inner.closing;
                }
            }
            self.wanted.notified().await;
        }
    }

    pub(super) fn close(&self) {
        self.inner.lock().closing = true;
        self.work.notify_all();
        self.wanted.notify_one();
        self.room.notify_all();
    }

    pub(super) fn run(&self) {
        loop {
            let mut inner = self.inner.lock();
            let batch = loop {
                match self.take(&mut inner) {
                    Some(batch) => break batch,
                    None if inner.closing => return,
                    None => self.work.wait(&mut inner),
                }
            };
            drop(inner);
            self.commit(batch);
        }
    }

    pub(super) fn oldest_unsynced_ms(&self) -> u64 {
        let inner = self.inner.lock();
        let since = inner.writing_since.or_else(|| inner.queue.front().map(|request| request.since));
        since.map_or(0, |since| u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX))
    }

    pub(super) fn read(&self, range: Range<u64>, limit_bytes: usize) -> Result<Vec<Record>, Error> {
        loop {
            let inner = self.inner.lock();
            let (start, end) = inner.clip(&range);
            if start >= end {
                return Ok(Vec::new());
            }
            let truncations = inner.truncations;
            let split = inner.tail.first_index().unwrap_or(end).clamp(start, end);
            let mut recent: Vec<Record> = Vec::new();
            let mut room = limit_bytes;
            if split == start {
                for record in inner.tail.from(start).take_while(|record| record.id.index < end) {
                    if !fits(record, recent.is_empty(), &mut room) {
                        break;
                    }
                    recent.push(record.clone());
                }
                return Ok(recent);
            }
            recent.extend(inner.tail.from(split).take_while(|record| record.id.index < end).cloned());
            drop(inner);

            let (mut records, cut) = self.read_engine(start, split, &mut room)?;
            let inner = self.inner.lock();
            if inner.truncations != truncations {
                continue;
            }
            // A purge may have overtaken the reading; what it took is no hole.
            let first = inner.clip(&range).0;
            drop(inner);
            records.retain(|record| record.id.index >= first);
            let whole = cut || records.len() as u64 == split.saturating_sub(first);
            if let Some(hole) = hole(first, &records, whole) {
                return Err(Error::LogDamaged { index: hole, why: "it is missing".to_owned() });
            }
            if !cut {
                for record in recent.into_iter().filter(|record| record.id.index >= first) {
                    if !fits(&record, records.is_empty(), &mut room) {
                        break;
                    }
                    records.push(record);
                }
            }
            return Ok(records);
        }
    }

    /// Reads `start..end` from the engine; also whether the limit ended it.
    fn read_engine(&self, start: u64, end: u64, room: &mut usize) -> Result<(Vec<Record>, bool), Error> {
        let mut records = Vec::new();
        let mut cut = false;
        let mut refused = None;
        self.engine.iterate(Space::Log, &codec::key(start), Some(&codec::key(end)), &mut |key, value| {
            let index = codec::index(key).unwrap_or(start);
            match codec::decode(index, value) {
                Ok(record) if fits(&record, records.is_empty(), room) => {
                    records.push(record);
                    return ControlFlow::Continue(());
                }
                Ok(_) => cut = true,
                Err(why) => refused = Some(Error::LogDamaged { index, why }),
            }
            ControlFlow::Break(())
        })?;
        refused.map_or(Ok((records, cut)), Err)
    }

    fn wait_for_room(&self, inner: &mut MutexGuard<'_, Inner>, size_bytes: usize) -> Result<(), Error> {
        let mut counted = false;
        loop {
            if let Some(failed) = &inner.failed {
                return Err(failed.clone());
            }
            if inner.closing {
                return Err(Error::Closed);
            }
            if inner.has_room(size_bytes) {
                return Ok(());
            }
            if !counted {
                metrics::counter!(LOG_QUEUE_FULL_TOTAL).increment(1);
                counted = true;
            }
            self.room.wait(inner);
        }
    }

    /// Applies a request to the memory.
    fn change(&self, inner: &mut Inner, op: &Op) -> Result<(), Error> {
        match op {
            Op::Append(records) => {
                let mut next = inner.bounds.last.map(|last| last.index + 1);
                for record in records {
                    let (found, expected) = (record.id.index, next.unwrap_or(record.id.index));
                    if found != expected {
                        return Err(Error::LogGap { expected, found });
                    }
                    next = Some(found + 1);
                }
            }
            Op::Truncate(from) => self.truncate(inner, *from)?,
            Op::Purge(_) | Op::Vote(_) | Op::Committed(_) | Op::Note(_) | Op::ClearSuspect => {}
        }
        inner.requests += 1;
        let number = inner.requests;
        match op {
            Op::Append(records) => {
                if let (None, Some(first)) = (inner.bounds.last, records.first()) {
                    inner.begin = first.id.index;
                }
                for record in records {
                    inner.bounds.last = Some(record.id);
                    inner.sizes.push(record.id.index, record.size_bytes());
                    inner.tail.push(number, record.clone());
                }
            }
            Op::Vote(vote) => inner.vote = Some(*vote),
            Op::Committed(id) => inner.committed = *id,
            Op::Note(note) => inner.note = Some(note.clone()),
            Op::Purge(id) => {
                inner.tail.purge_upto(id.index);
                inner.sizes.purge_upto(id.index);
                inner.bounds.last_purged = Some(*id);
                inner.begin = id.index.saturating_add(1);
                inner.bounds.last = inner.bounds.last.filter(|last| last.index > id.index).or(inner.bounds.last_purged);
            }
            Op::ClearSuspect => inner.suspect = None,
            Op::Truncate(_) => {}
        }
        Ok(())
    }

    fn truncate(&self, inner: &mut Inner, from: u64) -> Result<(), Error> {
        let Some(last) = inner.bounds.last.filter(|last| last.index >= from) else { return Ok(()) };
        let purged = inner.bounds.last_purged;
        if purged.is_some_and(|purged| purged.index >= from) {
            return Err(Error::LogGap { expected: purged.map_or(0, |purged| purged.index + 1), found: from });
        }
        let kept = if inner.tail.first_index().is_some_and(|first| first < from) {
            None
        } else if from <= inner.begin {
            Some(purged)
        } else {
            // Not in memory, so it is durable and no request under way removes it.
            let damaged = |why| Error::LogDamaged { index: from - 1, why };
            let value = self.engine.read(Space::Log, &codec::key(from - 1))?;
            let value = value.ok_or_else(|| damaged("it is missing".to_owned()))?;
            Some(Some(codec::decode(from - 1, &value).map_err(damaged)?.id))
        };
        inner.tail.truncate_from(from);
        inner.sizes.truncate_from(from);
        inner.truncations += 1;
        inner.bounds.last = kept.unwrap_or_else(|| inner.tail.last().map(|record| record.id).or(Some(last)));
        Ok(())
    }

    /// Takes what is written together.
    fn take(&self, inner: &mut Inner) -> Option<Vec<Request>> {
        let mut batch: Vec<Request> = Vec::new();
        let mut size_bytes = 0;
        while let Some(request) =
            inner.queue.pop_front_if(|next| batch.is_empty() || size_bytes + next.size_bytes <= BATCH_BYTES_MAX)
        {
            size_bytes += request.size_bytes;
            batch.push(request);
        }
        inner.queue_bytes -= size_bytes;
        inner.writing_since = batch.first().map(|request| request.since);
        self.room.notify_all();
        (!batch.is_empty()).then_some(batch)
    }

    fn commit(&self, mut requests: Vec<Request>) {
        let mut batch = WriteBatch::new();
        let mut sync = false;
        for request in &requests {
            sync |= !matches!(request.op, Op::Committed(_) | Op::Note(_));
            stage(&request.op, &mut batch);
        }
        metrics::histogram!(LOG_BATCH_REQUESTS).record(requests.len() as f64);
        metrics::histogram!(LOG_BATCH_BYTES).record(batch.size_bytes() as f64);
        let begun = Instant::now();
        let earlier = self.inner.lock().failed.clone();
        let result = match earlier {
            Some(error) => Err(error),
            None if batch.is_empty() => Ok(()),
            None => self.engine.write(batch, sync),
        };
        {
            let mut inner = self.inner.lock();
            if sync {
                let took = begun.elapsed();
                metrics::histogram!(LOG_SYNC_SECONDS).record(took);
                metrics::gauge!(LOG_SYNC_MAX_SECONDS).set(inner.slowest.take(took, Instant::now()).as_secs_f64());
            }
            inner.writing_since = None;
            match &result {
                Ok(()) => {
                    let durable = requests.last().map_or(0, |request| request.number);
                    inner.tail.evict(durable, CACHE_BYTES_MAX);
                }
                Err(error) => {
                    if inner.failed.is_none() {
                        tracing::error!(%error, "the log cannot be written");
                        inner.failed = Some(error.clone());
                    }
                    inner.queue_bytes = 0;
                    requests.extend(inner.queue.drain(..));
                    self.room.notify_all();
                }
            }
            metrics::gauge!(LOG_QUEUE_REQUESTS).set(inner.queue.len() as f64);
        }
        for done in requests.into_iter().filter_map(|request| request.done) {
            done(result.clone());
        }
    }
}

fn stage(op: &Op, batch: &mut WriteBatch) {
    match op {
        Op::Append(records) => {
            for record in records {
                batch.put(Space::Log, codec::key(record.id.index), codec::encode(record));
            }
        }
        Op::Vote(vote) => batch.put(Space::LogMeta, VOTE, codec::encode_meta(*vote)),
        Op::Committed(Some(id)) => batch.put(Space::LogMeta, COMMITTED, codec::encode_meta(*id)),
        Op::Note(note) => batch.put(Space::LogMeta, NOTE, codec::encode_meta(note)),
        Op::Committed(None) => batch.delete(Space::LogMeta, COMMITTED),
        Op::Truncate(from) => batch.delete_range(Space::Log, codec::key(*from), END),
        Op::Purge(id) => {
            batch.put(Space::LogMeta, PURGED, codec::encode_meta(*id));
            let end = id.index.checked_add(1).map_or(END.to_vec(), |next| codec::key(next).to_vec());
            batch.delete_range(Space::Log, codec::key(0), end);
        }
        Op::ClearSuspect => batch.delete(Space::LogMeta, SUSPECT),
    }
}

/// The first index from `first` on that is not there.
fn hole(first: u64, records: &[Record], whole: bool) -> Option<u64> {
    let found = (first..).zip(records).find(|(expected, record)| record.id.index != *expected);
    let end = (!whole).then(|| first + records.len() as u64);
    found.map(|(expected, _)| expected).or(end)
}

fn fits(record: &Record, first: bool, room: &mut usize) -> bool {
    let size_bytes = record.size_bytes();
    if !first && size_bytes > *room {
        return false;
    }
    *room = room.saturating_sub(size_bytes);
    true
}
