//! The edge: authenticates both ends, asks the policy, picks the path, stitches the two connections.
//!
//! A broker decides from its own copy of the log and writes every decision to its audit journal. It does not know
//! what the bytes of a session mean: they are encrypted between client and connector.
#![warn(missing_docs)]

pub mod audit;
pub mod config;
pub mod decision;
pub mod edge;
pub mod issuer;
pub mod metrics;
pub mod node;
pub mod ops;
pub mod relay;
pub mod routing;
pub mod web;
