//! Login grants: which person is at a device, signed by the cluster and bound to the device's key.

use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1, UnparsedPublicKey};
use prost::Message as _;
use rustls_pki_types::CertificateDer;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use crate::control::{LoginGrant, SignedGrant};

/// Version of the grants that this build makes and accepts.
pub const GRANT_VERSION: u32 = 1;
/// Bytes of a signed grant at most.
pub const GRANT_BYTES_MAX: usize = 16 * 1024;

/// Why a grant is not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Not a grant, or too long.
    #[error("malformed login grant")]
    Malformed,
    /// Of a version that this build does not know.
    #[error("login grant of version {0}")]
    Version(u32),
    /// Not signed by this cluster.
    #[error("the login grant's signature is not this cluster's")]
    Signature,
    /// Its end has come.
    #[error("the login grant has expired")]
    Expired,
}

/// Encodes and signs a grant; `sign` makes an ECDSA P-256 SHA-256 signature (DER) with the clients' intermediate key.
pub fn sign<E>(grant: &LoginGrant, sign: impl FnOnce(&[u8]) -> Result<Vec<u8>, E>) -> Result<Vec<u8>, E> {
    let grant = grant.encode_to_vec();
    let signature = sign(&grant)?;
    Ok(SignedGrant { grant, signature }.encode_to_vec())
}

/// Reads a grant that the holder of `anchor`'s key signed and that has not expired at `now_ms` (cluster time).
///
/// The caller still checks device key, epoch and generations against the state.
pub fn verify(bytes: &[u8], anchor: &CertificateDer<'_>, now_ms: u64) -> Result<LoginGrant, Error> {
    if bytes.len() > GRANT_BYTES_MAX {
        return Err(Error::Malformed);
    }
    let signed = SignedGrant::decode(bytes).map_err(|_| Error::Malformed)?;
    let (_, certificate) = X509Certificate::from_der(anchor).map_err(|_| Error::Malformed)?;
    let key = &certificate.public_key().subject_public_key.data;
    UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, key)
        .verify(&signed.grant, &signed.signature)
        .map_err(|_| Error::Signature)?;
    let grant = LoginGrant::decode(&signed.grant[..]).map_err(|_| Error::Malformed)?;
    if grant.version != GRANT_VERSION {
        return Err(Error::Version(grant.version));
    }
    if grant.expires_ms <= now_ms {
        return Err(Error::Expired);
    }
    Ok(grant)
}
