//! Enforcing what was published, reporting it, and knowing when all have done so.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use selvedge_domain::{Envelope, Id, State};
use selvedge_proto::peer as wire;
use serde::Serialize;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tonic::Request;

use crate::convert;
use crate::core::{Core, NoWrites};
use crate::dial::Purpose;
use crate::error::{Error, Fatal};
use crate::lease::surely_over_ms;
use crate::metrics::{ENFORCE_SECONDS, ENFORCED_INDEX, STATE_DIFFERS_TOTAL};
use crate::published::{HashesAt, ToEnforce};
use crate::version::Build;

/// Judges sessions, pending opens and tickets again when the state has changed.
///
/// Called in order, from a thread that may block, after the state was published; when a call returns, everything that
/// the change touches has been judged again and the refused are closed. That is what the freshness lease waits for; what
/// it answers is waited for only before the change counts as enforced everywhere.
pub trait Enforcer: Send + Sync + 'static {
    /// These events led to this state.
    fn enforce(&self, state: &Arc<State>, events: &[Envelope]) -> Confirmation;

    /// The state was replaced as a whole (at start, and when a snapshot was installed): judge everything again.
    fn replaced(&self, state: &Arc<State>) -> Confirmation;
}

/// Ends when the far ends of what was closed have said so, or can pass nothing on any more; none when nothing was closed.
///
/// It makes its way without being polled, and must end by itself: one that does not is overtaken by the leases' end.
pub type Confirmation = Option<BoxFuture<'static, ()>>;

/// For brokers that hold no sessions.
#[derive(Clone, Copy, Debug, Default)]
pub struct NothingToEnforce;

impl Enforcer for NothingToEnforce {
    fn enforce(&self, _state: &Arc<State>, _events: &[Envelope]) -> Confirmation {
        None
    }

    fn replaced(&self, _state: &Arc<State>) -> Confirmation {
        None
    }
}

/// Changes that are enforced with one call.
const COALESCED_MAX: usize = 256;

/// Changes that are enforced here and wait for their confirmation, in order.
///
/// Not more than there are changes that closed something: what closed nothing is done with the one before it.
#[derive(Default)]
struct Confirming(VecDeque<(Id, BoxFuture<'static, ()>)>);

impl Confirming {
    /// Answers the position when it is confirmed at once.
    fn push(&mut self, position: Id, confirmation: Confirmation) -> Option<Id> {
        match (confirmation, self.0.back_mut()) {
            (Some(confirmation), _) => self.0.push_back((position, confirmation)),
            (None, Some((last, _))) => *last = position,
            (None, None) => return Some(position),
        }
        None
    }

    /// The next position that is confirmed; never, while nothing waits.
    ///
    /// **Cancel safety**: nothing is lost.
    async fn next(&mut self) -> Id {
        let Some((position, confirmation)) = self.0.front_mut() else { return std::future::pending().await };
        confirmation.await;
        let position = *position;
        self.0.pop_front();
        position
    }
}

/// Enforces what is published until the queue closes.
pub(crate) async fn run(core: Arc<Core>, enforcer: Arc<dyn Enforcer>, mut queue: mpsc::Receiver<ToEnforce>) {
    let mut changes = Vec::new();
    let mut confirming = Confirming::default();
    loop {
        tokio::select! {
            () = core.stop.cancelled() => return,
            position = confirming.next() => {
                core.confirmed.send_replace(position);
                continue;
            }
            received = queue.recv_many(&mut changes, COALESCED_MAX) => if received == 0 { return },
        }
        let begun = Instant::now();
        let Some(last) = changes.last() else { continue };
        let (index, position) = (last.index, last.state.position());
        let batch = std::mem::take(&mut changes);
        let enforcer = enforcer.clone();
        let judged = core.blocking.call(move || judge(&*enforcer, batch)).await;
        let Ok(confirmation) = judged else {
            // What was not judged must not count as enforced, now or later: the lease is not renewed any more, and only
            // a new start, which judges nothing because it carries nothing, gets another one.
            core.fail(Fatal::Enforcing { index });
            return;
        };
        core.enforced.send_replace(index + 1);
        if let Some(position) = confirming.push(position, confirmation) {
            core.confirmed.send_replace(position);
        }
        ::metrics::histogram!(ENFORCE_SECONDS).record(begun.elapsed());
        ::metrics::gauge!(ENFORCED_INDEX).set(index as f64);
    }
}

fn judge(enforcer: &dyn Enforcer, batch: Vec<ToEnforce>) -> Confirmation {
    let mut events = Vec::new();
    let mut replaced = false;
    let mut state = None;
    for change in batch {
        replaced |= change.replaced;
        events.extend(change.events);
        state = Some(change.state);
    }
    let state = state?;
    if replaced {
        enforcer.replaced(&state)
    } else if events.is_empty() {
        None
    } else {
        enforcer.enforce(&state, &events)
    }
}

/// Reports between two brokers are sent no more often than this.
const REPORT_INTERVAL_MIN: Duration = Duration::from_millis(10);
/// And at least this often, so that a lost one does no harm.
const REPORT_INTERVAL_MAX: Duration = Duration::from_secs(1);
/// How soon a new member is told.
const MEMBERS_INTERVAL: Duration = Duration::from_millis(50);
const REPORT_TIMEOUT: Duration = Duration::from_secs(2);

/// Keeps one task for each other member, which tells it what this broker enforces.
pub(crate) async fn report(core: Arc<Core>) {
    let mut told = HashSet::new();
    let mut tasks: BTreeMap<u64, tokio_util::sync::CancellationToken> = BTreeMap::new();
    loop {
        let members = core.members();
        tasks.retain(|node, task| {
            let stays = members.contains(node);
            if !stays {
                task.cancel();
                told.remove(node);
            }
            stays
        });
        for node in members.into_iter().filter(|node| *node != core.node) {
            if told.insert(node) {
                let stop = core.stop.child_token();
                core.tasks.spawn(report_to(core.clone(), node, stop.clone()));
                tasks.insert(node, stop);
            }
        }
        if core.pause(MEMBERS_INTERVAL).await.is_err() {
            return;
        }
    }
}

async fn report_to(core: Arc<Core>, node: u64, stop: tokio_util::sync::CancellationToken) {
    let mut confirmed = core.confirmed.subscribe();
    loop {
        let position = *confirmed.borrow_and_update();
        let mut client = core.peer_client(node, Purpose::Control);
        let (hashes, own) = (core.published.last_hashes(), Build::own());
        let mut request = Request::new(wire::ReportRequest {
            enforced_index: *core.enforced.borrow(),
            enforced: Some(convert::position(position)),
            applied_index: hashes.as_ref().map_or(0, |hashes| hashes.index),
            state_hash: hashes.as_ref().map(|hashes| hashes.state.to_vec()).unwrap_or_default(),
            journal_hash: hashes.map(|hashes| hashes.journal).unwrap_or_default(),
            no_room: *core.closed_to_writes.lock() == Some(NoWrites::NoRoom),
            version: own.version,
            build: own.name,
        });
        request.set_timeout(REPORT_TIMEOUT);
        tokio::select! {
            () = stop.cancelled() => return,
            sent = client.report(request) => if let Err(status) = sent {
                tracing::debug!(node, %status, "a report was not received");
            },
        }
        tokio::time::sleep(REPORT_INTERVAL_MIN).await;
        tokio::select! {
            () = stop.cancelled() => return,
            _ = confirmed.changed() => {}
            () = tokio::time::sleep(REPORT_INTERVAL_MAX) => {}
        }
    }
}

/// Hashes that a broker reported and that are kept.
const REPORTED_HASHES_MAX: usize = 64;

/// What the others have reported.
#[derive(Default)]
pub(crate) struct Reports {
    nodes: BTreeMap<u64, Reported>,
}

#[derive(Default)]
struct Reported {
    enforced: Id,
    hashes: VecDeque<HashesAt>,
    /// The last that could be compared were not ours.
    differs: bool,
    no_room: bool,
    build: Build,
    /// When it was last heard, boottime in milliseconds.
    heard_ms: u64,
}

impl Reports {
    /// Takes a report; whether it is the first in a row of which the hashes differ from ours.
    pub(crate) fn take(
        &mut self,
        node: u64,
        report: wire::ReportRequest,
        now_ms: u64,
        ours: impl Fn(u64) -> Option<HashesAt>,
    ) -> bool {
        let reported = self.nodes.entry(node).or_default();
        reported.build = Build::reported(report.version, report.build);
        reported.heard_ms = now_ms;
        reported.no_room = report.no_room;
        reported.enforced = reported.enforced.max(convert::position_back(report.enforced));
        if let Ok(state) = report.state_hash.try_into()
            && reported.hashes.back().is_none_or(|last| last.index != report.applied_index)
        {
            if reported.hashes.len() == REPORTED_HASHES_MAX {
                reported.hashes.pop_front();
            }
            let theirs = HashesAt { index: report.applied_index, state, journal: report.journal_hash };
            let differs = ours(theirs.index).map_or(reported.differs, |ours| ours != theirs);
            reported.hashes.push_back(theirs);
            let before = std::mem::replace(&mut reported.differs, differs);
            return differs && !before;
        }
        false
    }

    /// One of these that has room on its disks.
    pub(crate) fn roomy(&self, voters: &[u64]) -> Option<u64> {
        voters.iter().copied().find(|voter| self.nodes.get(voter).is_some_and(|reported| !reported.no_room))
    }

    /// The build that a broker said it is, and when it was last heard.
    pub(crate) fn build(&self, node: u64) -> Option<(Build, u64)> {
        self.nodes.get(&node).map(|reported| (reported.build.clone(), reported.heard_ms))
    }

    fn enforced(&self, node: u64) -> Option<Id> {
        self.nodes.get(&node).map(|reported| reported.enforced)
    }

    /// The index at which a majority of `voters` agrees on hashes that are not ours.
    pub(crate) fn differs(
        &self,
        own: u64,
        voters: &[u64],
        at: u64,
        ours: impl Fn(u64) -> Option<HashesAt>,
    ) -> Option<u64> {
        let ours = ours(at)?;
        let theirs = voters
            .iter()
            .filter(|voter| **voter != own)
            .filter_map(|voter| self.nodes.get(voter)?.hashes.iter().find(|hashes| hashes.index == at));
        let mut counts: HashMap<&[u8; 32], usize> = HashMap::new();
        let mut differing = 0;
        for hashes in theirs {
            if hashes.state != ours.state || hashes.journal != ours.journal {
                let count = counts.entry(&hashes.state).or_default();
                *count += 1;
                differing = differing.max(*count);
            }
        }
        (differing > voters.len() / 2).then_some(at)
    }
}

/// Takes another broker's report, and stops this broker when a majority holds another state.
pub(crate) fn take_report(core: &Arc<Core>, node: u64, report: wire::ReportRequest) {
    let index = report.applied_index;
    let differs = {
        let mut reports = core.reports.lock();
        if reports.take(node, report, core.clock.boottime_ms(), |index| core.published.hashes_at(index)) {
            // Who is wrong, a majority says; until it does this wants somebody's attention.
            ::metrics::counter!(STATE_DIFFERS_TOTAL).increment(1);
            tracing::error!(code = "SE0119", node, index, "this broker's state differs from ours");
        }
        reports.differs(core.node, &core.voters(), index, |index| core.published.hashes_at(index))
    };
    core.reported.send_modify(|count| *count += 1);
    if let Some(index) = differs {
        core.fail_after_transfer(Fatal::StateDiffers { index });
    }
}

/// How it is known that a broker does not act on what was before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum How {
    /// It said so.
    Reported,
    /// Every lease that it could have held is over.
    LeaseOver,
}

/// Who enforced a change, how that is known, and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Receipt {
    /// Node id.
    pub node: u64,
    /// How it is known.
    pub how: How,
    /// Cluster time, milliseconds.
    pub at_ms: u64,
}

/// What became of waiting for a change to be enforced everywhere.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Enforced {
    /// No broker acts on what was before any more.
    pub complete: bool,
    /// Brokers that do not.
    pub receipts: Vec<Receipt>,
    /// Brokers that still may, and until when at most (cluster time, milliseconds).
    pub open: Vec<(u64, u64)>,
}

/// Waits until every broker enforces `position`, or cannot hold a lease without it, or `wait` is over.
pub(crate) async fn everywhere(core: &Core, position: Id, wait: Duration) -> Result<Enforced, Error> {
    let deadline = Instant::now() + wait;
    tokio::time::timeout_at(deadline, core.wait_applied(position)).await.map_err(|_| Error::TimedOut)??;
    let seen_ms = core.clock.boottime_ms();
    let over_ms = seen_ms + surely_over_ms(core.longest_lease_ms());
    let mut open: BTreeMap<u64, ()> = core.counted().into_iter().map(|node| (node, ())).collect();
    let mut receipts = Vec::new();
    let receipt = |node, how| Receipt { node, how, at_ms: core.published.now_ms() };

    let mut reported = core.reported.subscribe();
    let mut own = core.confirmed.subscribe();
    let holders = core.holders(deadline);
    tokio::pin!(holders);
    let mut asked = false;
    loop {
        reported.mark_unchanged();
        let own_position = *own.borrow_and_update();
        {
            let reports = core.reports.lock();
            open.retain(|node, ()| {
                let at = if *node == core.node { Some(own_position) } else { reports.enforced(*node) };
                let done = at.is_some_and(|at| at >= position);
                receipts.extend(done.then(|| receipt(*node, How::Reported)));
                !done
            });
        }
        let now_ms = core.clock.boottime_ms();
        if now_ms >= over_ms {
            receipts.extend(open.keys().map(|node| receipt(*node, How::LeaseOver)));
            open.clear();
        }
        if open.is_empty() || Instant::now() >= deadline {
            break;
        }
        let left = Duration::from_millis(over_ms - now_ms);
        tokio::select! {
            _ = reported.changed() => {}
            _ = own.changed() => {}
            () = tokio::time::sleep(left) => {}
            () = tokio::time::sleep_until(deadline) => {}
            holders = &mut holders, if !asked => {
                asked = true;
                // Without an answer all are waited for.
                if let Ok(holders) = holders {
                    for (node, may_hold) in holders {
                        let done = receipts.iter().any(|receipt: &Receipt| receipt.node == node);
                        if may_hold && !done {
                            // The leader also knows of brokers that were removed.
                            open.insert(node, ());
                        } else if open.remove(&node).is_some() {
                            receipts.push(receipt(node, How::LeaseOver));
                        }
                    }
                }
            }
        }
    }
    let until_ms = core.published.now_ms() + over_ms.saturating_sub(core.clock.boottime_ms());
    Ok(Enforced { complete: open.is_empty(), receipts, open: open.into_keys().map(|node| (node, until_ms)).collect() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(index: u64, hash: u8) -> wire::ReportRequest {
        wire::ReportRequest { applied_index: index, state_hash: vec![hash; 32], ..Default::default() }
    }

    fn ours(index: u64) -> Option<HashesAt> {
        Some(HashesAt { index, state: [1; 32], journal: Vec::new() })
    }

    #[test]
    fn who_differs_from_a_majority_is_told_and_nobody_without_one() {
        let mut reports = Reports::default();
        reports.take(2, report(7, 9), 0, ours);
        assert_eq!(reports.differs(1, &[1, 2, 3], 7, ours), None, "one of three is no majority");
        reports.take(3, report(7, 8), 0, ours);
        assert_eq!(reports.differs(1, &[1, 2, 3], 7, ours), None, "all three differ from each other");
        reports.take(3, report(8, 9), 0, ours);
        assert_eq!(reports.differs(1, &[1, 2, 3], 8, ours), None, "the other one did not report this index");
        reports.take(2, report(8, 9), 0, ours);
        assert_eq!(reports.differs(1, &[1, 2, 3], 8, ours), Some(8));
        assert_eq!(reports.differs(1, &[1, 2, 3], 7, |_| None), None, "what we do not hold is not judged");
    }
}
