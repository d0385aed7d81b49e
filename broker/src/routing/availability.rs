//! Transitions of availability: what this broker proposes to the log of the connectors that it has.
//!
//! A connector that came is told after it has stayed for [`UP_AFTER`]; one that went, or a target that stopped
//! answering, at once. What is proposed is the difference to the rows, so a lost proposal is made again.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use selvedge_domain::command::{AvailabilityChange, Body};
use selvedge_domain::limits::AVAILABILITY_CHANGES_MAX;
use selvedge_domain::rows::{Availability, Connector};
use selvedge_domain::{Id, State};
use tokio_util::sync::CancellationToken;

use super::Routing;
use crate::edge::Ground;

/// A connector or target that came back is proposed after it has stayed for so long.
pub const UP_AFTER: Duration = Duration::from_secs(1);
/// After its start a broker leaves the rows of its last boot alone for so long, so that connectors can come back.
pub const SETTLE: Duration = Duration::from_secs(5);
/// Between two looks when nothing calls for one.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);
const RETRY_AFTER: Duration = Duration::from_secs(1);

impl Routing {
    /// What is to be proposed now; `settled` when connectors had time to come.
    pub(crate) fn transitions(&self, state: &State, settled: bool, now: Instant) -> Vec<AvailabilityChange> {
        let soft = self.soft.lock();
        let row_of = |connector: Id| state.row::<Availability>(&Availability::key_of(connector, self.node));
        let mut changes = Vec::new();
        for (&connector, here) in &soft.connectors {
            if state.by_id::<Connector>(connector).is_none() {
                continue;
            }
            let row = row_of(connector);
            if row.as_ref().is_some_and(|row| row.stream > here.stream) {
                continue;
            }
            let was_up = row.as_ref().is_some_and(|row| row.up);
            let was_down: BTreeSet<&String> = row.iter().flat_map(|row| &row.down).collect();
            let newly_down = here.down.iter().any(|target| !was_down.contains(target));
            let same = row.as_ref().is_some_and(|row| row.stream == here.stream)
                && was_up
                && was_down.len() == here.down.len()
                && !newly_down;
            let stayed =
                now.duration_since(here.since) >= UP_AFTER && now.duration_since(here.health_since) >= UP_AFTER;
            if !same && (stayed || (was_up && newly_down)) {
                let down = here.down.iter().cloned().collect();
                changes.push(AvailabilityChange { connector, stream: here.stream, up: true, down });
            }
        }
        if settled {
            let gone = state
                .rows::<Availability>()
                .filter(|row| row.broker == self.node && row.up)
                .filter(|row| row.connector.is_some_and(|connector| !soft.connectors.contains_key(&connector)));
            changes.extend(gone.map(|row| AvailabilityChange {
                connector: row.connector.unwrap_or_default(),
                stream: row.stream,
                up: false,
                down: Vec::new(),
            }));
        }
        changes.truncate(AVAILABILITY_CHANGES_MAX);
        changes
    }
}

/// Proposes transitions until `stop`.
pub(crate) async fn run(routing: Arc<Routing>, ground: Arc<dyn Ground>, stop: CancellationToken) {
    let begun = Instant::now();
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = routing.changed.notified() => {}
            () = tokio::time::sleep(LOOK_INTERVAL) => {}
        }
        let changes = routing.transitions(&ground.state(), begun.elapsed() >= SETTLE, Instant::now());
        if changes.is_empty() {
            continue;
        }
        let count = changes.len();
        if let Err(error) = ground.propose(Body::Availability(changes)).await {
            tracing::debug!(%error, count, "transitions of availability were not written yet");
            tokio::time::sleep(RETRY_AFTER).await;
        }
    }
}
