//! The ways into a session (SOCKS5, HTTP CONNECT, listener, standard input and output), workloads, and revoking ends.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::path::Path;
use std::time::{Duration, Instant};

use crate::shop::{Shop, exchange, is_cut, upper_case_server};
use crate::world::{free_ports, text, wait};

/// A cut that was acknowledged as enforced has happened; the end of the stream is on its way.
const CUT_WITHIN: Duration = Duration::from_secs(3);

#[test]
fn a_proxy_reaches_what_is_allowed_and_says_the_same_of_denied_and_unknown() {
    let mut shop = Shop::open(1);
    let port = shop.app.port();
    let (ann, bob) = (shop.world.client("ann", "ann@test.example"), shop.world.client("bob", "bob@test.example"));
    let (of_ann, of_bob) = (proxy(&mut shop, "proxy-ann", &ann), proxy(&mut shop, "proxy-bob", &bob));
    wait("a session", || socks(of_ann, "shop.internal", port).1 == [5, 0, 0, 1, 0, 0, 0, 0, 0, 0]);

    let (mut stream, _) = socks(of_ann, "shop.internal", port);
    assert_eq!(line(&mut stream), "HELLO\n");
    let (mut stream, answer) = http(of_ann, &format!("Shop.Internal.:{port}"));
    assert_eq!(answer, "HTTP/1.1 200 Connection established\r\n\r\n");
    assert_eq!(line(&mut stream), "HELLO\n");

    let (denied, unknown) = (socks(of_bob, "shop.internal", port).1, socks(of_bob, "none.internal", port).1);
    assert_eq!(denied, [5, 4, 0, 1, 0, 0, 0, 0, 0, 0]);
    assert_eq!(denied, unknown);
    assert_eq!(socks(of_ann, "shop.internal", 1).1, unknown);
    let of = |host: &str| http(of_bob, &format!("{host}:{port}")).1;
    let denied = of("shop.internal");
    assert!(denied.starts_with("HTTP/1.1 502 "), "{denied}");
    assert_eq!(denied.replace("shop.", "none."), of("none.internal"));

    // Outside the zones nobody is asked, and the answer says why.
    assert_eq!(socks(of_ann, "www.example.com", 443).1[..2], [5, 2]);
    let outside = http(of_ann, "www.example.com:443").1;
    assert!(outside.starts_with("HTTP/1.1 403 ") && outside.contains("no private zone"), "{outside}");

    for command in ["proxy", "connect"] {
        let mut args = vec!["client", command, "--listen", "0.0.0.0:0", "--state", text(&ann)];
        args.extend((command == "connect").then_some("shop.internal:1"));
        let output = shop.world.run(&args);
        assert_eq!(output.status.code(), Some(2));
        assert!(String::from_utf8_lossy(&output.stderr).contains("`0.0.0.0:0` is not a loopback address"));
    }

    let status = shop.world.json(&["client", "status", "--state", text(&ann), "--json"]);
    assert!(status["id"].as_str().is_some_and(|id| id.starts_with("spiffe://test.example/client/")), "{status}");
    assert_eq!((&status["zones"][0], &status["brokers"][0]["name"]), (&"internal".into(), &"b1".into()), "{status}");
    let said = shop.world.ok(&["client", "status", "--state", text(&ann)]);
    assert!(said.contains("attached") && said.contains("internal"), "{said}");
    let why = |state: &Path, target: &str| shop.world.ok(&["client", "why", target, "--state", text(state)]);
    let target = shop.target();
    assert!(why(&ann, &target).starts_with("you may use it, and a connector is there"));
    assert_eq!(why(&bob, &target), why(&bob, "none.internal:1"));
    assert_eq!(why(&ann, "shop.internal:1"), why(&bob, "none.internal:1"));
}

#[test]
fn a_workload_reaches_what_policy_gives_it_and_a_denial_is_explained_by_its_id() {
    let mut shop = Shop::prepare(1);
    let ledger = upper_case_server().port();
    let port = shop.app.port();
    let yaml = format!(
        "kind: Segment\nname: ledger\nhosts: [ledger.internal]\ntcp: [\"{ledger}\"]\nconnector_groups: [here]\n---\n\
         kind: Policy\nname: billing-ledger\ncedar: |\n  permit(principal == Workload::\"billing\", action == Action::\"connect\", resource in Segment::\"ledger\");\n"
    );
    let secret = shop.world.secret("workload", "billing");
    let output = shop.world.apply(&yaml);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    shop.world.connector("connector", &["shop.internal", "ledger.internal"]);
    let state = shop.world.path("billing");
    let web = shop.world.brokers[0].web.to_string();
    let enrolled = shop.world.json(&[
        "workload",
        "enrol",
        "--web",
        &web,
        "--secret",
        &secret,
        "--name",
        "billing-1",
        "--state",
        text(&state),
        "--json",
    ]);
    assert!(
        enrolled["spiffe"].as_str().is_some_and(|id| id.starts_with("spiffe://test.example/workload/")),
        "{enrolled}"
    );
    let ann = shop.world.client("ann", "ann@test.example");

    wait("the connector", || shop.nc(&state, "ledger.internal", ledger).0 == "HELLO\n");
    let (out, said, code) = shop.nc(&state, "shop.internal", port);
    assert_eq!((out.as_str(), code), ("", Some(1)), "{said}");
    assert_eq!(shop.nc(&ann, "ledger.internal", ledger).2, Some(1));
    assert_eq!(shop.nc(&ann, "shop.internal", port).0, "HELLO\n");

    let explain = |host: &str, port: u16| {
        let port = port.to_string();
        shop.world.run(&["explain", "--workload", "billing", "--host", host, "--port", &port])
    };
    let (yes, no) = (explain("ledger.internal", ledger), explain("shop.internal", port));
    assert_eq!((yes.status.code(), no.status.code()), (Some(0), Some(1)));
    assert!(String::from_utf8_lossy(&yes.stdout).contains("billing-ledger"));

    let journal = shop.world.ok(&["audit", "show", "--json"]);
    let records: Vec<serde_json::Value> =
        journal.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    let denied = |kind: &str| {
        let record = records
            .iter()
            .map(|record| &record["record"])
            .find(|record| record["reason"] == "no_permit" && record["party"]["initiator"] == kind);
        record.unwrap_or_else(|| panic!("a denial of a {kind} is recorded: {journal}"))
    };
    let (of_billing, of_ann) = (denied("workload"), denied("person"));
    assert_eq!(
        (of_billing["party"]["name"].as_str(), of_billing["host"].as_str()),
        (Some("billing"), Some("shop.internal"))
    );
    assert_eq!(
        (of_ann["party"]["name"].as_str(), of_ann["segment_name"].as_str()),
        (Some("ann@test.example"), Some("ledger"))
    );
    for (denial, who) in [(of_billing, "billing"), (of_ann, "ann@test.example")] {
        let explained = shop.world.run(&["explain", "--id", denial["denial"].as_str().expect("an id")]);
        assert_eq!(explained.status.code(), Some(1), "{}", String::from_utf8_lossy(&explained.stderr));
        let said = String::from_utf8_lossy(&explained.stdout);
        assert!(said.contains(who) && said.contains("no_permit"), "{said}");
    }
    assert_eq!(shop.world.run(&["explain", "--id", &"0".repeat(32)]).status.code(), Some(2));
}

#[test]
fn a_revoked_device_workload_or_connector_is_cut_and_takes_no_more_sessions() {
    let mut shop = Shop::open(1);
    let port = shop.app.port();
    let secret = shop.world.secret("workload", "billing");
    let policy = "kind: Policy\nname: billing-shop\ncedar: |\n  permit(principal == Workload::\"billing\", action == Action::\"connect\", resource in Segment::\"shop\");\n";
    assert!(shop.world.apply(policy).status.success());
    let state = shop.world.path("billing");
    let web = shop.world.brokers[0].web.to_string();
    shop.world.ok(&[
        "client",
        "enrol",
        "--kind",
        "workload",
        "--web",
        &web,
        "--secret",
        &secret,
        "--name",
        "billing-1",
        "--state",
        text(&state),
    ]);
    let (first, second) =
        (shop.world.client("first", "ann@test.example"), shop.world.client("second", "ann@test.example"));
    let of_first = shop.listener_via("listener-first", &first, &[]);
    let of_second = shop.listener_via("listener-second", &second, &[]);
    let of_billing = shop.listener_via("listener-billing", &state, &[]);
    let revoke = |kind: &str, name: &str| {
        let answer = shop.world.json(&["revoke", kind, name, "--wait", "enforced", "--json"]);
        assert_eq!(answer["enforced"]["complete"], true, "{answer}");
        assert_eq!(answer["enforced"]["receipts"][0]["name"], "b1", "{answer}");
    };
    let mut live = [of_first, of_second, of_billing].map(|address| exchange(address).expect("a session"));

    revoke("device", "first");
    assert!(cut_soon(&mut live[0]));
    assert!(exchange(of_first).is_err());
    goes_on(&mut live[1]);
    goes_on(&mut live[2]);

    revoke("workload", "billing");
    assert!(cut_soon(&mut live[2]));
    assert!(exchange(of_billing).is_err());
    goes_on(&mut live[1]);

    revoke("connector", "connector");
    assert!(cut_soon(&mut live[1]));
    shop.world.kill("listener-second");
    let (out, said, code) = shop.nc(&second, "shop.internal", port);
    assert_eq!((out.as_str(), code), ("", Some(2)), "{said}");
    assert!(said.contains("`shop.internal` is unavailable"), "{said}");
    // Another one takes its place.
    shop.world.connector("other", &["shop.internal"]);
    wait("the other connector", || shop.nc(&second, "shop.internal", port).0 == "HELLO\n");
}

#[test]
fn packets_go_to_an_application_and_each_sender_gets_its_own_answers() {
    let mut shop = Shop::prepare(1);
    let echo = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
    let port = echo.local_addr().expect("bound").port();
    std::thread::spawn(move || {
        let mut packet = [0; 65_536];
        while let Ok((len, from)) = echo.recv_from(&mut packet) {
            packet[..len].make_ascii_uppercase();
            let _ = echo.send_to(&packet[..len], from);
        }
    });
    let yaml = format!(
        "kind: Segment\nname: clock\nhosts: [clock.internal]\nudp: [\"{port}\"]\nconnector_groups: [here]\n---\n\
         kind: Policy\nname: sales-clock\ncedar: |\n  permit(principal in Group::\"sales\", action == Action::\"connect\", resource in Segment::\"clock\");\n"
    );
    let output = shop.world.apply(&yaml);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    shop.world.connector("connector", &["shop.internal", "clock.internal"]);
    let (ann, bob) = (shop.world.client("ann", "ann@test.example"), shop.world.client("bob", "bob@test.example"));
    let target = format!("clock.internal:{port}");
    let [of_ann, of_bob] = free_ports();
    for (name, listen, state) in [("udp-ann", of_ann, &ann), ("udp-bob", of_bob, &bob)] {
        let listen = listen.to_string();
        shop.world.spawn(name, &["client", "connect", &target, "--udp", "--listen", &listen, "--state", text(state)]);
    }
    let [one, other] = [(); 2].map(|()| UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port"));
    wait("a packet through and back", || ask(&one, of_ann, b"first").is_some_and(|answer| answer == b"FIRST"));
    // Late answers to what was sent before the session stood.
    while ask(&one, of_ann, b"now").is_some_and(|answer| answer != b"NOW") {}
    assert_eq!(ask(&other, of_ann, b"second").as_deref(), Some(b"SECOND".as_slice()));
    assert_eq!(ask(&one, of_ann, b"third").as_deref(), Some(b"THIRD".as_slice()));
    let long = vec![b'a'; 60_000];
    assert!(ask(&one, of_ann, &long).is_some_and(|answer| answer == vec![b'A'; 60_000]));
    let sessions = shop.world.json(&["session", "list", "--json"]);
    let sessions = sessions["sessions"].as_array().expect("a list");
    assert_eq!(sessions.len(), 1, "one session for all who send: {sessions:?}");
    assert_eq!(sessions[0]["transport"], "udp");

    assert_eq!(ask(&one, of_bob, b"denied"), None);
    wait("the refusal is told", || {
        let said = std::fs::read_to_string(shop.world.path("udp-bob.log")).expect("a log");
        said.contains("no such name `clock.internal`")
    });
}

#[test]
fn a_private_name_has_an_address_for_those_who_may_use_it_and_no_other_name_has() {
    let shop = Shop::open(1);
    let (ann, bob) = (shop.world.client("ann", "ann@test.example"), shop.world.client("bob", "bob@test.example"));
    let resolve = |state: &Path, host: &str| shop.world.run(&["client", "resolve", host, "--state", text(state)]);
    let out = |state: &Path, host: &str| String::from_utf8(resolve(state, host).stdout).expect("text");
    wait("the connector", || out(&ann, "shop.internal").trim().parse::<std::net::Ipv6Addr>().is_ok());
    assert_eq!(out(&ann, "shop.internal"), out(&ann, "Shop.Internal."), "the same name");
    let (denied, unknown) = (resolve(&bob, "shop.internal"), resolve(&ann, "none.internal"));
    assert_eq!((denied.status.code(), unknown.status.code()), (Some(1), Some(1)));
    let said = |stderr: &[u8]| String::from_utf8(stderr.to_vec()).expect("text");
    assert_eq!(said(&denied.stderr).replace("shop.", "none."), said(&unknown.stderr));
    assert!(denied.stdout.is_empty() && unknown.stdout.is_empty());
    let outside = resolve(&ann, "www.example.com");
    assert_eq!(outside.status.code(), Some(2), "left to the machine's own resolver");
}

/// Sends a packet, and waits a moment for an answer.
fn ask(socket: &UdpSocket, to: SocketAddr, packet: &[u8]) -> Option<Vec<u8>> {
    socket.set_read_timeout(Some(Duration::from_secs(2))).expect("set");
    socket.send_to(packet, to).expect("sent");
    let mut answer = vec![0; 65_536];
    let (len, from) = socket.recv_from(&mut answer).ok()?;
    assert_eq!(from, to);
    answer.truncate(len);
    Some(answer)
}

/// Ends or is reset, soon.
fn cut_soon(stream: &mut TcpStream) -> bool {
    let begun = Instant::now();
    is_cut(stream) && begun.elapsed() < CUT_WITHIN
}

fn goes_on(stream: &mut TcpStream) {
    assert_eq!(line(stream), "HELLO\n");
}

/// Sends a line; answers the line that comes back.
fn line(stream: &mut TcpStream) -> String {
    stream.write_all(b"hello\n").expect("taken");
    let mut answer = [0; 6];
    stream.read_exact(&mut answer).expect("an answer");
    String::from_utf8_lossy(&answer).into_owned()
}

/// Starts a proxy and waits until it listens.
fn proxy(shop: &mut Shop, name: &str, state: &Path) -> SocketAddr {
    let [address] = free_ports();
    shop.world.spawn(name, &["client", "proxy", "--listen", &address.to_string(), "--state", text(state)]);
    wait("the proxy", || TcpStream::connect(address).is_ok());
    address
}

fn dial(proxy: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(proxy).expect("the proxy listens");
    stream.set_read_timeout(Some(Duration::from_secs(15))).expect("set");
    stream
}

/// Asks a SOCKS5 proxy for a name; answers the stream and the reply.
fn socks(proxy: SocketAddr, host: &str, port: u16) -> (TcpStream, Vec<u8>) {
    let mut stream = dial(proxy);
    let len = u8::try_from(host.len()).expect("a short name");
    let request = [&[5, 1, 0, 5, 1, 0, 3, len], host.as_bytes(), &port.to_be_bytes()].concat();
    stream.write_all(&request).expect("taken");
    let mut answer = [0; 12];
    stream.read_exact(&mut answer).expect("a method and a reply");
    assert_eq!(answer[..2], [5, 0]);
    (stream, answer[2..].to_vec())
}

/// Asks an HTTP proxy for `host:port`; answers the stream and what it said.
fn http(proxy: SocketAddr, target: &str) -> (TcpStream, String) {
    let mut stream = dial(proxy);
    write!(stream, "CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n").expect("taken");
    let mut answer = Vec::new();
    let mut byte = [0];
    while !answer.ends_with(b"\r\n\r\n") && stream.read(&mut byte).expect("an answer") == 1 {
        answer.push(byte[0]);
    }
    if !answer.starts_with(b"HTTP/1.1 200 ") {
        stream.read_to_end(&mut answer).expect("the end of a refusal");
    }
    (stream, String::from_utf8(answer).expect("text"))
}
