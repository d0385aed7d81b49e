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
        Ok(self.enqueue(&command, credential.as_ref(), bytes).await)
    }
}

/// Answers the proposals of a stream for as long as it lasts.
pub(crate) fn serve(
    core: Arc<Core>,
    caller: u64,
    frames: Streaming<wire::ProposeFrame>,
) -> impl Stream<Item = Result<wire::ProposeAnswer, Status>> + Send + 'static {
    let (answers, written) = mpsc::channel(ANSWERS_QUEUED_MAX);
    core.clone().tasks.spawn(async move {
        let decide = |frame| answer(core.clone(), caller, frame);
        tokio::select! {
            () = core.stop.cancelled() => {}
            () = answer_all(frames, decide, answers) => {}
        }
    });
    ReceiverStream::new(written)
}

/// Takes proposals as long as not too many are unanswered, and answers each as soon as it is decided.
async fn answer_all<A: Future<Output = Result<wire::ProposeAnswer, Status>>>(
    mut frames: impl Stream<Item = Result<wire::ProposeFrame, Status>> + Unpin,
    answer: impl Fn(wire::ProposeFrame) -> A,
    answers: mpsc::Sender<Result<wire::ProposeAnswer, Status>>,
) {
    let mut open = FuturesUnordered::new();
    let mut reading = true;
    loop {
        let answered = tokio::select! {
            frame = frames.next(), if reading && open.len() < OUTSTANDING_MAX => {
                match frame {
                    Some(Ok(frame)) => open.push(answer(frame)),
                    Some(Err(_)) | None => reading = false,
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
    if let Ok(Ok(answers)) = tokio::time::timeout(OPEN_TIMEOUT, opening).await {
        tokio::select! {
            () = core.stop.cancelled() => {}
            () = converse(&mut queue, &frames, answers.into_inner()) => {}
        }
    }
    refuse_rest(queue);
}

/// Writes proposals as long as not too many are unanswered and passes answers back, until the stream ends or was idle.
/// What was written and has no answer then is dropped, which answers it as unknown.
async fn converse(
    queue: &mut mpsc::Receiver<Outgoing>,
    frames: &mpsc::Sender<wire::ProposeFrame>,
    mut answers: impl Stream<Item = Result<wire::ProposeAnswer, Status>> + Unpin,
) {
    let mut open = BTreeMap::new();
    let mut tag = 0;
    loop {
        tokio::select! {
            next = tokio::time::timeout(IDLE_TIMEOUT, queue.recv()), if open.len() < OUTSTANDING_MAX => {
                let Ok(Some(Outgoing { request, answer })) = next else {
                    if open.is_empty() { return } else { continue }
                };
                if answer.is_closed() {
                    continue;
                }
                tag += 1;
                open.insert(tag, answer);
                if frames.send(wire::ProposeFrame { tag, request: Some(request) }).await.is_err() {
                    return;
                }
            }
            answered = answers.next() => match answered {
                Some(Ok(answered)) => {
                    if let Some(answer) = open.remove(&answered.tag) {
                        // Who asked may have given up.
                        let _ = answer.send(reply_back(answered.reply.unwrap_or_default()));
                    }
                }
                Some(Err(_)) | None => return,
            },
        }
        if open.len() >= OUTSTANDING_MAX {
            open.retain(|_, answer: &mut oneshot::Sender<Answer>| !answer.is_closed());
        }
    }
}

/// What waits in the queue of a stream that has ended was never written.
fn refuse_rest(mut queue: mpsc::Receiver<Outgoing>) {
    queue.close();
    while let Ok(Outgoing { answer, .. }) = queue.try_recv() {
        let _ = answer.send(Answer::NotLeader(None));
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot::error::TryRecvError;

    use super::*;

    /// The near end of a stream whose far end is the test.
    struct Near {
        queue: mpsc::Sender<Outgoing>,
        written: mpsc::Receiver<wire::ProposeFrame>,
        answers: mpsc::Sender<Result<wire::ProposeAnswer, Status>>,
        ended: tokio::task::JoinHandle<()>,
    }

    impl Near {
        fn open() -> Self {
            let (queue, mut queued) = mpsc::channel(OUTSTANDING_MAX);
            let (frames, written) = mpsc::channel(2 * OUTSTANDING_MAX);
            let (answers, answered) = mpsc::channel(16);
            let ended = tokio::spawn(async move {
                converse(&mut queued, &frames, ReceiverStream::new(answered)).await;
                refuse_rest(queued);
            });
            Self { queue, written, answers, ended }
        }

        async fn propose(&self) -> oneshot::Receiver<Answer> {
            let (answer, answered) = oneshot::channel();
            self.queue.send(Outgoing { request: wire::ProposeRequest::default(), answer }).await.ok().unwrap();
            answered
        }

        async fn answer(&self, tag: u64) {
            let reply = Some(reply(Answer::Busy));
            self.answers.send(Ok(wire::ProposeAnswer { tag, reply })).await.unwrap();
        }

        /// What has been written when nothing more can happen by itself.
        async fn settled(&mut self) -> Vec<u64> {
            let mut tags = Vec::new();
            // Time stands still: this passes only when every task waits for something.
            tokio::time::sleep(Duration::from_millis(1)).await;
            while let Ok(frame) = self.written.try_recv() {
                tags.push(frame.tag);
            }
            tags
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_has_so_many_proposals_unanswered_and_those_given_up_do_not_count() {
        let mut stream = Near::open();
        let mut waiting = Vec::new();
        for _ in 0..OUTSTANDING_MAX + 3 {
            waiting.push(stream.propose().await);
        }
        assert_eq!(stream.settled().await.len(), OUTSTANDING_MAX);
        stream.answer(7).await;
        assert_eq!(stream.settled().await, [OUTSTANDING_MAX as u64 + 1], "one place, one more");
        assert!(matches!(waiting[6].try_recv(), Ok(Answer::Busy)));
        // Who gave up does not keep its place; that is seen at the next answer.
        drop(waiting.drain(..2));
        stream.answer(8).await;
        assert_eq!(stream.settled().await.len(), 2);
        assert!(!stream.ended.is_finished());
    }

    #[tokio::test(start_paused = true)]
    async fn an_idle_stream_ends_and_one_that_waits_for_an_answer_does_not() {
        let mut stream = Near::open();
        let waiting = stream.propose().await;
        assert_eq!(stream.settled().await, [1]);
        tokio::time::sleep(10 * IDLE_TIMEOUT).await;
        assert!(!stream.ended.is_finished(), "an answer is owed");
        stream.answer(1).await;
        assert!(matches!(waiting.await, Ok(Answer::Busy)));
        tokio::time::sleep(IDLE_TIMEOUT / 2).await;
        let _again = stream.propose().await;
        assert_eq!(stream.settled().await, [2]);
        stream.answer(2).await;
        tokio::time::sleep(IDLE_TIMEOUT * 3 / 4).await;
        assert!(!stream.ended.is_finished(), "it was used since");
        tokio::time::sleep(IDLE_TIMEOUT / 2).await;
        assert!(stream.ended.is_finished());
        assert!(stream.queue.is_closed(), "whoever comes next opens another");
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_written_to_a_stream_that_ends_is_unknown_and_what_was_not_is_not_applied() {
        let mut stream = Near::open();
        let mut waiting = Vec::new();
        for _ in 0..OUTSTANDING_MAX + 1 {
            waiting.push(stream.propose().await);
        }
        assert_eq!(stream.settled().await.len(), OUTSTANDING_MAX);
        let Near { answers, ended, .. } = stream;
        answers.send(Err(Status::unavailable("gone"))).await.unwrap();
        ended.await.unwrap();
        assert!(matches!(waiting.pop().unwrap().try_recv(), Ok(Answer::NotLeader(None))), "never written");
        for mut written in waiting {
            // `forward` answers a dropped one as unknown.
            assert!(matches!(written.try_recv(), Err(TryRecvError::Closed)));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_leader_reads_so_many_proposals_of_a_stream_ahead_and_answers_each_once() {
        let (send, frames) = mpsc::channel(2 * OUTSTANDING_MAX);
        let (answers, mut answered) = mpsc::channel(2 * OUTSTANDING_MAX);
        let gates = Arc::new(Mutex::new(BTreeMap::new()));
        let taken = gates.clone();
        let decide = move |frame: wire::ProposeFrame| {
            let (open, opened) = oneshot::channel::<()>();
            taken.lock().insert(frame.tag, open);
            async move {
                opened.await.map_err(|_| Status::cancelled("the test is over"))?;
                Ok(wire::ProposeAnswer { tag: frame.tag, reply: None })
            }
        };
        let serving = tokio::spawn(answer_all(ReceiverStream::new(frames), decide, answers));
        let frames = OUTSTANDING_MAX as u64 + 5;
        for tag in 1..=frames {
            send.send(Ok(wire::ProposeFrame { tag, request: None })).await.unwrap();
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
        assert_eq!(gates.lock().len(), OUTSTANDING_MAX, "the rest waits in the stream");
        // The third is decided first, and makes room for one more.
        gates.lock().remove(&3).unwrap().send(()).unwrap();
        assert_eq!(answered.recv().await.unwrap().unwrap().tag, 3);
        tokio::time::sleep(Duration::from_millis(1)).await;
        assert!(gates.lock().contains_key(&(OUTSTANDING_MAX as u64 + 1)));
        drop(send);
        let mut tags = vec![3];
        while tags.len() < frames as usize {
            let open = std::mem::take(&mut *gates.lock());
            open.into_values().for_each(|open| open.send(()).unwrap());
            tags.push(answered.recv().await.unwrap().unwrap().tag);
        }
        tags.sort_unstable();
        assert_eq!(tags, (1..=frames).collect::<Vec<_>>());
        serving.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_proposal_that_no_broker_of_ours_sends_ends_its_stream() {
        let (send, frames) = mpsc::channel(4);
        let (answers, mut answered) = mpsc::channel(4);
        let refuse = |_| async { Err(Status::permission_denied("the command names another proposer")) };
        let serving = tokio::spawn(answer_all(ReceiverStream::new(frames), refuse, answers));
        send.send(Ok(wire::ProposeFrame::default())).await.unwrap();
        serving.await.unwrap();
        assert_eq!(answered.recv().await.unwrap().unwrap_err().code(), tonic::Code::PermissionDenied);
        assert!(answered.recv().await.is_none());
    }
}
