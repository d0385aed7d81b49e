//! `selvedge events`

use std::process::ExitCode;
use std::time::Duration;

use selvedge_domain::Id;
use serde_json::Value;

use crate::api::{Client, Error, Lines};
use crate::args::Global;
use crate::{output, shutdown};

/// Between two attempts to go on.
const PAUSE: Duration = Duration::from_secs(1);
/// Attempts in a row that brought nothing.
const ATTEMPTS_MAX: u32 = 30;

/// Show the event log.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Go on with events as they happen, at another endpoint when one goes away
    #[arg(long, short)]
    follow: bool,
    /// First event: a sequence number, or `epoch-seq`; the first that is kept when not given
    #[arg(long, value_name = "POS")]
    from: Option<String>,
    /// One JSON object a line, bookmarks included
    #[arg(long)]
    json: bool,
}

pub async fn run(args: Args, global: &Global) -> anyhow::Result<ExitCode> {
    let client = super::client(global)?;
    let stop = shutdown::on_signal()?;
    tokio::select! {
        result = show(&client, args) => result,
        () = stop.cancelled() => Ok(()),
    }?;
    Ok(ExitCode::SUCCESS)
}

async fn show(client: &Client, args: Args) -> anyhow::Result<()> {
    let (mut from, mut failures) = (args.from.clone(), 0);
    loop {
        let mut lines = match open(client, &args, from.as_ref()).await {
            Ok(lines) => lines,
            Err(Error::Unreachable(_)) if args.follow && failures > 0 && failures < ATTEMPTS_MAX => {
                failures += 1;
                tokio::time::sleep(PAUSE).await;
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        let broke = loop {
            match lines.next().await {
                Ok(Some(event)) => {
                    failures = 0;
                    if let Some(id) =
                        event["id"].as_str().or(event["bookmark"].as_str()).and_then(|id| id.parse::<Id>().ok())
                    {
                        from = Some(Id::new(id.epoch, id.seq + 1).to_string());
                    }
                    say(&event, args.json)?;
                }
                Ok(None) => break None,
                Err(error) => break Some(error),
            }
        };
        match broke {
            Some(error) if !args.follow || failures >= ATTEMPTS_MAX => return Err(error.into()),
            None if !args.follow => return Ok(()),
            _ => {
                failures += 1;
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

async fn open(client: &Client, args: &Args, from: Option<&String>) -> Result<Lines, Error> {
    let mut query = vec![("follow", args.follow.to_string())];
    query.extend(from.map(|from| ("from", from.clone())));
    client.lines("/api/v1/events", &query).await
}

fn say(event: &Value, as_json: bool) -> anyhow::Result<()> {
    if as_json {
        return output::json_line(event);
    }
    if event["bookmark"].is_string() {
        return Ok(());
    }
    let at = event["time_ms"].as_u64().map(output::moment).unwrap_or_default();
    output::line(output::clean(&format!(
        "{:<10} {at} {:<18} by {:<14} {}",
        output::cell(event.get("id")),
        output::cell(event.get("event")),
        output::cell(event.get("actor")),
        event["row"],
    )))
}
