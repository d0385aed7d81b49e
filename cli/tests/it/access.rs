//! What people and workloads reach, and what they are told of what they do not.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use serde_json::json;

use crate::world::{World, free_ports, text, wait};

/// A world with one application, reachable for the group `sales`, and the directory's token.
struct Shop {
    world: World,
    token: String,
    app: SocketAddr,
    ann: String,
    group: String,
}

impl Shop {
    fn open(brokers: usize) -> Self {
        let app = upper_case_server();
        let mut world = World::start(Path::new(env!("CARGO_BIN_EXE_selvedge")), brokers);
        let token = world.directory("people");
        let ann = world.user(&token, "ann@test.example");
        world.user(&token, "bob@test.example");
        let group = world.group(&token, "sales", &[&ann]);
        world.apply_segments(&[("shop", "shop.internal", app.port())]);
        let policy = "kind: Policy\nname: sales-shop\ncedar: |\n  permit(principal in Group::\"sales\", action == Action::\"connect\", resource in Segment::\"shop\");\n";
        let output = world.apply(policy);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        world.connector("connector", &["shop.internal"]);
        Self { world, token, app, ann, group }
    }

    fn target(&self) -> String {
        format!("shop.internal:{}", self.app.port())
    }

    /// What `client nc` prints and says for one line sent, and its exit code.
    fn nc(&self, state: &Path, host: &str, port: u16) -> (String, String, Option<i32>) {
        let mut child = self
            .world
            .command(&["client", "nc", host, &port.to_string(), "--state", text(state)])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("a client");
        let _ = child.stdin.take().expect("piped").write_all(b"hello\n");
        let output = child.wait_with_output().expect("it ends");
        let text = |bytes| String::from_utf8(bytes).expect("text");
        (text(output.stdout), text(output.stderr), output.status.code())
    }

    /// A client's listener for the application.
    fn listener(&mut self, state: &Path) -> SocketAddr {
        let [address] = free_ports();
        let target = self.target();
        self.world.spawn("listener", &["client", "connect", &target, "--listen", &address.to_string(), "--state", text(state)]);
        wait("a session", || exchange(address).is_ok());
        address
    }
}

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
    let patch = |shop: &Shop, path: &str, operations: serde_json::Value| {
        let body = json!({"schemas": ["urn:ietf:params:scim:api:messages:2.0:PatchOp"], "Operations": operations});
        let (status, answer) = shop.world.http(0, "PATCH", path, &shop.token, Some(body));
        assert!(status == 200 || status == 204, "{status} {answer}");
    };
    let (user, group) = (format!("/scim/v2/Users/{}", shop.ann), format!("/scim/v2/Groups/{}", shop.group));

    let mut live = exchange(address).expect("a session");
    patch(&shop, &user, json!([{"op": "replace", "path": "active", "value": false}]));
    assert!(is_cut(&mut live), "disabled");
    patch(&shop, &user, json!([{"op": "replace", "path": "active", "value": true}]));
    // The grant is of an older generation: the person logs in again.
    assert!(exchange(address).is_err());
    let ann = shop.world.client("ann-again", "ann@test.example");
    shop.world.kill("listener");
    let address = shop.listener(&ann);

    let mut live = exchange(address).expect("a session");
    let member = format!("members[value eq \"{}\"]", shop.ann);
    patch(&shop, &group, json!([{"op": "remove", "path": member}]));
    assert!(is_cut(&mut live), "left the group");
    patch(&shop, &group, json!([{"op": "add", "path": "members", "value": [{"value": shop.ann}]}]));
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
    let unknown = shop.world.run(&["key", "create", "--kind", "device", "--name", "x", "--target", "nobody@test.example", "--uses", "1"]);
    assert!(!unknown.status.success());
    assert!(String::from_utf8_lossy(&unknown.stderr).contains("nobody@test.example"));
}

/// Sends a line and gets it back in upper case.
fn exchange(address: SocketAddr) -> std::io::Result<TcpStream> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    stream.write_all(b"hello\n")?;
    let mut answer = [0; 6];
    stream.read_exact(&mut answer)?;
    assert_eq!(&answer, b"HELLO\n");
    Ok(stream)
}

/// Whether the stream ends or is reset, without another byte.
fn is_cut(stream: &mut TcpStream) -> bool {
    match stream.read(&mut [0]) {
        Ok(read) => read == 0,
        Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
    }
}

fn upper_case_server() -> SocketAddr {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
    let address = listener.local_addr().expect("bound");
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let mut writer = stream.try_clone()?;
                let mut reader = BufReader::new(stream);
                let mut line = Vec::new();
                while reader.read_until(b'\n', &mut line)? > 0 {
                    line.make_ascii_uppercase();
                    writer.write_all(&line)?;
                    line.clear();
                }
                Ok::<(), std::io::Error>(())
            });
        }
    });
    address
}
