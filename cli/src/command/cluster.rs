//! `selvedge cluster`: making and joining a cluster on this machine, and seeing and changing it through the API.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use base64::Engine as _;
use reqwest::Method;
use selvedge_broker::config::{Config, Valid};
use selvedge_broker::node::{self, InitOptions, JoinReply, Seed};
use selvedge_connector::enrol::{self, Secret};
use selvedge_domain::rows::BrokerRole;
use selvedge_proto::identity::Anchors;
use selvedge_proto::private_file;
use serde_json::{Value, json};

use super::config::OfBroker;
use crate::api::{Client, Wait};
use crate::args::Global;
use crate::context::Contexts;
use crate::{duration, output};

/// What a learner is for unless it is said.
const LEARNER_ROLES: &str = "issuer,web,edge";
const POLL: Duration = Duration::from_millis(500);

#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Make a new cluster on this machine; `selvedge broker` then starts it
    Init(Init),
    /// Make this machine a broker of a cluster that runs; `selvedge broker` then starts it
    Join(Join),
    /// Make a join token, with which one machine becomes a broker; it is shown once
    Token(Token),
    /// Make a join token for a broker that follows without a vote until it is promoted
    AddLearner(Token),
    /// Let a new broker take the place of one that is gone; run it again if it was cut short
    Replace(Replace),
    /// Members, roles, regions, leader, term, applied index, lag
    Status {
        /// JSON
        #[arg(long)]
        json: bool,
    },
    /// Say what is wrong with the broker on this machine, whether it runs or not; exits 1 with warnings, 2 with errors
    Doctor(super::doctor::Args),
    /// Take no new sessions on a broker, send its clients elsewhere, and wait until its sessions have ended
    ///
    /// What is left of them at the deadline is cut. The drain goes on when this command is ended, and when the broker is
    /// started again, until `--undo`.
    Drain {
        /// Name or node id
        broker: String,
        /// Sessions have so long to end
        #[arg(long, value_parser = duration::parse, default_value = "8h")]
        deadline: Duration,
        /// End draining
        #[arg(long, conflicts_with = "deadline")]
        undo: bool,
        /// Come back at once, not when the sessions have ended
        #[arg(long)]
        detach: bool,
        /// How far to wait
        #[arg(long, value_enum, default_value_t)]
        wait: Wait,
        /// JSON
        #[arg(long)]
        json: bool,
    },
    /// Make a learner a voter, once it has caught up
    Promote {
        /// Name or node id
        broker: String,
    },
    /// Remove a broker for ever; leadership is handed over before
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
    /// Let new rules decide, once every broker runs a build that knows them; there is no way back to an older build
    RaiseVersion {
        /// Version; the newest that a broker knows when not given
        #[arg(id = "rules", value_name = "VERSION")]
        version: Option<u32>,
        /// JSON
        #[arg(long)]
        json: bool,
    },
    /// Save and inspect snapshots of the state
    #[command(subcommand)]
    Snapshot(super::restore::Snapshot),
    /// Make this machine the first broker of the cluster's next epoch, from a snapshot; `selvedge broker` then starts it
    ///
    /// For when all brokers are lost. Everybody in the snapshot is held until somebody vouches for them, since the
    /// snapshot may be older than a revocation; `--revocations` says what is known of those.
    Restore(super::restore::Restore),
    /// Make this machine the first broker of the cluster's next epoch, from data directories that are left of it
    ///
    /// For when a majority of the voters is lost, or all machines but not their disks. The directory that has the most of
    /// the log goes on. All brokers must be stopped; the directories are only read.
    Recover(super::restore::Recover),
    /// Let be what is held since the cluster was restored; people are let be by their directory, which pushes them again
    Release(super::restore::Release),
    /// Set cluster time forward, after the brokers' clocks stepped by more than an hour; it never goes back
    SetTime(super::restore::SetTime),
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
    #[command(flatten)]
    of: OfBroker,
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
    #[command(flatten)]
    of: OfBroker,
    /// Join token: `selvedge cluster token` makes one; `-` reads it from standard input
    #[arg(long, env = "SELVEDGE_JOIN_TOKEN", hide_env_values = true)]
    token: String,
    /// Web listener of a broker that is an issuer
    #[arg(long, value_name = "HOST:PORT")]
    via: String,
    /// JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
pub struct Token {
    /// For people
    #[arg(long, default_value = "join")]
    name: String,
    /// What the broker is for: `voter`, `issuer`, `web` and `edge`, with commas between them; by default all
    #[arg(long, value_name = "ROLES")]
    roles: Option<String>,
    /// How long it is valid
    #[arg(long, value_parser = duration::parse, default_value = "1h")]
    life: Duration,
    /// JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
#[command(group(clap::ArgGroup::new("new").required(true).args(["config", "by"])))]
pub struct Replace {
    /// Name or node id of the broker that is gone
    broker: String,
    /// Configuration (TOML) of the new broker, on its own machine: it joins with the roles of the old one
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Name or node id of a broker that has joined already
    #[arg(long, value_name = "BROKER")]
    by: Option<String>,
    /// Web listener of a broker that is an issuer; the first of the context's endpoints when not given
    #[arg(long, value_name = "HOST:PORT")]
    via: Option<String>,
    /// How long to wait for the new broker to be started
    #[arg(long, value_parser = duration::parse, default_value = "10m")]
    wait: Duration,
}

pub async fn run(command: Command, global: &Global) -> anyhow::Result<ExitCode> {
    match command {
        Command::Init(init) => return make(init, global),
        Command::Join(args) => return join(args, global).await,
        Command::Token(Token { name, roles, life, json }) => {
            return super::keys::join_token(name, roles.unwrap_or_default(), life, json, global).await;
        }
        Command::AddLearner(Token { name, roles, life, json }) => {
            let roles = roles.unwrap_or_else(|| LEARNER_ROLES.to_owned());
            if roles.split(',').any(|role| role.trim() == "voter") {
                bail!("a learner has no vote; `selvedge cluster token` makes a token for a voter");
            }
            return super::keys::join_token(name, roles, life, json, global).await;
        }
        Command::Replace(args) => return replace(args, global).await,
        Command::Doctor(args) => return super::doctor::run(args, global).await,
        Command::Snapshot(command) => return super::restore::snapshot(command, global).await,
        Command::Restore(args) => return super::restore::restore(args, global).await,
        Command::Recover(args) => return super::restore::recover(args, global).await,
        Command::Release(args) => return super::restore::release(args, global).await,
        Command::SetTime(args) => return super::restore::set_time(args, global).await,
        Command::Status { json } => return status(&super::client(global)?, json).await,
        _ => {}
    }
    let client = super::client(global)?;
    match command {
        Command::Init(_)
        | Command::Join(_)
        | Command::Token(_)
        | Command::AddLearner(_)
        | Command::Replace(_)
        | Command::Doctor(_)
        | Command::Snapshot(_)
        | Command::Restore(_)
        | Command::Recover(_)
        | Command::Release(_)
        | Command::SetTime(_)
        | Command::Status { .. } => Ok(ExitCode::SUCCESS),
        Command::Drain { broker, deadline, undo, detach, wait, json } => {
            let node = node_of(&client, &broker).await?;
            let path = format!("/api/v1/cluster/brokers/{node}/drain");
            let deadline_ms = (!undo).then(|| u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX));
            let body = json!({ "draining": !undo, "deadline_ms": deadline_ms });
            let answer = client.change(Method::POST, &path, &body, wait).await?;
            if undo || detach {
                return super::changed(&answer, if undo { "takes sessions again" } else { "drains" }, json);
            }
            drained(&client, &node, json).await
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
        Command::RaiseVersion { version, json } => {
            let view: Value = client.read("/api/v1/cluster", &[]).await?;
            let version = version.map_or_else(|| view["version_next"].clone(), Value::from);
            if version.is_null() {
                output::line(format_args!("version {} is in force, and no broker knows a newer one", view["version"]))?;
                return Ok(ExitCode::SUCCESS);
            }
            let body = json!({ "version": version });
            let answer = client.change(Method::PUT, "/api/v1/cluster/version", &body, Wait::Committed).await?;
            super::changed(&answer, &format!("version {version} is in force"), json)
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

fn make(init: Init, global: &Global) -> anyhow::Result<ExitCode> {
    let config = init.of.load(global)?.config;
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
    output::line(format_args!("next     selvedge broker --config {}", init.of.config.display()))?;
    Ok(ExitCode::SUCCESS)
}

async fn join(args: Join, global: &Global) -> anyhow::Result<ExitCode> {
    let config = args.of.load(global)?.config;
    let token = super::context::secret(&args.token)?;
    let (node, anchors) = join_with(&config, &token, &args.via).await?;
    if args.json {
        output::json(&json!({ "node": node.to_string(), "cluster_id": hex::encode(anchors.cluster_id()) }))?;
    } else {
        output::line(format_args!(
            "joined as node {node}\nnext  selvedge broker --config {}",
            args.of.config.display()
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Shows a join token to an issuer and keeps what it answers; a second try is answered the same.
async fn join_with(config: &Valid<Config>, token: &str, via: &str) -> anyhow::Result<(u64, Anchors)> {
    let secret = Secret::parse(token)?;
    let request = node::join_request(config)?;
    let answer = enrol::exchange(via, &secret, "broker", &config.name, &request.csr, Some(request.node)).await?;
    let issuer_sealed = answer.issuer_sealed.as_deref().map(|sealed| base64::prelude::BASE64_STANDARD.decode(sealed));
    let seeds = answer.peers.iter().map(seed).collect::<anyhow::Result<Vec<_>>>()?;
    if seeds.is_empty() {
        bail!("`{via}` names no broker to join");
    }
    let roles = BrokerRole::parse_list(&answer.roles.join(",")).context("the roles that were given cannot be read")?;
    let reply = JoinReply {
        chain_pem: answer.chain.concat(),
        anchors: answer.anchors,
        issuer_sealed: issuer_sealed.transpose().context("the issuer's sealed keys cannot be read")?,
        seeds,
        roles,
    };
    node::join_complete(config, &request, &reply, secret.text())?;
    Ok((request.node, reply.anchors))
}

/// Join, promote, remove: each step is left out when it is done already.
async fn replace(args: Replace, global: &Global) -> anyhow::Result<ExitCode> {
    let client = super::client(global)?;
    let view: Value = client.read("/api/v1/cluster", &[]).await?;
    let here = args.config.as_deref().map(Config::load).transpose()?.map(|config| node::member(&config)).transpose()?;
    let here = here.flatten().map(|node| node.to_string());
    let named = |row: &&Value| row["name"] == *args.broker || row["node"] == *args.broker;
    // The new one may have the old one's name. One that is removed already is found too, so that a second run ends what
    // the first began.
    let others = brokers(&view).filter(named).filter(|row| row["node"].as_str() != here.as_deref());
    let row = others.max_by_key(|row| (row["removed"] == false, row["joined_ms"].as_u64()));
    let row = row.with_context(|| format!("there is no broker `{}`", args.broker))?;
    let old = row["node"].as_str().unwrap_or_default();
    let new = match (here, &args.config, &args.by) {
        (Some(node), ..) => node,
        (None, Some(path), _) => join_in_place(&client, path, args.via.as_deref(), row, global).await?,
        (None, None, Some(by)) => node_of(&client, by).await?,
        (None, None, None) => bail!("the new broker is named by `--config` or `--by`"),
    };
    if new == old {
        bail!("a broker cannot take its own place");
    }
    let has_started = |view: &Value| brokers(view).any(|row| row["node"] == *new && row["raft"] != "none");
    wait_for(&client, args.wait, has_started).await.with_context(|| format!("node {new} was not started"))?;
    output::line(format_args!("node {new} is a member"))?;
    if row["roles"].as_array().is_some_and(|roles| roles.iter().any(|role| role == "voter")) {
        let path = format!("/api/v1/cluster/brokers/{new}/promote");
        client.change(Method::POST, &path, &Value::Null, Wait::Committed).await?;
        output::line(format_args!("node {new} votes"))?;
    }
    let path = format!("/api/v1/cluster/brokers/{old}");
    client.change(Method::DELETE, &path, &Value::Null, Wait::Committed).await?;
    output::line(format_args!("node {old} is removed"))?;
    Ok(ExitCode::SUCCESS)
}

/// Joins this machine's broker with the roles of the old one.
async fn join_in_place(
    client: &Client,
    path: &Path,
    via: Option<&str>,
    old: &Value,
    global: &Global,
) -> anyhow::Result<String> {
    let config = Config::load(path)?;
    let roles: Vec<_> = old["roles"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let name = format!("replace {}", output::cell(old.get("name")));
    let token = super::keys::new_join_token(client, &name, &roles.join(",")).await?;
    let endpoint = Contexts::resolve(global)?.endpoints.into_iter().next();
    let endpoint = endpoint.map(|url| url.trim_start_matches("https://").trim_end_matches('/').to_owned());
    let via = via.map(str::to_owned).or(endpoint).context("no endpoint is known: give `--via`")?;
    let (node, _) = join_with(&config, &token, &via).await?;
    output::line(format_args!("joined as node {node}\nnow start it: selvedge broker --config {}", path.display()))?;
    Ok(node.to_string())
}

async fn wait_for(client: &Client, within: Duration, is: impl Fn(&Value) -> bool) -> anyhow::Result<()> {
    let deadline = tokio::time::Instant::now() + within;
    loop {
        // One that does not answer now may answer later.
        if client.read::<Value>("/api/v1/cluster", &[]).await.is_ok_and(|view| is(&view)) {
            return Ok(());
        }
        if tokio::time::Instant::now() >= deadline {
            bail!("not within {} s; run the command again", within.as_secs());
        }
        tokio::time::sleep(POLL).await;
    }
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
/// Waits until a broker that drains has no session left, and says how many were cut.
async fn drained(client: &Client, node: &str, as_json: bool) -> anyhow::Result<ExitCode> {
    let (mut heard, mut said) = (Instant::now(), None);
    loop {
        let view: Value = client.read("/api/v1/cluster", &[]).await?;
        let row =
            brokers(&view).find(|row| row["node"] == node).with_context(|| format!("there is no broker `{node}`"))?;
        anyhow::ensure!(row["draining"] == true, "somebody ended the drain");
        if let (Some(true), Some(sessions)) = (row["drains"].as_bool(), row["sessions"].as_u64()) {
            heard = Instant::now();
            if sessions == 0 {
                let cut = row["sessions_cut"].as_u64().unwrap_or(0);
                if as_json {
                    output::json(&json!({ "node": node, "sessions_cut": cut }))?;
                } else {
                    output::line(format_args!("drained sessions_cut={cut}"))?;
                }
                return Ok(ExitCode::SUCCESS);
            }
            if said.replace(sessions) != Some(sessions) {
                let until = row["drain_until_ms"].as_u64().map(output::moment).unwrap_or_default();
                // A terminal that is gone is told nothing; the drain goes on.
                let _ = writeln!(std::io::stderr(), "{sessions} sessions are left; they have until {until}");
            }
        }
        anyhow::ensure!(
            heard.elapsed() < UNHEARD_MAX,
            "the broker is not heard any more; its drain goes on when it is back"
        );
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

/// Between two looks at a broker that drains.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);
/// A broker that drains and was not heard for so long is given up.
const UNHEARD_MAX: Duration = Duration::from_secs(15);

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
        "cluster {}  trust domain {}  term {}  leader {}  version {}\nas {} sees it: position {}, applied {} of {}, policy revision {}, lease {} of {} ms left\n",
        field("cluster_id"),
        field("trust_domain"),
        field("term"),
        field("leader_name"),
        field("version"),
        output::cell(brokers(&view).find(|row| row["this"] == true).and_then(|row| row.get("name"))),
        field("position"),
        field("applied"),
        field("last_log"),
        field("revision"),
        field("lease_left_ms"),
        field("lease_ms"),
    ))?;
    let headers = ["name", "node", "region", "roles", "raft", "lag", "heard ms ago", "state", "build", "edge", "web"];
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
        let build = match row["version"].as_u64() {
            Some(version) => format!("{} knows {version}", text("build")),
            None => String::new(),
        };
        vec![name, node, region, roles, raft, lag, text("last_contact_ms"), state, build, text("edge"), text("web")]
    });
    output::table(&headers, rows)?;
    if let Some(next) = view["version_next"].as_u64() {
        let back = brokers(&view).filter(|row| row["holds_raise_back"] == true);
        let back: Vec<String> = back.map(|row| output::cell(row.get("name"))).collect();
        output::line(match back.is_empty() {
            true => format!("\nversion {next} is known to all: `selvedge cluster raise-version` puts it in force"),
            false => format!("\nversion {next} is held back by {}", back.join(", ")),
        })?;
    }
    Ok(ExitCode::SUCCESS)
}
