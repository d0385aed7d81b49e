//! The edge on a real listener, over a state that is changed by real commands, with ends that speak the real protocol.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use hyper_util::rt::TokioIo;
use selvedge_cluster::PeerChannel;
use selvedge_domain::command::{
    Apply, ApplyPut, CertificateIssued, CreateEnrolKey, Enrol, InitCluster, PutBroker, Subject, UserFields,
};
use selvedge_domain::rows::{BrokerRole, EnrolKind};
use selvedge_domain::{Actor, ActorKind, Body, Changes, Command, Id, Outcome, State, policy, spec};
use selvedge_proto::control::control_client::ControlClient;
use selvedge_proto::control::from_broker::Message as FromB;
use selvedge_proto::control::from_end::Message as FromE;
use selvedge_proto::control::{CutDone, DialAnswer, FromBroker, FromEnd, Hello, LoginGrant, Open, Pong, Resolve};
use selvedge_proto::frame::SessionCode;
use selvedge_proto::hello::{ALPN_CONTROL, ALPN_HOP, Ticket, ticket_hello};
use selvedge_proto::identity::Kind;
use selvedge_proto::relay::relay_client::RelayClient;
use selvedge_proto::{grant, tls};
use selvedge_storage::audit::Reader;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

use super::{Edge, Ground, Parts, knock};
use crate::audit::{Log, Record};
use crate::decision::Decider;
use crate::issuer::{Issuer, Seal};
use crate::relay::Relay;
use crate::routing::Routing;

const NODE: u64 = 7;
const DEADLINE: Duration = Duration::from_secs(10);

struct TestGround {
    states: watch::Sender<Arc<State>>,
    changes: parking_lot::Mutex<()>,
    lease: AtomicBool,
    renewed: watch::Sender<u64>,
    now_ms: u64,
}

impl TestGround {
    /// Applies a command, and gives back what it led to.
    fn apply(&self, actor: Actor, body: Body) -> (Vec<Id>, Changes) {
        let _one = self.changes.lock();
        let mut state = State::clone(&self.states.borrow());
        let mut changes = Changes::default();
        let command = Command { actor, proposer: NODE, dedupe: None, body };
        let outcome = state.apply(self.now_ms, &command, &mut changes);
        self.states.send_replace(Arc::new(state));
        match outcome {
            Outcome::Done { ids, .. } => (ids, changes),
            Outcome::Refused(rejected) => panic!("{rejected}"),
        }
    }
}

#[async_trait]
impl Ground for TestGround {
    fn node(&self) -> u64 {
        NODE
    }
    fn now_ms(&self) -> u64 {
        self.now_ms
    }
    fn state(&self) -> Arc<State> {
        self.states.borrow().clone()
    }
    fn subscribe(&self) -> watch::Receiver<Arc<State>> {
        self.states.subscribe()
    }
    fn lease_open(&self) -> bool {
        self.lease.load(Ordering::SeqCst)
    }
    fn lease_left_ms(&self) -> u64 {
        if self.lease_open() { 5_000 } else { 0 }
    }
    fn lease_renewed(&self) -> watch::Receiver<u64> {
        self.renewed.subscribe()
    }
    async fn propose(&self, body: Body) -> Result<(), String> {
        self.apply(Actor::BROKER, body);
        Ok(())
    }
    fn relay(&self, _node: u64) -> Option<RelayClient<PeerChannel>> {
        None
    }
}

struct World {
    ground: Arc<TestGround>,
    issuer: Arc<Issuer>,
    edge: Arc<Edge>,
    at: SocketAddr,
    owner: Actor,
    directory: Actor,
    user: Id,
    client: Member,
    connector: Member,
    stop: CancellationToken,
    dir: tempfile::TempDir,
}

impl Drop for World {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

struct Member {
    id: Id,
    kind: Kind,
    identity: tls::Identity,
    grants: Vec<Vec<u8>>,
}

fn enrol(ground: &TestGround, issuer: &Issuer, owner: &Actor, kind: EnrolKind, target: &str) -> Member {
    let secret = tls::new_key_and_csr().unwrap().1;
    let secret = selvedge_proto::identity::sha256(&secret);
    let key = CreateEnrolKey {
        kind: kind as i32,
        name: target.into(),
        target: target.into(),
        secret_sha256: secret,
        uses_max: 1,
        life_ms: 60_000,
    };
    ground.apply(owner.clone(), Body::CreateEnrolKey(key));
    let (key_pem, csr) = tls::new_key_and_csr().unwrap();
    let enrolment = Actor { kind: ActorKind::Enrolment, id: None, generation: 0 };
    let asked = Enrol { secret_sha256: secret, kind: kind as i32, key_sha256: [9; 32], name: "one".into(), node: 0 };
    let id = ground.apply(enrolment, Body::Enrol(asked)).0[0];
    let (kind, of) = match kind {
        EnrolKind::Device => (Kind::Client, Subject::Device(id)),
        EnrolKind::Workload => (Kind::Workload, Subject::Workload(id)),
        _ => (Kind::Connector, Subject::Connector(id)),
    };
    let issued = issuer.issue(kind, &id.to_string(), &csr, ground.now_ms).unwrap();
    ground.apply(
        Actor::BROKER,
        Body::CertificateIssued(CertificateIssued {
            serial: issued.serial.clone(),
            subject: issued.id.to_string(),
            key_sha256: issued.spki_sha256,
            not_after_ms: issued.not_after_ms,
            of,
        }),
    );
    let identity = tls::Identity::from_pem(&format!("{}{}", issued.chain_pem, *key_pem)).unwrap();
    Member { id, kind, identity, grants: Vec::new() }
}

async fn world() -> World {
    let dir = tempfile::tempdir().unwrap();
    let now_ms = (tls::system_time())();
    let seal = Seal::File(dir.path().join("seal"));
    let (issuer, _root) = Issuer::create(&dir.path().join("issuer"), &seal, "demo.test", [1; 16], now_ms).unwrap();
    let issuer = Arc::new(issuer);
    let ground = Arc::new(TestGround {
        states: watch::Sender::new(Arc::new(State::default())),
        changes: parking_lot::Mutex::new(()),
        lease: AtomicBool::new(true),
        renewed: watch::Sender::new(0),
        now_ms,
    });
    let init = InitCluster {
        cluster_id: [1; 16],
        trust_domain: "demo.test".into(),
        anchors: issuer.anchors().to_json().into_bytes(),
        owner_sha256: [2; 32],
        knock_secret: [3; 32],
        lease_ms: 10_000,
        hold_ms: 30_000,
    };
    let owner_id = ground.apply(Actor::BOOTSTRAP, Body::InitCluster(init)).0[0];
    let owner = Actor::token(owner_id, 1);
    let put = PutBroker {
        node: NODE,
        name: "b1".into(),
        region: "here".into(),
        host: "b1.demo.test".into(),
        edge: "127.0.0.1:1".into(),
        web: "127.0.0.1:2".into(),
        peer: "127.0.0.1:3".into(),
        roles: [BrokerRole::Voter, BrokerRole::Issuer, BrokerRole::Web, BrokerRole::Edge].map(|r| r as i32).into(),
    };
    ground.apply(Actor::BOOTSTRAP, Body::PutBroker(put));
    let directory = Body::PutDirectory { name: "corp".into(), token_sha256: [4; 32] };
    let directory = Actor::directory(ground.apply(owner.clone(), directory).0[0], 1);
    let fields = user_fields(true);
    let user = ground.apply(directory.clone(), Body::CreateUser(fields)).0[0];
    apply(&ground, &owner, r#"permit(principal == User::"ann@demo.test", action, resource in Segment::"crm");"#);

    let connector = enrol(&ground, &issuer, &owner, EnrolKind::Connector, "dc");
    let mut client = enrol(&ground, &issuer, &owner, EnrolKind::Device, "ann@demo.test");
    let login = LoginGrant {
        version: grant::GRANT_VERSION,
        user: user.to_string(),
        user_generation: generation_of(&ground, user),
        device: client.id.to_string(),
        device_key_sha256: client.identity.peer().unwrap().spki_sha256.to_vec(),
        login_ms: now_ms,
        expires_ms: now_ms + 3_600_000,
        method: "code".into(),
        directory: "corp".into(),
        epoch: 1,
        ..LoginGrant::default()
    };
    client.grants = vec![grant::sign(&login, |bytes| issuer.sign_grant(bytes)).unwrap()];

    let (key_pem, csr) = tls::new_key_and_csr().unwrap();
    let issued = issuer.issue_broker(&NODE.to_string(), &["b1.demo.test".into()], &csr, now_ms).unwrap();
    let identity = tls::Identity::from_pem(&format!("{}{}", issued.chain_pem, *key_pem)).unwrap();
    let anchors = Arc::new(issuer.anchors().clone());
    let config = tls::edge_server(&identity, &anchors, vec![tls::CONTROL_ALPN.to_vec()], &tls::system_time()).unwrap();
    let stream = selvedge_storage::audit::StreamId { broker: NODE, boot: 1 };
    let journal =
        selvedge_storage::audit::Journal::open(&dir.path().join("audit"), stream, Default::default()).unwrap();
    let edge = Edge::new(Parts {
        name: "b1".into(),
        region: "here".into(),
        ground: ground.clone(),
        anchors,
        tls: watch::Sender::new(Arc::new(config)).subscribe(),
        audit: Log::new(Arc::new(journal), Arc::new(move || now_ms)),
        issuer: Some(issuer.clone()),
        decider: Decider::new(),
        routing: Routing::new(NODE),
        relay: Relay::new(4),
    });
    edge.routing.set_own(true, false);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    let stop = CancellationToken::new();
    let (serving, stopped) = (edge.clone(), stop.clone());
    tokio::spawn(async move { serving.serve(listener, stopped).await });
    World { ground, issuer, edge, at, owner, directory, user, client, connector, stop, dir }
}

fn user_fields(active: bool) -> UserFields {
    UserFields {
        user_name: "ann@demo.test".into(),
        external_id: String::new(),
        display_name: "Ann".into(),
        active,
        attributes: "{}".into(),
    }
}

fn generation_of(ground: &TestGround, user: Id) -> u64 {
    ground.state().by_id::<selvedge_domain::rows::User>(user).unwrap().generation
}

fn apply(ground: &TestGround, owner: &Actor, cedar: &str) -> Changes {
    let rule = spec::Policy { name: "crm".into(), cedar: cedar.into(), simulate: false };
    let compiled = policy::compile(&rule).unwrap();
    let segment = |name: &str, host: &str, groups: &[&str]| {
        spec::Object::Segment(spec::Segment {
            name: name.into(),
            hosts: vec![host.into()],
            networks: Vec::new(),
            tcp: vec!["80".into()],
            udp: Vec::new(),
            inclusive: false,
            connector_groups: groups.iter().map(|group| (*group).to_owned()).collect(),
            groups: Vec::new(),
            idle_timeout_s: 0,
            absolute_timeout_s: 0,
        })
    };
    let puts = vec![
        (spec::Object::Region(spec::Region { name: "here".into(), latitude: 0.0, longitude: 0.0 }), None),
        (spec::Object::Zone(spec::Zone { name: "internal".into() }), None),
        (spec::Object::ConnectorGroup(spec::ConnectorGroup { name: "dc".into(), region: "here".into() }), None),
        (segment("crm", "crm.internal", &["dc"]), None),
        (segment("hr", "hr.internal", &["dc"]), None),
        (spec::Object::Policy(rule), Some(compiled)),
    ];
    let puts = puts.into_iter().map(|(object, compiled)| ApplyPut { object, compiled }).collect();
    ground.apply(owner.clone(), Body::Apply(Apply { puts, deletes: Vec::new(), expect_revision: None })).1
}

/// One attached end of a test.
struct Attached {
    out: mpsc::Sender<FromEnd>,
    messages: tonic::Streaming<FromBroker>,
    tickets: Vec<Ticket>,
}

impl Attached {
    async fn send(&self, message: FromE) {
        self.out.send(FromEnd { message: Some(message) }).await.unwrap();
    }

    /// The next message that `pick` takes; pings are answered and tickets kept meanwhile.
    async fn until<T>(&mut self, mut pick: impl FnMut(&FromB) -> Option<T>) -> T {
        let found = tokio::time::timeout(DEADLINE, async {
            loop {
                let message = self.messages.message().await.unwrap().expect("the stream goes on").message.unwrap();
                if let FromB::Ping(ping) = &message {
                    self.send(FromE::Pong(Pong { nonce: ping.nonce })).await;
                }
                if let FromB::Tickets(tickets) = &message {
                    self.tickets.extend(tickets.tickets.iter().map(|t| Ticket::from_bytes(t).unwrap()));
                }
                if let Some(found) = pick(&message) {
                    return found;
                }
            }
        });
        found.await.expect("the message comes in time")
    }

    async fn has_ended(&mut self) {
        let ended = tokio::time::timeout(DEADLINE, async { while let Ok(Some(_)) = self.messages.message().await {} });
        ended.await.expect("the stream ends in time");
    }

    async fn ticket(&mut self) -> Ticket {
        while self.tickets.is_empty() {
            self.until(|message| matches!(message, FromB::Tickets(_)).then_some(())).await;
        }
        self.tickets.remove(0)
    }

    async fn open(&mut self, host: &str, port: u32, ticket: &Ticket) {
        let open = Open {
            request: 1,
            ticket: ticket.as_bytes().to_vec(),
            host: host.into(),
            port,
            initiator: "person".into(),
            ..Open::default()
        };
        self.send(FromE::Open(open)).await;
    }

    async fn refusal(&mut self) -> selvedge_proto::control::OpenRefused {
        self.until(|message| match message {
            FromB::OpenRefused(refused) => Some(refused.clone()),
            FromB::Opened(_) => panic!("opened"),
            _ => None,
        })
        .await
    }
}

impl World {
    fn knock(&self) -> Vec<u8> {
        knock::key_of(&[3; 32], self.ground.now_ms / knock::DAY_MS).knock()
    }

    async fn channel(&self, member: &Member) -> std::io::Result<tonic::transport::Channel> {
        let alpn = vec![ALPN_CONTROL.to_vec(), self.knock()];
        let anchors = Arc::new(self.issuer.anchors().clone());
        let config = tls::edge_client(&member.identity, &anchors, alpn, None, &tls::system_time()).unwrap();
        let socket = TcpStream::connect(self.at).await?;
        let name = "b1.demo.test".to_owned().try_into().unwrap();
        let stream = tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, socket).await?;
        let stream = parking_lot::Mutex::new(Some(TokioIo::new(stream)));
        let once = tower::service_fn(move |_| {
            let stream = stream.lock().take().ok_or_else(|| std::io::Error::other("once"));
            async move { stream }
        });
        tonic::transport::Endpoint::from_static("http://broker")
            .connect_with_connector(once)
            .await
            .map_err(std::io::Error::other)
    }

    async fn attach_with(&self, member: &Member, hello: Hello) -> Result<Attached, tonic::Status> {
        let channel = self.channel(member).await.map_err(|error| tonic::Status::unavailable(error.to_string()))?;
        let (out, messages) = mpsc::channel(64);
        out.send(FromEnd { message: Some(FromE::Hello(hello)) }).await.unwrap();
        let messages = ControlClient::new(channel).attach(ReceiverStream::new(messages)).await?.into_inner();
        Ok(Attached { out, messages, tickets: Vec::new() })
    }

    async fn attach(&self, member: &Member, stream: u64) -> Attached {
        let mut attached = self.attach_with(member, hello(member, stream)).await.unwrap();
        let broker = attached.until(|message| match message {
            FromB::Hello(hello) => Some(hello.clone()),
            _ => None,
        });
        assert_eq!(broker.await.node, NODE);
        attached
    }

    /// A connection that sends these bytes; answers what comes back until the other side closes.
    async fn shows(&self, bytes: &[u8]) -> Vec<u8> {
        let mut socket = TcpStream::connect(self.at).await.unwrap();
        let _ = socket.write_all(bytes).await;
        let _ = socket.shutdown().await;
        drain(&mut socket).await
    }

    fn records(&self) -> Vec<Record> {
        let stream = self.edge.audit.stream();
        let mut reader = Reader::open(&self.dir.path().join("audit"), stream, 1).unwrap();
        let next = || reader.read_next().unwrap();
        std::iter::from_fn(next).map(|record| serde_json::from_slice(record.body()).unwrap()).collect()
    }
}

fn hello(member: &Member, stream: u64) -> Hello {
    Hello {
        protocol_min: 1,
        protocol_max: 1,
        role: member.kind.as_str().into(),
        stream,
        grants: member.grants.clone(),
        ..Hello::default()
    }
}

async fn drain(socket: &mut TcpStream) -> Vec<u8> {
    let mut answer = Vec::new();
    let read = tokio::time::timeout(DEADLINE, socket.read_to_end(&mut answer)).await;
    // A reset is silence too.
    let _ = read.expect("the broker closes in time");
    answer
}

/// Plays a connector: opens a hop for each dial, echoes what comes, and confirms cuts. Answers whether it has opened hops.
fn play_connector(at: SocketAddr, mut end: Attached, answer: u32) -> watch::Receiver<usize> {
    let (dialed, count) = watch::channel(0);
    tokio::spawn(async move {
        while let Ok(Some(FromBroker { message: Some(message) })) = end.messages.message().await {
            match message {
                FromB::Ping(ping) => end.send(FromE::Pong(Pong { nonce: ping.nonce })).await,
                FromB::Cut(cut) => end.send(FromE::CutDone(CutDone { session: cut.session })).await,
                FromB::Dial(dial) => {
                    dialed.send_modify(|count| *count += 1);
                    if answer == 0 {
                        let ticket = Ticket::from_bytes(&dial.ticket).unwrap();
                        assert!(!dial.parked);
                        tokio::spawn(async move {
                            let mut hop = TcpStream::connect(at).await.unwrap();
                            hop.write_all(&ticket_hello("b1.demo.test", &ticket)).await.unwrap();
                            let (mut read, mut write) = hop.split();
                            // A cut resets it.
                            let _ = tokio::io::copy(&mut read, &mut write).await;
                        });
                    }
                    end.send(FromE::DialAnswer(DialAnswer { session: dial.session, code: answer, app_rtt_us: 10 }))
                        .await;
                }
                _ => {}
            }
        }
    });
    count
}

/// Attaches a connector and waits until it counts as one.
async fn with_connector(world: &World, answer: u32) -> watch::Receiver<usize> {
    let end = world.attach(&world.connector, 1).await;
    let dialed = play_connector(world.at, end, answer);
    wait_for(|| world.edge.routing.via(world.connector.id).is_some()).await;
    dialed
}

async fn wait_for(mut condition: impl FnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + DEADLINE;
    while !condition() {
        assert!(tokio::time::Instant::now() < deadline, "the condition holds in time");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stranger_gets_silence() {
    let world = world().await;
    let random: Vec<u8> = (0..600_u32).map(|n| (n * 7919 % 251) as u8).collect();
    assert!(world.shows(&random).await.is_empty(), "random bytes");
    assert!(world.shows(b"GET / HTTP/1.1\r\n\r\n").await.is_empty(), "another protocol");
    let unknown = ticket_hello("b1.demo.test", &Ticket::random());
    assert!(world.shows(&unknown).await.is_empty(), "an unknown ticket");
    let other_protocol = [&unknown[..40], &unknown[41..]].concat();
    assert!(world.shows(&other_protocol).await.is_empty(), "a broken hello");
    assert!(world.shows(&unknown[..100]).await.is_empty(), "half a hello");
    assert!(world.shows(&[22; 20_000]).await.is_empty(), "too much");

    for alpn in [vec![], vec![ALPN_CONTROL.to_vec()], vec![ALPN_HOP.to_vec()], vec![b"h2".to_vec()]] {
        assert!(world.shows(&client_hello(alpn)).await.is_empty(), "neither knock nor ticket");
    }
    let wrong = knock::key_of(&[99; 32], world.ground.now_ms / knock::DAY_MS).knock();
    assert!(
        world.shows(&client_hello(vec![ALPN_CONTROL.to_vec(), wrong])).await.is_empty(),
        "a knock under another key"
    );
    assert!(world.edge.sessions().is_empty());
}

fn client_hello(alpn: Vec<Vec<u8>>) -> Vec<u8> {
    let mut config = rustls::ClientConfig::builder_with_provider(tls::provider().clone())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    config.alpn_protocols = alpn;
    let name = "b1.demo.test".to_owned().try_into().unwrap();
    let mut connection = rustls::ClientConnection::new(Arc::new(config), name).unwrap();
    let mut bytes = Vec::new();
    while connection.wants_write() {
        connection.write_tls(&mut bytes).unwrap();
    }
    bytes
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_shows_nothing_is_closed_in_time() {
    let world = world().await;
    let mut socket = TcpStream::connect(world.at).await.unwrap();
    assert!(drain(&mut socket).await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_carries_bytes_both_ways_and_leaves_its_records() {
    let world = world().await;
    let _dialed = with_connector(&world, 0).await;
    let mut client = world.attach(&world.client, 1).await;
    let ticket = client.ticket().await;
    client.open("CRM.internal.", 80, &ticket).await;
    let hello = ticket_hello("b1.demo.test", &ticket);
    let mut hop = TcpStream::connect(world.at).await.unwrap();
    // Byte by byte: the hello is read as a message.
    for byte in &hello {
        hop.write_all(&[*byte]).await.unwrap();
    }
    let opened = client
        .until(|message| match message {
            FromB::Opened(opened) => Some(opened.clone()),
            FromB::OpenRefused(refused) => panic!("{refused:?}"),
            _ => None,
        })
        .await;
    assert_eq!(opened.connector, format!("spiffe://demo.test/connector/{}", world.connector.id));
    let mut echoed = vec![0; hello.len()];
    hop.read_exact(&mut echoed).await.unwrap();
    assert_eq!(echoed, hello, "the hello itself went through, untouched");
    hop.write_all(b"ping").await.unwrap();
    let mut answer = [0; 4];
    hop.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"ping");
    let sessions = world.edge.sessions();
    assert_eq!((sessions.len(), sessions[0].host.as_str()), (1, "crm.internal"));
    hop.shutdown().await.unwrap();
    assert!(drain(&mut hop).await.is_empty(), "half-close passes through and back");
    wait_for(|| world.edge.sessions().is_empty()).await;

    let used = world.shows(&hello).await;
    assert!(used.is_empty(), "the ticket was used");
    wait_for(|| world.records().iter().any(|record| record.kind() == "session.close")).await;
    let records = world.records();
    let Some(Record::SessionOpen(open)) = records.iter().find(|r| r.kind() == "session.open") else { panic!() };
    assert_eq!((open.party.name.as_str(), open.segment_name.as_str()), ("ann@demo.test", "crm"));
    let Some(Record::SessionClose(close)) = records.iter().find(|r| r.kind() == "session.close") else { panic!() };
    assert_eq!((close.why.as_str(), close.up_bytes), ("ended", hello.len() as u64 + 4));
}

#[tokio::test(flavor = "multi_thread")]
async fn denied_unknown_and_wrong_port_are_one_answer_and_each_is_recorded_before() {
    let world = world().await;
    let dialed = with_connector(&world, 0).await;
    let mut client = world.attach(&world.client, 1).await;
    let mut sizes = Vec::new();
    for (host, port, reason) in [
        ("hr.internal", 80, "no_permit"),
        ("nowhere.internal", 80, "no_segment"),
        ("crm.internal", 81, "wrong_port"),
        ("not a name", 80, "no_segment"),
    ] {
        let (ticket, begun) = (client.ticket().await, std::time::Instant::now());
        client.open(host, port, &ticket).await;
        let refused = client.refusal().await;
        assert!(begun.elapsed() >= super::REFUSAL_FLOOR);
        assert_eq!(refused.code, SessionCode::Refused as u32, "{host}:{port}");
        let recorded = world.records().into_iter().any(|record| {
            matches!(record, Record::SessionDenied(denied) if denied.denial == refused.denial && denied.reason == reason)
        });
        assert!(recorded, "{host}:{port}: {:?}", world.records());
        sizes.push(prost::Message::encoded_len(&refused));
        assert!(world.shows(&ticket_hello("b1.demo.test", &ticket)).await.is_empty());
    }
    assert!(sizes.iter().all(|size| *size == sizes[0]), "{sizes:?}");
    assert_eq!(*dialed.borrow(), 0, "no connector heard of it");
}

#[tokio::test(flavor = "multi_thread")]
async fn names_exist_only_for_those_who_may_use_them() {
    let world = world().await;
    let mut client = world.attach(&world.client, 1).await;
    let ask = async |client: &mut Attached, host: &str| {
        client.send(FromE::Resolve(Resolve { request: 5, host: host.into() })).await;
        client
            .until(|message| match message {
                FromB::ResolveAnswer(answer) => Some(answer.clone()),
                _ => None,
            })
            .await
    };
    let without_connector = ask(&mut client, "crm.internal").await;
    assert!(without_connector.address.is_empty());
    let _dialed = with_connector(&world, 0).await;
    assert_eq!(ask(&mut client, "crm.internal").await.address.len(), 16);
    assert_eq!(ask(&mut client, "hr.internal").await, without_connector);
    assert_eq!(ask(&mut client, "nowhere.internal").await, without_connector);
    wait_for(|| world.records().iter().any(|r| matches!(r, Record::NameUnknown(u) if u.host == "nowhere.internal")))
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disabled_person_loses_the_live_session_before_enforce_returns() {
    let world = world().await;
    let _dialed = with_connector(&world, 0).await;
    let mut client = world.attach(&world.client, 1).await;
    let mut hop = open_echo(&world, &mut client).await;

    let change = Body::ReplaceUser { id: world.user, version: None, fields: user_fields(false) };
    let changes = world.ground.apply(world.directory.clone(), change).1;
    let (edge, state) = (world.edge.clone(), world.ground.state());
    tokio::task::spawn_blocking(move || edge.enforce(&state, &changes.events)).await.unwrap();
    assert!(world.edge.sessions().is_empty());
    assert!(drain(&mut hop).await.is_empty());
    wait_for(|| world.records().iter().any(|r| matches!(r, Record::SessionClose(c) if c.why == "revoked"))).await;

    let ticket = client.ticket().await;
    client.open("crm.internal", 80, &ticket).await;
    assert_eq!(client.refusal().await.code, SessionCode::Reauthenticate as u32);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_change_cuts_what_it_forbids_and_nothing_else() {
    let world = world().await;
    let _dialed = with_connector(&world, 0).await;
    let mut client = world.attach(&world.client, 1).await;
    let mut hop = open_echo(&world, &mut client).await;
    let enforce = async |cedar: &str| {
        let changes = apply(&world.ground, &world.owner, cedar);
        let (edge, state) = (world.edge.clone(), world.ground.state());
        tokio::task::spawn_blocking(move || edge.enforce(&state, &changes.events)).await.unwrap();
    };
    enforce(r#"permit(principal, action, resource in Segment::"crm");"#).await;
    hop.write_all(b"still").await.unwrap();
    let mut answer = [0; 5];
    hop.read_exact(&mut answer).await.unwrap();
    assert_eq!(world.edge.session_count(), 1);
    enforce(r#"permit(principal, action, resource in Segment::"hr");"#).await;
    assert_eq!(world.edge.session_count(), 0);
    assert!(drain(&mut hop).await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_ends_when_its_segment_goes_to_other_connectors() {
    let world = world().await;
    let _dialed = with_connector(&world, 0).await;
    let mut client = world.attach(&world.client, 1).await;
    let mut hop = open_echo(&world, &mut client).await;
    let segment = spec::Segment {
        name: "crm".into(),
        hosts: vec!["crm.internal".into()],
        networks: Vec::new(),
        tcp: vec!["80".into()],
        udp: Vec::new(),
        inclusive: false,
        connector_groups: vec!["elsewhere".into()],
        groups: Vec::new(),
        idle_timeout_s: 0,
        absolute_timeout_s: 0,
    };
    let group = spec::ConnectorGroup { name: "elsewhere".into(), region: "here".into() };
    let puts = [spec::Object::ConnectorGroup(group), spec::Object::Segment(segment)];
    let puts = puts.into_iter().map(|object| ApplyPut { object, compiled: None }).collect();
    let change = Body::Apply(Apply { puts, deletes: Vec::new(), expect_revision: None });
    let changes = world.ground.apply(world.owner.clone(), change).1;
    let (edge, state) = (world.edge.clone(), world.ground.state());
    tokio::task::spawn_blocking(move || edge.enforce(&state, &changes.events)).await.unwrap();
    assert_eq!(world.edge.session_count(), 0);
    assert!(drain(&mut hop).await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_outlives_a_drain_is_cut_and_its_end_recorded() {
    let world = world().await;
    let _dialed = with_connector(&world, 0).await;
    let mut client = world.attach(&world.client, 1).await;
    let mut hop = open_echo(&world, &mut client).await;
    assert_eq!(world.edge.drain(Duration::ZERO).await, 1);
    assert!(drain(&mut hop).await.is_empty());
    let is_end =
        |record: &Record| matches!(record, Record::SessionClose(c) if c.why == SessionCode::BrokerDraining.as_str());
    wait_for(|| world.records().iter().any(is_end)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_device_loses_its_control_stream_and_tickets() {
    let world = world().await;
    let mut client = world.attach(&world.client, 1).await;
    let ticket = client.ticket().await;
    let revoke = Body::Revoke { subject: Subject::Device(world.client.id) };
    let changes = world.ground.apply(world.owner.clone(), revoke).1;
    let (edge, state) = (world.edge.clone(), world.ground.state());
    tokio::task::spawn_blocking(move || edge.enforce(&state, &changes.events)).await.unwrap();
    client.has_ended().await;
    assert!(world.shows(&ticket_hello("b1.demo.test", &ticket)).await.is_empty(), "expired with its stream");
    assert!(world.edge.tickets.expect(1, &ticket).is_none());
    assert!(world.attach_with(&world.client, hello(&world.client, 2)).await.is_err(), "not let in again");
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_about_the_caller_are_told_at_once() {
    let world = world().await;
    let mut nobody = hello(&world.client, 1);
    nobody.grants.clear();
    let mut client = world.attach_with(&world.client, nobody).await.unwrap();
    let ticket = client.ticket().await;
    client.open("crm.internal", 80, &ticket).await;
    assert_eq!(client.refusal().await.code, SessionCode::Reauthenticate as u32);

    let mut client = world.attach(&world.client, 2).await;
    client.open("crm.internal", 80, &Ticket::random()).await;
    assert_eq!(client.refusal().await.code, SessionCode::ProtocolError as u32, "a ticket of nobody");
    let ticket = client.ticket().await;
    client.open("crm.internal", 80, &ticket).await;
    assert_eq!(client.refusal().await.code, SessionCode::Unavailable as u32, "allowed, without a connector");
    world.ground.lease.store(false, Ordering::SeqCst);
    let ticket = client.ticket().await;
    client.open("crm.internal", 80, &ticket).await;
    assert_eq!(client.refusal().await.code, SessionCode::Stale as u32);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connector_that_cannot_reach_the_application_says_why() {
    let world = world().await;
    let _dialed = with_connector(&world, SessionCode::AppRefused as u32).await;
    let mut client = world.attach(&world.client, 1).await;
    let ticket = client.ticket().await;
    client.open("crm.internal", 80, &ticket).await;
    assert_eq!(client.refusal().await.code, SessionCode::AppRefused as u32);
    wait_for(|| world.records().iter().any(|r| matches!(r, Record::SessionClose(c) if c.why == "app_refused"))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_roles_and_versions_are_turned_away() {
    let world = world().await;
    let wrong_role = Hello { role: "connector".into(), ..hello(&world.client, 1) };
    world.attach_with(&world.client, wrong_role).await.unwrap().has_ended().await;
    let too_new = Hello { protocol_min: 2, protocol_max: 3, ..hello(&world.client, 1) };
    let mut newer = world.attach_with(&world.client, too_new).await.unwrap();
    newer.until(|message| matches!(message, FromB::Upgrade(_)).then_some(())).await;
    newer.has_ended().await;
    let mut connector = world.attach(&world.connector, 1).await;
    connector.open("crm.internal", 80, &Ticket::random()).await;
    connector.has_ended().await;
    let broker = Member {
        id: Id::new(1, 1),
        kind: Kind::Broker,
        identity: {
            let (key_pem, csr) = tls::new_key_and_csr().unwrap();
            let issued = world.issuer.issue_broker("9", &["b9.demo.test".into()], &csr, world.ground.now_ms).unwrap();
            tls::Identity::from_pem(&format!("{}{}", issued.chain_pem, *key_pem)).unwrap()
        },
        grants: Vec::new(),
    };
    assert!(world.attach_with(&broker, hello(&broker, 1)).await.is_err(), "a broker is no end");
}

#[tokio::test(flavor = "multi_thread")]
async fn flows_are_held_while_the_lease_is_over_and_go_on_when_it_returns() {
    let world = world().await;
    let _dialed = with_connector(&world, 0).await;
    let mut client = world.attach(&world.client, 1).await;
    let mut hop = open_echo(&world, &mut client).await;
    world.ground.lease.store(false, Ordering::SeqCst);
    hop.write_all(b"later").await.unwrap();
    let mut answer = [0; 5];
    let early = tokio::time::timeout(Duration::from_millis(300), hop.read_exact(&mut answer)).await;
    assert!(early.is_err(), "nothing is forwarded without the lease");
    world.ground.lease.store(true, Ordering::SeqCst);
    world.ground.renewed.send_modify(|end| *end += 1);
    tokio::time::timeout(DEADLINE, hop.read_exact(&mut answer[..])).await.unwrap().unwrap();
    assert_eq!(&answer, b"later");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connector_that_fails_before_its_first_byte_is_replaced_and_the_client_hears_only_of_the_other() {
    let world = world().await;
    let good = with_connector(&world, 0).await;
    let other = enrol(&world.ground, &world.issuer, &world.owner, EnrolKind::Connector, "dc");
    let mut broken = world.attach(&other, 1).await;
    wait_for(|| world.edge.routing.via(other.id).is_some()).await;
    let (at, (failed, failures)) = (world.at, watch::channel(0));
    tokio::spawn(async move {
        while let Ok(Some(FromBroker { message: Some(message) })) = broken.messages.message().await {
            match message {
                FromB::Ping(ping) => broken.send(FromE::Pong(Pong { nonce: ping.nonce })).await,
                FromB::Cut(cut) => broken.send(FromE::CutDone(CutDone { session: cut.session })).await,
                FromB::Dial(dial) => {
                    // Everything stands, and then it goes without a byte.
                    let mut hop = TcpStream::connect(at).await.unwrap();
                    let ticket = Ticket::from_bytes(&dial.ticket).unwrap();
                    hop.write_all(&ticket_hello("b1.demo.test", &ticket)).await.unwrap();
                    broken.send(FromE::DialAnswer(DialAnswer { session: dial.session, ..Default::default() })).await;
                    let mut some = [0; 64];
                    let _ = hop.read(&mut some).await;
                    failed.send_modify(|count| *count += 1);
                }
                _ => {}
            }
        }
    });
    let mut client = world.attach(&world.client, 1).await;
    for _ in 0..64 {
        drop(open_echo(&world, &mut client).await);
        if *failures.borrow() > 0 {
            break;
        }
    }
    assert!(*failures.borrow() > 0 && *good.borrow() > 0);
}

/// Opens a session to `crm.internal` and moves its hello back and forth.
async fn open_echo(world: &World, client: &mut Attached) -> TcpStream {
    let ticket = client.ticket().await;
    client.open("crm.internal", 80, &ticket).await;
    let hello = ticket_hello("b1.demo.test", &ticket);
    let mut hop = TcpStream::connect(world.at).await.unwrap();
    hop.write_all(&hello).await.unwrap();
    client
        .until(|message| match message {
            FromB::Opened(opened) => {
                assert_eq!(opened.connector, format!("spiffe://demo.test/connector/{}", world.connector.id));
                Some(())
            }
            FromB::OpenRefused(refused) => panic!("{refused:?}"),
            _ => None,
        })
        .await;
    let mut echoed = vec![0; hello.len()];
    hop.read_exact(&mut echoed).await.unwrap();
    hop
}
