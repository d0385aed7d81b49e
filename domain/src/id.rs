//! Ids and positions: `(epoch, seq)` of an event.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The id of an object, and equally a position in the event log: the epoch and sequence number of an event.
///
/// An object's id is the position of the event that made it, so ids are never reused. Ordered by epoch, then
/// sequence. Printed as `epoch-seq`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Message)]
pub struct Id {
    /// Raised by each restore and recovery; starts at 1.
    #[prost(uint32, tag = "1")]
    pub epoch: u32,
    /// A counter of events that never restarts; starts at 1.
    #[prost(uint64, tag = "2")]
    pub seq: u64,
}

impl Id {
    /// An id from its parts.
    pub const fn new(epoch: u32, seq: u64) -> Self {
        Self { epoch, seq }
    }

    /// Big-endian bytes that sort as the id does.
    pub fn key(self) -> [u8; 12] {
        let mut key = [0; 12];
        key[..4].copy_from_slice(&self.epoch.to_be_bytes());
        key[4..].copy_from_slice(&self.seq.to_be_bytes());
        key
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.epoch, self.seq)
    }
}

/// The text is not an id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not an id (`epoch-seq`)")]
pub struct ParseError(String);

impl FromStr for Id {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parsed = text.split_once('-').and_then(|(epoch, seq)| {
            let id = Self::new(epoch.parse().ok()?, seq.parse().ok()?);
            (id.to_string() == text).then_some(id)
        });
        parsed.ok_or_else(|| ParseError(text.chars().take(64).collect()))
    }
}

impl Serialize for Id {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() {
            serializer.collect_str(self)
        } else {
            (self.epoch, self.seq).serialize(serializer)
        }
    }
}

impl<'de> Deserialize<'de> for Id {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if deserializer.is_human_readable() {
            String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
        } else {
            let (epoch, seq) = <(u32, u64)>::deserialize(deserializer)?;
            Ok(Self { epoch, seq })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_reads_back_only_what_it_prints() {
        assert_eq!("1-42".parse(), Ok(Id::new(1, 42)));
        for text in ["", "1", "1-", "-1", "01-2", "1-+2", "1-2-3", "1- 2"] {
            assert!(text.parse::<Id>().is_err(), "{text}");
        }
    }
}
