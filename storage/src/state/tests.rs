use std::{collections::BTreeMap, sync::Arc};

use proptest::prelude::*;

use super::*;
use crate::engine::mem::{Disk, Fault};

type Rows = BTreeMap<(u8, Vec<u8>), Vec<u8>>;

fn row(table: u8, key: &[u8], value: Option<&[u8]>) -> RowChange {
    RowChange { table, key: key.to_vec(), value: value.map(Arc::from) }
}

fn event(seq: u64) -> JournalRow {
    JournalRow { seq, bytes: Arc::from(format!("event {seq}").as_bytes()) }
}

fn open(disk: &Disk) -> StateStore {
    StateStore::open(Arc::new(disk.open().expect("the disk is free"))).expect("the state opens")
}

fn load(store: &StateStore) -> (Rows, Option<Vec<u8>>) {
    let mut rows = Rows::new();
    let meta = store.load(|table, key, value| {
        rows.insert((table, key.to_vec()), value.to_vec());
    });
    (rows, meta.expect("loads"))
}

fn rows(of: &[(u8, &[u8], &[u8])]) -> Rows {
    of.iter().map(|(table, key, value)| ((*table, key.to_vec()), value.to_vec())).collect()
}

/// A store with some rows, and what it holds.
fn filled(disk: &Disk) -> StateStore {
    let store = open(disk);
    let changes = [row(1, b"a", Some(b"1")), row(1, b"b", Some(b"2")), row(2, b"", Some(b"3"))];
    store.write(&changes, &[event(1), event(2)], b"meta 2", false).expect("writes");
    store.write(&[row(1, b"a", None)], &[event(3)], b"meta 3", true).expect("writes");
    store
}

fn exported(store: &StateStore) -> Vec<u8> {
    let mut bytes = Vec::new();
    store.export(&mut bytes).expect("exports");
    bytes
}

#[test]
fn rows_journal_and_meta_are_found_again() {
    let disk = Disk::new();
    drop(filled(&disk));
    let store = open(&disk);
    assert_eq!(load(&store), (rows(&[(1, b"b", b"2"), (2, b"", b"3")]), Some(b"meta 3".to_vec())));
    assert_eq!(store.journal(0, usize::MAX).expect("reads"), [event(1), event(2), event(3)]);
    assert_eq!(store.journal(2, 0).expect("reads"), [event(2)]);
    assert_eq!(store.journal_bounds().expect("reads"), JournalBounds { compacted: 0, last: 3 });
}

#[test]
fn an_unsynced_write_survives_whole_or_not_at_all() {
    for (keep, meta, journal_last) in [(0, b"meta 3", 3), (1, b"meta 4", 4), (2, b"meta 5", 5)] {
        let disk = Disk::new();
        let store = filled(&disk);
        store.write(&[row(3, b"x", Some(b"4"))], &[event(4)], b"meta 4", false).expect("writes");
        store.write(&[row(3, b"y", Some(b"5"))], &[event(5)], b"meta 5", false).expect("writes");
        disk.cut_power(keep);
        drop(store);
        let store = open(&disk);
        let (rows, found) = load(&store);
        assert_eq!((rows.len(), found.as_deref()), (2 + keep, Some(meta.as_slice())));
        assert_eq!(store.journal_bounds().expect("reads").last, journal_last);
    }
}

#[test]
fn a_synced_state_survives() {
    let disk = Disk::new();
    let store = filled(&disk);
    store.write(&[row(3, b"x", Some(b"4"))], &[], b"meta 4", false).expect("writes");
    store.sync().expect("syncs");
    disk.cut_power(0);
    drop(store);
    assert_eq!(load(&open(&disk)).1.as_deref(), Some(b"meta 4".as_slice()));
}

#[test]
fn a_compacted_position_is_refused() {
    let disk = Disk::new();
    let store = filled(&disk);
    store.compact_journal(2).expect("compacts");
    store.compact_journal(1).expect("an older point changes nothing");
    assert!(matches!(store.journal(2, usize::MAX), Err(Error::Compacted { upto: 2 })));
    assert_eq!(store.journal(3, usize::MAX).expect("reads"), [event(3)]);
    assert_eq!(store.journal_bounds().expect("reads"), JournalBounds { compacted: 2, last: 3 });
}

#[test]
fn the_reserved_table_is_refused() {
    let store = open(&Disk::new());
    let refused = store.write(&[row(RESERVED_TABLE, b"", Some(b""))], &[], b"", false);
    assert!(matches!(refused, Err(Error::ReservedTable { .. })));
}

#[test]
fn an_exported_state_is_installed_as_it_was() {
    let disk = Disk::new();
    let store = filled(&disk);
    let bytes = exported(&store);
    let head = Head { journal_last: 3, meta: b"meta 3".to_vec(), rows: 2 };
    let mut shown = Rows::new();
    let seen = verify(bytes.as_slice(), |table, key, value| drop(shown.insert((table, key.to_vec()), value.to_vec())));
    assert_eq!((seen.expect("verifies"), shown), (head, load(&store).0));
    let other = Disk::new();
    let target = open(&other);
    target.write(&[row(9, b"old", Some(b"old"))], &[event(1)], b"meta 1", true).expect("writes");
    assert_eq!(target.install(bytes.as_slice()).expect("installs"), b"meta 3");
    other.cut_power(0);
    drop(target);
    let target = open(&other);
    assert_eq!(load(&target), load(&store));
    assert_eq!(target.journal_bounds().expect("reads"), JournalBounds { compacted: 3, last: 3 });
    target.write(&[], &[event(4)], b"meta 4", true).expect("goes on");
    assert_eq!(target.journal(4, usize::MAX).expect("reads"), [event(4)]);
    assert_eq!(target.install(exported(&store).as_slice()).expect("installs on the first side again"), b"meta 3");
    assert_eq!(load(&target), load(&store));
}

#[test]
fn a_crash_in_an_install_leaves_the_old_state_or_the_new() {
    let source = filled(&Disk::new());
    let bytes = exported(&source);
    let old = (rows(&[(9, b"old", b"old")]), Some(b"meta 1".to_vec()));
    let new = load(&source);
    let mut seen_old = false;
    for nth in 1.. {
        for keep in [0, usize::MAX] {
            let disk = Disk::new();
            let target = open(&disk);
            target.write(&[row(9, b"old", Some(b"old"))], &[], b"meta 1", true).expect("writes");
            disk.fail_write(nth, if keep == 0 { Fault::PowerLoss } else { Fault::Io });
            let installed = target.install(bytes.as_slice());
            disk.cut_power(keep);
            drop(target);
            let found = load(&open(&disk));
            if installed.is_ok() {
                assert_eq!(found, new);
                assert!(seen_old);
                if keep != 0 && nth > 4 {
                    return;
                }
            } else {
                seen_old = true;
                assert!(found == old || found == new, "write {nth}: {found:?}");
            }
        }
    }
}

#[test]
fn a_damaged_snapshot_changes_nothing() {
    let bytes = exported(&filled(&Disk::new()));
    let target = open(&Disk::new());
    target.write(&[row(9, b"old", Some(b"old"))], &[], b"meta 1", true).expect("writes");
    let before = load(&target);
    for at in 0..bytes.len() {
        let mut changed = bytes.clone();
        changed[at] ^= 0x10;
        assert!(target.install(changed.as_slice()).is_err(), "byte {at} changed");
        assert!(target.install(&bytes[..at]).is_err(), "cut at byte {at}");
    }
    assert!(target.install([bytes, vec![0]].concat().as_slice()).is_err(), "something behind the end");
    assert_eq!(load(&target), before);
}

#[test]
fn an_export_is_of_one_moment_and_a_checkpoint_is_another_way_to_one() {
    let disk = Disk::new();
    let store = filled(&disk);
    store.checkpoint(Path::new("checkpoint")).expect("copies");
    let before = exported(&store);
    store.write(&[row(5, b"later", Some(b"x"))], &[event(4)], b"meta 4", false).expect("writes");
    let copy = store.open_checkpoint(Path::new("checkpoint")).expect("opens");
    let mut bytes = Vec::new();
    copy.export(&mut bytes).expect("exports");
    assert_eq!(copy.meta().expect("reads").as_deref(), Some(b"meta 3".as_slice()));
    assert_eq!(bytes, before);
}

#[test]
fn the_watchdog_sees_a_write_that_does_not_come_back() {
    let disk = Disk::new();
    let store = Arc::new(open(&disk));
    assert_eq!(store.oldest_write_ms(), 0);
    disk.set_stalled(true);
    let theirs = store.clone();
    let writer = std::thread::spawn(move || theirs.sync());
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while store.oldest_write_ms() < 5 {
        assert!(std::time::Instant::now() < deadline);
        std::thread::yield_now();
    }
    disk.set_stalled(false);
    writer.join().expect("no panic").expect("synced at last");
    assert_eq!(store.oldest_write_ms(), 0);
}

#[cfg(feature = "rocksdb")]
#[test]
fn a_state_on_rocksdb_is_exported_installed_and_found_again() {
    use crate::engine::rocks::Rocks;
    let dir = tempfile::tempdir().expect("a temporary directory");
    let engine = |name: &str| Arc::new(Rocks::open_state(&dir.path().join(name)).expect("opens"));
    let store = StateStore::open(engine("one")).expect("opens");
    let many: Vec<RowChange> =
        (0..3_000u32).map(|n| row(1 + (n % 3) as u8, &n.to_be_bytes(), Some(&[n as u8; 1_000]))).collect();
    store.write(&many, &[event(1), event(2)], b"meta 2", false).expect("writes");
    store.compact_journal(1).expect("compacts");
    store.checkpoint(&dir.path().join("copy")).expect("copies");
    let bytes = exported(&store);
    let mut copied = Vec::new();
    let copy = store.open_checkpoint(&dir.path().join("copy")).expect("opens");
    copy.export(&mut copied).expect("exports");
    assert_eq!(copied, bytes);

    let target = StateStore::open(engine("two")).expect("opens");
    target.write(&[row(9, b"old", Some(b"old"))], &[event(1)], b"meta 1", false).expect("writes");
    target.install(bytes.as_slice()).expect("installs");
    drop(target);
    let target = StateStore::open(engine("two")).expect("opens");
    assert_eq!(load(&target), load(&store));
    assert_eq!(target.journal_bounds().expect("reads"), JournalBounds { compacted: 2, last: 2 });
    target.sync().expect("syncs");
    drop(store);
    let store = StateStore::open(engine("one")).expect("opens again");
    assert_eq!(load(&store), load(&target));
    assert_eq!(store.journal(2, usize::MAX).expect("reads"), [event(2)]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn what_is_loaded_is_what_was_written(
        batches in proptest::collection::vec(
            proptest::collection::vec((0..4u8, 0..6u8, proptest::option::of(any::<u8>())), 0..8), 1..8),
    ) {
        let disk = Disk::new();
        let store = open(&disk);
        let mut model = Rows::new();
        for batch in batches {
            let mut changes = Vec::new();
            for (table, key, value) in batch {
                match value {
                    Some(value) => model.insert((table, vec![key]), vec![value]),
                    None => model.remove(&(table, vec![key])),
                };
                changes.push(row(table, &[key], value.as_ref().map(std::slice::from_ref)));
            }
            store.write(&changes, &[], b"m", false).expect("writes");
        }
        prop_assert_eq!(&load(&store).0, &model);
        let target = open(&Disk::new());
        target.install(exported(&store).as_slice()).expect("installs");
        prop_assert_eq!(&load(&target).0, &model);
    }
}

#[test]
fn rows_put_before_the_journal_are_seen_when_it_is_lowered_and_only_then() {
    let (disk, other) = (Disk::new(), Disk::new());
    let (source, target) = (open(&disk), open(&other));
    source.write(&[], &(1..=4).map(event).collect::<Vec<_>>(), b"meta", false).expect("writes");
    let mut snapshot = Vec::new();
    source.export(&mut snapshot).expect("exports");
    target.install(&snapshot[..]).expect("installs");
    let installed = JournalBounds { compacted: 4, last: 4 };
    assert_eq!(target.journal_bounds().expect("reads"), installed);

    target.put_before_journal(&[event(2), event(3), event(4), event(5)]).expect("writes");
    assert_eq!(target.journal_bounds().expect("reads"), installed, "not yet, and never the row behind it");
    assert!(matches!(target.journal(3, usize::MAX), Err(Error::Compacted { upto: 4 })));
    assert!(!target.lower_journal(3, 1, b"hash").expect("reads"), "it does not begin there");
    assert!(target.lower_journal(4, 1, b"hash").expect("writes"));
    assert_eq!(target.journal_mark(1).expect("reads"), Some(b"hash".to_vec()));
    assert_eq!(target.journal(2, usize::MAX).expect("reads"), [event(2), event(3), event(4)]);

    target.mark_journal(&[(3, [3; 32]), (4, [4; 32])]).expect("writes");
    target.compact_journal(3).expect("compacts");
    let marks = [1, 3, 4].map(|seq| target.journal_mark(seq).expect("reads").is_some());
    assert_eq!(marks, [false, true, true], "the one at its beginning stays");
}
