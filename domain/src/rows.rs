//! Rows of the replicated state, as they are stored.
//!
//! Protobuf messages: a field's number is for ever. Ids bind, names are for people. Times are cluster time in
//! milliseconds since the Unix epoch.

use crate::id::Id;
use crate::state::{IndexKey, Table};

/// A row of one of the state's tables.
pub trait Row: prost::Message + Default + Clone {
    /// The table it is stored in.
    const TABLE: Table;

    /// Its key in the table; sorts as the rows should.
    fn key(&self) -> Vec<u8>;

    /// What else it is found by.
    fn index(&self) -> Vec<IndexKey> {
        Vec::new()
    }
}

macro_rules! by_id {
    ($row:ty, $table:expr, |$this:ident| $index:expr) => {
        impl Row for $row {
            const TABLE: Table = $table;

            fn key(&self) -> Vec<u8> {
                self.id.unwrap_or_default().key().to_vec()
            }

            fn index(&self) -> Vec<IndexKey> {
                let $this = self;
                $index
            }
        }

        impl $row {
            /// The row's id.
            pub fn id(&self) -> Id {
                self.id.unwrap_or_default()
            }
        }
    };
}

/// The cluster itself: one row.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Cluster {
    /// Random, 16 bytes, made at `cluster init`.
    #[prost(bytes = "vec", tag = "1")]
    pub cluster_id: Vec<u8>,
    /// Trust domain of every SPIFFE id; never changes.
    #[prost(string, tag = "2")]
    pub trust_domain: String,
    /// Trust anchors as `proto::identity::Anchors` encodes them.
    #[prost(bytes = "vec", tag = "3")]
    pub anchors: Vec<u8>,
    /// Version of the rules of `decide` in force.
    #[prost(uint32, tag = "4")]
    pub version: u32,
    /// Freshness lease, milliseconds.
    #[prost(uint64, tag = "5")]
    pub lease_ms: u64,
    /// How long flows are held after the lease ended, milliseconds.
    #[prost(uint64, tag = "6")]
    pub hold_ms: u64,
    /// Raised by each change of the policy set (segments, groups, policies, zones).
    #[prost(uint64, tag = "7")]
    pub policy_revision: u64,
    /// Each day's knock key is derived from it; a filter in front of the handshake, not an identity.
    #[prost(bytes = "vec", tag = "8")]
    pub knock_secret: Vec<u8>,
}

impl Row for Cluster {
    const TABLE: Table = Table::Cluster;

    fn key(&self) -> Vec<u8> {
        Vec::new()
    }
}

/// A place that brokers and connector groups belong to.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Region {
    /// Id.
    #[prost(message, optional, tag = "1")]
    pub id: Option<Id>,
    /// Unique name.
    #[prost(string, tag = "2")]
    pub name: String,
    /// Degrees north.
    #[prost(double, tag = "3")]
    pub latitude: f64,
    /// Degrees east.
    #[prost(double, tag = "4")]
    pub longitude: f64,
}
by_id!(Region, Table::Region, |r| vec![IndexKey::name(&r.name)]);

/// What a broker may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum BrokerRole {
    /// Not set.
    Unspecified = 0,
    /// Votes in Raft.
    Voter = 1,
    /// Signs certificates.
    Issuer = 2,
    /// Serves `web`.
    Web = 3,
    /// Serves `edge`.
    Edge = 4,
}

/// A broker as the others and the ends know it.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Broker {
    /// Raft node id, random, never reused.
    #[prost(uint64, tag = "1")]
    pub node: u64,
    /// Unique name.
    #[prost(string, tag = "2")]
    pub name: String,
    /// Region, by name (a region may be declared later).
    #[prost(string, tag = "3")]
    pub region: String,
    /// Host name that TLS server names carry.
    #[prost(string, tag = "4")]
    pub host: String,
    /// Advertised `host:port` of the edge listener.
    #[prost(string, tag = "5")]
    pub edge: String,
    /// Advertised `host:port` of the web listener.
    #[prost(string, tag = "6")]
    pub web: String,
    /// Advertised `host:port` of the peer listener.
    #[prost(string, tag = "7")]
    pub peer: String,
    /// Roles.
    #[prost(enumeration = "BrokerRole", repeated, tag = "8")]
    pub roles: Vec<i32>,
    /// Raised by revoke and re-enrol.
    #[prost(uint64, tag = "9")]
    pub generation: u64,
    /// Removed brokers stay as rows, so that their ids are not accepted again.
    #[prost(bool, tag = "10")]
    pub removed: bool,
    /// Takes no new sessions.
    #[prost(bool, tag = "11")]
    pub draining: bool,
    /// When it joined.
    #[prost(uint64, tag = "12")]
    pub joined_ms: u64,
}

impl Row for Broker {
    const TABLE: Table = Table::Broker;

    fn key(&self) -> Vec<u8> {
        self.node.to_be_bytes().to_vec()
    }
}

/// A domain that the organisation declares private.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Zone {
    /// Id.
    #[prost(message, optional, tag = "1")]
    pub id: Option<Id>,
    /// The domain, canonical.
    #[prost(string, tag = "2")]
    pub name: String,
}
by_id!(Zone, Table::Zone, |r| vec![IndexKey::name(&r.name)]);

/// How a session carries bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
pub enum Transport {
    /// TCP.
    Tcp = 0,
    /// UDP.
    Udp = 1,
}

/// Ports of a segment, both ends included.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct PortRange {
    /// Transport.
    #[prost(enumeration = "Transport", tag = "1")]
    pub transport: i32,
    /// First port.
    #[prost(uint32, tag = "2")]
    pub first: u32,
    /// Last port.
    #[prost(uint32, tag = "3")]
    pub last: u32,
}

/// An application segment: names, addresses and ports of one application.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Segment {
    /// Id.
    #[prost(message, optional, tag = "1")]
    pub id: Option<Id>,
    /// Unique name.
    #[prost(string, tag = "2")]
    pub name: String,
    /// Canonical host patterns (`name`, `*.name`).
    #[prost(string, repeated, tag = "3")]
    pub hosts: Vec<String>,
    /// Networks in CIDR form.
    #[prost(string, repeated, tag = "4")]
    pub networks: Vec<String>,
    /// Ports.
    #[prost(message, repeated, tag = "5")]
    pub ports: Vec<PortRange>,
    /// Inclusive segments let less specific ones be tried for a port they lack.
    #[prost(bool, tag = "6")]
    pub inclusive: bool,
    /// Connector groups that reach it.
    #[prost(message, repeated, tag = "7")]
    pub connector_groups: Vec<Id>,
    /// Segment groups that it belongs to.
    #[prost(message, repeated, tag = "8")]
    pub groups: Vec<Id>,
    /// A session without a byte for so long is closed, milliseconds; 0 means never.
    #[prost(uint64, tag = "9")]
    pub idle_ms: u64,
    /// A session is closed after so long, milliseconds; 0 means never.
    #[prost(uint64, tag = "10")]
    pub absolute_ms: u64,
}
by_id!(Segment, Table::Segment, |r| vec![IndexKey::name(&r.name)]);

/// A named set of segments.
#[derive(Clone, PartialEq, prost::Message)]
pub struct SegmentGroup {
    /// Id.
    #[prost(message, optional, tag = "1")]
    pub id: Option<Id>,
    /// Unique name.
    #[prost(string, tag = "2")]
    pub name: String,
}
by_id!(SegmentGroup, Table::SegmentGroup, |r| vec![IndexKey::name(&r.name)]);

/// A unit of scale and failover: connectors beside the same applications.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ConnectorGroup {
    /// Id.
    #[prost(message, optional, tag = "1")]
    pub id: Option<Id>,
    /// Unique name.
    #[prost(string, tag = "2")]
    pub name: String,
    /// Region, by name.
    #[prost(string, tag = "3")]
    pub region: String,
}
by_id!(ConnectorGroup, Table::ConnectorGroup, |r| vec![IndexKey::name(&r.name)]);

/// Whether a policy's verdict counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum PolicyMode {
    /// It counts.
    Enforce = 0,
    /// It is evaluated beside the others and recorded when it would have changed the verdict.
    Simulate = 1,
}

/// An access policy.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Policy {
    /// Id.
    #[prost(message, optional, tag = "1")]
    pub id: Option<Id>,
    /// Unique name.
    #[prost(string, tag = "2")]
    pub name: String,
    /// Cedar as people wrote it.
    #[prost(string, tag = "3")]
    pub source: String,
    /// Cedar's JSON form, in which the n-th reference to an object is the entity id `$n`.
    #[prost(string, tag = "4")]
    pub template: String,
    /// What `$0`, `$1`, ... stand for.
    #[prost(message, repeated, tag = "5")]
    pub references: Vec<Reference>,
    /// Mode.
    #[prost(enumeration = "PolicyMode", tag = "6")]
    pub mode: i32,
}
by_id!(Policy, Table::Policy, |r| vec![IndexKey::name(&r.name)]);

/// An object that a policy names.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Reference {
    /// Cedar entity type (`User`, `Group`, `Workload`, `Segment`, `SegmentGroup`).
    #[prost(string, tag = "1")]
    pub kind: String,
    /// The object.
    #[prost(message, optional, tag = "2")]
    pub id: Option<Id>,
    /// The name that was written.
    #[prost(string, tag = "3")]
    pub name: String,
}

/// A directory: where users and groups come from.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Directory {
    /// Id.
    #[prost(message, optional, tag = "1")]
    pub id: Option<Id>,
    /// Unique name.
    #[prost(string, tag = "2")]
    pub name: String,
    /// SHA-256 of its SCIM bearer token.
    #[prost(bytes = "vec", tag = "3")]
    pub token_sha256: Vec<u8>,
    /// Raised when the token is replaced.
    #[prost(uint64, tag = "4")]
    pub generation: u64,
}
by_id!(Directory, Table::Directory, |r| vec![IndexKey::name(&r.name), IndexKey::Secret(r.token_sha256.clone())]);

/// A person.
#[derive(Clone, PartialEq, prost::Message)]
pub struct User {
    /// Id.
    #[prost(message, optional, tag = "1")]
    pub id: Option<Id>,
    /// Dense number, never reused.
    #[prost(uint32, tag = "2")]
    pub number: u32,
    /// Directory.
    #[prost(message, optional, tag = "3")]
    pub directory: Option<Id>,
    /// SCIM `userName`; unique in its directory without regard to case.
    #[prost(string, tag = "4")]
    pub user_name: String,
    /// SCIM `externalId`.
    #[prost(string, tag = "5")]
    pub external_id: String,
    /// SCIM `displayName`.
    #[prost(string, tag = "6")]
    pub display_name: String,
    /// SCIM `active`.
    #[prost(bool, tag = "7")]
    pub active: bool,
    /// Numbers of its groups, sorted; a number of a deleted group is ignored.
    #[prost(uint32, repeated, tag = "8")]
    pub groups: Vec<u32>,
    /// Raised by disable, delete and revoke; grants that carry an older one are void.
    #[prost(uint64, tag = "9")]
    pub generation: u64,
    /// Every other SCIM attribute, a JSON object.
    #[prost(string, tag = "10")]
    pub attributes: String,
    /// Made at.
    #[prost(uint64, tag = "11")]
    pub created_ms: u64,
    /// Changed at.
    #[prost(uint64, tag = "12")]
    pub modified_ms: u64,
    /// Counts changes; the ETag.
    #[prost(uint64, tag = "13")]
    pub version: u64,
}
by_id!(User, Table::User, |r| {
    let mut keys = vec![IndexKey::scoped(r.directory.unwrap_or_default(), &r.user_name), IndexKey::Number(r.number)];
    if !r.external_id.is_empty() {
        keys.push(IndexKey::External(r.directory.unwrap_or_default(), r.external_id.clone()));
    }
    keys
});

/// A group of users.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Group {
    /// Id.
    #[prost(message, optional, tag = "1")]
    pub id: Option<Id>,
    /// Dense number, never reused.
    #[prost(uint32, tag = "2")]
    pub number: u32,
    /// Directory.
    #[prost(message, optional, tag = "3")]
    pub directory: Option<Id>,
    /// SCIM `displayName`; unique in its directory without regard to case.
    #[prost(string, tag = "4")]
    pub display_name: String,
    /// SCIM `externalId`.
    #[prost(string, tag = "5")]
    pub external_id: String,
    /// Made at.
    #[prost(uint64, tag = "6")]
    pub created_ms: u64,
    /// Changed at.
    #[prost(uint64, tag = "7")]
    pub modified_ms: u64,
    /// Counts changes; the ETag.
    #[prost(uint64, tag = "8")]
    pub version: u64,
}
by_id!(Group, Table::Group, |r| vec![
    IndexKey::scoped(r.directory.unwrap_or_default(), &r.display_name),
    IndexKey::Number(r.number)
]);

/// Numbers of up to 1,024 members of a group: those whose number divided by 1,024 is `chunk`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Members {
    /// Number of the group.
    #[prost(uint32, tag = "1")]
    pub group: u32,
    /// User number / 1,024.
    #[prost(uint32, tag = "2")]
    pub chunk: u32,
    /// Sorted user numbers.
    #[prost(uint32, repeated, tag = "3")]
    pub users: Vec<u32>,
}

impl Members {
    /// The key of a chunk.
    pub fn key_of(group: u32, chunk: u32) -> Vec<u8> {
        [group.to_be_bytes(), chunk.to_be_bytes()].concat()
    }
}

impl Row for Members {
    const TABLE: Table = Table::Members;

    fn key(&self) -> Vec<u8> {
        Self::key_of(self.group, self.chunk)
    }
}

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

/// A proposing client of the log (a broker's boot) and the outcomes that a retry may ask for.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Client {
    /// Id.
    #[prost(message, optional, tag = "1")]
    pub id: Option<Id>,
    /// Broker.
    #[prost(uint64, tag = "2")]
    pub node: u64,
    /// Its boot.
    #[prost(uint64, tag = "3")]
    pub boot: u64,
    /// Every outcome below this was received and is forgotten.
    #[prost(uint64, tag = "4")]
    pub acked_below: u64,
    /// Kept outcomes, by sequence number.
    #[prost(message, repeated, tag = "5")]
    pub outcomes: Vec<KeptOutcome>,
    /// Last used.
    #[prost(uint64, tag = "6")]
    pub used_ms: u64,
}
by_id!(Client, Table::Client, |_r| vec![]);

/// The outcome of one request, without bodies.
#[derive(Clone, PartialEq, prost::Message)]
pub struct KeptOutcome {
    /// Sequence number of the request.
    #[prost(uint64, tag = "1")]
    pub seq: u64,
    /// Refusal code; 0 for done.
    #[prost(int32, tag = "2")]
    pub code: i32,
    /// Ids that it made.
    #[prost(message, repeated, tag = "3")]
    pub ids: Vec<Id>,
    /// Position after it.
    #[prost(message, optional, tag = "4")]
    pub position: Option<Id>,
}

/// The outcome of a request that an outside caller gave a key (`Idempotency-Key`).
#[derive(Clone, PartialEq, prost::Message)]
pub struct Idempotency {
    /// SHA-256 of caller and key.
    #[prost(bytes = "vec", tag = "1")]
    pub key_sha256: Vec<u8>,
    /// Outcome.
    #[prost(message, optional, tag = "2")]
    pub outcome: Option<KeptOutcome>,
    /// Forgotten from then on.
    #[prost(uint64, tag = "3")]
    pub expires_ms: u64,
}

impl Row for Idempotency {
    const TABLE: Table = Table::Idempotency;

    fn key(&self) -> Vec<u8> {
        self.key_sha256.clone()
    }
}
