//! How often a caller may ask: one token bucket for each caller.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::time::Instant;

use parking_lot::Mutex;
use selvedge_domain::Id;

/// Callers that are remembered; beyond it those whose bucket is full again are forgotten first.
pub const CALLERS_MAX: usize = 16_384;

/// Who is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Who {
    /// An administrator's token.
    Token(Id),
    /// A directory.
    Directory(Id),
    /// Failed authentications of a prefix.
    Failures(IpAddr),
    /// Enrolments of a prefix.
    Enrolments(IpAddr),
}

impl Who {
    /// Requests a second, and at once.
    fn rate(self) -> (f64, f64) {
        match self {
            Self::Token(_) => (100.0, 400.0),
            Self::Directory(_) => (200.0, 1_000.0),
            Self::Failures(_) => (2.0, 60.0),
            Self::Enrolments(_) => (5.0, 120.0),
        }
    }
}

/// The /24 or /48 that an address lies in.
pub(crate) fn prefix(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(v4) => IpAddr::V4((v4.to_bits() & 0xffff_ff00).into()),
        IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() & (u128::MAX << 80))),
    }
}

struct Bucket {
    left: f64,
    at: Instant,
}

/// The buckets.
#[derive(Default)]
pub(crate) struct Limiter(Mutex<HashMap<Who, Bucket>>);

impl Limiter {
    /// Takes one from the caller's bucket; else says in how many seconds there is one.
    pub(crate) fn take(&self, who: Who, now: Instant) -> Result<(), u64> {
        self.with(who, now, |left| {
            if *left >= 1.0 {
                *left -= 1.0;
                return Ok(());
            }
            Err(((1.0 - *left) / who.rate().0).ceil().max(1.0) as u64)
        })
    }

    /// Whether there is one, without taking it.
    pub(crate) fn peek(&self, who: Who, now: Instant) -> Result<(), u64> {
        self.with(who, now, |left| {
            if *left >= 1.0 { Ok(()) } else { Err(((1.0 - *left) / who.rate().0).ceil().max(1.0) as u64) }
        })
    }

    fn with<R>(&self, who: Who, now: Instant, use_it: impl FnOnce(&mut f64) -> R) -> R {
        let (per_second, at_once) = who.rate();
        let mut buckets = self.0.lock();
        if buckets.len() >= CALLERS_MAX && !buckets.contains_key(&who) {
            buckets.retain(|who, bucket| refilled(*who, bucket, now) < who.rate().1);
            if buckets.len() >= CALLERS_MAX {
                buckets.clear();
            }
        }
        let bucket = buckets.entry(who).or_insert(Bucket { left: at_once, at: now });
        let passed_s = now.saturating_duration_since(bucket.at).as_secs_f64();
        bucket.left = (bucket.left + passed_s * per_second).min(at_once);
        bucket.at = now;
        use_it(&mut bucket.left)
    }
}

fn refilled(who: Who, bucket: &Bucket, now: Instant) -> f64 {
    let (per_second, at_once) = who.rate();
    (bucket.left + now.saturating_duration_since(bucket.at).as_secs_f64() * per_second).min(at_once)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_caller_that_asks_too_often_waits_and_others_do_not() {
        let limiter = Limiter::default();
        let now = Instant::now();
        let one = Who::Token(Id::new(1, 1));
        for _ in 0..400 {
            limiter.take(one, now).unwrap();
        }
        assert_eq!(limiter.take(one, now), Err(1));
        assert_eq!(limiter.take(Who::Token(Id::new(1, 2)), now), Ok(()));
        assert_eq!(limiter.take(one, now + Duration::from_millis(20)), Ok(()));
    }

    #[test]
    fn addresses_are_counted_by_prefix() {
        assert_eq!(prefix("10.1.2.3".parse().unwrap()), "10.1.2.0".parse::<IpAddr>().unwrap());
        assert_eq!(prefix("::ffff:10.1.2.3".parse().unwrap()), "10.1.2.0".parse::<IpAddr>().unwrap());
        assert_eq!(prefix("2001:db8:1:2::3".parse().unwrap()), "2001:db8:1::".parse::<IpAddr>().unwrap());
    }
}
