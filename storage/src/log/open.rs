//! What a start does with the log that it finds.

use std::ops::ControlFlow;

use super::{Bounds, LogId, Record, Vote, codec, sizes::Sizes};
use crate::{
    Error,
    engine::{END, Engine, Space, View, WriteBatch},
};

pub(super) const VOTE: &[u8] = b"vote";
pub(super) const COMMITTED: &[u8] = b"committed";
pub(super) const PURGED: &[u8] = b"purged";
pub(super) const SUSPECT: &[u8] = b"suspect";
pub(super) const NOTE: &[u8] = b"note";

/// What a log holds beside its records.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// The first index that the log holds, or would hold.
    pub(super) begin: u64,
    pub(super) bounds: Bounds,
    pub(super) vote: Option<Vote>,
    pub(super) committed: Option<LogId>,
    pub(super) suspect: Option<u64>,
    pub(super) note: Option<Vec<u8>>,
    pub(super) sizes: Sizes,
}

/// What a log holds, as it lies there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inspection {
    /// Where it begins and ends.
    pub bounds: Bounds,
    /// The vote.
    pub vote: Option<Vote>,
    /// What was known to be committed.
    pub committed: Option<LogId>,
    /// The last index of a damaged end that an earlier start dropped.
    pub suspect: Option<u64>,
    /// A damaged end that the next start drops: its first index, and what is wrong.
    pub damaged_end: Option<(u64, String)>,
}

/// Checks every record and changes nothing.
///
/// **Errors:** [`Error::LogDamaged`] names a record that cannot be trusted and has readable ones behind it.
pub fn inspect(engine: &dyn View) -> Result<Inspection, Error> {
    let (found, bad) = look(engine)?;
    let Found { bounds, vote, committed, suspect, .. } = found;
    Ok(Inspection { bounds, vote, committed, suspect, damaged_end: bad.map(|bad| (bad.first, bad.why)) })
}

/// Visits the records from an index on, up to the end or a damaged end.
pub fn walk(engine: &dyn View, from: u64, mut visit: impl FnMut(Record) -> ControlFlow<()>) -> Result<(), Error> {
    engine.iterate(Space::Log, &codec::key(from), None, &mut |key, value| match codec::index(key)
        .map(|index| codec::decode(index, value))
    {
        Some(Ok(record)) => visit(record),
        _ => ControlFlow::Break(()),
    })
}

pub(super) fn recover(engine: &dyn Engine) -> Result<Found, Error> {
    let (mut found, bad) = look(engine)?;
    if let Some(bad) = bad {
        let end = found.suspect.map_or(bad.last, |end| end.max(bad.last));
        tracing::warn!(code = "SE0118", index = bad.first, why = bad.why, "dropped the damaged end of the log");
        let mut batch = WriteBatch::new();
        batch.delete_range(Space::Log, codec::key(bad.first), END);
        batch.put(Space::LogMeta, SUSPECT, codec::encode_meta(end));
        engine.write(batch, true)?;
        found.suspect = Some(end);
    }
    Ok(found)
}

fn look(engine: &dyn View) -> Result<(Found, Option<Bad>), Error> {
    let mut found = Found {
        begin: 0,
        bounds: Bounds::default(),
        vote: meta(engine, VOTE, "vote")?,
        committed: meta(engine, COMMITTED, "committed")?,
        suspect: meta(engine, SUSPECT, "suspect")?,
        note: meta(engine, NOTE, "note")?,
        sizes: Sizes::default(),
    };
    found.bounds.last_purged = meta(engine, PURGED, "purged")?;
    let scan = Scan::run(engine, found.bounds.last_purged)?;
    found.bounds.last = scan.last;
    found.sizes = scan.sizes;
    found.begin = found.bounds.last_purged.map(|id| id.index + 1).or(scan.first).unwrap_or(0);
    Ok((found, scan.bad))
}

fn meta<T: bincode::Decode<()>>(engine: &dyn View, key: &[u8], what: &'static str) -> Result<Option<T>, Error> {
    let Some(bytes) = engine.read(Space::LogMeta, key)? else { return Ok(None) };
    codec::decode_meta(&bytes).map(Some).map_err(|why| Error::MetaDamaged { what, why })
}

/// One pass over all records.
struct Scan {
    first: Option<u64>,
    last: Option<LogId>,
    bad: Option<Bad>,
    refused: Option<Error>,
    sizes: Sizes,
}

/// Records that cannot be read.
struct Bad {
    first: u64,
    last: u64,
    why: String,
}

impl Scan {
    fn run(engine: &dyn View, purged: Option<LogId>) -> Result<Scan, Error> {
        let mut scan = Scan { first: None, last: purged, bad: None, refused: None, sizes: Sizes::default() };
        let from = purged.map_or(0, |id| id.index + 1);
        let walked = engine.iterate(Space::Log, &codec::key(from), None, &mut |key, value| scan.visit(key, value));
        if let Some(refused) = scan.refused.take() {
            return Err(refused);
        }
        // The engine's own checksums failed: what is behind cannot be told, so nothing is dropped.
        walked.map_err(|error| match error {
            Error::Engine { source, .. } => Error::LogDamaged { index: scan.next(), why: source.to_string() },
            other => other,
        })?;
        Ok(scan)
    }

    fn next(&self) -> u64 {
        self.last.map_or(0, |id| id.index + 1)
    }

    fn visit(&mut self, key: &[u8], value: &[u8]) -> ControlFlow<()> {
        let Some(index) = codec::index(key) else {
            return self.refuse(self.next(), format!("a key of {} bytes stands in its place", key.len()));
        };
        match codec::decode(index, value) {
            Err(why) => {
                let bad = self.bad.get_or_insert(Bad { first: index, last: index, why });
                bad.last = index;
                ControlFlow::Continue(())
            }
            Ok(_) if self.bad.is_some() => {
                let bad = self.bad.take().map_or((index, String::new()), |bad| (bad.first, bad.why));
                self.refuse(bad.0, format!("{}, and record {index} behind it is readable", bad.1))
            }
            Ok(_) if self.last.is_some() && index != self.next() => {
                self.refuse(self.next(), format!("it is missing, and record {index} behind it is readable"))
            }
            Ok(record) if self.last.is_some_and(|last| record.id.term < last.term) => {
                self.refuse(index, format!("its term {} is older than that of the record before it", record.id.term))
            }
            Ok(record) => {
                self.first.get_or_insert(index);
                self.sizes.push(index, record.size_bytes());
                self.last = Some(record.id);
                ControlFlow::Continue(())
            }
        }
    }

    fn refuse(&mut self, index: u64, why: String) -> ControlFlow<()> {
        self.refused = Some(Error::LogDamaged { index, why });
        ControlFlow::Break(())
    }
}
