//! `selvedge apply`, `get` and `diff`: configuration as files.

use std::collections::BTreeMap;
use std::process::ExitCode;

use reqwest::Method;
use selvedge_domain::spec::{Key, Kind, Object};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::api::{Client, Wait};
use crate::args::{Files, Global};
use crate::{NO, diff, objects, output};

/// Apply configuration files as one transaction.
#[derive(Debug, clap::Args)]
pub struct Apply {
    #[command(flatten)]
    files: Files,
    /// Delete every object, of any kind, that is not in the files
    #[arg(long)]
    prune: bool,
    /// Say what would change, and change nothing
    #[arg(long)]
    dry_run: bool,
    /// Refuse when the policy revision is another by now
    #[arg(long, value_name = "N")]
    expect_revision: Option<u64>,
    /// How far to wait; exits 1 when it is not enforced everywhere in time
    #[arg(long, value_enum, default_value_t)]
    wait: Wait,
    /// JSON
    #[arg(long)]
    json: bool,
}

/// How objects are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Form {
    /// One line for each object.
    Table,
    /// As `apply -f` takes it.
    Yaml,
    /// With the policy revision.
    Json,
}

/// Show configuration objects.
#[derive(Debug, clap::Args)]
pub struct Get {
    /// Region, Zone, ConnectorGroup, SegmentGroup, Segment, Policy or Receiver; all when not given
    #[arg(value_parser = objects::kind)]
    kind: Option<Kind>,
    /// Name
    #[arg(requires = "kind")]
    name: Option<String>,
    /// Form
    #[arg(short, long, value_enum, default_value = "table")]
    output: Form,
}

/// Show what `apply` would change.
#[derive(Debug, clap::Args)]
pub struct Diff {
    #[command(flatten)]
    files: Files,
    /// As `apply --prune`: what is not in the files would be deleted
    #[arg(long)]
    prune: bool,
    /// JSON
    #[arg(long)]
    json: bool,
}

#[derive(Deserialize)]
struct ObjectList {
    revision: u64,
    objects: Vec<Object>,
}

pub async fn apply(args: Apply, global: &Global) -> anyhow::Result<ExitCode> {
    let objects = objects::read(&args.files.files)?;
    let client = super::client(global)?;
    let mut body = json!({ "objects": objects, "dry_run": args.dry_run, "prune": args.prune });
    if let Some(revision) = args.expect_revision {
        body["expect_revision"] = revision.into();
    }
    let answer = client.change(Method::POST, "/api/v1/apply", &body, args.wait).await?;
    if args.json {
        return super::changed(&answer, "applied", true);
    }
    let changes = changes(&answer);
    for (key, change) in &changes {
        let would = if args.dry_run { "would be " } else { "" };
        output::line(format_args!("{:?} `{}` {would}{change}", key.kind, key.name))?;
    }
    if changes.is_empty() {
        output::line("nothing to change")?;
    }
    if args.dry_run {
        return Ok(ExitCode::SUCCESS);
    }
    super::changed(&answer, &format!("revision {}", output::cell(answer.get("revision"))), false)
}

fn changes(answer: &Value) -> Vec<(Key, String)> {
    let change = |change: &Value| {
        let key = serde_json::from_value(json!({ "kind": change["kind"], "name": change["name"] })).ok()?;
        Some((key, change["change"].as_str()?.to_owned()))
    };
    answer["changed"].as_array().into_iter().flatten().filter_map(change).collect()
}

async fn all(client: &Client, kind: Option<Kind>, name: Option<&str>) -> anyhow::Result<ObjectList> {
    let mut query = Vec::new();
    query.extend(kind.map(|kind| ("kind", format!("{kind:?}"))));
    query.extend(name.map(|name| ("name", name.to_owned())));
    Ok(client.read("/api/v1/objects", &query).await?)
}

pub async fn get(args: Get, global: &Global) -> anyhow::Result<ExitCode> {
    let client = super::client(global)?;
    let list = all(&client, args.kind, args.name.as_deref()).await?;
    if let (Some(kind), Some(name), true) = (args.kind, &args.name, list.objects.is_empty()) {
        anyhow::bail!("there is no {kind:?} `{name}`");
    }
    match args.output {
        Form::Json => {
            let objects = list.objects.iter().map(objects::json).collect::<anyhow::Result<Vec<_>>>()?;
            output::json(&json!({ "revision": list.revision, "objects": objects }))?;
        }
        Form::Yaml => {
            let documents = list.objects.iter().map(objects::yaml).collect::<anyhow::Result<Vec<_>>>()?;
            output::print(&documents.join("---\n"))?;
        }
        Form::Table => {
            let row = |object: &Object| vec![format!("{:?}", object.key().kind), object.key().name, summary(object)];
            output::table(&["kind", "name", "what"], list.objects.iter().map(row))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// What an object says, on one line.
fn summary(object: &Object) -> String {
    match object {
        Object::Region(region) => format!("{:.2}, {:.2}", region.latitude, region.longitude),
        Object::Zone(_) | Object::SegmentGroup(_) => String::new(),
        Object::ConnectorGroup(group) => format!("in {}", group.region),
        Object::Segment(segment) => {
            let targets: Vec<&str> = segment.hosts.iter().chain(&segment.networks).map(String::as_str).collect();
            let tcp = segment.tcp.iter().map(|port| format!("tcp {port}"));
            let ports: Vec<String> = tcp.chain(segment.udp.iter().map(|port| format!("udp {port}"))).collect();
            format!("{}  {}  by {}", targets.join(" "), ports.join(" "), segment.connector_groups.join(" "))
        }
        Object::Policy(policy) => {
            let text = policy.cedar.split_whitespace().collect::<Vec<_>>().join(" ");
            if policy.simulate { format!("(simulated) {text}") } else { text }
        }
        Object::Receiver(receiver) => {
            format!("{}{}", receiver.address, if receiver.tls_ca.is_empty() { "" } else { " over TLS" })
        }
    }
}

pub async fn diff(args: Diff, global: &Global) -> anyhow::Result<ExitCode> {
    let objects = objects::read(&args.files.files)?;
    let client = super::client(global)?;
    let before = all(&client, None, None).await?;
    // The broker compares, because it knows what is only written differently; the state that it compares with is the
    // one that was read, or it refuses.
    let body = json!({ "objects": objects, "dry_run": true, "prune": args.prune, "expect_revision": before.revision });
    let answer = client.change(Method::POST, "/api/v1/apply", &body, Wait::Committed).await?;
    let changes = changes(&answer);
    let exit = if changes.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(NO) };
    if args.json {
        output::json(&answer)?;
        return Ok(exit);
    }
    let folded = |key: Key| (key.kind, key.name.to_lowercase());
    let texts = |objects: &[Object]| {
        let text = |object: &Object| Ok((folded(object.key()), objects::yaml(object)?));
        objects.iter().map(text).collect::<anyhow::Result<BTreeMap<_, _>>>()
    };
    let (old, new) = (texts(&before.objects)?, texts(&objects)?);
    for (key, change) in changes {
        let which = folded(key.clone());
        let text = |of: &BTreeMap<_, String>| of.get(&which).cloned().unwrap_or_default();
        let (old, new) = match change.as_str() {
            "deleted" => (text(&old), String::new()),
            _ => (text(&old), text(&new)),
        };
        output::line(format_args!("{:?} `{}` {change}", key.kind, key.name))?;
        output::line(diff::lines(&old, &new))?;
    }
    Ok(exit)
}
