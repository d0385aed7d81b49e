//! The TLS configurations of every listener and of everything that dials one.
//!
//! **Invariant:** TLS 1.3 only, one crypto provider, X25519MLKEM768 offered first, no early data;
//! sessions are never resumed, so each connection proves its keys anew.
//! **Invariant:** a mutual configuration accepts the kinds that its endpoint serves and no others
//! ([`crate::identity`]); DNS names decide nothing there.
//!
//! Revocation is not looked at here: after each handshake the caller takes [`peer_of`] and looks
//! its id and serial up in the state.

mod own;
#[cfg(test)]
mod tests;
mod verifier;

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls::client::Resumption;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::UnixTime;
use rustls::server::NoServerSessionStorage;
use rustls::time_provider::TimeProvider;
use rustls::{ClientConfig, CommonState, ServerConfig};

use own::NamedOrPinned;
pub use own::{Identity, Renewable, Shown, csr, new_key_and_csr};
use verifier::{KindVerifier, PinVerifier};

use crate::identity::{self, Anchors, Kind, Peer, Pin, SpiffeId};

/// ALPN of a control stream; a knock stands beside it.
pub const CONTROL_ALPN: &[u8] = b"selvedge-control/1";
/// ALPN of a hop; a ticket stands beside it.
pub const HOP_ALPN: &[u8] = b"selvedge-hop/1";

/// Kinds that may open a control stream on an edge listener.
pub const EDGE_CALLERS: &[Kind] = &[Kind::Connector, Kind::Client, Kind::Workload, Kind::Gateway, Kind::Agent];
/// Kinds that may open a session end to end.
pub const HOP_CALLERS: &[Kind] = &[Kind::Client, Kind::Workload, Kind::Gateway, Kind::Web, Kind::Agent];
/// Kinds that answer a session end to end.
pub const HOP_ANSWERERS: &[Kind] = &[Kind::Connector];
/// Kinds that answer on edge and peer listeners, and that open connections between brokers.
pub const BROKERS: &[Kind] = &[Kind::Broker];

/// Why a configuration, a key or a file could not be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// rustls refused it.
    #[error("TLS configuration")]
    Tls(#[from] rustls::Error),
    /// A file could not be read or written.
    #[error("file `{path}`")]
    File {
        /// Which file.
        path: String,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// Others than its owner may read a private key.
    #[error("file `{path}` holds a key and may be read by others than its owner (mode {mode:o})")]
    Exposed {
        /// Which file.
        path: String,
        /// Its permission bits.
        mode: u32,
    },
    /// No certificate, no key, or not PEM.
    #[error("malformed PEM: {0}")]
    Pem(&'static str),
    /// A key or a request could not be made.
    #[error("certificate request")]
    Request(#[from] rcgen::Error),
}

/// Where verifiers take the time from: milliseconds of Unix time.
pub type TimeSource = Arc<dyn Fn() -> u64 + Send + Sync>;

/// The machine's wall clock.
pub fn system_time() -> TimeSource {
    Arc::new(|| {
        SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |elapsed| u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX))
    })
}

/// Whether a verifier judges when a certificate begins. On `peer` it does not until this broker
/// knows the cluster's time; every end is always judged.
#[derive(Clone, Debug)]
pub struct NotBefore(Arc<AtomicBool>);

impl NotBefore {
    /// Judged from the start.
    pub fn judged() -> Self {
        NotBefore(Arc::new(AtomicBool::new(true)))
    }

    /// Not judged until [`NotBefore::judge`].
    pub fn deferred() -> Self {
        NotBefore(Arc::new(AtomicBool::new(false)))
    }

    /// From now on judged, in all configurations that share this.
    pub fn judge(&self) {
        self.0.store(true, Ordering::Release);
    }

    fn is_judged(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// The crypto provider of this product: aws-lc-rs, hybrid post-quantum key exchange first.
pub fn provider() -> &'static Arc<CryptoProvider> {
    static PROVIDER: OnceLock<Arc<CryptoProvider>> = OnceLock::new();
    PROVIDER.get_or_init(|| Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
}

/// Makes [`provider`] the process's default, for libraries that ask rustls for one. Call it first
/// thing in `main`; calling it again changes nothing.
pub fn install_provider() {
    // Fails only when a default is there already, and then ours is not needed.
    let _ = CryptoProvider::clone(provider()).install_default();
}

/// The edge listener: connectors, clients, workloads, gateways and agents, mutual.
///
/// **Errors**: [`Error::Tls`].
pub fn edge_server(
    identity: &impl Shown,
    anchors: &Arc<Anchors>,
    alpn: Vec<Vec<u8>>,
    time: &TimeSource,
) -> Result<ServerConfig, Error> {
    mutual_server(identity, anchors, EDGE_CALLERS, NotBefore::judged(), alpn, time)
}

/// Dials an edge listener and verifies a broker, or exactly `expected`.
///
/// **Errors**: [`Error::Tls`].
pub fn edge_client(
    identity: &impl Shown,
    anchors: &Arc<Anchors>,
    alpn: Vec<Vec<u8>>,
    expected: Option<SpiffeId>,
    time: &TimeSource,
) -> Result<ClientConfig, Error> {
    mutual_client(identity, anchors, BROKERS, NotBefore::judged(), alpn, expected, time)
}

/// The opening end of a session, end to end through the broker: verifies a connector, or exactly
/// `expected`. `alpn` carries the ticket; it may be left empty here and given with each connection
/// (`TlsConnector::with_alpn`).
///
/// **Errors**: [`Error::Tls`].
pub fn hop_client(
    identity: &impl Shown,
    anchors: &Arc<Anchors>,
    alpn: Vec<Vec<u8>>,
    expected: Option<SpiffeId>,
    time: &TimeSource,
) -> Result<ClientConfig, Error> {
    mutual_client(identity, anchors, HOP_ANSWERERS, NotBefore::judged(), alpn, expected, time)
}

/// The answering end of a session, in a connector. Which of the allowed kinds it must be, and who,
/// is compared with `Dial` afterwards, by [`peer_of`].
///
/// **Errors**: [`Error::Tls`].
pub fn hop_server(identity: &impl Shown, anchors: &Arc<Anchors>, time: &TimeSource) -> Result<ServerConfig, Error> {
    let alpn = vec![HOP_ALPN.to_vec()];
    mutual_server(identity, anchors, HOP_CALLERS, NotBefore::judged(), alpn, time)
}

/// The peer listener: brokers only.
///
/// **Errors**: [`Error::Tls`].
pub fn peer_server(
    identity: &impl Shown,
    anchors: &Arc<Anchors>,
    not_before: NotBefore,
    time: &TimeSource,
) -> Result<ServerConfig, Error> {
    mutual_server(identity, anchors, BROKERS, not_before, vec![b"h2".to_vec()], time)
}

/// Dials another broker's peer listener and verifies a broker, or exactly `expected`.
///
/// **Errors**: [`Error::Tls`].
pub fn peer_client(
    identity: &impl Shown,
    anchors: &Arc<Anchors>,
    expected: Option<SpiffeId>,
    not_before: NotBefore,
    time: &TimeSource,
) -> Result<ClientConfig, Error> {
    let alpn = vec![b"h2".to_vec()];
    mutual_client(identity, anchors, BROKERS, not_before, alpn, expected, time)
}

/// What a caller says beside its protocols when it knows the web listener by a pin and not by its name.
const PINNED_ALPN: &[u8] = b"selvedge-pinned/1";

/// The web listener: no certificate is asked of callers; HTTP/2 and HTTP/1.1. Who knows it by its name is shown `named`, which
/// may be the operator's; who knows it by a pin is shown `pinned`, which the issuer signed.
///
/// **Errors**: [`Error::Tls`].
pub fn web_server(named: &impl Shown, pinned: &impl Shown) -> Result<ServerConfig, Error> {
    let mut config = ServerConfig::builder_with_provider(provider().clone())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(NamedOrPinned { named: named.shown(), pinned: pinned.shown() }));
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    never_resume(&mut config);
    Ok(config)
}

/// Dials a web listener that is known by a pin and not by its name: accepted is a chain in which
/// the leaf, or an authority that the leaf verifies to, has the pinned key. Speaks HTTP/1.1; set
/// `alpn_protocols` for more, and leave the last of them in place: by it the listener knows what to show.
///
/// **Errors**: [`Error::Tls`].
pub fn pinned_web_client(pin: Pin, time: &TimeSource) -> Result<ClientConfig, Error> {
    let mut config = ClientConfig::builder_with_details(provider().clone(), clock(time))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(PinVerifier::new(pin)))
        .with_no_client_auth();
    config.resumption = Resumption::disabled();
    config.alpn_protocols = vec![b"http/1.1".to_vec(), PINNED_ALPN.to_vec()];
    Ok(config)
}

/// Who is at the other end of a finished handshake that one of this module's mutual configurations
/// made. A `ServerConnection` and a `ClientConnection` both are a `CommonState`.
///
/// **Errors**: [`identity::Error::NoCertificate`] before the handshake is over or when none was asked for.
pub fn peer_of(connection: &CommonState) -> Result<Peer, identity::Error> {
    if connection.is_handshaking() {
        return Err(identity::Error::NoCertificate);
    }
    let leaf = connection.peer_certificates().and_then(<[_]>::first).ok_or(identity::Error::NoCertificate)?;
    Peer::of_verified_leaf(leaf)
}

fn mutual_server(
    identity: &impl Shown,
    anchors: &Arc<Anchors>,
    allowed: &'static [Kind],
    not_before: NotBefore,
    alpn: Vec<Vec<u8>>,
    time: &TimeSource,
) -> Result<ServerConfig, Error> {
    let verifier = KindVerifier::new(anchors.clone(), allowed, None, not_before);
    let mut config = ServerConfig::builder_with_details(provider().clone(), clock(time))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_cert_resolver(Arc::new(identity.shown()));
    config.alpn_protocols = alpn;
    never_resume(&mut config);
    Ok(config)
}

fn never_resume(config: &mut ServerConfig) {
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.max_early_data_size = 0;
}

fn mutual_client(
    identity: &impl Shown,
    anchors: &Arc<Anchors>,
    allowed: &'static [Kind],
    not_before: NotBefore,
    alpn: Vec<Vec<u8>>,
    expected: Option<SpiffeId>,
    time: &TimeSource,
) -> Result<ClientConfig, Error> {
    let verifier = KindVerifier::new(anchors.clone(), allowed, expected, not_before);
    let mut config = ClientConfig::builder_with_details(provider().clone(), clock(time))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_cert_resolver(Arc::new(identity.shown()));
    config.alpn_protocols = alpn;
    config.resumption = Resumption::disabled();
    config.enable_early_data = false;
    Ok(config)
}

struct Clock(TimeSource);

impl fmt::Debug for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Clock")
    }
}

impl TimeProvider for Clock {
    fn current_time(&self) -> Option<UnixTime> {
        Some(UnixTime::since_unix_epoch(Duration::from_millis((self.0)())))
    }
}

fn clock(time: &TimeSource) -> Arc<dyn TimeProvider> {
    Arc::new(Clock(time.clone()))
}
