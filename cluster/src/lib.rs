//! Agreement: the replicated log of commands, read and written from any broker; who is a member; how fresh a broker is.
//!
//! **Invariant:** nothing is answered as done that a quorum has not made durable and that this broker has not applied.
//! **Invariant:** the consensus library is named here and nowhere else, and none of its layouts reaches disk or wire.
//! **Invariant:** a call between brokers is from the node that its certificate names, of this cluster and epoch.
//!
//! This crate does not know what a session is, nor what commands mean: that is `selvedge_domain`.
#![warn(missing_docs)]

mod acquaintance;
pub mod at_rest;
mod blocking;
mod clock;
mod cluster;
mod config;
mod convert;
mod core;
mod dial;
mod enforce;
mod error;
mod events;
mod housekeeping;
mod journal;
mod leader;
mod lease;
mod listen;
mod log_store;
mod machine;
mod membership;
pub mod metrics;
mod network;
mod propose;
mod propose_stream;
mod published;
mod raft_types;
mod read;
pub mod restore;
mod service;
mod snapshot;
mod status;
mod transport;
mod version;
mod watchdog;

pub use blocking::Blocking;
pub use clock::{Clock, ShiftedClock, SystemClock};
pub use cluster::Cluster;
pub use config::{LogLimits, Options, Preset};
pub use dial::{DialOverride, PeerChannel, Stamp, broker_id, node_of};
pub use enforce::{Confirmation, Enforced, Enforcer, How, NothingToEnforce, Receipt};
pub use error::{Error, Fatal, ProposeError};
pub use events::{FRAME_BYTES_MAX, Frame, WATCH_QUEUE_FRAMES, WATCH_STALL_MAX};
pub use lease::Lease;
pub use listen::Caller;
pub use membership::MEMBERS_MAX;
pub use network::MESSAGE_BYTES_MAX;
pub use propose::{COMMAND_BYTES_MAX, Done, PROPOSAL_TIMEOUT};
pub use published::HashesAt;
pub use read::{Mode, Read};
pub use snapshot::{SnapshotHead, save_at_rest};
pub use status::{Member, Status};
pub use transport::{Handshake, Link, Listener, Stream, Tls, Transport};

/// The stores as the consensus library sees them, for its own test suite.
#[doc(hidden)]
pub mod store {
    pub use crate::log_store::LogStore;
    pub use crate::machine::Machine;
    pub use crate::raft_types::TypeConfig;

    use std::path::PathBuf;
    use std::sync::Arc;

    use selvedge_storage::engine::Engine;
    use selvedge_storage::log::Log;
    use selvedge_storage::state::StateStore;

    /// Opens both over engines.
    pub async fn open(
        log: Arc<dyn Engine>,
        state: Arc<dyn Engine>,
        snapshot_dir: PathBuf,
    ) -> std::io::Result<(LogStore, Machine)> {
        let log = Log::open(log).map_err(std::io::Error::other)?;
        let store = StateStore::open(state).map_err(std::io::Error::other)?;
        let (published, _) = crate::published::Published::new(crate::SystemClock::shared(), 0);
        let machine = Machine::open(
            Arc::new(store),
            snapshot_dir,
            published,
            crate::Blocking::Threads,
            tokio::sync::watch::Sender::new(None),
        )
        .await?;
        Ok((LogStore::new(log), machine))
    }
}
