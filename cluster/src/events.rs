//! The event journal as a stream: ordered, gap-free, whole commands, with bookmarks.

use std::sync::Arc;

use futures::Stream;
use prost::Message as _;
use selvedge_domain::{Envelope, Id};
use selvedge_storage::state::JournalRow;

use crate::core::Core;
use crate::error::Error;

/// Bytes of events in one frame; a single larger event has a frame of its own.
pub const FRAME_BYTES_MAX: usize = 1 << 20;
/// Bytes that are read from the journal at once.
const READ_BYTES: usize = 4 << 20;

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
    },
}

/// Where a stream stands.
struct Cursor {
    core: Arc<Core>,
    states: tokio::sync::watch::Receiver<Arc<selvedge_domain::State>>,
    next_seq: u64,
    ready: std::collections::VecDeque<Frame>,
    /// The last frame given was the last one of its command, or there was none.
    between_commands: bool,
    bookmarked: Option<Id>,
    ended: bool,
}

/// The events of the command that ends at a position.
pub(crate) async fn of_command(core: &Core, position: Id) -> Result<Vec<Envelope>, Error> {
    let store = core.store.clone();
    let read = move || {
        let begin = store.journal_bounds()?.compacted + 1;
        let mut span = 64;
        loop {
            let from_seq = position.seq.saturating_sub(span).max(begin);
            let mut rows = store.journal(from_seq, usize::MAX)?;
            rows.retain(|row| row.seq <= position.seq);
            let mut events = Vec::with_capacity(rows.len());
            for row in rows {
                events.push(Envelope::decode(&*row.bytes).map_err(|_| Error::Journal { seq: row.seq })?);
            }
            let before = events.iter().rposition(|event: &Envelope| event.last && event.id != Some(position));
            if before.is_some() || from_seq == begin {
                return Ok(events.split_off(before.map_or(0, |at| at + 1)));
            }
            span *= 8;
        }
    };
    core.blocking.run(move || Ok(read())).await.map_err(Error::State)?
}

/// Events from a sequence number on, then live, without end.
pub(crate) fn stream(core: Arc<Core>, from_seq: u64) -> impl Stream<Item = Result<Frame, Error>> + Send + 'static {
    let cursor = Cursor {
        states: core.published.subscribe(),
        core,
        next_seq: from_seq.max(1),
        ready: Default::default(),
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
            if let Some(frame) = self.ready.pop_front() {
                if let Frame::Events { last, .. } = &frame {
                    self.between_commands = *last;
                }
                return Ok(Some(frame));
            }
            let state = self.states.borrow_and_update().clone();
            let position = state.position();
            if self.next_seq <= position.seq {
                self.read(position.seq).await?;
                continue;
            }
            if self.between_commands && self.next_seq == position.seq + 1 && self.bookmarked != Some(position) {
                self.bookmarked = Some(position);
                return Ok(Some(Frame::Bookmark { position, state_hash: state.state_hash() }));
            }
            tokio::select! {
                changed = self.states.changed() => if changed.is_err() { return Ok(None) },
                () = self.core.stop.cancelled() => return Ok(None),
            }
        }
    }

    /// Reads on, up to an event that is published.
    async fn read(&mut self, upto_seq: u64) -> Result<(), Error> {
        let (store, from_seq) = (self.core.store.clone(), self.next_seq);
        let read = move || Ok(store.journal(from_seq, READ_BYTES));
        let rows = self.core.blocking.run(read).await.map_err(Error::State)?;
        let mut rows = rows.map_err(|error| match error {
            selvedge_storage::Error::Compacted { upto } => Error::Compacted { upto },
            other => Error::Storage(other),
        })?;
        rows.retain(|row| row.seq <= upto_seq);
        if rows.first().is_none_or(|row| row.seq != from_seq) {
            // The rows are not here: this broker got a snapshot that has none.
            let upto = rows.first().map_or(upto_seq, |row| row.seq - 1);
            return Err(Error::Compacted { upto });
        }
        self.frame(rows)
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
