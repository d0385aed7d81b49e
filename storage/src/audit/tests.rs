use std::{fs, path::Path, sync::Arc};

use super::*;
use crate::Error;

const STREAM: StreamId = StreamId { broker: 7, boot: 1 };
const NEXT_BOOT: StreamId = StreamId { broker: 7, boot: 2 };

fn directory() -> tempfile::TempDir {
    tempfile::tempdir().expect("a temporary directory")
}

fn small() -> Options {
    Options { segment_bytes: 250, ..Options::default() }
}

fn open(root: &Path, stream: StreamId) -> Journal {
    Journal::open(root, stream, small()).expect("the journal opens")
}

/// Appends records one by one, so that segments are sealed between them.
fn fill(journal: &Journal, count: u64) {
    for n in 0..count {
        let body = format!("record {n}");
        journal.append(1_000 + n, body.as_bytes()).expect("taken").wait().expect("durable");
    }
}

fn files(root: &Path, stream: StreamId) -> Vec<std::path::PathBuf> {
    let dir = root.join(stream.to_string());
    segment::segments(&dir).expect("lists").known.into_iter().map(|segment| segment.path).collect()
}

/// What a verification finds of a journal in which nothing is broken.
fn verified(root: &Path) -> Result<Report, Error> {
    verify(root).and_then(Report::whole)
}

fn broken(result: Result<Report, Error>) -> Arc<Broken> {
    match result {
        Err(Error::AuditBroken(broken)) => broken,
        other => panic!("expected a broken journal, found {other:?}"),
    }
}

#[test]
fn records_are_chained_and_verified_over_segments_and_boots() {
    let dir = directory();
    let journal = open(dir.path(), STREAM);
    fill(&journal, 10);
    let head = journal.head();
    drop(journal);
    let journal = open(dir.path(), NEXT_BOOT);
    fill(&journal, 3);
    let report = verified(dir.path()).expect("verifies");
    assert_eq!(report.records(), 13);
    let first = &report.streams[0];
    assert_eq!((first.stream, first.records, first.first_seq, first.head), (STREAM, 10, 1, head.1));
    assert!(first.segments > 2);
    let records = Reader::open(dir.path(), STREAM, 4).expect("opens").next_batch(100, usize::MAX).expect("reads");
    assert_eq!(records.len(), 7);
    assert_eq!((records[0].seq, records[0].time_ms, records[0].body()), (4, 1_003, b"record 3".as_slice()));
    assert!(records.windows(2).all(|pair| pair[1].prev_hash == pair[0].hash));
    assert_eq!(streams(dir.path()).expect("lists"), [STREAM, NEXT_BOOT]);
}

#[test]
fn each_flipped_byte_is_found_and_its_record_named() {
    let dir = directory();
    let journal = open(dir.path(), STREAM);
    fill(&journal, 6);
    drop(journal);
    let mut seq = 1;
    for path in files(dir.path(), STREAM) {
        let bytes = fs::read(&path).expect("reads");
        let mut start = 0;
        let mut starts = Vec::new();
        while start < bytes.len() {
            let length = record::first(&bytes[start..]).expect("whole").len() + record::FRAME_BYTES;
            starts.extend(std::iter::repeat_n((start as u64, seq), length));
            start += length;
            seq += 1;
        }
        for at in 0..bytes.len() {
            for flip in [0x01, 0x80] {
                let mut changed = bytes.clone();
                changed[at] ^= flip;
                fs::write(&path, &changed).expect("writes");
                let found = broken(verified(dir.path()));
                assert_eq!((found.offset, found.seq), starts[at], "byte {at} of {}", path.display());
                assert_eq!(Some(found.segment.as_str()), path.file_name().and_then(|name| name.to_str()));
                assert_eq!(found.stream, STREAM.to_string());
            }
        }
        fs::write(&path, &bytes).expect("writes");
    }
    assert_eq!(verified(dir.path()).expect("whole again").records(), 6);
}

#[test]
fn a_missing_or_swapped_segment_is_found() {
    let dir = directory();
    let journal = open(dir.path(), STREAM);
    fill(&journal, 12);
    drop(journal);
    let paths = files(dir.path(), STREAM);
    assert!(paths.len() >= 4);
    let aside = dir.path().join("aside");
    let away = tempfile::NamedTempFile::new().expect("a file");
    fs::copy(&paths[1], away.path()).expect("copies");
    fs::remove_file(&paths[1]).expect("removes");
    assert!(broken(verified(dir.path())).why.contains("begins with record"));
    fs::copy(&paths[2], &paths[1]).expect("copies");
    assert!(broken(verified(dir.path())).why.contains("sequence"));
    fs::copy(away.path(), &paths[1]).expect("copies");
    verified(dir.path()).expect("whole again");
    fs::create_dir(&aside).expect("creates");
    assert_eq!(broken(verified(dir.path())).stream, "aside");
}

#[test]
fn a_verification_goes_on_behind_a_broken_stream_and_names_each() {
    let dir = directory();
    let boots: Vec<StreamId> = (1..=4).map(|boot| StreamId { broker: 7, boot }).collect();
    for &stream in &boots {
        fill(&open(dir.path(), stream), 6);
    }
    for &stream in [&boots[0], &boots[2]] {
        let path = files(dir.path(), stream).remove(1);
        let mut bytes = fs::read(&path).expect("reads");
        bytes[12] ^= 1;
        fs::write(&path, &bytes).expect("writes");
    }
    let report = verify(dir.path()).expect("reads");
    let named: Vec<_> = report.broken.iter().map(|place| place.stream.clone()).collect();
    assert_eq!(named, [boots[0].to_string(), boots[2].to_string()]);
    let whole: Vec<_> = report.streams.iter().map(|stream| stream.stream).collect();
    assert_eq!((whole, report.records()), (vec![boots[1], boots[3]], 12));
    assert!(report.whole().is_err());
}

#[test]
fn a_record_that_a_crash_cut_is_removed_at_the_next_start() {
    let dir = directory();
    let journal = open(dir.path(), STREAM);
    fill(&journal, 5);
    let whole = fs::read(files(dir.path(), STREAM).last().expect("a segment")).expect("reads");
    drop(journal);
    let path = files(dir.path(), STREAM).pop().expect("a segment");
    let last_start = {
        let mut start = 0;
        let mut last = 0;
        while start < whole.len() {
            last = start;
            start += record::first(&whole[start..]).expect("whole").len() + record::FRAME_BYTES;
        }
        last
    };
    for cut in last_start + 1..whole.len() {
        fs::write(&path, &whole[..cut]).expect("writes");
        assert!(verified(dir.path()).is_err(), "an unrepaired end is not whole");
        drop(open(dir.path(), NEXT_BOOT));
        let left = verify_stream(dir.path(), STREAM).expect("whole").records;
        assert_eq!(left, 4, "cut at {cut}");
    }
    fs::write(&path, &whole).expect("writes");
    drop(open(dir.path(), NEXT_BOOT));
    assert_eq!(verify_stream(dir.path(), STREAM).expect("whole").records, 5, "a whole end is left alone");
}

#[test]
fn damage_with_readable_records_behind_it_is_left_and_told() {
    let dir = directory();
    let journal = Journal::open(dir.path(), STREAM, Options::default()).expect("opens");
    fill(&journal, 5);
    drop(journal);
    let path = files(dir.path(), STREAM).pop().expect("a segment");
    let mut bytes = fs::read(&path).expect("reads");
    bytes[3] ^= 1;
    fs::write(&path, &bytes).expect("writes");
    let journal = open(dir.path(), NEXT_BOOT);
    assert_eq!(journal.broken_streams().len(), 1);
    assert_eq!(fs::read(&path).expect("reads"), bytes);
    drop(journal);
    assert!(matches!(Journal::open(dir.path(), STREAM, small()), Err(Error::AuditBroken(_))));
}

#[test]
fn a_stream_that_is_opened_again_goes_on_where_it_ended() {
    let dir = directory();
    fill(&open(dir.path(), STREAM), 3);
    let journal = open(dir.path(), STREAM);
    assert_eq!(journal.head().0, 3);
    fill(&journal, 3);
    assert_eq!(verified(dir.path()).expect("verifies").records(), 6);
}

#[test]
fn many_records_share_a_sync_and_all_are_durable() {
    let dir = directory();
    let journal = Journal::open(dir.path(), STREAM, Options::default()).expect("opens");
    let tickets: Vec<Ticket> = (0..2_000).map(|n| journal.append(n, b"x").expect("taken")).collect();
    for ticket in tickets {
        ticket.wait().expect("durable");
    }
    assert_eq!(journal.durable_seq(), 2_000);
    assert_eq!(verified(dir.path()).expect("verifies while it is open").records(), 2_000);
}

#[tokio::test]
async fn a_reader_follows_the_stream_while_it_is_written() {
    let dir = directory();
    let journal = open(dir.path(), STREAM);
    let mut reader = journal.reader(STREAM, 1).expect("opens");
    assert_eq!(reader.read_next().expect("reads"), None);
    for n in 1..=20 {
        let ticket = journal.append(n, &n.to_be_bytes()).expect("taken");
        assert!(reader.wait().await);
        let record = reader.read_next().expect("reads").expect("there is one");
        assert_eq!((record.seq, record.hash), (n, ticket.hash));
        ticket.durable().await.expect("durable");
    }
    assert_eq!(reader.position(), 21);
    drop(journal);
    assert!(!reader.wait().await, "nothing more will come");
}

#[test]
fn what_is_over_a_limit_is_refused() {
    let dir = directory();
    let options = Options { quota_bytes: 200, ..Options::default() };
    let journal = Journal::open(dir.path(), STREAM, options).expect("opens");
    assert!(matches!(journal.append(0, &vec![0; BODY_BYTES_MAX + 1]), Err(Error::AuditRecordTooLarge { .. })));
    fill(&journal, 2);
    assert!(matches!(journal.append(0, b"over"), Err(Error::AuditFull { .. })));
    drop(journal);
    let again = Journal::open(dir.path(), NEXT_BOOT, options).expect("opens");
    assert!(matches!(again.append(0, &[0; 100]), Err(Error::AuditFull { .. })), "earlier boots count too");
}

#[test]
fn a_disk_that_fails_refuses_records_and_is_used_again_when_it_works() {
    let dir = directory();
    let journal = Journal::open(dir.path(), STREAM, Options { segment_bytes: 1, ..Options::default() });
    let journal = journal.expect("opens");
    fill(&journal, 2);
    // A directory stands where the next segment should be made.
    let obstacle = dir.path().join(STREAM.to_string()).join(format!("{:020}.seg", 3));
    fs::create_dir(&obstacle).expect("creates");
    assert!(journal.append(0, b"refused").and_then(Ticket::wait).is_err());
    assert_eq!(journal.head().0, 2, "its number is free again");
    fs::remove_dir(&obstacle).expect("removes");
    fill(&journal, 2);
    assert_eq!(verified(dir.path()).expect("verifies").records(), 4);
}

#[test]
fn retention_deletes_whole_sealed_segments_that_nobody_needs() {
    let dir = directory();
    fill(&open(dir.path(), STREAM), 12);
    let journal = open(dir.path(), NEXT_BOOT);
    fill(&journal, 12);
    let before = files(dir.path(), NEXT_BOOT).len();
    assert_eq!(journal.delete_sealed_before(u64::MAX, |_| 1).expect("deletes nothing"), 0);
    assert_eq!(journal.delete_sealed_before(1_000, |_| u64::MAX).expect("deletes nothing"), 0);
    let freed = journal.delete_sealed_before(1_006, |stream| if stream == STREAM { 4 } else { u64::MAX });
    assert!(freed.expect("deletes") > 0);
    let report = verified(dir.path()).expect("verifies");
    assert_eq!(report.streams[0].first_seq, 4, "what is needed stays");
    assert!(files(dir.path(), NEXT_BOOT).len() < before);
    assert!(matches!(Reader::open(dir.path(), STREAM, 1), Err(Error::AuditGone { first: 4, .. })));
    journal.delete_sealed_before(u64::MAX, |_| u64::MAX).expect("deletes");
    assert_eq!(streams(dir.path()).expect("lists"), [NEXT_BOOT], "an empty stream goes");
    assert_eq!(files(dir.path(), NEXT_BOOT).len(), 1, "the segment in use stays");
    fill(&journal, 1);
    verified(dir.path()).expect("verifies");
}
