//! A control connection: the bytes that were read already, then the socket; and who is at its other end.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Buf, Bytes};
use selvedge_domain::Id;
use selvedge_proto::identity::Peer;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::transport::server::Connected;

/// A socket whose first bytes were read by someone else.
pub(super) struct Replayed {
    first: Bytes,
    socket: TcpStream,
}

impl Replayed {
    pub(super) fn new(first: Bytes, socket: TcpStream) -> Self {
        Self { first, socket }
    }
}

impl AsyncRead for Replayed {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.first.is_empty() {
            return Pin::new(&mut self.socket).poll_read(cx, buf);
        }
        let len = self.first.len().min(buf.remaining());
        buf.put_slice(&self.first[..len]);
        self.first.advance(len);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Replayed {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}

/// Who is at the other end of a control connection, as its certificate and the state said after the handshake.
#[derive(Clone)]
pub(super) struct Attached {
    pub(super) peer: Peer,
    pub(super) subject: Id,
    pub(super) source: SocketAddr,
    /// Cancelled, the connection is closed.
    pub(super) connection: CancellationToken,
}

/// A control connection after its handshake.
pub(super) struct EdgeStream {
    tls: TlsStream<Replayed>,
    attached: Attached,
    closed: Pin<Box<WaitForCancellationFutureOwned>>,
}

impl EdgeStream {
    pub(super) fn new(tls: TlsStream<Replayed>, attached: Attached) -> Self {
        let closed = Box::pin(attached.connection.clone().cancelled_owned());
        Self { tls, attached, closed }
    }
}

impl Drop for EdgeStream {
    fn drop(&mut self) {
        self.attached.connection.cancel();
    }
}

impl Connected for EdgeStream {
    type ConnectInfo = Attached;

    fn connect_info(&self) -> Attached {
        self.attached.clone()
    }
}

impl AsyncRead for EdgeStream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.closed.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        Pin::new(&mut self.tls).poll_read(cx, buf)
    }
}

impl AsyncWrite for EdgeStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tls).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tls).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tls).poll_shutdown(cx)
    }
}
