//! What goes wrong in a run, and when: drawn from its seed before it begins.

use std::collections::BTreeSet;

use rand::Rng as _;
use rand::rngs::StdRng;
use rand::seq::SliceRandom as _;
use selvedge_storage::engine::mem::Fault;

use super::clock::{Now, SimClock};
use super::{Bug, SAFETY_MS};

/// Within 5 % of true time, as the lease assumes of every machine.
const RATE_PPM: std::ops::RangeInclusive<u64> = 950_000..=1_050_000;
const OFFSET_MS_MAX: i64 = 5_000;
/// Beyond what a leader may be off.
const OFFSET_MS_FAR: i64 = 90_000;
const FAULTS: std::ops::Range<usize> = 5..12;

/// A machine, by number or by what it is when it is hit.
#[derive(Clone, Copy, Debug)]
pub(super) enum Target {
    Node(u64),
    Leader,
}

/// What a crash leaves on the disks.
#[derive(Clone, Copy, Debug)]
pub(super) enum Loss {
    /// The process dies; what it had written is there.
    Process,
    /// Power is lost: of what was not synced, so many of a hundred writes are there.
    Power(usize),
}

/// Something that goes wrong.
#[derive(Clone, Debug)]
pub(super) enum Trouble {
    Crash {
        whom: Target,
        loss: Loss,
        down_ms: u64,
    },
    CrashAll {
        loss: Loss,
        down_ms: u64,
    },
    /// Power is lost before, or a disk fails at, one of the next writes.
    Disk {
        whom: Target,
        log: bool,
        nth: u64,
        fault: Fault,
    },
    /// Nothing passes between these and the others.
    Split {
        side: BTreeSet<u64>,
        for_ms: u64,
    },
    Isolate {
        whom: Target,
        for_ms: u64,
    },
    /// Nothing passes from one to another; the other way it does.
    OneWay {
        from: u64,
        to: u64,
        for_ms: u64,
    },
    Deaf {
        whom: Target,
        for_ms: u64,
    },
    Slow {
        a: u64,
        b: u64,
        latency_ms: u64,
        for_ms: u64,
    },
    WallClock {
        whom: u64,
        by_ms: i64,
    },
    Transfer,
}

/// A fault and when it comes, milliseconds after all brokers vote.
pub(super) type Planned = (u64, Trouble);

/// The clocks of a machine.
pub(super) fn clock(rng: &mut StdRng, now: &Now, bug: Bug, node: u64) -> SimClock {
    let (rate_ppm, offset_ms) = (rng.random_range(RATE_PPM), rng.random_range(-OFFSET_MS_MAX..=OFFSET_MS_MAX));
    let slow = bug == Bug::ClockTooSlow && node == 1;
    SimClock::new(now.clone(), if slow { 400_000 } else { rate_ppm }, offset_ms)
}

/// What goes wrong in a run with so many brokers.
pub(super) fn plan(rng: &mut StdRng, brokers: u64, bug: Bug) -> Vec<Planned> {
    let mut planned: Vec<Planned> =
        (0..rng.random_range(FAULTS)).map(|_| (rng.random_range(0..SAFETY_MS), fault(rng, brokers))).collect();
    if bug == Bug::ClockTooSlow {
        planned.push((1_000, Trouble::Isolate { whom: Target::Node(1), for_ms: 9_000 }));
    }
    planned.sort_by_key(|(at_ms, _)| *at_ms);
    planned
}

fn fault(rng: &mut StdRng, brokers: u64) -> Trouble {
    let node = |rng: &mut StdRng| rng.random_range(1..=brokers);
    let whom = |rng: &mut StdRng| if rng.random_bool(0.5) { Target::Leader } else { Target::Node(node(rng)) };
    let for_ms = |rng: &mut StdRng| rng.random_range(200..6_000);
    match rng.random_range(0..100) {
        0..22 => Trouble::Crash { whom: whom(rng), loss: loss(rng), down_ms: rng.random_range(10..3_000) },
        22..29 => Trouble::CrashAll { loss: loss(rng), down_ms: rng.random_range(10..1_500) },
        29..37 => Trouble::Disk {
            whom: whom(rng),
            log: rng.random_bool(0.7),
            nth: rng.random_range(1..20),
            fault: if rng.random_bool(0.7) { Fault::PowerLoss } else { Fault::Io },
        },
        37..48 => {
            let mut all: Vec<u64> = (1..=brokers).collect();
            all.shuffle(rng);
            let side = all.into_iter().take(rng.random_range(1..=brokers as usize / 2)).collect();
            Trouble::Split { side, for_ms: for_ms(rng) }
        }
        48..62 => Trouble::Isolate { whom: whom(rng), for_ms: for_ms(rng) },
        62..70 => {
            let (from, to) = (node(rng), node(rng));
            Trouble::OneWay { from, to, for_ms: for_ms(rng) }
        }
        70..78 => Trouble::Deaf { whom: whom(rng), for_ms: for_ms(rng) },
        78..86 => {
            let (a, b) = (node(rng), node(rng));
            Trouble::Slow { a, b, latency_ms: rng.random_range(15..400), for_ms: for_ms(rng) }
        }
        86..94 => {
            let by_ms = if rng.random_bool(0.3) { OFFSET_MS_FAR } else { rng.random_range(500..4_000) };
            Trouble::WallClock { whom: node(rng), by_ms: if rng.random_bool(0.5) { by_ms } else { -by_ms } }
        }
        _ => Trouble::Transfer,
    }
}

fn loss(rng: &mut StdRng) -> Loss {
    if rng.random_bool(0.4) { Loss::Process } else { Loss::Power(rng.random_range(0..=100)) }
}
