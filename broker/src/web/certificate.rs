//! The web listener's certificate: the operator's files, or one signed by the issuer until there are any.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use rustls::ServerConfig;
use selvedge_proto::tls::{self, Identity, TimeSource};

use super::metrics::CERTIFICATE_LOADS_TOTAL;
use crate::issuer::{self, Issuer};

/// How often the files are looked at.
pub(super) const CHECK_INTERVAL: Duration = Duration::from_secs(10);

/// The operator's certificate chain and key.
#[derive(Clone, Debug)]
pub struct Files {
    /// PEM of the chain, leaf first.
    pub certificate: PathBuf,
    /// PEM of the key.
    pub key: PathBuf,
}

/// There is no certificate to listen with.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The files cannot be used.
    #[error("the web certificate")]
    Files(#[from] tls::Error),
    /// The issuer cannot sign one.
    #[error("a web certificate of the issuer")]
    Issuer(#[from] issuer::Error),
    /// There are no files and this broker is no issuer.
    #[error("this broker is no issuer: its web listener needs `certificate` and `key`")]
    None,
}

enum Source {
    Files { files: Files, seen: Mutex<Option<[SystemTime; 2]>> },
    Issuer { issuer: Arc<Issuer>, hosts: Vec<String>, time: TimeSource, renew_at_ms: Mutex<u64> },
}

/// The TLS configuration in use, renewed when the files change or the issuer's certificate grows old.
pub struct Certificates {
    current: ArcSwap<ServerConfig>,
    source: Source,
}

impl Certificates {
    /// Uses the operator's files, or without them has the issuer sign one for `hosts`.
    ///
    /// **Errors**: see [`Error`].
    pub fn new(
        files: Option<Files>,
        issuer: Option<Arc<Issuer>>,
        hosts: Vec<String>,
        time: TimeSource,
    ) -> Result<Self, Error> {
        let source = match (files, issuer) {
            (Some(files), _) => Source::Files { seen: Mutex::new(modified(&files)), files },
            (None, Some(issuer)) => Source::Issuer { issuer, hosts, time, renew_at_ms: Mutex::new(0) },
            (None, None) => return Err(Error::None),
        };
        let current = ArcSwap::new(Arc::new(source.load()?));
        Ok(Self { current, source })
    }

    /// What the next connection is accepted with.
    pub(super) fn current(&self) -> Arc<ServerConfig> {
        self.current.load_full()
    }

    /// Looks whether there is a newer certificate, and takes it. One that cannot be used leaves the old one in place.
    pub(super) fn refresh(&self) {
        if !self.source.is_due() {
            return;
        }
        let outcome = match self.source.load() {
            Ok(config) => {
                self.current.store(Arc::new(config));
                tracing::info!("the web certificate was renewed");
                "loaded"
            }
            Err(error) => {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "the web certificate was not renewed; the old one stays"
                );
                "failed"
            }
        };
        ::metrics::counter!(CERTIFICATE_LOADS_TOTAL, "outcome" => outcome).increment(1);
    }
}

impl Source {
    fn is_due(&self) -> bool {
        match self {
            Self::Files { files, seen } => {
                let now = modified(files);
                let mut seen = seen.lock();
                let due = now.is_some() && *seen != now;
                *seen = now.or(*seen);
                due
            }
            Self::Issuer { time, renew_at_ms, .. } => time() >= *renew_at_ms.lock(),
        }
    }

    fn load(&self) -> Result<ServerConfig, Error> {
        let identity = match self {
            Self::Files { files, .. } => Identity::load_files(&files.certificate, &files.key)?,
            Self::Issuer { issuer, hosts, time, renew_at_ms } => {
                let now_ms = time();
                let identity = issuer.issue_web(hosts, now_ms)?;
                *renew_at_ms.lock() = now_ms + issuer::BROKER_LIFETIME_MS / 3;
                identity
            }
        };
        Ok(tls::web_server(&identity)?)
    }
}

fn modified(files: &Files) -> Option<[SystemTime; 2]> {
    let of = |path| std::fs::metadata(path).and_then(|metadata| metadata.modified()).ok();
    Some([of(&files.certificate)?, of(&files.key)?])
}
