//! The event journal at rest: how long it is kept, and where a replica that installed a snapshot gets what is before it.
//!
//! A snapshot has no journal. Its replica knows the journal's chained hash at that point and fetches older rows from
//! others, the newest first, in pieces: a piece comes with the hash before it, and is believed when the chain from
//! there ends in the hash that is known. Until a piece is whole nobody sees its rows.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures::{Stream, StreamExt as _};
use prost::Message as _;
use selvedge_domain::limits::JOURNAL_MARK_EVERY;
use selvedge_domain::{Asker, Body, Envelope};
use selvedge_proto::peer as wire;
use selvedge_storage::state::{JournalRow, StateStore};
use tokio::time::Instant;
use tonic::{Request, Status};

use crate::core::Core;
use crate::dial::Purpose;
use crate::error::Error;
use crate::metrics::{JOURNAL_DIFFERS_TOTAL, JOURNAL_FETCHED_ROWS_TOTAL, JOURNAL_MISSING_ROWS};

/// Between two looks at what is too old.
const KEEP_INTERVAL: Duration = Duration::from_secs(1);
/// The oldest row is older by this part of the time for which rows are kept, before they go: so they go many at once.
const KEEP_SLACK: u64 = 16;
/// Between two looks at what is missing.
const FETCH_INTERVAL: Duration = Duration::from_secs(1);
/// A broker whose events are not those of this cluster is left alone for so long, then twice that, up to the longest.
const DIFFERS_PAUSE_MIN: Duration = Duration::from_secs(10);
const DIFFERS_PAUSE_MAX: Duration = Duration::from_secs(600);
/// Longest wait for the next part of a piece.
const FETCH_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest wait for the others to say what they have.
const HOLDERS_TIMEOUT: Duration = Duration::from_secs(3);
/// Rows of one piece.
const PIECE_ROWS: u64 = 1_024;
/// Bytes of rows in one message; a larger row has a message of its own.
const PART_BYTES: usize = 1 << 20;

/// The journal's hash after a row; none when the rows that lead to it are not here.
pub(crate) fn hash_at(store: &StateStore, seq: u64) -> Result<Option<Vec<u8>>, selvedge_storage::Error> {
    let bounds = store.journal_bounds()?;
    if seq == 0 {
        return Ok(Some(Vec::new()));
    }
    if seq < bounds.compacted || seq > bounds.last {
        return Ok(None);
    }
    let mut at = seq - seq % JOURNAL_MARK_EVERY;
    let mut hash = loop {
        if at <= bounds.compacted {
            at = bounds.compacted;
            match store.journal_mark(at)? {
                Some(hash) => break hash,
                None if at == 0 => break Vec::new(),
                None => return Ok(None),
            }
        }
        match store.journal_mark(at)? {
            Some(hash) => break hash,
            None => at = at.saturating_sub(JOURNAL_MARK_EVERY),
        }
    };
    while at < seq {
        let before = at;
        for row in store.journal(at + 1, PART_BYTES)?.into_iter().take_while(|row| row.seq <= seq) {
            if row.seq != at + 1 {
                return Ok(None);
            }
            hash = Envelope::chain(&hash, &row.bytes).to_vec();
            at = row.seq;
        }
        if at == before {
            return Ok(None);
        }
    }
    Ok(Some(hash))
}

/// Forgets rows up to `upto_seq`, included; the hash there is remembered.
pub(crate) fn compact(store: &StateStore, upto_seq: u64) -> Result<(), selvedge_storage::Error> {
    if let Some(hash) = hash_at(store, upto_seq)?.and_then(|hash| <[u8; 32]>::try_from(hash).ok()) {
        store.mark_journal(&[(upto_seq, hash)])?;
    }
    store.compact_journal(upto_seq)
}

/// While this broker leads, proposes to forget what has been kept for long enough.
pub(crate) async fn keep(core: Arc<Core>) {
    while core.pause(KEEP_INTERVAL).await.is_ok() {
        let Some(cluster) = core.published.state().cluster().filter(|_| core.leads()) else { continue };
        let (keep_ms, now_ms, store) = (cluster.journal_keep_ms(), core.published.now_ms(), core.store.clone());
        let found = core.blocking.call(move || too_old(&store, now_ms, keep_ms)).await;
        match found {
            Ok(Ok(Some(upto_seq))) => {
                tracing::info!(upto_seq, "forgetting old events");
                if let Err(error) = core.propose(Asker::BROKER, Body::CompactJournal { upto_seq }, None).await {
                    tracing::warn!(%error, "old events were not forgotten");
                }
            }
            Ok(Ok(None)) => {}
            Ok(Err(error)) => tracing::warn!(%error, "the age of the journal cannot be read"),
            Err(_) => return,
        }
    }
}

/// The last event of a command before which everything has been kept for long enough, once the oldest has been for
/// noticeably longer.
fn too_old(store: &StateStore, now_ms: u64, keep_ms: u64) -> Result<Option<u64>, Error> {
    let bounds = store.journal_bounds()?;
    let event = |seq: u64| {
        let row = store.journal(seq, 0)?.into_iter().next().filter(|row| row.seq == seq);
        row.and_then(|row| Envelope::decode(&*row.bytes).ok()).ok_or(Error::Journal { seq })
    };
    let old = |seq: u64, keep_ms: u64| Ok::<_, Error>(event(seq)?.time_ms.saturating_add(keep_ms) < now_ms);
    // The last event always stays.
    let (mut low, mut high) = (bounds.compacted + 1, bounds.last);
    if low >= high || !old(low, keep_ms + keep_ms / KEEP_SLACK)? {
        return Ok(None);
    }
    while low < high {
        let middle = low.midpoint(high);
        if old(middle, keep_ms)? { low = middle + 1 } else { high = middle }
    }
    let mut upto = low - 1;
    while upto > bounds.compacted && !event(upto)?.last {
        upto -= 1;
    }
    Ok((upto > bounds.compacted).then_some(upto))
}

/// Answers another broker: bounds, then the newest rows up to the one that it wants.
pub(crate) fn serve(
    core: Arc<Core>,
    upto_seq: u64,
) -> impl Stream<Item = Result<wire::JournalPart, Status>> + Send + 'static {
    futures::stream::try_unfold((core, None), move |(core, next): (Arc<Core>, Option<u64>)| async move {
        let store = core.store.clone();
        let read = move || match next {
            None => begin(&store, upto_seq).map(Some),
            Some(next) if next > upto_seq => Ok(None),
            Some(next) => rows(&store, next, upto_seq).map(Some),
        };
        let failed = |error: &dyn std::fmt::Display| Status::internal(error.to_string());
        let part = core.blocking.call(read).await.map_err(|_| Status::cancelled("this broker stops"))?;
        Ok(part.map_err(|error| failed(&error))?.map(|part| {
            let next = match (next, part.from_seq) {
                (Some(next), _) => next + part.rows.len() as u64,
                // Bounds were all there is to say.
                (None, 0) => u64::MAX,
                (None, from_seq) => from_seq,
            };
            (part, (core, Some(next)))
        }))
    })
}

fn begin(store: &StateStore, upto_seq: u64) -> Result<wire::JournalPart, Error> {
    let bounds = store.journal_bounds()?;
    let mut part = wire::JournalPart { compacted: bounds.compacted, ..wire::JournalPart::default() };
    if upto_seq > bounds.compacted && upto_seq <= bounds.last {
        let from_seq = (bounds.compacted + 1).max(upto_seq.saturating_sub(PIECE_ROWS - 1));
        if let Some(hash) = hash_at(store, from_seq - 1)? {
            (part.from_seq, part.hash_before) = (from_seq, hash);
        }
    }
    Ok(part)
}

fn rows(store: &StateStore, from_seq: u64, upto_seq: u64) -> Result<wire::JournalPart, Error> {
    let rows = store.journal(from_seq, PART_BYTES)?.into_iter().take_while(|row| row.seq <= upto_seq);
    let rows: Vec<Vec<u8>> = rows.map(|row| row.bytes.to_vec()).collect();
    if rows.is_empty() {
        Err(Error::Journal { seq: from_seq })
    } else {
        Ok(wire::JournalPart { rows, ..Default::default() })
    }
}

/// The brokers that have a row.
pub(crate) async fn holders(core: &Arc<Core>, seq: u64) -> Vec<u64> {
    let asked = core.members().into_iter().filter(|node| *node != core.node).map(|node| {
        let mut client = core.peer_client(node, Purpose::Control);
        async move {
            let ask = async {
                client.journal(Request::new(wire::JournalRequest { upto_seq: 0 })).await?.into_inner().message().await
            };
            let part = tokio::time::timeout(HOLDERS_TIMEOUT, ask).await.ok()?.ok()??;
            (part.compacted < seq).then_some(node)
        }
    });
    futures::future::join_all(asked).await.into_iter().flatten().collect()
}

/// Fetches what is missing before a snapshot that was installed.
pub(crate) async fn fetch_older(core: Arc<Core>) {
    let (mut told, mut differing) = (false, Differing::new());
    while core.pause(FETCH_INTERVAL).await.is_ok() {
        loop {
            let missing = match missing(&core).await {
                Ok(missing) => missing,
                Err(error) => {
                    tracing::warn!(%error, "the journal's beginning cannot be read");
                    break;
                }
            };
            let Some((begin, floor)) = missing else {
                ::metrics::gauge!(JOURNAL_MISSING_ROWS).set(0.0);
                if std::mem::take(&mut told) {
                    tracing::info!("the older events are here");
                }
                break;
            };
            ::metrics::gauge!(JOURNAL_MISSING_ROWS).set((begin - floor) as f64);
            if !std::mem::replace(&mut told, true) {
                tracing::info!(upto_seq = begin, "fetching older events from another broker");
            }
            if !fetch_from_any(&core, begin, &mut differing).await {
                break;
            }
        }
    }
}

/// The last row that is not here, when it is one that others may have, and the last one that nobody has.
async fn missing(core: &Arc<Core>) -> Result<Option<(u64, u64)>, Error> {
    let floor = core.published.state().meta().journal_compacted;
    let store = core.store.clone();
    let bounds = core.blocking.run(move || {
        let bounds = store.journal_bounds().map_err(std::io::Error::other)?;
        if bounds.compacted < floor {
            // A compaction overtook the fetching.
            compact(&store, floor).map_err(std::io::Error::other)?;
        }
        Ok(bounds)
    });
    let begin = bounds.await.map_err(Error::State)?.compacted;
    Ok((begin > floor).then_some((begin, floor)))
}

/// Brokers whose events were not those of this cluster: until when each is left alone, and for how long it was.
type Differing = BTreeMap<u64, (Instant, Duration)>;

async fn fetch_from_any(core: &Arc<Core>, begin: u64, differing: &mut Differing) -> bool {
    let now = Instant::now();
    for node in core.members().into_iter().filter(|node| *node != core.node) {
        if differing.get(&node).is_some_and(|(until, _)| *until > now) {
            continue;
        }
        match fetch(core, node, begin).await {
            Ok(0) => {}
            Ok(rows) => {
                ::metrics::counter!(JOURNAL_FETCHED_ROWS_TOTAL).increment(rows);
                differing.remove(&node);
                return true;
            }
            Err(Error::Journal { seq }) => {
                let longer = |(_, pause): &(Instant, Duration)| (*pause * 2).min(DIFFERS_PAUSE_MAX);
                let pause = differing.get(&node).map_or(DIFFERS_PAUSE_MIN, longer);
                differing.insert(node, (now + pause, pause));
                ::metrics::counter!(JOURNAL_DIFFERS_TOTAL).increment(1);
                tracing::error!(
                    node,
                    seq,
                    upto_seq = begin,
                    "another broker's older events are not those of this cluster"
                );
            }
            Err(error) => tracing::debug!(node, %error, "older events were not fetched"),
        }
    }
    false
}

/// Fetches one piece up to a row; answers how many rows it was, 0 when the other has none of them either.
async fn fetch(core: &Arc<Core>, node: u64, upto_seq: u64) -> Result<u64, Error> {
    let failed = |status| Error::Peer { node, status: Box::new(status) };
    let store = core.store.clone();
    let known = core.blocking.run(move || store.journal_mark(upto_seq).map_err(std::io::Error::other));
    let Some(known) = known.await.map_err(Error::State)? else { return Ok(0) };
    let mut client = core.peer_client(node, Purpose::Snapshot);
    let asked = client.journal(Request::new(wire::JournalRequest { upto_seq }));
    let parts = tokio::time::timeout(FETCH_TIMEOUT, asked).await.map_err(|_| Error::TimedOut)?;
    let mut parts = parts.map_err(failed)?.into_inner();
    let mut first: Option<wire::JournalPart> = None;
    let (mut next, mut hash) = (0, Vec::new());
    while let Some(part) = tokio::time::timeout(FETCH_TIMEOUT, parts.next()).await.map_err(|_| Error::TimedOut)? {
        let part = part.map_err(failed)?;
        let Some(_) = &first else {
            if part.from_seq == 0 || part.from_seq > upto_seq {
                return Ok(0);
            }
            (next, hash) = (part.from_seq, part.hash_before.clone());
            first = Some(part);
            continue;
        };
        let mut rows = Vec::with_capacity(part.rows.len());
        for bytes in part.rows {
            let seq = Envelope::decode(&*bytes).ok().and_then(|event| event.id).map(|id| id.seq);
            if seq != Some(next) || next > upto_seq {
                return Err(Error::Journal { seq: next });
            }
            hash = Envelope::chain(&hash, &bytes).to_vec();
            rows.push(JournalRow { seq: next, bytes: bytes.into() });
            next += 1;
        }
        let store = core.store.clone();
        let put = core.blocking.run(move || store.put_before_journal(&rows).map_err(std::io::Error::other));
        put.await.map_err(Error::State)?;
    }
    let Some(first) = first.filter(|_| next == upto_seq + 1) else { return Ok(0) };
    if hash != known {
        return Err(Error::Journal { seq: upto_seq });
    }
    let (store, to_seq) = (core.store.clone(), first.from_seq - 1);
    let lower = move || store.lower_journal(upto_seq, to_seq, &first.hash_before).map_err(std::io::Error::other);
    let lowered = core.blocking.run(lower).await.map_err(Error::State)?;
    Ok(if lowered { upto_seq - to_seq } else { 0 })
}
