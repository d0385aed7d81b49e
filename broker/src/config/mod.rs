//! A broker's configuration: one TOML file, then `SELVEDGE_*`, then flags.

mod layers;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use selvedge_cluster::Preset;
use selvedge_domain::name;

use crate::edge::Limits;
use crate::issuer::Seal;
use crate::web;
pub use layers::{FILE_BYTES_MAX, FILE_VARIABLE, Origin, Problem, Shown, Sources, VARIABLE_PREFIX};
use layers::{Layers, Text, Value, quoted};

/// Which log lines are written when nobody says so.
pub const LOG_DEFAULT: &str = "info";
/// What a reload puts into force; everything else needs a restart.
pub const RELOADED: [&str; 4] = ["log", "limits.", "web.certificate", "web.key"];

/// What an operator writes. Unknown fields are refused.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where everything durable lives; made with mode 0700.
    pub data_dir: PathBuf,
    /// Unique among the brokers.
    pub name: String,
    /// Name of a region.
    pub region: String,
    /// Host name that every TLS connection to this broker carries, so that name-based egress rules work.
    pub host: String,
    /// Timing of Raft: `lan`, `wan` or `test`.
    pub preset: Preset,
    /// Which log lines are written, e.g. `info` or `info,selvedge_broker=debug`.
    pub log: String,
    /// Control streams and hops of clients and connectors.
    pub edge: Listener,
    /// Admin API, SCIM, enrolment.
    pub web: WebListener,
    /// Raft and broker to broker.
    pub peer: Listener,
    /// Health and metrics.
    pub ops: OpsListener,
    /// How the issuer's keys are sealed on this disk.
    pub seal: SealConfig,
    /// OTLP endpoint (gRPC) for traces; none when absent.
    pub otlp_endpoint: Option<String>,
    /// Dials another address than the advertised one of a peer, for links that pass through a proxy.
    pub peer_via: BTreeMap<String, String>,
    /// What the edge admits.
    pub limits: Limits,
    /// Told to stop, the broker gives its sessions so many seconds to end, unless it drains until a time of its own.
    pub drain_on_stop_s: u32,
}

/// Seconds that sessions have to end when a broker is told to stop: less than what service managers wait.
pub const DRAIN_ON_STOP_S_DEFAULT: u32 = 20;

/// A listener with what others are told of it.
#[derive(Clone, Debug)]
pub struct Listener {
    /// Address to listen on.
    pub bind: SocketAddr,
    /// `host:port` that others dial; the bind address when absent.
    pub advertise: Option<String>,
}

impl Listener {
    /// What others dial.
    pub fn advertised(&self) -> String {
        self.advertise.clone().unwrap_or_else(|| self.bind.to_string())
    }
}

/// The `web` listener.
#[derive(Clone, Debug)]
pub struct WebListener {
    /// Address to listen on.
    pub bind: SocketAddr,
    /// `host:port` that others dial; the bind address when absent.
    pub advertise: Option<String>,
    /// The operator's certificate chain (PEM), reloaded when it changes; signed by the issuer until given.
    pub certificate: Option<PathBuf>,
    /// The certificate's key (PEM).
    pub key: Option<PathBuf>,
}

impl WebListener {
    /// What others dial.
    pub fn advertised(&self) -> String {
        self.advertise.clone().unwrap_or_else(|| self.bind.to_string())
    }
}

/// The `ops` listener.
#[derive(Clone, Debug)]
pub struct OpsListener {
    /// Address to listen on; loopback unless you know why not.
    pub bind: SocketAddr,
}

/// How the issuer's keys are sealed on this disk.
#[derive(Clone, Debug, Default)]
pub enum SealConfig {
    /// By a key file beside the data directory's other files.
    #[default]
    Local,
    /// By a key file elsewhere (32 bytes, mode 0600).
    File(PathBuf),
    /// By an environment variable (64 hexadecimal digits).
    Env(String),
}

/// What was checked.
#[derive(Clone, Debug)]
pub struct Valid<T = Config>(T);

impl<T> std::ops::Deref for Valid<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

/// A configuration that was checked, and where each of its values came from.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// The configuration.
    pub config: Valid<Config>,
    /// Every field in order, with its value and origin.
    pub shown: Vec<Shown>,
}

/// Why a configuration is not accepted: everything that is wrong with it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct Error {
    /// In the order of the file.
    pub problems: Vec<Problem>,
}

impl Error {
    /// The code that an operator looks up.
    pub const CODE: &str = "SE0301";
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the configuration is refused ({})", Self::CODE)?;
        self.problems.iter().try_for_each(|problem| write!(f, "\n  {problem}"))
    }
}

impl Config {
    /// Reads and checks a file and this process's environment.
    pub fn load(path: &Path) -> Result<Valid<Config>, Error> {
        Self::read(&Sources::environment(path)).map(|loaded| loaded.config)
    }

    /// Reads and checks, and says where each value came from.
    ///
    /// **Errors** with everything that is wrong, not only the first.
    pub fn read(sources: &Sources) -> Result<Loaded, Error> {
        let mut layers = Layers::open(sources);
        let config = Self::of(&mut layers);
        // Relations are judged when every value is there, so that nothing is called wrong for what is missing.
        let checked = config.map(Self::validate);
        let valid = match checked {
            Some(Ok(valid)) => Some(valid),
            Some(Err(wrong)) => {
                for (field, message) in wrong {
                    layers.problem(layers.place_of(field), format!("`{field}`: {message}"));
                }
                None
            }
            None => None,
        };
        let (shown, problems) = layers.finish();
        match valid {
            Some(config) if problems.is_empty() => Ok(Loaded { config, shown }),
            _ => Err(Error { problems }),
        }
    }

    /// Every field, once.
    fn of(from: &mut Layers) -> Option<Self> {
        let data_dir = from.required("data_dir");
        let name = from.required("name");
        let region = from.required("region");
        let host = from.required("host");
        let preset = from.or("preset", Preset::default());
        let log = from.or("log", LOG_DEFAULT.to_owned());
        let edge = listener(from, "edge.bind", "edge.advertise");
        let web = (from.required("web.bind"), from.optional("web.advertise"));
        let (certificate, key) = (from.optional("web.certificate"), from.optional("web.key"));
        let peer = listener(from, "peer.bind", "peer.advertise");
        let ops = from.required("ops.bind");
        let seal = seal(from);
        let otlp_endpoint = from.optional("otlp_endpoint");
        let peer_via = from.pairs("peer_via");
        let usual = Limits::default();
        let limits = Limits {
            sessions: from.or("limits.sessions", usual.sessions),
            sessions_per_principal: from.or("limits.sessions_per_principal", usual.sessions_per_principal),
            control_streams: from.or("limits.control_streams", usual.control_streams),
            opens_per_second: from.or("limits.opens_per_second", usual.opens_per_second),
            resolves_per_second: from.or("limits.resolves_per_second", usual.resolves_per_second),
        };
        let drain_on_stop_s = from.or("drain_on_stop_s", DRAIN_ON_STOP_S_DEFAULT);
        let web = WebListener { bind: web.0?, advertise: web.1, certificate, key };
        Some(Self {
            data_dir: data_dir?,
            name: name?,
            region: region?,
            host: host?,
            preset,
            log,
            edge: edge?,
            web,
            peer: peer?,
            ops: OpsListener { bind: ops? },
            seal: seal?,
            otlp_endpoint,
            peer_via,
            limits,
            drain_on_stop_s,
        })
    }

    /// Checks values and their relations.
    ///
    /// **Errors**: each wrong field and what is wrong with it.
    pub fn validate(self) -> Result<Valid<Config>, Vec<(&'static str, String)>> {
        let mut wrong = Vec::new();
        let mut refuse = |field, message: String| wrong.push((field, message));
        if self.data_dir.as_os_str().is_empty() {
            refuse("data_dir", "it is empty".to_owned());
        }
        for (field, text) in [("name", &self.name), ("region", &self.region)] {
            if let Err(error) = name::check_object(text) {
                refuse(field, error.to_string());
            }
        }
        if !matches!(name::Host::parse(&self.host), Ok(name::Host::Name(_))) {
            refuse("host", "a broker needs a host name, not an address".to_owned());
        }
        if let Err(error) = tracing_subscriber::EnvFilter::try_new(&self.log) {
            refuse("log", error.to_string());
        }
        if self.web.certificate.is_some() != self.web.key.is_some() {
            let field = if self.web.key.is_some() { "web.key" } else { "web.certificate" };
            refuse(field, "`web.certificate` and `web.key` belong together".to_owned());
        }
        let listeners = [
            ("edge.bind", "edge.advertise", &self.edge.advertise, self.edge.bind),
            ("web.bind", "web.advertise", &self.web.advertise, self.web.bind),
            ("peer.bind", "peer.advertise", &self.peer.advertise, self.peer.bind),
        ];
        for (bind_field, field, advertise, bind) in listeners {
            match advertise {
                None if bind.port() == 0 => {
                    refuse(bind_field, "with port 0, advertise the `host:port` that others dial".to_owned());
                }
                None if bind.ip().is_unspecified() => {
                    refuse(bind_field, "on every address, advertise the `host:port` that others dial".to_owned());
                }
                Some(text) if !is_host_port(text) => {
                    refuse(field, "advertise `host:port`, with the port that others dial".to_owned());
                }
                _ => {}
            }
        }
        let binds = listeners.map(|(field, _, _, bind)| (field, bind)).into_iter().chain([("ops.bind", self.ops.bind)]);
        let mut taken: Vec<(&'static str, SocketAddr)> = Vec::new();
        for (field, bind) in binds {
            if let Some((other, _)) = taken.iter().find(|(_, other)| meet(*other, bind)) {
                refuse(field, format!("`{bind}` is taken by `{other}`"));
            }
            taken.push((field, bind));
        }
        if self.otlp_endpoint.as_ref().is_some_and(|url| !url.starts_with("http://")) {
            refuse(
                "otlp_endpoint",
                "it must begin with `http://`: a collector on this machine or in its pod".to_owned(),
            );
        }
        if let Some((_, to)) = self.peer_via.iter().find(|(_, to)| !is_host_port(to)) {
            refuse("peer_via", format!("`{to}` is not `host:port`"));
        }
        for (field, value) in self.limits.named() {
            if value == 0 {
                refuse(field, "a limit of 0 admits nothing".to_owned());
            }
        }
        if self.limits.sessions_per_principal > self.limits.sessions {
            let sessions = self.limits.sessions;
            refuse("limits.sessions_per_principal", format!("it is over `limits.sessions`, which is {sessions}"));
        }
        if wrong.is_empty() { Ok(Valid(self)) } else { Err(wrong) }
    }

    /// The operator's certificate for the web listener.
    pub fn web_files(&self) -> Option<web::Files> {
        let (certificate, key) = (self.web.certificate.clone()?, self.web.key.clone()?);
        Some(web::Files { certificate, key })
    }

    /// Where node identity and cluster description are kept.
    pub fn node_dir(&self) -> PathBuf {
        self.data_dir.join("node")
    }

    /// Where the sealed issuer is kept.
    pub fn issuer_dir(&self) -> PathBuf {
        self.data_dir.join("issuer")
    }

    /// The seal of the issuer's keys.
    pub fn issuer_seal(&self) -> Seal {
        match &self.seal {
            SealConfig::Local => Seal::File(self.node_dir().join("seal.key")),
            SealConfig::File(path) => Seal::File(path.clone()),
            SealConfig::Env(name) => Seal::Env(name.clone()),
        }
    }
}

fn listener(from: &mut Layers, bind: &str, advertise: &str) -> Option<Listener> {
    let (bind, advertise) = (from.required(bind), from.optional(advertise));
    Some(Listener { bind: bind?, advertise })
}

fn seal(from: &mut Layers) -> Option<SealConfig> {
    let (file, env) = (from.optional::<PathBuf>("seal.file"), from.optional::<String>("seal.env"));
    match (file, env) {
        (None, None) => Some(SealConfig::Local),
        (Some(file), None) => Some(SealConfig::File(file)),
        (None, Some(env)) => Some(SealConfig::Env(env)),
        (Some(_), Some(_)) => {
            from.problem(from.place_of("seal.env"), "`seal.file` and `seal.env` exclude each other".to_owned());
            None
        }
    }
}

fn is_host_port(text: &str) -> bool {
    let port = text.rsplit_once(':').filter(|(host, _)| !host.is_empty());
    port.and_then(|(_, port)| port.parse::<u16>().ok()).is_some_and(|port| port != 0)
}

/// Whether two sockets cannot both be bound.
fn meet(one: SocketAddr, other: SocketAddr) -> bool {
    let covers = one.ip() == other.ip() || one.ip().is_unspecified() || other.ip().is_unspecified();
    one.port() != 0 && one.port() == other.port() && covers
}

impl Value for String {
    const WHAT: &'static str = "a text";

    fn read(text: &Text) -> Option<Self> {
        text.string().map(str::to_owned)
    }

    fn show(&self) -> String {
        quoted(self)
    }
}

impl Value for PathBuf {
    const WHAT: &'static str = "a path";

    fn read(text: &Text) -> Option<Self> {
        text.string().map(PathBuf::from)
    }

    fn show(&self) -> String {
        quoted(&self.to_string_lossy())
    }
}

impl Value for SocketAddr {
    const WHAT: &'static str = "an address with a port, as `0.0.0.0:443`";

    fn read(text: &Text) -> Option<Self> {
        text.string()?.parse().ok()
    }

    fn show(&self) -> String {
        quoted(&self.to_string())
    }
}

impl Value for u32 {
    const WHAT: &'static str = "a whole number";

    fn read(text: &Text) -> Option<Self> {
        text.number()
    }

    fn show(&self) -> String {
        self.to_string()
    }
}

impl Value for Preset {
    const WHAT: &'static str = "`lan`, `wan` or `test`";

    fn read(text: &Text) -> Option<Self> {
        match text.string()? {
            "lan" => Some(Self::Lan),
            "wan" => Some(Self::Wan),
            "test" => Some(Self::Test),
            _ => None,
        }
    }

    fn show(&self) -> String {
        quoted(match self {
            Self::Lan => "lan",
            Self::Wan => "wan",
            Self::Test => "test",
        })
    }
}
