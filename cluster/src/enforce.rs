//! Enforcing what was published, reporting it, and knowing when all have done so.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use selvedge_domain::{Envelope, Id, State};
use selvedge_proto::peer as wire;
use serde::Serialize;
use tokio::sync::mpsc;
use tonic::Request;

use crate::convert;
use crate::core::Core;
use crate::dial::Purpose;
use crate::error::{Error, Fatal};
use crate::lease::surely_over_ms;
use crate::metrics::{ENFORCE_SECONDS, ENFORCED_INDEX};
use crate::published::{HashesAt, ToEnforce};

/// Judges sessions, pending opens and tickets again when the state has changed.
///
/// Called in order, from a thread that may block, after the state was published; when a call returns, everything that
/// the change touches has been judged again and the refused are closed.
pub trait Enforcer: Send + Sync + 'static {
    /// These events led to this state.
    fn enforce(&self, state: &Arc<State>, events: &[Envelope]);

    /// The state was replaced as a whole (at start, and when a snapshot was installed): judge everything again.
    fn replaced(&self, state: &Arc<State>);
}

/// For brokers that hold no sessions.
#[derive(Clone, Copy, Debug, Default)]
pub struct NothingToEnforce;

impl Enforcer for NothingToEnforce {
    fn enforce(&self, _state: &Arc<State>, _events: &[Envelope]) {}
    fn replaced(&self, _state: &Arc<State>) {}
}

/// How far this broker enforces.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct EnforcedAt {
    /// Index after the last entry enforced.
    pub(crate) next_index: u64,
    pub(crate) position: Id,
}

/// Changes that are enforced with one call.
const COALESCED_MAX: usize = 256;

/// Enforces what is published until the queue closes.
pub(crate) async fn run(core: Arc<Core>, enforcer: Arc<dyn Enforcer>, mut queue: mpsc::Receiver<ToEnforce>) {
    let mut changes = Vec::new();
    loop {
        tokio::select! {
            () = core.stop.cancelled() => return,
            received = queue.recv_many(&mut changes, COALESCED_MAX) => if received == 0 { return },
        }
        let begun = Instant::now();
        let Some(last) = changes.last() else { continue };
        let at = EnforcedAt { next_index: last.index + 1, position: last.state.position() };
        let batch = std::mem::take(&mut changes);
        let enforcer = enforcer.clone();
        let judged = tokio::task::spawn_blocking(move || judge(&*enforcer, batch)).await;
        if judged.is_err() {
            // What was not judged must not count as enforced, now or later: the lease is not renewed any more, and only
            // a new start, which judges nothing because it carries nothing, gets another one.
            core.fail(Fatal::Enforcing { index: at.next_index.saturating_sub(1) });
            return;
        }
        core.enforced.send_replace(at);
        ::metrics::histogram!(ENFORCE_SECONDS).record(begun.elapsed());
        ::metrics::gauge!(ENFORCED_INDEX).set(at.next_index.saturating_sub(1) as f64);
    }
}

fn judge(enforcer: &dyn Enforcer, batch: Vec<ToEnforce>) {
    let mut events = Vec::new();
    let mut replaced = false;
    let mut state = None;
    for change in batch {
        replaced |= change.replaced;
        events.extend(change.events);
        state = Some(change.state);
    }
    let Some(state) = state else { return };
    if replaced {
        enforcer.replaced(&state);
    } else if !events.is_empty() {
        enforcer.enforce(&state, &events);
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
    let mut tasks: HashMap<u64, tokio_util::sync::CancellationToken> = HashMap::new();
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
    let mut enforced = core.enforced.subscribe();
    loop {
        let at = *enforced.borrow_and_update();
        let mut client = core.peer_client(node, Purpose::Control);
        let hashes = core.published.last_hashes();
        let mut request = Request::new(wire::ReportRequest {
            enforced_index: at.next_index,
            enforced: Some(convert::position(at.position)),
            applied_index: hashes.as_ref().map_or(0, |hashes| hashes.index),
            state_hash: hashes.as_ref().map(|hashes| hashes.state.to_vec()).unwrap_or_default(),
            journal_hash: hashes.map(|hashes| hashes.journal).unwrap_or_default(),
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
            _ = enforced.changed() => {}
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
}

impl Reports {
    pub(crate) fn take(&mut self, node: u64, report: wire::ReportRequest) {
        let reported = self.nodes.entry(node).or_default();
        reported.enforced = reported.enforced.max(convert::position_back(report.enforced));
        if let Ok(state) = report.state_hash.try_into()
            && reported.hashes.back().is_none_or(|last| last.index != report.applied_index)
        {
            if reported.hashes.len() == REPORTED_HASHES_MAX {
                reported.hashes.pop_front();
            }
            reported.hashes.push_back(HashesAt { index: report.applied_index, state, journal: report.journal_hash });
        }
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
pub(crate) fn take_report(core: &Core, node: u64, report: wire::ReportRequest) {
    let index = report.applied_index;
    let differs = {
        let mut reports = core.reports.lock();
        reports.take(node, report);
        reports.differs(core.node, &core.voters(), index, |index| core.published.hashes_at(index))
    };
    core.reported.send_modify(|count| *count += 1);
    if let Some(index) = differs {
        core.fail(Fatal::StateDiffers { index });
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
    let deadline = tokio::time::Instant::now() + wait;
    tokio::time::timeout_at(deadline, core.wait_applied(position)).await.map_err(|_| Error::TimedOut)??;
    let seen_ms = core.clock.boottime_ms();
    let over_ms = seen_ms + surely_over_ms(core.longest_lease_ms());
    let mut open: BTreeMap<u64, ()> = core.counted().into_iter().map(|node| (node, ())).collect();
    let mut receipts = Vec::new();
    let receipt = |node, how| Receipt { node, how, at_ms: core.published.now_ms() };

    let mut reported = core.reported.subscribe();
    let mut own = core.enforced.subscribe();
    let holders = core.holders(deadline);
    tokio::pin!(holders);
    let mut asked = false;
    loop {
        reported.mark_unchanged();
        let own_position = own.borrow_and_update().position;
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
        if open.is_empty() || tokio::time::Instant::now() >= deadline {
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
        reports.take(2, report(7, 9));
        assert_eq!(reports.differs(1, &[1, 2, 3], 7, ours), None, "one of three is no majority");
        reports.take(3, report(7, 8));
        assert_eq!(reports.differs(1, &[1, 2, 3], 7, ours), None, "all three differ from each other");
        reports.take(3, report(8, 9));
        assert_eq!(reports.differs(1, &[1, 2, 3], 8, ours), None, "the other one did not report this index");
        reports.take(2, report(8, 9));
        assert_eq!(reports.differs(1, &[1, 2, 3], 8, ours), Some(8));
        assert_eq!(reports.differs(1, &[1, 2, 3], 7, |_| None), None, "what we do not hold is not judged");
    }
}
