//! The end of the log in memory: all records that are not durable yet, and recent ones that are.

use std::collections::VecDeque;

use super::Record;

#[derive(Default)]
pub(super) struct Tail {
    /// Records in order without a hole, each with the number of the request that brought it.
    records: VecDeque<(u64, Record)>,
    size_bytes: usize,
}

impl Tail {
    pub(super) fn push(&mut self, request: u64, record: Record) {
        self.size_bytes += record.size_bytes();
        self.records.push_back((request, record));
    }

    pub(super) fn truncate_from(&mut self, index: u64) {
        while let Some((_, record)) = self.records.pop_back_if(|(_, record)| record.id.index >= index) {
            self.size_bytes -= record.size_bytes();
        }
    }

    pub(super) fn purge_upto(&mut self, index: u64) {
        while let Some((_, record)) = self.records.pop_front_if(|(_, record)| record.id.index <= index) {
            self.size_bytes -= record.size_bytes();
        }
    }

    /// Forgets the oldest records over `limit_bytes`, as far as requests up to `durable` brought them.
    pub(super) fn evict(&mut self, durable: u64, limit_bytes: usize) {
        while self.size_bytes > limit_bytes {
            let Some((_, record)) = self.records.pop_front_if(|(request, _)| *request <= durable) else { return };
            self.size_bytes -= record.size_bytes();
        }
    }

    pub(super) fn first_index(&self) -> Option<u64> {
        self.records.front().map(|(_, record)| record.id.index)
    }

    pub(super) fn last(&self) -> Option<&Record> {
        self.records.back().map(|(_, record)| record)
    }

    /// The records from `index` on, which must not lie before the first.
    pub(super) fn from(&self, index: u64) -> impl Iterator<Item = &Record> {
        let skip = self.first_index().map_or(0, |first| index.saturating_sub(first));
        self.records.iter().skip(usize::try_from(skip).unwrap_or(usize::MAX)).map(|(_, record)| record)
    }
}
