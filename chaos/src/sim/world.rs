//! What the harness and all simulated machines share, and what is written down of a run.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Write as _};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use selvedge_cluster::{Cluster, Confirmation, Enforcer};
use selvedge_domain::{Envelope, Id, State};
use selvedge_storage::engine::mem::Disk;
use tempfile::TempDir;
use tokio::sync::Notify;

use super::clock::{Now, SimClock};
use super::network::{Held, host};
use super::{Bug, Order};
use crate::check::History;

/// What the harness and all simulated machines share. Clones share it.
#[derive(Clone)]
pub(super) struct World(Arc<Shared>);

struct Shared {
    seed: u64,
    bug: Bug,
    now: Now,
    dir: TempDir,
    machines: BTreeMap<u64, Machine>,
    inner: Mutex<Inner>,
}

/// What outlives the processes of a machine.
pub(super) struct Machine {
    pub(super) log: Disk,
    pub(super) state: Disk,
    pub(super) clock: SimClock,
}

#[derive(Default)]
struct Inner {
    trace: String,
    history: History,
    connections: u64,
    /// Connections of each machine, in the order in which they were opened.
    open: BTreeMap<u64, BTreeMap<u64, Weak<HeldInner>>>,
    /// Machines whose process is being killed.
    dying: BTreeSet<u64>,
    running: BTreeMap<u64, Running>,
    boots: BTreeMap<u64, u64>,
    orders: BTreeMap<u64, Order>,
    /// How far the steps of the beginning have come.
    ready: Ready,
}

type HeldInner = <Held as std::ops::Deref>::Target;

/// How far the beginning of a run has come.
#[derive(Clone, Default)]
pub(super) struct Ready {
    pub(super) initialised: bool,
    pub(super) voters: usize,
    pub(super) keys: Vec<Id>,
}

/// A broker's process.
#[derive(Clone)]
pub(super) struct Running {
    pub(super) boot: u64,
    pub(super) cluster: Cluster,
    /// The position that it enforces.
    pub(super) enforced: Arc<Mutex<Id>>,
    /// Why it must stop.
    pub(super) fatal: Option<String>,
    /// Entries below this were looked at.
    pub(super) compared: u64,
    /// Lets its process die.
    pub(super) kill: Arc<Notify>,
}

impl World {
    pub(super) fn new(seed: u64, brokers: u64, bug: Bug) -> Self {
        let now = Now::default();
        let mut rng = super::rng(seed, 0xc10c);
        let machine = |node: u64| {
            let clock = super::schedule::clock(&mut rng, &now, bug, node);
            (node, Machine { log: Disk::new(), state: Disk::new(), clock })
        };
        let machines = (1..=brokers).map(machine).collect();
        // Only small files of the directory's own and received snapshots lie there; memory is quicker.
        let shm = std::path::Path::new("/dev/shm");
        let dir = if shm.is_dir() { tempfile::tempdir_in(shm) } else { tempfile::tempdir() };
        let dir = dir.expect("a temporary directory can be made");
        Self(Arc::new(Shared { seed, bug, now, dir, machines, inner: Mutex::default() }))
    }

    pub(super) fn seed(&self) -> u64 {
        self.0.seed
    }

    pub(super) fn bug(&self) -> Bug {
        self.0.bug
    }

    pub(super) fn now(&self) -> &Now {
        &self.0.now
    }

    pub(super) fn now_ms(&self) -> u64 {
        self.0.now.us() / 1_000
    }

    pub(super) fn dir(&self, node: u64) -> std::path::PathBuf {
        self.0.dir.path().join(host(node))
    }

    pub(super) fn nodes(&self) -> Vec<u64> {
        self.0.machines.keys().copied().collect()
    }

    pub(super) fn machine(&self, node: u64) -> &Machine {
        &self.0.machines[&node]
    }

    /// Writes a line into the trace.
    pub(super) fn trace(&self, line: fmt::Arguments<'_>) {
        let us = self.0.now.us();
        let trace = &mut self.0.inner.lock().trace;
        writeln!(trace, "{:6}.{:03} {line}", us / 1_000, us % 1_000).expect("a string can be written to");
    }

    pub(super) fn take_trace(&self) -> String {
        std::mem::take(&mut self.0.inner.lock().trace)
    }

    /// Numbers a connection of a machine.
    pub(super) fn opened(&self, node: u64, held: &Held) -> u64 {
        let (number, dying) = {
            let mut inner = self.0.inner.lock();
            inner.connections += 1;
            let number = inner.connections;
            let open = inner.open.entry(node).or_default();
            open.retain(|_, held| held.strong_count() > 0);
            open.insert(number, Arc::downgrade(held));
            (number, inner.dying.contains(&node))
        };
        if dying {
            held.lock().take();
        }
        number
    }

    /// Waits until the process of a machine is to die, and closes its connections in order. On that machine.
    pub(super) async fn die(&self, node: u64) {
        let kill = self.0.inner.lock().running.get(&node).map(|running| running.kill.clone());
        let Some(kill) = kill else { return };
        kill.notified().await;
        let open = {
            let mut inner = self.0.inner.lock();
            inner.dying.insert(node);
            inner.open.remove(&node).unwrap_or_default()
        };
        for held in open.into_values().filter_map(|held| held.upgrade()) {
            let tcp = held.lock().take();
            drop(tcp);
        }
    }

    /// Lets a machine's process begin to die; answers whether there is one.
    pub(super) fn kill(&self, node: u64) -> bool {
        let kill = self.0.inner.lock().running.get(&node).map(|running| running.kill.clone());
        kill.inspect(|kill| kill.notify_one()).is_some()
    }

    /// Looks at the history, or adds to it.
    pub(super) fn history<R>(&self, with: impl FnOnce(&mut History) -> R) -> R {
        with(&mut self.0.inner.lock().history)
    }

    pub(super) fn ready<R>(&self, with: impl FnOnce(&mut Ready) -> R) -> R {
        with(&mut self.0.inner.lock().ready)
    }

    /// Something does not hold, here and now.
    pub(super) fn violated(&self, what: String) {
        self.trace(format_args!("VIOLATED {what}"));
        let at_ms = self.now_ms();
        self.history(|history| history.violations.push(format!("at {at_ms} ms: {what}")));
    }

    pub(super) fn next_boot(&self, node: u64) -> u64 {
        let mut inner = self.0.inner.lock();
        let boot = inner.boots.entry(node).or_default();
        *boot += 1;
        *boot
    }

    pub(super) fn started(&self, node: u64, running: Running) {
        self.0.inner.lock().running.insert(node, running);
    }

    /// The process is gone, and with it what it held.
    pub(super) fn stopped(&self, node: u64) {
        let gone = {
            let mut inner = self.0.inner.lock();
            inner.dying.remove(&node);
            inner.open.remove(&node);
            inner.running.remove(&node)
        };
        drop(gone);
    }

    pub(super) fn must_stop(&self, node: u64, why: String) {
        if let Some(running) = self.0.inner.lock().running.get_mut(&node) {
            running.fatal = Some(why);
        }
    }

    pub(super) fn running(&self) -> Vec<(u64, Running)> {
        self.0.inner.lock().running.iter().map(|(node, running)| (*node, running.clone())).collect()
    }

    pub(super) fn compared(&self, node: u64, upto: u64) {
        if let Some(running) = self.0.inner.lock().running.get_mut(&node) {
            running.compared = upto;
        }
    }

    pub(super) fn give_order(&self, node: u64, order: Order) {
        self.0.inner.lock().orders.insert(node, order);
    }

    pub(super) fn next_order(&self, node: u64) -> Option<Order> {
        self.0.inner.lock().orders.remove(&node)
    }

    pub(super) fn step_clock(&self, node: u64, by_ms: i64) {
        self.machine(node).clock.offset_ms.fetch_add(by_ms, Ordering::Relaxed);
    }

    pub(super) fn set_clock_offset(&self, node: u64, offset_ms: i64) {
        self.machine(node).clock.offset_ms.store(offset_ms, Ordering::Relaxed);
    }
}

/// Notes what a broker enforces.
pub(super) struct Noting {
    pub(super) world: World,
    pub(super) node: u64,
    pub(super) enforced: Arc<Mutex<Id>>,
}

impl Noting {
    fn note(&self, state: &State) {
        *self.enforced.lock() = state.position();
        self.world.trace(format_args!("{} enforces {}", host(self.node), state.position()));
    }
}

impl Enforcer for Noting {
    fn enforce(&self, state: &Arc<State>, _events: &[Envelope]) -> Confirmation {
        self.note(state);
        None
    }

    fn replaced(&self, state: &Arc<State>) -> Confirmation {
        self.note(state);
        None
    }
}
