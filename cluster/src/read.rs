//! Reads that need a quorum: linearizable states, the freshness lease, and who may hold one.

use std::sync::Arc;
use std::time::Duration;

use openraft::errors::{LinearizableReadError, RaftError};
use openraft::{LinearizerOption, ReadPolicy};
use parking_lot::Mutex;
use selvedge_domain::State;
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
/// One round of asking for reads.
const ROUND_TIMEOUT: Duration = Duration::from_secs(5);
/// Renewals of the freshness lease are no closer together.
pub const RENEW_INTERVAL_MIN: Duration = Duration::from_millis(250);

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

    async fn read_index_from(&self, leader: u64, for_lease: bool, timeout: Duration) -> Result<u64, NoReadIndex> {
        if leader == self.node {
            if for_lease {
                self.note_holder(self.node);
            }
            let read = tokio::time::timeout(timeout, self.read_index_here()).await;
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

    /// A read index that was asked for after this call; calls that wait at the same time share the asking.
    async fn shared_read_index(self: &Arc<Self>) -> Result<u64, Error> {
        let (answer, answered) = oneshot::channel();
        let first = {
            let mut rounds = self.rounds.inner.lock();
            rounds.waiting.push(answer);
            !std::mem::replace(&mut rounds.running, true)
        };
        if first {
            let core = self.clone();
            self.tasks.spawn(async move {
                while let Some(waiting) = core.rounds.next() {
                    let index = core.read_index(false, Instant::now() + ROUND_TIMEOUT).await;
                    for answer in waiting {
                        // Who asked may have given up.
                        let _ = answer.send(index.as_ref().ok().copied());
                    }
                }
            });
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
