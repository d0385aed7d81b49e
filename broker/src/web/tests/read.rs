//! How fresh what is read is: the mode, the position and the age of every answer, and what was seen before.

use axum::http::StatusCode;
use selvedge_cluster::Mode;
use selvedge_domain::Id;
use serde_json::json;

use super::house::{House, OWNER};
use crate::web::{api, read};

#[tokio::test(flavor = "multi_thread")]
async fn every_read_says_its_mode_its_position_and_its_age() {
    let house = House::new().await;
    let scim = house.directory("corp").await;
    let position = house.context.cluster.state().position();
    let mut read = 0;
    let routes = api::routes().into_iter().filter(|described| {
        described.paths.paths.values().any(|item| item.get.is_some()) && !described.route.path.contains('{')
    });
    let mut asked: Vec<_> = routes.map(|described| (described.route.path, described.route.read, OWNER)).collect();
    asked.push(("/scim/v2/Users".to_owned(), Some(Mode::Linearizable), &scim));
    asked.push(("/scim/v2/Groups".to_owned(), Some(Mode::Linearizable), &scim));
    for (path, mode, token) in asked {
        let default = read::mode_name(mode.expect("every GET of the API reads"));
        for (named, expected) in [(None, default), (Some("local"), "local"), (Some("linearizable"), "linearizable")] {
            let headers: Vec<_> = named.map(|named| ("selvedge-read", named)).into_iter().collect();
            let got = house.call_with("GET", &path, token, None, &headers).await;
            // What a house without an edge or without a question has no answer to says so all the same.
            assert!(got.status != StatusCode::INTERNAL_SERVER_ERROR, "{path}: {}", got.text);
            assert_eq!(got.headers["selvedge-read"], expected, "{path}");
            let at: Id = got.headers["selvedge-position"].to_str().unwrap().parse().unwrap();
            assert!(at >= position, "{path}: {at}");
            let age_ms: u64 = got.headers["selvedge-age-ms"].to_str().unwrap().parse().unwrap();
            assert!(age_ms < 60_000, "{path}: {age_ms}");
            read += 1;
        }
    }
    assert!(read > 40, "{read}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_caller_has_seen_is_the_oldest_that_is_answered() {
    let house = House::new().await;
    let zone = json!({ "objects": [{ "Zone": { "name": "internal" } }] });
    let changed = house.call("POST", "/api/v1/apply", OWNER, zone).await;
    let seen = changed.headers["selvedge-position"].to_str().unwrap().to_owned();
    for mode in ["local", "linearizable"] {
        let headers = [("selvedge-read", mode), ("selvedge-position", seen.as_str())];
        let got = house.call_with("GET", "/api/v1/objects", OWNER, None, &headers).await.expect(200);
        assert_eq!(got["objects"][0]["Zone"]["name"], "internal");
    }
    for (header, value, status, code) in [
        ("selvedge-position", "1-999999", 503, "stale"),
        ("selvedge-position", "9-1", 503, "stale"),
        ("selvedge-position", "0-1", 410, "reset"),
        ("selvedge-position", "7", 400, "malformed"),
        ("selvedge-position", "1-1-1", 400, "malformed"),
        ("selvedge-read", "newest", 400, "malformed"),
    ] {
        let got = house.call_with("GET", "/api/v1/objects", OWNER, None, &[(header, value)]).await.expect(status);
        assert_eq!(got["code"], code, "{header}: {value}");
    }
    let document = house.call("GET", "/api/v1/openapi.json", OWNER, None).await.expect(200);
    let parameters = document["paths"]["/api/v1/cluster"]["get"]["parameters"].as_array().unwrap();
    let mode = parameters.iter().find(|parameter| parameter["name"] == "Selvedge-Read").expect("it is described");
    assert_eq!(mode["schema"]["default"], "local");
    let answered = &document["paths"]["/api/v1/objects"]["get"]["responses"]["200"]["headers"];
    assert!(answered.get("Selvedge-Age-Ms").is_some(), "{answered}");
}
