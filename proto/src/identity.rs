//! Who a TLS peer is: SPIFFE ids, the cluster's trust anchors, and the one function that turns
//! presented certificates into a [`Peer`].
//!
//! **Invariant:** an id is read from the first certificate only (the one whose key the handshake
//! proved), only after it was verified, and only from its single URI name.
//! **Invariant:** each kind has one anchor; a leaf of one intermediate is never accepted in
//! another's role, and nothing above the three intermediates is trusted.
//!
//! Revocation is not known here: it is looked up by id and serial in the state after a handshake.

mod anchors;
mod peer;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

pub(crate) use anchors::certificate_pem;
pub use anchors::{Anchors, Pin, Role, chain_pem};
pub(crate) use peer::{Check, Usage, leaf_validity_ms, verify};
pub use peer::{PEER_CHAIN_MAX, Peer, peer, sha256, spki_sha256};

/// Bytes of the longest SPIFFE id that is accepted.
pub const SPIFFE_ID_BYTES_MAX: usize = 255;

const SCHEME: &str = "spiffe://";

/// Why a certificate, an id or an anchor was refused.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not `spiffe://<trust domain>/<kind>/<id>`.
    #[error("not a SPIFFE id of this product: {0}")]
    SpiffeId(&'static str),
    /// The peer showed no certificate, or the handshake is not over.
    #[error("the peer proved no certificate")]
    NoCertificate,
    /// More certificates were presented than any honest peer sends.
    #[error("{count} certificates presented, at most {PEER_CHAIN_MAX} are read")]
    ChainTooLong {
        /// How many were presented.
        count: usize,
    },
    /// A certificate that cannot be parsed.
    #[error("malformed certificate: {0}")]
    Malformed(&'static str),
    /// The certificate does not verify to the anchor of any allowed kind.
    #[error("certificate is not trusted for this role")]
    NotTrusted(#[source] webpki::Error),
    /// The certificate has ended.
    #[error("certificate has expired")]
    Expired,
    /// The certificate has not begun.
    #[error("certificate is not valid yet")]
    NotYetValid,
    /// The leaf has no URI name; a common name never counts.
    #[error("certificate has no URI name")]
    NoUriName,
    /// The leaf has more than one URI name.
    #[error("certificate has more than one URI name")]
    ManyUriNames,
    /// The id belongs to another trust domain.
    #[error("certificate is of another trust domain")]
    ForeignTrustDomain,
    /// The id's kind may not use this endpoint, or its issuer may not sign that kind.
    #[error("a `{0}` is not accepted here")]
    WrongKind(Kind),
    /// The peer is somebody, but not the one who was expected.
    #[error("the peer is `{found}`, expected `{expected}`")]
    UnexpectedPeer {
        /// Who was expected.
        expected: Box<SpiffeId>,
        /// Who answered.
        found: Box<SpiffeId>,
    },
    /// The anchors themselves are unusable.
    #[error("bad trust anchors: {0}")]
    Anchors(&'static str),
    /// Not 64 hexadecimal digits.
    #[error("not a pin: 64 hexadecimal digits are needed")]
    Pin,
}

/// What a certificate's holder is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A member of the cluster.
    Broker,
    /// What signs certificates.
    Issuer,
    /// Stands beside applications and dials out.
    Connector,
    /// What a person runs.
    Client,
    /// A service that opens connections by itself.
    Workload,
    /// Carries the connections of a network's workloads.
    Gateway,
    /// Speaks for processes on a host.
    Agent,
    /// The browser access of a broker, presenting persons.
    Web,
}

impl Kind {
    /// All kinds, in the order of their declaration.
    pub const ALL: [Kind; 8] = [
        Kind::Broker,
        Kind::Issuer,
        Kind::Connector,
        Kind::Client,
        Kind::Workload,
        Kind::Gateway,
        Kind::Agent,
        Kind::Web,
    ];

    /// The kind as it is written in an id.
    pub const fn as_str(self) -> &'static str {
        match self {
            Kind::Broker => "broker",
            Kind::Issuer => "issuer",
            Kind::Connector => "connector",
            Kind::Client => "client",
            Kind::Workload => "workload",
            Kind::Gateway => "gateway",
            Kind::Agent => "agent",
            Kind::Web => "web",
        }
    }

    /// The intermediate that signs this kind, and no other.
    pub const fn role(self) -> Role {
        match self {
            Kind::Broker | Kind::Issuer => Role::Brokers,
            Kind::Connector | Kind::Gateway | Kind::Agent => Role::Connectors,
            Kind::Client | Kind::Workload | Kind::Web => Role::Clients,
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Kind {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        Kind::ALL.into_iter().find(|kind| kind.as_str() == text).ok_or(Error::SpiffeId("unknown kind"))
    }
}

/// `spiffe://<trust domain>/<kind>/<id>`.
///
/// **Shape**: trust domain of `[a-z0-9._-]`, id of `[a-z0-9.-]`, both not empty and neither `.`
/// nor `..`; at most [`SPIFFE_ID_BYTES_MAX`] bytes. Parsing is exact: printing gives the same bytes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpiffeId {
    trust_domain: String,
    kind: Kind,
    id: String,
}

impl SpiffeId {
    /// Makes an id of its parts.
    ///
    /// **Errors**: [`Error::SpiffeId`] when a part has a character that is not allowed or the whole is too long.
    pub fn new(trust_domain: &str, kind: Kind, id: &str) -> Result<Self, Error> {
        check_trust_domain(trust_domain)?;
        check_segment(id, |b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'-'))?;
        let length = SCHEME.len() + trust_domain.len() + kind.as_str().len() + id.len() + 2;
        if length > SPIFFE_ID_BYTES_MAX {
            return Err(Error::SpiffeId("longer than 255 bytes"));
        }
        Ok(SpiffeId { trust_domain: trust_domain.to_owned(), kind, id: id.to_owned() })
    }

    /// The trust domain.
    pub fn trust_domain(&self) -> &str {
        &self.trust_domain
    }

    /// The kind.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The last segment: which one of its kind.
    pub fn id(&self) -> &str {
        &self.id
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SCHEME}{}/{}/{}", self.trust_domain, self.kind, self.id)
    }
}

impl FromStr for SpiffeId {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        if text.len() > SPIFFE_ID_BYTES_MAX {
            return Err(Error::SpiffeId("longer than 255 bytes"));
        }
        let rest = text.strip_prefix(SCHEME).ok_or(Error::SpiffeId("does not begin with `spiffe://`"))?;
        let mut parts = rest.split('/');
        let (Some(trust_domain), Some(kind), Some(id), None) = (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(Error::SpiffeId("needs exactly a trust domain, a kind and an id"));
        };
        SpiffeId::new(trust_domain, kind.parse()?, id)
    }
}

impl Serialize for SpiffeId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for SpiffeId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(de::Error::custom)
    }
}

/// Checks the characters of a trust domain, as `cluster init` does before it is set for ever.
///
/// **Errors**: [`Error::SpiffeId`].
pub fn check_trust_domain(text: &str) -> Result<(), Error> {
    check_segment(text, |b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'-' | b'_'))
}

fn check_segment(text: &str, allowed: impl Fn(u8) -> bool) -> Result<(), Error> {
    if text.is_empty() {
        return Err(Error::SpiffeId("has an empty segment"));
    }
    if text == "." || text == ".." {
        return Err(Error::SpiffeId("has a relative segment"));
    }
    if !text.bytes().all(allowed) {
        return Err(Error::SpiffeId("has a character that is not allowed"));
    }
    Ok(())
}
