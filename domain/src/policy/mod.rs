//! Access policy: Cedar, typed by a schema that ships with the product.
//!
//! [`compile`] turns what people wrote into what is stored: one policy that fits the schema, its names as numbered
//! references. [`PolicyIndex`] arranges the stored policies by what their scopes can match. [`decide`] evaluates the few
//! that a request can concern, and [`explain`] says why.
//!
//! **Invariants:**
//! - what no permit allows is denied, and a forbid beats every permit;
//! - any failure in a policy looked at denies, with that policy's id: Cedar alone would skip it;
//! - references bind to ids, which are never reused: a policy that names something deleted matches nothing in its place;
//! - indexes of another policy revision than the state's deny.
//!
//! This module does not know where the state, the time or the facts of the context come from.

mod compile;
mod context;
mod evaluate;
mod explain;
mod index;
mod nesting;
mod schema;
mod template;

#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::id::Id;
use crate::segment::Endpoint;
use crate::state::State;

pub use compile::{Error, compile};
pub use context::{Attested, Claimed, Context};
pub use evaluate::{Reason, TIMED_VERDICT_MS_MAX, Verdict, decide};
pub use explain::{EXPLAINED_POLICIES_MAX, Explanation, PolicyOutcome, PolicyTrace, SegmentTrace, Unmet, explain};
pub use index::{Broken, PolicyIndex};
pub use schema::{DEREFERENCES_MAX, SCHEMA};

/// Whose rights count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Principal {
    /// A person.
    User(Id),
    /// A workload.
    Workload(Id),
    /// A device before anyone has logged in on it.
    Device(Id),
}

/// A question to the policy.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// Who asks.
    pub principal: Principal,
    /// For what.
    pub endpoint: Endpoint,
    /// Under which circumstances.
    pub context: Context,
}

/// A policy, for people and for records.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
pub struct PolicyRef {
    /// Its id.
    #[schema(value_type = String)]
    pub id: Id,
    /// Its name.
    pub name: String,
}

/// The revision of the policy set (segments, groups, policies, zones) in a state.
pub fn revision(state: &State) -> u64 {
    state.cluster().map(|cluster| cluster.policy_revision).unwrap_or_default()
}
