//! `selvedge broker`

use std::path::PathBuf;
use std::process::ExitCode;

use selvedge_broker::config::Config;
use selvedge_broker::node::Broker;
use selvedge_broker::ops;
use tracing::level_filters::LevelFilter;

use crate::args::Global;
use crate::{output, shutdown};

/// Run a broker.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Configuration (TOML)
    #[arg(long, env = "SELVEDGE_BROKER_CONFIG", value_name = "FILE")]
    config: PathBuf,
}

pub async fn run(args: Args, global: &Global) -> anyhow::Result<ExitCode> {
    let config = Config::load(&args.config)?;
    let telemetry = super::logs(global, LevelFilter::INFO, "selvedge-broker", config.otlp_endpoint.clone())?;
    let shutdown = shutdown::on_signal()?;
    let metrics = ops::install_metrics()?;
    let (name, web) = (config.name.clone(), config.web.advertised());
    let started = tokio::select! {
        started = Broker::start(config, metrics) => started?,
        () = shutdown.cancelled() => return Ok(ExitCode::SUCCESS),
    };
    tracing::info!(node = started.node(), name, "serving");
    if let Some(token) = started.owner_token() {
        output::line(format_args!(
            "This is a new cluster. The token of its first administrator, shown this once:\n\n  {token}\n\n\
             Keep it:  selvedge context add NAME --endpoint https://{web} --pin PIN --token -"
        ))?;
    }
    let result = started.run_until(shutdown).await;
    telemetry.stop().await;
    result?;
    Ok(ExitCode::SUCCESS)
}
