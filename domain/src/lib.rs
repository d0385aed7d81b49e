//! What Selvedge knows and decides, without doing anything.
//!
//! Ids, commands, events, the replicated state with `decide` and `evolve`, policy evaluation and path choice.
//! Everything here is pure: time and seeds are arguments; there is no socket, no clock and no randomness, so that
//! every broker that applies the same log holds the same state, byte for byte.
#![warn(missing_docs)]
#![deny(clippy::iter_over_hash_type)]

pub mod command;
pub mod credential;
pub mod decide;
pub mod event;
pub mod id;
pub mod limits;
pub mod name;
pub mod path;
pub mod policy;
pub mod rows;
pub mod segment;
pub mod spec;
pub mod state;

pub use command::{Actor, ActorKind, Body, Command, Dedupe, Outcome, Rejected, RejectedCode};
pub use credential::{Asker, Credential};
pub use event::{Envelope, Event};
pub use id::Id;
pub use state::{Changes, JournalRow, RowChange, State};
