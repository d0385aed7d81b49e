//! The clock of every measurement.

use std::time::Duration;

/// A moment on the clock that a suspended machine does not stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment(Duration);

impl Moment {
    /// Now.
    pub fn now() -> Self {
        let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        Self(Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec.unsigned_abs() as u32))
    }

    /// Milliseconds from an earlier moment; negative when that one is later.
    pub fn ms_since(self, earlier: Self) -> f64 {
        (self.0.as_secs_f64() - earlier.0.as_secs_f64()) * 1_000.0
    }
}
