//! The event log as newline-delimited JSON.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse as _, Response};
use bytes::Bytes;
use futures::StreamExt as _;
use selvedge_cluster::Frame;
use selvedge_domain::Id;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use utoipa::IntoParams;

use super::event_json;
use crate::web::input::Params;
use crate::web::{Context, Problem};

/// Lines that wait for a slow reader.
const LINES_QUEUED_MAX: usize = 64;
/// A reader that takes nothing for so long is cut; it resumes with `from`.
const READER_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(30);

/// From where, and whether to go on.
#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(super) struct Watch {
    /// The first event: a sequence number, or `epoch-seq`; the first that is kept when absent.
    from: Option<String>,
    /// Go on with events as they happen.
    #[serde(default)]
    follow: bool,
}

/// Events, one JSON object a line, with bookmarks between commands.
#[utoipa::path(get, path = "/api/v1/events", tag = "log", params(Watch),
    responses((status = 200, description = "newline-delimited JSON", content_type = "application/x-ndjson"),
        (status = 410, body = Problem)))]
pub(super) async fn watch(
    State(context): State<Arc<Context>>,
    Params(watch): Params<Watch>,
) -> Result<Response, Problem> {
    let state = context.cluster.state();
    let meta = state.meta();
    let from_seq = match watch.from.as_deref() {
        None => meta.journal_compacted + 1,
        Some(text) => match text.parse::<Id>() {
            Ok(id) if id.epoch != state.position().epoch => {
                return Err(Problem::new(
                    http::StatusCode::GONE,
                    "reset",
                    "the log began another epoch",
                    format!("the position is {}; read everything again", state.position()),
                ));
            }
            Ok(id) => id.seq,
            Err(_) => text.parse().map_err(|_| Problem::invalid("`from` is a sequence number or `epoch-seq`"))?,
        },
    };
    if from_seq <= meta.journal_compacted {
        return Err(selvedge_cluster::Error::Compacted { upto: meta.journal_compacted }.into());
    }
    let upto = (!watch.follow).then(|| state.position());
    let frames = Box::pin(context.cluster.events(from_seq));
    lines(&context, move |sender| async move {
        if upto.is_some_and(|upto| from_seq > upto.seq) {
            return;
        }
        let mut frames = frames;
        while let Some(frame) = frames.next().await {
            let (objects, done) = match frame {
                Ok(Frame::Events { events, position, last }) => {
                    let done = last && upto.is_some_and(|upto| position >= upto);
                    (events.iter().map(event_json::envelope).collect(), done)
                }
                Ok(Frame::Bookmark { position, state_hash }) => {
                    let line = json!({ "bookmark": position.to_string(), "state_hash": hex::encode(state_hash) });
                    (vec![line], upto.is_some_and(|upto| position >= upto))
                }
                Err(error) => (vec![json!({ "error": error.to_string() })], true),
            };
            for object in objects {
                if !sender.send(object).await {
                    return;
                }
            }
            if done {
                return;
            }
        }
    })
}

/// Where the lines of an answer go.
pub(super) struct Lines(mpsc::Sender<Result<Bytes, std::convert::Infallible>>);

impl Lines {
    /// Sends one; false when the reader is gone or too slow.
    pub async fn send(&self, object: Value) -> bool {
        let mut line = object.to_string();
        line.push('\n');
        self.0.send_timeout(Ok(line.into()), READER_TIMEOUT).await.is_ok()
    }
}

/// An answer of lines that `produce` sends; so many at once as followers are allowed.
pub(super) fn lines<P, F>(context: &Context, produce: P) -> Result<Response, Problem>
where
    P: FnOnce(Lines) -> F,
    F: Future<Output = ()> + Send + 'static,
{
    let place = context.followers.clone().try_acquire_owned().map_err(|_| Problem::too_many(5))?;
    let (sender, receiver) = mpsc::channel(LINES_QUEUED_MAX);
    let gone = sender.clone();
    let produced = produce(Lines(sender));
    tokio::spawn(async move {
        let _place = place;
        tokio::select! {
            () = produced => {}
            () = gone.closed() => {}
        }
    });
    let body = Body::from_stream(ReceiverStream::new(receiver));
    Ok(([(header::CONTENT_TYPE, "application/x-ndjson")], body).into_response())
}
