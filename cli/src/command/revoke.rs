//! `selvedge revoke`

use std::process::ExitCode;

use reqwest::Method;
use serde_json::json;

use crate::api::Wait;
use crate::args::Global;

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Kind {
    Device,
    Workload,
    Connector,
    Broker,
}

/// Revoke a device, workload, connector or broker.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What
    #[arg(value_enum)]
    kind: Kind,
    /// Which: its id, or its name if only one has it
    id: String,
    /// How far to wait; exits 1 when it is not enforced everywhere in time
    #[arg(long, value_enum, default_value_t)]
    wait: Wait,
    /// JSON
    #[arg(long)]
    json: bool,
}

pub async fn run(args: Args, global: &Global) -> anyhow::Result<ExitCode> {
    let kind = match args.kind {
        Kind::Device => "device",
        Kind::Workload => "workload",
        Kind::Connector => "connector",
        Kind::Broker => "broker",
    };
    let body = json!({ "subject": format!("{kind}/{}", args.id) });
    let answer = super::client(global)?.change(Method::POST, "/api/v1/revoke", &body, args.wait).await?;
    super::changed(&answer, "revoked", args.json)
}
