//! The network of simulated machines: turmoil's TCP under the real RPC code, each HTTP/2 frame recorded.
//!
//! Who dials is said in the first bytes, where TLS would prove it: TLS draws randomness that no seed reaches.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use parking_lot::Mutex;
use selvedge_cluster::{Handshake, Link, Listener, Transport, broker_id};
use selvedge_proto::identity::Peer;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use turmoil::net::{TcpListener, TcpStream};

use super::world::World;

pub(super) const PORT: u16 = 7000;
pub(super) const TRUST_DOMAIN: &str = "corp.example";

pub(super) fn host(node: u64) -> String {
    format!("b{node}")
}

pub(super) fn address(node: u64) -> String {
    format!("b{node}:{PORT}")
}

/// One machine's network.
pub(super) struct SimNetwork {
    pub(super) world: World,
    pub(super) node: u64,
}

impl SimNetwork {
    fn link(world: &World, node: u64, other: u64, socket: Socket, dialled: bool) -> io::Result<Link> {
        let id = broker_id(TRUST_DOMAIN, other).map_err(io::Error::other)?;
        let peer = Peer { id, serial: other.to_string(), spki_sha256: [0; 32], not_after_ms: u64::MAX };
        let number = socket.number;
        let name = format!("{}{}{} #{number}", host(node), if dialled { "->" } else { "<-" }, host(other));
        let stream = Recorded {
            socket,
            // A server's response headers name the hour, which is not virtual.
            sent: Frames::new(format!("{name} sent"), if dialled { PREFACE_BYTES } else { 0 }, !dialled),
            received: Frames::new(format!("{name} received"), if dialled { 0 } else { PREFACE_BYTES }, dialled),
            world: world.clone(),
        };
        Ok(Link { stream: Box::new(stream), peer })
    }
}

async fn say_and_hear(tcp: &mut Socket, node: u64) -> io::Result<u64> {
    tcp.write_all(&node.to_be_bytes()).await?;
    tcp.read_u64().await
}

#[tonic::async_trait]
impl Transport for SimNetwork {
    async fn listen(&self) -> io::Result<Box<dyn Listener>> {
        let tcp = TcpListener::bind(("0.0.0.0", PORT)).await?;
        Ok(Box::new(SimListener { tcp, world: self.world.clone(), node: self.node }))
    }

    async fn connect(&self, address: &str) -> io::Result<Link> {
        let mut socket = Socket::new(&self.world, self.node, TcpStream::connect(address).await?);
        let other = say_and_hear(&mut socket, self.node).await?;
        Self::link(&self.world, self.node, other, socket, true)
    }
}

struct SimListener {
    tcp: TcpListener,
    world: World,
    node: u64,
}

#[tonic::async_trait]
impl Listener for SimListener {
    async fn accept(&mut self) -> io::Result<Handshake> {
        let (tcp, _) = self.tcp.accept().await?;
        let (world, node) = (self.world.clone(), self.node);
        let mut socket = Socket::new(&world, node, tcp);
        Ok(Box::pin(async move {
            let other = say_and_hear(&mut socket, node).await?;
            SimNetwork::link(&world, node, other, socket, false)
        }))
    }
}

/// A connection, until the machine closes it.
pub(super) type Held = Arc<Mutex<Option<TcpStream>>>;

/// A connection that its machine can close when the process dies. Tokio drops the tasks of a runtime in an order that
/// follows from a counter of the whole process: what they sent by being dropped would come from no seed.
struct Socket {
    number: u64,
    tcp: Held,
}

impl Socket {
    fn new(world: &World, node: u64, tcp: TcpStream) -> Self {
        let tcp = Arc::new(Mutex::new(Some(tcp)));
        Self { number: world.opened(node, &tcp), tcp }
    }

    fn poll<T>(&self, poll: impl FnOnce(Pin<&mut TcpStream>) -> Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        match self.tcp.lock().as_mut() {
            Some(tcp) => poll(Pin::new(tcp)),
            None => Poll::Ready(Err(io::ErrorKind::ConnectionReset.into())),
        }
    }
}

impl AsyncRead for Socket {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.poll(|tcp| tcp.poll_read(cx, buf))
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.poll(|tcp| tcp.poll_write(cx, buf))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll(|tcp| tcp.poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll(|tcp| tcp.poll_shutdown(cx))
    }
}

/// A connection whose frames are written into the trace.
struct Recorded {
    socket: Socket,
    sent: Frames,
    received: Frames,
    world: World,
}

impl AsyncRead for Recorded {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let this = &mut *self;
        let polled = Pin::new(&mut this.socket).poll_read(cx, buf);
        if let Poll::Ready(Ok(())) = polled {
            this.received.take(&buf.filled()[before..], &this.world);
        }
        polled
    }
}

impl AsyncWrite for Recorded {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        let polled = Pin::new(&mut this.socket).poll_write(cx, buf);
        if let Poll::Ready(Ok(written)) = polled {
            this.sent.take(&buf[..written], &this.world);
        }
        polled
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}

const PREFACE_BYTES: usize = 24;
const HEAD_BYTES: usize = 9;
const HEADERS: u8 = 1;
const CONTINUATION: u8 = 9;

/// Follows the HTTP/2 frames of one direction.
struct Frames {
    name: String,
    skip: usize,
    /// The content of header frames is left out.
    dated: bool,
    head: Vec<u8>,
    left: usize,
    digest: Digest,
}

impl Frames {
    fn new(name: String, skip: usize, dated: bool) -> Self {
        Self { name, skip, dated, head: Vec::with_capacity(HEAD_BYTES), left: 0, digest: Digest::default() }
    }

    fn take(&mut self, mut bytes: &[u8], world: &World) {
        let skipped = self.skip.min(bytes.len());
        self.skip -= skipped;
        bytes = &bytes[skipped..];
        while !bytes.is_empty() {
            if self.head.len() < HEAD_BYTES {
                let taken = (HEAD_BYTES - self.head.len()).min(bytes.len());
                self.head.extend_from_slice(&bytes[..taken]);
                bytes = &bytes[taken..];
                if self.head.len() < HEAD_BYTES {
                    return;
                }
                self.left = u32::from_be_bytes([0, self.head[0], self.head[1], self.head[2]]) as usize;
                self.digest = Digest::default();
            } else {
                let taken = self.left.min(bytes.len());
                self.digest.update(&bytes[..taken]);
                self.left -= taken;
                bytes = &bytes[taken..];
            }
            if self.left == 0 {
                self.record(world);
                self.head.clear();
            }
        }
    }

    fn record(&self, world: &World) {
        let (kind, flags) = (self.head[3], self.head[4]);
        let stream = u32::from_be_bytes([self.head[5], self.head[6], self.head[7], self.head[8]]);
        let name = &self.name;
        if self.dated && matches!(kind, HEADERS | CONTINUATION) {
            world.trace(format_args!("{name} frame {kind} flags {flags} stream {stream}"));
        } else {
            let (length, digest) = (self.digest.length, self.digest.value);
            world.trace(format_args!(
                "{name} frame {kind} flags {flags} stream {stream} length {length} content {digest:016x}"
            ));
        }
    }
}

/// Tells contents apart; FNV-1a.
pub(super) struct Digest {
    value: u64,
    length: usize,
}

impl Default for Digest {
    fn default() -> Self {
        Self { value: 0xcbf2_9ce4_8422_2325, length: 0 }
    }
}

impl Digest {
    fn update(&mut self, bytes: &[u8]) {
        self.length += bytes.len();
        for byte in bytes {
            self.value = (self.value ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
}

pub(super) fn digest(bytes: &[u8]) -> u64 {
    let mut digest = Digest::default();
    digest.update(bytes);
    digest.value
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_recorded_whole_however_they_are_cut() {
        let frame = |kind: u8, content: &[u8]| {
            let mut bytes = vec![0, 0, content.len() as u8, kind, 4, 0, 0, 0, 7];
            bytes.extend_from_slice(content);
            bytes
        };
        let all = [vec![b'P'; PREFACE_BYTES], frame(0, b"hello"), frame(HEADERS, b"date"), frame(6, b"")].concat();
        let traces = [1, 2, 10, all.len()].map(|cut| {
            let world = World::new(1, 3, super::super::Bug::None);
            let mut frames = Frames::new("x".to_owned(), PREFACE_BYTES, true);
            all.chunks(cut).for_each(|chunk| frames.take(chunk, &world));
            world.take_trace()
        });
        assert_eq!(traces[0].lines().count(), 3, "{}", traces[0]);
        assert!(traces[0].contains("stream 7 length 5"), "{}", traces[0]);
        assert!(!traces[0].contains("length 4"), "the content of dated headers is left out: {}", traces[0]);
        assert!(traces.iter().all(|trace| *trace == traces[0]));
    }
}
