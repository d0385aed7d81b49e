//! Blocks of a snapshot stream: tag u8, length u32, crc32c u32 (over tag, length and content), content; all of them
//! run through one SHA-256. Integers are big-endian.

use std::io::{self, Read, Write};

use sha2::{Digest, Sha256};

use crate::Error;

/// Length of a block's content at most; a row must fit into one block.
pub(super) const BLOCK_BYTES_MAX: usize = 64 << 20;
const FRAME_BYTES: usize = 9;

/// Writes blocks and digests them.
pub(super) struct Sink<W> {
    to: W,
    digest: Sha256,
}

impl<W: Write> Sink<W> {
    pub(super) fn new(to: W) -> Sink<W> {
        Sink { to, digest: Sha256::new() }
    }

    pub(super) fn write(&mut self, tag: u8, content: &[u8]) -> Result<(), Error> {
        let length = u32::try_from(content.len()).unwrap_or(u32::MAX);
        if content.len() > BLOCK_BYTES_MAX {
            let why = format!("a block of {} bytes is over the limit of {BLOCK_BYTES_MAX}", content.len());
            return Err(Error::SnapshotDamaged { offset: 0, why });
        }
        let mut frame = [0; FRAME_BYTES];
        frame[0] = tag;
        frame[1..5].copy_from_slice(&length.to_be_bytes());
        let crc = crc32c::crc32c_append(crc32c::crc32c(&frame[..5]), content);
        frame[5..].copy_from_slice(&crc.to_be_bytes());
        self.digest.update(frame);
        self.digest.update(content);
        self.to.write_all(&frame).and_then(|()| self.to.write_all(content)).map_err(Error::io("write", "snapshot"))
    }

    pub(super) fn digest(&self) -> [u8; 32] {
        self.digest.clone().finalize().into()
    }

    pub(super) fn flush(&mut self) -> Result<(), Error> {
        self.to.flush().map_err(Error::io("write", "snapshot"))
    }
}

/// Reads blocks and checks them.
pub(super) struct Source<R> {
    from: R,
    digest: Sha256,
    offset: u64,
}

impl<R: Read> Source<R> {
    pub(super) fn new(from: R) -> Source<R> {
        Source { from, digest: Sha256::new(), offset: 0 }
    }

    pub(super) fn damaged(&self, why: impl Into<String>) -> Error {
        Error::SnapshotDamaged { offset: self.offset, why: why.into() }
    }

    /// The next block, and the digest of all before it.
    pub(super) fn read(&mut self) -> Result<(u8, Vec<u8>, [u8; 32]), Error> {
        let before = self.digest.clone().finalize().into();
        let mut frame = [0; FRAME_BYTES];
        self.fill(&mut frame)?;
        let [tag, l0, l1, l2, l3, c0, c1, c2, c3] = frame;
        let length = u32::from_be_bytes([l0, l1, l2, l3]) as usize;
        if length > BLOCK_BYTES_MAX {
            return Err(self.damaged("a block is longer than a block may be"));
        }
        // Grown as it comes, so that a lying length costs no memory.
        let mut content = Vec::new();
        let read = (&mut self.from).take(length as u64).read_to_end(&mut content);
        if read.map_err(Error::io("read", "snapshot"))? < length {
            return Err(self.damaged("it ends within a block"));
        }
        let crc = crc32c::crc32c_append(crc32c::crc32c(&frame[..5]), &content);
        if crc != u32::from_be_bytes([c0, c1, c2, c3]) {
            return Err(self.damaged("the checksum of a block does not match"));
        }
        self.offset += length as u64;
        self.digest.update(frame);
        self.digest.update(&content);
        Ok((tag, content, before))
    }

    pub(super) fn end(&mut self) -> Result<(), Error> {
        match self.from.read(&mut [0]).map_err(Error::io("read", "snapshot"))? {
            0 => Ok(()),
            _ => Err(self.damaged("something follows its end")),
        }
    }

    fn fill(&mut self, buffer: &mut [u8]) -> Result<(), Error> {
        match self.from.read_exact(buffer) {
            Ok(()) => {
                self.offset += buffer.len() as u64;
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Err(self.damaged("it ends too early")),
            Err(error) => Err(Error::io("read", "snapshot")(error)),
        }
    }
}
