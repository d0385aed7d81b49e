//! What people reach: zones, segments and the connector groups beside them.

use super::{Row, by_id};
use crate::id::Id;
use crate::state::{IndexKey, Table};

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
