//! Tokens, directories, and what is revoked.

use crate::command::{Rejected, RejectedCode, Subject};
use crate::event::Event;
use crate::id::Id;
use crate::rows::{AdminRole, Broker, Connector, Device, Directory, Token, Workload};
use crate::state::IndexKey;

use super::{Draft, check_name, invalid, not_found};

pub(super) fn create_token(draft: &mut Draft, name: &str, role: i32, secret: &[u8; 32]) -> Result<(), Rejected> {
    draft.need_role(AdminRole::Owner)?;
    check_name(name)?;
    #[cfg(feature = "next")]
    let name = &if draft.state.version() >= 2 { name.to_ascii_lowercase() } else { name.to_owned() };
    let role = AdminRole::try_from(role).ok().filter(|role| *role != AdminRole::Unspecified);
    let role = role.ok_or_else(|| invalid("unknown role"))?;
    if draft.state.find::<Token>(IndexKey::name(name)).is_some() {
        return Err(Rejected::new(RejectedCode::Conflict, format!("there is another token `{name}`")));
    }
    let id = draft.next_id();
    draft.emit(Event::TokenPut(Token {
        id: Some(id),
        name: name.to_owned(),
        secret_sha256: secret.to_vec(),
        role: role as i32,
        generation: 1,
        revoked: false,
    }));
    draft.ids.push(id);
    Ok(())
}

#[cfg(feature = "next")]
pub(super) fn rename_token(draft: &mut Draft, id: Id, name: &str) -> Result<(), Rejected> {
    draft.need_role(AdminRole::Owner)?;
    check_name(name)?;
    let token = draft.state.by_id::<Token>(id).ok_or_else(|| not_found("token", id))?;
    if draft.state.find::<Token>(IndexKey::name(name)).is_some_and(|other| other.id() != id) {
        return Err(Rejected::new(RejectedCode::Conflict, format!("there is another token `{name}`")));
    }
    draft.emit(Event::TokenPut(Token { name: name.to_owned(), ..token }));
    Ok(())
}

pub(super) fn revoke_token(draft: &mut Draft, id: Id) -> Result<(), Rejected> {
    draft.need_role(AdminRole::Owner)?;
    let mut token = draft.state.by_id::<Token>(id).ok_or_else(|| not_found("token", id))?;
    let owners = draft.state.rows::<Token>().filter(|t| !t.revoked && t.role() == AdminRole::Owner).count();
    if token.role() == AdminRole::Owner && !token.revoked && owners == 1 {
        return Err(Rejected::new(RejectedCode::Conflict, "the last owner cannot be revoked"));
    }
    token.revoked = true;
    token.generation += 1;
    draft.emit(Event::TokenPut(token));
    Ok(())
}

pub(super) fn put_directory(draft: &mut Draft, name: &str, token_sha256: &[u8; 32]) -> Result<(), Rejected> {
    draft.need_role(AdminRole::Admin)?;
    check_name(name)?;
    if name.contains('/') {
        return Err(invalid("a directory's name has no `/`"));
    }
    let old = draft.state.find::<Directory>(IndexKey::name(name));
    let id = old.as_ref().map_or(draft.next_id(), Directory::id);
    draft.emit(Event::DirectoryPut(Directory {
        id: Some(id),
        name: name.to_owned(),
        token_sha256: token_sha256.to_vec(),
        generation: old.map_or(1, |directory| directory.generation + 1),
    }));
    draft.ids.push(id);
    Ok(())
}

pub(super) fn revoke(draft: &mut Draft, subject: Subject) -> Result<(), Rejected> {
    draft.need_role(AdminRole::Admin)?;
    if matches!(subject, Subject::Broker(_)) {
        draft.need_role(AdminRole::Owner)?;
    }
    void(draft, subject)
}

/// Makes everything void that names a subject.
pub(super) fn void(draft: &mut Draft, subject: Subject) -> Result<(), Rejected> {
    match subject {
        Subject::Device(id) => {
            let mut device = draft.state.by_id::<Device>(id).ok_or_else(|| not_found("device", id))?;
            device.revoked = true;
            device.generation += 1;
            draft.emit(Event::DevicePut(device));
        }
        Subject::Workload(id) => {
            let mut workload = draft.state.by_id::<Workload>(id).ok_or_else(|| not_found("workload", id))?;
            workload.revoked = true;
            workload.generation += 1;
            draft.emit(Event::WorkloadPut(workload));
        }
        Subject::Connector(id) => {
            let mut connector = draft.state.by_id::<Connector>(id).ok_or_else(|| not_found("connector", id))?;
            connector.revoked = true;
            connector.generation += 1;
            draft.emit(Event::ConnectorPut(connector));
        }
        Subject::Broker(node) => {
            let mut broker = draft.state.row::<Broker>(&node.to_be_bytes()).ok_or_else(|| not_found("broker", node))?;
            broker.removed = true;
            broker.generation += 1;
            draft.emit(Event::BrokerPut(broker));
        }
    }
    Ok(())
}
