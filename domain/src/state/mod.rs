//! The replicated state: tables of rows in persistent maps.
//!
//! A clone costs nothing much and shares everything, so readers hold an `Arc<State>` and never lock. The state after
//! `load(rows)` equals the state the rows came from; secondary indexes are derived and never stored.

mod hash;
mod key;
mod read;
mod table;
#[cfg(test)]
mod tests;

use std::ops::Bound;
use std::sync::Arc;

use imbl::OrdMap;

pub use hash::StateHash;
pub use read::Unnamed;
pub use table::{IndexKey, Table};

use crate::command::{Actor, Body, Command, Outcome, Rejected};
use crate::decide::{self, BeginEpoch, Draft, Memory};
use crate::event::Envelope;
use crate::id::Id;
use crate::rows::{self, Row};
use key::{Key, Place};

/// One changed row: what a replica writes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RowChange {
    /// Number of the table.
    pub table: u8,
    /// Key.
    pub key: Vec<u8>,
    /// New value, or none when the row is gone.
    pub value: Option<Arc<[u8]>>,
}

/// One row of the journal: an encoded envelope.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JournalRow {
    /// Sequence number of the event.
    pub seq: u64,
    /// Encoded [`Envelope`].
    pub bytes: Arc<[u8]>,
}

/// What applying commands changed, to be written in one batch.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Changes {
    /// Rows.
    pub rows: Vec<RowChange>,
    /// Journal.
    pub journal: Vec<JournalRow>,
    /// The journal's hash after some of these rows: those whose number [`crate::limits::JOURNAL_MARK_EVERY`] divides.
    pub journal_marks: Vec<(u64, [u8; 32])>,
    /// The same events, decoded.
    pub events: Vec<Envelope>,
    /// The journal may forget rows up to here.
    pub compact_journal_upto: Option<u64>,
}

/// Of rows that were changed one after the other, the last change of each, in key order: what a replica has to write.
pub fn last_changes(mut rows: Vec<RowChange>) -> Vec<RowChange> {
    rows.reverse();
    rows.sort_by(|a, b| (a.table, &a.key).cmp(&(b.table, &b.key)));
    rows.dedup_by(|later, first| (later.table, &later.key) == (first.table, &first.key));
    rows
}

/// Counters and hashes that travel with the rows.
///
/// **Durability** written in the same batch as the rows it describes.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Meta {
    /// Position: the last event applied.
    #[prost(message, optional, tag = "1")]
    pub position: Option<Id>,
    /// Time of the last entry applied, milliseconds.
    #[prost(uint64, tag = "2")]
    pub time_ms: u64,
    /// Sum modulo 2^256 of SHA-256 over all rows.
    #[prost(bytes = "vec", tag = "3")]
    pub state_hash: Vec<u8>,
    /// Chained hash of all journal rows.
    #[prost(bytes = "vec", tag = "4")]
    pub journal_hash: Vec<u8>,
    /// Next dense number of a user.
    #[prost(uint32, tag = "5")]
    pub user_number_next: u32,
    /// Next dense number of a group.
    #[prost(uint32, tag = "6")]
    pub group_number_next: u32,
    /// The journal begins after this sequence number.
    #[prost(uint64, tag = "7")]
    pub journal_compacted: u64,
}

/// The state that every broker holds.
#[derive(Clone, Debug, Default)]
pub struct State {
    tables: [OrdMap<Key, Arc<[u8]>>; Table::COUNT],
    index: OrdMap<Place, Key>,
    hash: StateHash,
    pub(crate) meta: Meta,
}

/// Rows that were loaded are not a state.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The table's number is not known to this version.
    #[error("table {0} is not known to this version")]
    Table(u8),
    /// A row does not decode.
    #[error("a row of table `{table:?}` does not decode")]
    Row {
        /// Table.
        table: Table,
        /// Why.
        #[source]
        source: prost::DecodeError,
    },
    /// The stored hash has another length.
    #[error("the stored state hash is none")]
    Hash,
}

impl State {
    /// The state that rows and metadata came from. The hash is taken from the metadata as it stands;
    /// [`State::adds_up`] tells whether the rows add up to it.
    pub fn load(meta: Meta, rows: impl IntoIterator<Item = RowChange>) -> Result<Self, LoadError> {
        let mut state = Self { meta, ..Self::default() };
        for row in rows {
            let table = Table::from_number(row.table).ok_or(LoadError::Table(row.table))?;
            if let Some(value) = row.value {
                let keys = table.index_of(&value).map_err(|source| LoadError::Row { table, source })?;
                for index in &keys {
                    state.index.insert(Place::of(table, index), row.key.as_slice().into());
                }
                state.tables[table as usize].insert(row.key.as_slice().into(), value);
            }
        }
        state.hash = if state.meta.state_hash.is_empty() {
            state.rows_hash()
        } else {
            StateHash::from_bytes(&state.meta.state_hash).ok_or(LoadError::Hash)?
        };
        Ok(state)
    }

    /// The hash of the rows as they are, taken anew. Takes time.
    pub fn rows_hash(&self) -> StateHash {
        let mut hash = StateHash::default();
        for row in self.all_rows() {
            if let Some(value) = &row.value {
                hash.add(row.table, &row.key, value);
            }
        }
        hash
    }

    /// Whether the rows add up to the hash that is kept as they come and go. Takes time.
    pub fn adds_up(&self) -> bool {
        self.rows_hash() == self.hash
    }

    /// Decides a command and applies what it leads to. Pure and total: a refusal is an outcome.
    ///
    /// `time_ms` is the time that the leader stamped on the entry.
    pub fn apply(&mut self, time_ms: u64, command: &Command, changes: &mut Changes) -> Outcome {
        let mut memory = Memory::default();
        let outcome = self.apply_with(&mut memory, time_ms, command, changes);
        memory.write(self, &mut changes.rows);
        outcome
    }

    /// [`State::apply`] of each command of an entry, in order.
    pub fn apply_all(&mut self, time_ms: u64, commands: &[Command], changes: &mut Changes) -> Vec<Outcome> {
        let mut memory = Memory::default();
        let mut outcomes = Vec::with_capacity(commands.len());
        for command in commands {
            if matches!(command.body, Body::RegisterClient { .. }) {
                // It looks at the clients' rows.
                memory.write(self, &mut changes.rows);
            }
            outcomes.push(self.apply_with(&mut memory, time_ms, command, changes));
        }
        memory.write(self, &mut changes.rows);
        outcomes
    }

    fn apply_with(&mut self, memory: &mut Memory, time_ms: u64, command: &Command, changes: &mut Changes) -> Outcome {
        if let Some(outcome) = memory.before(self, command) {
            return outcome;
        }
        // The state goes into the draft, not a copy of it: a refusal is undone.
        let mut draft = Draft::new(std::mem::take(self), time_ms, command);
        let outcome = match decide::decide(&mut draft, command) {
            Ok(()) => Outcome::Done { position: draft.state.position(), ids: draft.ids.clone() },
            Err(rejected) => {
                draft.undo();
                Outcome::Refused(rejected)
            }
        };
        memory.remember(&mut draft, command, &outcome);
        let (state, made) = draft.finish();
        *self = state;
        changes.rows.extend(made.rows);
        changes.journal.extend(made.journal);
        changes.journal_marks.extend(made.journal_marks);
        changes.events.extend(made.events);
        changes.compact_journal_upto = made.compact_journal_upto.or(changes.compact_journal_upto);
        outcome
    }

    /// Begins the next epoch from this state. Not a command: no log carries it, so that nobody can propose it.
    ///
    /// **Errors**: nothing was changed.
    pub fn begin_epoch(
        &mut self,
        time_ms: u64,
        begin: &BeginEpoch,
        changes: &mut Changes,
    ) -> Result<Vec<Id>, Rejected> {
        let mut draft = Draft::by(self.clone(), time_ms, begin.broker.node, Actor::BOOTSTRAP);
        decide::begin_epoch(&mut draft, begin)?;
        let ids = std::mem::take(&mut draft.ids);
        let (state, made) = draft.finish();
        (*self, *changes) = (state, made);
        Ok(ids)
    }

    /// Whether a command would be refused by the state as it is now; the proposer asks before it proposes.
    pub fn check(&self, time_ms: u64, command: &Command) -> Result<(), Rejected> {
        let mut draft = Draft::new(self.clone(), time_ms.max(self.meta.time_ms), command);
        decide::decide(&mut draft, command)
    }

    /// Position: the last event applied.
    pub fn position(&self) -> Id {
        self.meta.position.unwrap_or(Id::new(1, 0))
    }

    /// Counters and hashes.
    pub fn meta(&self) -> Meta {
        Meta { state_hash: self.hash.to_bytes(), ..self.meta.clone() }
    }

    /// Sum of the hashes of all rows.
    pub fn state_hash(&self) -> [u8; 32] {
        self.hash.to_array()
    }

    /// Time of the last entry applied, milliseconds.
    pub fn time_ms(&self) -> u64 {
        self.meta.time_ms
    }

    /// The row with this key.
    pub fn row<R: Row>(&self, key: &[u8]) -> Option<R> {
        self.tables[R::TABLE as usize].get(key).map(|value| decoded(value))
    }

    /// The row with this key, as stored.
    pub fn stored(&self, table: Table, key: &[u8]) -> Option<&Arc<[u8]>> {
        self.tables[table as usize].get(key)
    }

    /// The row with this id.
    pub fn by_id<R: Row>(&self, id: Id) -> Option<R> {
        self.row(&id.key())
    }

    /// All rows of a table, in key order.
    pub fn rows<R: Row>(&self) -> impl Iterator<Item = R> + '_ {
        self.tables[R::TABLE as usize].values().map(|value| decoded(value))
    }

    /// Rows whose keys begin with `prefix`, in key order.
    pub fn rows_under<'a, R: Row + 'a>(&'a self, prefix: &'a [u8]) -> impl Iterator<Item = R> + 'a {
        self.tables[R::TABLE as usize]
            .range::<_, [u8]>((Bound::Included(prefix), Bound::Unbounded))
            .take_while(move |(key, _)| key.as_bytes().starts_with(prefix))
            .map(|(_, value)| decoded(value))
    }

    /// Keys of a table from `from` on, and before `to`.
    pub(crate) fn keys_between(&self, table: Table, from: &[u8], to: &[u8]) -> Vec<Vec<u8>> {
        let keys = self.tables[table as usize].range::<_, [u8]>((Bound::Included(from), Bound::Excluded(to)));
        keys.map(|(key, _)| key.as_bytes().to_vec()).collect()
    }

    /// The last row whose key is not above `key`.
    pub(crate) fn row_upto<R: Row>(&self, key: &[u8]) -> Option<R> {
        let mut rows = self.tables[R::TABLE as usize].range::<_, [u8]>((Bound::Unbounded, Bound::Included(key)));
        rows.next_back().map(|(_, value)| decoded(value))
    }

    /// The first row whose key is above `key`.
    pub(crate) fn row_after<R: Row>(&self, key: &[u8]) -> Option<R> {
        let mut rows = self.tables[R::TABLE as usize].range::<_, [u8]>((Bound::Excluded(key), Bound::Unbounded));
        rows.next().map(|(_, value)| decoded(value))
    }

    /// Number of rows of a table.
    pub fn count(&self, table: Table) -> usize {
        self.tables[table as usize].len()
    }

    /// Whether a row other than `own` is found by this.
    pub(crate) fn is_taken<R: Row>(&self, index: IndexKey, own: Option<Id>) -> bool {
        let found = self.index.get(&Place::of(R::TABLE, &index));
        found.is_some_and(|key| own.is_none_or(|own| key.as_bytes() != own.key()))
    }

    /// The row found by something else than its key.
    pub fn find<R: Row>(&self, index: IndexKey) -> Option<R> {
        self.row(self.index.get(&Place::of(R::TABLE, &index))?.as_bytes())
    }

    /// Every row as stored, for snapshots and tests.
    pub fn all_rows(&self) -> impl Iterator<Item = RowChange> + '_ {
        Table::ALL.into_iter().flat_map(move |table| {
            self.tables[table as usize].iter().map(move |(key, value)| RowChange {
                table: table as u8,
                key: key.as_bytes().to_vec(),
                value: Some(value.clone()),
            })
        })
    }

    /// Whether both have the same rows, and find them by the same.
    #[cfg(test)]
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        self.tables == other.tables && self.index == other.index
    }

    /// Writes a row; answers what was there, too.
    pub(crate) fn put<R: Row>(&mut self, row: &R) -> (RowChange, Option<Arc<[u8]>>) {
        let key = row.key();
        let value: Arc<[u8]> = row.encode_to_vec().into();
        let before = self.stored(R::TABLE, &key).map(|old| R::index_of(old)).unwrap_or_default();
        let old = self.set(R::TABLE, &key, Some(value.clone()), &before, &row.index());
        (RowChange { table: R::TABLE as u8, key, value: Some(value) }, old)
    }

    /// Deletes a row; answers what was there, too.
    pub(crate) fn delete(&mut self, table: Table, key: Vec<u8>) -> (RowChange, Option<Arc<[u8]>>) {
        let old = self.set(table, &key, None, &self.index_of(table, &key), &[]);
        (RowChange { table: table as u8, key, value: None }, old)
    }

    /// Makes a row what it was.
    pub(crate) fn restore(&mut self, table: Table, key: &[u8], old: Option<Arc<[u8]>>) {
        let before = self.index_of(table, key);
        let after = old.as_ref().and_then(|old| table.index_of(old).ok()).unwrap_or_default();
        self.set(table, key, old, &before, &after);
    }

    fn index_of(&self, table: Table, key: &[u8]) -> Vec<IndexKey> {
        self.stored(table, key).and_then(|value| table.index_of(value).ok()).unwrap_or_default()
    }

    fn set(
        &mut self,
        table: Table,
        key: &[u8],
        value: Option<Arc<[u8]>>,
        before: &[IndexKey],
        after: &[IndexKey],
    ) -> Option<Arc<[u8]>> {
        if before != after {
            for index in before {
                self.index.remove(&Place::of(table, index));
            }
            for index in after {
                self.index.insert(Place::of(table, index), key.into());
            }
        }
        if let Some(value) = &value {
            self.hash.add(table as u8, key, value);
        }
        let old = match value {
            Some(value) => self.tables[table as usize].insert(key.into(), value),
            None => self.tables[table as usize].remove(key),
        };
        if let Some(old) = &old {
            self.hash.remove(table as u8, key, old);
        }
        old
    }
}

/// A stored row.
pub(crate) fn decoded<M: prost::Message + Default>(value: &[u8]) -> M {
    M::decode(value).expect("rows were encoded by `put` or checked by `load`")
}

impl State {
    /// Whether there is a cluster.
    pub fn is_initialised(&self) -> bool {
        self.count(Table::Cluster) > 0
    }

    /// The version of the rules in force; 0 while there is no cluster.
    pub fn version(&self) -> u32 {
        self.cluster().map_or(0, |cluster| cluster.version)
    }

    /// The cluster's own row, once it was initialised.
    pub fn cluster(&self) -> Option<rows::Cluster> {
        self.row(&[])
    }
}
