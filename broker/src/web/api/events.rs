//! The event log as newline-delimited JSON.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse as _, Response};
use bytes::Bytes;
use futures::StreamExt as _;
use selvedge_cluster::{Error, Frame};
use selvedge_domain::event::Event;
use selvedge_domain::{Envelope, Id};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use utoipa::IntoParams;

use super::event_json;
use crate::web::auth::Caller;
use crate::web::input::Params;
use crate::web::read::Seen;
use crate::web::{Context, Problem};

/// Lines that wait for a slow reader.
const LINES_QUEUED_MAX: usize = 64;
/// A reader that takes nothing for so long is cut; the last line says where it resumes.
const READER_TIMEOUT: Duration = Duration::from_secs(30);
/// Between two looks at whether the reader may still read.
const CALLER_CHECK_INTERVAL: Duration = Duration::from_secs(2);

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

/// Events, one JSON object a line, with bookmarks between commands. A stream that cannot go on ends with a line that has
/// `error` and `code`, and `resume` where it can be taken up again.
#[utoipa::path(get, path = "/api/v1/events", tag = "log", params(Watch),
    responses((status = 200, description = "newline-delimited JSON", content_type = "application/x-ndjson"),
        (status = 410, body = Problem), (status = 503, body = Problem)))]
pub(super) async fn watch(
    State(context): State<Arc<Context>>,
    Seen(state): Seen,
    caller: Caller,
    Params(watch): Params<Watch>,
) -> Result<Response, Problem> {
    let position = state.position();
    let from = match watch.from.as_deref() {
        None => Id::new(position.epoch, state.meta().journal_compacted + 1),
        Some(text) => match (text.parse::<Id>(), text.parse::<u64>()) {
            (Ok(id), _) => id,
            (_, Ok(seq)) => Id::new(position.epoch, seq),
            _ => return Err(Problem::invalid("`from` is a sequence number or `epoch-seq`")),
        },
    };
    if from.epoch != position.epoch {
        return Err(Error::Reset { position }.into());
    }
    let upto = (!watch.follow).then_some(position);
    let mut frames = Box::pin(context.cluster.events(from));
    // What cannot be read at all is refused before the answer begins.
    let first = if from.seq <= position.seq { frames.next().await.transpose()? } else { None };
    let reader = (context.clone(), caller.clone());
    lines(&context, &caller, move |sender| async move {
        let (context, caller) = reader;
        if upto.is_some_and(|upto| from.seq > upto.seq) {
            return None;
        }
        let mut resume = from;
        let mut frames = futures::stream::iter(first.map(Ok)).chain(frames);
        while let Some(frame) = frames.next().await {
            match frame {
                Ok(Frame::Events { events, position, last }) => {
                    if events.iter().any(of_credentials)
                        && let Some(end) = ended(&context, &caller)
                    {
                        return Some(end);
                    }
                    for event in &events {
                        if !sender.send(event_json::envelope(event)).await {
                            return Some(end(&Error::Slow { resume }.into(), Some(resume)));
                        }
                        let id = event.id.unwrap_or_default();
                        resume = Id::new(id.epoch, id.seq + 1);
                    }
                    if last && upto.is_some_and(|upto| position >= upto) {
                        return None;
                    }
                }
                Ok(Frame::Bookmark { position, state_hash, journal_hash }) => {
                    let line = json!({
                        "bookmark": position.to_string(), "state_hash": hex::encode(state_hash),
                        "journal_hash": hex::encode(journal_hash),
                    });
                    if !sender.send(line).await {
                        return Some(end(&Error::Slow { resume }.into(), Some(resume)));
                    }
                    if upto.is_some_and(|upto| position >= upto) {
                        return None;
                    }
                }
                Err(error) => {
                    let resume = match &error {
                        Error::Slow { resume } => Some(*resume),
                        Error::Elsewhere { .. } => Some(resume),
                        _ => None,
                    };
                    return Some(end(&error.into(), resume));
                }
            }
        }
        None
    })
}

/// Events after which a reader may be none any more.
fn of_credentials(event: &Envelope) -> bool {
    matches!(event.event, Some(Event::TokenPut(_) | Event::DirectoryPut(_)))
}

/// The last line of a stream that cannot go on.
fn end(problem: &Problem, resume: Option<Id>) -> Value {
    let mut line = json!({ "error": problem.detail, "code": problem.code });
    if let Some(resume) = resume {
        line["resume"] = resume.to_string().into();
    }
    line
}

/// The last line for a reader whose credential is not what it was; none while it is.
fn ended(context: &Context, caller: &Caller) -> Option<Value> {
    let known = caller.credential.actor(&context.cluster.state());
    let void = known.as_ref() != Some(&caller.actor);
    void.then(|| end(&Problem::unauthenticated("the token was revoked"), None))
}

/// Returns when a reader may not read any more, with the last line for it.
async fn until_ended(context: Arc<Context>, caller: Caller) -> Value {
    let (mut states, mut look) = (context.cluster.subscribe(), tokio::time::interval(CALLER_CHECK_INTERVAL));
    let mut stale = false;
    loop {
        tokio::select! {
            _ = look.tick() => {
                // A broker that has lost touch does not learn of a revocation. A short lapse is none.
                let open = context.cluster.lease().open();
                if !open && std::mem::replace(&mut stale, !open) {
                    let detail = "this broker has lost touch with the others; ask another";
                    return end(&Problem::unavailable("stale", detail), None);
                }
                stale = !open;
            }
            changed = states.changed() => if changed.is_err() {
                return end(&Problem::unavailable("stopping", "this broker stops"), None);
            },
        }
        if let Some(end) = ended(&context, &caller) {
            return end;
        }
    }
}

/// Where the lines of an answer go.
pub(super) struct Lines(mpsc::Sender<Bytes>);

impl Lines {
    /// Sends one; false when the reader is gone or too slow.
    pub async fn send(&self, object: Value) -> bool {
        self.0.send_timeout(line(&object), READER_TIMEOUT).await.is_ok()
    }
}

fn line(object: &Value) -> Bytes {
    let mut line = object.to_string();
    line.push('\n');
    line.into()
}

/// An answer of lines that `produce` sends, for as long as the caller may read them; so many at once as followers are
/// allowed. What it returns is the last line.
pub(super) fn lines<P, F>(context: &Arc<Context>, caller: &Caller, produce: P) -> Result<Response, Problem>
where
    P: FnOnce(Lines) -> F,
    F: Future<Output = Option<Value>> + Send + 'static,
{
    let place = context.followers.clone().try_acquire_owned().map_err(|_| Problem::too_many(5))?;
    let (sender, receiver) = mpsc::channel(LINES_QUEUED_MAX);
    // Beside the queue, which is full when its reader is too slow.
    let (last, was_last) = oneshot::channel();
    let gone = sender.clone();
    let produced = produce(Lines(sender));
    let ended = until_ended(context.clone(), caller.clone());
    tokio::spawn(async move {
        let _place = place;
        let end = tokio::select! {
            biased;
            () = gone.closed() => None,
            end = ended => Some(end),
            end = produced => end,
        };
        if let Some(end) = end {
            // Who is gone need not be told.
            let _ = last.send(line(&end));
        }
    });
    let last = futures::stream::once(was_last).filter_map(|line| std::future::ready(line.ok()));
    let body = Body::from_stream(ReceiverStream::new(receiver).chain(last).map(Ok::<_, std::convert::Infallible>));
    Ok(([(header::CONTENT_TYPE, "application/x-ndjson")], body).into_response())
}
