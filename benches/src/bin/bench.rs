//! The broker's data plane beside HAProxy: CPU for each GiB of one flow, and the time to the first answered byte.
//!
//! Both carry the same bytes from the same source to the same sink on this machine, in turn, five times each. HAProxy
//! runs in `mode tcp` without splice, as its packages configure it, with as many threads as there are cores.

#[path = "../machine.rs"]
#[allow(dead_code, reason = "the other benchmark uses the rest")]
mod machine;
#[path = "../source.rs"]
mod source;
#[path = "../../../cli/tests/it/world.rs"]
#[allow(dead_code, reason = "the tests use the rest")]
mod world;

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use machine::{cpu_seconds, median};
use source::{Echo, Source};
use world::{World, free_ports, text, wait};

/// Payload of one flow.
const FLOW_BYTES: u64 = 8 << 30;
/// Pairs of runs; medians are compared.
const PAIRS: usize = 5;
/// Samples of the first answered byte.
const FIRST_BYTES: usize = 200;
/// Opens before the samples, so that control streams, tickets and parked hops are warm.
const WARM_UP: usize = 20;

fn main() -> anyhow::Result<()> {
    let bin = std::env::current_exe()?.with_file_name("selvedge");
    ensure!(bin.exists(), "`{}` is not there: run `make bench`", bin.display());
    let source = Source::start()?;
    let echo = Echo::start()?;
    let mut world = World::start(&bin, 1);
    let token = world.directory("bench");
    world.user(&token, "bench@test.example");
    world.apply_segments(&[
        ("bulk", "bulk.internal", source.address.port()),
        ("echo", "echo.internal", echo.address.port()),
    ]);
    let policy =
        "kind: Policy\nname: everybody\ncedar: |\n  permit(principal, action == Action::\"connect\", resource);\n";
    ensure!(world.apply(policy).status.success(), "the policy was not accepted");
    world.connector("connector", &["bulk.internal", "echo.internal"]);
    let state = world.client("client", "bench@test.example");
    let [bulk, first] = free_ports();
    listen(&mut world, "bulk", &state, &format!("bulk.internal:{}", source.address.port()), bulk);
    listen(&mut world, "echo", &state, &format!("echo.internal:{}", echo.address.port()), first);
    let rival = Haproxy::start(source.address)?;
    wait("a first flow", || flow(bulk, 1 << 20).is_ok() && flow(rival.address, 1 << 20).is_ok());

    print_machine(&rival.version);
    let broker = world.broker_pid(0);
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for pair in 1..=PAIRS {
        let (own, own_s) = measured(broker, bulk)?;
        let (other, other_s) = measured(rival.process.id(), rival.address)?;
        println!(
            "pair {pair}: broker {own:.4} CPU s/GiB ({own_s:.1} s), haproxy {other:.4} CPU s/GiB ({other_s:.1} s)"
        );
        ours.push(own);
        theirs.push(other);
    }
    let ratio = median(&ours) / median(&theirs);
    println!("medians of {PAIRS}: broker {:.4}, haproxy {:.4} CPU s/GiB", median(&ours), median(&theirs));

    for _ in 0..WARM_UP {
        first_byte(first)?;
    }
    let mut samples = Vec::with_capacity(FIRST_BYTES);
    for _ in 0..FIRST_BYTES {
        samples.push(first_byte(first)?.as_secs_f64() * 1_000.0);
    }
    samples.sort_by(f64::total_cmp);
    let first_byte_ms = median(&samples);
    println!(
        "first answered byte: median {first_byte_ms:.2} ms, p99 {:.2} ms of {FIRST_BYTES}",
        samples[FIRST_BYTES * 99 / 100]
    );
    println!("RESULT bench cpu_ratio_haproxy={ratio:.3} first_byte_ms={first_byte_ms:.2}");
    Ok(())
}

fn listen(world: &mut World, name: &str, state: &Path, target: &str, address: SocketAddr) {
    world.spawn(
        &format!("{name}-listener"),
        &["client", "connect", target, "--listen", &address.to_string(), "--state", text(state)],
    );
    wait("the client's listener", || TcpStream::connect(address).is_ok());
}

/// CPU seconds for each GiB of one flow, and how long it took.
fn measured(pid: u32, address: SocketAddr) -> anyhow::Result<(f64, f64)> {
    let (cpu, begun) = (cpu_seconds(pid)?, Instant::now());
    flow(address, FLOW_BYTES)?;
    let spent = cpu_seconds(pid)? - cpu;
    Ok((spent / (FLOW_BYTES as f64 / f64::from(1 << 30)), begun.elapsed().as_secs_f64()))
}

/// Fetches so many bytes.
fn flow(address: SocketAddr, bytes: u64) -> anyhow::Result<()> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    stream.write_all(&bytes.to_be_bytes())?;
    let mut buffer = vec![0; 256 << 10];
    let mut left = bytes;
    while left > 0 {
        let read = stream.read(&mut buffer)?;
        ensure!(read > 0, "the flow ended {left} bytes early");
        left -= read as u64;
    }
    Ok(())
}

fn first_byte(address: SocketAddr) -> anyhow::Result<Duration> {
    let begun = Instant::now();
    let mut stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    stream.write_all(b"x")?;
    stream.read_exact(&mut [0])?;
    Ok(begun.elapsed())
}

fn print_machine(haproxy: &str) {
    println!("machine: {}; selvedge {}; {haproxy}", machine::description(), env!("CARGO_PKG_VERSION"));
}

/// HAProxy in `mode tcp`, unpacked and run on a free port.
struct Haproxy {
    process: Child,
    address: SocketAddr,
    version: String,
    _dir: tempfile::TempDir,
}

impl Haproxy {
    fn start(to: SocketAddr) -> anyhow::Result<Self> {
        let tool =
            Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/tool")).arg("haproxy").output()?;
        ensure!(tool.status.success(), "haproxy cannot be had: {}", String::from_utf8_lossy(&tool.stderr));
        let bin = PathBuf::from(String::from_utf8(tool.stdout)?.trim().lines().last().context("no path")?);
        let version = Command::new(&bin).arg("-v").output()?.stdout;
        let version = String::from_utf8_lossy(&version).lines().next().unwrap_or_default().to_owned();
        let [address] = free_ports();
        let threads = std::thread::available_parallelism()?;
        let dir = tempfile::tempdir()?;
        let config = dir.path().join("haproxy.cfg");
        std::fs::write(
            &config,
            format!(
                "global\n  nbthread {threads}\n  maxconn 1000\ndefaults\n  mode tcp\n  timeout connect 5s\n  timeout client 60s\n  timeout server 60s\n\
                 frontend in\n  bind {address}\n  default_backend out\nbackend out\n  server s {to}\n"
            ),
        )?;
        let process =
            Command::new(&bin).args(["-db", "-f"]).arg(&config).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        Ok(Self { process, address, version, _dir: dir })
    }
}

impl Drop for Haproxy {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
