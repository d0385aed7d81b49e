//! Users and groups, as their directories pushed them. They are changed by SCIM only.

use axum::Json;
use selvedge_domain::rows::{Directory, Group, Members, User};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::ROWS_MAX;
use crate::web::input::Params;
use crate::web::read::Seen;

/// Which rows.
#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(super) struct Which {
    /// Part of the name, without regard to case.
    #[serde(default)]
    name: String,
    /// Rows at most (1,000).
    limit: Option<usize>,
}

impl Which {
    fn takes(&self, name: &str) -> bool {
        self.name.is_empty() || name.to_lowercase().contains(&self.name.to_lowercase())
    }

    fn limit(&self) -> usize {
        self.limit.unwrap_or(ROWS_MAX).min(ROWS_MAX)
    }
}

/// A person.
#[derive(Serialize, ToSchema)]
pub(super) struct UserView {
    /// Id.
    id: String,
    /// Name of the directory.
    directory: String,
    /// `userName`.
    user_name: String,
    /// `displayName`.
    display_name: String,
    /// `active`.
    active: bool,
    /// Held since the cluster was restored, until the directory pushes them again.
    held: bool,
    /// Names of the groups.
    groups: Vec<String>,
    /// Devices that are not revoked.
    devices: usize,
    /// Raised by disable, delete and revoke.
    generation: u64,
}

/// People.
#[derive(Serialize, ToSchema)]
pub(super) struct UserList {
    /// People, by id.
    users: Vec<UserView>,
    /// There are more.
    more: bool,
}

/// People and their groups.
#[utoipa::path(get, path = "/api/v1/users", tag = "identity", params(Which), responses((status = 200, body = UserList)))]
pub(super) async fn users(Seen(state): Seen, Params(which): Params<Which>) -> Json<UserList> {
    let view = |user: User| UserView {
        id: user.id().to_string(),
        directory: directory_name(&state, user.directory),
        groups: state.groups_of(&user).map(|group| group.display_name).collect(),
        devices: state.devices_of(user.id()).filter(|device| !device.revoked).count(),
        active: user.active,
        held: state.is_held(user.id(), user.vouched_epoch),
        generation: user.generation,
        user_name: user.user_name,
        display_name: user.display_name,
    };
    let mut rows = state.rows::<User>().filter(|user| which.takes(&user.user_name));
    let users = rows.by_ref().take(which.limit()).map(view).collect();
    Json(UserList { users, more: rows.next().is_some() })
}

/// A group.
#[derive(Serialize, ToSchema)]
pub(super) struct GroupView {
    /// Id.
    id: String,
    /// Name of the directory.
    directory: String,
    /// `displayName`.
    display_name: String,
    /// How many are in it.
    members: usize,
}

/// Groups.
#[derive(Serialize, ToSchema)]
pub(super) struct GroupList {
    /// Groups, by id.
    groups: Vec<GroupView>,
    /// There are more.
    more: bool,
}

/// Groups of people.
#[utoipa::path(get, path = "/api/v1/groups", tag = "identity", params(Which), responses((status = 200, body = GroupList)))]
pub(super) async fn groups(Seen(state): Seen, Params(which): Params<Which>) -> Json<GroupList> {
    let view = |group: Group| GroupView {
        id: group.id().to_string(),
        directory: directory_name(&state, group.directory),
        members: state.rows_under::<Members>(&group.number.to_be_bytes()).map(|chunk| chunk.users.len()).sum(),
        display_name: group.display_name,
    };
    let mut rows = state.rows::<Group>().filter(|group| which.takes(&group.display_name));
    let groups = rows.by_ref().take(which.limit()).map(view).collect();
    Json(GroupList { groups, more: rows.next().is_some() })
}

fn directory_name(state: &selvedge_domain::State, id: Option<selvedge_domain::Id>) -> String {
    id.and_then(|id| state.by_id::<Directory>(id)).map(|row| row.name).unwrap_or_default()
}
