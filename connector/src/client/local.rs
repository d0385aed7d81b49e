//! The socket by which other processes of the same user ask the running client for sessions.
//!
//! The running client lends its control stream: it sends `Open` and passes the answer on. The asking process opens the
//! hop itself with the lent ticket, so no application byte passes through the running client.
//!
//! **Shape**: JSON, one object a line. Only the socket's own user is served; the directory is that user's alone.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use selvedge_proto::control::{Broker, OpenRefused, Opened};
use selvedge_proto::hello::Ticket;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::source::{Begun, Own, Verdict, Waiting, Wish};
use super::{Error, Status};

/// Longest line.
const LINE_BYTES_MAX: u64 = 256 * 1024;
/// Processes served at once; more wait to be accepted.
const GUESTS_MAX: usize = 256;
/// A question comes within.
const ASK_TIMEOUT: Duration = Duration::from_secs(5);
/// An answer comes within.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(15);

/// Where the socket is.
pub(super) fn path(dir: &Path) -> PathBuf {
    dir.join("client.sock")
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Question {
    Open { host: String, port: u16, transport: u32, traceparent: String, initiator: String, avoid: Option<u64> },
    Why { host: String, port: u16 },
    Resolve { name: String },
    Status,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Reply {
    /// Where the hop goes, and the ticket that opens it.
    Lane {
        node: u64,
        name: String,
        host: String,
        edge: String,
        ticket: String,
    },
    Opened {
        session: String,
        connector: String,
    },
    Refused {
        code: u32,
        denial: String,
        retry_after_ms: u64,
    },
    Lost,
    Why(String),
    Resolved(Option<IpAddr>),
    Status(Status),
    Failed(String),
}

/// Serves until `shutdown`.
pub(super) async fn serve(own: Arc<Own>, shutdown: CancellationToken) {
    let path = path(own.end.dir());
    let listener = match listen(&path) {
        Ok(listener) => listener,
        Err(error) => return warn!(path = %path.display(), %error, "other processes cannot use this client"),
    };
    let places = Arc::new(Semaphore::new(GUESTS_MAX));
    let mut guests = JoinSet::new();
    loop {
        let Ok(place) = places.clone().acquire_owned().await else { break };
        let stream = tokio::select! {
            () = shutdown.cancelled() => break,
            Some(_) = guests.join_next() => continue,
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    debug!(%error, "accept");
                    sleep(Duration::from_millis(100)).await;
                    continue;
                }
            },
        };
        let same_user = stream.peer_cred().is_ok_and(|peer| peer.uid() == rustix::process::geteuid().as_raw());
        if !same_user {
            continue;
        }
        let own = own.clone();
        guests.spawn(async move {
            let _place = place;
            if let Err(error) = answer(&own, stream).await {
                debug!(%error, "a process of this user went away");
            }
        });
    }
    // Its place is free for the next client in any case: it replaces the file.
    let _ = fs::remove_file(&path);
}

fn listen(path: &Path) -> io::Result<UnixListener> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

async fn answer(own: &Arc<Own>, stream: UnixStream) -> io::Result<()> {
    let mut stream = BufReader::new(stream);
    let question = timeout(ASK_TIMEOUT, read(&mut stream)).await.map_err(|_| io::ErrorKind::TimedOut)??;
    let reply = match question {
        Question::Status => Reply::Status(own.status()),
        Question::Why { host, port } => match own.why(&host, port).await {
            Ok(text) => Reply::Why(text),
            Err(error) => Reply::Failed(error.to_string()),
        },
        Question::Resolve { name } => match own.resolve(&name).await {
            Ok(address) => Reply::Resolved(address),
            Err(error) => Reply::Failed(error.to_string()),
        },
        Question::Open { host, port, transport, traceparent, initiator, avoid } => {
            let wish = Wish { host, port, transport, traceparent, initiator };
            match own.begin(&wish, avoid).await {
                Ok(Begun { broker, ticket, mut answer }) => {
                    let Broker { node, name, host, edge, .. } = broker;
                    let lane = Reply::Lane { node, name, host, edge, ticket: hex::encode(ticket.as_bytes()) };
                    write(&mut stream, &lane).await?;
                    match answer.verdict().await {
                        Verdict::Opened(opened) => {
                            Reply::Opened { session: hex::encode(opened.session), connector: opened.connector }
                        }
                        Verdict::Refused(OpenRefused { code, denial, retry_after_ms, .. }) => {
                            Reply::Refused { code, denial, retry_after_ms }
                        }
                        Verdict::Lost => Reply::Lost,
                    }
                }
                Err(error) => Reply::Failed(error.to_string()),
            }
        }
    };
    write(&mut stream, &reply).await
}

/// One question to the running client, and its answers.
pub(super) struct Guest {
    stream: BufReader<UnixStream>,
}

impl Guest {
    /// Connects to the running client.
    pub(super) async fn connect(dir: &Path) -> io::Result<Self> {
        Ok(Self { stream: BufReader::new(UnixStream::connect(path(dir)).await?) })
    }

    pub(super) async fn begin(mut self, wish: &Wish, avoid: Option<u64>) -> Result<Begun, Error> {
        let Wish { host, port, transport, traceparent, initiator } = wish.clone();
        let question = Question::Open { host, port, transport, traceparent, initiator, avoid };
        match self.ask(&question).await? {
            Reply::Lane { node, name, host, edge, ticket } => {
                let ticket = hex::decode(ticket).ok().and_then(|bytes| Ticket::from_bytes(&bytes)).ok_or_else(odd)?;
                let broker = Broker { node, name, host, edge, ..Broker::default() };
                Ok(Begun { broker, ticket, answer: Waiting::Guest(self) })
            }
            Reply::Failed(reason) => Err(Error::Local(reason)),
            _ => Err(odd()),
        }
    }

    pub(super) async fn why(mut self, host: &str, port: u16) -> Result<String, Error> {
        match self.ask(&Question::Why { host: host.to_owned(), port }).await? {
            Reply::Why(text) => Ok(text),
            Reply::Failed(reason) => Err(Error::Local(reason)),
            _ => Err(odd()),
        }
    }

    pub(super) async fn resolve(mut self, name: &str) -> Result<Option<IpAddr>, Error> {
        match self.ask(&Question::Resolve { name: name.to_owned() }).await? {
            Reply::Resolved(address) => Ok(address),
            Reply::Failed(reason) => Err(Error::Local(reason)),
            _ => Err(odd()),
        }
    }

    pub(super) async fn status(mut self) -> Result<Status, Error> {
        match self.ask(&Question::Status).await? {
            Reply::Status(status) => Ok(status),
            Reply::Failed(reason) => Err(Error::Local(reason)),
            _ => Err(odd()),
        }
    }

    pub(super) async fn verdict(&mut self) -> Verdict {
        match read(&mut self.stream).await {
            Ok(Reply::Opened { session, connector }) => {
                let session = hex::decode(session).unwrap_or_default();
                Verdict::Opened(Opened { session, connector, ..Opened::default() })
            }
            Ok(Reply::Refused { code, denial, retry_after_ms }) => {
                Verdict::Refused(OpenRefused { code, denial, retry_after_ms, ..OpenRefused::default() })
            }
            _ => Verdict::Lost,
        }
    }

    async fn ask(&mut self, question: &Question) -> Result<Reply, Error> {
        let exchange = async {
            write(&mut self.stream, question).await?;
            read(&mut self.stream).await
        };
        match timeout(ANSWER_TIMEOUT, exchange).await {
            Ok(reply) => reply.map_err(|error| Error::Local(error.to_string())),
            Err(_) => Err(Error::Local("it did not answer in time".to_owned())),
        }
    }
}

fn odd() -> Error {
    Error::Local("it answered something else".to_owned())
}

async fn read<T: for<'de> Deserialize<'de>>(stream: &mut BufReader<UnixStream>) -> io::Result<T> {
    let mut line = Vec::new();
    stream.take(LINE_BYTES_MAX).read_until(b'\n', &mut line).await?;
    if line.last() != Some(&b'\n') {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(serde_json::from_slice(&line)?)
}

async fn write<T: Serialize>(stream: &mut BufReader<UnixStream>, value: &T) -> io::Result<()> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    stream.write_all(&line).await?;
    stream.flush().await
}
