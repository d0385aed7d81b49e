//! A log receiver: RFC 5424 messages over TCP with octet counting, kept in a file, one a line. Can be stopped and started.

use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, bail};
use parking_lot::Mutex;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Longest message that is taken.
const MESSAGE_BYTES_MAX: usize = 1 << 20;
/// Digits of the longest octet count.
const COUNT_BYTES_MAX: u64 = 8;

/// The receiver.
pub struct Receiver {
    address: SocketAddr,
    file: PathBuf,
    out: Arc<Mutex<std::fs::File>>,
    running: Option<(CancellationToken, TaskTracker)>,
}

impl Receiver {
    /// Begins to listen.
    pub async fn start(listener: TcpListener, file: &Path) -> io::Result<Self> {
        let address = listener.local_addr()?;
        let out = std::fs::OpenOptions::new().create(true).append(true).open(file)?;
        let mut receiver = Self { address, file: file.to_owned(), out: Arc::new(Mutex::new(out)), running: None };
        receiver.listen(listener);
        Ok(receiver)
    }

    /// Goes away: the listener and every connection close.
    pub async fn stop(&mut self) {
        if let Some((stop, tasks)) = self.running.take() {
            stop.cancel();
            tasks.wait().await;
        }
    }

    /// Comes back on the same address.
    pub async fn resume(&mut self) -> io::Result<()> {
        if self.running.is_none() {
            let listener = TcpListener::bind(self.address).await?;
            self.listen(listener);
        }
        Ok(())
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where the messages are kept.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// It listens.
    pub fn is_running(&self) -> bool {
        self.running.is_some()
    }

    fn listen(&mut self, listener: TcpListener) {
        let (stop, tasks) = (CancellationToken::new(), TaskTracker::new());
        let (until, connections, out) = (stop.clone(), tasks.clone(), self.out.clone());
        tasks.spawn(async move {
            loop {
                let accepted = tokio::select! {
                    () = until.cancelled() => return,
                    accepted = listener.accept() => accepted,
                };
                let Ok((socket, _)) = accepted else { continue };
                let (until, out) = (until.clone(), out.clone());
                connections.spawn(async move {
                    tokio::select! {
                        () = until.cancelled() => {}
                        // A sender that breaks the framing loses its connection, and connects again.
                        _ = receive(socket, &out) => {}
                    }
                });
            }
        });
        tasks.close();
        self.running = Some((stop, tasks));
    }
}

async fn receive(socket: TcpStream, out: &Mutex<std::fs::File>) -> anyhow::Result<()> {
    let mut read = BufReader::new(socket);
    loop {
        let mut count = Vec::new();
        if (&mut read).take(COUNT_BYTES_MAX).read_until(b' ', &mut count).await? == 0 {
            return Ok(());
        }
        let count: usize = std::str::from_utf8(&count)?.trim_end().parse().context("not an octet count")?;
        if count > MESSAGE_BYTES_MAX {
            bail!("a message of {count} bytes");
        }
        let mut message = vec![0; count];
        read.read_exact(&mut message).await?;
        message.iter_mut().filter(|byte| **byte == b'\n').for_each(|byte| *byte = b' ');
        message.push(b'\n');
        out.lock().write_all(&message)?;
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt as _;

    use super::*;

    #[tokio::test]
    async fn messages_are_kept_one_a_line_and_a_stopped_receiver_refuses() {
        let dir = tempfile::tempdir().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut receiver = Receiver::start(listener, &dir.path().join("received.log")).await.unwrap();
        let mut socket = TcpStream::connect(receiver.address()).await.unwrap();
        socket.write_all(b"5 hello3 a b").await.unwrap();
        socket.shutdown().await.unwrap();
        assert_eq!(socket.read(&mut [0; 1]).await.unwrap(), 0);
        assert_eq!(std::fs::read_to_string(receiver.file()).unwrap(), "hello\na b\n");
        receiver.stop().await;
        assert!(TcpStream::connect(receiver.address()).await.is_err());
        receiver.resume().await.unwrap();
        TcpStream::connect(receiver.address()).await.unwrap();
    }
}
