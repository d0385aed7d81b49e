//! A broker as one thing: puts cluster, edge, web, audit and ops together, and takes them apart in order.

mod home;
mod renewal;
mod restore;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use metrics_exporter_prometheus::PrometheusHandle;
use selvedge_cluster::{Blocking, Clock, Cluster, LogLimits, Options, SystemClock, Tls};
use selvedge_domain::command::PutBroker;
use selvedge_domain::rows::BrokerRole;
use selvedge_domain::{Asker, Body};
use selvedge_proto::tls::{self, Identity, NotBefore, Renewable, TimeSource};
use selvedge_storage::DataDir;
use selvedge_storage::audit::{Journal, StreamId};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::audit::{Exporter, Log, Record, SessionLost, retention};
use crate::config::Valid;
use crate::decision::Decider;
use crate::edge::{self, Edge};
use crate::issuer::Issuer;
use crate::ops::{Configured, Ops, Reload};
use crate::relay::{RELAY_PIPES_MAX, Relay};
use crate::routing::Routing;
use crate::web;
use home::{First, new_owner_token};
pub(crate) use home::{Home, identity_path};
pub use home::{
    InitOptions, Initialised, JoinReply, JoinRequest, Seed, init, join_complete, join_request, join_seal_key, member,
};
use renewal::Renewal;
pub use renewal::{CERTIFICATE_LEFT_SECONDS, CERTIFICATE_RENEWALS_TOTAL};
pub use restore::{From as RestoreFrom, Options as RestoreOptions, Restored, restore};
pub use selvedge_cluster::{SnapshotHead, save_at_rest};

/// Longest wait of a starting broker for a leader.
const START_STEP: Duration = Duration::from_secs(5);
/// Between attempts to register with a leader.
const REGISTER_RETRY: Duration = Duration::from_millis(500);
/// Longest wait for everything to end.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a broker does not start, or must stop.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `cluster init` or `cluster join` has not run here.
    #[error("this data directory belongs to no cluster: run `selvedge cluster init` or `selvedge cluster join` first")]
    NotMember,
    /// It has.
    #[error("this data directory belongs to a cluster already")]
    AlreadyMember,
    /// A file cannot be read or written.
    #[error("cannot use `{path}`")]
    File {
        /// File.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A file is not what was written.
    #[error("`{0}` is damaged: {1}")]
    Damaged(PathBuf, String),
    /// An address cannot be listened on.
    #[error("the `{listener}` listener cannot use `{address}`")]
    Listen {
        /// Which listener.
        listener: &'static str,
        /// Its address.
        address: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The certificate that was answered is somebody else's.
    #[error("the certificate that was answered is for `{0}`")]
    OtherIdentity(String),
    /// Nothing says where the issuer's keys are.
    #[error("no sealed issuer is there: name a data directory that has one, or a copy of it, with `--issuer`")]
    NoIssuer,
    /// The issuer that was named is of another cluster than the state.
    #[error("the issuer is of cluster `{0}`, the state of `{1}`")]
    OtherIssuer(String, String),
    /// A restore or recovery.
    #[error(transparent)]
    Restore(#[from] selvedge_cluster::restore::Error),
    /// The first command of the cluster was not accepted.
    #[error("the cluster was not initialised")]
    Initialise(#[source] Box<selvedge_cluster::ProposeError>),
    /// Storage.
    #[error(transparent)]
    Storage(#[from] selvedge_storage::Error),
    /// Issuer.
    #[error("issuer")]
    Issuer(#[from] crate::issuer::Error),
    /// TLS.
    #[error("tls")]
    Tls(#[from] tls::Error),
    /// Identities.
    #[error("identity")]
    Identity(#[from] selvedge_proto::identity::Error),
    /// Cluster.
    #[error(transparent)]
    Cluster(#[from] selvedge_cluster::Error),
    /// The web listener's certificate.
    #[error(transparent)]
    Web(#[from] web::CertificateError),
    /// The broker can no longer be trusted to hold what it should.
    #[error("{0}")]
    Fatal(#[from] selvedge_cluster::Fatal),
}

impl Error {
    fn file(path: &Path, source: std::io::Error) -> Self {
        Self::File { path: path.to_owned(), source }
    }
}

/// A running broker.
pub struct Broker {
    cluster: Cluster,
    edge: Arc<Edge>,
    /// None without the role.
    web: Option<web::Web>,
    reload: Arc<Reload>,
    owner_token: Option<String>,
    stop: CancellationToken,
    tasks: TaskTracker,
    drain_on_stop: Duration,
    /// Keeps the edge's TLS configuration replaceable.
    _edge_tls: watch::Sender<Arc<rustls::ServerConfig>>,
}

/// Cluster time once there is a cluster, the wall clock before.
#[derive(Clone)]
struct ClusterTime {
    cluster: Arc<OnceLock<Cluster>>,
    clock: Arc<dyn Clock>,
}

impl ClusterTime {
    fn now_ms(&self) -> u64 {
        self.cluster.get().map_or_else(|| self.clock.wall_ms(), Cluster::now_ms)
    }

    fn source(&self) -> TimeSource {
        let time = self.clone();
        Arc::new(move || time.now_ms())
    }
}

impl Broker {
    /// Starts everything. Returns when the listeners are open and this broker is registered with a leader.
    pub async fn start(configured: Configured, metrics: PrometheusHandle) -> Result<Self, Error> {
        Self::start_with_clock(configured, metrics, SystemClock::shared()).await
    }

    /// [`Broker::start`] with another clock than the machine's.
    pub async fn start_with_clock(
        configured: Configured,
        metrics: PrometheusHandle,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, Error> {
        tls::install_provider();
        let Configured { sources, loaded, set_log } = configured;
        let config = loaded.config;
        let home = Home::load(&config)?;
        let dir = Arc::new(DataDir::open(&config.data_dir)?);
        let own = Renewable::new(Identity::load(&home::identity_path(&config))?);
        let issuer = match Issuer::open(&config.issuer_dir(), &config.issuer_seal()) {
            Ok(issuer) => Some(Arc::new(issuer)),
            Err(crate::issuer::Error::Missing(_)) => None,
            Err(error) => return Err(error.into()),
        };
        let anchors = Arc::new(home.anchors.clone());
        let time = ClusterTime { cluster: Arc::default(), clock: clock.clone() };
        let listeners = Listeners::bind(&config)?;
        let journal = Journal::open(
            &dir.audit_path(),
            StreamId { broker: dir.node_id(), boot: dir.boot() },
            selvedge_storage::audit::Options::default(),
        )?;
        let log = Log::new(Arc::new(journal), {
            let time = time.clone();
            Arc::new(move || time.now_ms())
        });

        let not_before = NotBefore::deferred();
        let hook = edge::Hook::new();
        let cluster = Cluster::start(Options {
            cluster_id: anchors.cluster_id(),
            preset: config.preset,
            transport: Tls::shared(
                listeners.peer,
                Arc::new(tls::peer_server(&own, &anchors, not_before.clone(), &time.source())?),
                Arc::new(tls::peer_client(&own, &anchors, None, not_before.clone(), &time.source())?),
            ),
            clock,
            seed: None,
            blocking: Blocking::Threads,
            enforcer: Arc::new(hook.clone()),
            seeds: home.seeds.iter().map(|seed| (seed.node, seed.peer.clone())).collect(),
            dial: dial_override(&config, &home, &time),
            services: Some(tonic::service::Routes::new(hook.relay_service())),
            log_limits: LogLimits::default(),
            runtime: None,
            dir,
        })
        .await?;
        let _ = time.cluster.set(cluster.clone());
        let (stop, tasks) = (CancellationToken::new(), TaskTracker::new());
        let renewal = Renewal {
            cluster: cluster.clone(),
            issuer: issuer.clone(),
            anchors: anchors.clone(),
            own: own.clone(),
            path: home::identity_path(&config),
            host: config.host.clone(),
            time: time.source(),
        };
        // Before this broker is registered: the others may not take its certificate any more.
        tasks.spawn(renewal.run(stop.clone()));
        let end_with_this = stop.clone().drop_guard();
        record_lost_sessions(&log).await;

        let decider = Decider::new();
        let routing = Routing::new(cluster.node());
        let edge_tls = tls::edge_server(&own, &anchors, vec![tls::CONTROL_ALPN.to_vec()], &time.source())?;
        let (edge_tls, edge_tls_now) = watch::channel(Arc::new(edge_tls));
        let edge = Edge::new(edge::Parts {
            name: config.name.clone(),
            region: config.region.clone(),
            ground: Arc::new(cluster.clone()),
            anchors: anchors.clone(),
            tls: edge_tls_now,
            audit: log.clone(),
            issuer: issuer.clone(),
            decider: decider.clone(),
            routing: routing.clone(),
            relay: Relay::new(RELAY_PIPES_MAX),
            limits: config.limits,
        });
        hook.set(edge.clone());
        if home.roles.contains(&BrokerRole::Edge) {
            let (edge, stop) = (edge.clone(), stop.clone());
            tasks.spawn(async move {
                if let Err(error) = edge.serve(listeners.edge, stop).await {
                    tracing::error!(%error, "the edge listener failed");
                }
            });
        }
        let certificates = match home.roles.contains(&BrokerRole::Web) {
            true => Some(web_certificates(&config, issuer.clone(), &own, &time)?),
            false => None,
        };
        let context = web::Context::new(web::Parts {
            cluster: cluster.clone(),
            decider,
            edge: Some(edge.clone()),
            routing: Some(routing),
            audit: log.clone(),
            issuer: issuer.clone(),
            anchors: anchors.clone(),
        });
        let reload = Arc::new(Reload::new(sources, set_log, loaded.shown, edge.clone(), certificates.clone()));
        let serve = |certificates| web::Web::serve(context, listeners.web, certificates);
        let web = certificates.map(serve).transpose().map_err(|source| Error::Listen {
            listener: "web",
            address: config.web.bind.to_string(),
            source,
        })?;
        tasks.spawn(retention::run(cluster.clone(), log.clone(), stop.clone()));
        tasks.spawn(Exporter::new(cluster.clone(), log, config.name.clone()).run(stop.clone()));
        let (ops, ops_stop) = (Ops::new(cluster.clone(), metrics, reload.clone()), stop.clone());
        tasks.spawn(async move {
            if let Err(error) = ops.serve(listeners.ops, ops_stop).await {
                tracing::error!(%error, "the ops listener failed");
            }
        });

        // What is served answers from now on, if only that there is nothing to be had yet.
        let owner_token = match &home.first {
            Some(first) => initialise(&cluster, &config, &home, first).await?,
            None => None,
        };
        tokio::select! {
            registered = register(&cluster, &config, &home) => registered?,
            fatal = cluster.fatal() => return Err(fatal.into()),
        }
        not_before.judge();
        if home.first.is_some() {
            Home { first: None, ..home }.store(&config)?;
        }
        let stop = end_with_this.disarm();
        let drain_on_stop = Duration::from_secs(config.drain_on_stop_s.into());
        Ok(Self { cluster, edge, web, reload, owner_token, stop, tasks, drain_on_stop, _edge_tls: edge_tls })
    }

    /// The owner's token, when this start made the cluster. Shown once.
    pub fn owner_token(&self) -> Option<&str> {
        self.owner_token.as_deref()
    }

    /// Reads the configuration again.
    pub fn reload(&self) -> Arc<Reload> {
        self.reload.clone()
    }

    /// Node id.
    pub fn node(&self) -> u64 {
        self.cluster.node()
    }

    /// Runs until `shutdown`, then stops in order: leadership is handed over, ends are told to go elsewhere, and what is
    /// left of the sessions is cut at the deadline, or as soon as `now` says so.
    ///
    /// **Errors** when the broker must stop because it cannot be trusted any more.
    pub async fn run_until(self, shutdown: CancellationToken, now: CancellationToken) -> Result<(), Error> {
        let fatal = tokio::select! {
            () = shutdown.cancelled() => None,
            fatal = self.cluster.fatal() => Some(fatal),
        };
        if let Some(fatal) = fatal {
            tracing::error!(code = fatal.code(), %fatal, "this broker stops");
            return Err(fatal.into());
        }
        self.edge.begin_drain();
        edge::Ground::hand_over(&self.cluster).await;
        // A drain that was begun before has its own deadline.
        let wait = self.edge.drain_left().unwrap_or(self.drain_on_stop);
        tokio::select! {
            () = self.edge.is_left() => {}
            () = tokio::time::sleep(wait) => {}
            () = now.cancelled() => {}
            fatal = self.cluster.fatal() => {
                tracing::error!(code = fatal.code(), %fatal, "this broker stops");
                return Err(fatal.into());
            }
        }
        let cut = self.edge.cut_rest().await;
        tracing::info!(sessions_cut = cut, "stopping");
        self.edge.dismiss();
        let work = async {
            if let Some(web) = &self.web {
                web.stop().await;
            }
            self.cluster.shutdown().await;
            self.stop.cancel();
            self.tasks.close();
            self.tasks.wait().await;
        };
        if tokio::time::timeout(STOP_TIMEOUT, work).await.is_err() {
            tracing::warn!("some parts did not end in time");
        }
        Ok(())
    }
}

/// Every socket that a broker listens on, bound before anything else happens.
struct Listeners {
    edge: tokio::net::TcpListener,
    web: TcpListener,
    peer: TcpListener,
    ops: tokio::net::TcpListener,
}

impl Listeners {
    fn bind(config: &Valid) -> Result<Self, Error> {
        let bind = |listener, address: std::net::SocketAddr| {
            let failed = |source| Error::Listen { listener, address: address.to_string(), source };
            let socket = TcpListener::bind(address).map_err(failed)?;
            socket.set_nonblocking(true).map_err(failed)?;
            Ok::<_, Error>(socket)
        };
        let tokio = |listener, address| {
            let socket = bind(listener, address)?;
            tokio::net::TcpListener::from_std(socket).map_err(|source| Error::Listen {
                listener,
                address: address.to_string(),
                source,
            })
        };
        Ok(Self {
            edge: tokio("edge", config.edge.bind)?,
            web: bind("web", config.web.bind)?,
            peer: bind("peer", config.peer.bind)?,
            ops: tokio("ops", config.ops.bind)?,
        })
    }
}

/// Looks up `peer_via` by the address that a node advertises.
fn dial_override(config: &Valid, home: &Home, time: &ClusterTime) -> Option<selvedge_cluster::DialOverride> {
    if config.peer_via.is_empty() {
        return None;
    }
    let via = config.peer_via.clone();
    let seeds: BTreeMap<u64, String> = home.seeds.iter().map(|seed| (seed.node, seed.peer.clone())).collect();
    let time = time.clone();
    Some(Arc::new(move |node| {
        let broker = time.cluster.get().and_then(|cluster| cluster.state().broker(node));
        let advertised = broker.map(|broker| broker.peer).filter(|peer| !peer.is_empty());
        via.get(&advertised.or_else(|| seeds.get(&node).cloned())?).cloned()
    }))
}

/// Makes the cluster: the first command, and this broker.
async fn initialise(cluster: &Cluster, config: &Valid, home: &Home, first: &First) -> Result<Option<String>, Error> {
    // A start that was cut short may have come further than its own notes say.
    if cluster.status().last_log.is_some() {
        cluster.linearizable(START_STEP).await?;
        if cluster.state().cluster().is_some() {
            return Ok(None);
        }
    }
    let secret = new_owner_token();
    cluster.initialize(first.command(&home.anchors, &secret)).await?;
    propose_first(cluster, Body::PutBroker(description(cluster, config, home))).await?;
    Ok(Some(secret))
}

async fn propose_first(cluster: &Cluster, body: Body) -> Result<(), Error> {
    cluster.propose(Asker::BOOTSTRAP, body, None).await.map(drop).map_err(|error| Error::Initialise(Box::new(error)))
}

fn description(cluster: &Cluster, config: &Valid, home: &Home) -> PutBroker {
    described(config, cluster.node(), home.roles.iter().map(|role| *role as i32).collect())
}

fn described(config: &Valid, node: u64, roles: Vec<i32>) -> PutBroker {
    PutBroker {
        node,
        name: config.name.clone(),
        region: config.region.clone(),
        host: config.host.clone(),
        edge: config.edge.advertised(),
        web: config.web.advertised(),
        peer: config.peer.advertised(),
        roles,
    }
}

/// Becomes a member when this broker is none yet, and says what it is. Tried until it works: a broker may start before
/// the others do.
async fn register(cluster: &Cluster, config: &Valid, home: &Home) -> Result<(), Error> {
    let via = |seed: &Seed| config.peer_via.get(&seed.peer).unwrap_or(&seed.peer).clone();
    let seeds: Vec<String> = home.seeds.iter().map(via).collect();
    loop {
        let status = cluster.status();
        let own = status.members.iter().find(|member| member.node == cluster.node());
        let step = async {
            match own {
                None if !seeds.is_empty() => {
                    cluster.join(&seeds, &config.peer.advertised()).await.map_err(|e| e.to_string())
                }
                _ => Ok(()),
            }?;
            let body = Body::PutBroker(description(cluster, config, home));
            cluster.propose(Asker::BROKER, body, None).await.map_err(|error| error.to_string())?;
            let votes = own.is_some_and(|member| member.voter);
            let is_to_vote = cluster.state().broker(cluster.node()).is_some_and(|row| row.has(BrokerRole::Voter));
            if votes || !is_to_vote || seeds.is_empty() {
                Ok(())
            } else {
                cluster.promote(&Asker::BROKER, cluster.node()).await.map_err(|e| e.to_string())
            }
        };
        match step.await {
            Ok(()) => return Ok(()),
            Err(error) => tracing::info!(error, "not registered yet; trying again"),
        }
        tokio::time::sleep(REGISTER_RETRY).await;
    }
}

/// One record for each session that an earlier boot of this broker left open.
async fn record_lost_sessions(log: &Log) {
    let scan = log.clone();
    let lost = tokio::task::spawn_blocking(move || lost_sessions(&scan)).await.unwrap_or_default();
    for (session, stream) in lost {
        if let Err(error) = log.append(&Record::SessionLost(SessionLost { session, stream: stream.to_string() })) {
            tracing::warn!(%error, "a lost session was not recorded");
        }
    }
}

/// Sessions that the stream before this one left open, or took over as open.
fn lost_sessions(log: &Log) -> BTreeMap<String, StreamId> {
    let own = log.stream();
    let mut open = BTreeMap::new();
    let streams = selvedge_storage::audit::streams(log.journal().root()).unwrap_or_default();
    let last = streams.into_iter().filter(|stream| stream.broker == own.broker && stream.boot < own.boot).max();
    let Some(stream) = last else { return open };
    let Ok(mut reader) = log.journal().reader_of_kept(stream, 1) else { return open };
    while let Ok(Some(stored)) = reader.read_next() {
        match serde_json::from_slice(stored.body()) {
            Ok(Record::SessionOpen(record)) => drop(open.insert(record.session, stream)),
            Ok(Record::SessionClose(record)) => drop(open.remove(&record.session)),
            _ => {}
        }
    }
    open
}

fn web_certificates(
    config: &Valid,
    issuer: Option<Arc<Issuer>>,
    own: &Renewable,
    time: &ClusterTime,
) -> Result<Arc<web::Certificates>, Error> {
    let hosts = vec![config.host.clone(), config.web.bind.ip().to_string()];
    Ok(Arc::new(web::Certificates::new(config.web_files(), issuer, hosts, own.clone(), time.source())?))
}
