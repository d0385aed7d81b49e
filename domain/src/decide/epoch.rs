//! A new epoch: an earlier state, a backup or what a lost majority left behind, becomes the beginning of another log.
//!
//! **Invariant:** what the earlier epoch gave out by its tokens is void, and whom nobody vouches for is held.

use crate::command::{PutBroker, Rejected, RejectedCode, Release, Subject};
use crate::event::{EpochBegan, Event, MembersChanged};
use crate::id::Id;
use crate::rows::{
    AdminRole, Availability, Broker, Certificate, Client, Connector, Device, Directory, EnrolKey, Group, Idempotency,
    Row as _, Token, User, Workload,
};
use crate::state::{IndexKey, Table};

use super::{Draft, access, cluster, forget_all, invalid, not_found};

/// What begins an epoch.
#[derive(Clone, Debug, PartialEq)]
pub struct BeginEpoch {
    /// The cluster that goes on; must be the state's.
    pub cluster_id: [u8; 16],
    /// The epoch: higher than any that there was, also one that was begun from the same state and given up since.
    pub epoch: u32,
    /// The one broker that it goes on with. Its node id is new.
    pub broker: PutBroker,
    /// SHA-256 of the token of the new epoch's first owner.
    pub owner_sha256: [u8; 32],
    /// The state may lack the last changes before the loss: who is in it is held until somebody vouches for them.
    pub holds: bool,
    /// What is known to have happened after the state.
    pub beyond: Beyond,
}

/// What took access away after a state was saved. What that state does not know is passed over.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Beyond {
    /// Revoked devices, workloads and connectors.
    pub revoked: Vec<Subject>,
    /// Users that were disabled or deleted.
    pub disabled: Vec<Id>,
    /// Groups and the users that left them.
    pub left: Vec<(Id, Vec<Id>)>,
    /// Certificates that were issued to those who are not held, so that they need not be enrolled again.
    pub certificates: Vec<Certificate>,
}

pub(crate) fn begin_epoch(draft: &mut Draft, begin: &BeginEpoch) -> Result<(), Rejected> {
    let row = draft.state.cluster().filter(|row| row.cluster_id == begin.cluster_id);
    let mut row = row.ok_or_else(|| Rejected::new(RejectedCode::Forbidden, "the state is of another cluster"))?;
    let after = draft.state.position();
    let epoch = begin.epoch;
    if epoch <= after.epoch {
        return Err(invalid(format!("the state is of epoch {}, and the next is a higher one", after.epoch)));
    }
    if draft.state.row::<Broker>(&begin.broker.node.to_be_bytes()).is_some() {
        return Err(Rejected::new(RejectedCode::Conflict, "this node id was used before"));
    }
    draft.enter_epoch(epoch);
    draft.compact_journal(after.seq);
    draft.emit(Event::EpochBegan(EpochBegan { after: Some(after), holds: begin.holds }));
    if begin.holds {
        row.held_before_epoch = epoch;
    }
    draft.emit(Event::ClusterPut(row));
    void_tokens(draft);
    forget_brokers(draft);
    apply_beyond(draft, &begin.beyond);
    cluster::put_broker(draft, &begin.broker)?;

    let id = draft.next_id();
    let free = |name: &String| draft.state.find::<Token>(IndexKey::name(name)).is_none();
    let mut names = std::iter::once("owner".to_owned()).chain((epoch..).map(|number| format!("owner-{number}")));
    let name = names.find(free).ok_or_else(|| invalid("there is no name for the owner's token"))?;
    draft.emit(Event::TokenPut(Token {
        id: Some(id),
        name,
        secret_sha256: begin.owner_sha256.to_vec(),
        role: AdminRole::Owner as i32,
        generation: 1,
        revoked: false,
    }));
    draft.ids.push(id);
    Ok(())
}

/// Administrators' and directories' tokens and enrolment secrets: any of them may have been revoked after the state.
fn void_tokens(draft: &mut Draft) {
    let tokens: Vec<Token> = draft.state.rows::<Token>().filter(|token| !token.revoked).collect();
    for token in tokens {
        draft.emit(Event::TokenPut(Token { revoked: true, generation: token.generation + 1, ..token }));
    }
    let directories: Vec<Directory> = draft.state.rows::<Directory>().collect();
    for directory in directories {
        let generation = directory.generation + 1;
        draft.emit(Event::DirectoryPut(Directory { token_sha256: Vec::new(), generation, ..directory }));
    }
    let keys: Vec<EnrolKey> = draft.state.rows::<EnrolKey>().filter(|key| !key.revoked).collect();
    for key in keys {
        draft.emit(Event::EnrolKeyPut(EnrolKey { revoked: true, ..key }));
    }
}

/// The brokers of the earlier epoch, what they proposed and what they saw.
fn forget_brokers(draft: &mut Draft) {
    let brokers: Vec<Broker> = draft.state.rows::<Broker>().filter(|broker| !broker.removed).collect();
    for broker in brokers {
        draft.emit(Event::BrokerPut(Broker { removed: true, generation: broker.generation + 1, ..broker }));
    }
    let clients: Vec<Client> = draft.state.rows::<Client>().collect();
    for client in clients {
        forget_all(draft, client.id());
        draft.delete_quiet(Table::Client, client.key());
    }
    let keys: Vec<_> = draft.state.rows::<Idempotency>().map(|row| row.key()).collect();
    for key in keys {
        draft.delete_quiet(Table::Idempotency, key);
    }
    let keys: Vec<_> = draft.state.rows::<Availability>().map(|row| row.key()).collect();
    for key in keys {
        draft.delete_quiet(Table::Availability, key);
    }
}

fn apply_beyond(draft: &mut Draft, beyond: &Beyond) {
    for subject in &beyond.revoked {
        if stands(draft, *subject) {
            // It is there.
            let _ = access::void(draft, *subject);
        }
    }
    for id in &beyond.disabled {
        if let Some(user) = draft.state.by_id::<User>(*id).filter(|user| user.active) {
            let modified_ms = draft.now_ms();
            let (generation, version) = (user.generation + 1, user.version + 1);
            draft.emit(Event::UserPut(User { active: false, generation, version, modified_ms, ..user }));
        }
    }
    for (group, users) in &beyond.left {
        if let Some(row) = draft.state.by_id::<Group>(*group) {
            let users = users.iter().filter_map(|id| draft.state.by_id::<User>(*id));
            let mut removed: Vec<u32> =
                users.filter(|user| user.groups.contains(&row.number)).map(|user| user.number).collect();
            removed.sort_unstable();
            removed.dedup();
            if !removed.is_empty() {
                draft.emit(Event::MembersChanged(MembersChanged { group: Some(*group), added: Vec::new(), removed }));
            }
        }
    }
    for certificate in &beyond.certificates {
        if draft.state.row::<Certificate>(certificate.serial.as_bytes()).is_none() {
            draft.emit(Event::CertificatePut(certificate.clone()));
        }
    }
}

/// Whether a subject is there and was not revoked.
fn stands(draft: &Draft, subject: Subject) -> bool {
    match subject {
        Subject::Device(id) => draft.state.by_id::<Device>(id).is_some_and(|row| !row.revoked),
        Subject::Workload(id) => draft.state.by_id::<Workload>(id).is_some_and(|row| !row.revoked),
        Subject::Connector(id) => draft.state.by_id::<Connector>(id).is_some_and(|row| !row.revoked),
        // All of them are removed in any case.
        Subject::Broker(_) => false,
    }
}

/// Lets be what is held.
pub(super) fn release(draft: &mut Draft, release: Release) -> Result<(), Rejected> {
    let epoch = draft.state.position().epoch;
    match release {
        Release::Everything { cluster_id } => {
            draft.need_role(AdminRole::Owner)?;
            let mut row = draft.state.cluster().unwrap_or_default();
            if row.cluster_id != cluster_id {
                return Err(invalid("this is not the id of this cluster"));
            }
            if row.held_before_epoch != 0 {
                row.held_before_epoch = 0;
                draft.emit(Event::ClusterPut(row));
            }
            return Ok(());
        }
        Release::Subject(_) => draft.need_role(AdminRole::Admin)?,
    }
    let Release::Subject(subject) = release else { return Ok(()) };
    match subject {
        Subject::Device(id) => {
            let device = draft.state.by_id::<Device>(id).filter(|row| !row.revoked);
            let device = device.ok_or_else(|| not_found("device", id))?;
            if draft.state.is_held(id, device.vouched_epoch) {
                draft.emit(Event::DevicePut(Device { vouched_epoch: epoch, ..device }));
            }
        }
        Subject::Workload(id) => {
            let workload = draft.state.by_id::<Workload>(id).filter(|row| !row.revoked);
            let workload = workload.ok_or_else(|| not_found("workload", id))?;
            if draft.state.is_held(id, workload.vouched_epoch) {
                draft.emit(Event::WorkloadPut(Workload { vouched_epoch: epoch, ..workload }));
            }
        }
        Subject::Connector(id) => {
            let connector = draft.state.by_id::<Connector>(id).filter(|row| !row.revoked);
            let connector = connector.ok_or_else(|| not_found("connector", id))?;
            if draft.state.is_held(id, connector.vouched_epoch) {
                draft.emit(Event::ConnectorPut(Connector { vouched_epoch: epoch, ..connector }));
            }
        }
        Subject::Broker(_) => return Err(invalid("brokers of an earlier epoch are removed, not held")),
    }
    Ok(())
}
