//! Snapshots, and a cluster that goes on from one or from what is left of its brokers.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use reqwest::Method;
use selvedge_broker::node::{self, RestoreFrom, RestoreOptions, Restored, SnapshotHead, save_at_rest};
use selvedge_proto::private_file;
use serde_json::json;

use super::config::OfBroker;
use crate::api::Wait;
use crate::args::Global;
use crate::output;

#[derive(Debug, clap::Subcommand)]
pub enum Snapshot {
    /// Save the state of this machine's broker, whether it runs or not, to a new file; keep it as a secret
    Save {
        /// The file; it must not be there yet
        file: PathBuf,
        #[command(flatten)]
        of: OfBroker,
        /// JSON
        #[arg(long)]
        json: bool,
    },
    /// Read a whole snapshot, check it, and say what it is of
    Inspect {
        /// The file
        file: PathBuf,
        /// JSON
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, clap::Args)]
pub struct Restore {
    #[command(flatten)]
    of: OfBroker,
    /// The snapshot
    #[arg(long, value_name = "FILE")]
    from: PathBuf,
    /// Data directory of a broker that was an issuer, or a copy of its `issuer` and `node`
    #[arg(long, value_name = "DIR")]
    issuer: PathBuf,
    #[command(flatten)]
    common: Common,
}

#[derive(Debug, clap::Args)]
pub struct Recover {
    #[command(flatten)]
    of: OfBroker,
    /// Data directories of stopped brokers, as many as there are; with a majority of the voters nothing is lost
    #[arg(long, value_name = "DIR", required = true, num_args = 1..)]
    from: Vec<PathBuf>,
    /// Data directory of a broker that was an issuer; by default one of those that survived
    #[arg(long, value_name = "DIR")]
    issuer: Option<PathBuf>,
    #[command(flatten)]
    common: Common,
}

#[derive(Debug, clap::Args)]
struct Common {
    /// What may know of later revocations: data directories of stopped brokers, files with lines of `selvedge events
    /// --json` or of audit records
    #[arg(long, value_name = "PATH", num_args = 1..)]
    revocations: Vec<PathBuf>,
    /// Write the new owner's token here (mode 0600) instead of printing it
    #[arg(long, value_name = "FILE")]
    token_out: Option<PathBuf>,
    /// JSON; the token is in it unless it is written to a file
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
#[command(group(clap::ArgGroup::new("what").required(true).args(["device", "workload", "connector", "everything"])))]
pub struct Release {
    /// A device: its id, or its name if only one has it
    #[arg(long, value_name = "DEVICE")]
    device: Option<String>,
    /// A workload: its id or name
    #[arg(long, value_name = "WORKLOAD")]
    workload: Option<String>,
    /// A connector: its id, or its name if only one has it
    #[arg(long, value_name = "CONNECTOR")]
    connector: Option<String>,
    /// Everything, users too, of the cluster with this id: whatever was revoked after the backup and is not known to be
    /// is let be again
    #[arg(long, value_name = "CLUSTER_ID")]
    everything: Option<String>,
    /// JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
pub struct SetTime {
    /// What time it is, e.g. `2026-03-01T12:00:00Z`; no more than a minute ahead of the broker's own clock
    time: jiff::Timestamp,
    /// JSON
    #[arg(long)]
    json: bool,
}

pub async fn snapshot(command: Snapshot, global: &Global) -> anyhow::Result<ExitCode> {
    let (head, file, json) = match command {
        Snapshot::Save { file, of, json } => {
            let data_dir = of.load(global)?.config.data_dir.clone();
            let (from, to) = (data_dir.clone(), file.clone());
            let head = tokio::task::spawn_blocking(move || save_at_rest(&from, &to)).await?;
            let failed = || format!("the state in `{}` was not saved to `{}`", data_dir.display(), file.display());
            (head.with_context(failed)?, file, json)
        }
        Snapshot::Inspect { file, json } => {
            let path = file.clone();
            let head = tokio::task::spawn_blocking(move || SnapshotHead::read(&path)).await?;
            let failed = || format!("`{}` is no snapshot that can be used (SE0120)", file.display());
            (head.with_context(failed)?, file, json)
        }
    };
    if json {
        output::json(&head)?;
        return Ok(ExitCode::SUCCESS);
    }
    let nodes = |nodes: &[u64]| nodes.iter().map(u64::to_string).collect::<Vec<_>>().join(", ");
    output::line(format_args!(
        "file      {} ({} bytes, whole)\ncluster   {}\nposition  {} at {}\nentry     {} of term {}\nhash      {}\nvoters    {}\nlearners  {}\n",
        file.display(),
        head.bytes,
        head.cluster_id,
        head.position,
        output::moment(head.time_ms),
        head.index,
        head.term,
        head.state_hash,
        nodes(&head.voters),
        nodes(&head.learners),
    ))?;
    let mut rows: Vec<_> = head.tables.iter().map(|(name, rows)| vec![name.clone(), rows.to_string()]).collect();
    rows.push(vec!["all".to_owned(), head.rows.to_string()]);
    output::table(&["table", "rows"], rows)?;
    Ok(ExitCode::SUCCESS)
}

pub async fn restore(args: Restore, global: &Global) -> anyhow::Result<ExitCode> {
    let Restore { of, from, issuer, common } = args;
    begin(&of, RestoreFrom::Snapshot(from), Some(issuer), common, global).await
}

pub async fn recover(args: Recover, global: &Global) -> anyhow::Result<ExitCode> {
    let Recover { of, from, issuer, common } = args;
    begin(&of, RestoreFrom::Survivors(from), issuer, common, global).await
}

async fn begin(
    of: &OfBroker,
    from: RestoreFrom,
    issuer: Option<PathBuf>,
    common: Common,
    global: &Global,
) -> anyhow::Result<ExitCode> {
    let config = of.load(global)?.config;
    let Common { revocations, token_out, json } = common;
    if let Some(path) = token_out.as_ref().filter(|path| path.exists()) {
        anyhow::bail!("`{}` is there already", path.display());
    }
    let options = RestoreOptions { from, issuer, revocations };
    let restored = tokio::task::spawn_blocking(move || node::restore(&config, &options)).await??;
    let token = match &token_out {
        Some(path) => {
            if let Err(error) = private_file::create(path, format!("{}\n", *restored.owner_token).as_bytes()) {
                // It exists nowhere else.
                output::line(&*restored.owner_token)?;
                return Err(error).with_context(|| format!("cannot write `{}`; the token was printed", path.display()));
            }
            None
        }
        None => Some(restored.owner_token.as_str()),
    };
    if json {
        let beyond = &restored.beyond;
        let file = token_out.as_ref().map(|path| path.display().to_string());
        output::json(&json!({
            "cluster_id": restored.cluster_id, "pin": restored.pin, "node": restored.begun.node.to_string(),
            "from": restored.begun.from.to_string(), "position": restored.begun.position.to_string(),
            "epoch": restored.begun.position.epoch, "held": restored.holds, "survivors": restored.survivors,
            "revoked_beyond": beyond.revoked.len(), "disabled_beyond": beyond.disabled.len(),
            "token": token, "token_file": file,
        }))?;
        return Ok(ExitCode::SUCCESS);
    }
    show(&restored, of, token)
}

fn show(restored: &Restored, of: &OfBroker, token: Option<&str>) -> anyhow::Result<ExitCode> {
    for survivor in &restored.survivors {
        let state = match (&survivor.unusable, survivor.chosen, survivor.lost_end) {
            (Some(why), ..) => format!("not usable: {why}"),
            (None, true, _) => "goes on".to_owned(),
            (None, false, true) => "lost the end of its log".to_owned(),
            (None, false, false) => "is not further".to_owned(),
        };
        let (path, node) = (survivor.path.display(), survivor.node);
        output::line(format_args!("{path}: node {node}, entry {} of term {}: {state}", survivor.index, survivor.term))?;
    }
    output::line(format_args!(
        "cluster   {}\nepoch     {}, after {}\nnode      {}, the only voter",
        restored.cluster_id, restored.begun.position.epoch, restored.begun.from, restored.begun.node
    ))?;
    let beyond = &restored.beyond;
    if !beyond.revoked.is_empty() || !beyond.disabled.is_empty() {
        let (revoked, disabled) = (beyond.revoked.len(), beyond.disabled.len());
        output::line(format_args!("beyond    {revoked} revoked, {disabled} people disabled or deleted since"))?;
    }
    output::line(match restored.holds {
        true => {
            "held      every user, device, workload and connector, until somebody vouches for it: see\n          \
             `selvedge cluster release --help`"
        }
        false => "held      nobody: a majority of the voters survived, nothing that was acknowledged is lost",
    })?;
    if let Some(token) = token {
        output::line(format_args!(
            "\nAll tokens, codes and logins of before are void. The token of the new owner, shown this once:\n\n  {token}\n"
        ))?;
    }
    output::line(format_args!("next      selvedge broker --config {}", of.config.display()))?;
    Ok(ExitCode::SUCCESS)
}

pub async fn release(args: Release, global: &Global) -> anyhow::Result<ExitCode> {
    let Release { device, workload, connector, everything, json } = args;
    let named = [("device", device), ("workload", workload), ("connector", connector)];
    let subject = named.into_iter().find_map(|(kind, which)| Some(format!("{kind}/{}", which?)));
    let body = match subject {
        Some(subject) => json!({ "subject": subject }),
        None => json!({ "cluster_id": everything }),
    };
    let answer = super::client(global)?.change(Method::POST, "/api/v1/release", &body, Wait::Committed).await?;
    super::changed(&answer, "released", json)
}

pub async fn set_time(args: SetTime, global: &Global) -> anyhow::Result<ExitCode> {
    let time_ms = u64::try_from(args.time.as_millisecond()).context("a time before 1970")?;
    let body = json!({ "time_ms": time_ms });
    let answer = super::client(global)?.change(Method::POST, "/api/v1/cluster/time", &body, Wait::Committed).await?;
    super::changed(&answer, "set", args.json)
}
