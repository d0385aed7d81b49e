//! Administrators, and where what they do is reported.

use super::{Row, by_id};
use crate::id::Id;
use crate::state::{IndexKey, Table};

/// What an administrator's token may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum AdminRole {
    /// Nothing.
    Unspecified = 0,
    /// Reads everything but secrets.
    Auditor = 1,
    /// Changes policy, identity and keys.
    Admin = 2,
    /// Also makes and revokes administrators and changes the cluster.
    Owner = 3,
}

/// An administrator's token.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Token {
    /// Id.
    #[prost(message, optional, tag = "1")]
    pub id: Option<Id>,
    /// For people.
    #[prost(string, tag = "2")]
    pub name: String,
    /// SHA-256 of the token.
    #[prost(bytes = "vec", tag = "3")]
    pub secret_sha256: Vec<u8>,
    /// Role.
    #[prost(enumeration = "AdminRole", tag = "4")]
    pub role: i32,
    /// Raised by revoke.
    #[prost(uint64, tag = "5")]
    pub generation: u64,
    /// Revoked.
    #[prost(bool, tag = "6")]
    pub revoked: bool,
}
by_id!(Token, Table::Token, |r| vec![IndexKey::Secret(r.secret_sha256.clone()), IndexKey::name(&r.name)]);

/// A SIEM destination of the audit stream.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Receiver {
    /// Id.
    #[prost(message, optional, tag = "1")]
    pub id: Option<Id>,
    /// Unique name.
    #[prost(string, tag = "2")]
    pub name: String,
    /// `host:port`.
    #[prost(string, tag = "3")]
    pub address: String,
    /// TLS: PEM of the receiver's certification authority; empty for plain TCP.
    #[prost(string, tag = "4")]
    pub tls_ca: String,
    /// TLS: the receiver's name in its certificate.
    #[prost(string, tag = "5")]
    pub tls_name: String,
}
by_id!(Receiver, Table::Receiver, |r| vec![IndexKey::name(&r.name)]);

/// How far a receiver has acknowledged one broker's stream.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Cursor {
    /// Receiver.
    #[prost(message, optional, tag = "1")]
    pub receiver: Option<Id>,
    /// Broker of the stream.
    #[prost(uint64, tag = "2")]
    pub broker: u64,
    /// Boot of the stream.
    #[prost(uint64, tag = "3")]
    pub boot: u64,
    /// The next sequence number to send.
    #[prost(uint64, tag = "4")]
    pub next_seq: u64,
}

impl Row for Cursor {
    const TABLE: Table = Table::Cursor;

    fn key(&self) -> Vec<u8> {
        let receiver = self.receiver.unwrap_or_default().key();
        [&receiver[..], &self.broker.to_be_bytes(), &self.boot.to_be_bytes()].concat()
    }
}
