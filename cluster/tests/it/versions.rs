//! Brokers of two builds as one cluster. The newer build is this one with the feature `next`: it knows one more kind of
//! command (`RenameToken`), and by its rules the name of a new token is kept in small letters.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::process::{Process, Processes};

/// Writes of each broker between two steps.
const WRITES: usize = 5;

/// Builds this test binary as the next version; quick when that was done before, as `scripts/test` does.
fn next_build() -> PathBuf {
    let cargo = std::env::var_os("CARGO").expect("cargo runs the tests");
    let args = ["test", "--locked", "-p", "selvedge-cluster", "--features", "next", "--test", "it", "--no-run"];
    let built = Command::new(cargo)
        .args(args)
        .args(["--quiet", "--message-format=json"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo runs");
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    let messages = String::from_utf8(built.stdout).unwrap();
    let mut executables = messages.lines().filter_map(|line| line.split_once("\"executable\":\"")?.1.split_once('"'));
    PathBuf::from(executables.next_back().expect("one is built").0)
}

/// Replaces the build of one broker after the other, each stopped in order, while all others go on.
fn replace_all(cluster: &mut Processes, mut brokers: Vec<Process>, build: &Path) -> Vec<Process> {
    for at in 0..brokers.len() {
        let old = brokers.remove(at);
        let place = old.place;
        old.leave();
        cluster.work(&mut brokers, WRITES);
        let mut new = cluster.start(place, build);
        new.ready();
        brokers.insert(at, new);
        cluster.work(&mut brokers, WRITES);
    }
    brokers
}

fn refused(answer: Result<String, String>, says: &str) {
    let why = answer.unwrap_err();
    assert!(why.contains(says), "{why}");
}

/// Waits until a broker knows which versions its members know and which is in force.
fn versions(broker: &mut Process, expected: &str) {
    let begun = std::time::Instant::now();
    loop {
        let versions = broker.ask("versions").unwrap();
        if versions == expected {
            return;
        }
        assert!(begun.elapsed() < crate::brokers::PATIENCE, "{versions}, not {expected}");
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
}

// F28: every broker writes and reads all the time; no write is refused, each is there once, and after each entry all hold
// the same state and journal.
#[test]
fn a_cluster_of_two_builds_takes_every_write_through_upgrade_downgrade_and_raise() {
    let (this, next) = (Processes::this_build(), next_build());
    assert_ne!(this, next);
    let mut cluster = Processes::new();
    let mut brokers = cluster.voters(3);
    cluster.work(&mut brokers, WRITES);
    refused(brokers[0].ask("raise 2"), "knows version 1");

    // One is of the next version: it decides as the others do, and proposes nothing that they do not know.
    let old = brokers.remove(0);
    old.leave();
    let mut new = cluster.start(0, &next);
    new.ready();
    brokers.insert(0, new);
    versions(&mut brokers[1], "[1, 1, 2] 1");
    brokers[0].ask("create Kept").unwrap();
    assert_eq!(brokers[1].ask("has kept").unwrap(), "Kept", "the rules of version 1 are in force");
    refused(brokers[0].ask("rename Kept other"), "version 2 of the rules is not in force");
    refused(brokers[1].ask("rename Kept other"), "not known to this build");
    refused(brokers[0].ask("raise 2"), "which knows version 1");
    cluster.work(&mut brokers, WRITES);

    // All are, and none is again: until the raise, the way back is open.
    let brokers = replace_all(&mut cluster, brokers, &next);
    let mut brokers = replace_all(&mut cluster, brokers, &this);
    versions(&mut brokers[0], "[1, 1, 1] 1");
    assert_eq!(brokers[0].ask("has kept").unwrap(), "Kept");

    // A learner counts as much as a voter.
    let mut brokers = replace_all(&mut cluster, brokers, &next);
    let mut learner = cluster.start(3, &this);
    cluster.join(&mut learner, &mut brokers[0]).unwrap();
    learner.ready();
    versions(&mut brokers[0], "[1, 2, 2, 2] 1");
    refused(brokers[0].ask("raise 2"), "which knows version 1");
    learner.leave();
    refused(brokers[0].ask("raise 2"), "");
    let mut learner = cluster.start(3, &next);
    learner.ready();
    versions(&mut brokers[0], "[2, 2, 2, 2] 1");
    brokers.push(learner);

    // The raise: from its entry on all decide by the new rules, and the new kind is taken.
    brokers[1].ask("raise 2").unwrap();
    for broker in &mut brokers {
        versions(broker, "[2, 2, 2, 2] 2");
    }
    brokers[2].ask("create Small").unwrap();
    assert_eq!(brokers[0].ask("has small").unwrap(), "small", "the rules of version 2 are in force");
    assert_eq!(brokers[0].ask("has kept").unwrap(), "Kept", "what was decided before stays as it is");
    brokers[0].ask("rename Kept renamed").unwrap();
    assert_eq!(brokers[1].ask("has renamed").unwrap(), "renamed");
    brokers[1].ask("raise 2").unwrap();
    refused(brokers[1].ask("raise 1"), "between 2 and 2");
    refused(brokers[1].ask("raise 3"), "which knows version 2");
    cluster.work(&mut brokers, WRITES);

    // There is no way back: on what it has, or as a new one, the older build is told so, and the others go on.
    let down = brokers.remove(2);
    let place = down.place;
    down.leave();
    let why = cluster.start(place, &this).fatal();
    assert!(why.contains("SE0105"), "{why}");
    let mut stranger = cluster.start(4, &this);
    refused(cluster.join(&mut stranger, &mut brokers[0]), "SE0105");
    cluster.work(&mut brokers, WRITES);
    let mut back = cluster.start(place, &next);
    back.ready();
    brokers.push(back);
    cluster.work(&mut brokers, WRITES);
    cluster.check(brokers);
}

// One that was away during the raise meets it in the log, or in a snapshot: it stops there, before it decides anything by
// rules that it does not know.
#[test]
fn an_older_build_that_slept_through_the_raise_stops_at_it() {
    let (this, next) = (Processes::this_build(), next_build());
    let mut cluster = Processes::new();
    let brokers = cluster.voters(3);
    let mut brokers = replace_all(&mut cluster, brokers, &next);
    versions(&mut brokers[0], "[2, 2, 2] 1");
    // It goes back to the older build within the moment in which the raise does not know yet.
    let asleep = brokers.remove(2);
    let place = asleep.place;
    asleep.kill();
    let mut raised = brokers[0].ask("raise 2");
    assert!(raised.is_ok(), "it was heard a moment ago: {raised:?}");
    let why = cluster.start(place, &this).fatal();
    assert!(why.contains("SE0105"), "{why}");
    raised = brokers[0].ask("create after");
    assert!(raised.is_ok(), "{raised:?}");
    let mut back = cluster.start(place, &next);
    back.ready();
    brokers.push(back);
    cluster.check(brokers);
}
