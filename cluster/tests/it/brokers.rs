//! Brokers in one process, each with its own directory, certificate and listener.

use std::collections::{BTreeMap, BTreeSet};
use std::net::TcpListener;
use std::path::Path;
use std::sync::{Arc, Mutex, Once};
use std::time::{Duration, Instant};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    SanType,
};
use rustls_pki_types::PrivateKeyDer;
use selvedge_cluster::{
    Blocking, Cluster, Confirmation, Enforcer, LogLimits, NothingToEnforce, Options, Preset, ProposeError, SystemClock,
    Tls, broker_id,
};
use selvedge_domain::command::{InitCluster, PutBroker};
use selvedge_domain::{Actor, Asker, Body, Credential, Envelope, Id, State};
use selvedge_proto::identity::{Anchors, Role};
use selvedge_proto::tls::{self, Identity, NotBefore};
use selvedge_storage::engine::{Engine, rocks::Rocks};
use selvedge_storage::{DataDir, Error};
use sha2::{Digest as _, Sha256};
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

use crate::links::Links;

pub const TRUST_DOMAIN: &str = "corp.example";
pub const CLUSTER_ID: [u8; 16] = [7; 16];
/// As long as nothing here should ever take.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Signs certificates of brokers.
pub struct Authority {
    pub anchors: Arc<Anchors>,
    issuers: Vec<Issuer<'static, KeyPair>>,
}

impl Authority {
    pub fn new(cluster_id: [u8; 16]) -> Self {
        let mut certificates = Vec::new();
        let mut issuers = Vec::new();
        for role in Role::ALL {
            let mut params = CertificateParams::default();
            params.distinguished_name = DistinguishedName::new();
            params.distinguished_name.push(DnType::CommonName, role.as_str());
            params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
            let key = KeyPair::generate().unwrap();
            certificates.push(params.self_signed(&key).unwrap().der().clone());
            issuers.push(Issuer::new(params, key));
        }
        let anchors = Anchors::new(cluster_id, TRUST_DOMAIN, certificates.try_into().unwrap()).unwrap();
        Self { anchors: Arc::new(anchors), issuers }
    }

    /// Keeps it for other processes.
    pub fn save(&self, dir: &Path) {
        std::fs::write(dir.join("anchors"), self.anchors.to_json()).unwrap();
        for (role, issuer) in Role::ALL.iter().zip(&self.issuers) {
            std::fs::write(dir.join(role.as_str()), issuer.key().serialize_pem()).unwrap();
        }
    }

    /// One that another process has saved.
    pub fn load(dir: &Path) -> Self {
        let anchors = Anchors::from_json(&std::fs::read_to_string(dir.join("anchors")).unwrap()).unwrap();
        let issuer = |role: &Role| {
            let key = KeyPair::from_pem(&std::fs::read_to_string(dir.join(role.as_str())).unwrap()).unwrap();
            Issuer::from_ca_cert_der(anchors.certificate(*role), key).unwrap()
        };
        let issuers = Role::ALL.iter().map(issuer).collect();
        Self { anchors: Arc::new(anchors), issuers }
    }

    pub fn broker(&self, node: u64) -> Identity {
        self.certify(Role::Brokers, &broker_id(TRUST_DOMAIN, node).unwrap().to_string())
    }

    /// A certificate of one intermediate, that says any id.
    pub fn certify(&self, role: Role, uri: &str) -> Identity {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(uri.try_into().unwrap())];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate().unwrap();
        let certificate =
            params.signed_by(&key, &self.issuers[Role::ALL.iter().position(|at| *at == role).unwrap()]).unwrap();
        let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        Identity::new(vec![certificate.der().clone()], key).unwrap()
    }
}

/// One broker.
pub struct Broker {
    pub cluster: Cluster,
    pub address: String,
    pub node: u64,
    pub dir: TempDir,
}

pub struct Setup {
    pub authority: Arc<Authority>,
    pub cluster_id: [u8; 16],
    pub log_limits: LogLimits,
    pub enforcer: Arc<dyn Enforcer>,
    /// Brokers dial each other through these, each by the order in which it was first started.
    pub links: Option<Links>,
    pub started: Mutex<Vec<u64>>,
}

impl Setup {
    pub fn new() -> Self {
        static LOGGING: Once = Once::new();
        LOGGING.call_once(|| {
            let filter = tracing_subscriber::EnvFilter::from_default_env();
            let _ = tracing_subscriber::fmt().with_env_filter(filter).with_test_writer().try_init();
        });
        Self {
            authority: Arc::new(Authority::new(CLUSTER_ID)),
            cluster_id: CLUSTER_ID,
            log_limits: LogLimits::default(),
            enforcer: Arc::new(NothingToEnforce),
            links: None,
            started: Mutex::default(),
        }
    }

    pub async fn start(&self, dir: TempDir) -> Broker {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        self.start_at(dir, listener, None).await
    }

    /// Starts on a directory, claiming to be the node that the directory says unless `certificate` is another's.
    pub async fn start_at(&self, dir: TempDir, listener: TcpListener, certificate: Option<u64>) -> Broker {
        let address = listener.local_addr().unwrap().to_string();
        let options = self.options(dir.path(), listener, certificate).await;
        let node = options.dir.node_id();
        let cluster = Cluster::start(options).await.unwrap();
        Broker { cluster, address, node, dir }
    }

    /// Starts on engines that the caller keeps hold of.
    pub async fn start_on(
        &self,
        dir: TempDir,
        listener: TcpListener,
        log: Arc<dyn Engine>,
        state: Arc<dyn Engine>,
    ) -> Broker {
        let address = listener.local_addr().unwrap().to_string();
        let options = self.options(dir.path(), listener, None).await;
        let node = options.dir.node_id();
        let cluster = Cluster::start_on(options, log, state).await.unwrap();
        Broker { cluster, address, node, dir }
    }

    /// The order in which a broker was first started.
    pub fn place(&self, node: u64) -> usize {
        let mut started = self.started.lock().unwrap();
        started.iter().position(|known| *known == node).unwrap_or_else(|| {
            started.push(node);
            started.len() - 1
        })
    }

    /// What a broker on a directory is started with.
    pub async fn options(&self, dir: &Path, listener: TcpListener, certificate: Option<u64>) -> Options {
        let data = open(dir).await;
        let node = data.node_id();
        let identity = self.authority.broker(certificate.unwrap_or(node));
        let (anchors, time) = (&self.authority.anchors, tls::system_time());
        Options {
            dir: data,
            cluster_id: self.cluster_id,
            preset: Preset::Test,
            transport: Tls::shared(
                listener,
                Arc::new(tls::peer_server(&identity, anchors, NotBefore::judged(), &time).unwrap()),
                Arc::new(tls::peer_client(&identity, anchors, None, NotBefore::judged(), &time).unwrap()),
            ),
            clock: SystemClock::shared(),
            seed: None,
            blocking: Blocking::Threads,
            enforcer: self.enforcer.clone(),
            seeds: BTreeMap::new(),
            dial: self.links.as_ref().map(|links| links.dial(self.place(node))),
            services: None,
            log_limits: self.log_limits,
            runtime: None,
        }
    }

    /// The first broker of a new cluster.
    pub async fn first(&self) -> Broker {
        let first = self.start(TempDir::new().unwrap()).await;
        first.cluster.initialize(init(self.cluster_id)).await.unwrap();
        first.register().await;
        first
    }

    /// So many voters.
    pub async fn voters(&self, count: usize) -> Vec<Broker> {
        let mut brokers = vec![self.first().await];
        while brokers.len() < count {
            self.add_voter(&mut brokers).await;
        }
        brokers
    }

    /// One voter more.
    pub async fn add_voter(&self, brokers: &mut Vec<Broker>) {
        let next = self.start(TempDir::new().unwrap()).await;
        let first = &brokers[0];
        first.enrol(&next).await;
        next.cluster.join(std::slice::from_ref(&first.address), &next.address).await.unwrap();
        next.register().await;
        first.cluster.promote(&first.owner(), next.node).await.unwrap();
        brokers.push(next);
    }
}

/// Opens a directory that a stopped broker may still be letting go.
async fn open(path: &Path) -> Arc<DataDir> {
    let begun = Instant::now();
    loop {
        match DataDir::open(path) {
            Ok(dir) => return Arc::new(dir),
            Err(error) if begun.elapsed() > PATIENCE => panic!("{error}"),
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}

/// The first owner's token.
pub const OWNER: &str = "owner";
/// That of the owner of a later epoch.
pub const NEXT_OWNER: &str = "next owner";

pub fn init(cluster_id: [u8; 16]) -> InitCluster {
    InitCluster {
        cluster_id,
        trust_domain: TRUST_DOMAIN.to_owned(),
        anchors: Vec::new(),
        owner_sha256: Credential::new(OWNER).sha256(),
        knock_secret: [3; 32],
        lease_ms: 3_000,
        hold_ms: 30_000,
    }
}

impl Broker {
    /// Writes where this broker listens into the registry.
    pub async fn register(&self) {
        until("it has the cluster's state", || self.cluster.state().cluster().is_some()).await;
        self.enrol(self).await;
    }

    /// Writes another one into the registry, as its enrolment does before it joins.
    pub async fn enrol(&self, other: &Broker) {
        self.cluster.propose(self.owner(), Body::PutBroker(other.description()), None).await.unwrap();
    }

    /// What it says of itself.
    pub fn description(&self) -> PutBroker {
        PutBroker {
            node: self.node,
            name: format!("broker-{}", self.node),
            region: "here".to_owned(),
            host: "localhost".to_owned(),
            edge: String::new(),
            web: String::new(),
            peer: self.address.clone(),
            roles: vec![1, 2, 3, 4],
        }
    }

    /// Removes a broker for ever, as an administrator does.
    pub async fn remove(&self, node: u64) {
        self.cluster.propose(self.owner(), Body::RemoveBroker { node }, None).await.unwrap();
        self.cluster.remove(&self.owner(), node).await.unwrap();
    }

    /// Makes a token, as the first owner.
    pub async fn create_token(&self, name: &str) -> Result<Id, ProposeError> {
        let done = self.cluster.propose(self.owner(), token(name), None).await?;
        Ok(done.ids[0])
    }

    pub fn owner(&self) -> Asker {
        owner_of(&self.cluster.state()).expect("the cluster is initialised")
    }

    pub fn has_token(&self, name: &str) -> bool {
        has_token(&self.cluster.state(), name)
    }

    /// Stops it at once and starts it again on what it has.
    pub async fn restart(self, setup: &Setup) -> Broker {
        let Broker { cluster, address, dir, .. } = self;
        cluster.stop().await;
        drop(cluster);
        let listener = bind(&address).await;
        released(dir.path()).await;
        setup.start_at(dir, listener, None).await
    }
}

/// Waits until the stores of a broker that stopped are let go by what was still being answered from them.
pub async fn released(dir: &Path) {
    let begun = Instant::now();
    let path = open(dir).await;
    while matches!(Rocks::open_log(&path.log_path()), Err(Error::Locked { .. }))
        || matches!(Rocks::open_state(&path.state_path()), Err(Error::Locked { .. }))
    {
        assert!(begun.elapsed() < PATIENCE, "the stores are let go");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

pub async fn bind(address: &str) -> TcpListener {
    let begun = Instant::now();
    loop {
        match TcpListener::bind(address) {
            Ok(listener) => return listener,
            Err(error) if begun.elapsed() > PATIENCE => panic!("{error}"),
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}

pub fn token(name: &str) -> Body {
    let secret_sha256 = Sha256::digest(name.as_bytes()).into();
    Body::CreateToken { name: name.to_owned(), role: 1, secret_sha256 }
}

/// The owner, once there is one.
pub fn owner_of(state: &State) -> Option<Asker> {
    let owner = state.rows::<selvedge_domain::rows::Token>().find(|token| token.role == 3 && !token.revoked)?;
    let secret = if owner.id().epoch == 1 { OWNER } else { NEXT_OWNER };
    Some(Asker::holder(Actor::token(owner.id(), owner.generation), Credential::new(secret)))
}

pub fn has_token(state: &State, name: &str) -> bool {
    state.find::<selvedge_domain::rows::Token>(selvedge_domain::state::IndexKey::name(name)).is_some()
}

/// Waits for a condition.
pub async fn until(what: &str, condition: impl Fn() -> bool) {
    let begun = Instant::now();
    while !condition() {
        assert!(begun.elapsed() < PATIENCE, "waited in vain until {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Which of the brokers all agree is the leader.
pub async fn leader_of(brokers: &[Broker]) -> usize {
    let agreed = || {
        let leaders: BTreeSet<_> = brokers.iter().map(|broker| broker.cluster.status().leader).collect();
        let leader = leaders.first().copied().flatten().filter(|_| leaders.len() == 1)?;
        brokers.iter().position(|broker| broker.node == leader)
    };
    until("all agree on a leader", || agreed().is_some()).await;
    agreed().expect("awaited above")
}

/// Counts the events it is shown.
#[derive(Default)]
pub struct Counting {
    pub seen: Mutex<Vec<Envelope>>,
    /// Holds the enforcing thread while it is locked.
    pub gate: Mutex<()>,
    /// What it closes is confirmed when this is cancelled; without it nothing is closed.
    pub confirmed: Mutex<Option<CancellationToken>>,
}

impl Enforcer for Counting {
    fn enforce(&self, _state: &Arc<State>, events: &[Envelope]) -> Confirmation {
        let _open = self.gate.lock().unwrap();
        let confirmed = self.confirmed.lock().unwrap().clone();
        self.seen.lock().unwrap().extend(events.iter().cloned());
        Some(Box::pin(confirmed?.cancelled_owned()))
    }

    fn replaced(&self, _state: &Arc<State>) -> Confirmation {
        None
    }
}
