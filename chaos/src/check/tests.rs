//! Each invariant finds a history in which it does not hold.

use super::*;

fn id(seq: u64) -> Id {
    Id::new(1, seq)
}

fn put(key: usize, value: &str) -> Seen {
    Seen { content: value.len() as u64, written: Some((key, value.to_owned())), token: None }
}

/// One acknowledged write at 1, which one follower was sent.
fn sound() -> History {
    let mut history = History::default();
    let op = history.new_write(0);
    history.invoke(op, 1);
    history.saw(1, id(1), put(0, "write-1"));
    history.answer(op, Attempt::Done(id(1)));
    let invoked = history.tick();
    history.read(0, "write-1".to_owned(), id(1), invoked);
    history
}

fn found(history: &History) -> String {
    all(history).join("\n")
}

#[test]
fn a_sound_history_is_found_sound() {
    assert_eq!(found(&sound()), "");
}

#[test]
fn a_lost_write_is_found() {
    let mut history = sound();
    let op = history.new_write(0);
    history.invoke(op, 1);
    history.answer(op, Attempt::Done(id(2)));
    assert!(found(&history).starts_with("I1: `write-2`"), "{}", found(&history));
}

#[test]
fn a_write_that_is_applied_twice_or_was_called_not_done_is_found() {
    let mut history = sound();
    for (seq, value) in [(2, "write-2"), (3, "write-3"), (4, "write-2")] {
        history.saw(1, id(seq), put(0, value));
    }
    for _ in 2..=3 {
        let op = history.new_write(0);
        history.invoke(op, 1);
        history.answer(op, if op == 1 { Attempt::Maybe } else { Attempt::Never });
    }
    let found = applied_once(&history);
    assert_eq!(found.len(), 2, "{found:?}");
    assert!(found[0].contains("`write-2` was applied 2 times"), "{found:?}");
    assert!(found[1].contains("`write-3` was answered as not done"), "{found:?}");
    history.saw(1, id(5), put(0, "write-9"));
    assert!(applied_once(&history).iter().any(|found| found.contains("never asked for")));
}

#[test]
fn a_stale_read_is_found() {
    let mut history = sound();
    let invoked = history.tick();
    history.read(0, String::new(), id(0), invoked);
    assert!(
        found(&history).starts_with("I3: a read of 0 at 1-0 was asked for when 1-1 was known"),
        "{}",
        found(&history)
    );
    let mut history = sound();
    let invoked = history.tick();
    history.read(0, "write-9".to_owned(), id(1), invoked);
    assert!(found(&history).contains("saw `write-9`, not `write-1`"), "{}", found(&history));
}

#[test]
fn a_read_that_was_asked_for_before_the_write_was_acknowledged_may_miss_it() {
    let mut history = History::default();
    let op = history.new_write(0);
    history.invoke(op, 1);
    let invoked = history.tick();
    history.saw(1, id(1), put(0, "write-1"));
    history.answer(op, Attempt::Done(id(1)));
    history.read(0, String::new(), id(0), invoked);
    assert_eq!(found(&history), "");
}

#[test]
fn a_hole_in_the_journal_and_two_events_with_one_number_are_found() {
    let mut history = sound();
    history.saw(1, id(3), put(0, "x"));
    assert!(journal_is_whole(&history)[0].contains("from 2 to before 3"));
    history.saw(2, id(3), put(0, "yy"));
    assert!(found(&history).starts_with("I4: the follower at b2"), "{}", found(&history));
}

#[test]
fn different_states_after_one_entry_are_found() {
    let mut history = sound();
    history.applied(1, 7, ([1; 32], vec![]));
    history.applied(2, 7, ([1; 32], vec![]));
    assert_eq!(found(&history), "");
    history.applied(3, 7, ([1; 32], vec![1]));
    assert!(found(&history).starts_with("I5: after entry 7, b3"));
}

#[test]
fn what_goes_back_is_found() {
    let mut history = sound();
    history.in_term(1, 1, 4);
    history.in_term(1, 2, 3);
    assert_eq!(found(&history), "", "another process may not know it yet");
    history.in_term(1, 2, 2);
    history.serves(1, id(9));
    history.serves(1, id(8));
    assert_eq!(history.violations.len(), 2, "{:?}", history.violations);
}

#[test]
fn a_lease_for_an_older_state_is_found() {
    let mut history = sound();
    history.enforced_everywhere(id(5));
    history.holds_lease(1, id(5));
    assert_eq!(found(&history), "");
    history.holds_lease(2, id(4));
    assert!(found(&history).starts_with("I8: b2"));
}

#[test]
fn an_attempt_whose_process_died_is_unknown_and_brought_again() {
    let mut history = History::default();
    let op = history.new_write(0);
    history.invoke(op, 2);
    history.died(2);
    assert!(!history.writes[op].never());
    assert_eq!((history.adopt(), history.adopt()), (Some(op), None));
}
