//! Moves the bytes of stitched sessions between two sockets with `splice(2)`.
//!
//! A quiet flow holds nothing: the little it has is copied through a buffer that lives as long as the copy. A flow that
//! has more waiting than one copy takes is busy and borrows a 1 MiB pipe until it has nothing waiting again. A pipe goes
//! back to the pool only when known to be empty. Where no pipe is to be had, or the system does not let it grow, the flow
//! goes on with what it has.
//!
//! **Invariants**: the [`Gate`] is asked before each read and each forward; when [`Relay::run`] has returned, nothing of
//! that flow is forwarded any more; half-close passes through; a failure of one side is a reset of the other.
//!
//! This module does not know who talks, whether they may, or what they say. The process must ignore `SIGPIPE`, as
//! programs in Rust do.

use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use rustix::time::{ClockId, clock_gettime};
use socket2::{SockRef, TcpKeepalive};
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;

mod direction;
mod metrics;
mod pipe;
#[cfg(test)]
mod tests;

use direction::{Direction, Fault, Shared, Side, broken};
use metrics::Counted;
pub use pipe::Pipes;

/// Default for the most pipes that all flows together may borrow: 1 MiB each of kernel memory at worst.
pub const RELAY_PIPES_MAX: usize = 256;

const KEEPALIVE_TIME: Duration = Duration::from_secs(30);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_PROBES: u32 = 3;
/// Longer than lease and hold together: a peer that is alive and does not read must not be taken for dead meanwhile.
const USER_TIMEOUT: Duration = Duration::from_secs(180);

/// Whether bytes may be forwarded now: the broker's freshness lease.
#[async_trait]
pub trait Gate: Send + Sync {
    /// Asked before each read and each forward, so it must be cheap.
    fn open(&self) -> bool;

    /// Returns when the gate may have opened; it is asked again then.
    async fn wait_open(&self);
}

/// What a flow has moved so far, readable while it runs. One for each session.
#[derive(Debug, Default)]
pub struct Counters {
    up_bytes: AtomicU64,
    down_bytes: AtomicU64,
    active_at_ms: AtomicU64,
}

impl Counters {
    /// Nothing moved yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Bytes forwarded to connectors, the preface included, each time it was sent.
    pub fn up_bytes(&self) -> u64 {
        self.up_bytes.load(Ordering::Relaxed)
    }

    /// Bytes forwarded to the client.
    pub fn down_bytes(&self) -> u64 {
        self.down_bytes.load(Ordering::Relaxed)
    }

    /// Whether a byte from a connector was forwarded: from then on no second choice is tried.
    pub fn answered(&self) -> bool {
        self.down_bytes() > 0
    }

    /// When something was last forwarded. **Units**: milliseconds of `CLOCK_BOOTTIME`, zero for never.
    pub fn active_at_ms(&self) -> u64 {
        self.active_at_ms.load(Ordering::Relaxed)
    }

    fn add_up(&self, len: u64) {
        self.up_bytes.fetch_add(len, Ordering::Relaxed);
        self.touch();
    }

    fn add_down(&self, len: u64) {
        self.down_bytes.fetch_add(len, Ordering::Relaxed);
        self.touch();
    }

    fn touch(&self) {
        let now = clock_gettime(ClockId::Boottime);
        let now_ms = now.tv_sec as u64 * 1000 + now.tv_nsec as u64 / 1_000_000;
        self.active_at_ms.store(now_ms, Ordering::Relaxed);
    }
}

/// One flow to relay.
pub struct Flow {
    /// The client's hop, from which the ClientHello was read.
    pub client: TcpStream,
    /// The connector's hop, from which its own ClientHello was swallowed.
    pub connector: TcpStream,
    /// All that was read from the client, to be forwarded first.
    pub preface: Bytes,
    /// Closed, the flow is held.
    pub gate: Arc<dyn Gate>,
    /// Updated while the flow runs.
    pub counters: Arc<Counters>,
    /// Cancelled, the flow ends with resets on both sides.
    pub cut: CancellationToken,
    /// How long the connector may take to its first byte. `None`: for ever.
    pub answer_within: Option<Duration>,
}

/// How a flow ended.
#[derive(Debug)]
pub struct Closed {
    /// Why.
    pub why: Why,
    /// The failure, where `why` is one.
    pub error: Option<io::Error>,
    /// What [`Counters::up_bytes`] says at the end.
    pub up_bytes: u64,
    /// What [`Counters::down_bytes`] says at the end.
    pub down_bytes: u64,
    /// The client's hop, when another connector may be given it and the same preface: this one failed before any of its
    /// bytes was forwarded, and the client said nothing beyond the preface.
    pub client: Option<TcpStream>,
}

/// Why a flow ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// Both sides ended it.
    Ended,
    /// The client's connection failed or was reset.
    ClientFailed,
    /// The connector's connection failed or was reset, or ended without an answer.
    ConnectorFailed,
    /// The connector took too long to its first byte.
    NoAnswer,
    /// It was cut.
    Cut,
}

impl Why {
    /// The name for records and metric labels.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ended => "ended",
            Self::ClientFailed => "client_failed",
            Self::ConnectorFailed => "connector_failed",
            Self::NoAnswer => "no_answer",
            Self::Cut => "cut",
        }
    }
}

/// Relays flows, which share its pipes. Cheap to clone.
#[derive(Clone)]
pub struct Relay {
    pool: Arc<pipe::Pool>,
    up: ::metrics::Counter,
    down: ::metrics::Counter,
}

impl Relay {
    /// A relay that borrows at most `pipes_max` pipes at once; zero copies everything. Made after the metrics recorder.
    pub fn new(pipes_max: usize) -> Self {
        metrics::describe();
        Self { pool: pipe::Pool::new(pipes_max), up: metrics::bytes("up"), down: metrics::bytes("down") }
    }

    /// How many pipes there are now.
    pub fn pipes(&self) -> Pipes {
        self.pool.pipes()
    }

    /// Moves bytes until both sides have ended, one has failed, or the flow is cut.
    ///
    /// **Cancel safety**: dropping the future closes both sockets, without a reset; cancel [`Flow::cut`] instead.
    pub async fn run(&self, flow: Flow) -> Closed {
        let Flow { client, connector, preface, gate, counters, cut, answer_within } = flow;
        let _counted = Counted::new(metrics::FLOWS);
        let (pool, client_spoke) = (&self.pool, AtomicBool::new(false));
        let shared = Shared { pool, gate: &*gate, counters: &counters, client_spoke };
        let (why, error) = {
            let ends = [&client, &connector];
            let up = Direction::up(ends, preface, &shared, &self.up);
            let down = Direction::down(ends, &shared, &self.down);
            tokio::select! {
                biased;
                () = cut.cancelled() => (Why::Cut, None),
                ended = stitch(up, down) => match ended {
                    Ok(()) => (Why::Ended, None),
                    Err(Fault { side: Side::Client, error }) => (Why::ClientFailed, Some(error)),
                    Err(Fault { side: Side::Connector, error }) => (Why::ConnectorFailed, Some(error)),
                },
                () = no_answer(answer_within, &shared) => (Why::NoAnswer, None),
            }
        };
        let spoke = shared.client_spoke.load(Ordering::Relaxed) || counters.answered();
        let again = matches!(why, Why::ConnectorFailed | Why::NoAnswer) && !spoke;
        if why != Why::Ended {
            reset(&connector);
            if !again {
                reset(&client);
            }
        }
        metrics::closed(why);
        let (up_bytes, down_bytes) = (counters.up_bytes(), counters.down_bytes());
        Closed { why, error, up_bytes, down_bytes, client: again.then_some(client) }
    }
}

/// Sets what every hop has: keepalive 30/10/3 s, `TCP_USER_TIMEOUT` 180 s, no delay.
pub fn tune(stream: &TcpStream) -> io::Result<()> {
    let keepalive =
        TcpKeepalive::new().with_time(KEEPALIVE_TIME).with_interval(KEEPALIVE_INTERVAL).with_retries(KEEPALIVE_PROBES);
    let socket = SockRef::from(stream);
    socket.set_tcp_keepalive(&keepalive)?;
    socket.set_tcp_user_timeout(Some(USER_TIMEOUT))?;
    socket.set_tcp_nodelay(true)
}

/// Makes the socket's close a reset; what was not sent yet is thrown away. A socket that refuses is closed as it is.
pub fn reset(stream: &TcpStream) {
    if let Err(error) = stream.set_zero_linger() {
        tracing::debug!(%error, "the connection is closed without a reset");
    }
}

/// Runs both directions; where one has ended, a failure of its silent source still ends the flow.
async fn stitch(up: Direction<'_>, down: Direction<'_>) -> Result<(), Fault> {
    let (client, connector) = (up.from, down.from);
    let (mut up, mut down) = (pin!(up.run()), pin!(down.run()));
    tokio::select! {
        ended = &mut up => {
            ended?;
            tokio::select! {
                ended = &mut down => ended,
                fault = broken(client, Side::Client) => Err(fault),
            }
        }
        ended = &mut down => {
            ended?;
            tokio::select! {
                ended = &mut up => ended,
                fault = broken(connector, Side::Connector) => Err(fault),
            }
        }
    }
}

/// Returns when the connector is late with its first byte. A closed gate is not the connector's fault.
async fn no_answer(within: Option<Duration>, shared: &Shared<'_>) {
    let Some(within) = within else { return std::future::pending().await };
    loop {
        tokio::time::sleep(within).await;
        if shared.counters.answered() {
            return std::future::pending().await;
        }
        if shared.gate.open() {
            return;
        }
    }
}
