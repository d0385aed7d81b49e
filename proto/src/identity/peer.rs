use std::time::Duration;

use rustls::pki_types::{CertificateDer, UnixTime};
use sha2::{Digest, Sha256};
use webpki::{EndEntityCert, ExtendedKeyUsageValidator, KeyPurposeId, KeyPurposeIdIter, KeyUsage};
use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::oid_registry::OID_X509_EXT_SUBJECT_ALT_NAME;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::{Anchors, Error, Kind, SpiffeId};
use crate::tls;

/// Certificates of one peer that are looked at; an honest peer sends one or two.
pub const PEER_CHAIN_MAX: usize = 4;

const SERVER_AUTH: &[u8] = &[0x2b, 6, 1, 5, 5, 7, 3, 1];
const CLIENT_AUTH: &[u8] = &[0x2b, 6, 1, 5, 5, 7, 3, 2];

/// Who stands at the other end, as its verified leaf says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// The leaf's only URI name.
    pub id: SpiffeId,
    /// The leaf's serial number in hex, lower case.
    pub serial: String,
    /// SHA-256 of the leaf's SubjectPublicKeyInfo.
    pub spki_sha256: [u8; 32],
    /// When the leaf ends, in milliseconds of Unix time.
    pub not_after_ms: u64,
}

/// Verifies what a peer presented and says who it is.
///
/// `certs` is in the order of the handshake: the first is the one whose key was proven, the others
/// are ignored, because every leaf is signed by the anchor of its role itself.
///
/// **Errors**: when the leaf does not verify to the anchor of an `allowed` kind, is not valid at
/// `now_ms`, has not exactly one URI name, or its kind is not allowed.
pub fn peer(certs: &[CertificateDer<'_>], anchors: &Anchors, allowed: &[Kind], now_ms: u64) -> Result<Peer, Error> {
    let check = Check {
        allowed,
        usage: Usage::Any,
        now: UnixTime::since_unix_epoch(Duration::from_millis(now_ms)),
        judge_not_before: true,
    };
    let leaf = certs.first().ok_or(Error::NoCertificate)?;
    verify(leaf, certs.len(), anchors, &check)
}

/// SHA-256 of a certificate's SubjectPublicKeyInfo.
///
/// **Errors**: [`Error::Malformed`].
pub fn spki_sha256(certificate: &CertificateDer<'_>) -> Result<[u8; 32], Error> {
    Ok(sha256(parse(certificate)?.public_key().raw))
}

/// SHA-256 of a SubjectPublicKeyInfo in DER, or of anything.
pub fn sha256(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

impl Peer {
    /// Reads a leaf that has been verified already, by a handshake with one of the configurations
    /// in [`crate::tls`]. Decides nothing.
    ///
    /// **Errors**: as [`peer`], for what concerns the leaf's form.
    pub fn of_verified_leaf(leaf: &CertificateDer<'_>) -> Result<Self, Error> {
        let certificate = parse(leaf)?;
        Ok(Peer {
            id: only_uri_name(&certificate)?.parse()?,
            serial: hex::encode(certificate.tbs_certificate.raw_serial()),
            spki_sha256: sha256(certificate.public_key().raw),
            not_after_ms: unix_ms(certificate.validity().not_after.timestamp()),
        })
    }
}

/// What a leaf must be good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Usage {
    /// The peer accepted the connection.
    Server,
    /// The peer opened the connection.
    Client,
    /// Either, where the handshake has judged it.
    Any,
}

/// What is asked of a leaf.
pub(crate) struct Check<'a> {
    pub(crate) allowed: &'a [Kind],
    pub(crate) usage: Usage,
    pub(crate) now: UnixTime,
    /// False while this machine does not know the time well enough to judge a beginning.
    pub(crate) judge_not_before: bool,
}

pub(crate) fn verify(
    leaf: &CertificateDer<'_>,
    presented: usize,
    anchors: &Anchors,
    check: &Check<'_>,
) -> Result<Peer, Error> {
    if presented > PEER_CHAIN_MAX {
        return Err(Error::ChainTooLong { count: presented });
    }
    let now = if check.judge_not_before {
        check.now
    } else {
        let (not_before_ms, _) = leaf_validity_ms(leaf)?;
        let not_before = UnixTime::since_unix_epoch(Duration::from_millis(not_before_ms));
        check.now.max(not_before)
    };
    let mut roles: Vec<_> = check.allowed.iter().map(|kind| kind.role()).collect();
    roles.sort_unstable();
    roles.dedup();

    let mut refusal = webpki::Error::UnknownIssuer;
    for role in roles {
        match verify_to(leaf, anchors.certificate(role), check.usage, now) {
            Ok(()) => {
                let peer = Peer::of_verified_leaf(leaf)?;
                if peer.id.trust_domain() != anchors.trust_domain() {
                    return Err(Error::ForeignTrustDomain);
                }
                let kind = peer.id.kind();
                if kind.role() != role || !check.allowed.contains(&kind) {
                    return Err(Error::WrongKind(kind));
                }
                return Ok(peer);
            }
            Err(webpki::Error::UnknownIssuer) => {}
            Err(other) => refusal = other,
        }
    }
    Err(match refusal {
        webpki::Error::CertExpired { .. } => Error::Expired,
        webpki::Error::CertNotValidYet { .. } => Error::NotYetValid,
        other => Error::NotTrusted(other),
    })
}

/// Beginning and end of a certificate, in milliseconds of Unix time.
pub(crate) fn leaf_validity_ms(leaf: &CertificateDer<'_>) -> Result<(u64, u64), Error> {
    let certificate = parse(leaf)?;
    let validity = certificate.validity();
    Ok((unix_ms(validity.not_before.timestamp()), unix_ms(validity.not_after.timestamp())))
}

// No presented intermediate is ever used: the anchor signs leaves itself. So a peer can neither
// lengthen the path nor spend our time on siblings.
fn verify_to(
    leaf: &CertificateDer<'_>,
    anchor: &CertificateDer<'_>,
    usage: Usage,
    now: UnixTime,
) -> Result<(), webpki::Error> {
    let anchor = [webpki::anchor_from_trusted_cert(anchor)?];
    EndEntityCert::try_from(leaf)?
        .verify_for_usage(tls::provider().signature_verification_algorithms.all, &anchor, &[], now, usage, None, None)
        .map(drop)
}

impl ExtendedKeyUsageValidator for Usage {
    fn validate(&self, purposes: KeyPurposeIdIter<'_, '_>) -> Result<(), webpki::Error> {
        let wanted: &[&'static [u8]] = match self {
            Usage::Server => &[SERVER_AUTH],
            Usage::Client => &[CLIENT_AUTH],
            Usage::Any => &[SERVER_AUTH, CLIENT_AUTH],
        };
        let mut present = Vec::new();
        for purpose in purposes {
            let purpose = purpose?;
            if wanted.iter().any(|oid| KeyPurposeId::new(oid) == purpose) {
                return Ok(());
            }
            present.push(purpose.to_decoded_oid());
        }
        Err(webpki::Error::RequiredEkuNotFoundContext(webpki::RequiredEkuNotFoundContext {
            required: KeyUsage::required(wanted[0]),
            present,
        }))
    }
}

fn parse<'a>(certificate: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, Error> {
    let (rest, parsed) = X509Certificate::from_der(certificate).map_err(|_| Error::Malformed("it cannot be parsed"))?;
    if !rest.is_empty() {
        return Err(Error::Malformed("bytes after its end"));
    }
    Ok(parsed)
}

fn only_uri_name<'a>(certificate: &'a X509Certificate<'_>) -> Result<&'a str, Error> {
    let mut found = None;
    for extension in certificate.extensions() {
        if extension.oid != OID_X509_EXT_SUBJECT_ALT_NAME {
            continue;
        }
        let ParsedExtension::SubjectAlternativeName(names) = extension.parsed_extension() else {
            return Err(Error::Malformed("its alternative names cannot be parsed"));
        };
        for name in &names.general_names {
            match name {
                GeneralName::URI(uri) if found.is_none() => found = Some(*uri),
                GeneralName::URI(_) => return Err(Error::ManyUriNames),
                GeneralName::Invalid(..) => {
                    return Err(Error::Malformed("an alternative name cannot be parsed"));
                }
                _ => {}
            }
        }
    }
    found.ok_or(Error::NoUriName)
}

fn unix_ms(seconds: i64) -> u64 {
    u64::try_from(seconds).unwrap_or(0).saturating_mul(1000)
}
