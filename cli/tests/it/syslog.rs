//! The audit stream at a real syslog receiver.

use std::collections::BTreeSet;
use std::io::Read as _;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use crate::world::{World, free_ports, text, wait};

#[test]
fn every_record_reaches_rsyslog_also_those_made_while_it_was_away() {
    let Some(rsyslogd) = tool("rsyslogd") else { return skip("every_record_reaches_rsyslog", "rsyslog") };
    let world = World::start(Path::new(env!("CARGO_BIN_EXE_selvedge")), 1);
    let [address] = free_ports();
    let file = world.path("received.log");
    let config = world.path("rsyslog.conf");
    let port = address.port();
    std::fs::write(
        &config,
        format!(
            "global(workDirectory={:?} maxMessageSize=\"64k\")\nmodule(load=\"imtcp\")\ntemplate(name=\"raw\" type=\"string\" string=\"%rawmsg%\\n\")\n\
             input(type=\"imtcp\" address=\"127.0.0.1\" port=\"{port}\")\naction(type=\"omfile\" file={file:?} template=\"raw\")\n",
            world.path("")
        ),
    )
    .expect("a configuration");
    let pid_file = world.path("rsyslog.pid");
    let start = || {
        Receiver(
            Command::new(&rsyslogd)
                .args(["-n", "-f", text(&config), "-i", text(&pid_file)])
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .expect("rsyslogd"),
        )
    };
    let mut receiver = start();
    let output = world.apply(&format!("kind: Receiver\nname: siem\naddress: {address}\n"));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let token = world.directory("people");
    world.user(&token, "before@test.example");
    wait("the first records", || received(&file).len() >= 3);
    receiver.stop();
    for number in 0..20 {
        world.user(&token, &format!("away{number}@test.example"));
    }
    let _receiver = start();
    world.user(&token, "after@test.example");
    let journal = ids(&world.ok(&["audit", "show", "--json"]));
    assert!(journal.len() >= 24, "{}", journal.len());
    wait("all records", || journal.is_subset(&received(&file)));
    let verified = world.run(&["audit", "verify", text(&world.path("b1").join("audit"))]);
    assert!(verified.status.success(), "{}", String::from_utf8_lossy(&verified.stderr));
}

#[test]
fn a_receiver_with_tls_gets_every_record_and_one_with_another_name_gets_none() {
    let certified = rcgen::generate_simple_self_signed(vec!["siem.test".to_owned()]).expect("a certificate");
    let (named, misnamed) = (TlsReceiver::start(&certified), TlsReceiver::start(&certified));
    let world = World::start(Path::new(env!("CARGO_BIN_EXE_selvedge")), 1);
    let ca: String = certified.cert.pem().lines().map(|line| format!("  {line}\n")).collect();
    let receiver = |name: &str, address, tls_name: &str| {
        let yaml = format!("kind: Receiver\nname: {name}\naddress: {address}\ntls_name: {tls_name}\ntls_ca: |\n{ca}");
        let output = world.apply(&yaml);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    receiver("misnamed", misnamed.address, "other.test");
    receiver("siem", named.address, "siem.test");
    world.directory("people");
    let journal = ids(&world.ok(&["audit", "show", "--json"]));
    assert!(journal.len() >= 3, "{}", journal.len());
    wait("all records", || journal.is_subset(&named.ids()));
    wait("an attempt at the other", || misnamed.attempts.load(Ordering::Relaxed) > 0);
    assert!(misnamed.ids().is_empty(), "whose name is not in the certificate is sent nothing");
}

/// A TLS server that keeps what it is sent.
struct TlsReceiver {
    address: SocketAddr,
    received: Arc<Mutex<Vec<u8>>>,
    attempts: Arc<AtomicUsize>,
}

impl TlsReceiver {
    fn start(certified: &rcgen::CertifiedKey<rcgen::KeyPair>) -> Self {
        let key = rustls::pki_types::PrivateKeyDer::try_from(certified.signing_key.serialize_der()).expect("a key");
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .expect("TLS 1.3")
            .with_no_client_auth()
            .with_single_cert(vec![certified.cert.der().clone()], key)
            .expect("a certificate and its key");
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
        let address = listener.local_addr().expect("bound");
        let (received, attempts) = (Arc::<Mutex<Vec<u8>>>::default(), Arc::<AtomicUsize>::default());
        let (config, kept, counted) = (Arc::new(config), received.clone(), attempts.clone());
        std::thread::spawn(move || {
            for mut socket in listener.incoming().flatten() {
                counted.fetch_add(1, Ordering::Relaxed);
                let mut connection = rustls::ServerConnection::new(config.clone()).expect("a connection");
                let mut stream = rustls::Stream::new(&mut connection, &mut socket);
                let mut buffer = [0; 16 << 10];
                while let Ok(read @ 1..) = stream.read(&mut buffer) {
                    kept.lock().expect("not poisoned").extend_from_slice(&buffer[..read]);
                }
            }
        });
        Self { address, received, attempts }
    }

    fn ids(&self) -> BTreeSet<String> {
        ids(&String::from_utf8_lossy(&self.received.lock().expect("not poisoned")))
    }
}

struct Receiver(Child);

impl Receiver {
    fn stop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Ids in what was received; `"id":"stream/seq"` stands in each message.
fn received(file: &Path) -> BTreeSet<String> {
    ids(&std::fs::read_to_string(file).unwrap_or_default())
}

fn ids(text: &str) -> BTreeSet<String> {
    text.split("\"id\":\"")
        .skip(1)
        .filter_map(|rest| rest.split_once('"'))
        .map(|(id, _)| id.to_owned())
        .filter(|id| id.contains('/'))
        .collect()
}

/// The path of an unpacked server.
pub fn tool(name: &str) -> Option<PathBuf> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/tool");
    let output = Command::new(script).arg(name).output().ok()?;
    let path = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| PathBuf::from(path.trim().lines().last().unwrap_or_default()))
}

/// Counts a skipped test.
pub fn skip(test: &str, needs: &str) {
    use std::io::Write as _;
    println!("SKIP {test}: needs {needs}");
    if let Some(file) = std::env::var_os("SELVEDGE_SKIPS") {
        let file = std::fs::File::options().append(true).create(true).open(file);
        writeln!(file.expect("the list of skips"), "SKIP {test}: needs {needs}").expect("the list of skips is written");
    }
}
