//! The canonical bytes of a record, over which its hash is taken.
//!
//! version u8, broker u64, boot u64, seq u64, time in ms u64, hash of the record before (32 bytes, zero for the
//! first), body. The hash is SHA-256 over all of it.

use std::{fmt, str::FromStr};

use sha2::{Digest, Sha256};

use super::BODY_BYTES_MAX;

const VERSION: u8 = 1;
const BODY_AT: usize = 65;
/// Bytes of a frame before its record.
pub(super) const FRAME_BYTES: usize = 8;

/// One boot of one broker. Printed as two hexadecimal numbers of 16 digits with a dash between.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StreamId {
    /// Node id of the broker.
    pub broker: u64,
    /// Its boot.
    pub boot: u64,
}

impl fmt::Display for StreamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}-{:016x}", self.broker, self.boot)
    }
}

/// The text is not a stream id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not an audit stream")]
pub struct ParseError(String);

impl FromStr for StreamId {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<StreamId, ParseError> {
        let parsed = text.split_once('-').and_then(|(broker, boot)| {
            let number = |hex| u64::from_str_radix(hex, 16).ok();
            let stream = StreamId { broker: number(broker)?, boot: number(boot)? };
            (stream.to_string() == text).then_some(stream)
        });
        parsed.ok_or_else(|| ParseError(text.chars().take(64).collect()))
    }
}

/// A record as it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Its stream.
    pub stream: StreamId,
    /// Its place in the stream; begins at 1.
    pub seq: u64,
    /// When it was made, as its maker said.
    pub time_ms: u64,
    /// Hash of the record before it.
    pub prev_hash: [u8; 32],
    /// Its own hash.
    pub hash: [u8; 32],
    bytes: Vec<u8>,
}

impl Record {
    /// The canonical bytes, over which [`Record::hash`] is taken.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// What was appended.
    pub fn body(&self) -> &[u8] {
        &self.bytes[BODY_AT..]
    }

    /// Parses canonical bytes.
    pub fn parse(bytes: Vec<u8>) -> Result<Record, &'static str> {
        if bytes.len() < BODY_AT {
            return Err("it is shorter than a record");
        }
        if bytes[0] != VERSION {
            return Err("its version is unknown");
        }
        let number = |at: usize| bytes[at..].first_chunk().map_or(0, |chunk| u64::from_be_bytes(*chunk));
        let mut prev_hash = [0; 32];
        prev_hash.copy_from_slice(&bytes[33..BODY_AT]);
        Ok(Record {
            stream: StreamId { broker: number(1), boot: number(9) },
            seq: number(17),
            time_ms: number(25),
            prev_hash,
            hash: hash(&bytes),
            bytes,
        })
    }
}

/// Appends the frame of a new record to `out`; returns the record's hash.
pub(super) fn frame(
    out: &mut Vec<u8>,
    stream: StreamId,
    seq: u64,
    time_ms: u64,
    prev_hash: &[u8; 32],
    body: &[u8],
) -> [u8; 32] {
    let length = u32::try_from(BODY_AT + body.len()).unwrap_or(u32::MAX).to_be_bytes();
    let start = out.len();
    out.extend_from_slice(&length);
    out.extend_from_slice(&[0; 4]);
    out.push(VERSION);
    for number in [stream.broker, stream.boot, seq, time_ms] {
        out.extend_from_slice(&number.to_be_bytes());
    }
    out.extend_from_slice(prev_hash);
    out.extend_from_slice(body);
    let crc = checksum(length, &out[start + FRAME_BYTES..]);
    out[start + 4..start + FRAME_BYTES].copy_from_slice(&crc.to_be_bytes());
    hash(&out[start + FRAME_BYTES..])
}

/// Bytes that a body takes in a segment.
pub(super) fn framed_bytes(body: &[u8]) -> usize {
    FRAME_BYTES + BODY_AT + body.len()
}

/// The length of the record behind a frame's head, if a record may have it.
pub(super) fn length(head: [u8; FRAME_BYTES]) -> Result<usize, &'static str> {
    let [l0, l1, l2, l3, ..] = head;
    let length = u32::from_be_bytes([l0, l1, l2, l3]) as usize;
    if (BODY_AT..=BODY_AT + BODY_BYTES_MAX).contains(&length) {
        Ok(length)
    } else {
        Err("its length is not that of a record")
    }
}

/// Checks a record against its frame's head.
pub(super) fn check(head: [u8; FRAME_BYTES], record: &[u8]) -> Result<(), &'static str> {
    let [l0, l1, l2, l3, c0, c1, c2, c3] = head;
    if checksum([l0, l1, l2, l3], record) == u32::from_be_bytes([c0, c1, c2, c3]) {
        Ok(())
    } else {
        Err("its checksum does not match")
    }
}

/// The record that begins the bytes, without parsing it.
pub(super) fn first(bytes: &[u8]) -> Result<&[u8], &'static str> {
    let (head, rest) = bytes.split_first_chunk::<FRAME_BYTES>().ok_or("it is cut short")?;
    let record = rest.get(..length(*head)?).ok_or("it is cut short")?;
    check(*head, record)?;
    Ok(record)
}

/// Whether bytes look like a record of a stream; cheaper than its checksum.
pub(super) fn plausible(bytes: &[u8], stream: StreamId) -> bool {
    let mut start = [VERSION; 17];
    start[1..9].copy_from_slice(&stream.broker.to_be_bytes());
    start[9..].copy_from_slice(&stream.boot.to_be_bytes());
    bytes.get(FRAME_BYTES..).is_some_and(|record| record.starts_with(&start))
}

fn checksum(length: [u8; 4], record: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&length), record)
}

fn hash(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}
