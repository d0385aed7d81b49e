//! Reads that need a quorum: linearizable states, the freshness lease, and who may hold one.

use std::sync::Arc;
use std::time::Duration;

use openraft::errors::{LinearizableReadError, RaftError};
use openraft::{LinearizerOption, ReadPolicy};
use parking_lot::Mutex;
use selvedge_domain::{Id, State};
use selvedge_proto::peer as wire;
use tokio::sync::oneshot;
use tokio::time::Instant;
use tonic::Request;

use crate::core::Core;
use crate::dial::Purpose;
use crate::error::Error;
use crate::metrics::LEASE_RENEWALS_TOTAL;

const RETRY_INTERVAL: Duration = Duration::from_millis(30);
/// One attempt at a leader that does not answer.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(2);
/// A round of asking for reads ends after so long.
const ROUND_TIMEOUT: Duration = Duration::from_secs(5);
/// Renewals of the freshness lease are no closer together.
pub const RENEW_INTERVAL_MIN: Duration = Duration::from_millis(250);

/// How a state is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// As this broker has it.
    Local,
    /// With everything that was committed before the call.
    Linearizable,
}

/// A state that was read.
pub struct Read {
    /// The state.
    pub state: Arc<State>,
    /// Nothing that was committed longer ago is missing in it; none on a broker that never asked a leader.
    /// **Units**: milliseconds.
    pub age_ms: Option<u64>,
}

/// Why this broker does not know a read index.
#[derive(Debug)]
pub(crate) enum NoReadIndex {
    NotLeader(Option<u64>),
    NoQuorum,
}

/// Linearizable reads that wait for a read index.
#[derive(Default)]
pub(crate) struct Rounds {
    inner: Mutex<Waiting>,
}

#[derive(Default)]
struct Waiting {
    waiting: Vec<oneshot::Sender<Option<u64>>>,
    running: bool,
}

impl Rounds {
    /// Waits for the next round; whether the caller is the one to [`Rounds::run`].
    fn join(&self) -> (oneshot::Receiver<Option<u64>>, bool) {
        let (answer, answered) = oneshot::channel();
        let mut inner = self.inner.lock();
        inner.waiting.push(answer);
        (answered, !std::mem::replace(&mut inner.running, true))
    }

    /// Asks once for all who wait, again for those who came meanwhile, and ends when nobody waits.
    async fn run<A: Future<Output = Option<u64>>>(&self, ask: impl Fn() -> A) {
        while let Some(waiting) = self.next() {
            let index = ask().await;
            for answer in waiting {
                // Who asked may have given up.
                let _ = answer.send(index);
            }
        }
    }

    /// Who waits for the next round; none ends the asking.
    fn next(&self) -> Option<Vec<oneshot::Sender<Option<u64>>>> {
        let mut inner = self.inner.lock();
        inner.running = !inner.waiting.is_empty();
        inner.running.then(|| std::mem::take(&mut inner.waiting))
    }
}

impl Core {
    /// The index that a read must wait for, as the leader that this broker must be.
    pub(crate) async fn read_index_here(&self) -> Result<u64, NoReadIndex> {
        let option = LinearizerOption::from(ReadPolicy::ReadIndex);
        match self.raft.get_read_log_id(option).await {
            Ok((read, _)) => Ok(read.index()),
            Err(RaftError::APIError(LinearizableReadError::ForwardToLeader(to))) => {
                Err(NoReadIndex::NotLeader(to.leader_id.filter(|leader| *leader != self.node)))
            }
            Err(RaftError::APIError(LinearizableReadError::QuorumNotEnough(_)) | RaftError::Fatal(_)) => {
                Err(NoReadIndex::NoQuorum)
            }
        }
    }

    /// The same, for a node's lease.
    pub(crate) async fn lease_index_here(&self, node: u64) -> Result<u64, NoReadIndex> {
        if self.waits() {
            return Err(NoReadIndex::NoQuorum);
        }
        self.note_holder(node);
        self.read_index_here().await
    }

    async fn read_index_from(&self, leader: u64, for_lease: bool, timeout: Duration) -> Result<u64, NoReadIndex> {
        if leader == self.node {
            let read =
                async { if for_lease { self.lease_index_here(self.node).await } else { self.read_index_here().await } };
            let read = tokio::time::timeout(timeout, read).await;
            return read.unwrap_or(Err(NoReadIndex::NoQuorum));
        }
        let mut request = Request::new(wire::ReadIndexRequest { for_lease });
        request.set_timeout(timeout);
        let mut client = self.peer_client(leader, Purpose::Control);
        use wire::read_index_reply::Result as Reply;
        let answer = tokio::select! {
            answer = tokio::time::timeout(timeout, client.read_index(request)) => answer,
            // The old leader may be gone without a word.
            () = self.led_by_another(leader) => return Err(NoReadIndex::NoQuorum),
        };
        match answer {
            Ok(Ok(reply)) => match reply.into_inner().result {
                Some(Reply::Index(index)) => Ok(index),
                Some(Reply::NotLeader(not)) => Err(NoReadIndex::NotLeader((not.leader != 0).then_some(not.leader))),
                Some(Reply::NoQuorum(_)) | None => Err(NoReadIndex::NoQuorum),
            },
            Ok(Err(_)) | Err(_) => Err(NoReadIndex::NoQuorum),
        }
    }

    /// Asks whoever leads until it answers.
    async fn read_index(&self, for_lease: bool, deadline: Instant) -> Result<u64, Error> {
        let mut hint = None;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::Unavailable);
            }
            if let Some(leader) = hint.take().or_else(|| self.leader()) {
                match self.read_index_from(leader, for_lease, left.min(ATTEMPT_TIMEOUT)).await {
                    Ok(index) => return Ok(index),
                    Err(NoReadIndex::NotLeader(leader)) => hint = leader.filter(|leader| *leader != self.node),
                    Err(NoReadIndex::NoQuorum) => {}
                }
            }
            self.pause(RETRY_INTERVAL).await.map_err(|_| Error::Unavailable)?;
        }
    }

    /// One round of asking for reads.
    async fn ask(&self) -> Option<u64> {
        self.read_index(false, Instant::now() + ROUND_TIMEOUT).await.ok()
    }

    /// A read index that was asked for after this call; calls that wait at the same time share the asking.
    async fn shared_read_index(self: &Arc<Self>) -> Result<u64, Error> {
        let (answered, first) = self.rounds.join();
        if first {
            let core = self.clone();
            self.tasks.spawn(async move { core.rounds.run(|| core.ask()).await });
        }
        answered.await.ok().flatten().ok_or(Error::Unavailable)
    }

    /// A state that holds everything that was committed before the call.
    pub(crate) async fn linearizable(self: &Arc<Self>, wait: Duration) -> Result<Arc<State>, Error> {
        let deadline = Instant::now() + wait;
        let index = loop {
            match tokio::time::timeout_at(deadline, self.shared_read_index()).await {
                Ok(Ok(index)) => break index,
                // The round gave up before this call does.
                Ok(Err(_)) => self.pause(RETRY_INTERVAL).await.map_err(|_| Error::Unavailable)?,
                Err(_) => return Err(Error::Unavailable),
            }
        };
        let mut applied = self.published.applied();
        let reached = applied.wait_for(|next| *next > index);
        let reached = tokio::time::timeout_at(deadline, reached).await.map_err(|_| Error::TimedOut)?;
        reached.map_err(|_| Error::Unavailable)?;
        Ok(self.published.state())
    }

    /// A state that is no older than `seen`, for a caller that has seen it.
    ///
    /// **Errors**: [`Error::Reset`] when that was in an epoch that is over, [`Error::Behind`] when this broker does not
    /// get that far within `wait`.
    pub(crate) async fn read(self: &Arc<Self>, mode: Mode, seen: Option<Id>, wait: Duration) -> Result<Read, Error> {
        let (begun_ms, deadline) = (self.clock.boottime_ms(), Instant::now() + wait);
        // Before the state, which may be newer by then.
        let asked_ms = match mode {
            Mode::Local => self.lease.asked_ms(),
            Mode::Linearizable => Some(begun_ms),
        };
        let mut state = match mode {
            Mode::Local => self.published.state(),
            Mode::Linearizable => self.linearizable(wait).await?,
        };
        if let Some(seen) = seen {
            let position = state.position();
            if seen.epoch < position.epoch {
                return Err(Error::Reset { position });
            }
            let applied = tokio::time::timeout_at(deadline, self.wait_applied(seen)).await;
            state = applied.map_err(|_| Error::Behind { position, seen })??;
        }
        let age_ms = asked_ms.map(|asked_ms| self.clock.boottime_ms().saturating_sub(asked_ms));
        Ok(Read { state, age_ms })
    }

    /// Who may hold a lease, as the leader knows.
    pub(crate) async fn holders(&self, deadline: Instant) -> Result<Vec<(u64, bool)>, Error> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::Unavailable);
            }
            match self.leader() {
                Some(leader) if leader == self.node => {
                    if matches!(tokio::time::timeout(left, self.read_index_here()).await, Ok(Ok(_))) {
                        return Ok(self.known_holders());
                    }
                }
                Some(leader) => {
                    let timeout = left.min(ATTEMPT_TIMEOUT);
                    let mut request = Request::new(wire::HoldersRequest {});
                    request.set_timeout(timeout);
                    let mut client = self.peer_client(leader, Purpose::Control);
                    if let Ok(Ok(reply)) = tokio::time::timeout(timeout, client.holders(request)).await
                        && let Some(wire::holders_reply::Result::Holders(holders)) = reply.into_inner().result
                    {
                        return Ok(holders.holders.into_iter().map(|holder| (holder.node, holder.may_hold)).collect());
                    }
                }
                None => {}
            }
            self.pause(RETRY_INTERVAL).await.map_err(|_| Error::Unavailable)?;
        }
    }

    /// One renewal: notes the time, asks the leader, and waits until that is enforced here.
    async fn renew_once(&self) -> Result<(), Error> {
        self.lease
            .renew_by(async {
                let lease_ms = self.lease_ms();
                let deadline = Instant::now() + Duration::from_millis(lease_ms / 2);
                let index = self.read_index(true, deadline).await?;
                let mut enforced = self.enforced.subscribe();
                let reached = enforced.wait_for(|next| *next > index);
                let reached = tokio::time::timeout_at(deadline, reached).await.map_err(|_| Error::TimedOut)?;
                reached.map_err(|_| Error::Unavailable)?;
                // A lease that was shortened meanwhile is in what was just enforced.
                Ok(lease_ms.min(self.lease_ms()))
            })
            .await
    }
}

/// Keeps the freshness lease.
pub(crate) async fn keep_lease(core: Arc<Core>) {
    if core.leases_from_ms != 0 {
        let wait = Duration::from_millis(core.leases_from_ms.saturating_sub(core.clock.boottime_ms()));
        tracing::info!(seconds = wait.as_secs(), "this epoch has begun; leases of the one before it run out first");
        while core.waits() {
            if core.pause(RETRY_INTERVAL).await.is_err() {
                return;
            }
        }
        if let Err(error) = core.has_waited().await {
            tracing::warn!(%error, "the next start of this broker waits again");
        }
    }
    loop {
        let interval = RENEW_INTERVAL_MIN.max(Duration::from_millis(core.lease_ms() / 4));
        let renewed = tokio::select! {
            () = core.stop.cancelled() => return,
            renewed = core.renew_once() => renewed,
        };
        let outcome = match &renewed {
            Ok(()) => "renewed",
            Err(error) => {
                tracing::debug!(%error, left_ms = core.lease.left_ms(), "the freshness lease was not renewed");
                "failed"
            }
        };
        ::metrics::counter!(LEASE_RENEWALS_TOTAL, "outcome" => outcome).increment(1);
        let pause = if renewed.is_ok() { interval } else { RETRY_INTERVAL };
        tokio::select! {
            () = core.stop.cancelled() => return,
            () = tokio::time::sleep(pause) => {}
            () = core.lease.wanted(), if renewed.is_ok() => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use tokio::sync::Semaphore;

    use super::*;

    /// A leader that answers the n-th asking with n, each when it is let.
    #[derive(Default)]
    struct Leader {
        asked: AtomicU64,
        let_answer: Option<Arc<Semaphore>>,
    }

    impl Leader {
        async fn ask(&self) -> Option<u64> {
            let number = self.asked.fetch_add(1, Ordering::SeqCst) + 1;
            self.let_answer.as_ref()?.acquire().await.ok()?.forget();
            Some(number)
        }
    }

    fn ready(answered: &mut oneshot::Receiver<Option<u64>>) -> Option<u64> {
        answered.try_recv().ok().flatten()
    }

    #[tokio::test]
    async fn reads_share_a_round_but_only_one_that_is_sent_after_they_arrived() {
        let (rounds, answers) = (Arc::new(Rounds::default()), Arc::new(Semaphore::new(0)));
        let leader = Arc::new(Leader { let_answer: Some(answers.clone()), ..Leader::default() });
        let (mut early, first) = rounds.join();
        assert!(first, "nobody asks yet");
        let (running, asked) = (rounds.clone(), leader.clone());
        let asking = tokio::spawn(async move { running.run(|| asked.ask()).await });
        while leader.asked.load(Ordering::SeqCst) == 0 {
            tokio::task::yield_now().await;
        }
        // The question is on its way: what is answered to it may be older than these reads.
        let mut late: Vec<_> = (0..10).map(|_| rounds.join()).collect();
        assert!(late.iter().all(|(_, first)| !first), "somebody asks already");
        answers.add_permits(1);
        while leader.asked.load(Ordering::SeqCst) == 1 {
            tokio::task::yield_now().await;
        }
        assert_eq!(ready(&mut early), Some(1));
        assert!(late.iter_mut().all(|(answered, _)| ready(answered).is_none()), "the first answer is not theirs");
        answers.add_permits(1);
        asking.await.unwrap();
        assert!(late.iter_mut().all(|(answered, _)| ready(answered) == Some(2)), "one question for all of them");
        assert_eq!(leader.asked.load(Ordering::SeqCst), 2, "and none when nobody waits");
        assert!(rounds.join().1, "the next read asks again");
    }

    #[tokio::test]
    async fn a_round_without_an_answer_fails_those_that_waited_for_it_and_no_others() {
        let rounds = Rounds::default();
        let (mut waiting, _) = rounds.join();
        let silent = Leader::default();
        rounds.run(|| silent.ask()).await;
        assert_eq!(waiting.try_recv().unwrap(), None);
        let (mut next, first) = rounds.join();
        assert!(first);
        rounds.run(|| async { Some(9) }).await;
        assert_eq!(ready(&mut next), Some(9));
    }
}
