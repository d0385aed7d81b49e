//! The audit journals on this broker's disk, as newline-delimited JSON.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::Response;
use selvedge_storage::audit::{Reader, Record, StreamId};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use utoipa::{IntoParams, ToSchema};

use super::events::lines;
use crate::web::auth::Caller;
use crate::web::input::Params;
use crate::web::{Context, Problem};

/// Records that are read at once.
const BATCH_RECORDS_MAX: usize = 256;
const BATCH_BYTES_MAX: usize = 1 << 20;

/// Which records.
#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(super) struct Tail {
    /// Stream; that of this broker's present boot when absent.
    stream: Option<String>,
    /// The first sequence number, or what retention has left behind it; the last `limit` records when absent.
    from: Option<u64>,
    /// Records at most; all when absent and `from` is given, else 100.
    limit: Option<u64>,
    /// Go on with records as they become durable.
    #[serde(default)]
    follow: bool,
    /// Add the canonical bytes of each record, in base64, so that its hash can be checked.
    #[serde(default)]
    raw: bool,
}

/// Records, one JSON object a line.
#[utoipa::path(get, path = "/api/v1/audit", tag = "audit", params(Tail),
    responses((status = 200, description = "newline-delimited JSON", content_type = "application/x-ndjson"),
        (status = 404, body = Problem)))]
pub(super) async fn tail(
    State(context): State<Arc<Context>>,
    caller: Caller,
    Params(tail): Params<Tail>,
) -> Result<Response, Problem> {
    const LAST: u64 = 100;
    let journal = context.audit.journal().clone();
    let own = journal.stream();
    let stream: StreamId = match &tail.stream {
        None => own,
        Some(text) => text.parse().map_err(|_| Problem::invalid("`stream` is two hexadecimal numbers with a dash"))?,
    };
    let last = journal.durable_seq();
    let limit = tail.limit.or(tail.from.is_none().then_some(LAST));
    let from = match tail.from {
        Some(from) => from.max(1),
        // Of another stream the end is not known beforehand; it is read from its beginning.
        None if stream == own => (last + 1).saturating_sub(limit.unwrap_or(LAST)).max(1),
        None => 1,
    };
    let opened = blocking(move || journal.reader_of_kept(stream, from)).await?;
    let mut reader = opened.map_err(|error| Problem::not_found(error.to_string()))?;
    let mut left = if tail.follow && tail.limit.is_none() { u64::MAX } else { limit.unwrap_or(u64::MAX) };
    lines(&context, &caller, move |sender| async move {
        while left > 0 {
            let count = usize::try_from(left).unwrap_or(usize::MAX).min(BATCH_RECORDS_MAX);
            let read = blocking(move || {
                let records = reader.next_batch(count, BATCH_BYTES_MAX);
                (reader, records)
            });
            let (back, records) = read.await.ok()?;
            reader = back;
            let records = match records {
                Ok(records) => records,
                Err(error) => return Some(json!({ "error": error.to_string(), "code": "journal" })),
            };
            left -= records.len() as u64;
            let end = records.is_empty();
            for record in records {
                if !sender.send(line(&record, tail.raw)).await {
                    let resume = record.seq;
                    return Some(json!({ "error": "the reader is too slow", "code": "slow", "resume": resume }));
                }
            }
            if end && (!tail.follow || !reader.wait().await) {
                break;
            }
        }
        None
    })
}

fn line(record: &Record, raw: bool) -> Value {
    use base64::Engine as _;
    let mut line = json!({
        "stream": record.stream.to_string(),
        "seq": record.seq,
        "time_ms": record.time_ms,
        "prev_hash": hex::encode(record.prev_hash),
        "hash": hex::encode(record.hash),
        "record": body(record),
    });
    if raw {
        line["raw"] = base64::engine::general_purpose::STANDARD.encode(record.bytes()).into();
    }
    line
}

fn body(record: &Record) -> Value {
    serde_json::from_slice(record.body()).unwrap_or(Value::Null)
}

/// A stream of audit records.
#[derive(Serialize, ToSchema)]
pub(super) struct StreamView {
    /// Its id.
    stream: String,
    /// Node id of its broker.
    broker: String,
    /// It is being written now.
    current: bool,
    /// The last durable record, when it is being written.
    durable_seq: Option<u64>,
    /// Where this broker found it broken.
    broken: Option<String>,
}

/// Streams.
#[derive(Serialize, ToSchema)]
pub(super) struct StreamList {
    /// Streams on this broker's disk.
    streams: Vec<StreamView>,
}

/// The streams on this broker's disk.
#[utoipa::path(get, path = "/api/v1/audit/streams", tag = "audit", responses((status = 200, body = StreamList)))]
pub(super) async fn streams(State(context): State<Arc<Context>>) -> Result<Json<StreamList>, Problem> {
    let journal = context.audit.journal().clone();
    let own = journal.stream();
    let durable_seq = journal.durable_seq();
    let broken = journal.broken_streams();
    let all = blocking(move || selvedge_storage::audit::streams(journal.root())).await?;
    let all = all.map_err(|error| Problem::internal(&error))?;
    let view = |stream: StreamId| StreamView {
        stream: stream.to_string(),
        broker: stream.broker.to_string(),
        current: stream == own,
        durable_seq: (stream == own).then_some(durable_seq),
        broken: broken.iter().find(|place| place.stream == stream.to_string()).map(ToString::to_string),
    };
    Ok(Json(StreamList { streams: all.into_iter().map(view).collect() }))
}

/// The record of a denial, if it is in a journal on this disk. The newest streams are read first.
pub(super) async fn denial(context: &Context, denial: String) -> Result<Option<Value>, Problem> {
    let journal = context.audit.journal().clone();
    let found = blocking(move || {
        let mut streams = selvedge_storage::audit::streams(journal.root())?;
        let own = journal.stream();
        streams.sort_by_key(|stream| (*stream != own, std::cmp::Reverse(stream.boot)));
        let until = std::time::Instant::now() + DENIAL_SEARCH_TIME_MAX;
        for stream in streams {
            let mut reader = journal.reader_of_kept(stream, 1)?;
            if let Some(found) = search(&mut reader, &denial, until)? {
                return Ok(Some(found));
            }
        }
        Ok(None)
    });
    found.await?.map_err(|error: selvedge_storage::Error| Problem::internal(&error))
}

/// A search for a denial gives up after so long.
const DENIAL_SEARCH_TIME_MAX: std::time::Duration = std::time::Duration::from_secs(10);

fn search(
    reader: &mut Reader,
    denial: &str,
    until: std::time::Instant,
) -> Result<Option<Value>, selvedge_storage::Error> {
    while std::time::Instant::now() < until {
        let records = reader.next_batch(BATCH_RECORDS_MAX, BATCH_BYTES_MAX)?;
        if records.is_empty() {
            return Ok(None);
        }
        for record in records {
            // Only bytes that have the id at all are parsed.
            if record.body().windows(denial.len()).any(|window| window == denial.as_bytes()) {
                let body = body(&record);
                if body["kind"] == "session.denied" && body["denial"] == denial {
                    return Ok(Some(line(&record, false)));
                }
            }
        }
    }
    Ok(None)
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Problem> {
    tokio::task::spawn_blocking(work).await.map_err(|error| Problem::internal(&error))
}
