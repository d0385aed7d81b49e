//! Raft's state machine: decides the commands of committed entries over [`selvedge_domain::State`], writes what they
//! change as one batch, publishes the new state, and only then answers.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use futures::{Stream, StreamExt as _};
use openraft::OptionalSend;
use openraft::storage::{EntryResponder, RaftStateMachine};
use prost::Message as _;
use selvedge_domain::state::{Meta, last_changes};
use selvedge_domain::{Changes, Outcome, RowChange, State};
use selvedge_proto::peer as wire;
use selvedge_storage::state::StateStore;
use tokio::sync::watch;

use crate::blocking::Blocking;
use crate::convert::{self, invalid};
use crate::error::Fatal;
use crate::journal;
use crate::metrics::{APPLIED_INDEX, APPLY_SECONDS};
use crate::published::{HashesAt, Published};
use crate::raft_types::{Batch, Entry, LogId, Payload, Snapshot, SnapshotMeta, StoredMembership, TypeConfig};
use crate::snapshot::{SnapshotData, Snapshots, decode_meta};
use crate::version;

/// Entries that are applied with one write.
const APPLY_ENTRIES_MAX: usize = 64;

/// The state machine. Owned by Raft.
pub struct Machine {
    store: Arc<StateStore>,
    snapshots: Snapshots,
    published: Arc<Published>,
    state: State,
    last_applied: Option<LogId>,
    membership: StoredMembership,
    fatal: watch::Sender<Option<Fatal>>,
}

impl Machine {
    /// Loads the stored state and publishes it. Snapshots lie in `snapshot_dir`, which is emptied.
    pub(crate) async fn open(
        store: Arc<StateStore>,
        snapshot_dir: PathBuf,
        published: Arc<Published>,
        blocking: Blocking,
        fatal: watch::Sender<Option<Fatal>>,
    ) -> io::Result<Self> {
        let mut machine = Self {
            snapshots: Snapshots::new(store.clone(), snapshot_dir, blocking)?,
            store,
            published,
            state: State::default(),
            last_applied: None,
            membership: StoredMembership::default(),
            fatal,
        };
        machine.load().await?;
        Ok(machine)
    }

    /// Index of the last entry that the loaded state holds.
    pub(crate) fn applied_index(&self) -> Option<u64> {
        self.last_applied.as_ref().map(|id| id.index)
    }

    pub(crate) fn snapshots(&self) -> Snapshots {
        self.snapshots.clone()
    }

    async fn load(&mut self) -> io::Result<()> {
        let store = self.store.clone();
        let read = move || {
            let mut rows = Vec::new();
            let meta = store
                .load(|table, key, value| {
                    rows.push(RowChange { table, key: key.to_vec(), value: Some(value.into()) });
                })
                .map_err(io::Error::other)?;
            Ok((rows, meta))
        };
        let (rows, meta) = self.snapshots.blocking().run(read).await?;
        let meta = meta.map_or_else(|| Ok(wire::StateMeta::default()), |bytes| decode_meta(&bytes))?;
        let domain = Meta::decode(&*meta.domain).map_err(|_| invalid("the stored meta of the state is none"))?;
        let state = State::load(domain, rows);
        version::loaded(&state).map_err(|newer| self.must_stop(newer))?;
        self.state = state.map_err(io::Error::other)?;
        self.last_applied = meta.last_applied.as_ref().map(convert::log_id_back);
        self.membership = convert::stored_membership_back(meta.membership.as_ref())?;
        let index = self.last_applied.as_ref().map(|id| id.index);
        let state = Arc::new(self.state.clone());
        // After an install: what is fetched of the journal before it must lead to this hash.
        let (store, seq) = (self.store.clone(), state.position().seq);
        if let Ok(hash) = <[u8; 32]>::try_from(state.meta().journal_hash)
            && store.journal_bounds().map_err(io::Error::other)?.compacted == seq
        {
            store.mark_journal(&[(seq, hash)]).map_err(io::Error::other)?;
        }
        tokio::spawn(check(self.snapshots.blocking().clone(), state.clone(), self.fatal.clone()));
        self.published.replace(state, index).await;
        Ok(())
    }

    fn meta(&self) -> Vec<u8> {
        wire::StateMeta {
            last_applied: self.last_applied.as_ref().map(convert::log_id),
            membership: Some(convert::stored_membership(&self.membership)),
            domain: self.state.meta().encode_to_vec(),
        }
        .encode_to_vec()
    }

    fn decide(&mut self, entry: Entry, changes: &mut Changes) -> io::Result<Vec<Outcome>> {
        self.last_applied = Some(entry.log_id);
        decide(&mut self.state, &mut self.membership, entry, changes).map_err(|error| match error {
            Undecided::Newer(newer) => self.must_stop(newer),
            Undecided::Damaged(error) => error,
        })
    }

    /// Says why this broker stops before Raft finds that it cannot apply any more.
    fn must_stop(&self, fatal: Fatal) -> io::Error {
        fatal.clone().report(&self.fatal);
        io::Error::other(fatal)
    }

    async fn apply_batch(&mut self, entries: Vec<Result<EntryResponder<TypeConfig>, io::Error>>) -> io::Result<()> {
        let begun = Instant::now();
        let mut changes = Changes::default();
        let mut answers = Vec::with_capacity(entries.len());
        let mut hashes = Vec::with_capacity(entries.len());
        let mut last_index = 0;
        for item in entries {
            let (entry, responder) = item?;
            last_index = entry.log_id.index;
            let outcomes = self.decide(entry, &mut changes)?;
            hashes.push(HashesAt {
                index: last_index,
                state: self.state.state_hash(),
                journal: self.state.meta().journal_hash,
            });
            answers.extend(responder.map(|responder| (responder, outcomes)));
        }
        let rows = last_changes(changes.rows);
        self.store.mark_journal(&changes.journal_marks).map_err(io::Error::other)?;
        self.store.write(&rows, &changes.journal, &self.meta(), false).map_err(io::Error::other)?;
        if let Some(upto) = changes.compact_journal_upto {
            journal::compact(&self.store, upto).map_err(io::Error::other)?;
        }
        self.published.advance(Arc::new(self.state.clone()), last_index, changes.events, hashes).await;
        for (responder, outcomes) in answers {
            responder.send(outcomes);
        }
        ::metrics::histogram!(APPLY_SECONDS).record(begun.elapsed());
        ::metrics::gauge!(APPLIED_INDEX).set(last_index as f64);
        Ok(())
    }
}

/// Why an entry cannot be applied.
#[derive(Debug)]
pub(crate) enum Undecided {
    /// It is of a newer build.
    Newer(Fatal),
    /// It is not what a leader writes.
    Damaged(io::Error),
}

/// Decides the commands of an entry, or takes over its membership.
pub(crate) fn decide(
    state: &mut State,
    membership: &mut StoredMembership,
    entry: Entry,
    changes: &mut Changes,
) -> Result<Vec<Outcome>, Undecided> {
    match entry.payload {
        Payload::Blank => Ok(Vec::new()),
        Payload::Membership(new) => {
            *membership = StoredMembership::new(Some(entry.log_id), new);
            Ok(Vec::new())
        }
        Payload::Normal(Batch(bytes)) => {
            let batch = wire::Batch::decode(bytes);
            let batch = batch.map_err(|_| Undecided::Damaged(invalid("an entry that is not a batch")))?;
            // What this build does not know must not be passed over: the others may know it.
            let commands = batch.commands.iter().map(|command| version::read(command));
            let commands = commands.collect::<Result<Vec<_>, _>>().map_err(Undecided::Newer)?;
            Ok(state.apply_all(batch.time_ms, &commands, changes))
        }
    }
}

/// Hashes the rows that were loaded again, while they are served already.
async fn check(blocking: Blocking, state: Arc<State>, fatal: watch::Sender<Option<Fatal>>) {
    let position = state.position().seq;
    if let Ok(false) = blocking.call(move || state.adds_up()).await {
        Fatal::StateDamaged { position }.report(&fatal);
    }
}

impl RaftStateMachine<TypeConfig> for Machine {
    type SnapshotData = SnapshotData;
    type SnapshotBuilder = Snapshots;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), io::Error> {
        Ok((self.last_applied, self.membership.clone()))
    }

    async fn apply<Strm>(&mut self, entries: Strm) -> Result<(), io::Error>
    where
        Strm: Stream<Item = Result<EntryResponder<TypeConfig>, io::Error>> + Unpin + OptionalSend,
    {
        let mut batches = entries.ready_chunks(APPLY_ENTRIES_MAX);
        while let Some(batch) = batches.next().await {
            self.apply_batch(batch).await?;
        }
        Ok(())
    }

    async fn try_create_snapshot_builder(&mut self, _force: bool) -> Option<Snapshots> {
        Some(self.snapshots.clone())
    }

    async fn get_snapshot_builder(&mut self) -> Snapshots {
        self.snapshots.clone()
    }

    async fn install_snapshot(&mut self, _meta: &SnapshotMeta, snapshot: SnapshotData) -> Result<(), io::Error> {
        let snapshots = self.snapshots.clone();
        self.snapshots.blocking().run(move || snapshots.install(&snapshot)).await?;
        self.load().await
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot>, io::Error> {
        Ok(self.snapshots.current())
    }
}
