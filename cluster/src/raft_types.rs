//! The types that Raft is used with here.

use std::fmt;

use bytes::Bytes;
use openraft::EmptyNode;
use selvedge_domain::Outcome;

/// The payload of an entry: an encoded `peer.v1.Batch`. Decoded when it is applied.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Batch(pub Bytes);

impl fmt::Debug for Batch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "batch of {} bytes", self.0.len())
    }
}

impl fmt::Display for Batch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

#[allow(deprecated, reason = "the macro names the runtime through its deprecated path")]
mod config {
    use super::{Batch, EmptyNode, Outcome, Runtime};

    openraft::declare_raft_types!(
        /// Raft of this product.
        pub TypeConfig:
            D = Batch,
            R = Vec<Outcome>,
            NodeId = u64,
            Node = EmptyNode,
            AsyncRuntime = Runtime,
    );
}
pub use config::TypeConfig;

/// The runtime that Raft is bound to: tokio's, with randomness that follows from a seed. Its tasks take their seeds from
/// whoever spawns them, so Raft must be made within [`seeded`].
#[allow(deprecated, reason = "the library names it so without a further dependency")]
pub type Runtime = openraft::rt::deterministic_rng::DeterministicRng<openraft::impls::TokioRuntime>;

/// Runs what makes Raft, with the seed of its randomness.
pub(crate) async fn seeded<F: Future>(seed: u64, making: F) -> F::Output {
    Runtime::scope(seed, making).await
}

/// Raft with our state machine.
pub type Raft = openraft::Raft<TypeConfig, crate::machine::Machine>;
/// Leader id: term and node.
pub type LeaderId = openraft::impls::leader_id_adv::LeaderId<u64, u64>;
/// Log id.
pub type LogId = openraft::LogId<LeaderId>;
/// Vote.
pub type Vote = openraft::Vote<LeaderId>;
/// Membership.
pub type Membership = openraft::Membership<u64, EmptyNode>;
/// Membership with the id of its entry.
pub type StoredMembership = openraft::StoredMembership<LeaderId, u64, EmptyNode>;
/// Meta of a snapshot.
pub type SnapshotMeta = openraft::SnapshotMeta<LeaderId, u64, EmptyNode>;
/// Snapshot.
pub type Snapshot = openraft::Snapshot<LeaderId, u64, EmptyNode, crate::snapshot::SnapshotData>;
/// Payload of an entry.
pub type Payload = openraft::EntryPayload<Batch, u64, EmptyNode>;
/// Entry.
pub type Entry = openraft::Entry<LeaderId, Payload>;
