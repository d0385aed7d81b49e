//! The replicated log beside etcd: one load generator drives three brokers and three etcd servers, in turn, on this
//! machine; then the brokers alone are killed, filled, restarted and saved.
//!
//! Both speak gRPC with mutual TLS to the load generator and among themselves, and both answer a write when a quorum of
//! three processes has synced it. A command is the replacement of one user's attributes (256 bytes), decided and applied
//! by every broker; a put writes 256 bytes under one key. Keys and users are equally many and drawn alike.

#[path = "../../machine.rs"]
mod machine;
#[path = "../../../../cli/tests/it/world.rs"]
#[allow(dead_code, reason = "the tests use the rest")]
mod world;

mod brokers;
mod commits;
mod dial;
mod etcd;
mod failover;
mod grpc;
mod load;
mod scale;
mod scim;
mod supervise;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::ensure;
use clap::{Parser, ValueEnum};

/// Measures the brokers' replicated log beside etcd; the last line is `RESULT cluster ...`.
#[derive(Clone, Debug, Parser)]
struct Args {
    /// Users of the scale part; groups, segments and connectors are in proportion
    #[arg(long, default_value_t = 1_000_000)]
    scale: usize,
    /// Only these parts; the RESULT line has only their keys
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Part>,
    /// Pairs of runs; medians are compared
    #[arg(long, env = "BENCH_PAIRS", default_value_t = 5)]
    pairs: usize,
    /// Seconds that count, of the runs with 256 clients
    #[arg(long, env = "BENCH_SECONDS", default_value_t = 30)]
    seconds: u64,
    /// Seconds before them
    #[arg(long, env = "BENCH_WARM_UP", default_value_t = 5)]
    warm_up: u64,
    /// Kills of the leader, for each preset
    #[arg(long, env = "BENCH_KILLS", default_value_t = 20)]
    kills: usize,
    /// Seed of the generated people and groups
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Runs the measurements themselves: what is started without it ends and cleans up after it
    #[arg(long, hide = true)]
    inner: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    Commits,
    Failover,
    Scale,
}

/// What the parts found, in the order of the RESULT line; and what did not hold.
#[derive(Default)]
pub struct Findings {
    keys: Vec<(&'static str, String)>,
    shortfalls: Vec<String>,
}

impl Findings {
    fn key(&mut self, name: &'static str, value: f64, digits: usize) {
        self.keys.push((name, format!("{value:.digits$}")));
    }

    /// A bound that the run is there to show.
    fn must(&mut self, holds: bool, what: impl FnOnce() -> String) {
        if !holds {
            self.shortfalls.push(what());
        }
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    if !args.inner {
        return supervise::run();
    }
    selvedge_proto::tls::install_provider();
    match measure(&args) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("bench-cluster: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn measure(args: &Args) -> anyhow::Result<ExitCode> {
    let bin: PathBuf = std::env::current_exe()?.with_file_name("selvedge");
    ensure!(bin.exists(), "`{}` is not there: run `make bench-cluster`", bin.display());
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    println!("machine: {}", machine::description());
    let wanted = |part| args.only.is_empty() || args.only.contains(&part);
    let mut findings = Findings::default();
    if wanted(Part::Commits) {
        let window = |clients, warm_up, seconds| load::Load {
            clients,
            warm_up: Duration::from_secs(warm_up),
            measured: Duration::from_secs(seconds),
        };
        let (warm_up, seconds) = (args.warm_up, args.seconds);
        let plan = commits::Plan {
            pairs: args.pairs,
            wide: window(256, warm_up, seconds),
            narrow: window(64, warm_up.div_ceil(2), seconds.div_ceil(3)),
            reads: window(256, warm_up.div_ceil(2), seconds.div_ceil(3)),
        };
        commits::run(&bin, &runtime, &plan, &mut findings)?;
    }
    if wanted(Part::Failover) {
        for (key, preset) in [("failover_max_ms", "lan"), ("failover_wan_max_ms", "wan")] {
            failover::run(&bin, &runtime, preset, args.kills, key, &mut findings)?;
        }
    }
    if wanted(Part::Scale) {
        scale::run(&bin, &runtime, args.scale, args.seed, &mut findings)?;
    }
    for shortfall in &findings.shortfalls {
        println!("SHORTFALL {shortfall}");
    }
    let keys: Vec<_> = findings.keys.iter().map(|(name, value)| format!("{name}={value}")).collect();
    println!("RESULT cluster {}", keys.join(" "));
    Ok(if findings.shortfalls.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
