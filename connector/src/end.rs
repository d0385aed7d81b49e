//! What all control streams of one process share: who it is, whom it trusts, which brokers there are.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use parking_lot::Mutex;
use rustls_pki_types::ServerName;
use selvedge_proto::control::{Broker, BrokerList, Brokers, Hello, KnockKeys, Position, Zones};
use selvedge_proto::hello::KnockKey;
use selvedge_proto::identity::{Anchors, Kind, SpiffeId};
use selvedge_proto::tls::{self, Identity};
use tokio::net::TcpStream;
use tokio::sync::{Notify, watch};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tracing::{info, warn};

use crate::dial::{self, Via};
use crate::link::Error;
use crate::state::{Lock, SignedBrokers, Store};
use crate::{clock, enrol, state, trust};

/// Lowest and highest version of the control protocol that this build speaks.
pub(crate) const PROTOCOL: (u32, u32) = (1, 1);

const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(3);

/// One enrolled end, running.
pub(crate) struct End {
    pub(crate) anchors: Arc<Anchors>,
    pub(crate) identity: ArcSwap<Identity>,
    pub(crate) spiffe: SpiffeId,
    pub(crate) via: Via,
    pub(crate) zones: watch::Sender<Option<Zones>>,
    store: Store,
    instance: [u8; 16],
    grants: ArcSwap<Vec<Vec<u8>>>,
    knock: ArcSwap<KnockKey>,
    brokers: ArcSwap<BrokerList>,
    brokers_changed: Notify,
    stream: AtomicU64,
    fences: Mutex<BTreeMap<u64, Arc<Fence>>>,
    _lock: Lock,
}

impl End {
    /// Opens the state of `dir` for this process alone.
    pub(crate) fn open(dir: &Path, via: Via) -> Result<Arc<Self>, state::Error> {
        state::prepare_dir(dir)?;
        let lock = Lock::take(dir)?;
        let (store, identity) = Store::open(dir)?;
        let malformed = |reason: &str| state::Error::Malformed {
            path: dir.join("state.json").display().to_string(),
            reason: reason.to_owned(),
        };
        let state = store.with(Clone::clone);
        let knock =
            state.knock_keys.first().and_then(|key| decode_knock(key)).ok_or_else(|| malformed("no knock key"))?;
        let brokers = enrol::decode_brokers(&state.brokers).map_err(|error| malformed(&error.to_string()))?;
        // It was verified when it was stored, in a directory that only its owner writes.
        let brokers = trust::verify_brokers(&state.anchors, &brokers, true, clock::unix_ms())
            .map_err(|error| malformed(&error.to_string()))?;
        let grants: Vec<_> = state.grants.iter().filter_map(|grant| STANDARD.decode(grant).ok()).collect();
        Ok(Arc::new(Self {
            anchors: Arc::new(state.anchors),
            identity: ArcSwap::from_pointee(identity),
            spiffe: state.spiffe,
            via,
            zones: watch::Sender::new(None),
            instance: rand::random(),
            grants: ArcSwap::from_pointee(grants),
            knock: ArcSwap::from_pointee(knock),
            brokers: ArcSwap::from_pointee(brokers),
            brokers_changed: Notify::new(),
            stream: AtomicU64::new(state.stream),
            fences: Mutex::new(BTreeMap::new()),
            store,
            _lock: lock,
        }))
    }

    /// The brokers of the newest list.
    pub(crate) fn brokers(&self) -> Arc<BrokerList> {
        self.brokers.load_full()
    }

    /// Waits until the list changes.
    pub(crate) async fn brokers_changed(&self) {
        self.brokers_changed.notified().await;
    }

    /// Until when this end may read what a broker forwards.
    pub(crate) fn fence(&self, node: u64) -> Arc<Fence> {
        self.fences.lock().entry(node).or_default().clone()
    }

    /// The first message of a control stream.
    pub(crate) fn hello(&self) -> Hello {
        let newest = self.stream.load(Ordering::Acquire).max(clock::unix_ms()) + 1;
        let stream = self.stream.fetch_max(newest, Ordering::AcqRel).max(newest);
        let position = self.brokers.load().position;
        Hello {
            protocol_min: PROTOCOL.0,
            protocol_max: PROTOCOL.1,
            build: env!("CARGO_PKG_VERSION").to_owned(),
            features: vec!["hop-raw".to_owned()],
            instance: self.instance.to_vec(),
            role: self.spiffe.kind().to_string(),
            position,
            stream,
            grants: self.grants.load().to_vec(),
            node: 0,
            name: self.store.with(|state| state.name.clone()),
        }
    }

    /// Opens a TLS connection for a control stream; answers the time of the handshake's round trip too.
    pub(crate) async fn connect(&self, broker: &Broker) -> Result<(TlsStream<TcpStream>, Duration), Error> {
        let expected = SpiffeId::new(self.anchors.trust_domain(), Kind::Broker, &broker.node.to_string())?;
        let alpn = vec![tls::CONTROL_ALPN.to_vec(), self.knock.load().knock()];
        let identity = self.identity.load();
        let config = tls::edge_client(&**identity, &self.anchors, alpn, Some(expected), &tls::system_time())?;
        let server = server_name(broker)?;
        let stream = dial::broker(&self.via, broker).await.map_err(Error::Connect)?;
        let began = Instant::now();
        let stream = timeout(HANDSHAKE_TIMEOUT, TlsConnector::from(Arc::new(config)).connect(server, stream))
            .await
            .map_err(|_| Error::Silent)?
            .map_err(Error::Handshake)?;
        Ok((stream, began.elapsed()))
    }

    /// Takes a list of brokers that a broker sent.
    pub(crate) fn take_brokers(self: &Arc<Self>, message: &Brokers) {
        let list = match trust::verify_brokers(&self.anchors, message, true, clock::unix_ms()) {
            Ok(list) => list,
            Err(error) => return warn!(%error, "a list of brokers was not believed"),
        };
        let known = self.brokers.load();
        if order(list.position.as_ref(), list.time_ms) < order(known.position.as_ref(), known.time_ms) {
            return;
        }
        let changed = known.brokers != list.brokers;
        self.brokers.store(Arc::new(list));
        if changed {
            self.brokers_changed.notify_waiters();
            let signed = SignedBrokers {
                list: STANDARD.encode(&message.list),
                signature: STANDARD.encode(&message.signature),
                signer: STANDARD.encode(&message.signer),
            };
            self.save(|state| state.brokers = signed);
        }
    }

    /// Takes the knock keys that a broker sent.
    pub(crate) fn take_knock_keys(self: &Arc<Self>, message: &KnockKeys) {
        let Some(first) = message.keys.first().and_then(|key| KnockKey::from_bytes(key)) else {
            return warn!("knock keys of a wrong form");
        };
        let keys: Vec<_> = message.keys.iter().take(8).map(|key| STANDARD.encode(key)).collect();
        self.knock.store(Arc::new(first));
        if self.store.with(|state| state.knock_keys != keys) {
            self.save(|state| state.knock_keys = keys);
        }
    }

    /// Stores and uses a renewed identity, and the login grant that is bound to its key, if there is one.
    pub(crate) fn take_identity(self: &Arc<Self>, identity: Identity, grant: Vec<u8>) -> Result<(), tls::Error> {
        if !grant.is_empty() {
            // Both are shown: whichever key a crash leaves behind has its grant.
            let grants: Vec<_> = std::iter::once(grant).chain(self.grants.load().first().cloned()).collect();
            let texts = grants.iter().map(|grant| STANDARD.encode(grant)).collect();
            self.grants.store(Arc::new(grants));
            self.save(|state| state.grants = texts);
        }
        identity.save(&state::identity_path(self.store.dir()))?;
        self.identity.store(Arc::new(identity));
        info!("certificate renewed");
        Ok(())
    }

    /// Whether the certificate has ended, so that no edge takes it.
    pub(crate) fn has_expired(&self) -> bool {
        self.identity.load().validity_ms().is_ok_and(|(_, end_ms)| end_ms <= clock::unix_ms())
    }

    /// Web listeners: that of the enrolment, and of any broker that is known.
    fn webs(&self) -> Vec<String> {
        let first = self.store.with(|state| state.web.clone());
        let brokers = self.brokers.load();
        let others = brokers.brokers.iter().map(|broker| &broker.web).filter(|web| !web.is_empty() && **web != first);
        std::iter::once(&first).chain(others).cloned().collect()
    }

    /// Asks at web listeners which brokers there are.
    pub(crate) async fn ask_for_brokers(self: &Arc<Self>) -> Result<(), String> {
        let mut why = String::new();
        for web in self.webs() {
            match enrol::brokers(&web, &self.anchors, &self.identity.load()).await {
                Ok((brokers, keys)) => {
                    self.take_brokers(&brokers);
                    self.take_knock_keys(&keys);
                    return Ok(());
                }
                Err(error) => why = error.to_string(),
            }
        }
        Err(why)
    }

    /// Whether a broker is of an earlier epoch than one that this end has heard of.
    pub(crate) fn is_of_the_past(&self, position: Option<&Position>) -> bool {
        epoch(position) < epoch(self.brokers.load().position.as_ref())
    }

    /// Certifies a new key at a web listener.
    pub(crate) async fn renew_expired(self: &Arc<Self>) -> Result<(), String> {
        let mut why = String::new();
        for web in self.webs() {
            match enrol::renew(&web, &self.anchors, &self.identity.load()).await {
                Ok(identity) => return self.take_identity(identity, Vec::new()).map_err(|error| error.to_string()),
                Err(error) => why = error.to_string(),
            }
        }
        Err(why)
    }

    /// The directory of this end's state.
    pub(crate) fn dir(&self) -> &Path {
        self.store.dir()
    }

    /// How long a session is held when its broker's lease has run out.
    pub(crate) fn hold_ms(&self) -> u64 {
        self.store.with(|state| state.hold_ms)
    }

    fn save(self: &Arc<Self>, change: impl FnOnce(&mut state::State) + Send + 'static) {
        let end = self.clone();
        tokio::task::spawn_blocking(move || {
            let stream = end.stream.load(Ordering::Acquire);
            let saved = end.store.update(|state| {
                change(state);
                state.stream = state.stream.max(stream);
            });
            if let Err(error) = saved {
                warn!(%error, "the state could not be saved");
            }
        });
    }
}

/// The name that a broker's TLS connections ask for.
pub(crate) fn server_name(broker: &Broker) -> Result<ServerName<'static>, Error> {
    ServerName::try_from(broker.host.clone()).map_err(|_| Error::Host(broker.host.clone()))
}

/// What a `Dial` says of a broker's lease counts for at most so long; links ask every second.
const DIAL_LEASE_MS_MAX: u64 = 3_000;

/// Until when, on the boot clock, what a broker forwards may be read; and how many sessions care.
#[derive(Default)]
pub(crate) struct Fence {
    until_ms: AtomicU64,
    sessions: AtomicUsize,
    extended: Notify,
}

impl Fence {
    /// Moves the end forward; never back.
    pub(crate) fn extend(&self, until_ms: u64) {
        self.until_ms.fetch_max(until_ms, Ordering::AcqRel);
        self.extended.notify_waiters();
    }

    /// Opens it by what a `Dial` says is left of the lease, for as long as it takes to ask. How old a `Dial` is nobody
    /// here knows: while there are sessions, which ask, it opens nothing.
    pub(crate) fn open_by_dial(&self, now_ms: u64, left_ms: u64) {
        if self.sessions() == 0 {
            self.extend(now_ms.saturating_add(left_ms.min(DIAL_LEASE_MS_MAX)));
        }
    }

    /// Whether `now_ms` is before the end.
    pub(crate) fn is_open(&self, now_ms: u64) -> bool {
        now_ms < self.until_ms.load(Ordering::Acquire)
    }

    /// When it closes.
    pub(crate) fn until_ms(&self) -> u64 {
        self.until_ms.load(Ordering::Acquire)
    }

    /// Waits for the next move forward.
    pub(crate) async fn extended(&self) {
        self.extended.notified().await;
    }

    /// How many sessions go through this broker.
    pub(crate) fn sessions(&self) -> usize {
        self.sessions.load(Ordering::Acquire)
    }

    /// Counts a session as long as the answer lives.
    pub(crate) fn enter(self: &Arc<Self>) -> Fenced {
        self.sessions.fetch_add(1, Ordering::AcqRel);
        Fenced(self.clone())
    }
}

/// One session counted by a [`Fence`].
pub(crate) struct Fenced(Arc<Fence>);

impl std::ops::Deref for Fenced {
    type Target = Fence;

    fn deref(&self) -> &Fence {
        &self.0
    }
}

impl Drop for Fenced {
    fn drop(&mut self) {
        self.0.sessions.fetch_sub(1, Ordering::AcqRel);
    }
}

fn order(position: Option<&Position>, time_ms: u64) -> (u32, u64, u64) {
    position.map_or((0, 0, time_ms), |position| (position.epoch, position.seq, time_ms))
}

fn epoch(position: Option<&Position>) -> u32 {
    position.map_or(0, |position| position.epoch)
}

fn decode_knock(text: &str) -> Option<KnockKey> {
    KnockKey::from_bytes(&STANDARD.decode(text).ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_of_a_later_epoch_goes_before_one_with_a_higher_number() {
        let position = |epoch, seq| Position { epoch, seq };
        let (last, next) = (position(1, 900), position(2, 7));
        assert!(order(Some(&last), 50) < order(Some(&next), 10));
        assert!(epoch(Some(&last)) < epoch(Some(&next)) && epoch(None) < epoch(Some(&last)));
    }

    #[test]
    fn a_fence_moves_only_forward_and_counts_its_sessions() {
        let fence = Arc::new(Fence::default());
        assert!(!fence.is_open(0));
        fence.extend(100);
        fence.extend(50);
        assert!(fence.is_open(99));
        assert!(!fence.is_open(100));
        let one = fence.enter();
        let two = fence.enter();
        assert_eq!(fence.sessions(), 2);
        drop((one, two));
        assert_eq!(fence.sessions(), 0);
    }

    #[test]
    fn a_dial_opens_a_fence_only_until_this_end_has_asked_for_itself() {
        let fence = Arc::new(Fence::default());
        fence.open_by_dial(1_000, 60_000);
        assert!(fence.is_open(1_000) && !fence.is_open(1_000 + DIAL_LEASE_MS_MAX), "however much is said to be left");
        fence.open_by_dial(1_000 + DIAL_LEASE_MS_MAX, 500);
        assert!(!fence.is_open(1_500 + DIAL_LEASE_MS_MAX));
        let one = fence.enter();
        fence.open_by_dial(10_000, 60_000);
        assert!(!fence.is_open(10_000), "a session is there, and asks");
        drop(one);
    }
}
