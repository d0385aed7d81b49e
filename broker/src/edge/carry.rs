//! Carries an admitted session: dials, stitches, looks after its timers, and records its end.

use std::io::ErrorKind;
use std::mem::MaybeUninit;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use selvedge_domain::Id;
use selvedge_domain::path::{BetterBroker, Pair};
use selvedge_domain::rows::Segment;
use selvedge_proto::control::from_broker::Message as Out;
use selvedge_proto::control::{Open, Opened};
use selvedge_proto::frame::SessionCode;
use selvedge_proto::identity::{Kind, SpiffeId};
use socket2::SockRef;
use tokio::net::TcpStream;
use tracing::Instrument as _;

use super::ends::End;
use super::listener::OPEN_TIMEOUT;
use super::opens::{self, Admitted};
use super::sessions::{Session, next_look};
use super::tickets::Hop;
use super::{Edge, boottime_ms, dial, metrics, push};
use crate::audit::{Record, SessionClose};
use crate::relay::{Closed, Flow, Why};

/// How a session came to its end.
enum Ended {
    /// It was carried.
    Carried(Closed),
    /// It did not begin.
    Failed(SessionCode),
}

/// Runs an admitted session to its end.
pub(super) async fn carry(edge: &Arc<Edge>, end: &Arc<End>, open: &Open, admitted: Admitted) {
    let Admitted { entered, mut hop, choice, segment, record, begun } = admitted;
    let session = entered.session.clone();
    let durable = tokio::spawn(record.durable());
    let pairs: Vec<Pair> = choice.chosen.into_iter().chain(choice.second).collect();
    let better = choice.better_broker;
    let opening = Opening { edge, end, open, session: &session, segment: &segment, better, begun };
    let ended = opening.run(&pairs, &mut hop, durable).await;
    if let (Some(code), Some(connector)) = (session.cut_code(), session.connector()) {
        dial::abandon(edge, &session, connector, code);
    }
    // Out of the indexes, and over for whoever waits for the cut, before the record says so.
    drop(entered);
    let why = match &ended {
        Ended::Carried(closed) => why_of(&session, closed),
        Ended::Failed(code) => session.cut_code().unwrap_or(*code).as_str(),
    };
    if let Ended::Failed(code) = ended {
        tracing::Span::current().record("code", code.as_str());
        opens::refuse(end, open, code, String::new(), 0);
    }
    let closed = SessionClose {
        session: session.name(),
        why: why.to_owned(),
        up_bytes: session.counters.up_bytes(),
        down_bytes: session.counters.down_bytes(),
        duration_ms: session.started.elapsed().as_millis() as u64,
    };
    tracing::debug!(why, up = closed.up_bytes, down = closed.down_bytes, "a session is over");
    // The log says so when the journal does not accept; `session.lost` tells it at the next boot.
    let _ = edge.audit.append(&Record::SessionClose(closed));
}

fn why_of(session: &Session, closed: &Closed) -> &'static str {
    match (closed.why, session.cut_code(), session.reported()) {
        (Why::Cut, Some(code), _) | (_, None, Some(code)) => code.as_str(),
        (why, ..) => why.as_str(),
    }
}

struct Opening<'a> {
    edge: &'a Arc<Edge>,
    end: &'a Arc<End>,
    open: &'a Open,
    session: &'a Arc<Session>,
    segment: &'a Segment,
    better: Option<BetterBroker>,
    begun: Instant,
}

impl Opening<'_> {
    async fn run(
        &self,
        pairs: &[Pair],
        client: &mut super::tickets::Awaited,
        durable: tokio::task::JoinHandle<Result<(), crate::audit::Error>>,
    ) -> Ended {
        let (edge, session) = (self.edge, self.session);
        let mut durable = Some(durable);
        let mut waiting: Option<Hop> = None;
        let mut last = SessionCode::Unavailable;
        for (nth, pair) in pairs.iter().enumerate() {
            if nth > 0 {
                metrics::second_choice();
                edge.sessions.set_connector(session, pair.connector);
            }
            let dialed = dial::dial(edge, session, self.segment, pair.connector)
                .instrument(tracing::debug_span!("dial", connector = %pair.connector))
                .await;
            let connector = match dialed {
                Ok(hop) => hop,
                Err(code) => {
                    last = code;
                    if session.cut.is_cancelled() {
                        break;
                    }
                    continue;
                }
            };
            if waiting.is_none() {
                let left = OPEN_TIMEOUT.saturating_sub(self.begun.elapsed());
                waiting = tokio::time::timeout(left, client.hop()).await.ok().flatten();
            }
            let Some(hop) = waiting.take() else {
                last = SessionCode::HopTimeout;
                dial::abandon(edge, session, pair.connector, last);
                break;
            };
            // Durable before the first byte; the sync has had the whole dial.
            if let Some(durable) = durable.take()
                && !matches!(durable.await, Ok(Ok(())))
            {
                last = SessionCode::Busy;
                dial::abandon(edge, session, pair.connector, last);
                break;
            }
            if session.cut.is_cancelled() || !edge.ground.lease_open() {
                last = if session.cut.is_cancelled() { SessionCode::Refused } else { SessionCode::Stale };
                dial::abandon(edge, session, pair.connector, last);
                break;
            }
            let raw = hop.raw.clone();
            match self.stitch(hop, connector, pair.connector).await {
                (closed, true) => return Ended::Carried(closed),
                // It failed before it said anything: the client does not know of it yet.
                (Closed { client, why, .. }, false) => {
                    tracing::info!(connector = %pair.connector, why = why.as_str(), "a connector failed before its first byte");
                    last = match why {
                        Why::ClientFailed | Why::Ended => SessionCode::PeerGone,
                        _ => session.reported().unwrap_or(SessionCode::Unavailable),
                    };
                    dial::abandon(edge, session, pair.connector, last);
                    waiting = client.map(|stream| Hop { stream, hello_len: raw.len(), raw });
                    if waiting.is_none() {
                        break;
                    }
                }
            }
        }
        match session.cut_code() {
            // Another broker takes it.
            Some(SessionCode::Drained) => last = SessionCode::BrokerDraining,
            Some(_) => last = SessionCode::Refused,
            None => {}
        }
        Ended::Failed(last)
    }

    /// Tells the client whom it meets.
    fn opened(&self, connector: Id) {
        let Ok(connector) = SpiffeId::new(self.edge.anchors.trust_domain(), Kind::Connector, &connector.to_string())
        else {
            return;
        };
        let state = self.edge.ground.state();
        let better = self.better.and_then(|better| state.broker(better.node));
        metrics::opened(self.begun.elapsed());
        metrics::open("opened");
        self.end.send(Out::Opened(Opened {
            request: self.open.request,
            session: self.session.id.to_be_bytes().to_vec(),
            connector: connector.to_string(),
            better: better.map(|broker| push::wire_broker(&state, broker)),
        }));
    }

    /// Moves bytes until the session ends, and looks at it whenever one of its times has come. The client is told of the
    /// connector when that one answers, so a second choice contradicts nothing; answers whether it was.
    async fn stitch(&self, client: Hop, connector: Hop, id: Id) -> (Closed, bool) {
        let (edge, session) = (self.edge, self.session);
        let answer = first_answer(&connector.stream);
        tokio::pin!(answer);
        let (mut answered, mut told) = (false, false);
        session.carried.store(true, Ordering::Release);
        let flow = Flow {
            client: client.stream,
            connector: connector.stream,
            preface: client.raw,
            gate: edge.gate.clone(),
            counters: session.counters.clone(),
            cut: session.cut.clone(),
            answer_within: Some(dial::READY_TIMEOUT),
        };
        let carried_ms = boottime_ms();
        let run = edge.relay.run(flow);
        tokio::pin!(run);
        loop {
            let quiet =
                Duration::from_millis(boottime_ms().saturating_sub(session.counters.active_at_ms().max(carried_ms)));
            let verdict_left_ms = session.good_until_ms.load(Ordering::Relaxed).saturating_sub(edge.ground.now_ms());
            let age = session.started.elapsed();
            let look = next_look(age, quiet, self.segment.idle_ms, self.segment.absolute_ms, verdict_left_ms);
            tokio::select! {
                biased;
                answers = &mut answer, if !answered => {
                    answered = true;
                    if answers {
                        self.opened(id);
                        told = true;
                    }
                }
                closed = &mut run => {
                    // What came and went between two looks was forwarded.
                    if !told && session.counters.answered() {
                        self.opened(id);
                        told = true;
                    }
                    return (closed, told);
                }
                () = session.good_until_moved.notified() => {}
                () = tokio::time::sleep(look), if !session.cut.is_cancelled() => self.look(carried_ms),
            }
        }
    }

    fn look(&self, carried_ms: u64) {
        let (edge, session, segment) = (self.edge, self.session, self.segment);
        let quiet_ms = boottime_ms().saturating_sub(session.counters.active_at_ms().max(carried_ms));
        let age_ms = session.started.elapsed().as_millis() as u64;
        let over = |limit_ms: u64, passed_ms: u64| limit_ms > 0 && passed_ms >= limit_ms;
        if over(segment.absolute_ms, age_ms) || over(segment.idle_ms, quiet_ms) {
            session.cut_for(SessionCode::Expired);
        } else if session.good_until_ms.load(Ordering::Relaxed) <= edge.ground.now_ms() {
            edge.judge_again(session, &edge.ground.state(), true);
        }
    }
}

/// Waits for a connector's first bytes without taking them; false when it ends or fails instead. Ready at once with true
/// when the system gives no second handle: then the client is told early.
fn first_answer(connector: &TcpStream) -> impl Future<Output = bool> + use<> {
    let twin = SockRef::from(connector).try_clone().and_then(|socket| TcpStream::from_std(socket.into()));
    async move {
        let Ok(twin) = twin else { return true };
        if twin.readable().await.is_err() {
            return false;
        }
        let mut byte = [MaybeUninit::uninit()];
        match SockRef::from(&twin).peek(&mut byte) {
            Ok(len) => len > 0,
            // The relay has taken them.
            Err(error) => error.kind() == ErrorKind::WouldBlock,
        }
    }
}
