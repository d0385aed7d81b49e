//! The protocol: services, wire messages, data-plane frames, and who a TLS peer is.
//!
//! Wire messages become validated domain types at this border; what is stored is in `selvedge_domain`.
#![warn(missing_docs)]

pub mod frame;
pub mod grant;
pub mod hello;
pub mod identity;
pub mod tls;

/// Generated from `control.proto`: control streams of clients and connectors.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod control {
    tonic::include_proto!("selvedge.control.v1");
}

/// Generated from `peer.proto`: between brokers, and the shapes of what the cluster stores.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod peer {
    tonic::include_proto!("selvedge.peer.v1");
}

/// Generated from `relay.proto`: what a broker's edge needs of other brokers.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod relay {
    tonic::include_proto!("selvedge.relay.v1");
}
