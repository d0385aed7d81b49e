//! Sessions that are carried: bytes, second choice, timers.

use std::time::Duration;

use selvedge_domain::rows::EnrolKind;
use selvedge_proto::control::from_broker::Message as FromB;
use selvedge_proto::hello::ticket_hello;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::world::*;
use crate::audit::Record;

/// Good until a second after the login.
const FOR_A_SECOND: &str = r#"permit(principal == User::"ann@demo.test", action, resource in Segment::"crm")
    when { context has auth_age && context.auth_age < 1 };"#;

#[tokio::test(flavor = "multi_thread")]
async fn a_session_carries_bytes_both_ways_and_leaves_its_records() {
    let world = world().await;
    let _dialed = with_connector(&world, Manner::echoes()).await;
    let mut client = world.attach(&world.client, 1).await;
    let ticket = client.ticket().await;
    client.open("CRM.internal.", 80, &ticket).await;
    let hello = ticket_hello("b1.demo.test", &ticket);
    let mut hop = TcpStream::connect(world.at).await.unwrap();
    // Byte by byte: the hello is read as a message.
    for byte in &hello {
        hop.write_all(&[*byte]).await.unwrap();
    }
    let opened = client
        .until(|message| match message {
            FromB::Opened(opened) => Some(opened.clone()),
            FromB::OpenRefused(refused) => panic!("{refused:?}"),
            _ => None,
        })
        .await;
    assert_eq!(opened.connector, format!("spiffe://demo.test/connector/{}", world.connector.id));
    let mut echoed = vec![0; hello.len()];
    hop.read_exact(&mut echoed).await.unwrap();
    assert_eq!(echoed, hello, "the hello itself went through, untouched");
    hop.write_all(b"ping").await.unwrap();
    let mut answer = [0; 4];
    hop.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"ping");
    let sessions = world.edge.sessions();
    assert_eq!((sessions.len(), sessions[0].host.as_str()), (1, "crm.internal"));
    hop.shutdown().await.unwrap();
    assert!(drain(&mut hop).await.is_empty(), "half-close passes through and back");
    wait_for(|| world.edge.sessions().is_empty()).await;

    let used = world.shows(&hello).await;
    assert!(used.is_empty(), "the ticket was used");
    wait_for(|| world.records().iter().any(|record| record.kind() == "session.close")).await;
    let records = world.records();
    let Some(Record::SessionOpen(open)) = records.iter().find(|r| r.kind() == "session.open") else { panic!() };
    assert_eq!((open.party.name.as_str(), open.segment_name.as_str()), ("ann@demo.test", "crm"));
    let Some(Record::SessionClose(close)) = records.iter().find(|r| r.kind() == "session.close") else { panic!() };
    assert_eq!((close.why.as_str(), close.up_bytes), ("ended", hello.len() as u64 + 4));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connector_that_fails_before_its_first_byte_is_replaced_and_the_client_hears_only_of_the_other() {
    let world = world().await;
    let good = with_connector(&world, Manner::echoes()).await;
    let other = enrol(&world.ground, &world.issuer, &world.owner, EnrolKind::Connector, "dc");
    let failures = attach_connector(&world, &other, Manner::breaks()).await;
    let mut client = world.attach(&world.client, 1).await;
    for _ in 0..64 {
        drop(open_echo(&world, &mut client).await);
        if *failures.borrow() > 0 {
            break;
        }
    }
    assert!(*failures.borrow() > 0 && *good.borrow() > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_verdict_that_is_good_for_less_time_after_a_change_is_asked_again_then() {
    let world = world().await;
    let _dialed = with_connector(&world, Manner::echoes()).await;
    let mut client = world.attach(&world.client, 1).await;
    let mut hop = open_echo(&world, &mut client).await;
    // Until now the session would have been looked at in an hour.
    assert!(world.enforce(apply(&world.ground, &world.owner, FOR_A_SECOND)).await.is_none(), "it goes on");
    world.ground.pass(Duration::from_secs(3));
    assert!(drain(&mut hop).await.is_empty());
    assert_eq!(world.why_ended().await, "expired");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sessions_time_is_looked_after_when_its_connector_has_ended_without_a_byte() {
    let world = world().await;
    let _dialed = with_connector(&world, Manner::ends_mute()).await;
    let mut client = world.attach(&world.client, 1).await;
    let ticket = client.ticket().await;
    client.open("crm.internal", 80, &ticket).await;
    let mut hop = TcpStream::connect(world.at).await.unwrap();
    hop.write_all(&ticket_hello("b1.demo.test", &ticket)).await.unwrap();
    wait_for(|| world.edge.sessions().iter().any(|session| session.carried)).await;
    // What goes beyond the hello: from now on no other connector could take over, and the connector's end is passed on.
    hop.write_all(END).await.unwrap();
    assert_eq!(hop.read(&mut [0; 16]).await.unwrap(), 0);
    world.enforce(apply(&world.ground, &world.owner, FOR_A_SECOND)).await;
    world.ground.pass(Duration::from_secs(3));
    client.refusal().await;
    assert_eq!(world.why_ended().await, "expired");
}
