//! The demo's world: brokers in three regions, connectors beside applications, people, a workload, a log receiver, and
//! the links between them.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use selvedge_proto::identity::Pin;
use tokio::time::Instant;

use super::apps::{self, Apps};
use super::cli::Cli;
use super::geography::Region;
use super::home::Home;
use super::link::Link;
use super::ports::Ports;
use super::process::Process;
use super::provision::client_arguments;
use super::receiver::Receiver;
use super::web::Caller;

/// Longest wait for a broker to listen, and for the cluster to have all three.
const START_LIMIT: Duration = Duration::from_secs(60);
/// Between two looks at what is waited for.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// The usual ports; a broker adds its place, counted from 1.
const EDGE_PORT: u16 = 7_100;
const WEB_PORT: u16 = 7_200;
const PEER_PORT: u16 = 7_300;
const OPS_PORT: u16 = 7_400;
/// Where the links begin.
const LINK_PORT: u16 = 7_501;
/// The log receiver.
const RECEIVER_PORT: u16 = 7_601;
/// The trust domain of the demo's organisation.
pub const TRUST_DOMAIN: &str = "demo.test";

/// The accounts.
pub const ALLOWED: &str = "allowed@demo.test";
/// Is in no group.
pub const DENIED: &str = "denied@demo.test";
/// Is disabled while connected.
pub const LEAVER: &str = "leaver@demo.test";
/// The workload.
pub const BILLING: &str = "billing";

/// A connector: its name, where it is, which applications are beside it, and how much farther than others of its region
/// it is from the broker there, so that one is the best.
pub const CONNECTORS: [(&str, Region, &[&str], u64); 4] = [
    ("frankfurt-1", Region::Frankfurt, &[apps::CRM.0, apps::CHAT.0], 0),
    ("frankfurt-2", Region::Frankfurt, &[apps::CRM.0, apps::CHAT.0], 4),
    ("virginia-1", Region::Virginia, &[apps::CRM.0, apps::CHAT.0], 0),
    ("singapore-1", Region::Singapore, &[apps::LEDGER.0], 0),
];

/// A broker.
pub struct Broker {
    pub region: Region,
    pub edge: SocketAddr,
    pub web: SocketAddr,
    pub ops: SocketAddr,
    pub dir: PathBuf,
    pub config: PathBuf,
    pub process: Process,
}

/// A connector.
pub struct Connector {
    pub name: String,
    pub region: Region,
    pub process: Process,
    pub links: [Link; 3],
}

/// A device of a person, or a workload's place: enrolled, with links of its own to every broker.
pub struct Seat {
    pub name: String,
    pub state: PathBuf,
    pub links: [Link; 3],
    /// A broker's advertised address to the link that leads there.
    pub via: BTreeMap<String, String>,
}

/// Everything.
pub struct World {
    pub cli: Cli,
    pub brokers: [Broker; 3],
    pub connectors: Vec<Connector>,
    pub seats: BTreeMap<String, Seat>,
    pub apps: Apps,
    pub receiver: Receiver,
    pub directory: Caller,
    pub administrator: Caller,
    /// Of the cluster's issuer.
    pub pin: Pin,
    /// `userName` to SCIM id.
    pub users: BTreeMap<&'static str, String>,
    pub ports: Ports,
    /// (from, to, link) between brokers.
    peer_links: Vec<(Region, Region, Link)>,
    dir: PathBuf,
}

impl World {
    /// Makes it, saying what is being done. Each seat is (name, whose, region).
    pub async fn build(home: &Home, seats: &[(&str, &str, Region)], say: &dyn Fn(&str)) -> anyhow::Result<Self> {
        let dir = home.dir().to_owned();
        let mut ports = Ports::default();
        for sub in ["logs", "brokers", "connectors", "clients", "policy"] {
            std::fs::create_dir_all(dir.join(sub))?;
        }
        let apps = Apps::start().await.context("cannot start the applications")?;
        let receiver = Receiver::start(ports.listen(RECEIVER_PORT).await?, &dir.join("received.log")).await?;
        let cli = Cli::new(dir.join("context"));

        let mut addresses = Vec::new();
        for (place, region) in (1..).zip(Region::ALL) {
            let mut reserve = [SocketAddr::from(([0; 4], 0)); 4];
            for (address, base) in reserve.iter_mut().zip([EDGE_PORT, WEB_PORT, PEER_PORT, OPS_PORT]) {
                *address = ports.reserve(base + place).await?;
            }
            addresses.push((region, reserve));
        }
        let mut next_link = LINK_PORT;
        let mut peer_links = Vec::new();
        for (from, _) in &addresses {
            for (to, [_, _, peer, _]) in addresses.iter().filter(|(to, _)| to != from) {
                let link = Link::start(ports.listen(next_link).await?, *peer, from.delay_to(*to))?;
                next_link += 1;
                peer_links.push((*from, *to, link));
            }
        }
        let brokers = addresses
            .iter()
            .map(|(region, [edge, web, peer, ops])| {
                let via = peer_links.iter().filter(|(from, _, _)| from == region).map(|(_, to, link)| {
                    let (_, [_, _, peer, _]) = addresses[to.index()];
                    (peer, link.address())
                });
                broker(&dir, *region, [*edge, *web, *peer, *ops], via)
            })
            .collect::<anyhow::Result<Vec<_>>>()?;
        let brokers: [Broker; 3] = brokers.try_into().map_err(|_| anyhow::anyhow!("there are three regions"))?;

        // Nobody has these until the cluster is made.
        let pin = Pin::from([0; 32]);
        let nobody = Caller::new(pin, String::new())?;
        let mut world = Self {
            cli,
            brokers,
            connectors: Vec::new(),
            seats: BTreeMap::new(),
            apps,
            receiver,
            directory: nobody.clone(),
            administrator: nobody,
            pin,
            users: BTreeMap::new(),
            ports,
            peer_links,
            dir,
        };
        world.provision(seats, &mut next_link, say).await?;
        Ok(world)
    }

    /// A broker by its region.
    pub fn broker(&mut self, region: Region) -> &mut Broker {
        &mut self.brokers[region.index()]
    }

    /// A seat by its name.
    pub fn seat(&self, name: &str) -> anyhow::Result<&Seat> {
        self.seats.get(name).with_context(|| format!("there is no client `{name}`"))
    }

    /// Cuts or mends a broker's links to the other brokers. Clients and connectors keep theirs.
    pub fn set_partition(&self, region: Region, cut: bool) {
        for (from, to, link) in &self.peer_links {
            if *from == region || *to == region {
                link.set_cut(cut);
            }
        }
    }

    /// Every broker's region that cannot reach the others.
    pub fn partitioned(&self) -> Vec<Region> {
        let alone = |region: &Region| {
            self.peer_links
                .iter()
                .filter(|(from, to, _)| from == region || to == region)
                .all(|(_, _, link)| link.is_cut())
        };
        Region::ALL.into_iter().filter(alone).collect()
    }

    /// A broker or connector by name.
    pub fn process(&mut self, name: &str) -> Option<&mut Process> {
        let brokers = self.brokers.iter_mut().map(|broker| &mut broker.process);
        let connectors = self.connectors.iter_mut().map(|connector| &mut connector.process);
        brokers.chain(connectors).find(|process| process.name() == name)
    }

    /// Names of brokers and connectors, and the receiver's.
    pub fn names(&self) -> Vec<String> {
        let brokers = self.brokers.iter().map(|broker| broker.region.name().to_owned());
        brokers
            .chain(self.connectors.iter().map(|connector| connector.name.clone()))
            .chain(["receiver".to_owned()])
            .collect()
    }

    /// The directory of this run.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A process that carries one target to a port of this machine for a seat.
    pub fn connect(&self, seat: &str, target: (&str, u16), listen: SocketAddr) -> anyhow::Result<Process> {
        let seat = self.seat(seat)?;
        let mut arguments = client_arguments(seat, "connect");
        arguments.push(format!("{}:{}", target.0, target.1).into());
        arguments.extend(["--listen".into(), listen.to_string().into()]);
        let log = self.dir.join("logs").join(format!("client-{}-{}.log", seat.name, target.0));
        Ok(Process::new(format!("client {}", seat.name), arguments, log).with_env("SELVEDGE_HOME", self.cli.home()))
    }

    /// Starts a broker and waits until it is ready.
    pub async fn start_broker(&mut self, region: Region) -> anyhow::Result<()> {
        let broker = self.broker(region);
        broker.process.start()?;
        let deadline = Instant::now() + START_LIMIT;
        while !ready(broker.ops).await {
            if !broker.process.is_running() {
                bail!("the broker `{}` ended: {}", region.name(), broker.process.last_words());
            }
            if Instant::now() > deadline {
                bail!("the broker `{}` does not become ready: {}", region.name(), broker.process.last_words());
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
        Ok(())
    }

    /// Kills every process. What is left is the directory.
    pub async fn end(&mut self) {
        for connector in &mut self.connectors {
            let _ = connector.process.kill().await;
        }
        for broker in &mut self.brokers {
            let _ = broker.process.kill().await;
        }
        self.receiver.stop().await;
    }
}

/// `GET /readyz` says 200.
async fn ready(ops: SocketAddr) -> bool {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let work = async {
        let mut socket = tokio::net::TcpStream::connect(ops).await?;
        socket
            .write_all(format!("GET /readyz HTTP/1.1\r\nhost: {ops}\r\nconnection: close\r\n\r\n").as_bytes())
            .await?;
        let mut answer = String::new();
        socket.read_to_string(&mut answer).await?;
        std::io::Result::Ok(answer.starts_with("HTTP/1.1 200"))
    };
    matches!(tokio::time::timeout(Duration::from_secs(2), work).await, Ok(Ok(true)))
}

fn broker(
    dir: &Path,
    region: Region,
    [edge, web, peer, ops]: [SocketAddr; 4],
    via: impl Iterator<Item = (SocketAddr, SocketAddr)>,
) -> anyhow::Result<Broker> {
    let name = region.name();
    let data = dir.join("brokers").join(name);
    let mut text = format!(
        "data_dir = {:?}\nname = \"{name}\"\nregion = \"{name}\"\nhost = \"{name}.brokers.demo.test\"\npreset = \"wan\"\n\
         edge = {{ bind = \"{edge}\" }}\nweb = {{ bind = \"{web}\" }}\npeer = {{ bind = \"{peer}\" }}\nops = {{ bind = \"{ops}\" }}\n\n[peer_via]\n",
        data.display().to_string()
    );
    for (peer, link) in via {
        writeln!(text, "\"{peer}\" = \"{link}\"")?;
    }
    let config = dir.join("brokers").join(format!("{name}.toml"));
    std::fs::write(&config, text)?;
    let arguments = ["broker".into(), "--config".into(), config.clone().into_os_string()].to_vec();
    let process = Process::new(name, arguments, dir.join("logs").join(format!("{name}.log")));
    Ok(Broker { region, edge, web, ops, dir: data, config, process })
}
