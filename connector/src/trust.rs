//! What an end verifies by itself: the list of brokers, and certificates that it was given.

use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1, UnparsedPublicKey};
use prost::Message as _;
use rustls_pki_types::CertificateDer;
use selvedge_proto::control::{BrokerList, Brokers};
use selvedge_proto::identity::{self, Anchors, Kind, Role, SpiffeId};
use x509_parser::prelude::{FromDer as _, X509Certificate};

/// Most brokers in a list.
pub(crate) const BROKERS_MAX: usize = 128;

/// Why something that came from the cluster is not believed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not a list, an empty one, or too long.
    #[error("malformed list of brokers")]
    List,
    /// Its signature is not one of this cluster's issuer.
    #[error("the list of brokers is not signed by this cluster's issuer")]
    Signature,
    /// It comes from nobody in particular and has no signature.
    #[error("the list of brokers has no signature")]
    Unsigned,
    /// A newer list is known already.
    #[error("the list of brokers is older than the one that is known")]
    Older,
    /// A certificate does not verify.
    #[error("certificate: {0}")]
    Certificate(#[from] identity::Error),
    /// A certificate is somebody else's.
    #[error("the certificate is of `{found}`, expected `{expected}`")]
    WrongId {
        /// Who it should be.
        expected: Box<SpiffeId>,
        /// Who it is.
        found: Box<SpiffeId>,
    },
}

/// Verifies a list of brokers and decodes it.
///
/// A list without a signature is believed only when a broker gave it over a mutually authenticated stream
/// (`from_broker`).
pub(crate) fn verify_brokers(
    anchors: &Anchors,
    brokers: &Brokers,
    from_broker: bool,
    now_ms: u64,
) -> Result<BrokerList, Error> {
    if !(brokers.signature.is_empty() && from_broker) {
        if brokers.signature.is_empty() {
            return Err(Error::Unsigned);
        }
        verify_signature(anchors, brokers, now_ms)?;
    }
    let list = BrokerList::decode(&brokers.list[..]).map_err(|_| Error::List)?;
    if list.brokers.is_empty() || list.brokers.len() > BROKERS_MAX {
        return Err(Error::List);
    }
    Ok(list)
}

/// The signer is the brokers' intermediate itself or an issuer's leaf under it.
fn verify_signature(anchors: &Anchors, brokers: &Brokers, now_ms: u64) -> Result<(), Error> {
    let signer = CertificateDer::from(brokers.signer.as_slice());
    let anchor = anchors.certificate(Role::Brokers);
    if !brokers.signer.is_empty() && signer != *anchor {
        identity::peer(std::slice::from_ref(&signer), anchors, &[Kind::Issuer], now_ms)?;
    }
    let certificate = if brokers.signer.is_empty() { anchor } else { &signer };
    let (_, parsed) = X509Certificate::from_der(certificate).map_err(|_| Error::Signature)?;
    UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, &parsed.public_key().subject_public_key.data)
        .verify(&brokers.list, &brokers.signature)
        .map_err(|_| Error::Signature)
}

/// Verifies a chain that this end was given for its own key: it ends at the anchor of its kind, and is of this id.
pub(crate) fn verify_own(
    anchors: &Anchors,
    chain: &[CertificateDer<'static>],
    expected: &SpiffeId,
    now_ms: u64,
) -> Result<(), Error> {
    let peer = identity::peer(chain, anchors, &[expected.kind()], now_ms)?;
    if peer.id != *expected {
        return Err(Error::WrongId { expected: Box::new(expected.clone()), found: Box::new(peer.id) });
    }
    Ok(())
}
