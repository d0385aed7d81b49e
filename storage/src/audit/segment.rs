//! The files of a journal and their names.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use super::StreamId;
use crate::Error;

const SUFFIX: &str = ".seg";

/// One segment file.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Segment {
    pub(super) first_seq: u64,
    pub(super) path: PathBuf,
}

impl Segment {
    pub(super) fn new(dir: &Path, first_seq: u64) -> Segment {
        Segment { first_seq, path: dir.join(format!("{first_seq:020}{SUFFIX}")) }
    }

    pub(super) fn name(&self) -> String {
        self.path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
    }
}

/// What a directory holds that should and that should not be there.
pub(super) struct Listing<T> {
    pub(super) known: Vec<T>,
    pub(super) foreign: Vec<String>,
}

/// The streams in an audit directory, in order.
pub fn streams(root: &Path) -> Result<Vec<StreamId>, Error> {
    list_streams(root).map(|listing| listing.known)
}

pub(super) fn list_streams(root: &Path) -> Result<Listing<StreamId>, Error> {
    list(root, |name| name.parse().ok())
}

/// The segments of a stream, in order.
pub(super) fn segments(dir: &Path) -> Result<Listing<Segment>, Error> {
    list(dir, |name| {
        let segment = Segment::new(dir, name.strip_suffix(SUFFIX)?.parse().ok()?);
        (segment.name() == name).then_some(segment)
    })
}

fn list<T: Ord>(dir: &Path, parse: impl Fn(&str) -> Option<T>) -> Result<Listing<T>, Error> {
    let mut listing = Listing { known: Vec::new(), foreign: Vec::new() };
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(listing),
        Err(error) => return Err(Error::io("list", dir)(error)),
    };
    for entry in entries {
        let name = entry.map_err(Error::io("list", dir))?.file_name().to_string_lossy().into_owned();
        match parse(&name) {
            Some(known) => listing.known.push(known),
            None => listing.foreign.push(name),
        }
    }
    listing.known.sort();
    listing.foreign.sort();
    Ok(listing)
}
