//! The cluster itself, its regions and its brokers, and what brokers propose with.

use super::{Row, by_id};
use crate::id::Id;
use crate::limits::JOURNAL_KEEP_MS_DEFAULT;
use crate::state::{IndexKey, Table};

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
    /// How long the event journal is kept, milliseconds; the default when 0.
    #[prost(uint64, tag = "9")]
    pub journal_keep_ms: u64,
    /// Users, devices, workloads and connectors for which nobody has vouched in this epoch or a later one are held.
    #[prost(uint32, tag = "10")]
    pub held_before_epoch: u32,
}

impl Cluster {
    /// How long the event journal is kept, milliseconds.
    pub fn journal_keep_ms(&self) -> u64 {
        if self.journal_keep_ms == 0 { JOURNAL_KEEP_MS_DEFAULT } else { self.journal_keep_ms }
    }
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

impl BrokerRole {
    /// Every role.
    pub const ALL: [Self; 4] = [Self::Voter, Self::Issuer, Self::Web, Self::Edge];

    /// The role, as people write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Unspecified => "none",
            Self::Voter => "voter",
            Self::Issuer => "issuer",
            Self::Web => "web",
            Self::Edge => "edge",
        }
    }

    /// Reads names with commas between them, in any order; all roles when the text is empty. None when one is no role.
    pub fn parse_list(text: &str) -> Option<Vec<Self>> {
        if text.trim().is_empty() {
            return Some(Self::ALL.into());
        }
        let named = |name: &str| Self::ALL.into_iter().find(|role| role.name() == name.trim());
        let mut roles = text.split(',').map(named).collect::<Option<Vec<_>>>()?;
        roles.sort_unstable();
        roles.dedup();
        Some(roles)
    }
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
    /// While it drains: what is left of its sessions is cut then. Cluster time, milliseconds.
    #[prost(uint64, tag = "13")]
    pub drain_until_ms: u64,
}

impl Broker {
    /// Whether it has a role.
    pub fn has(&self, role: BrokerRole) -> bool {
        self.roles.contains(&(role as i32))
    }
}

impl Row for Broker {
    const TABLE: Table = Table::Broker;

    fn key(&self) -> Vec<u8> {
        self.node.to_be_bytes().to_vec()
    }
}

/// A proposing client of the log (a broker's boot). Tag 5 held the outcomes, which have rows of their own.
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
    /// Last used.
    #[prost(uint64, tag = "6")]
    pub used_ms: u64,
}
by_id!(Client, Table::Client, |_r| vec![]);

/// Outcomes that retries of a client's requests may ask for: of [`ClientOutcomes::SEQS`] requests in a row.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ClientOutcomes {
    /// The proposing client.
    #[prost(message, optional, tag = "1")]
    pub client: Option<Id>,
    /// Sequence number / [`ClientOutcomes::SEQS`].
    #[prost(uint64, tag = "2")]
    pub block: u64,
    /// Outcomes, in the order in which they were decided.
    #[prost(message, repeated, tag = "3")]
    pub outcomes: Vec<KeptOutcome>,
}

impl ClientOutcomes {
    /// Requests whose outcomes stand in one row.
    pub const SEQS: u64 = 16;

    /// The key of the row of a request.
    pub fn key_of(client: Id, seq: u64) -> Vec<u8> {
        [&client.key()[..], &(seq / Self::SEQS).to_be_bytes()].concat()
    }
}

impl Row for ClientOutcomes {
    const TABLE: Table = Table::ClientOutcomes;

    fn key(&self) -> Vec<u8> {
        [&self.client.unwrap_or_default().key()[..], &self.block.to_be_bytes()].concat()
    }
}

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
