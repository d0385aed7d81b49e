//! Keeps control streams to the best brokers, and to those that sessions need.
//!
//! A broker is measured by a bare TLS handshake with a knock, closed at once, until a stream's own pings measure it.
//! Invariants: one attempt per broker at a time; after a failure a broker is left alone for a jittered, growing while.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use selvedge_proto::control::Broker;
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::backoff::Backoff;
use crate::end::End;
pub use crate::link::Error;
use crate::link::{Events, Link};
use crate::{clock, metrics};

/// Control streams that an end holds.
pub(crate) const STREAMS: usize = 2;

/// How often brokers without a stream are measured again.
const PROBE_INTERVAL: Duration = Duration::from_secs(10);
/// The second stream waits so long for slower brokers' measurements.
const PROBE_GRACE: Duration = Duration::from_secs(1);
/// Probes under way at once.
const PROBES_MAX: usize = 8;
/// A broker replaces another when it is nearer by this much and by a third.
const BETTER_BY: Duration = Duration::from_millis(5);
/// A stream that a session asked for is kept so long after it was last needed.
const DEMAND: Duration = Duration::from_secs(60);
const RENEW_WITHIN: Duration = Duration::from_secs(20);
const RENEW_RETRY: Duration = Duration::from_secs(60);
/// An end that has had no usable stream for so long asks elsewhere which brokers there are: those that it knows may all
/// be gone for ever.
const LOST_AFTER: Duration = Duration::from_secs(10);
/// Longest time between two times of asking.
const LOST_RETRY_MAX: Duration = Duration::from_secs(15 * 60);
const WAKE: Duration = Duration::from_millis(500);

/// What a person sees of one attached broker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkStatus {
    /// Node id.
    pub node: u64,
    /// Name.
    pub name: String,
    /// Region.
    pub region: String,
    /// Advertised edge address.
    pub edge: String,
    /// Smoothed round trip.
    pub rtt_us: u64,
    /// Whether new sessions use it.
    pub usable: bool,
}

/// The control streams of one end.
pub(crate) struct Links {
    pub(crate) end: Arc<End>,
    attached: Mutex<Vec<Arc<Link>>>,
    changed: watch::Sender<u64>,
    demanded: Mutex<BTreeMap<u64, (Broker, Instant)>>,
    wake: Notify,
    last_error: Mutex<Option<String>>,
    tickets_wanted: usize,
    events: Option<Events>,
    shutdown: CancellationToken,
}

impl Links {
    /// Starts to attach, in the background, until `shutdown`.
    pub(crate) fn start(
        end: Arc<End>,
        tickets_wanted: usize,
        events: Option<Events>,
        shutdown: CancellationToken,
    ) -> (Arc<Self>, tokio::task::JoinHandle<()>) {
        let links = Arc::new(Self {
            end,
            attached: Mutex::new(Vec::new()),
            changed: watch::Sender::new(0),
            demanded: Mutex::new(BTreeMap::new()),
            wake: Notify::new(),
            last_error: Mutex::new(None),
            tickets_wanted,
            events,
            shutdown,
        });
        let task = tokio::spawn(Supervisor::new(links.clone()).run());
        (links, task)
    }

    /// The streams that new sessions may use, nearest first.
    pub(crate) fn usable(&self) -> Vec<Arc<Link>> {
        let mut links: Vec<_> = self.attached.lock().iter().filter(|link| link.is_usable()).cloned().collect();
        links.sort_by_key(|link| link.rtt_us());
        links
    }

    /// The stream to one broker.
    pub(crate) fn to(&self, node: u64) -> Option<Arc<Link>> {
        self.attached.lock().iter().find(|link| link.broker.node == node).cloned()
    }

    /// All streams.
    pub(crate) fn all(&self) -> Vec<Arc<Link>> {
        self.attached.lock().clone()
    }

    /// Asks for a stream to one more broker.
    pub(crate) fn demand(&self, broker: &Broker) {
        let until = Instant::now() + DEMAND;
        let known = self.demanded.lock().insert(broker.node, (broker.clone(), until)).is_some();
        if !known {
            self.wake.notify_one();
        }
    }

    /// Waits for a usable stream to a broker that is not `avoid`.
    pub(crate) async fn any(&self, avoid: Option<u64>) -> Arc<Link> {
        let mut changed = self.changed.subscribe();
        loop {
            changed.borrow_and_update();
            if let Some(link) = self.usable().into_iter().find(|link| Some(link.broker.node) != avoid) {
                return link;
            }
            if changed.changed().await.is_err() {
                // The sender is in `self`.
                std::future::pending::<()>().await;
            }
        }
    }

    /// What a person sees.
    pub(crate) fn status(&self) -> Vec<LinkStatus> {
        let all = self.all();
        let status = |link: &Arc<Link>| LinkStatus {
            node: link.broker.node,
            name: link.broker.name.clone(),
            region: link.broker.region.clone(),
            edge: link.broker.edge.clone(),
            rtt_us: link.rtt_us(),
            usable: link.is_usable(),
        };
        all.iter().map(status).collect()
    }

    /// Why the last attempt failed.
    pub(crate) fn last_error(&self) -> Option<String> {
        self.last_error.lock().clone()
    }

    fn add(&self, link: &Arc<Link>) {
        self.attached.lock().push(link.clone());
        self.count();
    }

    fn remove(&self, link: &Arc<Link>) {
        self.attached.lock().retain(|other| !Arc::ptr_eq(other, link));
        self.count();
    }

    fn count(&self) {
        let count = self.attached.lock().len();
        ::metrics::gauge!(metrics::CONTROL_STREAMS).set(count as f64);
        self.changed.send_modify(|version| *version += 1);
        self.wake.notify_one();
    }

    fn demanded(&self) -> Vec<Broker> {
        let now = Instant::now();
        let mut demanded = self.demanded.lock();
        demanded.retain(|node, (_, until)| *until > now || self.end.fence(*node).sessions() > 0);
        demanded.values().map(|(broker, _)| broker.clone()).collect()
    }
}

/// What is known of one broker.
#[derive(Default)]
struct Known {
    backoff: Backoff,
    retry_at: Option<Instant>,
    rtt: Option<Duration>,
    measured_at: Option<Instant>,
    probing: bool,
    attaching: bool,
}

impl Known {
    fn may_try(&self, now: Instant) -> bool {
        !self.attaching && self.retry_at.is_none_or(|at| at <= now)
    }

    fn is_measured(&self, now: Instant) -> bool {
        self.measured_at.is_some_and(|at| now.duration_since(at) < PROBE_INTERVAL)
    }

    fn failed(&mut self, now: Instant) {
        self.retry_at = Some(now + self.backoff.fail(rand::random()));
    }
}

enum Done {
    Probed(u64, Result<Duration, Error>),
    Ended(u64, bool, Error),
}

struct Supervisor {
    links: Arc<Links>,
    known: BTreeMap<u64, Known>,
    tasks: JoinSet<Done>,
    began: Instant,
    renew_at: Instant,
    /// When to ask elsewhere which brokers there are, and how long to wait after that; none while there is a stream.
    lost: Option<(Instant, Duration)>,
}

impl Supervisor {
    fn new(links: Arc<Links>) -> Self {
        let now = Instant::now();
        Self { links, known: BTreeMap::new(), tasks: JoinSet::new(), began: now, renew_at: now, lost: None }
    }

    async fn run(mut self) {
        let links = self.links.clone();
        let mut renewal = tokio::task::JoinSet::new();
        loop {
            self.step();
            if renewal.is_empty() && Instant::now() >= self.renew_at && renewal_is_possible(&links) {
                self.renew_at = Instant::now() + RENEW_RETRY;
                renewal.spawn(renew_if_due(links.clone()));
            }
            if renewal.is_empty() && self.is_lost() {
                let end = links.end.clone();
                renewal.spawn(async move {
                    match end.ask_for_brokers().await {
                        Ok(()) => info!("asked elsewhere which brokers there are"),
                        Err(error) => warn!(error, "no broker is reached, and nobody says which ones there are"),
                    }
                });
            }
            tokio::select! {
                () = links.shutdown.cancelled() => break,
                () = links.wake.notified() => {}
                () = links.end.brokers_changed() => {}
                Some(done) = self.tasks.join_next() => if let Ok(done) = done { self.finish(done) },
                Some(_) = renewal.join_next() => {}
                () = sleep_until((Instant::now() + WAKE).into()) => {}
            }
        }
        for link in links.all() {
            link.close();
        }
        let ended = async { while self.tasks.join_next().await.is_some() {} };
        // A stream that does not end in time is dropped with its task.
        let _ = timeout(Duration::from_secs(1), ended).await;
    }

    /// Whether to ask elsewhere now.
    fn is_lost(&mut self) -> bool {
        if !self.links.usable().is_empty() {
            self.lost = None;
            return false;
        }
        let now = Instant::now();
        let (at, wait) = *self.lost.get_or_insert((now + LOST_AFTER, LOST_AFTER));
        if now < at {
            return false;
        }
        let wait = (wait * 2).min(LOST_RETRY_MAX);
        // Not all ends at the same moment.
        self.lost = Some((now + wait.mul_f64(rand::random_range(0.5..1.0)), wait));
        true
    }

    fn step(&mut self) {
        let now = Instant::now();
        let list = self.links.end.brokers();
        let demanded = self.links.demanded();
        let attached = self.links.all();
        let is_demanded = |node: u64| demanded.iter().any(|broker| broker.node == node);
        let usable = |link: &&Arc<Link>| link.is_usable();
        let candidates = self.candidates(&list.brokers, attached.is_empty());

        for broker in &demanded {
            let known = self.known.entry(broker.node).or_default();
            if known.may_try(now) && !attached.iter().any(|link| link.broker.node == broker.node) {
                known.attaching = true;
                self.spawn_attach(broker.clone());
            }
        }

        self.probe(&candidates, &attached, now);

        let attaching = candidates.iter().filter(|broker| self.is_attaching(broker.node)).count();
        let have = attached.iter().filter(usable).count() + attaching;
        let mut need = STREAMS.saturating_sub(have);
        // The nearest answers first and is taken at once; the next waits until the others could have answered.
        if have + need > 1 && self.is_probing() && now.duration_since(self.began) < PROBE_GRACE {
            need = need.min(1_usize.saturating_sub(have));
        }
        let mut free: Vec<(Duration, &Broker)> = candidates
            .iter()
            .filter(|broker| !attached.iter().any(|link| link.broker.node == broker.node))
            .filter_map(|broker| {
                let known = self.known.get(&broker.node)?;
                Some((known.rtt.filter(|_| known.may_try(now))?, *broker))
            })
            .collect();
        free.sort_by_key(|(rtt, _)| *rtt);
        for (_, broker) in free.iter().take(need) {
            self.known.entry(broker.node).or_default().attaching = true;
            self.spawn_attach((*broker).clone());
        }

        if need == 0 && attaching == 0 {
            // One better broker takes the place of the worst; what was demanded stays.
            let mut mine: Vec<_> =
                attached.iter().filter(usable).filter(|link| !is_demanded(link.broker.node)).collect();
            mine.sort_by_key(|link| link.rtt_us());
            if mine.len() > STREAMS
                && let Some(worst) = mine.pop()
                && worst.fence.sessions() == 0
            {
                debug!(broker = worst.broker.name, "a nearer broker took its place");
                worst.close();
            } else if let (Some(worst), Some((rtt, broker))) = (mine.last(), free.first())
                && mine.len() == STREAMS
                && is_much_better(*rtt, Duration::from_micros(worst.rtt_us()))
            {
                self.known.entry(broker.node).or_default().attaching = true;
                self.spawn_attach((*broker).clone());
            }
        }
    }

    /// The brokers to attach to: those that do not drain. Where none of them can be reached, the others too: this end's
    /// list may be old, and nobody else could tell.
    fn candidates<'a>(&self, brokers: &'a [Broker], is_alone: bool) -> Vec<&'a Broker> {
        let failed = |broker: &&Broker| self.known.get(&broker.node).is_some_and(|known| known.retry_at.is_some());
        let (draining, staying): (Vec<_>, Vec<_>) = brokers.iter().partition(|broker| broker.draining);
        if is_alone && staying.iter().all(failed) { [staying, draining].concat() } else { staying }
    }

    fn probe(&mut self, candidates: &[&Broker], attached: &[Arc<Link>], now: Instant) {
        let under_way = self.known.values().filter(|known| known.probing).count();
        let mut free = PROBES_MAX.saturating_sub(under_way);
        for broker in candidates {
            let known = self.known.entry(broker.node).or_default();
            let has_stream = attached.iter().any(|link| link.broker.node == broker.node);
            if free == 0 || has_stream || known.probing || known.is_measured(now) || !known.may_try(now) {
                continue;
            }
            free -= 1;
            known.probing = true;
            let (end, broker) = (self.links.end.clone(), (*broker).clone());
            self.tasks.spawn(async move {
                let measured = end.connect(&broker).await.map(|(_, rtt)| rtt);
                Done::Probed(broker.node, measured)
            });
        }
    }

    fn spawn_attach(&mut self, broker: Broker) {
        let links = self.links.clone();
        self.tasks.spawn(async move {
            let node = broker.node;
            let (link, inbound) = match Link::attach(&links.end, broker, links.tickets_wanted).await {
                Ok(attached) => attached,
                Err(error) => return Done::Ended(node, false, error),
            };
            info!(broker = link.broker.name, rtt_us = link.rtt_us(), "attached");
            links.add(&link);
            let error = link.serve(&links.end, inbound, links.events.as_ref()).await;
            links.remove(&link);
            Done::Ended(node, true, error)
        });
    }

    fn finish(&mut self, done: Done) {
        let now = Instant::now();
        match done {
            Done::Probed(node, Ok(rtt)) => {
                let known = self.known.entry(node).or_default();
                known.probing = false;
                known.rtt = Some(rtt);
                known.measured_at = Some(now);
            }
            Done::Probed(node, Err(error)) => {
                debug!(node, %error, "a broker could not be measured");
                *self.links.last_error.lock() = Some(error.to_string());
                let known = self.known.entry(node).or_default();
                known.probing = false;
                known.rtt = None;
                known.failed(now);
            }
            Done::Ended(node, was_attached, error) => {
                let known = self.known.entry(node).or_default();
                known.attaching = false;
                if was_attached {
                    known.backoff.reset();
                }
                // Measured again before it is used again: it may be gone.
                known.rtt = None;
                known.measured_at = None;
                known.failed(now);
                if !matches!(error, Error::Closed) {
                    warn!(node, %error, "a control stream ended");
                    *self.links.last_error.lock() = Some(error.to_string());
                }
            }
        }
    }

    fn is_attaching(&self, node: u64) -> bool {
        let attached = self.links.to(node).is_some();
        self.known.get(&node).is_some_and(|known| known.attaching) && !attached
    }

    fn is_probing(&self) -> bool {
        self.known.values().any(|known| known.probing)
    }
}

/// Through a control stream; without one, at the web listener when the certificate has ended and no broker's edge takes
/// it any more.
fn renewal_is_possible(links: &Links) -> bool {
    !links.usable().is_empty() || links.end.has_expired()
}

/// Renews at a third of the certificate's life, then begins each stream anew, one after the other.
async fn renew_if_due(links: Arc<Links>) {
    if links.end.identity.load().renewal_due_ms().is_ok_and(|due_ms| clock::unix_ms() < due_ms) {
        return;
    }
    let renewed = match links.usable().into_iter().next() {
        Some(link) => link.renew(&links.end, RENEW_WITHIN).await.map_err(|error| error.to_string()),
        None => links.end.renew_expired().await,
    };
    if let Err(error) = renewed {
        return warn!(error, "the certificate could not be renewed");
    }
    for link in links.all() {
        let mut changed = links.changed.subscribe();
        let node = link.broker.node;
        link.close();
        let back = async {
            while links.to(node).is_none_or(|new| Arc::ptr_eq(&new, &link)) && changed.changed().await.is_ok() {}
        };
        // Whether or not it came back, the others must not go on with the old certificate.
        let _ = timeout(RENEW_WITHIN, back).await;
    }
}

fn is_much_better(new: Duration, old: Duration) -> bool {
    new + BETTER_BY < old && new * 3 < old * 2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_broker_is_changed_only_for_one_that_is_much_nearer() {
        let ms = Duration::from_millis;
        assert!(is_much_better(ms(10), ms(80)));
        assert!(!is_much_better(ms(60), ms(80)));
        assert!(!is_much_better(ms(1), ms(5)));
        assert!(!is_much_better(ms(80), ms(80)));
    }

    #[test]
    fn a_broker_that_failed_is_left_alone_for_a_while() {
        let now = Instant::now();
        let mut known = Known::default();
        assert!(known.may_try(now));
        known.failed(now);
        assert!(!known.may_try(now));
        assert!(known.may_try(now + Duration::from_millis(150)));
        known.attaching = true;
        assert!(!known.may_try(now + Duration::from_secs(10)));
    }
}
