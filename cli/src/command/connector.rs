//! `selvedge connector`

use std::path::PathBuf;
use std::process::ExitCode;

use selvedge_connector::connector::{self, Config};
use selvedge_connector::enrol::{self, EnrolKind, Options};
use serde_json::Value;
use tracing::level_filters::LevelFilter;

use crate::args::Global;
use crate::{output, shutdown};

#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Enrol a connector with a provisioning key
    Enrol(Enrol),
    /// Run a connector: dial out, and reach what its configuration allows
    Run(Run),
    /// All connectors, and which brokers they are connected to
    List {
        /// JSON
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, clap::Args)]
pub struct Enrol {
    /// Web listener of a broker
    #[arg(long, value_name = "HOST:PORT")]
    web: String,
    /// Provisioning key; `-` reads it from standard input
    #[arg(long, env = "SELVEDGE_ENROL_SECRET", hide_env_values = true)]
    secret: String,
    /// Name of this connector
    #[arg(long)]
    name: String,
    /// Where its identity is kept (made with mode 0700)
    #[arg(long, value_name = "DIR")]
    state: PathBuf,
    /// JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
pub struct Run {
    /// Configuration (TOML)
    #[arg(long, env = "SELVEDGE_CONNECTOR_CONFIG", value_name = "FILE")]
    config: PathBuf,
}

pub async fn run(args: Run, global: &Global) -> anyhow::Result<ExitCode> {
    let telemetry = super::logs(global, LevelFilter::INFO, "selvedge-connector")?;
    let shutdown = shutdown::on_signal()?;
    let result = connector::run(Config::load(&args.config)?, shutdown).await;
    telemetry.stop().await;
    result?;
    Ok(ExitCode::SUCCESS)
}

pub async fn other(command: Command, global: &Global) -> anyhow::Result<ExitCode> {
    match command {
        Command::Run(args) => run(args, global).await,
        Command::Enrol(args) => {
            let (secret, kind) = (super::context::secret(&args.secret)?.to_string(), EnrolKind::Connector);
            let options = Options { web: args.web, secret, kind, name: args.name, state_dir: args.state.clone() };
            let state = enrol::enrol(options).await?;
            super::client::say_enrolled(&state, &args.state, args.json)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::List { json } => {
            let answer: Value = super::client(global)?.read("/api/v1/connectors", &[]).await?;
            if json {
                output::json(&answer)?;
                return Ok(ExitCode::SUCCESS);
            }
            let row = |connector: &Value| {
                let text = |name: &str| output::cell(connector.get(name));
                let seen = connector["seen"].as_array();
                let up = seen.into_iter().flatten().filter(|seen| seen["up"] == true);
                let brokers: Vec<String> = up.clone().map(|seen| output::cell(seen.get("broker_name"))).collect();
                let mut down: Vec<String> = up
                    .flat_map(|seen| seen["down"].as_array())
                    .flatten()
                    .map(|target| output::cell(Some(target)))
                    .collect();
                down.sort();
                down.dedup();
                let (id, name, group) = (text("id"), text("name"), text("group"));
                vec![id, name, group, text("up"), brokers.join(", "), down.join(", "), text("revoked")]
            };
            let headers = ["id", "name", "group", "up", "connected to", "not answering", "revoked"];
            output::table(&headers, answer["connectors"].as_array().into_iter().flatten().map(row))?;
            Ok(ExitCode::SUCCESS)
        }
    }
}
