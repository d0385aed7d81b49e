//! A whole cluster on one thread, in virtual time, from a seed.
//!
//! The brokers are real: `cluster`'s log, apply, lease and propose code over `storage`'s memory engine, calling each
//! other through gRPC over turmoil's TCP. Only the clocks, the network below gRPC, the disks below the engine's
//! interface and the randomness come from the seed. A run has a phase in which things go wrong and only safety is
//! asked for, then everything is healed, and the cluster must serve again within a bound.
//!
//! **Invariant:** a seed makes one run: everything that is recorded of it comes again byte for byte.

mod client;
mod clock;
mod engine;
mod machine;
mod network;
mod schedule;
mod world;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use selvedge_storage::engine::mem::Disk;
use selvedge_storage::log::Log;
use turmoil::Sim;

use crate::check::{self, Hashes};
use network::{digest, host};
use schedule::{Loss, Planned, Target, Trouble};
use world::World;

/// Virtual time moves by this much at once; a message takes at least as long.
const TICK_US: u64 = 1_000;
/// All brokers vote by then.
const BEGIN_MS_MAX: u64 = 30_000;
/// How long things go wrong.
const SAFETY_MS: u64 = 12_000;
/// All must be well so long after everything was healed: an election, the time until a dead connection is given up, a
/// proposal's whole time that began before, and a lease.
const LIVENESS_MS: u64 = 25_000;
/// How often the brokers are looked at.
const LOOK_MS: u64 = 5;
const LATENCY_MS: (u64, u64) = (1, 8);

/// Something that is wrong on purpose, to see it found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bug {
    /// Nothing.
    None,
    /// The log's disk says that it has synced, and has not.
    LogIsNotSynced,
    /// Readers take the state that the broker has, without asking the leader.
    ReadsAskNobody,
    /// A client's retry is a new request.
    RetriesAreNew,
    /// One machine's clocks run at less than half the speed, where 5 % is assumed.
    ClockTooSlow,
}

/// What came of a run.
pub struct Outcome {
    /// Everything that was recorded: each frame of each call, each entry applied with its hashes, each client's answer,
    /// in virtual time.
    pub trace: String,
    /// What did not hold.
    pub violations: Vec<String>,
    /// Counts of what happened.
    pub counts: Counts,
}

/// How much happened in a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Writes that were acknowledged.
    pub writes: usize,
    /// Reads that were answered.
    pub reads: usize,
    /// Writes of which no client knows what became of them.
    pub unknown: usize,
    /// Times that a process was ended.
    pub crashes: usize,
    /// Times that a link was cut.
    pub cuts: usize,
    /// The highest term.
    pub term: u64,
    /// Virtual time, milliseconds.
    pub virtual_ms: u64,
}

/// An order to a broker's operator.
#[derive(Clone, Copy, Debug)]
enum Order {
    Transfer,
}

fn rng(seed: u64, salt: u64) -> StdRng {
    StdRng::seed_from_u64(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ salt)
}

/// Runs a seed.
pub fn run(seed: u64, bug: Bug) -> Outcome {
    let mut draws = rng(seed, 0);
    let brokers = if draws.random_bool(0.3) { 5 } else { 3 };
    let world = World::new(seed, brokers, bug);
    let mut sim = turmoil::Builder::new()
        .rng_seed(draws.random())
        .epoch(UNIX_EPOCH)
        .simulation_duration(Duration::from_secs(3_600))
        .tick_duration(Duration::from_micros(TICK_US))
        .min_message_latency(Duration::from_millis(LATENCY_MS.0))
        .max_message_latency(Duration::from_millis(LATENCY_MS.1))
        .tcp_capacity(1 << 16)
        .enable_random_order()
        .build();
    for node in world.nodes() {
        let world = world.clone();
        sim.host(host(node), move || machine::run(world.clone(), node));
    }
    let mut plan = schedule::plan(&mut draws, brokers, bug);
    plan.reverse();
    let mut run = Run {
        sim,
        world,
        plan,
        draws,
        restarts: BTreeMap::new(),
        dying: BTreeMap::new(),
        cuts: Vec::new(),
        slow: Vec::new(),
        blocked: BTreeSet::new(),
        counts: Counts::default(),
    };
    run.go();
    run.end()
}

struct Run<'a> {
    sim: Sim<'a>,
    world: World,
    /// Last first.
    plan: Vec<Planned>,
    draws: StdRng,
    /// Machines that are down, and when they come back.
    restarts: BTreeMap<u64, u64>,
    /// Ways that are cut, and when each of these cuts is over.
    cuts: Vec<(u64, BTreeSet<(u64, u64)>)>,
    /// Processes that are killed with this step, and for how long they are down.
    dying: BTreeMap<u64, u64>,
    slow: Vec<(u64, u64, u64)>,
    blocked: BTreeSet<(u64, u64)>,
    counts: Counts,
}

impl Run<'_> {
    fn now_ms(&self) -> u64 {
        self.world.now_ms()
    }

    fn go(&mut self) {
        let nodes = self.world.nodes().len();
        if !self.until("all brokers vote", BEGIN_MS_MAX, |run| run.world.ready(|ready| ready.voters) == nodes) {
            return;
        }
        self.world.trace(format_args!("things go wrong from now on: {:?}", self.plan));
        let begin_ms = self.now_ms();
        while self.now_ms() < begin_ms + SAFETY_MS && self.step() {
            self.trouble(begin_ms);
        }
        self.heal();
        let nodes = self.world.nodes();
        let served = |run: &Self| run.world.history(|history| history.served_again.len()) == nodes.len();
        if !self.until("I10: every broker serves again", LIVENESS_MS, served) {
            return;
        }
        self.world.history(|history| history.quiet = true);
        self.until("I10: every broker holds the same and its lease", LIVENESS_MS, Self::converged);
    }

    /// Steps until a condition holds; else that is a violation.
    fn until(&mut self, what: &str, within_ms: u64, holds: impl Fn(&Self) -> bool) -> bool {
        let deadline_ms = self.now_ms() + within_ms;
        while !holds(self) {
            if self.now_ms() >= deadline_ms {
                let statuses: Vec<_> = self.world.running().into_iter().map(|(_, it)| it.cluster.status()).collect();
                self.world.violated(format!("not within {within_ms} ms: {what}; {statuses:?}"));
                return false;
            }
            if !self.step() {
                return false;
            }
        }
        true
    }

    /// One tick of everything; answers whether there is a point in another.
    fn step(&mut self) -> bool {
        if let Err(error) = self.sim.step() {
            self.world.violated(format!("I13: a task panicked: {error}"));
            return false;
        }
        let us = u64::try_from(self.sim.elapsed().as_micros()).expect("a run is short");
        self.world.now().set_us(us);
        let now_ms = self.now_ms();
        for (node, down_ms) in std::mem::take(&mut self.dying) {
            self.down(node, Loss::Process, down_ms);
        }
        if now_ms.is_multiple_of(LOOK_MS) {
            self.look();
        }
        for node in self.world.nodes() {
            if self.restarts.get(&node).is_some_and(|at_ms| *at_ms <= now_ms) {
                self.restarts.remove(&node);
                self.sim.bounce(host(node));
            }
        }
        self.lift(now_ms);
        self.world.history(|history| history.violations.is_empty())
    }

    /// What can be seen of the brokers from outside.
    fn look(&mut self) {
        for (node, running) in self.world.running() {
            if running.fatal.is_some() {
                self.crash(node, Loss::Process, 200);
                continue;
            }
            let cluster = &running.cluster;
            let mut upto = running.compared;
            for at in cluster.hashes(running.compared) {
                upto = at.index + 1;
                let hashes: Hashes = (at.state, at.journal);
                let (state, journal) = (digest(&hashes.0), digest(&hashes.1));
                self.world.trace(format_args!(
                    "{} applied {} state {state:016x} journal {journal:016x}",
                    host(node),
                    at.index
                ));
                self.world.history(|history| history.applied(node, at.index, hashes));
            }
            self.world.compared(node, upto);
            let status = cluster.status();
            self.counts.term = self.counts.term.max(status.term);
            let enforces = *running.enforced.lock();
            let open = cluster.lease().open();
            self.world.history(|history| {
                history.in_term(node, running.boot, status.term);
                if open {
                    history.serves(node, status.position);
                    history.holds_lease(node, enforces);
                }
            });
        }
    }

    fn converged(&self) -> bool {
        let running = self.world.running();
        let states: BTreeSet<_> = running.iter().map(|(_, it)| it.cluster.status().state_hash).collect();
        let leaders: BTreeSet<_> = running.iter().map(|(_, it)| it.cluster.status().leader).collect();
        let followed = running.iter().all(|(node, it)| {
            self.world.history(|history| history.follower_at(*node)) == it.cluster.state().position().seq + 1
        });
        running.len() == self.world.nodes().len()
            && states.len() == 1
            && leaders.len() == 1
            && followed
            && running.iter().all(|(_, it)| it.cluster.lease().open())
    }

    fn target(&mut self, target: Target) -> Option<u64> {
        match target {
            Target::Node(node) => Some(node),
            Target::Leader => self.world.running().into_iter().find(|(_, it)| it.cluster.leads()).map(|(node, _)| node),
        }
    }

    /// Begins what is planned for this moment.
    fn trouble(&mut self, begin_ms: u64) {
        let now_ms = self.now_ms();
        while let Some((_, trouble)) = self.plan.pop_if(|(at_ms, _)| begin_ms + *at_ms <= now_ms) {
            self.world.trace(format_args!("trouble: {trouble:?}"));
            self.begin(trouble);
        }
    }

    fn begin(&mut self, trouble: Trouble) {
        let nodes = self.world.nodes();
        let now_ms = self.now_ms();
        match trouble {
            Trouble::Crash { whom, loss, down_ms } => {
                if let Some(node) = self.target(whom) {
                    self.crash(node, loss, down_ms);
                }
            }
            Trouble::CrashAll { loss, down_ms } => {
                for node in nodes {
                    let down_ms = down_ms + self.draws.random_range(0..500);
                    self.crash(node, loss, down_ms);
                }
            }
            Trouble::Disk { whom, log, nth, fault } => {
                if let Some(node) = self.target(whom) {
                    let machine = self.world.machine(node);
                    let disk = if log { &machine.log } else { &machine.state };
                    disk.fail_write(nth, fault);
                }
            }
            Trouble::Split { side, for_ms } => self.cut(now_ms + for_ms, |a, b| side.contains(&a) != side.contains(&b)),
            Trouble::Isolate { whom, for_ms } => {
                if let Some(node) = self.target(whom) {
                    self.cut(now_ms + for_ms, |a, b| a == node || b == node);
                }
            }
            Trouble::OneWay { from, to, for_ms } => self.cut(now_ms + for_ms, |a, b| (a, b) == (from, to)),
            Trouble::Deaf { whom, for_ms } => {
                if let Some(node) = self.target(whom) {
                    self.cut(now_ms + for_ms, |_, b| b == node);
                }
            }
            Trouble::Slow { a, b, latency_ms, for_ms } if a != b => {
                self.sim.set_link_latency(host(a), host(b), Duration::from_millis(latency_ms));
                self.slow.push((now_ms + for_ms, a, b));
            }
            Trouble::Slow { .. } => {}
            Trouble::WallClock { whom, by_ms } => self.world.step_clock(whom, by_ms),
            Trouble::Transfer => {
                if let Some(node) = self.target(Target::Leader) {
                    self.world.give_order(node, Order::Transfer);
                }
            }
        }
    }

    fn crash(&mut self, node: u64, loss: Loss, down_ms: u64) {
        if self.restarts.contains_key(&node) || self.dying.contains_key(&node) {
            return;
        }
        self.counts.crashes += 1;
        self.world.trace(format_args!("{} crashes: {loss:?}", host(node)));
        match loss {
            // The system closes what a process had open: that takes a step on that machine.
            Loss::Process if self.world.kill(node) => drop(self.dying.insert(node, down_ms)),
            Loss::Process | Loss::Power(_) => self.down(node, loss, down_ms),
        }
    }

    fn down(&mut self, node: u64, loss: Loss, down_ms: u64) {
        // Whoever is gone says nothing more.
        let others = self.world.nodes().into_iter().filter(|other| *other != node);
        let open: Vec<u64> = others.filter(|other| !self.blocked.contains(&(node, *other))).collect();
        for other in &open {
            self.sim.partition_oneway(host(node), host(*other));
        }
        self.sim.crash(host(node));
        for other in &open {
            self.sim.repair_oneway(host(node), host(*other));
        }
        self.world.stopped(node);
        self.world.history(|history| history.died(node));
        let machine = self.world.machine(node);
        for disk in [&machine.log, &machine.state] {
            let unsynced = disk.unsynced_batches();
            disk.cut_power(match loss {
                Loss::Process => unsynced,
                Loss::Power(percent) => unsynced * percent / 100,
            });
        }
        self.restarts.insert(node, self.now_ms() + down_ms);
    }

    fn cut(&mut self, until_ms: u64, cut: impl Fn(u64, u64) -> bool) {
        self.counts.cuts += 1;
        let nodes = self.world.nodes();
        let ways = nodes.iter().flat_map(|a| nodes.iter().map(|b| (*a, *b)));
        self.cuts.push((until_ms, ways.filter(|(a, b)| a != b && cut(*a, *b)).collect()));
        self.block();
    }

    /// Ends what is over.
    fn lift(&mut self, now_ms: u64) {
        let before = self.cuts.len();
        self.cuts.retain(|(until_ms, _)| *until_ms > now_ms);
        if self.cuts.len() != before {
            self.block();
        }
        let (over, on) = std::mem::take(&mut self.slow).into_iter().partition(|(until_ms, ..)| *until_ms <= now_ms);
        self.slow = on;
        let over: Vec<(u64, u64, u64)> = over;
        for (_, a, b) in over {
            self.restore_latency(a, b);
        }
    }

    fn restore_latency(&self, a: u64, b: u64) {
        self.sim.set_link_latency(host(a), host(b), Duration::from_millis(LATENCY_MS.0));
        self.sim.set_link_max_message_latency(host(a), host(b), Duration::from_millis(LATENCY_MS.1));
    }

    /// Cuts the ways that some cut names, and no others.
    fn block(&mut self) {
        let blocked: BTreeSet<(u64, u64)> = self.cuts.iter().flat_map(|(_, ways)| ways.iter().copied()).collect();
        for (a, b) in blocked.difference(&self.blocked) {
            self.sim.partition_oneway(host(*a), host(*b));
        }
        for (a, b) in self.blocked.difference(&blocked) {
            self.sim.repair_oneway(host(*a), host(*b));
        }
        self.blocked = blocked;
    }

    /// Ends everything that is wrong.
    fn heal(&mut self) {
        self.world.trace(format_args!("all is healed"));
        self.lift(u64::MAX);
        for (node, down_ms) in std::mem::take(&mut self.dying) {
            self.down(node, Loss::Process, down_ms);
        }
        for node in self.world.nodes() {
            self.world.set_clock_offset(node, 0);
            if self.restarts.remove(&node).is_some() {
                self.sim.bounce(host(node));
            }
        }
        self.world.history(|history| history.healed = true);
    }

    fn end(mut self) -> Outcome {
        self.look();
        let running = self.world.running();
        for node in self.world.nodes() {
            if running.iter().any(|(it, _)| *it == node) {
                self.sim.crash(host(node));
                self.world.stopped(node);
            }
        }
        drop(running);
        let world = self.world;
        let differing = logs_agree(&world);
        let mut violations = world.history(|history| check::all(history));
        violations.extend(differing);
        let counts = world.history(|history| Counts {
            writes: history.writes.iter().filter(|write| write.acknowledged.is_some()).count(),
            reads: history.reads.len(),
            unknown: history.writes.iter().filter(|write| write.acknowledged.is_none() && write.unknown).count(),
            virtual_ms: world.now_ms(),
            ..self.counts
        });
        drop(self.sim);
        Outcome { trace: world.take_trace(), violations, counts }
    }
}

/// I7: entries of one leader at one index are the same on every disk.
fn logs_agree(world: &World) -> Vec<String> {
    let mut first = BTreeMap::new();
    let mut violations = Vec::new();
    for node in world.nodes() {
        let disk = &world.machine(node).log;
        disk.cut_power(usize::MAX);
        match entries(disk) {
            Ok(entries) => {
                for (id, content) in entries {
                    if *first.entry(id).or_insert(content) != content {
                        violations.push(format!("I7: the log of {} has another entry {id:?}", host(node)));
                    }
                }
            }
            Err(error) => violations.push(format!("the log of {} cannot be read: {error}", host(node))),
        }
    }
    violations
}

type LogEntry = ((u64, u64, u64), u64);

fn entries(disk: &Disk) -> Result<Vec<LogEntry>, selvedge_storage::Error> {
    let (log, _driver) = Log::open_driven(Arc::new(disk.open()?))?;
    let records = log.read(0..u64::MAX)?;
    let content = |payload| digest(format!("{payload:?}").as_bytes());
    Ok(records.into_iter().map(|it| ((it.id.index, it.id.term, it.id.node), content(it.payload))).collect())
}
