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
use tonic::transport::{Channel, Endpoint};
use tower::service_fn;

/// One connection to `address`, made when it is used and again when it broke.
pub fn channel(address: SocketAddr, tls: &Arc<ClientConfig>) -> Channel {
    let tls = tls.clone();
    let connector = service_fn(move |_| {
        let tls = tls.clone();
        async move {
            let tcp = TcpStream::connect(address).await?;
            tcp.set_nodelay(true)?;
            let stream = TlsConnector::from(tls).connect(ServerName::from(address.ip()), tcp).await?;
            Ok::<_, io::Error>(TokioIo::new(stream))
        }
    });
    // TLS is ours; the address is the connector's.
    Endpoint::from_static("http://endpoint")
        .connect_timeout(Duration::from_secs(3))
        .initial_stream_window_size(4 << 20)
        .initial_connection_window_size(16 << 20)
        .connect_with_connector_lazy(connector)
}
