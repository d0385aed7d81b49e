//! The web listener over a real cluster of one broker, with its own issuer and audit journal.

mod follow;
pub(crate) mod house;
mod read;
mod renew;

use std::net::TcpListener;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::http::{Method, Request, StatusCode, header};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::TokioIo;
use selvedge_domain::rows::AdminRole;
use selvedge_proto::tls;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio_rustls::TlsConnector;

use super::auth::Need;
use super::*;
use crate::issuer::Seal;
use house::{DOMAIN, House, OWNER};

fn csr() -> Value {
    csr_of(&tls::new_key_and_csr().unwrap().1)
}

fn csr_of(der: &[u8]) -> Value {
    STANDARD.encode(der).into()
}

fn disable() -> Value {
    json!({ "Operations": [{ "op": "replace", "value": { "active": false } }] })
}

#[tokio::test(flavor = "multi_thread")]
async fn before_there_is_a_cluster_nothing_is_served() {
    let (house, _) = House::empty().await;
    for path in ["/api/v1/cluster", "/scim/v2/Users", "/enrol/v1", "/", "/api/v1/tokens"] {
        for method in ["GET", "POST"] {
            let got = house.call(method, path, OWNER, json!({})).await;
            assert_eq!(got.status, StatusCode::SERVICE_UNAVAILABLE, "{method} {path}");
            assert!(got.headers.contains_key(header::RETRY_AFTER));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_route_asks_for_its_credential() {
    let house = House::new().await;
    let directory = house.directory("corp").await;
    let tokens = [
        ("", AdminRole::Unspecified),
        (&*directory, AdminRole::Unspecified),
        (&*house.token("auditor").await, AdminRole::Auditor),
        (&*house.token("admin").await, AdminRole::Admin),
        (OWNER, AdminRole::Owner),
    ];
    let mut asked = 0;
    for described in api::routes() {
        let item = described.paths.paths.values().next().unwrap();
        let methods = [(&item.get, "GET"), (&item.post, "POST"), (&item.put, "PUT"), (&item.delete, "DELETE")];
        let (Need::Role(needed) | Need::RoleWhenCutOff(needed)) = described.route.need else {
            panic!("a route of the API needs a role")
        };
        assert!(needed >= AdminRole::Auditor, "{}", described.route.path);
        // No object has this id, so nothing is done by those who may.
        let path = described.route.path.replace("{node}", "none").replace("{id}", "none");
        for (_, method) in methods.into_iter().filter(|(operation, _)| operation.is_some()) {
            for (token, role) in &tokens {
                let got = house.call(method, &path, token, None).await;
                let (status, whole) = (got.status.as_u16(), format!("{method} {path} as {role:?}: {}", got.text));
                match (token.is_empty(), *role >= needed) {
                    (true, _) => assert_eq!(status, 401, "{whole}"),
                    (_, false) => assert_eq!(status, 403, "{whole}"),
                    _ => assert!(![401, 403, 404, 405, 500].contains(&status), "{whole}"),
                }
                asked += 1;
            }
        }
    }
    assert!(asked > 100, "{asked}");
    for route in scim::routes() {
        assert_eq!(route.need, Need::Directory);
        let path = route.path.replace("{id}", "1-1");
        for (token, expected) in [("", 401), ("svt_guess", 401), (OWNER, 403)] {
            let got = house.call("GET", &path, token, None).await;
            assert_eq!(got.status.as_u16(), expected, "{path}");
            assert_eq!(got.json()["schemas"][0], "urn:ietf:params:scim:api:messages:2.0:Error");
        }
    }
    let known = house.records();
    let refused = known.iter().filter(|record| record["outcome"] == "forbidden");
    assert!(refused.count() > 50, "each attempt of a known credential is recorded");
    assert_eq!(house.call("GET", "/api/v1/nothing", OWNER, None).await.status, StatusCode::NOT_FOUND);
    assert_eq!(house.call("PATCH", "/api/v1/cluster", OWNER, None).await.status, StatusCode::METHOD_NOT_ALLOWED);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_openapi_document_has_every_route() {
    let house = House::new().await;
    let document = house.call("GET", "/api/v1/openapi.json", OWNER, None).await.expect(200);
    for described in api::routes() {
        assert!(document["paths"].get(&described.route.path).is_some(), "{}", described.route.path);
    }
    assert!(document["components"]["schemas"].get("Explanation").is_some(), "schemas that are referred to are there");
    let text = document.to_string();
    for reference in text.split("\"$ref\":\"#/components/schemas/").skip(1) {
        let name = reference.split('"').next().unwrap();
        assert!(document["components"]["schemas"].get(name).is_some(), "`{name}` is referred to and not there");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn guesses_of_a_stranger_end_in_waiting() {
    let house = House::new().await;
    let mut last = StatusCode::OK;
    for guess in 0..80 {
        last = house.call("GET", "/api/v1/cluster", &format!("svx_{guess}"), None).await.status;
    }
    assert_eq!(last, StatusCode::TOO_MANY_REQUESTS);
}

fn objects() -> Value {
    json!([
        { "Region": { "name": "eu", "latitude": 50.0, "longitude": 8.0 } },
        { "Zone": { "name": "internal" } },
        { "ConnectorGroup": { "name": "dc", "region": "eu" } },
        { "Segment": { "name": "crm", "hosts": ["crm.internal"], "tcp": ["8080"], "connector_groups": ["dc"] } },
        { "Policy": { "name": "sales-crm",
            "cedar": "permit(principal in Group::\"sales\", action, resource in Segment::\"crm\");" } },
    ])
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_is_applied_explained_and_told_to_watchers() {
    let house = House::new().await;
    let scim = house.directory("corp").await;
    let user = |name: &str| json!({ "userName": name, "active": true });
    let allowed = house.call("POST", "/scim/v2/Users", &scim, user("allowed@demo.test")).await.expect(201);
    house.call("POST", "/scim/v2/Users", &scim, user("denied@demo.test")).await.expect(201);
    let group = json!({ "displayName": "sales", "members": [{ "value": allowed["id"] }] });
    house.call("POST", "/scim/v2/Groups", &scim, group).await.expect(201);

    let dry = json!({ "objects": objects(), "dry_run": true });
    let would = house.call("POST", "/api/v1/apply", OWNER, dry).await.expect(200);
    assert_eq!(would["changed"].as_array().unwrap().len(), 5);
    let none = house.call("GET", "/api/v1/objects", OWNER, None).await.expect(200);
    assert_eq!(none["objects"], json!([]), "a dry run changes nothing");
    let done = house.call("POST", "/api/v1/apply", OWNER, json!({ "objects": objects() })).await.expect(200);
    assert_eq!(done["changed"], would["changed"]);
    let stale = json!({ "objects": objects(), "expect_revision": 1 });
    assert_eq!(house.call("POST", "/api/v1/apply", OWNER, stale).await.expect(412)["code"], "version_mismatch");
    let segment = house.call("GET", "/api/v1/objects?kind=Segment&name=CRM", OWNER, None).await.expect(200);
    assert_eq!(segment["objects"][0]["Segment"]["tcp"], json!(["8080"]));

    let explain = |who: &str| format!("/api/v1/explain?{who}&host=CRM.internal.&port=8080");
    let yes = house.call("GET", &explain("user=allowed@demo.test"), OWNER, None).await.expect(200);
    assert_eq!(yes["explanation"]["allowed"], true, "{yes}");
    assert_eq!(yes["explanation"]["deciding"][0]["name"], "sales-crm");
    let no = house.call("GET", &explain("user=corp/denied@demo.test"), OWNER, None).await.expect(200);
    assert_eq!(no["explanation"]["reason"]["code"], "no_permit");
    house.call("GET", &explain("user=nobody"), OWNER, None).await.expect(404);
    house.call("GET", &explain("denial=0123456789abcdef"), OWNER, None).await.expect(404);
    house.call("GET", "/api/v1/explain?user=a&host=x&port=99999", OWNER, None).await.expect(422);
    house.call("GET", "/api/v1/explain?user=a&host=x&port=1&tenant=4", OWNER, None).await.expect(422);

    let events = house.call("GET", "/api/v1/events", OWNER, None).await;
    let lines: Vec<Value> = events.text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let seqs: Vec<u64> = lines.iter().filter_map(|line| line["id"].as_str()?.split_once('-')?.1.parse().ok()).collect();
    assert!(seqs.windows(2).all(|pair| pair[1] == pair[0] + 1), "{seqs:?}");
    assert!(lines.iter().any(|line| line["event"] == "policy.put" && line["row"]["name"] == "sales-crm"));
    assert!(
        lines
            .iter()
            .any(|line| line["event"] == "user.put" && line["actor"].as_str().unwrap().starts_with("directory/"))
    );
    assert!(!events.text.contains(&hex::encode(sha256(OWNER))));

    let audit = house.call("GET", "/api/v1/audit?from=1", OWNER, None).await;
    assert!(audit.text.lines().any(|line| line.contains("\"action\":\"apply\"") && line.contains("Policy/sales-crm")));
    let streams = house.call("GET", "/api/v1/audit/streams", OWNER, None).await.expect(200);
    assert_eq!(streams["streams"][0]["current"], true);
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_values_are_refused_and_change_nothing() {
    let house = House::new().await;
    let before = house.context.cluster.state().position();
    for (path, body) in [
        ("/api/v1/apply", json!({ "objects": [{ "Zone": { "name": "*" } }] })),
        ("/api/v1/apply", json!({ "objects": [{ "Zone": { "name": "x", "is_admin": true } }] })),
        ("/api/v1/apply", json!({ "objects": [{ "Region": { "name": "r", "latitude": 91.0, "longitude": 0.0 } }] })),
        ("/api/v1/apply", json!({ "objects": [{ "Policy": { "name": "p", "cedar": "permit(" } }] })),
        ("/api/v1/tokens", json!({ "name": "x", "role": "god" })),
        ("/api/v1/tokens", json!({ "name": "x", "role": "auditor", "revoked_at": null })),
        ("/api/v1/keys", json!({ "kind": "broker", "name": "k", "uses": 0 })),
        ("/api/v1/keys", json!({ "kind": "broker", "name": "k", "uses": -1 })),
        ("/api/v1/keys", json!({ "kind": "broker", "name": "k", "life_s": 315_576_000_000_000u64 })),
        ("/api/v1/keys", json!({ "kind": "broker", "name": "k", "life_s": u64::MAX })),
        ("/api/v1/keys", json!({ "kind": "issuer", "name": "k" })),
        ("/api/v1/revoke", json!({ "subject": "cluster" })),
        ("/api/v1/directories", json!({ "name": "a/b" })),
    ] {
        let got = house.call("POST", path, OWNER, body.clone()).await;
        assert_eq!(got.status, StatusCode::UNPROCESSABLE_ENTITY, "{path} {body}: {}", got.text);
    }
    assert_eq!(house.context.cluster.state().position(), before);
    let big = Request::builder()
        .method(Method::POST)
        .uri("/api/v1/apply")
        .header(header::AUTHORIZATION, format!("Bearer {OWNER}"))
        .body(Body::from(vec![b' '; ADMIN_BODY_BYTES_MAX + 1]))
        .unwrap();
    assert_eq!(house.send(big).await.status, StatusCode::PAYLOAD_TOO_LARGE);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repeated_key_is_applied_once_and_a_change_can_be_waited_for() {
    let house = House::new().await;
    let zone = json!({ "objects": [{ "Zone": { "name": "internal" } }] });
    let headers = [("idempotency-key", "k-1"), ("prefer", "enforced, wait=20")];
    let first = house.call_with("POST", "/api/v1/apply", OWNER, zone.clone(), &headers).await;
    assert_eq!(first.headers["preference-applied"], "enforced", "{}", first.text);
    let first = first.expect(200);
    assert_eq!(first["enforced"]["complete"], true);
    assert_eq!(first["enforced"]["receipts"][0]["name"], "b1");
    let position = house.context.cluster.state().position();
    let again = house.call_with("POST", "/api/v1/apply", OWNER, zone, &headers[..1]).await.expect(200);
    assert_eq!(again["position"], first["position"]);
    assert_eq!(house.context.cluster.state().position(), position);

    let token = json!({ "name": "ci", "role": "auditor" });
    let key = [("idempotency-key", "k-2")];
    house.call_with("POST", "/api/v1/tokens", OWNER, token.clone(), &key).await.expect(201);
    let again = house.call_with("POST", "/api/v1/tokens", OWNER, token, &key).await.expect(409);
    assert!(again["detail"].as_str().unwrap().contains("not shown again"));
    let kinds: Vec<_> = house.records().iter().map(|record| record["kind"].clone()).collect();
    assert!(kinds.contains(&json!("enforce.receipt")));
}

#[tokio::test(flavor = "multi_thread")]
async fn roles_are_decided_where_the_change_is() {
    let house = House::new().await;
    let second =
        house.call("POST", "/api/v1/tokens", OWNER, json!({ "name": "o2", "role": "owner" })).await.expect(201);
    let (id, token) = (second["id"].as_str().unwrap(), second["token"].as_str().unwrap());
    let own = format!("/api/v1/tokens/{id}");
    let grants = (0..20).map(|n| {
        let house = &house;
        async move {
            let body = json!({ "name": format!("t{n}"), "role": "owner" });
            (house.call("POST", "/api/v1/tokens", token, body).await, n)
        }
    });
    let (revoked, granted) = tokio::join!(house.call("DELETE", &own, OWNER, None), futures::future::join_all(grants));
    let revoked_at =
        revoked.expect(200)["position"].as_str().unwrap().split_once('-').unwrap().1.parse::<u64>().unwrap();
    for (got, n) in granted {
        match got.status.as_u16() {
            201 => {
                let at = got.json()["position"].as_str().unwrap().split_once('-').unwrap().1.parse::<u64>().unwrap();
                assert!(at < revoked_at, "t{n} was granted by a token that was revoked before");
            }
            401 => {}
            other => panic!("{other}: {}", got.text),
        }
    }
    assert_eq!(house.call("GET", "/api/v1/cluster", token, None).await.status, StatusCode::UNAUTHORIZED);
    let last = house.call("GET", "/api/v1/tokens", OWNER, None).await.expect(200);
    let owner = last["tokens"].as_array().unwrap().iter().find(|token| token["name"] == "owner").unwrap();
    let owner = format!("/api/v1/tokens/{}", owner["id"].as_str().unwrap());
    let others = last["tokens"].as_array().unwrap().iter().filter(|t| t["revoked"] == false).count();
    if others == 1 {
        house.call("DELETE", &owner, OWNER, None).await.expect(409);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_is_served_as_okta_tests_it() {
    let house = House::new().await;
    let scim = house.directory("okta").await;
    let (house, scim) = (&house, &scim);
    let call = |method: &'static str, path: String, body: Option<Value>| async move {
        house.call(method, &path, scim, body).await
    };

    let empty = call("GET", "/scim/v2/Users?count=1&startIndex=1".into(), None).await.expect(200);
    assert_eq!((&empty["totalResults"], &empty["Resources"]), (&json!(0), &json!([])));
    let anna = json!({
        "schemas": ["urn:ietf:params:scim:schemas:core:2.0:User"], "id": "9-9", "userName": "Anna@demo.test",
        "name": { "givenName": "Anna", "familyName": "A" }, "externalId": "00u1", "active": true,
        "emails": [{ "primary": true, "value": "anna@demo.test", "type": "work" }],
    });
    let made = call("POST", "/scim/v2/Users".into(), Some(anna.clone())).await;
    let (location, tag) = (made.headers[header::LOCATION].clone(), made.headers[header::ETAG].clone());
    let made = made.expect(201);
    let id = made["id"].as_str().unwrap().to_owned();
    assert_eq!(location.to_str().unwrap(), format!("https://web.demo.test/scim/v2/Users/{id}"));
    assert_eq!(tag, "W/\"1\"");
    assert_eq!((&made["name"]["givenName"], &made["meta"]["resourceType"]), (&json!("Anna"), &json!("User")));
    assert_ne!(id, "9-9");

    let again = call("POST", "/scim/v2/Users".into(), Some(anna)).await.expect(409);
    assert_eq!((&again["scimType"], &again["status"]), (&json!("uniqueness"), &json!("409")));
    for filter in
        ["userName%20eq%20%22ANNA@DEMO.TEST%22", "externalId%20eq%20%2200u1%22", "name.givenName%20sw%20%22an%22"]
    {
        let found = call("GET", format!("/scim/v2/Users?filter={filter}"), None).await.expect(200);
        assert_eq!(found["totalResults"], 1, "{filter}");
        assert_eq!(found["Resources"][0]["id"], json!(id));
    }
    let missed = call("GET", "/scim/v2/Users?filter=userName%20eq%20%22x%22".into(), None).await.expect(200);
    assert_eq!(missed["totalResults"], 0);
    let wrong = call("GET", "/scim/v2/Users?filter=colour%20eq%20%22x%22".into(), None).await.expect(400);
    assert_eq!(wrong["scimType"], "invalidFilter");
    let unknown = call("GET", "/scim/v2/Users/1-9999".into(), None).await.expect(404);
    assert!(unknown["detail"].is_string());

    let user = format!("/scim/v2/Users/{id}");
    let disabled = call("PATCH", user.clone(), Some(disable())).await.expect(200);
    assert_eq!((&disabled["active"], &disabled["meta"]["version"]), (&json!(false), &json!("W/\"2\"")));
    assert_eq!(call("GET", user.clone(), None).await.expect(200)["active"], false, "it stays visible");
    let put = json!({ "userName": "anna@demo.test", "name": { "givenName": "B" } });
    let put = call("PUT", user.clone(), Some(put)).await.expect(200);
    assert_eq!(put["active"], false, "a body that does not say enables nobody");
    assert!(put.get("emails").is_none());
    let slim = call("GET", format!("{user}?attributes=userName"), None).await.expect(200);
    assert!(slim.get("meta").is_none() && slim.get("userName").is_some());

    for (path, expected) in
        [("ServiceProviderConfig", 200), ("ResourceTypes", 200), ("Schemas", 200), ("Schemas/x", 404)]
    {
        call("GET", format!("/scim/v2/{path}"), None).await.expect(expected);
    }
    let stale = house.call_with("DELETE", &user, scim, None, &[("if-match", "W/\"1\"")]).await;
    assert_eq!(stale.status, StatusCode::PRECONDITION_FAILED);
    let gone = house.call_with("DELETE", &user, scim, None, &[("if-match", "W/\"3\"")]).await;
    assert_eq!((gone.status, gone.text.as_str()), (StatusCode::NO_CONTENT, ""));
    call("GET", user, None).await.expect(404);
}

#[tokio::test(flavor = "multi_thread")]
async fn directories_do_not_see_each_other_and_members_add_up() {
    let house = House::new().await;
    let (one, two) = (house.directory("one").await, house.directory("two").await);
    let mut ids = Vec::new();
    for n in 0..8 {
        let made = house.call("POST", "/scim/v2/Users", &one, json!({ "userName": format!("u{n}") })).await.expect(201);
        ids.push(made["id"].clone());
    }
    let group = house.call("POST", "/scim/v2/Groups", &one, json!({ "displayName": "g" })).await.expect(201);
    let path = format!("/scim/v2/Groups/{}", group["id"].as_str().unwrap());
    let patch = |id: &Value| json!({ "Operations": [{ "op": "add", "path": "members", "value": [{ "value": id }] }] });

    let user = format!("/scim/v2/Users/{}", ids[0].as_str().unwrap());
    for (method, path, body) in [
        ("GET", &user, None),
        ("PATCH", &user, Some(disable())),
        ("DELETE", &user, None),
        ("GET", &path, None),
        ("PATCH", &path, Some(patch(&ids[0]))),
        ("DELETE", &path, None),
    ] {
        house.call(method, path, &two, body).await.expect(404);
    }
    let foreign = json!({ "displayName": "x", "members": [{ "value": ids[0] }] });
    house.call("POST", "/scim/v2/Groups", &two, foreign).await.expect(400);

    let adds = ids.iter().map(|id| house.call("PATCH", &path, &one, patch(id)));
    for got in futures::future::join_all(adds).await {
        got.expect(200);
    }
    let all = house.call("GET", &path, &one, None).await.expect(200);
    assert_eq!(all["members"].as_array().unwrap().len(), ids.len(), "no addition was lost");
    let repeated = house.call("PATCH", &path, &one, patch(&ids[0])).await.expect(200);
    assert_eq!(repeated["meta"]["version"], all["meta"]["version"], "the same again changes nothing");
    let filter = format!(
        "/scim/v2/Groups?filter=members.value%20eq%20%22{}%22&excludedAttributes=members",
        ids[1].as_str().unwrap()
    );
    let found = house.call("GET", &filter, &one, None).await.expect(200);
    assert_eq!(found["totalResults"], 1);
    assert!(found["Resources"][0].get("members").is_none());
    let remove = json!({ "Operations": [{ "op": "Remove", "path": format!("members[value eq {}]", ids[1]) }] });
    let left = house.call("PATCH", &path, &one, remove).await.expect(200);
    assert_eq!(left["members"].as_array().unwrap().len(), ids.len() - 1);
    let seen = house.call("GET", &user, &one, None).await.expect(200);
    assert_eq!(seen["groups"][0]["display"], "g");

    // Both change another attribute of one user at the same time; neither is lost.
    let title = json!({ "Operations": [{ "op": "add", "path": "title", "value": "t" }] });
    let nick = json!({ "Operations": [{ "op": "add", "path": "nickName", "value": "n" }] });
    let (a, b) = tokio::join!(house.call("PATCH", &user, &one, title), house.call("PATCH", &user, &one, nick));
    a.expect(200);
    b.expect(200);
    let both = house.call("GET", &user, &one, None).await.expect(200);
    assert_eq!((&both["title"], &both["nickName"]), (&json!("t"), &json!("n")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_with_one_use_enrols_one_of_fifty() {
    let house = House::new().await;
    house
        .call("POST", "/api/v1/apply", OWNER, json!({ "objects": objects().as_array().unwrap()[..3] }))
        .await
        .expect(200);
    let secret = house.key(json!({ "kind": "connector", "name": "k", "target": "dc" })).await;
    let body = |csr: Value| json!({ "secret": secret, "kind": "connector", "name": "c", "csr": csr, "node": null });
    let bodies: Vec<Value> = (0..50).map(|_| body(csr())).collect();
    let tries = bodies.iter().map(|body| house.call("POST", "/enrol/v1", "", body.clone()));
    let got = futures::future::join_all(tries).await;
    let won: Vec<usize> = (0..50).filter(|n| got[*n].status == StatusCode::CREATED).collect();
    assert_eq!(won.len(), 1);
    for lost in got.iter().filter(|got| got.status != StatusCode::CREATED) {
        assert_eq!(lost.json()["code"], "key_exhausted", "{}", lost.text);
    }
    let winner = got[won[0]].json();
    let repeated = house.call("POST", "/enrol/v1", "", bodies[won[0]].clone()).await.expect(201);
    assert_eq!(repeated["id"], winner["id"], "the same key is answered the same");
    assert_eq!(winner["spiffe"], format!("spiffe://{DOMAIN}/connector/{}", winner["id"].as_str().unwrap()));
    let anchors = selvedge_proto::identity::Anchors::from_json(&winner["anchors"].to_string()).unwrap();
    assert_eq!(anchors, *house.context.anchors);
    assert_eq!(winner["knock_keys"].as_array().unwrap().len(), 2);
    let list = house.call("GET", "/api/v1/keys", OWNER, None).await;
    assert!(!list.text.contains(&secret));
    assert_eq!(list.json()["keys"][0]["uses"], 1);
    let recorded = house.records();
    assert!(recorded.iter().any(|record| record["action"] == "enrol" && record["outcome"] == "key_exhausted"));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_may_not_enrol_is_refused_before_anything_is_used() {
    let house = House::new().await;
    let secret = house.key(json!({ "kind": "workload", "name": "k", "target": "billing", "uses": 3 })).await;
    let other = EnrolSecret::generate(&house.context.anchors.pin()).unwrap();
    let request = |change: fn(&mut rcgen::CertificateParams)| {
        let mut params = rcgen::CertificateParams::default();
        change(&mut params);
        STANDARD.encode(params.serialize_request(&rcgen::KeyPair::generate().unwrap()).unwrap().der())
    };
    let of_another = request(|params| {
        params.subject_alt_names = vec![rcgen::SanType::URI("spiffe://demo.test/workload/1-999".try_into().unwrap())];
    });
    let authority = request(|params| params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained));
    let mut broken = STANDARD.decode(csr().as_str().unwrap()).unwrap();
    let last = broken.len() - 1;
    broken[last] ^= 1;
    let ask = |secret: &str, kind: &str, csr: Value| json!({ "secret": secret, "kind": kind, "name": "x", "csr": csr });
    for (body, status, code) in [
        (ask(other.reveal(), "workload", csr()), 403, "key_unknown"),
        (ask(&secret, "connector", csr()), 403, "key_mismatch"),
        (ask("sv1.x.y", "workload", csr()), 422, "invalid"),
        (ask(&secret, "workload", "AAAA".into()), 422, "invalid"),
        (ask(&secret, "workload", "not base64!".into()), 422, "invalid"),
        (ask(&secret, "workload", STANDARD.encode(&broken).into()), 422, "invalid"),
        (ask(&secret, "owner", csr()), 422, "invalid"),
        (ask(&secret, "workload", of_another.into()), 422, "invalid"),
        (ask(&secret, "workload", authority.into()), 422, "invalid"),
    ] {
        let got = house.call("POST", "/enrol/v1", "", body).await;
        assert_eq!((got.status.as_u16(), got.json()["code"].as_str()), (status, Some(code)), "{}", got.text);
    }
    let keys = house.context.cluster.state();
    assert_eq!(keys.rows::<selvedge_domain::rows::EnrolKey>().next().unwrap().uses, 0);
    let big =
        Request::builder().method(Method::POST).uri("/enrol/v1").body(Body::from(vec![b'{'; ENROL_BODY_BYTES_MAX + 1]));
    assert_eq!(house.send(big.unwrap()).await.status, StatusCode::PAYLOAD_TOO_LARGE);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_gets_a_login_and_a_broker_the_sealed_issuer() {
    let house = House::new().await;
    let scim = house.directory("corp").await;
    let user = house.call("POST", "/scim/v2/Users", &scim, json!({ "userName": "anna" })).await.expect(201);
    let code = house.key(json!({ "kind": "device", "name": "laptop", "target": "anna" })).await;
    let body = json!({ "secret": code, "kind": "device", "name": "laptop", "csr": csr() });
    let device = house.call("POST", "/enrol/v1", "", body).await.expect(201);
    let grant = STANDARD.decode(device["grant"].as_str().unwrap()).unwrap();
    let anchor = house.context.anchors.certificate(selvedge_proto::identity::Role::Clients);
    let grant = selvedge_proto::grant::verify(&grant, anchor, house.context.cluster.now_ms()).unwrap();
    assert_eq!((json!(grant.user), json!(grant.device)), (user["id"].clone(), device["id"].clone()));

    let again = house.key(json!({ "kind": "device", "name": "laptop", "target": "anna" })).await;
    house
        .call("PATCH", &format!("/scim/v2/Users/{}", user["id"].as_str().unwrap()), &scim, disable())
        .await
        .expect(200);
    let body = json!({ "secret": again, "kind": "device", "name": "laptop", "csr": csr() });
    assert_eq!(house.call("POST", "/enrol/v1", "", body).await.expect(403)["code"], "key_void");

    let token = house.key(json!({ "kind": "broker", "name": "b2" })).await;
    let body = json!({ "secret": token, "kind": "broker", "name": "b2", "csr": csr(), "node": "77" });
    let broker = house.call("POST", "/enrol/v1", "", body).await.expect(201);
    assert_eq!(broker["spiffe"], format!("spiffe://{DOMAIN}/broker/77"));
    assert_eq!(broker["peers"][0]["peer"], "127.0.0.1:3");
    let sealed = STANDARD.decode(broker["issuer_sealed"].as_str().unwrap()).unwrap();
    let dir = TempDir::new().unwrap();
    let key = crate::node::join_seal_key(&token);
    let seal = Seal::File(dir.path().join("k"));
    let opened = Issuer::from_sealed(&sealed, &key, &dir.path().join("issuer"), &seal).unwrap();
    assert_eq!(opened.anchors(), &*house.context.anchors);
    let taken = house.key(json!({ "kind": "broker", "name": "b3" })).await;
    let body = json!({ "secret": taken, "kind": "broker", "name": "b3", "csr": csr(), "node": "77" });
    assert_eq!(house.call("POST", "/enrol/v1", "", body).await.expect(409)["code"], "conflict");
}

/// The house's listener, with the operator's certificate or without one.
fn listen(house: &House, files: Option<Files>) -> Web {
    let (issuer, hosts) = (house.context.issuer.clone(), vec!["web.demo.test".to_owned()]);
    let own = tls::Renewable::new(house.own.clone());
    let certificates = Certificates::new(files, issuer, hosts, own, tls::system_time()).unwrap();
    Web::serve(house.context.clone(), TcpListener::bind("127.0.0.1:0").unwrap(), Arc::new(certificates)).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn who_pins_the_issuer_is_served_also_where_the_operator_has_a_certificate() {
    let house = House::new().await;
    let operators = rcgen::generate_simple_self_signed(["web.demo.test".to_owned()]).unwrap();
    let dir = TempDir::new().unwrap();
    let files = Files { certificate: dir.path().join("web.pem"), key: dir.path().join("web.key") };
    std::fs::write(&files.certificate, operators.cert.pem()).unwrap();
    std::fs::write(&files.key, operators.signing_key.serialize_pem()).unwrap();
    let web = listen(&house, Some(files));
    let address = web.address().to_string();

    // Enrolment and late renewal ask so, the command line by the same handshake.
    let (pin, time) = (house.context.anchors.pin(), tls::system_time());
    let secret = house.key(json!({ "kind": "broker", "name": "b2" })).await;
    let body = json!({ "secret": secret, "kind": "broker", "name": "b2", "csr": csr(), "node": "77" });
    let (status, _) = selvedge_proto::https::post(&address, pin, &time, "/enrol/v1", &body.to_string()).await.unwrap();
    assert_eq!(status, 201);
    let other = selvedge_proto::https::post(&address, [1; 32].into(), &time, "/enrol/v1", "{}").await.unwrap_err();
    assert!(matches!(other, selvedge_proto::https::Error::WrongCluster { .. }), "{other}");

    // Browsers know it by its name.
    let mut roots = rustls::RootCertStore::empty();
    roots.add(operators.cert.der().clone()).unwrap();
    let config = rustls::ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
    let stream = tokio::net::TcpStream::connect(web.address()).await.unwrap();
    let stream = TlsConnector::from(Arc::new(config)).connect("web.demo.test".try_into().unwrap(), stream).await;
    assert_eq!(stream.unwrap().get_ref().1.peer_certificates().unwrap()[0], *operators.cert.der());
    web.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_listener_shows_the_pinned_key_and_speaks_http_1_and_2() {
    let house = House::new().await;
    let web = listen(&house, None);
    for alpn in ["h2", "http/1.1"] {
        let mut config = tls::pinned_web_client(house.context.anchors.pin(), &tls::system_time()).unwrap();
        config.alpn_protocols[0] = alpn.as_bytes().to_vec();
        let stream = tokio::net::TcpStream::connect(web.address()).await.unwrap();
        let name = "web.demo.test".try_into().unwrap();
        let stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await.unwrap();
        let request = Request::get("https://web.demo.test/api/v1/cluster")
            .header(header::HOST, "web.demo.test")
            .header(header::AUTHORIZATION, format!("bearer {OWNER}"))
            .body(Full::<bytes::Bytes>::default())
            .unwrap();
        let response = if alpn == "h2" {
            let executor = hyper_util::rt::TokioExecutor::new();
            let (mut send, connection) =
                hyper::client::conn::http2::handshake(executor, TokioIo::new(stream)).await.unwrap();
            tokio::spawn(connection);
            send.send_request(request).await.unwrap()
        } else {
            let (mut send, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
            tokio::spawn(connection);
            send.send_request(request).await.unwrap()
        };
        assert_eq!(response.status(), StatusCode::OK, "{alpn}");
        let body = response.into_body().collect().await.unwrap().to_bytes();
        let view: Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(view["brokers"][0]["name"], "b1");
    }
    let wrong = tls::pinned_web_client([1; 32].into(), &tls::system_time()).unwrap();
    let stream = tokio::net::TcpStream::connect(web.address()).await.unwrap();
    let refused = TlsConnector::from(Arc::new(wrong)).connect("web.demo.test".try_into().unwrap(), stream).await;
    assert!(refused.is_err(), "another cluster's listener is not spoken to");
    let begun = Instant::now();
    web.stop().await;
    assert!(begun.elapsed() < Duration::from_secs(8));
}
