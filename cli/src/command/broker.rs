//! `selvedge broker`

use std::process::ExitCode;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use selvedge_broker::config::Config;
use selvedge_broker::node::Broker;
use selvedge_broker::ops::{self, Configured};
use tokio::signal::unix::{SignalKind, signal};

use super::config::OfBroker;
use crate::args::Global;
use crate::{output, shutdown, telemetry};

/// Run a broker.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    of: OfBroker,
}

pub async fn run(args: Args, global: &Global) -> anyhow::Result<ExitCode> {
    let sources = args.of.sources(global);
    let loaded = Config::read(&sources)?;
    let config = &loaded.config;
    let telemetry = telemetry::start(&telemetry::Options {
        format: global.log_format,
        filter: config.log.clone(),
        otlp: config.otlp_endpoint.clone(),
        service: "selvedge-broker",
    })?;
    raise_open_files();
    let (shutdown, now) = shutdown::on_signals()?;
    // From here on a signal waits until there is something to read again, instead of ending the process.
    let mut hangup = signal(SignalKind::hangup())?;
    let metrics = ops::install_metrics()?;
    let (name, web) = (config.name.clone(), config.web.advertised());
    let configured = Configured { sources, loaded, set_log: Box::new(telemetry.set_log()) };
    let started = tokio::select! {
        started = Broker::start(configured, metrics) => started?,
        () = shutdown.cancelled() => return Ok(ExitCode::SUCCESS),
    };
    tracing::info!(node = started.node(), name, "serving");
    if let Some(token) = started.owner_token() {
        output::line(format_args!(
            "This is a new cluster. The token of its first administrator, shown this once:\n\n  {token}\n\n\
             Keep it:  selvedge context add NAME --endpoint https://{web} --pin PIN --token -"
        ))?;
    }
    let reload = started.reload();
    tokio::spawn(async move {
        while hangup.recv().await.is_some() {
            let reload = reload.clone();
            // It says itself what it did.
            let _ = tokio::task::spawn_blocking(move || reload.run()).await;
        }
    });
    let result = started.run_until(shutdown, now).await;
    telemetry.stop().await;
    result?;
    Ok(ExitCode::SUCCESS)
}

/// Takes all the open files that the system grants: what it gives by itself is often a thousand.
fn raise_open_files() {
    let limit = getrlimit(Resource::Nofile);
    let all = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if let Err(error) = setrlimit(Resource::Nofile, all) {
        tracing::info!(%error, "the number of open files stays as it is");
    }
}
