use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, OtherError, SignatureScheme};
use webpki::{EndEntityCert, KeyUsage};

use super::{NotBefore, provider};
use crate::identity::{
    Anchors, Check, Error, Kind, PEER_CHAIN_MAX, Pin, SpiffeId, Usage, leaf_validity_ms, spki_sha256, verify,
};

const SERVER_AUTH: KeyUsage = KeyUsage::required(&[0x2b, 6, 1, 5, 5, 7, 3, 1]);

/// Accepts leaves of the allowed kinds, each under the anchor of its role.
#[derive(Debug)]
pub(super) struct KindVerifier {
    anchors: Arc<Anchors>,
    allowed: &'static [Kind],
    expected: Option<SpiffeId>,
    not_before: NotBefore,
}

impl KindVerifier {
    pub(super) fn new(
        anchors: Arc<Anchors>,
        allowed: &'static [Kind],
        expected: Option<SpiffeId>,
        not_before: NotBefore,
    ) -> Self {
        KindVerifier { anchors, allowed, expected, not_before }
    }

    fn judge(
        &self,
        leaf: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        usage: Usage,
        now: UnixTime,
    ) -> Result<(), Error> {
        let check = Check { allowed: self.allowed, usage, now, judge_not_before: self.not_before.is_judged() };
        let peer = verify(leaf, 1 + others.len(), &self.anchors, &check)?;
        match &self.expected {
            Some(expected) if *expected != peer.id => {
                Err(Error::UnexpectedPeer { expected: Box::new(expected.clone()), found: Box::new(peer.id) })
            }
            _ => Ok(()),
        }
    }
}

impl ClientCertVerifier for KindVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // Strangers learn no names from us, and a peer has one certificate to show.
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.judge(end_entity, intermediates, Usage::Client, now)
            .map(|()| ClientCertVerified::assertion())
            .map_err(refusal)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        signature12(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        signature13(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        schemes()
    }
}

impl ServerCertVerifier for KindVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.judge(end_entity, intermediates, Usage::Server, now)
            .map(|()| ServerCertVerified::assertion())
            .map_err(refusal)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        signature12(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        signature13(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        schemes()
    }
}

/// Accepts a chain by the hash of one of its keys, whatever it is called.
#[derive(Debug)]
pub(super) struct PinVerifier {
    pin: Pin,
}

impl PinVerifier {
    pub(super) fn new(pin: Pin) -> Self {
        PinVerifier { pin }
    }

    fn judge(&self, leaf: &CertificateDer<'_>, others: &[CertificateDer<'_>], now: UnixTime) -> Result<(), Error> {
        let count = 1 + others.len();
        if count > PEER_CHAIN_MAX {
            return Err(Error::ChainTooLong { count });
        }
        if spki_sha256(leaf)? == *self.pin.as_bytes() {
            return check_validity(leaf, now);
        }
        let mut refusal = webpki::Error::UnknownIssuer;
        for authority in others {
            if spki_sha256(authority)? != *self.pin.as_bytes() {
                continue;
            }
            match verify_under(leaf, authority, others, now) {
                Ok(()) => return Ok(()),
                Err(error) => refusal = error,
            }
        }
        Err(Error::NotTrusted(refusal))
    }
}

impl ServerCertVerifier for PinVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.judge(end_entity, intermediates, now).map(|()| ServerCertVerified::assertion()).map_err(refusal)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        signature12(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        signature13(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        schemes()
    }
}

fn check_validity(leaf: &CertificateDer<'_>, now: UnixTime) -> Result<(), Error> {
    let (not_before_ms, not_after_ms) = leaf_validity_ms(leaf)?;
    let now_ms = now.as_secs().saturating_mul(1000);
    if now_ms < not_before_ms {
        return Err(Error::NotYetValid);
    }
    if now_ms > not_after_ms {
        return Err(Error::Expired);
    }
    Ok(())
}

fn verify_under(
    leaf: &CertificateDer<'_>,
    authority: &CertificateDer<'_>,
    others: &[CertificateDer<'_>],
    now: UnixTime,
) -> Result<(), webpki::Error> {
    let anchor = [webpki::anchor_from_trusted_cert(authority)?];
    EndEntityCert::try_from(leaf)?
        .verify_for_usage(
            provider().signature_verification_algorithms.all,
            &anchor,
            others,
            now,
            SERVER_AUTH,
            None,
            None,
        )
        .map(drop)
}

fn refusal(error: Error) -> rustls::Error {
    rustls::Error::InvalidCertificate(match error {
        Error::Expired => CertificateError::Expired,
        Error::NotYetValid => CertificateError::NotValidYet,
        Error::Malformed(_) | Error::NotTrusted(webpki::Error::BadDer) => CertificateError::BadEncoding,
        Error::NotTrusted(webpki::Error::UnknownIssuer) => CertificateError::UnknownIssuer,
        other => CertificateError::Other(OtherError(Arc::new(other))),
    })
}

fn signature12(
    message: &[u8],
    cert: &CertificateDer<'_>,
    dss: &DigitallySignedStruct,
) -> Result<HandshakeSignatureValid, rustls::Error> {
    verify_tls12_signature(message, cert, dss, &provider().signature_verification_algorithms)
}

fn signature13(
    message: &[u8],
    cert: &CertificateDer<'_>,
    dss: &DigitallySignedStruct,
) -> Result<HandshakeSignatureValid, rustls::Error> {
    verify_tls13_signature(message, cert, dss, &provider().signature_verification_algorithms)
}

fn schemes() -> Vec<SignatureScheme> {
    provider().signature_verification_algorithms.supported_schemes()
}
