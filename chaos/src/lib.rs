//! What is thrown at Selvedge, and the rules of the house that no compiler checks.
//!
//! `tests/arrows.rs` holds the workspace to its arrows. This crate may use every other one; nothing uses it.
#![warn(missing_docs)]
