//! Changes, and what they cut.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use selvedge_domain::command::Subject;
use selvedge_domain::rows::EnrolKind;
use selvedge_domain::{Actor, Body};
use selvedge_proto::frame::SessionCode;
use selvedge_proto::hello::ticket_hello;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::world::*;
use crate::edge::Ground as _;
use crate::edge::limits::Limits;
use crate::edge::sessions::tests::session_of;

const ONLY_HR: &str = r#"permit(principal, action, resource in Segment::"hr");"#;

#[tokio::test(flavor = "multi_thread")]
async fn a_disabled_person_loses_the_live_session_before_enforce_returns() {
    let world = world().await;
    let _dialed = with_connector(&world, Manner::echoes()).await;
    let mut client = world.attach(&world.client, 1).await;
    let mut hop = open_echo(&world, &mut client).await;

    let change = Body::ReplaceUser { id: world.user, version: None, fields: user_fields(false) };
    let changes = world.ground.apply(world.directory.clone(), change).1;
    let confirmed = world.enforce(changes).await.expect("a session was cut");
    assert!(world.edge.sessions().is_empty());
    assert!(drain(&mut hop).await.is_empty());
    assert_eq!(world.why_ended().await, "revoked");
    tokio::time::timeout(DEADLINE, confirmed).await.expect("the connector confirms");

    let ticket = client.ticket().await;
    client.open("crm.internal", 80, &ticket).await;
    assert_eq!(client.refusal().await.code, SessionCode::Reauthenticate as u32);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_change_cuts_what_it_forbids_and_nothing_else() {
    let world = world().await;
    let _dialed = with_connector(&world, Manner::echoes()).await;
    let mut client = world.attach(&world.client, 1).await;
    let mut hop = open_echo(&world, &mut client).await;
    let changes = apply(&world.ground, &world.owner, r#"permit(principal, action, resource in Segment::"crm");"#);
    assert!(world.enforce(changes).await.is_none(), "nothing was cut");
    hop.write_all(b"still").await.unwrap();
    let mut answer = [0; 5];
    hop.read_exact(&mut answer).await.unwrap();
    assert_eq!(world.edge.session_count(), 1);
    world.enforce(apply(&world.ground, &world.owner, ONLY_HR)).await;
    assert_eq!(world.edge.session_count(), 0);
    assert!(drain(&mut hop).await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_ends_when_its_segment_goes_to_other_connectors() {
    let world = world().await;
    let _dialed = with_connector(&world, Manner::echoes()).await;
    let mut client = world.attach(&world.client, 1).await;
    let mut hop = open_echo(&world, &mut client).await;
    world.enforce(move_elsewhere(&world.ground, &world.owner)).await;
    assert_eq!(world.edge.session_count(), 0);
    assert!(drain(&mut hop).await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_device_loses_its_control_stream_and_tickets() {
    let world = world().await;
    let mut client = world.attach(&world.client, 1).await;
    let ticket = client.ticket().await;
    let revoke = Body::Revoke { subject: Subject::Device(world.client.id) };
    let changes = world.ground.apply(world.owner.clone(), revoke).1;
    world.enforce(changes).await;
    client.has_ended().await;
    assert!(world.shows(&ticket_hello("b1.demo.test", &ticket)).await.is_empty(), "expired with its stream");
    assert!(world.edge.tickets.expect(1, &ticket).is_none());
    assert!(world.attach_with(&world.client, hello(&world.client, 2)).await.is_err(), "not let in again");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connector_that_never_confirms_a_cut_counts_when_its_fence_is_over_and_learns_of_no_later_lease() {
    let world = world().await;
    let _dialed = with_connector(&world, Manner::never_confirms()).await;
    let mut client = world.attach(&world.client, 1).await;
    let mut hop = open_echo(&world, &mut client).await;
    let (before_ms, later_ms) = (1_500, 60_000);
    world.ground.lease_left_ms.store(before_ms, Ordering::SeqCst);
    let confirmed = world.enforce(apply(&world.ground, &world.owner, ONLY_HR)).await;
    let mut confirmed = confirmed.expect("a session was cut");
    assert!(world.edge.sessions().is_empty(), "the lease does not wait for the connector");
    assert!(drain(&mut hop).await.is_empty());

    world.ground.lease_left_ms.store(later_ms, Ordering::SeqCst);
    assert!(world.edge.lease_left_for(world.connector.id) <= before_ms);
    assert_eq!(world.edge.lease_left_for(world.client.id), later_ms, "the others are told all of it");
    assert!(tokio::time::timeout(Duration::ZERO, &mut confirmed).await.is_err());
    tokio::time::timeout(DEADLINE, confirmed).await.expect("its fence is over");
    assert_eq!(world.edge.lease_left_for(world.connector.id), later_ms);
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_waits_for_the_word_of_a_connector_that_was_revoked() {
    let world = world().await;
    let _dialed = with_connector(&world, Manner::never_confirms()).await;
    let mut client = world.attach(&world.client, 1).await;
    let mut hop = open_echo(&world, &mut client).await;
    let revoke = Body::Revoke { subject: Subject::Connector(world.connector.id) };
    let changes = world.ground.apply(world.owner.clone(), revoke).1;
    assert!(world.enforce(changes).await.is_none());
    assert!(world.edge.sessions().is_empty());
    assert!(drain(&mut hop).await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_is_not_enforced_while_a_flow_is_between_reading_and_forwarding() {
    let world = world().await;
    // Nobody knows this person, so any change of policy cuts the session; it ends when this test says so.
    let session = session_of(1, 900, 901);
    session.carried.store(true, Ordering::SeqCst);
    let entered = world.edge.sessions.enter(&session, Limits::default()).unwrap();
    let changes = apply(&world.ground, &world.owner, ONLY_HR);
    let (edge, state) = (world.edge.clone(), world.ground.state());
    let enforcing = tokio::task::spawn_blocking(move || drop(edge.enforce(&state, &changes.events)));
    tokio::time::timeout(DEADLINE, session.cut.cancelled()).await.expect("it is cut");
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!enforcing.is_finished(), "a byte may still be on its way");
    drop(entered);
    tokio::time::timeout(DEADLINE, enforcing).await.expect("it ends with the session").unwrap();
}

type Change = fn(&TestGround, &Actor);
const CHANGES: [Change; 2] =
    [|ground, owner| drop(apply(ground, owner, ONLY_HR)), |ground, owner| drop(move_elsewhere(ground, owner))];

#[tokio::test(flavor = "multi_thread")]
async fn a_change_right_after_the_verdict_is_seen_before_the_dial() {
    for change in CHANGES {
        let world = world().await;
        let dialed = with_connector(&world, Manner::echoes()).await;
        let mut client = world.attach(&world.client, 1).await;
        let ticket = client.ticket().await;
        let (edge, owner) = (Arc::downgrade(&world.edge), world.owner.clone());
        world.ground.after_state(move |ground| {
            // In the state that was just taken the session may be; in the next one it may not.
            let begun = edge.upgrade().is_none_or(|edge| edge.session_count() > 0);
            if begun {
                change(ground, &owner);
            }
            begun
        });
        client.open("crm.internal", 80, &ticket).await;
        assert_eq!(client.refusal().await.code, SessionCode::Refused as u32);
        assert_eq!(*dialed.borrow(), 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_during_the_first_dial_is_seen_before_the_second() {
    for change in CHANGES {
        let world = world().await;
        let other = enrol(&world.ground, &world.issuer, &world.owner, EnrolKind::Connector, "dc");
        let manner = || {
            let (ground, owner) = (world.ground.clone(), world.owner.clone());
            Manner::answers_with(move || {
                change(&ground, &owner);
                SessionCode::AppRefused
            })
        };
        let dialed = [with_connector(&world, manner()).await, attach_connector(&world, &other, manner()).await];
        let mut client = world.attach(&world.client, 1).await;
        let ticket = client.ticket().await;
        client.open("crm.internal", 80, &ticket).await;
        assert_eq!(client.refusal().await.code, SessionCode::Refused as u32);
        assert_eq!(dialed.map(|dialed| *dialed.borrow()).iter().sum::<usize>(), 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connector_whose_certificate_has_expired_since_it_attached_is_not_dialed() {
    let world = world().await;
    let until_ms = world.ground.now_ms() + 60_000;
    let short = enrol_until(&world.ground, &world.issuer, &world.owner, EnrolKind::Connector, "dc", until_ms);
    let dialed = attach_connector(&world, &short, Manner::echoes()).await;
    let mut client = world.attach(&world.client, 1).await;
    world.ground.pass(Duration::from_secs(120));
    let ticket = client.ticket().await;
    client.open("crm.internal", 80, &ticket).await;
    assert_eq!(client.refusal().await.code, SessionCode::Unavailable as u32);
    assert_eq!(*dialed.borrow(), 0);
    wait_for(|| world.edge.routing.via(short.id).is_none()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connector_that_is_revoked_in_the_state_is_not_dialed_before_its_stream_is_cut() {
    let world = world().await;
    let dialed = with_connector(&world, Manner::echoes()).await;
    let mut client = world.attach(&world.client, 1).await;
    let ticket = client.ticket().await;
    // The state has it; nothing that the change touches has been looked at yet.
    let revoke = Body::Revoke { subject: Subject::Connector(world.connector.id) };
    world.ground.apply(world.owner.clone(), revoke);
    client.open("crm.internal", 80, &ticket).await;
    assert_eq!(client.refusal().await.code, SessionCode::Unavailable as u32);
    assert_eq!(*dialed.borrow(), 0);
}
