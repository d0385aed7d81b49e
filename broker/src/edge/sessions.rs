//! The sessions of this broker, and what each is found by.
//!
//! **Invariant:** a session is in its indexes before the state that it is decided on is taken, so a change either is in
//! that state or finds the session.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use selvedge_domain::Id;
use selvedge_domain::policy::Principal;
use selvedge_domain::segment::{Endpoint, transport_name};
use selvedge_proto::frame::SessionCode;
use serde::Serialize;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::limits::Limits;
use super::metrics;
use super::standing::{Caller, principal_text};
use crate::relay::Counters;

/// One stitched connection, from `Open` on.
pub(super) struct Session {
    pub(super) id: u128,
    pub(super) caller: Caller,
    pub(super) endpoint: Endpoint,
    pub(super) program: Option<String>,
    pub(super) started: Instant,
    pub(super) started_ms: u64,
    pub(super) traceparent: String,
    pub(super) counters: Arc<Counters>,
    /// Cancelled, nothing is forwarded any more.
    pub(super) cut: CancellationToken,
    /// Cancelled when the last byte was forwarded and the session is out of the indexes.
    pub(super) over: CancellationToken,
    /// The verdict is good until then, cluster time in milliseconds.
    pub(super) good_until_ms: AtomicU64,
    /// `good_until_ms` has moved: whoever sleeps until it looks again.
    pub(super) good_until_moved: Notify,
    /// Its first byte may have been forwarded.
    pub(super) carried: AtomicBool,
    route: Mutex<Route>,
    code: OnceLock<SessionCode>,
    reported: OnceLock<SessionCode>,
}

#[derive(Clone, Default)]
struct Route {
    segment: Option<Id>,
    connector: Option<Id>,
}

impl Session {
    pub(super) fn new(
        id: u128,
        caller: Caller,
        endpoint: Endpoint,
        program: Option<String>,
        started_ms: u64,
        traceparent: String,
    ) -> Arc<Self> {
        Arc::new(Self {
            id,
            caller,
            endpoint,
            program,
            started: Instant::now(),
            started_ms,
            traceparent,
            counters: Arc::new(Counters::new()),
            cut: CancellationToken::new(),
            over: CancellationToken::new(),
            good_until_ms: AtomicU64::new(u64::MAX),
            good_until_moved: Notify::new(),
            carried: AtomicBool::new(false),
            route: Mutex::default(),
            code: OnceLock::new(),
            reported: OnceLock::new(),
        })
    }

    /// 32 hexadecimal digits.
    pub(super) fn name(&self) -> String {
        format!("{:032x}", self.id)
    }

    /// The trace that the attempt belongs to.
    pub(super) fn trace(&self) -> String {
        super::trace::trace_id(&self.traceparent)
    }

    /// Cuts it; the first reason counts.
    pub(super) fn cut_for(&self, code: SessionCode) {
        if self.code.set(code).is_ok() {
            metrics::cut(code.as_str());
        }
        self.cut.cancel();
    }

    /// Why it was cut.
    pub(super) fn cut_code(&self) -> Option<SessionCode> {
        self.code.get().copied()
    }

    /// What an end says of how its hop failed; the first word counts.
    pub(super) fn report(&self, code: SessionCode) {
        let _ = self.reported.set(code);
    }

    pub(super) fn reported(&self) -> Option<SessionCode> {
        self.reported.get().copied()
    }

    pub(super) fn segment(&self) -> Option<Id> {
        self.route.lock().segment
    }

    pub(super) fn connector(&self) -> Option<Id> {
        self.route.lock().connector
    }
}

/// A session, for people.
#[derive(Clone, Debug, Serialize, utoipa::ToSchema)]
pub struct SessionInfo {
    /// 32 hexadecimal digits.
    pub session: String,
    /// `user/1-42`, `workload/1-43`.
    pub principal: String,
    /// SPIFFE id of the certificate shown.
    pub presenter: String,
    /// Canonical host.
    pub host: String,
    /// Port.
    pub port: u16,
    /// `tcp` or `udp`.
    pub transport: String,
    /// Segment's id, once it was decided.
    pub segment: Option<String>,
    /// Connector's id, once it was chosen.
    pub connector: Option<String>,
    /// When it was asked for, milliseconds since the Unix epoch.
    pub started_ms: u64,
    /// Bytes from the client.
    pub up_bytes: u64,
    /// Bytes from the application.
    pub down_bytes: u64,
    /// Bytes are carried; before, it is being decided and dialed.
    pub carried: bool,
}

impl From<&Session> for SessionInfo {
    fn from(session: &Session) -> Self {
        let route = session.route.lock().clone();
        Self {
            session: session.name(),
            principal: principal_text(session.caller.principal),
            presenter: session.caller.peer.id.to_string(),
            host: session.endpoint.host.to_string(),
            port: session.endpoint.port,
            transport: transport_name(session.endpoint.transport).to_owned(),
            segment: route.segment.map(|id| id.to_string()),
            connector: route.connector.map(|id| id.to_string()),
            started_ms: session.started_ms,
            up_bytes: session.counters.up_bytes(),
            down_bytes: session.counters.down_bytes(),
            carried: session.carried.load(Ordering::Relaxed),
        }
    }
}

#[derive(Default)]
struct Inner {
    by_id: BTreeMap<u128, Arc<Session>>,
    by_principal: BTreeMap<Principal, BTreeSet<u128>>,
    by_presenter: BTreeMap<String, BTreeSet<u128>>,
    by_segment: BTreeMap<Id, BTreeSet<u128>>,
    by_connector: BTreeMap<Id, BTreeSet<u128>>,
}

/// What a change touches.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Touched {
    /// Everything: the policy set changed.
    pub(super) all: bool,
    pub(super) principals: BTreeSet<Principal>,
    /// SPIFFE ids of devices and workloads.
    pub(super) presenters: BTreeSet<String>,
    pub(super) connectors: BTreeSet<Id>,
    pub(super) segments: BTreeSet<Id>,
}

impl Touched {
    pub(super) fn is_nothing(&self) -> bool {
        *self == Self::default()
    }
}

/// The sessions of this broker.
#[derive(Default)]
pub(super) struct Sessions {
    inner: Mutex<Inner>,
}

/// A session that is in the indexes; dropped, it is out of them and over.
pub(super) struct Entered {
    sessions: Arc<Sessions>,
    pub(super) session: Arc<Session>,
}

impl Drop for Entered {
    fn drop(&mut self) {
        self.sessions.leave(&self.session);
        self.session.over.cancel();
    }
}

impl Sessions {
    /// Enters a session; none when a limit is reached.
    pub(super) fn enter(self: &Arc<Self>, session: &Arc<Session>, limits: Limits) -> Option<Entered> {
        let mut inner = self.inner.lock();
        let of_principal = inner.by_principal.get(&session.caller.principal).map_or(0, BTreeSet::len);
        if inner.by_id.len() >= limits.sessions as usize || of_principal >= limits.sessions_per_principal as usize {
            return None;
        }
        inner.by_id.insert(session.id, session.clone());
        inner.by_principal.entry(session.caller.principal).or_default().insert(session.id);
        inner.by_presenter.entry(session.caller.peer.id.to_string()).or_default().insert(session.id);
        metrics::sessions(inner.by_id.len());
        Some(Entered { sessions: self.clone(), session: session.clone() })
    }

    /// The segment that a session belongs to was found.
    pub(super) fn set_segment(&self, session: &Session, segment: Id) {
        let mut inner = self.inner.lock();
        if let Some(before) = session.route.lock().segment.replace(segment) {
            forget(&mut inner.by_segment, &before, session.id);
        }
        inner.by_segment.entry(segment).or_default().insert(session.id);
    }

    /// The connector that a session is given to was chosen.
    pub(super) fn set_connector(&self, session: &Session, connector: Id) {
        let mut inner = self.inner.lock();
        if let Some(before) = session.route.lock().connector.replace(connector) {
            forget(&mut inner.by_connector, &before, session.id);
        }
        inner.by_connector.entry(connector).or_default().insert(session.id);
    }

    pub(super) fn find(&self, id: u128) -> Option<Arc<Session>> {
        self.inner.lock().by_id.get(&id).cloned()
    }

    pub(super) fn all(&self) -> Vec<Arc<Session>> {
        self.inner.lock().by_id.values().cloned().collect()
    }

    pub(super) fn len(&self) -> usize {
        self.inner.lock().by_id.len()
    }

    /// The sessions that a change touches, each once.
    pub(super) fn touched(&self, by: &Touched) -> Vec<Arc<Session>> {
        let inner = self.inner.lock();
        if by.all {
            return inner.by_id.values().cloned().collect();
        }
        let mut ids = BTreeSet::new();
        ids.extend(by.principals.iter().filter_map(|key| inner.by_principal.get(key)).flatten());
        ids.extend(by.presenters.iter().filter_map(|key| inner.by_presenter.get(key)).flatten());
        ids.extend(by.connectors.iter().filter_map(|key| inner.by_connector.get(key)).flatten());
        ids.extend(by.segments.iter().filter_map(|key| inner.by_segment.get(key)).flatten());
        ids.iter().filter_map(|id| inner.by_id.get(id)).cloned().collect()
    }

    fn leave(&self, session: &Session) {
        let mut inner = self.inner.lock();
        inner.by_id.remove(&session.id);
        forget(&mut inner.by_principal, &session.caller.principal, session.id);
        forget(&mut inner.by_presenter, &session.caller.peer.id.to_string(), session.id);
        let route = session.route.lock().clone();
        if let Some(segment) = route.segment {
            forget(&mut inner.by_segment, &segment, session.id);
        }
        if let Some(connector) = route.connector {
            forget(&mut inner.by_connector, &connector, session.id);
        }
        metrics::sessions(inner.by_id.len());
    }
}

fn forget<K: Ord>(index: &mut BTreeMap<K, BTreeSet<u128>>, key: &K, id: u128) {
    if let Some(ids) = index.get_mut(key) {
        ids.remove(&id);
        if ids.is_empty() {
            index.remove(key);
        }
    }
}

/// When a session is looked at next: the earliest of its edges.
///
/// **Units**: milliseconds; `idle_ms` and `absolute_ms` are 0 for never.
pub(super) fn next_look(
    age: Duration,
    quiet: Duration,
    idle_ms: u64,
    absolute_ms: u64,
    verdict_left_ms: u64,
) -> Duration {
    let left = |limit_ms: u64, passed: Duration| match limit_ms {
        0 => Duration::MAX,
        limit_ms => Duration::from_millis(limit_ms).saturating_sub(passed),
    };
    let verdict = Duration::from_millis(verdict_left_ms);
    left(idle_ms, quiet).min(left(absolute_ms, age)).min(verdict).clamp(LOOK_MIN, LOOK_MAX)
}

const LOOK_MIN: Duration = Duration::from_millis(10);
const LOOK_MAX: Duration = Duration::from_secs(3_600);

#[cfg(test)]
pub(super) mod tests {
    use selvedge_domain::name::Host;
    use selvedge_domain::rows::Transport;
    use selvedge_proto::identity::{Kind, Peer, SpiffeId};

    use super::*;

    pub(in crate::edge) fn session_of(id: u128, user: u64, device: u64) -> Arc<Session> {
        let device = Id::new(1, device);
        let caller = Caller {
            peer: Peer {
                id: SpiffeId::new("demo.test", Kind::Client, &device.to_string()).unwrap(),
                serial: "01".into(),
                spki_sha256: [0; 32],
                not_after_ms: u64::MAX,
            },
            principal: Principal::User(Id::new(1, user)),
            device: Some(device),
            login: None,
            source: "127.0.0.1".parse().unwrap(),
        };
        let endpoint = Endpoint { host: Host::parse("crm.internal").unwrap(), port: 80, transport: Transport::Tcp };
        Session::new(id, caller, endpoint, None, 0, String::new())
    }

    #[test]
    fn a_change_touches_only_the_sessions_of_what_it_names() {
        let sessions = Arc::new(Sessions::default());
        let (a, b, c) = (session_of(1, 10, 20), session_of(2, 10, 21), session_of(3, 11, 22));
        let entered: Vec<Entered> = [&a, &b, &c].map(|s| sessions.enter(s, Limits::default()).unwrap()).into();
        sessions.set_segment(&a, Id::new(1, 30));
        sessions.set_connector(&a, Id::new(1, 40));
        sessions.set_connector(&c, Id::new(1, 41));
        let ids = |touched: Touched| sessions.touched(&touched).iter().map(|s| s.id).collect::<Vec<_>>();
        assert_eq!(ids(Touched::default()), [] as [u128; 0]);
        assert_eq!(ids(Touched { principals: [Principal::User(Id::new(1, 10))].into(), ..Default::default() }), [1, 2]);
        assert_eq!(ids(Touched { presenters: [b.caller.peer.id.to_string()].into(), ..Default::default() }), [2]);
        assert_eq!(ids(Touched { segments: [Id::new(1, 30)].into(), ..Default::default() }), [1]);
        assert_eq!(ids(Touched { connectors: [Id::new(1, 41)].into(), ..Default::default() }), [3]);
        assert_eq!(ids(Touched { all: true, ..Default::default() }), [1, 2, 3]);
        sessions.set_connector(&a, Id::new(1, 41));
        assert_eq!(ids(Touched { connectors: [Id::new(1, 40)].into(), ..Default::default() }), [] as [u128; 0]);
        drop(entered);
        assert!(a.over.is_cancelled());
        assert_eq!(ids(Touched { all: true, ..Default::default() }), [] as [u128; 0]);
        assert!(sessions.inner.lock().by_principal.is_empty() && sessions.inner.lock().by_connector.is_empty());
    }

    #[test]
    fn the_next_look_is_at_the_earliest_edge() {
        let ms = Duration::from_millis;
        assert_eq!(next_look(ms(0), ms(0), 0, 0, u64::MAX), LOOK_MAX);
        assert_eq!(next_look(ms(900), ms(100), 500, 5_000, u64::MAX), ms(400));
        assert_eq!(next_look(ms(4_800), ms(0), 500, 5_000, u64::MAX), ms(200));
        assert_eq!(next_look(ms(0), ms(0), 500, 0, 50), ms(50));
    }
}
