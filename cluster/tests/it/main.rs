//! The cluster over real storage and real connections.

mod brokers;
mod freshness;
mod links;
mod membership;
mod proposals;
mod store_suite;
mod watching;
