//! The handle that the broker uses.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use futures::Stream;
use parking_lot::Mutex;
use selvedge_domain::command::InitCluster;
use selvedge_domain::decide::VERSION;
use selvedge_domain::{Asker, Body, Envelope, Id, State, limits};
use selvedge_proto::peer as wire;
use selvedge_proto::peer::change_request::Change;
use selvedge_proto::peer::peer_client::PeerClient;
use selvedge_proto::peer::peer_server::PeerServer;
use selvedge_proto::peer::raft_server::RaftServer;
use selvedge_storage::engine::{Engine, rocks::Rocks};
use selvedge_storage::room::{Room, Roomy};
use selvedge_storage::state::StateStore;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::Request;
use tonic::service::Routes;

use crate::acquaintance::{self, Acquaintances};
use crate::config::Options;
use crate::core::Core;
use crate::dial::{Dialer, PeerChannel, Purpose};
use crate::enforce::{self, Enforced};
use crate::error::{Error, Fatal, ProposeError};
use crate::events::{self, Frame};
use crate::leader::{self, QUEUE_COMMANDS_MAX};
use crate::lease::{Lease, surely_over_ms};
use crate::log_store::LogStore;
use crate::machine::Machine;
use crate::network::{MESSAGE_BYTES_MAX, Network};
use crate::propose::Done;
use crate::published::{HashesAt, Published, ToEnforce};
use crate::raft_types::seeded;
use crate::read::{Mode, Read};
use crate::service::{PeerService, RaftService};
use crate::snapshot::{self, SnapshotHead, Snapshots};
use crate::status::{Status, status};
use crate::transport::Listener;
use crate::{housekeeping, journal, listen, membership, metrics, read, restore, watchdog};

const SNAPSHOT_DIR: &str = "snapshots";
const TRANSFER_TIMEOUT: Duration = Duration::from_secs(3);
const STOP_TIMEOUT: Duration = Duration::from_secs(5);
const JOIN_TIMEOUT: Duration = Duration::from_secs(40);

/// This broker's part of the cluster. Clones share it.
#[derive(Clone)]
pub struct Cluster {
    core: Arc<Core>,
    runtime: tokio::runtime::Handle,
}

impl Cluster {
    /// Opens the stores, starts Raft and the peer listener. A new directory stays alone until
    /// [`Cluster::initialize`] or [`Cluster::join`].
    ///
    /// **Errors**: storage, the listener.
    pub async fn start(options: Options) -> Result<Self, Error> {
        let (log_path, state_path) = (options.dir.log_path(), options.dir.state_path());
        let engines =
            options.blocking.run(move || Ok((Rocks::open_log(&log_path), Rocks::open_state(&state_path)))).await;
        let (log, state) = engines.map_err(Error::State)?;
        let (dir, log_path, state_path) =
            (options.dir.path().to_owned(), options.dir.log_path(), options.dir.state_path());
        let ballast_bytes = options.preset.ballast_bytes();
        let room = options.blocking.run(move || {
            let room = Room::new(&[&dir, &log_path, &state_path], ballast_bytes);
            Ok(room.and_then(|room| room.lay_ballast().map(|()| Arc::new(room))))
        });
        let room = room.await.map_err(Error::State)??;
        let (log, state) = (Roomy::shared(Arc::new(log?), &room), Roomy::shared(Arc::new(state?), &room));
        Self::launch(options, log, state, Some(room)).await
    }

    /// [`Cluster::start`] on other engines than the directory's own.
    ///
    /// **Errors**: as [`Cluster::start`].
    pub async fn start_on(options: Options, log: Arc<dyn Engine>, state: Arc<dyn Engine>) -> Result<Self, Error> {
        Self::launch(options, log, state, None).await
    }

    async fn launch(
        options: Options,
        log: Arc<dyn Engine>,
        state: Arc<dyn Engine>,
        room: Option<Arc<Room>>,
    ) -> Result<Self, Error> {
        metrics::describe();
        let runtime = options.runtime.clone().unwrap_or_else(tokio::runtime::Handle::current);
        let handle = runtime.clone();
        let started = runtime.spawn(async move { start(options, log, state, room, handle).await });
        started.await.map_err(|_| Error::Raft("starting panicked".to_owned()))?
    }

    /// Makes this broker the first voter of a new cluster, and writes the first command. Once, on an empty directory.
    ///
    /// **Errors**: [`Error::Initialize`] when the cluster was initialised before or the command is refused.
    pub async fn initialize(&self, init: InitCluster) -> Result<Done, Error> {
        if init.cluster_id != self.core.cluster_id {
            return Err(Error::Initialize("the cluster id is not the one this broker was started with".to_owned()));
        }
        // A start that was interrupted between the two goes on here; a second one is refused by the log.
        let raft = &self.core.raft;
        if !raft.is_initialized().await.map_err(|error| Error::Raft(error.to_string()))? {
            let members = BTreeSet::from([self.core.node]);
            raft.initialize(members).await.map_err(|error| Error::Initialize(error.to_string()))?;
        }
        let done = self.core.propose_first(Body::InitCluster(init)).await;
        done.map_err(|error| Error::Initialize(error.to_string()))
    }

    /// Asks a broker at one of these addresses to make this one a learner; `advertised` is where it listens.
    ///
    /// **Errors**: [`Error::Membership`] with what the last one said.
    pub async fn join(&self, addresses: &[String], advertised: &str) -> Result<(), Error> {
        let mut why = "no address was given".to_owned();
        for address in addresses {
            let mut client = PeerClient::new(self.core.dialer.channel_to_address(address));
            let join = wire::JoinRequest { address: advertised.to_owned(), version: VERSION };
            let mut request = Request::new(join);
            request.set_timeout(JOIN_TIMEOUT);
            use wire::change_reply::Result as Reply;
            match tokio::time::timeout(JOIN_TIMEOUT, client.join(request)).await {
                Ok(Ok(reply)) => match reply.into_inner().result {
                    Some(Reply::Done(_)) => return Ok(()),
                    Some(Reply::Failed(reason) | Reply::Later(reason)) => why = format!("`{address}`: {reason}"),
                    Some(Reply::Refused(refused)) => why = format!("`{address}`: {}", refused.message),
                    Some(Reply::NotLeader(_)) | None => why = format!("`{address}`: no leader"),
                },
                Ok(Err(status)) => why = format!("`{address}`: {status}"),
                Err(_) => why = format!("`{address}`: no answer in time"),
            }
        }
        Err(Error::Membership(why))
    }

    /// Makes an enrolled broker a learner; `address` is where its peer listener is reached until the registry says so.
    ///
    /// **Errors**: [`Error::Membership`], [`Error::Refused`].
    pub async fn add_learner(&self, asker: &Asker, node: u64, address: &str) -> Result<(), Error> {
        let add = wire::AddLearner { node, address: address.to_owned() };
        membership::change(&self.core, asker, Change::AddLearner(add)).await
    }

    /// Makes a learner a voter, once it has caught up: an owner any that has the role, a broker itself.
    ///
    /// **Errors**: [`Error::Membership`], [`Error::Refused`].
    pub async fn promote(&self, asker: &Asker, node: u64) -> Result<(), Error> {
        membership::change(&self.core, asker, Change::Promote(node)).await
    }

    /// Lets go of a voter or learner that the registry says is removed, for an owner.
    ///
    /// **Errors**: [`Error::Membership`], [`Error::Refused`].
    pub async fn remove(&self, asker: &Asker, node: u64) -> Result<(), Error> {
        membership::change(&self.core, asker, Change::Remove(node)).await
    }

    /// Hands leadership over for an owner, to a certain voter or the one that has the most of the log.
    ///
    /// **Errors**: [`Error::Membership`], [`Error::Refused`].
    pub async fn transfer_leader(&self, asker: &Asker, to: Option<u64>) -> Result<(), Error> {
        membership::change(&self.core, asker, Change::TransferLeader(to.unwrap_or(0))).await
    }

    /// Hands leadership over, if this broker has it, to a certain voter or the one that has the most of the log.
    ///
    /// **Errors**: [`Error::Membership`].
    pub async fn hand_over(&self, to: Option<u64>) -> Result<(), Error> {
        membership::transfer(&self.core, to).await
    }

    /// Proposes a command from this broker, whoever leads. Returns once this broker has applied it; a retry inside is
    /// applied once. With `idempotency` (SHA-256 of caller and key) so is a retry from outside, for 24 h.
    ///
    /// **Errors**: see [`ProposeError`].
    /// **Cancel safety**: a dropped call may still be applied.
    pub async fn propose(&self, asker: Asker, body: Body, idempotency: Option<[u8; 32]>) -> Result<Done, ProposeError> {
        self.core.propose(asker, body, idempotency).await
    }

    /// The state here and now, which may be behind.
    pub fn state(&self) -> Arc<State> {
        self.core.published.state()
    }

    /// The state here, as it changes.
    pub fn subscribe(&self) -> watch::Receiver<Arc<State>> {
        self.core.published.subscribe()
    }

    /// A state that holds everything that was committed before the call, on any broker.
    ///
    /// **Errors**: [`Error::Unavailable`] without a leader that has a quorum, [`Error::TimedOut`].
    pub async fn linearizable(&self, wait: Duration) -> Result<Arc<State>, Error> {
        self.core.linearizable(wait).await
    }

    /// A state that is no older than `seen`, when the caller has seen any, and how old it may be.
    ///
    /// **Errors**: [`Error::Unavailable`], [`Error::TimedOut`]; [`Error::Reset`] when that was in an epoch that is over;
    /// [`Error::Behind`] when this broker does not get that far within `wait`.
    pub async fn read(&self, mode: Mode, seen: Option<Id>, wait: Duration) -> Result<Read, Error> {
        self.core.read(mode, seen, wait).await
    }

    /// Waits until this broker has applied a position.
    ///
    /// **Errors**: [`Error::Unavailable`] when this broker stops.
    pub async fn wait_applied(&self, position: Id) -> Result<Arc<State>, Error> {
        self.core.wait_applied(position).await
    }

    /// Waits until no broker acts on what was before `position`, for at most `wait`.
    ///
    /// **Errors**: [`Error::TimedOut`] when not even this broker has applied it by then.
    pub async fn enforced(&self, position: Id, wait: Duration) -> Result<Enforced, Error> {
        enforce::everywhere(&self.core, position, wait).await
    }

    /// The events of the command after which the log stood at `position`, which this broker has applied.
    ///
    /// **Errors**: [`Error::Compacted`] when the journal does not hold them any more.
    pub async fn events_of(&self, position: Id) -> Result<Vec<Envelope>, Error> {
        events::of_command(&self.core, position).await
    }

    /// Events from a position on, then live, without end; bookmarks between them. A position of epoch 0 counts in the
    /// epoch of this broker.
    ///
    /// **Errors**: [`Error::Compacted`], [`Error::Elsewhere`], [`Error::Reset`], [`Error::Slow`]; each ends the stream.
    pub fn events(&self, from: Id) -> impl Stream<Item = Result<Frame, Error>> + Send + 'static {
        events::watch(self.core.clone(), from)
    }

    /// Writes the state, as this broker has applied it, to a new file, durably; nothing is there under that name before
    /// it is whole.
    ///
    /// **Errors**: [`Error::State`]; one that is there already is left alone.
    pub async fn save_snapshot(&self, path: PathBuf) -> Result<SnapshotHead, Error> {
        let store = self.core.store.clone();
        self.core.blocking.run(move || snapshot::save(&store, &path)).await.map_err(Error::State)
    }

    /// This broker's freshness lease.
    pub fn lease(&self) -> &Arc<Lease> {
        &self.core.lease
    }

    /// After so many milliseconds nobody acts any more on what this broker has said, until now, of what is left of its
    /// lease, whatever their clock.
    pub fn lease_told_over_ms(&self) -> u64 {
        let lease_ms = self.core.longest_lease_ms();
        self.core.lease.left_ms() + (surely_over_ms(lease_ms) - lease_ms)
    }

    /// Cluster time, milliseconds since the Unix epoch.
    pub fn now_ms(&self) -> u64 {
        self.core.published.now_ms()
    }

    /// This machine's wall clock, milliseconds since the Unix epoch.
    pub fn wall_ms(&self) -> u64 {
        self.core.clock.wall_ms()
    }

    /// A connection to another broker, for the services that the broker registers beside ours.
    pub fn channel(&self, node: u64) -> PeerChannel {
        self.core.dialer.channel(node, Purpose::Extra)
    }

    /// This broker's node id.
    pub fn node(&self) -> u64 {
        self.core.node
    }

    /// Whether this broker leads, as far as it knows.
    pub fn leads(&self) -> bool {
        self.core.leads()
    }

    /// The hashes after the entries from `index` on that were applied here lately, in order.
    pub fn hashes(&self, index: u64) -> Vec<HashesAt> {
        self.core.published.hashes_from(index)
    }

    /// How the cluster looks from here.
    pub fn status(&self) -> Status {
        status(&self.core)
    }

    /// Returns when this broker must stop, with the reason.
    pub async fn fatal(&self) -> Fatal {
        let mut fatal = self.core.fatal.subscribe();
        let found = fatal.wait_for(Option::is_some).await;
        match found.ok().and_then(|fatal| fatal.clone()) {
            Some(fatal) => fatal,
            // The sender lives in what this holds.
            None => std::future::pending().await,
        }
    }

    /// Hands leadership over, if this broker has it, and stops.
    pub async fn shutdown(&self) {
        if self.core.leads() && membership::transfer(&self.core, None).await.is_ok() {
            let mut left = 60;
            while self.core.leads() && left > 0 {
                tokio::time::sleep(TRANSFER_TIMEOUT / 60).await;
                left -= 1;
            }
        }
        self.stop().await;
    }

    /// Stops at once, as a crash would, but leaves the directory free for another start.
    pub async fn stop(&self) {
        let core = self.core.clone();
        let stopped = self.runtime.spawn(async move {
            core.stop.cancel();
            if core.raft.shutdown().await.is_err() {
                tracing::warn!("raft did not stop by itself");
            }
            core.tasks.close();
            if tokio::time::timeout(STOP_TIMEOUT, core.tasks.wait()).await.is_err() {
                tracing::warn!("some tasks are still busy");
            }
        });
        // It panics only with the runtime itself.
        let _ = stopped.await;
    }
}

async fn start(
    options: Options,
    log: Arc<dyn Engine>,
    state: Arc<dyn Engine>,
    room: Option<Arc<Room>>,
    runtime: tokio::runtime::Handle,
) -> Result<Cluster, Error> {
    let node = options.dir.node_id();
    let blocking = options.blocking.clone();
    let log = blocking.open_log(log).await.map_err(Error::State)??;
    let store = blocking.run(move || Ok(StateStore::open(state))).await.map_err(Error::State)??;
    let (log, store) = (LogStore::new(log), Arc::new(store));
    let old_log_index = log.log().bounds().last.map_or(0, |last| last.index);
    let fatal = watch::Sender::new(None);
    let acquaintances = Acquaintances::new(node, log.log().clone(), options.clock.clone(), fatal.clone());
    let (published, to_enforce) = Published::new(options.clock.clone(), old_log_index);
    let snapshot_dir = options.dir.path().join(SNAPSHOT_DIR);
    let machine = Machine::open(store.clone(), snapshot_dir, published.clone(), blocking.clone(), fatal.clone());
    // Of what stops a broker it says itself what it is.
    let machine = machine.await.map_err(|error| match fatal.borrow().clone() {
        Some(fatal) => Error::Fatal(fatal),
        None => Error::State(error),
    })?;
    continues(log.log().bounds().last_purged.map(|id| id.index), machine.applied_index())?;
    let snapshots = machine.snapshots();

    let dialer =
        Dialer::new(&options.cluster_id, node, published.clone(), options.transport.clone(), options.dial.clone());
    for (seed, address) in &options.seeds {
        dialer.learn(*seed, address);
    }
    let config = options.preset.raft(&hex::encode(options.cluster_id)).validate();
    let config = Arc::new(config.map_err(|error| Error::Raft(error.to_string()))?);
    let append_timeout = Duration::from_millis(options.preset.election_ms().1);
    let network = Network {
        dialer: dialer.clone(),
        acquaintances: acquaintances.clone(),
        append_timeout,
        blocking: blocking.clone(),
    };
    let seed = options.seed.unwrap_or_else(rand::random);
    let raft = seeded(seed, openraft::Raft::new(node, config, network, log.clone(), machine)).await;
    let raft = raft.map_err(|error| Error::Raft(error.to_string()))?;
    acquaintances.look_at(&raft);
    // Until it has met enough of the others.
    raft.runtime_config().elect(false);

    let (queue, queued) = mpsc::channel(QUEUE_COMMANDS_MAX);
    let started_ms = options.clock.boottime_ms();
    let lease_ms = published.state().cluster().map_or(limits::LEASE_MS_DEFAULT, |cluster| cluster.lease_ms);
    let waits = restore::waits(options.dir.path());
    let leases_from_ms = if waits { started_ms + surely_over_ms(lease_ms) } else { 0 };
    let core = Arc::new(Core {
        node,
        boot: options.dir.boot(),
        cluster_id: options.cluster_id,
        limits: options.log_limits,
        clock: options.clock.clone(),
        blocking,
        raft,
        acquaintances,
        room,
        closed_to_writes: Mutex::default(),
        log,
        store,
        dialer,
        published,
        lease: Arc::new(Lease::new(options.clock.clone())),
        enforced: watch::Sender::default(),
        confirmed: watch::Sender::default(),
        reports: Mutex::default(),
        reported: watch::Sender::new(0),
        holders: Mutex::default(),
        clocks: Mutex::default(),
        sessions: Default::default(),
        streams: Default::default(),
        rounds: Default::default(),
        queue,
        changing: tokio::sync::Mutex::default(),
        seen: Mutex::default(),
        longest_lease: Mutex::default(),
        started_ms,
        leases_from_ms,
        leaving: AtomicBool::new(false),
        fatal,
        stop: CancellationToken::new(),
        tasks: TaskTracker::new(),
        dir: options.dir.clone(),
    });
    let listener = options.transport.listen().await.map_err(Error::Socket)?;
    spawn(&core, options, listener, snapshots, to_enforce, queued);
    Ok(Cluster { core, runtime })
}

/// A log must hold what comes after the state.
///
/// **Errors**: it was cut further than the state goes, so the state is not the one that was left with it.
fn continues(purged: Option<u64>, applied: Option<u64>) -> Result<(), Error> {
    if purged <= applied {
        return Ok(());
    }
    let why = format!("it ends at {applied:?}, and the log begins behind {purged:?}");
    Err(Error::Storage(selvedge_storage::Error::MetaDamaged { what: "state", why }))
}

fn spawn(
    core: &Arc<Core>,
    options: Options,
    listener: Box<dyn Listener>,
    snapshots: Snapshots,
    to_enforce: mpsc::Receiver<ToEnforce>,
    queued: mpsc::Receiver<leader::Pending>,
) {
    let raft = RaftService { raft: core.raft.clone(), acquaintances: core.acquaintances.clone(), snapshots };
    let raft =
        RaftServer::new(raft).max_decoding_message_size(MESSAGE_BYTES_MAX).max_encoding_message_size(MESSAGE_BYTES_MAX);
    let peer = PeerServer::new(PeerService(core.clone()))
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    let routes = options.services.unwrap_or_else(|| Routes::builder().routes()).add_service(raft).add_service(peer);

    let tasks = &core.tasks;
    let (serving, stop) = (core.clone(), core.stop.clone());
    tasks.spawn(async move {
        let server =
            listen::serve(listener, &serving.cluster_id, serving.published.clone(), routes, serving.stop.clone());
        // Streams that never end would keep it from ending by itself.
        let ended = async {
            stop.cancelled().await;
            tokio::time::sleep(Duration::from_millis(200)).await;
        };
        tokio::select! {
            served = server => if let Err(error) = served {
                serving.fail(Fatal::Raft(format!("the peer listener failed: {error}")));
            },
            () = ended => {}
        }
    });
    tasks.spawn(enforce::run(core.clone(), options.enforcer, to_enforce));
    tasks.spawn(enforce::report(core.clone()));
    tasks.spawn(leader::batch(core.clone(), queued));
    tasks.spawn(leader::keep_time(core.clone()));
    tasks.spawn(read::keep_lease(core.clone()));
    tasks.spawn(acquaintance::keep(core.clone()));
    tasks.spawn(watchdog::watch_writes(core.clone()));
    tasks.spawn(watchdog::watch_room(core.clone()));
    tasks.spawn(housekeeping::watch(core.clone()));
    tasks.spawn(journal::keep(core.clone()));
    tasks.spawn(journal::fetch_older(core.clone()));
    tasks.spawn(housekeeping::keep_connected(core.clone()));
    tasks.spawn(housekeeping::keep_log_short(core.clone()));
    tasks.spawn(membership::keep(core.clone()));
}
