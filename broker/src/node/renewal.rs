//! This broker's own certificate: a new one with a new key after a third of its life, shown from the next handshake on.
//!
//! A broker that is an issuer signs for itself; another asks an issuer at its web listener, as an end does whose
//! certificate has ended. One that slept for longer than its certificate is renewed before anything else: no other
//! broker takes what it shows until then.
//!
//! **Invariant:** the file is replaced before the new certificate is shown.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use metrics::{counter, describe_counter, describe_gauge, gauge};
use selvedge_cluster::{Cluster, ProposeError};
use selvedge_domain::command::{CertificateIssued, Subject};
use selvedge_domain::rows::{Broker, BrokerRole, Certificate};
use selvedge_domain::{Asker, Body, RejectedCode};
use selvedge_proto::https;
use selvedge_proto::identity::{self, Anchors, Kind};
use selvedge_proto::renewal::{self, Renewed};
use selvedge_proto::tls::{self, Identity, Renewable, TimeSource};
use tokio_util::sync::CancellationToken;

use crate::issuer::{self, Issuer};

/// Seconds until the end of the certificate that this broker shows; negative when it has ended.
pub const CERTIFICATE_LEFT_SECONDS: &str = "selvedge_broker_certificate_left_seconds";
/// Renewals of this broker's certificate, by outcome (`done`, `failed`).
pub const CERTIFICATE_RENEWALS_TOTAL: &str = "selvedge_broker_certificate_renewals_total";

const CHECK_INTERVAL: Duration = Duration::from_secs(1);
const RETRY_INTERVAL: Duration = Duration::from_secs(10);
/// Code of a broker whose certificate has ended and could not be renewed.
const ENDED: &str = "SE0401";

/// Why there is no new certificate.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("issuer")]
    Issuer(#[from] issuer::Error),
    #[error("tls")]
    Tls(#[from] tls::Error),
    #[error("identity")]
    Identity(#[from] identity::Error),
    #[error("the log did not take it: {0}")]
    Propose(#[from] ProposeError),
    #[error("{0}")]
    Asked(String),
}

/// Renews one broker's certificate.
pub(super) struct Renewal {
    pub cluster: Cluster,
    pub issuer: Option<Arc<Issuer>>,
    pub anchors: Arc<Anchors>,
    /// What this broker shows.
    pub own: Renewable,
    /// Where it is kept.
    pub path: PathBuf,
    /// Host name that stands in the certificate.
    pub host: String,
    pub time: TimeSource,
}

impl Renewal {
    /// Looks after the certificate until `stop`.
    pub async fn run(self, stop: CancellationToken) {
        describe_gauge!(CERTIFICATE_LEFT_SECONDS, "seconds until the end of this broker's certificate");
        describe_counter!(CERTIFICATE_RENEWALS_TOTAL, "renewals of this broker's certificate, by outcome");
        loop {
            let wait = match self.step().await {
                Ok(()) => CHECK_INTERVAL,
                Err(error) => {
                    self.failed(&error);
                    RETRY_INTERVAL
                }
            };
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    fn failed(&self, error: &Error) {
        counter!(CERTIFICATE_RENEWALS_TOTAL, "outcome" => "failed").increment(1);
        let error = error as &dyn std::error::Error;
        if self.left_ms().is_ok_and(|left_ms| left_ms <= 0) {
            tracing::error!(code = ENDED, error, "the certificate of this broker has ended and was not renewed");
        } else {
            tracing::warn!(error, "the certificate of this broker was not renewed; trying again");
        }
    }

    fn left_ms(&self) -> Result<i64, identity::Error> {
        let (_, end_ms) = self.own.now().validity_ms()?;
        Ok(end_ms.cast_signed() - (self.time)().cast_signed())
    }

    async fn step(&self) -> Result<(), Error> {
        let left_ms = self.left_ms()?;
        gauge!(CERTIFICATE_LEFT_SECONDS).set(left_ms as f64 / 1_000.0);
        let (begin_ms, _) = self.own.now().validity_ms()?;
        // One that begins later was made while this machine's clock was wrong, at its start.
        if (begin_ms..self.own.now().renewal_due_ms()?).contains(&(self.time)()) {
            return self.record().await;
        }
        let (key, csr) = tls::new_key_and_csr()?;
        let chain_pem = match &self.issuer {
            Some(issuer) => self.sign(issuer, &csr, left_ms > 0).await?,
            None => self.ask(csr).await?,
        };
        let new = Identity::from_pem(&format!("{chain_pem}{}", *key))?;
        // This machine's clock may be behind until a leader has been heard.
        let (begin_ms, _) = new.validity_ms()?;
        identity::peer(new.chain(), &self.anchors, &[Kind::Broker], begin_ms.max((self.time)()))?;
        let (path, file) = (self.path.clone(), new.clone());
        let saved = tokio::task::spawn_blocking(move || file.save(&path)).await;
        saved.map_err(|error| Error::Asked(error.to_string()))??;
        self.own.replace(new);
        counter!(CERTIFICATE_RENEWALS_TOTAL, "outcome" => "done").increment(1);
        tracing::info!("the certificate of this broker was renewed");
        self.record().await
    }

    /// The log learns of it first, except when no other broker would take what this one shows.
    async fn sign(&self, issuer: &Issuer, csr: &[u8], log_first: bool) -> Result<String, Error> {
        let node = self.cluster.node();
        let hosts = std::slice::from_ref(&self.host);
        let issued = issuer.issue_broker(&node.to_string(), hosts, csr, (self.time)())?;
        if log_first {
            self.cluster.propose(Asker::BROKER, issued.command(Subject::Broker(node)), None).await?;
        }
        Ok(issued.chain_pem)
    }

    async fn ask(&self, csr: Vec<u8>) -> Result<String, Error> {
        let request = renewal::Renewal::new(&self.own.now(), csr)?;
        let body = serde_json::to_string(&request).map_err(|error| Error::Asked(error.to_string()))?;
        let state = self.cluster.state();
        let others = state.rows::<Broker>().filter(|broker| !broker.removed && broker.node != self.cluster.node());
        let mut why = "no other broker is an issuer".to_owned();
        for issuer in others.filter(|broker| broker.has(BrokerRole::Issuer) && !broker.web.is_empty()) {
            match https::post(&issuer.web, self.anchors.pin(), &self.time, renewal::PATH, &body).await {
                Ok((201, answer)) => match serde_json::from_slice::<Renewed>(&answer) {
                    Ok(renewed) => return Ok(renewed.chain_pem),
                    Err(error) => why = format!("`{}`: {error}", issuer.name),
                },
                Ok((status, answer)) => {
                    why = format!("`{}` refused ({status}): {}", issuer.name, String::from_utf8_lossy(&answer));
                }
                Err(error) => why = format!("`{}`: {error}", issuer.name),
            }
        }
        Err(Error::Asked(why))
    }

    /// Lets the log know of a certificate that this broker signed for itself when it could not: before there was a
    /// cluster, or after the one before had ended.
    async fn record(&self) -> Result<(), Error> {
        let (node, state) = (self.cluster.node(), self.cluster.state());
        let peer = self.own.now().peer()?;
        let known = state.row::<Certificate>(peer.serial.as_bytes()).is_some();
        if self.issuer.is_none() || known || state.broker(node).is_none() {
            return Ok(());
        }
        let issued = CertificateIssued {
            serial: peer.serial,
            subject: peer.id.to_string(),
            key_sha256: peer.spki_sha256,
            not_after_ms: peer.not_after_ms,
            of: Subject::Broker(node),
        };
        match self.cluster.propose(Asker::BROKER, Body::CertificateIssued(issued), None).await {
            // It is there, and this broker was behind.
            Err(ProposeError::Refused(refused)) if refused.code == RejectedCode::Conflict => Ok(()),
            other => Ok(other.map(drop)?),
        }
    }
}
