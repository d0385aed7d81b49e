//! One request to a web listener that is known by a pin: enrolment and renewal begin so, when there is no identity yet
//! or none that is good any more.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::{BodyExt as _, Full, Limited};
use hyper_util::rt::TokioIo;
use rustls_pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::identity::Pin;
use crate::tls::{self, TimeSource};

/// Bytes of the longest answer that is read.
pub const ANSWER_BYTES_MAX: usize = 1024 * 1024;
/// For connecting, asking and reading.
pub const TIMEOUT: Duration = Duration::from_secs(30);

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The address is not `host:port`.
    #[error("`{0}` is not `host:port`")]
    Address(String),
    /// The web listener could not be reached.
    #[error("cannot reach `{address}`: {source}")]
    Unreachable {
        /// Where.
        address: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// It did not answer.
    #[error("`{0}` did not answer in time; asking again is safe")]
    TimedOut(String),
    /// The listener's key is not the pinned one.
    #[error("`{address}` is not the cluster that the pin names: {source}")]
    WrongCluster {
        /// Where.
        address: String,
        /// What TLS said.
        #[source]
        source: io::Error,
    },
    /// TLS cannot be spoken.
    #[error("tls")]
    Tls(#[from] tls::Error),
    /// The HTTP exchange broke.
    #[error("the exchange with `{address}` failed; asking again is safe: {reason}")]
    Exchange {
        /// Where.
        address: String,
        /// What happened.
        reason: String,
    },
}

/// Posts a JSON body to `path` of the web listener at `web` (`host:port`); answers status and body. The body is sent
/// only to a listener that proved the pinned key.
///
/// **Errors**: any but an answer, whatever its status.
pub async fn post(web: &str, pin: Pin, time: &TimeSource, path: &str, json: &str) -> Result<(u16, Vec<u8>), Error> {
    let exchange = tokio::time::timeout(TIMEOUT, exchange(web, pin, time, path, json));
    exchange.await.map_err(|_| Error::TimedOut(web.to_owned()))?
}

async fn exchange(web: &str, pin: Pin, time: &TimeSource, path: &str, json: &str) -> Result<(u16, Vec<u8>), Error> {
    let host = web.rsplit_once(':').map(|(host, _)| host).filter(|host| !host.is_empty());
    let host = host.ok_or_else(|| Error::Address(web.to_owned()))?.trim_matches(['[', ']']);
    let server = ServerName::try_from(host.to_owned()).map_err(|_| Error::Address(web.to_owned()))?;
    let stream =
        TcpStream::connect(web).await.map_err(|source| Error::Unreachable { address: web.to_owned(), source })?;
    let stream = TlsConnector::from(Arc::new(tls::pinned_web_client(pin, time)?))
        .connect(server, stream)
        .await
        .map_err(|source| Error::WrongCluster { address: web.to_owned(), source })?;

    let failed = |reason: String| Error::Exchange { address: web.to_owned(), reason };
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|error| failed(error.to_string()))?;
    let connection = tokio::spawn(connection);
    let request = http::Request::post(path)
        .header(http::header::HOST, web)
        .header(http::header::CONTENT_TYPE, "application/json")
        .body(Full::new(bytes::Bytes::copy_from_slice(json.as_bytes())))
        .map_err(|error| failed(error.to_string()))?;
    let response = sender.send_request(request).await.map_err(|error| failed(error.to_string()))?;
    let status = response.status().as_u16();
    let bytes = Limited::new(response.into_body(), ANSWER_BYTES_MAX)
        .collect()
        .await
        .map_err(|error| failed(error.to_string()))?
        .to_bytes();
    connection.abort();
    Ok((status, bytes.to_vec()))
}
