//! A link between two places: a TCP proxy whose bytes arrive later by the distance, and that can be cut.
//!
//! A chunk carries the time at which it is due; the queue holds more than any link here can have in flight, so that
//! distance costs time and not throughput. A cut link swallows nothing and passes nothing: both directions stand still,
//! as packets do that are lost and sent again, and go on when it is mended.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Bytes under way in one direction of one connection, at most; the reader waits when there are more.
const IN_FLIGHT_BYTES_MAX: usize = 32 << 20;
/// Bytes read at once.
const CHUNK_BYTES_MAX: usize = 64 << 10;
/// Chunks under way in one direction of one connection, at most.
const IN_FLIGHT_CHUNKS_MAX: usize = 16 << 10;
/// After a failed accept.
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);

/// One link.
pub struct Link {
    listen: SocketAddr,
    cut: watch::Sender<bool>,
    bytes: Arc<AtomicU64>,
}

impl Link {
    /// Passes what comes to the listener on to `target`, each way `delay` later.
    pub fn start(listener: TcpListener, target: SocketAddr, delay: Duration) -> io::Result<Self> {
        let listen = listener.local_addr()?;
        let (cut, state) = watch::channel(false);
        let bytes = Arc::new(AtomicU64::new(0));
        let count = bytes.clone();
        tokio::spawn(async move {
            loop {
                match listener.accept().await {
                    Ok((socket, _)) => {
                        tokio::spawn(carry(socket, target, delay, state.clone(), count.clone()));
                    }
                    Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
                }
            }
        });
        Ok(Self { listen, cut, bytes })
    }

    /// Cuts or mends it.
    pub fn set_cut(&self, cut: bool) {
        self.cut.send_replace(cut);
    }

    /// Where to connect instead of the target.
    pub fn address(&self) -> SocketAddr {
        self.listen
    }

    /// Bytes passed on so far, both ways.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Nothing passes.
    pub fn is_cut(&self) -> bool {
        *self.cut.borrow()
    }
}

/// Waits until the link is whole.
async fn whole(cut: &mut watch::Receiver<bool>) {
    if cut.wait_for(|cut| !cut).await.is_err() {
        std::future::pending::<()>().await;
    }
}

async fn carry(
    near: TcpStream,
    target: SocketAddr,
    delay: Duration,
    mut cut: watch::Receiver<bool>,
    bytes: Arc<AtomicU64>,
) {
    // The three-way handshake of a real connection takes one round trip before the first byte can leave.
    let opened = Instant::now() + 2 * delay;
    whole(&mut cut).await;
    let Ok(far) = TcpStream::connect(target).await else {
        tokio::time::sleep_until(opened).await;
        reset_on_close(&near);
        return;
    };
    if near.set_nodelay(true).is_err() || far.set_nodelay(true).is_err() {
        return;
    }
    let reset = CancellationToken::new();
    let both = async {
        tokio::join!(
            direction(&near, &far, opened, delay, &cut, &reset, &bytes),
            direction(&far, &near, opened, delay, &cut, &reset, &bytes),
        )
    };
    tokio::select! {
        _ = both => {}
        () = reset.cancelled() => {
            reset_on_close(&near);
            reset_on_close(&far);
        }
    }
}

enum Chunk {
    Bytes(Bytes, OwnedSemaphorePermit),
    End,
    Reset,
}

async fn direction(
    from: &TcpStream,
    to: &TcpStream,
    not_before: Instant,
    delay: Duration,
    cut: &watch::Receiver<bool>,
    reset: &CancellationToken,
    count: &AtomicU64,
) {
    let (send, receive) = mpsc::channel(IN_FLIGHT_CHUNKS_MAX);
    tokio::join!(collect(from, send, not_before, delay, cut.clone()), deliver(to, receive, cut.clone(), reset, count));
}

async fn collect(
    from: &TcpStream,
    send: mpsc::Sender<(Instant, Chunk)>,
    not_before: Instant,
    delay: Duration,
    mut cut: watch::Receiver<bool>,
) {
    let room = Arc::new(Semaphore::new(IN_FLIGHT_BYTES_MAX));
    let mut buffer = vec![0; CHUNK_BYTES_MAX];
    loop {
        whole(&mut cut).await;
        let result = tokio::select! {
            result = read(from, &mut buffer) => result,
            () = send.closed() => return,
        };
        let due = Instant::now().max(not_before) + delay;
        let chunk = match result {
            Ok(0) => Chunk::End,
            Ok(count) => {
                let Ok(permit) = room.clone().acquire_many_owned(count as u32).await else { return };
                Chunk::Bytes(Bytes::copy_from_slice(&buffer[..count]), permit)
            }
            Err(_) => Chunk::Reset,
        };
        let last = !matches!(chunk, Chunk::Bytes(..));
        if send.send((due, chunk)).await.is_err() || last {
            return;
        }
    }
}

async fn deliver(
    to: &TcpStream,
    mut receive: mpsc::Receiver<(Instant, Chunk)>,
    mut cut: watch::Receiver<bool>,
    reset: &CancellationToken,
    count: &AtomicU64,
) {
    while let Some((due, chunk)) = receive.recv().await {
        tokio::time::sleep_until(due).await;
        whole(&mut cut).await;
        let result = match chunk {
            Chunk::Bytes(bytes, _permit) => {
                count.fetch_add(bytes.len() as u64, Ordering::Relaxed);
                write_all(to, &bytes).await
            }
            Chunk::End => socket2::SockRef::from(to).shutdown(std::net::Shutdown::Write),
            Chunk::Reset => {
                reset.cancel();
                return;
            }
        };
        if result.is_err() {
            return;
        }
    }
}

async fn read(socket: &TcpStream, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        socket.readable().await?;
        match socket.try_read(buffer) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            result => return result,
        }
    }
}

async fn write_all(socket: &TcpStream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        socket.writable().await?;
        match socket.try_write(bytes) {
            Ok(count) => bytes = &bytes[count..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn reset_on_close(socket: &TcpStream) {
    // A socket that is gone already needs no reset.
    let _ = socket2::SockRef::from(socket).set_linger(Some(Duration::ZERO));
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    async fn echo() -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            while let Ok((mut socket, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let (mut read, mut write) = socket.split();
                    let _ = tokio::io::copy(&mut read, &mut write).await;
                    let _ = write.shutdown().await;
                });
            }
        });
        address
    }

    async fn link(delay_ms: u64) -> Link {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        Link::start(listener, echo().await, Duration::from_millis(delay_ms)).unwrap()
    }

    #[tokio::test]
    async fn an_answer_takes_the_handshake_and_one_round_trip_and_bulk_is_not_slowed() {
        let link = link(40).await;
        let started = Instant::now();
        let mut socket = TcpStream::connect(link.address()).await.unwrap();
        socket.write_all(b"hello").await.unwrap();
        let mut answer = [0; 5];
        socket.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"hello");
        let first = started.elapsed();
        assert!(first >= Duration::from_millis(160), "{first:?}");

        const BYTES: usize = 24 << 20;
        let (mut read, mut write) = socket.into_split();
        let writer = tokio::spawn(async move {
            write.write_all(&vec![7; BYTES]).await.unwrap();
            write.shutdown().await.unwrap();
        });
        let mut bytes = Vec::new();
        read.read_to_end(&mut bytes).await.unwrap();
        writer.await.unwrap();
        assert_eq!(bytes.len(), BYTES);
    }

    #[tokio::test]
    async fn a_cut_link_passes_nothing_and_goes_on_when_mended() {
        let link = link(1).await;
        let mut socket = TcpStream::connect(link.address()).await.unwrap();
        socket.write_all(b"a").await.unwrap();
        assert_eq!(socket.read_u8().await.unwrap(), b'a');
        link.set_cut(true);
        socket.write_all(b"b").await.unwrap();
        assert!(tokio::time::timeout(Duration::from_millis(100), socket.read_u8()).await.is_err());
        link.set_cut(false);
        assert_eq!(socket.read_u8().await.unwrap(), b'b');
    }
}
