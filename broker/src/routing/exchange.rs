//! Tells the other brokers each second what is measured here, hears what they measure, and measures the way to them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use selvedge_domain::rows::Broker;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::{Load, Routing};
use crate::edge::Ground;

/// Between two exchanges with the same broker.
pub const EXCHANGE_INTERVAL: Duration = Duration::from_secs(1);
/// An exchange that takes longer has failed.
pub const EXCHANGE_TIMEOUT: Duration = Duration::from_secs(2);

/// Exchanges with all other brokers until `stop`.
pub(crate) async fn exchange(
    routing: Arc<Routing>,
    ground: Arc<dyn Ground>,
    load: impl Fn() -> Load + Send,
    stop: CancellationToken,
) {
    let mut ticks = tokio::time::interval(EXCHANGE_INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut calls = JoinSet::new();
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = ticks.tick() => {}
        }
        routing.set_own(ground.lease_open(), load());
        // One call at a time per broker would be kept waiting by the slowest; late ones end by their timeout.
        while calls.try_join_next().is_some() {}
        let state = ground.state();
        let others = state.rows::<Broker>().filter(|broker| !broker.removed && broker.node != ground.node());
        for broker in others {
            let Some(mut relay) = ground.relay(broker.node) else { continue };
            let (routing, told, node) = (routing.clone(), routing.tell(), broker.node);
            calls.spawn(async move {
                let asked = Instant::now();
                match tokio::time::timeout(EXCHANGE_TIMEOUT, relay.exchange(told)).await {
                    Ok(Ok(answer)) if answer.get_ref().node == node => {
                        routing.hear(answer.into_inner(), Some(asked.elapsed()));
                    }
                    Ok(Ok(_)) => tracing::warn!(node, "another broker answered in this one's place"),
                    Ok(Err(status)) => tracing::debug!(node, %status, "no exchange with a broker"),
                    Err(_) => tracing::debug!(node, "no exchange with a broker in time"),
                }
            });
        }
    }
}
