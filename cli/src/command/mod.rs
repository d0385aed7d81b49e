//! One file for each group of commands.

pub mod apply;
pub mod audit;
pub mod broker;
pub mod client;
pub mod cluster;
pub mod config;
pub mod connector;
pub mod context;
pub mod doctor;
pub mod events;
pub mod explain;
pub mod identity;
pub mod keys;
pub mod restore;
pub mod revoke;

use std::process::ExitCode;

use clap::CommandFactory as _;
use serde_json::Value;
use tracing::level_filters::LevelFilter;

use crate::api::Client;
use crate::args::{Args, Command, Global};
use crate::context::Contexts;
use crate::telemetry::{self, Telemetry};
use crate::{demo, output};

/// Runs what the command line says.
pub async fn run(args: Args) -> anyhow::Result<ExitCode> {
    let global = args.global.with_environment()?;
    match args.command {
        Command::Broker(args) => return broker::run(args, &global).await,
        Command::Connector(connector::Command::Run(args)) => return connector::run(args, &global).await,
        Command::Client(command) => return client::run(command, &global).await,
        Command::Demo(args) => return demo::run(args).await,
        Command::Tour(args) => return demo::tour(args).await,
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Args::command(), "selvedge", &mut script);
            output::print(&String::from_utf8(script)?)?;
            return Ok(ExitCode::SUCCESS);
        }
        _ => {}
    }
    let telemetry = logs(&global, LevelFilter::WARN, "selvedge")?;
    let code = match args.command {
        Command::Cluster(command) => cluster::run(command, &global).await,
        Command::Config(command) => config::run(command, &global).await,
        Command::Connector(command) => connector::other(command, &global).await,
        Command::Workload(command) => identity::workload(command, &global).await,
        Command::Context(command) => context::run(command),
        Command::Apply(args) => apply::apply(args, &global).await,
        Command::Get(args) => apply::get(args, &global).await,
        Command::Diff(args) => apply::diff(args, &global).await,
        Command::Explain(args) => explain::explain(args, &global).await,
        Command::Path(args) => explain::path(args, &global).await,
        Command::Events(args) => events::run(args, &global).await,
        Command::Audit(command) => audit::run(command, &global).await,
        Command::Token(command) => keys::token(command, &global).await,
        Command::Directory(command) => keys::directory(command, &global).await,
        Command::Key(command) => keys::key(command, &global).await,
        Command::Code(command) => keys::code(command, &global).await,
        Command::User(command) => identity::users(command, &global).await,
        Command::Group(command) => identity::groups(command, &global).await,
        Command::Device(command) => identity::devices(command, &global).await,
        Command::Session(command) => identity::sessions(command, &global).await,
        Command::Revoke(args) => revoke::run(args, &global).await,
        Command::Broker(_) | Command::Client(_) | Command::Demo(_) | Command::Tour(_) | Command::Completions { .. } => {
            Ok(ExitCode::SUCCESS)
        }
    };
    telemetry.stop().await;
    code
}

/// Sets up logs and traces of a process that has no configuration of its own for them.
fn logs(global: &Global, level: LevelFilter, service: &'static str) -> anyhow::Result<Telemetry> {
    telemetry::start(&telemetry::Options {
        format: global.log_format,
        filter: global.log.clone().unwrap_or_else(|| level.to_string()),
        otlp: global.otlp_endpoint.clone(),
        service,
    })
}

/// A caller of the chosen cluster.
fn client(global: &Global) -> anyhow::Result<Client> {
    Ok(Client::new(&Contexts::resolve(global)?, global.read)?)
}

/// Prints what became of a change: as JSON whole, or its position and who enforces it.
///
/// Answers no when it was to be enforced and is not everywhere.
fn changed(answer: &Value, what: &str, as_json: bool) -> anyhow::Result<ExitCode> {
    let open = answer["enforced"]["open"].as_array().cloned().unwrap_or_default();
    let complete = answer["enforced"].is_null() || answer["enforced"]["complete"] == true;
    if as_json {
        output::json(answer)?;
    } else {
        match answer["position"].as_str() {
            Some(position) => output::line(format_args!("{what} at {position}"))?,
            None => output::line(what)?,
        }
        for receipt in answer["enforced"]["receipts"].as_array().unwrap_or(&Vec::new()) {
            let how = if receipt["how"] == "lease_over" { "its lease is over" } else { "enforces it" };
            output::line(format_args!("  {}: {how}", output::cell(receipt.get("name"))))?;
        }
        for broker in &open {
            let until = broker["until_ms"].as_u64().map(output::moment).unwrap_or_default();
            output::line(format_args!("  {}: may not enforce it until {until}", output::cell(broker.get("name"))))?;
        }
    }
    Ok(if complete { ExitCode::SUCCESS } else { ExitCode::from(crate::NO) })
}

/// A part of a path of the API, so that it stays one.
fn segment(text: &str) -> anyhow::Result<&str> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if text.is_empty() || text.starts_with('.') || !text.chars().all(plain) {
        anyhow::bail!("`{}` is no id", output::clean(text));
    }
    Ok(text)
}
