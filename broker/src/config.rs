//! A broker's configuration: one TOML file, then `SELVEDGE_*`, then flags.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use selvedge_cluster::Preset;
use serde::{Deserialize, Serialize};

use crate::issuer::Seal;

/// What an operator writes. Unknown fields are refused.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
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
    #[serde(default)]
    pub preset: Preset,
    /// Control streams and hops of clients and connectors.
    pub edge: Listener,
    /// Admin API, SCIM, enrolment.
    pub web: WebListener,
    /// Raft and broker to broker.
    pub peer: Listener,
    /// Health and metrics.
    pub ops: OpsListener,
    /// How the issuer's keys are sealed on this disk.
    #[serde(default)]
    pub seal: SealConfig,
    /// OTLP endpoint (gRPC) for traces; none when absent.
    #[serde(default)]
    pub otlp_endpoint: Option<String>,
    /// Dials another address than the advertised one of a peer, for links that pass through a proxy.
    #[serde(default)]
    pub peer_via: BTreeMap<String, String>,
}

/// A listener with what others are told of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Listener {
    /// Address to listen on.
    pub bind: SocketAddr,
    /// `host:port` that others dial; the bind address when absent.
    #[serde(default)]
    pub advertise: Option<String>,
}

impl Listener {
    /// What others dial.
    pub fn advertised(&self) -> String {
        self.advertise.clone().unwrap_or_else(|| self.bind.to_string())
    }
}

/// The `web` listener.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WebListener {
    /// Address to listen on.
    pub bind: SocketAddr,
    /// `host:port` that others dial; the bind address when absent.
    #[serde(default)]
    pub advertise: Option<String>,
    /// The operator's certificate chain (PEM), reloaded when it changes; signed by the issuer until given.
    #[serde(default)]
    pub certificate: Option<PathBuf>,
    /// The certificate's key (PEM).
    #[serde(default)]
    pub key: Option<PathBuf>,
}

impl WebListener {
    /// What others dial.
    pub fn advertised(&self) -> String {
        self.advertise.clone().unwrap_or_else(|| self.bind.to_string())
    }
}

/// The `ops` listener.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OpsListener {
    /// Address to listen on; loopback unless you know why not.
    pub bind: SocketAddr,
}

/// How the issuer's keys are sealed on this disk.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "lowercase")]
pub enum SealConfig {
    /// By a key file beside the data directory's other files.
    #[default]
    Local,
    /// By a key file elsewhere (32 bytes, mode 0600).
    File(PathBuf),
    /// By an environment variable (64 hexadecimal digits).
    Env(String),
}

/// A configuration that was checked.
#[derive(Clone, Debug)]
pub struct Valid(Config);

impl std::ops::Deref for Valid {
    type Target = Config;

    fn deref(&self) -> &Config {
        &self.0
    }
}

/// Why a configuration is not accepted.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read.
    #[error("cannot read `{path}`")]
    Read {
        /// File.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Not TOML of this shape.
    #[error("`{path}`: {message}")]
    Parse {
        /// File.
        path: PathBuf,
        /// Where and why.
        message: String,
    },
    /// A value is out of its bounds, or two do not go together.
    #[error("`{field}`: {message}")]
    Value {
        /// Field.
        field: &'static str,
        /// Why.
        message: String,
    },
}

impl Config {
    /// Reads and checks a file.
    pub fn load(path: &Path) -> Result<Valid, Error> {
        let text = std::fs::read_to_string(path).map_err(|source| Error::Read { path: path.to_owned(), source })?;
        let config: Self = toml::from_str(&text)
            .map_err(|error| Error::Parse { path: path.to_owned(), message: error.to_string() })?;
        config.validate()
    }

    /// Checks values and their relations.
    pub fn validate(self) -> Result<Valid, Error> {
        let wrong = |field, message: &str| Err(Error::Value { field, message: message.to_owned() });
        if let Err(error) = selvedge_domain::name::check_object(&self.name) {
            return wrong("name", &error.to_string());
        }
        if !matches!(selvedge_domain::name::Host::parse(&self.host), Ok(selvedge_domain::name::Host::Name(_))) {
            return wrong("host", "a broker needs a host name, not an address");
        }
        if self.web.certificate.is_some() != self.web.key.is_some() {
            return wrong("web", "`certificate` and `key` belong together");
        }
        let advertised =
            [("edge", self.edge.advertised()), ("web", self.web.advertised()), ("peer", self.peer.advertised())];
        for (field, address) in advertised {
            let port = address.rsplit_once(':').and_then(|(_, port)| port.parse::<u16>().ok());
            if port.is_none_or(|port| port == 0) {
                return wrong(field, "advertise `host:port`, with the port that others dial");
            }
        }
        Ok(Valid(self))
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

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
        data_dir = "/var/lib/selvedge"
        name = "eu-1"
        region = "eu"
        host = "eu-1.brokers.example"
        preset = "lan"
        edge = { bind = "127.0.0.1:443" }
        web = { bind = "127.0.0.1:8443" }
        peer = { bind = "127.0.0.1:7443" }
        ops = { bind = "127.0.0.1:9443" }
    "#;

    #[test]
    fn unknown_fields_and_wrong_relations_are_refused() {
        let parse = |text: &str| toml::from_str::<Config>(text).map_err(|error| error.to_string());
        assert!(parse(GOOD).unwrap().validate().is_ok());
        assert!(parse(&format!("{GOOD}\nlisten = 3")).unwrap_err().contains("listen"));
        assert!(parse(&GOOD.replace("eu-1.brokers.example", "10.0.0.1")).unwrap().validate().is_err());
        assert!(parse(&GOOD.replace("127.0.0.1:443\"", "127.0.0.1:0\"")).unwrap().validate().is_err());
        assert!(parse(&GOOD.replace("127.0.0.1:8443\"", "127.0.0.1:8443\", key = \"k\"")).unwrap().validate().is_err());
    }
}
