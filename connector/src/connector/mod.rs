//! The app connector: dials out to its brokers, and joins their sessions to applications beside it.
//!
//! Invariants: it listens on nothing; it connects only where its own allow list says, judged on the address it
//! connects to; no application byte passes while the stitching broker's lease is over.

mod allow;
mod config;
mod health;
mod parked;
mod session;
mod udp;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use selvedge_domain::name::Host;
use selvedge_proto::control::{CutDone, DialAnswer, from_end};
use selvedge_proto::frame::SessionCode;
use selvedge_proto::identity::Kind;
use selvedge_proto::tls::{self, Identity};
use tokio::net::lookup_host;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

pub use allow::{Allow, Refusal, Rule};
pub use config::{Config, PARKED_HOPS_MAX, SESSIONS_MAX, Valid};

use crate::end::End;
use crate::link::{Event, Link};
use crate::links::Links;
use crate::{metrics, state};
use health::Health;
use parked::Parked;

/// Events of all control streams that wait for this role; full means that the streams wait.
const EVENTS: usize = 1_024;
/// Longest look-up of an application's name.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a cut waits for its session's sockets.
const CUT_TIMEOUT: Duration = Duration::from_secs(2);
/// How long the sessions have to end when the connector is stopped.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(2);

/// Why a connector cannot run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration is wrong.
    #[error("configuration: {0}")]
    Config(String),
    /// The state cannot be used.
    #[error(transparent)]
    State(#[from] state::Error),
    /// What is enrolled there is something else.
    #[error("`{0}` is not a connector's state directory")]
    NotAConnector(String),
    /// TLS cannot be set up.
    #[error(transparent)]
    Tls(#[from] tls::Error),
}

/// Runs a connector until `shutdown`.
///
/// **Errors**: only what is wrong before it starts; afterwards it tries for ever.
pub async fn run(config: Config, shutdown: CancellationToken) -> Result<(), Error> {
    let config = config.validate()?;
    let end = End::open(&config.state, config.via.clone())?;
    if end.spiffe.kind() != Kind::Connector {
        return Err(Error::NotAConnector(config.state.display().to_string()));
    }
    let identity = end.identity.load_full();
    let acceptor = acceptor(&identity, &end)?;
    let (events, inbox) = mpsc::channel(EVENTS);
    let (links, supervisor) = Links::start(end.clone(), config.parked_hops, Some(events), shutdown.child_token());
    let hold = config.hold.unwrap_or(Duration::from_millis(end.hold_ms()));
    info!(name = config.name, id = %end.spiffe, "connector started");
    let role = Arc::new(Role {
        acceptor: Mutex::new((identity, acceptor)),
        brokers: ArcSwap::from_pointee(BTreeSet::new()),
        sessions: Mutex::new(HashMap::new()),
        parked: Parked::new(config.parked_hops),
        health: Health::default(),
        config,
        end,
        links,
        hold,
    });
    role.find_brokers().await;
    let checks = tokio::spawn(health::run(role.clone(), shutdown.clone()));
    role.serve(inbox, &shutdown).await;
    role.cut_all().await;
    // Both end with `shutdown`.
    let _ = tokio::join!(checks, supervisor);
    info!("connector stopped");
    Ok(())
}

/// One session, as `Cut` finds it.
#[derive(Clone, Default)]
struct Entry {
    cut: CancellationToken,
    done: CancellationToken,
}

/// What all sessions of one connector share.
struct Role {
    config: Valid,
    end: Arc<End>,
    links: Arc<Links>,
    parked: Parked,
    health: Health,
    hold: Duration,
    brokers: ArcSwap<BTreeSet<IpAddr>>,
    sessions: Mutex<HashMap<u128, Entry>>,
    acceptor: Mutex<(Arc<Identity>, TlsAcceptor)>,
}

impl Role {
    async fn serve(self: &Arc<Self>, mut inbox: mpsc::Receiver<(Arc<Link>, Event)>, shutdown: &CancellationToken) {
        let mut tasks = JoinSet::new();
        loop {
            let (link, event) = tokio::select! {
                () = shutdown.cancelled() => return,
                Some(_) = tasks.join_next() => continue,
                event = inbox.recv() => match event {
                    Some(event) => event,
                    None => return,
                },
            };
            match event {
                Event::Dial(dial) => {
                    if self.sessions.lock().len() >= self.config.sessions_max {
                        warn!("too many sessions");
                        let busy = DialAnswer { session: dial.session, code: SessionCode::Busy as u32, app_rtt_us: 0 };
                        // A full outbox or a gone stream: the broker's deadline says the same.
                        let _ = link.try_send(from_end::Message::DialAnswer(busy));
                        continue;
                    }
                    tasks.spawn(session::run(self.clone(), link, *dial));
                }
                Event::Cut(cut) => {
                    let entry = session_id(&cut.session).and_then(|id| self.sessions.lock().get(&id).cloned());
                    let code = SessionCode::from_wire(i32::try_from(cut.code).unwrap_or(0));
                    debug!(%code, found = entry.is_some(), "cut");
                    let done = from_end::Message::CutDone(CutDone { session: cut.session });
                    tasks.spawn(async move {
                        if let Some(entry) = entry {
                            entry.cut.cancel();
                            if timeout(CUT_TIMEOUT, entry.done.cancelled()).await.is_err() {
                                return warn!("a session did not end when it was cut");
                            }
                        }
                        // A stream that is gone cannot be told; its broker counts on the lease then.
                        let _ = link.send(done).await;
                    });
                }
                Event::Targets(targets) => self.health.take(&link, targets),
                Event::Attached => {
                    self.parked.forget(link.broker.node);
                    self.health.changed();
                }
                Event::Tickets => {
                    tasks.spawn(parked::fill(self.clone(), link));
                }
                Event::Detached => {
                    self.parked.forget(link.broker.node);
                    self.health.forget(link.broker.node);
                }
            }
        }
    }

    /// The addresses that `host` and `port` stand for here.
    async fn resolve(&self, host: &Host, port: u16) -> Result<Vec<SocketAddr>, SessionCode> {
        if let Some(address) = self.config.hosts.get(host) {
            return Ok(vec![SocketAddr::new(*address, port)]);
        }
        match host {
            Host::Address(address) => Ok(vec![SocketAddr::new(*address, port)]),
            Host::Name(name) => match timeout(RESOLVE_TIMEOUT, lookup_host((name.as_str(), port))).await {
                Ok(Ok(addresses)) => Ok(addresses.collect()),
                Ok(Err(_)) => Err(SessionCode::AppUnreachable),
                Err(_) => Err(SessionCode::AppTimeout),
            },
        }
    }

    /// The first address of a target that this connector may reach.
    async fn permitted(&self, host: &Host, port: u16) -> Result<SocketAddr, SessionCode> {
        let brokers = self.brokers.load();
        let mut refused = SessionCode::AppUnreachable;
        for address in self.resolve(host, port).await? {
            match self.config.allow.check(address, &brokers) {
                Ok(()) => return Ok(address),
                Err(refusal) => {
                    debug!(%host, %address, %refusal, "not allowed here");
                    refused = SessionCode::NotAllowed;
                }
            }
        }
        Err(refused)
    }

    /// Looks the brokers' addresses up, so that no session reaches one.
    async fn find_brokers(&self) {
        let list = self.end.brokers();
        let mut found = BTreeSet::new();
        for broker in &list.brokers {
            for address in [&broker.edge, &broker.web] {
                if let Ok(Ok(addresses)) = timeout(RESOLVE_TIMEOUT, lookup_host(address.as_str())).await {
                    found.extend(addresses.map(|address| address.ip().to_canonical()));
                }
            }
        }
        self.brokers.store(Arc::new(found));
    }

    /// The answering side of end-to-end handshakes, with the certificate of now.
    fn acceptor(&self) -> Result<TlsAcceptor, tls::Error> {
        let identity = self.end.identity.load_full();
        let mut cached = self.acceptor.lock();
        if !Arc::ptr_eq(&cached.0, &identity) {
            let acceptor = acceptor(&identity, &self.end)?;
            *cached = (identity, acceptor);
        }
        Ok(cached.1.clone())
    }

    fn enter(&self, session: u128) -> Option<Entry> {
        let mut sessions = self.sessions.lock();
        if sessions.contains_key(&session) {
            return None;
        }
        let entry = Entry::default();
        sessions.insert(session, entry.clone());
        ::metrics::gauge!(metrics::SESSIONS).set(sessions.len() as f64);
        Some(entry)
    }

    fn leave(&self, session: u128, entry: &Entry) {
        let mut sessions = self.sessions.lock();
        sessions.remove(&session);
        ::metrics::gauge!(metrics::SESSIONS).set(sessions.len() as f64);
        entry.done.cancel();
    }

    async fn cut_all(&self) {
        let entries: BTreeMap<_, _> = self.sessions.lock().iter().map(|(id, entry)| (*id, entry.clone())).collect();
        for entry in entries.values() {
            entry.cut.cancel();
        }
        let ended = async {
            for entry in entries.values() {
                entry.done.cancelled().await;
            }
        };
        // What does not end now ends with the process.
        let _ = timeout(DRAIN_TIMEOUT, ended).await;
    }

    fn load_permille(&self) -> u32 {
        let load = self.sessions.lock().len() * 1_000 / self.config.sessions_max;
        u32::try_from(load).unwrap_or(1_000).min(1_000)
    }
}

fn acceptor(identity: &Identity, end: &End) -> Result<TlsAcceptor, tls::Error> {
    Ok(TlsAcceptor::from(Arc::new(tls::hop_server(identity, &end.anchors, &tls::system_time())?)))
}

fn session_id(bytes: &[u8]) -> Option<u128> {
    Some(u128::from_be_bytes(bytes.try_into().ok()?))
}
