//! Who is a member: joining, growing, shrinking, being removed.

use std::net::TcpListener;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use selvedge_cluster::{LogLimits, MEMBERS_MAX};
use selvedge_domain::Body;
use selvedge_domain::command::PutBroker;
use tempfile::TempDir;

use crate::brokers::{Broker, PATIENCE, Setup, has_token, init, leader_of, token, until};

#[tokio::test(flavor = "multi_thread")]
async fn a_learner_catches_up_from_a_snapshot_when_the_log_was_cut() {
    let mut setup = Setup::new();
    setup.log_limits = LogLimits { snapshot_bytes: 10_000, keep_entries: 2, ..LogLimits::default() };
    let first = setup.first().await;
    let mut made = 0;
    while first.cluster.status().applied < Some(60) {
        first.create_token(&format!("token-{made}")).await.unwrap();
        made += 1;
    }
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    let learner = setup.start(TempDir::new().unwrap()).await;
    first.enrol(&learner).await;
    learner.cluster.join(std::slice::from_ref(&first.address), &learner.address).await.unwrap();
    until("the learner has the last token", || learner.has_token(&format!("token-{}", made - 1))).await;
    learner.register().await;
    // What is only remembered of a request moves no position.
    until("both hold the same", || learner.cluster.state().state_hash() == first.cluster.state().state_hash()).await;
    first.cluster.promote(&first.owner(), learner.node).await.unwrap();
    until("both know of two voters", || voters(&first) == 2 && voters(&learner) == 2).await;
    // And it keeps what it installed.
    let learner = learner.restart(&setup).await;
    until("it has the state again", || learner.has_token("token-0")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn leadership_is_handed_over_and_a_removed_broker_is_no_member() {
    let brokers = Setup::new().voters(3).await;
    let leader = leader_of(&brokers).await;
    let to = brokers[(leader + 1) % 3].node;
    // Asked of a follower.
    brokers[(leader + 2) % 3].cluster.transfer_leader(&brokers[leader].owner(), Some(to)).await.unwrap();
    until("the other one leads", || brokers[(leader + 1) % 3].cluster.leads()).await;
    brokers[(leader + 1) % 3].remove(brokers[leader].node).await;
    until("two members are left", || brokers[(leader + 1) % 3].cluster.status().members.len() == 2).await;
    brokers[(leader + 1) % 3].create_token("still here").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_of_another_cluster_is_refused() {
    let setup = Setup::new();
    let first = setup.first().await;
    // Same authorities, another cluster id in its calls.
    let other = Setup { authority: setup.authority.clone(), cluster_id: [8; 16], ..Setup::new() };
    let stranger = other.start(TempDir::new().unwrap()).await;
    let error = stranger.cluster.join(std::slice::from_ref(&first.address), &stranger.address).await.unwrap_err();
    assert!(error.to_string().contains("another cluster"), "{error}");
    // Other authorities.
    let foreign = Setup::new().start(TempDir::new().unwrap()).await;
    foreign.cluster.join(std::slice::from_ref(&first.address), &foreign.address).await.unwrap_err();
    assert_eq!(first.cluster.status().members.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_claims_another_node_than_its_certificate_is_refused() {
    let setup = Setup::new();
    let first = setup.first().await;
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let liar = setup.start_at(TempDir::new().unwrap(), listener, Some(12_345)).await;
    let error = liar.cluster.join(std::slice::from_ref(&first.address), &liar.address).await.unwrap_err();
    assert!(error.to_string().contains("claims"), "{error}");
    assert_eq!(first.cluster.status().members.len(), 1);
    assert!(liar.cluster.linearizable(Duration::from_millis(300)).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn three_grow_to_five_and_shrink_to_three_under_load() {
    let setup = Setup::new();
    let mut brokers = setup.voters(3).await;
    // Written through every broker that stays, all the time.
    let (stop, kept) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Vec::new())));
    let write = |broker: &Broker| {
        let (cluster, owner, stop, kept) = (broker.cluster.clone(), broker.owner(), stop.clone(), kept.clone());
        let node = broker.node;
        tokio::spawn(async move {
            for number in 0.. {
                if stop.load(Ordering::SeqCst) {
                    return;
                }
                let name = format!("{node}-{number}");
                if cluster.propose(owner.clone(), token(&name), None).await.is_ok() {
                    kept.lock().unwrap().push(name);
                }
            }
        })
    };
    let mut writers = vec![write(&brokers[0])];
    for _ in 0..2 {
        setup.add_voter(&mut brokers).await;
        writers.push(write(brokers.last().unwrap()));
    }
    until("all know of five voters", || brokers.iter().all(|broker| voters(broker) == 5)).await;
    // The leader goes first, if it is one of the two: it hands over before.
    let stay = |broker: &Broker| [0, 3, 4].iter().any(|at| brokers[*at].node == broker.node);
    let leader = leader_of(&brokers).await;
    if stay(&brokers[leader]) {
        lead(&brokers[0], &brokers[1]).await;
    }
    for at in [1, 2] {
        let node = brokers[at].node;
        if brokers[at].cluster.leads() {
            lead(&brokers[0], &brokers[3]).await;
        }
        brokers[0].remove(node).await;
    }
    let removed: Vec<Broker> = brokers.drain(1..3).collect();
    let at = kept.lock().unwrap().len();
    until("writes go on", || kept.lock().unwrap().len() > at + 20).await;
    stop.store(true, Ordering::SeqCst);
    for writer in writers {
        writer.await.unwrap();
    }
    for broker in &brokers {
        let state = broker.cluster.linearizable(PATIENCE).await.unwrap();
        assert_eq!((voters(broker), broker.cluster.status().members.len()), (3, 3));
        for name in kept.lock().unwrap().iter() {
            assert!(has_token(&state, name), "`{name}` was acknowledged");
        }
    }
    // Who was removed is answered nothing any more.
    for broker in removed {
        assert!(broker.cluster.linearizable(Duration::from_millis(300)).await.is_err());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_leads_finishes_a_change_that_a_dead_leader_left_half_done() {
    let setup = Setup::new();
    let mut brokers = setup.voters(3).await;
    let learner = setup.start(TempDir::new().unwrap()).await;
    brokers[0].enrol(&learner).await;
    learner.cluster.join(std::slice::from_ref(&brokers[0].address), &learner.address).await.unwrap();
    learner.register().await;
    brokers.push(learner);
    let leader = leader_of(&brokers[..3]).await;
    let (one, two) = ((leader + 1) % 3, (leader + 2) % 3);
    // Two of three know of the change, and of the four that it leads to no three can agree on it.
    let asleep = brokers[two].node;
    brokers[two].cluster.stop().await;
    brokers[3].cluster.stop().await;
    let (cluster, owner, node) = (brokers[leader].cluster.clone(), brokers[leader].owner(), brokers[3].node);
    let promoting = tokio::spawn(async move { cluster.promote(&owner, node).await });
    let half_done = || [leader, one].iter().all(|at| brokers[*at].cluster.status().joint);
    until("two brokers have the first half of the change", half_done).await;
    brokers[leader].cluster.stop().await;
    promoting.abort();
    // The leader stays away; the others wake.
    let dead = brokers[leader].node;
    let mut awake = Vec::new();
    for broker in brokers {
        match broker.node {
            node if node == dead => drop(broker),
            other if other == asleep || other == node => awake.push(broker.restart(&setup).await),
            _ => awake.push(broker),
        }
    }
    until("all have the second half", || {
        awake.iter().all(|broker| voters(broker) == 4 && !broker.cluster.status().joint)
    })
    .await;
    awake[0].create_token("after").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_leader_lets_go_of_those_alone_whom_the_registry_says_are_removed() {
    let brokers = Setup::new().voters(3).await;
    let leader = leader_of(&brokers).await;
    let (asker, gone) = (&brokers[(leader + 1) % 3], &brokers[(leader + 2) % 3]);
    let refused = asker.cluster.remove(&asker.owner(), gone.node).await.unwrap_err();
    assert!(refused.to_string().contains("was not removed from the registry"), "{refused}");
    assert_eq!(voters(asker), 3);
    // The registry's word is enough: whoever leads sees to the rest, whether or not anybody asks.
    asker.cluster.propose(asker.owner(), Body::RemoveBroker { node: gone.node }, None).await.unwrap();
    let ended = tokio::time::timeout(PATIENCE, gone.cluster.fatal()).await.expect("it is told, and ends");
    assert_eq!(ended.code(), "SE0104");
    until("it is no member", || asker.cluster.status().members.len() == 2).await;
    asker.create_token("still here").await.unwrap();
    let again = asker.cluster.add_learner(&asker.owner(), gone.node, &gone.address).await.unwrap_err();
    assert!(again.to_string().contains("was removed"), "{again}");
    let last = asker.cluster.promote(&asker.owner(), 12_345).await.unwrap_err();
    assert!(last.to_string().contains("is not a member"), "{last}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_was_removed_while_it_slept_is_told_and_ends() {
    let setup = Setup::new();
    let mut brokers = setup.voters(3).await;
    let asleep = brokers.remove((leader_of(&brokers).await + 1) % 3);
    asleep.cluster.stop().await;
    brokers[0].remove(asleep.node).await;
    let awake = asleep.restart(&setup).await;
    let ended = tokio::time::timeout(PATIENCE, awake.cluster.fatal()).await.expect("it is told");
    assert_eq!(ended.code(), "SE0104");
    brokers[1].create_token("without it").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_has_at_most_30_members() {
    let setup = Setup::new();
    let first = setup.first().await;
    // Nobody answers there: learners count all the same.
    for node in 1..=MEMBERS_MAX as u64 {
        let put = PutBroker { node, name: format!("b{node}"), peer: "127.0.0.1:9".to_owned(), ..first.description() };
        first.cluster.propose(first.owner(), Body::PutBroker(put), None).await.unwrap();
    }
    for node in 1..MEMBERS_MAX as u64 {
        first.cluster.add_learner(&first.owner(), node, "127.0.0.1:9").await.unwrap();
    }
    assert_eq!(first.cluster.status().members.len(), MEMBERS_MAX);
    let refused = first.cluster.add_learner(&first.owner(), MEMBERS_MAX as u64, "127.0.0.1:9").await.unwrap_err();
    assert!(refused.to_string().contains("at most 30 members"), "{refused}");
    first.create_token("still here").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_without_the_role_stays_a_learner() {
    let setup = Setup::new();
    let first = setup.first().await;
    let learner = setup.start(TempDir::new().unwrap()).await;
    let description = first.description();
    let put = |roles| PutBroker {
        node: learner.node,
        name: "learner".to_owned(),
        peer: learner.address.clone(),
        roles,
        ..description.clone()
    };
    first.cluster.propose(first.owner(), Body::PutBroker(put(vec![2, 3, 4])), None).await.unwrap();
    learner.cluster.join(std::slice::from_ref(&first.address), &learner.address).await.unwrap();
    until("it follows", || learner.cluster.state().cluster().is_some()).await;
    let refused = first.cluster.promote(&first.owner(), learner.node).await.unwrap_err();
    assert!(refused.to_string().contains("the role `voter`"), "{refused}");
    first.cluster.propose(first.owner(), Body::PutBroker(put(vec![1, 2, 3, 4])), None).await.unwrap();
    first.cluster.promote(&first.owner(), learner.node).await.unwrap();
    until("it votes", || voters(&first) == 2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_is_initialised_once() {
    let setup = Setup::new();
    let first = setup.first().await;
    let before = first.cluster.state().position();
    let again = first.cluster.initialize(init(setup.cluster_id)).await.unwrap_err();
    assert!(again.to_string().contains("initialised before"), "{again}");
    let other = first.cluster.initialize(init([9; 16])).await.unwrap_err();
    assert!(other.to_string().contains("cluster id"), "{other}");
    assert_eq!(first.cluster.state().position(), before);
    first.create_token("still here").await.unwrap();
}

/// Hands leadership over; under load it is not always taken at once.
async fn lead(asker: &Broker, next: &Broker) {
    let begun = Instant::now();
    while !next.cluster.leads() {
        assert!(begun.elapsed() < PATIENCE, "it does not lead");
        drop(asker.cluster.transfer_leader(&asker.owner(), Some(next.node)).await);
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

fn voters(broker: &Broker) -> usize {
    broker.cluster.status().members.iter().filter(|member| member.voter).count()
}
