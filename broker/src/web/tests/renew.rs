//! Certificates that have ended, renewed by whoever has the old key.

use selvedge_domain::rows::{Certificate, Workload};
use selvedge_domain::state::IndexKey;
use selvedge_proto::identity::{self, Kind};
use selvedge_proto::renewal::{PATH, Renewal};
use selvedge_proto::tls::{self, Identity};
use serde_json::{Value, json};

use super::csr_of;
use super::house::{House, OWNER};
use crate::issuer::{BROKER_LIFETIME_MS, DEVICE_LIFETIME_MS};

const DAY_MS: u64 = 24 * 3_600_000;

async fn workload(house: &House) -> Identity {
    let secret = house.key(json!({ "kind": "workload", "name": "billing", "target": "billing" })).await;
    let (key, csr) = tls::new_key_and_csr().unwrap();
    let body = json!({ "secret": secret, "kind": "workload", "name": "billing", "csr": csr_of(&csr) });
    let enrolled = house.call("POST", "/enrol/v1", "", body).await.expect(201);
    let chain: String = enrolled["chain"].as_array().unwrap().iter().map(|pem| pem.as_str().unwrap()).collect();
    Identity::from_pem(&format!("{chain}{}", *key)).unwrap()
}

/// A request of `old`, and the key that it is for.
fn request(old: &Identity) -> (String, Value) {
    let (key, csr) = tls::new_key_and_csr().unwrap();
    (key.to_string(), serde_json::to_value(Renewal::new(old, csr).unwrap()).unwrap())
}

async fn renewed(house: &House, old: &Identity) -> Identity {
    let (key, body) = request(old);
    let answer = house.call("POST", PATH, "", body).await.expect(201);
    Identity::from_pem(&format!("{}{key}", answer["chain_pem"].as_str().unwrap())).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_that_has_ended_is_renewed_with_a_new_key_for_30_days() {
    let house = House::new().await;
    let old = workload(&house).await;
    house.clock.advance(DEVICE_LIFETIME_MS + 29 * DAY_MS);
    let now_ms = house.context.cluster.now_ms();
    let kinds = [Kind::Workload];
    identity::peer(old.chain(), &house.context.anchors, &kinds, now_ms).unwrap_err();
    let new = renewed(&house, &old).await;
    let peer = identity::peer(new.chain(), &house.context.anchors, &kinds, now_ms).unwrap();
    let before = old.peer().unwrap();
    assert_eq!(peer.id, before.id);
    assert_ne!(peer.spki_sha256, before.spki_sha256);
    let row: Certificate = house.context.cluster.state().row(peer.serial.as_bytes()).unwrap();
    assert_eq!(row.key_sha256, peer.spki_sha256, "it is in the log");
    let record = house.records().into_iter().find(|record| record["action"] == "renew").unwrap();
    assert_eq!((&record["actor"], &record["outcome"]), (&json!(peer.id.to_string()), &json!("done")));

    house.clock.advance(2 * DAY_MS);
    let refused = house.call("POST", PATH, "", request(&old).1).await.expect(403);
    assert!(refused["detail"].as_str().unwrap().contains("30 days"), "{refused}");
    // The one that it was given goes on from here.
    renewed(&house, &new).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_was_revoked_is_not_certified_again() {
    let house = House::new().await;
    let old = workload(&house).await;
    renewed(&house, &old).await;
    house.call("POST", "/api/v1/revoke", OWNER, json!({ "subject": "workload/billing" })).await.expect(200);
    let issued = house.context.cluster.state().rows::<Certificate>().count();
    let refused = house.call("POST", PATH, "", request(&old).1).await.expect(403);
    assert!(refused["detail"].as_str().unwrap().contains("revoked"), "{refused}");
    house.clock.advance(DEVICE_LIFETIME_MS + DAY_MS);
    house.call("POST", PATH, "", request(&old).1).await.expect(403);
    let state = house.context.cluster.state();
    assert_eq!(state.rows::<Certificate>().count(), issued);
    assert!(state.find::<Workload>(IndexKey::name("billing")).unwrap().revoked);
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_and_forgeries_renew_nothing() {
    let house = House::new().await;
    let old = workload(&house).await;
    let (_, good) = request(&old);
    let mut swapped = good.clone();
    swapped["csr"] = request(&old).1["csr"].clone();
    let mut garbled = good.clone();
    garbled["certificate"] = json!("00");
    // Of this cluster's issuer, but nobody's whom the log knows.
    let (key, csr) = tls::new_key_and_csr().unwrap();
    let issuer = house.context.issuer.as_ref().unwrap();
    let unknown = issuer.issue(Kind::Workload, "1-999", &csr, house.context.cluster.now_ms()).unwrap();
    let unknown = Identity::from_pem(&format!("{}{}", unknown.chain_pem, *key)).unwrap();
    let foreign = workload(&House::new().await).await;
    for (what, body, status) in [
        ("another key under the signature", swapped, 401),
        ("no certificate", garbled, 401),
        ("another cluster", request(&foreign).1, 401),
        ("an unknown id", request(&unknown).1, 403),
        ("no body", json!({}), 422),
        ("not hexadecimal", json!({ "certificate": "zz", "csr": "", "signature": "" }), 422),
    ] {
        let got = house.call("POST", PATH, "", body).await;
        assert_eq!(got.status.as_u16(), status, "{what}: {}", got.text);
    }
    assert!(house.records().iter().all(|record| record["action"] != "renew"), "strangers fill no journal");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_is_certified_again_until_it_is_removed() {
    let house = House::new().await;
    let token = house.key(json!({ "kind": "broker", "name": "b2" })).await;
    let (key, csr) = tls::new_key_and_csr().unwrap();
    let body = json!({ "secret": token, "kind": "broker", "name": "b2", "csr": csr_of(&csr), "node": "77" });
    let joined = house.call("POST", "/enrol/v1", "", body).await.expect(201);
    let chain: String = joined["chain"].as_array().unwrap().iter().map(|pem| pem.as_str().unwrap()).collect();
    let old = Identity::from_pem(&format!("{chain}{}", *key)).unwrap();
    house.clock.advance(BROKER_LIFETIME_MS + DAY_MS);
    let new = renewed(&house, &old).await;
    assert_eq!(new.peer().unwrap().id, old.peer().unwrap().id);
    let body = selvedge_domain::Body::RemoveBroker { node: 77 };
    house.as_owner(body).await;
    for identity in [&old, &new] {
        let refused = house.call("POST", PATH, "", request(identity).1).await.expect(403);
        assert!(refused["detail"].as_str().unwrap().contains("revoked"), "{refused}");
    }
}
