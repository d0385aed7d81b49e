//! What an engine writes at once.

use std::ops::Range;

use super::{END, Space};

/// One change of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op<'a> {
    /// Sets a key.
    Put {
        /// Where.
        space: Space,
        /// The key.
        key: &'a [u8],
        /// The value.
        value: &'a [u8],
    },
    /// Removes a key.
    Delete {
        /// Where.
        space: Space,
        /// The key.
        key: &'a [u8],
    },
    /// Removes the keys from `from` (included) to `to` (excluded).
    DeleteRange {
        /// Where.
        space: Space,
        /// First key that goes.
        from: &'a [u8],
        /// First key that stays.
        to: &'a [u8],
    },
}

/// Changes that are applied in order and all together. Their bytes lie in one piece, since most are small and many.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WriteBatch {
    ops: Vec<(Kind, Space, Range<usize>, Range<usize>)>,
    bytes: Vec<u8>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Put,
    Delete,
    DeleteRange,
}

impl WriteBatch {
    /// An empty batch.
    pub fn new() -> WriteBatch {
        WriteBatch::default()
    }

    /// Sets a key.
    pub fn put(&mut self, space: Space, key: impl AsRef<[u8]>, value: impl AsRef<[u8]>) {
        self.push(Kind::Put, space, key.as_ref(), value.as_ref());
    }

    /// Removes a key.
    pub fn delete(&mut self, space: Space, key: impl AsRef<[u8]>) {
        self.push(Kind::Delete, space, key.as_ref(), &[]);
    }

    /// Removes the keys from `from` (included) to `to` (excluded).
    pub fn delete_range(&mut self, space: Space, from: impl AsRef<[u8]>, to: impl AsRef<[u8]>) {
        self.push(Kind::DeleteRange, space, from.as_ref(), to.as_ref());
    }

    /// Removes all keys of a space.
    pub fn clear(&mut self, space: Space) {
        self.delete_range(space, [], END);
    }

    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.ops.is_empty()
    }

    /// Bytes of keys and values.
    pub fn size_bytes(&self) -> usize {
        self.bytes.len()
    }

    /// The changes in order.
    pub fn ops(&self) -> impl Iterator<Item = Op<'_>> {
        self.ops.iter().map(|(kind, space, first, second)| {
            let (space, first, second) = (*space, &self.bytes[first.clone()], &self.bytes[second.clone()]);
            match kind {
                Kind::Put => Op::Put { space, key: first, value: second },
                Kind::Delete => Op::Delete { space, key: first },
                Kind::DeleteRange => Op::DeleteRange { space, from: first, to: second },
            }
        })
    }

    fn push(&mut self, kind: Kind, space: Space, first: &[u8], second: &[u8]) {
        let begin = self.bytes.len();
        self.bytes.extend_from_slice(first);
        let middle = self.bytes.len();
        self.bytes.extend_from_slice(second);
        self.ops.push((kind, space, begin..middle, middle..self.bytes.len()));
    }
}
