//! `Open` and `Resolve`: what is refused, how, and what is recorded of it.

use std::sync::atomic::Ordering;

use selvedge_proto::control::Resolve;
use selvedge_proto::control::from_broker::Message as FromB;
use selvedge_proto::control::from_end::Message as FromE;
use selvedge_proto::frame::SessionCode;
use selvedge_proto::hello::{Ticket, ticket_hello};

use super::world::*;
use crate::audit::Record;

#[tokio::test(flavor = "multi_thread")]
async fn denied_unknown_and_wrong_port_are_one_answer_and_each_is_recorded_before() {
    let world = world().await;
    let dialed = with_connector(&world, Manner::echoes()).await;
    let mut client = world.attach(&world.client, 1).await;
    let mut sizes = Vec::new();
    for (host, port, reason) in [
        ("hr.internal", 80, "no_permit"),
        ("nowhere.internal", 80, "no_segment"),
        ("crm.internal", 81, "wrong_port"),
        ("not a name", 80, "no_segment"),
    ] {
        let (ticket, begun) = (client.ticket().await, std::time::Instant::now());
        client.open(host, port, &ticket).await;
        let refused = client.refusal().await;
        assert!(begun.elapsed() >= crate::edge::REFUSAL_FLOOR);
        assert_eq!(refused.code, SessionCode::Refused as u32, "{host}:{port}");
        let recorded = world.records().into_iter().any(|record| {
            matches!(record, Record::SessionDenied(denied) if denied.denial == refused.denial && denied.reason == reason)
        });
        assert!(recorded, "{host}:{port}: {:?}", world.records());
        sizes.push(prost::Message::encoded_len(&refused));
        assert!(world.shows(&ticket_hello("b1.demo.test", &ticket)).await.is_empty());
    }
    assert!(sizes.iter().all(|size| *size == sizes[0]), "{sizes:?}");
    assert_eq!(*dialed.borrow(), 0, "no connector heard of it");
}

#[tokio::test(flavor = "multi_thread")]
async fn names_exist_only_for_those_who_may_use_them() {
    let world = world().await;
    let mut client = world.attach(&world.client, 1).await;
    let ask = async |client: &mut Attached, host: &str| {
        client.send(FromE::Resolve(Resolve { request: 5, host: host.into() })).await;
        client
            .until(|message| match message {
                FromB::ResolveAnswer(answer) => Some(answer.clone()),
                _ => None,
            })
            .await
    };
    let without_connector = ask(&mut client, "crm.internal").await;
    assert!(without_connector.address.is_empty());
    let _dialed = with_connector(&world, Manner::echoes()).await;
    assert_eq!(ask(&mut client, "crm.internal").await.address.len(), 16);
    assert_eq!(ask(&mut client, "hr.internal").await, without_connector);
    assert_eq!(ask(&mut client, "nowhere.internal").await, without_connector);
    wait_for(|| world.records().iter().any(|r| matches!(r, Record::NameUnknown(u) if u.host == "nowhere.internal")))
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_about_the_caller_are_told_at_once() {
    let world = world().await;
    let mut nobody = hello(&world.client, 1);
    nobody.grants.clear();
    let mut client = world.attach_with(&world.client, nobody).await.unwrap();
    let ticket = client.ticket().await;
    client.open("crm.internal", 80, &ticket).await;
    assert_eq!(client.refusal().await.code, SessionCode::Reauthenticate as u32);

    let mut client = world.attach(&world.client, 2).await;
    client.open("crm.internal", 80, &Ticket::random()).await;
    assert_eq!(client.refusal().await.code, SessionCode::ProtocolError as u32, "a ticket of nobody");
    let ticket = client.ticket().await;
    client.open("crm.internal", 80, &ticket).await;
    assert_eq!(client.refusal().await.code, SessionCode::Unavailable as u32, "allowed, without a connector");
    world.ground.lease.store(false, Ordering::SeqCst);
    let ticket = client.ticket().await;
    client.open("crm.internal", 80, &ticket).await;
    assert_eq!(client.refusal().await.code, SessionCode::Stale as u32);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connector_that_cannot_reach_the_application_says_why() {
    let world = world().await;
    let _dialed = with_connector(&world, Manner::answers(SessionCode::AppRefused)).await;
    let mut client = world.attach(&world.client, 1).await;
    let ticket = client.ticket().await;
    client.open("crm.internal", 80, &ticket).await;
    assert_eq!(client.refusal().await.code, SessionCode::AppRefused as u32);
    wait_for(|| world.records().iter().any(|r| matches!(r, Record::SessionClose(c) if c.why == "app_refused"))).await;
}
