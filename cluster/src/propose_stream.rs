//! Proposals from one broker to another over one stream: many at once, each answered as soon as it is decided.
//!
//! **Invariant:** a proposal that was never written to the stream is answered as certainly not applied; one that was, and has
//! no answer when the stream ends, as unknown.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures::stream::FuturesUnordered;
use futures::{Stream, StreamExt as _};
use parking_lot::Mutex;
use selvedge_domain::{ActorKind, Command, Credential};
use selvedge_proto::peer as wire;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Status, Streaming};

use crate::convert;
use crate::core::Core;
use crate::dial::Purpose;
use crate::leader::{Answer, BUSY_RETRY_AFTER_MS};
use crate::propose::COMMAND_BYTES_MAX;

/// Proposals of one stream that are not yet answered; further ones are not read from it.
pub const OUTSTANDING_MAX: usize = 4_096;
/// Answers that wait to be written to a stream.
const ANSWERS_QUEUED_MAX: usize = 256;
/// Proposals that wait to be written to a stream.
const FRAMES_QUEUED_MAX: usize = 256;
/// For a stream to be there.
const OPEN_TIMEOUT: Duration = Duration::from_secs(3);
/// A stream that nothing was sent on for so long is closed.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);

impl Core {
    /// Takes a proposal that another broker sent.
    ///
    /// **Errors**: what no broker of ours sends.
    pub(crate) async fn take_proposal(
        self: &Arc<Self>,
        caller: u64,
        request: wire::ProposeRequest,
    ) -> Result<Answer, Status> {
        let wire::ProposeRequest { command: bytes, credential } = request;
        if bytes.len() > COMMAND_BYTES_MAX {
            return Err(Status::invalid_argument("the command is too large"));
        }
        // What an entry holds must be readable by all, and say truly who proposed it.
        let command = Command::decode(&bytes).map_err(|error| Status::invalid_argument(error.to_string()))?;
        if command.proposer != caller {
            return Err(Status::permission_denied("the command names another proposer"));
        }
        if command.actor.kind == ActorKind::Bootstrap {
            return Err(Status::permission_denied("the first commands are proposed where they are written"));
        }
        let credential = (!credential.is_empty()).then(|| Credential::new(credential));
        Ok(self.enqueue(&command.actor, credential.as_ref(), bytes.into()).await)
    }
}

/// Answers the proposals of a stream for as long as it lasts.
pub(crate) fn serve(
    core: Arc<Core>,
    caller: u64,
    mut frames: Streaming<wire::ProposeFrame>,
) -> impl Stream<Item = Result<wire::ProposeAnswer, Status>> + Send + 'static {
    let (answers, written) = mpsc::channel(ANSWERS_QUEUED_MAX);
    core.clone().tasks.spawn(async move {
        let mut open = FuturesUnordered::new();
        let mut reading = true;
        loop {
            let answered = tokio::select! {
                () = core.stop.cancelled() => return,
                frame = frames.message(), if reading && open.len() < OUTSTANDING_MAX => {
                    match frame {
                        Ok(Some(frame)) => open.push(answer(core.clone(), caller, frame)),
                        Ok(None) | Err(_) => reading = false,
                    }
                    continue;
                }
                Some(answered) = open.next() => answered,
                else => return,
            };
            let wrong = answered.is_err();
            if answers.send(answered).await.is_err() || wrong {
                return;
            }
        }
    });
    ReceiverStream::new(written)
}

async fn answer(core: Arc<Core>, caller: u64, frame: wire::ProposeFrame) -> Result<wire::ProposeAnswer, Status> {
    let request = frame.request.ok_or_else(|| Status::invalid_argument("no proposal"))?;
    let answer = core.take_proposal(caller, request).await?;
    Ok(wire::ProposeAnswer { tag: frame.tag, reply: Some(reply(answer)) })
}

/// An answer as it is sent.
pub(crate) fn reply(answer: Answer) -> wire::ProposeReply {
    use wire::propose_reply::Result as Reply;
    let result = match answer {
        Answer::Outcome(outcome) => convert::outcome(outcome),
        Answer::NotLeader(leader) => Reply::NotLeader(wire::NotLeader { leader: leader.unwrap_or(0) }),
        Answer::Busy => Reply::Busy(wire::Busy { retry_after_ms: BUSY_RETRY_AFTER_MS }),
        Answer::NoRoom => Reply::NoRoom(wire::Empty {}),
        Answer::Unknown => Reply::Unknown(wire::Empty {}),
    };
    wire::ProposeReply { result: Some(result) }
}

fn reply_back(reply: wire::ProposeReply) -> Answer {
    use wire::propose_reply::Result as Reply;
    match reply.result {
        Some(Reply::Done(done)) => Answer::Outcome(convert::done_back(done)),
        Some(Reply::Refused(refused)) => Answer::Outcome(convert::refused_back(refused)),
        Some(Reply::NotLeader(not)) => Answer::NotLeader((not.leader != 0).then_some(not.leader)),
        Some(Reply::Busy(_)) => Answer::Busy,
        Some(Reply::NoRoom(_)) => Answer::NoRoom,
        Some(Reply::Unknown(_)) | None => Answer::Unknown,
    }
}

/// A proposal on its way to another broker.
struct Outgoing {
    request: wire::ProposeRequest,
    answer: oneshot::Sender<Answer>,
}

/// The streams that this broker has open, by node.
#[derive(Default)]
pub(crate) struct Streams {
    open: Mutex<BTreeMap<u64, mpsc::Sender<Outgoing>>>,
}

impl Core {
    /// Sends a proposal to the leader; dropped, it may still be applied.
    pub(crate) async fn forward(
        self: &Arc<Self>,
        leader: u64,
        request: wire::ProposeRequest,
        timeout: Duration,
    ) -> Answer {
        let (answer, answered) = oneshot::channel();
        if let Err(refused) = self.send(leader, Outgoing { request, answer }) {
            return refused;
        }
        tokio::select! {
            answered = tokio::time::timeout(timeout, answered) => match answered {
                Ok(Ok(answer)) => answer,
                Ok(Err(_)) | Err(_) => Answer::Unknown,
            },
            // The old leader may be gone without a word; a retry with the same number is applied once.
            () = self.led_by_another(leader) => Answer::Unknown,
        }
    }

    /// Puts a proposal into the stream to a broker, which is opened when there is none.
    fn send(self: &Arc<Self>, leader: u64, outgoing: Outgoing) -> Result<(), Answer> {
        let mut streams = self.streams.open.lock();
        let mut outgoing = outgoing;
        if let Some(stream) = streams.get(&leader) {
            match stream.try_send(outgoing) {
                Ok(()) => return Ok(()),
                Err(mpsc::error::TrySendError::Full(_)) => return Err(Answer::Busy),
                // It has ended.
                Err(mpsc::error::TrySendError::Closed(back)) => outgoing = back,
            }
        }
        let (queue, queued) = mpsc::channel(OUTSTANDING_MAX);
        let sent = queue.try_send(outgoing);
        streams.insert(leader, queue);
        self.tasks.spawn(run(self.clone(), leader, queued));
        sent.map_err(|_| Answer::Busy)
    }
}

/// One stream to a broker, from its opening to its end.
async fn run(core: Arc<Core>, leader: u64, mut queue: mpsc::Receiver<Outgoing>) {
    let (frames, to_write) = mpsc::channel(FRAMES_QUEUED_MAX);
    let mut client = core.peer_client(leader, Purpose::Propose);
    let opening = client.propose_stream(Request::new(ReceiverStream::new(to_write)));
    let mut open = BTreeMap::new();
    if let Ok(Ok(answers)) = tokio::time::timeout(OPEN_TIMEOUT, opening).await {
        let mut answers = answers.into_inner();
        let mut tag = 0;
        loop {
            tokio::select! {
                () = core.stop.cancelled() => break,
                next = tokio::time::timeout(IDLE_TIMEOUT, queue.recv()), if open.len() < OUTSTANDING_MAX => {
                    let Ok(Some(Outgoing { request, answer })) = next else {
                        if open.is_empty() { break } else { continue }
                    };
                    if answer.is_closed() {
                        continue;
                    }
                    tag += 1;
                    open.insert(tag, answer);
                    if frames.send(wire::ProposeFrame { tag, request: Some(request) }).await.is_err() {
                        break;
                    }
                }
                answered = answers.message() => match answered {
                    Ok(Some(answered)) => {
                        if let Some(answer) = open.remove(&answered.tag) {
                            // Who asked may have given up.
                            let _ = answer.send(reply_back(answered.reply.unwrap_or_default()));
                        }
                    }
                    Ok(None) | Err(_) => break,
                },
            }
            if open.len() >= OUTSTANDING_MAX {
                open.retain(|_, answer: &mut oneshot::Sender<Answer>| !answer.is_closed());
            }
        }
    }
    queue.close();
    while let Ok(Outgoing { answer, .. }) = queue.try_recv() {
        let _ = answer.send(Answer::NotLeader(None));
    }
    // What is open was written: dropping it answers unknown.
}
