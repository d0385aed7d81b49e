use std::time::Duration;

use aws_lc_rs::rand;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PublicKeyData, SanType, SerialNumber, SigningKey as _, date_time_ymd,
};
use rustls::pki_types::CertificateDer;
use selvedge_proto::identity::Role;

use super::{BACKDATE_MS, DAY_MS, Error};

const ROOT_LIFETIME_MS: u64 = 20 * 365 * DAY_MS;
const INTERMEDIATE_LIFETIME_MS: u64 = 10 * 365 * DAY_MS;
// The last second that X.509 can write: 9999-12-31T23:59:59Z.
const LAST_SECOND: u64 = 253_402_300_799;
const DER_SEQUENCE: u8 = 0x30;

/// One intermediate and its key.
pub(super) struct Authority {
    issuer: Issuer<'static, KeyPair>,
}

/// What a leaf says besides its key.
pub(super) struct Leaf {
    pub(super) names: Vec<SanType>,
    pub(super) server: bool,
    pub(super) client: bool,
    pub(super) lifetime_ms: u64,
}

impl Authority {
    pub(super) fn new(certificate: CertificateDer<'static>, key: KeyPair) -> Result<Self, Error> {
        Ok(Authority { issuer: Issuer::from_ca_cert_der(&certificate, key)? })
    }

    /// ECDSA P-256 with SHA-256 (DER) over bytes that are no certificate.
    pub(super) fn sign_bytes(&self, bytes: &[u8]) -> Result<Vec<u8>, Error> {
        // What is signed into a certificate begins with a DER sequence; nothing else may be mistaken for one.
        if bytes.first() == Some(&DER_SEQUENCE) {
            return Err(Error::Request("bytes that could be a certificate are not signed"));
        }
        Ok(self.issuer.key().sign(bytes)?)
    }

    pub(super) fn sign(
        &self,
        leaf: &Leaf,
        public_key: &impl PublicKeyData,
        now_ms: u64,
    ) -> Result<CertificateDer<'static>, Error> {
        let mut params = dated(now_ms, leaf.lifetime_ms)?;
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = leaf.names.clone();
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.use_authority_key_identifier_extension = true;
        if leaf.server {
            params.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth);
        }
        if leaf.client {
            params.extended_key_usages.push(ExtendedKeyUsagePurpose::ClientAuth);
        }
        Ok(params.signed_by(public_key, &self.issuer)?.der().clone())
    }
}

/// The root, for as long as it takes to sign the three intermediates.
pub(super) struct Root(CertifiedIssuer<'static, KeyPair>);

pub(super) fn make_root(name: &str, now_ms: u64) -> Result<Root, Error> {
    let params = authority_params(&format!("{name} root"), 1, now_ms, ROOT_LIFETIME_MS)?;
    Ok(Root(CertifiedIssuer::self_signed(params, KeyPair::generate()?)?))
}

impl Root {
    pub(super) fn make_intermediate(
        &self,
        name: &str,
        role: Role,
        now_ms: u64,
    ) -> Result<(CertificateDer<'static>, KeyPair), Error> {
        let name = format!("{name} {}", role.as_str());
        let mut params = authority_params(&name, 0, now_ms, INTERMEDIATE_LIFETIME_MS)?;
        params.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate()?;
        Ok((params.signed_by(&key, &self.0)?.der().clone(), key))
    }

    pub(super) fn certificate_pem(&self) -> String {
        self.0.pem()
    }

    pub(super) fn key_pem(&self) -> String {
        self.0.key().serialize_pem()
    }
}

fn authority_params(name: &str, path_length: u8, now_ms: u64, lifetime_ms: u64) -> Result<CertificateParams, Error> {
    let mut params = dated(now_ms, lifetime_ms)?;
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(path_length));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    Ok(params)
}

fn dated(now_ms: u64, lifetime_ms: u64) -> Result<CertificateParams, Error> {
    let end_s = now_ms.saturating_add(lifetime_ms) / 1000;
    if end_s > LAST_SECOND {
        return Err(Error::Time(now_ms));
    }
    let epoch = date_time_ymd(1970, 1, 1);
    let mut params = CertificateParams::default();
    params.not_before = epoch + Duration::from_secs(now_ms.saturating_sub(BACKDATE_MS) / 1000);
    params.not_after = epoch + Duration::from_secs(end_s);
    params.serial_number = Some(random_serial()?);
    Ok(params)
}

// 126 random bits; the two highest are fixed so that the number is positive and always 16 bytes.
fn random_serial() -> Result<SerialNumber, Error> {
    let mut bytes = [0; 16];
    rand::fill(&mut bytes).map_err(|_| Error::Random)?;
    bytes[0] = bytes[0] & 0x7f | 0x40;
    Ok(SerialNumber::from_slice(&bytes))
}
