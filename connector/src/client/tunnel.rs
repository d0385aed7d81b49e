use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use selvedge_proto::frame::{FRAME_BYTES_MAX, Frame, SessionCode};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;

use crate::dial;

/// One session's bytes, end to end. Dropped before its end was reached in order, it resets the session.
///
/// The connector's `Started` is read with the first bytes, so that the first question need not wait for it.
#[derive(Debug)]
pub struct Tunnel {
    hop: TlsStream<TcpStream>,
    session: u128,
    opening: Opening,
    wrote_end: bool,
    read_end: bool,
}

#[derive(Debug)]
enum Opening {
    /// The connector's first frame, as far as it came.
    Awaited(Vec<u8>),
    Started,
}

impl Tunnel {
    pub(super) fn new(hop: TlsStream<TcpStream>, session: u128) -> Self {
        Self { hop, session, opening: Opening::Awaited(Vec::new()), wrote_end: false, read_end: false }
    }

    /// The session's id.
    pub fn session(&self) -> u128 {
        self.session
    }

    /// Reads exactly the connector's first frame.
    fn poll_started(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Opening::Awaited(frame) = &mut self.opening else { return Poll::Ready(Ok(())) };
        loop {
            let wanted = match frame.first_chunk::<2>() {
                None => 2,
                Some(prefix) => 2 + usize::from(u16::from_be_bytes(*prefix)),
            };
            if wanted > 2 + FRAME_BYTES_MAX {
                return Poll::Ready(Err(invalid("the connector's first frame is too long")));
            }
            if frame.len() == wanted && wanted > 2 {
                break;
            }
            let mut piece = [0; 256];
            let missing = (wanted - frame.len()).clamp(1, piece.len());
            let mut buffer = ReadBuf::new(&mut piece[..missing]);
            ready!(Pin::new(&mut self.hop).poll_read(cx, &mut buffer))?;
            if buffer.filled().is_empty() {
                return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
            }
            frame.extend_from_slice(buffer.filled());
        }
        let outcome = match Frame::decode(&frame[2..]) {
            Ok(Frame::Started(started)) if started.session == self.session => Ok(()),
            Ok(Frame::Failed { code }) => Err(failed(code)),
            _ => Err(invalid("the connector's first frame is not `Started` of this session")),
        };
        self.opening = Opening::Started;
        Poll::Ready(outcome)
    }
}

impl AsyncRead for Tunnel {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_started(cx))?;
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.hop).poll_read(cx, buffer))?;
        if buffer.filled().len() == before && buffer.remaining() > 0 {
            self.read_end = true;
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Tunnel {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.hop).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.hop).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(Pin::new(&mut self.hop).poll_shutdown(cx))?;
        self.wrote_end = true;
        Poll::Ready(Ok(()))
    }
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        if !(self.wrote_end && self.read_end) {
            dial::reset_on_close(self.hop.get_ref().0);
        }
    }
}

fn failed(code: SessionCode) -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionAborted, format!("the connector said `{code}`"))
}

fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}
