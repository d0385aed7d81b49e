//! Three brokers: relayed sessions, second choices, brokers that die, and changes that hold everywhere.

use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader, ErrorKind, Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::Stdio;
use std::sync::mpsc;
use std::time::Duration;

use serde_json::{Value, json};

use crate::shop::{Shop, exchange, is_cut};
use crate::world::{DEADLINE, World, text, wait};

/// One way of a link that is long enough to be avoided.
pub const FAR: Duration = Duration::from_millis(30);
/// Events that wait to be looked at.
const FOLLOWED_MAX: usize = 1_024;

#[test]
fn a_session_goes_through_a_broker_that_the_connector_is_not_attached_to_and_round_a_dead_connector() {
    let mut shop = Shop::prepare(3);
    let far = link(shop.world.brokers[0].edge, FAR);
    for name in ["one", "two"] {
        shop.world.connector_via(name, &["shop.internal"], &[("b1", far)]);
    }
    let elsewhere = |name: &str| [(name.to_owned(), "b2".to_owned()), (name.to_owned(), "b3".to_owned())];
    let expected: BTreeSet<_> = elsewhere("one").into_iter().chain(elsewhere("two")).collect();
    wait("both connectors at the near brokers alone", || attachments(&shop.world) == expected);
    let ann = shop.world.client("ann", "ann@test.example");
    let address = shop.listener_via("listener", &ann, &only("b1"));

    let mut live = exchange(address).expect("a session");
    let session = sessions(&shop.world).into_iter().next().expect("it is listed");
    assert_eq!(stitched_by(&shop.world, &session), "b1");
    let name = connector_name(&shop.world, &session);
    assert_eq!(attachments(&shop.world), expected, "the dial was passed on");
    let opened = records(&shop.world, 0)
        .into_iter()
        .find(|record| record["kind"] == "session.open" && record["session"] == session["session"]);
    assert!(
        opened.is_some_and(|record| record["connector"] == session["connector"]),
        "the broker that stitched has the record"
    );

    shop.world.kill(&name);
    assert!(is_cut(&mut live), "its connector is gone");
    let _live = exchange(address).expect("the next session takes the other connector");
    let session = sessions(&shop.world).into_iter().next().expect("it is listed");
    assert_ne!(connector_name(&shop.world, &session), name);
}

#[test]
fn what_takes_access_away_at_one_broker_is_enforced_at_all() {
    let mut shop = Shop::open(3);
    let followers: Vec<usize> = (0..3).filter(|number| *number != shop.world.leader()).collect();
    let mut addresses = Vec::new();
    for name in ["b1", "b2", "b3"] {
        let state = shop.world.client(&format!("ann-{name}"), "ann@test.example");
        addresses.push(shop.listener_via(&format!("listener-{name}"), &state, &only(name)));
    }
    let open = |shop: &Shop| {
        let live: Vec<TcpStream> = addresses.iter().map(|address| exchange(*address).expect("a session")).collect();
        let by: BTreeSet<String> =
            sessions(&shop.world).iter().map(|session| stitched_by(&shop.world, session)).collect();
        assert_eq!(by.len(), 3, "each broker stitches one: {by:?}");
        live
    };

    let live = open(&shop);
    let path = shop.world.path("closed.yaml");
    let policy = "kind: Policy\nname: closed\ncedar: |\n  forbid(principal, action == Action::\"connect\", resource in Segment::\"shop\");\n";
    std::fs::write(&path, policy).expect("a file");
    let endpoint = format!("https://{}", shop.world.brokers[followers[0]].web);
    let mut apply = shop.world.command(&["apply", "-f", path.to_str().expect("text"), "--wait", "enforced", "--json"]);
    let output = apply.env("SELVEDGE_ENDPOINT", endpoint).output().expect("the binary runs");
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    let answer: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let receipts: BTreeSet<&str> = answer["enforced"]["receipts"]
        .as_array()
        .expect("receipts")
        .iter()
        .filter_map(|receipt| receipt["name"].as_str())
        .collect();
    assert_eq!(receipts, BTreeSet::from(["b1", "b2", "b3"]), "{answer}");
    for mut stream in live {
        assert!(is_cut(&mut stream), "forbidden");
    }
    assert!(sessions(&shop.world).is_empty(), "nothing is left when it is enforced");
    for address in &addresses {
        assert!(exchange(*address).is_err(), "forbidden");
    }

    std::fs::write(&path, policy.replace("forbid", "permit")).expect("a file");
    shop.world.ok(&["apply", "-f", path.to_str().expect("text"), "--wait", "enforced"]);
    let live = open(&shop);
    shop.patch(
        followers[1],
        &format!("/scim/v2/Users/{}", shop.ann),
        json!([{"op": "replace", "path": "active", "value": false}]),
    );
    for mut stream in live {
        assert!(is_cut(&mut stream), "disabled");
    }
}

#[test]
fn what_was_changed_through_one_broker_is_read_through_every_other() {
    let world = World::start(Path::new(env!("CARGO_BIN_EXE_selvedge")), 3);
    let at = |number: usize, args: &[&str]| {
        let endpoint = format!("https://{}", world.brokers[number % 3].web);
        let output = world.command(args).env("SELVEDGE_ENDPOINT", endpoint).output().expect("the binary runs");
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("text")
    };
    let file = world.path("zone.yaml");
    for round in 0..6 {
        let zone = format!("round{round}.internal");
        std::fs::write(&file, format!("kind: Zone\nname: {zone}\n")).expect("a file");
        at(round, &["apply", "-f", text(&file)]);
        for other in 1..3 {
            // What the other broker has by then is not enough: it is to have what was changed from here.
            let zones = at(round + other, &["get", "zone", "--read", "local"]);
            assert!(zones.contains(&zone), "round {round}: {zones}");
        }
    }
}

#[test]
fn a_listener_and_a_follower_of_events_go_on_when_their_broker_the_leader_is_killed() {
    let mut shop = Shop::open(3);
    let leader = shop.world.leader();
    let names: Vec<String> = shop.world.brokers.iter().map(|broker| broker.name.clone()).collect();
    let others: Vec<usize> = (0..3).filter(|number| *number != leader).collect();
    let via: Vec<(&str, SocketAddr)> =
        others.iter().map(|number| (names[*number].as_str(), link(shop.world.brokers[*number].edge, FAR))).collect();
    let ann = shop.world.client("ann", "ann@test.example");
    let address = shop.listener_via("listener", &ann, &via);
    wait("a session at the nearest broker", || {
        let live = exchange(address);
        live.is_ok() && sessions(&shop.world).iter().any(|session| stitched_by(&shop.world, session) == names[leader])
    });

    let endpoints: Vec<String> =
        [leader].iter().chain(&others).map(|number| format!("https://{}", shop.world.brokers[*number].web)).collect();
    let mut follow = shop.world.command(&["events", "--follow", "--json"]);
    let mut follow =
        Ended(follow.env("SELVEDGE_ENDPOINT", endpoints.join(",")).stdout(Stdio::piped()).spawn().expect("a follower"));
    let followed = lines(&mut follow);
    let mut seen = Vec::new();
    let user = |shop: &Shop, number: usize, name: &str| {
        let body = json!({"schemas": ["urn:ietf:params:scim:schemas:core:2.0:User"], "userName": name});
        wait("a write", || {
            matches!(shop.world.http(number, "POST", "/scim/v2/Users", &shop.token, Some(body.clone())).0, 201 | 409)
        });
    };
    user(&shop, leader, "before@test.example");
    until_user(&followed, &mut seen, "before@test.example");

    let mut live = exchange(address).expect("a session");
    shop.world.kill_broker(leader);
    for number in &others {
        user(&shop, *number, &format!("after-{number}@test.example"));
    }
    assert!(is_cut(&mut live), "its broker is gone");
    wait("a session through another broker", || exchange(address).is_ok());
    user(&shop, others[0], "last@test.example");
    until_user(&followed, &mut seen, "last@test.example");

    let whole: Vec<String> = shop
        .world
        .command(&["events", "--json"])
        .env("SELVEDGE_ENDPOINT", &endpoints[2])
        .output()
        .map(|output| {
            let text = String::from_utf8(output.stdout).expect("text");
            text.lines().filter_map(id_of).collect()
        })
        .expect("the binary runs");
    assert_eq!(whole[..seen.len()], seen, "each event once, in order, none missing");
    let sequence: Vec<u64> =
        seen.iter().map(|id| id.rsplit('-').next().and_then(|seq| seq.parse().ok()).expect("a position")).collect();
    assert!(sequence.windows(2).all(|pair| pair[1] == pair[0] + 1), "{sequence:?}");
}

/// A child that does not outlive the test.
struct Ended(std::process::Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn lines(child: &mut Ended) -> mpsc::Receiver<String> {
    let (sender, receiver) = mpsc::sync_channel(FOLLOWED_MAX);
    let stdout = child.0.stdout.take().expect("piped");
    std::thread::spawn(move || {
        BufReader::new(stdout).lines().map_while(Result::ok).try_for_each(|line| sender.send(line))
    });
    receiver
}

/// Takes events until the one that made a user.
fn until_user(followed: &mpsc::Receiver<String>, seen: &mut Vec<String>, name: &str) {
    loop {
        let line = followed.recv_timeout(DEADLINE).expect("the follower goes on");
        seen.extend(id_of(&line));
        if line.contains(name) {
            return;
        }
    }
}

/// The id of an event; none of a bookmark.
fn id_of(line: &str) -> Option<String> {
    let event: Value = serde_json::from_str(line).expect("JSON");
    event["id"].as_str().map(str::to_owned)
}

/// Routes to every broker but one lead nowhere.
pub fn only(name: &str) -> Vec<(&str, SocketAddr)> {
    let nowhere = SocketAddr::from((Ipv4Addr::LOCALHOST, 1));
    ["b1", "b2", "b3"].into_iter().filter(|other| *other != name).map(|other| (other, nowhere)).collect()
}

pub fn sessions(world: &World) -> Vec<Value> {
    world.json(&["session", "list", "--json"])["sessions"].as_array().cloned().unwrap_or_default()
}

/// Name of the broker that stitched a session.
pub fn stitched_by(world: &World, session: &Value) -> String {
    let at = session["endpoint"].as_str().expect("an endpoint");
    let broker = world.brokers.iter().find(|broker| at.ends_with(&broker.web.to_string()));
    broker.expect("the endpoint is a broker's").name.clone()
}

/// Pairs of a connector and a broker that it is attached to.
pub fn attachments(world: &World) -> BTreeSet<(String, String)> {
    let connectors = connectors(world);
    let pairs = connectors.iter().flat_map(|connector| {
        let seen = connector["seen"].as_array().into_iter().flatten().filter(|seen| seen["up"] == true);
        seen.map(|seen| (name(&connector["name"]), name(&seen["broker_name"])))
    });
    pairs.collect()
}

fn connectors(world: &World) -> Vec<Value> {
    world.json(&["connector", "list", "--json"])["connectors"].as_array().cloned().unwrap_or_default()
}

fn connector_name(world: &World, session: &Value) -> String {
    let connectors = connectors(world);
    let connector = connectors
        .iter()
        .find(|connector| connector["id"] == session["connector"] || connector["name"] == session["connector"]);
    name(&connector.unwrap_or_else(|| panic!("{session}: {connectors:?}"))["name"])
}

fn name(value: &Value) -> String {
    value.as_str().expect("a name").to_owned()
}

/// The audit records of one broker since it started.
pub fn records(world: &World, number: usize) -> Vec<Value> {
    let token = world.json(&["token", "create", &format!("reader-{number}"), "--role", "auditor", "--json"]);
    let token = token["token"].as_str().expect("a token").to_owned();
    let (status, text) = world.http(number, "GET", "/api/v1/audit?from=1", &token, None);
    assert_eq!(status, 200, "{text}");
    let lines = text.as_str().map(str::to_owned).unwrap_or_else(|| text.to_string());
    lines.lines().filter_map(|line| Some(serde_json::from_str::<Value>(line).ok()?["record"].clone())).collect()
}

/// A link to `target` on which everything takes `each_way` longer.
pub fn link(target: SocketAddr, each_way: Duration) -> SocketAddr {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
    let address = listener.local_addr().expect("bound");
    std::thread::spawn(move || {
        for near in listener.incoming().flatten() {
            // A connection to nobody is closed.
            let Ok(far) = TcpStream::connect(target) else { continue };
            for (from, to) in [(&near, &far), (&far, &near)] {
                if let (Ok(from), Ok(to)) = (from.try_clone(), to.try_clone()) {
                    std::thread::spawn(move || pass(from, to, each_way));
                }
            }
        }
    });
    address
}

fn pass(mut from: TcpStream, mut to: TcpStream, delay: Duration) {
    let mut bytes = [0; 16 * 1024];
    let _ = to.set_nodelay(true);
    loop {
        match from.read(&mut bytes) {
            Ok(0) => break,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => break drop(from.shutdown(Shutdown::Both)),
            Ok(read) => {
                // The distance, not a wait for anything.
                std::thread::sleep(delay);
                if to.write_all(&bytes[..read]).is_err() {
                    break drop(from.shutdown(Shutdown::Both));
                }
            }
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}
