//! What an engine writes at once.

use super::{END, Space};

/// One change of a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// Sets a key.
    Put {
        /// Where.
        space: Space,
        /// The key.
        key: Vec<u8>,
        /// The value.
        value: Vec<u8>,
    },
    /// Removes a key.
    Delete {
        /// Where.
        space: Space,
        /// The key.
        key: Vec<u8>,
    },
    /// Removes the keys from `from` (included) to `to` (excluded).
    DeleteRange {
        /// Where.
        space: Space,
        /// First key that goes.
        from: Vec<u8>,
        /// First key that stays.
        to: Vec<u8>,
    },
}

/// Changes that are applied in order and all together.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WriteBatch {
    ops: Vec<Op>,
    size_bytes: usize,
}

impl WriteBatch {
    /// An empty batch.
    pub fn new() -> WriteBatch {
        WriteBatch::default()
    }

    /// Sets a key.
    pub fn put(&mut self, space: Space, key: impl Into<Vec<u8>>, value: impl Into<Vec<u8>>) {
        let (key, value) = (key.into(), value.into());
        self.size_bytes += key.len() + value.len();
        self.ops.push(Op::Put { space, key, value });
    }

    /// Removes a key.
    pub fn delete(&mut self, space: Space, key: impl Into<Vec<u8>>) {
        let key = key.into();
        self.size_bytes += key.len();
        self.ops.push(Op::Delete { space, key });
    }

    /// Removes the keys from `from` (included) to `to` (excluded).
    pub fn delete_range(&mut self, space: Space, from: impl Into<Vec<u8>>, to: impl Into<Vec<u8>>) {
        let (from, to) = (from.into(), to.into());
        self.size_bytes += from.len() + to.len();
        self.ops.push(Op::DeleteRange { space, from, to });
    }

    /// Removes all keys of a space.
    pub fn clear(&mut self, space: Space) {
        self.delete_range(space, Vec::new(), END);
    }

    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.ops.is_empty()
    }

    /// Bytes of keys and values.
    pub fn size_bytes(&self) -> usize {
        self.size_bytes
    }

    /// The changes in order.
    pub fn ops(&self) -> &[Op] {
        &self.ops
    }
}
