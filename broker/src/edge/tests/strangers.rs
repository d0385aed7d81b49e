//! What those get who show nothing, or who are not who they say.

use std::sync::Arc;

use selvedge_domain::Id;
use selvedge_proto::control::Hello;
use selvedge_proto::control::from_broker::Message as FromB;
use selvedge_proto::hello::{ALPN_CONTROL, ALPN_HOP, Ticket, ticket_hello};
use selvedge_proto::identity::Kind;
use selvedge_proto::tls;
use tokio::net::TcpStream;

use super::world::*;
use crate::edge::{Ground as _, knock};

#[tokio::test(flavor = "multi_thread")]
async fn a_stranger_gets_silence() {
    let world = world().await;
    let random: Vec<u8> = (0..600_u32).map(|n| (n * 7919 % 251) as u8).collect();
    assert!(world.shows(&random).await.is_empty(), "random bytes");
    assert!(world.shows(b"GET / HTTP/1.1\r\n\r\n").await.is_empty(), "another protocol");
    let unknown = ticket_hello("b1.demo.test", &Ticket::random());
    assert!(world.shows(&unknown).await.is_empty(), "an unknown ticket");
    let other_protocol = [&unknown[..40], &unknown[41..]].concat();
    assert!(world.shows(&other_protocol).await.is_empty(), "a broken hello");
    assert!(world.shows(&unknown[..100]).await.is_empty(), "half a hello");
    assert!(world.shows(&[22; 20_000]).await.is_empty(), "too much");

    for alpn in [vec![], vec![ALPN_CONTROL.to_vec()], vec![ALPN_HOP.to_vec()], vec![b"h2".to_vec()]] {
        assert!(world.shows(&client_hello(alpn)).await.is_empty(), "neither knock nor ticket");
    }
    let wrong = knock::key_of(&[99; 32], world.ground.now_ms() / knock::DAY_MS).knock();
    assert!(
        world.shows(&client_hello(vec![ALPN_CONTROL.to_vec(), wrong])).await.is_empty(),
        "a knock under another key"
    );
    assert!(world.edge.sessions().is_empty());
}

fn client_hello(alpn: Vec<Vec<u8>>) -> Vec<u8> {
    let mut config = rustls::ClientConfig::builder_with_provider(tls::provider().clone())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    config.alpn_protocols = alpn;
    let name = "b1.demo.test".to_owned().try_into().unwrap();
    let mut connection = rustls::ClientConnection::new(Arc::new(config), name).unwrap();
    let mut bytes = Vec::new();
    while connection.wants_write() {
        connection.write_tls(&mut bytes).unwrap();
    }
    bytes
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_shows_nothing_is_closed_in_time() {
    let world = world().await;
    let mut socket = TcpStream::connect(world.at).await.unwrap();
    assert!(drain(&mut socket).await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_roles_and_versions_are_turned_away() {
    let world = world().await;
    let wrong_role = Hello { role: "connector".into(), ..hello(&world.client, 1) };
    world.attach_with(&world.client, wrong_role).await.unwrap().has_ended().await;
    let too_new = Hello { protocol_min: 2, protocol_max: 3, ..hello(&world.client, 1) };
    let mut newer = world.attach_with(&world.client, too_new).await.unwrap();
    newer.until(|message| matches!(message, FromB::Upgrade(_)).then_some(())).await;
    newer.has_ended().await;
    let mut connector = world.attach(&world.connector, 1).await;
    connector.open("crm.internal", 80, &Ticket::random()).await;
    connector.has_ended().await;
    let broker = Member {
        id: Id::new(1, 1),
        kind: Kind::Broker,
        identity: {
            let (key_pem, csr) = tls::new_key_and_csr().unwrap();
            let issued = world.issuer.issue_broker("9", &["b9.demo.test".into()], &csr, world.ground.now_ms()).unwrap();
            tls::Identity::from_pem(&format!("{}{}", issued.chain_pem, *key_pem)).unwrap()
        },
        grants: Vec::new(),
    };
    assert!(world.attach_with(&broker, hello(&broker, 1)).await.is_err(), "a broker is no end");
}
