use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;

use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, KeyPair, PKCS_ECDSA_P384_SHA384, PKCS_ED25519,
    PKCS_RSA_SHA256, SanType, SignatureAlgorithm,
};
use rustls::{ClientConfig, ClientConnection, ServerConfig, ServerConnection};
use selvedge_proto::identity::{Peer, Pin};
use tempfile::TempDir;

use super::*;

const NOW_MS: u64 = 1_800_000_000_000;
const TRUST_DOMAIN: &str = "corp.example";

struct House {
    dir: TempDir,
    seal: Seal,
    issuer: Issuer,
}

fn house() -> House {
    let dir = tempfile::tempdir().unwrap();
    let seal = Seal::File(dir.path().join("keys/seal.key"));
    let at = dir.path().join("issuer");
    let (issuer, root_key) = Issuer::create(&at, &seal, TRUST_DOMAIN, [9; 16], NOW_MS).unwrap();
    assert!(root_key.reveal().contains("PRIVATE KEY"));
    assert_eq!(format!("{root_key:?}"), "RootKeyPem(***)");
    House { dir, seal, issuer }
}

fn member(issuer: &Issuer, kind: Kind) -> tls::Identity {
    let (key, csr) = tls::new_key_and_csr().unwrap();
    let issued = issuer.issue(kind, "m1", &csr, NOW_MS).unwrap();
    tls::Identity::from_pem(&format!("{}{}", issued.chain_pem, *key)).unwrap()
}

fn csr_of(algorithm: &'static SignatureAlgorithm) -> Vec<u8> {
    let key = KeyPair::generate_for(algorithm).unwrap();
    let params = CertificateParams::default();
    params.serialize_request(&key).unwrap().der().to_vec()
}

#[test]
fn each_kind_is_issued_under_its_role_with_its_lifetime() {
    let house = house();
    let issuer = &house.issuer;
    for kind in Kind::ALL {
        let (_, csr) = tls::new_key_and_csr().unwrap();
        let result = issuer.issue(kind, "m1", &csr, NOW_MS);
        if kind == Kind::Issuer {
            assert!(matches!(result, Err(Error::KindNotIssued(_))));
            continue;
        }
        let issued = result.unwrap();
        assert_eq!(issued.id.to_string(), format!("spiffe://corp.example/{kind}/m1"));
        assert_eq!(issued.spki_sha256, Csr::parse(&csr).unwrap().spki_sha256());
        assert_eq!(issued.serial.len(), 32);
        let days = if kind == Kind::Broker { 30 } else { 7 };
        assert_eq!(issued.not_after_ms, NOW_MS + days * DAY_MS);
        let before = NOW_MS - BACKDATE_MS + 1;
        assert!(identity::peer(&issued.chain, issuer.anchors(), &[kind], before).is_ok());
        let long_before = NOW_MS - BACKDATE_MS - 1000;
        assert!(identity::peer(&issued.chain, issuer.anchors(), &[kind], long_before).is_err());
        for other in Kind::ALL.into_iter().filter(|other| *other != kind) {
            assert!(identity::peer(&issued.chain, issuer.anchors(), &[other], NOW_MS).is_err());
        }
    }
}

#[test]
fn serials_do_not_repeat() {
    let house = house();
    let (_, csr) = tls::new_key_and_csr().unwrap();
    let one = house.issuer.issue(Kind::Client, "c", &csr, NOW_MS).unwrap();
    let two = house.issuer.issue(Kind::Client, "c", &csr, NOW_MS).unwrap();
    assert_ne!(one.serial, two.serial);
    assert_eq!(one.spki_sha256, two.spki_sha256);
}

#[test]
fn the_allowed_keys_are_p256_p384_and_ed25519() {
    let house = house();
    for algorithm in [&PKCS_ECDSA_P384_SHA384, &PKCS_ED25519] {
        let issued = house.issuer.issue(Kind::Client, "c", &csr_of(algorithm), NOW_MS);
        assert!(issued.is_ok(), "{issued:?}");
    }
    let refused = house.issuer.issue(Kind::Client, "c", &csr_of(&PKCS_RSA_SHA256), NOW_MS);
    assert!(matches!(refused, Err(Error::Request(_))), "{refused:?}");
}

#[test]
fn requests_that_are_broken_or_ask_for_more_are_refused() {
    let house = house();
    let (key_pem, good) = tls::new_key_and_csr().unwrap();
    let key = KeyPair::from_pem(&key_pem).unwrap();
    let request = |change: &dyn Fn(&mut CertificateParams)| {
        let mut params = CertificateParams::default();
        change(&mut params);
        params.serialize_request(&key).unwrap().der().to_vec()
    };

    let mut bad_signature = good.clone();
    *bad_signature.last_mut().unwrap() ^= 1;
    let (_, other) = tls::new_key_and_csr().unwrap();
    let mut swapped = good.clone();
    // Another's key under our signature: the P-256 point is the last 65 bytes of the key.
    let point = |der: &[u8]| der.windows(2).position(|w| w == [0x00, 0x04]).unwrap() + 1;
    let (to, from) = (point(&swapped), point(&other));
    swapped[to..to + 65].copy_from_slice(&other[from..from + 65]);
    let mut trailing = good.clone();
    trailing.push(0);
    let uri = |text: &str| SanType::URI(text.try_into().unwrap());
    let table = [
        ("bad signature", bad_signature),
        ("another's key", swapped),
        ("trailing bytes", trailing),
        ("oversize", vec![0x30; CSR_BYTES_MAX + 1]),
        ("a megabyte", vec![0x30; 1 << 20]),
        ("empty", Vec::new()),
        ("garbage", vec![0x30, 0x82, 0xff, 0xff]),
        ("authority", request(&|params| params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained))),
        (
            "another id",
            request(&|params| {
                params.subject_alt_names = vec![uri("spiffe://corp.example/broker/b1")];
            }),
        ),
    ];
    for (what, csr) in table {
        let result = house.issuer.issue(Kind::Client, "c1", &csr, NOW_MS);
        assert!(matches!(result, Err(Error::Request(_))), "{what}: {result:?}");
    }

    // What else it asks for is left out.
    let csr = request(&|params| {
        params.subject_alt_names =
            vec![uri("spiffe://corp.example/client/c1"), SanType::DnsName("broker.example".try_into().unwrap())];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    });
    let issued = house.issuer.issue(Kind::Client, "c1", &csr, NOW_MS).unwrap();
    let (_, leaf) = x509_parser::parse_x509_certificate(&issued.chain[0]).unwrap();
    let names = leaf.subject_alternative_name().unwrap().unwrap();
    assert_eq!(names.value.general_names.len(), 1);
    let purposes = leaf.extended_key_usage().unwrap().unwrap();
    assert!(purposes.value.client_auth && !purposes.value.server_auth);
    assert!(!leaf.is_ca());
}

#[test]
fn ids_and_hosts_that_cannot_stand_in_a_certificate_are_refused() {
    let house = house();
    let (_, csr) = tls::new_key_and_csr().unwrap();
    for id in ["", "A", "a/b", "a,b", ".."] {
        let result = house.issuer.issue(Kind::Client, id, &csr, NOW_MS);
        assert!(matches!(result, Err(Error::Identity(_))), "{id}");
    }
    for host in ["", "*.example", "a..b", "a b", "b\u{fc}ro.example", "x\0y"] {
        let result = house.issuer.issue_broker("b", &[host.to_owned()], &csr, NOW_MS);
        assert!(matches!(result, Err(Error::Host(_))), "{host}");
    }
    assert!(matches!(house.issuer.issue_web(&[], NOW_MS), Err(Error::Hosts(0))));
    assert!(matches!(house.issuer.issue(Kind::Client, "c", &csr, u64::MAX), Err(Error::Time(_))));
}

#[test]
fn a_sealed_issuer_opens_with_its_key_and_no_key_is_on_disk_in_clear() {
    let house = house();
    let at = house.dir.path().join("issuer");
    let opened = Issuer::open(&at, &house.seal).unwrap();
    assert_eq!(opened.anchors(), house.issuer.anchors());
    let client = member(&opened, Kind::Client);
    assert!(identity::peer(client.chain(), house.issuer.anchors(), &[Kind::Client], NOW_MS).is_ok());

    let path = at.join(FILE_NAME);
    let bytes = fs::read(&path).unwrap();
    assert!(!String::from_utf8_lossy(&bytes).contains("PRIVATE"));
    for (path, mode) in [(&path, 0o600), (&at, 0o700), (&house.dir.path().join("keys/seal.key"), 0o600)] {
        assert_eq!(fs::metadata(path).unwrap().permissions().mode() & 0o777, mode);
    }
    assert_eq!(fs::read_dir(&at).unwrap().count(), 1);

    let again = Issuer::create(&at, &house.seal, TRUST_DOMAIN, [9; 16], NOW_MS);
    assert!(matches!(again, Err(Error::Exists(_))));
    let missing = Issuer::open(&house.dir.path().join("none"), &house.seal);
    assert!(matches!(missing, Err(Error::Missing(_))));

    let wrong = house.dir.path().join("wrong.key");
    fs::write(&wrong, [1; 32]).unwrap();
    fs::set_permissions(&wrong, fs::Permissions::from_mode(0o600)).unwrap();
    let wrong_seal = Seal::File(wrong.clone());
    assert!(matches!(Issuer::open(&at, &wrong_seal), Err(Error::Unseal(_))));
    fs::set_permissions(&wrong, fs::Permissions::from_mode(0o644)).unwrap();
    assert!(matches!(Issuer::open(&at, &wrong_seal), Err(Error::SealKey { .. })));

    fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
    assert!(matches!(Issuer::open(&at, &house.seal), Err(Error::Unseal(_))));
}

#[test]
fn a_second_issuer_signs_for_the_same_cluster() {
    let house = house();
    let sealed = house.issuer.seal_for(&[3; 32]).unwrap();
    let dir = house.dir.path().join("second");
    let seal = Seal::File(house.dir.path().join("second.key"));
    let refused = Issuer::from_sealed(&sealed, &[4; 32], &dir, &seal);
    assert!(matches!(refused, Err(Error::Unseal(_))));
    Issuer::from_sealed(&sealed, &[3; 32], &dir, &seal).unwrap();
    let second = Issuer::open(&dir, &seal).unwrap();
    let broker = member(&second, Kind::Broker);
    assert!(identity::peer(broker.chain(), house.issuer.anchors(), &[Kind::Broker], NOW_MS).is_ok());
    assert!(matches!(Issuer::from_sealed(&sealed, &[3; 32], &dir, &seal), Err(Error::Exists(_))));
}

#[test]
fn issued_certificates_shake_hands() {
    let house = house();
    let anchors = Arc::new(house.issuer.anchors().clone());
    let time: tls::TimeSource = Arc::new(|| NOW_MS);
    let (broker, connector, client) = (
        member(&house.issuer, Kind::Broker),
        member(&house.issuer, Kind::Connector),
        member(&house.issuer, Kind::Client),
    );
    let control = vec![tls::CONTROL_ALPN.to_vec()];
    let edge = || tls::edge_server(&broker, &anchors, control.clone(), &time).unwrap();
    for caller in [&connector, &client] {
        let dial = tls::edge_client(caller, &anchors, control.clone(), None, &time).unwrap();
        assert_eq!(handshake(dial, edge()).unwrap().id, caller.peer().unwrap().id);
    }
    let dial = tls::edge_client(&broker, &anchors, control.clone(), None, &time).unwrap();
    assert!(handshake(dial, edge()).is_none());

    let dial = tls::hop_client(&client, &anchors, vec![tls::HOP_ALPN.to_vec()], None, &time);
    let answer = tls::hop_server(&connector, &anchors, &time);
    assert!(handshake(dial.unwrap(), answer.unwrap()).is_some());

    let judged = tls::NotBefore::judged;
    let dial = tls::peer_client(&broker, &anchors, None, judged(), &time);
    let answer = tls::peer_server(&broker, &anchors, judged(), &time);
    assert!(handshake(dial.unwrap(), answer.unwrap()).is_some());

    let hosts = ["broker.example".to_owned(), "127.0.0.1".to_owned()];
    let web = house.issuer.issue_web(&hosts, NOW_MS).unwrap();
    for (pin, accepted) in [(anchors.pin(), true), (Pin::of(house.issuer.root()).unwrap(), false)] {
        let dial = tls::pinned_web_client(pin, &time).unwrap();
        let (client, _) = exchange(dial, tls::web_server(&web, &web).unwrap());
        assert_eq!(client.is_ok(), accepted);
    }
    let dial = tls::peer_client(&web, &anchors, None, judged(), &time);
    let answer = tls::peer_server(&broker, &anchors, judged(), &time);
    assert!(handshake(dial.unwrap(), answer.unwrap()).is_none());
}

fn handshake(client: ClientConfig, server: ServerConfig) -> Option<Peer> {
    match exchange(client, server) {
        (Ok(_), Ok(server)) => Some(tls::peer_of(&server).unwrap()),
        _ => None,
    }
}

fn exchange(
    client: ClientConfig,
    server: ServerConfig,
) -> (Result<ClientConnection, rustls::Error>, Result<ServerConnection, rustls::Error>) {
    let name = "broker.example".try_into().unwrap();
    let mut client = ClientConnection::new(Arc::new(client), name).unwrap();
    let mut server = ServerConnection::new(Arc::new(server)).unwrap();
    let (mut client_error, mut server_error) = (None, None);
    for _ in 0..10 {
        let mut wire = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut wire).unwrap();
        }
        let mut unread = wire.as_slice();
        while !unread.is_empty() && server_error.is_none() {
            server.read_tls(&mut unread).unwrap();
            server_error = server.process_new_packets().err();
        }
        let mut wire = Vec::new();
        while server.wants_write() {
            server.write_tls(&mut wire).unwrap();
        }
        let mut unread = wire.as_slice();
        while !unread.is_empty() && client_error.is_none() {
            client.read_tls(&mut unread).unwrap();
            client_error = client.process_new_packets().err();
        }
    }
    (client_error.map_or(Ok(client), Err), server_error.map_or(Ok(server), Err))
}

#[test]
fn a_grant_is_the_clients_intermediates_and_certificates_cannot_be_signed_as_grants() {
    let house = house();
    let grant = selvedge_proto::control::LoginGrant {
        version: selvedge_proto::grant::GRANT_VERSION,
        user: "1-7".to_owned(),
        expires_ms: NOW_MS + 1,
        ..Default::default()
    };
    let signed = selvedge_proto::grant::sign(&grant, |bytes| house.issuer.sign_grant(bytes)).unwrap();
    let anchor = |role| house.issuer.anchors().certificate(role);
    assert_eq!(selvedge_proto::grant::verify(&signed, anchor(Role::Clients), NOW_MS), Ok(grant));
    assert_eq!(
        selvedge_proto::grant::verify(&signed, anchor(Role::Brokers), NOW_MS),
        Err(selvedge_proto::grant::Error::Signature)
    );
    assert!(house.issuer.sign_grant(&[0x30, 0x82, 0, 0]).is_err());
    let (_, signer) = house.issuer.sign_list(&[10, 0]).unwrap();
    assert_eq!(signer, anchor(Role::Brokers).to_vec());
}
