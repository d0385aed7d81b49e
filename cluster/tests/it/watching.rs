use std::pin::pin;

use futures::StreamExt as _;
use selvedge_cluster::{Error, Frame};
use selvedge_domain::{Asker, Body};

use crate::brokers::{PATIENCE, Setup, leader_of};

#[tokio::test(flavor = "multi_thread")]
async fn events_are_gap_free_over_a_leader_change_and_end_in_a_bookmark_of_the_state() {
    let brokers = Setup::new().voters(3).await;
    let leader = leader_of(&brokers).await;
    let watcher = &brokers[(leader + 1) % 3];
    let mut events = pin!(watcher.cluster.events(1));
    let writer = &brokers[(leader + 2) % 3];
    for n in 0..10 {
        writer.create_token(&format!("token-{n}")).await.unwrap();
        if n == 4 {
            brokers[leader].cluster.transfer_leader(None).await.unwrap();
        }
    }
    let end = writer.cluster.state().position();
    let mut next_seq = 1;
    loop {
        let frame = tokio::time::timeout(PATIENCE, events.next()).await.unwrap().unwrap().unwrap();
        match frame {
            Frame::Events { position, events, last } => {
                for event in &events {
                    assert_eq!(event.id.unwrap().seq, next_seq);
                    next_seq += 1;
                }
                assert_eq!(position.seq, next_seq - 1);
                assert_eq!(last, events.last().unwrap().last);
            }
            Frame::Bookmark { position, state_hash } => {
                assert_eq!(position.seq, next_seq - 1);
                if position == end {
                    assert_eq!(state_hash, writer.cluster.state().state_hash());
                    break;
                }
            }
        }
    }
    // Resumed in the middle.
    let mut again = pin!(watcher.cluster.events(5));
    match again.next().await.unwrap().unwrap() {
        Frame::Events { events, .. } => assert_eq!(events[0].id.unwrap().seq, 5),
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_compacted_is_said_to_be_gone() {
    let broker = Setup::new().first().await;
    for n in 0..3 {
        broker.create_token(&format!("token-{n}")).await.unwrap();
    }
    let upto_seq = broker.cluster.state().position().seq - 1;
    broker.cluster.propose(Asker::BROKER, Body::CompactJournal { upto_seq }, None).await.unwrap();
    let mut gone = pin!(broker.cluster.events(1));
    match gone.next().await {
        Some(Err(Error::Compacted { upto })) => assert_eq!(upto, upto_seq),
        other => panic!("{other:?}"),
    }
    assert!(gone.next().await.is_none());
    let mut rest = pin!(broker.cluster.events(upto_seq + 1));
    assert!(matches!(rest.next().await, Some(Ok(Frame::Events { .. }))));
}
