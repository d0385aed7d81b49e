//! Connectors that owe the confirmation of a cut.
//!
//! A connector reads what this broker forwards only within what it was told is left of the broker's lease: its fence.
//!
//! **Invariant:** while a connector owes, it is told of no more of the lease than it may have been told before the cut.
//! So it has confirmed in the end, or its fence is over.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;
use selvedge_domain::Id;

/// Which connectors owe, and when the lease ended of which they had been told. **Units**: boottime, milliseconds.
#[derive(Default)]
pub(super) struct Owed(Mutex<Inner>);

#[derive(Default)]
struct Inner {
    next: u64,
    until_ms: BTreeMap<(Id, u64), u64>,
}

/// One confirmation that is owed, as long as this lives.
pub(super) struct Owing {
    owed: Arc<Owed>,
    key: (Id, u64),
}

impl Drop for Owing {
    fn drop(&mut self) {
        self.owed.0.lock().until_ms.remove(&self.key);
    }
}

impl Owed {
    /// From now on this connector owes one more confirmation; the lease that it may know of ends at `until_ms`.
    pub(super) fn enter(self: &Arc<Self>, connector: Id, until_ms: u64) -> Owing {
        let mut inner = self.0.lock();
        inner.next += 1;
        let key = (connector, inner.next);
        inner.until_ms.insert(key, until_ms);
        Owing { owed: self.clone(), key }
    }

    /// What a connector may be told is left, when `left_ms` is.
    pub(super) fn left_ms(&self, connector: Id, now_ms: u64, left_ms: u64) -> u64 {
        let inner = self.0.lock();
        let until_ms =
            inner.until_ms.range((connector, 0)..=(connector, u64::MAX)).map(|(_, until_ms)| *until_ms).min();
        until_ms.map_or(left_ms, |until_ms| left_ms.min(until_ms.saturating_sub(now_ms)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connector_that_owes_is_told_of_no_later_end_than_before_the_cut() {
        let owed = Arc::new(Owed::default());
        let (slow, other) = (Id::new(1, 5), Id::new(1, 6));
        let first = owed.enter(slow, 1_000);
        let second = owed.enter(slow, 1_500);
        assert_eq!(owed.left_ms(slow, 400, 5_000), 600);
        assert_eq!(owed.left_ms(slow, 400, 50), 50);
        assert_eq!(owed.left_ms(slow, 2_000, 5_000), 0);
        assert_eq!(owed.left_ms(other, 400, 5_000), 5_000);
        drop(first);
        assert_eq!(owed.left_ms(slow, 400, 5_000), 1_100);
        drop(second);
        assert_eq!(owed.left_ms(slow, 400, 5_000), 5_000);
        assert!(owed.0.lock().until_ms.is_empty());
    }
}
