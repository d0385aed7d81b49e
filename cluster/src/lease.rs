//! The freshness lease: without it a broker neither admits nor forwards.
//!
//! **Invariant:** the lease runs from before the leader was asked, on a clock that a pause does not stop, and only
//! for a state that is enforced up to what a quorum knew at the time of asking.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

use tokio::sync::{Notify, watch};

use crate::clock::Clock;

/// The wall clock may move against the boottime by this much between renewals before flows are held.
pub const CLOCK_STEP_MS_MAX: u64 = 1_000;

/// This broker's freshness lease. Starts ended.
pub struct Lease {
    clock: Arc<dyn Clock>,
    end_ms: AtomicU64,
    /// When the newest renewal was asked for; 0 before the first.
    asked_ms: AtomicU64,
    /// Wall clock minus boottime when the last renewal was asked for.
    skew_ms: AtomicI64,
    renewed: watch::Sender<u64>,
    wanted: Notify,
}

/// What the clocks said before a renewal was asked for.
#[derive(Clone, Copy, Debug)]
struct Asking {
    at_ms: u64,
    skew_ms: i64,
}

impl Lease {
    pub(crate) fn new(clock: Arc<dyn Clock>) -> Self {
        let skew_ms = AtomicI64::new(skew_ms(&*clock));
        Self {
            clock,
            end_ms: AtomicU64::new(0),
            asked_ms: AtomicU64::new(0),
            skew_ms,
            renewed: watch::Sender::new(0),
            wanted: Notify::new(),
        }
    }

    /// Asks for a renewal, and sets the lease's end from before it asked.
    ///
    /// `ask` answers how long a lease is.
    pub(crate) async fn renew_by<E>(&self, ask: impl Future<Output = Result<u64, E>>) -> Result<(), E> {
        let asked = self.asking();
        let lease_ms = ask.await?;
        self.renew(asked, lease_ms);
        Ok(())
    }

    /// The clocks before a renewal is asked for.
    fn asking(&self) -> Asking {
        let at_ms = self.clock.boottime_ms();
        Asking { at_ms, skew_ms: skew_ms(&*self.clock) }
    }

    /// Sets the lease's end from the moment of asking; never takes back what was given. A machine that was stopped
    /// between asking and this stays closed: the skew is that of asking, too.
    fn renew(&self, asked: Asking, lease_ms: u64) {
        self.skew_ms.store(asked.skew_ms, Ordering::Release);
        let end_ms = asked.at_ms + lease_ms;
        self.end_ms.fetch_max(end_ms, Ordering::AcqRel);
        self.asked_ms.fetch_max(asked.at_ms, Ordering::AcqRel);
        self.renewed.send_modify(|end| *end = (*end).max(end_ms));
    }

    /// Waits until a renewal is wanted at once.
    pub(crate) async fn wanted(&self) {
        self.wanted.notified().await;
    }

    /// Whether this broker may forward now. Cheap; asked before each forward.
    ///
    /// Also closed, until the next renewal, when the wall clock has stepped: the machine may have been stopped in a
    /// way that its clocks do not show.
    pub fn open(&self) -> bool {
        if self.clock.boottime_ms() >= self.end_ms.load(Ordering::Acquire) {
            return false;
        }
        if skew_ms(&*self.clock).abs_diff(self.skew_ms.load(Ordering::Acquire)) > CLOCK_STEP_MS_MAX {
            self.wanted.notify_one();
            return false;
        }
        true
    }

    /// What is left of it, in milliseconds; 0 when it has ended.
    pub fn left_ms(&self) -> u64 {
        self.end_ms.load(Ordering::Acquire).saturating_sub(self.clock.boottime_ms())
    }

    /// When the newest renewal was asked for, on the boottime clock in milliseconds: what was committed before is here.
    pub(crate) fn asked_ms(&self) -> Option<u64> {
        Some(self.asked_ms.load(Ordering::Acquire)).filter(|asked_ms| *asked_ms > 0)
    }

    /// When it ends or ended, on the boottime clock in milliseconds; 0 before the first one.
    pub fn end_ms(&self) -> u64 {
        self.end_ms.load(Ordering::Acquire)
    }

    /// Changes with each renewal; the value is [`Lease::end_ms`]. Nothing tells when it ends: whoever waits for that
    /// sleeps for [`Lease::left_ms`].
    pub fn changed(&self) -> watch::Receiver<u64> {
        self.renewed.subscribe()
    }
}

fn skew_ms(clock: &dyn Clock) -> i64 {
    let (wall, boottime) = (clock.wall_ms(), clock.boottime_ms());
    i64::try_from(wall).unwrap_or(i64::MAX).saturating_sub(i64::try_from(boottime).unwrap_or(i64::MAX))
}

/// How long a lease may last on another machine's clock: its own and this one are within 5 % of true time.
pub(crate) fn surely_over_ms(lease_ms: u64) -> u64 {
    lease_ms + lease_ms * 11 / 100 + 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::testing::Manual;

    fn lease() -> (Arc<Manual>, Lease) {
        let clock = Arc::new(Manual::default());
        clock.wall.store(1_000_000, Ordering::SeqCst);
        clock.boottime.store(1_000, Ordering::SeqCst);
        (clock.clone(), Lease::new(clock))
    }

    fn pass(clock: &Manual, ms: u64) {
        clock.wall.fetch_add(ms, Ordering::SeqCst);
        clock.boottime.fetch_add(ms, Ordering::SeqCst);
    }

    #[test]
    fn a_lease_counts_from_the_moment_of_asking_and_ends_by_itself() {
        let (clock, lease) = lease();
        assert!(!lease.open(), "it starts with none");
        let asked = lease.asking();
        pass(&clock, 400);
        lease.renew(asked, 1_000);
        assert_eq!(lease.left_ms(), 600);
        assert!(lease.open());
        pass(&clock, 599);
        assert!(lease.open());
        pass(&clock, 1);
        assert!(!lease.open());
    }

    #[tokio::test]
    async fn the_answer_may_take_its_time_and_the_lease_does_not_wait_for_it() {
        let (clock, lease) = lease();
        let ask = async {
            pass(&clock, 400);
            Ok::<_, ()>(1_000)
        };
        lease.renew_by(ask).await.unwrap();
        assert_eq!(lease.left_ms(), 600);
        assert!(lease.renew_by(async { Err(()) }).await.is_err());
        assert_eq!(lease.left_ms(), 600);
    }

    #[test]
    fn a_late_renewal_never_shortens_it() {
        let (clock, lease) = lease();
        let early = lease.asking();
        pass(&clock, 500);
        lease.renew(lease.asking(), 1_000);
        lease.renew(early, 1_000);
        assert_eq!(lease.left_ms(), 1_000);
    }

    #[test]
    fn a_stepped_wall_clock_holds_flows_until_the_next_renewal() {
        let (clock, lease) = lease();
        lease.renew(lease.asking(), 10_000);
        clock.wall.fetch_add(CLOCK_STEP_MS_MAX + 1, Ordering::SeqCst);
        assert!(!lease.open());
        lease.renew(lease.asking(), 10_000);
        assert!(lease.open());
    }

    #[test]
    fn an_answer_from_before_the_machine_was_stopped_opens_nothing() {
        let (clock, lease) = lease();
        let asked = lease.asking();
        clock.wall.fetch_add(60_000, Ordering::SeqCst);
        lease.renew(asked, 10_000);
        assert!(!lease.open());
        lease.renew(lease.asking(), 10_000);
        assert!(lease.open());
    }
}
