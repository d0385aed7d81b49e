//! Power is lost on either side of each step of a broker's storage, while the others go on; what was not synced is gone.

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use prost::Message as _;
use selvedge_cluster::{Cluster, LogLimits};
use selvedge_domain::{Asker, Body, Id};
use selvedge_proto::peer as wire;
use selvedge_storage::engine::mem::{Disk, Moment, Step};
use selvedge_storage::engine::{Op, Space};
use tempfile::TempDir;
use tokio::task::JoinHandle;

use crate::brokers::{Broker, PATIENCE, Setup, bind, init, token, until};
use crate::links::Links;

/// A broker, and the disks that outlive it.
pub struct Host {
    pub broker: Broker,
    pub log: Disk,
    pub state: Disk,
}

impl Host {
    /// A new one on empty disks, with links to those that are there and from them.
    pub async fn new(setup: &Setup, links: &Links, others: &[Self]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let host = Self::start(setup, TempDir::new().unwrap(), listener, Disk::new(), Disk::new()).await;
        let place = setup.place(host.broker.node);
        for other in others.iter().map(|other| &other.broker) {
            links.add(place, other.node, &other.address).await;
            links.add(setup.place(other.node), host.broker.node, &host.broker.address).await;
        }
        host
    }

    async fn start(setup: &Setup, dir: TempDir, listener: TcpListener, log: Disk, state: Disk) -> Self {
        let (log_engine, state_engine) = (Arc::new(log.open().unwrap()), Arc::new(state.open().unwrap()));
        let broker = setup.start_on(dir, listener, log_engine, state_engine).await;
        Self { broker, log, state }
    }

    /// Starts it again on what its disks kept.
    pub async fn restart(self, setup: &Setup) -> Self {
        self.broker.cluster.stop().await;
        self.start_again(setup).await
    }
}

/// A step of storage, as what is written at it looks.
struct Point {
    name: &'static str,
    disk: fn(&Host) -> (&Disk, &Disk),
    is: fn(&Step<'_>) -> bool,
    bring: Bring,
}

/// What makes a broker take the step.
#[derive(Clone, Copy, PartialEq)]
enum Bring {
    /// Writes alone.
    Nothing,
    /// It is handed leadership.
    Lead,
    /// It leads, is cut off with entries of its own, and comes back when another leads.
    Conflict,
    /// A snapshot and what follows it, on demand of the log's length.
    Snapshot,
    /// It was away until it needs a snapshot.
    Install,
    /// A member is added.
    Membership,
    /// The journal is compacted.
    Compact,
}

fn log(host: &Host) -> (&Disk, &Disk) {
    (&host.log, &host.state)
}

fn state(host: &Host) -> (&Disk, &Disk) {
    (&host.state, &host.log)
}

fn ops<'a>(step: &Step<'a>) -> Vec<Op<'a>> {
    match step {
        Step::Write { batch, .. } => batch.ops().collect(),
        Step::Checkpoint => Vec::new(),
    }
}

fn puts(step: &Step<'_>, space: Space, key: &[u8]) -> bool {
    ops(step).into_iter().any(|op| matches!(op, Op::Put { space: at, key: put, .. } if at == space && put == key))
}

fn in_rows(op: &Op<'_>) -> bool {
    let (Op::Put { space, .. } | Op::Delete { space, .. } | Op::DeleteRange { space, .. }) = op;
    matches!(space, Space::StateA | Space::StateB)
}

fn is_append(step: &Step<'_>) -> bool {
    ops(step).iter().any(|op| matches!(op, Op::Put { space: Space::Log, .. }))
}

fn is_truncate(step: &Step<'_>) -> bool {
    let cut = |op: &Op<'_>| matches!(op, Op::DeleteRange { space: Space::Log, .. });
    ops(step).iter().any(cut) && !puts(step, Space::LogMeta, b"purged")
}

fn is_apply(step: &Step<'_>) -> bool {
    puts(step, Space::StateMeta, b"meta") && !puts(step, Space::StateMeta, b"side")
}

pub fn is_membership(step: &Step<'_>) -> bool {
    let meta = ops(step).into_iter().find_map(|op| match op {
        Op::Put { space: Space::StateMeta, key, value } if key == b"meta" => wire::StateMeta::decode(value).ok(),
        _ => None,
    });
    is_apply(step)
        && meta.is_some_and(|meta| {
            let changed = meta.membership.and_then(|membership| membership.log_id);
            changed.is_some() && changed == meta.last_applied
        })
}

fn is_fill(step: &Step<'_>) -> bool {
    let ops = ops(step);
    !ops.is_empty() && ops.iter().all(|op| in_rows(op) && matches!(op, Op::Put { .. }))
}

fn is_clear(step: &Step<'_>) -> bool {
    matches!(ops(step).as_slice(), [op @ Op::DeleteRange { .. }] if in_rows(op))
}

const POINTS: &[Point] = &[
    Point { name: "append and sync", disk: log, is: is_append, bring: Bring::Nothing },
    Point {
        name: "save the committed index",
        disk: log,
        is: |step| puts(step, Space::LogMeta, b"committed"),
        bring: Bring::Nothing,
    },
    Point { name: "save the vote", disk: log, is: |step| puts(step, Space::LogMeta, b"vote"), bring: Bring::Lead },
    Point { name: "truncate", disk: log, is: is_truncate, bring: Bring::Conflict },
    Point { name: "purge", disk: log, is: |step| puts(step, Space::LogMeta, b"purged"), bring: Bring::Snapshot },
    Point { name: "apply a batch and save its index", disk: state, is: is_apply, bring: Bring::Nothing },
    Point { name: "apply a membership", disk: state, is: is_membership, bring: Bring::Membership },
    Point {
        name: "compact the journal",
        disk: state,
        is: |step| puts(step, Space::StateMeta, b"compacted") && !puts(step, Space::StateMeta, b"side"),
        bring: Bring::Compact,
    },
    Point {
        name: "build a snapshot",
        disk: state,
        is: |step| matches!(step, Step::Checkpoint),
        bring: Bring::Snapshot,
    },
    Point { name: "install a snapshot: its rows", disk: state, is: is_fill, bring: Bring::Install },
    Point {
        name: "install a snapshot: the swap",
        disk: state,
        is: |step| puts(step, Space::StateMeta, b"side"),
        bring: Bring::Install,
    },
    Point { name: "install a snapshot: clear the old", disk: state, is: is_clear, bring: Bring::Install },
];

/// Writes through whoever is there, and remembers what was acknowledged.
#[derive(Clone, Default)]
pub struct Writer {
    through: Arc<Mutex<BTreeMap<u64, (Cluster, Asker)>>>,
    acknowledged: Arc<Mutex<Vec<(String, Id)>>>,
    stop: Arc<AtomicBool>,
}

impl Writer {
    /// So many at once, through all of these.
    pub fn start(&self, hosts: &[Host], count: usize) -> Vec<JoinHandle<()>> {
        hosts.iter().for_each(|host| self.add(&host.broker));
        (0..count).map(|number| tokio::spawn(self.clone().run(number))).collect()
    }

    /// Ends them.
    pub async fn stop(&self, writers: Vec<JoinHandle<()>>) {
        self.stop.store(true, Ordering::Relaxed);
        for writer in writers {
            writer.await.unwrap();
        }
    }

    /// How many writes were acknowledged.
    pub fn acknowledged(&self) -> usize {
        self.acknowledged.lock().unwrap().len()
    }

    pub fn add(&self, broker: &Broker) {
        self.through.lock().unwrap().insert(broker.node, (broker.cluster.clone(), broker.owner()));
    }

    pub fn remove(&self, node: u64) {
        self.through.lock().unwrap().remove(&node);
    }

    async fn run(self, number: usize) {
        for n in 0.. {
            let through: Vec<_> = self.through.lock().unwrap().values().cloned().collect();
            if self.stop.load(Ordering::Relaxed) {
                return;
            }
            let Some((cluster, owner)) = through.get(n % through.len().max(1)).cloned() else {
                tokio::time::sleep(Duration::from_millis(5)).await;
                continue;
            };
            let name = format!("token-{number}-{n}");
            drop(through);
            if let Ok(done) = cluster.propose(owner, token(&name), None).await {
                self.acknowledged.lock().unwrap().push((name, done.ids[0]));
            }
        }
    }
}

/// Three voters that reach each other through links only.
pub async fn three(setup: &Setup, links: &Links) -> Vec<Host> {
    voters(setup, links, 3).await
}

/// So many of them.
pub async fn voters(setup: &Setup, links: &Links, count: usize) -> Vec<Host> {
    let first = Host::new(setup, links, &[]).await;
    first.broker.cluster.initialize(init(setup.cluster_id)).await.unwrap();
    first.broker.register().await;
    let mut hosts = vec![first];
    while hosts.len() < count {
        let next = Host::new(setup, links, &hosts).await;
        join(&hosts[0].broker, &next.broker).await;
        hosts[0].broker.cluster.promote(&hosts[0].broker.owner(), next.broker.node).await.unwrap();
        hosts.push(next);
    }
    hosts
}

/// Makes a broker a learner.
pub async fn join(first: &Broker, next: &Broker) {
    first.enrol(next).await;
    next.cluster.join(std::slice::from_ref(&first.address), &next.address).await.unwrap();
    next.register().await;
}

/// Brings a broker to take a step, once.
async fn bring(what: Bring, setup: &Setup, links: &Links, hosts: &[Host], victim: usize) {
    let other = &hosts[(victim + 1) % 3].broker;
    match what {
        Bring::Nothing | Bring::Snapshot | Bring::Install => {}
        // Refused while another change is under way, and asked again.
        Bring::Lead => {
            let to = if hosts[victim].broker.cluster.leads() { other.node } else { hosts[victim].broker.node };
            drop(other.cluster.transfer_leader(&other.owner(), Some(to)).await);
        }
        Bring::Compact => {
            let upto_seq = other.cluster.state().position().seq - 1;
            drop(other.cluster.propose(Asker::BROKER, Body::CompactJournal { upto_seq }, None).await);
        }
        Bring::Membership => {
            let learner = setup.start(TempDir::new().unwrap()).await;
            other.enrol(&learner).await;
            drop(learner.cluster.join(std::slice::from_ref(&other.address), &learner.address).await);
            drop(other.cluster.remove(&other.owner(), learner.node).await);
            learner.cluster.stop().await;
        }
        Bring::Conflict => {
            let victim_node = hosts[victim].broker.node;
            drop(other.cluster.transfer_leader(&other.owner(), Some(victim_node)).await);
            let sprung = || !hosts[victim].log.has_trap();
            until("the victim leads", || sprung() || hosts[victim].broker.cluster.leads()).await;
            if sprung() {
                return;
            }
            links.cut(victim, victim_node, true);
            let cut_off = hosts[victim].broker.cluster.clone();
            let owner = hosts[victim].broker.owner();
            let lost =
                tokio::spawn(async move { drop(cut_off.propose(owner, token("never acknowledged"), None).await) });
            until("another leads", || {
                hosts.iter().any(|host| host.broker.node != victim_node && host.broker.cluster.leads())
            })
            .await;
            lost.abort();
            links.cut(victim, victim_node, false);
            let target = other.cluster.state().position();
            until("it has caught up", || sprung() || hosts[victim].broker.cluster.state().position() >= target).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_loss_of_power_on_either_side_of_any_step_of_storage_loses_nothing_and_applies_nothing_twice() {
    let mut setup = Setup::new();
    let links = Links::default();
    setup.links = Some(links.clone());
    setup.log_limits = LogLimits { snapshot_bytes: 20_000, keep_entries: 5, ..LogLimits::default() };
    let mut hosts = three(&setup, &links).await;
    let writer = Writer::default();
    let writers = writer.start(&hosts, 2);

    let mut leads = false;
    for point in POINTS {
        for moment in [Moment::Before, Moment::After] {
            leads = !leads;
            let leader = leader_of(&hosts).await;
            // A leader installs nothing; of the other steps each kind takes its turn.
            let victim = if leads && point.bring != Bring::Install { leader } else { (leader + 1) % 3 };
            let begun = Instant::now();
            crash(&setup, &links, &mut hosts, &writer, victim, point, moment).await;
            tracing::info!(point.name, ?moment, leads, took_ms = begun.elapsed().as_millis() as u64, "survived");
        }
    }
    writer.stop(writers).await;
    check(&hosts, &writer).await;
}

async fn crash(
    setup: &Setup,
    links: &Links,
    hosts: &mut Vec<Host>,
    writer: &Writer,
    victim: usize,
    point: &Point,
    moment: Moment,
) {
    let what = format!("{moment:?} `{}`", point.name);
    writer.remove(hosts[victim].broker.node);
    if point.bring == Bring::Install {
        // It starts again when the others have cut what it lacks from their logs.
        let host = hosts.remove(victim);
        host.broker.cluster.stop().await;
        let missed = host.broker.cluster.status().last_log;
        let begun = Instant::now();
        while hosts.iter().any(|host| host.broker.cluster.status().purged < missed) {
            assert!(begun.elapsed() < PATIENCE, "{what}: the others keep their logs");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        hosts.insert(victim, host.start_again(setup).await);
    }
    // The trap is there before what springs it: a snapshot has to arrive first.
    let (disk, beside) = (point.disk)(&hosts[victim]);
    disk.set_trap(moment, beside, point.is);
    let served = hosts[victim].broker.cluster.state().position();
    let term = hosts[victim].broker.cluster.status().term;
    let begun = Instant::now();
    while (point.disk)(&hosts[victim]).0.has_trap() {
        assert!(begun.elapsed() < PATIENCE, "{what} was never reached");
        bring(point.bring, setup, links, hosts, victim).await;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let stopped = tokio::time::timeout(PATIENCE, hosts[victim].broker.cluster.fatal()).await;
    assert!(stopped.is_ok(), "{what}: a broker whose storage is gone stops");

    let host = hosts.remove(victim).restart(setup).await;
    hosts.insert(victim, host);
    let back = &hosts[victim].broker;
    let read = back.cluster.linearizable(PATIENCE).await;
    let state = read.unwrap_or_else(|error| panic!("{what}: {error}"));
    assert!(state.position() >= served, "{what}: what is served went back");
    assert!(back.cluster.status().term >= term, "{what}: its term went back");
    writer.add(back);
}

impl Host {
    /// Starts it on what is left of its disks without power.
    async fn start_again(self, setup: &Setup) -> Self {
        let Self { broker: Broker { cluster, address, dir, .. }, log, state } = self;
        drop(cluster);
        log.cut_power(0);
        state.cut_power(0);
        Self::start(setup, dir, bind(&address).await, log, state).await
    }
}

/// Which of them all agree is the leader.
pub async fn leader_of(hosts: &[Host]) -> usize {
    let agreed = || {
        let leaders: Vec<_> = hosts.iter().map(|host| host.broker.cluster.status().leader).collect();
        let leader = leaders[0].filter(|leader| leaders.iter().all(|other| *other == Some(*leader)))?;
        hosts.iter().position(|host| host.broker.node == leader)
    };
    until("all agree on a leader", || agreed().is_some()).await;
    agreed().expect("awaited above")
}

/// Everything that was acknowledged is there once, on all, and all hold the same.
pub async fn check(hosts: &[Host], writer: &Writer) {
    let acknowledged = writer.acknowledged.lock().unwrap().clone();
    assert!(acknowledged.len() > 100, "only {} writes were acknowledged", acknowledged.len());
    for host in hosts {
        let state = host.broker.cluster.linearizable(PATIENCE).await.unwrap();
        for (name, id) in &acknowledged {
            let row = state.by_id::<selvedge_domain::rows::Token>(*id);
            assert_eq!(row.map(|row| row.name), Some(name.clone()), "an acknowledged write is gone");
        }
        let count = state.rows::<selvedge_domain::rows::Token>().count();
        let names: std::collections::BTreeSet<_> =
            state.rows::<selvedge_domain::rows::Token>().map(|row| row.name).collect();
        assert_eq!(names.len(), count, "a write was applied twice");
        assert!(state.adds_up(), "the rows are those that the hash was kept of");
    }
    until("all hold the same", || {
        let status: Vec<_> = hosts.iter().map(|host| host.broker.cluster.status()).collect();
        status.iter().all(|other| other.applied == status[0].applied && other.state_hash == status[0].state_hash)
    })
    .await;
}
