//! The clocks of simulated machines: virtual time, run too fast or slow, and set wrong.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

use selvedge_cluster::Clock;

const WALL_BEGIN_MS: u64 = 1_790_000_000_000;
const BOOT_BEGIN_MS: u64 = 1_000_000;

/// Virtual time as the harness knows it, for whoever asks from outside a machine.
#[derive(Clone, Default)]
pub(super) struct Now(Arc<AtomicU64>);

impl Now {
    pub(super) fn set_us(&self, us: u64) {
        self.0.store(us, Ordering::Relaxed);
    }

    /// Microseconds since the beginning, on the machine that runs now.
    pub(super) fn us(&self) -> u64 {
        let known = self.0.load(Ordering::Relaxed);
        let here = turmoil::sim_elapsed().and_then(|elapsed| u64::try_from(elapsed.as_micros()).ok());
        // A machine that is being torn down has no time of its own.
        here.unwrap_or(known).clamp(known, known + super::TICK_US)
    }
}

/// One machine's clocks.
#[derive(Clone)]
pub(super) struct SimClock {
    now: Now,
    /// Parts of a million that its clocks run at.
    rate_ppm: u64,
    /// How far its wall clock is off, milliseconds.
    pub(super) offset_ms: Arc<AtomicI64>,
}

impl SimClock {
    pub(super) fn new(now: Now, rate_ppm: u64, offset_ms: i64) -> Self {
        Self { now, rate_ppm, offset_ms: Arc::new(AtomicI64::new(offset_ms)) }
    }

    fn elapsed_ms(&self) -> u64 {
        self.now.us() * self.rate_ppm / 1_000_000 / 1_000
    }
}

impl Clock for SimClock {
    fn wall_ms(&self) -> u64 {
        (WALL_BEGIN_MS + self.elapsed_ms()).saturating_add_signed(self.offset_ms.load(Ordering::Relaxed))
    }

    fn boottime_ms(&self) -> u64 {
        BOOT_BEGIN_MS + self.elapsed_ms()
    }
}
