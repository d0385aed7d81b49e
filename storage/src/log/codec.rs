//! The bytes of log records. Never changed: a new layout gets a new version byte.
//!
//! Record: key = index, big-endian u64; value = version u8, term u64, node u64, kind u8, crc32c u32 (over the key and
//! all of the value but itself), payload. Small records: version u8, bincode (big-endian, fixed width), crc32c u32.

use bincode::config;
use bytes::Bytes;

use super::{LogId, Payload, Record};

/// Bytes of a key.
pub(super) const KEY_BYTES: usize = 8;
/// Bytes of a value before its payload.
pub(super) const HEADER_BYTES: usize = 22;
const CRC_AT: usize = 18;
const VERSION: u8 = 1;
const KIND_BLANK: u8 = 0;
const KIND_NORMAL: u8 = 1;
const KIND_MEMBERSHIP: u8 = 2;

pub(super) fn key(index: u64) -> [u8; KEY_BYTES] {
    index.to_be_bytes()
}

pub(super) fn index(key: &[u8]) -> Option<u64> {
    Some(u64::from_be_bytes(key.try_into().ok()?))
}

pub(super) fn encode(record: &Record) -> Vec<u8> {
    let payload = record.payload.bytes();
    let kind = match record.payload {
        Payload::Blank => KIND_BLANK,
        Payload::Normal(_) => KIND_NORMAL,
        Payload::Membership(_) => KIND_MEMBERSHIP,
    };
    let mut value = Vec::with_capacity(HEADER_BYTES + payload.len());
    value.push(VERSION);
    value.extend_from_slice(&record.id.term.to_be_bytes());
    value.extend_from_slice(&record.id.node.to_be_bytes());
    value.push(kind);
    value.extend_from_slice(&checksum(record.id.index, &value, payload).to_be_bytes());
    value.extend_from_slice(payload);
    value
}

pub(super) fn decode(index: u64, value: &[u8]) -> Result<Record, String> {
    if value.len() < HEADER_BYTES {
        return Err(format!("it has {} bytes, fewer than a header", value.len()));
    }
    let (header, payload) = value.split_at(HEADER_BYTES);
    let stored = u32::from_be_bytes(array(&header[CRC_AT..]));
    if checksum(index, &header[..CRC_AT], payload) != stored {
        return Err("its checksum does not match".to_owned());
    }
    if header[0] != VERSION {
        return Err(format!("its version {} is unknown", header[0]));
    }
    let id = LogId {
        term: u64::from_be_bytes(array(&header[1..9])),
        node: u64::from_be_bytes(array(&header[9..17])),
        index,
    };
    let payload = match header[17] {
        KIND_BLANK if payload.is_empty() => Payload::Blank,
        KIND_NORMAL => Payload::Normal(Bytes::copy_from_slice(payload)),
        KIND_MEMBERSHIP => Payload::Membership(Bytes::copy_from_slice(payload)),
        kind => return Err(format!("its kind {kind} is unknown")),
    };
    Ok(Record { id, payload })
}

pub(super) fn encode_meta<T: bincode::Encode>(value: T) -> Vec<u8> {
    let mut bytes = vec![VERSION];
    bincode::encode_into_std_write(value, &mut bytes, layout()).expect("a vector takes all, and the type has no maps");
    let crc = crc32c::crc32c(&bytes);
    bytes.extend_from_slice(&crc.to_be_bytes());
    bytes
}

pub(super) fn decode_meta<T: bincode::Decode<()>>(bytes: &[u8]) -> Result<T, String> {
    let Some((content, crc)) = bytes.split_last_chunk::<4>() else {
        return Err("it is too short".to_owned());
    };
    if crc32c::crc32c(content) != u32::from_be_bytes(*crc) {
        return Err("its checksum does not match".to_owned());
    }
    let Some((&VERSION, content)) = content.split_first() else {
        return Err("its version is unknown".to_owned());
    };
    match bincode::decode_from_slice(content, layout()) {
        Ok((value, used)) if used == content.len() => Ok(value),
        Ok(_) => Err("it is too long".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

fn layout() -> impl config::Config {
    config::standard().with_big_endian().with_fixed_int_encoding()
}

fn checksum(index: u64, header: &[u8], payload: &[u8]) -> u32 {
    let crc = crc32c::crc32c(&key(index));
    crc32c::crc32c_append(crc32c::crc32c_append(crc, header), payload)
}

fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
    let mut array = [0; N];
    array.copy_from_slice(&bytes[..N]);
    array
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{super::Vote, *};

    fn payloads() -> impl Strategy<Value = Payload> {
        let bytes = || proptest::collection::vec(any::<u8>(), 0..200).prop_map(Bytes::from);
        prop_oneof![Just(Payload::Blank), bytes().prop_map(Payload::Normal), bytes().prop_map(Payload::Membership)]
    }

    proptest! {
        #[test]
        fn a_record_comes_back_as_it_was(term: u64, node: u64, index: u64, payload in payloads()) {
            let record = Record { id: LogId { term, node, index }, payload };
            let value = encode(&record);
            prop_assert_eq!(value.len() + KEY_BYTES, record.size_bytes());
            prop_assert_eq!(decode(index, &value), Ok(record));
        }

        #[test]
        fn a_changed_byte_or_place_is_noticed(payload in payloads(), at: prop::sample::Index, with in 1..=255u8) {
            let record = Record { id: LogId { term: 3, node: 7, index: 9 }, payload };
            let mut value = encode(&record);
            prop_assert!(decode(10, &value).is_err());
            let at = at.index(value.len());
            value[at] ^= with;
            prop_assert!(decode(9, &value).is_err());
        }

        #[test]
        fn any_bytes_are_decoded_or_refused(value in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = decode(1, &value);
            let _ = decode_meta::<Vote>(&value);
        }

        #[test]
        fn a_vote_comes_back_as_it_was(term: u64, node: u64, committed: bool) {
            let vote = Vote { term, node, committed };
            prop_assert_eq!(decode_meta(&encode_meta(vote)), Ok(vote));
        }
    }

    #[test]
    fn the_layout_on_disk_never_changes() {
        let record =
            Record { id: LogId { term: 1, node: 2, index: 3 }, payload: Payload::Normal(Bytes::from_static(b"hi")) };
        assert_eq!(hex::encode(encode(&record)), GOLDEN_RECORD);
        assert_eq!(hex::encode(encode_meta(Vote { term: 1, node: 2, committed: true })), GOLDEN_VOTE);
    }

    const GOLDEN_RECORD: &str = "010000000000000001000000000000000201f83f7d3c6869";
    const GOLDEN_VOTE: &str = "010000000000000001000000000000000201d8340747";
}
