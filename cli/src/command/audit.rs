//! `selvedge audit`: the journals of the brokers through the API, and of a directory on this machine.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;

use selvedge_storage::audit;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use crate::api::Client;
use crate::args::Global;
use crate::{NO, output, shutdown};

/// Records that wait to be printed.
const QUEUED_MAX: usize = 256;

#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// The newest records of every broker
    Tail {
        /// Go on with records as they become durable
        #[arg(long, short)]
        follow: bool,
        /// Records of each broker to begin with
        #[arg(long, short = 'n', default_value_t = 20)]
        lines: u64,
        /// One JSON object a line
        #[arg(long)]
        json: bool,
    },
    /// All records of every broker since it last started, in the order of their times
    Show {
        /// Only this stream; older ones are named by `--streams`
        #[arg(long)]
        stream: Option<String>,
        /// First sequence number
        #[arg(long, default_value_t = 1)]
        from: u64,
        /// Name the streams instead
        #[arg(long, conflicts_with = "stream")]
        streams: bool,
        /// One JSON object a line
        #[arg(long)]
        json: bool,
    },
    /// Check every byte of the journals in a directory; exits 1 and names where each is not as written
    Verify {
        /// `audit` in a broker's data directory, or a copy of it
        dir: PathBuf,
        /// JSON
        #[arg(long)]
        json: bool,
    },
}

pub async fn run(command: Command, global: &Global) -> anyhow::Result<ExitCode> {
    match command {
        Command::Tail { follow, lines, json } => tail(&super::client(global)?, follow, lines, json).await,
        Command::Show { streams: true, json, .. } => streams(&super::client(global)?, json).await,
        Command::Show { stream, from, json, .. } => show(&super::client(global)?, stream, from, json).await,
        Command::Verify { dir, json } => verify(dir, json).await,
    }
}

async fn tail(client: &Client, follow: bool, lines: u64, as_json: bool) -> anyhow::Result<ExitCode> {
    let stop = shutdown::on_signal()?;
    let (sender, mut receiver) = mpsc::channel(QUEUED_MAX);
    let brokers = client.brokers().await?;
    let (mut recent, mut open, mut failed) = (BTreeMap::new(), brokers.len(), 0);
    for one in brokers {
        let sender = sender.clone();
        tokio::spawn(async move {
            let result = follow_one(&one, follow, lines, &sender).await;
            // Whoever prints may have stopped.
            let _ = sender.send(Err((one.name(), result))).await;
        });
    }
    drop(sender);
    loop {
        let next = tokio::select! {
            next = receiver.recv() => next,
            () = stop.cancelled() => break,
        };
        match next {
            Some(Ok(record)) if follow => say(&record, as_json)?,
            Some(Ok(record)) => drop(recent.insert(order(&record), record)),
            Some(Err((name, result))) => {
                open -= 1;
                if let Err(error) = result {
                    failed += 1;
                    warn(&name, &error);
                }
            }
            None => break,
        }
        if open == 0 && receiver.is_empty() {
            break;
        }
    }
    for record in recent.values() {
        say(record, as_json)?;
    }
    missed(failed)
}

async fn follow_one(
    one: &Client,
    follow: bool,
    lines: u64,
    sender: &mpsc::Sender<Result<Value, (String, anyhow::Result<()>)>>,
) -> anyhow::Result<()> {
    let mut query = Vec::new();
    if follow {
        // Where to begin: the last of what is there now.
        let streams: Value = one.read("/api/v1/audit/streams", &[]).await?;
        let own = streams["streams"].as_array().into_iter().flatten().find(|stream| stream["current"] == true);
        let last = own.and_then(|stream| stream["durable_seq"].as_u64()).unwrap_or_default();
        query.push(("from", (last + 1).saturating_sub(lines).max(1).to_string()));
        query.push(("follow", "true".to_owned()));
    } else {
        query.push(("limit", lines.to_string()));
    }
    let mut records = one.lines("/api/v1/audit", &query).await?;
    while let Some(record) = records.next().await? {
        if sender.send(Ok(record)).await.is_err() {
            return Ok(());
        }
    }
    anyhow::ensure!(!follow, "the broker ended the stream");
    Ok(())
}

async fn show(client: &Client, stream: Option<String>, from: u64, as_json: bool) -> anyhow::Result<ExitCode> {
    let mut found = BTreeMap::new();
    let (mut failed, mut answered) = (0, false);
    for one in client.brokers().await? {
        let mut query = vec![("from", from.to_string())];
        query.extend(stream.clone().map(|stream| ("stream", stream)));
        let read = async {
            let mut records = one.lines("/api/v1/audit", &query).await?;
            while let Some(record) = records.next().await? {
                found.insert(order(&record), record);
            }
            Ok::<(), crate::api::Error>(())
        };
        match read.await {
            Ok(()) => answered = true,
            // A named stream lies with one broker.
            Err(error) if stream.is_some() && error.is_not_found() => {}
            Err(error) => {
                failed += 1;
                warn(&one.name(), &error.into());
            }
        }
    }
    for record in found.values() {
        say(record, as_json)?;
    }
    if let (Some(stream), false, 0) = (&stream, answered, failed) {
        anyhow::bail!("no broker has the stream `{stream}`");
    }
    missed(failed)
}

async fn streams(client: &Client, as_json: bool) -> anyhow::Result<ExitCode> {
    let (mut rows, mut failed) = (Vec::new(), 0);
    for one in client.brokers().await? {
        match one.read::<Value>("/api/v1/audit/streams", &[]).await {
            Ok(answer) => {
                for stream in answer["streams"].as_array().into_iter().flatten() {
                    let mut stream = stream.clone();
                    stream["endpoint"] = one.name().into();
                    rows.push(stream);
                }
            }
            Err(error) => {
                failed += 1;
                warn(&one.name(), &error.into());
            }
        }
    }
    let columns = [
        ("stream", "/stream"),
        ("current", "/current"),
        ("durable", "/durable_seq"),
        ("endpoint", "/endpoint"),
        ("broken", "/broken"),
    ];
    output::list(&json!({ "streams": rows }), "streams", &columns, as_json)?;
    missed(failed)
}

/// What some brokers have is missing: that is said, and the exit code says it too.
fn missed(failed: usize) -> anyhow::Result<ExitCode> {
    if failed == 0 {
        return Ok(ExitCode::SUCCESS);
    }
    anyhow::bail!("{failed} broker(s) did not answer whole; what they have is missing above")
}

fn warn(endpoint: &str, error: &anyhow::Error) {
    use std::io::Write as _;
    // A terminal that is gone is told nothing.
    let _ = writeln!(std::io::stderr(), "warning: {endpoint}: {}", output::chain(error));
}

fn order(record: &Value) -> (u64, String, u64) {
    let stream = record["stream"].as_str().unwrap_or_default().to_owned();
    (record["time_ms"].as_u64().unwrap_or_default(), stream, record["seq"].as_u64().unwrap_or_default())
}

fn say(record: &Value, as_json: bool) -> anyhow::Result<()> {
    let id = format!("{}/{}", output::cell(record.get("stream")), output::cell(record.get("seq")));
    if as_json {
        let mut record = record.clone();
        record["id"] = id.into();
        return output::json_line(&record);
    }
    let at = record["time_ms"].as_u64().map(output::moment).unwrap_or_default();
    let body = &record["record"];
    let mut fields = body.as_object().cloned().unwrap_or_default();
    fields.remove("kind");
    output::line(output::clean(&format!("{at} {:<15} {} {id}", output::cell(body.get("kind")), Value::Object(fields))))
}

async fn verify(dir: PathBuf, as_json: bool) -> anyhow::Result<ExitCode> {
    anyhow::ensure!(dir.is_dir(), "`{}` is no directory", dir.display());
    let report = tokio::task::spawn_blocking(move || audit::verify(&dir)).await??;
    let whole = report.broken.is_empty();
    if as_json {
        let stream = |stream: &audit::StreamReport| {
            json!({
                "stream": stream.stream.to_string(), "first_seq": stream.first_seq, "records": stream.records,
                "segments": stream.segments, "head": hex::encode(stream.head),
            })
        };
        let broken = |place: &audit::Broken| {
            json!({
                "stream": place.stream, "segment": place.segment, "offset": place.offset, "seq": place.seq,
                "why": place.why,
            })
        };
        let streams: Vec<Value> = report.streams.iter().map(stream).collect();
        let broken: Vec<Value> = report.broken.iter().map(|place| broken(place)).collect();
        output::json(&json!({ "ok": whole, "records": report.records(), "streams": streams, "broken": broken }))?;
    } else {
        let row = |stream: &audit::StreamReport| {
            let (first, last) = (stream.first_seq, stream.first_seq + stream.records);
            let numbers = if stream.records == 0 { "-".to_owned() } else { format!("{first} to {}", last - 1) };
            let cells = [stream.stream.to_string(), stream.records.to_string(), numbers, stream.segments.to_string()];
            [&cells[..], &[hex::encode(stream.head)]].concat()
        };
        output::table(&["stream", "records", "numbers", "segments", "head"], report.streams.iter().map(row))?;
        for place in &report.broken {
            output::line(format_args!(
                "\nbroken\n  stream   {}\n  segment  {}\n  offset   {}\n  record   {}\n  why      {}",
                output::clean(&place.stream),
                output::clean(&place.segment),
                place.offset,
                place.seq,
                place.why
            ))?;
        }
        let all = if whole { format!("all {}", report.records()) } else { format!("the other {}", report.records()) };
        output::line(format_args!("\n{all} records are as they were written"))?;
    }
    Ok(if whole { ExitCode::SUCCESS } else { ExitCode::from(NO) })
}
