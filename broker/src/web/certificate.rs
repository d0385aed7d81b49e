//! The web listener's certificate: the operator's files, or one signed by the issuer until there are any.
//!
//! Who knows the listener by the pin of the issuer (enrolment, late renewal, the command line) is shown this broker's
//! own certificate when there are files: the operator's is not the issuer's.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use rustls::ServerConfig;
use rustls_pki_types::CertificateDer;
use selvedge_proto::tls::{self, Identity, Renewable, TimeSource};

use super::metrics::{CERTIFICATE_LEFT_SECONDS, CERTIFICATE_LOADS_TOTAL};
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

/// Where certificates come from.
enum Source {
    Files { files: Files, seen: Option<[SystemTime; 2]> },
    Issuer { renew_at_ms: u64 },
}

/// Signs certificates when there are no files.
struct Signer {
    issuer: Arc<Issuer>,
    hosts: Vec<String>,
    time: TimeSource,
}

/// The TLS configuration in use, renewed when the files change or the issuer's certificate grows old.
pub struct Certificates {
    current: ArcSwap<ServerConfig>,
    source: Mutex<Source>,
    signer: Option<Signer>,
    own: Renewable,
    /// What is shown now.
    shown: Mutex<Shown>,
}

/// A certificate chain.
#[derive(Clone, PartialEq, Eq)]
struct Shown {
    chain: Vec<CertificateDer<'static>>,
    /// When it ends; 0 when that cannot be read.
    end_ms: u64,
}

/// A certificate that was loaded and is not in use yet.
pub struct Prepared {
    source: Source,
    config: ServerConfig,
    shown: Shown,
}

impl Certificates {
    /// Uses the operator's files, or without them has the issuer sign one for `hosts`.
    ///
    /// **Errors**: see [`Error`].
    pub fn new(
        files: Option<Files>,
        issuer: Option<Arc<Issuer>>,
        hosts: Vec<String>,
        own: Renewable,
        time: TimeSource,
    ) -> Result<Self, Error> {
        let signer = issuer.map(|issuer| Signer { issuer, hosts, time });
        let Prepared { source, config, shown } = load(files, signer.as_ref(), &own)?;
        let current = ArcSwap::from_pointee(config);
        Ok(Self { current, source: Mutex::new(source), signer, own, shown: Mutex::new(shown) })
    }

    /// Loads the operator's files, or without them has the issuer sign, and changes nothing yet.
    ///
    /// **Errors**: see [`Error`].
    pub fn prepare(&self, files: Option<Files>) -> Result<Option<Prepared>, Error> {
        // What the issuer signed is good until it is due.
        let stays = files.is_none() && matches!(*self.source.lock(), Source::Issuer { .. });
        if stays { Ok(None) } else { load(files, self.signer.as_ref(), &self.own).map(Some) }
    }

    /// Shows what was prepared from now on; whether that is another certificate.
    pub fn take(&self, prepared: Option<Prepared>) -> bool {
        let Some(Prepared { source, config, shown }) = prepared else { return false };
        *self.source.lock() = source;
        let is_new = std::mem::replace(&mut *self.shown.lock(), shown.clone()) != shown;
        if is_new {
            self.current.store(Arc::new(config));
        }
        is_new
    }

    /// What the next connection is accepted with.
    pub(super) fn current(&self) -> Arc<ServerConfig> {
        self.current.load_full()
    }

    /// Looks whether there is a newer certificate, and takes it. One that cannot be used leaves the old one in place.
    pub(super) fn refresh(&self) {
        let end_ms = self.shown.lock().end_ms;
        ::metrics::gauge!(CERTIFICATE_LEFT_SECONDS).set((end_ms as f64 - (tls::system_time())() as f64) / 1_000.0);
        let Some(files) = self.due() else { return };
        let outcome = match load(files, self.signer.as_ref(), &self.own) {
            Ok(prepared) => {
                self.take(Some(prepared));
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

    /// The files to load, if any, when it is time to load again.
    fn due(&self) -> Option<Option<Files>> {
        match &mut *self.source.lock() {
            Source::Files { files, seen } => {
                let now = modified(files).filter(|now| *seen != Some(*now))?;
                *seen = Some(now);
                Some(Some(files.clone()))
            }
            Source::Issuer { renew_at_ms } => {
                let signer = self.signer.as_ref()?;
                ((signer.time)() >= *renew_at_ms).then_some(None)
            }
        }
    }
}

fn load(files: Option<Files>, signer: Option<&Signer>, own: &Renewable) -> Result<Prepared, Error> {
    let (source, identity, pinned) = match (files, signer) {
        (Some(files), _) => {
            let seen = modified(&files);
            let identity = Identity::load_files(&files.certificate, &files.key)?;
            (Source::Files { files, seen }, identity, own.clone())
        }
        (None, Some(Signer { issuer, hosts, time })) => {
            let now_ms = time();
            let identity = issuer.issue_web(hosts, now_ms)?;
            let pinned = Renewable::new(identity.clone());
            (Source::Issuer { renew_at_ms: now_ms + issuer::BROKER_LIFETIME_MS / 3 }, identity, pinned)
        }
        (None, None) => return Err(Error::None),
    };
    let end_ms = identity.validity_ms().map_or(0, |(_, end_ms)| end_ms);
    let shown = Shown { chain: identity.chain().to_vec(), end_ms };
    Ok(Prepared { source, config: tls::web_server(&identity, &pinned)?, shown })
}

fn modified(files: &Files) -> Option<[SystemTime; 2]> {
    let of = |path| std::fs::metadata(path).and_then(|metadata| metadata.modified()).ok();
    Some([of(&files.certificate)?, of(&files.key)?])
}
