//! The listeners of this broker, and whether the other brokers are reached from here.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use selvedge_cluster::at_rest::{AtRest, Peers};
use selvedge_domain::rows::{self, BrokerRole};
use selvedge_proto::tls::{self, NotBefore};

use super::Report;
use super::node::Node;
use crate::config::{Config, Valid};

/// Listeners.
const LISTENER: &str = "SE0407";
/// Other brokers.
const PEER: &str = "SE0408";
/// The freshness lease.
const LEASE: &str = "SE0413";
/// The leader.
const LEADER: &str = "SE0414";
/// How long an answer on this machine may take.
const LOCAL_TIMEOUT: Duration = Duration::from_secs(5);
/// Bytes of an answer that are read.
const ANSWER_BYTES_MAX: u64 = 1 << 20;

/// Each listener's port is this broker's while it runs, and free while it does not.
pub(super) async fn listeners(config: &Valid<Config>, node: &Node, report: &mut Report) {
    let binds = [
        ("edge listener", config.edge.bind, Some(BrokerRole::Edge)),
        ("web listener", config.web.bind, Some(BrokerRole::Web)),
        ("peer listener", config.peer.bind, None),
        ("ops listener", config.ops.bind, None),
    ];
    for (check, bind, role) in binds {
        match node.running {
            _ if role.is_some_and(|role| !node.home.roles.contains(&role)) => {
                report.note(LISTENER, check, "off: this broker does not have the role");
            }
            Some(pid) => answered(check, bind, pid, report),
            None => free(check, bind, report),
        }
    }
    if !config.ops.bind.ip().to_canonical().is_loopback() {
        let message = format!("`{}` is not a loopback address: whoever reaches it reads every metric", config.ops.bind);
        report.warn(LISTENER, "ops listener", message, "bind `ops` to 127.0.0.1, or let a firewall guard it");
    }
    if node.running.is_some() {
        let bind = config.ops.bind;
        let asked = tokio::task::spawn_blocking(move || status(bind)).await;
        live(asked.ok().flatten().as_ref(), node, report);
    }
}

fn free(check: &'static str, bind: SocketAddr, report: &mut Report) {
    match TcpListener::bind(bind) {
        Ok(_) => report.fine(LISTENER, check, format!("`{bind}` is free")),
        Err(error) => {
            let next = match error.kind() {
                ErrorKind::AddrInUse => "find out whose it is (`ss -ltnp`), and end that or take another port",
                ErrorKind::PermissionDenied => {
                    "a port below 1024 needs a right (systemd: `AmbientCapabilities=CAP_NET_BIND_SERVICE`)"
                }
                ErrorKind::AddrNotAvailable => "this machine has no such address: correct the `bind`",
                _ => "correct the `bind`",
            };
            report.error(LISTENER, check, format!("`{bind}` cannot be listened on: {error}"), next);
        }
    }
}

fn answered(check: &'static str, bind: SocketAddr, pid: u32, report: &mut Report) {
    let next = "restart the broker; what it bound is not what this file says, or another process has the port";
    let here = SocketAddr::new(reachable(bind.ip()), bind.port());
    if let Err(error) = TcpStream::connect_timeout(&here, LOCAL_TIMEOUT) {
        return report.error(LISTENER, check, format!("nobody answers at `{bind}`: {error}"), next);
    }
    match is_of(bind.port(), pid) {
        Some(true) => report.fine(LISTENER, check, format!("`{bind}` is the running broker's")),
        Some(false) => report.error(LISTENER, check, format!("`{bind}` is another process's"), next),
        None => report.note(LISTENER, check, format!("`{bind}` answers; whose it is may only its user and root see")),
    }
}

/// Where on this machine an address is reached that may stand for all.
fn reachable(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V4(v4) if v4.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(v6) if v6.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        other => other,
    }
}

/// Whether a process listens on a port; none when its open files cannot be seen.
///
/// **Source** proc_net(5), proc_pid_fd(5).
fn is_of(port: u16, pid: u32) -> Option<bool> {
    const LISTENING: &str = "0A";
    let mut inodes = BTreeSet::new();
    for table in ["tcp", "tcp6"] {
        let text = std::fs::read_to_string(format!("/proc/{pid}/net/{table}")).unwrap_or_default();
        for line in text.lines().skip(1) {
            let words: Vec<&str> = line.split_whitespace().collect();
            let [_, local, _, state, ..] = words.as_slice() else { continue };
            let is_port = local.rsplit_once(':').and_then(|(_, hex)| u16::from_str_radix(hex, 16).ok()) == Some(port);
            if *state == LISTENING && is_port {
                inodes.extend(words.get(9).map(|inode| format!("socket:[{inode}]")));
            }
        }
    }
    let open = std::fs::read_dir(format!("/proc/{pid}/fd")).ok()?;
    let links = open.filter_map(|file| std::fs::read_link(file.ok()?.path()).ok());
    Some(links.into_iter().any(|link| inodes.contains(&*link.to_string_lossy())))
}

/// What the running broker says of itself.
fn status(ops: SocketAddr) -> Option<serde_json::Value> {
    let mut stream =
        TcpStream::connect_timeout(&SocketAddr::new(reachable(ops.ip()), ops.port()), LOCAL_TIMEOUT).ok()?;
    stream.set_read_timeout(Some(LOCAL_TIMEOUT)).ok()?;
    write!(stream, "GET /status HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.take(ANSWER_BYTES_MAX).read_to_string(&mut answer).ok()?;
    let (_, body) = answer.split_once("\r\n\r\n")?;
    serde_json::from_str(body).ok()
}

fn live(status: Option<&serde_json::Value>, node: &Node, report: &mut Report) {
    let Some(status) = status else {
        let next = "it may still be starting: look at its log, and ask again";
        return report.error(LISTENER, "ops listener", "the running broker does not say how it is", next);
    };
    if status["node"].as_u64() != Some(node.id) {
        let message = format!("node {} answers there, not {}", status["node"], node.id);
        return report.error(
            LISTENER,
            "ops listener",
            message,
            "correct `ops.bind`: two brokers share this file's port",
        );
    }
    match status["leader"].as_u64() {
        Some(leader) if leader == node.id => report.fine(LEADER, "leader", "this broker leads"),
        Some(leader) => report.fine(LEADER, "leader", format!("node {leader} leads")),
        None => {
            let next = "see that a majority of the voters runs and that they reach each other";
            report.error(LEADER, "leader", "this broker knows of no leader", next);
        }
    }
    match status["lease_left_ms"].as_u64() {
        Some(0) | None => {
            let next = "without it nothing is admitted or forwarded: see what keeps this broker from a majority";
            report.error(LEASE, "freshness lease", "this broker holds none", next);
        }
        Some(left_ms) => report.fine(LEASE, "freshness lease", format!("{left_ms} ms left")),
    }
}

/// Asks every other broker; answers how far their clocks are from this one's.
pub(super) async fn peers(
    config: &Valid<Config>,
    node: &Node,
    stored: Option<&AtRest>,
    report: &mut Report,
) -> Vec<i64> {
    let Some(identity) = &node.identity else { return Vec::new() };
    let anchors = Arc::new(node.home.anchors.clone());
    let client = tls::peer_client(identity, &anchors, None, NotBefore::judged(), &tls::system_time());
    let client = match client {
        Ok(client) => Arc::new(client),
        Err(error) => {
            report.error("SE0401", "other brokers", super::chain(&error), "join this broker again");
            return Vec::new();
        }
    };
    let others = others(node, stored);
    let addresses: BTreeMap<u64, String> = others.iter().map(|(id, (_, address))| (*id, address.clone())).collect();
    let via = config.peer_via.clone();
    let dialled = addresses.clone();
    let dial = move |id: u64| via.get(dialled.get(&id)?).cloned();
    let cluster_id = node.home.anchors.cluster_id();
    let peers = Peers::new(&cluster_id, node.id, stored, client, Some(Arc::new(dial)), &addresses).await;
    let asked = futures::future::join_all(others.keys().map(|id| peers.ask(*id))).await;

    let mut offsets_ms = Vec::new();
    let mut reached = BTreeSet::from([node.id]);
    for ((id, (name, address)), asked) in others.iter().zip(asked) {
        match asked {
            Ok(answer) => {
                let message = format!("`{name}` at `{address}` answers with TLS in {} ms", answer.round_trip_ms);
                report.fine(PEER, "other brokers", message);
                offsets_ms.push(answer.offset_ms);
                reached.insert(*id);
            }
            Err(why) => {
                let message = format!("`{name}` at `{address}`: {why}");
                match refusal(&why) {
                    Some(next) => report.error(PEER, "other brokers", message, next),
                    None => {
                        let next =
                            "see whether it runs (`selvedge cluster doctor` there), and whether a firewall is between";
                        report.warn(PEER, "other brokers", message, next);
                    }
                }
            }
        }
    }
    if let Some(stored) = stored.filter(|stored| !stored.voters.is_empty()) {
        let here = stored.voters.iter().filter(|voter| reached.contains(voter)).count();
        if here <= stored.voters.len() / 2 {
            let message =
                format!("only {here} of {} voters are reached, this one counted: no majority", stored.voters.len());
            report.error(LEADER, "majority", message, "start the others, or mend the network between them");
        }
    }
    offsets_ms
}

/// Name and address of every other broker.
fn others(node: &Node, stored: Option<&AtRest>) -> BTreeMap<u64, (String, String)> {
    let seeds = node.home.seeds.iter().map(|seed| (seed.node, (seed.node.to_string(), seed.peer.clone())));
    let mut others: BTreeMap<u64, (String, String)> = seeds.collect();
    for broker in stored.into_iter().flat_map(|stored| stored.state.rows::<rows::Broker>()) {
        if broker.removed {
            others.remove(&broker.node);
        } else if !broker.peer.is_empty() {
            others.insert(broker.node, (broker.name, broker.peer));
        }
    }
    others.remove(&node.id);
    others
}

/// What to do when the other broker answered, and refused.
fn refusal(why: &str) -> Option<&'static str> {
    let known = [
        ("another cluster", "its address belongs to another cluster's broker: correct who advertises it"),
        ("another epoch", "this directory is from before a restore: move it away and join this broker again"),
        ("was removed", "this broker was removed: move its directory away and join it again"),
        ("not of the node", "the directory of another broker was copied here: move it away and join this broker again"),
        ("not broker", "another broker answers there: correct the address that one of the two advertises"),
        ("invalid peer certificate", "one of the two certificates has ended or is foreign: run doctor on both"),
    ];
    known.iter().find(|(said, _)| why.contains(said)).map(|(_, next)| *next)
}
