//! How many bytes of records lie behind an index, to the mebibyte.

use std::collections::VecDeque;

/// Bytes between two marks.
const MARK_BYTES: u64 = 1 << 20;

#[derive(Debug, Default)]
pub(super) struct Sizes {
    /// Bytes of all records that were found or appended, ever.
    written_bytes: u64,
    /// Some records' indices, each with `written_bytes` behind it.
    marks: VecDeque<(u64, u64)>,
}

impl Sizes {
    pub(super) fn push(&mut self, index: u64, size_bytes: usize) {
        self.written_bytes += size_bytes as u64;
        if self.marks.back().is_none_or(|(_, at)| self.written_bytes - at >= MARK_BYTES) {
            self.marks.push_back((index, self.written_bytes));
        }
    }

    pub(super) fn truncate_from(&mut self, index: u64) {
        while self.marks.pop_back_if(|(marked, _)| *marked >= index).is_some() {}
    }

    pub(super) fn purge_upto(&mut self, index: u64) {
        while self.marks.pop_front_if(|(marked, _)| *marked <= index).is_some() {}
    }

    pub(super) fn written_bytes(&self) -> u64 {
        self.written_bytes
    }

    /// The last marked index with at least so many bytes behind it. What was truncated counts as if it were there.
    pub(super) fn index_behind(&self, bytes: u64) -> Option<u64> {
        let marks = self.marks.iter().rev();
        marks.into_iter().find(|(_, at)| self.written_bytes - at >= bytes).map(|(index, _)| *index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_index_behind_which_enough_lies_is_found_to_the_mebibyte() {
        let mut sizes = Sizes::default();
        for index in 0..100 {
            sizes.push(index, 100 << 10);
        }
        assert_eq!(sizes.written_bytes(), 100 * (100 << 10));
        let cut = sizes.index_behind(3 << 20).expect("there is more");
        let behind = (99 - cut) * (100 << 10);
        assert!((3 << 20..5 << 20).contains(&behind), "{behind} bytes behind {cut}");
        assert_eq!(sizes.index_behind(1 << 30), None);
        sizes.purge_upto(cut);
        assert_eq!(sizes.index_behind(3 << 20), None);
        sizes.truncate_from(0);
        assert_eq!(sizes.index_behind(0), None);
    }
}
