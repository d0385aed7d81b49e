//! Whatever commands were decided, the rows that a replica wrote are the state, and a state that was loaded from them
//! decides everything after as the one that it came from does.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

use super::*;
use crate::command::{
    Actor, Apply, ApplyPut, AvailabilityChange, Body, CertificateIssued, ChangeGroup, CreateEnrolKey, CursorMove,
    Dedupe, Enrol, GroupFields, InitCluster, PutBroker, Subject, UserFields,
};
use crate::decide::VERSION;
use crate::limits::LEASE_MS_DEFAULT;
use crate::spec;

const NODE: u64 = 7;
const DAY_MS: u64 = 24 * 3_600_000;

/// A command to be made of what there is by then, from a few names and a few of the ids made so far.
type Step = (u8, [usize; 4], bool, Option<(u64, bool)>);

fn steps() -> impl Strategy<Value = Vec<Vec<Step>>> {
    let kind = 0..KINDS;
    let dedupe = proptest::option::of((1..30u64, any::<bool>()));
    let step = (kind, [0..6usize, 0..6, 0..40, 0..40], any::<bool>(), dedupe);
    // Batches, as they are written.
    proptest::collection::vec(proptest::collection::vec(step, 1..4), 1..40)
}

/// Replicas and what they have written.
struct World {
    state: State,
    written: BTreeMap<(u8, Vec<u8>), Arc<[u8]>>,
    ids: Vec<Id>,
    now_ms: u64,
    /// Kinds of commands that were done, not refused.
    done: BTreeSet<String>,
}

impl World {
    fn new() -> Self {
        let written = BTreeMap::new();
        let mut world =
            Self { state: State::default(), written, ids: Vec::new(), now_ms: DAY_MS, done: BTreeSet::new() };
        let init = InitCluster {
            cluster_id: [1; 16],
            trust_domain: "demo.test".into(),
            anchors: vec![1],
            owner_sha256: [9; 32],
            knock_secret: [8; 32],
            lease_ms: LEASE_MS_DEFAULT,
            hold_ms: 30_000,
        };
        world.batch(vec![
            Command::new(Actor::BOOTSTRAP, NODE, None, Body::InitCluster(init)),
            Command::new(Actor::BOOTSTRAP, NODE, None, broker(NODE, 0)),
        ]);
        world
    }

    /// Applies commands to the state, and to the one that is loaded from what was written before.
    fn batch(&mut self, commands: Vec<Command>) {
        let mut loaded = self.load();
        let (mut changes, mut again) = (Changes::default(), Changes::default());
        for command in &commands {
            let outcome = self.state.apply(self.now_ms, command, &mut changes);
            assert_eq!(loaded.apply(self.now_ms, command, &mut again), outcome, "{command:?}");
            if let Outcome::Done { ids, .. } = outcome {
                self.ids.extend(ids);
                self.done.insert(name(&command.body));
            }
        }
        assert_eq!(again, changes, "the loaded state goes another way after {commands:?}");
        for row in last_changes(changes.rows) {
            let key = (row.table, row.key);
            match row.value {
                Some(value) => drop(self.written.insert(key, value)),
                None => drop(self.written.remove(&key)),
            }
        }
        self.is_what_was_written();
    }

    fn load(&self) -> State {
        let rows = self.written.iter().map(|((table, key), value)| RowChange {
            table: *table,
            key: key.clone(),
            value: Some(value.clone()),
        });
        State::load(self.state.meta(), rows).expect("what was written is a state")
    }

    fn is_what_was_written(&self) {
        let loaded = self.load();
        assert!(loaded.is_same(&self.state), "rows, or what they are found by");
        assert_eq!(loaded.meta(), self.state.meta());
        assert!(loaded.adds_up(), "the hash is that of the rows");
    }

    /// Anything that was made.
    fn id(&self, number: usize) -> Id {
        self.ids.get(number % self.ids.len().max(1)).copied().unwrap_or(Id::new(1, 1))
    }

    fn owner(&self) -> Actor {
        let tokens = self.state.rows::<rows::Token>();
        let token = tokens.filter(|token| !token.revoked && token.role() == rows::AdminRole::Owner).last();
        let token = token.expect("the last owner is not revoked");
        Actor::token(token.id(), token.generation)
    }

    fn directory(&self, number: usize) -> Actor {
        let directory = self.state.find::<rows::Directory>(IndexKey::name(NAMES[number % 2]));
        directory.map_or(Actor::BROKER, |found| Actor::directory(found.id(), found.generation))
    }

    fn enrolment(&self, secret: u8) -> Actor {
        let key = self.state.find::<rows::EnrolKey>(IndexKey::secret(&[secret; 32]));
        Actor::enrolment(key.map(|key| key.id()).unwrap_or_default())
    }

    /// An id of what is in a table; of anything, when that is empty.
    fn some<R: Row>(&self, number: usize, id: impl Fn(&R) -> Id) -> Id {
        let ids: Vec<Id> = self.state.rows::<R>().map(|row| id(&row)).collect();
        ids.get(number % ids.len().max(1)).copied().unwrap_or_else(|| self.id(number))
    }

    fn user(&self, number: usize) -> Id {
        self.some(number, rows::User::id)
    }

    fn command(&mut self, (kind, [a, b, c, d], flag, dedupe): Step) -> Command {
        let (actor, body) = self.body(kind, [a, b, c, d], flag);
        let client = self.state.rows::<rows::Client>().last().map(|client| client.id());
        let dedupe = client.zip(dedupe).map(|(client, (seq, keyed))| Dedupe {
            client,
            seq,
            acked_below: seq.saturating_sub(d as u64 % 9),
            idempotency: keyed.then_some([a as u8; 32]),
        });
        Command::new(actor, NODE, dedupe, body)
    }

    fn body(&mut self, kind: u8, [a, b, c, d]: [usize; 4], flag: bool) -> (Actor, Body) {
        let text = NAMES[a].to_owned();
        let owner = self.owner();
        let users = |world: &Self| vec![world.user(c), world.user(d)];
        match kind {
            0 => {
                // Sometimes so much that clients and keys expire.
                self.now_ms += if flag { 2 * DAY_MS } else { 50 };
                (Actor::BROKER, Body::Tick)
            }
            1 => (Actor::BROKER, Body::RegisterClient { boot: b as u64 }),
            2 => (owner, broker(NODE + b as u64 % 3, a)),
            3 => (owner, Body::RemoveBroker { node: NODE + 1 + b as u64 % 2 }),
            4 => (owner, Body::DrainBroker { node: NODE, draining: flag, within_ms: c as u64 }),
            5 => (owner, Body::PutSettings { lease_ms: LEASE_MS_DEFAULT + c as u64, hold_ms: d as u64 }),
            6 => (Actor::BROKER, Body::CompactJournal { upto_seq: self.state.position().seq.saturating_sub(c as u64) }),
            7 => (owner, Body::KeepJournal { keep_ms: DAY_MS + c as u64 }),
            8 => (owner, Body::CreateToken { name: text, role: 1 + b as i32 % 3, secret_sha256: [c as u8; 32] }),
            9 => (owner, Body::RevokeToken { id: self.some(c, rows::Token::id) }),
            10 => (owner, Body::PutDirectory { name: NAMES[a % 2].to_owned(), token_sha256: [c as u8; 32] }),
            11 => (self.directory(b), Body::CreateUser(user(a, c, true))),
            12 => {
                let replace = Body::ReplaceUser { id: self.user(c), version: None, fields: user(a, d, flag) };
                (self.directory(b), replace)
            }
            13 => (self.directory(b), Body::DeleteUser { id: self.user(c), version: None }),
            14 => {
                let fields = GroupFields {
                    display_name: text,
                    external_id: if flag { NAMES[b].to_owned() } else { String::new() },
                    members: users(self),
                };
                (self.directory(b), Body::CreateGroup(fields))
            }
            15 => {
                let change = ChangeGroup {
                    id: self.some(c, rows::Group::id),
                    version: None,
                    display_name: flag.then_some(text),
                    external_id: None,
                    members: (d % 4 == 0).then(|| users(self)),
                    add: vec![self.user(d)],
                    remove: vec![self.user(c)],
                };
                (self.directory(b), Body::ChangeGroup(change))
            }
            16 => (self.directory(b), Body::DeleteGroup { id: self.some(c, rows::Group::id), version: None }),
            17 => (owner, Body::Apply(objects(a, b, c, flag))),
            18 => (owner, Body::RaiseMinVersion { version: VERSION }),
            19 => {
                let target = match b % 4 {
                    0 => NAMES[c % 2].to_owned(),
                    1 => "voter".to_owned(),
                    _ => text.clone(),
                };
                let kind = [1, 4, 2, 3][b % 4];
                let (uses_max, life_ms) = (1 + d as u32 % 3, DAY_MS);
                let secret_sha256 = [d as u8; 32];
                (
                    owner,
                    Body::CreateEnrolKey(CreateEnrolKey { kind, name: text, target, secret_sha256, uses_max, life_ms }),
                )
            }
            20 => (owner, Body::RevokeEnrolKey { id: self.some(c, rows::EnrolKey::id) }),
            21 => {
                let keys: Vec<rows::EnrolKey> = self.state.rows().collect();
                let key = keys.get(d % keys.len().max(1));
                let secret = key.and_then(|key| key.secret_sha256.first().copied()).unwrap_or(0);
                let enrol = Enrol {
                    secret_sha256: [secret; 32],
                    kind: key.map_or(1, |key| key.kind),
                    key_sha256: [c as u8; 32],
                    name: text,
                    node: 100 + c as u64,
                };
                (self.enrolment(secret), Body::Enrol(enrol))
            }
            22 => {
                let of = match b % 4 {
                    0 => Subject::Device(self.some(c, rows::Device::id)),
                    1 => Subject::Workload(self.some(c, rows::Workload::id)),
                    2 => Subject::Connector(self.some(c, rows::Connector::id)),
                    _ => Subject::Broker(NODE),
                };
                let (serial, subject) = (format!("{d:02x}"), text);
                let issued = CertificateIssued { serial, subject, key_sha256: [c as u8; 32], not_after_ms: 1, of };
                (Actor::BROKER, Body::CertificateIssued(issued))
            }
            23 => {
                let subject = match b % 4 {
                    0 => Subject::Device(self.some(c, rows::Device::id)),
                    1 => Subject::Workload(self.some(c, rows::Workload::id)),
                    2 => Subject::Connector(self.some(c, rows::Connector::id)),
                    _ => Subject::Broker(100 + c as u64),
                };
                (owner, Body::Revoke { subject })
            }
            24 => {
                let down = if flag { vec![format!("{text}:80")] } else { Vec::new() };
                let connector = self.some(c, rows::Connector::id);
                let change = AvailabilityChange { connector, stream: d as u64, up: flag, down };
                (Actor::BROKER, Body::Availability(vec![change]))
            }
            _ => {
                let receiver = self.some(c, rows::Receiver::id);
                let cursor = CursorMove { receiver, broker: NODE, boot: b as u64, next_seq: d as u64 };
                (Actor::BROKER, Body::MoveCursors(vec![cursor]))
            }
        }
    }
}

const KINDS: u8 = 26;
const NAMES: [&str; 6] = ["corp", "partners", "Ann", "ann", "sales", "a name that is longer than a short key"];

fn name(body: &Body) -> String {
    format!("{body:?}").chars().take_while(char::is_ascii_alphanumeric).collect()
}

fn broker(node: u64, name: usize) -> Body {
    Body::PutBroker(PutBroker {
        node,
        name: format!("{}-{node}", NAMES[name]),
        region: "eu".into(),
        host: "b.test".into(),
        edge: "127.0.0.1:1".into(),
        web: "127.0.0.1:2".into(),
        peer: "127.0.0.1:3".into(),
        roles: vec![1, 2, 3, 4],
    })
}

fn user(name: usize, more: usize, active: bool) -> UserFields {
    UserFields {
        user_name: NAMES[name].into(),
        external_id: if more.is_multiple_of(3) { String::new() } else { format!("x{}", more % 5) },
        display_name: format!("{more}"),
        active,
        attributes: "{}".into(),
    }
}

/// A region and a group are named by most of the others, so they often come along.
fn objects(a: usize, b: usize, c: usize, flag: bool) -> Apply {
    use spec::Object;
    let name = NAMES[a].to_owned();
    let group = NAMES[b % 2].to_owned();
    let region = |name: &str| spec::Region { name: name.to_owned(), latitude: b as f64, longitude: c as f64 };
    let connector_group = spec::ConnectorGroup { name: group.clone(), region: "eu".into() };
    let object = match c % 6 {
        0 => Object::Region(region(&name)),
        1 => Object::Zone(spec::Zone { name: format!("z{a}.internal") }),
        2 => Object::SegmentGroup(spec::SegmentGroup { name: name.clone() }),
        3 => Object::Segment(spec::Segment {
            name: name.clone(),
            hosts: vec![format!("h{b}.internal")],
            networks: vec![],
            tcp: vec![format!("{}", 80 + a)],
            udp: vec![],
            inclusive: flag,
            connector_groups: vec![group],
            groups: vec![],
            idle_timeout_s: 0,
            absolute_timeout_s: 0,
        }),
        4 => Object::Receiver(spec::Receiver {
            name: name.clone(),
            address: "127.0.0.1:514".into(),
            tls_ca: String::new(),
            tls_name: String::new(),
        }),
        _ => Object::ConnectorGroup(spec::ConnectorGroup { name: name.clone(), region: "eu".into() }),
    };
    let key = object.key();
    let mut puts = vec![Object::Region(region("eu")), Object::ConnectorGroup(connector_group), object];
    puts.dedup_by_key(|object| object.key());
    let delete = flag && c.is_multiple_of(5);
    let deletes = if delete { vec![puts.pop().map_or(key, |object| object.key())] } else { Vec::new() };
    let puts = puts.into_iter().map(|object| ApplyPut { object, compiled: None }).collect();
    Apply { puts, deletes, expect_revision: None }
}

#[test]
fn a_state_loaded_from_what_was_written_is_the_one_that_it_came_from_and_goes_on_alike() {
    let done = RefCell::new(BTreeSet::new());
    let config = Config { failure_persistence: None, ..Config::with_cases(96) };
    let mut runner = TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha));
    let result = runner.run(&steps(), |batches| {
        let mut world = World::new();
        for batch in batches {
            let commands = batch.into_iter().map(|step| world.command(step)).collect();
            world.batch(commands);
        }
        done.borrow_mut().append(&mut world.done);
        Ok(())
    });
    if let Err(error) = result {
        panic!("{error}");
    }
    // And the first command of a cluster.
    assert_eq!(done.borrow().len(), usize::from(KINDS) + 1, "of each kind some were done: {:?}", done.borrow());
}
