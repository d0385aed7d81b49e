//! Outcomes that a retry may ask for again: applied once, answered as often as asked.

use std::collections::BTreeMap;

use crate::command::{Command, Outcome, Rejected, RejectedCode};
use crate::id::Id;
use crate::limits::DEDUPE_WINDOW;
use crate::rows::{Client, ClientOutcomes, Idempotency, KeptOutcome};
use crate::state::{RowChange, State, Table};

use super::Draft;

/// How long the outcome of an `Idempotency-Key` is kept, milliseconds.
const IDEMPOTENCY_MS: u64 = 24 * 3_600_000;

/// The outcomes of proposing clients' requests while an entry is applied: most of its commands are of a few clients, whose
/// rows are read once and written once, at its end.
#[derive(Default)]
pub(crate) struct Memory {
    clients: BTreeMap<Id, Recalled>,
}

/// A client and those of its rows of outcomes that were looked at.
struct Recalled {
    client: Client,
    /// What its row says.
    acked_below: u64,
    /// By number. One that was looked for and is not there is empty.
    blocks: BTreeMap<u64, ClientOutcomes>,
    changed: bool,
}

impl Recalled {
    fn block(&mut self, state: &State, seq: u64) -> &mut ClientOutcomes {
        let (client, block) = (self.client.id(), seq / ClientOutcomes::SEQS);
        self.blocks.entry(block).or_insert_with(|| {
            let stored = state.row(&ClientOutcomes::key_of(client, seq));
            stored.unwrap_or(ClientOutcomes { client: Some(client), block, outcomes: Vec::new() })
        })
    }
}

impl Memory {
    fn client(&mut self, state: &State, id: Id) -> Option<&mut Recalled> {
        use std::collections::btree_map::Entry;
        match self.clients.entry(id) {
            Entry::Occupied(known) => Some(known.into_mut()),
            Entry::Vacant(vacant) => {
                let client = state.by_id::<Client>(id)?;
                let acked_below = client.acked_below;
                Some(vacant.insert(Recalled { client, acked_below, blocks: BTreeMap::new(), changed: false }))
            }
        }
    }

    /// What became of an earlier attempt with the same key; none when this is the first.
    pub(crate) fn before(&mut self, state: &State, command: &Command) -> Option<Outcome> {
        let dedupe = command.dedupe.as_ref()?;
        if let Some(kept) = dedupe.idempotency.and_then(|key| state.row::<Idempotency>(&key))
            && kept.expires_ms > state.time_ms()
        {
            return kept.outcome.map(from_kept);
        }
        let Some(recalled) = self.client(state, dedupe.client) else {
            return Some(refused(RejectedCode::DedupeUnknown, "the proposing client is not registered"));
        };
        if dedupe.seq < recalled.client.acked_below {
            let message = "the outcome of this request is not kept any more";
            return Some(refused(RejectedCode::DedupeWindow, message));
        }
        let block = recalled.block(state, dedupe.seq);
        block.outcomes.iter().find(|kept| kept.seq == dedupe.seq).cloned().map(from_kept)
    }

    /// Keeps the outcome of a command that carried a key.
    pub(crate) fn remember(&mut self, draft: &mut Draft, command: &Command, outcome: &Outcome) {
        let Some(dedupe) = &command.dedupe else { return };
        let now_ms = draft.now_ms();
        let Some(recalled) = self.client(&draft.state, dedupe.client) else { return };
        let kept = kept(dedupe.seq, outcome);
        let client = &mut recalled.client;
        client.acked_below = client
            .acked_below
            .max(dedupe.acked_below.min(dedupe.seq))
            .max(dedupe.seq.saturating_add(1).saturating_sub(DEDUPE_WINDOW));
        client.used_ms = now_ms;
        recalled.changed = true;
        recalled.block(&draft.state, dedupe.seq).outcomes.push(kept.clone());
        if let Some(key) = dedupe.idempotency {
            let expires_ms = now_ms + IDEMPOTENCY_MS;
            draft.put_quiet(&Idempotency { key_sha256: key.to_vec(), outcome: Some(kept), expires_ms });
        }
    }

    /// Writes what changed, and begins anew.
    pub(crate) fn write(&mut self, state: &mut State, rows: &mut Vec<RowChange>) {
        for (id, recalled) in std::mem::take(&mut self.clients).into_iter().filter(|(_, recalled)| recalled.changed) {
            let Recalled { client, acked_below, blocks, .. } = recalled;
            let (from, upto) =
                (ClientOutcomes::key_of(id, acked_below), ClientOutcomes::key_of(id, client.acked_below));
            for key in state.keys_between(Table::ClientOutcomes, &from, &upto) {
                rows.push(state.delete(Table::ClientOutcomes, key).0);
            }
            let first = client.acked_below / ClientOutcomes::SEQS;
            for block in blocks.range(first..).map(|(_, block)| block).filter(|block| !block.outcomes.is_empty()) {
                rows.push(state.put(block).0);
            }
            rows.push(state.put(&client).0);
        }
    }
}

/// Forgets all outcomes of a client.
pub(crate) fn forget_all(draft: &mut Draft, client: Id) {
    // Above every key that begins with the client's id.
    let end = [&client.key()[..], &[0xff; 9]].concat();
    for key in draft.state.keys_between(Table::ClientOutcomes, &client.key(), &end) {
        draft.delete_quiet(Table::ClientOutcomes, key);
    }
}

fn kept(seq: u64, outcome: &Outcome) -> KeptOutcome {
    match outcome {
        Outcome::Done { position, ids } => KeptOutcome { seq, code: 0, ids: ids.clone(), position: Some(*position) },
        Outcome::Refused(rejected) => KeptOutcome { seq, code: rejected.code as i32, ids: Vec::new(), position: None },
    }
}

fn from_kept(kept: KeptOutcome) -> Outcome {
    if kept.code == 0 {
        return Outcome::Done { position: kept.position.unwrap_or_default(), ids: kept.ids };
    }
    let code = RejectedCode::try_from(kept.code).unwrap_or(RejectedCode::Before);
    refused(code, "refused before, with the same key")
}

fn refused(code: RejectedCode, message: &str) -> Outcome {
    Outcome::Refused(Rejected::new(code, message))
}
