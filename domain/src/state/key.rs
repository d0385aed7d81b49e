//! Keys of rows and of the index as they stand in memory: in place, without an allocation of their own.

use std::borrow::Borrow;
use std::cmp::Ordering;
use std::fmt;
use std::sync::Arc;

use sha2::{Digest, Sha256};

use super::table::{IndexKey, Table};

const SHORT_BYTES_MAX: usize = 22;

/// The key of a row. Ids and most other keys are short.
#[derive(Clone)]
pub(super) enum Key {
    Short { length: u8, bytes: [u8; SHORT_BYTES_MAX] },
    Long(Arc<[u8]>),
}

impl Key {
    pub(super) fn as_bytes(&self) -> &[u8] {
        match self {
            Self::Short { length, bytes } => &bytes[..usize::from(*length)],
            Self::Long(bytes) => bytes,
        }
    }
}

impl From<&[u8]> for Key {
    fn from(key: &[u8]) -> Self {
        let mut bytes = [0; SHORT_BYTES_MAX];
        match (bytes.get_mut(..key.len()), u8::try_from(key.len())) {
            (Some(place), Ok(length)) => {
                place.copy_from_slice(key);
                Self::Short { length, bytes }
            }
            _ => Self::Long(key.into()),
        }
    }
}

impl Borrow<[u8]> for Key {
    fn borrow(&self) -> &[u8] {
        self.as_bytes()
    }
}

impl PartialEq for Key {
    fn eq(&self, other: &Self) -> bool {
        self.as_bytes() == other.as_bytes()
    }
}

impl Eq for Key {}

impl PartialOrd for Key {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Key {
    fn cmp(&self, other: &Self) -> Ordering {
        self.as_bytes().cmp(other.as_bytes())
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.as_bytes().fmt(f)
    }
}

/// Where something that a row is found by stands in the index: the table, and a number or 120 bits of a SHA-256, which
/// no two names share.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place([u8; 16]);

impl Place {
    pub(super) fn of(table: Table, key: &IndexKey) -> Self {
        let mut place = [0; 16];
        place[0] = table as u8;
        let digest = |kind: u8, scope: &[u8], text: &[u8]| {
            Sha256::new().chain_update([kind]).chain_update(scope).chain_update(text).finalize()
        };
        let digest = match key {
            IndexKey::Number(number) => {
                place[12..].copy_from_slice(&number.to_be_bytes());
                return Self(place);
            }
            IndexKey::Name(scope, name) => digest(1, &scope.key(), name.as_bytes()),
            IndexKey::Secret(sha256) => digest(2, &[], sha256),
            IndexKey::External(scope, id) => digest(3, &scope.key(), id.as_bytes()),
        };
        place[1..].copy_from_slice(&digest[..15]);
        Self(place)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_sort_as_their_bytes_do_however_long_they_are() {
        let texts = [&b""[..], b"a", b"a\0", &[b'a'; 22], &[b'a'; 23], &[b'a'; 300], b"b"];
        let keys: Vec<Key> = texts.iter().map(|text| Key::from(*text)).collect();
        for (a, text_a) in keys.iter().zip(texts) {
            assert_eq!(a.as_bytes(), text_a);
            for (b, text_b) in keys.iter().zip(texts) {
                assert_eq!(a.cmp(b), text_a.cmp(text_b));
            }
        }
        assert_eq!(size_of::<Key>(), 24);
    }
}
