//! Brokers in processes of their own, which write and read all the time until they are told to leave or are killed.
//!
//! A process is this test binary, or that of another build. It is told what to do by lines on its standard input, and
//! says what it sees by lines on its standard output.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::TcpListener;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use selvedge_cluster::{Cluster, LogLimits, ProposeError};
use selvedge_domain::command::PutBroker;
use selvedge_domain::rows::Token;
use selvedge_domain::state::IndexKey;
use selvedge_domain::{Body, State};
use sha2::{Digest as _, Sha256};
use tempfile::TempDir;

use crate::brokers::{Authority, CLUSTER_ID, PATIENCE, Setup, init, owner_of, token};

/// The directory that the processes of a cluster share.
const SHARED: &str = "SELVEDGE_PROCESS_DIR";
/// Which of them a process is.
const PLACE: &str = "SELVEDGE_PROCESS_PLACE";
/// How long the slowest thing that a process does may take.
const LIFE_PATIENCE: Duration = Duration::from_secs(60);

/// A cluster of processes.
pub struct Processes {
    dir: TempDir,
    told: Arc<Mutex<Told>>,
    lives: u64,
}

/// What all processes have said.
#[derive(Default)]
pub struct Told {
    /// Acknowledged writes, by name: the id that each made.
    pub acknowledged: BTreeMap<String, String>,
    /// Linearizable reads that were answered.
    pub reads: usize,
    /// What must not be said.
    pub wrong: Vec<String>,
    /// The hashes after each entry, by whoever said so first.
    hashes: BTreeMap<u64, String>,
    /// How many processes have said the hashes of an entry that another said before.
    pub compared: usize,
}

/// One process.
pub struct Process {
    child: Child,
    stdin: ChildStdin,
    heard: Arc<Mutex<Heard>>,
    told: Arc<Mutex<Told>>,
    asked: u64,
    pub place: usize,
    pub node: u64,
    pub address: String,
}

/// What one process has said.
#[derive(Default)]
struct Heard {
    listens: Option<(u64, String)>,
    ready: bool,
    leads: bool,
    answers: BTreeMap<u64, Result<String, String>>,
    /// Why it stopped, or did not start: a code and what it means.
    fatal: Option<String>,
    done: usize,
    /// Why its last write has to be tried again.
    again: String,
    ended: bool,
}

impl Processes {
    pub fn new() -> Self {
        let dir = TempDir::new().unwrap();
        Authority::new(CLUSTER_ID).save(dir.path());
        Self { dir, told: Arc::default(), lives: 0 }
    }

    /// This build.
    pub fn this_build() -> PathBuf {
        std::env::current_exe().unwrap()
    }

    /// So many brokers of this build, all voters, all at work.
    pub fn voters(&mut self, count: usize) -> Vec<Process> {
        let mut processes: Vec<_> = (0..count).map(|place| self.start(place, &Self::this_build())).collect();
        let (first, others) = processes.split_first_mut().expect("there is one");
        first.ask("initialize").unwrap();
        first.ask(&format!("enrol {} {}", first.node, first.address)).unwrap();
        for other in others.iter_mut() {
            self.join(other, first).unwrap();
            first.ask(&format!("promote {}", other.node)).unwrap();
        }
        for process in &mut processes {
            process.until("it works", |heard| heard.ready);
        }
        processes
    }

    /// Makes a broker a learner.
    pub fn join(&self, process: &mut Process, through: &mut Process) -> Result<String, String> {
        through.ask(&format!("enrol {} {}", process.node, process.address))?;
        let (own, other) = (process.address.clone(), through.address.clone());
        process.ask(&format!("join {other} {own}"))
    }

    /// Starts a broker, for the first time or again on what it has.
    pub fn start(&mut self, place: usize, build: &Path) -> Process {
        self.lives += 1;
        let mut process = Process::spawn(build, self.dir.path(), place, self.lives, self.told.clone());
        process.until("it listens or says why not", |heard| heard.listens.is_some() || heard.fatal.is_some());
        if let Some((node, address)) = process.heard.lock().unwrap().listens.clone() {
            (process.node, process.address) = (node, address);
        }
        process
    }

    /// What was said so far; fails when any of it must not be.
    pub fn told(&self) -> std::sync::MutexGuard<'_, Told> {
        let told = self.told.lock().unwrap();
        assert!(told.wrong.is_empty(), "{:?}", told.wrong);
        told
    }

    /// Waits until each of these has had so many more writes acknowledged.
    pub fn work(&self, processes: &mut [Process], writes: usize) {
        for process in processes {
            let before = process.heard.lock().unwrap().done;
            process.until("its writes are acknowledged", |heard| heard.done >= before + writes);
        }
        drop(self.told());
    }

    /// Which of them leads.
    pub fn leader(&self, processes: &[Process]) -> usize {
        let begun = Instant::now();
        loop {
            let leaders: Vec<_> = (0..processes.len()).filter(|at| processes[*at].leads()).collect();
            if let [leader] = leaders[..] {
                return leader;
            }
            assert!(begun.elapsed() < LIFE_PATIENCE, "one of them leads, not {leaders:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Ends the work, and holds what every broker has against what was acknowledged: each write is there once, and all
    /// that can be compared of two brokers' states and journals was equal after each entry.
    pub fn check(&self, mut processes: Vec<Process>) {
        for process in &mut processes {
            process.ask("rest").unwrap();
        }
        let acknowledged = self.told().acknowledged.clone();
        let mut ends = BTreeSet::new();
        for process in &mut processes {
            let holds = process.ask("tokens").unwrap();
            let holds: Vec<(&str, &str)> = holds.split(' ').filter_map(|pair| pair.split_once('=')).collect();
            let names: BTreeMap<&str, &str> = holds.iter().copied().collect();
            assert_eq!(names.len(), holds.len(), "a write was applied twice");
            for (name, id) in &acknowledged {
                assert_eq!(names.get(name.as_str()), Some(&id.as_str()), "`{name}` was acknowledged");
            }
            ends.insert(process.ask("end").unwrap());
        }
        assert_eq!(ends.len(), 1, "all hold the same: {ends:?}");
        let told = self.told();
        assert!(told.compared > 20, "only {} states were compared", told.compared);
        println!("{} writes, {} reads, {} states compared", acknowledged.len(), told.reads, told.compared);
    }
}

impl Process {
    fn spawn(build: &Path, shared: &Path, place: usize, life: u64, told: Arc<Mutex<Told>>) -> Self {
        let mut child = Command::new(build)
            .args(["process::the_process_that_is_a_broker", "--exact", "--ignored", "--nocapture", "--test-threads=1"])
            .env(SHARED, shared)
            .env(PLACE, format!("{place} {life}"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("this binary runs");
        let stdin = child.stdin.take().expect("piped");
        let stdout = BufReader::new(child.stdout.take().expect("piped"));
        let heard = Arc::new(Mutex::new(Heard::default()));
        let (hears, tells) = (heard.clone(), told.clone());
        std::thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                hear(&line, &mut hears.lock().unwrap(), &tells);
            }
            hears.lock().unwrap().ended = true;
        });
        Self { child, stdin, heard, told, asked: 0, place, node: 0, address: String::new() }
    }

    fn until(&mut self, what: &str, is: impl Fn(&Heard) -> bool) {
        let begun = Instant::now();
        loop {
            {
                let heard = self.heard.lock().unwrap();
                if is(&heard) {
                    return;
                }
                assert!(
                    !heard.ended,
                    "process {} ended while it was waited until {what}: {:?}",
                    self.place, heard.fatal
                );
            }
            let wrong = self.told.lock().unwrap().wrong.clone();
            assert!(wrong.is_empty(), "{wrong:?}");
            let again = self.heard.lock().unwrap().again.clone();
            assert!(begun.elapsed() < LIFE_PATIENCE, "process {}: waited in vain until {what}: {again}", self.place);
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Asks for something, and waits for the answer.
    pub fn ask(&mut self, what: &str) -> Result<String, String> {
        self.asked += 1;
        let number = self.asked;
        writeln!(self.stdin, "{number} {what}").expect("it listens");
        self.until(what, |heard| heard.answers.contains_key(&number));
        self.heard.lock().unwrap().answers.remove(&number).expect("awaited above")
    }

    pub fn ready(&mut self) {
        self.until("it has caught up", |heard| heard.ready);
    }

    pub fn leads(&self) -> bool {
        self.heard.lock().unwrap().leads
    }

    /// Waits until it has said why it stops, or does not start.
    pub fn fatal(&mut self) -> String {
        self.until("it stops", |heard| heard.fatal.is_some());
        let fatal = self.heard.lock().unwrap().fatal.clone().expect("awaited above");
        self.child.wait().expect("it ends by itself");
        fatal
    }

    /// Lets it end in order, as a service manager does.
    pub fn leave(mut self) {
        self.ask("leave").unwrap();
        let ended = self.child.wait().expect("it ends by itself");
        assert!(ended.success(), "{ended}");
    }

    /// SIGKILL.
    pub fn kill(mut self) {
        self.child.kill().expect("it runs");
        let ended = self.child.wait().expect("a killed process ends");
        assert_eq!(ended.signal(), Some(9), "it was killed, and had not ended before");
        // What it wrote to the pipe before it died counts.
        let begun = Instant::now();
        while !self.heard.lock().unwrap().ended {
            assert!(begun.elapsed() < PATIENCE, "its last words are heard");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn hear(line: &str, heard: &mut Heard, told: &Mutex<Told>) {
    let words: Vec<&str> = line.split(' ').collect();
    match words[..] {
        ["listens", node, address] => heard.listens = Some((node.parse().unwrap(), address.to_owned())),
        ["ready"] => heard.ready = true,
        ["leads", leads] => heard.leads = leads == "true",
        ["fatal", ..] => heard.fatal = Some(line["fatal ".len()..].to_owned()),
        ["answer", number, "ok", ..] => {
            let rest = words[3..].join(" ");
            drop(heard.answers.insert(number.parse().unwrap(), Ok(rest)));
        }
        ["answer", number, "no", ..] => {
            let rest = words[3..].join(" ");
            drop(heard.answers.insert(number.parse().unwrap(), Err(rest)));
        }
        ["done", name, id] => {
            heard.done += 1;
            told.lock().unwrap().acknowledged.insert(name.to_owned(), id.to_owned());
        }
        ["again", ..] => heard.again = line.to_owned(),
        ["read"] => told.lock().unwrap().reads += 1,
        ["hash", index, hash] => {
            let mut told = told.lock().unwrap();
            let index = index.parse().unwrap();
            match told.hashes.get(&index) {
                None => drop(told.hashes.insert(index, hash.to_owned())),
                Some(known) if known == hash => told.compared += 1,
                Some(known) => {
                    let wrong = format!("after entry {index} one holds {known}, another {hash}");
                    told.wrong.push(wrong);
                }
            }
        }
        ["wrong", ..] => told.lock().unwrap().wrong.push(line.to_owned()),
        // The test harness of the process.
        _ => {}
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "is run by tests that need brokers in processes of their own"]
async fn the_process_that_is_a_broker() {
    let Some(shared) = std::env::var_os(SHARED).map(PathBuf::from) else { return };
    let place = std::env::var(PLACE).unwrap();
    let (place, life) = place.split_once(' ').unwrap();
    // The harness has begun a line.
    say("");
    let setup = Setup {
        authority: Arc::new(Authority::load(&shared)),
        log_limits: LogLimits { snapshot_bytes: 100_000, keep_entries: 50, ..LogLimits::default() },
        ..Setup::new()
    };
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let mut options = setup.options(&shared.join(place), listener, None).await;
    let node = options.dir.node_id();
    // Each says where it listens in this life; nobody reads half a line.
    let note = shared.join(format!("{node}.new"));
    std::fs::write(&note, &address).unwrap();
    std::fs::rename(note, shared.join(format!("{node}.address"))).unwrap();
    let addresses = shared.clone();
    options.dial = Some(Arc::new(move |node| std::fs::read_to_string(addresses.join(format!("{node}.address"))).ok()));
    let cluster = match Cluster::start(options).await {
        Ok(cluster) => cluster,
        Err(error) => return say(&format!("fatal {error}")),
    };
    say(&format!("listens {node} {address}"));
    let resting = Arc::new(AtomicBool::new(false));
    let work = tokio::spawn(work(cluster.clone(), format!("W{place}.{life}"), resting.clone()));
    tokio::spawn(tell(cluster.clone()));
    let (ask, mut asked) = tokio::sync::mpsc::channel(16);
    std::thread::spawn(move || {
        for line in std::io::stdin().lines().map_while(Result::ok) {
            if ask.blocking_send(line).is_err() {
                return;
            }
        }
    });
    let mut work = Some(work);
    loop {
        let line = tokio::select! {
            line = asked.recv() => line,
            fatal = cluster.fatal() => {
                say(&format!("fatal {} {fatal}", fatal.code()));
                return cluster.stop().await;
            }
        };
        // A parent that is gone asks for nothing any more.
        let Some(line) = line else { return };
        let (number, what) = line.split_once(' ').unwrap();
        if matches!(what, "rest" | "leave")
            && let Some(work) = work.take()
        {
            resting.store(true, Ordering::SeqCst);
            work.await.unwrap();
        }
        let answer = match what {
            "leave" => {
                cluster.shutdown().await;
                Ok(String::new())
            }
            "rest" => Ok(String::new()),
            _ => obey(&cluster, &setup, what).await,
        };
        match answer {
            Ok(answer) => say(&format!("answer {number} ok {answer}")),
            Err(answer) => say(&format!("answer {number} no {answer}")),
        }
        if what == "leave" {
            return;
        }
    }
}

async fn obey(cluster: &Cluster, setup: &Setup, what: &str) -> Result<String, String> {
    let words: Vec<&str> = what.split(' ').collect();
    let propose = async |body: Body| {
        let owner = owner_of(&cluster.state()).ok_or("there is no owner")?;
        let done = cluster.propose(owner, body, None).await.map_err(|error| error.to_string())?;
        Ok(done.ids.first().map(ToString::to_string).unwrap_or_default())
    };
    match words[..] {
        ["initialize"] => {
            let done = cluster.initialize(init(setup.cluster_id)).await;
            done.map(|_| String::new()).map_err(|error| error.to_string())
        }
        ["enrol", node, address] => {
            let (node, peer) = (node.parse().unwrap(), address.to_owned());
            let (name, region) = (format!("broker-{node}"), "here".to_owned());
            let (edge, web, host) = (String::new(), String::new(), "localhost".to_owned());
            let roles = vec![1, 2, 3, 4];
            propose(Body::PutBroker(PutBroker { node, name, region, host, edge, web, peer, roles })).await
        }
        ["join", other, own] => {
            let joined = cluster.join(&[other.to_owned()], own).await;
            joined.map(|()| String::new()).map_err(|error| error.to_string())
        }
        ["promote", node] => {
            let owner = owner_of(&cluster.state()).ok_or("there is no owner")?;
            let promoted = cluster.promote(&owner, node.parse().unwrap()).await;
            promoted.map(|()| String::new()).map_err(|error| error.to_string())
        }
        ["raise", version] => propose(Body::RaiseMinVersion { version: version.parse().unwrap() }).await,
        ["create", name] => propose(token(name)).await,
        #[cfg(feature = "next")]
        ["rename", from, to] => {
            let found = cluster.state().find::<Token>(IndexKey::name(from)).ok_or("there is no such token")?;
            propose(Body::RenameToken { id: found.id(), name: to.to_owned() }).await
        }
        ["has", name] => {
            let state = cluster.linearizable(PATIENCE).await.map_err(|error| error.to_string())?;
            state.find::<Token>(IndexKey::name(name)).map(|token| token.name).ok_or("no".to_owned())
        }
        // Versions that the members of a cluster know, lowest first, and the one in force.
        ["versions"] => {
            let status = cluster.status();
            let mut known: Vec<_> = status.members.iter().map(|member| member.version.unwrap_or(0)).collect();
            known.sort_unstable();
            Ok(format!("{known:?} {}", status.version))
        }
        ["tokens"] => {
            let state = cluster.linearizable(PATIENCE).await.map_err(|error| error.to_string())?;
            let tokens: Vec<String> =
                state.rows::<Token>().map(|token| format!("{}={}", as_proposed(&token.name), token.id())).collect();
            Ok(tokens.join(" "))
        }
        ["end"] => {
            let state = cluster.linearizable(PATIENCE).await.map_err(|error| error.to_string())?;
            let sound = state.adds_up();
            Ok(format!(
                "{} {} adds up: {sound}",
                hex::encode(state.state_hash()),
                hex::encode(state.meta().journal_hash)
            ))
        }
        _ => Err(format!("`{what}` is not known to this build")),
    }
}

/// Writers' names begin with a capital, which the next version of the rules makes a small letter.
fn as_proposed(name: &str) -> String {
    if name.starts_with('w') { name.replacen('w', "W", 1) } else { name.to_owned() }
}

/// Makes tokens and reads them back, one after the other; one of which the outcome is unknown is asked for again.
async fn work(cluster: Cluster, writer: String, resting: Arc<AtomicBool>) {
    let mut said_ready = false;
    let mut number = 0;
    let mut begun = Instant::now();
    while !resting.load(Ordering::SeqCst) {
        let state = cluster.state();
        let Some(owner) = owner_of(&state).filter(|_| state.broker(cluster.node()).is_some()) else {
            tokio::time::sleep(Duration::from_millis(20)).await;
            continue;
        };
        let name = format!("{writer}-{number}");
        let key = Sha256::digest(name.as_bytes()).into();
        let done = match cluster.propose(owner, token(&name), Some(key)).await {
            Ok(done) => done,
            Err(ProposeError::Refused(rejected)) => return say(&format!("wrong: `{name}` was refused: {rejected}")),
            // It has not caught up yet, or somebody is just being replaced.
            Err(error) => {
                say(&format!("again `{name}`: {error}"));
                if said_ready && begun.elapsed() > LIFE_PATIENCE {
                    say(&format!("wrong: `{name}` cannot be written: {error}"));
                }
                continue;
            }
        };
        say(&format!("done {name} {}", done.ids[0]));
        match cluster.linearizable(PATIENCE).await {
            Ok(state) if has(&state, &name) => say("read"),
            Ok(_) => say(&format!("wrong: `{name}` is not there after it was acknowledged")),
            Err(error) if said_ready => say(&format!("wrong: no read: {error}")),
            Err(_) => {}
        }
        if !said_ready {
            say("ready");
            said_ready = true;
        }
        (number, begun) = (number + 1, Instant::now());
    }
}

fn has(state: &State, name: &str) -> bool {
    state.find::<Token>(IndexKey::name(name)).is_some()
}

/// Tells who leads and what the hashes are, as they come.
async fn tell(cluster: Cluster) {
    let (mut led, mut next) = (false, 0);
    loop {
        let leads = cluster.leads();
        if leads != led {
            led = leads;
            say(&format!("leads {leads}"));
        }
        for hashes in cluster.hashes(next) {
            next = hashes.index + 1;
            let (state, journal) = (hex::encode(hashes.state), hex::encode(hashes.journal));
            say(&format!("hash {} {state}/{journal}", hashes.index));
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn say(line: &str) {
    // One write, so that a kill cuts no line in two that is taken for whole.
    let mut out = std::io::stdout().lock();
    // A parent that is gone hears nothing any more.
    let _ = out.write_all(format!("{line}\n").as_bytes()).and_then(|()| out.flush());
}
