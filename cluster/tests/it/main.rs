//! The cluster over real storage and real connections.

mod brokers;
mod crash;
mod disk;
mod freshness;
mod kill;
mod links;
mod membership;
mod peer_port;
mod proposals;
mod snapshot;
mod store_suite;
mod watching;
