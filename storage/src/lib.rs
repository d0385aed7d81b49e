//! Durability: the Raft log, the replicated state with its event journal and snapshots, and the audit journal.
//!
//! **Invariant:** what a caller was told is durable survives a loss of power; what is found damaged is refused by
//! name, never mended silently.
//!
//! Log and state are written once, over a small [`engine::Engine`]; RocksDB and a fault-injecting memory are engines.
//! This crate does not know the consensus library, nor what is inside a row, an event or an audit record.
#![warn(missing_docs)]

pub mod audit;
pub mod dir;
pub mod engine;
mod error;
pub mod inspect;
pub mod log;
pub mod metrics;
pub mod room;
pub mod state;

pub use dir::DataDir;
pub use error::Error;
