//! A new epoch: what is void, who is held, and who lets them be.

use super::tests::{NODE, World, apply, broker, enrol, group_objects, key, user};
use super::{BeginEpoch, Beyond};
use crate::command::*;
use crate::id::Id;
use crate::rows::{self, EnrolKind};
use crate::state::{IndexKey, State, Table};

const NEXT: u64 = 8;

fn begin(holds: bool) -> BeginEpoch {
    let Body::PutBroker(next) = broker(NEXT) else { panic!("a broker") };
    BeginEpoch { cluster_id: [1; 16], epoch: 2, broker: next, owner_sha256: [10; 32], holds, beyond: Beyond::default() }
}

/// A world with a person, their device and a connector.
struct Peopled {
    world: World,
    ann: Id,
    device: Id,
    connector: Id,
}

fn peopled() -> Peopled {
    let mut world = World::new();
    world.done(world.owner(), apply(group_objects()));
    let ann = world.user("ann");
    world.done(world.owner(), key(EnrolKind::Device, "ann", 1));
    let device = world.done(world.enrolment(), enrol(EnrolKind::Device, 1))[0];
    let Body::CreateEnrolKey(connectors) = key(EnrolKind::Connector, "g", 1) else { panic!("a key") };
    world.done(world.owner(), Body::CreateEnrolKey(CreateEnrolKey { secret_sha256: [6; 32], ..connectors }));
    let secret = world.state.find::<rows::EnrolKey>(IndexKey::secret(&[6; 32])).expect("made above").id();
    let Body::Enrol(connector) = enrol(EnrolKind::Connector, 2) else { panic!("an enrolment") };
    let connector = Body::Enrol(Enrol { secret_sha256: [6; 32], ..connector });
    let connector = world.done(Actor::enrolment(secret), connector)[0];
    Peopled { world, ann, device, connector }
}

impl World {
    fn begin(&mut self, begin: &BeginEpoch) {
        self.changes = Default::default();
        self.state.begin_epoch(self.now_ms, begin, &mut self.changes).expect("begins");
        let loaded = State::load(self.state.meta(), self.state.all_rows()).expect("the rows are a state");
        assert!(loaded.adds_up() && loaded.is_same(&self.state));
    }

    /// Proposes through the new epoch's broker.
    fn now(&mut self, actor: Actor, body: Body) -> Outcome {
        let command = Command::new(actor, NEXT, None, body);
        self.state.apply(self.now_ms, &command, &mut self.changes)
    }

    fn new_owner(&self) -> Actor {
        let token = self.state.find::<rows::Token>(IndexKey::secret(&[10; 32])).expect("made by the new epoch");
        Actor::token(token.id(), token.generation)
    }

    fn holds_device(&self, id: Id) -> bool {
        let device = self.state.by_id::<rows::Device>(id).expect("a device");
        self.state.is_held(id, device.vouched_epoch)
    }

    fn holds_connector(&self, id: Id) -> bool {
        let connector = self.state.by_id::<rows::Connector>(id).expect("a connector");
        self.state.is_held(id, connector.vouched_epoch)
    }

    fn holds_user(&self, id: Id) -> bool {
        let user = self.state.by_id::<rows::User>(id).expect("a user");
        self.state.is_held(id, user.vouched_epoch)
    }
}

fn code(outcome: Outcome) -> RejectedCode {
    match outcome {
        Outcome::Done { .. } => RejectedCode::None,
        Outcome::Refused(rejected) => rejected.code,
    }
}

#[test]
fn numbers_of_events_go_on_in_the_next_epoch_and_the_journal_begins_there() {
    let mut world = peopled().world;
    let before = world.state.position();
    world.begin(&begin(true));
    let first = world.changes.events.first().and_then(|event| event.id).expect("an event");
    assert_eq!(first, Id::new(before.epoch + 1, before.seq + 1));
    assert_eq!(world.changes.events[0].event.as_ref().map(|event| event.name()), Some("epoch.began"));
    assert_eq!(world.state.meta().journal_compacted, before.seq);
    assert!(world.changes.events.last().is_some_and(|event| event.last), "it is one command");
    let made = world.now(world.new_owner(), Body::PutDirectory { name: "other".into(), token_sha256: [4; 32] });
    let Outcome::Done { ids, .. } = made else { panic!("{made:?}") };
    assert_eq!(ids[0].epoch, before.epoch + 1);
}

#[test]
fn tokens_of_the_earlier_epoch_and_its_brokers_are_void() {
    let mut world = peopled().world;
    let (owner, directory) = (world.owner(), world.directory());
    world.done(world.owner(), Body::RegisterClient { boot: 1 });
    let Body::CreateEnrolKey(unused) = key(EnrolKind::Connector, "g", 9) else { panic!("a key") };
    world.done(world.owner(), Body::CreateEnrolKey(CreateEnrolKey { secret_sha256: [3; 32], ..unused }));
    world.begin(&begin(false));
    let put = || Body::PutDirectory { name: "x".into(), token_sha256: [2; 32] };
    assert_eq!(code(world.now(owner.clone(), put())), RejectedCode::Unauthenticated);
    assert_eq!(code(world.now(directory, Body::CreateUser(user("bob")))), RejectedCode::Unauthenticated);
    assert!(world.state.find::<rows::Directory>(IndexKey::secret(&[5; 32])).is_none(), "its secret leads nowhere");
    assert!(world.state.rows::<rows::EnrolKey>().all(|key| key.revoked));
    assert!(world.state.row::<rows::Broker>(&NODE.to_be_bytes()).is_some_and(|broker| broker.removed));
    assert_eq!((world.state.count(Table::Client), world.state.count(Table::Availability)), (0, 0));
    // Through the old broker, with the new owner's token.
    let command = Command::new(world.new_owner(), NODE, None, put());
    let outcome = world.state.apply(world.now_ms, &command, &mut world.changes);
    assert_eq!(code(outcome), RejectedCode::Forbidden);
    assert_eq!(code(world.now(world.new_owner(), put())), RejectedCode::None);
}

#[test]
fn whom_nobody_vouches_for_is_held_until_each_is_let_be_in_its_own_way() {
    let Peopled { mut world, ann, device, connector } = peopled();
    world.begin(&begin(true));
    assert!(world.holds_user(ann) && world.holds_device(device) && world.holds_connector(connector));

    // A certificate or a code for one that is held would be a way around.
    let issued = Body::CertificateIssued(CertificateIssued {
        serial: "aa".into(),
        subject: "spiffe://demo.test/connector/1-1".into(),
        key_sha256: [2; 32],
        not_after_ms: u64::MAX,
        of: Subject::Connector(connector),
    });
    assert_eq!(code(world.now(Actor::BROKER, issued.clone())), RejectedCode::Forbidden);
    let Body::CreateEnrolKey(code_for_ann) = key(EnrolKind::Device, "ann", 1) else { panic!("a key") };
    let made = Body::CreateEnrolKey(CreateEnrolKey { secret_sha256: [2; 32], ..code_for_ann });
    assert_eq!(code(world.now(world.new_owner(), made)), RejectedCode::None);
    let secret = world.state.find::<rows::EnrolKey>(IndexKey::secret(&[2; 32])).expect("made above").id();
    let Body::Enrol(again) = enrol(EnrolKind::Device, 3) else { panic!("an enrolment") };
    let again = Body::Enrol(Enrol { secret_sha256: [2; 32], ..again });
    assert_eq!(code(world.now(Actor::enrolment(secret), again)), RejectedCode::Forbidden);

    // The directory says that there is such a person, though nothing new of them.
    let owner = world.new_owner();
    assert_eq!(
        code(world.now(owner.clone(), Body::PutDirectory { name: "demo".into(), token_sha256: [4; 32] })),
        RejectedCode::None
    );
    let replaced = Body::ReplaceUser { id: ann, version: None, fields: user("ann") };
    assert_eq!(code(world.now(world.directory(), replaced)), RejectedCode::None);
    assert!(!world.holds_user(ann) && world.holds_device(device));

    for subject in [Subject::Device(device), Subject::Connector(connector)] {
        let released = world.now(owner.clone(), Body::Release(Release::Subject(subject)));
        assert_eq!(code(released), RejectedCode::None);
    }
    assert!(!world.holds_device(device) && !world.holds_connector(connector));
    assert_eq!(code(world.now(Actor::BROKER, issued)), RejectedCode::None);
}

#[test]
fn everything_is_released_by_an_owner_who_names_the_cluster() {
    let Peopled { mut world, ann, device, connector } = peopled();
    world.begin(&begin(true));
    let owner = world.new_owner();
    let release = |cluster_id| Body::Release(Release::Everything { cluster_id });
    assert_eq!(code(world.now(owner.clone(), release([2; 16]))), RejectedCode::Invalid);
    assert!(world.holds_user(ann));
    assert_eq!(code(world.now(Actor::BROKER, release([1; 16]))), RejectedCode::Forbidden);
    assert_eq!(code(world.now(owner, release([1; 16]))), RejectedCode::None);
    assert!(!world.holds_user(ann) && !world.holds_device(device) && !world.holds_connector(connector));
}

#[test]
fn a_whole_state_holds_nobody_and_ends_no_hold_of_before() {
    let Peopled { mut world, ann, device, .. } = peopled();
    world.begin(&begin(false));
    assert!(!world.holds_user(ann) && !world.holds_device(device));

    let Peopled { mut world, ann, device, connector } = peopled();
    world.begin(&begin(true));
    let released = world.now(world.new_owner(), Body::Release(Release::Subject(Subject::Connector(connector))));
    assert_eq!(code(released), RejectedCode::None);
    let Body::PutBroker(third) = broker(NEXT + 1) else { panic!("a broker") };
    world.begin(&BeginEpoch { epoch: 3, broker: third.clone(), owner_sha256: [11; 32], ..begin(false) });
    assert!(world.holds_user(ann) && world.holds_device(device) && !world.holds_connector(connector));
    let fourth = PutBroker { node: NEXT + 2, ..third };
    world.begin(&BeginEpoch { epoch: 9, broker: fourth, owner_sha256: [12; 32], ..begin(true) });
    assert!(world.holds_connector(connector), "what was released before is not after another loss");
}

#[test]
fn what_is_known_to_be_revoked_beyond_the_state_stays_revoked() {
    let Peopled { mut world, ann, device, connector } = peopled();
    let bob = world.user("bob");
    let fields = GroupFields { display_name: "sales".into(), external_id: String::new(), members: vec![ann, bob] };
    let sales = world.done(world.directory(), Body::CreateGroup(fields))[0];
    let unknown = Id::new(1, 999_999);
    let beyond = Beyond {
        revoked: vec![Subject::Device(device), Subject::Connector(connector), Subject::Workload(unknown)],
        disabled: vec![ann, unknown],
        left: vec![(sales, vec![bob, unknown]), (unknown, vec![bob])],
        certificates: vec![rows::Certificate { serial: "bb".into(), ..Default::default() }],
    };
    world.begin(&BeginEpoch { beyond, ..begin(true) });
    assert_eq!(
        code(world.now(world.new_owner(), Body::Release(Release::Everything { cluster_id: [1; 16] }))),
        RejectedCode::None
    );
    let user = |world: &World, id| world.state.by_id::<rows::User>(id).expect("a user");
    assert!(!user(&world, ann).active && user(&world, ann).generation == 2);
    assert!(user(&world, bob).active && user(&world, bob).groups.is_empty());
    assert!(world.state.by_id::<rows::Device>(device).is_some_and(|row| row.revoked && row.generation == 2));
    assert!(world.state.by_id::<rows::Connector>(connector).is_some_and(|row| row.revoked));
    let released = world.now(world.new_owner(), Body::Release(Release::Subject(Subject::Device(device))));
    assert_eq!(code(released), RejectedCode::NotFound, "a release is no way back");
    assert!(world.state.row::<rows::Certificate>(b"bb").is_some());
}

#[test]
fn the_state_of_another_cluster_a_used_node_or_an_epoch_that_was_begins_nothing() {
    let mut world = peopled().world;
    let before = (world.state.state_hash(), world.state.position());
    let Body::PutBroker(used) = broker(NODE) else { panic!("a broker") };
    for (wrong, refused) in [
        (BeginEpoch { cluster_id: [2; 16], ..begin(true) }, RejectedCode::Forbidden),
        (BeginEpoch { broker: used, ..begin(true) }, RejectedCode::Conflict),
        (BeginEpoch { epoch: 1, ..begin(true) }, RejectedCode::Invalid),
    ] {
        let error = world.state.begin_epoch(world.now_ms, &wrong, &mut world.changes).expect_err("refused");
        assert_eq!(error.code, refused);
        assert_eq!((world.state.state_hash(), world.state.position()), before);
    }
}

#[test]
fn cluster_time_is_set_forward_by_an_owner_and_never_back() {
    let mut world = World::new();
    let (owner, now_ms) = (world.owner(), world.now_ms);
    let to_ms = now_ms + 40 * 24 * 3_600_000;
    assert_eq!(world.refused(world.directory(), Body::SetTime { time_ms: to_ms }), RejectedCode::Forbidden);
    world.done(owner.clone(), Body::SetTime { time_ms: to_ms });
    assert_eq!(world.state.time_ms(), to_ms);
    assert_eq!(world.refused(owner.clone(), Body::SetTime { time_ms: to_ms }), RejectedCode::Invalid);
    assert_eq!(world.refused(owner, Body::SetTime { time_ms: now_ms }), RejectedCode::Invalid);
    assert_eq!(world.state.time_ms(), to_ms, "an entry with an earlier stamp does not bring it back");
}
