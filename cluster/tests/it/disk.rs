//! Disks that are wiped, set back, damaged, full, stalled or read-only: refused with a code, and the others go on.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use prost::Message as _;
use selvedge_cluster::{Cluster, Error, Fatal, LogLimits, ProposeError};
use selvedge_domain::state::{Meta, StateHash, Table};
use selvedge_proto::peer as wire;
use selvedge_storage::DataDir;
use selvedge_storage::engine::mem::Disk;
use selvedge_storage::engine::rocks::Rocks;
use selvedge_storage::engine::{Engine as _, Space, View as _};
use tempfile::TempDir;

use crate::brokers::{Broker, PATIENCE, Setup, bind, leader_of, until};
use crate::crash::{self, Host};
use crate::links::Links;
use crate::snapshot::{push_users, unite};

async fn fatal(cluster: &Cluster) -> Fatal {
    tokio::time::timeout(PATIENCE, cluster.fatal()).await.expect("it must stop")
}

/// Two of three that go on.
async fn go_on(brokers: &[Broker], name: &str) {
    brokers[0].create_token(name).await.unwrap();
    until("both have it", || brokers.iter().all(|broker| broker.has_token(name))).await;
}

fn copy(from: &Path, to: &Path) {
    for part in ["log", "state"] {
        let _ = std::fs::remove_dir_all(to.join(part));
        std::fs::create_dir_all(to.join(part)).unwrap();
        for file in std::fs::read_dir(from.join(part)).into_iter().flatten() {
            let file = file.unwrap();
            std::fs::copy(file.path(), to.join(part).join(file.file_name())).unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_whose_disk_was_wiped_or_set_back_is_told_by_the_others_and_stops() {
    let setup = Setup::new();
    let mut brokers = setup.voters(3).await;
    let leader = leader_of(&brokers).await;
    let victim = brokers.remove((leader + 1) % 3);
    until("it has all", || victim.cluster.state().position() == brokers[0].cluster.state().position()).await;
    let victim = Down::new(victim).await;
    let (backup, empty) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    copy(victim.dir.path(), backup.path());
    let victim = victim.start(&setup).await;
    go_on(&brokers, "after the backup").await;
    until("it has it too", || victim.has_token("after the backup")).await;
    // That it holds this is known once the next one is acknowledged.
    go_on(&brokers, "and more").await;
    until("and that", || victim.has_token("and more")).await;

    // F25: an old copy of its directory is put back.
    let victim = Down::new(victim).await;
    let newest = TempDir::new().unwrap();
    copy(victim.dir.path(), newest.path());
    copy(backup.path(), victim.dir.path());
    let victim = victim.start(&setup).await;
    let why = fatal(&victim.cluster).await;
    assert_eq!(why.code(), "SE0113", "{why}");
    go_on(&brokers, "without it").await;

    // F18: its databases are gone, its identity is not.
    let victim = Down::new(victim).await;
    copy(empty.path(), victim.dir.path());
    let victim = victim.start(&setup).await;
    let why = fatal(&victim.cluster).await;
    assert_eq!(why.code(), "SE0113", "{why}");
    assert!(!victim.has_token("without it"), "it was given nothing");
    go_on(&brokers, "still without it").await;

    // The same when everybody has started again since: what is remembered is kept.
    let victim = Down::new(victim).await;
    let mut restarted = Vec::new();
    for broker in brokers {
        restarted.push(broker.restart(&setup).await);
    }
    let victim = victim.start(&setup).await;
    let why = fatal(&victim.cluster).await;
    assert_eq!(why.code(), "SE0113", "{why}");

    // With what it really had it is welcome.
    let victim = Down::new(victim).await;
    copy(newest.path(), victim.dir.path());
    let victim = victim.start(&setup).await;
    until("it has caught up", || victim.has_token("still without it")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_state_that_ends_before_its_log_begins_is_refused() {
    let mut setup = Setup::new();
    setup.log_limits = LogLimits { snapshot_bytes: 5_000, keep_entries: 2, ..LogLimits::default() };
    let broker = setup.first().await;
    let mut number = 0;
    while broker.cluster.status().purged.is_none() {
        broker.create_token(&format!("token-{number}")).await.unwrap();
        number += 1;
    }
    let broker = Down::new(broker).await;
    std::fs::remove_dir_all(broker.dir.path().join("state")).unwrap();
    let options = setup.options(broker.dir.path(), bind(&broker.address).await, None).await;
    let refused = Cluster::start(options).await.err().expect("what it lacks is nowhere here");
    let Error::Storage(refused) = refused else { panic!("{refused}") };
    assert_eq!(refused.code(), Some("SE0114"), "{refused}");
}

/// A broker that has let go of its directory.
struct Down {
    dir: TempDir,
    address: String,
}

impl Down {
    async fn new(broker: Broker) -> Self {
        let Broker { cluster, address, dir, .. } = broker;
        cluster.stop().await;
        drop(cluster);
        let free = || {
            let parts = (Rocks::open_log(&dir.path().join("log")), Rocks::open_state(&dir.path().join("state")));
            parts.0.is_ok() && parts.1.is_ok()
        };
        until("nothing is open any more", free).await;
        Self { dir, address }
    }

    async fn start(self, setup: &Setup) -> Broker {
        setup.start_at(self.dir, bind(&self.address).await, None).await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_lost_the_end_of_its_log_elects_nobody_who_lacks_what_it_had() {
    let mut setup = Setup::new();
    let links = Links::default();
    setup.links = Some(links.clone());
    let mut hosts = crash::three(&setup, &links).await;
    let leader = crash::leader_of(&hosts).await;
    // One is away while the other two write, and then those two are away, too.
    let mut behind = hosts.remove((leader + 1) % 3);
    behind.broker.cluster.stop().await;
    let (ahead, suspect) = if hosts[0].broker.cluster.leads() { (0, 1) } else { (1, 0) };
    hosts[ahead].broker.create_token("acknowledged").await.unwrap();
    until("both have it", || hosts[suspect].broker.has_token("acknowledged")).await;
    for host in &hosts {
        host.broker.cluster.stop().await;
    }
    let last = hosts[suspect].broker.cluster.status().last_log.unwrap();
    let mut suspect = hosts.remove(suspect);
    let mut ahead = hosts.remove(0);
    suspect.log.corrupt(Space::Log, &last.to_be_bytes(), |value| value[20] ^= 1);

    behind = behind.restart(&setup).await;
    suspect = suspect.restart(&setup).await;
    // These two are a majority, and may not act as one: the one holds less than was acknowledged, the other knows that
    // it may have acknowledged it. Many election timeouts pass.
    let begun = std::time::Instant::now();
    while begun.elapsed() < Duration::from_secs(4) {
        for host in [&behind, &suspect] {
            assert!(!host.broker.cluster.leads(), "a leader that lacks an acknowledged write");
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // All voters are present: the one that has it leads.
    ahead = ahead.restart(&setup).await;
    for host in [&behind, &suspect, &ahead] {
        let state = host.broker.cluster.linearizable(PATIENCE).await.unwrap();
        assert!(crate::brokers::has_token(&state, "acknowledged"));
    }
    // And the one that was suspect counts again.
    suspect.broker.create_token("later").await.unwrap();
    behind.broker.cluster.stop().await;
    ahead.broker.create_token("of two").await.unwrap();
    until("both have it", || suspect.broker.has_token("of two")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_whose_state_differs_from_that_of_the_others_hands_over_and_stops() {
    let mut setup = Setup::new();
    let links = Links::default();
    setup.links = Some(links.clone());
    let mut hosts = crash::three(&setup, &links).await;
    hosts[0].broker.create_token("kept").await.unwrap();
    until("all have it", || hosts.iter().all(|host| host.broker.has_token("kept"))).await;
    let leader = crash::leader_of(&hosts).await;
    let victim = hosts.remove((leader + 1) % 3);
    victim.broker.cluster.stop().await;
    change_row(&victim, true);
    let victim = victim.restart(&setup).await;
    until("it has what the others have", || {
        victim.broker.cluster.state().position() == hosts[0].broker.cluster.state().position()
    })
    .await;
    drop(hosts[0].broker.cluster.transfer_leader(&hosts[0].broker.owner(), Some(victim.broker.node)).await);
    let why = fatal(&victim.broker.cluster).await;
    assert_eq!(why.code(), "SE0102", "{why}");
    assert!(!victim.broker.cluster.leads(), "another leads before it stops");
    hosts[0].broker.create_token("without it").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_that_do_not_add_up_to_their_hash_are_noticed_while_they_are_served() {
    let mut setup = Setup::new();
    let links = Links::default();
    setup.links = Some(links.clone());
    let mut hosts = crash::three(&setup, &links).await;
    hosts[0].broker.create_token("kept").await.unwrap();
    until("all have it", || hosts.iter().all(|host| host.broker.has_token("kept"))).await;
    let victim = hosts.remove(1);
    victim.broker.cluster.stop().await;
    change_row(&victim, false);
    let victim = victim.restart(&setup).await;
    let why = fatal(&victim.broker.cluster).await;
    assert_eq!(why.code(), "SE0114", "{why}");
}

/// Changes the row of the token `kept` behind the broker's back; with its hash, if it is to look right.
fn change_row(host: &Host, with_hash: bool) {
    let (mut old, mut key) = (Vec::new(), Vec::new());
    {
        // Nothing is lost here: it was stopped in order.
        host.state.cut_power(usize::MAX);
        let engine = host.state.open().unwrap();
        let from = [Table::Token as u8];
        let mut find = |at: &[u8], value: &[u8]| {
            if value.windows(4).any(|part| part == b"kept") {
                (key, old) = (at.to_vec(), value.to_vec());
            }
            std::ops::ControlFlow::Continue(())
        };
        engine.iterate(Space::StateA, &from, Some(&[Table::Token as u8 + 1]), &mut find).unwrap();
        engine.sync().unwrap();
    }
    let at = old.windows(4).position(|part| part == b"kept").expect("the token is there");
    let mut new = old.clone();
    new[at..at + 4].copy_from_slice(b"lost");
    host.state.corrupt(Space::StateA, &key, |value| *value = new.clone());
    if with_hash {
        host.state.corrupt(Space::StateMeta, b"meta", |value| {
            let mut meta = wire::StateMeta::decode(&**value).unwrap();
            let mut domain = Meta::decode(&*meta.domain).unwrap();
            let mut hash = StateHash::from_bytes(&domain.state_hash).unwrap();
            hash.remove(key[0], &key[1..], &old);
            hash.add(key[0], &key[1..], &new);
            domain.state_hash = hash.to_array().to_vec();
            meta.domain = domain.encode_to_vec();
            *value = meta.encode_to_vec();
        });
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_whose_disk_stalls_hands_over_and_stops_while_the_others_write() {
    let mut setup = Setup::new();
    let links = Links::default();
    setup.links = Some(links.clone());
    let mut hosts = crash::three(&setup, &links).await;
    let leader = crash::leader_of(&hosts).await;
    let victim = hosts.remove(leader);
    let disk: Disk = victim.log.clone();
    disk.set_stalled(true);
    // Something must wait for the disk: the others acknowledge it.
    let (cluster, owner) = (hosts[0].broker.cluster.clone(), hosts[0].broker.owner());
    drop(cluster.propose(owner, crate::brokers::token("during"), None).await);
    until("another leads", || hosts.iter().any(|host| host.broker.cluster.leads())).await;
    hosts[1].broker.create_token("after").await.unwrap();
    let why = fatal(&victim.broker.cluster).await;
    assert_eq!(why.code(), "SE0112", "{why}");
    disk.set_stalled(false);
}

/// A tmpfs that goes with its directory.
struct Tmpfs(TempDir);

impl Tmpfs {
    /// None without the right to mount.
    fn new(megabytes: u32) -> Option<Self> {
        let dir = TempDir::new().unwrap();
        let size = format!("size={megabytes}m,mode=0700");
        mount(&["-t", "tmpfs", "-o", &size, "tmpfs"], dir.path()).then_some(Self(dir))
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn filler(&self) -> PathBuf {
        self.path().join("filler")
    }

    /// Fills it until so many bytes are left.
    fn fill(&self, left: u64) {
        let usage = selvedge_storage::room::Usage::of(self.path()).unwrap();
        let filled = std::fs::metadata(self.filler()).map_or(0, |filler| filler.len());
        let file = std::fs::File::options().write(true).create(true).truncate(false).open(self.filler()).unwrap();
        let bytes = filled + usage.free_bytes.saturating_sub(left);
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, bytes).unwrap();
    }

    fn free(&self) {
        std::fs::remove_file(self.filler()).unwrap();
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        // Lazily: a broker may still be letting go of it.
        let _ = Command::new("umount").arg("-l").arg(self.path()).status();
    }
}

fn mount(args: &[&str], at: &Path) -> bool {
    Command::new("mount")
        .args(args)
        .arg(at)
        .stderr(std::process::Stdio::null())
        .status()
        .is_ok_and(|done| done.success())
}

/// Says that a test needs something that is not there.
fn skip(test: &str, needs: &str) {
    println!("SKIP {test}: needs {needs}");
    if let Some(file) = std::env::var_os("SELVEDGE_SKIPS") {
        use std::io::Write as _;
        let mut file = std::fs::File::options().append(true).create(true).open(file).unwrap();
        writeln!(file, "SKIP {test}: needs {needs}").unwrap();
    }
}

/// Three voters, each on a small disk of its own.
async fn small_disks(setup: &Setup, megabytes: u32) -> Option<(Vec<Broker>, Vec<Tmpfs>)> {
    let disks: Vec<Tmpfs> = (0..3).map_while(|_| Tmpfs::new(megabytes)).collect();
    if disks.len() < 3 {
        return None;
    }
    let mut brokers = Vec::new();
    for disk in &disks {
        let dir = tempfile::Builder::new().prefix("broker").tempdir_in(disk.path()).unwrap();
        brokers.push(setup.start(dir).await);
    }
    unite(setup, &brokers).await;
    Some((brokers, disks))
}

#[tokio::test(flavor = "multi_thread")]
async fn full_disks_refuse_writes_with_a_code_until_there_is_room_and_lose_nothing() {
    let setup = Setup::new();
    // Of each, what the databases lay aside for their logs takes a third.
    let Some((mut brokers, disks)) = small_disks(&setup, 512).await else {
        return skip(
            "full_disks_refuse_writes_with_a_code_until_there_is_room_and_lose_nothing",
            "root, to mount a tmpfs",
        );
    };
    let nearly_full = 5 << 20;
    brokers[0].create_token("before").await.unwrap();

    // The leader's is nearly full: another leads, and writes go on.
    let leader = leader_of(&brokers).await;
    disks[leader].fill(nearly_full);
    until("one with room leads", || {
        brokers.iter().enumerate().any(|(at, broker)| at != leader && broker.cluster.leads())
    })
    .await;
    brokers[leader].create_token("through the full one").await.unwrap();

    // All are: nothing is written, everything is read; and when there is room again nobody needs to start again.
    disks.iter().enumerate().filter(|(at, _)| *at != leader).for_each(|(_, disk)| disk.fill(nearly_full));
    let begun = std::time::Instant::now();
    let mut number = 0;
    loop {
        number += 1;
        match brokers[0].create_token(&format!("filling {number}")).await {
            Err(ProposeError::NoRoom) => break,
            other => assert!(begun.elapsed() < PATIENCE, "writes are not refused: {other:?}"),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    for broker in &brokers {
        let state = broker.cluster.linearizable(PATIENCE).await.unwrap();
        assert!(crate::brokers::has_token(&state, "through the full one"));
        assert!(!crate::brokers::has_token(&state, &format!("filling {number}")), "what was refused was not done");
    }
    disks.iter().for_each(Tmpfs::free);
    let begun = std::time::Instant::now();
    while let Err(error) = brokers[0].create_token("with room").await {
        assert!(begun.elapsed() < PATIENCE, "{error}");
    }

    // A follower's disk has no byte left: it stops with a code, its ballast gone, and comes back when there is room.
    let leader = leader_of(&brokers).await;
    let victim = (leader + 1) % 3;
    let ballast = brokers[victim].dir.path().join("ballast");
    assert!(ballast.exists());
    disks[victim].fill(0);
    let mut pushed = 0;
    let mut round = 0;
    let why = loop {
        pushed += push_users(&brokers[leader], &format!("people-{round}"), 200).await;
        round += 1;
        match tokio::time::timeout(Duration::from_millis(100), brokers[victim].cluster.fatal()).await {
            Ok(why) => break why,
            Err(_) => assert!(round < 12, "the full disk took {pushed} users"),
        }
        if round == 3 {
            // Nor is what the database had laid aside.
            disks[victim].fill(0);
        }
    };
    assert_eq!(why.code(), "SE0111", "{why}");
    assert!(!ballast.exists(), "it was given up");
    let broker = brokers.remove(victim);
    go_on(&brokers, "without it").await;
    broker.cluster.stop().await;
    disks[victim].free();
    let back = broker.restart(&setup).await;
    until("it has caught up", || back.has_token("without it")).await;
    assert_eq!(back.cluster.state().rows::<selvedge_domain::rows::User>().count(), pushed);
    assert!(ballast.exists(), "it is laid again");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_only_disk_is_refused_with_a_code_and_nothing_is_half_done() {
    let mut setup = Setup::new();
    setup.log_limits = LogLimits::default();
    // Of each, what the databases lay aside for their logs takes a third.
    let Some((mut brokers, disks)) = small_disks(&setup, 512).await else {
        return skip("a_read_only_disk_is_refused_with_a_code_and_nothing_is_half_done", "root, to mount a tmpfs");
    };
    let leader = leader_of(&brokers).await;
    let victim = (leader + 1) % 3;
    let broker = brokers.remove(victim);
    broker.cluster.stop().await;
    let Broker { cluster, address, dir, .. } = broker;
    drop(cluster);
    // Free once nothing is open for writing any more.
    let read_only = ["-o", "remount,ro"];
    until("it can be mounted read-only", || mount(&read_only, disks[victim].path())).await;
    let refused = DataDir::open(dir.path()).err().expect("nothing can be written");
    assert_eq!(refused.code(), Some("SE0115"), "{refused}");
    go_on(&brokers, "without it").await;
    assert!(mount(&["-o", "remount,rw"], disks[victim].path()));
    let back = setup.start_at(dir, TcpListener::bind(&address).unwrap(), None).await;
    until("it has caught up", || back.has_token("without it")).await;
}
