//! The private applications: an HTTP server, a server of lines, and a ledger, each on a loopback address of its own.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use sha2::{Digest as _, Sha256};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};

use super::clock::Moment;

/// Between two frames of `chat`, in both directions.
pub const FRAME_EVERY: Duration = Duration::from_millis(10);
/// Largest blob that `crm` makes.
const BLOB_BYTES_MAX: u64 = 1 << 30;
/// Longest line or request head that an application reads.
const LINE_BYTES_MAX: u64 = 8 << 10;
/// Networks 127.77.0.0/24 to 127.77.99.0/24 are tried in turn.
const NETWORKS: u8 = 100;

/// The names that the applications have inside.
pub const CRM: (&str, u16) = ("crm.internal", 8080);
/// The server of lines.
pub const CHAT: (&str, u16) = ("chat.internal", 7000);
/// The ledger of the workload `billing`.
pub const LEDGER: (&str, u16) = ("ledger.internal", 9000);

/// The running applications.
pub struct Apps {
    /// Host name to address.
    pub hosts: BTreeMap<&'static str, SocketAddr>,
    /// The usual addresses were taken.
    pub moved: bool,
    /// Who frames, and when the last line came.
    pub heard: Heard,
}

/// When the last line of each framing session reached the application, by the session's own word.
#[derive(Clone, Default)]
pub struct Heard(Arc<Mutex<BTreeMap<String, Moment>>>);

impl Heard {
    /// The last line of a session.
    pub fn last(&self, word: &str) -> Option<Moment> {
        self.0.lock().get(word).copied()
    }

    fn note(&self, word: &str) {
        self.0.lock().insert(word.to_owned(), Moment::now());
    }
}

impl Apps {
    /// Starts all of them on the first network that is free.
    pub async fn start() -> io::Result<Self> {
        let mut last = io::ErrorKind::AddrInUse.into();
        for network in 0..NETWORKS {
            match bind(network).await {
                Ok([crm, chat, ledger]) => {
                    let hosts = BTreeMap::from([
                        (CRM.0, crm.local_addr()?),
                        (CHAT.0, chat.local_addr()?),
                        (LEDGER.0, ledger.local_addr()?),
                    ]);
                    let heard = Heard::default();
                    let talk = heard.clone();
                    serve(crm, crm_request);
                    serve(chat, move |socket| chat_session(socket, talk.clone()));
                    serve(ledger, ledger_session);
                    return Ok(Self { hosts, moved: network > 0, heard });
                }
                Err(error) => last = error,
            }
        }
        Err(last)
    }
}

async fn bind(network: u8) -> io::Result<[TcpListener; 3]> {
    let at = |host: u8, port: u16| SocketAddr::new(IpAddr::V4(Ipv4Addr::new(127, 77, network, host)), port);
    Ok([
        TcpListener::bind(at(10, CRM.1)).await?,
        TcpListener::bind(at(20, CHAT.1)).await?,
        TcpListener::bind(at(30, LEDGER.1)).await?,
    ])
}

fn serve<F>(listener: TcpListener, session: impl Fn(TcpStream) -> F + Send + 'static)
where
    F: Future<Output = io::Result<()>> + Send + 'static,
{
    tokio::spawn(async move {
        loop {
            match listener.accept().await {
                Ok((socket, _)) => {
                    let work = session(socket);
                    // What a caller does to its own connection ends that connection and nothing else.
                    tokio::spawn(async move { drop(work.await) });
                }
                Err(_) => tokio::time::sleep(FRAME_EVERY).await,
            }
        }
    });
}

/// The bytes of every blob: the same for the same length.
pub fn blob(bytes: u64) -> impl Iterator<Item = Vec<u8>> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut left = bytes;
    std::iter::from_fn(move || {
        let size = left.min(64 << 10) as usize;
        left -= size as u64;
        let mut chunk = Vec::with_capacity(size + 8);
        while chunk.len() < size {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            chunk.extend_from_slice(&state.to_le_bytes());
        }
        chunk.truncate(size);
        (size > 0).then_some(chunk)
    })
}

/// SHA-256 of a blob, hexadecimal.
pub fn blob_sha256(bytes: u64) -> String {
    let mut hash = Sha256::new();
    blob(bytes).for_each(|chunk| hash.update(chunk));
    hex::encode(hash.finalize())
}

/// One request a connection: `GET /` and `GET /blob?bytes=N`.
async fn crm_request(mut socket: TcpStream) -> io::Result<()> {
    socket.set_nodelay(true)?;
    let (read, mut write) = socket.split();
    let mut lines = BufReader::new(read.take(LINE_BYTES_MAX)).lines();
    let request = lines.next_line().await?.unwrap_or_default();
    while lines.next_line().await?.is_some_and(|line| !line.is_empty()) {}
    let path = request.strip_prefix("GET ").and_then(|rest| rest.split(' ').next()).unwrap_or_default();
    let wanted = path.strip_prefix("/blob?bytes=").map(str::parse::<u64>);
    match wanted {
        Some(Ok(bytes)) if bytes <= BLOB_BYTES_MAX => {
            let head = format!(
                "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-type: application/octet-stream\r\ncontent-length: {bytes}\r\nx-sha256: {}\r\n\r\n",
                blob_sha256(bytes)
            );
            write.write_all(head.as_bytes()).await?;
            for chunk in blob(bytes) {
                write.write_all(&chunk).await?;
            }
        }
        None if path == "/" => {
            let body = "This is crm.internal. Nothing listens for you here: a connector dialled out.\n";
            let head = format!(
                "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-type: text/plain\r\ncontent-length: {}\r\n\r\n{body}",
                body.len()
            );
            write.write_all(head.as_bytes()).await?;
        }
        _ => write.write_all(b"HTTP/1.1 404 Not Found\r\nconnection: close\r\ncontent-length: 0\r\n\r\n").await?,
    }
    write.shutdown().await
}

/// A line comes back in capitals. `frames WORD` begins a stream of numbered frames that only the end of the connection ends.
async fn chat_session(mut socket: TcpStream, heard: Heard) -> io::Result<()> {
    socket.set_nodelay(true)?;
    let (read, mut write) = socket.split();
    let mut read = BufReader::new(read);
    write.write_all(b"welcome to chat.internal\n").await?;
    while let Some(line) = line(&mut read).await? {
        if let Some(word) = line.strip_prefix("frames ") {
            return frames(read, write, word, &heard).await;
        }
        write.write_all(format!("{}\n", line.to_uppercase()).as_bytes()).await?;
    }
    write.shutdown().await
}

async fn frames(
    mut read: impl tokio::io::AsyncBufRead + Unpin,
    mut write: impl tokio::io::AsyncWrite + Unpin,
    word: &str,
    heard: &Heard,
) -> io::Result<()> {
    let send = async {
        let mut ticks = tokio::time::interval(FRAME_EVERY);
        for number in 1_u64.. {
            ticks.tick().await;
            write.write_all(format!("frame {number}\n").as_bytes()).await?;
        }
        io::Result::Ok(())
    };
    let receive = async {
        while line(&mut read).await?.is_some() {
            heard.note(word);
        }
        io::Result::Ok(())
    };
    tokio::select! {
        result = send => result,
        result = receive => result,
    }
}

/// `balance` is answered; anything else is not known.
async fn ledger_session(mut socket: TcpStream) -> io::Result<()> {
    socket.set_nodelay(true)?;
    let (read, mut write) = socket.split();
    let mut read = BufReader::new(read);
    while let Some(line) = line(&mut read).await? {
        let answer = if line == "balance" { "balance 1204.50 EUR\n" } else { "unknown request\n" };
        write.write_all(answer.as_bytes()).await?;
    }
    write.shutdown().await
}

async fn line(read: &mut (impl tokio::io::AsyncBufRead + Unpin)) -> io::Result<Option<String>> {
    let mut line = String::new();
    let count = read.take(LINE_BYTES_MAX).read_line(&mut line).await?;
    Ok((count > 0).then(|| line.trim_end_matches(['\r', '\n']).to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_blob_has_its_length_and_always_the_same_bytes() {
        assert_eq!(blob(70_001).map(|chunk| chunk.len()).sum::<usize>(), 70_001);
        assert_eq!(blob_sha256(70_001), blob_sha256(70_001));
        assert_ne!(blob_sha256(70_001), blob_sha256(70_002));
    }
}
