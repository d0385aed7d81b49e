//! What a person sees when the demo is up.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::Path;

use super::apps;
use super::geography::Region;
use super::process::Process;
use super::world::World;

/// The usual ports of the clients' listeners.
const CRM_PORT: u16 = 8_480;
const CHAT_PORT: u16 = 8_470;

/// A port of this machine behind which an application is.
pub struct Listener {
    pub seat: &'static str,
    pub target: (&'static str, u16),
    pub address: SocketAddr,
    pub process: Process,
}

/// Starts a listener for `allowed` and one for `leaver`.
pub async fn listeners(world: &mut World) -> anyhow::Result<Vec<Listener>> {
    let mut listeners = Vec::new();
    for (seat, target, port) in [("allowed", apps::CRM, CRM_PORT), ("leaver", apps::CHAT, CHAT_PORT)] {
        let address = world.ports.reserve(port).await?;
        let mut process = world.connect(seat, target, address)?;
        process.start()?;
        listeners.push(Listener { seat, target, address, process });
    }
    Ok(listeners)
}

/// The whole banner.
pub fn banner(world: &World, listeners: &[Listener], leader: &str, keep: bool) -> String {
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = write(&mut text, world, listeners, leader, keep);
    text
}

fn write(text: &mut String, world: &World, listeners: &[Listener], leader: &str, keep: bool) -> std::fmt::Result {
    let binary = std::env::current_exe().unwrap_or_else(|_| "selvedge".into());
    let binary = shown(&binary);
    writeln!(text, "\nSelvedge runs: three brokers in three regions, one cluster.\n")?;
    for broker in &world.brokers {
        writeln!(
            text,
            "  broker     {:<12} edge {}  web https://{}  ops http://{}",
            broker.region.name(),
            broker.edge,
            broker.web,
            broker.ops
        )?;
    }
    for connector in &world.connectors {
        writeln!(text, "  connector  {:<12} in {}, listens on nothing", connector.name, connector.region.name())?;
    }
    writeln!(text, "  receiver   siem         {} writes {}", world.receiver.address(), shown(world.receiver.file()))?;
    let pairs = [
        (Region::Frankfurt, Region::Virginia),
        (Region::Frankfurt, Region::Singapore),
        (Region::Virginia, Region::Singapore),
    ];
    let distances = pairs.map(|(a, b)| format!("{}-{} {} ms", a.name(), b.name(), 2 * a.delay_to(b).as_millis()));
    writeln!(text, "  distances  {} (there and back)\n", distances.join(", "))?;
    writeln!(text, "  applications (reachable only through a session):")?;
    for (host, what) in [
        (apps::CRM, "an HTTP server in frankfurt and virginia"),
        (apps::CHAT, "a server of lines in frankfurt and virginia"),
        (apps::LEDGER, "in singapore, for the workload `billing` alone"),
    ] {
        writeln!(text, "    {:<22} {what}", format!("{}:{}", host.0, host.1))?;
    }
    writeln!(text, "\n  accounts:")?;
    writeln!(text, "    allowed@demo.test   in `sales`, reaches crm and chat")?;
    writeln!(text, "    denied@demo.test    in no group, finds nothing there")?;
    writeln!(text, "    leaver@demo.test    in `sales` until you disable it")?;
    for listener in listeners {
        writeln!(
            text,
            "\n  {}'s client carries {}:{} to {} on this machine",
            listener.seat, listener.target.0, listener.target.1, listener.address
        )?;
    }
    for (usual, instead) in world.ports.replaced() {
        writeln!(text, "  port {usual} was taken: {instead} is used instead")?;
    }
    if world.apps.moved {
        writeln!(text, "  127.77.0.0/24 was taken: the applications have other addresses of 127.77.0.0/16")?;
    }
    let fate = if keep { "stays there" } else { "goes away with Ctrl-C" };
    writeln!(text, "\n  All data is in {} and {fate}.", shown(world.dir()))?;
    writeln!(text, "\nIn another terminal:\n")?;
    if let Some(crm) = listeners.first() {
        writeln!(text, "  curl http://{}/", crm.address)?;
    }
    let home = shown(world.cli.home());
    writeln!(
        text,
        "  SELVEDGE_HOME={home} {binary} explain --user denied@demo.test --host {} --port {}",
        apps::CRM.0,
        apps::CRM.1
    )?;
    writeln!(text, "  {binary} demo kill {leader} && sleep 4 && SELVEDGE_HOME={home} {binary} cluster status")?;
    writeln!(text, "\nCtrl-C ends it.")
}

/// A path as a shell takes it.
fn shown(path: &Path) -> String {
    let text = path.display().to_string();
    let plain = text.chars().all(|c| c.is_ascii_alphanumeric() || "/._-+@".contains(c));
    if plain { text } else { format!("'{}'", text.replace('\'', r"'\''")) }
}
