//! The ends whose control streams end here.
//!
//! **Invariant:** one stream per end (per key, for the instances of a workload): a later one replaces an earlier one,
//! an older one is refused.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock};
use selvedge_domain::Id;
use selvedge_proto::control::{FromBroker, GoAway, LoginGrant, from_broker::Message};
use selvedge_proto::hello::Ticket;
use selvedge_proto::identity::{Kind, Peer};
use tokio::sync::{Semaphore, mpsc};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::limits::Limits;
use super::metrics;
use super::standing::Caller;
use super::tickets::StreamKey;

/// Messages that wait to be sent on one control stream; when it is full, the stream is closed.
pub const CONTROL_QUEUE_MAX: usize = 256;
/// `Open`s of one control stream that are being decided; further ones are `busy`.
pub const OPENS_IN_FLIGHT_MAX: usize = 256;

/// One attached end.
pub(super) struct End {
    pub(super) key: StreamKey,
    pub(super) peer: Peer,
    pub(super) subject: Id,
    /// The end's own number of this stream.
    pub(super) number: u64,
    /// Whose rights count; none for connectors and for clients without a login.
    pub(super) caller: Option<Caller>,
    grant: Option<LoginGrant>,
    pub(super) closed: CancellationToken,
    pub(super) in_flight: Arc<Semaphore>,
    pub(super) opens: Mutex<Bucket>,
    pub(super) resolves: Mutex<Bucket>,
    why: OnceLock<&'static str>,
    out: mpsc::Sender<Result<FromBroker, Status>>,
}

impl End {
    #[allow(clippy::too_many_arguments)] // each once, in the one place that makes ends
    pub(super) fn new(
        key: StreamKey,
        peer: Peer,
        subject: Id,
        number: u64,
        caller: Option<Caller>,
        grant: Option<LoginGrant>,
        closed: CancellationToken,
        out: mpsc::Sender<Result<FromBroker, Status>>,
    ) -> Arc<Self> {
        Arc::new(Self {
            key,
            peer,
            subject,
            number,
            caller,
            grant,
            closed,
            in_flight: Arc::new(Semaphore::new(OPENS_IN_FLIGHT_MAX)),
            opens: Mutex::new(Bucket::full()),
            resolves: Mutex::new(Bucket::full()),
            why: OnceLock::new(),
            out,
        })
    }

    /// The login grant that was accepted, as it was signed.
    pub(super) fn login_grant(&self) -> Option<LoginGrant> {
        self.grant.clone()
    }

    pub(super) fn kind(&self) -> Kind {
        self.peer.id.kind()
    }

    /// Sends, or closes the stream when its queue is full. False when it is closed.
    pub(super) fn send(&self, message: Message) -> bool {
        if self.closed.is_cancelled() {
            return false;
        }
        match self.out.try_send(Ok(FromBroker { message: Some(message) })) {
            Ok(()) => true,
            Err(mpsc::error::TrySendError::Closed(_)) => {
                self.close("gone");
                false
            }
            Err(mpsc::error::TrySendError::Full(_)) => {
                metrics::control_queue_full();
                self.close("queue_full");
                false
            }
        }
    }

    pub(super) fn send_tickets(&self, tickets: Vec<Ticket>) {
        if !tickets.is_empty() {
            let tickets = tickets.iter().map(|ticket| ticket.as_bytes().to_vec()).collect();
            self.send(Message::Tickets(selvedge_proto::control::Tickets { tickets }));
        }
    }

    /// Ends the stream; what it opened goes on unless it is cut.
    pub(super) fn close(&self, why: &'static str) {
        if self.why.set(why).is_ok() {
            let goodbye = Message::GoAway(GoAway { reason: why.into() });
            // The peer sees the end of the stream in any case.
            let _ = self.out.try_send(Ok(FromBroker { message: Some(goodbye) }));
        }
        self.closed.cancel();
    }

    pub(super) fn why_closed(&self) -> &'static str {
        self.why.get().copied().unwrap_or("gone")
    }

    /// What one stream is told apart by: a workload has many instances, each with a key.
    fn slot(&self) -> Slot {
        let instance = (self.kind() == Kind::Workload).then_some(self.peer.spki_sha256);
        (self.peer.id.to_string(), instance)
    }
}

/// SPIFFE id, and for workloads the instance's key.
type Slot = (String, Option<[u8; 32]>);

#[derive(Default)]
pub(super) struct Ends {
    next_key: AtomicU64,
    attached: RwLock<BTreeMap<Slot, Arc<End>>>,
    connectors: RwLock<BTreeMap<Id, Arc<End>>>,
}

/// Why an end was not attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refused {
    /// A later stream of the same end is there.
    Older,
    /// Too many streams.
    Full,
}

impl Ends {
    pub(super) fn next_key(&self) -> StreamKey {
        self.next_key.fetch_add(1, Ordering::Relaxed) + 1
    }

    pub(super) fn attach(&self, end: &Arc<End>, limits: Limits) -> Result<(), Refused> {
        let mut attached = self.attached.write();
        if attached.len() >= limits.control_streams as usize {
            return Err(Refused::Full);
        }
        if attached.get(&end.slot()).is_some_and(|before| before.number >= end.number && !before.closed.is_cancelled())
        {
            return Err(Refused::Older);
        }
        let replaced = attached.insert(end.slot(), end.clone());
        if end.kind() == Kind::Connector {
            self.connectors.write().insert(end.subject, end.clone());
        }
        drop(attached);
        if let Some(before) = replaced {
            before.close("replaced");
        }
        metrics::control_streams(end.kind().as_str(), 1.0);
        Ok(())
    }

    pub(super) fn detach(&self, end: &Arc<End>) {
        let mut attached = self.attached.write();
        if attached.get(&end.slot()).is_some_and(|now| now.key == end.key) {
            attached.remove(&end.slot());
        }
        let mut connectors = self.connectors.write();
        if connectors.get(&end.subject).is_some_and(|now| now.key == end.key) {
            connectors.remove(&end.subject);
        }
        metrics::control_streams(end.kind().as_str(), -1.0);
    }

    pub(super) fn connector(&self, id: Id) -> Option<Arc<End>> {
        self.connectors.read().get(&id).cloned()
    }

    pub(super) fn all(&self) -> Vec<Arc<End>> {
        self.attached.read().values().cloned().collect()
    }
}

/// A budget that refills with time; how fast may change.
pub(super) struct Bucket {
    left: f64,
    at: Instant,
}

impl Bucket {
    fn full() -> Self {
        Self { left: f64::INFINITY, at: Instant::now() }
    }

    /// Takes one; false when there is none left.
    pub(super) fn take(&mut self, now: Instant, per_second: u32) -> bool {
        let (passed, per_second) = (now.saturating_duration_since(self.at), f64::from(per_second));
        self.at = now;
        self.left = (self.left + passed.as_secs_f64() * per_second).min(per_second);
        let enough = self.left >= 1.0;
        if enough {
            self.left -= 1.0;
        }
        enough
    }

    /// When there will be one.
    pub(super) fn wait(&self, per_second: u32) -> Duration {
        Duration::from_secs_f64(((1.0 - self.left) / f64::from(per_second)).max(0.001))
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::edge) fn end_of(
        kind: Kind,
        seq: u64,
        number: u64,
        key: StreamKey,
    ) -> (Arc<End>, mpsc::Receiver<Result<FromBroker, Status>>) {
        let subject = Id::new(1, seq);
        let peer = Peer {
            id: selvedge_proto::identity::SpiffeId::new("demo.test", kind, &subject.to_string()).unwrap(),
            serial: "01".into(),
            spki_sha256: [key as u8; 32],
            not_after_ms: u64::MAX,
        };
        let (out, sent) = mpsc::channel(CONTROL_QUEUE_MAX);
        (End::new(key, peer, subject, number, None, None, CancellationToken::new(), out), sent)
    }

    #[test]
    fn a_later_stream_replaces_an_earlier_one_and_an_older_one_is_refused() {
        let ends = Ends::default();
        let (first, _a) = end_of(Kind::Connector, 5, 10, 1);
        let (older, _b) = end_of(Kind::Connector, 5, 9, 2);
        let (later, _c) = end_of(Kind::Connector, 5, 11, 3);
        let limits = Limits { control_streams: 1, ..Limits::default() };
        assert_eq!(ends.attach(&first, Limits::default()), Ok(()));
        assert_eq!(ends.attach(&older, Limits::default()), Err(Refused::Older));
        assert_eq!(ends.attach(&later, limits), Err(Refused::Full), "as many as there may be");
        assert_eq!(ends.attach(&later, Limits::default()), Ok(()));
        assert!(first.closed.is_cancelled() && !later.closed.is_cancelled());
        ends.detach(&first);
        assert_eq!(ends.connector(Id::new(1, 5)).map(|end| end.key), Some(3), "the later one stays");
    }

    #[test]
    fn instances_of_a_workload_stand_beside_each_other() {
        let ends = Ends::default();
        let (one, _a) = end_of(Kind::Workload, 5, 10, 1);
        let (other, _b) = end_of(Kind::Workload, 5, 3, 2);
        let attach = |end| ends.attach(end, Limits::default());
        assert_eq!((attach(&one), attach(&other)), (Ok(()), Ok(())));
        assert_eq!(ends.all().len(), 2);
    }

    #[test]
    fn a_full_queue_closes_the_stream() {
        let (end, _kept) = end_of(Kind::Client, 5, 1, 1);
        for nonce in 0..CONTROL_QUEUE_MAX as u64 {
            assert!(end.send(Message::Ping(selvedge_proto::control::Ping { nonce })));
        }
        assert!(!end.send(Message::Ping(selvedge_proto::control::Ping { nonce: 0 })));
        assert!(end.closed.is_cancelled());
        assert_eq!(end.why_closed(), "queue_full");
    }

    #[test]
    fn a_bucket_refills_with_time() {
        let mut bucket = Bucket::full();
        let now = Instant::now();
        assert!(bucket.take(now, 2) && bucket.take(now, 2) && !bucket.take(now, 2));
        let later = now + Duration::from_millis(600);
        assert!(bucket.take(later, 2) && !bucket.take(later, 2));
        assert!(bucket.take(later + Duration::from_millis(100), 100), "a new rate holds from the next one on");
    }
}
