//! Questions that several parts ask of the state.

use crate::id::Id;
use crate::rows::{Broker, Device, Directory, Group, User};

use super::{IndexKey, State};

/// A name that does not lead to one object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unnamed {
    /// Nobody has it.
    Unknown,
    /// Several directories have it.
    Ambiguous,
}

impl State {
    /// The user with this `userName`, or `directory/userName`.
    pub fn user_named(&self, name: &str) -> Result<User, Unnamed> {
        self.in_directories(name, |directory, name| self.find(IndexKey::scoped(directory, name)))
    }

    /// The group with this `displayName`, or `directory/displayName`.
    pub fn group_named(&self, name: &str) -> Result<Group, Unnamed> {
        self.in_directories(name, |directory, name| self.find(IndexKey::scoped(directory, name)))
    }

    /// The groups that a user is in; numbers of deleted groups are passed over.
    pub fn groups_of<'a>(&'a self, user: &'a User) -> impl Iterator<Item = Group> + 'a {
        user.groups.iter().filter_map(|number| self.find::<Group>(IndexKey::Number(*number)))
    }

    /// Whether a user, device, workload or connector is held: the state was restored from an earlier one, and nobody has
    /// vouched for it since.
    pub fn is_held(&self, id: Id, vouched_epoch: u32) -> bool {
        let vouched = id.epoch.max(vouched_epoch);
        // Most are of this epoch; then the cluster's row is not looked at.
        vouched < self.position().epoch && self.cluster().is_some_and(|cluster| vouched < cluster.held_before_epoch)
    }

    /// A broker that is a member.
    pub fn broker(&self, node: u64) -> Option<Broker> {
        self.row::<Broker>(&node.to_be_bytes()).filter(|broker| !broker.removed)
    }

    /// The devices of a user, revoked ones included.
    pub fn devices_of(&self, user: Id) -> impl Iterator<Item = Device> + '_ {
        self.rows::<Device>().filter(move |device| device.user == Some(user))
    }

    fn in_directories<R>(&self, name: &str, find: impl Fn(Id, &str) -> Option<R>) -> Result<R, Unnamed> {
        let mut found: Vec<R> = self.rows::<Directory>().filter_map(|directory| find(directory.id(), name)).collect();
        if found.is_empty()
            && let Some((directory, rest)) = name.split_once('/')
            && let Some(directory) = self.find::<Directory>(IndexKey::name(directory))
        {
            found.extend(find(directory.id(), rest));
        }
        match found.len() {
            0 => Err(Unnamed::Unknown),
            1 => Ok(found.remove(0)),
            _ => Err(Unnamed::Ambiguous),
        }
    }
}
