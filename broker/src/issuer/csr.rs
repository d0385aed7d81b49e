use rcgen::{PKCS_ECDSA_P256_SHA256, PKCS_ECDSA_P384_SHA384, PKCS_ED25519, PublicKeyData, SubjectPublicKeyInfo};
use selvedge_proto::identity::{self, SpiffeId};
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::cri_attributes::ParsedCriAttribute;
use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::prelude::FromDer;

use super::Error;

/// Bytes of the longest certificate request that is read.
pub const CSR_BYTES_MAX: usize = 8 * 1024;

/// A certificate request whose holder proved to have the key, and nothing else that it says.
#[derive(Debug)]
pub struct Csr {
    public_key: SubjectPublicKeyInfo,
    asks_authority: bool,
    asks_names: Vec<String>,
}

impl Csr {
    /// Reads and checks a request in DER: at most [`CSR_BYTES_MAX`], signed by its own key, which is
    /// P-256, P-384 or Ed25519. Cheap refusals come first.
    ///
    /// **Errors**: [`Error::Request`].
    pub fn parse(der: &[u8]) -> Result<Self, Error> {
        if der.len() > CSR_BYTES_MAX {
            return Err(Error::Request("it is larger than 8 KiB"));
        }
        let (rest, request) =
            X509CertificationRequest::from_der(der).map_err(|_| Error::Request("it cannot be parsed"))?;
        if !rest.is_empty() {
            return Err(Error::Request("bytes after its end"));
        }
        let public_key = SubjectPublicKeyInfo::from_der(request.certification_request_info.subject_pki.raw)
            .map_err(|_| Error::Request("the key is not P-256, P-384 or Ed25519"))?;
        let allowed = [&PKCS_ECDSA_P256_SHA256, &PKCS_ECDSA_P384_SHA384, &PKCS_ED25519];
        if !allowed.contains(&public_key.algorithm()) {
            return Err(Error::Request("the key is not P-256, P-384 or Ed25519"));
        }
        request.verify_signature().map_err(|_| Error::Request("it is not signed by its own key"))?;

        let mut asks_authority = false;
        let mut asks_names = Vec::new();
        for attribute in request.certification_request_info.iter_attributes() {
            let ParsedCriAttribute::ExtensionRequest(requested) = attribute.parsed_attribute() else {
                continue;
            };
            for extension in &requested.extensions {
                match extension.parsed_extension() {
                    ParsedExtension::BasicConstraints(constraints) => {
                        asks_authority |= constraints.ca;
                    }
                    ParsedExtension::SubjectAlternativeName(names) => {
                        asks_names.extend(names.general_names.iter().filter_map(|name| match name {
                            GeneralName::URI(uri) => Some((*uri).to_owned()),
                            _ => None,
                        }));
                    }
                    _ => {}
                }
            }
        }
        Ok(Csr { public_key, asks_authority, asks_names })
    }

    /// SHA-256 of the key, by which a retried enrolment is known.
    pub fn spki_sha256(&self) -> [u8; 32] {
        identity::sha256(&self.public_key.subject_public_key_info())
    }

    /// Refuses a request that asks to be an authority or for any id. One who enrols does not know an id yet, so this is
    /// known before a use of the secret is spent.
    ///
    /// **Errors**: [`Error::Request`].
    pub fn check_asks_nothing(&self) -> Result<(), Error> {
        if self.asks_authority {
            return Err(Error::Request("it asks to be an authority"));
        }
        if !self.asks_names.is_empty() {
            return Err(Error::Request("it asks for an id; the cluster gives ids"));
        }
        Ok(())
    }

    pub(super) fn public_key(&self) -> &SubjectPublicKeyInfo {
        &self.public_key
    }

    // Nothing that a request asks for is granted. One that asks to be somebody else, or an
    // authority, is an attack or a mistake, and either should hear of it.
    pub(super) fn check_asks_for(&self, id: &SpiffeId) -> Result<(), Error> {
        if self.asks_authority {
            return Err(Error::Request("it asks to be an authority"));
        }
        let id = id.to_string();
        if self.asks_names.iter().any(|name| *name != id) {
            return Err(Error::Request("it asks for another id"));
        }
        Ok(())
    }
}
