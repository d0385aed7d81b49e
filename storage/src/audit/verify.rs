//! Proves that a journal is what was written, or names where it is not.

use std::{path::Path, sync::Arc, time::Duration};

use super::{
    Record, StreamId, record,
    segment::{Segment, list_streams, segments},
};
use crate::Error;

/// How often the end of a journal that is being written is looked at again.
const TAIL_ATTEMPTS: u32 = 20;
/// How long the writer gets between two looks.
const TAIL_PAUSE: Duration = Duration::from_millis(10);

/// The first place at which a journal is not what was written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("audit stream `{stream}`, segment `{segment}`, byte {offset}: record {seq} is broken: {why}")]
pub struct Broken {
    /// The stream's directory.
    pub stream: String,
    /// The segment file; empty when the fault is not in a file.
    pub segment: String,
    /// Where the record begins in the file.
    pub offset: u64,
    /// The record that should stand there.
    pub seq: u64,
    /// What is wrong.
    pub why: String,
}

/// What a verification saw.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Report {
    /// Each whole stream, in order.
    pub streams: Vec<StreamReport>,
    /// The first broken place of each other one, and of what is no stream.
    pub broken: Vec<Arc<Broken>>,
}

impl Report {
    /// The same, when nothing is broken.
    ///
    /// **Errors:** [`Error::AuditBroken`] names the first broken place.
    pub fn whole(self) -> Result<Report, Error> {
        match self.broken.first() {
            Some(place) => Err(place.clone().into()),
            None => Ok(self),
        }
    }

    /// Records of all whole streams.
    pub fn records(&self) -> u64 {
        self.streams.iter().map(|stream| stream.records).sum()
    }
}

/// What a verification saw of one stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamReport {
    /// The stream.
    pub stream: StreamId,
    /// The first record that retention has left; 1 when all are there.
    pub first_seq: u64,
    /// Number of records.
    pub records: u64,
    /// Number of segments.
    pub segments: usize,
    /// Hash of the last record; zero when there is none.
    pub head: [u8; 32],
}

/// Checks every byte of every stream.
///
/// What is missing at the end of a stream can only be told by comparing [`StreamReport::head`] with a head that was
/// kept elsewhere. **Errors:** what cannot be read at all; what is broken is in the report.
pub fn verify(root: &Path) -> Result<Report, Error> {
    let listing = list_streams(root)?;
    let mut report = Report::default();
    for name in listing.foreign {
        let why = "this is not an audit stream".to_owned();
        report.broken.push(Arc::new(Broken { stream: name, segment: String::new(), offset: 0, seq: 0, why }));
    }
    for stream in listing.known {
        match verify_stream(root, stream) {
            Ok(stream) => report.streams.push(stream),
            Err(Error::AuditBroken(place)) => report.broken.push(place),
            Err(error) => return Err(error),
        }
    }
    Ok(report)
}

/// Checks every byte of one stream.
pub fn verify_stream(root: &Path, stream: StreamId) -> Result<StreamReport, Error> {
    let dir = root.join(stream.to_string());
    let mut attempts = 0;
    loop {
        let listing = segments(&dir)?;
        let sizes = || listing.known.iter().map(|segment| segment.path.metadata().map_or(0, |meta| meta.len()));
        let before: u64 = sizes().sum();
        let result = Walk::new(stream).run(&listing.known, listing.foreign.first());
        let Err(Failed { error, at_end: true }) = result else { return result.map_err(|failed| failed.error) };
        // The last record may be on its way to the disk right now.
        attempts += 1;
        if attempts >= TAIL_ATTEMPTS {
            return Err(error);
        }
        std::thread::sleep(TAIL_PAUSE);
        let after: u64 = sizes().sum();
        if after == before && attempts > 1 {
            return Err(error);
        }
    }
}

struct Failed {
    error: Error,
    /// It is the end of the last segment that is cut short.
    at_end: bool,
}

struct Walk {
    report: StreamReport,
    next_seq: Option<u64>,
}

impl Walk {
    fn new(stream: StreamId) -> Walk {
        let report = StreamReport { stream, first_seq: 1, records: 0, segments: 0, head: [0; 32] };
        Walk { report, next_seq: None }
    }

    fn run(mut self, segments: &[Segment], foreign: Option<&String>) -> Result<StreamReport, Failed> {
        if let Some(name) = foreign {
            return Err(self.broken(name.clone(), 0, 0, "this is not a segment"));
        }
        for (at, segment) in segments.iter().enumerate() {
            let bytes = std::fs::read(&segment.path)
                .map_err(|error| Failed { error: Error::io("read", &segment.path)(error), at_end: false })?;
            self.segment(segment, &bytes, at + 1 == segments.len())?;
        }
        Ok(self.report)
    }

    fn segment(&mut self, segment: &Segment, bytes: &[u8], last: bool) -> Result<(), Failed> {
        let next = *self.next_seq.get_or_insert(segment.first_seq);
        if self.report.segments == 0 {
            self.report.first_seq = segment.first_seq;
        }
        self.report.segments += 1;
        if segment.first_seq != next {
            let why = format!("the segment begins with record {}", segment.first_seq);
            return Err(self.broken(segment.name(), 0, next, &why));
        }
        if bytes.is_empty() {
            let failed = self.broken(segment.name(), 0, next, "the segment is empty");
            return Err(Failed { at_end: last, ..failed });
        }
        let mut offset = 0;
        while offset < bytes.len() {
            let seq = segment.first_seq.max(self.next_seq.unwrap_or(segment.first_seq));
            let found = record::first(&bytes[offset..]);
            let at_end = last && found == Err("it is cut short");
            let result = found.and_then(|bytes| Record::parse(bytes.to_vec())).and_then(|record| {
                self.follows(&record, seq)?;
                Ok(record)
            });
            let record = result.map_err(|why| {
                let failed = self.broken(segment.name(), offset as u64, seq, why);
                Failed { at_end, ..failed }
            })?;
            offset += record::FRAME_BYTES + record.bytes().len();
            self.report.records += 1;
            self.report.head = record.hash;
            self.next_seq = Some(seq + 1);
        }
        Ok(())
    }

    fn follows(&self, record: &Record, seq: u64) -> Result<(), &'static str> {
        if record.stream != self.report.stream {
            return Err("it belongs to another stream");
        }
        if record.seq != seq {
            return Err("it has another sequence number");
        }
        let begins_here = self.report.records == 0 && seq > 1;
        if !begins_here && record.prev_hash != self.report.head {
            return Err("it does not name the record before it");
        }
        Ok(())
    }

    fn broken(&self, segment: String, offset: u64, seq: u64, why: &str) -> Failed {
        let stream = self.report.stream.to_string();
        let broken = Broken { stream, segment, offset, seq, why: why.to_owned() };
        Failed { error: Arc::new(broken).into(), at_end: false }
    }
}
