//! Three brokers in one process that is killed at random moments, again and again: what they acknowledged is there
//! after each start, once.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::TcpListener;
use std::path::Path;
use std::pin::pin;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures::StreamExt as _;
use selvedge_cluster::{Cluster, Frame, LogLimits, ProposeError};
use selvedge_domain::rows::Token;
use sha2::{Digest as _, Sha256};
use tempfile::TempDir;

use crate::brokers::{Broker, PATIENCE, Setup, init, owner_of, token, until};

const ROUNDS: usize = 8;
const ROUNDS_LONG: usize = 200;
/// A kill comes this late at most, after the start or once all was checked.
const LIFE_MS_MAX: u64 = 1_500;
const WRITERS: usize = 4;
/// The directory that the killed process works in.
const DIR: &str = "SELVEDGE_KILL_DIR";
/// The number that each of its writers begins with.
const NEXT: &str = "SELVEDGE_KILL_NEXT";

/// What the killed process has told.
#[derive(Default)]
struct Told {
    /// Id of the token that each acknowledged request made, by writer and number.
    acknowledged: BTreeMap<(usize, u64), String>,
}

impl Told {
    fn next(&self) -> Vec<u64> {
        let last = |writer| self.acknowledged.keys().filter(|(by, _)| *by == writer).map(|(_, number)| *number).max();
        (0..WRITERS).map(|writer| last(writer).map_or(0, |last| last + 1)).collect()
    }
}

#[test]
fn a_process_killed_at_random_moments_loses_nothing_acknowledged_and_applies_nothing_twice() {
    let rounds = if std::env::var_os("SELVEDGE_LONG").is_some() { ROUNDS_LONG } else { ROUNDS };
    let seed = std::env::var("SELVEDGE_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(std::process::id());
    println!("replay with SELVEDGE_SEED={seed}");
    let mut random = u64::from(seed) | 1;
    let dir = TempDir::new().unwrap();
    let mut told = Told::default();
    let mut checked = 0;
    // The first life is whole, so that there is a cluster; the last one, so that all is checked at the end.
    for round in 0..=rounds {
        let (mut child, lines) = spawn(dir.path(), &told.next());
        let mut life = Life { told: &mut told, ready: false, rows: BTreeMap::new() };
        if round == 0 || round == rounds {
            let begun = Instant::now();
            while !life.ready || (round == 0 && life.told.acknowledged.len() < 20) {
                assert!(begun.elapsed() < 2 * PATIENCE, "round {round}: the brokers do not come up");
                life.hear(&mut child, &lines, Duration::from_millis(50));
            }
        } else {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            // Every other life comes as far as to be checked and to write; the rest may end while they start.
            let begun = Instant::now();
            while round % 2 == 0 && !life.ready {
                assert!(begun.elapsed() < 2 * PATIENCE, "round {round}: the brokers do not come up");
                life.hear(&mut child, &lines, Duration::from_millis(20));
            }
            life.hear(&mut child, &lines, Duration::from_millis(random % LIFE_MS_MAX));
        }
        checked += usize::from(life.ready);
        child.kill().expect("it runs");
        child.wait().expect("a killed process ends");
        // What it wrote to the pipe before it died counts.
        life.rest(&lines);
    }
    println!("{} requests were acknowledged; {checked} starts were checked", told.acknowledged.len());
    assert!(checked >= rounds / 2, "only {checked} of {rounds} lives came as far as to be checked");
}

/// What is heard from one life of the process.
struct Life<'a> {
    told: &'a mut Told,
    ready: bool,
    rows: BTreeMap<(usize, u64), String>,
}

impl Life<'_> {
    /// Listens for a while.
    fn hear(&mut self, child: &mut Child, lines: &Receiver<String>, time: Duration) {
        let until = Instant::now() + time;
        loop {
            match lines.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(line) => self.take(&line),
                Err(RecvTimeoutError::Timeout) => return,
                Err(RecvTimeoutError::Disconnected) => {
                    panic!("the process ended by itself: {:?}", child.wait());
                }
            }
        }
    }

    fn rest(&mut self, lines: &Receiver<String>) {
        while let Ok(line) = lines.recv_timeout(PATIENCE) {
            self.take(&line);
        }
    }

    fn take(&mut self, line: &str) {
        let words: Vec<&str> = line.split(' ').collect();
        match words.as_slice() {
            ["have", writer, number, id] => {
                let before = self.rows.insert((writer.parse().unwrap(), number.parse().unwrap()), (*id).to_owned());
                assert_eq!(before, None, "it was applied twice: {line}");
            }
            ["ready"] => {
                self.ready = true;
                for (request, id) in &self.told.acknowledged {
                    assert_eq!(self.rows.get(request), Some(id), "an acknowledged request is gone: {request:?}");
                }
            }
            ["done", writer, number, id] => {
                let request = (writer.parse().unwrap(), number.parse().unwrap());
                self.told.acknowledged.insert(request, (*id).to_owned());
            }
            ["wrong", ..] => panic!("{line}"),
            // The test harness of the process.
            _ => {}
        }
    }
}

fn spawn(dir: &Path, next: &[u64]) -> (Child, Receiver<String>) {
    let next = next.iter().fold(String::new(), |mut text, next| {
        write!(text, "{next} ").expect("to a string");
        text
    });
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["kill::the_process_that_is_killed", "--exact", "--ignored", "--nocapture", "--test-threads=1"])
        .env(DIR, dir)
        .env(NEXT, next)
        .stdout(Stdio::piped())
        .spawn()
        .expect("this binary runs");
    let stdout = BufReader::new(child.stdout.take().expect("piped"));
    let (tell, told) = sync_channel(65_536);
    std::thread::spawn(move || {
        for line in stdout.lines().map_while(Result::ok) {
            if tell.send(line).is_err() {
                return;
            }
        }
    });
    (child, told)
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "is run, and killed, by the test above"]
async fn the_process_that_is_killed() {
    let Some(dir) = std::env::var_os(DIR) else { return };
    let next = std::env::var(NEXT).unwrap();
    let next: Vec<u64> = next.split_whitespace().map(|next| next.parse().unwrap()).collect();
    // The harness has begun a line.
    say("");
    let clusters = start(Path::new(&dir)).await;
    for cluster in &clusters {
        check(cluster).await;
    }
    say("ready");
    let writers = next.into_iter().enumerate().map(|(writer, next)| write(clusters.clone(), writer, next));
    futures::future::join_all(writers).await;
}

fn say(line: &str) {
    // One write, so that a kill cuts no line in two that is taken for whole.
    let mut out = std::io::stdout().lock();
    out.write_all(format!("{line}\n").as_bytes()).and_then(|()| out.flush()).expect("the parent listens");
}

/// Three brokers on what there is; the first time they are made a cluster.
async fn start(dir: &Path) -> Vec<Cluster> {
    let mut setup = Setup::new();
    setup.log_limits = LogLimits { snapshot_bytes: 100_000, keep_entries: 20, ..LogLimits::default() };
    let addresses = Arc::new(Mutex::new(BTreeMap::<u64, String>::new()));
    let mut brokers = Vec::new();
    for number in 0..3 {
        let path = dir.join(number.to_string());
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let mut options = setup.options(&path, listener, None).await;
        let node = options.dir.node_id();
        addresses.lock().unwrap().insert(node, address.clone());
        let known = addresses.clone();
        options.dial = Some(Arc::new(move |node| known.lock().unwrap().get(&node).cloned()));
        let cluster = Cluster::start(options).await.unwrap();
        brokers.push(Broker { cluster, address, node, dir: TempDir::new().unwrap() });
    }
    let first = &brokers[0];
    let made = dir.join("made");
    if !made.exists() {
        first.cluster.initialize(init(setup.cluster_id)).await.unwrap();
        first.register().await;
        for next in &brokers[1..] {
            first.enrol(next).await;
            next.cluster.join(std::slice::from_ref(&first.address), &next.address).await.unwrap();
            next.register().await;
            first.cluster.promote(&first.owner(), next.node).await.unwrap();
        }
        std::fs::write(made, "").unwrap();
    }
    brokers.into_iter().map(|broker| broker.cluster).collect()
}

/// Tells what there is, and that the journal tells the same.
async fn check(cluster: &Cluster) {
    let read = Instant::now();
    let state = loop {
        match cluster.linearizable(PATIENCE).await {
            Ok(state) => break state,
            Err(error) => assert!(read.elapsed() < PATIENCE, "{error}"),
        }
    };
    let mut tokens: Vec<Token> = state.rows::<Token>().filter(|token| token.name.contains('/')).collect();
    tokens.sort_by_key(|token| token.id());
    if !state.adds_up() {
        say("wrong: the rows do not add up to their hash");
    }
    // One event for each, in the order of the journal, as far back as it goes.
    let mut made = Vec::new();
    let mut events = pin!(cluster.events(selvedge_domain::Id::new(1, 1)));
    while let Some(frame) = events.next().await {
        match frame {
            Ok(Frame::Events { events, .. }) => made.extend(events.into_iter().filter_map(|event| match event.event {
                Some(selvedge_domain::Event::TokenPut(token)) if token.name.contains('/') => Some(token.name),
                _ => None,
            })),
            Ok(Frame::Bookmark { position, .. }) if position >= state.position() => break,
            Ok(Frame::Bookmark { .. }) => {}
            Err(error) => {
                // This broker installed a snapshot: what was before is elsewhere.
                say(&format!("journal: {error}"));
                made.clear();
                break;
            }
        }
    }
    let names: Vec<&String> = tokens.iter().map(|token| &token.name).collect();
    if !made.is_empty() && made.iter().collect::<Vec<_>>() != names {
        say("wrong: the journal does not tell what the state holds");
    }
    static TOLD: std::sync::Once = std::sync::Once::new();
    TOLD.call_once(|| {
        for token in &tokens {
            let (writer, number) = token.name.split_once('/').expect("filtered");
            say(&format!("have {writer} {number} {}", token.id()));
        }
    });
}

/// Makes tokens one after the other; one of which the outcome is unknown is asked for again, in another life too.
async fn write(clusters: Vec<Cluster>, writer: usize, mut next: u64) {
    let cluster = &clusters[writer % clusters.len()];
    until("the owner is known", || owner_of(&cluster.state()).is_some()).await;
    loop {
        let owner = owner_of(&cluster.state()).expect("awaited above");
        let name = format!("{writer}/{next}");
        let key = Sha256::digest(name.as_bytes()).into();
        match cluster.propose(owner, token(&name), Some(key)).await {
            Ok(done) => {
                say(&format!("done {writer} {next} {}", done.ids[0]));
                next += 1;
            }
            Err(ProposeError::Refused(rejected)) => say(&format!("wrong: {name} was refused: {rejected}")),
            Err(_) => {}
        }
    }
}
