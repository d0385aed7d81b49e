//! Objects as people write them: the YAML of `selvedge apply` and the JSON of the admin API.
//!
//! Names, not ids; resolved when applied.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// One object of the configuration, tagged by `kind`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub enum Object {
    /// A region.
    Region(Region),
    /// A zone.
    Zone(Zone),
    /// A connector group.
    ConnectorGroup(ConnectorGroup),
    /// A segment group.
    SegmentGroup(SegmentGroup),
    /// An application segment.
    Segment(Segment),
    /// An access policy.
    Policy(Policy),
    /// A log receiver.
    Receiver(Receiver),
}

impl Object {
    /// Kind and name.
    pub fn key(&self) -> Key {
        let (kind, name) = match self {
            Self::Region(o) => (Kind::Region, &o.name),
            Self::Zone(o) => (Kind::Zone, &o.name),
            Self::ConnectorGroup(o) => (Kind::ConnectorGroup, &o.name),
            Self::SegmentGroup(o) => (Kind::SegmentGroup, &o.name),
            Self::Segment(o) => (Kind::Segment, &o.name),
            Self::Policy(o) => (Kind::Policy, &o.name),
            Self::Receiver(o) => (Kind::Receiver, &o.name),
        };
        Key { kind, name: name.clone() }
    }
}

/// Kinds of configuration objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
pub enum Kind {
    /// A region.
    Region,
    /// A zone.
    Zone,
    /// A connector group.
    ConnectorGroup,
    /// A segment group.
    SegmentGroup,
    /// An application segment.
    Segment,
    /// An access policy.
    Policy,
    /// A log receiver.
    Receiver,
}

/// Which object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
pub struct Key {
    /// Kind.
    pub kind: Kind,
    /// Name.
    pub name: String,
}

/// A place.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Region {
    /// Unique name.
    pub name: String,
    /// Degrees north, -90 to 90.
    pub latitude: f64,
    /// Degrees east, -180 to 180.
    pub longitude: f64,
}

/// A private domain.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Zone {
    /// The domain.
    pub name: String,
}

/// Connectors beside the same applications.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ConnectorGroup {
    /// Unique name.
    pub name: String,
    /// Name of a region.
    pub region: String,
}

/// A named set of segments.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SegmentGroup {
    /// Unique name.
    pub name: String,
}

/// An application.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Segment {
    /// Unique name.
    pub name: String,
    /// Host names or patterns (`*.domain`).
    #[serde(default)]
    pub hosts: Vec<String>,
    /// Addresses or networks in CIDR form.
    #[serde(default)]
    pub networks: Vec<String>,
    /// TCP ports: `443`, or a range `8000-8099`.
    #[serde(default)]
    pub tcp: Vec<String>,
    /// UDP ports.
    #[serde(default)]
    pub udp: Vec<String>,
    /// Let less specific segments be tried for a port this one lacks.
    #[serde(default)]
    pub inclusive: bool,
    /// Names of the connector groups that reach it.
    pub connector_groups: Vec<String>,
    /// Names of its segment groups.
    #[serde(default)]
    pub groups: Vec<String>,
    /// Close a session without a byte for so long, seconds; 0 means never.
    #[serde(default)]
    pub idle_timeout_s: u32,
    /// Close a session after so long, seconds; 0 means never.
    #[serde(default)]
    pub absolute_timeout_s: u32,
}

/// An access policy.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    /// Unique name.
    pub name: String,
    /// Cedar text of one policy. Entities are written by name: `Group::"sales"`, `Segment::"crm"`.
    pub cedar: String,
    /// Evaluate and record, but do not let it count.
    #[serde(default)]
    pub simulate: bool,
}

/// A SIEM destination.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Receiver {
    /// Unique name.
    pub name: String,
    /// `host:port` of a syslog receiver (RFC 5424 over TCP, octet counting).
    pub address: String,
    /// PEM of the receiver's certification authority; TLS is used when set.
    #[serde(default)]
    pub tls_ca: String,
    /// The receiver's name in its certificate.
    #[serde(default)]
    pub tls_name: String,
}
