//! What a start does with the end of a stream: a record that a crash cut is removed if nothing readable follows.

use std::{
    fs::{self, OpenOptions},
    path::Path,
    sync::Arc,
};

use super::{
    Broken, Record, StreamId, record,
    segment::{Segment, segments},
};
use crate::{Error, dir::sync_dir};

/// Where a stream ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) seq: u64,
    pub(super) hash: [u8; 32],
}

/// Cuts a torn end and returns where the stream ends now.
pub(super) fn recover(root: &Path, stream: StreamId) -> Result<Head, Error> {
    let dir = root.join(stream.to_string());
    let mut known = segments(&dir)?.known;
    while let Some(segment) = known.pop() {
        let bytes = fs::read(&segment.path).map_err(Error::io("read", &segment.path))?;
        let (head, end) = walk(&segment, &bytes, stream)?;
        if end < bytes.len() {
            tracing::warn!(%stream, segment = segment.name(), offset = end, bytes = bytes.len() - end,
                "cut the end of an audit stream that a crash left");
            OpenOptions::new()
                .write(true)
                .open(&segment.path)
                .and_then(|file| file.set_len(end as u64).and_then(|()| file.sync_all()))
                .map_err(Error::io("cut", &segment.path))?;
        }
        if let Some(head) = head {
            return Ok(head);
        }
        fs::remove_file(&segment.path).map_err(Error::io("remove", &segment.path))?;
        sync_dir(&dir)?;
        if segment.first_seq > 1 && known.is_empty() {
            // Retention never leaves an empty segment alone; without the one before it the chain cannot go on.
            return Err(broken(&segment, stream, 0, segment.first_seq, "the segment before it is missing"));
        }
    }
    Ok(Head { seq: 0, hash: [0; 32] })
}

/// The last whole record, and where it ends.
fn walk(segment: &Segment, bytes: &[u8], stream: StreamId) -> Result<(Option<Head>, usize), Error> {
    let mut head: Option<Head> = None;
    let mut offset = 0;
    while offset < bytes.len() {
        let seq = head.map_or(segment.first_seq, |head| head.seq + 1);
        let record = match record::first(&bytes[offset..]) {
            Ok(record) => Record::parse(record.to_vec()),
            Err(why) => match readable_behind(bytes, offset + 1, stream) {
                None => return Ok((head, offset)),
                Some(at) => {
                    let why = format!("{why}, and a record at byte {at} behind it is readable");
                    return Err(broken(segment, stream, offset, seq, &why));
                }
            },
        };
        let record = record.map_err(|why| broken(segment, stream, offset, seq, why))?;
        if (record.stream, record.seq) != (stream, seq) {
            return Err(broken(segment, stream, offset, seq, "another record stands in its place"));
        }
        offset += record::FRAME_BYTES + record.bytes().len();
        head = Some(Head { seq, hash: record.hash });
    }
    Ok((head, offset))
}

fn readable_behind(bytes: &[u8], from: usize, stream: StreamId) -> Option<usize> {
    (from..bytes.len()).find(|&at| record::plausible(&bytes[at..], stream) && record::first(&bytes[at..]).is_ok())
}

fn broken(segment: &Segment, stream: StreamId, offset: usize, seq: u64, why: &str) -> Error {
    let broken =
        Broken { stream: stream.to_string(), segment: segment.name(), offset: offset as u64, seq, why: why.to_owned() };
    Arc::new(broken).into()
}
