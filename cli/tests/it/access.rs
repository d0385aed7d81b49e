//! What people and workloads reach, and what they are told of what they do not.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;

use serde_json::json;

use crate::shop::{Shop, exchange, is_cut};
use crate::world::{text, wait};

#[test]
fn the_allowed_reach_the_application_and_the_denied_find_no_such_name() {
    let shop = Shop::open(1);
    let (ann, bob) = (shop.world.client("ann", "ann@test.example"), shop.world.client("bob", "bob@test.example"));
    let port = shop.app.port();
    wait("the connector", || shop.nc(&ann, "shop.internal", port).0 == "HELLO\n");
    let denied = shop.nc(&bob, "shop.internal", port);
    let unknown = shop.nc(&bob, "nowhere.internal", port);
    let wrong_port = shop.nc(&ann, "shop.internal", 1);
    assert_eq!((denied.0.as_str(), denied.2), ("", Some(1)), "{}", denied.1);
    assert_eq!(denied.1.replace("shop.", "nowhere."), unknown.1);
    assert_eq!(denied.2, unknown.2);
    assert_eq!(denied.1, wrong_port.1);
    let explain = |user: &str| {
        let port = port.to_string();
        shop.world.run(&["explain", "--user", user, "--host", "shop.internal", "--port", &port])
    };
    let (yes, no) = (explain("ann@test.example"), explain("bob@test.example"));
    assert_eq!((yes.status.code(), no.status.code()), (Some(0), Some(1)));
    assert!(String::from_utf8_lossy(&yes.stdout).contains("sales-shop"));
    assert_eq!(explain("nobody@test.example").status.code(), Some(2));
}

#[test]
fn a_session_ends_when_its_person_is_disabled_leaves_the_group_or_the_policy_goes() {
    let mut shop = Shop::open(1);
    let ann = shop.world.client("ann", "ann@test.example");
    let address = shop.listener(&ann);
    let (user, group) = (format!("/scim/v2/Users/{}", shop.ann), format!("/scim/v2/Groups/{}", shop.group));

    let mut live = exchange(address).expect("a session");
    shop.patch(0, &user, json!([{"op": "replace", "path": "active", "value": false}]));
    assert!(is_cut(&mut live), "disabled");
    shop.patch(0, &user, json!([{"op": "replace", "path": "active", "value": true}]));
    // The grant is of an older generation: the person logs in again.
    assert!(exchange(address).is_err());
    let ann = shop.world.client("ann-again", "ann@test.example");
    shop.world.kill("listener");
    let address = shop.listener(&ann);

    let mut live = exchange(address).expect("a session");
    let member = format!("members[value eq \"{}\"]", shop.ann);
    shop.patch(0, &group, json!([{"op": "remove", "path": member}]));
    assert!(is_cut(&mut live), "left the group");
    shop.patch(0, &group, json!([{"op": "add", "path": "members", "value": [{"value": shop.ann}]}]));
    wait("access again", || exchange(address).is_ok());

    let mut live = exchange(address).expect("a session");
    let forbid = "kind: Policy\nname: closed\ncedar: |\n  forbid(principal, action == Action::\"connect\", resource in Segment::\"shop\");\n";
    assert!(shop.world.apply(forbid).status.success());
    assert!(is_cut(&mut live), "forbidden");
}

#[test]
fn half_close_passes_through_and_bytes_arrive_whole() {
    let mut shop = Shop::open(1);
    let ann = shop.world.client("ann", "ann@test.example");
    let address = shop.listener(&ann);
    let mut stream = TcpStream::connect(address).expect("the listener");
    let mut sender = stream.try_clone().expect("a clone");
    let sent = std::thread::spawn(move || {
        let line = [b"abcdefghijklmnopqrstuvwxyz012345".repeat(2_000), vec![b'\n']].concat();
        for _ in 0..500 {
            sender.write_all(&line).expect("taken");
        }
        sender.shutdown(std::net::Shutdown::Write).expect("half closed");
        line.len() * 500
    });
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).expect("until the end");
    assert_eq!(answer.len(), sent.join().expect("sent"));
    assert!(answer.iter().all(|byte| byte.is_ascii_uppercase() || byte.is_ascii_digit() || *byte == b'\n'));
}

#[test]
fn an_exhausted_key_and_unknown_people_are_told_so() {
    let shop = Shop::open(1);
    let code = shop.world.secret("device", "ann@test.example");
    let web = shop.world.brokers[0].web.to_string();
    let enrol = |name: &str| {
        let state = shop.world.path(name);
        shop.world.run(&["client", "enrol", "--web", &web, "--code", &code, "--name", name, "--state", text(&state)])
    };
    assert!(enrol("first").status.success());
    let second = enrol("second");
    assert!(!second.status.success());
    let said = String::from_utf8_lossy(&second.stderr).to_lowercase();
    assert!(said.contains("used"), "{said}");
    let unknown = shop.world.run(&[
        "key",
        "create",
        "--kind",
        "device",
        "--name",
        "x",
        "--target",
        "nobody@test.example",
        "--uses",
        "1",
    ]);
    assert!(!unknown.status.success());
    assert!(String::from_utf8_lossy(&unknown.stderr).contains("nobody@test.example"));
}
