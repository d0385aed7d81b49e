//! Connections of the load generator: HTTP/2 over mutual TLS, the same for both.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::transport::{Channel, Endpoint};
use tower::service_fn;

/// HTTP/2 window of one stream, bytes.
pub const STREAM_WINDOW_BYTES: u32 = 4 << 20;
/// HTTP/2 window of a connection, bytes.
pub const CONNECTION_WINDOW_BYTES: u32 = 16 << 20;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// A connection to `address`.
pub async fn connect(address: SocketAddr, tls: &Arc<ClientConfig>) -> io::Result<TlsStream<TcpStream>> {
    let connecting = async {
        let tcp = TcpStream::connect(address).await?;
        tcp.set_nodelay(true)?;
        TlsConnector::from(tls.clone()).connect(ServerName::from(address.ip()), tcp).await
    };
    tokio::time::timeout(CONNECT_TIMEOUT, connecting).await?
}

/// The same for generated clients, whose streams last.
pub fn channel(address: SocketAddr, tls: &Arc<ClientConfig>) -> Channel {
    let tls = tls.clone();
    let connector = service_fn(move |_| {
        let tls = tls.clone();
        async move { connect(address, &tls).await.map(TokioIo::new) }
    });
    // TLS is ours; the address is the connector's.
    Endpoint::from_static("http://endpoint")
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .connect_with_connector_lazy(connector)
}
