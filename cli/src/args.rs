//! What can be written on the command line.

use std::path::PathBuf;

use clap::{Parser, Subcommand};
use selvedge_proto::identity::Pin;

use crate::api::Read;
use crate::command::{
    apply, audit, broker, client, cluster, config, connector, context, events, explain, identity, keys, revoke,
};
use crate::demo;
use crate::telemetry::Format;

/// Private applications for people and workloads, without a network around them.
#[derive(Debug, Parser)]
#[command(name = "selvedge", version, propagate_version = true, max_term_width = 110)]
pub struct Args {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

/// What every command takes.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Options of every command")]
pub struct Global {
    /// Context to use instead of the current one
    #[arg(long, global = true, env = "SELVEDGE_CONTEXT", value_name = "NAME")]
    pub context: Option<String>,
    #[arg(skip)]
    pub endpoint: Vec<String>,
    #[arg(skip)]
    pub token: Option<String>,
    #[arg(skip)]
    pub pin: Option<Pin>,
    /// How fresh what is shown must be; each command has its own default, see the page of the API
    #[arg(long, global = true, env = "SELVEDGE_READ", value_enum, value_name = "MODE")]
    pub read: Option<Read>,
    /// How log lines are written to standard error
    #[arg(long, global = true, env = "SELVEDGE_LOG_FORMAT", value_enum, default_value_t)]
    pub log_format: Format,
    /// Which log lines are written, e.g. `info` or `selvedge_broker=debug`
    #[arg(long, global = true, env = "SELVEDGE_LOG", value_name = "FILTER")]
    pub log: Option<String>,
    /// Send traces to this OpenTelemetry collector (OTLP over gRPC, http://HOST:PORT)
    #[arg(long, global = true, env = "SELVEDGE_OTLP_ENDPOINT", value_name = "URL")]
    pub otlp_endpoint: Option<String>,
}

impl Global {
    /// Adds what only the environment says, so that a command may have options of the same names.
    pub fn with_environment(mut self) -> anyhow::Result<Self> {
        let variable = |name| std::env::var(name).ok().filter(|text| !text.is_empty());
        if let Some(endpoints) = variable("SELVEDGE_ENDPOINT") {
            let endpoints = endpoints.split(',').map(|text| crate::api::endpoint(text.trim()));
            self.endpoint = endpoints.collect::<Result<_, _>>().map_err(anyhow::Error::msg)?;
        }
        self.token = variable("SELVEDGE_TOKEN");
        self.pin = variable("SELVEDGE_PIN").map(|text| text.parse()).transpose()?;
        Ok(self)
    }
}

/// Everything that the binary does.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a broker
    Broker(broker::Args),
    /// Make a cluster, join one, see and change its brokers
    #[command(subcommand)]
    Cluster(cluster::Command),
    /// Check and explain a broker's configuration file, or put it into force
    #[command(subcommand)]
    Config(config::Command),
    /// Enrol and run an app connector; list connectors
    #[command(subcommand)]
    Connector(connector::Command),
    /// Enrol and run a client: reach applications
    #[command(subcommand)]
    Client(client::Command),
    /// Enrol a workload; list workloads
    #[command(subcommand)]
    Workload(identity::Workload),
    /// Which cluster these commands speak to
    #[command(subcommand)]
    Context(context::Command),
    /// Apply configuration files as one transaction
    Apply(apply::Apply),
    /// Show configuration objects
    Get(apply::Get),
    /// Show what `apply` would change; exits 1 when there is something
    Diff(apply::Diff),
    /// Say why access is allowed or denied; exits 0 allowed, 1 denied
    Explain(explain::Explain),
    /// List the paths to an application, their costs, and why the losers lost
    Path(explain::Path),
    /// Show the event log
    Events(events::Args),
    /// Show and verify the audit journals
    #[command(subcommand)]
    Audit(audit::Command),
    /// Administrators' tokens
    #[command(subcommand)]
    Token(keys::Token),
    /// Directories, which push people and groups by SCIM
    #[command(subcommand)]
    Directory(keys::Directory),
    /// Enrolment secrets of connectors, workloads, devices and brokers
    #[command(subcommand)]
    Key(keys::Key),
    /// One-time codes with which people enrol a device
    #[command(subcommand)]
    Code(keys::Code),
    /// People
    #[command(subcommand)]
    User(identity::Named),
    /// Groups of people
    #[command(subcommand)]
    Group(identity::Named),
    /// Devices
    #[command(subcommand)]
    Device(identity::Plain),
    /// Live sessions
    #[command(subcommand)]
    Session(identity::Plain),
    /// Revoke a device, workload, connector or broker: its certificates are void, its sessions are cut
    Revoke(revoke::Args),
    /// Print a completion script for a shell
    Completions {
        /// Shell
        shell: clap_complete::Shell,
    },
    /// Run a whole Selvedge on this machine until Ctrl-C, or break and mend the one that runs
    Demo(demo::Args),
    /// Walk through everything that the demo shows, measure it, and say what does not hold
    Tour(demo::TourArgs),
}

/// A file, or a directory; `-` is standard input.
#[derive(Debug, clap::Args)]
pub struct Files {
    /// Files, directories (their *.yaml and *.yml), or `-`
    #[arg(short = 'f', long = "file", required = true, value_name = "FILE|DIR|-")]
    pub files: Vec<PathBuf>,
}
