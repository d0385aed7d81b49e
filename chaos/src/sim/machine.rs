//! What runs on a simulated machine: a broker, and the clients that use it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use rand::Rng as _;
use selvedge_cluster::{Blocking, Cluster, Fatal, LogLimits, Options, Preset, ProposeError};
use selvedge_domain::command::{InitCluster, PutBroker, UserFields};
use selvedge_domain::rows::{Directory, Token};
use selvedge_domain::state::IndexKey;
use selvedge_domain::{Actor, Asker, Body, Credential, Id, State};
use selvedge_storage::DataDir;
use selvedge_storage::engine::Engine;
use selvedge_storage::log::Driver;

use super::engine::Forgetful;
use super::network::{SimNetwork, TRUST_DOMAIN, address, host};
use super::world::{Noting, Running, World};
use super::{Bug, client};

const CLUSTER_ID: [u8; 16] = [7; 16];
const OWNER: &str = "owner's token";
const DIRECTORY: &str = "directory's token";
/// The shortest that is accepted, so that much of it fits into a short run.
pub(super) const LEASE_MS: u64 = 2_700;
/// A write of the log takes up to so long.
const SYNC_MS_MAX: u64 = 6;
/// Registers that clients write and read: users, and their display names.
pub(super) const KEYS: usize = 4;
const RETRY: Duration = Duration::from_millis(50);

/// Runs until the machine crashes.
pub(super) async fn run(world: World, node: u64) -> turmoil::Result {
    let boot = world.next_boot(node);
    world.trace(format_args!("{} starts for the {boot}. time", host(node)));
    let cluster = match start(&world, node, boot).await {
        Ok(cluster) => cluster,
        Err(error) => {
            world.violated(format!("{} does not start: {error}", host(node)));
            return std::future::pending().await;
        }
    };
    let join = join(&world, node, &cluster);
    let fatal = cluster.fatal();
    tokio::pin!(join, fatal);
    let stopped = tokio::select! {
        () = &mut join => None,
        stopped = &mut fatal => Some(stopped),
    };
    let stopped = match stopped {
        Some(stopped) => stopped,
        None => {
            client::spawn(&world, node, boot, &cluster);
            fatal.await
        }
    };
    world.trace(format_args!("{} must stop: {stopped}", host(node)));
    if matches!(stopped, Fatal::StateDiffers { .. } | Fatal::Enforcing { .. }) {
        world.violated(format!("{} must stop: {stopped}", host(node)));
    }
    world.must_stop(node, stopped.to_string());
    // The harness takes the process down.
    std::future::pending().await
}

async fn start(world: &World, node: u64, boot: u64) -> Result<Cluster, Box<dyn std::error::Error>> {
    let machine = world.machine(node);
    let (mut log, state): (Arc<dyn Engine>, Arc<dyn Engine>) =
        (Arc::new(machine.log.open()?), Arc::new(machine.state.open()?));
    if world.bug() == Bug::LogIsNotSynced {
        log = Arc::new(Forgetful(log));
    }
    let mut rng = super::rng(world.seed(), (node << 32) | boot);
    let limits = LogLimits {
        snapshot_bytes: rng.random_range(4 << 10..32 << 10),
        keep_entries: rng.random_range(5..60),
        ..LogLimits::default()
    };
    let seed = rng.random();
    let rng = Mutex::new(rng);
    let sync = move || Duration::from_millis(rng.lock().random_range(0..=SYNC_MS_MAX));
    let sync = Arc::new(sync);
    let enforced = Arc::new(Mutex::new(Id::default()));
    let options = Options {
        dir: Arc::new(DataDir::open_as(&world.dir(node), || node)?),
        cluster_id: CLUSTER_ID,
        preset: Preset::Lan,
        transport: Arc::new(SimNetwork { world: world.clone(), node }),
        clock: Arc::new(machine.clock.clone()),
        seed: Some(seed),
        blocking: Blocking::Inline(Arc::new(move |driver| drop(tokio::spawn(drive(driver, sync.clone()))))),
        enforcer: Arc::new(Noting { world: world.clone(), node, enforced: enforced.clone() }),
        seeds: BTreeMap::new(),
        dial: None,
        services: None,
        log_limits: limits,
        runtime: None,
    };
    let cluster = Cluster::start_on(options, log, state).await?;
    world.started(
        node,
        Running { boot, cluster: cluster.clone(), enforced, fatal: None, compared: 0, kill: Arc::default() },
    );
    let dying = world.clone();
    tokio::spawn(async move { dying.die(node).await });
    Ok(cluster)
}

/// Writes the log, each time after as long as a disk may take.
async fn drive(driver: Driver, sync: Arc<dyn Fn() -> Duration + Send + Sync>) {
    while driver.wanted().await {
        tokio::time::sleep(sync()).await;
        driver.write_waiting();
    }
    driver.write_waiting();
}

/// Does what of the beginning is still to be done: the first broker makes the cluster and its objects, the others join
/// one after the other.
async fn join(world: &World, node: u64, cluster: &Cluster) {
    if node == 1 && !world.ready(|ready| ready.initialised) {
        let init = InitCluster {
            cluster_id: CLUSTER_ID,
            trust_domain: TRUST_DOMAIN.to_owned(),
            anchors: Vec::new(),
            owner_sha256: Credential::new(OWNER).sha256(),
            knock_secret: [3; 32],
            lease_ms: LEASE_MS,
            hold_ms: 30_000,
        };
        if let Err(error) = cluster.initialize(init).await {
            return world.violated(format!("the cluster cannot be initialised: {error}"));
        }
        // Who was never enrolled may not join.
        for other in world.nodes() {
            register(cluster, other).await;
        }
        let put = Body::PutDirectory { name: "hr".to_owned(), token_sha256: Credential::new(DIRECTORY).sha256() };
        until_done(cluster, || owner(&cluster.state()), put).await;
        for key in 0..KEYS {
            let made = until_done(cluster, || directory(&cluster.state()), Body::CreateUser(user(key, ""))).await;
            world.ready(|ready| ready.keys.extend(made));
        }
        world.ready(|ready| {
            ready.initialised = true;
            ready.voters = 1;
        });
    }
    while world.ready(|ready| ready.voters) + 1 < node as usize {
        tokio::time::sleep(RETRY).await;
    }
    if world.ready(|ready| ready.voters) + 1 == node as usize {
        while cluster.join(&[address(1)], &address(node)).await.is_err() {
            tokio::time::sleep(RETRY).await;
        }
        register(cluster, node).await;
        while cluster.promote(&Asker::BROKER, node).await.is_err() {
            tokio::time::sleep(RETRY).await;
        }
        world.ready(|ready| ready.voters = node as usize);
    }
}

async fn register(cluster: &Cluster, node: u64) {
    let put = PutBroker {
        node,
        name: host(node),
        region: "here".to_owned(),
        host: host(node),
        edge: String::new(),
        web: String::new(),
        peer: address(node),
        roles: vec![1, 2, 3, 4],
    };
    until_done(cluster, || owner(&cluster.state()), Body::PutBroker(put)).await;
}

async fn until_done(cluster: &Cluster, asker: impl Fn() -> Option<Asker>, body: Body) -> Vec<Id> {
    loop {
        if let Some(asker) = asker() {
            match cluster.propose(asker, body.clone(), None).await {
                Ok(done) => return done.ids,
                Err(ProposeError::Refused(refused)) => panic!("the beginning is refused: {refused}"),
                Err(_) => {}
            }
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// The administrator, once this broker knows them.
pub(super) fn owner(state: &State) -> Option<Asker> {
    let token = state.find::<Token>(IndexKey::name("owner"))?;
    Some(Asker::holder(Actor::token(token.id(), token.generation), Credential::new(OWNER)))
}

/// The directory, once this broker knows it.
pub(super) fn directory(state: &State) -> Option<Asker> {
    let directory = state.find::<Directory>(IndexKey::name("hr"))?;
    Some(Asker::holder(Actor::directory(directory.id(), directory.generation), Credential::new(DIRECTORY)))
}

/// A register with a value.
pub(super) fn user(key: usize, value: &str) -> UserFields {
    UserFields {
        user_name: format!("key-{key}"),
        external_id: String::new(),
        display_name: value.to_owned(),
        active: true,
        attributes: "{}".to_owned(),
    }
}
