//! Writes and reads per second: the brokers' and etcd's, in turn.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use anyhow::ensure;
use tokio::runtime::Runtime;

use crate::Findings;
use crate::brokers::{self, BROKERS, Brokers, Client, Users};
use crate::etcd::{self, Etcd};
use crate::load::{Load, Sample, closed_loop, spread};
use crate::machine::{cpu_seconds, median};

/// Keys that are written, and users.
const KEYS: usize = 10_000;
/// Least ratio of single commands, and of commands on a stream.
const COMMIT_RATIO_MIN: f64 = 3.0;
const STREAM_RATIO_GOAL: f64 = 5.0;

pub struct Plan {
    pub pairs: usize,
    pub wide: Load,
    pub narrow: Load,
    pub reads: Load,
}

/// One kind of run on both sides.
#[derive(Default)]
struct Figures {
    per_second: Vec<f64>,
    p99_ms: Vec<f64>,
}

impl Figures {
    fn add(&mut self, sample: &Sample) {
        self.per_second.push(sample.per_second);
        self.p99_ms.push(sample.latency_ms(99));
    }
}

pub fn run(bin: &Path, runtime: &Runtime, plan: &Plan, findings: &mut Findings) -> anyhow::Result<()> {
    let ours = Brokers::start(bin, "lan")?;
    let theirs = Etcd::start()?;
    println!(
        "versions: selvedge {} (`{}`); {}",
        env!("CARGO_PKG_VERSION"),
        if cfg!(debug_assertions) { "dev profile" } else { "release profile" },
        theirs.version
    );
    println!(
        "commits: {KEYS} users and {KEYS} keys, values of {} bytes; one connection to each of {BROKERS} endpoints; a broker that does \
         not lead names the leader and the client goes there, an etcd server that does not lead passes the put on",
        brokers::VALUE_BYTES
    );
    let (client, users, rival) = runtime.block_on(async {
        let client = Arc::new(ours.client().await?);
        let users = Arc::new(Users::make(&client, KEYS).await?);
        let rival = Arc::new(theirs.client()?);
        rival.ready().await?;
        for key in 0..KEYS {
            rival.put(key, brokers::name(key).into_bytes(), brokers::value(0).into_bytes()).await?;
        }
        Ok::<_, anyhow::Error>((client, users, rival))
    })?;
    let side = Side { client, users, rival, ours: &ours, theirs: &theirs };

    let (mut unary, mut stream, mut puts) = (Figures::default(), Figures::default(), Figures::default());
    let (mut unary_narrow, mut stream_narrow, mut puts_narrow) =
        (Figures::default(), Figures::default(), Figures::default());
    let (mut reads, mut ranges) = (Figures::default(), Figures::default());
    for pair in 1..=plan.pairs {
        println!("pair {pair} of {}", plan.pairs);
        unary.add(&runtime.block_on(side.unary(plan.wide))?);
        puts.add(&runtime.block_on(side.puts(plan.wide))?);
        stream.add(&runtime.block_on(side.stream(plan.wide))?);
        unary_narrow.add(&runtime.block_on(side.unary(plan.narrow))?);
        puts_narrow.add(&runtime.block_on(side.puts(plan.narrow))?);
        stream_narrow.add(&runtime.block_on(side.stream(plan.narrow))?);
        reads.add(&runtime.block_on(side.reads(plan.reads))?);
        ranges.add(&runtime.block_on(side.ranges(plan.reads))?);
    }
    runtime.block_on(side.same_everywhere())?;
    let hints = side.client.hints.load(Ordering::Relaxed);

    let ratio = |ours: &Figures, theirs: &Figures| median(&ours.per_second) / median(&theirs.per_second);
    let (commit_ratio, stream_ratio) = (ratio(&unary, &puts), ratio(&stream, &puts));
    println!(
        "medians of {}: commands/s {:.0} single, {:.0} on a stream, puts/s {:.0}; p99 {:.1}, {:.1} and {:.1} ms; a broker named another leader {hints} times",
        plan.pairs,
        median(&unary.per_second),
        median(&stream.per_second),
        median(&puts.per_second),
        median(&unary.p99_ms),
        median(&stream.p99_ms),
        median(&puts.p99_ms),
    );
    println!(
        "with {} clients: commands/s {:.0} single, {:.0} on a stream, puts/s {:.0}; ratios {:.2} and {:.2}; p99 {:.1}, {:.1} and {:.1} ms",
        plan.narrow.clients,
        median(&unary_narrow.per_second),
        median(&stream_narrow.per_second),
        median(&puts_narrow.per_second),
        ratio(&unary_narrow, &puts_narrow),
        ratio(&stream_narrow, &puts_narrow),
        median(&unary_narrow.p99_ms),
        median(&stream_narrow.p99_ms),
        median(&puts_narrow.p99_ms),
    );
    println!(
        "linearizable reads/s, a third on each: {:.0}, etcd {:.0}",
        median(&reads.per_second),
        median(&ranges.per_second)
    );
    findings.key("commit_ratio", commit_ratio, 2);
    findings.key("commit_stream_ratio", stream_ratio, 2);
    findings.key("commit_p99_ratio", median(&unary.p99_ms) / median(&puts.p99_ms), 2);
    findings.key("read_ratio", ratio(&reads, &ranges), 2);
    findings.must(commit_ratio >= COMMIT_RATIO_MIN, || {
        format!("commit_ratio is {commit_ratio:.2}, and should be at least {COMMIT_RATIO_MIN}")
    });
    findings.must(stream_ratio >= STREAM_RATIO_GOAL, || {
        format!("commit_stream_ratio is {stream_ratio:.2}, and the goal is {STREAM_RATIO_GOAL}")
    });
    Ok(())
}

/// Both sides, ready to be driven.
struct Side<'a> {
    client: Arc<Client>,
    users: Arc<Users>,
    rival: Arc<etcd::Client>,
    ours: &'a Brokers,
    theirs: &'a Etcd,
}

/// Which key the `n`th request of a client is about.
fn key(client: usize, n: u64) -> usize {
    (spread((client as u64) << 40 | n) % KEYS as u64) as usize
}

impl Side<'_> {
    async fn unary(&self, load: Load) -> anyhow::Result<Sample> {
        let (client, users) = (self.client.clone(), self.users.clone());
        let operation = move |number, n| {
            let (client, users) = (client.clone(), users.clone());
            async move { client.propose(users.change(key(number, n), spread(n))).await.map(drop) }
        };
        self.measured("selvedge single commands", load, self.ours.pids(), operation).await
    }

    async fn stream(&self, load: Load) -> anyhow::Result<Sample> {
        let stream = Arc::new(self.client.stream(load.clients, self.users.change(0, 0)).await?);
        let users = self.users.clone();
        let operation = move |number, n| {
            let (stream, users) = (stream.clone(), users.clone());
            async move { stream.propose(number, users.change(key(number, n), spread(n))).await.map(drop) }
        };
        self.measured("selvedge commands on a stream", load, self.ours.pids(), operation).await
    }

    async fn puts(&self, load: Load) -> anyhow::Result<Sample> {
        let rival = self.rival.clone();
        let operation = move |number, n| {
            let rival = rival.clone();
            async move {
                let key = brokers::name(key(number, n)).into_bytes();
                rival.put(number, key, brokers::value(spread(n)).into_bytes()).await
            }
        };
        self.measured("etcd puts", load, self.theirs.pids(), operation).await
    }

    async fn reads(&self, load: Load) -> anyhow::Result<Sample> {
        let (client, users) = (self.client.clone(), self.users.clone());
        let operation = move |number, n| {
            let (client, user) = (client.clone(), users.ids[key(number, n)]);
            async move { client.read(number, user).await.map(drop) }
        };
        self.measured("selvedge linearizable reads", load, self.ours.pids(), operation).await
    }

    async fn ranges(&self, load: Load) -> anyhow::Result<Sample> {
        let rival = self.rival.clone();
        let operation = move |number, n| {
            let rival = rival.clone();
            async move { rival.read(number, brokers::name(key(number, n)).into_bytes()).await.map(drop) }
        };
        self.measured("etcd linearizable ranges", load, self.theirs.pids(), operation).await
    }

    async fn measured<F, O>(&self, what: &str, load: Load, servers: Vec<u32>, operation: F) -> anyhow::Result<Sample>
    where
        F: Fn(usize, u64) -> O + Send + Sync + 'static,
        O: Future<Output = anyhow::Result<()>> + Send,
    {
        let pids: Vec<u32> = [std::process::id()].into_iter().chain(servers).collect();
        let sample = closed_loop(load, &pids, operation).await?;
        let [generator, servers @ ..] = sample.cpu_us.as_slice() else { anyhow::bail!("no processes") };
        let each: Vec<_> = servers.iter().map(|us| format!("{us:.0}")).collect();
        println!(
            "  {what}, {} clients: {:.0}/s ({} in {} s), p50 {:.1} p99 {:.1} max {:.1} ms; CPU us each: servers {} = {:.0}, generator {generator:.0}",
            load.clients,
            sample.per_second,
            sample.operations,
            load.measured.as_secs(),
            sample.latency_ms(50),
            sample.latency_ms(99),
            sample.latency_ms(100),
            each.join(" + "),
            servers.iter().sum::<f64>(),
        );
        Ok(sample)
    }

    /// Every broker answers the same of every hundredth user.
    async fn same_everywhere(&self) -> anyhow::Result<()> {
        for id in self.users.ids.iter().step_by(100) {
            let first = self.client.read(0, *id).await?;
            for broker in 1..BROKERS {
                ensure!(self.client.read(broker, *id).await? == first, "two brokers answer differently of user `{id}`");
            }
        }
        for pid in self.ours.pids() {
            cpu_seconds(pid)?;
        }
        println!("every broker answers the same of {} users", self.users.ids.len().div_ceil(100));
        Ok(())
    }
}
