//! What commands lead to: `decide` says which events, `evolve` (in `Draft::emit`) writes them.
//!
//! Pure and total over the committed state, the entry's time and the command. The state says which version of the rules
//! is in force: what any of them returns for an input changes only by asking [`State::version`], and brokers of both
//! versions go on as one cluster until `RaiseMinVersion` says that all know the new one.

mod access;
mod apply;
mod availability;
mod cluster;
mod enrol;
mod epoch;
mod group;
mod remember;
#[cfg(test)]
mod restored_tests;
#[cfg(test)]
mod tests;
mod user;

use std::collections::BTreeMap;
use std::sync::Arc;

use prost::Message as _;

use crate::command::{Actor, ActorKind, Body, Command, Rejected, RejectedCode};
use crate::event::{Envelope, Event};
use crate::id::Id;
use crate::limits::{JOURNAL_MARK_EVERY, MEMBERS_ROW_MAX};
use crate::rows::{self, AdminRole, Members, Row};
use crate::state::{Changes, IndexKey, JournalRow, Meta, State, Table};

pub(crate) use epoch::begin_epoch;
pub use epoch::{BeginEpoch, Beyond};
pub(crate) use remember::Memory;
use remember::forget_all;

/// The version of the rules that this build knows.
pub const VERSION: u32 = if cfg!(feature = "next") { 2 } else { 1 };
/// The version that clusters began with.
const VERSION_FIRST: u32 = 1;

/// A state in which a command is being decided: each event is written at once, so that later checks of the same
/// command see it; dropped as a whole when the command is refused.
pub(crate) struct Draft {
    pub state: State,
    pub ids: Vec<Id>,
    time_ms: u64,
    proposer: u64,
    actor: Actor,
    changes: Changes,
    /// What the changed rows were, in the same order; and the counters.
    before: Vec<Option<Arc<[u8]>>>,
    meta_before: Meta,
}

impl Draft {
    pub fn new(state: State, time_ms: u64, command: &Command) -> Self {
        Self::by(state, time_ms, command.proposer, command.actor.clone())
    }

    /// What `actor` asks for through the broker `proposer`.
    pub fn by(mut state: State, time_ms: u64, proposer: u64, actor: Actor) -> Self {
        state.meta.time_ms = state.meta.time_ms.max(time_ms);
        let meta_before = state.meta.clone();
        Self {
            time_ms: state.meta.time_ms,
            state,
            ids: Vec::new(),
            proposer,
            actor,
            changes: Changes::default(),
            before: Vec::new(),
            meta_before,
        }
    }

    /// Makes everything what it was before the command; time has moved all the same.
    pub fn undo(&mut self) {
        let changed = std::mem::take(&mut self.changes).rows;
        for (change, old) in changed.iter().zip(std::mem::take(&mut self.before)).rev() {
            if let Some(table) = Table::from_number(change.table) {
                self.state.restore(table, &change.key, old);
            }
        }
        self.state.meta = self.meta_before.clone();
        self.ids.clear();
    }

    /// Cluster time of the entry, milliseconds.
    pub fn now_ms(&self) -> u64 {
        self.time_ms
    }

    /// The id that the next event will make.
    pub fn next_id(&self) -> Id {
        let position = self.state.position();
        Id::new(position.epoch, position.seq + 1)
    }

    /// Records an event and evolves the state by it.
    pub fn emit(&mut self, event: Event) {
        let id = self.next_id();
        self.evolve(&event);
        self.state.meta.position = Some(id);
        self.changes.events.push(Envelope {
            id: Some(id),
            time_ms: self.time_ms,
            proposer: self.proposer,
            actor: match self.actor.kind {
                ActorKind::Broker => "broker",
                ActorKind::Token => "token",
                ActorKind::Directory => "directory",
                ActorKind::Bootstrap => "bootstrap",
                ActorKind::Enrolment => "enrolment",
            }
            .to_owned(),
            actor_id: self.actor.id,
            last: false,
            event: Some(event),
        });
    }

    /// Writes a row that has no place in the journal (outcomes, cursors).
    pub fn put_quiet<R: Row>(&mut self, row: &R) {
        self.put(row);
    }

    /// Deletes a row that has no place in the journal.
    pub fn delete_quiet(&mut self, table: Table, key: Vec<u8>) {
        self.delete(table, key);
    }

    /// Lets the journal forget rows.
    pub fn compact_journal(&mut self, upto_seq: u64) {
        self.state.meta.journal_compacted = upto_seq;
        self.changes.compact_journal_upto = Some(upto_seq);
    }

    /// Moves cluster time forward.
    pub fn set_time(&mut self, time_ms: u64) {
        self.time_ms = time_ms;
        self.state.meta.time_ms = time_ms;
    }

    /// What happens from here on is of another epoch; the numbers of events go on.
    pub fn enter_epoch(&mut self, epoch: u32) {
        self.state.meta.position = Some(Id::new(epoch, self.state.position().seq));
    }

    /// The state after the command, and what it changed.
    pub fn finish(mut self) -> (State, Changes) {
        if let Some(last) = self.changes.events.last_mut() {
            last.last = true;
        }
        for envelope in &self.changes.events {
            let bytes = envelope.encode_to_vec();
            let seq = envelope.id.unwrap_or_default().seq;
            let hash = Envelope::chain(&self.state.meta.journal_hash, &bytes);
            self.state.meta.journal_hash = hash.to_vec();
            if seq.is_multiple_of(JOURNAL_MARK_EVERY) {
                self.changes.journal_marks.push((seq, hash));
            }
            self.changes.journal.push(JournalRow { seq, bytes: bytes.into() });
        }
        (self.state, self.changes)
    }

    /// The one place where an event becomes rows.
    fn evolve(&mut self, event: &Event) {
        match event {
            Event::ClusterPut(row) => self.put(row),
            Event::BrokerPut(row) => self.put(row),
            Event::RegionPut(row) => self.put(row),
            Event::ZonePut(row) => self.put(row),
            Event::ConnectorGroupPut(row) => self.put(row),
            Event::SegmentGroupPut(row) => self.put(row),
            Event::SegmentPut(row) => self.put(row),
            Event::PolicyPut(row) => self.put(row),
            Event::ReceiverPut(row) => self.put(row),
            Event::TokenPut(row) => self.put(row),
            Event::DirectoryPut(row) => self.put(row),
            Event::UserPut(row) => self.put(row),
            Event::GroupPut(row) => self.put(row),
            Event::MembersChanged(change) => self.evolve_members(change),
            Event::EnrolKeyPut(row) => self.put(row),
            Event::Enrolled(row) => self.put(row),
            Event::DevicePut(row) => self.put(row),
            Event::WorkloadPut(row) => self.put(row),
            Event::ConnectorPut(row) => self.put(row),
            Event::CertificatePut(row) => self.put(row),
            Event::AvailabilityPut(row) => self.put(row),
            Event::ClientPut(row) => self.put(row),
            Event::JournalCompacted(_) | Event::EpochBegan(_) | Event::TimeSet(_) => {}
            Event::Deleted(gone) => self.evolve_deleted(gone),
        }
    }

    fn evolve_deleted(&mut self, gone: &crate::event::Deleted) {
        let Some(table) = u8::try_from(gone.table).ok().and_then(Table::from_number) else { return };
        let id = gone.id.unwrap_or_default();
        if table == Table::Group
            && let Some(group) = self.state.by_id::<rows::Group>(id)
        {
            let chunks: Vec<_> =
                self.state.rows_under::<Members>(&group.number.to_be_bytes()).map(|chunk| chunk.key()).collect();
            for key in chunks {
                self.delete(Table::Members, key);
            }
        }
        if table == Table::User
            && let Some(user) = self.state.by_id::<rows::User>(id)
        {
            for group in &user.groups {
                self.change_members(*group, &BTreeMap::from([(user.number, false)]));
            }
        }
        self.delete(table, id.key().to_vec());
    }

    fn evolve_members(&mut self, change: &crate::event::MembersChanged) {
        let Some(group) = change.group.and_then(|id| self.state.by_id::<rows::Group>(id)) else { return };
        let changes = change.added.iter().map(|n| (*n, true)).chain(change.removed.iter().map(|n| (*n, false)));
        let mut changed = BTreeMap::new();
        for (number, joined) in changes {
            let Some(mut user) = self.state.find::<rows::User>(IndexKey::Number(number)) else { continue };
            match (user.groups.binary_search(&group.number), joined) {
                (Err(at), true) => user.groups.insert(at, group.number),
                (Ok(at), false) => drop(user.groups.remove(at)),
                _ => continue,
            }
            self.put(&user);
            changed.insert(number, joined);
        }
        self.change_members(group.number, &changed);
    }

    /// Enters users into the rows of a group's members, or takes them out; each row is written once.
    fn change_members(&mut self, group: u32, changes: &BTreeMap<u32, bool>) {
        let mut rest = changes.iter().peekable();
        while let Some(&(&number, _)) = rest.peek() {
            let key = Members::key_of(group, number);
            let row = self.state.row_upto::<Members>(&key).filter(|row| row.group == group);
            let mut row = row.unwrap_or(Members { group, from: 0, users: Vec::new() });
            let next = self.state.row_after::<Members>(&key).filter(|next| next.group == group);
            let was = row.users.clone();
            while let Some((&number, &joined)) =
                rest.next_if(|(number, _)| next.as_ref().is_none_or(|next| **number < next.from))
            {
                match (row.users.binary_search(&number), joined) {
                    (Err(at), true) => row.users.insert(at, number),
                    (Ok(at), false) => drop(row.users.remove(at)),
                    _ => {}
                }
            }
            if row.users.is_empty() && !was.is_empty() {
                self.delete(Table::Members, row.key());
            } else if row.users != was {
                self.put_members(row);
            }
        }
    }

    /// Writes a row of members, or several when there are too many for one.
    fn put_members(&mut self, mut row: Members) {
        let rows = row.users.len().div_ceil(MEMBERS_ROW_MAX);
        let each = row.users.len().div_ceil(rows.max(1));
        while row.users.len() > each {
            let rest = row.users.split_off(each);
            self.put(&row);
            row = Members { group: row.group, from: rest[0], users: rest };
        }
        self.put(&row);
    }

    fn put<R: Row>(&mut self, row: &R) {
        let (change, old) = self.state.put(row);
        self.before.push(old);
        self.changes.rows.push(change);
    }

    fn delete(&mut self, table: Table, key: Vec<u8>) {
        let (change, old) = self.state.delete(table, key);
        self.before.push(old);
        self.changes.rows.push(change);
    }

    fn need_role(&self, role: AdminRole) -> Result<(), Rejected> {
        self.state.need_role(&self.actor, role)
    }

    /// The actor is the directory that owns this object, with its present token.
    fn need_directory(&self) -> Result<Id, Rejected> {
        if self.actor.kind != ActorKind::Directory {
            return Err(forbidden());
        }
        self.actor
            .id
            .and_then(|id| self.state.by_id::<rows::Directory>(id))
            .filter(|directory| directory.generation == self.actor.generation)
            .map(|directory| directory.id())
            .ok_or_else(|| Rejected::new(RejectedCode::Unauthenticated, "the directory's token is not valid any more"))
    }

    /// The command comes from a broker of this cluster, acting for itself.
    fn need_broker(&self) -> Result<(), Rejected> {
        let known = self.state.row::<rows::Broker>(&self.proposer.to_be_bytes()).is_some_and(|broker| !broker.removed);
        if self.actor.kind == ActorKind::Broker && known { Ok(()) } else { Err(forbidden()) }
    }

    /// The proposing broker holds a role.
    fn need_broker_role(&self, role: rows::BrokerRole) -> Result<(), Rejected> {
        let has = self
            .state
            .row::<rows::Broker>(&self.proposer.to_be_bytes())
            .is_some_and(|broker| !broker.removed && broker.roles.contains(&(role as i32)));
        if has { Ok(()) } else { Err(forbidden()) }
    }
}

impl State {
    /// Whether an actor is an administrator with at least this role.
    ///
    /// **Errors**: why not.
    pub fn need_role(&self, actor: &Actor, role: AdminRole) -> Result<(), Rejected> {
        if actor.kind != ActorKind::Token {
            return Err(forbidden());
        }
        let token = actor.id.and_then(|id| self.by_id::<rows::Token>(id));
        let token = token.filter(|token| !token.revoked && token.generation == actor.generation);
        let gone = || Rejected::new(RejectedCode::Unauthenticated, "the token is not valid any more");
        if token.ok_or_else(gone)?.role() >= role { Ok(()) } else { Err(forbidden()) }
    }
}

/// Decides a command: emits its events into the draft, or refuses.
pub(crate) fn decide(draft: &mut Draft, command: &Command) -> Result<(), Rejected> {
    if let Body::InitCluster(init) = &command.body {
        return cluster::init(draft, init);
    }
    if !draft.state.is_initialised() {
        return Err(Rejected::new(RejectedCode::NotInitialised, "the cluster is not initialised"));
    }
    if command.class != command.body.class() {
        return Err(invalid("the command is not of the class that it names"));
    }
    let needed = command.body.since_version();
    if needed > VERSION_FIRST && needed > draft.state.version() {
        return Err(Rejected::new(RejectedCode::Conflict, format!("version {needed} of the rules is not in force")));
    }
    // Bootstrap has no broker to speak for it yet; each kind that takes it says when.
    if command.actor.kind != ActorKind::Bootstrap
        && let Some(role) = command.body.proposer_role()
    {
        draft.need_broker_role(role)?;
    }
    match &command.body {
        Body::InitCluster(_) => unreachable!("returned above"),
        Body::RaiseMinVersion { version } => cluster::raise_min_version(draft, *version),
        Body::Tick => Ok(()),
        Body::RegisterClient { boot } => cluster::register_client(draft, *boot),
        Body::PutBroker(put) => cluster::put_broker(draft, put),
        Body::RemoveBroker { node } => cluster::remove_broker(draft, *node),
        Body::DrainBroker { node, draining, within_ms } => {
            cluster::drain_broker(draft, *node, draining.then_some(*within_ms))
        }
        Body::PutSettings { lease_ms, hold_ms } => cluster::put_settings(draft, *lease_ms, *hold_ms),
        Body::CompactJournal { upto_seq } => cluster::compact_journal(draft, *upto_seq),
        Body::KeepJournal { keep_ms } => cluster::keep_journal(draft, *keep_ms),
        Body::SetTime { time_ms } => cluster::set_time(draft, *time_ms),
        Body::Apply(change) => apply::apply(draft, change),
        Body::CreateToken { name, role, secret_sha256 } => access::create_token(draft, name, *role, secret_sha256),
        Body::RevokeToken { id } => access::revoke_token(draft, *id),
        Body::PutDirectory { name, token_sha256 } => access::put_directory(draft, name, token_sha256),
        Body::Revoke { subject } => access::revoke(draft, *subject),
        Body::Release(release) => epoch::release(draft, *release),
        Body::CreateUser(fields) => user::create(draft, fields),
        Body::ReplaceUser { id, version, fields } => user::replace(draft, *id, *version, fields),
        Body::DeleteUser { id, version } => user::delete(draft, *id, *version),
        Body::CreateGroup(fields) => group::create(draft, fields),
        Body::ChangeGroup(change) => group::change(draft, change),
        Body::DeleteGroup { id, version } => group::delete(draft, *id, *version),
        Body::CreateEnrolKey(create) => enrol::create_key(draft, create),
        Body::RevokeEnrolKey { id } => enrol::revoke_key(draft, *id),
        Body::Enrol(enrol) => enrol::enrol(draft, enrol),
        Body::CertificateIssued(issued) => enrol::certificate_issued(draft, issued),
        Body::Availability(changes) => availability::change(draft, changes),
        Body::MoveCursors(moves) => availability::move_cursors(draft, moves),
        #[cfg(feature = "next")]
        Body::RenameToken { id, name } => access::rename_token(draft, *id, name),
    }
}

fn forbidden() -> Rejected {
    Rejected::new(RejectedCode::Forbidden, "not allowed")
}

fn invalid(message: impl Into<String>) -> Rejected {
    Rejected::new(RejectedCode::Invalid, message)
}

fn not_found(what: &str, name: impl std::fmt::Display) -> Rejected {
    Rejected::new(RejectedCode::NotFound, format!("{what} `{name}` is not there"))
}

fn check_name(name: &str) -> Result<(), Rejected> {
    crate::name::check_object(name).map_err(|error| invalid(error.to_string()))
}

fn check_version(expected: Option<u64>, is: u64) -> Result<(), Rejected> {
    match expected {
        Some(version) if version != is => {
            Err(Rejected::new(RejectedCode::VersionMismatch, format!("the version is {is}, not {version}")))
        }
        _ => Ok(()),
    }
}
