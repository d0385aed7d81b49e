//! The client: what a person or a workload runs to reach applications.
//!
//! Invariants: application bytes leave only inside a TLS session whose other end is the connector that the broker
//! named; a denied target and one that does not exist look the same.

mod attempt;
mod error;
mod front;
mod local;
mod owner;
mod proxy;
mod source;
mod tunnel;
mod udp;

use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use selvedge_domain::name::{Host, is_in_zone};
use selvedge_proto::frame::Transport;
use selvedge_proto::identity::{Anchors, Kind, SpiffeId};
use selvedge_proto::tls::{self, Identity};
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep, timeout};
use tokio_rustls::TlsConnector;
use tokio_util::sync::CancellationToken;
use tracing::debug;

pub use error::Error;
pub use front::{Report, connect, nc};
pub use proxy::proxy;
pub use tunnel::Tunnel;
pub use udp::connect_udp;

use crate::clock;
use crate::dial::Via;
use crate::end::End;
use crate::links::LinkStatus;
use crate::state::{self, State, identity_path};
use local::Guest;
use source::Own;

/// How long a client that begins waits for one that is beginning on the same state directory.
const GUEST_TIMEOUT: Duration = Duration::from_secs(5);
const ZONES_TIMEOUT: Duration = Duration::from_secs(3);

/// How a client begins.
#[derive(Clone, Debug)]
pub struct Options {
    /// The directory that `enrol` filled.
    pub state_dir: PathBuf,
    /// Where to dial instead of a broker's advertised edge address.
    pub via: Via,
}

/// A client. Cheap to clone.
///
/// Of several clients on one state directory the first holds the control streams; the others ask it for sessions, and
/// the next one takes its place when it is gone.
#[derive(Clone)]
pub struct Client(Arc<Inner>);

struct Inner {
    options: Options,
    spiffe: SpiffeId,
    anchors: Arc<Anchors>,
    source: Mutex<Source>,
    hop: Mutex<HopTls>,
    shutdown: CancellationToken,
}

#[derive(Clone)]
enum Source {
    Own(Arc<Own>),
    Guest,
}

/// The opening side of end-to-end handshakes, made of the identity of `modified`.
struct HopTls {
    modified: Option<SystemTime>,
    checked: Instant,
    connector: TlsConnector,
}

/// What a person sees of their client.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    /// Whose certificate it is.
    pub id: String,
    /// The brokers that it is attached to.
    pub brokers: Vec<LinkStatus>,
    /// The private domains; none before a broker told.
    pub zones: Option<Vec<String>>,
    /// Names outside the zones that may be used now.
    pub names: Vec<String>,
    /// When the certificate ends, in milliseconds of Unix time.
    pub certificate_expires_ms: u64,
    /// Why the last attempt to attach failed.
    pub last_error: Option<String>,
}

impl Client {
    /// Reads the state and attaches in the background, or finds the client that runs on it already.
    pub async fn start(options: Options) -> Result<Self, Error> {
        let state = State::load(&options.state_dir)?;
        if !matches!(state.spiffe.kind(), Kind::Client | Kind::Workload) {
            return Err(Error::NotAClient(options.state_dir.display().to_string()));
        }
        let shutdown = CancellationToken::new();
        let deadline = Instant::now() + GUEST_TIMEOUT;
        let source = loop {
            match End::open(&options.state_dir, options.via.clone()) {
                Ok(end) => break Source::Own(Own::start(end, &shutdown)),
                Err(state::Error::InUse(_)) if Guest::connect(&options.state_dir).await.is_ok() => break Source::Guest,
                // It is just beginning, or just ending.
                Err(state::Error::InUse(_)) if Instant::now() < deadline => sleep(Duration::from_millis(50)).await,
                Err(error) => return Err(error.into()),
            }
        };
        let anchors = Arc::new(state.anchors);
        let hop = HopTls::load(&options.state_dir, &anchors)?;
        let (source, hop) = (Mutex::new(source), Mutex::new(hop));
        Ok(Self(Arc::new(Inner { options, spiffe: state.spiffe, anchors, source, hop, shutdown })))
    }

    /// Waits until at least one control stream stands.
    pub async fn ready(&self, within: Duration) -> Result<(), Error> {
        let deadline = Instant::now() + within;
        loop {
            match self.source().await? {
                Source::Own(own) => return own.ready(deadline.saturating_duration_since(Instant::now())).await,
                Source::Guest => {
                    let status = self.guest().await?.status().await?;
                    if status.brokers.iter().any(|broker| broker.usable) {
                        return Ok(());
                    }
                    if Instant::now() >= deadline {
                        let reason = status.last_error.unwrap_or_else(|| "none answered in time".to_owned());
                        return Err(Error::Detached(reason));
                    }
                    sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    /// Opens one session. A UDP session carries `selvedge_proto::frame::Datagram`s.
    ///
    /// When the first broker fails before any byte, a second one is tried.
    pub async fn open(&self, host: &str, port: u16, transport: Transport) -> Result<Tunnel, Error> {
        attempt::open(self, host, port, transport).await
    }

    /// The address that stands for a host: for a name in a zone, if it exists for this person, one that brokers made up;
    /// for an address itself.
    ///
    /// **Errors**: [`Error::NoSuchName`] for what is denied, unknown or not reachable now, which look the same;
    /// [`Error::NotPrivate`] for what is left to the machine's own resolver.
    pub async fn resolve(&self, host: &str) -> Result<IpAddr, Error> {
        let no_such_name = || Error::NoSuchName(host.to_owned());
        let parsed = Host::parse(host).map_err(|_| no_such_name())?;
        let name = match &parsed {
            Host::Address(address) => return Ok(*address),
            Host::Name(name) => name,
        };
        if !self.is_private(&parsed).await? {
            return Err(Error::NotPrivate(host.to_owned()));
        }
        let address = match self.source().await? {
            Source::Own(own) => own.resolve(name).await?,
            Source::Guest => self.guest().await?.resolve(name).await?,
        };
        address.ok_or_else(no_such_name)
    }

    /// What policy discloses about a target.
    pub async fn why(&self, host: &str, port: u16) -> Result<String, Error> {
        match self.source().await? {
            Source::Own(own) => own.why(host, port).await,
            Source::Guest => self.guest().await?.why(host, port).await,
        }
    }

    /// What the client knows of itself.
    pub async fn status(&self) -> Result<Status, Error> {
        match self.source().await? {
            Source::Own(own) => Ok(own.status()),
            Source::Guest => self.guest().await?.status().await,
        }
    }

    /// Whether a target is one that brokers are asked about: a name in a zone, one that this person may use, or an
    /// address.
    pub async fn is_private(&self, host: &Host) -> Result<bool, Error> {
        let Host::Name(name) = host else { return Ok(true) };
        if let Source::Own(own) = self.source().await? {
            let mut zones = own.end.zones.subscribe();
            // Told right after attaching; a broker that never tells is asked about everything.
            let _ = timeout(ZONES_TIMEOUT, zones.wait_for(Option::is_some)).await;
        }
        let status = self.status().await?;
        let Some(zones) = status.zones else { return Ok(true) };
        Ok(zones.iter().any(|zone| is_in_zone(name, zone)) || status.names.contains(name))
    }

    /// Ends the control streams, if they are this client's own. Open sessions are not touched.
    pub async fn stop(&self) {
        self.0.shutdown.cancel();
        let source = self.0.source.lock().clone();
        if let Source::Own(own) = source {
            own.stopped().await;
        }
    }

    /// Where sessions are asked for now. A guest whose host is gone takes its place.
    async fn source(&self) -> Result<Source, Error> {
        let source = self.0.source.lock().clone();
        if matches!(source, Source::Own(_)) || Guest::connect(&self.0.options.state_dir).await.is_ok() {
            return Ok(source);
        }
        match End::open(&self.0.options.state_dir, self.0.options.via.clone()) {
            Ok(end) => {
                debug!("the client that ran is gone; this one takes its place");
                let own = Source::Own(Own::start(end, &self.0.shutdown));
                *self.0.source.lock() = own.clone();
                Ok(own)
            }
            // Another one was quicker, in this process or elsewhere.
            Err(state::Error::InUse(_)) => Ok(self.0.source.lock().clone()),
            Err(error) => Err(error.into()),
        }
    }

    async fn guest(&self) -> Result<Guest, Error> {
        let deadline = Instant::now() + GUEST_TIMEOUT;
        loop {
            match Guest::connect(&self.0.options.state_dir).await {
                Ok(guest) => return Ok(guest),
                Err(_) if Instant::now() < deadline => sleep(Duration::from_millis(50)).await,
                Err(error) => return Err(Error::Local(error.to_string())),
            }
        }
    }

    /// The opening side of end-to-end handshakes; read again when the certificate was renewed.
    fn hop_connector(&self) -> Result<TlsConnector, Error> {
        let mut hop = self.0.hop.lock();
        if hop.checked.elapsed() > Duration::from_secs(1) {
            hop.checked = Instant::now();
            if modified(&self.0.options.state_dir) != hop.modified {
                *hop = HopTls::load(&self.0.options.state_dir, &self.0.anchors)?;
            }
        }
        Ok(hop.connector.clone())
    }
}

impl HopTls {
    fn load(dir: &Path, anchors: &Arc<Anchors>) -> Result<Self, Error> {
        let modified = modified(dir);
        let identity = Identity::load(&identity_path(dir))?;
        let config = tls::hop_client(&identity, anchors, Vec::new(), None, &tls::system_time())?;
        Ok(Self { modified, checked: Instant::now(), connector: TlsConnector::from(Arc::new(config)) })
    }
}

fn modified(dir: &Path) -> Option<SystemTime> {
    std::fs::metadata(identity_path(dir)).and_then(|metadata| metadata.modified()).ok()
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "id           {}", self.id)?;
        let left_ms = self.certificate_expires_ms.saturating_sub(clock::unix_ms());
        writeln!(f, "certificate  ends in {} h", left_ms / 3_600_000)?;
        match &self.zones {
            Some(zones) => writeln!(f, "zones        {}", zones.join(" "))?,
            None => writeln!(f, "zones        not told yet")?,
        }
        if !self.names.is_empty() {
            writeln!(f, "names        {}", self.names.join(" "))?;
        }
        for broker in &self.brokers {
            let rtt_ms = broker.rtt_us as f64 / 1_000.0;
            let state = if broker.usable { "attached" } else { "leaving" };
            writeln!(f, "broker       {} ({}) {} {state}, {rtt_ms:.1} ms", broker.name, broker.region, broker.edge)?;
        }
        if self.brokers.is_empty() {
            let reason = self.last_error.as_deref().unwrap_or("not attached yet");
            writeln!(f, "broker       none: {reason}")?;
        }
        Ok(())
    }
}
