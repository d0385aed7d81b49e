//! Lists of people, groups, devices, workloads and sessions.

use std::process::ExitCode;

use serde_json::{Value, json};

use super::client::Enrol;
use crate::args::Global;
use crate::output;

#[derive(Debug, clap::Subcommand)]
pub enum Plain {
    /// All of them
    List {
        /// JSON
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, clap::Subcommand)]
pub enum Named {
    /// All of them, or those whose name has a part
    List {
        /// Part of the name
        #[arg(long, default_value = "")]
        name: String,
        /// JSON
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, clap::Subcommand)]
pub enum Workload {
    /// Enrol this machine as an instance of a workload; then use `selvedge client`
    Enrol(Enrol),
    /// All workloads
    List {
        /// JSON
        #[arg(long)]
        json: bool,
    },
}

pub async fn users(Named::List { name, json }: Named, global: &Global) -> anyhow::Result<ExitCode> {
    let columns = [
        ("id", "/id"),
        ("user", "/user_name"),
        ("name", "/display_name"),
        ("directory", "/directory"),
        ("active", "/active"),
        ("held", "/held"),
        ("groups", "/groups"),
        ("devices", "/devices"),
    ];
    named(global, "users", &name, &columns, json).await
}

pub async fn groups(Named::List { name, json }: Named, global: &Global) -> anyhow::Result<ExitCode> {
    let columns = [("id", "/id"), ("name", "/display_name"), ("directory", "/directory"), ("members", "/members")];
    named(global, "groups", &name, &columns, json).await
}

async fn named(
    global: &Global,
    what: &str,
    name: &str,
    columns: &[(&str, &str)],
    as_json: bool,
) -> anyhow::Result<ExitCode> {
    let answer: Value = super::client(global)?.read(&format!("/api/v1/{what}"), &[("name", name.to_owned())]).await?;
    output::list(&answer, what, columns, as_json)?;
    Ok(ExitCode::SUCCESS)
}

pub async fn devices(Plain::List { json }: Plain, global: &Global) -> anyhow::Result<ExitCode> {
    let answer: Value = super::client(global)?.read("/api/v1/devices", &[]).await?;
    let columns = [("id", "/id"), ("name", "/name"), ("user", "/user"), ("revoked", "/revoked"), ("held", "/held")];
    output::list(&answer, "devices", &columns, json)?;
    Ok(ExitCode::SUCCESS)
}

pub async fn workload(command: Workload, global: &Global) -> anyhow::Result<ExitCode> {
    match command {
        Workload::Enrol(args) => super::client::enrol(args, true).await,
        Workload::List { json } => {
            let answer: Value = super::client(global)?.read("/api/v1/workloads", &[]).await?;
            let columns = [
                ("id", "/id"),
                ("name", "/name"),
                ("instances", "/instances"),
                ("revoked", "/revoked"),
                ("held", "/held"),
            ];
            output::list(&answer, "workloads", &columns, json)?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// Each broker knows the sessions that it stitches.
pub async fn sessions(Plain::List { json: as_json }: Plain, global: &Global) -> anyhow::Result<ExitCode> {
    let client = super::client(global)?;
    let (mut rows, mut tried) = (Vec::new(), Vec::new());
    for one in client.brokers().await? {
        match one.read::<Value>("/api/v1/sessions", &[]).await {
            Ok(answer) => {
                for session in answer["sessions"].as_array().into_iter().flatten() {
                    let mut session = session.clone();
                    session["endpoint"] = one.name().into();
                    rows.push(session);
                }
            }
            Err(error) => tried.push(output::chain(&error.into())),
        }
    }
    if as_json {
        output::json(&json!({ "sessions": rows }))?;
    } else {
        let headers = ["session", "who", "to", "connector", "since", "up", "down", "stitched by"];
        let row = |session: &Value| {
            let text = |name: &str| output::cell(session.get(name));
            let to = format!("{}:{}/{}", text("host"), text("port"), text("transport"));
            let since = session["started_ms"].as_u64().map(output::moment).unwrap_or_default();
            let (up, down) = (text("up_bytes"), text("down_bytes"));
            vec![text("session"), text("principal"), to, text("connector"), since, up, down, text("endpoint")]
        };
        output::table(&headers, rows.iter().map(row))?;
    }
    anyhow::ensure!(
        tried.is_empty(),
        "some brokers did not answer; their sessions are missing above\n{}",
        tried.join("\n")
    );
    Ok(ExitCode::SUCCESS)
}
