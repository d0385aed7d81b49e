//! What is thrown at Selvedge, and the rules of the house that no compiler checks.
//!
//! - [`sim`]: whole clusters on one thread in virtual time, from a seed; README.md says how to run and replay one.
//! - [`check`]: the invariants, as functions of what such a run observed.
//! - `tests/arrows.rs` holds the workspace to its arrows. This crate may use every other one; nothing uses it.
#![warn(missing_docs)]

pub mod check;
pub mod sim;
