//! How brokers reach each other: connections whose other end has proven who it is.

use std::io;
use std::net::TcpListener as StdListener;
use std::sync::Arc;

use futures::future::BoxFuture;
use parking_lot::Mutex;
use rustls_pki_types::ServerName;
use selvedge_proto::identity::Peer as PeerIdentity;
use selvedge_proto::tls;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector};

/// The bytes of a connection.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

/// A connection whose other end has proven who it is.
pub struct Link {
    /// Its bytes.
    pub stream: Box<dyn Stream>,
    /// The other end.
    pub peer: PeerIdentity,
}

/// An accepted connection, until its other end has proven who it is.
pub type Handshake = BoxFuture<'static, io::Result<Link>>;

/// Takes connections.
#[tonic::async_trait]
pub trait Listener: Send + 'static {
    /// The next connection; it has proven nothing yet.
    ///
    /// **Cancel safety**: no connection is lost.
    async fn accept(&mut self) -> io::Result<Handshake>;
}

/// Makes and takes connections between brokers. [`Tls`] in a real cluster.
#[tonic::async_trait]
pub trait Transport: Send + Sync + 'static {
    /// Begins to listen; called once, on the runtime that serves.
    async fn listen(&self) -> io::Result<Box<dyn Listener>>;

    /// Dials an address; the answer says who is there.
    async fn connect(&self, address: &str) -> io::Result<Link>;
}

/// Mutual TLS over TCP.
pub struct Tls {
    listener: Mutex<Option<StdListener>>,
    server: Arc<rustls::ServerConfig>,
    client: Arc<rustls::ClientConfig>,
}

impl Tls {
    /// Over a bound socket, with `selvedge_proto::tls::peer_server` and `peer_client`; the latter accepts any broker:
    /// which one it is, is compared after each handshake.
    pub fn shared(
        listener: StdListener,
        server: Arc<rustls::ServerConfig>,
        client: Arc<rustls::ClientConfig>,
    ) -> Arc<dyn Transport> {
        Arc::new(Self { listener: Mutex::new(Some(listener)), server, client })
    }
}

#[tonic::async_trait]
impl Transport for Tls {
    async fn listen(&self) -> io::Result<Box<dyn Listener>> {
        let listener = self.listener.lock().take();
        let listener = listener.ok_or_else(|| io::Error::other("the peer listener is in use already"))?;
        listener.set_nonblocking(true)?;
        let tcp = TcpListener::from_std(listener)?;
        Ok(Box::new(TlsListener { tcp, acceptor: TlsAcceptor::from(self.server.clone()) }))
    }

    async fn connect(&self, address: &str) -> io::Result<Link> {
        connect(&self.client, address).await
    }
}

/// Dials and listens nowhere.
pub(crate) struct DialOnly(pub(crate) Arc<rustls::ClientConfig>);

#[tonic::async_trait]
impl Transport for DialOnly {
    async fn listen(&self) -> io::Result<Box<dyn Listener>> {
        Err(io::ErrorKind::Unsupported.into())
    }

    async fn connect(&self, address: &str) -> io::Result<Link> {
        connect(&self.0, address).await
    }
}

async fn connect(client: &Arc<rustls::ClientConfig>, address: &str) -> io::Result<Link> {
    let tcp = TcpStream::connect(address).await?;
    tcp.set_nodelay(true)?;
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host).trim_matches(['[', ']']);
    let name =
        ServerName::try_from(host.to_owned()).map_err(|_| io::Error::other(format!("`{host}` is not a host name")))?;
    let stream = TlsConnector::from(client.clone()).connect(name, tcp).await?;
    let peer = tls::peer_of(stream.get_ref().1).map_err(io::Error::other)?;
    Ok(Link { stream: Box::new(stream), peer })
}

struct TlsListener {
    tcp: TcpListener,
    acceptor: TlsAcceptor,
}

#[tonic::async_trait]
impl Listener for TlsListener {
    async fn accept(&mut self) -> io::Result<Handshake> {
        let (tcp, _) = self.tcp.accept().await?;
        let acceptor = self.acceptor.clone();
        Ok(Box::pin(async move {
            tcp.set_nodelay(true)?;
            let stream = acceptor.accept(tcp).await?;
            let peer = tls::peer_of(stream.get_ref().1).map_err(io::Error::other)?;
            Ok(Link { stream: Box::new(stream), peer })
        }))
    }
}
