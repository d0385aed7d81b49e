//! Brokers that come, go and take each other's place, by the commands of the documentation.

use std::path::Path;

use serde_json::Value;

use crate::world::{World, http_get, text, wait};

fn world(brokers: usize) -> World {
    World::start(Path::new(env!("CARGO_BIN_EXE_selvedge")), brokers)
}

fn raft_of(status: &Value, name: &str) -> Vec<String> {
    let rows = status["brokers"].as_array().expect("brokers").iter().filter(|row| row["name"] == name);
    rows.map(|row| {
        format!("{}{}", row["raft"].as_str().expect("text"), if row["removed"] == true { " removed" } else { "" })
    })
    .collect()
}

#[test]
fn a_new_broker_takes_the_place_of_a_dead_one_by_one_command_that_may_be_cut_short() {
    let mut world = world(3);
    let dead = world.leader();
    let name = world.brokers[dead].name.clone();
    world.kill_broker(dead);
    world.add_broker(4);
    let config = world.path("b4.toml");
    let others: Vec<_> = (0..3).filter(|number| *number != dead).collect();
    let via = world.brokers[others[0]].web.to_string();
    wait("another leads", || {
        let status = world.run(&["cluster", "status", "--json"]);
        serde_json::from_slice::<Value>(&status.stdout)
            .is_ok_and(|status| status["leader_name"].as_str().is_some_and(|leader| leader != name))
    });
    let replace = ["cluster", "replace", &name, "--config", text(&config), "--via", &via, "--wait"];
    // It is waited for and nobody starts it: the command ends, and what it did stays.
    let cut_short = world.run(&[&replace[..], &["0s"]].concat());
    assert!(!cut_short.status.success());
    let said = String::from_utf8_lossy(&cut_short.stderr).into_owned();
    assert!(said.contains("run the command again"), "{said}");
    world.start_broker(3);
    for _ in 0..2 {
        // The second time there is nothing left to do.
        world.ok(&[&replace[..], &["60s"]].concat());
        let status = world.json(&["cluster", "status", "--json"]);
        assert_eq!(raft_of(&status, &name), ["none removed"]);
        assert_eq!(raft_of(&status, "b4"), ["voter"]);
    }
    // Two of the three that are left decide: the new one counts.
    world.kill_broker(others[1]);
    wait("the new broker is part of the majority", || {
        world.run(&["token", "create", "after", "--role", "auditor", "--json"]).status.success()
    });
}

#[test]
fn the_leader_is_removed_and_a_learner_is_promoted() {
    let mut world = world(3);
    let token = world.json(&["cluster", "add-learner", "--name", "far", "--json"]);
    world.add_broker(4);
    let (config, via) = (world.path("b4.toml"), world.brokers[0].web.to_string());
    let secret = token["secret"].as_str().expect("a join token");
    world.ok(&["cluster", "join", "--config", text(&config), "--token", secret, "--via", &via]);
    world.start_broker(3);
    let status = world.json(&["cluster", "status", "--json"]);
    assert_eq!(raft_of(&status, "b4"), ["learner"]);
    world.ok(&["cluster", "promote", "b4"]);
    assert_eq!(raft_of(&world.json(&["cluster", "status", "--json"]), "b4"), ["voter"]);

    let leader = world.leader();
    let name = world.brokers[leader].name.clone();
    world.ok(&["cluster", "remove", &name]);
    wait("the others go on without it", || {
        let status = world.run(&["cluster", "status", "--json"]);
        serde_json::from_slice::<Value>(&status.stdout)
            .is_ok_and(|status| raft_of(&status, &name) == ["none removed"] && status["leader_name"] != *name)
    });
    world.kill_broker(leader);
    world.ok(&["token", "create", "after", "--role", "auditor", "--json"]);
    let refused = world.run(&["cluster", "token", "--roles", "voter,king"]);
    assert!(!refused.status.success());
    assert!(String::from_utf8_lossy(&refused.stderr).contains("the roles of a broker are"));
}

#[test]
fn a_broker_that_finds_no_cluster_answers_on_every_port_and_admits_nobody() {
    let mut world = world(1);
    world.add_broker(2);
    let token = world.json(&["cluster", "token", "--json"]);
    let (config, via) = (world.path("b2.toml"), world.brokers[0].web.to_string());
    let secret = token["secret"].as_str().expect("a join token");
    world.ok(&["cluster", "join", "--config", text(&config), "--token", secret, "--via", &via]);
    world.kill_broker(0);
    world.spawn_broker(1);
    let ops = world.brokers[1].ops;
    let answers = |path, status: &str| http_get(ops, path).is_some_and(|answer| answer.starts_with(status));
    wait("it says that it lives", || answers("/livez", "HTTP/1.1 200"));
    assert!(answers("/readyz", "HTTP/1.1 503"));
    for path in ["/api/v1/cluster", "/scim/v2/Users", "/enrol/v1", "/enrol/v1/renew", "/nothing"] {
        for method in ["GET", "POST"] {
            let (status, body) = world.http(1, method, path, "svt_anything", None);
            assert_eq!(status, 503, "{method} {path}: {body}");
        }
    }
    for address in [world.brokers[1].edge, world.brokers[1].peer] {
        crate::bad_input::assert_closed(address);
    }
    world.start_broker(0);
    world.wait_ready(1);
    assert_eq!(raft_of(&world.json(&["cluster", "status", "--json"]), "b2"), ["voter"]);
}
