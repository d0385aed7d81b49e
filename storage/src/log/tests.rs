use std::{
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use bytes::Bytes;
use proptest::prelude::*;

use super::*;
use crate::engine::{
    Space,
    mem::{Disk, Fault},
};

fn record(term: u64, index: u64) -> Record {
    let payload = Payload::Normal(Bytes::from(format!("{term}/{index}")));
    Record { id: LogId { term, node: 1, index }, payload }
}

fn records(term: u64, range: Range<u64>) -> Vec<Record> {
    range.map(|index| record(term, index)).collect()
}

/// A `Done`, and the way to wait for it.
fn done() -> (Done, impl FnOnce() -> Result<(), Error>) {
    let (tell, told) = mpsc::sync_channel(1);
    let done: Done = Box::new(move |result| tell.send(result).expect("the test waits"));
    (done, move || told.recv_timeout(Duration::from_secs(20)).expect("called back in time"))
}

fn append(log: &Log, records: Vec<Record>) -> Result<(), Error> {
    let (done, wait) = done();
    log.append(records, done);
    wait()
}

fn truncate(log: &Log, from: u64) -> Result<(), Error> {
    let (done, wait) = done();
    log.truncate_from(from, done);
    wait()
}

fn purge(log: &Log, index: u64) -> Result<(), Error> {
    let (done, wait) = done();
    log.purge_upto(LogId { term: 1, node: 1, index }, done);
    wait()
}

fn open(disk: &Disk) -> Log {
    Log::open(Arc::new(disk.open().expect("the disk is free"))).expect("the log opens")
}

fn indices(log: &Log) -> Vec<u64> {
    log.read(0..u64::MAX).expect("reads").iter().map(|record| record.id.index).collect()
}

#[test]
fn all_is_found_again_after_reopening() {
    let disk = Disk::new();
    let log = open(&disk);
    let vote = Vote { term: 2, node: 9, committed: true };
    let (voted, wait) = done();
    log.save_vote(vote, voted);
    append(&log, records(1, 0..10)).expect("appends");
    log.save_committed(Some(record(1, 7).id));
    wait().expect("voted");
    purge(&log, 2).expect("purges");
    drop(log);
    let log = open(&disk);
    assert_eq!(log.vote(), Some(vote));
    assert_eq!(log.committed(), Some(record(1, 7).id));
    assert_eq!(log.bounds(), Bounds { last_purged: Some(record(1, 2).id), last: Some(record(1, 9).id) });
    assert_eq!(log.read(0..100).expect("reads"), records(1, 3..10));
    assert_eq!(log.suspect(), None);
}

#[test]
fn records_are_readable_before_they_are_durable_and_the_watchdog_sees_them_wait() {
    let disk = Disk::new();
    let log = open(&disk);
    append(&log, records(1, 0..3)).expect("appends");
    disk.set_stalled(true);
    let (stalled, wait) = done();
    log.append(records(1, 3..6), stalled);
    assert_eq!(log.read(1..9).expect("reads"), records(1, 1..6));
    let deadline = Instant::now() + Duration::from_secs(20);
    while log.oldest_unsynced_ms() < 5 {
        assert!(Instant::now() < deadline);
        std::thread::yield_now();
    }
    disk.set_stalled(false);
    wait().expect("durable at last");
    assert_eq!(log.oldest_unsynced_ms(), 0);
}

#[test]
fn what_was_not_synced_when_power_went_is_reported_as_failed() {
    let disk = Disk::new();
    let log = open(&disk);
    append(&log, records(1, 0..3)).expect("appends");
    disk.set_stalled(true);
    let (lost, wait) = done();
    log.append(records(1, 3..6), lost);
    disk.cut_power(0);
    assert!(wait().is_err());
    assert!(append(&log, records(1, 6..7)).is_err(), "nothing is accepted after a failure");
    drop(log);
    assert_eq!(indices(&open(&disk)), [0, 1, 2]);
}

#[test]
fn after_a_failed_write_nothing_is_durable_any_more() {
    for fault in [Fault::Io, Fault::NoSpace] {
        let disk = Disk::new();
        let log = open(&disk);
        append(&log, records(1, 0..3)).expect("appends");
        disk.fail_write(1, fault);
        let error = append(&log, records(1, 3..4)).expect_err("fails");
        assert_eq!(error.is_no_space(), fault == Fault::NoSpace);
        assert!(append(&log, records(1, 4..5)).is_err());
        assert!(log.failure().is_some());
        drop(log);
        assert_eq!(indices(&open(&disk)), [0, 1, 2]);
    }
}

#[test]
fn an_append_that_leaves_a_gap_is_refused() {
    let log = open(&Disk::new());
    append(&log, records(1, 0..3)).expect("appends");
    assert!(matches!(append(&log, records(1, 4..5)), Err(Error::LogGap { expected: 3, found: 4 })));
    assert!(matches!(append(&log, records(1, 2..3)), Err(Error::LogGap { expected: 3, found: 2 })));
    append(&log, records(1, 3..4)).expect("goes on");
}

#[test]
fn a_purge_beyond_the_end_moves_the_end() {
    let disk = Disk::new();
    let log = open(&disk);
    append(&log, records(1, 0..3)).expect("appends");
    purge(&log, 9).expect("purges");
    purge(&log, 4).expect("an older purge changes nothing");
    append(&log, records(1, 10..12)).expect("continues behind the purge");
    drop(log);
    let log = open(&disk);
    assert_eq!(log.bounds().last_purged, Some(record(1, 9).id));
    assert_eq!(log.read(0..100).expect("reads"), records(1, 10..12));
}

#[test]
fn a_truncated_end_is_replaced_by_what_follows() {
    let disk = Disk::new();
    append(&open(&disk), records(1, 0..6)).expect("appends");
    let log = open(&disk);
    truncate(&log, 4).expect("truncates what is only on disk");
    assert_eq!(log.bounds().last, Some(record(1, 3).id));
    append(&log, records(2, 4..8)).expect("appends");
    truncate(&log, 7).expect("truncates what is in memory");
    let expected = [records(1, 0..4), records(2, 4..7)].concat();
    assert_eq!(log.read(0..100).expect("reads"), expected);
    drop(log);
    let log = open(&disk);
    assert_eq!(log.read(0..100).expect("reads"), expected);
    truncate(&log, 0).expect("truncates all");
    assert_eq!(log.bounds(), Bounds::default());
    append(&log, records(3, 0..1)).expect("begins anew");
}

#[test]
fn a_limited_read_returns_at_least_one_record() {
    let disk = Disk::new();
    let log = open(&disk);
    append(&log, records(1, 0..20)).expect("appends");
    let one = record(1, 0).size_bytes();
    assert_eq!(log.read_limited(0..20, 0).expect("reads"), records(1, 0..1));
    assert_eq!(log.read_limited(3..20, 2 * one).expect("reads"), records(1, 3..5));
    drop(log);
    let log = open(&disk);
    append(&log, records(1, 20..22)).expect("appends");
    assert_eq!(log.read_limited(3..22, 2 * one).expect("reads"), records(1, 3..5));
    assert_eq!(log.read_limited(19..22, 1 << 20).expect("reads"), records(1, 19..22));
}

#[test]
fn a_damaged_end_is_dropped_and_makes_the_node_suspect() {
    let disk = Disk::new();
    append(&open(&disk), records(1, 0..6)).expect("appends");
    disk.corrupt(Space::Log, &codec::key(5), |value| value[20] ^= 1);
    let log = open(&disk);
    assert_eq!((log.suspect(), log.bounds().last), (Some(5), Some(record(1, 4).id)));
    drop(log);
    let log = open(&disk);
    assert_eq!(log.suspect(), Some(5), "it stays suspect until told otherwise");
    let (cleared, wait) = done();
    log.clear_suspect(cleared);
    wait().expect("cleared");
    drop(log);
    assert_eq!(open(&disk).suspect(), None);
}

#[test]
fn damage_with_readable_records_behind_it_is_refused_by_index() {
    let disk = Disk::new();
    append(&open(&disk), records(1, 0..6)).expect("appends");
    disk.corrupt(Space::Log, &codec::key(3), |value| value[23] ^= 1);
    let refused = Log::open(Arc::new(disk.open().expect("free"))).err();
    assert!(matches!(refused, Some(Error::LogDamaged { index: 3, .. })), "{refused:?}");
}

#[test]
fn a_damaged_vote_is_refused() {
    let disk = Disk::new();
    let log = open(&disk);
    let (voted, wait) = done();
    log.save_vote(Vote { term: 1, node: 1, committed: false }, voted);
    wait().expect("voted");
    drop(log);
    disk.corrupt(Space::LogMeta, b"vote", |value| value[3] ^= 4);
    let refused = Log::open(Arc::new(disk.open().expect("free"))).err();
    assert!(matches!(refused, Some(Error::MetaDamaged { what: "vote", .. })), "{refused:?}");
}

#[test]
fn a_driven_log_writes_when_its_driver_does_and_not_before() {
    let disk = Disk::new();
    let (log, driver) = Log::open_driven(Arc::new(disk.open().expect("free"))).expect("opens");
    let (written, wait) = done();
    log.append(records(1, 0..3), written);
    assert_eq!(log.read(0..9).expect("reads").len(), 3, "readable before it is written");
    driver.write_waiting();
    wait().expect("durable");
    log.append(records(1, 3..5), Box::new(|_| panic!("power was lost before the write")));
    disk.cut_power(0);
    drop((log, driver));
    assert_eq!(indices(&open(&disk)), [0, 1, 2]);
}

#[test]
fn a_driven_log_whose_queue_is_full_writes_at_once() {
    let disk = Disk::new();
    let (log, _driver) = Log::open_driven(Arc::new(disk.open().expect("free"))).expect("opens");
    for index in 0..=QUEUE_REQUESTS_MAX as u64 {
        log.append(records(1, index..index + 1), Box::new(|_| {}));
    }
    disk.cut_power(0);
    drop(log);
    assert_eq!(indices(&open(&disk)).len(), QUEUE_REQUESTS_MAX);
}

#[cfg(feature = "rocksdb")]
#[test]
fn a_log_on_rocksdb_is_found_again_and_its_lock_is_respected() {
    use crate::engine::rocks::Rocks;
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("log");
    let log = Log::open(Arc::new(Rocks::open_log(&path).expect("opens"))).expect("opens");
    append(&log, records(1, 0..50)).expect("appends");
    purge(&log, 9).expect("purges");
    truncate(&log, 40).expect("truncates");
    append(&log, records(2, 40..45)).expect("appends");
    assert!(matches!(Rocks::open_log(&path), Err(Error::Locked { .. })));
    drop(log);
    let log = Log::open(Arc::new(Rocks::open_log(&path).expect("opens"))).expect("opens");
    assert_eq!(log.read(0..100).expect("reads"), [records(1, 10..40), records(2, 40..45)].concat());
    assert_eq!(log.bounds().last_purged, Some(record(1, 9).id));
    truncate(&log, 30).expect("truncates what is only on disk");
    assert_eq!(log.bounds().last, Some(record(1, 29).id));
}

#[cfg(feature = "rocksdb")]
#[test]
fn a_write_that_a_crash_cut_is_dropped_and_what_was_before_it_stays() {
    use crate::engine::rocks::Rocks;
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (live, crashed) = (dir.path().join("live"), dir.path().join("crashed"));
    let log = Log::open(Arc::new(Rocks::open_log(&live).expect("opens"))).expect("opens");
    append(&log, records(1, 0..3)).expect("appends");
    append(&log, records(1, 3..4)).expect("appends");
    // What the disk holds while the process lives is what a kill leaves.
    std::fs::create_dir(&crashed).expect("creates");
    for entry in std::fs::read_dir(&live).expect("lists") {
        let from = entry.expect("lists").path();
        std::fs::copy(&from, crashed.join(from.file_name().expect("a name"))).expect("copies");
    }
    drop(log);
    let mut written: Vec<_> = std::fs::read_dir(&crashed)
        .expect("lists")
        .map(|entry| entry.expect("lists").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "log"))
        .collect();
    written.sort();
    let last = std::fs::OpenOptions::new().write(true).open(written.last().expect("a write-ahead log"));
    let last = last.expect("opens");
    last.set_len(last.metadata().expect("reads").len() - 3).expect("cuts");
    let log = Log::open(Arc::new(Rocks::open_log(&crashed).expect("opens"))).expect("opens");
    assert_eq!(log.read(0..9).expect("reads"), records(1, 0..3));
    assert_eq!(log.suspect(), None);
    append(&log, records(2, 3..5)).expect("goes on");
}

#[test]
fn requests_are_finished_in_order_and_a_full_queue_makes_the_next_one_wait() {
    let disk = Disk::new();
    let log = open(&disk);
    disk.set_stalled(true);
    let count = 2 * QUEUE_REQUESTS_MAX as u64;
    let (tell, told) = mpsc::sync_channel(QUEUE_REQUESTS_MAX);
    let theirs = log.clone();
    let appender = std::thread::spawn(move || {
        for index in 0..count {
            let tell = tell.clone();
            let done = move |result: Result<(), Error>| tell.send((index, result.is_ok())).expect("the test waits");
            if index % 10 == 0 {
                theirs.save_vote(Vote { term: index, node: 1, committed: false }, Box::new(|_| ()));
            }
            theirs.append(records(1, index..index + 1), Box::new(done));
        }
    });
    let deadline = Instant::now() + Duration::from_secs(20);
    while log.bounds().last.is_none_or(|last| last.index + 200 < QUEUE_REQUESTS_MAX as u64) {
        assert!(Instant::now() < deadline);
        std::thread::yield_now();
    }
    assert!(log.bounds().last.is_some_and(|last| last.index < count - 1), "the queue is bounded");
    disk.set_stalled(false);
    for expected in 0..count {
        assert_eq!(told.recv_timeout(Duration::from_secs(20)).expect("in time"), (expected, true));
    }
    appender.join().expect("appended all");
    assert_eq!(log.vote().map(|vote| vote.term), Some((count - 1) / 10 * 10));
    disk.cut_power(0);
    drop(log);
    assert_eq!(indices(&open(&disk)), (0..count).collect::<Vec<_>>());
}

#[test]
fn what_the_log_weighs_is_known_again_after_reopening() {
    let disk = Disk::new();
    let log = open(&disk);
    let payload = Payload::Normal(Bytes::from(vec![7; 200 << 10]));
    let heavy = |index| Record { id: LogId { term: 1, node: 1, index }, payload: payload.clone() };
    append(&log, (0..40).map(heavy).collect()).expect("appends");
    let (written_bytes, cut) = (log.written_bytes(), log.index_behind(4 << 20));
    assert!(written_bytes > 40 * (200 << 10) && cut.is_some_and(|cut| (10..20).contains(&cut)), "{cut:?}");
    drop(log);
    let log = open(&disk);
    assert_eq!((log.written_bytes(), log.index_behind(4 << 20)), (written_bytes, cut));
}

#[test]
fn a_note_is_kept_with_the_next_write() {
    let disk = Disk::new();
    let log = open(&disk);
    log.save_note(b"one".to_vec());
    append(&log, records(1, 0..1)).expect("appends");
    log.save_note(b"two".to_vec());
    assert_eq!(log.note().as_deref(), Some(b"two".as_slice()));
    disk.cut_power(0);
    drop(log);
    assert_eq!(open(&disk).note().as_deref(), Some(b"one".as_slice()));
}

#[derive(Debug, Clone)]
enum Step {
    Append(u64),
    Truncate(u64),
    Purge(u64),
    Reopen,
    PowerLoss(usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (1..6u64).prop_map(Step::Append),
        1 => (0..4u64).prop_map(Step::Truncate),
        1 => (0..3u64).prop_map(Step::Purge),
        1 => Just(Step::Reopen),
        1 => (0..3usize).prop_map(Step::PowerLoss),
    ];
    proptest::collection::vec(step, 1..40)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn the_log_is_what_a_plain_list_would_be_and_loses_nothing_that_was_synced(steps in steps()) {
        let disk = Disk::new();
        let mut log = open(&disk);
        let mut model: Vec<Record> = Vec::new();
        let mut begin = 0;
        let mut term = 1;
        for step in steps {
            let end = begin + model.len() as u64;
            match step {
                Step::Append(count) => {
                    let more = records(term, end..end + count);
                    append(&log, more.clone()).expect("appends");
                    model.extend(more);
                }
                Step::Truncate(count) => {
                    let from = end.saturating_sub(count).max(begin);
                    truncate(&log, from).expect("truncates");
                    model.truncate(usize::try_from(from - begin).expect("small"));
                    term += 1;
                }
                Step::Purge(count) => {
                    if let Some(last) = model.get(usize::try_from(count).expect("small")).cloned() {
                        let (purged, wait) = done();
                        log.purge_upto(last.id, purged);
                        wait().expect("purges");
                        model.drain(..=usize::try_from(count).expect("small"));
                        begin = last.id.index + 1;
                    }
                }
                Step::Reopen => {
                    drop(log);
                    log = open(&disk);
                }
                Step::PowerLoss(keep) => {
                    disk.cut_power(keep);
                    drop(log);
                    log = open(&disk);
                }
            }
            prop_assert_eq!(&log.read(0..u64::MAX).expect("reads"), &model);
            if let Some(last) = model.last() {
                prop_assert_eq!(log.bounds().last, Some(last.id));
            }
        }
    }
}
