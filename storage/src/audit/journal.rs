//! The journal of this boot: takes records, chains them, and syncs all that waits together on one OS thread.

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex};
use tokio::sync::{oneshot, watch};

use super::{
    BODY_BYTES_MAX, Broken, PENDING_BYTES_MAX, QUOTA_BYTES, Reader, SEGMENT_AGE_MS, SEGMENT_BYTES, StreamId, record,
    recover::{Head, recover},
    segment::{Segment, list_streams, segments},
};
use crate::{
    Error,
    dir::{make_private, sync_dir},
    metrics::{
        AUDIT_BATCH_RECORDS, AUDIT_BROKEN_STREAMS, AUDIT_DISK_BYTES, AUDIT_QUEUE_BYTES, AUDIT_REFUSED_TOTAL,
        AUDIT_SYNC_SECONDS,
    },
};

/// How long the thread waits before it tries again to repair a segment after a failed write.
const REPAIR_PAUSE: Duration = Duration::from_secs(1);

/// Sizes of a journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Size from which on a segment is sealed.
    pub segment_bytes: u64,
    /// Age at which a segment is sealed.
    pub segment_age_ms: u64,
    /// Bytes of all segments on this disk; beyond it the journal refuses.
    pub quota_bytes: u64,
}

impl Default for Options {
    fn default() -> Options {
        Options { segment_bytes: SEGMENT_BYTES, segment_age_ms: SEGMENT_AGE_MS, quota_bytes: QUOTA_BYTES }
    }
}

/// A record that was taken and is on its way to the disk.
#[derive(Debug)]
#[must_use = "a record counts only once it is durable"]
pub struct Ticket {
    /// Its sequence number.
    pub seq: u64,
    /// Its hash.
    pub hash: [u8; 32],
    done: oneshot::Receiver<Result<(), Error>>,
}

impl Ticket {
    /// Waits until the record is durable. After an error it is not in the journal, and its number is used again.
    pub async fn durable(self) -> Result<(), Error> {
        self.done.await.unwrap_or(Err(Error::Closed))
    }

    /// Like [`Ticket::durable`], for a thread that may block.
    pub fn wait(self) -> Result<(), Error> {
        self.done.blocking_recv().unwrap_or(Err(Error::Closed))
    }
}

/// The audit journal of this boot. When dropped, it first writes what waits.
pub struct Journal {
    shared: Arc<Shared>,
    /// Streams that were found broken, and where.
    broken: Mutex<BTreeMap<String, Arc<Broken>>>,
    /// The last record of each earlier stream of this broker.
    ends: Mutex<BTreeMap<StreamId, u64>>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    root: PathBuf,
    dir: PathBuf,
    stream: StreamId,
    options: Options,
    inner: Mutex<Inner>,
    work: Condvar,
    /// Of all streams on this disk.
    disk_bytes: AtomicU64,
    durable: watch::Sender<u64>,
}

struct Inner {
    head: Head,
    pending: Vec<u8>,
    pending_first_seq: u64,
    waiting: Vec<oneshot::Sender<Result<(), Error>>>,
    failed: Option<Error>,
    closing: bool,
}

impl Journal {
    /// Opens the journal of a stream, cutting what a crash left at the ends of this broker's streams.
    ///
    /// **Errors:** [`Error::AuditBroken`] when this very stream is broken; broken earlier ones are left as they are
    /// and told by [`Journal::broken_streams`].
    pub fn open(root: &Path, stream: StreamId, options: Options) -> Result<Journal, Error> {
        let dir = root.join(stream.to_string());
        make_private(root)?;
        make_private(&dir)?;
        let (mut ends, mut broken) = (BTreeMap::new(), Vec::new());
        let mut disk_bytes = 0;
        for earlier in list_streams(root)?.known {
            if earlier.broker == stream.broker && earlier != stream {
                match recover(root, earlier) {
                    Ok(head) => drop(ends.insert(earlier, head.seq)),
                    Err(Error::AuditBroken(place)) => broken.push(place),
                    Err(error) => return Err(error),
                }
            }
            for segment in segments(&root.join(earlier.to_string()))?.known {
                disk_bytes += size(&segment.path)?;
            }
        }
        let head = recover(root, stream)?;
        let inner = Inner {
            head,
            pending: Vec::new(),
            pending_first_seq: head.seq + 1,
            waiting: Vec::new(),
            failed: None,
            closing: false,
        };
        let shared = Arc::new(Shared {
            root: root.to_owned(),
            dir,
            stream,
            options,
            inner: Mutex::new(inner),
            work: Condvar::new(),
            disk_bytes: AtomicU64::new(disk_bytes),
            durable: watch::Sender::new(head.seq),
        });
        let mut writer = Writer { shared: shared.clone(), open: None, durable: head };
        let thread = std::thread::Builder::new()
            .name("selvedge-audit".to_owned())
            .spawn(move || writer.run())
            .map_err(Error::io("start the thread of", root))?;
        metrics::gauge!(AUDIT_DISK_BYTES).set(disk_bytes as f64);
        metrics::gauge!(AUDIT_BROKEN_STREAMS).set(0.0);
        let journal = Journal { shared, broken: Mutex::default(), ends: Mutex::new(ends), thread: Some(thread) };
        for place in &broken {
            journal.found_broken(place);
        }
        Ok(journal)
    }

    /// Takes a record. It has its place now, and is durable when the ticket says so.
    ///
    /// **Errors:** [`Error::AuditFull`], [`Error::AuditRecordTooLarge`], or why the disk cannot be written. The caller
    /// must then deny what it wanted to record.
    pub fn append(&self, time_ms: u64, body: &[u8]) -> Result<Ticket, Error> {
        let taken = self.shared.append(time_ms, body);
        if taken.is_err() {
            metrics::counter!(AUDIT_REFUSED_TOTAL).increment(1);
        }
        taken
    }

    /// Sequence number and hash of the last record taken; (0, zero) when there is none.
    pub fn head(&self) -> (u64, [u8; 32]) {
        let head = self.shared.inner.lock().head;
        (head.seq, head.hash)
    }

    /// The last durable record; 0 when there is none.
    pub fn durable_seq(&self) -> u64 {
        *self.shared.durable.borrow()
    }

    /// This journal's stream.
    pub fn stream(&self) -> StreamId {
        self.shared.stream
    }

    /// Where all streams lie.
    pub fn root(&self) -> &Path {
        &self.shared.root
    }

    /// Why nothing can be written at the moment.
    pub fn failure(&self) -> Option<Error> {
        self.shared.inner.lock().failed.clone()
    }

    /// Where streams on this disk were found broken, at the start or since: the first such place of each.
    pub fn broken_streams(&self) -> Vec<Arc<Broken>> {
        self.broken.lock().values().cloned().collect()
    }

    /// Remembers a broken place that a reader met; it is told once for each stream.
    pub fn found_broken(&self, place: &Arc<Broken>) {
        let mut broken = self.broken.lock();
        if !broken.contains_key(&place.stream) {
            tracing::error!(code = "SE0202", %place, "an audit stream is broken");
            broken.insert(place.stream.clone(), place.clone());
            metrics::gauge!(AUDIT_BROKEN_STREAMS).set(broken.len() as f64);
        }
    }

    /// This broker's streams on this disk with the last record of each, as far as it is known: not of broken ones.
    pub fn ends(&self) -> BTreeMap<StreamId, u64> {
        let mut ends = self.ends.lock().clone();
        ends.insert(self.stream(), self.durable_seq());
        ends
    }

    /// Bytes of all segments on this disk.
    pub fn disk_bytes(&self) -> u64 {
        self.shared.disk_bytes.load(Ordering::Relaxed)
    }

    /// What [`Journal::disk_bytes`] may come to.
    pub fn quota_bytes(&self) -> u64 {
        self.shared.options.quota_bytes
    }

    /// Reads a stream on this disk; this boot's own is followed as it grows, durable records only.
    pub fn reader(&self, stream: StreamId, from_seq: u64) -> Result<Reader, Error> {
        let durable = (stream == self.shared.stream).then(|| self.shared.durable.subscribe());
        Reader::start(&self.shared.root, stream, from_seq, durable)
    }

    /// [`Journal::reader`] from a record on, or from the first that retention has left.
    pub fn reader_of_kept(&self, stream: StreamId, from_seq: u64) -> Result<Reader, Error> {
        match self.reader(stream, from_seq) {
            Err(Error::AuditGone { first, .. }) => self.reader(stream, first),
            opened => opened,
        }
    }

    /// The first record of the segment behind the one that has a record.
    pub fn segment_behind(&self, stream: StreamId, seq: u64) -> Result<Option<u64>, Error> {
        let known = segments(&self.shared.root.join(stream.to_string()))?.known;
        Ok(known.into_iter().map(|segment| segment.first_seq).find(|first| *first > seq))
    }

    /// Deletes sealed segments whose records are all older than `before_ms` and below what `needed_from` says is still
    /// needed of their stream. Returns the bytes that came free. A broken segment stays, and what is behind it.
    pub fn delete_sealed_before(&self, before_ms: u64, needed_from: impl Fn(StreamId) -> u64) -> Result<u64, Error> {
        let mut freed = 0;
        for stream in list_streams(&self.shared.root)?.known {
            freed += self.delete_sealed_of(stream, before_ms, needed_from(stream))?;
        }
        metrics::gauge!(AUDIT_DISK_BYTES).set(self.disk_bytes() as f64);
        Ok(freed)
    }

    fn delete_sealed_of(&self, stream: StreamId, before_ms: u64, needed_from: u64) -> Result<u64, Error> {
        let dir = self.shared.root.join(stream.to_string());
        let known = segments(&dir)?.known;
        let own = stream == self.shared.stream;
        let (mut freed, mut left) = (0, known.len());
        for (at, segment) in known.iter().enumerate() {
            let next = known.get(at + 1).map(|next| next.first_seq);
            if own && next.is_none() {
                break;
            }
            let span = match span(&self.shared.root, stream, segment, next) {
                Err(Error::AuditBroken(place)) => {
                    self.found_broken(&place);
                    break;
                }
                span => span?,
            };
            let Some((last_seq, newest_ms)) = span else { break };
            if newest_ms >= before_ms || last_seq >= needed_from {
                break;
            }
            let bytes = size(&segment.path)?;
            fs::remove_file(&segment.path).map_err(Error::io("remove", &segment.path))?;
            self.shared.disk_bytes.fetch_sub(bytes, Ordering::Relaxed);
            freed += bytes;
            left -= 1;
        }
        if left < known.len() {
            sync_dir(&dir)?;
        }
        if left == 0 && !own {
            fs::remove_dir(&dir).map_err(Error::io("remove", &dir))?;
            self.ends.lock().remove(&stream);
        }
        Ok(freed)
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        self.shared.inner.lock().closing = true;
        self.shared.work.notify_all();
        if let Some(thread) = self.thread.take() {
            // A panic of that thread has been reported by the panic hook; there is nobody left to tell.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn append(&self, time_ms: u64, body: &[u8]) -> Result<Ticket, Error> {
        if body.len() > BODY_BYTES_MAX {
            return Err(Error::AuditRecordTooLarge { bytes: body.len(), limit_bytes: BODY_BYTES_MAX });
        }
        let mut inner = self.inner.lock();
        if let Some(failed) = &inner.failed {
            return Err(failed.clone());
        }
        if inner.closing {
            return Err(Error::Closed);
        }
        let queued = inner.pending.len() + record::framed_bytes(body);
        if queued > PENDING_BYTES_MAX {
            return Err(Error::AuditFull { what: "too much waits for the disk" });
        }
        if self.disk_bytes.load(Ordering::Relaxed) + queued as u64 > self.options.quota_bytes {
            return Err(Error::AuditFull { what: "its quota is used up" });
        }
        let seq = inner.head.seq + 1;
        let prev_hash = inner.head.hash;
        if inner.pending.is_empty() {
            inner.pending_first_seq = seq;
        }
        let hash = record::frame(&mut inner.pending, self.stream, seq, time_ms, &prev_hash, body);
        inner.head = Head { seq, hash };
        let (tell, done) = oneshot::channel();
        inner.waiting.push(tell);
        metrics::gauge!(AUDIT_QUEUE_BYTES).set(inner.pending.len() as f64);
        drop(inner);
        self.work.notify_one();
        Ok(Ticket { seq, hash, done })
    }
}

/// What the journal's thread owns.
struct Writer {
    shared: Arc<Shared>,
    open: Option<Open>,
    durable: Head,
}

struct Open {
    segment: Segment,
    file: File,
    durable_bytes: u64,
    since: Instant,
}

struct Batch {
    bytes: Vec<u8>,
    first_seq: u64,
    head: Head,
    waiting: Vec<oneshot::Sender<Result<(), Error>>>,
}

impl Writer {
    fn run(&mut self) {
        while let Some(batch) = self.take() {
            let begun = Instant::now();
            let result = self.write(&batch);
            metrics::histogram!(AUDIT_SYNC_SECONDS).record(begun.elapsed());
            metrics::histogram!(AUDIT_BATCH_RECORDS).record(batch.waiting.len() as f64);
            match result {
                Ok(()) => {
                    self.durable = batch.head;
                    self.shared.durable.send_replace(batch.head.seq);
                    for waiting in batch.waiting {
                        // Who no longer waits need not be told.
                        let _ = waiting.send(Ok(()));
                    }
                }
                Err(error) => self.fail(error, batch.waiting),
            }
        }
    }

    /// Waits for records; seals an old segment and repairs a failed one meanwhile. `None` when closed.
    fn take(&mut self) -> Option<Batch> {
        let shared = self.shared.clone();
        let mut inner = shared.inner.lock();
        loop {
            if !inner.pending.is_empty() {
                metrics::gauge!(AUDIT_QUEUE_BYTES).set(0.0);
                return Some(Batch {
                    bytes: std::mem::take(&mut inner.pending),
                    first_seq: inner.pending_first_seq,
                    head: inner.head,
                    waiting: std::mem::take(&mut inner.waiting),
                });
            }
            if inner.closing {
                return None;
            }
            if inner.failed.is_some() {
                shared.work.wait_for(&mut inner, REPAIR_PAUSE);
                if self.repair().is_ok() {
                    inner.failed = None;
                }
                continue;
            }
            match &self.open {
                None => shared.work.wait(&mut inner),
                Some(open) => {
                    let deadline = open.since + Duration::from_millis(shared.options.segment_age_ms);
                    if Instant::now() >= deadline {
                        self.open = None;
                    } else {
                        shared.work.wait_until(&mut inner, deadline);
                    }
                }
            }
        }
    }

    fn write(&mut self, batch: &Batch) -> Result<(), Error> {
        let options = self.shared.options;
        let added = batch.bytes.len() as u64;
        self.open.take_if(|open| {
            open.durable_bytes + added > options.segment_bytes
                || open.since.elapsed() >= Duration::from_millis(options.segment_age_ms)
        });
        if self.open.is_none() {
            let segment = Segment::new(&self.shared.dir, batch.first_seq);
            let file = OpenOptions::new()
                .append(true)
                .create_new(true)
                .mode(0o600)
                .open(&segment.path)
                .map_err(Error::io("create", &segment.path))?;
            self.open = Some(Open { segment, file, durable_bytes: 0, since: Instant::now() });
            sync_dir(&self.shared.dir)?;
        }
        let open = self.open.as_mut().expect("the lines above have opened one");
        open.file
            .write_all(&batch.bytes)
            .and_then(|()| open.file.sync_data())
            .map_err(Error::io("write", &open.segment.path))?;
        open.durable_bytes += added;
        let disk_bytes = self.shared.disk_bytes.fetch_add(added, Ordering::Relaxed) + added;
        metrics::gauge!(AUDIT_DISK_BYTES).set(disk_bytes as f64);
        Ok(())
    }

    /// Takes back all that is not durable, and tells everyone who waits for it.
    fn fail(&mut self, error: Error, mut waiting: Vec<oneshot::Sender<Result<(), Error>>>) {
        tracing::error!(%error, "the audit journal cannot be written");
        let repaired = {
            let mut inner = self.shared.inner.lock();
            inner.head = self.durable;
            inner.pending.clear();
            waiting.append(&mut inner.waiting);
            inner.failed = Some(error.clone());
            // What may be half on the disk must go before its numbers are used again.
            let repaired = self.open.as_ref().is_none_or(|open| cut(open, &self.shared.dir).is_ok());
            if repaired {
                inner.failed = None;
            }
            repaired
        };
        if repaired {
            // The kernel may have dropped pages of this file; a new one is begun.
            self.open = None;
        }
        metrics::counter!(AUDIT_REFUSED_TOTAL).increment(waiting.len() as u64);
        for waiting in waiting {
            // Who no longer waits need not be told.
            let _ = waiting.send(Err(error.clone()));
        }
    }

    fn repair(&mut self) -> Result<(), Error> {
        if let Some(open) = &self.open {
            cut(open, &self.shared.dir)?;
        }
        self.open = None;
        Ok(())
    }
}

/// Cuts a segment back to what is durable.
fn cut(open: &Open, dir: &Path) -> Result<(), Error> {
    if open.durable_bytes == 0 {
        match fs::remove_file(&open.segment.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(Error::io("remove", &open.segment.path)(error));
            }
            _ => return sync_dir(dir),
        }
    }
    open.file
        .set_len(open.durable_bytes)
        .and_then(|()| open.file.sync_all())
        .map_err(Error::io("cut", &open.segment.path))
}

/// The last sequence number of a segment, behind which the segment of `next` begins, and its newest time.
fn span(root: &Path, stream: StreamId, segment: &Segment, next: Option<u64>) -> Result<Option<(u64, u64)>, Error> {
    let mut reader = Reader::open(root, stream, segment.first_seq)?;
    let mut span: Option<(u64, u64)> = None;
    while next.is_none_or(|next| reader.position() < next) {
        let Some(record) = reader.read_next()? else { break };
        let newest = span.map_or(0, |(_, newest)| newest).max(record.time_ms);
        span = Some((record.seq, newest));
    }
    Ok(span)
}

fn size(path: &Path) -> Result<u64, Error> {
    fs::metadata(path).map(|meta| meta.len()).map_err(Error::io("read", path))
}
