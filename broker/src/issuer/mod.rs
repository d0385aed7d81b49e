//! The cluster's issuer: three intermediates whose keys are sealed on this machine's disk.
//!
//! `cluster init` makes a root, which signs the three intermediates and is then handed out once and
//! kept nowhere. Everything else lies in one sealed file, replaced atomically.
//!
//! **Invariant:** no key is written in clear, and none is printed.
//! **Invariant:** what a certificate says comes from the caller's committed enrolment, never from
//! the request: of a request only the key is taken.
//!
//! It does not know who may enrol, what was issued before, or what is revoked: that is in the log.

mod authority;
mod csr;
mod seal;
#[cfg(test)]
mod tests;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use rcgen::{KeyPair, PublicKeyData, SanType};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use selvedge_domain::Body;
use selvedge_domain::command::{CertificateIssued, Subject};
use selvedge_proto::identity::{self, Anchors, Kind, Role, SpiffeId};
use selvedge_proto::{private_file, tls};
use serde::{Deserialize, Serialize};
use zeroize::{Zeroize, Zeroizing};

use authority::{Authority, Leaf};
pub use csr::{CSR_BYTES_MAX, Csr};
pub use seal::Seal;

/// Lifetime of certificates of connectors, clients, workloads, gateways, agents and the web part.
pub const DEVICE_LIFETIME_MS: u64 = 7 * DAY_MS;
/// Lifetime of brokers' certificates, and of the web listener's own.
pub const BROKER_LIFETIME_MS: u64 = 30 * DAY_MS;
/// How far before their issue certificates begin, for clocks that are behind.
pub const BACKDATE_MS: u64 = 60 * 60 * 1000;
/// Names and addresses of one broker or web listener.
pub const HOSTS_MAX: usize = 32;

const DAY_MS: u64 = 24 * 60 * 60 * 1000;
const FILE_NAME: &str = "issuer.sealed";
const BUNDLE_VERSION: u32 = 1;
const ON_DISK: &[u8] = b"selvedge issuer on disk";
const IN_TRANSIT: &[u8] = b"selvedge issuer in transit";

/// Why the issuer could not be made, opened or asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is one already; it is never overwritten.
    #[error("there is an issuer in `{0}` already")]
    Exists(String),
    /// There is none.
    #[error("there is no issuer in `{0}`")]
    Missing(String),
    /// A file could not be read or written.
    #[error("file `{path}`")]
    File {
        /// Which file.
        path: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The sealing key is missing, malformed or readable by others.
    #[error("sealing key `{name}`: {reason}")]
    SealKey {
        /// The file or variable it is in.
        name: String,
        /// What is wrong.
        reason: &'static str,
    },
    /// The sealed bytes are damaged, or sealed under another key or for another purpose.
    #[error("the sealed issuer cannot be opened: {0}")]
    Unseal(&'static str),
    /// What was sealed is not an issuer that this version knows.
    #[error("the sealed issuer is malformed: {0}")]
    Bundle(&'static str),
    /// The request for a certificate was refused.
    #[error("certificate request refused: {0}")]
    Request(&'static str),
    /// This kind is not issued to anyone.
    #[error("a `{0}` is not issued from a request")]
    KindNotIssued(Kind),
    /// A host name that cannot stand in a certificate.
    #[error("`{0}` is not a host name or an address")]
    Host(String),
    /// More than [`HOSTS_MAX`] hosts, or none where one is needed.
    #[error("{0} hosts named, between 1 and {HOSTS_MAX} are possible")]
    Hosts(usize),
    /// The time lies where certificates cannot be dated.
    #[error("the time {0} ms cannot stand in a certificate")]
    Time(u64),
    /// The system gave no randomness.
    #[error("no randomness")]
    Random,
    /// An id or an anchor is malformed.
    #[error("identity")]
    Identity(#[from] identity::Error),
    /// A key and a certificate do not belong together.
    #[error("TLS identity")]
    Tls(#[from] tls::Error),
    /// A certificate could not be made.
    #[error("certificate")]
    Certificate(#[from] rcgen::Error),
}

/// The root's private key as PKCS #8 PEM: shown once, to be kept in a safe. Prints as `***`.
pub struct RootKeyPem(Zeroizing<String>);

impl RootKeyPem {
    /// The PEM text.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for RootKeyPem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RootKeyPem(***)")
    }
}

/// A certificate just made.
#[derive(Clone, Debug)]
pub struct Issued {
    /// Whom it names.
    pub id: SpiffeId,
    /// The leaf; for a broker also the intermediate that signed it.
    pub chain: Vec<CertificateDer<'static>>,
    /// The same as PEM.
    pub chain_pem: String,
    /// Serial number in hex, lower case.
    pub serial: String,
    /// SHA-256 of the certified key.
    pub spki_sha256: [u8; 32],
    /// When it ends, in milliseconds of Unix time.
    pub not_after_ms: u64,
}

impl Issued {
    /// The command by which the log learns of it.
    pub fn command(&self, of: Subject) -> Body {
        Body::CertificateIssued(CertificateIssued {
            serial: self.serial.clone(),
            subject: self.id.to_string(),
            key_sha256: self.spki_sha256,
            not_after_ms: self.not_after_ms,
            of,
        })
    }
}

/// The three intermediates and their keys.
pub struct Issuer {
    anchors: Anchors,
    root: CertificateDer<'static>,
    brokers: Authority,
    connectors: Authority,
    clients: Authority,
    bundle: Bundle,
}

impl Issuer {
    /// Makes a new cluster's root and intermediates and seals the intermediates' keys in `dir`.
    /// A sealing key file that does not exist is made.
    ///
    /// **Durability**: on disk when it returns.
    /// **Errors**: [`Error::Exists`] when `dir` has an issuer; the seal's and the file system's errors.
    pub fn create(
        dir: &Path,
        seal: &Seal,
        trust_domain: &str,
        cluster_id: [u8; 16],
        now_ms: u64,
    ) -> Result<(Issuer, RootKeyPem), Error> {
        refuse_existing(dir)?;
        let name = format!("{trust_domain} {}", hex::encode(cluster_id));
        identity::check_trust_domain(trust_domain)?;
        let root = authority::make_root(&name, now_ms)?;
        let mut keys = Keys::default();
        let mut certificates = Vec::with_capacity(Role::ALL.len());
        for role in Role::ALL {
            let (certificate, key) = root.make_intermediate(&name, role, now_ms)?;
            certificates.push(certificate);
            *keys.of_mut(role) = key.serialize_pem();
        }
        let intermediates = <[_; 3]>::try_from(certificates).map_err(|_| Error::Bundle("not three intermediates"))?;
        let bundle = Bundle {
            version: BUNDLE_VERSION,
            anchors: Anchors::new(cluster_id, trust_domain, intermediates)?,
            root_pem: root.certificate_pem(),
            keys,
        };
        let root_key = RootKeyPem(Zeroizing::new(root.key_pem()));
        let issuer = Issuer::from_bundle(bundle)?;
        issuer.write(dir, seal)?;
        Ok((issuer, root_key))
    }

    /// Opens the issuer that is sealed in `dir`.
    ///
    /// **Errors**: [`Error::Missing`], [`Error::SealKey`], [`Error::Unseal`], [`Error::Bundle`].
    pub fn open(dir: &Path, seal: &Seal) -> Result<Issuer, Error> {
        let path = dir.join(FILE_NAME);
        let sealed = seal::read_bounded(&path).map_err(|error| match error {
            Error::File { source, .. } if source.kind() == io::ErrorKind::NotFound => {
                Error::Missing(dir.display().to_string())
            }
            other => other,
        })?;
        let key = seal.key()?;
        let clear = seal::open(&key, ON_DISK, &sealed)?;
        Issuer::from_bundle(Bundle::parse(&clear)?)
    }

    /// Takes over what another broker's [`Issuer::seal_for`] made under `key`, and seals it in `dir`.
    ///
    /// **Errors**: as [`Issuer::open`]; [`Error::Exists`] when `dir` has an issuer.
    pub fn from_sealed(bytes: &[u8], key: &[u8; 32], dir: &Path, seal: &Seal) -> Result<Issuer, Error> {
        refuse_existing(dir)?;
        let clear = seal::open(key, IN_TRANSIT, bytes)?;
        let issuer = Issuer::from_bundle(Bundle::parse(&clear)?)?;
        issuer.write(dir, seal)?;
        Ok(issuer)
    }

    /// The intermediates and their keys, sealed under a key that the second issuer gets by other means.
    ///
    /// **Errors**: [`Error::Random`].
    pub fn seal_for(&self, key: &[u8; 32]) -> Result<Vec<u8>, Error> {
        seal::seal(key, IN_TRANSIT, &self.bundle.serialize()?)
    }

    /// What this cluster trusts.
    pub fn anchors(&self) -> &Anchors {
        &self.anchors
    }

    /// The root's certificate. Nobody trusts it; it shows which root the intermediates came from.
    pub fn root(&self) -> &CertificateDer<'static> {
        &self.root
    }

    /// Certifies the key of `csr_der` as `kind`/`id`, for an enrolment that is committed.
    ///
    /// **Errors**: [`Error::Request`] when the request is refused ([`Csr::parse`]), asks to be an
    /// authority or for another id; [`Error::KindNotIssued`] for an issuer.
    pub fn issue(&self, kind: Kind, id: &str, csr_der: &[u8], now_ms: u64) -> Result<Issued, Error> {
        self.certify(kind, id, Vec::new(), csr_der, now_ms)
    }

    /// Certifies a broker, with its host names and addresses beside its id.
    ///
    /// **Errors**: as [`Issuer::issue`]; [`Error::Host`], [`Error::Hosts`].
    pub fn issue_broker(&self, id: &str, hosts: &[String], csr_der: &[u8], now_ms: u64) -> Result<Issued, Error> {
        self.certify(Kind::Broker, id, host_names(hosts)?, csr_der, now_ms)
    }

    /// Makes a key and a certificate for the web listener, used until the operator gives one. It is
    /// signed by the brokers' intermediate, so that [`Anchors::pin`] finds it, and names no id, so
    /// that it is nobody on the other listeners.
    ///
    /// **Errors**: [`Error::Host`], [`Error::Hosts`], [`Error::Time`].
    pub fn issue_web(&self, hosts: &[String], now_ms: u64) -> Result<tls::Identity, Error> {
        let key = KeyPair::generate()?;
        let leaf = Leaf { names: host_names(hosts)?, server: true, client: false, lifetime_ms: BROKER_LIFETIME_MS };
        let certificate = self.brokers.sign(&leaf, &key, now_ms)?;
        let key =
            PrivateKeyDer::try_from(key.serialize_der()).map_err(|_| Error::Bundle("the new key cannot be read"))?;
        let chain = vec![certificate, self.anchors.certificate(Role::Brokers).clone()];
        Ok(tls::Identity::new(chain, key)?)
    }

    /// Signs a login grant (`selvedge_proto::grant::sign`) with the clients' intermediate.
    ///
    /// **Shape** ECDSA P-256 with SHA-256, DER.
    pub fn sign_grant(&self, bytes: &[u8]) -> Result<Vec<u8>, Error> {
        self.clients.sign_bytes(bytes)
    }

    /// Signs a list of brokers with the brokers' intermediate; answers signature and the signer's certificate (DER).
    ///
    /// **Shape** ECDSA P-256 with SHA-256, DER.
    pub fn sign_list(&self, bytes: &[u8]) -> Result<(Vec<u8>, Vec<u8>), Error> {
        Ok((self.brokers.sign_bytes(bytes)?, self.anchors.certificate(Role::Brokers).to_vec()))
    }

    fn certify(&self, kind: Kind, id: &str, hosts: Vec<SanType>, csr_der: &[u8], now_ms: u64) -> Result<Issued, Error> {
        if kind == Kind::Issuer {
            return Err(Error::KindNotIssued(kind));
        }
        let id = SpiffeId::new(self.anchors.trust_domain(), kind, id)?;
        let request = Csr::parse(csr_der)?;
        request.check_asks_for(&id)?;
        let uri =
            id.to_string().try_into().map_err(|_| identity::Error::SpiffeId("has a character that is not allowed"))?;
        let mut names = vec![SanType::URI(uri)];
        names.extend(hosts);
        let leaf = Leaf {
            names,
            server: matches!(kind.role(), Role::Brokers | Role::Connectors),
            client: true,
            lifetime_ms: match kind {
                Kind::Broker => BROKER_LIFETIME_MS,
                _ => DEVICE_LIFETIME_MS,
            },
        };
        let certificate = self.authority(kind.role()).sign(&leaf, request.public_key(), now_ms)?;
        let mut chain = vec![certificate];
        if kind == Kind::Broker {
            chain.push(self.anchors.certificate(Role::Brokers).clone());
        }
        // What leaves the house is what our own verifier accepts.
        let peer = identity::peer(&chain, &self.anchors, &[kind], now_ms)?;
        Ok(Issued {
            id: peer.id,
            chain_pem: identity::chain_pem(&chain),
            chain,
            serial: peer.serial,
            spki_sha256: peer.spki_sha256,
            not_after_ms: peer.not_after_ms,
        })
    }

    fn authority(&self, role: Role) -> &Authority {
        match role {
            Role::Brokers => &self.brokers,
            Role::Connectors => &self.connectors,
            Role::Clients => &self.clients,
        }
    }

    fn from_bundle(bundle: Bundle) -> Result<Issuer, Error> {
        if bundle.version != BUNDLE_VERSION {
            return Err(Error::Bundle("made by another version"));
        }
        let authority = |role| {
            let key = KeyPair::from_pem(bundle.keys.of(role))?;
            let certificate = bundle.anchors.certificate(role);
            let certified = identity::spki_sha256(certificate)?;
            if identity::sha256(&key.subject_public_key_info()) != certified {
                return Err(Error::Bundle("a key is not its certificate's"));
            }
            Authority::new(certificate.clone(), key)
        };
        Ok(Issuer {
            brokers: authority(Role::Brokers)?,
            connectors: authority(Role::Connectors)?,
            clients: authority(Role::Clients)?,
            anchors: bundle.anchors.clone(),
            root: CertificateDer::from_pem_slice(bundle.root_pem.as_bytes())
                .map_err(|_| Error::Bundle("the root's certificate cannot be read"))?,
            bundle,
        })
    }

    fn write(&self, dir: &Path, seal: &Seal) -> Result<(), Error> {
        seal::make_private_dir(dir)?;
        let key = seal.key_or_new()?;
        let sealed = seal::seal(&key, ON_DISK, &self.bundle.serialize()?)?;
        let path = dir.join(FILE_NAME);
        private_file::create(&path, &sealed).map_err(|source| seal::file_error(&path, source))
    }
}

impl fmt::Debug for Issuer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Issuer")
            .field("cluster_id", &hex::encode(self.anchors.cluster_id()))
            .field("trust_domain", &self.anchors.trust_domain())
            .field("keys", &"***")
            .finish()
    }
}

/// What is inside the seal, as JSON.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Bundle {
    version: u32,
    anchors: Anchors,
    root_pem: String,
    keys: Keys,
}

impl Bundle {
    fn parse(clear: &[u8]) -> Result<Self, Error> {
        serde_json::from_slice(clear).map_err(|_| Error::Bundle("it cannot be read"))
    }

    fn serialize(&self) -> Result<Zeroizing<Vec<u8>>, Error> {
        serde_json::to_vec(self).map(Zeroizing::new).map_err(|_| Error::Bundle("it cannot be written"))
    }
}

#[derive(Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Keys {
    brokers: String,
    connectors: String,
    clients: String,
}

impl Keys {
    fn of(&self, role: Role) -> &str {
        match role {
            Role::Brokers => &self.brokers,
            Role::Connectors => &self.connectors,
            Role::Clients => &self.clients,
        }
    }

    fn of_mut(&mut self, role: Role) -> &mut String {
        match role {
            Role::Brokers => &mut self.brokers,
            Role::Connectors => &mut self.connectors,
            Role::Clients => &mut self.clients,
        }
    }
}

impl Drop for Keys {
    fn drop(&mut self) {
        for role in Role::ALL {
            self.of_mut(role).zeroize();
        }
    }
}

fn refuse_existing(dir: &Path) -> Result<(), Error> {
    let path: PathBuf = dir.join(FILE_NAME);
    match path.symlink_metadata() {
        Ok(_) => Err(Error::Exists(dir.display().to_string())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(seal::file_error(&path, source)),
    }
}

fn host_names(hosts: &[String]) -> Result<Vec<SanType>, Error> {
    if hosts.is_empty() || hosts.len() > HOSTS_MAX {
        return Err(Error::Hosts(hosts.len()));
    }
    hosts
        .iter()
        .map(|host| {
            if let Ok(address) = host.parse() {
                return Ok(SanType::IpAddress(address));
            }
            let is_name = host.len() <= 253
                && host.split('.').all(|label| {
                    (1..=63).contains(&label.len()) && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
                });
            match host.as_str().try_into() {
                Ok(name) if is_name => Ok(SanType::DnsName(name)),
                _ => Err(Error::Host(host.clone())),
            }
        })
        .collect()
}
