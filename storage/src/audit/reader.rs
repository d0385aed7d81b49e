//! Reads a stream from a place on, and follows it while it is written.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use tokio::sync::watch;

use super::{
    Broken, Record, StreamId,
    record::{self, FRAME_BYTES},
    segment::{Segment, segments},
};
use crate::Error;

/// A place in a stream.
pub struct Reader {
    dir: PathBuf,
    stream: StreamId,
    /// The first record that is wanted.
    from_seq: u64,
    /// The record that stands at `offset`.
    next_seq: u64,
    open: Option<(Segment, File)>,
    offset: u64,
    last_hash: Option<[u8; 32]>,
    /// The last durable record of a stream that is being written.
    durable: Option<watch::Receiver<u64>>,
}

impl Reader {
    /// Reads a stream that is not being written any more; its end is the end of its files.
    ///
    /// **Errors:** [`Error::AuditGone`] when retention has deleted `from_seq`.
    pub fn open(root: &Path, stream: StreamId, from_seq: u64) -> Result<Reader, Error> {
        Reader::start(root, stream, from_seq, None)
    }

    pub(super) fn start(
        root: &Path,
        stream: StreamId,
        from_seq: u64,
        durable: Option<watch::Receiver<u64>>,
    ) -> Result<Reader, Error> {
        let from_seq = from_seq.max(1);
        let dir = root.join(stream.to_string());
        let known = segments(&dir)?.known;
        let start = known.iter().rev().find(|segment| segment.first_seq <= from_seq);
        let next_seq = match (start, known.first()) {
            (Some(segment), _) => segment.first_seq,
            (None, Some(first)) => return Err(Error::AuditGone { stream, first: first.first_seq }),
            (None, None) => 1,
        };
        Ok(Reader { dir, stream, from_seq, next_seq, open: None, offset: 0, last_hash: None, durable })
    }

    /// The next record; `None` at the end of the stream, or when no more is durable yet. Blocks on the disk only.
    pub fn read_next(&mut self) -> Result<Option<Record>, Error> {
        loop {
            if self.durable.as_ref().is_some_and(|durable| *durable.borrow() < self.next_seq) {
                return Ok(None);
            }
            let Some(record) = self.read()? else { return Ok(None) };
            if record.seq >= self.from_seq {
                return Ok(Some(record));
            }
        }
    }

    /// Records until one of the limits is met; empty when there are none yet.
    pub fn next_batch(&mut self, records_max: usize, bytes_max: usize) -> Result<Vec<Record>, Error> {
        let mut batch = Vec::new();
        let mut size_bytes = 0;
        while batch.len() < records_max && size_bytes < bytes_max {
            let Some(record) = self.read_next()? else { break };
            size_bytes += record.bytes().len();
            batch.push(record);
        }
        Ok(batch)
    }

    /// Waits until there is more to read; `false` when there never will be. **Cancel safety:** safe.
    pub async fn wait(&mut self) -> bool {
        let wanted = self.next_seq.max(self.from_seq);
        match &mut self.durable {
            Some(durable) => durable.wait_for(|durable| *durable >= wanted).await.is_ok(),
            None => false,
        }
    }

    /// The record that [`Reader::read_next`] will return.
    pub fn position(&self) -> u64 {
        self.next_seq.max(self.from_seq)
    }

    /// Reads the record at the place, moving to the next segment where one ends.
    fn read(&mut self) -> Result<Option<Record>, Error> {
        let mut head = [0; FRAME_BYTES];
        loop {
            if let Some((segment, file)) = &self.open {
                match file.read_exact_at(&mut head, self.offset) {
                    Ok(()) => break,
                    Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                        let size = file.metadata().map_err(Error::io("read", &segment.path))?.len();
                        if size > self.offset {
                            return Err(self.broken("it is cut short"));
                        }
                    }
                    Err(error) => return Err(Error::io("read", &segment.path)(error)),
                }
            }
            let segment = Segment::new(&self.dir, self.next_seq);
            if self.open.as_ref().is_some_and(|(open, _)| *open == segment) {
                return Ok(None);
            }
            match File::open(&segment.path) {
                Ok(file) => {
                    self.open = Some((segment, file));
                    self.offset = 0;
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => return self.missing(),
                Err(error) => return Err(Error::io("open", &segment.path)(error)),
            }
        }
        let length = record::length(head).map_err(|why| self.broken(why))?;
        let mut bytes = vec![0; length];
        if let Some((segment, file)) = &self.open {
            file.read_exact_at(&mut bytes, self.offset + FRAME_BYTES as u64).map_err(|error| match error.kind() {
                io::ErrorKind::UnexpectedEof => self.broken("it is cut short"),
                _ => Error::io("read", &segment.path)(error),
            })?;
        }
        let record = record::check(head, &bytes).and_then(|()| Record::parse(bytes)).map_err(|why| self.broken(why))?;
        if (record.stream, record.seq) != (self.stream, self.next_seq) {
            return Err(self.broken("another record stands in its place"));
        }
        if self.last_hash.is_some_and(|hash| hash != record.prev_hash) {
            return Err(self.broken("it does not name the record before it"));
        }
        self.offset += (FRAME_BYTES + length) as u64;
        self.next_seq += 1;
        self.last_hash = Some(record.hash);
        Ok(Some(record))
    }

    /// No segment begins with the next record: the stream ends, or retention was faster.
    fn missing(&self) -> Result<Option<Record>, Error> {
        let later = segments(&self.dir)?.known.into_iter().find(|segment| segment.first_seq > self.next_seq);
        match later {
            Some(later) => Err(Error::AuditGone { stream: self.stream, first: later.first_seq }),
            None => Ok(None),
        }
    }

    fn broken(&self, why: &str) -> Error {
        let broken = Broken {
            stream: self.stream.to_string(),
            segment: self.open.as_ref().map(|(segment, _)| segment.name()).unwrap_or_default(),
            offset: self.offset,
            seq: self.next_seq,
            why: why.to_owned(),
        };
        Arc::new(broken).into()
    }
}
