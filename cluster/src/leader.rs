//! What only the leader does: puts commands into entries, stamps them with cluster time, and knows who may hold a lease.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use openraft::errors::ClientWriteError;
use openraft::impls::ProgressResponder;
use prost::Message as _;
use selvedge_domain::{Actor, ActorKind, Body, Command, Credential, Outcome, Rejected, RejectedCode};
use selvedge_proto::peer as wire;
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::Instant;
use tonic::Request;

use crate::core::{Core, NoWrites};
use crate::dial::Purpose;
use crate::lease::surely_over_ms;
use crate::metrics::{CLOCK_OFFSET_MS, CREDENTIALS_REFUSED_TOTAL, ENTRY_COMMANDS, QUEUE_COMMANDS};
use crate::raft_types::Batch;

/// Commands that may wait on the leader; further ones are answered busy.
pub const QUEUE_COMMANDS_MAX: usize = 4_096;
/// Commands in one entry.
pub const ENTRY_COMMANDS_MAX: usize = 1_024;
/// Bytes of commands in one entry; a single larger command has an entry of its own.
pub const ENTRY_BYTES_MAX: usize = 1 << 20;
/// Entries of commands that are not yet answered.
pub const ENTRIES_IN_FLIGHT_MAX: usize = 4;
/// When to try again, told to who is answered busy.
pub(crate) const BUSY_RETRY_AFTER_MS: u64 = 100;
/// After so long an entry's commands are answered *unknown*, and block none behind it.
const ENTRY_TIMEOUT: Duration = Duration::from_secs(5);
/// Without anything to write, time moves by a tick.
pub const TICK_INTERVAL: Duration = Duration::from_secs(10);
/// A leader whose clock is further from the median does not stamp.
pub const CLOCK_OFFSET_MS_MAX: u64 = 30_000;
/// Cluster time does not step forward by more within a boot.
pub const TIME_STEP_MS_MAX: u64 = 3_600_000;
/// A credential that is not known to this leader is looked up once more within.
const VERIFY_WAIT: Duration = Duration::from_secs(2);
const CLOCKS_INTERVAL: Duration = Duration::from_secs(2);
const CLOCKS_TIMEOUT: Duration = Duration::from_secs(1);
/// An older measurement of another clock does not count.
const CLOCK_AGE_MS_MAX: u64 = 30_000;

/// A command that waits to be put into an entry.
pub(crate) struct Pending {
    /// In an entry of its own: what is decided after it is decided by other rules.
    pub(crate) alone: bool,
    pub(crate) command: Bytes,
    pub(crate) answer: oneshot::Sender<Answer>,
}

/// What became of it.
#[derive(Debug)]
pub(crate) enum Answer {
    Outcome(Outcome),
    /// Certainly not applied.
    NotLeader(Option<u64>),
    /// Certainly not applied.
    Busy,
    /// Certainly not applied: a disk of the leader is nearly full.
    NoRoom,
    /// May be applied, now or later.
    Unknown,
}

/// Puts commands into entries, in order.
pub(crate) async fn batch(core: Arc<Core>, mut queue: mpsc::Receiver<Pending>) {
    let flights = Arc::new(Semaphore::new(ENTRIES_IN_FLIGHT_MAX));
    let mut held = None;
    loop {
        let first = match held.take() {
            Some(first) => first,
            None => tokio::select! {
                () = core.stop.cancelled() => return,
                next = queue.recv() => match next {
                    Some(next) => next,
                    None => return,
                },
            },
        };
        let flight = tokio::select! {
            () = core.stop.cancelled() => return,
            flight = flights.clone().acquire_owned() => match flight {
                Ok(flight) => flight,
                Err(_) => return,
            },
        };
        let batch;
        (batch, held) = gather(first, &mut queue);
        ::metrics::gauge!(QUEUE_COMMANDS).set(queue.len() as f64);
        let Some(time_ms) = stamp(&core) else {
            hand_over(&core).await;
            for pending in batch {
                // Whoever asked may have given up.
                let _ = pending.answer.send(Answer::NotLeader(None));
            }
            continue;
        };
        ::metrics::histogram!(ENTRY_COMMANDS).record(batch.len() as f64);
        let (commands, answers): (Vec<_>, Vec<_>) =
            batch.into_iter().map(|pending| (pending.command, pending.answer)).unzip();
        let entry = Batch(wire::Batch { time_ms, commands }.encode_to_vec().into());
        let (responder, written) = ProgressResponder::complete_only();
        if core.raft.client_write_ff(entry, Some(responder)).await.is_err() {
            answer_all(answers, || Answer::Unknown);
            continue;
        }
        core.tasks.spawn(async move {
            match tokio::time::timeout(ENTRY_TIMEOUT, written).await {
                Ok(Ok(Ok(response))) => {
                    for (answer, outcome) in answers.into_iter().zip(response.data) {
                        let _ = answer.send(Answer::Outcome(outcome));
                    }
                }
                Ok(Ok(Err(ClientWriteError::ForwardToLeader(to)))) => {
                    answer_all(answers, || Answer::NotLeader(to.leader_id));
                }
                Ok(Ok(Err(_)) | Err(_)) | Err(_) => answer_all(answers, || Answer::Unknown),
            }
            drop(flight);
        });
    }
}

/// The commands of one entry, in the order in which they came, and the next one when it does not fit.
fn gather(first: Pending, queue: &mut mpsc::Receiver<Pending>) -> (Vec<Pending>, Option<Pending>) {
    let mut bytes = first.command.len();
    let alone = first.alone;
    let mut batch = vec![first];
    while batch.len() < ENTRY_COMMANDS_MAX && bytes < ENTRY_BYTES_MAX && !alone {
        let Ok(next) = queue.try_recv() else { break };
        if next.alone || bytes + next.command.len() > ENTRY_BYTES_MAX {
            return (batch, Some(next));
        }
        bytes += next.command.len();
        batch.push(next);
    }
    (batch, None)
}

fn answer_all(answers: Vec<oneshot::Sender<Answer>>, with: impl Fn() -> Answer) {
    for answer in answers {
        let _ = answer.send(with());
    }
}

impl Core {
    /// Puts a command into this broker's queue, as its leader, once its actor has proven to be who it says.
    pub(crate) async fn enqueue(
        self: &Arc<Self>,
        command: &Command,
        credential: Option<&Credential>,
        bytes: Bytes,
    ) -> Answer {
        if !self.leads() {
            return Answer::NotLeader(self.leader().filter(|leader| *leader != self.node));
        }
        match *self.closed_to_writes.lock() {
            Some(NoWrites::NoRoom) => return Answer::NoRoom,
            Some(NoWrites::Stalled) => return Answer::Busy,
            None => {}
        }
        match self.verify(&command.actor, credential).await {
            Ok(true) => {}
            Ok(false) => {
                ::metrics::counter!(CREDENTIALS_REFUSED_TOTAL).increment(1);
                let message = "the credential is not known, was revoked, or is somebody else's";
                return Answer::Outcome(Outcome::Refused(Rejected::new(RejectedCode::Unauthenticated, message)));
            }
            Err(answer) => return answer,
        }
        if let Some(rejected) = self.held_back(command) {
            return Answer::Outcome(Outcome::Refused(rejected));
        }
        let (answer, answered) = oneshot::channel();
        let alone = matches!(command.body, Body::RaiseMinVersion { .. });
        match self.queue.try_send(Pending { alone, command: bytes, answer }) {
            Ok(()) => answered.await.unwrap_or(Answer::Unknown),
            Err(_) => Answer::Busy,
        }
    }
}

impl Core {
    /// Whether a credential stands for this actor, in a state that holds everything committed before.
    async fn verify(self: &Arc<Self>, actor: &Actor, credential: Option<&Credential>) -> Result<bool, Answer> {
        if matches!(actor.kind, ActorKind::Broker | ActorKind::Bootstrap) {
            return Ok(credential.is_none());
        }
        let Some(credential) = credential else { return Ok(false) };
        if credential.actor(&self.published.state()).as_ref() == Some(actor) {
            return Ok(true);
        }
        // One that leads since a moment ago may not have applied yet what made the credential.
        let state = self.linearizable(VERIFY_WAIT).await.map_err(|_| Answer::NotLeader(None))?;
        Ok(credential.actor(&state).as_ref() == Some(actor))
    }
}

/// The time of a new entry; none when this broker's clock must not give it.
fn stamp(core: &Core) -> Option<u64> {
    let wall_ms = core.clock.wall_ms();
    let now_ms = core.published.now_ms();
    let last_ms = core.published.state().time_ms();
    let median = core.clocks.lock().median_offset(core.node, &core.voters(), core.clock.boottime_ms());
    let time_ms = match median {
        Some(offset_ms) => {
            ::metrics::gauge!(CLOCK_OFFSET_MS).set(offset_ms as f64);
            if offset_ms.unsigned_abs() > CLOCK_OFFSET_MS_MAX {
                return None;
            }
            wall_ms.saturating_add_signed(offset_ms)
        }
        // Not enough other clocks were read since this broker leads.
        None => now_ms,
    };
    let time_ms = if core.published.time().is_of_this_boot() && time_ms > now_ms + TIME_STEP_MS_MAX {
        tracing::warn!(step_ms = time_ms - now_ms, "the voters' clocks stepped forward; cluster time does not follow");
        now_ms
    } else {
        time_ms
    };
    Some(time_ms.max(last_ms))
}

async fn hand_over(core: &Core) {
    tracing::warn!("this leader's wall clock is more than 30 s from the voters' median; handing leadership over");
    if let Err(error) = crate::membership::transfer(core, None).await {
        tracing::warn!(%error, "leadership cannot be handed over");
    }
}

/// Wall clocks of other voters, as differences from ours.
#[derive(Default)]
pub(crate) struct PeerClocks {
    /// Difference, and when it was measured on our boottime.
    offsets: BTreeMap<u64, (i64, u64)>,
}

impl PeerClocks {
    /// How far the median of the voters' clocks is from ours; none when fewer than a majority are known.
    fn median_offset(&self, own: u64, voters: &[u64], now_ms: u64) -> Option<i64> {
        let mut offsets: Vec<i64> = voters
            .iter()
            .filter_map(|voter| {
                if *voter == own {
                    return Some(0);
                }
                let (offset_ms, at_ms) = self.offsets.get(voter)?;
                (now_ms < at_ms + CLOCK_AGE_MS_MAX).then_some(*offset_ms)
            })
            .collect();
        if offsets.len() <= voters.len() / 2 {
            return None;
        }
        offsets.sort_unstable();
        offsets.get((offsets.len() - 1) / 2).copied()
    }
}

/// Reads the other voters' clocks while this broker leads, and moves time when nothing else does.
pub(crate) async fn keep_time(core: Arc<Core>) {
    let mut last_time_ms = 0;
    let mut moved = Instant::now();
    let mut read = None::<Instant>;
    while core.pause(Duration::from_millis(200)).await.is_ok() {
        if !core.leads() {
            read = None;
            continue;
        }
        if read.is_none_or(|at| at.elapsed() >= CLOCKS_INTERVAL) {
            read = Some(Instant::now());
            for voter in core.voters().into_iter().filter(|voter| *voter != core.node) {
                core.tasks.spawn(read_clock(core.clone(), voter));
            }
        }
        let time_ms = core.published.state().time_ms();
        if time_ms != last_time_ms {
            (last_time_ms, moved) = (time_ms, Instant::now());
        } else if moved.elapsed() >= TICK_INTERVAL && core.published.state().cluster().is_some() {
            moved = Instant::now();
            let command = Command::new(Actor::BROKER, core.node, None, Body::Tick);
            let core = core.clone();
            core.tasks.clone().spawn(async move {
                let answer = core.enqueue(&command, None, command.encode().into()).await;
                tracing::trace!(?answer, "tick");
            });
        }
    }
}

async fn read_clock(core: Arc<Core>, voter: u64) {
    let mut request = Request::new(wire::ClockRequest {});
    request.set_timeout(CLOCKS_TIMEOUT);
    let (wall_ms, begun_ms) = (core.clock.wall_ms(), core.clock.boottime_ms());
    let mut client = core.peer_client(voter, Purpose::Control);
    let Ok(Ok(reply)) = tokio::time::timeout(CLOCKS_TIMEOUT, client.clock(request)).await else { return };
    let now_ms = core.clock.boottime_ms();
    let ours_ms = wall_ms + (now_ms - begun_ms) / 2;
    let offset_ms = i64::try_from(i128::from(reply.into_inner().wall_ms) - i128::from(ours_ms)).unwrap_or(i64::MAX);
    core.clocks.lock().offsets.insert(voter, (offset_ms, now_ms));
}

/// Who asked this broker for a read index for its lease, and since when it leads.
#[derive(Default)]
pub(crate) struct Holders {
    /// The newest term that this broker was seen to lead, and when it was first seen to.
    led: Option<(u64, u64)>,
    asked: BTreeMap<u64, u64>,
}

impl Holders {
    /// This broker leads a term.
    fn lead(&mut self, term: u64, now_ms: u64) {
        if self.led.is_none_or(|(led, _)| led != term) {
            self.led = Some((term, now_ms));
        }
    }

    /// Whether a node may hold a lease: until this broker led, it may have had one from another.
    fn may_hold(&self, node: u64, now_ms: u64, over_ms: u64) -> bool {
        let since_ms = self.led.map_or(now_ms, |(_, since_ms)| since_ms);
        let last_ms = self.asked.get(&node).copied().unwrap_or_default().max(since_ms);
        now_ms < last_ms + over_ms
    }
}

impl Core {
    /// Notes that a node asks for a read index for its lease. Called before the quorum is asked.
    pub(crate) fn note_holder(&self, node: u64) {
        let (metrics, now_ms) = (self.metrics(), self.clock.boottime_ms());
        let mut holders = self.holders.lock();
        if metrics.state.is_leader() {
            holders.lead(metrics.current_term, now_ms);
        }
        holders.asked.insert(node, now_ms);
    }

    /// Who may hold a lease now, as this leader knows. The caller has made sure that it leads.
    pub(crate) fn known_holders(&self) -> Vec<(u64, bool)> {
        let (metrics, now_ms) = (self.metrics(), self.clock.boottime_ms());
        let over_ms = surely_over_ms(self.longest_lease_ms());
        let mut counted = self.counted();
        let mut holders = self.holders.lock();
        if metrics.state.is_leader() {
            holders.lead(metrics.current_term, now_ms);
        } else {
            // It does not any more.
            holders.led = None;
        }
        holders.asked.retain(|_, at_ms| now_ms < *at_ms + over_ms);
        counted.extend(holders.asked.keys());
        counted.sort_unstable();
        counted.dedup();
        counted.into_iter().map(|node| (node, holders.may_hold(node, now_ms, over_ms))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_asked_before_this_broker_led_may_have_a_lease_from_whoever_led_then() {
        let mut holders = Holders::default();
        assert!(holders.may_hold(2, 5_000, 100), "a broker that does not lead knows nothing");
        holders.asked.insert(2, 1_000);
        holders.lead(7, 1_900);
        assert!(holders.may_hold(2, 1_999, 100), "it asked again, somewhere else");
        assert!(!holders.may_hold(2, 2_000, 100) && !holders.may_hold(3, 2_000, 100));
        holders.asked.insert(2, 2_500);
        holders.lead(7, 2_590);
        assert!(holders.may_hold(2, 2_599, 100) && !holders.may_hold(3, 2_599, 100), "the same term began once");
        holders.lead(9, 2_590);
        assert!(holders.may_hold(3, 2_599, 100), "another led in between");
    }

    #[test]
    fn an_entry_is_bounded_and_a_raise_of_the_version_has_one_of_its_own() {
        let pending = |bytes: usize, alone| {
            let (answer, _) = oneshot::channel();
            Pending { alone, command: vec![0; bytes].into(), answer }
        };
        let (send, mut queue) = mpsc::channel(2 * ENTRY_COMMANDS_MAX);
        let mut entries = |waiting: Vec<Pending>| {
            waiting.into_iter().for_each(|waiting| send.try_send(waiting).ok().unwrap());
            let (mut held, mut entries) = (None, Vec::new());
            while let Some(first) = held.take().or_else(|| queue.try_recv().ok()) {
                let batch;
                (batch, held) = gather(first, &mut queue);
                entries.push(batch.len());
            }
            entries
        };
        let small = |count: usize| (0..count).map(|_| pending(1, false));
        let raise = || pending(1, true);
        assert_eq!(entries(small(2).chain([raise()]).chain(small(3)).collect()), [2, 1, 3]);
        assert_eq!(entries(vec![raise(), raise(), pending(1, false)]), [1, 1, 1]);
        assert_eq!(entries(small(ENTRY_COMMANDS_MAX + 1).collect()), [ENTRY_COMMANDS_MAX, 1]);
        let half = || pending(ENTRY_BYTES_MAX / 2, false);
        assert_eq!(entries(vec![half(), half(), half(), pending(2 * ENTRY_BYTES_MAX, false), half()]), [2, 1, 1, 1]);
    }

    #[test]
    fn one_clock_that_jumps_does_not_move_the_median() {
        let mut clocks = PeerClocks::default();
        clocks.offsets.insert(2, (3_600_000, 1_000));
        clocks.offsets.insert(3, (-4, 1_000));
        assert_eq!(clocks.median_offset(1, &[1, 2, 3], 1_100), Some(0));
        assert_eq!(clocks.median_offset(1, &[1, 2, 3], 1_000 + CLOCK_AGE_MS_MAX), None, "old readings do not count");
        clocks.offsets.insert(3, (3_600_000, 1_000));
        assert_eq!(
            clocks.median_offset(1, &[1, 2, 3], 1_100),
            Some(3_600_000),
            "the leader's own is the one that is off"
        );
        assert_eq!(clocks.median_offset(1, &[1], 0), Some(0));
    }
}
