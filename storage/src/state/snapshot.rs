//! The state as a stream: a header, blocks of rows in ascending order, and an end with their number and the digest of
//! all before it.

use std::{
    io::{Read, Write},
    ops::ControlFlow,
    sync::Arc,
};

use super::{
    META, RESERVED_TABLE,
    block::{Sink, Source},
    bounds, side_of,
};
use crate::{
    Error,
    engine::{Engine, Space, View},
};

const MAGIC: &[u8; 8] = b"SLVGSNP1";
const HEADER: u8 = b'H';
const ROWS: u8 = b'R';
const END: u8 = b'E';
/// Bytes of rows that are collected for one block.
const BLOCK_BYTES: usize = 1 << 20;

/// What a snapshot says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Head {
    /// Last sequence number of the journal when it was taken.
    pub journal_last: u64,
    /// The meta of the last write that it holds.
    pub meta: Vec<u8>,
    /// How many rows it holds.
    pub rows: u64,
}

/// A durable copy of the state.
pub struct Snapshot {
    engine: Arc<dyn Engine>,
}

impl Snapshot {
    pub(super) fn new(engine: Arc<dyn Engine>) -> Snapshot {
        Snapshot { engine }
    }

    /// The meta of the last write that it holds.
    pub fn meta(&self) -> Result<Option<Vec<u8>>, Error> {
        self.engine.read(Space::StateMeta, META)
    }

    /// Streams all rows; returns the meta.
    pub fn export(&self, to: impl Write) -> Result<Vec<u8>, Error> {
        export(&*self.engine, to)
    }
}

/// Checks a whole exported stream without installing it, and shows each row's table, key and value.
pub fn verify(from: impl Read, mut visit: impl FnMut(u8, &[u8], &[u8])) -> Result<Head, Error> {
    read(from, &mut |key, value| {
        if let Some((&table, key)) = key.split_first() {
            visit(table, key, value);
        }
        Ok(())
    })
}

pub(crate) fn export(view: &dyn View, to: impl Write) -> Result<Vec<u8>, Error> {
    let meta = view.read(Space::StateMeta, META)?.unwrap_or_default();
    let mut sink = Sink::new(to);
    let mut header = MAGIC.to_vec();
    header.extend_from_slice(&bounds(view)?.last.to_be_bytes());
    header.extend_from_slice(&meta);
    sink.write(HEADER, &header)?;

    let mut block = Vec::with_capacity(BLOCK_BYTES);
    let mut rows = 0u64;
    let mut failed = None;
    view.iterate(side_of(view)?, &[], None, &mut |key, value| {
        if !block.is_empty() && block.len() + key.len() + value.len() > BLOCK_BYTES {
            if let Err(error) = sink.write(ROWS, &block) {
                failed = Some(error);
                return ControlFlow::Break(());
            }
            block.clear();
        }
        // A row longer than u32 does not fit into a block either, and is refused there.
        for part in [key, value] {
            block.extend_from_slice(&u32::try_from(part.len()).unwrap_or(u32::MAX).to_be_bytes());
            block.extend_from_slice(part);
        }
        rows += 1;
        ControlFlow::Continue(())
    })?;
    if let Some(error) = failed {
        return Err(error);
    }
    if !block.is_empty() {
        sink.write(ROWS, &block)?;
    }
    let mut end = rows.to_be_bytes().to_vec();
    end.extend_from_slice(&sink.digest());
    sink.write(END, &end)?;
    sink.flush()?;
    Ok(meta)
}

/// What is called for each row, with its key (table first) and value.
type OnRow<'a> = dyn FnMut(&[u8], &[u8]) -> Result<(), Error> + 'a;

/// Reads a whole stream, checking it; what `row` did before an error must be undone by the caller.
pub(super) fn read(from: impl Read, row: &mut OnRow<'_>) -> Result<Head, Error> {
    let mut source = Source::new(from);
    let (tag, header, _) = source.read()?;
    let header = header.strip_prefix(MAGIC).filter(|_| tag == HEADER).and_then(|rest| rest.split_first_chunk::<8>());
    let Some((journal_last, meta)) = header else {
        return Err(source.damaged("it does not begin like a snapshot"));
    };
    let (journal_last, meta) = (u64::from_be_bytes(*journal_last), meta.to_vec());

    let mut rows = 0u64;
    let mut last_key: Option<Vec<u8>> = None;
    loop {
        let (tag, content, digest) = source.read()?;
        match tag {
            ROWS => {
                let mut rest = content.as_slice();
                while !rest.is_empty() {
                    let (Some(key), Some(value)) = (part(&mut rest), part(&mut rest)) else {
                        return Err(source.damaged("a row is cut short"));
                    };
                    if key.first().is_none_or(|&table| table == RESERVED_TABLE) {
                        return Err(source.damaged("a row has no table"));
                    }
                    if last_key.as_deref().is_some_and(|last| last >= key) {
                        return Err(source.damaged("rows are not in order"));
                    }
                    row(key, value)?;
                    last_key = Some(key.to_vec());
                    rows += 1;
                }
            }
            END => {
                if content.split_first_chunk::<8>() != Some((&rows.to_be_bytes(), &digest)) {
                    return Err(source.damaged("its number of rows or its digest does not match"));
                }
                source.end()?;
                return Ok(Head { journal_last, meta, rows });
            }
            _ => return Err(source.damaged("a block is of an unknown kind")),
        }
    }
}

fn part<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let (length, after) = rest.split_first_chunk::<4>()?;
    let (part, after) = after.split_at_checked(u32::from_be_bytes(*length) as usize)?;
    *rest = after;
    Some(part)
}
