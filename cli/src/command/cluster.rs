//! `selvedge cluster`: making and joining a cluster on this machine, and seeing and changing it through the API.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, bail};
use base64::Engine as _;
use reqwest::Method;
use selvedge_broker::config::Config;
use selvedge_broker::node::{self, InitOptions, JoinReply, Seed};
use selvedge_connector::enrol::{self, Secret};
use selvedge_proto::private_file;
use serde_json::{Value, json};

use crate::api::{Client, Wait};
use crate::args::Global;
use crate::{duration, output};

#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Make a new cluster on this machine; `selvedge broker` then starts it
    Init(Init),
    /// Make this machine a broker of a cluster that runs; `selvedge broker` then starts it
    Join(Join),
    /// Members, roles, regions, leader, term, applied index, lag
    Status {
        /// JSON
        #[arg(long)]
        json: bool,
    },
    /// Take no new sessions on a broker
    Drain {
        /// Name or node id
        broker: String,
        /// End draining
        #[arg(long)]
        undo: bool,
        /// How far to wait
        #[arg(long, value_enum, default_value_t)]
        wait: Wait,
        /// JSON
        #[arg(long)]
        json: bool,
    },
    /// Make a learner a voter
    Promote {
        /// Name or node id
        broker: String,
    },
    /// Remove a broker for ever
    Remove {
        /// Name or node id
        broker: String,
        /// How far to wait
        #[arg(long, value_enum, default_value_t)]
        wait: Wait,
        /// JSON
        #[arg(long)]
        json: bool,
    },
    /// Hand leadership over
    Transfer {
        /// Name or node id; the voter that has the most of the log when not given
        #[arg(long)]
        to: Option<String>,
    },
    /// Change the freshness lease and the hold
    Settings {
        /// A broker that hears from no majority for so long stops forwarding
        #[arg(long, value_parser = duration::parse)]
        lease: Duration,
        /// Sessions are held for so long after that
        #[arg(long, value_parser = duration::parse)]
        hold: Duration,
        /// JSON
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, clap::Args)]
pub struct Init {
    /// Configuration of this broker (TOML)
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Trust domain of every identity, e.g. `example.com`; it never changes
    #[arg(long, value_name = "DOMAIN")]
    trust_domain: String,
    /// Write the root's key here (mode 0600) instead of printing it; then keep it away from these machines
    #[arg(long, value_name = "FILE")]
    root_key_out: Option<PathBuf>,
    /// Freshness lease
    #[arg(long, value_parser = duration::parse)]
    lease: Option<Duration>,
    /// How long sessions are held after the lease ended
    #[arg(long, value_parser = duration::parse)]
    hold: Option<Duration>,
    /// JSON; the root's key is in it unless it is written to a file
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
pub struct Join {
    /// Configuration of this broker (TOML)
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Join token: `selvedge key create --kind broker` makes one; `-` reads it from standard input
    #[arg(long, env = "SELVEDGE_JOIN_TOKEN", hide_env_values = true)]
    token: String,
    /// Web listener of a broker that is an issuer
    #[arg(long, value_name = "HOST:PORT")]
    via: String,
    /// JSON
    #[arg(long)]
    json: bool,
}

pub async fn run(command: Command, global: &Global) -> anyhow::Result<ExitCode> {
    match command {
        Command::Init(init) => return make(init),
        Command::Join(args) => return join(args).await,
        Command::Status { json } => return status(&super::client(global)?, json).await,
        _ => {}
    }
    let client = super::client(global)?;
    match command {
        Command::Init(_) | Command::Join(_) | Command::Status { .. } => Ok(ExitCode::SUCCESS),
        Command::Drain { broker, undo, wait, json } => {
            let path = format!("/api/v1/cluster/brokers/{}/drain", node_of(&client, &broker).await?);
            let answer = client.change(Method::POST, &path, &json!({ "draining": !undo }), wait).await?;
            super::changed(&answer, if undo { "takes sessions again" } else { "drains" }, json)
        }
        Command::Promote { broker } => {
            let path = format!("/api/v1/cluster/brokers/{}/promote", node_of(&client, &broker).await?);
            client.change(Method::POST, &path, &Value::Null, Wait::Committed).await?;
            output::line("votes")?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Remove { broker, wait, json } => {
            let path = format!("/api/v1/cluster/brokers/{}", node_of(&client, &broker).await?);
            let answer = client.change(Method::DELETE, &path, &Value::Null, wait).await?;
            super::changed(&answer, "removed", json)
        }
        Command::Transfer { to } => {
            let to = match to {
                Some(broker) => Some(node_of(&client, &broker).await?),
                None => None,
            };
            client.change(Method::POST, "/api/v1/cluster/transfer", &json!({ "to": to }), Wait::Committed).await?;
            output::line("handed over")?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Settings { lease, hold, json } => {
            let body = json!({ "lease_ms": ms(lease), "hold_ms": ms(hold) });
            let answer = client.change(Method::PUT, "/api/v1/cluster/settings", &body, Wait::Committed).await?;
            super::changed(&answer, "set", json)
        }
    }
}

fn ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn make(init: Init) -> anyhow::Result<ExitCode> {
    let config = Config::load(&init.config)?;
    if let Some(path) = init.root_key_out.as_ref().filter(|path| path.exists()) {
        bail!("`{}` is there already", path.display());
    }
    let mut options = InitOptions::new(init.trust_domain);
    options.lease_ms = init.lease.map_or(options.lease_ms, ms);
    options.hold_ms = init.hold.map_or(options.hold_ms, ms);
    let made = node::init(&config, &options)?;
    let shown = match &init.root_key_out {
        Some(path) => {
            if let Err(error) = private_file::create(path, made.root_key.reveal().as_bytes()) {
                // The key exists nowhere else.
                output::line(made.root_key.reveal())?;
                return Err(error)
                    .with_context(|| format!("cannot write `{}`; the root's key was printed", path.display()));
            }
            None
        }
        None => Some(made.root_key.reveal()),
    };
    if init.json {
        let file = init.root_key_out.as_ref().map(|path| path.display().to_string());
        output::json(&json!({
            "cluster_id": made.cluster_id, "pin": made.pin, "root_key": shown, "root_key_file": file,
        }))?;
        return Ok(ExitCode::SUCCESS);
    }
    output::line(format_args!("cluster  {}\npin      {}", made.cluster_id, made.pin))?;
    match (shown, &init.root_key_out) {
        (Some(key), _) => output::line(format_args!(
            "\nThe root's key, shown this once. Keep it away from these machines; it is needed only to make new issuers.\n\n{key}"
        ))?,
        (None, Some(path)) => {
            output::line(format_args!("root key {}: keep it away from these machines", path.display()))?
        }
        (None, None) => {}
    }
    output::line(format_args!("next     selvedge broker --config {}", init.config.display()))?;
    Ok(ExitCode::SUCCESS)
}

async fn join(args: Join) -> anyhow::Result<ExitCode> {
    let config = Config::load(&args.config)?;
    let token = super::context::secret(&args.token)?;
    let secret = Secret::parse(&token)?;
    let request = node::join_request(&config)?;
    let answer = enrol::exchange(&args.via, &secret, "broker", &config.name, &request.csr, Some(request.node)).await?;
    let issuer_sealed = answer.issuer_sealed.as_deref().map(|sealed| base64::prelude::BASE64_STANDARD.decode(sealed));
    let seeds = answer.peers.iter().map(seed).collect::<anyhow::Result<Vec<_>>>()?;
    if seeds.is_empty() {
        bail!("`{}` names no broker to join", args.via);
    }
    let reply = JoinReply {
        chain_pem: answer.chain.concat(),
        anchors: answer.anchors,
        issuer_sealed: issuer_sealed.transpose().context("the issuer's sealed keys cannot be read")?,
        seeds,
    };
    node::join_complete(&config, &request, &reply, secret.text())?;
    if args.json {
        output::json(
            &json!({ "node": request.node.to_string(), "cluster_id": hex::encode(reply.anchors.cluster_id()) }),
        )?;
    } else {
        output::line(format_args!(
            "joined as node {}\nnext  selvedge broker --config {}",
            request.node,
            args.config.display()
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn seed(peer: &Value) -> anyhow::Result<Seed> {
    let node = match &peer["node"] {
        Value::String(text) => text.parse().ok(),
        other => other.as_u64(),
    };
    let address = peer["peer"].as_str().map(str::to_owned);
    match (node, address) {
        (Some(node), Some(peer)) => Ok(Seed { node, peer }),
        _ => bail!("the answer names a broker that cannot be read"),
    }
}

/// The node id of a broker that is written by name or node id.
async fn node_of(client: &Client, broker: &str) -> anyhow::Result<String> {
    if broker.chars().all(|c| c.is_ascii_digit()) {
        return Ok(broker.to_owned());
    }
    let view: Value = client.read("/api/v1/cluster", &[]).await?;
    let named = brokers(&view).find(|row| row["name"] == broker && row["removed"] == false);
    let node = named.and_then(|row| row["node"].as_str());
    node.map(str::to_owned).with_context(|| format!("there is no broker `{broker}`"))
}

fn brokers(view: &Value) -> impl Iterator<Item = &Value> {
    view["brokers"].as_array().into_iter().flatten()
}

async fn status(client: &Client, as_json: bool) -> anyhow::Result<ExitCode> {
    let mut view: Value = client.read("/api/v1/cluster", &[]).await?;
    // Only the leader knows how far behind the others are.
    let leader = brokers(&view).find(|row| row["leader"] == true && row["this"] == false);
    if let Some(leader) = leader.and_then(|row| client.at(row["web"].as_str()?))
        && let Ok(of_leader) = leader.read::<Value>("/api/v1/cluster", &[]).await
        && of_leader["leader"] == of_leader["this"]
    {
        view = of_leader;
    }
    let leader = brokers(&view).find(|row| row["leader"] == true).map(|row| row["name"].clone());
    view["leader_name"] = leader.unwrap_or(Value::Null);
    if as_json {
        output::json(&view)?;
        return Ok(ExitCode::SUCCESS);
    }
    let field = |name: &str| output::cell(view.get(name));
    output::line(format_args!(
        "cluster {}  trust domain {}  term {}  leader {}\nas {} sees it: position {}, applied {} of {}, policy revision {}, lease {} of {} ms left\n",
        field("cluster_id"),
        field("trust_domain"),
        field("term"),
        field("leader_name"),
        output::cell(brokers(&view).find(|row| row["this"] == true).and_then(|row| row.get("name"))),
        field("position"),
        field("applied"),
        field("last_log"),
        field("revision"),
        field("lease_left_ms"),
        field("lease_ms"),
    ))?;
    let headers = ["name", "node", "region", "roles", "raft", "lag", "heard ms ago", "state", "edge", "web"];
    let rows = brokers(&view).map(|row| {
        let text = |name: &str| output::cell(row.get(name));
        let raft = if row["leader"] == true { "leader".to_owned() } else { text("raft") };
        let lag = if row["leader"] == true { "0".to_owned() } else { text("lag_entries") };
        let state = match (row["removed"] == true, row["draining"] == true) {
            (true, _) => "removed",
            (_, true) => "draining",
            _ => "serving",
        };
        let state = state.to_owned();
        let (name, node, region, roles) = (text("name"), text("node"), text("region"), text("roles"));
        vec![name, node, region, roles, raft, lag, text("last_contact_ms"), state, text("edge"), text("web")]
    });
    output::table(&headers, rows)?;
    Ok(ExitCode::SUCCESS)
}
