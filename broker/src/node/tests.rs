//! Whole brokers in one process, on clocks that a test moves.

use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use metrics_exporter_prometheus::PrometheusBuilder;
use selvedge_cluster::{ShiftedClock, Status};
use selvedge_domain::command::CreateEnrolKey;
use selvedge_domain::rows::{Certificate, EnrolKind, Token};
use selvedge_domain::state::IndexKey;
use selvedge_domain::{Actor, Credential};
use selvedge_proto::https;
use selvedge_proto::identity::{Peer, SpiffeId};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::task::JoinHandle;
use tokio_rustls::TlsConnector;

use super::*;
use crate::config::{Config, Sources};
use crate::issuer::BROKER_LIFETIME_MS;
use crate::web::{EnrolSecret, sha256};

const DAY_MS: u64 = 24 * 3_600_000;
/// As long as nothing here should ever take.
const PATIENCE: Duration = Duration::from_secs(60);

/// One broker's machine: what is on its disk, and its process while it runs.
struct Machine {
    name: String,
    peer: SocketAddr,
    web: SocketAddr,
    config: PathBuf,
    /// Where its data is, and how often it was moved.
    data: (PathBuf, usize),
    clock: Arc<ShiftedClock>,
    running: Option<Running>,
    dir: TempDir,
}

struct Running {
    cluster: Cluster,
    stop: CancellationToken,
    ended: JoinHandle<Result<(), Error>>,
}

impl Machine {
    fn new(name: &str, clock: &Arc<ShiftedClock>) -> Self {
        tls::install_provider();
        let dir = TempDir::new().unwrap();
        let listeners = [(); 4].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        let [edge, web, peer, ops] = listeners.map(|listener| listener.local_addr().unwrap());
        let (config, data) = (dir.path().join("broker.toml"), dir.path().join("data"));
        let toml = format!(
            "data_dir = {:?}\nname = \"{name}\"\nregion = \"here\"\nhost = \"{name}.brokers.test\"\npreset = \"test\"\n\
             edge = {{ bind = \"{edge}\" }}\nweb = {{ bind = \"{web}\" }}\npeer = {{ bind = \"{peer}\" }}\nops = {{ bind = \"{ops}\" }}\n",
            data
        );
        std::fs::write(&config, toml).unwrap();
        Self { name: name.to_owned(), peer, web, config, data: (data, 0), clock: clock.clone(), running: None, dir }
    }

    fn configured(&self) -> Configured {
        let sources = Sources::file(&self.config);
        let loaded = Config::read(&sources).unwrap();
        Configured { sources, loaded, set_log: Box::new(|_| Ok(())) }
    }

    /// The owner's token, if this start made the cluster.
    async fn start(&mut self) -> Option<String> {
        let metrics = PrometheusBuilder::new().build_recorder().handle();
        let started = Broker::start_with_clock(self.configured(), metrics, self.clock.clone());
        let broker = tokio::time::timeout(PATIENCE, started).await.expect("it starts").unwrap();
        let token = broker.owner_token().map(str::to_owned);
        let (cluster, stop) = (broker.cluster.clone(), CancellationToken::new());
        let ended = tokio::spawn(broker.run_until(stop.clone(), CancellationToken::new()));
        self.running = Some(Running { cluster, stop, ended });
        token
    }

    async fn stop(&mut self) {
        let Running { cluster, stop, ended } = self.running.take().expect("it runs");
        stop.cancel();
        ended.await.unwrap().unwrap();
        drop(cluster);
        // A process that ends lets go of its directory; here the lock stays with whatever of the broker is still held. So
        // the disk is put into another machine.
        let (old, moved) = self.data.clone();
        let new = self.dir.path().join(format!("data-{}", moved + 1));
        copy(&old, &new);
        let toml = std::fs::read_to_string(&self.config).unwrap();
        std::fs::write(&self.config, toml.replace(&format!("{old:?}"), &format!("{new:?}"))).unwrap();
        self.data = (new, moved + 1);
    }

    fn cluster(&self) -> &Cluster {
        &self.running.as_ref().expect("it runs").cluster
    }

    fn status(&self) -> Status {
        self.cluster().status()
    }

    fn identity(&self) -> Identity {
        Identity::load(&home::identity_path(&self.configured().loaded.config)).unwrap()
    }

    /// Whom the peer listener shows to a broker.
    async fn shown(&self, caller: &Identity) -> Peer {
        let anchors = Arc::new(Home::load(&self.configured().loaded.config).unwrap().anchors);
        let clock = self.clock.clone();
        let time: TimeSource = Arc::new(move || clock.wall_ms());
        let dial = tls::peer_client(caller, &anchors, None, NotBefore::judged(), &time).unwrap();
        let stream = tokio::net::TcpStream::connect(self.peer).await.unwrap();
        let name = "127.0.0.1".try_into().unwrap();
        let stream = TlsConnector::from(Arc::new(dial)).connect(name, stream).await.unwrap();
        tls::peer_of(stream.get_ref().1).unwrap()
    }
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir(to).unwrap();
    std::fs::set_permissions(to, std::fs::metadata(from).unwrap().permissions()).unwrap();
    for entry in std::fs::read_dir(from).unwrap().map(Result::unwrap) {
        let (path, beside) = (entry.path(), to.join(entry.file_name()));
        if entry.file_type().unwrap().is_dir() {
            copy(&path, &beside);
        } else {
            std::fs::copy(&path, &beside).unwrap();
        }
    }
}

/// A cluster of brokers on one clock.
struct House {
    clock: Arc<ShiftedClock>,
    owner: String,
    pin: selvedge_proto::identity::Pin,
    machines: Vec<Machine>,
}

impl House {
    async fn new() -> Self {
        let clock = Arc::new(ShiftedClock::default());
        let mut first = Machine::new("b1", &clock);
        init(&first.configured().loaded.config, &InitOptions::new("demo.test")).unwrap();
        let pin = Home::load(&first.configured().loaded.config).unwrap().anchors.pin();
        let owner = first.start().await.expect("the first start makes the cluster");
        Self { clock, owner, pin, machines: vec![first] }
    }

    async fn of(count: usize) -> Self {
        let mut house = Self::new().await;
        while house.machines.len() < count {
            house.join("").await;
        }
        house
    }

    /// Another broker, with the roles that its join token gives it.
    async fn join(&mut self, roles: &str) -> usize {
        let mut machine = Machine::new(&format!("b{}", self.machines.len() + 1), &self.clock);
        let secret = EnrolSecret::generate(&self.pin).unwrap();
        let secret = secret.reveal();
        let key = CreateEnrolKey {
            kind: EnrolKind::Broker as i32,
            name: machine.name.clone(),
            target: roles.to_owned(),
            secret_sha256: sha256(secret),
            uses_max: 1,
            life_ms: 3_600_000,
        };
        let cluster = self.machines[0].cluster();
        cluster.propose(self.as_owner(), Body::CreateEnrolKey(key), None).await.unwrap();
        let request = join_request(&machine.configured().loaded.config).unwrap();
        let body = json!({
            "secret": secret, "kind": "broker", "name": machine.name, "csr": STANDARD.encode(&request.csr),
            "node": request.node.to_string(),
        });
        let clock = self.clock.clone();
        let time: TimeSource = Arc::new(move || clock.wall_ms());
        let web = self.machines[0].web.to_string();
        let answer = https::post(&web, self.pin, &time, "/enrol/v1", &body.to_string()).await.unwrap();
        assert_eq!(answer.0, 201, "{}", String::from_utf8_lossy(&answer.1));
        let answer: Value = serde_json::from_slice(&answer.1).unwrap();
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        let seed = |peer: &Value| Seed { node: text(&peer["node"]).parse().unwrap(), peer: text(&peer["peer"]) };
        let reply = JoinReply {
            chain_pem: answer["chain"].as_array().unwrap().iter().map(text).collect(),
            anchors: serde_json::from_value(answer["anchors"].clone()).unwrap(),
            issuer_sealed: answer["issuer_sealed"].as_str().map(|sealed| STANDARD.decode(sealed).unwrap()),
            seeds: answer["peers"].as_array().unwrap().iter().map(seed).collect(),
            roles: BrokerRole::parse_list(
                &answer["roles"].as_array().unwrap().iter().map(text).collect::<Vec<_>>().join(","),
            )
            .unwrap(),
        };
        join_complete(&machine.configured().loaded.config, &request, &reply, secret).unwrap();
        machine.start().await;
        self.machines.push(machine);
        self.machines.len() - 1
    }

    fn as_owner(&self) -> Asker {
        let owner = self.machines[0].cluster().state().find::<Token>(IndexKey::name("owner")).unwrap();
        Asker::holder(Actor::token(owner.id(), owner.generation), Credential::new(self.owner.as_str()))
    }

    /// Removes a broker for ever, as the API does.
    async fn remove(&self, at: usize, node: u64) {
        let cluster = self.machines[at].cluster();
        cluster.propose(self.as_owner(), Body::RemoveBroker { node }, None).await.unwrap();
        cluster.remove(&self.as_owner(), node).await.unwrap();
    }

    /// Lets days pass; every broker that runs has a certificate that is good for long when it returns.
    async fn pass(&self, days: u64) {
        let running = || self.machines.iter().filter(|machine| machine.running.is_some());
        for _ in 0..days {
            self.clock.advance(DAY_MS);
            let now_ms = self.clock.wall_ms();
            let all_fresh = || running().all(|machine| machine.identity().renewal_due_ms().unwrap() > now_ms);
            until("every broker's certificate is renewed", all_fresh).await;
        }
    }
}

async fn until(what: &str, condition: impl Fn() -> bool) {
    let begun = Instant::now();
    while !condition() {
        assert!(begun.elapsed() < PATIENCE, "waited in vain until {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn knows(machine: &Machine, certificate: &Identity) -> bool {
    let serial = certificate.peer().unwrap().serial;
    machine.cluster().state().row::<Certificate>(serial.as_bytes()).is_some()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_renews_its_certificate_and_shows_the_new_one_without_a_restart() {
    let mut house = House::new().await;
    let first = house.machines[0].identity();
    until("the log knows the certificate that was made before it", || knows(&house.machines[0], &first)).await;
    house.clock.advance(BROKER_LIFETIME_MS / 3 - DAY_MS);
    let next = house.join("").await;
    let broker = &house.machines[0];
    assert_eq!(broker.identity().peer().unwrap(), first.peer().unwrap(), "not before a third of its life");
    house.clock.advance(DAY_MS);
    until("it has another", || broker.identity().peer().unwrap() != first.peer().unwrap()).await;
    let (new, before) = (broker.identity(), first.peer().unwrap());
    let now = new.peer().unwrap();
    assert_eq!(now.id, before.id);
    assert_ne!(now.spki_sha256, before.spki_sha256, "with a new key");
    assert!(now.not_after_ms > before.not_after_ms);
    assert!(knows(broker, &new), "and the log knew it first");
    let other = house.machines[next].identity();
    // It is on disk a moment before it is shown.
    let begun = Instant::now();
    while broker.shown(&other).await != now {
        assert!(begun.elapsed() < PATIENCE, "its listener does not show it");
    }
    // Its calls carry it: the other accepts nothing else once the old one has ended.
    house.pass(25).await;
    house.machines[next].cluster().linearizable(PATIENCE).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_slept_longer_than_its_certificate_rejoins_by_itself() {
    let mut house = House::of(3).await;
    let sleeper = house.machines[2].identity();
    house.machines[2].stop().await;
    house.pass(BROKER_LIFETIME_MS / DAY_MS + 5).await;
    assert!(sleeper.validity_ms().unwrap().1 < house.clock.wall_ms(), "its certificate has ended");
    house.machines[2].start().await;
    let back = &house.machines[2];
    back.cluster().linearizable(PATIENCE).await.unwrap();
    let new = back.identity();
    assert_ne!(new.peer().unwrap().serial, sleeper.peer().unwrap().serial);
    until("the log learns of the certificate", || knows(&house.machines[0], &new)).await;
    let id: SpiffeId = new.peer().unwrap().id;
    assert_eq!(id, sleeper.peer().unwrap().id);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_slept_through_a_replacement_and_a_week_of_certificates_rejoins_by_itself() {
    let mut house = House::of(3).await;
    let node = |house: &House, at: usize| house.machines[at].cluster().node();
    let removed = node(&house, 1);
    house.machines[2].stop().await;
    // A fourth takes the place of the second, which ends when it hears of it.
    let next = house.join("").await;
    house.remove(0, removed).await;
    let gone = house.machines[1].running.take().expect("it runs");
    let ended = tokio::time::timeout(PATIENCE, gone.ended).await.expect("it ends by itself").unwrap();
    assert!(matches!(ended, Err(Error::Fatal(selvedge_cluster::Fatal::Removed))), "{ended:?}");
    let moved = house.machines[0].cluster().transfer_leader(&house.as_owner(), Some(node(&house, next))).await;
    moved.unwrap();
    house.pass(11).await;
    house.machines[2].start().await;
    let back = &house.machines[2];
    back.cluster().linearizable(PATIENCE).await.unwrap();
    let members: Vec<u64> = back.status().members.iter().map(|member| member.node).collect();
    assert_eq!(members.len(), 3);
    assert!(!members.contains(&removed));
    assert!(back.status().members.iter().all(|member| member.voter));
    // And it counts: with the newest one gone, the two old ones are the majority.
    house.machines[next].stop().await;
    house.machines[2].cluster().linearizable(PATIENCE).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_without_the_role_is_no_issuer_and_is_certified_by_one() {
    let mut house = House::new().await;
    // Without a vote, so that the other goes on alone while it sleeps.
    let at = house.join("edge").await;
    let other = &house.machines[at];
    assert!(!other.configured().loaded.config.issuer_dir().exists(), "it was given no keys");
    assert!(TcpListener::bind(other.web).is_ok(), "it has no web listener");
    let first = other.identity();
    house.pass(BROKER_LIFETIME_MS / DAY_MS / 3 + 1).await;
    let other = &house.machines[at];
    let new = other.identity();
    assert_ne!(new.peer().unwrap().spki_sha256, first.peer().unwrap().spki_sha256);
    assert!(knows(&house.machines[0], &new));
    // Also after it slept for longer than its certificate.
    house.machines[at].stop().await;
    house.pass(BROKER_LIFETIME_MS / DAY_MS + 5).await;
    house.machines[at].start().await;
    house.machines[at].cluster().linearizable(PATIENCE).await.unwrap();
}
