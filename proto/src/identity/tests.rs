use proptest::prelude::*;
use rcgen::ExtendedKeyUsagePurpose;

use super::testing::{Cluster, DAY_MS, Leaf, NOW_MS, TRUST_DOMAIN};
use super::*;

#[test]
fn an_id_prints_as_it_was_parsed() {
    for kind in Kind::ALL {
        let text = format!("spiffe://corp_1.example/{kind}/a-1.b");
        let id: SpiffeId = text.parse().unwrap();
        assert_eq!(id.to_string(), text);
        assert_eq!(id.kind(), kind);
        assert_eq!(serde_json::to_string(&id).unwrap(), format!("\"{text}\""));
        assert_eq!(serde_json::from_str::<SpiffeId>(&format!("\"{text}\"")).unwrap(), id);
    }
}

#[test]
fn anything_but_the_exact_form_is_no_id() {
    let long = format!("spiffe://corp.example/client/{}", "a".repeat(255));
    for text in [
        "",
        "spiffe://",
        "spiffe://corp.example",
        "spiffe://corp.example/client",
        "spiffe://corp.example/client/",
        "spiffe:///client/a",
        "spiffe://corp.example//a",
        "spiffe://corp.example/client/a/",
        "spiffe://corp.example/client/a/b",
        "spiffe://corp.example/client/a?x=1",
        "spiffe://corp.example/client/a#x",
        "spiffe://corp.example/client/A",
        "spiffe://corp.example/client/a,b",
        "spiffe://corp.example/client/a\0",
        "spiffe://corp.example/client/*",
        "spiffe://corp.example/client/..",
        "spiffe://corp.example/client/%61",
        "spiffe://corp.example/client/\u{430}",
        "spiffe://corp.example/client/a_b",
        "spiffe://corp.example/Client/a",
        "spiffe://corp.example/root/a",
        "spiffe://Corp.example/client/a",
        "spiffe://corp.example:443/client/a",
        "spiffe://user@corp.example/client/a",
        "SPIFFE://corp.example/client/a",
        " spiffe://corp.example/client/a",
        "https://corp.example/client/a",
        long.as_str(),
    ] {
        assert!(text.parse::<SpiffeId>().is_err(), "`{text}`");
    }
}

proptest! {
    #[test]
    fn whatever_parses_prints_the_same_bytes(text in "spiffe://[a-z0-9._/-]{0,12}/(client|broker)/[a-zA-Z0-9./%-]{0,8}") {
        if let Ok(id) = text.parse::<SpiffeId>() {
            prop_assert_eq!(id.to_string(), text);
        }
    }
}

#[test]
fn a_verified_leaf_names_its_holder() {
    let cluster = Cluster::new();
    for kind in Kind::ALL {
        let member = cluster.member(kind, "x1");
        let found = peer(member.chain(), &cluster.anchors, &[kind], NOW_MS).unwrap();
        assert_eq!(found.id, SpiffeId::new(TRUST_DOMAIN, kind, "x1").unwrap());
        assert_eq!(found.not_after_ms, NOW_MS + DAY_MS);
        assert_eq!(found.spki_sha256, spki_sha256(&member.chain()[0]).unwrap());
        assert!(!found.serial.is_empty());
    }
}

#[test]
fn certificates_that_prove_nothing_are_refused() {
    let cluster = Cluster::new();
    let foreign = Cluster::new();
    let client = Leaf::of(Kind::Client, "c1");
    let refused = |what: &str, leaf: &Leaf, allowed: &[Kind]| {
        let signed = cluster.sign(leaf);
        peer(signed.chain(), &cluster.anchors, allowed, NOW_MS).expect_err(what)
    };

    let error = refused("a client where brokers speak", &client, &[Kind::Broker]);
    assert!(matches!(error, Error::NotTrusted(_)), "{error}");

    let workload = Leaf::of(Kind::Workload, "w1");
    let error = refused("another kind of the same role", &workload, &[Kind::Client]);
    assert!(matches!(error, Error::WrongKind(Kind::Workload)), "{error}");

    let broker = format!("spiffe://{TRUST_DOMAIN}/broker/b1");
    let forged = Leaf::named(Role::Clients, &broker);
    let error = refused("a broker signed by the clients' intermediate", &forged, &Kind::ALL);
    assert!(matches!(error, Error::WrongKind(Kind::Broker)), "{error}");
    let error = refused("the same on peer", &forged, &[Kind::Broker]);
    assert!(matches!(error, Error::NotTrusted(_)), "{error}");

    let mut two = client.clone();
    two.uris.push(format!("spiffe://{TRUST_DOMAIN}/client/c2"));
    let error = refused("two URI names", &two, &[Kind::Client]);
    assert!(matches!(error, Error::ManyUriNames), "{error}");

    let mut none = client.clone();
    none.uris.clear();
    none.common_name = Some("spiffe://corp.example/client/c1");
    let error = refused("a common name only", &none, &[Kind::Client]);
    assert!(matches!(error, Error::NoUriName), "{error}");

    let other = Leaf::named(Role::Clients, "spiffe://other.example/client/c1");
    let error = refused("another trust domain", &other, &[Kind::Client]);
    assert!(matches!(error, Error::ForeignTrustDomain), "{error}");

    for name in ["spiffe://corp.example/client/a,b", "spiffe://corp.example/client/*"] {
        let error = refused(name, &Leaf::named(Role::Clients, name), &[Kind::Client]);
        assert!(matches!(error, Error::SpiffeId(_)), "{error}");
    }

    let mut ended = client.clone();
    (ended.begin_ms, ended.end_ms) = (NOW_MS - 2 * DAY_MS, NOW_MS - DAY_MS);
    let error = refused("expired", &ended, &[Kind::Client]);
    assert!(matches!(error, Error::Expired), "{error}");

    let mut early = client.clone();
    early.begin_ms = NOW_MS + DAY_MS / 2;
    let error = refused("not yet valid", &early, &[Kind::Client]);
    assert!(matches!(error, Error::NotYetValid), "{error}");

    let mut authority = client.clone();
    authority.authority = true;
    let error = refused("an authority", &authority, &[Kind::Client]);
    assert!(matches!(error, Error::NotTrusted(_)), "{error}");

    let mut purposeless = client.clone();
    purposeless.purposes = vec![ExtendedKeyUsagePurpose::CodeSigning];
    let error = refused("a purpose of another trade", &purposeless, &[Kind::Client]);
    assert!(matches!(error, Error::NotTrusted(_)), "{error}");
    purposeless.purposes.clear();
    refused("no purpose", &purposeless, &[Kind::Client]);

    let stranger = foreign.sign(&client);
    let error = peer(stranger.chain(), &cluster.anchors, &[Kind::Client], NOW_MS).unwrap_err();
    assert!(matches!(error, Error::NotTrusted(_)), "{error}");

    for role in Role::ALL {
        let intermediate = [cluster.anchors.certificate(role).clone()];
        let error = peer(&intermediate, &cluster.anchors, &Kind::ALL, NOW_MS).unwrap_err();
        assert!(matches!(error, Error::NotTrusted(_)), "{error}");
    }

    let error = peer(&[], &cluster.anchors, &Kind::ALL, NOW_MS).unwrap_err();
    assert!(matches!(error, Error::NoCertificate), "{error}");
    let garbage = [rustls::pki_types::CertificateDer::from(vec![0x30, 0x03, 1, 2, 3])];
    assert!(peer(&garbage, &cluster.anchors, &Kind::ALL, NOW_MS).is_err());
}

#[test]
fn a_victims_certificate_behind_the_attackers_leaf_changes_nothing() {
    let cluster = Cluster::new();
    let victim = cluster.member(Kind::Client, "victim");
    let attacker = cluster.member(Kind::Client, "attacker");
    let stranger = Cluster::new().member(Kind::Client, "victim");
    let behind = |leaf: &crate::tls::Identity| {
        let chain = [leaf.chain()[0].clone(), victim.chain()[0].clone()];
        peer(&chain, &cluster.anchors, &[Kind::Client], NOW_MS)
    };
    assert_eq!(behind(&attacker).unwrap().id.id(), "attacker");
    assert!(behind(&stranger).is_err());
}

#[test]
fn a_long_chain_is_refused_before_it_is_read() {
    let cluster = Cluster::new();
    let leaf = cluster.member(Kind::Client, "c1").chain()[0].clone();
    let chain = vec![leaf; PEER_CHAIN_MAX + 1];
    let error = peer(&chain, &cluster.anchors, &[Kind::Client], NOW_MS).unwrap_err();
    assert!(matches!(error, Error::ChainTooLong { count: 5 }), "{error}");
}

#[test]
fn anchors_survive_json_and_refuse_what_is_no_authority() {
    let cluster = Cluster::new();
    let read = Anchors::from_json(&cluster.anchors.to_json()).unwrap();
    assert_eq!(read, cluster.anchors);
    assert_eq!(read.pin().to_string().parse::<Pin>().unwrap(), cluster.anchors.pin());
    assert_eq!(read.to_pem().matches("BEGIN CERTIFICATE").count(), 3);

    let leaf = cluster.member(Kind::Broker, "b1").chain()[0].clone();
    let of = |role| cluster.anchors.certificate(role).clone();
    let connectors = of(Role::Connectors);
    let with_leaf = [leaf, connectors.clone(), of(Role::Clients)];
    assert!(Anchors::new([0; 16], TRUST_DOMAIN, with_leaf).is_err());
    let twice = [of(Role::Brokers), connectors.clone(), connectors];
    assert!(Anchors::new([0; 16], TRUST_DOMAIN, twice).is_err());
    assert!(Anchors::from_json("{}").is_err());
}
