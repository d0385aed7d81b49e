//! Snapshots: saved, sent, broken off, installed; and a log that is cut all the time.

use std::path::Path;
use std::time::{Duration, Instant};

use futures::future::join_all;
use selvedge_cluster::{Error, LogLimits, SnapshotHead};
use selvedge_domain::command::UserFields;
use selvedge_domain::{Actor, Asker, Body, Credential};
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

use crate::brokers::{Broker, PATIENCE, Setup, init, leader_of, token, until};
use crate::links::Links;

#[tokio::test(flavor = "multi_thread")]
async fn a_saved_snapshot_says_what_it_is_of_and_one_that_was_changed_is_refused() {
    let broker = Setup::new().first().await;
    broker.create_token("kept").await.unwrap();
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("state.snapshot");
    let saved = broker.cluster.save_snapshot(path.clone()).await.unwrap();
    let status = broker.cluster.status();
    assert_eq!((saved.position, &saved.state_hash), (status.position, &status.state_hash));
    assert_eq!((saved.index, &saved.voters), (status.applied.unwrap(), &vec![broker.node]));
    assert_eq!((saved.cluster_id.as_str(), saved.bytes > 0), (status.cluster_id.as_str(), true));
    assert_eq!(SnapshotHead::read(&path).unwrap(), saved);
    assert_eq!(names(dir.path()), ["state.snapshot"], "nothing is left beside it");

    match broker.cluster.save_snapshot(path.clone()).await {
        Err(Error::State(error)) => assert_eq!(error.kind(), std::io::ErrorKind::AlreadyExists),
        other => panic!("{other:?}"),
    }
    let bytes = std::fs::read(&path).unwrap();
    for at in (0..bytes.len()).step_by(bytes.len() / 50) {
        let mut changed = bytes.clone();
        changed[at] ^= 1;
        std::fs::write(&path, &changed).unwrap();
        assert!(SnapshotHead::read(&path).is_err(), "byte {at}");
    }
}

fn names(dir: &Path) -> Vec<String> {
    std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// Bytes of one user's attributes.
const USER_BYTES: usize = 60_000;
/// Users that make a snapshot of many chunks.
const USERS: usize = 400;

/// Three voters that reach each other through links only.
pub async fn linked(setup: &mut Setup) -> (Vec<Broker>, Links) {
    let links = Links::default();
    setup.links = Some(links.clone());
    let mut brokers = Vec::new();
    for _ in 0..3 {
        brokers.push(setup.start(TempDir::new().unwrap()).await);
    }
    for (from, broker) in brokers.iter().enumerate() {
        for other in brokers.iter().filter(|other| other.node != broker.node) {
            links.add(from, other.node, &other.address).await;
        }
    }
    unite(setup, &brokers).await;
    (brokers, links)
}

/// Makes brokers that have started one cluster of voters.
pub async fn unite(setup: &Setup, brokers: &[Broker]) {
    let first = &brokers[0];
    first.cluster.initialize(init(setup.cluster_id)).await.unwrap();
    first.register().await;
    for next in &brokers[1..] {
        first.enrol(next).await;
        next.cluster.join(std::slice::from_ref(&first.address), &next.address).await.unwrap();
        next.register().await;
        first.cluster.promote(&first.owner(), next.node).await.unwrap();
    }
}

/// Pushes users with so many attributes that the state grows; answers how many were taken before one was not.
pub async fn push_users(broker: &Broker, directory: &str, count: usize) -> usize {
    let credential = Credential::new(directory);
    let put = Body::PutDirectory { name: directory.to_owned(), token_sha256: credential.sha256() };
    let Ok(done) = broker.cluster.propose(broker.owner(), put, None).await else { return 0 };
    let asker = Asker::holder(Actor::directory(done.ids[0], 1), credential);
    let mut taken = 0;
    while taken < count {
        let round = (taken..count.min(taken + 32)).map(|number| {
            let user = UserFields {
                user_name: format!("{directory}-{number}"),
                external_id: String::new(),
                display_name: String::new(),
                active: true,
                attributes: format!("{{\"title\":\"{}\"}}", "x".repeat(USER_BYTES)),
            };
            broker.cluster.propose(asker.clone(), Body::CreateUser(user), None)
        });
        let done = join_all(round).await;
        taken += done.iter().filter(|done| done.is_ok()).count();
        if done.iter().any(Result::is_err) {
            return taken;
        }
    }
    taken
}

/// Waits until the logs of brokers are cut beyond what another one has.
async fn cut_beyond(brokers: &[&Broker], last_log: Option<u64>) {
    let begun = Instant::now();
    let mut number = 0;
    while brokers.iter().any(|broker| broker.cluster.status().purged <= last_log) {
        assert!(begun.elapsed() < PATIENCE, "the logs are not cut");
        // The log must grow to be cut.
        let name = format!("cut-{}-{number}", last_log.unwrap_or(0));
        brokers[0].create_token(&name).await.unwrap();
        number += 1;
    }
}

/// Waits until a broker has received so many bytes of a snapshot.
async fn received(broker: &Broker, bytes: u64) {
    let dir = broker.dir.path().join("snapshots");
    until("the snapshot has come so far", || {
        let files = std::fs::read_dir(&dir).into_iter().flatten().flatten();
        files.filter_map(|file| file.metadata().ok()).any(|file| file.is_file() && file.len() >= bytes)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_that_is_broken_off_at_either_end_is_sent_again_and_so_is_the_next_one() {
    let mut setup = Setup::new();
    setup.log_limits = LogLimits { snapshot_bytes: 20_000, keep_entries: 2, ..LogLimits::default() };
    let (mut brokers, links) = linked(&mut setup).await;
    let leader = leader_of(&brokers).await;
    let away = brokers.remove((leader + 1) % 3);
    away.cluster.stop().await;
    let missed = away.cluster.status().last_log;
    assert_eq!(push_users(&brokers[0], "people", USERS).await, USERS);
    cut_beyond(&brokers.iter().collect::<Vec<_>>(), missed).await;
    links.slow(away.node, Duration::from_millis(8));

    let whole = (USERS * USER_BYTES) as u64;
    // The receiver, early and late.
    let mut away = away.restart(&setup).await;
    for part in [10, 90] {
        received(&away, whole * part / 100).await;
        assert_eq!(away.cluster.status().last_log, missed, "nothing is installed before it is whole");
        away = away.restart(&setup).await;
    }
    // The sender, half way.
    received(&away, whole / 2).await;
    let leader = leader_of(&brokers).await;
    let sender = brokers.remove(leader);
    links.slow(away.node, Duration::ZERO);
    let sender = sender.restart(&setup).await;
    brokers.push(sender);
    until("it has what it missed", || away.cluster.state().position() == brokers[0].cluster.state().position()).await;
    assert_eq!(away.cluster.state().state_hash(), brokers[0].cluster.state().state_hash());

    // And another one right behind it.
    away.cluster.stop().await;
    let missed = away.cluster.status().last_log;
    cut_beyond(&brokers.iter().collect::<Vec<_>>(), missed).await;
    let away = away.restart(&setup).await;
    brokers.push(away);
    brokers[0].create_token("after all").await.unwrap();
    until("all have the same", || {
        let states: Vec<_> = brokers.iter().map(|broker| broker.cluster.state()).collect();
        states.iter().all(|state| state.position() == states[0].position())
    })
    .await;
    for broker in &brokers {
        let state = broker.cluster.linearizable(PATIENCE).await.unwrap();
        assert!(state.adds_up() && crate::brokers::has_token(&state, "after all"));
        assert_eq!(state.rows::<selvedge_domain::rows::User>().count(), USERS);
    }
}

/// Writes run for so long, and in a long run for so long.
const SUSTAINED: Duration = Duration::from_secs(10);
const SUSTAINED_LONG: Duration = Duration::from_secs(600);

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_whose_logs_are_cut_all_the_time_and_whose_followers_come_and_go_still_commits() {
    let time = if std::env::var_os("SELVEDGE_LONG").is_some() { SUSTAINED_LONG } else { SUSTAINED };
    let mut setup = Setup::new();
    setup.log_limits = LogLimits { snapshot_bytes: 50_000, keep_entries: 5, ..LogLimits::default() };
    let (brokers, links) = linked(&mut setup).await;
    let stop = CancellationToken::new();
    let writers: Vec<_> = (0..6)
        .map(|writer| {
            let (cluster, owner) = (brokers[writer % 3].cluster.clone(), brokers[0].owner());
            let stop = stop.clone();
            tokio::spawn(async move {
                let mut made = 0_u64;
                while !stop.is_cancelled() {
                    // One token, made and revoked: what is written is much, what is kept is little.
                    let Ok(done) = cluster.propose(owner.clone(), token(&format!("w{writer}-{made}")), None).await
                    else {
                        continue;
                    };
                    let revoke = Body::RevokeToken { id: done.ids[0] };
                    drop(cluster.propose(owner.clone(), revoke, None).await);
                    made += 1;
                }
                made
            })
        })
        .collect();
    let begun = Instant::now();
    let mut isolated = 0;
    while begun.elapsed() < time {
        let leader = leader_of(&brokers).await;
        let (at, here) = ((leader + 1 + isolated % 2) % 3, leader);
        links.cut(at, brokers[at].node, true);
        let missed = brokers[at].cluster.status().last_log;
        until("the others have cut what it misses", || brokers[here].cluster.status().purged > missed).await;
        links.cut(at, brokers[at].node, false);
        let target = brokers[here].cluster.state().position();
        until("it has caught up", || brokers[at].cluster.state().position() >= target).await;
        isolated += 1;
    }
    stop.cancel();
    let mut made = 0;
    for writer in writers {
        made += writer.await.unwrap();
    }
    println!("{made} writes, {isolated} followers isolated until they needed a snapshot");
    assert!(made > 0 && isolated > 0);
    brokers[0].create_token("still here").await.unwrap();
    for broker in &brokers {
        let state = broker.cluster.linearizable(PATIENCE).await.unwrap();
        assert!(state.adds_up() && crate::brokers::has_token(&state, "still here"));
    }
}
