//! The cluster over real storage and real connections.

mod brokers;
mod crash;
mod disk;
mod faults;
mod freshness;
mod kill;
mod links;
mod membership;
mod peer_port;
mod process;
mod proposals;
mod restore;
mod snapshot;
mod store_suite;
mod time;
mod versions;
mod watching;
