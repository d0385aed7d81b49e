//! The invariants that must hold whatever fails, as functions of what was observed of a cluster.
//!
//! Some are checked as soon as something is observed ([`History`] takes it), the others over the whole ([`all`]).

mod history;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use selvedge_domain::Id;

pub use history::{Attempt, Hashes, History, Read, Seen, Write};

/// What does not hold, each with the name of its invariant.
pub fn all(history: &History) -> Vec<String> {
    let mut violations = history.violations.clone();
    violations.extend(acknowledged_is_not_lost(history));
    violations.extend(applied_once(history));
    violations.extend(reads_are_linearizable(history));
    violations.extend(journal_is_whole(history));
    violations
}

/// I1: a write that was acknowledged is in the journal, not after the position it was acknowledged at.
pub fn acknowledged_is_not_lost(history: &History) -> Vec<String> {
    let at: BTreeMap<&str, u64> = history.written().map(|(seq, _, value)| (value, seq)).collect();
    let writes = history.writes.iter().filter_map(|write| Some((&*write.value, write.acknowledged?.0)));
    let tokens = history.tokens_made.iter().map(|(name, position)| (&**name, *position));
    let lost = |what: &str, position: Id, seq: Option<&u64>| match seq {
        Some(seq) if *seq <= position.seq => None,
        Some(seq) => Some(format!("I1: `{what}` was acknowledged at {position} and is at {seq}")),
        None => Some(format!("I1: `{what}` was acknowledged at {position} and is lost")),
    };
    let lost_writes = writes.filter_map(|(value, position)| lost(value, position, at.get(value)));
    let lost_tokens = tokens.filter_map(|(name, position)| lost(name, position, history.tokens.get(name)));
    lost_writes.chain(lost_tokens).collect()
}

/// I2: a write is in the journal once at most; not at all when every attempt was answered as not done; and never
/// without having been asked for.
pub fn applied_once(history: &History) -> Vec<String> {
    let mut times: BTreeMap<&str, usize> = BTreeMap::new();
    for (_, _, value) in history.written() {
        *times.entry(value).or_default() += 1;
    }
    let asked: BTreeMap<&str, &Write> = history.writes.iter().map(|write| (&*write.value, write)).collect();
    times
        .into_iter()
        .filter_map(|(value, times)| match asked.get(value) {
            None => Some(format!("I2: `{value}` was applied and never asked for")),
            Some(_) if times > 1 => Some(format!("I2: `{value}` was applied {times} times")),
            Some(write) if write.never() => Some(format!("I2: `{value}` was answered as not done, and was applied")),
            Some(_) => None,
        })
        .collect()
}

/// I3: a read sees the last write before its position, and its position is not before that of anything that was
/// acknowledged to anybody, or read by anybody, before it was asked for.
pub fn reads_are_linearizable(history: &History) -> Vec<String> {
    let mut by_key: BTreeMap<usize, BTreeMap<u64, &str>> = BTreeMap::new();
    for (seq, key, value) in history.written() {
        by_key.entry(key).or_default().insert(seq, value);
    }
    // What was known by whom, in order: (when it was, position).
    let acknowledged = history.writes.iter().filter_map(|write| write.acknowledged.map(|(at, when)| (when, at)));
    let mut known: Vec<(u64, Id)> =
        acknowledged.chain(history.reads.iter().map(|read| (read.returned, read.position))).collect();
    known.sort_unstable_by_key(|(when, _)| *when);
    let mut newest = Id::default();
    for (_, position) in &mut known {
        newest = newest.max(*position);
        *position = newest;
    }
    let known_before = |when: u64| {
        let before = known.partition_point(|(at, _)| *at < when);
        before.checked_sub(1).map_or(Id::default(), |last| known[last].1)
    };
    let mut violations = Vec::new();
    for read in &history.reads {
        let before = known_before(read.invoked);
        if read.position < before {
            let (key, position) = (read.key, read.position);
            violations.push(format!("I3: a read of {key} at {position} was asked for when {before} was known"));
        }
        let written = by_key.get(&read.key).and_then(|writes| writes.range(..=read.position.seq).next_back());
        let expected = written.map_or("", |(_, value)| *value);
        if read.value != expected {
            let (key, position, value) = (read.key, read.position, &read.value);
            violations.push(format!("I3: a read of {key} at {position} saw `{value}`, not `{expected}`"));
        }
    }
    violations
}

/// I4, over all followers together: the journal has no hole.
pub fn journal_is_whole(history: &History) -> Vec<String> {
    let mut next = 1;
    let mut violations = Vec::new();
    for seq in history.journal.keys() {
        if *seq != next {
            violations.push(format!("I4: nobody was ever sent the events from {next} to before {seq}"));
        }
        next = seq + 1;
    }
    violations
}
