//! `selvedge demo` and `selvedge tour`: a whole Selvedge on one machine, made of real processes of this binary with the
//! commands and requests that its users have. Distances, partitions and healing are links between the processes.

mod apps;
mod cli;
mod clock;
mod control;
mod geography;
mod home;
mod link;
mod ports;
mod process;
mod provision;
mod receiver;
mod show;
mod tour;
mod web;
mod world;

use std::fmt::Write as _;
use std::io::Write as _;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::{Parser, Subcommand};
use tokio::signal::unix::{SignalKind, signal};

use control::Request;
use geography::Region;
use home::Home;
use world::World;

/// After a failure, how long to see whether it was a signal that began it.
const SIGNAL_WAIT: Duration = Duration::from_millis(300);

/// `selvedge demo`
#[derive(Debug, Parser)]
pub struct Args {
    /// Keep the directory (logs, journals, what the receiver got) and say where it is.
    #[arg(long)]
    keep: bool,
    /// Break or mend the demo that runs; without it, run one until Ctrl-C.
    #[command(subcommand)]
    action: Option<Action>,
}

/// What to do to the demo that runs.
#[derive(Debug, Subcommand)]
enum Action {
    /// SIGKILL a broker or connector
    Kill { name: String },
    /// SIGSTOP a broker or connector; the log receiver goes away
    Stop { name: String },
    /// SIGCONT a broker or connector; the log receiver comes back
    Cont { name: String },
    /// Cut a broker off from the other brokers; its clients and connectors stay connected
    Partition { name: String },
    /// Mend everything about a name: started again, continued, links restored
    Heal { name: String },
    /// What runs, is stopped, is down or is cut off
    Status,
}

/// `selvedge tour`
#[derive(Debug, Parser)]
pub struct TourArgs {
    /// Keep the directory (logs, journals, what the receiver got) and say where it is
    #[arg(long)]
    keep: bool,
    /// Walk only these steps, by number
    #[arg(long, value_delimiter = ',')]
    only: Vec<usize>,
}

/// Runs the demo, or talks to the one that runs.
pub async fn run(args: Args) -> anyhow::Result<ExitCode> {
    let request = |action: &str, name: String| Request { action: action.to_owned(), name };
    let request = match args.action {
        None => return demonstrate(args.keep).await,
        Some(Action::Kill { name }) => request("kill", name),
        Some(Action::Stop { name }) => request("stop", name),
        Some(Action::Cont { name }) => request("cont", name),
        Some(Action::Partition { name }) => request("partition", name),
        Some(Action::Heal { name }) => request("heal", name),
        Some(Action::Status) => request("status", String::new()),
    };
    let dir = home::running().context("no demo of yours runs; `make demo` begins one")?;
    say(control::ask(&home::control(&dir), &request).await?.trim_end());
    Ok(ExitCode::SUCCESS)
}

/// Walks the tour.
pub async fn tour(args: TourArgs) -> anyhow::Result<ExitCode> {
    let home = Home::make(false, args.keep)?;
    if args.keep {
        say(&format!("everything is kept in {}", home.dir().display()));
    }
    let mut ended = Ended::listen()?;
    tokio::select! {
        result = tour::walk(&home, &args.only) => match result {
            Err(_) if ended.follows().await => Ok(ExitCode::from(130)),
            result => result,
        },
        () = ended.wait() => Ok(ExitCode::from(130)),
    }
}

async fn demonstrate(keep: bool) -> anyhow::Result<ExitCode> {
    let home = Home::make(true, keep)?;
    let mut ended = Ended::listen()?;
    let seats = [
        ("allowed", world::ALLOWED, Region::Frankfurt),
        ("denied", world::DENIED, Region::Frankfurt),
        ("leaver", world::LEAVER, Region::Virginia),
        (world::BILLING, world::BILLING, Region::Virginia),
    ];
    let built = tokio::select! {
        built = World::build(&home, &seats, &|text| say(&format!("  {text}"))) => built,
        () = ended.wait() => return Ok(ExitCode::from(130)),
    };
    let mut world = match built {
        Err(_) if ended.follows().await => return Ok(ExitCode::from(130)),
        built => built?,
    };
    let mut requests = control::listen(&home.control())?;
    let mut listeners = show::listeners(&mut world).await?;
    let status = world.cli.json(&["cluster", "status", "--json"]).await?;
    let leader = status["leader_name"].as_str().unwrap_or(Region::ALL[0].name());
    say(&show::banner(&world, &listeners, leader, keep));
    loop {
        tokio::select! {
            () = ended.wait() => break,
            Some(asked) = requests.recv() => {
                let answer = act(&mut world, &asked.request).await;
                // Who asked may have gone.
                let _ = asked.answer.send(answer);
            }
        }
    }
    for listener in &mut listeners {
        listener.process.kill().await?;
    }
    world.end().await;
    Ok(ExitCode::SUCCESS)
}

async fn act(world: &mut World, request: &Request) -> anyhow::Result<String> {
    let name = request.name.as_str();
    if name == "receiver" {
        match request.action.as_str() {
            "kill" | "stop" => world.receiver.stop().await,
            "cont" | "heal" => world.receiver.resume().await?,
            other => bail!("the receiver knows kill, stop, cont and heal, not `{other}`"),
        }
        return Ok(format!("receiver: {}\n", if world.receiver.is_running() { "runs" } else { "down" }));
    }
    if request.action == "status" {
        return status(world);
    }
    let region = Region::named(name);
    match (request.action.as_str(), region) {
        ("partition", Some(region)) => {
            world.set_partition(region, true);
            return Ok(format!("{name}: cut off from the other brokers; it stops forwarding when its lease ends\n"));
        }
        ("partition", None) => bail!("only brokers can be cut off: frankfurt, virginia, singapore"),
        _ => {}
    }
    if let ("heal", Some(region)) = (request.action.as_str(), region) {
        world.set_partition(region, false);
    }
    let Some(process) = world.process(name) else {
        let names: Vec<String> = world.names();
        bail!("there is no `{name}`; there are {}", names.join(", "));
    };
    match request.action.as_str() {
        "kill" => process.kill().await?,
        "stop" => process.stop()?,
        "cont" => process.cont()?,
        "heal" => {
            if process.is_running() {
                process.cont()?;
            }
            process.start()?;
        }
        other => bail!("`{other}` is not known"),
    }
    Ok(format!("{name}: {}\n", process.state()))
}

fn status(world: &mut World) -> anyhow::Result<String> {
    let mut text = String::new();
    let alone = world.partitioned();
    for broker in &mut world.brokers {
        let cut = if alone.contains(&broker.region) { ", cut off from the other brokers" } else { "" };
        writeln!(text, "broker     {:<12} {}{cut}", broker.region.name(), broker.process.state())?;
    }
    for connector in &mut world.connectors {
        writeln!(text, "connector  {:<12} {}", connector.name, connector.process.state())?;
    }
    writeln!(text, "receiver   {:<12} {}", "siem", if world.receiver.is_running() { "runs" } else { "down" })?;
    Ok(text)
}

/// The ways in which a person ends a run.
struct Ended {
    signals: [tokio::signal::unix::Signal; 3],
}

impl Ended {
    fn listen() -> anyhow::Result<Self> {
        let kinds = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()];
        let [interrupt, terminate, hangup] = kinds.map(signal);
        Ok(Self { signals: [interrupt?, terminate?, hangup?] })
    }

    /// Whether a signal comes within a moment: a terminal's Ctrl-C ends the other processes too, and what they leave
    /// undone may be noticed first.
    async fn follows(&mut self) -> bool {
        tokio::time::timeout(SIGNAL_WAIT, self.wait()).await.is_ok()
    }

    async fn wait(&mut self) {
        let [interrupt, terminate, hangup] = &mut self.signals;
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
        }
    }
}

/// Prints a line. A terminal that is gone is no reason to leave processes behind.
fn say(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{text}");
    let _ = out.flush();
}
