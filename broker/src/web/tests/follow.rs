//! Answers that go on: who may read them, and how they end.

use std::time::Duration;

use axum::body::Body;
use http_body_util::BodyExt as _;
use serde_json::{Value, json};

use super::house::{House, OWNER};

/// Longest wait for a line.
const PATIENCE: Duration = Duration::from_secs(30);

fn lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// A body that is read line by line.
struct Follower {
    body: Body,
    text: String,
}

impl Follower {
    async fn open(house: &House, path: &str, token: &str) -> Self {
        Self { body: house.open(path, token).await, text: String::new() }
    }

    /// Reads until a line is the one.
    async fn until(&mut self, is: impl Fn(&Value) -> bool) {
        while !self.text.lines().any(|line| serde_json::from_str(line).is_ok_and(|line| is(&line))) {
            assert!(self.more().await, "it never came: {}", self.text);
        }
    }

    async fn more(&mut self) -> bool {
        let frame = tokio::time::timeout(PATIENCE, self.body.frame()).await.expect("something comes, or the end");
        let Some(frame) = frame else { return false };
        self.text.push_str(std::str::from_utf8(frame.unwrap().data_ref().unwrap()).unwrap());
        true
    }

    /// Reads to the end.
    async fn rest(&mut self) -> Vec<Value> {
        while self.more().await {}
        lines(&self.text)
    }
}

async fn make_token(house: &House, name: &str) -> (String, String) {
    let body = json!({ "name": name, "role": "auditor" });
    let made = house.call("POST", "/api/v1/tokens", OWNER, body).await.expect(201);
    (made["id"].as_str().unwrap().to_owned(), made["token"].as_str().unwrap().to_owned())
}

async fn revoke(house: &House, id: &str) {
    house.call("DELETE", &format!("/api/v1/tokens/{id}"), OWNER, None).await.expect(200);
}

/// Whether an event says that a token was revoked.
fn revokes(line: &Value, id: &str) -> bool {
    line["event"] == "token.put" && line["row"]["id"] == id && line["row"]["revoked"] == true
}

#[tokio::test(flavor = "multi_thread")]
async fn a_follower_is_cut_when_its_token_is_revoked_and_not_when_another_is() {
    let house = House::new().await;
    let (own, token) = make_token(&house, "own").await;
    let (other, _) = make_token(&house, "other").await;
    let mut events = Follower::open(&house, "/api/v1/events?follow=true", &token).await;
    let mut audit = Follower::open(&house, "/api/v1/audit?follow=true&from=1", &token).await;
    revoke(&house, &other).await;
    events.until(|line| revokes(line, &other)).await;
    audit.until(|line| line["record"]["action"] == "token.revoke").await;

    revoke(&house, &own).await;
    make_token(&house, "later").await;
    let (events, audit) = (events.rest().await, audit.rest().await);
    for lines in [&events, &audit] {
        let last = lines.last().unwrap();
        assert_eq!(last["code"], "unauthenticated", "{last}");
        assert!(last["error"].as_str().unwrap().contains("revoked"), "{last}");
    }
    assert!(!events.iter().any(|line| revokes(line, &own) || line["row"]["name"] == "later"), "{events:?}");
    assert_eq!(house.call("GET", "/api/v1/events", &token, None).await.status.as_u16(), 401);
}

#[tokio::test(flavor = "multi_thread")]
async fn events_from_another_epoch_or_a_forgotten_time_are_refused_and_bookmarks_prove_both_hashes() {
    let house = House::new().await;
    let reset = house.call("GET", "/api/v1/events?from=2-1", OWNER, None).await.expect(410);
    assert_eq!(reset["code"], "reset");
    let whole = house.call("GET", "/api/v1/events", OWNER, None).await;
    let lines = lines(&whole.text);
    let last = lines.last().unwrap();
    assert!(last["bookmark"].is_string() || last["id"].is_string(), "{last}");
    let position = house.context.cluster.state().position();
    let followed = house.call("GET", &format!("/api/v1/events?from={position}"), OWNER, None).await;
    assert!(followed.text.contains(&format!("\"id\":\"{position}\"")), "{}", followed.text);
    let settings = |body| house.call("PUT", "/api/v1/cluster/settings", OWNER, body);
    settings(json!({ "journal_keep_ms": 86_400_000 })).await.expect(200);
    settings(json!({ "journal_keep_ms": 1 })).await.expect(422);
    settings(json!({})).await.expect(422);
    let cluster = house.call("GET", "/api/v1/cluster", OWNER, None).await.expect(200);
    assert_eq!(cluster["journal_keep_ms"], 86_400_000);
    settings(json!({ "lease_ms": 9_000, "hold_ms": 20_000 })).await.expect(200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_version_that_the_asked_broker_does_not_know_is_refused_and_the_one_in_force_is_shown() {
    let house = House::new().await;
    let raise = |version: u32, token: &'static str| {
        house.call("PUT", "/api/v1/cluster/version", token, json!({ "version": version }))
    };
    let cluster = house.call("GET", "/api/v1/cluster", OWNER, None).await.expect(200);
    let known = u32::try_from(cluster["version"].as_u64().unwrap()).unwrap();
    let own = &cluster["brokers"][0];
    assert_eq!((own["version"].as_u64(), &cluster["version_next"]), (Some(known.into()), &Value::Null), "{cluster}");
    assert!(own["build"].is_string() && own["holds_raise_back"] == false, "{own}");
    let refused = raise(known + 1, OWNER).await.expect(422);
    assert!(refused["detail"].as_str().unwrap_or_default().contains(&format!("and {known}")), "{refused}");
    raise(known, OWNER).await.expect(200);
    raise(known - 1, OWNER).await.expect(422);
    raise(known, "").await.expect(401);
}
