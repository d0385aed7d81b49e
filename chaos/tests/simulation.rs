//! Seeds of the whole cluster in virtual time. README.md says how to replay one.

use std::sync::atomic::{AtomicU64, Ordering};

use selvedge_chaos::sim::{self, Bug, Counts, Outcome};

const SEEDS: u64 = 50;
const SEEDS_LONG: u64 = 500;
/// A planted bug is looked for in so many seeds.
const SEEDS_PER_BUG: u64 = 20;

/// Seeds that one environment variable, or another, asks for.
fn seeds() -> Vec<u64> {
    if let Ok(seed) = std::env::var("SELVEDGE_SEED") {
        return vec![seed.parse().expect("SELVEDGE_SEED is a number")];
    }
    (1..=if std::env::var_os("SELVEDGE_LONG").is_some() { SEEDS_LONG } else { SEEDS }).collect()
}

/// Runs a function for each seed, on every core.
fn each<R: Send>(seeds: &[u64], run: impl Fn(u64) -> R + Sync) -> Vec<R> {
    let next = AtomicU64::new(0);
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let mut results: Vec<(u64, R)> = std::thread::scope(|scope| {
        let worker = || {
            let mut results = Vec::new();
            loop {
                let at = next.fetch_add(1, Ordering::Relaxed);
                let Some(seed) = seeds.get(at as usize) else { return results };
                results.push((at, run(*seed)));
            }
        };
        let workers: Vec<_> = (0..cores.min(seeds.len())).map(|_| scope.spawn(worker)).collect();
        workers.into_iter().flat_map(|worker| worker.join().expect("a run does not panic")).collect()
    });
    results.sort_by_key(|(at, _)| *at);
    results.into_iter().map(|(_, result)| result).collect()
}

fn replay(seed: u64) -> String {
    format!("SELVEDGE_SEED={seed} scripts/cargo test -p selvedge-chaos --test simulation every_seed -- --nocapture")
}

/// Where two traces part.
fn parting(first: &str, second: &str) -> Option<String> {
    if first == second {
        return None;
    }
    let line = first.lines().zip(second.lines()).position(|(a, b)| a != b);
    let line = line.unwrap_or_else(|| first.lines().count().min(second.lines().count()));
    let show = |trace: &str| trace.lines().skip(line.saturating_sub(3)).take(6).collect::<Vec<_>>().join("\n  ");
    Some(format!("they part in line {}:\n  {}\nand\n  {}", line + 1, show(first), show(second)))
}

/// Writes a trace where it can be looked at.
fn keep(seed: u64, part: &str, trace: &str) -> String {
    let path = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("seed-{seed}{part}.trace"));
    match std::fs::write(&path, trace) {
        Ok(()) => path.display().to_string(),
        Err(error) => format!("nowhere: {error}"),
    }
}

#[test]
fn every_seed_keeps_every_invariant_and_runs_the_same_way_twice() {
    let seeds = seeds();
    let alone = std::env::var_os("SELVEDGE_SEED").is_some();
    let results = each(&seeds, |seed| {
        let (mut first, mut second) = (sim::run(seed, Bug::None), sim::run(seed, Bug::None));
        // One thing in a run follows the machine's time: h2 forgets a stream that was reset after a second of it, which a
        // machine that is busy with something else may reach. Such a pair is run once more, and said.
        if first.trace != second.trace && first.violations.is_empty() && second.violations.is_empty() {
            println!("the runs of seed {seed} parted; it is run twice once more");
            (first, second) = (sim::run(seed, Bug::None), sim::run(seed, Bug::None));
        }
        if alone {
            println!("{} {:?}", keep(seed, "", &first.trace), first.counts);
        }
        let mut wrong = first.violations.clone();
        if let Some(parting) = parting(&first.trace, &second.trace) {
            wrong.push(format!("two runs are not equal: {parting}"));
            keep(seed, "-again", &second.trace);
        }
        if wrong.is_empty() {
            return Ok((first.counts, first.trace.len()));
        }
        let trace = keep(seed, "", &first.trace);
        Err(format!("seed {seed}:\n{}\ntrace: {trace}\nreplay: {}\n", wrong.join("\n"), replay(seed)))
    });
    let mut sum = Counts::default();
    let mut bytes = 0;
    let mut wrong = Vec::new();
    for result in results {
        match result {
            Ok((counts, length)) => {
                sum = add(sum, counts);
                bytes += length;
            }
            Err(what) => wrong.push(what),
        }
    }
    println!("{} seeds, {bytes} bytes of traces compared: {sum:?}", seeds.len());
    assert!(wrong.is_empty(), "{} of {} seeds fail\n{}", wrong.len(), seeds.len(), wrong.join("\n"));
    if !alone {
        // A run in which nothing happens proves nothing.
        let each = |count: usize, of: usize| assert!(count >= of * seeds.len(), "{sum:?}");
        each(sum.writes, 30);
        each(sum.reads, 10);
        each(sum.crashes, 1);
        each(sum.cuts, 1);
    }
}

fn add(a: Counts, b: Counts) -> Counts {
    Counts {
        writes: a.writes + b.writes,
        reads: a.reads + b.reads,
        unknown: a.unknown + b.unknown,
        crashes: a.crashes + b.crashes,
        cuts: a.cuts + b.cuts,
        term: a.term.max(b.term),
        virtual_ms: a.virtual_ms + b.virtual_ms,
    }
}

/// The first seed in which a planted bug is found as what it is.
fn find(bug: Bug, invariant: &str) {
    let seeds: Vec<u64> = (1..=SEEDS_PER_BUG).collect();
    for pair in seeds.chunks(2) {
        let runs: Vec<Outcome> = each(pair, |seed| sim::run(seed, bug));
        for (seed, run) in pair.iter().zip(&runs) {
            if let Some(found) = run.violations.iter().find(|found| found.contains(invariant)) {
                println!("{bug:?} is found by seed {seed}: {found}");
                return;
            }
        }
    }
    panic!("{bug:?} is not found as {invariant} in {SEEDS_PER_BUG} seeds");
}

#[test]
fn a_disk_that_lies_about_its_syncs_is_found() {
    find(Bug::LogIsNotSynced, "");
}

#[test]
fn reads_that_ask_nobody_are_found() {
    find(Bug::ReadsAskNobody, "I3");
}

#[test]
fn retries_that_are_new_requests_are_found() {
    find(Bug::RetriesAreNew, "I2");
}

#[test]
fn a_clock_that_is_slower_than_any_lease_allows_is_found() {
    find(Bug::ClockTooSlow, "I8");
}

#[test]
fn two_seeds_are_two_runs() {
    let runs = each(&[1, 2], |seed| sim::run(seed, Bug::None).trace);
    assert_ne!(runs[0], runs[1]);
}
