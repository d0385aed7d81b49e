//! Asking for a new certificate with the key of the old one, which may have ended a while ago.
//!
//! A handshake cannot prove a certificate that has ended, so the request is signed. Whoever has it can do nothing with
//! it: what it leads to is a certificate for a key that only the asker has.
//!
//! Whether its holder still stands is not known here: that is looked up in the state, by id and serial.

use std::time::Duration;

use rustls::pki_types::{CertificateDer, UnixTime};
use serde::{Deserialize, Serialize};
use webpki::EndEntityCert;

use crate::identity::{self, Anchors, Check, Kind, Peer, Usage, leaf_validity_ms, sha256};
use crate::tls::{self, Identity};

/// Where the web listener takes it.
pub const PATH: &str = "/enrol/v1/renew";
/// How long after its end a certificate can be renewed, in milliseconds.
pub const LATE_MS_MAX: u64 = 30 * 24 * 3_600_000;

const CONTEXT: &[u8] = b"selvedge renewal 1";
const KINDS: &[Kind] =
    &[Kind::Broker, Kind::Connector, Kind::Client, Kind::Workload, Kind::Gateway, Kind::Agent, Kind::Web];

/// Why a renewal is refused.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The certificate is not this cluster's, or its form is wrong.
    #[error(transparent)]
    Identity(#[from] identity::Error),
    /// It ended too long ago.
    #[error("the certificate ended more than 30 days ago: enrol again")]
    TooLate,
    /// The request is not signed by the certificate's key.
    #[error("the request is not signed with the key of the certificate")]
    Signature,
}

/// A request for a certificate in place of an old one.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Renewal {
    /// The old leaf, DER.
    #[serde(with = "hexadecimal")]
    pub certificate: Vec<u8>,
    /// The certificate request with the new key, DER.
    #[serde(with = "hexadecimal")]
    pub csr: Vec<u8>,
    /// Over both, with the old key.
    #[serde(with = "hexadecimal")]
    pub signature: Vec<u8>,
}

/// What comes back.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Renewed {
    /// The new certificates, PEM, leaf first.
    pub chain_pem: String,
}

/// Where the web listener takes a [`Renewal`] of nothing, from an end that reaches no broker that it knows.
pub const BROKERS_PATH: &str = "/enrol/v1/brokers";

/// What comes back there: which brokers there are, signed, and how to knock.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct KnownBrokers {
    /// Encoded `control.v1.BrokerList`.
    #[serde(with = "hexadecimal")]
    pub list: Vec<u8>,
    /// The issuer's signature over it.
    #[serde(with = "hexadecimal")]
    pub signature: Vec<u8>,
    /// The issuer's certificate, DER.
    #[serde(with = "hexadecimal")]
    pub signer: Vec<u8>,
    /// Knock keys, hexadecimal; the first is today's.
    pub knock_keys: Vec<String>,
}

impl Renewal {
    /// Asks, as `old`, for the key of `csr`.
    ///
    /// **Errors**: when the old key cannot sign.
    pub fn new(old: &Identity, csr: Vec<u8>) -> Result<Self, tls::Error> {
        let certificate = old.chain().first().map(|leaf| leaf.to_vec()).unwrap_or_default();
        let signature = old.sign(&signed_bytes(&certificate, &csr))?;
        Ok(Self { certificate, csr, signature })
    }

    /// Who asks, if the certificate is this cluster's and ended at most [`LATE_MS_MAX`] before `now_ms`.
    ///
    /// **Errors**: see [`Error`]. Cheap refusals come first.
    pub fn verify(&self, anchors: &Anchors, now_ms: u64) -> Result<Peer, Error> {
        let leaf = CertificateDer::from(self.certificate.as_slice());
        let (_, end_ms) = leaf_validity_ms(&leaf)?;
        if now_ms > end_ms.saturating_add(LATE_MS_MAX) {
            return Err(Error::TooLate);
        }
        let now = UnixTime::since_unix_epoch(Duration::from_millis(now_ms.min(end_ms)));
        let check = Check { allowed: KINDS, usage: Usage::Any, now, judge_not_before: true };
        let peer = identity::verify(&leaf, 1, anchors, &check)?;
        let proven = EndEntityCert::try_from(&leaf).is_ok_and(|leaf| {
            let message = signed_bytes(&self.certificate, &self.csr);
            let algorithms = tls::provider().signature_verification_algorithms.all;
            algorithms.iter().any(|algorithm| leaf.verify_signature(*algorithm, &message, &self.signature).is_ok())
        });
        if proven { Ok(peer) } else { Err(Error::Signature) }
    }
}

fn signed_bytes(certificate: &[u8], csr: &[u8]) -> Vec<u8> {
    [CONTEXT, &sha256(certificate), &sha256(csr)].concat()
}

/// Bytes as hexadecimal text.
mod hexadecimal {
    use serde::{Deserialize as _, Deserializer, Serializer, de};

    pub fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&hex::encode(bytes))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        hex::decode(String::deserialize(deserializer)?).map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::testing::{Cluster, DAY_MS, Leaf, NOW_MS};

    #[test]
    fn the_holder_of_a_certificate_is_known_by_it_until_30_days_after_its_end() {
        let cluster = Cluster::new();
        for kind in [Kind::Broker, Kind::Connector, Kind::Client, Kind::Workload] {
            // Ends a day after NOW_MS.
            let old = cluster.member(kind, "m1");
            let (_, csr) = tls::new_key_and_csr().unwrap();
            let renewal = Renewal::new(&old, csr).unwrap();
            let read: Renewal = serde_json::from_str(&serde_json::to_string(&renewal).unwrap()).unwrap();
            for days in [0, 2, 30] {
                let peer = read.verify(&cluster.anchors, NOW_MS + days * DAY_MS).unwrap();
                assert_eq!(peer, old.peer().unwrap());
            }
            let late = read.verify(&cluster.anchors, NOW_MS + 31 * DAY_MS + 1_000);
            assert!(matches!(late, Err(Error::TooLate)), "{late:?}");
        }
    }

    #[test]
    fn what_was_changed_or_is_anothers_renews_nothing() {
        let cluster = Cluster::new();
        let old = cluster.member(Kind::Client, "m1");
        let (_, csr) = tls::new_key_and_csr().unwrap();
        let good = Renewal::new(&old, csr).unwrap();
        let verify = |renewal: &Renewal| renewal.verify(&cluster.anchors, NOW_MS);
        verify(&good).unwrap();

        let (_, other) = tls::new_key_and_csr().unwrap();
        let swapped = Renewal { csr: other, ..good.clone() };
        assert!(matches!(verify(&swapped), Err(Error::Signature)));
        let victim = cluster.member(Kind::Client, "victim").chain()[0].to_vec();
        let stolen = Renewal { certificate: victim, ..good.clone() };
        assert!(matches!(verify(&stolen), Err(Error::Signature)));
        for at in 0..good.signature.len() {
            let mut changed = good.clone();
            changed.signature[at] ^= 1;
            assert!(matches!(verify(&changed), Err(Error::Signature)), "byte {at}");
        }
        let foreign = Renewal::new(&Cluster::new().member(Kind::Client, "m1"), good.csr.clone()).unwrap();
        assert!(matches!(verify(&foreign), Err(Error::Identity(_))));
        // Signed by an intermediate of this cluster, for a role that is not its own.
        let broker = Leaf::named(crate::identity::Role::Clients, "spiffe://corp.example/broker/1");
        let forged = Renewal::new(&cluster.sign(&broker), good.csr.clone()).unwrap();
        assert!(matches!(verify(&forged), Err(Error::Identity(_))));
        let empty = Renewal { certificate: Vec::new(), ..good };
        assert!(matches!(verify(&empty), Err(Error::Identity(_))));
    }
}
