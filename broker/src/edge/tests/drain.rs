//! Leaving in order.

use std::sync::atomic::Ordering;
use std::time::Duration;

use selvedge_domain::Body;
use selvedge_proto::control::from_broker::Message as FromB;
use selvedge_proto::frame::SessionCode;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::world::*;

/// Begins a drain in the log, or ends it.
fn drain_in_log(world: &World, within: Option<Duration>) {
    let within_ms = within.map_or(0, |within| within.as_millis() as u64);
    let change = Body::DrainBroker { node: NODE, draining: within.is_some(), within_ms };
    world.ground.apply(world.owner.clone(), change);
}

async fn is_sent_elsewhere(end: &mut Attached) {
    end.until(|message| matches!(message, FromB::GoAway(away) if away.reason == "draining").then_some(())).await;
}

async fn is_refused(client: &mut Attached) {
    let ticket = client.ticket().await;
    client.open("crm.internal", 80, &ticket).await;
    assert_eq!(client.refusal().await.code, SessionCode::BrokerDraining as u32);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_outlives_a_drain_is_cut_and_its_end_recorded() {
    let world = world().await;
    let _dialed = with_connector(&world, Manner::echoes()).await;
    let mut client = world.attach(&world.client, 1).await;
    let mut hop = open_echo(&world, &mut client).await;
    world.edge.begin_drain();
    is_sent_elsewhere(&mut client).await;
    is_refused(&mut client).await;
    assert_eq!(world.edge.cut_rest().await, 1);
    assert_eq!(world.why_ended().await, "drained");
    assert!(drain(&mut hop).await.is_empty());
    tokio::time::timeout(DEADLINE, world.edge.emptied()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_in_the_log_lets_sessions_end_until_its_deadline_and_is_taken_back() {
    let world = world().await;
    let _dialed = with_connector(&world, Manner::echoes()).await;
    let mut client = world.attach(&world.client, 1).await;
    let mut hop = open_echo(&world, &mut client).await;
    drain_in_log(&world, Some(Duration::from_secs(60)));
    is_sent_elsewhere(&mut client).await;
    is_refused(&mut client).await;
    wait_for(|| world.ground.handed_over.load(Ordering::SeqCst) > 0).await;
    let mut later = world.attach(&world.client, 2).await;
    is_sent_elsewhere(&mut later).await;
    hop.write_all(b"on").await.unwrap();
    hop.read_exact(&mut [0; 2]).await.unwrap();

    world.ground.pass(Duration::from_secs(61));
    assert_eq!(world.why_ended().await, "drained");
    wait_for(|| world.edge.routing.load(NODE).is_some_and(|load| (load.sessions, load.sessions_cut) == (0, 1))).await;

    drain_in_log(&world, None);
    later.has_ended().await;
    wait_for(|| world.edge.routing.via(world.connector.id).is_none()).await;
    let end = world.attach(&world.connector, 2).await;
    let _dialed = play_connector(world.at, end, Manner::echoes());
    wait_for(|| world.edge.routing.via(world.connector.id).is_some()).await;
    wait_for(|| world.edge.routing.load(NODE).is_some_and(|load| !load.draining)).await;
    let mut back = world.attach(&world.client, 3).await;
    open_echo(&world, &mut back).await;
}
