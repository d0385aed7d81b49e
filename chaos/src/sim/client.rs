//! Clients of a broker: they write and read registers, follow the journal, and write down what they were told.

use std::time::Duration;

use futures::StreamExt as _;
use rand::Rng as _;
use rand::rngs::StdRng;
use selvedge_cluster::{Cluster, Error, Frame, ProposeError};
use selvedge_domain::rows::User;
use selvedge_domain::{Asker, Body, Id, State};

use super::machine::{KEYS, directory, owner, user};
use super::network::{digest, host};
use super::world::World;
use super::{Bug, Order};
use crate::check::{Attempt, Seen};

const WRITERS: u64 = 2;
const READ_WAIT: Duration = Duration::from_secs(2);
const ENFORCED_WAIT: Duration = Duration::from_secs(5);
const RETRY: Duration = Duration::from_millis(30);
/// How often a write is brought to a broker by the same client.
const ATTEMPTS_MAX: usize = 3;

pub(super) fn spawn(world: &World, node: u64, boot: u64, cluster: &Cluster) {
    for writer in 0..WRITERS {
        let rng = super::rng(world.seed(), (node << 32) | (boot << 8) | (writer + 1));
        tokio::spawn(Client { world: world.clone(), node, cluster: cluster.clone(), rng }.work());
    }
    let rng = super::rng(world.seed(), (node << 32) | (boot << 8) | 0xff);
    tokio::spawn(Client { world: world.clone(), node, cluster: cluster.clone(), rng }.probe());
    tokio::spawn(follow(world.clone(), node, cluster.clone()));
    tokio::spawn(operate(world.clone(), node, cluster.clone()));
}

struct Client {
    world: World,
    node: u64,
    cluster: Cluster,
    rng: StdRng,
}

impl Client {
    async fn work(mut self) {
        while !self.world.history(|history| history.quiet) {
            tokio::time::sleep(Duration::from_millis(self.rng.random_range(10..120))).await;
            match self.rng.random_range(0..100) {
                0..8 => {
                    if let Some(position) = self.new_write().await {
                        self.enforce(position).await;
                    }
                }
                8..50 => drop(self.new_write().await),
                50..58 => self.token().await,
                58..66 => self.orphan().await,
                _ => drop(self.read().await),
            }
        }
    }

    /// Once all is healed: one write and one read through this broker.
    async fn probe(mut self) {
        while !self.world.history(|history| history.healed) {
            tokio::time::sleep(RETRY).await;
        }
        while self.new_write().await.is_none() {
            tokio::time::sleep(RETRY).await;
        }
        while !self.read().await {
            tokio::time::sleep(RETRY).await;
        }
        self.world.trace(format_args!("{} serves again", host(self.node)));
        self.world.history(|history| history.served_again.insert(self.node));
    }

    async fn new_write(&mut self) -> Option<Id> {
        let key = self.rng.random_range(0..KEYS);
        let op = self.world.history(|history| history.new_write(key));
        self.write(op).await
    }

    /// Brings a write whose client died to this broker.
    async fn orphan(&mut self) {
        if let Some(op) = self.world.history(|history| history.adopt()) {
            self.write(op).await;
        }
    }

    async fn write(&mut self, op: usize) -> Option<Id> {
        for _ in 0..ATTEMPTS_MAX {
            let (key, value) = self.world.history(|history| history.invoke(op, self.node));
            let Some(asker) = directory(&self.cluster.state()) else {
                self.world.history(|history| history.answer(op, Attempt::Never));
                return None;
            };
            let id = self.world.ready(|ready| ready.keys.get(key).copied())?;
            let body = Body::ReplaceUser { id, version: None, fields: user(key, &value) };
            let idempotency = (self.world.bug() != Bug::RetriesAreNew).then(|| key_of(&value));
            let answer = self.propose(&value, asker, body, idempotency).await;
            self.world.history(|history| history.answer(op, answer));
            if let Attempt::Done(position) = answer {
                return Some(position);
            }
            tokio::time::sleep(RETRY).await;
        }
        None
    }

    async fn propose(&self, what: &str, asker: Asker, body: Body, idempotency: Option<[u8; 32]>) -> Attempt {
        let name = host(self.node);
        self.world.trace(format_args!("{name} asks {what}"));
        let result = self.cluster.propose(asker, body, idempotency).await;
        self.world.trace(format_args!("{name} answers {what}: {result:?}"));
        match result {
            Ok(done) => Attempt::Done(done.position),
            Err(ProposeError::Unknown) => Attempt::Maybe,
            Err(ProposeError::Busy { .. } | ProposeError::NoRoom | ProposeError::Unavailable) => Attempt::Never,
            Err(ProposeError::Refused(refused)) => {
                // Each write is of a value of its own, and asks for what is allowed.
                self.world.violated(format!("I2: `{what}` was refused: {refused}"));
                Attempt::Never
            }
        }
    }

    /// Something whose second application is refused, so that a client would see it.
    async fn token(&mut self) {
        let name = self.world.history(|history| history.new_token());
        let Some(owner) = owner(&self.cluster.state()) else { return };
        let body = Body::CreateToken { name: name.clone(), role: 1, secret_sha256: key_of(&name) };
        for _ in 0..ATTEMPTS_MAX {
            match self.propose(&name, owner.clone(), body.clone(), Some(key_of(&name))).await {
                Attempt::Done(position) => {
                    self.world.history(|history| history.token_made(name, position));
                    return;
                }
                Attempt::Maybe | Attempt::Never => tokio::time::sleep(RETRY).await,
            }
        }
    }

    async fn enforce(&self, position: Id) {
        let Ok(enforced) = self.cluster.enforced(position, ENFORCED_WAIT).await else { return };
        self.world.trace(format_args!("{} enforced {position}: {enforced:?}", host(self.node)));
        if enforced.complete {
            self.world.history(|history| history.enforced_everywhere(position));
        }
    }

    async fn read(&mut self) -> bool {
        let key = self.rng.random_range(0..KEYS);
        let Some(id) = self.world.ready(|ready| ready.keys.get(key).copied()) else { return false };
        let invoked = self.world.history(|history| history.tick());
        let state = if self.world.bug() == Bug::ReadsAskNobody {
            Ok(self.cluster.state())
        } else {
            self.cluster.linearizable(READ_WAIT).await
        };
        match state {
            Ok(state) => {
                let value = value_of(&state, id);
                let position = state.position();
                self.world.trace(format_args!("{} reads {key} at {position}: {value}", host(self.node)));
                self.world.history(|history| history.read(key, value, position, invoked));
                true
            }
            Err(error) => {
                self.world.trace(format_args!("{} does not read {key}: {error}", host(self.node)));
                false
            }
        }
    }
}

fn value_of(state: &State, id: Id) -> String {
    state.by_id::<User>(id).map(|user| user.display_name).unwrap_or_default()
}

fn key_of(text: &str) -> [u8; 32] {
    selvedge_proto::identity::sha256(text.as_bytes())
}

/// Follows the journal from where this broker's follower was, over crashes.
async fn follow(world: World, node: u64, cluster: Cluster) {
    let mut next = world.history(|history| history.follower_at(node));
    loop {
        let mut frames = Box::pin(cluster.events(Id::new(0, next)));
        let mut within = false;
        while let Some(frame) = frames.next().await {
            match frame {
                Ok(Frame::Events { position, events, last }) => {
                    for event in &events {
                        let id = event.id.unwrap_or_default();
                        if id.seq != next {
                            world.violated(format!("I4: {} was sent {id} where {next} follows", host(node)));
                        }
                        next = id.seq + 1;
                        let content = digest(&prost::Message::encode_to_vec(event));
                        let seen = Seen::of(event, content);
                        world.history(|history| history.saw(node, id, seen));
                    }
                    if events.last().and_then(|event| event.id) != Some(position) {
                        world.violated(format!("I4: {} was sent a frame that does not end at {position}", host(node)));
                    }
                    within = !last;
                    if last {
                        world.history(|history| history.followed(node, next));
                    }
                }
                Ok(Frame::Bookmark { position, .. }) => {
                    if within || position.seq + 1 != next {
                        world.violated(format!("I4: {} was sent a bookmark {position} at {next}", host(node)));
                    }
                }
                Err(Error::Compacted { upto } | Error::Elsewhere { upto, .. }) if upto >= next => {
                    // A snapshot has no journal: the others' followers saw what is missing here.
                    world.trace(format_args!("{} has no journal up to {upto}", host(node)));
                    next = upto + 1;
                    break;
                }
                Err(error) => {
                    world.violated(format!("I4: {} ends its stream at {next}: {error}", host(node)));
                    return;
                }
            }
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// Does what the schedule asks of this broker.
async fn operate(world: World, node: u64, cluster: Cluster) {
    loop {
        tokio::time::sleep(RETRY).await;
        match world.next_order(node) {
            Some(Order::Transfer) => {
                let Some(owner) = owner(&cluster.state()) else { continue };
                let result = cluster.transfer_leader(&owner, None).await;
                world.trace(format_args!("{} hands over: {:?}", host(node), result.err().map(|e| e.to_string())));
            }
            None => {}
        }
    }
}
