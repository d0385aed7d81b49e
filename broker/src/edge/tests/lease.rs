//! The freshness lease, and what is held without it.

use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::world::*;

#[tokio::test(flavor = "multi_thread")]
async fn flows_are_held_while_the_lease_is_over_and_go_on_when_it_returns() {
    let world = world().await;
    let _dialed = with_connector(&world, Manner::echoes()).await;
    let mut client = world.attach(&world.client, 1).await;
    let mut hop = open_echo(&world, &mut client).await;
    world.ground.lease.store(false, Ordering::SeqCst);
    hop.write_all(b"later").await.unwrap();
    let mut answer = [0; 5];
    let early = tokio::time::timeout(Duration::from_millis(300), hop.read_exact(&mut answer)).await;
    assert!(early.is_err(), "nothing is forwarded without the lease");
    world.ground.lease.store(true, Ordering::SeqCst);
    world.ground.renewed.send_modify(|end| *end += 1);
    tokio::time::timeout(DEADLINE, hop.read_exact(&mut answer[..])).await.unwrap().unwrap();
    assert_eq!(&answer, b"later");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_ended_by_time_alone_while_it_was_held_does_not_go_on_when_the_lease_returns() {
    let world = world().await;
    let _dialed = with_connector(&world, Manner::echoes()).await;
    let mut client = world.attach(&world.client, 1).await;
    let mut hop = open_echo(&world, &mut client).await;
    // The login is over; the session's own timer sleeps for as long as it was good at its beginning.
    world.ground.lease.store(false, Ordering::SeqCst);
    world.ground.pass(Duration::from_secs(7_200));
    let cut = async {
        // The lease is looked at now and then: it must be seen to be over before it returns.
        loop {
            tokio::time::sleep(Duration::from_millis(300)).await;
            world.ground.lease.store(true, Ordering::SeqCst);
            world.ground.renewed.send_modify(|end| *end += 1);
            tokio::time::sleep(Duration::from_millis(300)).await;
            world.ground.lease.store(false, Ordering::SeqCst);
        }
    };
    tokio::select! {
        () = cut => {}
        left = drain(&mut hop) => assert!(left.is_empty()),
    }
    assert_eq!(world.why_ended().await, "expired");
}
