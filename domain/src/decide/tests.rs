//! Tables of (state, command) -> outcome and events.

use crate::command::*;
use crate::id::Id;
use crate::limits::{DRAIN_MS_MAX, LEASE_MS_DEFAULT};
use crate::rows::{self, AdminRole, EnrolKind};
use crate::spec;
use crate::state::{Changes, IndexKey, State, last_changes};

pub(super) const NODE: u64 = 7;

/// A cluster of one broker with an owner's token and a directory, driven by commands.
pub(super) struct World {
    pub(super) state: State,
    pub(super) changes: Changes,
    pub(super) now_ms: u64,
}

impl World {
    pub(super) fn new() -> Self {
        let mut world = Self { state: State::default(), changes: Changes::default(), now_ms: 1_000_000 };
        let init = InitCluster {
            cluster_id: [1; 16],
            trust_domain: "demo.test".into(),
            anchors: vec![1],
            owner_sha256: [9; 32],
            knock_secret: [8; 32],
            lease_ms: LEASE_MS_DEFAULT,
            hold_ms: 30_000,
        };
        world.done(Actor::BOOTSTRAP, Body::InitCluster(init));
        world.done(Actor::BOOTSTRAP, broker(NODE));
        world.done(world.owner(), Body::PutDirectory { name: "demo".into(), token_sha256: [5; 32] });
        world
    }

    fn propose(&mut self, actor: Actor, body: Body) -> Outcome {
        self.propose_with(actor, body, None)
    }

    fn propose_with(&mut self, actor: Actor, body: Body, dedupe: Option<Dedupe>) -> Outcome {
        let command = Command::new(actor, NODE, dedupe, body);
        assert_eq!(Command::decode(&command.encode()), Ok(command.clone()));
        let outcome = self.state.apply(self.now_ms, &command, &mut self.changes);
        let loaded = State::load(self.state.meta(), self.state.all_rows()).expect("the rows are a state");
        assert_eq!(loaded.state_hash(), self.state.state_hash());
        assert!(loaded.adds_up(), "the hash is that of the rows");
        assert!(loaded.is_same(&self.state), "what is found by name is what the rows say");
        outcome
    }

    /// The holder of the enrolment secret that [`key`] makes; while there is none, of one that nobody knows.
    pub(super) fn enrolment(&self) -> Actor {
        let key = self.state.find::<rows::EnrolKey>(IndexKey::secret(&[7; 32]));
        Actor::enrolment(key.map(|key| key.id()).unwrap_or_default())
    }

    pub(super) fn done(&mut self, actor: Actor, body: Body) -> Vec<Id> {
        match self.propose(actor, body) {
            Outcome::Done { ids, .. } => ids,
            Outcome::Refused(rejected) => panic!("refused: {rejected}"),
        }
    }

    pub(super) fn refused(&mut self, actor: Actor, body: Body) -> RejectedCode {
        let before = (self.state.state_hash(), self.state.position());
        match self.propose(actor, body) {
            Outcome::Done { .. } => panic!("not refused"),
            Outcome::Refused(rejected) => {
                assert_eq!((self.state.state_hash(), self.state.position()), before, "a refusal changes nothing");
                rejected.code
            }
        }
    }

    pub(super) fn owner(&self) -> Actor {
        let token = self.state.find::<rows::Token>(IndexKey::name("owner")).expect("made by init");
        Actor::token(token.id(), token.generation)
    }

    pub(super) fn directory(&self) -> Actor {
        let directory = self.state.find::<rows::Directory>(IndexKey::name("demo")).expect("made by new");
        Actor::directory(directory.id(), directory.generation)
    }

    pub(super) fn user(&mut self, name: &str) -> Id {
        self.done(self.directory(), Body::CreateUser(user(name)))[0]
    }
}

pub(super) fn broker(node: u64) -> Body {
    Body::PutBroker(PutBroker {
        node,
        name: format!("b{node}"),
        region: "eu".into(),
        host: "b.test".into(),
        edge: "127.0.0.1:1".into(),
        web: "127.0.0.1:2".into(),
        peer: "127.0.0.1:3".into(),
        roles: vec![1, 2, 3, 4],
    })
}

pub(super) fn user(name: &str) -> UserFields {
    UserFields {
        user_name: name.into(),
        external_id: String::new(),
        display_name: name.into(),
        active: true,
        attributes: "{}".into(),
    }
}

pub(super) fn key(kind: EnrolKind, target: &str, uses_max: u32) -> Body {
    Body::CreateEnrolKey(CreateEnrolKey {
        kind: kind as i32,
        name: "k".into(),
        target: target.into(),
        secret_sha256: [7; 32],
        uses_max,
        life_ms: 60_000,
    })
}

pub(super) fn enrol(kind: EnrolKind, key: u8) -> Body {
    Body::Enrol(Enrol { secret_sha256: [7; 32], kind: kind as i32, key_sha256: [key; 32], name: "x".into(), node: 0 })
}

fn segment(name: &str, host: &str, port: &str) -> ApplyPut {
    put(spec::Object::Segment(spec::Segment {
        name: name.into(),
        hosts: vec![host.into()],
        networks: vec![],
        tcp: vec![port.into()],
        udp: vec![],
        inclusive: false,
        connector_groups: vec!["g".into()],
        groups: vec![],
        idle_timeout_s: 0,
        absolute_timeout_s: 0,
    }))
}

fn put(object: spec::Object) -> ApplyPut {
    ApplyPut { object, compiled: None }
}

pub(super) fn group_objects() -> Vec<ApplyPut> {
    vec![
        put(spec::Object::ConnectorGroup(spec::ConnectorGroup { name: "g".into(), region: "eu".into() })),
        put(spec::Object::Region(spec::Region { name: "eu".into(), latitude: 50.0, longitude: 8.0 })),
    ]
}

pub(super) fn apply(puts: Vec<ApplyPut>) -> Body {
    Body::Apply(Apply { puts, deletes: vec![], expect_revision: None })
}

#[test]
fn a_cluster_is_initialised_once_and_nothing_comes_before() {
    let mut state = State::default();
    let early = Command::new(Actor::BROKER, 1, None, Body::Tick);
    let outcome = state.apply(1, &early, &mut Changes::default());
    assert!(matches!(outcome, Outcome::Refused(r) if r.code == RejectedCode::NotInitialised));
    let mut world = World::new();
    let again = InitCluster {
        cluster_id: [2; 16],
        trust_domain: "x".into(),
        anchors: vec![],
        owner_sha256: [0; 32],
        knock_secret: [0; 32],
        lease_ms: LEASE_MS_DEFAULT,
        hold_ms: 1,
    };
    assert_eq!(world.refused(Actor::BOOTSTRAP, Body::InitCluster(again)), RejectedCode::AlreadyInitialised);
}

#[test]
fn rights_are_checked_in_the_state_that_is_decided_on() {
    let mut world = World::new();
    let owner = world.owner();
    let create = |name: &str, role: AdminRole, secret| Body::CreateToken {
        name: name.into(),
        role: role as i32,
        secret_sha256: secret,
    };
    let admin = world.done(owner.clone(), create("admin", AdminRole::Admin, [1; 32]))[0];
    let admin = Actor::token(admin, 1);
    assert_eq!(world.refused(admin.clone(), create("other", AdminRole::Owner, [2; 32])), RejectedCode::Forbidden);
    world.done(owner.clone(), Body::RevokeToken { id: admin.id.expect("a token") });
    assert_eq!(world.refused(admin, key(EnrolKind::Broker, "", 1)), RejectedCode::Unauthenticated);
    assert_eq!(
        world.refused(owner.clone(), Body::RevokeToken { id: owner.id.expect("a token") }),
        RejectedCode::Conflict
    );
    assert_eq!(world.refused(Actor::BROKER, create("b", AdminRole::Owner, [3; 32])), RejectedCode::Forbidden);
    assert_eq!(world.refused(world.directory(), apply(vec![])), RejectedCode::Forbidden);
}

#[test]
fn a_transaction_is_applied_whole_or_not_at_all_in_any_order_of_its_objects() {
    let mut world = World::new();
    let owner = world.owner();
    let revision = world.state.cluster().expect("initialised").policy_revision;
    let mut puts = vec![segment("crm", "crm.internal", "80")];
    puts.extend(group_objects());
    world.done(owner.clone(), apply(puts));
    assert_eq!(world.state.cluster().expect("initialised").policy_revision, revision + 1);
    let overlapping = vec![segment("other", "crm.internal", "70-90"), segment("fine", "x.internal", "1")];
    assert_eq!(world.refused(owner.clone(), apply(overlapping)), RejectedCode::Conflict);
    assert!(world.state.find::<rows::Segment>(IndexKey::name("fine")).is_none());
    let delete = spec::Key { kind: spec::Kind::ConnectorGroup, name: "g".into() };
    let delete = Body::Apply(Apply { puts: vec![], deletes: vec![delete], expect_revision: None });
    assert_eq!(world.refused(owner.clone(), delete), RejectedCode::InUse);
    let stale = Body::Apply(Apply { puts: vec![], deletes: vec![], expect_revision: Some(revision) });
    assert_eq!(world.refused(owner, stale), RejectedCode::VersionMismatch);
}

#[test]
fn odd_objects_are_refused() {
    let mut world = World::new();
    let owner = world.owner();
    world.done(owner.clone(), apply(group_objects()));
    for (host, port) in
        [("*", "80"), ("*.", "80"), ("a b", "80"), ("x.internal", "0"), ("x.internal", "9-3"), ("x.internal", "65536")]
    {
        assert_eq!(
            world.refused(owner.clone(), apply(vec![segment("s", host, port)])),
            RejectedCode::Invalid,
            "{host} {port}"
        );
    }
    for network in ["0.0.0.0/0", "::/0", "::ffff:0:0/96", "10.0.0.0/33", "x"] {
        let mut one = segment("s", "x.internal", "80");
        if let spec::Object::Segment(segment) = &mut one.object {
            segment.networks = vec![network.into()];
        }
        assert_eq!(world.refused(owner.clone(), apply(vec![one])), RejectedCode::Invalid, "{network}");
    }
    let twice = vec![segment("s", "x.internal", "80"), segment("s", "y.internal", "80")];
    assert_eq!(world.refused(owner, apply(twice)), RejectedCode::Invalid);
}

#[test]
fn a_users_name_is_unique_without_regard_to_case_and_disabling_raises_the_generation() {
    let mut world = World::new();
    let ann = world.user("ann@demo.test");
    assert_eq!(world.refused(world.directory(), Body::CreateUser(user("ANN@demo.test"))), RejectedCode::Conflict);
    let disabled = UserFields { active: false, ..user("ann@demo.test") };
    let replace = Body::ReplaceUser { id: ann, version: Some(1), fields: disabled.clone() };
    world.done(world.directory(), replace);
    let row = world.state.by_id::<rows::User>(ann).expect("still there");
    assert_eq!((row.active, row.generation, row.version), (false, 2, 2));
    let stale = Body::ReplaceUser { id: ann, version: Some(1), fields: user("ann@demo.test") };
    assert_eq!(world.refused(world.directory(), stale), RejectedCode::VersionMismatch);
    let position = world.state.position();
    world.done(world.directory(), Body::ReplaceUser { id: ann, version: None, fields: disabled });
    assert_eq!(world.state.position(), position, "what changes nothing is no event");
}

#[test]
fn another_directory_does_not_see_a_user() {
    let mut world = World::new();
    let ann = world.user("ann@demo.test");
    let owner = world.owner();
    let other = world.done(owner, Body::PutDirectory { name: "other".into(), token_sha256: [6; 32] })[0];
    let other = Actor::directory(other, 1);
    assert_eq!(world.refused(other.clone(), Body::DeleteUser { id: ann, version: None }), RejectedCode::NotFound);
    let group = GroupFields { display_name: "g".into(), external_id: String::new(), members: vec![ann] };
    assert_eq!(world.refused(other, Body::CreateGroup(group)), RejectedCode::Invalid);
}

#[test]
fn members_and_users_agree_and_a_deleted_groups_number_is_not_reused() {
    let mut world = World::new();
    let (ann, bob) = (world.user("ann"), world.user("bob"));
    let directory = world.directory();
    let fields = |name: &str, members| GroupFields { display_name: name.into(), external_id: String::new(), members };
    let sales = world.done(directory.clone(), Body::CreateGroup(fields("sales", vec![ann, bob])))[0];
    let names = |world: &World, user| {
        let row = world.state.by_id::<rows::User>(user).expect("there");
        world.state.groups_of(&row).map(|group| group.display_name).collect::<Vec<_>>()
    };
    assert_eq!(names(&world, ann), ["sales"]);
    let change = ChangeGroup {
        id: sales,
        version: None,
        display_name: None,
        external_id: None,
        members: None,
        add: vec![],
        remove: vec![ann],
    };
    world.done(directory.clone(), Body::ChangeGroup(change));
    assert!(names(&world, ann).is_empty());
    world.done(directory.clone(), Body::DeleteGroup { id: sales, version: None });
    assert!(names(&world, bob).is_empty());
    let number = world.state.by_id::<rows::User>(bob).expect("there").groups[0];
    let next = world.done(directory.clone(), Body::CreateGroup(fields("sales", vec![])))[0];
    assert!(world.state.by_id::<rows::Group>(next).expect("there").number > number);
    world.done(directory, Body::DeleteUser { id: bob, version: None });
    assert_eq!(world.state.rows::<rows::Members>().count(), 0);
}

#[test]
fn a_command_that_is_refused_halfway_leaves_nothing_behind() {
    let mut world = World::new();
    let owner = world.owner();
    world.done(owner.clone(), apply(group_objects()));
    let before = world.state.clone();
    // The region gets other degrees and a second zone is made before the segment that names no group is refused.
    let Body::Apply(mut change) = apply(vec![
        put(spec::Object::Region(spec::Region { name: "eu".into(), latitude: 1.0, longitude: 2.0 })),
        put(spec::Object::Region(spec::Region { name: "us".into(), latitude: 1.0, longitude: 2.0 })),
        segment("lonely", "lonely.internal", "443"),
    ]) else {
        unreachable!("`apply` makes one")
    };
    change.deletes.push(spec::Key { kind: spec::Kind::ConnectorGroup, name: "g".into() });
    assert_eq!(world.refused(owner, Body::Apply(change)), RejectedCode::NotFound);
    assert!(world.state.is_same(&before));
}

#[test]
fn members_of_a_large_group_stand_in_rows_of_a_bounded_size() {
    let mut world = World::new();
    let directory = world.directory();
    let users: Vec<Id> = (0..2_500).map(|n| quickly(&mut world, Body::CreateUser(user(&format!("u{n}"))))[0]).collect();
    let fields = |members| GroupFields { display_name: "all".into(), external_id: String::new(), members };
    let odd: Vec<Id> = users.iter().copied().skip(1).step_by(2).collect();
    let group = world.done(directory.clone(), Body::CreateGroup(fields(odd)))[0];
    let change = |add: &[Id], remove: &[Id]| {
        let (add, remove) = (add.to_vec(), remove.to_vec());
        let (version, display_name, external_id, members) = (None, None, None, None);
        Body::ChangeGroup(ChangeGroup { id: group, version, display_name, external_id, members, add, remove })
    };
    let rows = |world: &World| world.state.rows::<rows::Members>().collect::<Vec<_>>();
    let numbers = |world: &World| rows(world).into_iter().flat_map(|row| row.users).collect::<Vec<_>>();
    world.done(directory.clone(), change(&users, &[]));
    assert_eq!(numbers(&world), (0..2_500).collect::<Vec<_>>());
    assert!(rows(&world).iter().all(|row| row.users.len() <= crate::limits::MEMBERS_ROW_MAX));
    assert!(rows(&world).iter().all(|row| row.users[0] >= row.from));
    world.done(directory.clone(), change(&users[..1], &users[..2_400]));
    assert_eq!(numbers(&world), (2_400..2_500).collect::<Vec<_>>());
    world.done(directory.clone(), change(&users[7..8], &users[2_450..]));
    assert_eq!(numbers(&world), [7].into_iter().chain(2_400..2_450).collect::<Vec<_>>());
    world.done(directory, change(&[], &users));
    assert!(rows(&world).is_empty());
}

/// Without the comparison with a state that was loaded, which is slow.
fn quickly(world: &mut World, body: Body) -> Vec<Id> {
    let command = Command::new(world.directory(), NODE, None, body);
    match world.state.apply(world.now_ms, &command, &mut world.changes) {
        Outcome::Done { ids, .. } => ids,
        Outcome::Refused(rejected) => panic!("refused: {rejected}"),
    }
}

#[test]
fn a_client_that_was_idle_for_a_day_is_forgotten_with_its_outcomes() {
    let mut world = World::new();
    let client = world.done(Actor::BROKER, Body::RegisterClient { boot: 1 })[0];
    let directory = world.directory();
    for seq in 1..=40 {
        let dedupe = Some(Dedupe { client, seq, acked_below: seq, idempotency: None });
        world.propose_with(directory.clone(), Body::CreateUser(user(&format!("u{seq}"))), dedupe);
    }
    let kept = |world: &World| world.state.rows::<rows::ClientOutcomes>().map(|row| row.outcomes.len()).sum::<usize>();
    assert!(kept(&world) <= 16, "what was acknowledged is not kept for long");
    let late = Some(Dedupe { client, seq: 39, acked_below: 1, idempotency: None });
    let late = world.propose_with(directory, Body::CreateUser(user("late")), late);
    assert!(matches!(late, Outcome::Refused(r) if r.code == RejectedCode::DedupeWindow));
    world.now_ms += crate::limits::CLIENT_IDLE_MS_MAX + 1;
    world.done(Actor::BROKER, Body::RegisterClient { boot: 2 });
    assert_eq!((kept(&world), world.state.rows::<rows::Client>().count()), (0, 1));
}

#[test]
fn an_enrolment_secret_is_used_as_often_as_it_may_be_and_a_repetition_is_free() {
    let mut world = World::new();
    let owner = world.owner();
    world.done(owner.clone(), apply(group_objects()));
    world.done(owner.clone(), key(EnrolKind::Connector, "g", 1));
    assert_eq!(world.refused(world.enrolment(), enrol(EnrolKind::Device, 1)), RejectedCode::KeyMismatch);
    let first = world.done(world.enrolment(), enrol(EnrolKind::Connector, 1));
    assert_eq!(world.done(world.enrolment(), enrol(EnrolKind::Connector, 1)), first);
    assert_eq!(world.refused(world.enrolment(), enrol(EnrolKind::Connector, 2)), RejectedCode::KeyExhausted);
    world.now_ms += 60_000;
    assert_eq!(world.refused(world.enrolment(), enrol(EnrolKind::Connector, 1)), RejectedCode::KeyVoid);
    let unknown =
        Body::Enrol(Enrol { secret_sha256: [0; 32], kind: 1, key_sha256: [1; 32], name: String::new(), node: 0 });
    assert_eq!(world.refused(world.enrolment(), unknown), RejectedCode::KeyUnknown);
}

#[test]
fn a_code_of_someone_who_left_enrols_nothing() {
    let mut world = World::new();
    let owner = world.owner();
    let ann = world.user("ann");
    world.done(owner, key(EnrolKind::Device, "ann", 1));
    let fields = UserFields { active: false, ..user("ann") };
    world.done(world.directory(), Body::ReplaceUser { id: ann, version: None, fields });
    assert_eq!(world.refused(world.enrolment(), enrol(EnrolKind::Device, 1)), RejectedCode::KeyVoid);
}

#[test]
fn a_retry_is_applied_once_and_answered_alike() {
    let mut world = World::new();
    let client = world.done(Actor::BROKER, Body::RegisterClient { boot: 1 })[0];
    assert_eq!(world.done(Actor::BROKER, Body::RegisterClient { boot: 1 }), [client]);
    let dedupe = |seq, idempotency| Some(Dedupe { client, seq, acked_below: 1, idempotency });
    let directory = world.directory();
    let first = world.propose_with(directory.clone(), Body::CreateUser(user("ann")), dedupe(1, Some([3; 32])));
    let position = world.state.position();
    assert_eq!(world.propose_with(directory.clone(), Body::CreateUser(user("ann")), dedupe(1, None)), first);
    assert_eq!(world.propose_with(directory.clone(), Body::CreateUser(user("ann")), dedupe(2, Some([3; 32]))), first);
    assert_eq!(world.state.position(), position);
    let far = world.propose_with(directory.clone(), Body::CreateUser(user("bob")), dedupe(5_000, None));
    assert!(matches!(far, Outcome::Done { .. }));
    let late = world.propose_with(directory.clone(), Body::CreateUser(user("cid")), dedupe(2, None));
    assert!(matches!(late, Outcome::Refused(r) if r.code == RejectedCode::DedupeWindow));
    let unknown = Some(Dedupe { client: Id::new(9, 9), seq: 1, acked_below: 1, idempotency: None });
    let unknown = world.propose_with(directory, Body::CreateUser(user("dan")), unknown);
    assert!(matches!(unknown, Outcome::Refused(r) if r.code == RejectedCode::DedupeUnknown));
}

#[test]
fn the_commands_of_an_entry_lead_to_what_each_alone_leads_to() {
    let mut world = World::new();
    let client = world.done(Actor::BROKER, Body::RegisterClient { boot: 1 })[0];
    let directory = world.directory();
    let create = |seq, acked_below, name: &str| {
        let dedupe = Some(Dedupe { client, seq, acked_below, idempotency: None });
        Command::new(directory.clone(), NODE, dedupe, Body::CreateUser(user(name)))
    };
    let mut commands: Vec<_> = (1..=60).map(|seq| create(seq, seq / 2, &format!("user-{seq}"))).collect();
    // A retry, one that comes too late, one whose name is taken, and a registration that forgets the client.
    commands.extend([create(60, 20, "user-60"), create(3, 1, "user-3"), create(61, 40, "user-1")]);
    let register = Command::new(Actor::BROKER, NODE, None, Body::RegisterClient { boot: 2 });
    commands.extend([register, create(62, 62, "user-62")]);

    let now_ms = world.now_ms + crate::limits::CLIENT_IDLE_MS_MAX;
    let (mut one, mut each) = (world.state.clone(), world.state);
    let (mut changes, mut changes_each) = (Changes::default(), Changes::default());
    let outcomes = one.apply_all(now_ms, &commands, &mut changes);
    let alone = commands.iter().map(|command| each.apply(now_ms, command, &mut changes_each));
    assert_eq!(outcomes, alone.collect::<Vec<_>>());
    assert!(one.is_same(&each) && one.adds_up(), "the rows are the same");
    assert_eq!((one.meta(), &changes.journal), (each.meta(), &changes_each.journal));
    let (written, written_each) = (last_changes(changes.rows), last_changes(changes_each.rows));
    assert!(written.iter().all(|row| written_each.contains(row)), "nothing else is written");
    assert!(written.len() < changes.journal.len() * 2, "a client's rows are written once");
}

#[test]
fn an_older_stream_does_not_change_availability() {
    let mut world = World::new();
    let owner = world.owner();
    world.done(owner.clone(), apply(group_objects()));
    world.done(owner, key(EnrolKind::Connector, "g", 1));
    let connector = world.done(world.enrolment(), enrol(EnrolKind::Connector, 1))[0];
    let change = |stream, up| Body::Availability(vec![AvailabilityChange { connector, stream, up, down: vec![] }]);
    world.done(Actor::BROKER, change(5, true));
    world.done(Actor::BROKER, change(4, false));
    assert!(world.state.rows::<rows::Availability>().all(|row| row.up && row.stream == 5));
}

#[test]
fn a_removed_broker_does_not_come_back_and_may_propose_nothing() {
    let mut world = World::new();
    let owner = world.owner();
    world.done(owner.clone(), broker(8));
    let stranger = Command::new(Actor::BROKER, 9, None, broker(9));
    let outcome = world.state.apply(1, &stranger, &mut Changes::default());
    assert!(matches!(outcome, Outcome::Refused(_)), "who never enrolled does not register itself");
    world.done(owner.clone(), Body::RemoveBroker { node: 8 });
    assert_eq!(world.refused(owner, broker(8)), RejectedCode::Forbidden);
    let command = Command::new(Actor::BROKER, 8, None, Body::Availability(vec![]));
    let outcome = world.state.apply(1, &command, &mut Changes::default());
    assert!(matches!(outcome, Outcome::Refused(r) if r.code == RejectedCode::Forbidden));
}

#[test]
fn a_broker_proposes_only_what_its_roles_allow() {
    use rows::BrokerRole::{Edge, Issuer, Web};
    let issued = CertificateIssued {
        serial: "1".into(),
        subject: "s".into(),
        key_sha256: [1; 32],
        not_after_ms: 1,
        of: Subject::Broker(NODE),
    };
    for (needed, body) in [
        (Web, apply(group_objects())),
        (Web, Body::CreateUser(user("ann"))),
        (Web, key(EnrolKind::Broker, "", 1)),
        (Web, Body::RevokeToken { id: Id::new(1, 2) }),
        (Web, Body::PutSettings { lease_ms: LEASE_MS_DEFAULT, hold_ms: 1 }),
        (Web, Body::RemoveBroker { node: 8 }),
        (Issuer, enrol(EnrolKind::Connector, 1)),
        (Issuer, Body::CertificateIssued(issued)),
        (Edge, Body::Availability(vec![])),
    ] {
        let mut world = World::new();
        let mut broker = world.state.broker(NODE).unwrap();
        broker.roles.retain(|role| *role != needed as i32);
        world.state.put(&broker);
        for actor in [world.owner(), Actor::BROKER, world.enrolment(), world.directory()] {
            assert_eq!(world.refused(actor, body.clone()), RejectedCode::Forbidden, "{body:?}");
        }
    }
}

#[test]
fn a_command_is_of_its_bodys_class() {
    let mut world = World::new();
    let owner = world.owner();
    let mut command = Command::new(owner, NODE, None, apply(group_objects()));
    command.class = Class::Operations;
    let outcome = world.state.apply(1, &command, &mut Changes::default());
    assert!(matches!(outcome, Outcome::Refused(refused) if refused.code == RejectedCode::Invalid));
}

#[test]
fn an_enrolment_is_of_the_secret_that_was_shown() {
    let mut world = World::new();
    let owner = world.owner();
    world.done(owner.clone(), apply(group_objects()));
    world.done(owner, key(EnrolKind::Connector, "g", 1));
    let other = Actor::enrolment(Id::new(1, 1));
    assert_eq!(world.refused(other, enrol(EnrolKind::Connector, 1)), RejectedCode::Forbidden);
}

#[test]
fn the_last_event_of_a_command_says_so_and_the_journal_is_chained() {
    let mut world = World::new();
    let owner = world.owner();
    world.changes = Changes::default();
    world.done(owner, apply(group_objects()));
    let lasts: Vec<bool> = world.changes.events.iter().map(|event| event.last).collect();
    assert_eq!(lasts, [false, false, true]);
    let seqs: Vec<u64> = world.changes.journal.iter().map(|row| row.seq).collect();
    assert!(seqs.windows(2).all(|pair| pair[1] == pair[0] + 1));
    assert_eq!(world.state.meta().journal_hash.len(), 32);
}

#[test]
fn a_drain_has_a_deadline_that_a_registration_does_not_forget() {
    let mut world = World::new();
    let owner = world.owner();
    let drain = |draining, within_ms| Body::DrainBroker { node: NODE, draining, within_ms };
    let row = |world: &World| {
        let row = world.state.broker(NODE).expect("registered");
        (row.draining, row.drain_until_ms)
    };
    world.done(owner.clone(), drain(true, 5_000));
    let until_ms = world.now_ms + 5_000;
    assert_eq!(row(&world), (true, until_ms));
    world.now_ms += 1_000;
    world.done(Actor::BROKER, broker(NODE));
    assert_eq!(row(&world), (true, until_ms), "it was started again");
    assert_eq!(world.refused(owner.clone(), drain(true, DRAIN_MS_MAX + 1)), RejectedCode::Invalid);
    world.done(owner, drain(false, 0));
    assert_eq!(row(&world), (false, 0));
}
