//! `selvedge explain` and `selvedge path`

use std::process::ExitCode;

use selvedge_domain::policy::{Explanation, PolicyOutcome};
use selvedge_domain::segment::Fate;
use serde::Deserialize;
use serde_json::Value;

use crate::api::{Client, Error};
use crate::args::Global;
use crate::{NO, output};

/// Who wants to reach what.
#[derive(Debug, clap::Args)]
struct Asked {
    /// A person's `userName`, or `directory/userName`
    #[arg(long)]
    user: Option<String>,
    /// A workload's name
    #[arg(long, conflicts_with = "user")]
    workload: Option<String>,
    /// Host name or address
    #[arg(long)]
    host: Option<String>,
    /// Port
    #[arg(long)]
    port: Option<u16>,
    /// `tcp` or `udp`
    #[arg(long, value_parser = ["tcp", "udp"], default_value = "tcp")]
    transport: String,
}

impl Asked {
    fn query(&self) -> Vec<(&'static str, String)> {
        let mut query = vec![("transport", self.transport.clone())];
        query.extend(self.user.clone().map(|user| ("user", user)));
        query.extend(self.workload.clone().map(|workload| ("workload", workload)));
        query.extend(self.host.clone().map(|host| ("host", host)));
        query.extend(self.port.map(|port| ("port", port.to_string())));
        query
    }
}

/// Say why access is allowed or denied; exits 0 allowed, 1 denied, 2 when it cannot be found out.
#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("who").required(true).args(["user", "workload", "id"]))]
pub struct Explain {
    #[command(flatten)]
    asked: Asked,
    /// The id that a refused caller was told: who and what are then taken from its audit record
    #[arg(long, value_name = "DENIAL", conflicts_with_all = ["host", "port"])]
    id: Option<String>,
    /// JSON
    #[arg(long)]
    json: bool,
}

/// List the paths to an application.
#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("who").required(true).args(["user", "workload"]))]
pub struct Path {
    #[command(flatten)]
    asked: Asked,
    /// JSON
    #[arg(long)]
    json: bool,
}

#[derive(Deserialize)]
struct Explained {
    explanation: Explanation,
    #[serde(default)]
    recorded: Option<Value>,
}

pub async fn explain(args: Explain, global: &Global) -> anyhow::Result<ExitCode> {
    let client = super::client(global)?;
    let answer: Value = match &args.id {
        Some(id) => of_denial(&client, id).await?,
        None => client.read("/api/v1/explain", &args.asked.query()).await?,
    };
    let explained: Explained = serde_json::from_value(answer.clone())?;
    if args.json {
        output::json(&answer)?;
    } else {
        if let Some(recorded) = &explained.recorded {
            say_recorded(recorded)?;
        }
        say(&explained.explanation)?;
    }
    Ok(if explained.explanation.allowed { ExitCode::SUCCESS } else { ExitCode::from(NO) })
}

/// The record of a denial lies with the broker that denied.
async fn of_denial(client: &Client, id: &str) -> anyhow::Result<Value> {
    let mut first = None;
    for one in client.brokers().await? {
        match one.read("/api/v1/explain", &[("denial", id.to_owned())]).await {
            Ok(answer) => return Ok(answer),
            Err(error @ (Error::Refused { status: 404, .. } | Error::Unreachable(_))) => {
                let not_reached = !error.is_not_found();
                // That one broker did not answer weighs more than that another does not have it.
                if first.is_none() || not_reached {
                    first = Some(error);
                }
            }
            Err(error) => return Err(error.into()),
        }
    }
    Err(first.map_or_else(|| anyhow::anyhow!("the cluster names no broker"), Into::into))
}

fn say_recorded(recorded: &Value) -> anyhow::Result<()> {
    let record = &recorded["record"];
    let at = recorded["time_ms"].as_u64().map(output::moment).unwrap_or_default();
    output::line(format_args!(
        "refused     {at} at revision {}: {}\nrecord      {}/{}\n\nas the policy is now:",
        output::cell(record.get("revision")),
        output::cell(record.get("reason")),
        output::cell(recorded.get("stream")),
        output::cell(recorded.get("seq")),
    ))
}

fn say(why: &Explanation) -> anyhow::Result<()> {
    let names = |names: &[String]| if names.is_empty() { "none".to_owned() } else { names.join(", ") };
    let verdict = if why.allowed { "allowed" } else { "denied" };
    let mut text = format!("{verdict}: {}\n\n", why.message);
    let mut put = |name: &str, value: &str| text.push_str(&format!("{name:<12}{value}\n"));
    put("who", &why.principal);
    put("groups", &names(&why.groups));
    put("what", &format!("{}:{} ({})", why.host, why.port, why.transport));
    put("zone", why.zone.as_deref().unwrap_or("none: the name is not private"));
    let matched =
        why.segments.iter().filter(|segment| segment.fate == Fate::Matched).map(|segment| segment.name.as_str());
    let unreached = || matched.collect::<Vec<_>>().join(", ");
    match why.segment.clone().unwrap_or_else(unreached) {
        none if none.is_empty() => put("segment", "none"),
        segment => put("segment", &segment),
    }
    for segment in &why.segments {
        let fate = match segment.fate {
            Fate::Matched => "matched",
            Fate::LacksPort => "does not have the port",
            Fate::Hidden => "a more specific segment stands before it",
        };
        put("", &format!("{} by `{}`: {fate}", segment.name, segment.by));
    }
    let deciding: Vec<String> = why.deciding.iter().map(|policy| format!("{} ({})", policy.name, policy.id)).collect();
    put(
        "decided by",
        &if deciding.is_empty() { "no policy: what nothing permits is denied".to_owned() } else { deciding.join(", ") },
    );
    if !why.policies.is_empty() {
        put("policies", "");
    }
    for policy in &why.policies {
        let outcome = match (policy.outcome, &policy.unmet) {
            (PolicyOutcome::Applies, _) if policy.deciding => "applies, decides".to_owned(),
            (PolicyOutcome::Applies, _) => "applies".to_owned(),
            (PolicyOutcome::DoesNotApply, None) => "does not apply".to_owned(),
            (PolicyOutcome::DoesNotApply, Some(unmet)) => format!("not met: {} `{}`", unmet.part, unmet.text),
            (PolicyOutcome::Failed, None) => "could not be evaluated, which denies".to_owned(),
            (PolicyOutcome::Failed, Some(unmet)) => {
                let error = unmet.error.as_deref().unwrap_or("no reason given");
                format!("could not be evaluated, which denies: {} `{}`: {error}", unmet.part, unmet.text)
            }
        };
        let simulated = if policy.simulated { ", simulated" } else { "" };
        put("", &format!("{} ({}{simulated}): {outcome}", policy.policy.name, policy.effect));
    }
    if why.policies_left_out > 0 {
        put("", &format!("and {} more", why.policies_left_out));
    }
    if why.simulated_differs == Some(true) {
        put("simulated", "the simulated policies would turn the verdict");
    }
    if let Some(change) = &why.change {
        put("to change", change);
    }
    put("as of", &format!("revision {}, position {}", why.revision, why.position));
    let text: Vec<String> = text.lines().map(|line| output::clean(line.trim_end())).collect();
    output::line(text.join("\n"))
}

pub async fn path(args: Path, global: &Global) -> anyhow::Result<ExitCode> {
    let answer: Value = super::client(global)?.read("/api/v1/path", &args.asked.query()).await?;
    let allowed = answer["allowed"] == true;
    let exit = if allowed { ExitCode::SUCCESS } else { ExitCode::from(NO) };
    if args.json {
        output::json(&answer)?;
        return Ok(exit);
    }
    let empty = Vec::new();
    let candidates = answer["candidates"].as_array().unwrap_or(&empty);
    let here = candidates.iter().find(|candidate| candidate["broker"] == answer["broker"]);
    let here = here.and_then(|candidate| candidate.get("broker_name")).or(answer.get("broker"));
    output::line(format_args!(
        "{}: {}\nsegment {}, for a client that is attached to {}\n",
        if allowed { "allowed" } else { "denied" },
        output::clean(&output::cell(answer.get("reason"))),
        output::cell(answer.get("segment")),
        output::cell(here),
    ))?;
    if let Some(better) = answer["better_broker"].as_object() {
        let named = candidates.iter().find(|candidate| Some(&candidate["broker"]) == better.get("broker"));
        let name = output::cell(named.and_then(|candidate| candidate.get("broker_name")));
        output::line(format_args!(
            "the client will move to {name}, which saves {} ms\n",
            millis(better.get("saves_ms"))
        ))?;
    }
    let row = |candidate: &Value| {
        let cost = &candidate["cost"];
        // `~` marks an estimate from geography.
        let leg = |ms: &str, measured: &str| {
            let mark = if cost[measured] == true { "" } else { "~" };
            format!("{mark}{}", millis(cost.get(ms)))
        };
        vec![
            output::cell(candidate.get("broker_name")),
            output::cell(candidate.get("connector_name")),
            leg("client_broker_ms", "client_broker_measured"),
            leg("broker_connector_ms", "broker_connector_measured"),
            millis(cost.get("connector_app_ms")),
            millis(cost.get("load_over_group_ms")),
            millis(cost.get("total_ms")),
            output::cell(candidate.get("why")),
        ]
    };
    if candidates.is_empty() {
        output::line("no connector of this segment is known")?;
        return Ok(exit);
    }
    let headers = ["broker", "connector", "to broker", "to connector", "to application", "load", "total ms", "why"];
    output::table(&headers, candidates.iter().map(row))?;
    Ok(exit)
}

fn millis(value: Option<&Value>) -> String {
    value.and_then(Value::as_f64).map_or_else(|| "-".to_owned(), |ms| format!("{ms:.1}"))
}
