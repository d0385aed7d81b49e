//! The event journal as a stream: ordered, gap-free, whole commands, with bookmarks.

use std::collections::VecDeque;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures::{Stream, StreamExt as _};
use prost::Message as _;
use selvedge_domain::{Envelope, Id, State};
use selvedge_storage::state::JournalRow;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_stream::wrappers::ReceiverStream;

use crate::core::Core;
use crate::error::Error;
use crate::journal;
use crate::metrics::{WATCHERS, WATCHERS_CUT_TOTAL};

/// Bytes of events in one frame; a single larger event has a frame of its own.
pub const FRAME_BYTES_MAX: usize = 1 << 20;
/// Bytes that are read from the journal at once.
const READ_BYTES: usize = 4 << 20;
/// Frames that wait for a watcher. When they are this many the journal is read no further, and a watcher that takes none
/// for [`WATCH_STALL_MAX`] is cut; it resumes where it is told.
pub const WATCH_QUEUE_FRAMES: usize = 4;
/// Longest time that a full queue waits for its watcher.
pub const WATCH_STALL_MAX: Duration = Duration::from_secs(30);

/// A piece of the event stream.
#[derive(Clone, Debug, PartialEq)]
pub enum Frame {
    /// Events of one command. A consumer applies them when it has the frame that is `last`.
    Events {
        /// Position of the last event in the frame.
        position: Id,
        /// The events, in order.
        events: Vec<Envelope>,
        /// The last frame of its command.
        last: bool,
    },
    /// Everything up to a position was sent. Follows a `last` frame only.
    Bookmark {
        /// The position.
        position: Id,
        /// Hash of the state there, by which a subscriber proves what it holds.
        state_hash: [u8; 32],
        /// Chained hash of all events up to there: `SHA-256(hash before, bytes of the event)`.
        journal_hash: Vec<u8>,
    },
}

/// The events of the command that ends at a position.
pub(crate) async fn of_command(core: &Core, position: Id) -> Result<Vec<Envelope>, Error> {
    let store = core.store.clone();
    let read = move || {
        let mut events = VecDeque::new();
        for seq in (1..=position.seq).rev() {
            let row = store.journal(seq, 0).map_err(gone)?.into_iter().next().filter(|row| row.seq == seq);
            let event = row.and_then(|row| Envelope::decode(&*row.bytes).ok()).ok_or(Error::Journal { seq })?;
            if event.last && seq != position.seq {
                break;
            }
            events.push_front(event);
        }
        Ok(events.into())
    };
    core.blocking.run(move || Ok(read())).await.map_err(Error::State)?
}

fn gone(error: selvedge_storage::Error) -> Error {
    match error {
        selvedge_storage::Error::Compacted { upto } => Error::Compacted { upto },
        other => Error::Storage(other),
    }
}

/// Events from a position on, then live, without end, through a bounded queue. A position of epoch 0 counts in this
/// broker's epoch.
pub(crate) fn watch(core: Arc<Core>, from: Id) -> impl Stream<Item = Result<Frame, Error>> + Send + 'static {
    let (queue, queued) = mpsc::channel(WATCH_QUEUE_FRAMES);
    let (cut, was_cut) = oneshot::channel();
    let (tasks, stop) = (core.tasks.clone(), core.stop.clone());
    tasks.spawn(async move {
        let _counted = Counted::new();
        let forwarded = stop.run_until_cancelled_owned(forward(frames(core, from), from, queue)).await;
        if let Some(resume) = forwarded.flatten() {
            ::metrics::counter!(WATCHERS_CUT_TOTAL).increment(1);
            // Who is not there any more need not be told.
            let _ = cut.send(Error::Slow { resume });
        }
    });
    let end = futures::stream::once(was_cut).filter_map(|cut| std::future::ready(cut.ok().map(Err)));
    ReceiverStream::new(queued).chain(end)
}

/// Puts frames into the queue. Answers where to resume when its watcher is too slow.
async fn forward(
    frames: impl Stream<Item = Result<Frame, Error>>,
    from: Id,
    queue: mpsc::Sender<Result<Frame, Error>>,
) -> Option<Id> {
    let (mut frames, mut resume) = (pin!(frames), from);
    loop {
        let frame = tokio::select! {
            () = queue.closed() => return None,
            frame = frames.next() => frame?,
        };
        let position = match &frame {
            Ok(Frame::Events { position, .. }) => Some(*position),
            _ => None,
        };
        match queue.send_timeout(frame, WATCH_STALL_MAX).await {
            Ok(()) => resume = position.map_or(resume, |position| Id::new(position.epoch, position.seq + 1)),
            Err(mpsc::error::SendTimeoutError::Closed(_)) => return None,
            Err(mpsc::error::SendTimeoutError::Timeout(_)) => return Some(resume),
        }
    }
}

/// One watcher more while it lives.
struct Counted;

impl Counted {
    fn new() -> Self {
        ::metrics::gauge!(WATCHERS).increment(1.0);
        Self
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        ::metrics::gauge!(WATCHERS).decrement(1.0);
    }
}

/// Where a stream stands.
struct Cursor {
    core: Arc<Core>,
    states: watch::Receiver<Arc<State>>,
    /// None until there is a cluster to be in.
    epoch: Option<u32>,
    next_seq: u64,
    ready: VecDeque<Frame>,
    /// The last frame given was the last one of its command, or there was none.
    between_commands: bool,
    bookmarked: Option<Id>,
    ended: bool,
}

fn frames(core: Arc<Core>, from: Id) -> impl Stream<Item = Result<Frame, Error>> + Send + 'static {
    let cursor = Cursor {
        states: core.published.subscribe(),
        core,
        epoch: (from.epoch != 0).then_some(from.epoch),
        next_seq: from.seq.max(1),
        ready: VecDeque::new(),
        between_commands: true,
        bookmarked: None,
        ended: false,
    };
    futures::stream::unfold(cursor, |mut cursor| async {
        if cursor.ended {
            return None;
        }
        let next = cursor.next().await;
        match next {
            Ok(Some(frame)) => Some((Ok(frame), cursor)),
            Ok(None) => None,
            Err(error) => {
                cursor.ended = true;
                Some((Err(error), cursor))
            }
        }
    })
}

impl Cursor {
    async fn next(&mut self) -> Result<Option<Frame>, Error> {
        loop {
            let state = self.states.borrow_and_update().clone();
            let position = state.position();
            if state.cluster().is_some() && *self.epoch.get_or_insert(position.epoch) != position.epoch {
                return Err(Error::Reset { position });
            }
            if let Some(frame) = self.ready.pop_front() {
                if let Frame::Events { last, .. } = &frame {
                    self.between_commands = *last;
                }
                return Ok(Some(frame));
            }
            if self.next_seq <= position.seq {
                self.read(&state).await?;
                continue;
            }
            if self.between_commands && self.next_seq == position.seq + 1 && self.bookmarked != Some(position) {
                self.bookmarked = Some(position);
                let (state_hash, journal_hash) = (state.state_hash(), state.meta().journal_hash);
                return Ok(Some(Frame::Bookmark { position, state_hash, journal_hash }));
            }
            tokio::select! {
                changed = self.states.changed() => if changed.is_err() { return Ok(None) },
                () = self.core.stop.cancelled() => return Ok(None),
            }
        }
    }

    /// Reads on, up to an event that is published.
    async fn read(&mut self, state: &State) -> Result<(), Error> {
        let (store, from_seq) = (self.core.store.clone(), self.next_seq);
        let (upto_seq, forgotten) = (state.position().seq, state.meta().journal_compacted);
        if from_seq <= forgotten {
            return Err(Error::Compacted { upto: forgotten });
        }
        let rows = self.core.blocking.run(move || Ok(store.journal(from_seq, READ_BYTES)));
        let mut rows = match rows.await.map_err(Error::State)? {
            Err(selvedge_storage::Error::Compacted { upto }) => return Err(self.elsewhere(upto).await),
            rows => rows.map_err(Error::Storage)?,
        };
        rows.retain(|row| row.seq <= upto_seq);
        if rows.first().is_none_or(|row| row.seq != from_seq) {
            let upto = rows.first().map_or(upto_seq, |row| row.seq - 1);
            return Err(self.elsewhere(upto).await);
        }
        self.frame(rows)
    }

    /// The rows are not here: everybody has forgotten them by now, or this broker got a snapshot, which has none.
    async fn elsewhere(&self, upto: u64) -> Error {
        let forgotten = self.core.published.state().meta().journal_compacted;
        if self.next_seq <= forgotten {
            return Error::Compacted { upto: forgotten };
        }
        Error::Elsewhere { upto, brokers: journal::holders(&self.core, self.next_seq).await }
    }

    fn frame(&mut self, rows: Vec<JournalRow>) -> Result<(), Error> {
        let mut events = Vec::new();
        let mut bytes = 0;
        for row in rows {
            let damaged = Error::Journal { seq: row.seq };
            if row.seq != self.next_seq {
                return Err(damaged);
            }
            let Ok(event) = Envelope::decode(&*row.bytes) else { return Err(damaged) };
            if !events.is_empty() && bytes + row.bytes.len() > FRAME_BYTES_MAX {
                self.push(std::mem::take(&mut events), false);
                bytes = 0;
            }
            bytes += row.bytes.len();
            let last = event.last;
            events.push(event);
            self.next_seq += 1;
            if last {
                self.push(std::mem::take(&mut events), true);
                bytes = 0;
            }
        }
        self.push(events, false);
        Ok(())
    }

    fn push(&mut self, events: Vec<Envelope>, last: bool) {
        if let Some(position) = events.last().and_then(|event| event.id) {
            self.ready.push_back(Frame::Events { position, events, last });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frames() -> impl Stream<Item = Result<Frame, Error>> {
        let frame = |seq| Ok(Frame::Events { position: Id::new(1, seq), events: Vec::new(), last: true });
        futures::stream::iter((1..=20).map(frame))
    }

    #[tokio::test(start_paused = true)]
    async fn a_watcher_that_takes_nothing_is_cut_and_told_where_to_resume() {
        let (queue, mut queued) = mpsc::channel(WATCH_QUEUE_FRAMES);
        let resume = forward(frames(), Id::new(1, 1), queue).await;
        let mut last = 0;
        while let Some(frame) = queued.recv().await {
            let Ok(Frame::Events { position, .. }) = frame else { panic!("{frame:?}") };
            last = position.seq;
        }
        assert_eq!(last, WATCH_QUEUE_FRAMES as u64, "the queue is bounded, and what is in it is given");
        assert_eq!(resume, Some(Id::new(1, last + 1)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_watcher_that_takes_something_now_and_then_gets_everything_and_one_that_goes_ends_it() {
        let (queue, mut queued) = mpsc::channel(WATCH_QUEUE_FRAMES);
        let slowly = async {
            for _ in 0..20 {
                tokio::time::sleep(WATCH_STALL_MAX - Duration::from_millis(1)).await;
                assert!(queued.recv().await.is_some());
            }
        };
        let (resume, ()) = tokio::join!(forward(frames(), Id::new(1, 1), queue), slowly);
        assert_eq!(resume, None);

        let (queue, queued) = mpsc::channel(WATCH_QUEUE_FRAMES);
        drop(queued);
        assert_eq!(forward(futures::stream::pending(), Id::new(1, 1), queue).await, None);
    }
}
