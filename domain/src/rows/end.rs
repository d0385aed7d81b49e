//! What is enrolled, by what secret, with which certificate: devices, workloads, connectors.

use super::{BrokerRole, Row, by_id};
use crate::id::Id;
use crate::state::{IndexKey, Table};

/// A device that a person's client runs on.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Device {
    /// Id.
    #[prost(message, optional, tag = "1")]
    pub id: Option<Id>,
    /// Who enrolled it.
    #[prost(message, optional, tag = "2")]
    pub user: Option<Id>,
    /// What its owner calls it.
    #[prost(string, tag = "3")]
    pub name: String,
    /// SHA-256 of its public key (SPKI).
    #[prost(bytes = "vec", tag = "4")]
    pub key_sha256: Vec<u8>,
    /// Raised by revoke and re-enrol.
    #[prost(uint64, tag = "5")]
    pub generation: u64,
    /// Revoked.
    #[prost(bool, tag = "6")]
    pub revoked: bool,
    /// Enrolled at.
    #[prost(uint64, tag = "7")]
    pub enrolled_ms: u64,
    /// The last epoch in which somebody vouched for it; 0 when nobody had to since it was made.
    #[prost(uint32, tag = "8")]
    pub vouched_epoch: u32,
}
by_id!(Device, Table::Device, |_r| vec![]);

/// A workload: an application that is a principal of its own.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Workload {
    /// Id.
    #[prost(message, optional, tag = "1")]
    pub id: Option<Id>,
    /// Unique name; made by the first provisioning key or policy that needs it.
    #[prost(string, tag = "2")]
    pub name: String,
    /// SHA-256 of the public keys (SPKI) of its instances.
    #[prost(bytes = "vec", repeated, tag = "3")]
    pub keys_sha256: Vec<Vec<u8>>,
    /// Raised by revoke.
    #[prost(uint64, tag = "4")]
    pub generation: u64,
    /// Revoked.
    #[prost(bool, tag = "5")]
    pub revoked: bool,
    /// The last epoch in which somebody vouched for it; 0 when nobody had to since it was made.
    #[prost(uint32, tag = "6")]
    pub vouched_epoch: u32,
}
by_id!(Workload, Table::Workload, |r| vec![IndexKey::name(&r.name)]);

/// A connector.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Connector {
    /// Id.
    #[prost(message, optional, tag = "1")]
    pub id: Option<Id>,
    /// What its operator calls it.
    #[prost(string, tag = "2")]
    pub name: String,
    /// Group.
    #[prost(message, optional, tag = "3")]
    pub group: Option<Id>,
    /// SHA-256 of its public key (SPKI).
    #[prost(bytes = "vec", tag = "4")]
    pub key_sha256: Vec<u8>,
    /// Raised by revoke and re-enrol.
    #[prost(uint64, tag = "5")]
    pub generation: u64,
    /// Revoked.
    #[prost(bool, tag = "6")]
    pub revoked: bool,
    /// Enrolled at.
    #[prost(uint64, tag = "7")]
    pub enrolled_ms: u64,
    /// The last epoch in which somebody vouched for it; 0 when nobody had to since it was made.
    #[prost(uint32, tag = "8")]
    pub vouched_epoch: u32,
}
by_id!(Connector, Table::Connector, |_r| vec![]);

/// What an enrolment secret makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum EnrolKind {
    /// Not set.
    Unspecified = 0,
    /// A connector, into a connector group.
    Connector = 1,
    /// An instance of a workload.
    Workload = 2,
    /// A person's device (a one-time code).
    Device = 3,
    /// A broker (a join token).
    Broker = 4,
}

/// An enrolment secret: provisioning key, one-time code or join token.
#[derive(Clone, PartialEq, prost::Message)]
pub struct EnrolKey {
    /// Id.
    #[prost(message, optional, tag = "1")]
    pub id: Option<Id>,
    /// What it makes.
    #[prost(enumeration = "EnrolKind", tag = "2")]
    pub kind: i32,
    /// SHA-256 of the secret.
    #[prost(bytes = "vec", tag = "3")]
    pub secret_sha256: Vec<u8>,
    /// The connector group, workload or user it is bound to.
    #[prost(message, optional, tag = "4")]
    pub target: Option<Id>,
    /// How often it may be used.
    #[prost(uint32, tag = "5")]
    pub uses_max: u32,
    /// How often it was.
    #[prost(uint32, tag = "6")]
    pub uses: u32,
    /// Void from then on.
    #[prost(uint64, tag = "7")]
    pub expires_ms: u64,
    /// Revoked.
    #[prost(bool, tag = "8")]
    pub revoked: bool,
    /// For people.
    #[prost(string, tag = "9")]
    pub name: String,
    /// For brokers, the roles that it gives.
    #[prost(enumeration = "BrokerRole", repeated, tag = "10")]
    pub roles: Vec<i32>,
}
by_id!(EnrolKey, Table::EnrolKey, |r| vec![IndexKey::Secret(r.secret_sha256.clone())]);

/// What one use of an enrolment key made; a repetition with the same public key gets the same answer.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Enrolment {
    /// The enrolment key.
    #[prost(message, optional, tag = "1")]
    pub key: Option<Id>,
    /// SHA-256 of the public key (SPKI) that was enrolled.
    #[prost(bytes = "vec", tag = "2")]
    pub key_sha256: Vec<u8>,
    /// The connector, workload or device; for brokers none.
    #[prost(message, optional, tag = "3")]
    pub made: Option<Id>,
    /// For brokers, the node id.
    #[prost(uint64, tag = "4")]
    pub node: u64,
    /// At.
    #[prost(uint64, tag = "5")]
    pub at_ms: u64,
}

impl Enrolment {
    /// The key of a row.
    pub fn key_of(key: Id, key_sha256: &[u8]) -> Vec<u8> {
        [&key.key()[..], key_sha256].concat()
    }
}

impl Row for Enrolment {
    const TABLE: Table = Table::Enrolment;

    fn key(&self) -> Vec<u8> {
        Self::key_of(self.key.unwrap_or_default(), &self.key_sha256)
    }
}

/// A certificate that the issuer signed.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Certificate {
    /// Serial number, lower-case hex.
    #[prost(string, tag = "1")]
    pub serial: String,
    /// SPIFFE id.
    #[prost(string, tag = "2")]
    pub subject: String,
    /// SHA-256 of its public key (SPKI).
    #[prost(bytes = "vec", tag = "3")]
    pub key_sha256: Vec<u8>,
    /// Expires.
    #[prost(uint64, tag = "4")]
    pub not_after_ms: u64,
    /// Revoked by serial.
    #[prost(bool, tag = "5")]
    pub revoked: bool,
    /// Generation of its subject when it was issued.
    #[prost(uint64, tag = "6")]
    pub generation: u64,
}

impl Row for Certificate {
    const TABLE: Table = Table::Certificate;

    fn key(&self) -> Vec<u8> {
        self.serial.clone().into_bytes()
    }
}

/// Whether a connector is there, as one broker sees it.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Availability {
    /// Connector.
    #[prost(message, optional, tag = "1")]
    pub connector: Option<Id>,
    /// Broker that says so.
    #[prost(uint64, tag = "2")]
    pub broker: u64,
    /// The connector's stream number; an older one is ignored.
    #[prost(uint64, tag = "3")]
    pub stream: u64,
    /// Connected.
    #[prost(bool, tag = "4")]
    pub up: bool,
    /// Targets (`host:port`) that it found not to answer.
    #[prost(string, repeated, tag = "5")]
    pub down: Vec<String>,
    /// Since.
    #[prost(uint64, tag = "6")]
    pub since_ms: u64,
}

impl Availability {
    /// The key of a row.
    pub fn key_of(connector: Id, broker: u64) -> Vec<u8> {
        [&connector.key()[..], &broker.to_be_bytes()].concat()
    }
}

impl Row for Availability {
    const TABLE: Table = Table::Availability;

    fn key(&self) -> Vec<u8> {
        Self::key_of(self.connector.unwrap_or_default(), self.broker)
    }
}
