//! The cluster over real storage and real connections.

mod brokers;
mod membership;
mod proposals;
mod freshness;
mod store_suite;
mod watching;
