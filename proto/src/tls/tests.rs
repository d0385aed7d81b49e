use std::fs;
use std::os::unix::fs::PermissionsExt;

use rcgen::ExtendedKeyUsagePurpose;
use rustls::pki_types::CertificateDer;
use rustls::{ClientConnection, HandshakeKind, NamedGroup, ProtocolVersion, ServerConnection};

use super::*;
use crate::identity::Role;
use crate::identity::testing::{Cluster, DAY_MS, Leaf, NOW_MS, TRUST_DOMAIN};

fn at(now_ms: u64) -> TimeSource {
    Arc::new(move || now_ms)
}

fn now() -> TimeSource {
    at(NOW_MS)
}

type Ends = (ClientConnection, ServerConnection);

fn handshake(client: ClientConfig, server: ServerConfig) -> Result<Ends, rustls::Error> {
    let name = "broker.example".try_into().unwrap();
    let mut client = ClientConnection::new(Arc::new(client), name)?;
    let mut server = ServerConnection::new(Arc::new(server))?;
    // A client of TLS 1.3 is done before the server has judged it: both must be.
    for _ in 0..10 {
        let mut wire = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut wire).unwrap();
        }
        let mut unread = wire.as_slice();
        while !unread.is_empty() {
            server.read_tls(&mut unread).unwrap();
            server.process_new_packets()?;
        }
        let mut wire = Vec::new();
        while server.wants_write() {
            server.write_tls(&mut wire).unwrap();
        }
        let mut unread = wire.as_slice();
        while !unread.is_empty() {
            client.read_tls(&mut unread).unwrap();
            client.process_new_packets()?;
        }
    }
    assert!(!client.is_handshaking() && !server.is_handshaking());
    Ok((client, server))
}

fn control() -> Vec<Vec<u8>> {
    vec![CONTROL_ALPN.to_vec()]
}

struct House {
    cluster: Cluster,
    anchors: Arc<Anchors>,
}

impl House {
    fn new() -> Self {
        let cluster = Cluster::new();
        let anchors = Arc::new(cluster.anchors.clone());
        House { cluster, anchors }
    }

    fn member(&self, kind: Kind) -> Identity {
        self.cluster.member(kind, "m1")
    }

    fn id(&self, kind: Kind) -> SpiffeId {
        SpiffeId::new(TRUST_DOMAIN, kind, "m1").unwrap()
    }

    fn edge(&self, caller: &Identity, answerer: &Identity) -> Result<Ends, rustls::Error> {
        handshake(
            edge_client(caller, &self.anchors, control(), None, &now()).unwrap(),
            edge_server(answerer, &self.anchors, control(), &now()).unwrap(),
        )
    }

    fn hop(&self, caller: &Identity, answerer: &Identity) -> Result<Ends, rustls::Error> {
        let alpn = vec![HOP_ALPN.to_vec(), b"ticket".to_vec()];
        handshake(
            hop_client(caller, &self.anchors, alpn, None, &now()).unwrap(),
            hop_server(answerer, &self.anchors, &now()).unwrap(),
        )
    }

    fn peers(&self, caller: &Identity, answerer: &Identity, not_before: &NotBefore) -> Result<Ends, rustls::Error> {
        handshake(
            peer_client(caller, &self.anchors, None, not_before.clone(), &now()).unwrap(),
            peer_server(answerer, &self.anchors, not_before.clone(), &now()).unwrap(),
        )
    }
}

fn followed_by(identity: &Identity, certificate: &CertificateDer<'static>) -> Identity {
    let more = crate::identity::chain_pem(std::slice::from_ref(certificate));
    let longer = Identity::from_pem(&format!("{}{more}", *identity.to_pem())).unwrap();
    assert_eq!(longer.chain().len(), 2);
    longer
}

fn assert_strong(ends: &Ends) {
    assert_eq!(ends.0.protocol_version(), Some(ProtocolVersion::TLSv1_3));
    assert_eq!(ends.0.handshake_kind(), Some(HandshakeKind::Full));
    let group = ends.0.negotiated_key_exchange_group().unwrap().name();
    assert_eq!(group, NamedGroup::X25519MLKEM768);
}

#[test]
fn every_listener_serves_its_own_kinds_and_no_others() {
    let house = House::new();
    let broker = house.member(Kind::Broker);
    let connector = house.member(Kind::Connector);
    for kind in Kind::ALL {
        let caller = house.member(kind);
        let results = [
            (EDGE_CALLERS, house.edge(&caller, &broker)),
            (HOP_CALLERS, house.hop(&caller, &connector)),
            (BROKERS, house.peers(&caller, &broker, &NotBefore::judged())),
        ];
        for (served, result) in results {
            assert_eq!(result.is_ok(), served.contains(&kind), "{kind} {result:?}");
            if let Ok(ends) = result {
                assert_strong(&ends);
                assert_eq!(peer_of(&ends.1).unwrap().id, house.id(kind));
            }
        }
        let answerer = &caller;
        let client = house.member(Kind::Client);
        let edge = house.edge(&client, answerer);
        assert_eq!(edge.is_ok(), kind == Kind::Broker, "edge answered by {kind}");
        let hop = house.hop(&client, answerer);
        assert_eq!(hop.is_ok(), kind == Kind::Connector, "hop answered by {kind}");
        let peers = house.peers(&broker, answerer, &NotBefore::judged());
        assert_eq!(peers.is_ok(), kind == Kind::Broker, "peer answered by {kind}");
    }
}

#[test]
fn the_alpn_of_the_protocol_is_chosen_and_not_the_ticket_beside_it() {
    let house = House::new();
    let ends = house.hop(&house.member(Kind::Client), &house.member(Kind::Connector)).unwrap();
    assert_eq!(ends.0.alpn_protocol(), Some(HOP_ALPN));
    assert_eq!(peer_of(&ends.0).unwrap().id, house.id(Kind::Connector));
}

#[test]
fn another_cluster_is_refused_on_both_ends() {
    let (house, foreign) = (House::new(), House::new());
    let broker = house.member(Kind::Broker);
    let stranger = foreign.member(Kind::Client);
    assert!(house.edge(&stranger, &broker).is_err());
    assert!(house.edge(&house.member(Kind::Client), &foreign.member(Kind::Broker)).is_err());
    assert!(house.hop(&stranger, &house.member(Kind::Connector)).is_err());
}

#[test]
fn an_expected_id_must_be_met_exactly() {
    let house = House::new();
    let client = house.member(Kind::Client);
    for (id, accepted) in [("m1", true), ("m2", false)] {
        let expected = SpiffeId::new(TRUST_DOMAIN, Kind::Connector, id).unwrap();
        let alpn = vec![HOP_ALPN.to_vec()];
        let result = handshake(
            hop_client(&client, &house.anchors, alpn, Some(expected), &now()).unwrap(),
            hop_server(&house.member(Kind::Connector), &house.anchors, &now()).unwrap(),
        );
        assert_eq!(result.is_ok(), accepted, "{id}");
    }
}

#[test]
fn a_key_for_callers_cannot_answer() {
    let house = House::new();
    let mut leaf = Leaf::of(Kind::Connector, "m1");
    leaf.purposes = vec![ExtendedKeyUsagePurpose::ClientAuth];
    let connector = house.cluster.sign(&leaf);
    assert!(house.hop(&house.member(Kind::Client), &connector).is_err());
    assert!(house.edge(&connector, &house.member(Kind::Broker)).is_ok());
}

#[test]
fn a_victims_certificate_appended_to_the_leaf_gives_nothing() {
    let house = House::new();
    let victim = house.cluster.member(Kind::Client, "victim").chain()[0].clone();
    let append = |of: &Cluster| followed_by(&of.member(Kind::Client, "attacker"), &victim);
    let broker = house.member(Kind::Broker);
    let ends = house.edge(&append(&house.cluster), &broker).unwrap();
    assert_eq!(peer_of(&ends.1).unwrap().id.id(), "attacker");
    assert!(house.edge(&append(&Cluster::new()), &broker).is_err());
}

#[test]
fn the_beginning_of_a_peers_certificate_waits_and_its_end_does_not() {
    let house = House::new();
    let not_before = NotBefore::deferred();
    let broker = house.member(Kind::Broker);
    let mut early = Leaf::of(Kind::Broker, "early");
    early.begin_ms = NOW_MS + DAY_MS / 2;
    let early = house.cluster.sign(&early);
    let mut ended = Leaf::of(Kind::Broker, "ended");
    (ended.begin_ms, ended.end_ms) = (NOW_MS - 2 * DAY_MS, NOW_MS - DAY_MS);
    let ended = house.cluster.sign(&ended);

    assert!(house.peers(&early, &broker, &not_before).is_ok());
    assert!(house.peers(&ended, &broker, &not_before).is_err());
    not_before.judge();
    assert!(house.peers(&early, &broker, &not_before).is_err());
    assert!(house.peers(&broker, &broker, &not_before).is_ok());
}

#[test]
fn a_pinned_web_listener_is_known_by_its_issuers_key() {
    let house = House::new();
    let anchor = house.anchors.certificate(Role::Brokers).clone();
    let mut leaf = Leaf::of(Kind::Broker, "web");
    leaf.uris.clear();
    let signed = house.cluster.sign(&leaf);
    let web = followed_by(&signed, &anchor);
    let dial = |pin, web: &Identity, time| {
        let client = pinned_web_client(pin, &time).unwrap();
        handshake(client, web_server(web, web).unwrap())
    };
    let pin = house.anchors.pin();
    let ends = dial(pin, &web, now()).unwrap();
    assert!(matches!(peer_of(&ends.1), Err(identity::Error::NoCertificate)));
    assert!(peer_of(&ends.0).is_err());

    assert!(dial(Pin::of(&signed.chain()[0]).unwrap(), &signed, now()).is_ok());
    assert!(dial(pin, &web, at(NOW_MS + 3 * DAY_MS)).is_err());
    assert!(dial(House::new().anchors.pin(), &web, now()).is_err());
    assert!(dial(pin, &signed, now()).is_err(), "the pinned key is not shown");

    // The pinned authority is appended to a leaf that it did not sign.
    let forged = followed_by(&Cluster::new().sign(&leaf), &anchor);
    assert!(dial(pin, &forged, now()).is_err());
}

#[test]
fn a_web_certificate_is_nobody_on_the_other_listeners() {
    let house = House::new();
    let mut leaf = Leaf::of(Kind::Broker, "web");
    leaf.uris.clear();
    let web = house.cluster.sign(&leaf);
    let broker = house.member(Kind::Broker);
    assert!(house.peers(&web, &broker, &NotBefore::judged()).is_err());
    assert!(house.edge(&house.member(Kind::Client), &web).is_err());
}

#[test]
fn an_identity_file_is_its_owners_alone() {
    let house = House::new();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("identity.pem");
    let identity = house.member(Kind::Client);
    identity.save(&path).unwrap();
    identity.save(&path).unwrap();
    let mode = fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o600);
    let read = Identity::load(&path).unwrap();
    assert_eq!(read.chain(), identity.chain());
    assert_eq!(read.to_pem(), identity.to_pem());
    assert_eq!(read.peer().unwrap().id, house.id(Kind::Client));
    assert!(!format!("{read:?}").contains("PRIVATE"));

    fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
    assert!(matches!(Identity::load(&path), Err(Error::Exposed { .. })));
    assert!(matches!(Identity::load(&dir.path().join("none")), Err(Error::File { .. })));
}

#[test]
fn a_key_that_is_not_the_leafs_is_refused() {
    let house = House::new();
    let mine = house.member(Kind::Client).to_pem();
    let other = house.member(Kind::Client);
    let (_, key) = mine.split_once("-----BEGIN PRIVATE KEY").unwrap();
    let mixed = format!("{}-----BEGIN PRIVATE KEY{key}", crate::identity::chain_pem(other.chain()));
    assert!(matches!(Identity::from_pem(&mixed), Err(Error::Tls(_))));
    assert!(Identity::from_pem("").is_err());
}

#[test]
fn a_retried_request_is_for_the_same_key() {
    let (key, request) = new_key_and_csr().unwrap();
    let again = csr(&key).unwrap();
    let parse = |der: &[u8]| rcgen::CertificateSigningRequestParams::from_der(&der.into()).unwrap().public_key;
    assert_eq!(parse(&request), parse(&again));
}

#[test]
fn a_web_listener_resumes_no_session() {
    let house = House::new();
    let identity = house.member(Kind::Broker);
    // A client that keeps what it is given for another time, as browsers do.
    let mut client = pinned_web_client(house.anchors.pin(), &now()).unwrap();
    client.resumption = Resumption::in_memory_sessions(8);
    let second = |server: &ServerConfig| {
        handshake(client.clone(), server.clone()).unwrap();
        handshake(client.clone(), server.clone()).unwrap().1.handshake_kind()
    };
    let shown = followed_by(&identity, house.anchors.certificate(Role::Brokers));
    let ours = web_server(&shown, &shown).unwrap();
    assert_eq!(second(&ours), Some(HandshakeKind::Full));
    // The same client resumes with a server that lets it.
    let mut willing = ours;
    willing.send_tls13_tickets = 2;
    willing.session_storage = rustls::server::ServerSessionMemoryCache::new(8);
    assert_eq!(second(&willing), Some(HandshakeKind::Resumed));
}
