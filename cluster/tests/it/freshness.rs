use std::sync::Arc;
use std::time::Duration;

use selvedge_cluster::{Error, How, Mode};
use selvedge_domain::Id;
use tokio_util::sync::CancellationToken;

use crate::brokers::{Counting, PATIENCE, Setup, leader_of, until};
use crate::crash;
use crate::links::Links;

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_without_a_quorum_loses_its_lease_and_refuses_linearizable_reads() {
    let setup = Setup::new();
    let mut brokers = setup.voters(3).await;
    until("all hold a lease", || brokers.iter().all(|broker| broker.cluster.lease().open())).await;
    let leader = leader_of(&brokers).await;
    let alone = brokers.swap_remove(leader);
    for other in &brokers {
        other.cluster.stop().await;
    }
    let read = alone.cluster.linearizable(Duration::from_millis(500)).await;
    assert!(read.is_err(), "a leader that no quorum confirms must not answer");
    until("its lease has ended", || !alone.cluster.lease().open()).await;
    assert_eq!(alone.cluster.lease().left_ms(), 0);
    // It comes back with the quorum.
    let mut back = Vec::new();
    for broker in brokers {
        back.push(broker.restart(&setup).await);
    }
    until("the lease is back", || alone.cluster.lease().open()).await;
    alone.cluster.linearizable(PATIENCE).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_is_enforced_when_every_broker_has_said_so() {
    let mut setup = Setup::new();
    let counting = Arc::new(Counting::default());
    setup.enforcer = counting.clone();
    let brokers = setup.voters(3).await;
    brokers[1].create_token("seen").await.unwrap();
    let position = brokers[1].cluster.state().position();
    let enforced = brokers[1].cluster.enforced(position, PATIENCE).await.unwrap();
    assert!(enforced.complete, "{enforced:?}");
    assert_eq!(enforced.receipts.len(), 3);
    assert!(enforced.receipts.iter().all(|receipt| receipt.how == How::Reported), "{enforced:?}");
    assert!(!counting.seen.lock().unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_cannot_be_asked_is_waited_for_until_its_lease_is_over() {
    let setup = Setup::new();
    let brokers = setup.voters(3).await;
    until("all hold a lease", || brokers.iter().all(|broker| broker.cluster.lease().open())).await;
    let leader = leader_of(&brokers).await;
    let (gone, here) = ((leader + 1) % 3, (leader + 2) % 3);
    brokers[gone].cluster.stop().await;
    let done = brokers[here].cluster.propose(brokers[here].owner(), crate::brokers::token("late"), None).await.unwrap();
    let soon = brokers[here].cluster.enforced(done.position, Duration::from_millis(300)).await.unwrap();
    assert!(!soon.complete, "{soon:?}");
    assert_eq!(soon.open.len(), 1);
    assert_eq!(soon.open[0].0, brokers[gone].node);
    let later = brokers[here].cluster.enforced(done.position, PATIENCE).await.unwrap();
    assert!(later.complete, "{later:?}");
    let receipt = later.receipts.iter().find(|receipt| receipt.node == brokers[gone].node).unwrap();
    assert_eq!(receipt.how, How::LeaseOver);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_is_not_renewed_while_a_change_is_not_enforced() {
    let mut setup = Setup::new();
    let counting = Arc::new(Counting::default());
    setup.enforcer = counting.clone();
    let broker = setup.first().await;
    until("it holds a lease", || broker.cluster.lease().open()).await;
    let held = counting.clone();
    let (locked, is_locked) = tokio::sync::oneshot::channel();
    let (release, released) = std::sync::mpsc::sync_channel(1);
    let holder = std::thread::spawn(move || {
        let _gate = held.gate.lock().unwrap();
        locked.send(()).unwrap();
        released.recv().unwrap();
    });
    is_locked.await.unwrap();
    broker.create_token("slow").await.unwrap();
    until("the lease has ended", || !broker.cluster.lease().open()).await;
    release.send(()).unwrap();
    holder.join().unwrap();
    until("the lease is back", || broker.cluster.lease().open()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_waits_for_its_confirmation_and_the_lease_does_not() {
    let mut setup = Setup::new();
    let counting = Arc::new(Counting::default());
    setup.enforcer = counting.clone();
    let broker = setup.first().await;
    until("it holds a lease", || broker.cluster.lease().open()).await;
    let confirmed = CancellationToken::new();
    *counting.confirmed.lock().unwrap() = Some(confirmed.clone());
    broker.create_token("closes").await.unwrap();
    let closes = broker.cluster.state().position();
    let is_seen = || counting.seen.lock().unwrap().iter().any(|event| event.id == Some(closes));
    until("the change is enforced", is_seen).await;
    *counting.confirmed.lock().unwrap() = None;
    broker.create_token("later").await.unwrap();
    let later = broker.cluster.state().position();
    let until_ms = broker.cluster.lease().end_ms();
    until("the lease is renewed", || broker.cluster.lease().end_ms() > until_ms).await;
    for position in [closes, later] {
        let soon = broker.cluster.enforced(position, Duration::ZERO).await.unwrap();
        assert_eq!(soon.open.iter().map(|(node, _)| *node).collect::<Vec<_>>(), [broker.node], "{soon:?}");
    }
    confirmed.cancel();
    let enforced = broker.cluster.enforced(later, PATIENCE).await.unwrap();
    assert_eq!(enforced.receipts.iter().map(|receipt| receipt.how).collect::<Vec<_>>(), [How::Reported]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_that_is_never_confirmed_counts_when_every_lease_from_before_is_over() {
    let mut setup = Setup::new();
    let counting = Arc::new(Counting::default());
    setup.enforcer = counting.clone();
    let broker = setup.first().await;
    until("it holds a lease", || broker.cluster.lease().open()).await;
    *counting.confirmed.lock().unwrap() = Some(CancellationToken::new());
    broker.create_token("closes").await.unwrap();
    let enforced = broker.cluster.enforced(broker.cluster.state().position(), PATIENCE).await.unwrap();
    assert!(enforced.complete);
    assert_eq!(enforced.receipts.iter().map(|receipt| receipt.how).collect::<Vec<_>>(), [How::LeaseOver]);
    assert!(broker.cluster.lease().open());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_behind_links_that_swallow_everything_is_deposed_and_comes_back() {
    let mut setup = Setup::new();
    let links = Links::default();
    setup.links = Some(links.clone());
    let brokers = setup.voters(3).await;
    for (from, broker) in brokers.iter().enumerate() {
        for other in brokers.iter().filter(|other| other.node != broker.node) {
            links.add(from, other.node, &other.address).await;
        }
    }
    // They were connected directly until now: only new connections go through the links.
    let mut restarted = Vec::new();
    for broker in brokers {
        restarted.push(broker.restart(&setup).await);
    }
    let brokers = restarted;
    until("all hold a lease", || brokers.iter().all(|broker| broker.cluster.lease().open())).await;
    let leader = leader_of(&brokers).await;
    let (alone, rest) = (&brokers[leader], [&brokers[(leader + 1) % 3], &brokers[(leader + 2) % 3]]);

    links.cut(leader, alone.node, true);
    rest[0].create_token("elsewhere").await.unwrap();
    assert!(alone.cluster.linearizable(Duration::from_millis(500)).await.is_err());
    assert!(!alone.has_token("elsewhere"));
    until("the isolated one has lost its lease", || !alone.cluster.lease().open()).await;
    assert!(rest.iter().all(|broker| broker.cluster.lease().open()), "the others keep theirs");

    links.cut(leader, alone.node, false);
    until("it has caught up", || alone.has_token("elsewhere")).await;
    until("it holds a lease again", || alone.cluster.lease().open()).await;
    alone.create_token("back").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn who_has_seen_a_position_reads_nothing_older_from_a_broker_that_is_cut_off() {
    let mut setup = Setup::new();
    let links = Links::default();
    setup.links = Some(links.clone());
    let hosts = crash::three(&setup, &links).await;
    until("all hold a lease", || hosts.iter().all(|host| host.broker.cluster.lease().open())).await;
    let leader = crash::leader_of(&hosts).await;
    let (behind, here) = ((leader + 1) % 3, &hosts[leader].broker.cluster);
    let (cut, node) = (&hosts[behind].broker.cluster, hosts[behind].broker.node);
    hosts[leader].broker.create_token("before").await.unwrap();
    let before = here.state().position();
    until("it has what comes before", || cut.state().position() >= before).await;
    links.cut(behind, node, true);
    hosts[leader].broker.create_token("after").await.unwrap();
    let seen = here.state().position();

    let soon = Duration::from_millis(300);
    let old = cut.read(Mode::Local, None, PATIENCE).await.unwrap();
    assert!(old.state.position() < seen, "what it has, it answers");
    let age_ms = old.age_ms.expect("it has asked before");
    let stale = cut.read(Mode::Local, Some(seen), soon).await.err().expect("what was seen is not here");
    assert!(matches!(stale, Error::Behind { seen: at, .. } if at == seen), "{stale}");
    assert!(cut.read(Mode::Linearizable, None, soon).await.is_err(), "nobody says what is newest");
    let older = cut.read(Mode::Local, Some(before), soon).await.unwrap();
    assert!(older.state.position() >= before && older.age_ms.unwrap() >= age_ms + 300, "and it gets older");
    let other = here.read(Mode::Linearizable, Some(seen), PATIENCE).await.unwrap();
    assert!(other.state.position() >= seen);

    let waiting = tokio::spawn({
        let cut = cut.clone();
        async move { cut.read(Mode::Local, Some(seen), PATIENCE).await.map(|read| read.state) }
    });
    links.cut(behind, node, false);
    let state = waiting.await.unwrap().unwrap();
    assert!(crate::brokers::has_token(&state, "after"), "it waits until it has it");
    let reset = cut.read(Mode::Local, Some(Id::new(0, 9)), PATIENCE).await.err().expect("that epoch is over");
    assert!(matches!(reset, Error::Reset { .. }), "{reset}");
}
