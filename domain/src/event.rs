//! Events: what a command changed. Journal rows are encoded [`Envelope`]s.

use sha2::{Digest as _, Sha256};

use crate::id::Id;
use crate::rows;

/// An event with where, when and by whom.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Envelope {
    /// Position; also the id of what the event made.
    #[prost(message, optional, tag = "1")]
    pub id: Option<Id>,
    /// Cluster time, milliseconds.
    #[prost(uint64, tag = "2")]
    pub time_ms: u64,
    /// Broker that proposed the command.
    #[prost(uint64, tag = "3")]
    pub proposer: u64,
    /// Who asked: kind (`broker`, `token`, `directory`, `bootstrap`, `enrolment`).
    #[prost(string, tag = "4")]
    pub actor: String,
    /// Who asked: token or directory.
    #[prost(message, optional, tag = "5")]
    pub actor_id: Option<Id>,
    /// The last event of its command: a consumer applies up to here at once.
    #[prost(bool, tag = "6")]
    pub last: bool,
    /// What happened.
    #[prost(
        oneof = "Event",
        tags = "16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41"
    )]
    pub event: Option<Event>,
}

impl Envelope {
    /// The journal's hash after a row, from the hash before it (empty before the first) and the row's bytes.
    pub fn chain(before: &[u8], bytes: &[u8]) -> [u8; 32] {
        Sha256::new().chain_update(before).chain_update(bytes).finalize().into()
    }
}

/// What happened: the row as it is from now on, or the key of the row that is gone.
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Event {
    /// The cluster's own row.
    #[prost(message, tag = "16")]
    ClusterPut(rows::Cluster),
    /// A broker.
    #[prost(message, tag = "17")]
    BrokerPut(rows::Broker),
    /// A region.
    #[prost(message, tag = "18")]
    RegionPut(rows::Region),
    /// A zone.
    #[prost(message, tag = "19")]
    ZonePut(rows::Zone),
    /// A connector group.
    #[prost(message, tag = "20")]
    ConnectorGroupPut(rows::ConnectorGroup),
    /// A segment group.
    #[prost(message, tag = "21")]
    SegmentGroupPut(rows::SegmentGroup),
    /// A segment.
    #[prost(message, tag = "22")]
    SegmentPut(rows::Segment),
    /// A policy.
    #[prost(message, tag = "23")]
    PolicyPut(rows::Policy),
    /// A log receiver.
    #[prost(message, tag = "24")]
    ReceiverPut(rows::Receiver),
    /// An object is gone.
    #[prost(message, tag = "25")]
    Deleted(Deleted),
    /// A token.
    #[prost(message, tag = "26")]
    TokenPut(rows::Token),
    /// A directory.
    #[prost(message, tag = "27")]
    DirectoryPut(rows::Directory),
    /// A user; its groups included.
    #[prost(message, tag = "28")]
    UserPut(rows::User),
    /// A group, without its members.
    #[prost(message, tag = "29")]
    GroupPut(rows::Group),
    /// Users joined or left a group.
    #[prost(message, tag = "30")]
    MembersChanged(MembersChanged),
    /// An enrolment secret.
    #[prost(message, tag = "31")]
    EnrolKeyPut(rows::EnrolKey),
    /// An enrolment.
    #[prost(message, tag = "32")]
    Enrolled(rows::Enrolment),
    /// A device.
    #[prost(message, tag = "33")]
    DevicePut(rows::Device),
    /// A workload.
    #[prost(message, tag = "34")]
    WorkloadPut(rows::Workload),
    /// A connector.
    #[prost(message, tag = "35")]
    ConnectorPut(rows::Connector),
    /// A certificate.
    #[prost(message, tag = "36")]
    CertificatePut(rows::Certificate),
    /// Availability of a connector as a broker sees it.
    #[prost(message, tag = "37")]
    AvailabilityPut(rows::Availability),
    /// A proposing client.
    #[prost(message, tag = "38")]
    ClientPut(rows::Client),
    /// The journal was compacted.
    #[prost(message, tag = "39")]
    JournalCompacted(JournalCompacted),
    /// An earlier state became the beginning of this epoch.
    #[prost(message, tag = "40")]
    EpochBegan(EpochBegan),
    /// An administrator set cluster time forward.
    #[prost(message, tag = "41")]
    TimeSet(TimeSet),
}

/// An object is gone.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Deleted {
    /// Number of its table (`state::Table`).
    #[prost(uint32, tag = "1")]
    pub table: u32,
    /// Its id.
    #[prost(message, optional, tag = "2")]
    pub id: Option<Id>,
    /// Its name, for people.
    #[prost(string, tag = "3")]
    pub name: String,
}

/// Users joined or left a group.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct MembersChanged {
    /// Group.
    #[prost(message, optional, tag = "1")]
    pub group: Option<Id>,
    /// Numbers of users that joined, sorted.
    #[prost(uint32, repeated, tag = "2")]
    pub added: Vec<u32>,
    /// Numbers of users that left, sorted.
    #[prost(uint32, repeated, tag = "3")]
    pub removed: Vec<u32>,
}

/// Journal rows up to here are gone.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct JournalCompacted {
    /// The last row that is gone.
    #[prost(uint64, tag = "1")]
    pub upto_seq: u64,
}

/// An earlier state became the beginning of an epoch.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct EpochBegan {
    /// Where that state stood, in its own epoch.
    #[prost(message, optional, tag = "1")]
    pub after: Option<Id>,
    /// Users, devices, workloads and connectors of earlier epochs are held.
    #[prost(bool, tag = "2")]
    pub holds: bool,
}

/// Cluster time was set forward.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct TimeSet {
    /// From, milliseconds.
    #[prost(uint64, tag = "1")]
    pub from_ms: u64,
    /// To, milliseconds.
    #[prost(uint64, tag = "2")]
    pub to_ms: u64,
}

impl Event {
    /// The event's name, for people and scripts.
    pub fn name(&self) -> &'static str {
        match self {
            Self::ClusterPut(_) => "cluster.put",
            Self::BrokerPut(_) => "broker.put",
            Self::RegionPut(_) => "region.put",
            Self::ZonePut(_) => "zone.put",
            Self::ConnectorGroupPut(_) => "connector_group.put",
            Self::SegmentGroupPut(_) => "segment_group.put",
            Self::SegmentPut(_) => "segment.put",
            Self::PolicyPut(_) => "policy.put",
            Self::ReceiverPut(_) => "receiver.put",
            Self::Deleted(_) => "deleted",
            Self::TokenPut(_) => "token.put",
            Self::DirectoryPut(_) => "directory.put",
            Self::UserPut(_) => "user.put",
            Self::GroupPut(_) => "group.put",
            Self::MembersChanged(_) => "members.changed",
            Self::EnrolKeyPut(_) => "enrol_key.put",
            Self::Enrolled(_) => "enrolled",
            Self::DevicePut(_) => "device.put",
            Self::WorkloadPut(_) => "workload.put",
            Self::ConnectorPut(_) => "connector.put",
            Self::CertificatePut(_) => "certificate.put",
            Self::AvailabilityPut(_) => "availability.put",
            Self::ClientPut(_) => "client.put",
            Self::JournalCompacted(_) => "journal.compacted",
            Self::EpochBegan(_) => "epoch.began",
            Self::TimeSet(_) => "time.set",
        }
    }
}
