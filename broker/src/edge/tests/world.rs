//! A broker's edge on a real listener, over a state that is changed by real commands, with ends that speak the real
//! protocol.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use hyper_util::rt::TokioIo;
use selvedge_cluster::{Confirmation, PeerChannel};
use selvedge_domain::command::{
    Apply, ApplyPut, CertificateIssued, CreateEnrolKey, Enrol, InitCluster, PutBroker, Subject, UserFields,
};
use selvedge_domain::rows::{BrokerRole, EnrolKind};
use selvedge_domain::{Actor, Body, Changes, Command, Id, Outcome, State, policy, spec};
use selvedge_proto::control::control_client::ControlClient;
use selvedge_proto::control::from_broker::Message as FromB;
use selvedge_proto::control::from_end::Message as FromE;
use selvedge_proto::control::{CutDone, DialAnswer, FromBroker, FromEnd, Hello, LoginGrant, Open, Pong};
use selvedge_proto::frame::SessionCode;
use selvedge_proto::hello::{ALPN_CONTROL, Ticket, ticket_hello};
use selvedge_proto::identity::Kind;
use selvedge_proto::relay::relay_client::RelayClient;
use selvedge_proto::{grant, tls};
use selvedge_storage::audit::Reader;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

use super::super::{Edge, Ground, Limits, Parts, knock};
use crate::audit::{Log, Record};
use crate::decision::Decider;
use crate::issuer::{Issuer, Seal};
use crate::relay::Relay;
use crate::routing::{Load, Routing};

pub(super) const NODE: u64 = 7;
pub(super) const DEADLINE: Duration = Duration::from_secs(10);

pub(super) struct TestGround {
    states: watch::Sender<Arc<State>>,
    changes: parking_lot::Mutex<()>,
    after_state: parking_lot::Mutex<Option<AfterState>>,
    pub(super) lease: AtomicBool,
    pub(super) lease_left_ms: AtomicU64,
    pub(super) renewed: watch::Sender<u64>,
    pub(super) now_ms: AtomicU64,
    /// How often leadership would have been handed over.
    pub(super) handed_over: AtomicU64,
}

type AfterState = Box<dyn FnMut(&TestGround) -> bool + Send>;

impl TestGround {
    /// Applies a command, and gives back what it led to.
    pub(super) fn apply(&self, actor: Actor, body: Body) -> (Vec<Id>, Changes) {
        let _one = self.changes.lock();
        let mut state = State::clone(&self.states.borrow());
        let mut changes = Changes::default();
        let command = Command::new(actor, NODE, None, body);
        let outcome = state.apply(self.now_ms(), &command, &mut changes);
        self.states.send_replace(Arc::new(state));
        match outcome {
            Outcome::Done { ids, .. } => (ids, changes),
            Outcome::Refused(rejected) => panic!("{rejected}"),
        }
    }

    /// Called whenever someone has taken a state, until it answers that it is done: for a change that comes right after.
    pub(super) fn after_state(&self, call: impl FnMut(&TestGround) -> bool + Send + 'static) {
        *self.after_state.lock() = Some(Box::new(call));
    }

    pub(super) fn pass(&self, time: Duration) {
        self.now_ms.fetch_add(time.as_millis() as u64, Ordering::SeqCst);
    }
}

#[async_trait]
impl Ground for TestGround {
    fn node(&self) -> u64 {
        NODE
    }
    fn now_ms(&self) -> u64 {
        self.now_ms.load(Ordering::SeqCst)
    }
    fn state(&self) -> Arc<State> {
        let state = self.states.borrow().clone();
        if let Some(mut after) = self.after_state.try_lock()
            && after.as_mut().is_some_and(|call| call(self))
        {
            *after = None;
        }
        state
    }
    fn subscribe(&self) -> watch::Receiver<Arc<State>> {
        self.states.subscribe()
    }
    fn lease_open(&self) -> bool {
        self.lease.load(Ordering::SeqCst)
    }
    fn lease_left_ms(&self) -> u64 {
        if self.lease_open() { self.lease_left_ms.load(Ordering::SeqCst) } else { 0 }
    }
    fn lease_told_over_ms(&self) -> u64 {
        self.lease_left_ms() * 111 / 100 + 1
    }
    fn lease_renewed(&self) -> watch::Receiver<u64> {
        self.renewed.subscribe()
    }
    async fn propose(&self, body: Body) -> Result<(), String> {
        self.apply(Actor::BROKER, body);
        Ok(())
    }
    async fn hand_over(&self) {
        self.handed_over.fetch_add(1, Ordering::SeqCst);
    }
    fn relay(&self, _node: u64) -> Option<RelayClient<PeerChannel>> {
        None
    }
}

pub(super) struct World {
    pub(super) ground: Arc<TestGround>,
    pub(super) issuer: Arc<Issuer>,
    pub(super) edge: Arc<Edge>,
    pub(super) at: SocketAddr,
    pub(super) owner: Actor,
    pub(super) directory: Actor,
    pub(super) user: Id,
    pub(super) client: Member,
    pub(super) connector: Member,
    pub(super) stop: CancellationToken,
    pub(super) dir: tempfile::TempDir,
}

impl Drop for World {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

pub(super) struct Member {
    pub(super) id: Id,
    pub(super) kind: Kind,
    pub(super) identity: tls::Identity,
    pub(super) grants: Vec<Vec<u8>>,
}

pub(super) fn enrol(ground: &TestGround, issuer: &Issuer, owner: &Actor, kind: EnrolKind, target: &str) -> Member {
    enrol_until(ground, issuer, owner, kind, target, u64::MAX)
}

/// Enrols someone whose certificate counts for no longer than this.
pub(super) fn enrol_until(
    ground: &TestGround,
    issuer: &Issuer,
    owner: &Actor,
    kind: EnrolKind,
    target: &str,
    until_ms: u64,
) -> Member {
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
    let enrolment = Actor::enrolment(ground.apply(owner.clone(), Body::CreateEnrolKey(key)).0[0]);
    let (key_pem, csr) = tls::new_key_and_csr().unwrap();
    let asked = Enrol { secret_sha256: secret, kind: kind as i32, key_sha256: [9; 32], name: "one".into(), node: 0 };
    let id = ground.apply(enrolment, Body::Enrol(asked)).0[0];
    let (kind, of) = match kind {
        EnrolKind::Device => (Kind::Client, Subject::Device(id)),
        EnrolKind::Workload => (Kind::Workload, Subject::Workload(id)),
        _ => (Kind::Connector, Subject::Connector(id)),
    };
    let issued = issuer.issue(kind, &id.to_string(), &csr, ground.now_ms()).unwrap();
    ground.apply(
        Actor::BROKER,
        Body::CertificateIssued(CertificateIssued {
            serial: issued.serial.clone(),
            subject: issued.id.to_string(),
            key_sha256: issued.spki_sha256,
            not_after_ms: issued.not_after_ms.min(until_ms),
            of,
        }),
    );
    let identity = tls::Identity::from_pem(&format!("{}{}", issued.chain_pem, *key_pem)).unwrap();
    Member { id, kind, identity, grants: Vec::new() }
}

pub(super) async fn world() -> World {
    let dir = tempfile::tempdir().unwrap();
    let now_ms = (tls::system_time())();
    let seal = Seal::File(dir.path().join("seal"));
    let (issuer, _root) = Issuer::create(&dir.path().join("issuer"), &seal, "demo.test", [1; 16], now_ms).unwrap();
    let issuer = Arc::new(issuer);
    let ground = Arc::new(TestGround {
        states: watch::Sender::new(Arc::new(State::default())),
        changes: parking_lot::Mutex::new(()),
        after_state: parking_lot::Mutex::new(None),
        lease: AtomicBool::new(true),
        lease_left_ms: AtomicU64::new(5_000),
        renewed: watch::Sender::new(0),
        now_ms: AtomicU64::new(now_ms),
        handed_over: AtomicU64::new(0),
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
        limits: Limits::default(),
    });
    edge.routing.set_own(true, Load::default());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    let stop = CancellationToken::new();
    let (serving, stopped) = (edge.clone(), stop.clone());
    tokio::spawn(async move { serving.serve(listener, stopped).await });
    World { ground, issuer, edge, at, owner, directory, user, client, connector, stop, dir }
}

pub(super) fn user_fields(active: bool) -> UserFields {
    UserFields {
        user_name: "ann@demo.test".into(),
        external_id: String::new(),
        display_name: "Ann".into(),
        active,
        attributes: "{}".into(),
    }
}

pub(super) fn generation_of(ground: &TestGround, user: Id) -> u64 {
    ground.state().by_id::<selvedge_domain::rows::User>(user).unwrap().generation
}

pub(super) fn apply(ground: &TestGround, owner: &Actor, cedar: &str) -> Changes {
    let rule = spec::Policy { name: "crm".into(), cedar: cedar.into(), simulate: false };
    let compiled = policy::compile(&rule).unwrap();
    let puts = vec![
        (spec::Object::Region(spec::Region { name: "here".into(), latitude: 0.0, longitude: 0.0 }), None),
        (spec::Object::Zone(spec::Zone { name: "internal".into() }), None),
        (spec::Object::ConnectorGroup(spec::ConnectorGroup { name: "dc".into(), region: "here".into() }), None),
        (segment("crm", "crm.internal", "dc"), None),
        (segment("hr", "hr.internal", "dc"), None),
        (spec::Object::Policy(rule), Some(compiled)),
    ];
    let puts = puts.into_iter().map(|(object, compiled)| ApplyPut { object, compiled }).collect();
    ground.apply(owner.clone(), Body::Apply(Apply { puts, deletes: Vec::new(), expect_revision: None })).1
}

/// Gives the application to other connectors.
pub(super) fn move_elsewhere(ground: &TestGround, owner: &Actor) -> Changes {
    let group = spec::ConnectorGroup { name: "elsewhere".into(), region: "here".into() };
    let puts = [spec::Object::ConnectorGroup(group), segment("crm", "crm.internal", "elsewhere")];
    let puts = puts.into_iter().map(|object| ApplyPut { object, compiled: None }).collect();
    ground.apply(owner.clone(), Body::Apply(Apply { puts, deletes: Vec::new(), expect_revision: None })).1
}

fn segment(name: &str, host: &str, group: &str) -> spec::Object {
    spec::Object::Segment(spec::Segment {
        name: name.into(),
        hosts: vec![host.into()],
        networks: Vec::new(),
        tcp: vec!["80".into()],
        udp: Vec::new(),
        inclusive: false,
        connector_groups: vec![group.into()],
        groups: Vec::new(),
        idle_timeout_s: 0,
        absolute_timeout_s: 0,
    })
}

/// One attached end of a test.
pub(super) struct Attached {
    pub(super) out: mpsc::Sender<FromEnd>,
    pub(super) messages: tonic::Streaming<FromBroker>,
    pub(super) tickets: Vec<Ticket>,
}

impl Attached {
    pub(super) async fn send(&self, message: FromE) {
        self.out.send(FromEnd { message: Some(message) }).await.unwrap();
    }

    /// The next message that `pick` takes; pings are answered and tickets kept meanwhile.
    pub(super) async fn until<T>(&mut self, mut pick: impl FnMut(&FromB) -> Option<T>) -> T {
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

    pub(super) async fn has_ended(&mut self) {
        let ended = tokio::time::timeout(DEADLINE, async { while let Ok(Some(_)) = self.messages.message().await {} });
        ended.await.expect("the stream ends in time");
    }

    pub(super) async fn ticket(&mut self) -> Ticket {
        while self.tickets.is_empty() {
            self.until(|message| matches!(message, FromB::Tickets(_)).then_some(())).await;
        }
        self.tickets.remove(0)
    }

    pub(super) async fn open(&mut self, host: &str, port: u32, ticket: &Ticket) {
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

    pub(super) async fn refusal(&mut self) -> selvedge_proto::control::OpenRefused {
        self.until(|message| match message {
            FromB::OpenRefused(refused) => Some(refused.clone()),
            FromB::Opened(_) => panic!("opened"),
            _ => None,
        })
        .await
    }
}

impl World {
    pub(super) fn knock(&self) -> Vec<u8> {
        knock::key_of(&[3; 32], self.ground.now_ms() / knock::DAY_MS).knock()
    }

    pub(super) async fn channel(&self, member: &Member) -> std::io::Result<tonic::transport::Channel> {
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

    pub(super) async fn attach_with(&self, member: &Member, hello: Hello) -> Result<Attached, tonic::Status> {
        let channel = self.channel(member).await.map_err(|error| tonic::Status::unavailable(error.to_string()))?;
        let (out, messages) = mpsc::channel(64);
        out.send(FromEnd { message: Some(FromE::Hello(hello)) }).await.unwrap();
        let messages = ControlClient::new(channel).attach(ReceiverStream::new(messages)).await?.into_inner();
        Ok(Attached { out, messages, tickets: Vec::new() })
    }

    pub(super) async fn attach(&self, member: &Member, stream: u64) -> Attached {
        let mut attached = self.attach_with(member, hello(member, stream)).await.unwrap();
        let broker = attached.until(|message| match message {
            FromB::Hello(hello) => Some(hello.clone()),
            _ => None,
        });
        assert_eq!(broker.await.node, NODE);
        attached
    }

    /// A connection that sends these bytes; answers what comes back until the other side closes.
    pub(super) async fn shows(&self, bytes: &[u8]) -> Vec<u8> {
        let mut socket = TcpStream::connect(self.at).await.unwrap();
        let _ = socket.write_all(bytes).await;
        let _ = socket.shutdown().await;
        drain(&mut socket).await
    }

    /// Enforces what a change led to, as the cluster does: on a thread that may block.
    pub(super) async fn enforce(&self, changes: Changes) -> Confirmation {
        let (edge, state) = (self.edge.clone(), self.ground.state());
        tokio::task::spawn_blocking(move || edge.enforce(&state, &changes.events)).await.unwrap()
    }

    /// Waits until a session has ended, and answers why.
    pub(super) async fn why_ended(&self) -> String {
        let why = || {
            self.records().into_iter().find_map(|record| match record {
                Record::SessionClose(close) => Some(close.why),
                _ => None,
            })
        };
        wait_for(|| why().is_some()).await;
        why().unwrap()
    }

    pub(super) fn records(&self) -> Vec<Record> {
        let stream = self.edge.audit.stream();
        let mut reader = Reader::open(&self.dir.path().join("audit"), stream, 1).unwrap();
        let next = || reader.read_next().unwrap();
        std::iter::from_fn(next).map(|record| serde_json::from_slice(record.body()).unwrap()).collect()
    }
}

pub(super) fn hello(member: &Member, stream: u64) -> Hello {
    Hello {
        protocol_min: 1,
        protocol_max: 1,
        role: member.kind.as_str().into(),
        stream,
        grants: member.grants.clone(),
        ..Hello::default()
    }
}

pub(super) async fn drain(socket: &mut TcpStream) -> Vec<u8> {
    let mut answer = Vec::new();
    let read = tokio::time::timeout(DEADLINE, socket.read_to_end(&mut answer)).await;
    // A reset is silence too.
    let _ = read.expect("the broker closes in time");
    answer
}

/// What a client says to a connector that [`Manner::ends_mute`].
pub(super) const END: &[u8] = b"end";

/// How a connector of a test behaves.
pub(super) struct Manner {
    /// The code that it answers a dial with; 0 opens a hop.
    answer: Box<dyn FnMut() -> u32 + Send>,
    /// What it does with what comes.
    hop: Hop,
    confirms_cuts: bool,
}

#[derive(Clone, Copy)]
enum Hop {
    Echoes,
    /// Ends its direction without a byte when it has heard [`END`], and goes on listening.
    EndsMute,
    /// Takes the first bytes, and is gone.
    Breaks,
}

impl Manner {
    pub(super) fn echoes() -> Self {
        Self { answer: Box::new(|| 0), hop: Hop::Echoes, confirms_cuts: true }
    }

    pub(super) fn ends_mute() -> Self {
        Self { hop: Hop::EndsMute, ..Self::echoes() }
    }

    pub(super) fn breaks() -> Self {
        Self { hop: Hop::Breaks, ..Self::echoes() }
    }

    pub(super) fn answers(code: SessionCode) -> Self {
        Self::answers_with(move || code)
    }

    pub(super) fn answers_with(mut answer: impl FnMut() -> SessionCode + Send + 'static) -> Self {
        Self { answer: Box::new(move || answer() as u32), ..Self::echoes() }
    }

    pub(super) fn never_confirms() -> Self {
        Self { confirms_cuts: false, ..Self::echoes() }
    }
}

/// Plays a connector, and counts its dials.
pub(super) fn play_connector(at: SocketAddr, mut end: Attached, mut manner: Manner) -> watch::Receiver<usize> {
    let (dialed, count) = watch::channel(0);
    tokio::spawn(async move {
        while let Ok(Some(FromBroker { message: Some(message) })) = end.messages.message().await {
            match message {
                FromB::Ping(ping) => end.send(FromE::Pong(Pong { nonce: ping.nonce })).await,
                FromB::Cut(cut) if manner.confirms_cuts => {
                    end.send(FromE::CutDone(CutDone { session: cut.session })).await;
                }
                FromB::Dial(dial) => {
                    dialed.send_modify(|count| *count += 1);
                    let code = (manner.answer)();
                    if code == 0 {
                        assert!(!dial.parked);
                        let ticket = Ticket::from_bytes(&dial.ticket).unwrap();
                        tokio::spawn(play_hop(at, ticket, manner.hop));
                    }
                    let answer = DialAnswer { session: dial.session, code, app_rtt_us: 10 };
                    end.send(FromE::DialAnswer(answer)).await;
                }
                _ => {}
            }
        }
    });
    count
}

async fn play_hop(at: SocketAddr, ticket: Ticket, manner: Hop) {
    let mut hop = TcpStream::connect(at).await.unwrap();
    hop.write_all(&ticket_hello("b1.demo.test", &ticket)).await.unwrap();
    let (mut read, mut write) = hop.split();
    // A cut resets it.
    let _ = match manner {
        Hop::Echoes => tokio::io::copy(&mut read, &mut write).await.map(drop),
        Hop::EndsMute => {
            let mut heard = Vec::new();
            while !heard.ends_with(END) && read.read_buf(&mut heard).await.is_ok_and(|len| len > 0) {}
            let _ = write.shutdown().await;
            tokio::io::copy(&mut read, &mut tokio::io::sink()).await.map(drop)
        }
        Hop::Breaks => read.read(&mut [0; 64]).await.map(drop),
    };
}

/// Attaches the world's connector and waits until it counts as one.
pub(super) async fn with_connector(world: &World, manner: Manner) -> watch::Receiver<usize> {
    attach_connector(world, &world.connector, manner).await
}

pub(super) async fn attach_connector(world: &World, member: &Member, manner: Manner) -> watch::Receiver<usize> {
    let end = world.attach(member, 1).await;
    let dialed = play_connector(world.at, end, manner);
    wait_for(|| world.edge.routing.via(member.id).is_some()).await;
    dialed
}

pub(super) async fn wait_for(mut condition: impl FnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + DEADLINE;
    while !condition() {
        assert!(tokio::time::Instant::now() < deadline, "the condition holds in time");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Opens a session to `crm.internal` and moves its hello back and forth.
pub(super) async fn open_echo(world: &World, client: &mut Attached) -> TcpStream {
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
