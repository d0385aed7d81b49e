//! The protocol: services, wire messages, data-plane frames, and who a TLS peer is.
//!
//! Wire messages become validated domain types at this border; what is stored is in `selvedge_domain`.
#![warn(missing_docs)]

pub mod frame;
pub mod grant;
pub mod hello;
pub mod https;
pub mod identity;
pub mod private_file;
pub mod renewal;
pub mod tls;

pub use generated::selvedge::control::v1 as control;
pub use generated::selvedge::peer::v1 as peer;
pub use generated::selvedge::relay::v1 as relay;

/// Generated from `proto/*.proto`: `control` (streams of clients and connectors), `relay` (what a broker's edge needs
/// of other brokers) and `peer` (Raft and its surroundings, and the shapes of what the cluster stores).
#[allow(missing_docs, clippy::all, clippy::pedantic)]
mod generated {
    pub mod selvedge {
        pub mod control {
            pub mod v1 {
                tonic::include_proto!("selvedge.control.v1");
            }
        }
        pub mod peer {
            pub mod v1 {
                tonic::include_proto!("selvedge.peer.v1");
            }
        }
        pub mod relay {
            pub mod v1 {
                tonic::include_proto!("selvedge.relay.v1");
            }
        }
    }
}
