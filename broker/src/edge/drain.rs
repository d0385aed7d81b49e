//! Leaving in order: no new sessions, all ends are told to go elsewhere, and what is left at the deadline is cut.
//!
//! A drain begins in the log (`cluster drain`), where its deadline outlives this process, or when this process is told
//! to stop.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use selvedge_proto::control::GoAway;
use selvedge_proto::control::from_broker::Message as Out;
use selvedge_proto::frame::SessionCode;
use tokio_util::sync::CancellationToken;

use super::Edge;
use super::ends::End;

/// How long sessions that are cut at the end of a drain have to record it.
const CUT_TIMEOUT: Duration = Duration::from_secs(2);
/// The others hear each second what this broker says of itself, and pass no dials through one that goes.
const NOTICE: Duration = Duration::from_millis(1_500);
const LOOK_INTERVAL: Duration = Duration::from_millis(200);
/// What ends are told.
const DRAINING: &str = "draining";
/// Ends that were told to go elsewhere come back on a new control stream.
const DRAIN_OVER: &str = "drain_over";
const STOPPING: &str = "stopping";

impl Edge {
    /// Takes no new sessions, and tells all ends to go elsewhere: those that are attached, and those that still come.
    pub fn begin_drain(&self) {
        if self.draining.swap(true, Ordering::AcqRel) {
            return;
        }
        self.cut_by_drain.store(0, Ordering::Relaxed);
        let ends = self.ends.all();
        tracing::info!(sessions = self.sessions.len(), ends = ends.len(), "draining: new sessions go elsewhere");
        ends.iter().for_each(|end| tell(end));
    }

    /// Waits until every session has ended, and the other brokers know that this one goes.
    pub async fn is_left(&self) {
        tokio::join!(self.emptied(), tokio::time::sleep(NOTICE));
    }

    /// Waits until every session has ended.
    pub async fn emptied(&self) {
        // One that was being decided may have come in meanwhile.
        while let Some(session) = self.sessions.all().first() {
            session.over.cancelled().await;
        }
    }

    /// Cuts the sessions that are left, and waits until the end of each is recorded. Answers how many were cut.
    pub async fn cut_rest(&self) -> usize {
        let left = self.sessions.all();
        left.iter().for_each(|session| session.cut_for(SessionCode::Drained));
        if tokio::time::timeout(CUT_TIMEOUT, self.emptied()).await.is_err() {
            tracing::warn!(sessions = self.sessions.len(), "some sessions did not end when they were cut");
        }
        self.cut_by_drain.fetch_add(left.len() as u64, Ordering::Relaxed);
        left.len()
    }

    /// Closes every control stream: this broker stops.
    pub fn dismiss(&self) {
        self.ends.all().iter().for_each(|end| end.close(STOPPING));
    }

    /// What is left until the deadline that the log has for this broker's drain; none when it has no drain.
    pub fn drain_left(&self) -> Option<Duration> {
        let own = self.ground.state().broker(self.ground.node()).filter(|broker| broker.draining)?;
        Some(Duration::from_millis(own.drain_until_ms.saturating_sub(self.ground.now_ms())))
    }

    /// For an end that has just attached.
    pub(super) fn tell_of_drain(&self, end: &End) {
        if self.is_draining() {
            tell(end);
        }
    }

    pub(super) fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Acquire) || self.drain_left().is_some()
    }

    fn end_drain(&self) {
        tracing::info!("the drain is over: new sessions are taken again");
        self.draining.store(false, Ordering::Release);
        self.ends.all().iter().for_each(|end| end.close(DRAIN_OVER));
    }
}

fn tell(end: &End) {
    end.send(Out::GoAway(GoAway { reason: DRAINING.into() }));
}

/// Does what the log says of this broker's drain, until `stop`.
pub(super) async fn follow(edge: Arc<Edge>, stop: CancellationToken) {
    let mut drains = false;
    loop {
        match edge.drain_left() {
            Some(left) => {
                drains = true;
                edge.begin_drain();
                edge.ground.hand_over().await;
                if left.is_zero() && edge.session_count() > 0 {
                    let cut = edge.cut_rest().await;
                    tracing::info!(sessions_cut = cut, "the drain's deadline has come");
                }
            }
            None if drains => {
                drains = false;
                edge.end_drain();
            }
            None => {}
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(LOOK_INTERVAL) => {}
        }
    }
}
