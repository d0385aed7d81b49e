//! People, as directories push them.

use crate::command::{Rejected, RejectedCode, UserFields};
use crate::event::{Deleted, Event};
use crate::id::Id;
use crate::limits::{NAME_CHARS_MAX, SCIM_BYTES_MAX};
use crate::rows::User;
use crate::state::{IndexKey, Table};

use super::{Draft, check_version, invalid, not_found};

pub(super) fn create(draft: &mut Draft, fields: &UserFields) -> Result<(), Rejected> {
    let directory = draft.need_directory()?;
    check(draft, directory, fields, None)?;
    let id = draft.next_id();
    let number = draft.state.meta.user_number_next;
    draft.state.meta.user_number_next += 1;
    let now_ms = draft.now_ms();
    draft.emit(Event::UserPut(User {
        id: Some(id),
        number,
        directory: Some(directory),
        user_name: fields.user_name.clone(),
        external_id: fields.external_id.clone(),
        display_name: fields.display_name.clone(),
        active: fields.active,
        groups: Vec::new(),
        generation: 1,
        attributes: fields.attributes.clone(),
        created_ms: now_ms,
        modified_ms: now_ms,
        version: 1,
        vouched_epoch: 0,
    }));
    draft.ids.push(id);
    Ok(())
}

pub(super) fn replace(draft: &mut Draft, id: Id, version: Option<u64>, fields: &UserFields) -> Result<(), Rejected> {
    let directory = draft.need_directory()?;
    let mut user = owned(draft, directory, id)?;
    check_version(version, user.version)?;
    check(draft, directory, fields, Some(id))?;
    let held = draft.state.is_held(id, user.vouched_epoch);
    if held {
        // The directory says that there is such a person, also when it says nothing new.
        user.vouched_epoch = draft.state.position().epoch;
    }
    if user.active && !fields.active {
        user.generation += 1;
    }
    let mut changed = held || user.active != fields.active;
    user.active = fields.active;
    for (is, should) in [
        (&mut user.user_name, &fields.user_name),
        (&mut user.external_id, &fields.external_id),
        (&mut user.display_name, &fields.display_name),
        (&mut user.attributes, &fields.attributes),
    ] {
        if is != should {
            is.clone_from(should);
            changed = true;
        }
    }
    if changed {
        user.version += 1;
        user.modified_ms = draft.now_ms();
        draft.emit(Event::UserPut(user));
    }
    Ok(())
}

pub(super) fn delete(draft: &mut Draft, id: Id, version: Option<u64>) -> Result<(), Rejected> {
    let directory = draft.need_directory()?;
    let user = owned(draft, directory, id)?;
    check_version(version, user.version)?;
    draft.emit(Event::Deleted(Deleted { table: Table::User as u32, id: Some(id), name: user.user_name }));
    Ok(())
}

fn owned(draft: &Draft, directory: Id, id: Id) -> Result<User, Rejected> {
    draft.state.by_id::<User>(id).filter(|user| user.directory == Some(directory)).ok_or_else(|| not_found("user", id))
}

fn check(draft: &Draft, directory: Id, fields: &UserFields, own: Option<Id>) -> Result<(), Rejected> {
    let length = fields.user_name.chars().count();
    if length == 0 || length > NAME_CHARS_MAX * 2 || fields.user_name.chars().any(char::is_control) {
        return Err(invalid("`userName` must have 1 to 256 characters, none of them control characters"));
    }
    if fields.attributes.len() + fields.display_name.len() + fields.external_id.len() > SCIM_BYTES_MAX {
        return Err(Rejected::new(RejectedCode::Limit, format!("a user has at most {SCIM_BYTES_MAX} bytes")));
    }
    let taken = |index| draft.state.is_taken::<User>(index, own);
    if taken(IndexKey::scoped(directory, &fields.user_name)) {
        return Err(Rejected::new(RejectedCode::Conflict, format!("there is another user `{}`", fields.user_name)));
    }
    if !fields.external_id.is_empty() && taken(IndexKey::External(directory, fields.external_id.clone())) {
        return Err(Rejected::new(
            RejectedCode::Conflict,
            format!("there is another user with `externalId` `{}`", fields.external_id),
        ));
    }
    Ok(())
}
