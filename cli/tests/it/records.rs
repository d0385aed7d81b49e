//! What is recorded of each thing that happens, as a log receiver gets it.

use std::io::Read as _;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::sync::{Arc, Mutex};

use serde_json::Value;

use crate::shop::Shop;
use crate::world::wait;

#[test]
fn the_beginning_and_the_end_of_a_session_and_a_denial_are_recorded_and_delivered() {
    let siem = Siem::start();
    let shop = Shop::open(1);
    let receiver = format!("kind: Receiver\nname: siem\naddress: {}\n", siem.address);
    assert!(shop.world.apply(&receiver).status.success());
    let (ann, bob) = (shop.world.client("ann", "ann@test.example"), shop.world.client("bob", "bob@test.example"));
    let port = shop.app.port();

    wait("a session", || shop.nc(&ann, "shop.internal", port).0 == "HELLO\n");
    let open = siem.first("session.open", |record| record["party"]["name"] == "ann@test.example");
    assert_eq!((open["host"].as_str(), open["port"].as_u64()), (Some("shop.internal"), Some(port.into())));
    assert_eq!((&open["policies"][0], &open["segment_name"]), (&"sales-shop".into(), &"shop".into()));
    let close = siem.first("session.close", |record| record["session"] == open["session"]);
    assert_eq!((close["up_bytes"].as_u64() > Some(0), close["down_bytes"].as_u64() > Some(0)), (true, true));

    shop.nc(&bob, "shop.internal", port);
    let denied = siem.first("session.denied", |record| record["party"]["name"] == "bob@test.example");
    assert_eq!((&denied["host"], denied["reason"].is_string()), (&"shop.internal".into(), true));
}

/// A receiver of RFC 5424 over TCP with octet counting that keeps the records.
struct Siem {
    address: SocketAddr,
    records: Arc<Mutex<Vec<Value>>>,
}

impl Siem {
    fn start() -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
        let address = listener.local_addr().expect("bound");
        let records = Arc::<Mutex<Vec<Value>>>::default();
        let kept = records.clone();
        std::thread::spawn(move || {
            for mut socket in listener.incoming().flatten() {
                let mut buffer = Vec::new();
                let mut chunk = [0; 16 << 10];
                while let Ok(read @ 1..) = socket.read(&mut chunk) {
                    buffer.extend_from_slice(&chunk[..read]);
                    while let Some(message) = take(&mut buffer) {
                        let body = &message[message.find('{').expect("a body")..];
                        let mut body: Value = serde_json::from_str(body).expect("JSON");
                        kept.lock().expect("not poisoned").push(body["record"].take());
                    }
                }
            }
        });
        Self { address, records }
    }

    fn all(&self, kind: &str) -> Vec<Value> {
        let records = self.records.lock().expect("not poisoned");
        records.iter().filter(|record| record["kind"] == kind).cloned().collect()
    }

    /// The first record of a kind that is the one, once it has come.
    fn first(&self, kind: &str, is: impl Fn(&Value) -> bool) -> Value {
        let mut found = None;
        wait(kind, || {
            found = self.all(kind).into_iter().find(&is);
            found.is_some()
        });
        found.expect("waited for")
    }
}

/// The next message, when it is whole.
fn take(buffer: &mut Vec<u8>) -> Option<String> {
    let space = buffer.iter().position(|byte| *byte == b' ')?;
    let length: usize = std::str::from_utf8(&buffer[..space]).expect("digits").parse().expect("an octet count");
    (buffer.len() > space + length).then(|| {
        let message = buffer.drain(..=space + length).skip(space + 1).collect();
        String::from_utf8(message).expect("text")
    })
}
