use std::fmt;
use std::str::FromStr;

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::{Error, check_trust_domain, spki_sha256};

/// Which of the cluster's three intermediates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Signs brokers.
    Brokers,
    /// Signs connectors, gateways and agents.
    Connectors,
    /// Signs clients, workloads and the web part.
    Clients,
}

impl Role {
    /// All roles, in the order in which bundles hold them.
    pub const ALL: [Role; 3] = [Role::Brokers, Role::Connectors, Role::Clients];

    /// The role as it is written in names and files.
    pub const fn as_str(self) -> &'static str {
        match self {
            Role::Brokers => "brokers",
            Role::Connectors => "connectors",
            Role::Clients => "clients",
        }
    }
}

/// What one cluster's members, connectors and clients trust: its three intermediates, each the
/// anchor of its role alone.
///
/// **Shape**: serialises as `{cluster_id, trust_domain, brokers, connectors, clients}`, the id in
/// hex and the certificates in PEM. Three different keys, all of them authorities.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Anchors {
    cluster_id: [u8; 16],
    trust_domain: String,
    brokers: CertificateDer<'static>,
    connectors: CertificateDer<'static>,
    clients: CertificateDer<'static>,
}

impl Anchors {
    /// Takes the three intermediates, in the order brokers, connectors, clients.
    ///
    /// **Errors**: [`Error::Anchors`] when one is no authority or two share a key;
    /// [`Error::SpiffeId`] when the trust domain is malformed.
    pub fn new(
        cluster_id: [u8; 16],
        trust_domain: &str,
        intermediates: [CertificateDer<'static>; 3],
    ) -> Result<Self, Error> {
        check_trust_domain(trust_domain)?;
        let mut keys = Vec::with_capacity(intermediates.len());
        for certificate in &intermediates {
            check_authority(certificate)?;
            let key = spki_sha256(certificate)?;
            if keys.contains(&key) {
                return Err(Error::Anchors("two roles share a key"));
            }
            keys.push(key);
        }
        let [brokers, connectors, clients] = intermediates;
        Ok(Anchors { cluster_id, trust_domain: trust_domain.to_owned(), brokers, connectors, clients })
    }

    /// Which cluster these are the anchors of.
    pub fn cluster_id(&self) -> [u8; 16] {
        self.cluster_id
    }

    /// The trust domain of every id in this cluster.
    pub fn trust_domain(&self) -> &str {
        &self.trust_domain
    }

    /// The anchor of one role.
    pub fn certificate(&self, role: Role) -> &CertificateDer<'static> {
        match role {
            Role::Brokers => &self.brokers,
            Role::Connectors => &self.connectors,
            Role::Clients => &self.clients,
        }
    }

    /// What enrolment secrets and `selvedge context` carry: the key of the intermediate that signs
    /// brokers and the web listener. Not the root's, under which connectors' certificates also are.
    pub fn pin(&self) -> Pin {
        // `new` has parsed this certificate.
        Pin(spki_sha256(&self.brokers).unwrap_or_default())
    }

    /// The three certificates as one PEM bundle: brokers, connectors, clients.
    pub fn to_pem(&self) -> String {
        Role::ALL.map(|role| certificate_pem(self.certificate(role))).concat()
    }

    /// The anchors as a JSON document.
    pub fn to_json(&self) -> String {
        serde_json::json!(self).to_string()
    }

    /// Reads what [`Anchors::to_json`] wrote.
    ///
    /// **Errors**: [`Error::Anchors`] whatever is wrong with it.
    pub fn from_json(text: &str) -> Result<Self, Error> {
        serde_json::from_str(text).map_err(|_| Error::Anchors("not an anchors document"))
    }
}

/// SHA-256 of a key (its SubjectPublicKeyInfo), by which a web listener is known before any secret
/// is sent to it. Prints as 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Pin([u8; 32]);

impl Pin {
    /// The pin of a certificate's key.
    ///
    /// **Errors**: [`Error::Malformed`].
    pub fn of(certificate: &CertificateDer<'_>) -> Result<Self, Error> {
        spki_sha256(certificate).map(Pin)
    }

    /// The hash itself.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl From<[u8; 32]> for Pin {
    fn from(hash: [u8; 32]) -> Self {
        Pin(hash)
    }
}

impl fmt::Display for Pin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for Pin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pin({self})")
    }
}

impl FromStr for Pin {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let mut hash = [0; 32];
        hex::decode_to_slice(text, &mut hash).map_err(|_| Error::Pin)?;
        Ok(Pin(hash))
    }
}

impl Serialize for Pin {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Pin {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(de::Error::custom)
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    cluster_id: String,
    trust_domain: String,
    brokers: String,
    connectors: String,
    clients: String,
}

impl Serialize for Anchors {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Document {
            cluster_id: hex::encode(self.cluster_id),
            trust_domain: self.trust_domain.clone(),
            brokers: certificate_pem(&self.brokers),
            connectors: certificate_pem(&self.connectors),
            clients: certificate_pem(&self.clients),
        }
        .serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Anchors {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let document = Document::deserialize(deserializer)?;
        let mut cluster_id = [0; 16];
        hex::decode_to_slice(&document.cluster_id, &mut cluster_id).map_err(de::Error::custom)?;
        let certificate = |pem: &str| CertificateDer::from_pem_slice(pem.as_bytes()).map_err(de::Error::custom);
        Anchors::new(
            cluster_id,
            &document.trust_domain,
            [certificate(&document.brokers)?, certificate(&document.connectors)?, certificate(&document.clients)?],
        )
        .map_err(de::Error::custom)
    }
}

/// Certificates as one PEM text, in their order.
pub fn chain_pem(chain: &[CertificateDer<'_>]) -> String {
    chain.iter().map(certificate_pem).collect()
}

pub(crate) fn certificate_pem(certificate: &CertificateDer<'_>) -> String {
    pem::encode_config(
        &pem::Pem::new("CERTIFICATE", certificate.as_ref()),
        pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF),
    )
}

fn check_authority(certificate: &CertificateDer<'_>) -> Result<(), Error> {
    let (rest, parsed) = X509Certificate::from_der(certificate).map_err(|_| Error::Anchors("not a certificate"))?;
    if !rest.is_empty() {
        return Err(Error::Anchors("bytes after the certificate"));
    }
    if !parsed.is_ca() {
        return Err(Error::Anchors("not an authority"));
    }
    webpki::anchor_from_trusted_cert(certificate).map(drop).map_err(|_| Error::Anchors("not a certificate"))
}
