//! The two clocks: wall time for certificates and stream numbers, boot time for leases and deadlines.

use rustix::time::{ClockId, clock_gettime};
use selvedge_proto::tls;

/// Milliseconds of Unix time.
pub(crate) fn unix_ms() -> u64 {
    (tls::system_time())()
}

/// Milliseconds since boot, on a clock that suspension does not stop.
pub(crate) fn boot_ms() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    seconds * 1_000 + u64::try_from(now.tv_nsec).unwrap_or(0) / 1_000_000
}
