//! The edge listener: what a connection must show before anything is done for it.
//!
//! Silence for everything else: a connection is closed without a byte unless it shows, within [`SHOW_TIMEOUT`], a knock
//! under one of the days' keys or a live ticket.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use selvedge_proto::control::control_server::ControlServer;
use selvedge_proto::hello::{self, Hello, Kind};
use selvedge_proto::tls;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio_rustls::TlsAcceptor;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

use super::control::ControlService;
use super::standing::{self, Unfit};
use super::strangers::prefix_of;
use super::stream::{Attached, EdgeStream, Replayed};
use super::tickets::{Claim, Hop};
use super::{Edge, metrics};
use crate::relay;

/// A connection that has shown neither knock nor ticket by then is closed.
pub const SHOW_TIMEOUT: Duration = Duration::from_secs(3);
/// A handshake that takes longer is given up.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a hop waits for its `Open`.
pub const OPEN_TIMEOUT: Duration = Duration::from_secs(3);
/// Connections that have shown nothing yet; further ones are closed.
pub const PENDING_MAX: usize = 4_096;
/// Connections of one /24 or /48 that have shown nothing yet; further ones are closed.
pub const PENDING_PER_PREFIX_MAX: usize = 512;
/// Handshakes at the same time; further ones wait in line.
pub const HANDSHAKES_MAX: usize = 64;
/// How long this broker waits for an enrolment that has not arrived here yet.
pub const ENROLMENT_WAIT: Duration = Duration::from_secs(2);
/// Bytes of one message on a control stream.
pub const CONTROL_MESSAGE_BYTES_MAX: usize = 256 * 1024;
const ACCEPTED_QUEUE_MAX: usize = 64;
const ACCEPT_RETRY_AFTER: Duration = Duration::from_millis(100);
/// `Attach` and nothing else.
const STREAMS_PER_CONNECTION_MAX: u32 = 4;
const HTTP2_KEEPALIVE: Duration = Duration::from_secs(10);
const HTTP2_HEADER_BYTES_MAX: u32 = 16 * 1024;

/// Serves until `stop`.
pub(super) async fn serve(edge: Arc<Edge>, listener: TcpListener, stop: CancellationToken) -> io::Result<()> {
    let (accepted, connections) = mpsc::channel::<io::Result<EdgeStream>>(ACCEPTED_QUEUE_MAX);
    let service = ControlServer::new(ControlService(edge.clone()))
        .max_decoding_message_size(CONTROL_MESSAGE_BYTES_MAX)
        .max_encoding_message_size(CONTROL_MESSAGE_BYTES_MAX * 4);
    let server = tonic::transport::Server::builder()
        .max_concurrent_streams(STREAMS_PER_CONNECTION_MAX)
        .http2_keepalive_interval(Some(HTTP2_KEEPALIVE))
        .http2_max_header_list_size(HTTP2_HEADER_BYTES_MAX)
        .add_service(service)
        .serve_with_incoming_shutdown(ReceiverStream::new(connections), stop.clone().cancelled_owned());
    let accepting = tokio::spawn(accept(edge, listener, accepted, stop));
    let served = server.await.map_err(io::Error::other);
    accepting.abort();
    served
}

async fn accept(
    edge: Arc<Edge>,
    listener: TcpListener,
    accepted: mpsc::Sender<io::Result<EdgeStream>>,
    stop: CancellationToken,
) {
    let pending = Arc::new(Pending::default());
    let lane = Arc::new(Semaphore::new(HANDSHAKES_MAX));
    loop {
        let (socket, from) = tokio::select! {
            () = stop.cancelled() => return,
            result = listener.accept() => match result {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Out of descriptors, most likely: wait for some to come back.
                    tracing::warn!(%error, "the edge listener cannot accept");
                    tokio::time::sleep(ACCEPT_RETRY_AFTER).await;
                    continue;
                }
            },
        };
        let Some(slot) = Slot::take(&pending, from.ip()) else {
            edge.strangers.count(from.ip(), "too_many");
            continue;
        };
        let connection = Connection { edge: edge.clone(), lane: lane.clone(), from, slot };
        let (accepted, stop) = (accepted.clone(), stop.clone());
        tokio::spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                attached = connection.serve(socket) => {
                    if let Some(stream) = attached {
                        // The receiver is gone only at shutdown.
                        let _ = accepted.send(Ok(stream)).await;
                    }
                }
            }
        });
    }
}

/// A connection that has shown nothing yet.
struct Connection {
    edge: Arc<Edge>,
    lane: Arc<Semaphore>,
    from: SocketAddr,
    slot: Slot,
}

impl Connection {
    /// Reads what it shows; gives back a control connection, or has dealt with a hop.
    async fn serve(self, mut socket: TcpStream) -> Option<EdgeStream> {
        if let Err(error) = relay::tune(&socket) {
            tracing::debug!(%error, "a socket refused its settings");
        }
        let read = tokio::time::timeout(SHOW_TIMEOUT, hello::read(&mut socket)).await;
        let refuse = |reason| {
            self.edge.strangers.count(self.from.ip(), reason);
            None
        };
        let hello = match read {
            Ok(Ok(hello)) => hello,
            Ok(Err(hello::Error::Ended | hello::Error::Io(_))) => return refuse("ended"),
            Ok(Err(_)) => return refuse("bad_hello"),
            Err(_) => return refuse("silent"),
        };
        match hello.kind() {
            Kind::Other => refuse("neither"),
            Kind::Control { knock } => {
                let secret = self.edge.ground.state().cluster().map(|row| row.knock_secret).unwrap_or_default();
                if !self.edge.knocks.admits(&secret, self.edge.ground.now_ms(), &knock) {
                    return refuse("knock");
                }
                self.control(hello, socket).await
            }
            Kind::Hop { ticket } => {
                let Hello { raw, hello_len, .. } = hello;
                let hop = Hop { stream: socket, raw: raw.into(), hello_len };
                match self.edge.tickets.claim(&ticket, hop) {
                    Claim::Given | Claim::Parked => {}
                    Claim::Unknown => self.edge.strangers.count(self.from.ip(), "ticket"),
                    Claim::WaitsForOpen => {
                        let Self { edge, slot, .. } = self;
                        drop(slot);
                        tokio::time::sleep(OPEN_TIMEOUT).await;
                        edge.tickets.expire(&ticket);
                    }
                }
                None
            }
        }
    }

    async fn control(self, hello: Hello, socket: TcpStream) -> Option<EdgeStream> {
        let Self { edge, lane, from, slot } = self;
        let replayed = Replayed::new(Bytes::from(hello.raw), socket);
        let config = edge.tls.borrow().clone();
        let handshake = async {
            let _permit = lane.acquire().await.ok()?;
            TlsAcceptor::from(config).accept(replayed).await.ok()
        };
        let Ok(Some(stream)) = tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake).await else {
            edge.strangers.count(from.ip(), "handshake");
            return None;
        };
        drop(slot);
        let Ok(peer) = tls::peer_of(stream.get_ref().1) else {
            edge.strangers.count(from.ip(), "handshake");
            return None;
        };
        match fit(&edge, &peer).await {
            Ok(subject) => {
                let attached = Attached { peer, subject, source: from, connection: CancellationToken::new() };
                Some(EdgeStream::new(stream, attached))
            }
            Err(unfit) => {
                metrics::refused(unfit.as_str());
                tracing::info!(id = %peer.id, serial = peer.serial, reason = unfit.as_str(), "an end was not let in");
                None
            }
        }
    }
}

/// Checks an end against the state; an enrolment that was written a moment ago may still be on its way here.
async fn fit(edge: &Edge, peer: &selvedge_proto::identity::Peer) -> Result<selvedge_domain::Id, Unfit> {
    let mut states = edge.ground.subscribe();
    let deadline = tokio::time::Instant::now() + ENROLMENT_WAIT;
    loop {
        let state = states.borrow_and_update().clone();
        match standing::check(&state, peer, edge.ground.now_ms()) {
            Err(unfit) if unfit.may_pass() => match tokio::time::timeout_at(deadline, states.changed()).await {
                Ok(Ok(())) => {}
                _ => return Err(unfit),
            },
            checked => return checked,
        }
    }
}

/// How many connections have shown nothing yet, and from where.
#[derive(Default)]
struct Pending {
    by_prefix: Mutex<(usize, BTreeMap<String, usize>)>,
}

struct Slot {
    pending: Arc<Pending>,
    prefix: String,
}

impl Slot {
    fn take(pending: &Arc<Pending>, from: IpAddr) -> Option<Self> {
        let prefix = prefix_of(from);
        let mut counts = pending.by_prefix.lock();
        let (total, by_prefix) = &mut *counts;
        if *total >= PENDING_MAX || by_prefix.get(&prefix).is_some_and(|count| *count >= PENDING_PER_PREFIX_MAX) {
            return None;
        }
        *total += 1;
        *by_prefix.entry(prefix.clone()).or_default() += 1;
        ::metrics::gauge!(metrics::CONNECTIONS_PENDING).set(*total as f64);
        drop(counts);
        Some(Self { pending: pending.clone(), prefix })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut counts = self.pending.by_prefix.lock();
        let (total, by_prefix) = &mut *counts;
        *total -= 1;
        ::metrics::gauge!(metrics::CONNECTIONS_PENDING).set(*total as f64);
        if let Some(count) = by_prefix.get_mut(&self.prefix) {
            *count -= 1;
            if *count == 0 {
                by_prefix.remove(&self.prefix);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_prefix_cannot_take_all_places() {
        let pending = Arc::new(Pending::default());
        let near: IpAddr = "10.0.0.1".parse().unwrap();
        let slots: Vec<Slot> = (0..PENDING_PER_PREFIX_MAX).map(|_| Slot::take(&pending, near).unwrap()).collect();
        assert!(Slot::take(&pending, "10.0.0.200".parse().unwrap()).is_none());
        assert!(Slot::take(&pending, "10.0.1.1".parse().unwrap()).is_some());
        drop(slots);
        assert!(Slot::take(&pending, near).is_some());
        assert!(pending.by_prefix.lock().1.is_empty(), "nothing is remembered of who has left");
    }
}
