//! Delivery to log receivers: RFC 5424 messages over TCP with octet counting, TLS when the receiver has it.
//!
//! Each broker sends its own streams, earlier boots first, only while its freshness lease is open. Plain syslog does
//! not acknowledge: a record counts as delivered when the receiver's kernel has taken it and the connection was still
//! there [`SETTLE`] later; after a broken connection everything that had not settled is sent again, byte-identical.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use selvedge_cluster::Cluster;
use selvedge_domain::command::CursorMove;
use selvedge_domain::rows::{Cursor, Receiver, Row as _};
use selvedge_domain::{Asker, Body, Id, State};
use selvedge_storage::audit::{Journal, Record as Stored, StreamId};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;

use super::log::Log;
use super::metrics;
use super::record::{ExportGap, Record};

/// A connection must have stood for so long after a record was taken by the receiver's kernel.
const SETTLE: Duration = Duration::from_secs(3);
/// Between attempts to reach a receiver.
const RETRY: Duration = Duration::from_secs(1);
/// Longest wait for a connection and for a write.
const IO_TIMEOUT: Duration = Duration::from_secs(10);
/// Between two looks at how much every receiver lacks.
const BACKLOG_INTERVAL: Duration = Duration::from_secs(1);
/// Records read and sent at once.
const BATCH_RECORDS: usize = 512;
/// Bytes read and sent at once.
const BATCH_BYTES: usize = 1 << 20;
/// Records that were sent and have not settled, at most.
const UNSETTLED_RECORDS_MAX: usize = 100_000;
/// Private enterprise number in structured data (RFC 5612: for documentation).
const ENTERPRISE: u32 = 32_473;
/// Facility `log audit` (13), severity `informational` (6).
const PRIORITY: u32 = 13 * 8 + 6;

/// A record as a receiver gets it: an RFC 5424 message, without the octet count.
///
/// **Shape** the message is a JSON object `{id, stream, seq, time_ms, prev, hash, record}`; `record` is the stored text
/// itself, so that the receiver can compute `hash` (see `storage::audit`). **Source** RFC 5424, RFC 6587 section 3.4.1.
pub fn line(record: &Stored, host: &str) -> Vec<u8> {
    let time = i64::try_from(record.time_ms).ok().and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok());
    let time = time.map_or_else(|| "-".to_owned(), |time| format!("{time:.3}"));
    let body = String::from_utf8_lossy(record.body());
    let kind = serde_json::from_str::<Kind>(&body).map_or_else(|_| "-".to_owned(), |kind| kind.kind);
    let host: String = host.chars().filter(char::is_ascii_graphic).take(255).collect();
    let host = if host.is_empty() { "-" } else { &host };
    let (stream, seq) = (record.stream, record.seq);
    format!(
        "<{PRIORITY}>1 {time} {host} selvedge - {kind} [selvedge@{ENTERPRISE} id=\"{stream}/{seq}\"] \
         {{\"id\":\"{stream}/{seq}\",\"stream\":\"{stream}\",\"seq\":{seq},\"time_ms\":{},\"prev\":\"{}\",\"hash\":\"{}\",\"record\":{body}}}",
        record.time_ms,
        hex::encode(record.prev_hash),
        hex::encode(record.hash),
    )
    .into_bytes()
}

#[derive(serde::Deserialize)]
struct Kind {
    kind: String,
}

/// Keeps one delivery task for each configured receiver.
pub struct Exporter {
    cluster: Cluster,
    log: Log,
    host: String,
    /// Gaps that were told: receiver, stream, and the first record that it lacks.
    told: Mutex<BTreeSet<(Id, StreamId, u64)>>,
}

impl Exporter {
    /// An exporter of this broker's own streams; `host` is the name in the messages.
    pub fn new(cluster: Cluster, log: Log, host: String) -> Self {
        Self { cluster, log, host, told: Mutex::default() }
    }

    /// Delivers until `stop`.
    pub async fn run(self, stop: CancellationToken) {
        let exporter = Arc::new(self);
        let mut states = exporter.cluster.subscribe();
        let mut running: BTreeMap<Id, (Receiver, CancellationToken)> = BTreeMap::new();
        let mut look = tokio::time::interval(BACKLOG_INTERVAL);
        loop {
            let wanted: BTreeMap<Id, Receiver> =
                states.borrow_and_update().rows::<Receiver>().map(|receiver| (receiver.id(), receiver)).collect();
            running.retain(|id, (receiver, token)| {
                let keep = wanted.get(id) == Some(receiver);
                if !keep {
                    token.cancel();
                }
                keep
            });
            for (id, receiver) in wanted {
                running.entry(id).or_insert_with(|| {
                    let token = stop.child_token();
                    tokio::spawn(exporter.clone().deliver(receiver.clone(), token.clone()));
                    (receiver, token)
                });
            }
            tokio::select! {
                () = stop.cancelled() => return,
                changed = states.changed() => if changed.is_err() { return },
                _ = look.tick() => ::metrics::gauge!(metrics::BACKLOG_RECORDS).set(exporter.backlog() as f64),
            }
        }
    }

    /// Records that the slowest receiver has not acknowledged.
    fn backlog(&self) -> u64 {
        let (state, ends) = (self.cluster.state(), self.log.journal().ends());
        let lacks = |receiver: Receiver| {
            let lacks =
                |(stream, end): (&StreamId, &u64)| (end + 1).saturating_sub(cursor(&state, receiver.id(), *stream));
            ends.iter().map(lacks).sum()
        };
        state.rows::<Receiver>().map(lacks).max().unwrap_or_default()
    }

    async fn deliver(self: Arc<Self>, receiver: Receiver, stop: CancellationToken) {
        let work = async {
            loop {
                if self.cluster.lease().open()
                    && let Err(error) = self.connection(&receiver).await
                {
                    ::metrics::counter!(metrics::CONNECTION_FAILURES).increment(1);
                    tracing::info!(receiver = receiver.name, %error, "log receiver is away, delivery will resume");
                }
                tokio::time::sleep(RETRY).await;
            }
        };
        tokio::select! {
            () = stop.cancelled() => {}
            () = work => {}
        }
    }

    async fn connection(&self, receiver: &Receiver) -> Result<(), Error> {
        let socket = tokio::time::timeout(IO_TIMEOUT, TcpStream::connect(&receiver.address))
            .await
            .map_err(|_| Error::Timeout)??;
        socket.set_nodelay(true)?;
        let fd = socket.as_raw_fd();
        if receiver.tls_ca.is_empty() {
            let (read, write) = socket.into_split();
            self.pump(receiver, fd, read, write).await
        } else {
            let stream =
                tokio::time::timeout(IO_TIMEOUT, tls(receiver, socket)).await.map_err(|_| Error::Timeout)??;
            let (read, write) = tokio::io::split(stream);
            self.pump(receiver, fd, read, write).await
        }
    }

    async fn pump(
        &self,
        receiver: &Receiver,
        fd: i32,
        mut read: impl AsyncRead + Unpin,
        mut write: impl AsyncWrite + Unpin,
    ) -> Result<(), Error> {
        let node = self.log.stream().broker;
        let mut source = Source::new(self.log.journal().clone(), receiver.id(), node, self.cluster.state());
        let mut unsettled: VecDeque<(StreamId, u64, Instant)> = VecDeque::new();
        let mut acknowledged: BTreeMap<StreamId, u64> = BTreeMap::new();
        let mut settle = tokio::time::interval(Duration::from_secs(1));
        let mut sink = [0; 512];
        loop {
            tokio::select! {
                next = source.next(), if unsettled.len() < UNSETTLED_RECORDS_MAX => {
                    let batch = match next? {
                        Next::Records(batch) => batch,
                        Next::Gap(gap) => {
                            self.tell(receiver, &gap);
                            unsettled.extend(gap.upto.map(|upto| (gap.stream, upto, Instant::now())));
                            continue;
                        }
                    };
                    if !self.cluster.lease().open() {
                        return Err(Error::LeaseOver);
                    }
                    let mut bytes = Vec::new();
                    for record in &batch {
                        let line = line(record, &self.host);
                        bytes.extend_from_slice(format!("{} ", line.len()).as_bytes());
                        bytes.extend_from_slice(&line);
                    }
                    tokio::time::timeout(IO_TIMEOUT, async { write.write_all(&bytes).await?; write.flush().await })
                        .await
                        .map_err(|_| Error::Timeout)??;
                    ::metrics::counter!(metrics::SENT).increment(batch.len() as u64);
                    let now = Instant::now();
                    unsettled.extend(batch.iter().map(|record| (record.stream, record.seq, now)));
                }
                received = read.read(&mut sink) => {
                    if received? == 0 {
                        return Err(Error::Closed);
                    }
                }
                _ = settle.tick() => {
                    if unsent_bytes(fd)? == 0 {
                        while let Some((stream, seq, sent)) = unsettled.front().copied()
                            && sent.elapsed() >= SETTLE
                        {
                            acknowledged.insert(stream, seq + 1);
                            unsettled.pop_front();
                        }
                    }
                    self.acknowledge(receiver, &mut acknowledged).await;
                }
            }
        }
    }

    /// Says once what a receiver will never get: in the log, and in the journal that it and all others read.
    fn tell(&self, receiver: &Receiver, gap: &Gap) {
        if !self.told.lock().insert((receiver.id(), gap.stream, gap.from)) {
            return;
        }
        let why = gap.why;
        tracing::warn!(receiver = receiver.name, stream = %gap.stream, from = gap.from, upto = gap.upto, why,
            "a log receiver will not get some audit records");
        ::metrics::counter!(metrics::GAPS, "why" => why).increment(1);
        let record = ExportGap {
            receiver: receiver.id().to_string(),
            receiver_name: receiver.name.clone(),
            stream: gap.stream.to_string(),
            from: gap.from,
            upto: gap.upto,
            why: why.to_owned(),
        };
        // What the journal does not accept, it says itself.
        let _ = self.log.append(&Record::ExportGap(record));
    }

    /// Moves the cursors in the log; what fails is tried again with the next second.
    async fn acknowledge(&self, receiver: &Receiver, acknowledged: &mut BTreeMap<StreamId, u64>) {
        if acknowledged.is_empty() || !self.cluster.lease().open() {
            return;
        }
        let moves = acknowledged
            .iter()
            .map(|(stream, next_seq)| CursorMove {
                receiver: receiver.id(),
                broker: stream.broker,
                boot: stream.boot,
                next_seq: *next_seq,
            })
            .collect();
        match self.cluster.propose(Asker::BROKER, Body::MoveCursors(moves), None).await {
            Ok(_) => acknowledged.clear(),
            Err(error) => tracing::debug!(%error, "export cursors were not moved"),
        }
    }
}

/// What comes next for a receiver.
enum Next {
    Records(Vec<Stored>),
    Gap(Gap),
}

/// Records that cannot be delivered any more.
struct Gap {
    stream: StreamId,
    from: u64,
    /// The last of them; none when nobody knows where the stream ended.
    upto: Option<u64>,
    why: &'static str,
}

/// The next record that a receiver should get of a stream.
fn cursor(state: &State, receiver: Id, stream: StreamId) -> u64 {
    let key = Cursor { receiver: Some(receiver), broker: stream.broker, boot: stream.boot, next_seq: 0 }.key();
    state.row::<Cursor>(&key).map_or(1, |cursor| cursor.next_seq)
}

/// This broker's streams from the cursors on, earlier boots first.
struct Source {
    journal: Arc<Journal>,
    streams: VecDeque<(StreamId, u64)>,
    reader: Option<selvedge_storage::audit::Reader>,
}

impl Source {
    fn new(journal: Arc<Journal>, receiver: Id, node: u64, state: Arc<State>) -> Self {
        let current = journal.stream();
        let mut streams = selvedge_storage::audit::streams(journal.root()).unwrap_or_default();
        streams.retain(|stream| stream.broker == node && *stream != current);
        streams.sort();
        streams.push(current);
        let streams = streams.into_iter().map(|stream| (stream, cursor(&state, receiver, stream))).collect();
        Self { journal, streams, reader: None }
    }

    /// The next records; waits for new ones at the end. What was deleted or is damaged is passed over and named.
    /// **Cancel safety:** safe, nothing is lost between batches.
    async fn next(&mut self) -> Result<Next, Error> {
        loop {
            let Some((stream, from)) = self.streams.front().copied() else { return Err(Error::Closed) };
            let is_own = stream == self.journal.stream();
            match self.read(stream, from) {
                Ok(batch) if !batch.is_empty() => return Ok(Next::Records(batch)),
                Ok(_) if is_own => {}
                Ok(_) => self.pass(),
                Err(selvedge_storage::Error::AuditGone { first, .. }) => {
                    return Ok(Next::Gap(self.skip("deleted", Some(first))));
                }
                Err(selvedge_storage::Error::AuditBroken(place)) => {
                    self.journal.found_broken(&place);
                    let behind = self.journal.segment_behind(stream, place.seq)?;
                    if is_own && behind.is_none() {
                        // The segment that is being written: tried again until another begins.
                        return Err(selvedge_storage::Error::AuditBroken(place).into());
                    }
                    return Ok(Next::Gap(self.skip("broken", behind)));
                }
                Err(error) => return Err(error.into()),
            }
            if is_own
                && let Some(reader) = &mut self.reader
                && !reader.wait().await
            {
                return Err(Error::Closed);
            }
        }
    }

    /// Goes on with the next stream.
    fn pass(&mut self) {
        self.streams.pop_front();
        self.reader = None;
    }

    /// Goes on with another record of this stream, or with the next stream when there is none.
    fn skip(&mut self, why: &'static str, to: Option<u64>) -> Gap {
        let (stream, from) = self.streams.front().copied().unwrap_or((self.journal.stream(), 1));
        let from = self.reader.as_ref().map_or(from, |reader| reader.position());
        match (to, self.streams.front_mut()) {
            (Some(to), Some(front)) => {
                front.1 = to;
                self.reader = None;
            }
            _ => self.pass(),
        }
        Gap { stream, from, upto: to.map(|to| to - 1), why }
    }

    /// What there is, up to the limits and up to the first record that cannot be read.
    fn read(&mut self, stream: StreamId, from: u64) -> Result<Vec<Stored>, selvedge_storage::Error> {
        let reader = match &mut self.reader {
            Some(reader) => reader,
            None => self.reader.insert(self.journal.reader(stream, from)?),
        };
        let (mut batch, mut size_bytes) = (Vec::new(), 0);
        while batch.len() < BATCH_RECORDS && size_bytes < BATCH_BYTES {
            match reader.read_next() {
                Ok(Some(record)) => {
                    size_bytes += record.bytes().len();
                    batch.push(record);
                }
                Ok(None) => break,
                // Met again, and told, once these are delivered.
                Err(_) if !batch.is_empty() => break,
                Err(error) => return Err(error),
            }
        }
        Ok(batch)
    }
}

async fn tls(receiver: &Receiver, socket: TcpStream) -> Result<tokio_rustls::client::TlsStream<TcpStream>, Error> {
    let mut roots = rustls::RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(receiver.tls_ca.as_bytes()) {
        let certificate = certificate.map_err(|error| Error::Tls(error.to_string()))?;
        roots.add(certificate).map_err(|error| Error::Tls(error.to_string()))?;
    }
    let config = rustls::ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
    let host = receiver.address.rsplit_once(':').map_or(receiver.address.as_str(), |(host, _)| host);
    let name = if receiver.tls_name.is_empty() { host } else { &receiver.tls_name };
    let name = ServerName::try_from(name.to_owned()).map_err(|error| Error::Tls(error.to_string()))?;
    Ok(tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, socket).await?)
}

/// Bytes that the receiver's kernel has not taken yet.
#[allow(unsafe_code)]
fn unsent_bytes(fd: i32) -> Result<i32, Error> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the descriptor is that of the connection whose halves live until after this call, and `bytes` outlives it.
    let answer = unsafe { libc::ioctl(fd, libc::TIOCOUTQ, &mut bytes) };
    if answer == 0 { Ok(bytes) } else { Err(std::io::Error::last_os_error().into()) }
}

/// Why a connection to a receiver ended.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("connection failed")]
    Io(#[from] std::io::Error),
    #[error("no progress for {IO_TIMEOUT:?}")]
    Timeout,
    #[error("the receiver closed the connection")]
    Closed,
    #[error("this broker's freshness lease is over")]
    LeaseOver,
    #[error("tls: {0}")]
    Tls(String),
    #[error(transparent)]
    Journal(#[from] selvedge_storage::Error),
}
