//! The side that dials out: enrolment, control streams to the best brokers, the app connector, and the client.
//!
//! Invariants: nothing here listens beyond loopback and a socket of the same user; a private key is made here and never
//! leaves; application bytes leave this machine only inside the end-to-end TLS session.
//!
//! It decides nothing about access: brokers do. What it refuses by itself is what its own configuration does not allow.
#![warn(missing_docs)]

mod backoff;
pub mod client;
mod clock;
pub mod connector;
mod copy;
mod dial;
mod end;
pub mod enrol;
mod link;
mod links;
mod metrics;
pub mod state;
mod trace;
mod trust;

pub use dial::Via;
pub use links::{Error as LinkError, LinkStatus};
