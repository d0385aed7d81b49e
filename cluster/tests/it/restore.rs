//! A snapshot, or what is left of a cluster, becomes the next epoch.

use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use futures::StreamExt as _;
use selvedge_cluster::restore::{self, Begun, Source, in_directory};
use selvedge_cluster::{Error, SnapshotHead, save_at_rest};
use selvedge_domain::command::PutBroker;
use selvedge_domain::decide::{BeginEpoch, Beyond};
use selvedge_domain::{Credential, Id};
use selvedge_storage::engine::rocks::Rocks;
use selvedge_storage::log::{Log, Vote};
use selvedge_storage::{DataDir, inspect};
use tempfile::TempDir;

use crate::brokers::{Broker, CLUSTER_ID, NEXT_OWNER, PATIENCE, Setup, leader_of, until};

/// The directory of the next epoch.
fn begin(source: Source) -> (TempDir, Begun) {
    let holder = TempDir::new().unwrap();
    let dir = DataDir::make(holder.path()).unwrap();
    let begin = BeginEpoch {
        cluster_id: CLUSTER_ID,
        epoch: source.state().position().epoch + 1,
        broker: PutBroker {
            node: dir.node_id(),
            name: "next".to_owned(),
            region: "here".to_owned(),
            host: "localhost".to_owned(),
            edge: String::new(),
            web: String::new(),
            peer: "127.0.0.1:1".to_owned(),
            roles: vec![1, 2, 3, 4],
        },
        owner_sha256: Credential::new(NEXT_OWNER).sha256(),
        holds: !source.is_whole(),
        beyond: Beyond::default(),
    };
    let begun = restore::begin(&dir, source, &begin, 1).unwrap();
    dir.finish().unwrap();
    (holder, begun)
}

/// Stops a broker and leaves its directory.
async fn stopped(broker: Broker) -> TempDir {
    let Broker { cluster, dir, .. } = broker;
    let row = cluster.state().cluster().expect("it is a member");
    cluster.stop().await;
    drop(cluster);
    crate::brokers::released(dir.path()).await;
    // As whoever makes a broker a member does.
    let cluster_id = u128::from_be_bytes(row.cluster_id.try_into().unwrap());
    DataDir::open(dir.path()).unwrap().join_cluster(cluster_id).unwrap();
    dir
}

fn path(dir: &TempDir) -> PathBuf {
    dir.path().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_becomes_the_next_epoch_with_one_voter_that_waits_for_the_leases_of_the_last() {
    let setup = Setup::new();
    let broker = setup.first().await;
    broker.create_token("kept").await.unwrap();
    let files = TempDir::new().unwrap();
    let file = files.path().join("state.snapshot");
    // Of a broker that runs, as it lies there.
    let saved = save_at_rest(broker.dir.path(), &file).unwrap();
    assert_eq!(SnapshotHead::read(&file).unwrap(), saved);
    assert_eq!((saved.tables["token"], saved.tables["broker"]), (2, 1));
    broker.create_token("lost").await.unwrap();
    let old_owner = broker.owner();
    drop(stopped(broker).await);

    let source = Source::snapshot(&file).unwrap();
    assert!(!source.is_whole() && source.cluster_id() == CLUSTER_ID);
    let (dir, begun) = begin(source);
    assert_eq!((begun.from, begun.position.epoch), (saved.position, saved.position.epoch + 1));
    let begun_at = Instant::now();
    let next = setup.start(dir).await;
    assert_eq!((next.cluster.status().epoch, next.node), (2, begun.node));

    // Writes go on at once, for whom this epoch knows.
    next.register().await;
    let members: Vec<_> = next.cluster.status().members.iter().map(|m| (m.node, m.voter)).collect();
    assert_eq!(members, [(next.node, true)]);
    next.create_token("new").await.unwrap();
    assert!(next.has_token("kept") && !next.has_token("lost"));
    let refused = next.cluster.propose(old_owner, crate::brokers::token("x"), None).await;
    assert!(refused.is_err(), "{refused:?}");
    assert!(!next.cluster.lease().open(), "a lease of the last epoch may still run");
    until("it serves", || next.cluster.lease().open()).await;
    assert!(begun_at.elapsed() >= Duration::from_millis(3_000 * 111 / 100));

    // A watch of the last epoch is told to begin anew; one of this epoch begins where it began.
    let mut watch = pin!(next.cluster.events(Id::new(1, 1)));
    let first = tokio::time::timeout(PATIENCE, watch.next()).await.unwrap().unwrap();
    assert!(matches!(first, Err(Error::Reset { position }) if position.epoch == 2), "{first:?}");
    let mut watch = pin!(next.cluster.events(Id::new(2, begun.from.seq + 1)));
    let first = tokio::time::timeout(PATIENCE, watch.next()).await.unwrap().unwrap().unwrap();
    let selvedge_cluster::Frame::Events { events, .. } = first else { panic!("{first:?}") };
    assert_eq!(events[0].event.as_ref().map(|event| event.name()), Some("epoch.began"));

    // It has waited: another start does not.
    let next = next.restart(&setup).await;
    assert!(next.has_token("new"));
    until("it serves", || next.cluster.lease().open()).await;
    next.cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn another_broker_joins_the_next_epoch_and_one_of_the_last_is_refused() {
    let setup = Setup::new();
    let mut old = setup.voters(2).await;
    let files = TempDir::new().unwrap();
    let file = files.path().join("state.snapshot");
    old[0].cluster.save_snapshot(file.clone()).await.unwrap();
    drop(stopped(old.remove(0)).await);

    let (dir, _) = begin(Source::snapshot(&file).unwrap());
    let next = setup.start(dir).await;
    next.register().await;
    // It has not heard that its cluster went on without it.
    let late = &old[0];
    let refused = late.cluster.join(std::slice::from_ref(&next.address), &late.address).await.unwrap_err();
    assert!(refused.to_string().contains("another epoch"), "{refused}");

    until("it serves", || next.cluster.lease().open()).await;
    let mut brokers = vec![next];
    setup.add_voter(&mut brokers).await;
    brokers[0].create_token("both").await.unwrap();
    until("it is on both", || brokers.iter().all(|broker| broker.has_token("both"))).await;
    let hash = |broker: &Broker| broker.cluster.status().state_hash.clone();
    until("both hold the same", || hash(&brokers[0]) == hash(&brokers[1])).await;
    for broker in brokers.iter().chain(&old) {
        broker.cluster.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_the_survivors_the_one_with_the_most_of_the_log_goes_on_and_nothing_acknowledged_is_lost() {
    let setup = Setup::new();
    let mut brokers = setup.voters(3).await;
    let leader = leader_of(&brokers).await;
    let behind = brokers.remove((leader + 1) % 3);
    let behind_node = behind.node;
    let behind = stopped(behind).await;
    // On a busy machine some may not be acknowledged; those that are count.
    let (mut acknowledged, begun_at) = (Vec::new(), Instant::now());
    for n in 0.. {
        let name = format!("t{n}");
        if brokers[0].create_token(&name).await.is_ok() {
            acknowledged.push(name);
        }
        if acknowledged.len() == 20 {
            break;
        }
        assert!(begun_at.elapsed() < 2 * PATIENCE, "two of three take writes");
    }
    // Whoever stood for election since votes in a higher term, and has no more of the log for it.
    {
        let dir = DataDir::open(behind.path()).unwrap();
        let log = Log::open(std::sync::Arc::new(Rocks::open_log(&dir.log_path()).unwrap())).unwrap();
        let (done, was_done) = mpsc::sync_channel(1);
        let vote = Vote { term: log.vote().unwrap().term + 50, node: behind_node, committed: false };
        log.save_vote(vote, Box::new(move |result| drop(done.send(result))));
        was_done.recv().unwrap().unwrap();
    }
    let lost = brokers.remove(1);
    drop(stopped(lost).await);
    let ahead = stopped(brokers.remove(0)).await;
    let ahead_node = inspect::identity(ahead.path()).unwrap().node_id;

    let (source, survivors) = Source::survivors(&[path(&behind), path(&ahead)]).unwrap();
    assert!(source.is_whole(), "two of three voters are a majority");
    let chosen: Vec<u64> = survivors.iter().filter(|s| s.chosen).map(|s| s.node).collect();
    assert_eq!(chosen, [ahead_node]);
    let (dir, _) = begin(source);

    // The one that is behind is no majority, and says so.
    let (alone, _) = Source::survivors(&[path(&behind)]).unwrap();
    assert!(!alone.is_whole());
    let (alone, survivors) = Source::survivors(&[path(&behind), path(&behind)]).unwrap();
    assert!(!alone.is_whole() && survivors.len() == 2, "one node is one, however often it is named");

    let next = setup.start(dir).await;
    next.register().await;
    for name in &acknowledged {
        assert!(next.has_token(name), "{name} was acknowledged");
    }
    next.create_token("after").await.unwrap();
    next.cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_whole_snapshot_or_no_stopped_broker_begins_nothing() {
    let setup = Setup::new();
    let broker = setup.first().await;
    let files = TempDir::new().unwrap();
    let file = files.path().join("state.snapshot");
    save_at_rest(broker.dir.path(), &file).unwrap();
    let whole = std::fs::read(&file).unwrap();
    let refused = |bytes: &[u8], what: &str| {
        let wrong = files.path().join("wrong");
        std::fs::write(&wrong, bytes).unwrap();
        let error = Source::snapshot(&wrong).err().unwrap_or_else(|| panic!("{what} was taken"));
        assert!(error.to_string().contains("SE0120"), "{what}: {error}");
        assert!(SnapshotHead::read(&wrong).is_err(), "{what}");
    };
    refused(b"", "an empty file");
    refused(b"kind: Region\nname: here\n", "another file");
    for at in (0..whole.len()).step_by(whole.len() / 16) {
        refused(&whole[..at], "a part of one");
        let mut changed = whole.clone();
        changed[at] ^= 0x10;
        refused(&changed, "a changed one");
    }
    refused(&[&whole[..], b"x"].concat(), "one with more behind it");

    let in_use = Source::survivors(&[path(&broker.dir)]).err().expect("it runs").to_string();
    assert!(in_use.contains(&format!("process {}", std::process::id())) && in_use.contains("SE0116"), "{in_use}");
    let nothing = Source::survivors(&[files.path().to_owned()]).err().expect("no data directory").to_string();
    assert!(nothing.contains("SE0120"), "{nothing}");

    let other = Setup {
        cluster_id: [8; 16],
        authority: std::sync::Arc::new(crate::brokers::Authority::new([8; 16])),
        ..Setup::new()
    };
    let stranger = other.first().await;
    let (ours, theirs) = (stopped(broker).await, stopped(stranger).await);
    let mixed = Source::survivors(&[path(&ours), path(&theirs)]).err().expect("two clusters").to_string();
    assert!(mixed.contains(&hex(CLUSTER_ID)) && mixed.contains(&hex([8; 16])), "{mixed}");
    let state = Source::snapshot(&file).unwrap();
    assert!(in_directory(theirs.path(), state.state()).is_err(), "another cluster's revocations");
    let unused = TempDir::new().unwrap();
    drop(DataDir::open(&data(unused.path())).unwrap());
    assert!(Source::survivors(&[data(unused.path())]).is_err(), "it belongs to no cluster");
}

fn data(path: &Path) -> PathBuf {
    path.join("data")
}

fn hex(id: [u8; 16]) -> String {
    format!("{:032x}", u128::from_be_bytes(id))
}
