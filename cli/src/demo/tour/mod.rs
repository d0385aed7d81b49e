//! `selvedge tour`: walks what Selvedge promises, measures each, and fails when one does not hold.

mod audit;
mod faults;
mod framing;
mod reach;
mod revoke;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, bail};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;

use framing::Framing;

use super::apps;
use super::cli::Ran;
use super::clock::Moment;
use super::geography::Region;
use super::home::Home;
use super::link::Link;
use super::process::Process;
use super::provision::{client_arguments, until};
use super::say;
use super::world::{ALLOWED, BILLING, DENIED, LEAVER, World};

/// Longest wait for an answer of an application.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// Longest wait until a client that was just started carries sessions.
const CLIENT_LIMIT: Duration = Duration::from_secs(30);
/// Longest wait for anything to come back after a fault.
const RECOVERY_LIMIT: Duration = Duration::from_secs(45);
/// Between two attempts of a measurement.
const RETRY_EVERY: Duration = Duration::from_millis(20);
/// How long sessions are watched before something is done to them.
const WATCH: Duration = Duration::from_millis(600);
/// The talk that tells which links a session takes.
const TALK_LINES: usize = 64;
const TALK_LINE_BYTES: usize = 4_000;

/// The steps, in order.
const STEPS: [&str; 11] = [
    "64 MiB arrive through the tunnel as they were sent",
    "the denied find what is not there",
    "a workload reaches its application in another region, and nothing else",
    "an interactive exchange",
    "the leader is killed",
    "the best connector is killed",
    "the client's broker is killed",
    "the leader's region is cut off",
    "the leaver is disabled at a follower",
    "the log receiver goes away and comes back",
    "the journals are verified, and a flipped byte is found",
];

/// The tour's figures.
#[derive(Debug, Default)]
struct Figures {
    failover_ms: Option<f64>,
    reroute_ms: Option<f64>,
    broker_loss_ms: Option<f64>,
    revoke_ms: Option<f64>,
    isolated_stop_ms: Option<f64>,
    audit_missing: Option<usize>,
    audit_dup: Option<usize>,
}

struct Tour {
    world: World,
    figures: Figures,
    /// (seat, host) to a client's process and its listener.
    clients: BTreeMap<(String, &'static str), (SocketAddr, Process)>,
}

/// Builds the world and walks the steps in it; only those in `only`, when it names some.
pub async fn walk(home: &Home, only: &[usize]) -> anyhow::Result<ExitCode> {
    say(&format!("selvedge {} on {}", env!("CARGO_PKG_VERSION"), machine()));
    let mut seats =
        vec![("denied".to_owned(), DENIED, Region::Frankfurt), (BILLING.to_owned(), BILLING, Region::Virginia)];
    for region in Region::ALL {
        seats.push((format!("allowed-{}", region.name()), ALLOWED, region));
        seats.push((format!("leaver-{}", region.name()), LEAVER, region));
    }
    let named: Vec<(&str, &str, Region)> = seats.iter().map(|(name, whose, at)| (name.as_str(), *whose, *at)).collect();
    let begun = Moment::now();
    let world = World::build(home, &named, &|text| say(&format!("      {text}"))).await?;
    say(&format!("      the world stands after {:.1} s", Moment::now().ms_since(begun) / 1_000.0));
    for (usual, instead) in world.ports.replaced() {
        say(&format!("      port {usual} was taken: {instead} is used instead"));
    }
    let mut tour = Tour { world, figures: Figures::default(), clients: BTreeMap::new() };
    let (mut walked, mut failed) = (0, 0);
    for (number, title) in (1..).zip(STEPS) {
        if !only.is_empty() && !only.contains(&number) {
            continue;
        }
        walked += 1;
        match tour.step(number).await {
            Ok(measured) => say(&format!("ok   {number:>2}  {title}: {measured}")),
            Err(error) => {
                failed += 1;
                say(&format!("FAIL {number:>2}  {title}: {error:#}"));
                if let Err(error) = tour.mend().await {
                    say(&format!("          and it could not be mended: {error:#}"));
                }
            }
        }
    }
    tour.end().await;
    say(&tour.figures.line(walked, failed));
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

impl Figures {
    fn line(&self, steps: usize, failed: usize) -> String {
        let ms = |value: Option<f64>| value.map_or_else(|| "none".to_owned(), |ms| format!("{ms:.1}"));
        let count = |value: Option<usize>| value.map_or_else(|| "none".to_owned(), |count| count.to_string());
        format!(
            "RESULT tour steps={steps} failed={failed} failover_ms={} reroute_ms={} broker_loss_ms={} revoke_ms={} \
             isolated_stop_ms={} audit_missing={} audit_dup={}",
            ms(self.failover_ms),
            ms(self.reroute_ms),
            ms(self.broker_loss_ms),
            ms(self.revoke_ms),
            ms(self.isolated_stop_ms),
            count(self.audit_missing),
            count(self.audit_dup)
        )
    }
}

impl Tour {
    async fn step(&mut self, number: usize) -> anyhow::Result<String> {
        match number {
            1 => self.bulk().await,
            2 => self.denied().await,
            3 => self.workload().await,
            4 => self.interactive().await,
            5 => self.leader_killed().await,
            6 => self.connector_killed().await,
            7 => self.broker_killed().await,
            8 => self.region_cut_off().await,
            9 => self.leaver_disabled().await,
            10 => self.receiver_away().await,
            11 => self.journals_verified().await,
            other => bail!("there is no step {other}"),
        }
    }

    /// Where a seat's client listens for an application; starts that client when it does not run yet.
    async fn listener(&mut self, seat: &str, target: (&'static str, u16)) -> anyhow::Result<SocketAddr> {
        let key = (seat.to_owned(), target.0);
        if let Some((address, process)) = self.clients.get_mut(&key)
            && process.is_running()
        {
            return Ok(*address);
        }
        let address = self.world.ports.reserve(0).await?;
        let mut process = self.world.connect(seat, target, address)?;
        process.start()?;
        let carries = until("a session of a client that was just started", CLIENT_LIMIT, async || {
            if !process.is_running() {
                bail!("the client ended: {}", process.last_words());
            }
            answers(address, target).await
        });
        carries.await?;
        self.clients.insert(key, (address, process));
        Ok(address)
    }

    /// Starts a seat's client anew, so that it attaches to the brokers that are best now.
    async fn fresh_listener(&mut self, seat: &str, target: (&'static str, u16)) -> anyhow::Result<SocketAddr> {
        for ((whose, _), (_, process)) in &mut self.clients {
            if whose == seat {
                process.kill().await?;
            }
        }
        self.listener(seat, target).await
    }

    /// A watched session of a seat.
    async fn framing(&mut self, seat: &str) -> anyhow::Result<Framing> {
        let listener = self.listener(seat, apps::CHAT).await?;
        Framing::open(listener, &self.world.apps.heard).await.with_context(|| format!("a session of `{seat}`"))
    }

    /// The broker and the connector that carry a seat's sessions now, told by where the bytes of a talk go.
    async fn carriers(&mut self, seat: &str) -> anyhow::Result<(Region, String)> {
        let listener = self.listener(seat, apps::CHAT).await?;
        let before = self.traffic(seat)?;
        tokio::time::timeout(ANSWER_LIMIT, talk(listener)).await.context("no answer")??;
        let after = self.traffic(seat)?;
        let grown = |at: usize| after.0[at] - before.0[at];
        let broker = Region::ALL.into_iter().max_by_key(|region| grown(region.index())).context("no broker")?;
        let connector = self
            .world
            .connectors
            .iter()
            .max_by_key(|connector| after.1[&connector.name] - before.1[&connector.name])
            .context("no connector")?;
        Ok((broker, connector.name.clone()))
    }

    /// Bytes on a seat's links, and on each connector's.
    fn traffic(&self, seat: &str) -> anyhow::Result<([u64; 3], BTreeMap<String, u64>)> {
        let seat = self.world.seat(seat)?;
        let connectors = self.world.connectors.iter();
        let sum = |links: &[Link; 3]| links.iter().map(Link::bytes).sum();
        Ok((
            [0, 1, 2].map(|at: usize| seat.links[at].bytes()),
            connectors.map(|connector| (connector.name.clone(), sum(&connector.links))).collect(),
        ))
    }

    /// Who leads, as the command line says.
    async fn leader(&self) -> anyhow::Result<Region> {
        until("a leader", RECOVERY_LIMIT, async || {
            let status = self.world.cli.json(&["cluster", "status", "--json"]).await?;
            let name = status["leader_name"].as_str().context("nobody leads")?;
            Region::named(name).with_context(|| format!("the leader `{name}` is not one of the three"))
        })
        .await
    }

    /// `client nc` of a seat.
    async fn nc(&self, seat: &str, (host, port): (&str, u16), input: &[u8]) -> anyhow::Result<Ran> {
        let mut arguments = client_arguments(self.world.seat(seat)?, "nc");
        arguments.extend([host.into(), port.to_string().into()]);
        self.world.cli.run(arguments, input).await
    }

    /// Everything runs and nothing is cut.
    async fn mend(&mut self) -> anyhow::Result<()> {
        for region in Region::ALL {
            self.world.set_partition(region, false);
        }
        self.world.receiver.resume().await?;
        for connector in &mut self.world.connectors {
            connector.process.start()?;
        }
        for region in Region::ALL {
            self.world.start_broker(region).await?;
        }
        Ok(())
    }

    async fn end(&mut self) {
        for (_, process) in self.clients.values_mut() {
            // It may have ended already.
            let _ = process.kill().await;
        }
        self.world.end().await;
    }
}

/// One whole exchange with an application.
async fn answers(address: SocketAddr, target: (&str, u16)) -> anyhow::Result<()> {
    if target == apps::CHAT { echo(address).await } else { fetch(address, "/").await.map(drop) }
}

/// Opens a session to `chat` and gets a line back in capitals.
async fn echo(address: SocketAddr) -> anyhow::Result<()> {
    let work = async {
        let socket = TcpStream::connect(address).await?;
        socket.set_nodelay(true)?;
        let (read, mut write) = socket.into_split();
        let mut lines = BufReader::new(read).lines();
        lines.next_line().await?.context("the session ended before the first byte")?;
        write.write_all(b"hello\n").await?;
        let answer = lines.next_line().await?.context("the session ended before the answer")?;
        if answer == "HELLO" { Ok(()) } else { bail!("`{answer}` is not the answer") }
    };
    tokio::time::timeout(ANSWER_LIMIT, work).await.context("no answer")?
}

/// A session that moves far more bytes than anything else does meanwhile.
async fn talk(address: SocketAddr) -> anyhow::Result<()> {
    let mut socket = TcpStream::connect(address).await?;
    let (read, mut write) = socket.split();
    let mut lines = BufReader::new(read).lines();
    lines.next_line().await?.context("the session ended before the first byte")?;
    let line = format!("{}\n", "x".repeat(TALK_LINE_BYTES));
    for _ in 0..TALK_LINES {
        write.write_all(line.as_bytes()).await?;
    }
    for _ in 0..TALK_LINES {
        lines.next_line().await?.context("the session ended before the answer")?;
    }
    Ok(())
}

/// `GET` of a path; the body.
async fn fetch(address: SocketAddr, path: &str) -> anyhow::Result<(String, Vec<u8>)> {
    use tokio::io::AsyncReadExt as _;
    let mut socket = TcpStream::connect(address).await?;
    socket.write_all(format!("GET {path} HTTP/1.1\r\nhost: {}\r\n\r\n", apps::CRM.0).as_bytes()).await?;
    let mut bytes = Vec::new();
    socket.read_to_end(&mut bytes).await?;
    let end = bytes.windows(4).position(|window| window == b"\r\n\r\n").context("the answer has no end of its head")?;
    let body = bytes.split_off(end + 4);
    let head = String::from_utf8_lossy(&bytes).into_owned();
    if head.starts_with("HTTP/1.1 200") {
        Ok((head, body))
    } else {
        bail!("{}", head.lines().next().unwrap_or_default())
    }
}

/// The first answered byte of a session opened after `since`, tried again until it succeeds.
async fn first_answer(listener: SocketAddr, since: Moment) -> anyhow::Result<f64> {
    let work = async {
        loop {
            if echo(listener).await.is_ok() {
                return Moment::now().ms_since(since);
            }
            tokio::time::sleep(RETRY_EVERY).await;
        }
    };
    tokio::time::timeout(RECOVERY_LIMIT, work).await.context("no session was answered any more")
}

/// Kernel and processors.
fn machine() -> String {
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let cores = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
    format!("Linux {}, {cores} cores", kernel.trim_end())
}
