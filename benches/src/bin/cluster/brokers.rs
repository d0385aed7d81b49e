//! Three brokers as an operator makes them, and a client of their own gRPC: it enrols as one more broker, which joins no
//! quorum and keeps no log, and proposes commands as brokers do.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use bytes::Bytes;
use rustls::ClientConfig;
use selvedge_domain::command::{Dedupe, UserFields};
use selvedge_domain::rows::User;
use selvedge_domain::state::Table;
use selvedge_domain::{Actor, Body, Command, Id};
use selvedge_proto::identity::Anchors;
use selvedge_proto::peer as wire;
use selvedge_proto::peer::peer_client::PeerClient;
use selvedge_proto::peer::propose_reply::Result as Reply;
use selvedge_proto::tls::{self, Identity, NotBefore};
use tokio::sync::mpsc;
use tonic::Request;

use crate::dial;
use crate::grpc::Endpoint;
use crate::world::{World, free_ports, text};

pub const BROKERS: usize = 3;
/// The directory that everything is proposed for.
const DIRECTORY: &str = "bench";
/// An answer that takes longer has failed.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// A bulk load has so many commands outstanding: fewer than the log keeps outcomes for.
pub const OUTSTANDING_MAX: usize = 480;

/// The brokers' processes, and who the load generator is to them.
pub struct Brokers {
    pub world: World,
    identity: Identity,
    anchors: Arc<Anchors>,
    node: u64,
    nodes: Vec<u64>,
    directory: Id,
    token: String,
}

impl Brokers {
    /// Starts three brokers with a preset and enrols the load generator.
    pub fn start(bin: &Path, preset: &str) -> anyhow::Result<Self> {
        let world = World::start_preset(bin, BROKERS, preset, Vec::new());
        let (node, identity, anchors) = enrol(&world)?;
        let made = world.json(&["directory", "create", DIRECTORY, "--json"]);
        let status = world.json(&["cluster", "status", "--json"]);
        let node_of = |name: &str| {
            let rows = status["brokers"].as_array()?;
            rows.iter().find(|row| row["name"] == name)?["node"].as_str()?.parse().ok()
        };
        let nodes = world.brokers.iter().map(|broker| node_of(&broker.name).context("a broker's node id"));
        Ok(Self {
            nodes: nodes.collect::<anyhow::Result<_>>()?,
            directory: made["id"].as_str().context("a directory's id")?.parse()?,
            token: made["token"].as_str().context("a directory's token")?.to_owned(),
            identity,
            anchors: Arc::new(anchors),
            node,
            world,
        })
    }

    pub fn pids(&self) -> Vec<u32> {
        (0..BROKERS).map(|broker| self.world.broker_pid(broker)).collect()
    }

    /// Connects, and registers with the log. Within a runtime.
    pub async fn client(&self) -> anyhow::Result<Client> {
        let time = tls::system_time();
        let tls = Arc::new(tls::peer_client(&self.identity, &self.anchors, None, NotBefore::judged(), &time)?);
        // Each call says whose it is, as every call between brokers does.
        let claim = [
            ("selvedge-cluster", hex(&self.anchors.cluster_id())),
            ("selvedge-epoch", "1".to_owned()),
            ("selvedge-node", self.node.to_string()),
        ];
        let peers: Vec<SocketAddr> = self.world.brokers.iter().map(|broker| broker.peer).collect();
        let endpoints = peers.iter().map(|peer| Endpoint::new(*peer, &tls, &claim));
        let mut client = Client {
            endpoints: endpoints.collect::<anyhow::Result<_>>()?,
            peers,
            tls,
            claim: Claim(claim),
            nodes: self.nodes.clone(),
            node: self.node,
            asker: Asker { actor: Actor::directory(self.directory, 1), credential: self.token.clone() },
            leader: AtomicUsize::new(0),
            hints: AtomicU64::new(0),
            session: Arc::default(),
            session_id: Id::default(),
        };
        let boot = u64::from(std::process::id()) << 32 | u64::from(std::time::UNIX_EPOCH.elapsed()?.subsec_nanos());
        let register = Command::new(Actor::BROKER, self.node, None, Body::RegisterClient { boot }).encode().into();
        let done = client.settled(0, register, String::new()).await?;
        client.session_id = *done.ids.first().context("a registration has an id")?;
        Ok(client)
    }
}

/// Joins as a broker does, by the documented command, but never runs.
fn enrol(world: &World) -> anyhow::Result<(u64, Identity, Anchors)> {
    let [edge, web, peer, ops] = free_ports();
    let (config, data) = (world.path("load.toml"), world.path("load"));
    std::fs::write(
        &config,
        format!(
            "data_dir = {data:?}\nname = \"load\"\nregion = \"here\"\nhost = \"load.brokers.test\"\n\
             edge = {{ bind = \"{edge}\" }}\nweb = {{ bind = \"{web}\" }}\npeer = {{ bind = \"{peer}\" }}\nops = {{ bind = \"{ops}\" }}\n"
        ),
    )?;
    let key = world.json(&["key", "create", "--kind", "broker", "--name", "load", "--uses", "1", "--json"]);
    let secret = key["secret"].as_str().context("a join token")?;
    let via = world.brokers[0].web.to_string();
    let joined =
        world.json(&["cluster", "join", "--config", text(&config), "--token", secret, "--via", &via, "--json"]);
    let node = joined["node"].as_str().context("a node id")?.parse()?;
    let identity = Identity::load(&data.join("node/identity.pem"))?;
    let home: serde_json::Value = serde_json::from_slice(&std::fs::read(data.join("node/cluster.json"))?)?;
    Ok((node, identity, serde_json::from_value(home["anchors"].clone())?))
}

/// What a call says of whose it is.
#[derive(Clone)]
struct Claim([(&'static str, String); 3]);

impl tonic::service::Interceptor for Claim {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, tonic::Status> {
        for (name, value) in &self.0 {
            let value = value.parse().map_err(|_| tonic::Status::internal("a claim that is no metadata"))?;
            request.metadata_mut().insert(*name, value);
        }
        Ok(request)
    }
}

/// Numbers of the requests that are open, as a broker's own session keeps them.
#[derive(Default)]
struct Session {
    open: Mutex<(u64, BTreeSet<u64>)>,
}

/// An open request; closes with it.
struct Slot {
    session: Arc<Session>,
    seq: u64,
    acked_below: u64,
}

impl Session {
    fn open(self: &Arc<Self>) -> Slot {
        let mut open = self.open.lock().expect("nobody panics with it");
        open.0 += 1;
        let seq = open.0;
        open.1.insert(seq);
        Slot { session: self.clone(), seq, acked_below: open.1.first().copied().unwrap_or(seq) }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.session.open.lock().expect("nobody panics with it").1.remove(&self.seq);
    }
}

/// Who a command is proposed for, and what they showed.
#[derive(Clone)]
pub struct Asker {
    pub actor: Actor,
    pub credential: String,
}

/// A proposing client: one connection to each broker, one session with the log.
pub struct Client {
    endpoints: Vec<Endpoint>,
    peers: Vec<SocketAddr>,
    tls: Arc<ClientConfig>,
    claim: Claim,
    nodes: Vec<u64>,
    node: u64,
    asker: Asker,
    /// Who led when last heard of.
    leader: AtomicUsize,
    /// How often a broker answered that another one leads.
    pub hints: AtomicU64,
    session: Arc<Session>,
    session_id: Id,
}

/// What a proposal did.
#[derive(Debug)]
pub struct Done {
    pub ids: Vec<Id>,
}

/// An attempt's answer.
pub enum Attempt {
    Done(Done),
    /// Certainly not applied; who leads, if that is known.
    Elsewhere(Option<usize>),
    /// Certainly not applied: come back.
    Busy,
    /// May be applied.
    Unknown,
}

impl Client {
    /// Proposes a command and follows the brokers to who leads; answered when it is applied on a quorum.
    pub async fn propose(&self, body: Body) -> anyhow::Result<Done> {
        self.propose_as(&self.asker, body).await
    }

    /// [`Client::propose`] for somebody else than the directory.
    pub async fn propose_as(&self, asker: &Asker, body: Body) -> anyhow::Result<Done> {
        let slot = self.session.open();
        let command = self.command(&slot, asker, body);
        self.settled(self.leader.load(Ordering::Relaxed), command, asker.credential.clone()).await
    }

    /// A command for a write that is tried more than once: each attempt carries the same number, so it is applied once.
    pub fn repeatable(&self, body: Body) -> Repeatable {
        let slot = self.session.open();
        Repeatable { command: self.command(&slot, &self.asker, body), _slot: slot }
    }

    fn command(&self, slot: &Slot, asker: &Asker, body: Body) -> Bytes {
        let dedupe =
            Dedupe { client: self.session_id, seq: slot.seq, acked_below: slot.acked_below, idempotency: None };
        Command::new(asker.actor.clone(), self.node, Some(dedupe), body).encode().into()
    }

    async fn settled(&self, mut at: usize, command: Bytes, credential: String) -> anyhow::Result<Done> {
        let settle = async {
            loop {
                match self.attempt(at, command.clone(), credential.clone()).await? {
                    Attempt::Done(done) => return Ok(done),
                    Attempt::Elsewhere(Some(leader)) => {
                        self.hints.fetch_add(1, Ordering::Relaxed);
                        self.leader.store(leader, Ordering::Relaxed);
                        at = leader;
                    }
                    Attempt::Elsewhere(None) => {
                        tokio::time::sleep(Duration::from_millis(20)).await;
                        at = (at + 1) % BROKERS;
                    }
                    // With the same number it is applied once, however often it is sent.
                    Attempt::Busy | Attempt::Unknown => tokio::time::sleep(Duration::from_millis(20)).await,
                }
            }
        };
        tokio::time::timeout(ANSWER_TIMEOUT, settle).await.context("a command was not answered")?
    }

    /// One attempt at one broker.
    pub async fn attempt(&self, at: usize, command: Bytes, credential: String) -> anyhow::Result<Attempt> {
        let request = wire::ProposeRequest { command, credential };
        self.read_reply(self.endpoints[at].call("/selvedge.peer.v1.Peer/Propose", &request).await?)
    }

    /// [`Client::attempt`] with a command that is tried more than once.
    pub async fn attempt_again(&self, at: usize, repeatable: &Repeatable) -> anyhow::Result<Attempt> {
        self.attempt(at, repeatable.command.clone(), self.asker.credential.clone()).await
    }

    fn read_reply(&self, reply: wire::ProposeReply) -> anyhow::Result<Attempt> {
        Ok(match reply.result.context("an answer without a result")? {
            Reply::Done(done) => {
                let ids = done.ids.into_iter().map(|id| Id::new(id.epoch, id.seq)).collect();
                Attempt::Done(Done { ids })
            }
            Reply::Refused(refused) => bail!("refused: {}", refused.message),
            Reply::NotLeader(not) => Attempt::Elsewhere(self.nodes.iter().position(|node| *node == not.leader)),
            Reply::Busy(_) => Attempt::Busy,
            Reply::NoRoom(_) => bail!("the disk of a broker is full"),
            Reply::Unknown(_) => Attempt::Unknown,
        })
    }

    /// A linearizable read of a user at one broker; answers the user's attributes.
    pub async fn read(&self, endpoint: usize, user: Id) -> anyhow::Result<User> {
        let request = wire::ReadRequest { table: Table::User as u32, key: user.key().to_vec(), ..Default::default() };
        let reply: wire::ReadReply =
            self.endpoints[endpoint % BROKERS].call("/selvedge.peer.v1.Peer/Read", &request).await?;
        let row = reply.row.context("the user is not there")?;
        Ok(prost::Message::decode(row.as_slice())?)
    }

    /// Opens a stream of proposals to the broker that leads, with one place for each of `clients`; `first` is proposed
    /// before, so that the leader is known.
    pub async fn stream(self: &Arc<Self>, clients: usize, first: Body) -> anyhow::Result<Stream> {
        self.propose(first).await?;
        let leader = self.leader.load(Ordering::Relaxed);
        let (frames, outbound) = mpsc::channel(clients.max(1));
        let outbound = tokio_stream::wrappers::ReceiverStream::new(outbound);
        let mut endpoint =
            PeerClient::with_interceptor(dial::channel(self.peers[leader], &self.tls), self.claim.clone());
        let mut answers = endpoint.propose_stream(outbound).await?.into_inner();
        let places: Arc<Vec<Place>> = Arc::new((0..clients).map(|_| Place::default()).collect());
        let waiting = places.clone();
        tokio::spawn(async move {
            while let Ok(Some(answer)) = answers.message().await {
                let place = usize::try_from(answer.tag).ok().and_then(|tag| waiting.get(tag));
                let waiter = place.and_then(|place| place.lock().expect("nobody panics with it").take());
                if let (Some(waiter), Some(reply)) = (waiter, answer.reply) {
                    // Who waited may have given up.
                    let _ = waiter.send(reply);
                }
            }
            // Whoever still waits learns that the stream has ended.
            waiting.iter().for_each(|place| drop(place.lock().expect("nobody panics with it").take()));
        });
        Ok(Stream { client: self.clone(), frames, places })
    }
}

/// A command with its number.
pub struct Repeatable {
    command: Bytes,
    _slot: Slot,
}

type Place = Mutex<Option<tokio::sync::oneshot::Sender<wire::ProposeReply>>>;

/// A stream of proposals; answers come in any order.
pub struct Stream {
    client: Arc<Client>,
    frames: mpsc::Sender<wire::ProposeFrame>,
    places: Arc<Vec<Place>>,
}

impl Stream {
    /// Proposes at one place, which has one command outstanding at most.
    pub async fn propose(&self, place: usize, body: Body) -> anyhow::Result<Done> {
        let slot = self.client.session.open();
        let request = wire::ProposeRequest {
            command: self.client.command(&slot, &self.client.asker, body),
            credential: self.client.asker.credential.clone(),
        };
        let settle = async {
            loop {
                let (answer, answered) = tokio::sync::oneshot::channel();
                *self.places[place].lock().expect("nobody panics with it") = Some(answer);
                let frame = wire::ProposeFrame { tag: place as u64, request: Some(request.clone()) };
                self.frames.send(frame).await.ok().context("the stream has ended")?;
                match self.client.read_reply(answered.await.context("the stream has ended")?)? {
                    Attempt::Done(done) => return Ok(done),
                    Attempt::Busy | Attempt::Unknown => tokio::time::sleep(Duration::from_millis(20)).await,
                    Attempt::Elsewhere(_) => bail!("the leader changed under a stream"),
                }
            }
        };
        tokio::time::timeout(ANSWER_TIMEOUT, settle).await.context("a command was not answered")?
    }
}

/// The users that the measured commands change: made once, so that the state does not grow.
pub struct Users {
    pub ids: Vec<Id>,
}

impl Users {
    /// Makes so many.
    pub async fn make(client: &Arc<Client>, count: usize) -> anyhow::Result<Self> {
        let mut ids = vec![Id::default(); count];
        let mut flight = tokio::task::JoinSet::new();
        for number in 0..count {
            if flight.len() >= OUTSTANDING_MAX {
                note(&mut ids, flight.join_next().await)?;
            }
            let client = client.clone();
            flight.spawn(async move {
                let done = client.propose(Body::CreateUser(fields(number, 0))).await?;
                Ok((number, done.ids.first().copied().context("a new user has an id")?))
            });
        }
        while let Some(made) = flight.join_next().await {
            note(&mut ids, Some(made))?;
        }
        ensure!(ids.iter().all(|id| id.seq != 0), "a user was not made");
        Ok(Self { ids })
    }

    /// The command that gives a user another value of [`VALUE_BYTES`].
    pub fn change(&self, number: usize, n: u64) -> Body {
        Body::ReplaceUser { id: self.ids[number], version: None, fields: fields(number, n) }
    }
}

type Made = Result<anyhow::Result<(usize, Id)>, tokio::task::JoinError>;

fn note(ids: &mut [Id], made: Option<Made>) -> anyhow::Result<()> {
    let (number, id) = made.context("nothing is under way")?.context("a task panicked")??;
    ids[number] = id;
    Ok(())
}

/// Bytes of a value, ours and the rival's.
pub const VALUE_BYTES: usize = 256;

/// A value that differs with `n`: a JSON object of exactly [`VALUE_BYTES`].
pub fn value(n: u64) -> String {
    let head = format!("{{\"title\":\"{n:020}");
    format!("{head}{:x<width$}\"}}", "", width = VALUE_BYTES - head.len() - 2)
}

/// Name of the key or user with a number.
pub fn name(number: usize) -> String {
    format!("user-{number:07}")
}

fn fields(number: usize, n: u64) -> UserFields {
    UserFields {
        user_name: name(number),
        external_id: String::new(),
        display_name: String::new(),
        active: true,
        attributes: value(n),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
