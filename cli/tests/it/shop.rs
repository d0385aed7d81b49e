//! A world with one application that answers in upper case, and the people who may use it.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use serde_json::json;

use crate::world::{World, free_ports, text, wait};

/// A world with one application, reachable for the group `sales`, and the directory's token.
pub struct Shop {
    pub world: World,
    pub token: String,
    pub app: SocketAddr,
    pub ann: String,
    pub group: String,
}

impl Shop {
    /// With one connector.
    pub fn open(brokers: usize) -> Self {
        let mut shop = Self::prepare(brokers);
        shop.world.connector("connector", &["shop.internal"]);
        shop
    }

    /// With no connector yet.
    pub fn prepare(brokers: usize) -> Self {
        let app = upper_case_server();
        let world = World::start(Path::new(env!("CARGO_BIN_EXE_selvedge")), brokers);
        let token = world.directory("people");
        let ann = world.user(&token, "ann@test.example");
        world.user(&token, "bob@test.example");
        let group = world.group(&token, "sales", &[&ann]);
        world.apply_segments(&[("shop", "shop.internal", app.port())]);
        let policy = "kind: Policy\nname: sales-shop\ncedar: |\n  permit(principal in Group::\"sales\", action == Action::\"connect\", resource in Segment::\"shop\");\n";
        let output = world.apply(policy);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Self { world, token, app, ann, group }
    }

    pub fn target(&self) -> String {
        format!("shop.internal:{}", self.app.port())
    }

    /// What `client nc` prints and says for one line sent, and its exit code.
    pub fn nc(&self, state: &Path, host: &str, port: u16) -> (String, String, Option<i32>) {
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
    pub fn listener(&mut self, state: &Path) -> SocketAddr {
        self.listener_via("listener", state, &[])
    }

    /// A client's listener in a child of this name, that dials brokers where `via` says.
    pub fn listener_via(&mut self, name: &str, state: &Path, via: &[(&str, SocketAddr)]) -> SocketAddr {
        let [address] = free_ports();
        let (target, listen) = (self.target(), address.to_string());
        let via: Vec<String> = via.iter().map(|(broker, address)| format!("{broker}={address}")).collect();
        let mut args = vec!["client", "connect", &target, "--listen", &listen, "--state", text(state)];
        via.iter().for_each(|via| args.extend(["--via", via]));
        self.world.spawn(name, &args);
        wait("a session", || exchange(address).is_ok());
        address
    }

    /// Changes a SCIM resource through broker `number`.
    pub fn patch(&self, number: usize, path: &str, operations: serde_json::Value) {
        let body = json!({"schemas": ["urn:ietf:params:scim:api:messages:2.0:PatchOp"], "Operations": operations});
        let (status, answer) = self.world.http(number, "PATCH", path, &self.token, Some(body));
        assert!(status == 200 || status == 204, "{status} {answer}");
    }
}

/// Sends a line and gets it back in upper case.
pub fn exchange(address: SocketAddr) -> std::io::Result<TcpStream> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    stream.write_all(b"hello\n")?;
    let mut answer = [0; 6];
    stream.read_exact(&mut answer)?;
    assert_eq!(&answer, b"HELLO\n");
    Ok(stream)
}

/// Whether the stream ends or is reset, without another byte.
pub fn is_cut(stream: &mut TcpStream) -> bool {
    match stream.read(&mut [0]) {
        Ok(read) => read == 0,
        Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
    }
}

/// Answers each line in upper case.
pub fn upper_case_server() -> SocketAddr {
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
