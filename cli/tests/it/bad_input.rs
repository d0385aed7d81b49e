//! What is malformed, oversized or not allowed gets a clear error (on the edge: silence), and the rest goes on.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::world::{World, text};

/// The edge closes what has shown neither knock nor ticket within 3 s; the rest is slack for a busy machine.
const SILENCE_MAX: Duration = Duration::from_secs(20);

#[test]
fn the_edge_answers_strangers_with_silence_and_goes_on() {
    let world = World::start(Path::new(env!("CARGO_BIN_EXE_selvedge")), 1);
    let edge = world.brokers[0].edge;
    let hello = |alpn: &[&[u8]]| client_hello(alpn);
    let ticket = [b"t/".as_slice(), &[7; 32]].concat();
    let knock = [b"k/".as_slice(), &[7; 48]].concat();
    let plain = hello(&[]);
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("nothing", vec![]),
        ("random bytes", (0..4_096_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect()),
        ("http", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec()),
        ("a hello without alpn", plain.clone()),
        ("a control hello without knock", hello(&[b"selvedge-control/1"])),
        ("a control hello with a wrong knock", hello(&[b"selvedge-control/1", &knock])),
        ("a hop without ticket", hello(&[b"selvedge-hop/1"])),
        ("a hop with an unknown ticket", hello(&[b"selvedge-hop/1", &ticket])),
        ("a record longer than the limit", [&[22, 3, 1, 0xff, 0xff][..], &vec![1; 70_000]].concat()),
        ("half a hello", plain[..plain.len() / 2].to_vec()),
    ];
    for (what, bytes) in &cases {
        assert_silent(edge, what, |stream| stream.write_all(bytes));
    }
    assert_silent(edge, "a hello byte by byte", |stream| {
        stream.set_nodelay(true)?;
        plain.iter().try_for_each(|byte| stream.write_all(&[*byte]))
    });
    assert!(world.run(&["cluster", "status"]).status.success());
}

#[test]
fn the_peer_port_takes_no_stranger() {
    let world = World::start(Path::new(env!("CARGO_BIN_EXE_selvedge")), 1);
    let other = World::start(Path::new(env!("CARGO_BIN_EXE_selvedge")), 1);
    let config = std::fs::read_to_string(other.path("b1.toml")).expect("the other cluster's configuration");
    assert!(!config.is_empty());
    let peer = world.brokers[0].peer;
    for bytes in [&b"GET / HTTP/1.1\r\n\r\n"[..], &client_hello(&[b"h2"])[..]] {
        let mut stream = TcpStream::connect(peer).expect("the peer port");
        stream.set_read_timeout(Some(SILENCE_MAX)).expect("a timeout");
        stream.write_all(bytes).expect("taken");
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        assert!(!answer.windows(4).any(|window| window == b"HTTP"), "no stranger speaks HTTP here");
    }
    assert!(world.run(&["cluster", "status"]).status.success());
}

#[test]
fn the_web_listener_refuses_wrong_tokens_and_oversized_or_malformed_bodies() {
    let world = World::start(Path::new(env!("CARGO_BIN_EXE_selvedge")), 1);
    let token = world.directory("people");
    let other = world.directory("others");
    let status = |method: &str, path: &str, token: &str, body| world.http(0, method, path, token, body).0;
    assert_eq!(status("GET", "/scim/v2/Users", "svd_wrong", None), 401);
    assert_eq!(status("GET", "/api/v1/cluster", "svt_wrong", None), 401);
    assert_eq!(status("GET", "/api/v1/cluster", &token, None), 403, "a directory administers nothing");
    let user = |extra: serde_json::Value| {
        let mut body = json!({"schemas": ["urn:ietf:params:scim:schemas:core:2.0:User"], "userName": "a@test.example"});
        body.as_object_mut().expect("an object").extend(extra.as_object().expect("an object").clone());
        body
    };
    assert_eq!(status("POST", "/scim/v2/Users", &token, Some(json!("x".repeat(5 << 20)))), 413);
    assert_eq!(status("POST", "/scim/v2/Users", &token, Some(json!({"userName": 7}))), 400);
    assert_eq!(status("POST", "/scim/v2/Users", &token, Some(json!({}))), 400);
    assert_eq!(status("POST", "/scim/v2/Users", &token, Some(user(json!({"id": "1-1"})))), 201);
    assert_eq!(status("POST", "/scim/v2/Users", &token, Some(user(json!({})))), 409);
    let (_, list) = world.http(0, "GET", "/scim/v2/Users?filter=userName%20eq%20%22A@test.example%22", &token, None);
    assert_eq!(list["totalResults"], 1, "{list}");
    let id = list["Resources"][0]["id"].as_str().expect("an id").to_owned();
    assert_ne!(id, "1-1");
    assert_eq!(status("GET", &format!("/scim/v2/Users/{id}"), &other, None), 404);
    assert_eq!(status("GET", &format!("/scim/v2/Users?filter={}", "(".repeat(3_000)), &token, None), 400);
    assert_eq!(status("POST", "/enrol/v1", "x", Some(json!({"secret": "s".repeat(100_000)}))), 413);
    assert!(matches!(status("POST", "/enrol/v1", "x", Some(json!({"secret": "sv1.x.y"}))), 400..=422));
}

#[test]
fn apply_names_what_is_wrong_and_changes_nothing() {
    let world = World::start(Path::new(env!("CARGO_BIN_EXE_selvedge")), 1);
    world.apply_segments(&[("shop", "shop.internal", 80)]);
    let before = world.ok(&["get", "-o", "json"]);
    for (yaml, said) in [
        ("kind: Segment\nname: x\nhost: [a]\n", "host"),
        ("kind: Nonsense\nname: x\n", "Nonsense"),
        ("kind: Segment\nname: x\nhosts: [x.internal]\ntcp: [\"80\"]\nconnector_groups: [nowhere]\n", "nowhere"),
        ("kind: Segment\nname: x\nhosts: [shop.internal]\ntcp: [\"1-100\"]\nconnector_groups: [here]\n", "shop"),
        ("kind: Policy\nname: x\ncedar: permit(principal, action, resource\n", "x"),
        ("kind: Policy\nname: x\ncedar: permit(principal in Group::\"nobody\", action, resource);\n", "nobody"),
        ("kind: Zone\nname: [\n", ""),
    ] {
        let output = world.apply(yaml);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && error.contains(said), "{yaml}: {error}");
    }
    assert_eq!(world.ok(&["get", "-o", "json"]), before);
}

#[test]
fn a_data_directory_is_made_once_and_used_by_one_process() {
    let world = World::start(Path::new(env!("CARGO_BIN_EXE_selvedge")), 1);
    let config = world.path("b1.toml");
    let again = world.run(&["cluster", "init", "--config", text(&config), "--trust-domain", "test.example"]);
    assert!(!again.status.success());
    let second = world.run(&["broker", "--config", text(&config)]);
    assert!(!second.status.success());
    assert!(String::from_utf8_lossy(&second.stderr).contains("another process"));
    assert!(world.run(&["cluster", "status"]).status.success());
}

fn assert_silent(edge: SocketAddr, what: &str, send: impl FnOnce(&mut TcpStream) -> std::io::Result<()>) {
    let mut stream = TcpStream::connect(edge).expect("the edge");
    stream.set_read_timeout(Some(SILENCE_MAX)).expect("a timeout");
    let begun = Instant::now();
    // It may be closed while it is still being written to.
    let _ = send(&mut stream);
    let mut answer = Vec::new();
    let ended = stream.read_to_end(&mut answer);
    assert!(answer.is_empty(), "{what}: {answer:?}");
    let open = ended.is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock);
    assert!(!open, "{what}: still open after {:?}", begun.elapsed());
}

/// A stranger's bytes are closed without an answer, but for an alert of TLS.
pub fn assert_closed(address: SocketAddr) {
    let mut stream = TcpStream::connect(address).expect("a listener");
    stream.set_read_timeout(Some(SILENCE_MAX)).expect("a timeout");
    let _ = stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n");
    let mut answer = Vec::new();
    let ended = stream.read_to_end(&mut answer);
    assert!(answer.len() < 64 && !answer.starts_with(b"HTTP"), "{answer:?}");
    assert!(!ended.is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock), "still open");
}

/// A real ClientHello with these protocol names.
fn client_hello(alpn: &[&[u8]]) -> Vec<u8> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("TLS 1.3")
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    let name = "b1.brokers.test".try_into().expect("a name");
    let mut connection = rustls::ClientConnection::new(Arc::new(config), name).expect("a connection");
    let mut bytes = Vec::new();
    connection.write_tls(&mut bytes).expect("to a vector");
    bytes
}
