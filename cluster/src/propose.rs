//! Proposals from any broker: a session of its own with the log, so that a retry is applied once.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use openraft::async_runtime::WatchReceiver as _;
use parking_lot::Mutex;
use selvedge_domain::command::Dedupe;
use selvedge_domain::{Actor, Asker, Body, Command, Credential, Id, Outcome, Rejected, RejectedCode, limits};
use selvedge_proto::peer as wire;
use tokio::time::Instant;

use crate::core::Core;
use crate::error::ProposeError;
use crate::leader::{Answer, BUSY_RETRY_AFTER_MS};
use crate::metrics::{PROPOSAL_SECONDS, PROPOSALS_TOTAL};
use crate::version;

/// Bytes of one encoded command.
pub const COMMAND_BYTES_MAX: usize = 8 << 20;
/// A proposal is retried for so long.
pub const PROPOSAL_TIMEOUT: Duration = Duration::from_secs(10);
/// Requests of this broker that may be open, counted from the oldest: fewer than the log keeps outcomes for.
pub const REQUESTS_OPEN_MAX: u64 = limits::DEDUPE_WINDOW / 2;
/// One attempt at a leader that does not answer.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(3);
/// One attempt at this broker's own queue, when it leads: longer than an entry may take to be answered.
const ENQUEUED_TIMEOUT: Duration = Duration::from_secs(8);
/// A proposal is retried for so long at leaders without room.
const NO_ROOM_TIMEOUT: Duration = Duration::from_secs(2);
const RETRY_MIN: Duration = Duration::from_millis(20);
const RETRY_MAX: Duration = Duration::from_millis(300);

/// What a proposal did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Done {
    /// Position of the log after it.
    pub position: Id,
    /// Ids of the objects that it made, in order.
    pub ids: Vec<Id>,
}

/// This broker's registration with the log.
#[derive(Default)]
pub(crate) struct Sessions {
    registering: tokio::sync::Mutex<()>,
    inner: Mutex<Session>,
}

#[derive(Default)]
struct Session {
    client: Option<Id>,
    last_seq: u64,
    open: BTreeSet<u64>,
}

/// An open request of the session; closes with it.
struct Slot<'a> {
    sessions: &'a Sessions,
    client: Id,
    seq: u64,
    acked_below: u64,
}

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        self.sessions.inner.lock().open.remove(&self.seq);
    }
}

impl Sessions {
    fn client(&self) -> Option<Id> {
        self.inner.lock().client
    }

    fn registered(&self, client: Id) {
        self.inner.lock().client = Some(client);
    }

    /// Forgets a registration that the log does not know any more.
    fn forget(&self, client: Id) {
        let mut inner = self.inner.lock();
        if inner.client == Some(client) {
            inner.client = None;
        }
    }

    fn open(&self, client: Id) -> Option<Slot<'_>> {
        let mut inner = self.inner.lock();
        let seq = inner.last_seq + 1;
        let acked_below = inner.open.first().copied().unwrap_or(seq);
        if seq - acked_below >= REQUESTS_OPEN_MAX {
            return None;
        }
        inner.last_seq = seq;
        inner.open.insert(seq);
        Some(Slot { sessions: self, client, seq, acked_below })
    }
}

impl Core {
    /// Proposes a command; returns once this broker has applied it.
    pub(crate) async fn propose(
        self: &Arc<Self>,
        asker: Asker,
        body: Body,
        idempotency: Option<[u8; 32]>,
    ) -> Result<Done, ProposeError> {
        let begun = Instant::now();
        let result = self.propose_until(asker, body, idempotency, begun + PROPOSAL_TIMEOUT).await;
        let outcome = match &result {
            Ok(_) => "done",
            Err(ProposeError::Refused(_)) => "refused",
            Err(ProposeError::Unknown) => "unknown",
            Err(ProposeError::Busy { .. }) => "busy",
            Err(ProposeError::NoRoom) => "no_room",
            Err(ProposeError::Unavailable) => "unavailable",
        };
        ::metrics::counter!(PROPOSALS_TOTAL, "outcome" => outcome).increment(1);
        ::metrics::histogram!(PROPOSAL_SECONDS).record(begun.elapsed());
        result
    }

    async fn propose_until(
        self: &Arc<Self>,
        asker: Asker,
        body: Body,
        idempotency: Option<[u8; 32]>,
        deadline: Instant,
    ) -> Result<Done, ProposeError> {
        if let Some(rejected) = version::too_early(&self.published.state(), &body) {
            return Err(ProposeError::Refused(rejected));
        }
        let mut command = Command::new(asker.actor, self.node, None, body);
        let mut again = true;
        let outcome = loop {
            let client = self.client(deadline).await?;
            let slot = self.sessions.open(client).ok_or(ProposeError::Busy { retry_after_ms: BUSY_RETRY_AFTER_MS })?;
            let (seq, acked_below) = (slot.seq, slot.acked_below);
            command.dedupe = Some(Dedupe { client: slot.client, seq, acked_below, idempotency });
            match self.submit(&command, asker.credential.as_ref(), deadline).await? {
                Outcome::Refused(Rejected { code: RejectedCode::DedupeUnknown, .. }) if again => {
                    // The registration expired: nothing was applied under it.
                    self.sessions.forget(client);
                    again = false;
                }
                Outcome::Refused(Rejected { code: RejectedCode::DedupeWindow, .. }) => {
                    return Err(ProposeError::Unknown);
                }
                outcome => break outcome,
            }
        };
        self.settle(outcome, deadline).await
    }

    /// Proposes the first command of a cluster, for which nobody can be registered.
    pub(crate) async fn propose_first(self: &Arc<Self>, body: Body) -> Result<Done, ProposeError> {
        let deadline = Instant::now() + PROPOSAL_TIMEOUT;
        let command = Command::new(Actor::BOOTSTRAP, self.node, None, body);
        let outcome = self.submit(&command, None, deadline).await?;
        self.settle(outcome, deadline).await
    }

    /// Waits until this broker sees its own write. It is committed: when that takes too long it is done all the same.
    async fn settle(&self, outcome: Outcome, deadline: Instant) -> Result<Done, ProposeError> {
        match outcome {
            Outcome::Done { position, ids } => {
                let applied = tokio::time::timeout_at(deadline, self.wait_applied(position)).await;
                if !matches!(applied, Ok(Ok(_))) {
                    tracing::warn!(%position, "a proposal is committed but not applied here yet");
                }
                Ok(Done { position, ids })
            }
            Outcome::Refused(rejected) => Err(ProposeError::Refused(rejected)),
        }
    }

    /// This broker's client id; registers it once a boot.
    async fn client(self: &Arc<Self>, deadline: Instant) -> Result<Id, ProposeError> {
        if let Some(client) = self.sessions.client() {
            return Ok(client);
        }
        let _one = self.sessions.registering.lock().await;
        if let Some(client) = self.sessions.client() {
            return Ok(client);
        }
        let body = Body::RegisterClient { boot: self.boot };
        let command = Command::new(Actor::BROKER, self.node, None, body);
        // Registering the same boot twice answers the same client.
        let registered = self.submit(&command, None, deadline).await.map_err(|error| match error {
            ProposeError::Unknown => ProposeError::Unavailable,
            other => other,
        })?;
        match registered {
            Outcome::Done { ids, .. } => {
                let client = ids.first().copied().ok_or(ProposeError::Unavailable)?;
                self.sessions.registered(client);
                Ok(client)
            }
            Outcome::Refused(rejected) => Err(ProposeError::Refused(rejected)),
        }
    }

    /// Brings a command to the leader until it is answered.
    async fn submit(
        self: &Arc<Self>,
        command: &Command,
        credential: Option<&Credential>,
        mut deadline: Instant,
    ) -> Result<Outcome, ProposeError> {
        let bytes = Bytes::from(command.encode());
        if bytes.len() > COMMAND_BYTES_MAX {
            let message = format!("a command has at most {COMMAND_BYTES_MAX} bytes");
            return Err(ProposeError::Refused(Rejected::new(RejectedCode::Limit, message)));
        }
        let begun = Instant::now();
        let mut maybe_applied = false;
        let (mut busy, mut no_room) = (false, false);
        let mut retry = RETRY_MIN;
        let mut hint = None;
        loop {
            if no_room {
                // Whoever has room leads soon, if there is one.
                deadline = deadline.min(begun + NO_ROOM_TIMEOUT);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || self.stop.is_cancelled() {
                break;
            }
            let leader = hint.take().or_else(|| self.leader());
            let answer = match leader {
                None => Answer::NotLeader(None),
                Some(leader) if leader == self.node => {
                    let answer = self.enqueue(command, credential, bytes.clone());
                    tokio::time::timeout(left.min(ENQUEUED_TIMEOUT), answer).await.unwrap_or(Answer::Unknown)
                }
                Some(leader) => {
                    let credential = credential.map(|credential| credential.reveal().to_owned()).unwrap_or_default();
                    let request = wire::ProposeRequest { command: bytes.clone(), credential };
                    self.forward(leader, request, left.min(ATTEMPT_TIMEOUT)).await
                }
            };
            match answer {
                Answer::Outcome(outcome) => return Ok(outcome),
                Answer::NotLeader(leader) => hint = leader.filter(|leader| *leader != self.node),
                Answer::Busy => busy = true,
                Answer::NoRoom => no_room = true,
                Answer::Unknown => maybe_applied = true,
            }
            // A hint that the local view does not share is followed at once, but only a few times in a row.
            let pause = if hint.is_some() && retry == RETRY_MIN { Duration::ZERO } else { retry };
            let left = deadline.saturating_duration_since(Instant::now());
            if self.pause(pause.min(left)).await.is_err() {
                break;
            }
            retry = (retry * 2).min(RETRY_MAX);
        }
        Err(match (maybe_applied, no_room, busy) {
            (true, _, _) => ProposeError::Unknown,
            (false, true, _) => ProposeError::NoRoom,
            (false, false, true) => ProposeError::Busy { retry_after_ms: BUSY_RETRY_AFTER_MS },
            (false, false, false) => ProposeError::Unavailable,
        })
    }

    /// Returns when this broker knows another leader than this one.
    pub(crate) async fn led_by_another(&self, leader: u64) {
        let mut metrics = self.raft.server_metrics();
        loop {
            if metrics.borrow_watched().current_leader.is_some_and(|other| other != leader) {
                return;
            }
            if metrics.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_open_request_bounds_how_many_may_be_open() {
        let sessions = Sessions::default();
        let client = Id::new(1, 5);
        let oldest = sessions.open(client).unwrap();
        assert_eq!((oldest.seq, oldest.acked_below), (1, 1));
        for seq in 2..=REQUESTS_OPEN_MAX {
            let slot = sessions.open(client).unwrap();
            assert_eq!((slot.seq, slot.acked_below), (seq, 1));
        }
        assert!(sessions.open(client).is_none(), "outcomes beyond the window would be forgotten");
        drop(oldest);
        let slot = sessions.open(client).unwrap();
        assert_eq!(slot.acked_below, slot.seq, "nothing else is open");
    }
}
