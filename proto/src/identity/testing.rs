//! A cluster's authorities made on the spot, so that leaves can say whatever a test wants.

use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    SanType, date_time_ymd,
};
use rustls::pki_types::PrivateKeyDer;

use super::{Anchors, Kind, Role};
use crate::tls::Identity;

/// 2027-01-15, in milliseconds.
pub(crate) const NOW_MS: u64 = 1_800_000_000_000;
pub(crate) const DAY_MS: u64 = 24 * 60 * 60 * 1000;
pub(crate) const TRUST_DOMAIN: &str = "corp.example";

pub(crate) struct Cluster {
    pub(crate) anchors: Anchors,
    issuers: Vec<Issuer<'static, KeyPair>>,
}

#[derive(Clone)]
pub(crate) struct Leaf {
    pub(crate) role: Role,
    pub(crate) uris: Vec<String>,
    pub(crate) common_name: Option<&'static str>,
    pub(crate) purposes: Vec<ExtendedKeyUsagePurpose>,
    pub(crate) begin_ms: u64,
    pub(crate) end_ms: u64,
    pub(crate) authority: bool,
}

impl Leaf {
    pub(crate) fn of(kind: Kind, id: &str) -> Self {
        Leaf::named(kind.role(), &format!("spiffe://{TRUST_DOMAIN}/{kind}/{id}"))
    }

    pub(crate) fn named(role: Role, uri: &str) -> Self {
        Leaf {
            role,
            uris: vec![uri.to_owned()],
            common_name: None,
            purposes: vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth],
            begin_ms: NOW_MS - DAY_MS,
            end_ms: NOW_MS + DAY_MS,
            authority: false,
        }
    }
}

impl Cluster {
    pub(crate) fn new() -> Self {
        let mut issuers = Vec::new();
        let mut certificates = Vec::new();
        for role in Role::ALL {
            let mut params = CertificateParams::default();
            params.distinguished_name = DistinguishedName::new();
            params.distinguished_name.push(DnType::CommonName, role.as_str());
            params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
            let key = KeyPair::generate().unwrap();
            certificates.push(params.self_signed(&key).unwrap().der().clone());
            issuers.push(Issuer::new(params, key));
        }
        let anchors = Anchors::new([7; 16], TRUST_DOMAIN, certificates.try_into().unwrap()).unwrap();
        Cluster { anchors, issuers }
    }

    pub(crate) fn sign(&self, leaf: &Leaf) -> Identity {
        let at = |ms: u64| date_time_ymd(1970, 1, 1) + Duration::from_millis(ms);
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        if let Some(name) = leaf.common_name {
            params.distinguished_name.push(DnType::CommonName, name);
        }
        params.subject_alt_names = leaf.uris.iter().map(|uri| SanType::URI(uri.as_str().try_into().unwrap())).collect();
        params.extended_key_usages = leaf.purposes.clone();
        params.not_before = at(leaf.begin_ms);
        params.not_after = at(leaf.end_ms);
        if leaf.authority {
            params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        }
        let key = KeyPair::generate().unwrap();
        let index = Role::ALL.iter().position(|r| *r == leaf.role).unwrap();
        let certificate = params.signed_by(&key, &self.issuers[index]).unwrap();
        let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        Identity::new(vec![certificate.der().clone()], key).unwrap()
    }

    pub(crate) fn member(&self, kind: Kind, id: &str) -> Identity {
        self.sign(&Leaf::of(kind, id))
    }
}
