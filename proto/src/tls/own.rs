use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;

use arc_swap::ArcSwap;
use rcgen::{CertificateParams, DistinguishedName, KeyPair};
use rustls::SignatureScheme;
use rustls::client::ResolvesClientCert;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use zeroize::Zeroizing;

use super::{Error, PINNED_ALPN, provider};
use crate::identity::{self, Peer};
use crate::private_file;

/// Bytes of the longest identity file that is read.
const IDENTITY_FILE_BYTES_MAX: u64 = 256 * 1024;

/// A certificate chain and the private key of its leaf: what one shows of oneself. Cheap to clone;
/// prints its key as `***`.
#[derive(Clone)]
pub struct Identity {
    chain: Arc<[CertificateDer<'static>]>,
    key: Arc<Zeroizing<PrivateKeyDer<'static>>>,
    certified: Arc<CertifiedKey>,
}

impl Identity {
    /// Takes a chain, leaf first, and the leaf's key.
    ///
    /// **Errors**: [`Error::Tls`] when the key is not the leaf's, [`Error::Pem`] when the chain is empty.
    pub fn new(chain: Vec<CertificateDer<'static>>, key: PrivateKeyDer<'static>) -> Result<Self, Error> {
        if chain.is_empty() {
            return Err(Error::Pem("no certificate"));
        }
        let certified = CertifiedKey::from_der(chain.clone(), key.clone_key(), provider())?;
        Ok(Identity { chain: chain.into(), key: Arc::new(Zeroizing::new(key)), certified: Arc::new(certified) })
    }

    /// Reads the certificates and the key of one PEM text, in any order, or of a chain and a key
    /// put one after the other.
    ///
    /// **Errors**: [`Error::Pem`], [`Error::Tls`].
    pub fn from_pem(pem: &str) -> Result<Self, Error> {
        let chain = CertificateDer::pem_slice_iter(pem.as_bytes())
            .collect::<Result<Vec<_>, _>>()
            .map_err(|_| Error::Pem("a certificate cannot be read"))?;
        let key = PrivateKeyDer::from_pem_slice(pem.as_bytes()).map_err(|_| Error::Pem("no private key"))?;
        Identity::new(chain, key)
    }

    /// Reads what [`Identity::save`] wrote.
    ///
    /// **Errors**: [`Error::File`]; [`Error::Exposed`] when others may read it; as [`Identity::from_pem`].
    pub fn load(path: &Path) -> Result<Self, Error> {
        let file = File::open(path).map_err(|source| file_error(path, source))?;
        let mode = file.metadata().map_err(|source| file_error(path, source))?.permissions().mode();
        if mode & 0o077 != 0 {
            return Err(Error::Exposed { path: path.display().to_string(), mode: mode & 0o7777 });
        }
        Identity::from_pem(&read_bounded(file, path)?)
    }

    /// Reads a chain and a key from an operator's own two files, whatever their modes.
    ///
    /// **Errors**: [`Error::File`]; as [`Identity::from_pem`].
    pub fn load_files(chain: &Path, key: &Path) -> Result<Self, Error> {
        let open = |path: &Path| File::open(path).map_err(|source| file_error(path, source));
        let chain_pem = read_bounded(open(chain)?, chain)?;
        let key_pem = read_bounded(open(key)?, key)?;
        let chain = CertificateDer::pem_slice_iter(chain_pem.as_bytes())
            .collect::<Result<Vec<_>, _>>()
            .map_err(|_| Error::Pem("a certificate cannot be read"))?;
        let key = PrivateKeyDer::from_pem_slice(key_pem.as_bytes()).map_err(|_| Error::Pem("no private key"))?;
        Identity::new(chain, key)
    }

    /// Writes chain and key as one PEM file that only its owner may read.
    ///
    /// **Durability**: as [`private_file::replace`].
    /// **Errors**: [`Error::File`].
    pub fn save(&self, path: &Path) -> Result<(), Error> {
        private_file::replace(path, self.to_pem().as_bytes()).map_err(|source| file_error(path, source))
    }

    /// Chain, leaf first, then the key, as PEM.
    pub fn to_pem(&self) -> Zeroizing<String> {
        let tag = match &**self.key {
            PrivateKeyDer::Pkcs1(_) => "RSA PRIVATE KEY",
            PrivateKeyDer::Sec1(_) => "EC PRIVATE KEY",
            _ => "PRIVATE KEY",
        };
        let config = pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF);
        let mut text = Zeroizing::new(String::new());
        for certificate in self.chain.iter() {
            text.push_str(&identity::certificate_pem(certificate));
        }
        let key = Zeroizing::new(pem::encode_config(&pem::Pem::new(tag, self.key.secret_der()), config));
        text.push_str(&key);
        text
    }

    /// The certificates, leaf first.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.chain
    }

    /// Who this identity says it is, read from its leaf.
    ///
    /// **Errors**: when the leaf has no SPIFFE id, as the web listener's has none.
    pub fn peer(&self) -> Result<Peer, identity::Error> {
        // `new` refuses an empty chain.
        let leaf = self.chain.first().ok_or(identity::Error::NoCertificate)?;
        Peer::of_verified_leaf(leaf)
    }

    /// Beginning and end of the leaf in milliseconds of Unix time, by which renewal is planned.
    ///
    /// **Errors**: [`identity::Error::Malformed`].
    pub fn validity_ms(&self) -> Result<(u64, u64), identity::Error> {
        let leaf = self.chain.first().ok_or(identity::Error::NoCertificate)?;
        identity::leaf_validity_ms(leaf)
    }

    /// When it is time for a certificate with a new key: after a third of this one's life, in milliseconds of Unix time.
    ///
    /// **Errors**: [`identity::Error::Malformed`].
    pub fn renewal_due_ms(&self) -> Result<u64, identity::Error> {
        let (begin_ms, end_ms) = self.validity_ms()?;
        Ok(begin_ms + end_ms.saturating_sub(begin_ms) / 3)
    }

    /// Signs with the key of the leaf, as its kind of key signs in TLS 1.3.
    ///
    /// **Errors**: [`Error::Tls`] for a key that TLS 1.3 does not know.
    pub(crate) fn sign(&self, message: &[u8]) -> Result<Vec<u8>, Error> {
        let signer =
            self.certified.key.choose_scheme(&provider().signature_verification_algorithms.supported_schemes());
        let signer = signer.ok_or_else(|| rustls::Error::General("the key signs in no known way".to_owned()))?;
        Ok(signer.sign(message)?)
    }
}

/// What a TLS configuration shows of its own: one [`Identity`] for good, or a [`Renewable`].
pub trait Shown {
    /// As one that may be renewed.
    fn shown(&self) -> Renewable;
}

impl Shown for Identity {
    fn shown(&self) -> Renewable {
        Renewable::new(self.clone())
    }
}

impl<T: Shown> Shown for Arc<T> {
    fn shown(&self) -> Renewable {
        self.as_ref().shown()
    }
}

impl Shown for Renewable {
    fn shown(&self) -> Renewable {
        self.clone()
    }
}

/// The identity of a process, which is replaced while configurations use it: each handshake shows the one of its
/// moment. Clones are the same.
#[derive(Clone, Debug)]
pub struct Renewable(Arc<ArcSwap<Identity>>);

impl Renewable {
    /// Begins with an identity.
    pub fn new(identity: Identity) -> Self {
        Self(Arc::new(ArcSwap::from_pointee(identity)))
    }

    /// The one that is shown now.
    pub fn now(&self) -> Arc<Identity> {
        self.0.load_full()
    }

    /// Shows another one from the next handshake on. What was begun with the old one goes on.
    pub fn replace(&self, identity: Identity) {
        self.0.store(Arc::new(identity));
    }
}

impl ResolvesServerCert for Renewable {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.load().certified.clone())
    }
}

/// Shows a caller the certificate by which it knows the web listener.
#[derive(Debug)]
pub(super) struct NamedOrPinned {
    pub(super) named: Renewable,
    pub(super) pinned: Renewable,
}

impl ResolvesServerCert for NamedOrPinned {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let is_pinned = hello.alpn().is_some_and(|mut offered| offered.any(|protocol| protocol == PINNED_ALPN));
        let shown = if is_pinned { &self.pinned } else { &self.named };
        ResolvesServerCert::resolve(shown, hello)
    }
}

impl ResolvesClientCert for Renewable {
    fn resolve(&self, _roots: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.0.load().certified.clone())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity").field("certificates", &self.chain.len()).field("key", &"***").finish()
    }
}

/// Makes a new P-256 key and a request to certify it. The key never leaves the machine; the request
/// names nothing, because the issuer says who it is for.
///
/// **Shape**: the key as PKCS #8 PEM, the request in DER.
/// **Errors**: [`Error::Request`].
pub fn new_key_and_csr() -> Result<(Zeroizing<String>, Vec<u8>), Error> {
    let key = KeyPair::generate()?;
    let request = request(&key)?;
    Ok((Zeroizing::new(key.serialize_pem()), request))
}

/// Makes the request for a key that is there already, as a retry of the same enrolment does.
///
/// **Errors**: [`Error::Request`].
pub fn csr(key_pem: &str) -> Result<Vec<u8>, Error> {
    request(&KeyPair::from_pem(key_pem)?)
}

fn request(key: &KeyPair) -> Result<Vec<u8>, Error> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    Ok(params.serialize_request(key)?.der().to_vec())
}

fn read_bounded(file: File, path: &Path) -> Result<Zeroizing<String>, Error> {
    let mut text = Zeroizing::new(String::new());
    let read =
        file.take(IDENTITY_FILE_BYTES_MAX + 1).read_to_string(&mut text).map_err(|source| file_error(path, source))?;
    if read as u64 > IDENTITY_FILE_BYTES_MAX {
        return Err(Error::Pem("the file is larger than 256 KiB"));
    }
    Ok(text)
}

fn file_error(path: &Path, source: io::Error) -> Error {
    Error::File { path: path.display().to_string(), source }
}
