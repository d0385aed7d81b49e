//! Access policies.

use super::{Row, by_id};
use crate::id::Id;
use crate::state::{IndexKey, Table};

/// Whether a policy's verdict counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum PolicyMode {
    /// It counts.
    Enforce = 0,
    /// It is evaluated beside the others and recorded when it would have changed the verdict.
    Simulate = 1,
}

/// An access policy.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Policy {
    /// Id.
    #[prost(message, optional, tag = "1")]
    pub id: Option<Id>,
    /// Unique name.
    #[prost(string, tag = "2")]
    pub name: String,
    /// Cedar as people wrote it.
    #[prost(string, tag = "3")]
    pub source: String,
    /// Cedar's JSON form, in which the n-th reference to an object is the entity id `$n`.
    #[prost(string, tag = "4")]
    pub template: String,
    /// What `$0`, `$1`, ... stand for.
    #[prost(message, repeated, tag = "5")]
    pub references: Vec<Reference>,
    /// Mode.
    #[prost(enumeration = "PolicyMode", tag = "6")]
    pub mode: i32,
}
by_id!(Policy, Table::Policy, |r| vec![IndexKey::name(&r.name)]);

/// An object that a policy names.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Reference {
    /// Cedar entity type (`User`, `Group`, `Workload`, `Segment`, `SegmentGroup`).
    #[prost(string, tag = "1")]
    pub kind: String,
    /// The object.
    #[prost(message, optional, tag = "2")]
    pub id: Option<Id>,
    /// The name that was written.
    #[prost(string, tag = "3")]
    pub name: String,
}
