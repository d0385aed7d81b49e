//! Directories, and the people and groups that they say there are.

use super::{Row, by_id};
use crate::id::Id;
use crate::state::{IndexKey, Table};

/// A directory: where users and groups come from.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Directory {
    /// Id.
    #[prost(message, optional, tag = "1")]
    pub id: Option<Id>,
    /// Unique name.
    #[prost(string, tag = "2")]
    pub name: String,
    /// SHA-256 of its SCIM bearer token; empty when the one that it had is void.
    #[prost(bytes = "vec", tag = "3")]
    pub token_sha256: Vec<u8>,
    /// Raised when the token is replaced.
    #[prost(uint64, tag = "4")]
    pub generation: u64,
}
by_id!(Directory, Table::Directory, |r| {
    let mut keys = vec![IndexKey::name(&r.name)];
    if !r.token_sha256.is_empty() {
        keys.push(IndexKey::Secret(r.token_sha256.clone()));
    }
    keys
});

/// A person.
#[derive(Clone, PartialEq, prost::Message)]
pub struct User {
    /// Id.
    #[prost(message, optional, tag = "1")]
    pub id: Option<Id>,
    /// Dense number, never reused.
    #[prost(uint32, tag = "2")]
    pub number: u32,
    /// Directory.
    #[prost(message, optional, tag = "3")]
    pub directory: Option<Id>,
    /// SCIM `userName`; unique in its directory without regard to case.
    #[prost(string, tag = "4")]
    pub user_name: String,
    /// SCIM `externalId`.
    #[prost(string, tag = "5")]
    pub external_id: String,
    /// SCIM `displayName`.
    #[prost(string, tag = "6")]
    pub display_name: String,
    /// SCIM `active`.
    #[prost(bool, tag = "7")]
    pub active: bool,
    /// Numbers of its groups, sorted; a number of a deleted group is ignored.
    #[prost(uint32, repeated, tag = "8")]
    pub groups: Vec<u32>,
    /// Raised by disable, delete and revoke; grants that carry an older one are void.
    #[prost(uint64, tag = "9")]
    pub generation: u64,
    /// Every other SCIM attribute, a JSON object.
    #[prost(string, tag = "10")]
    pub attributes: String,
    /// Made at.
    #[prost(uint64, tag = "11")]
    pub created_ms: u64,
    /// Changed at.
    #[prost(uint64, tag = "12")]
    pub modified_ms: u64,
    /// Counts changes; the ETag.
    #[prost(uint64, tag = "13")]
    pub version: u64,
    /// The last epoch in which somebody vouched for it; 0 when nobody had to since it was made.
    #[prost(uint32, tag = "14")]
    pub vouched_epoch: u32,
}

impl User {
    /// The row's id.
    pub fn id(&self) -> Id {
        self.id.unwrap_or_default()
    }
}

impl Row for User {
    const TABLE: Table = Table::User;

    fn key(&self) -> Vec<u8> {
        self.id().key().to_vec()
    }

    fn index(&self) -> Vec<IndexKey> {
        user_index(self.directory, self.number, &self.user_name, &self.external_id)
    }

    fn index_of(stored: &[u8]) -> Vec<IndexKey> {
        let user: IndexedUser = crate::state::decoded(stored);
        user_index(user.directory, user.number, &user.user_name, &user.external_id)
    }
}

/// What a [`User`] is found by, read without the rest.
#[derive(Clone, PartialEq, prost::Message)]
struct IndexedUser {
    #[prost(uint32, tag = "2")]
    number: u32,
    #[prost(message, optional, tag = "3")]
    directory: Option<Id>,
    #[prost(string, tag = "4")]
    user_name: String,
    #[prost(string, tag = "5")]
    external_id: String,
}

fn user_index(directory: Option<Id>, number: u32, user_name: &str, external_id: &str) -> Vec<IndexKey> {
    let directory = directory.unwrap_or_default();
    let mut keys = vec![IndexKey::scoped(directory, user_name), IndexKey::Number(number)];
    if !external_id.is_empty() {
        keys.push(IndexKey::External(directory, external_id.to_owned()));
    }
    keys
}

/// A group of users.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Group {
    /// Id.
    #[prost(message, optional, tag = "1")]
    pub id: Option<Id>,
    /// Dense number, never reused.
    #[prost(uint32, tag = "2")]
    pub number: u32,
    /// Directory.
    #[prost(message, optional, tag = "3")]
    pub directory: Option<Id>,
    /// SCIM `displayName`; unique in its directory without regard to case.
    #[prost(string, tag = "4")]
    pub display_name: String,
    /// SCIM `externalId`.
    #[prost(string, tag = "5")]
    pub external_id: String,
    /// Made at.
    #[prost(uint64, tag = "6")]
    pub created_ms: u64,
    /// Changed at.
    #[prost(uint64, tag = "7")]
    pub modified_ms: u64,
    /// Counts changes; the ETag.
    #[prost(uint64, tag = "8")]
    pub version: u64,
}
by_id!(Group, Table::Group, |r| vec![
    IndexKey::scoped(r.directory.unwrap_or_default(), &r.display_name),
    IndexKey::Number(r.number)
]);

/// Numbers of members of a group: those from `from` on, and before that of the group's next row. A row that would have
/// more than [`crate::limits::MEMBERS_ROW_MAX`] is divided.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Members {
    /// Number of the group.
    #[prost(uint32, tag = "1")]
    pub group: u32,
    /// The least number that may stand here; 0 in the group's first row.
    #[prost(uint32, tag = "2")]
    pub from: u32,
    /// Sorted user numbers.
    #[prost(uint32, repeated, tag = "3")]
    pub users: Vec<u32>,
}

impl Members {
    /// The key of a row.
    pub fn key_of(group: u32, from: u32) -> Vec<u8> {
        [group.to_be_bytes(), from.to_be_bytes()].concat()
    }
}

impl Row for Members {
    const TABLE: Table = Table::Members;

    fn key(&self) -> Vec<u8> {
        Self::key_of(self.group, self.from)
    }
}
