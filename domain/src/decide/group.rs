//! Groups and their members.

use std::collections::BTreeSet;

use crate::command::{ChangeGroup, GroupFields, Rejected, RejectedCode};
use crate::event::{Deleted, Event, MembersChanged};
use crate::id::Id;
use crate::limits::{MEMBERS_CHANGE_MAX, NAME_CHARS_MAX};
use crate::rows::{Group, Members, User};
use crate::state::{IndexKey, Table};

use super::{Draft, check_version, invalid, not_found};

pub(super) fn create(draft: &mut Draft, fields: &GroupFields) -> Result<(), Rejected> {
    let directory = draft.need_directory()?;
    check_display_name(draft, directory, &fields.display_name, None)?;
    let members = numbers(draft, directory, &fields.members, true)?;
    let id = draft.next_id();
    let number = draft.state.meta.group_number_next;
    draft.state.meta.group_number_next += 1;
    let now_ms = draft.now_ms();
    draft.emit(Event::GroupPut(Group {
        id: Some(id),
        number,
        directory: Some(directory),
        display_name: fields.display_name.clone(),
        external_id: fields.external_id.clone(),
        created_ms: now_ms,
        modified_ms: now_ms,
        version: 1,
    }));
    draft.ids.push(id);
    if !members.is_empty() {
        draft.emit(Event::MembersChanged(MembersChanged {
            group: Some(id),
            added: members.into_iter().collect(),
            removed: Vec::new(),
        }));
    }
    Ok(())
}

pub(super) fn change(draft: &mut Draft, change: &ChangeGroup) -> Result<(), Rejected> {
    let directory = draft.need_directory()?;
    let group = owned(draft, directory, change.id)?;
    check_version(change.version, group.version)?;
    if let Some(name) = &change.display_name {
        check_display_name(draft, directory, name, Some(change.id))?;
    }
    let is: BTreeSet<u32> =
        draft.state.rows_under::<Members>(&group.number.to_be_bytes()).flat_map(|chunk| chunk.users).collect();
    let mut will = match &change.members {
        Some(members) => numbers(draft, directory, members, true)?,
        None => is.clone(),
    };
    will.extend(numbers(draft, directory, &change.add, true)?);
    for number in numbers(draft, directory, &change.remove, false)? {
        will.remove(&number);
    }
    let added: Vec<u32> = will.difference(&is).copied().collect();
    let removed: Vec<u32> = is.difference(&will).copied().collect();
    let mut changed = Group {
        display_name: change.display_name.clone().unwrap_or_else(|| group.display_name.clone()),
        external_id: change.external_id.clone().unwrap_or_else(|| group.external_id.clone()),
        ..group.clone()
    };
    if changed == group && added.is_empty() && removed.is_empty() {
        return Ok(());
    }
    changed.version += 1;
    changed.modified_ms = draft.now_ms();
    draft.emit(Event::GroupPut(changed));
    if !added.is_empty() || !removed.is_empty() {
        draft.emit(Event::MembersChanged(MembersChanged { group: Some(change.id), added, removed }));
    }
    Ok(())
}

pub(super) fn delete(draft: &mut Draft, id: Id, version: Option<u64>) -> Result<(), Rejected> {
    let directory = draft.need_directory()?;
    let group = owned(draft, directory, id)?;
    check_version(version, group.version)?;
    draft.emit(Event::Deleted(Deleted { table: Table::Group as u32, id: Some(id), name: group.display_name }));
    Ok(())
}

fn owned(draft: &Draft, directory: Id, id: Id) -> Result<Group, Rejected> {
    draft
        .state
        .by_id::<Group>(id)
        .filter(|group| group.directory == Some(directory))
        .ok_or_else(|| not_found("group", id))
}

fn numbers(draft: &Draft, directory: Id, users: &[Id], must_exist: bool) -> Result<BTreeSet<u32>, Rejected> {
    if users.len() > MEMBERS_CHANGE_MAX {
        return Err(Rejected::new(RejectedCode::Limit, format!("at most {MEMBERS_CHANGE_MAX} members at once")));
    }
    let mut numbers = BTreeSet::new();
    for id in users {
        match draft.state.by_id::<User>(*id).filter(|user| user.directory == Some(directory)) {
            Some(user) => drop(numbers.insert(user.number)),
            None if must_exist => return Err(invalid(format!("member `{id}` is not a user of this directory"))),
            None => {}
        }
    }
    Ok(numbers)
}

fn check_display_name(draft: &Draft, directory: Id, name: &str, own: Option<Id>) -> Result<(), Rejected> {
    let length = name.chars().count();
    if length == 0 || length > NAME_CHARS_MAX * 2 || name.chars().any(char::is_control) {
        return Err(invalid("`displayName` must have 1 to 256 characters, none of them control characters"));
    }
    let other = draft.state.find::<Group>(IndexKey::scoped(directory, name)).is_some_and(|group| group.id != own);
    if other {
        return Err(Rejected::new(RejectedCode::Conflict, format!("there is another group `{name}`")));
    }
    Ok(())
}
