//! The clocks of this machine, and cluster time.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// This machine's clocks, in milliseconds.
pub trait Clock: Send + Sync + 'static {
    /// Wall clock: since the Unix epoch; may step.
    fn wall_ms(&self) -> u64;

    /// Since boot; a pause of the machine does not stop it, and it never steps.
    fn boottime_ms(&self) -> u64;
}

/// The clocks of the operating system.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

impl SystemClock {
    /// As a shared [`Clock`].
    pub fn shared() -> Arc<dyn Clock> {
        Arc::new(Self)
    }
}

impl Clock for SystemClock {
    fn wall_ms(&self) -> u64 {
        read_ms(libc::CLOCK_REALTIME)
    }

    fn boottime_ms(&self) -> u64 {
        read_ms(libc::CLOCK_BOOTTIME)
    }
}

/// The clocks of the operating system, and what was added to both: the machine as it will be then.
#[derive(Debug, Default)]
pub struct ShiftedClock {
    by_ms: AtomicU64,
}

impl ShiftedClock {
    /// Lets so much time pass at once.
    pub fn advance(&self, by_ms: u64) {
        self.by_ms.fetch_add(by_ms, Ordering::SeqCst);
    }
}

impl Clock for ShiftedClock {
    fn wall_ms(&self) -> u64 {
        SystemClock.wall_ms() + self.by_ms.load(Ordering::SeqCst)
    }

    fn boottime_ms(&self) -> u64 {
        SystemClock.boottime_ms() + self.by_ms.load(Ordering::SeqCst)
    }
}

#[expect(unsafe_code, reason = "the standard library reads neither clock as it is")]
fn read_ms(clock: libc::clockid_t) -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a valid timespec that lives through the call.
    let failed = unsafe { libc::clock_gettime(clock, &raw mut time) } != 0;
    assert!(!failed, "both clocks exist on every Linux that this runs on");
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    seconds * 1_000 + u64::try_from(time.tv_nsec).unwrap_or(0) / 1_000_000
}

/// Cluster time as this broker knows it: the time of the last entry applied, and what has passed since.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ClusterTime {
    entry_ms: u64,
    at_boottime_ms: u64,
    /// An entry that was made since this process started was applied.
    of_this_boot: bool,
}

impl ClusterTime {
    pub(crate) fn applied(&mut self, entry_ms: u64, clock: &dyn Clock, of_this_boot: bool) {
        // Never backwards: what has passed since the last entry counts.
        self.entry_ms = if self.of_this_boot { self.now_ms(clock).max(entry_ms) } else { self.entry_ms.max(entry_ms) };
        self.at_boottime_ms = clock.boottime_ms();
        self.of_this_boot |= of_this_boot;
    }

    pub(crate) fn now_ms(&self, clock: &dyn Clock) -> u64 {
        if self.of_this_boot {
            self.entry_ms + clock.boottime_ms().saturating_sub(self.at_boottime_ms)
        } else {
            self.entry_ms.max(clock.wall_ms())
        }
    }

    pub(crate) fn is_of_this_boot(&self) -> bool {
        self.of_this_boot
    }
}

#[cfg(test)]
pub(crate) mod testing {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::Clock;

    /// Clocks that a test sets.
    #[derive(Debug, Default)]
    pub(crate) struct Manual {
        pub(crate) wall: AtomicU64,
        pub(crate) boottime: AtomicU64,
    }

    impl Clock for Manual {
        fn wall_ms(&self) -> u64 {
            self.wall.load(Ordering::SeqCst)
        }

        fn boottime_ms(&self) -> u64 {
            self.boottime.load(Ordering::SeqCst)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::testing::Manual;
    use super::*;

    #[test]
    fn cluster_time_follows_entries_and_then_the_boottime() {
        let clock = Manual::default();
        clock.wall.store(5_000, Ordering::SeqCst);
        let mut time = ClusterTime::default();
        time.applied(1_000, &clock, false);
        assert_eq!(time.now_ms(&clock), 5_000, "the wall clock counts until an entry of this boot");
        time.applied(2_000, &clock, true);
        clock.wall.store(99_000, Ordering::SeqCst);
        clock.boottime.store(300, Ordering::SeqCst);
        assert_eq!(time.now_ms(&clock), 2_300, "then it does not");
        time.applied(2_100, &clock, true);
        assert_eq!(time.now_ms(&clock), 2_300, "and time never goes back");
    }
}
