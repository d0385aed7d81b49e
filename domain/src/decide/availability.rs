//! Availability of connectors, and how far receivers have read.

use crate::command::{AvailabilityChange, CursorMove, Rejected, RejectedCode};
use crate::event::Event;
use crate::limits::{AVAILABILITY_CHANGES_MAX, CURSORS_MAX, SEGMENT_TARGETS_MAX};
use crate::rows::{Availability, Connector, Cursor, Receiver, Row as _};

use super::Draft;

pub(super) fn change(draft: &mut Draft, changes: &[AvailabilityChange]) -> Result<(), Rejected> {
    draft.need_broker()?;
    if changes.len() > AVAILABILITY_CHANGES_MAX || changes.iter().any(|c| c.down.len() > SEGMENT_TARGETS_MAX) {
        return Err(Rejected::new(RejectedCode::Limit, "too many transitions in one command"));
    }
    let broker = draft.proposer;
    for change in changes {
        if draft.state.by_id::<Connector>(change.connector).is_none() {
            continue;
        }
        let old = draft.state.row::<Availability>(&Availability::key_of(change.connector, broker));
        if old.as_ref().is_some_and(|old| old.stream > change.stream) {
            continue;
        }
        let same =
            old.as_ref().is_some_and(|old| (old.stream, old.up, &old.down) == (change.stream, change.up, &change.down));
        if !same {
            let since_ms = draft.now_ms();
            draft.emit(Event::AvailabilityPut(Availability {
                connector: Some(change.connector),
                broker,
                stream: change.stream,
                up: change.up,
                down: change.down.clone(),
                since_ms,
            }));
        }
    }
    Ok(())
}

pub(super) fn move_cursors(draft: &mut Draft, moves: &[CursorMove]) -> Result<(), Rejected> {
    draft.need_broker()?;
    if moves.len() > CURSORS_MAX {
        return Err(Rejected::new(RejectedCode::Limit, "too many cursors in one command"));
    }
    for to in moves {
        if draft.state.by_id::<Receiver>(to.receiver).is_none() {
            continue;
        }
        let row = Cursor { receiver: Some(to.receiver), broker: to.broker, boot: to.boot, next_seq: to.next_seq };
        let old = draft.state.row::<Cursor>(&row.key());
        if old.is_none_or(|old| old.next_seq < row.next_seq) {
            draft.put_quiet(&row);
        }
    }
    Ok(())
}
