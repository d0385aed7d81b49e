//! How long to wait before the next attempt.

use std::time::Duration;

/// First wait.
pub(crate) const FIRST: Duration = Duration::from_millis(100);
/// Longest wait.
pub(crate) const LONGEST: Duration = Duration::from_secs(2);

/// Doubles from [`FIRST`] to [`LONGEST`]; each wait is spread over its upper half, so that ends that lost the same
/// broker do not return together.
#[derive(Debug, Default)]
pub(crate) struct Backoff {
    failures: u32,
}

impl Backoff {
    /// The wait after one more failure; `spread` is a random number in `0.0..1.0`.
    pub(crate) fn fail(&mut self, spread: f64) -> Duration {
        let whole = FIRST.saturating_mul(1 << self.failures.min(16)).min(LONGEST);
        self.failures = self.failures.saturating_add(1);
        whole.mul_f64(0.5 + spread.clamp(0.0, 1.0) / 2.0)
    }

    /// Forgets all failures.
    pub(crate) fn reset(&mut self) {
        self.failures = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_longest_and_begin_anew_after_success() {
        let mut backoff = Backoff::default();
        let waits: Vec<_> = (0..8).map(|_| backoff.fail(1.0).as_millis()).collect();
        assert_eq!(waits, [100, 200, 400, 800, 1600, 2000, 2000, 2000]);
        backoff.reset();
        assert_eq!(backoff.fail(0.0), FIRST / 2);
    }

    #[test]
    fn no_number_of_failures_overflows() {
        let mut backoff = Backoff { failures: u32::MAX };
        assert_eq!(backoff.fail(1.0), LONGEST);
        assert_eq!(backoff.fail(7.0), LONGEST);
    }
}
