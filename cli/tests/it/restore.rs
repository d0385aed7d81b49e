//! A cluster that lost everything, or its majority, goes on; and nobody comes back who was revoked.

use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::Instant;

use serde_json::{Value, json};

use crate::shop::Shop;
use crate::world::{DEADLINE, World, text, wait};

/// What a broker's data directory has of the issuer, copied elsewhere.
fn copy_issuer(data: &Path, to: &Path) {
    for (dir, file) in [("issuer", "issuer.sealed"), ("node", "seal.key")] {
        std::fs::create_dir_all(to.join(dir)).expect("a directory");
        std::fs::copy(data.join(dir).join(file), to.join(dir).join(file)).expect("a copy");
    }
}

impl World {
    fn snapshot(&self, name: &str) -> PathBuf {
        let (file, config) = (self.path(name), self.path("b1.toml"));
        let head = self.json(&["cluster", "snapshot", "save", text(&file), "--config", text(&config), "--json"]);
        let read = self.json(&["cluster", "snapshot", "inspect", text(&file), "--json"]);
        assert_eq!(head, read);
        file
    }

    fn try_restore(&self, args: &[&str]) -> Output {
        let config = self.path("b1.toml");
        let mut command = vec!["cluster", args[0], "--config", text(&config), "--json"];
        command.extend(&args[1..]);
        self.run(&command)
    }

    /// Makes the next epoch's directory, and speaks as its owner from then on.
    fn restore(&mut self, args: &[&str]) -> Value {
        let output = self.try_restore(args);
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        let answer: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        let token = answer["token"].as_str().expect("a token").to_owned();
        self.env.retain(|(name, _)| name != "SELVEDGE_TOKEN");
        self.env.push(("SELVEDGE_TOKEN".to_owned(), token));
        answer
    }

    /// A row of a list, by name.
    fn row(&self, what: &str, field: &str, name: &str) -> Value {
        let list = self.json(&[what, "list", "--json"]);
        let rows = list[format!("{what}s")].as_array().expect("a list");
        rows.iter().find(|row| row[field] == name).unwrap_or_else(|| panic!("{name} in {list}")).clone()
    }

    fn release(&self, how: &str, which: &str) -> Output {
        self.run(&["cluster", "release", how, which])
    }
}

fn refused(output: &Output, why: &str) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains(why), "`{why}` in: {said}");
}

#[test]
fn nobody_comes_back_by_a_backup_who_was_revoked_after_it() {
    let mut shop = Shop::open(1);
    let target = shop.app.port();
    shop.world.ok(&["cluster", "settings", "--lease", "3s", "--hold", "5s"]);
    shop.world.connector("stolen", &["elsewhere.internal"]);
    let ann = shop.world.client("ann", "ann@test.example");
    wait("the application", || shop.nc(&ann, "shop.internal", target).0 == "HELLO\n");
    wait("both connectors", || shop.world.row("connector", "name", "stolen")["up"] == true);

    let (data, before, config) = (shop.world.path("b1"), shop.world.path("before"), shop.world.path("b1.toml"));
    let backup = shop.world.snapshot("backup.snapshot");
    let issuer = shop.world.path("issuer-copy");
    copy_issuer(&data, &issuer);
    let again = shop.world.run(&["cluster", "snapshot", "save", text(&backup), "--config", text(&config)]);
    refused(&again, "was not saved");
    let (from_file, issuer_dir) = (text(&backup), text(&issuer));
    let from = ["restore", "--from", from_file, "--issuer", issuer_dir];

    // What the backup does not know.
    shop.world.ok(&["revoke", "connector", "stolen"]);
    let bob = shop.world.json(&["user", "list", "--name", "bob", "--json"])["users"][0]["id"]
        .as_str()
        .expect("an id")
        .to_owned();
    let (status, _) = shop.world.http(0, "DELETE", &format!("/scim/v2/Users/{bob}"), &shop.token, None);
    assert_eq!(status, 204);
    let events = shop.world.path("events.jsonl");
    std::fs::write(&events, shop.world.ok(&["events", "--json"])).expect("a file");

    // Over a broker that lives nothing is restored.
    refused(&shop.world.try_restore(&from), "SE0120");
    shop.world.wait_ready(0);
    shop.world.kill_broker(0);
    std::fs::rename(&data, &before).expect("moved aside");

    // From what is no snapshot, or with another cluster's or no issuer, neither.
    let wrong = shop.world.path("wrong.snapshot");
    let mut bytes = std::fs::read(&backup).expect("the backup");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&wrong, &bytes).expect("a file");
    let wrong_args = ["restore", "--from", text(&wrong), "--issuer", text(&issuer)];
    refused(&shop.world.try_restore(&wrong_args), "SE0120");
    refused(&shop.world.run(&["cluster", "snapshot", "inspect", text(&wrong)]), "SE0120");
    let nowhere = shop.world.path("nowhere");
    refused(&shop.world.try_restore(&["restore", "--from", text(&backup), "--issuer", text(&nowhere)]), "issuer");
    let known = [&from[..], &["--revocations", text(&wrong)]].concat();
    refused(&shop.world.try_restore(&known), "neither event nor record");
    assert!(!data.exists(), "nothing was begun");

    // Without a word of what came later, everybody is held.
    let old_token = shop.token.clone();
    let begun = shop.world.restore(&from);
    assert_eq!(begun["held"], true);
    let first_epoch = begun["epoch"].as_u64();
    assert!(first_epoch > Some(1), "{begun}");
    refused(&shop.world.try_restore(&from), "not empty");
    shop.world.start_broker(0);
    for connector in ["connector", "stolen"] {
        let row = shop.world.row("connector", "name", connector);
        assert_eq!((&row["held"], &row["up"], &row["revoked"]), (&json!(true), &json!(false), &json!(false)), "{row}");
    }
    assert_eq!(shop.world.row("device", "name", "ann")["held"], true);
    let port = target.to_string();
    let explain = ["explain", "--user", "ann@test.example", "--host", "shop.internal", "--port", &port, "--json"];
    let why: Value = serde_json::from_slice(&shop.world.run(&explain).stdout).expect("JSON");
    assert!(why.to_string().contains("\"restored\""), "{why}");
    let (status, _) = shop.world.http(0, "GET", "/scim/v2/Users", &old_token, None);
    assert_eq!(status, 401, "the directory's token is void");

    // Each is let be in its own way.
    shop.token = shop.world.directory("people");
    shop.patch(0, &format!("/scim/v2/Users/{}", shop.ann), json!([{"op": "replace", "path": "active", "value": true}]));
    assert_eq!(shop.world.row("user", "user_name", "ann@test.example")["held"], false);
    assert_eq!(shop.world.row("user", "user_name", "bob@test.example")["held"], true);
    assert!(shop.world.release("--connector", "connector").status.success());
    assert!(shop.world.release("--device", "ann").status.success());
    assert_eq!(shop.world.row("device", "name", "ann")["held"], false);
    let new = shop.world.client("ann-again", "ann@test.example");
    let begun_at = Instant::now();
    while shop.nc(&new, "shop.internal", target).0 != "HELLO\n" {
        assert!(begun_at.elapsed() < 2 * DEADLINE, "the connector that was released does not come back");
        std::thread::sleep(std::time::Duration::from_millis(200));
    }
    assert_eq!(shop.world.row("connector", "name", "stolen")["up"], false, "the other one is held");

    // With what came later: whoever releases what, who was revoked stays so.
    shop.world.kill_broker(0);
    std::fs::remove_dir_all(&data).expect("lost again");
    let known = [&from[..], &["--revocations", text(&events), text(&before)]].concat();
    let begun = shop.world.restore(&known);
    assert!(begun["epoch"].as_u64() > first_epoch, "the same state never begins the same epoch twice: {begun}");
    assert!(begun["revoked_beyond"].as_u64() >= Some(1) && begun["disabled_beyond"].as_u64() >= Some(1), "{begun}");
    shop.world.start_broker(0);
    let cluster = begun["cluster_id"].as_str().expect("an id").to_owned();
    refused(&shop.world.release("--everything", &"0".repeat(32)), "not the id of this cluster");
    assert!(shop.world.release("--everything", &cluster).status.success());
    let stolen = shop.world.row("connector", "name", "stolen");
    assert_eq!((&stolen["revoked"], &stolen["held"]), (&json!(true), &json!(false)), "{stolen}");
    let bob = shop.world.row("user", "user_name", "bob@test.example");
    assert_eq!((&bob["active"], &bob["held"]), (&json!(false), &json!(false)), "{bob}");
    assert_eq!(shop.world.row("user", "user_name", "ann@test.example")["active"], true);
}

#[test]
fn what_two_of_three_brokers_left_goes_on_and_another_broker_joins() {
    let mut world = World::start(Path::new(env!("CARGO_BIN_EXE_selvedge")), 3);
    world.ok(&["cluster", "settings", "--lease", "3s", "--hold", "5s"]);
    for name in ["one", "two"] {
        world.ok(&["token", "create", name, "--role", "auditor"]);
    }
    // The third one misses what comes now, and the second one is never seen again.
    world.kill_broker(2);
    world.ok(&["token", "create", "three", "--role", "auditor"]);
    world.kill_broker(1);
    world.kill_broker(0);
    let (data, before, third) = (world.path("b1"), world.path("before"), world.path("b3"));
    std::fs::rename(&data, &before).expect("moved aside");
    let begun = world.restore(&["recover", "--from", text(&third), text(&before)]);
    assert!(begun["held"] == false && begun["epoch"].as_u64() > Some(1), "{begun}");
    let chosen = begun["survivors"].as_array().expect("a list").iter().filter(|row| row["chosen"] == true);
    assert_eq!(chosen.map(|row| row["path"].clone()).collect::<Vec<_>>(), [json!(text(&before))]);
    world.start_broker(0);
    let tokens = world.json(&["token", "list", "--json"]);
    for name in ["one", "two", "three"] {
        let row = tokens["tokens"].as_array().expect("a list").iter().find(|row| row["name"] == name);
        assert_eq!(row.unwrap_or_else(|| panic!("{name} was acknowledged: {tokens}"))["revoked"], true);
    }

    // One that was left out of it is nobody any more; with a new directory its machine joins.
    std::fs::remove_dir_all(world.path("b2")).expect("its disk is lost");
    let key = world.json(&["cluster", "token", "--json"]);
    let secret = key["secret"].as_str().expect("a join token").to_owned();
    let (config, via) = (world.path("b2.toml"), world.brokers[0].web.to_string());
    world.ok(&["cluster", "join", "--config", text(&config), "--token", &secret, "--via", &via]);
    world.start_broker(1);
    let is_voter = |world: &World, name: &str| {
        let view = world.json(&["cluster", "status", "--json"]);
        let rows = view["brokers"].as_array().expect("a list").clone();
        rows.iter().any(|row| row["name"] == name && row["raft"] == "voter" && row["removed"] == false)
    };
    wait("two voters", || is_voter(&world, "b1") && is_voter(&world, "b2"));
    world.ok(&["token", "create", "four", "--role", "auditor"]);
}

#[test]
fn cluster_time_is_set_by_an_owner_and_no_further_than_the_clock() {
    let world = World::start(Path::new(env!("CARGO_BIN_EXE_selvedge")), 1);
    let now = jiff::Timestamp::now();
    let at = |seconds: i64| (now + jiff::SignedDuration::from_secs(seconds)).to_string();
    refused(&world.run(&["cluster", "set-time", &at(400 * 86_400)]), "never goes back");
    refused(&world.run(&["cluster", "set-time", &at(-86_400)]), "never goes back");
    refused(&world.run(&["cluster", "set-time", "noon"]), "noon");
    world.ok(&["cluster", "set-time", &at(55)]);
    let status = world.json(&["cluster", "status", "--json"]);
    let ahead_ms = status["now_ms"].as_i64().expect("a time") - now.as_millisecond();
    assert!(ahead_ms >= 55_000, "{ahead_ms}");
}
