//! Outcomes that a retry may ask for again: applied once, answered as often as asked.

use crate::command::{Command, Outcome, Rejected, RejectedCode};
use crate::id::Id;
use crate::limits::DEDUPE_WINDOW;
use crate::rows::{Client, ClientOutcomes, Idempotency, KeptOutcome};
use crate::state::{State, Table};

use super::Draft;

/// How long the outcome of an `Idempotency-Key` is kept, milliseconds.
const IDEMPOTENCY_MS: u64 = 24 * 3_600_000;

/// What became of an earlier attempt with the same key; none when this is the first.
pub(crate) fn before(state: &State, command: &Command) -> Option<Outcome> {
    let dedupe = command.dedupe.as_ref()?;
    if let Some(kept) = dedupe.idempotency.and_then(|key| state.row::<Idempotency>(&key))
        && kept.expires_ms > state.time_ms()
    {
        return kept.outcome.map(from_kept);
    }
    let Some(client) = state.by_id::<Client>(dedupe.client) else {
        return Some(refused(RejectedCode::DedupeUnknown, "the proposing client is not registered"));
    };
    if dedupe.seq < client.acked_below {
        return Some(refused(RejectedCode::DedupeWindow, "the outcome of this request is not kept any more"));
    }
    let block = state.row::<ClientOutcomes>(&ClientOutcomes::key_of(dedupe.client, dedupe.seq))?;
    block.outcomes.into_iter().find(|kept| kept.seq == dedupe.seq).map(from_kept)
}

/// Keeps the outcome of a command that carried a key, and answers a repeated one with the first outcome.
pub(crate) fn remember(draft: &mut Draft, command: &Command, outcome: Outcome) -> Outcome {
    let Some(dedupe) = &command.dedupe else { return outcome };
    let Some(mut client) = draft.state.by_id::<Client>(dedupe.client) else { return outcome };
    let kept = kept(dedupe.seq, &outcome);
    let below = client.acked_below;
    client.acked_below =
        below.max(dedupe.acked_below.min(dedupe.seq)).max(dedupe.seq.saturating_add(1).saturating_sub(DEDUPE_WINDOW));
    let upto = ClientOutcomes::key_of(dedupe.client, client.acked_below);
    forget(draft, &ClientOutcomes::key_of(dedupe.client, below), &upto);
    let key = ClientOutcomes::key_of(dedupe.client, dedupe.seq);
    let mut block = draft.state.row::<ClientOutcomes>(&key).unwrap_or(ClientOutcomes {
        client: Some(dedupe.client),
        block: dedupe.seq / ClientOutcomes::SEQS,
        outcomes: Vec::new(),
    });
    block.outcomes.push(kept.clone());
    draft.put_quiet(&block);
    client.used_ms = draft.now_ms();
    draft.put_quiet(&client);
    if let Some(key) = dedupe.idempotency {
        let expires_ms = draft.now_ms() + IDEMPOTENCY_MS;
        draft.put_quiet(&Idempotency { key_sha256: key.to_vec(), outcome: Some(kept), expires_ms });
    }
    outcome
}

/// Forgets all outcomes of a client.
pub(crate) fn forget_all(draft: &mut Draft, client: Id) {
    // Above every key that begins with the client's id.
    let end = [&client.key()[..], &[0xff; 9]].concat();
    forget(draft, &client.key(), &end);
}

/// Forgets the rows of outcomes whose keys lie between.
fn forget(draft: &mut Draft, from: &[u8], to: &[u8]) {
    for key in draft.state.keys_between(Table::ClientOutcomes, from, to) {
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
