//! The peer listener: each call's claim is held against what its connection's other end has proven.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use selvedge_domain::rows::Broker;
use selvedge_proto::identity::Peer as PeerIdentity;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::metadata::{MetadataMap, MetadataValue};
use tonic::service::{InterceptorLayer, Routes};
use tonic::transport::server::Connected;
use tonic::{Request, Status};

use crate::dial::{CONNECTION_WINDOW_BYTES, STREAM_WINDOW_BYTES, epoch, node_of};
use crate::error::Error;
use crate::metrics::PEER_REFUSED_TOTAL;
use crate::published::Published;
use crate::transport::{Link, Listener, Stream};

/// How long a handshake on the peer listener may take.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Handshakes on the peer listener at the same time; further connections wait.
pub const HANDSHAKES_MAX: usize = 64;
const ACCEPTED_QUEUE_MAX: usize = 64;
const STREAMS_PER_CONNECTION_MAX: u32 = 1_024;
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);

const CLUSTER_KEY: &str = "selvedge-cluster";
const EPOCH_KEY: &str = "selvedge-epoch";
const NODE_KEY: &str = "selvedge-node";
/// What a broker is told that was removed for ever.
pub(crate) const REMOVED: &str = "this broker was removed (SE0104)";

/// What a call says of its caller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Claim {
    pub(crate) cluster: String,
    pub(crate) node: u64,
    pub(crate) epoch: u32,
}

impl Claim {
    pub(crate) fn write(&self, to: &mut MetadataMap) -> Result<(), Status> {
        let cluster =
            MetadataValue::try_from(&self.cluster).map_err(|_| Status::internal("a cluster id that is not text"))?;
        to.insert(CLUSTER_KEY, cluster);
        to.insert(EPOCH_KEY, MetadataValue::from(self.epoch));
        to.insert(NODE_KEY, MetadataValue::from(self.node));
        Ok(())
    }

    fn read(from: &MetadataMap) -> Option<Self> {
        let text = |key| from.get(key)?.to_str().ok();
        Some(Self {
            cluster: text(CLUSTER_KEY)?.to_owned(),
            node: text(NODE_KEY)?.parse().ok()?,
            epoch: text(EPOCH_KEY)?.parse().ok()?,
        })
    }
}

/// The caller of a call on the peer listener: who its certificate says it is. In the request's extensions, also for
/// services that the broker registers beside ours.
#[derive(Clone, Debug)]
pub struct Caller {
    /// Node id.
    pub node: u64,
    /// The certificate's content.
    pub identity: Arc<PeerIdentity>,
}

impl Caller {
    /// The caller of a call.
    ///
    /// **Errors**: `unauthenticated` when the request did not come through the peer listener.
    pub fn of<T>(request: &Request<T>) -> Result<Self, Status> {
        request.extensions().get::<Self>().cloned().ok_or_else(|| Status::unauthenticated("not a peer"))
    }
}

/// Refuses calls whose claim is not that of the certificate, or is of another cluster or epoch.
#[derive(Clone)]
struct Gatekeeper {
    cluster: String,
    published: Arc<Published>,
}

impl Gatekeeper {
    fn check(&self, request: &Request<()>) -> Result<(), (&'static str, Status)> {
        let refused = |reason, message| (reason, Status::permission_denied(message));
        let caller = Caller::of(request).map_err(|status| ("node", status))?;
        let claim =
            Claim::read(request.metadata()).ok_or_else(|| refused("node", "the call does not say whose it is"))?;
        if claim.cluster != self.cluster {
            return Err(refused("cluster", "another cluster"));
        }
        if claim.node != caller.node {
            return Err(refused("node", "the certificate is not of the node that the call claims"));
        }
        let epoch = epoch(&self.published);
        if claim.epoch != 0 && epoch != 0 && claim.epoch != epoch {
            return Err(refused("epoch", "another epoch"));
        }
        // Its row stays for ever, so that it is known.
        let row = self.published.state().row::<Broker>(&caller.node.to_be_bytes());
        if row.is_some_and(|broker| broker.removed) {
            return Err(refused("removed", REMOVED));
        }
        Ok(())
    }
}

/// Serves until `stop`.
pub(crate) async fn serve(
    listener: Box<dyn Listener>,
    cluster: &[u8; 16],
    published: Arc<Published>,
    routes: Routes,
    stop: CancellationToken,
) -> Result<(), Error> {
    let (accepted, connections) = mpsc::channel(ACCEPTED_QUEUE_MAX);
    tokio::spawn(accept(listener, accepted, stop.clone()));
    let keeper = Gatekeeper { cluster: hex::encode(cluster), published };
    let check = move |request: Request<()>| match keeper.check(&request) {
        Ok(()) => Ok(request),
        Err((reason, status)) => {
            ::metrics::counter!(PEER_REFUSED_TOTAL, "reason" => reason).increment(1);
            tracing::warn!(reason, caller = ?request.extensions().get::<Caller>().map(|c| c.node), "refused a peer's call");
            Err(status)
        }
    };
    tonic::transport::Server::builder()
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_concurrent_streams(STREAMS_PER_CONNECTION_MAX)
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .layer(InterceptorLayer::new(check))
        .add_routes(routes)
        .serve_with_incoming_shutdown(ReceiverStream::new(connections), stop.cancelled_owned())
        .await
        .map_err(Error::Listen)
}

async fn accept(
    mut listener: Box<dyn Listener>,
    accepted: mpsc::Sender<io::Result<PeerStream>>,
    stop: CancellationToken,
) {
    let lane = Arc::new(Semaphore::new(HANDSHAKES_MAX));
    loop {
        let Ok(permit) = lane.clone().acquire_owned().await else { return };
        let handshake = tokio::select! {
            () = stop.cancelled() => return,
            result = listener.accept() => match result {
                Ok(handshake) => handshake,
                Err(error) => {
                    // Out of descriptors, most likely: wait for some to come back.
                    tracing::warn!(%error, "the peer listener cannot accept");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            },
        };
        let (accepted, stop) = (accepted.clone(), stop.clone());
        tokio::spawn(async move {
            let handshake = async {
                let Link { stream, peer: identity } = handshake.await?;
                let node = node_of(&identity).ok_or_else(|| io::Error::other("the certificate has no node id"))?;
                Ok::<_, io::Error>(PeerStream { stream, caller: Caller { node, identity: Arc::new(identity) } })
            };
            let result = tokio::select! {
                () = stop.cancelled() => return,
                result = tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake) => result,
            };
            drop(permit);
            match result {
                // The receiver is gone only at shutdown.
                Ok(Ok(stream)) => drop(accepted.send(Ok(stream)).await),
                Ok(Err(error)) => {
                    ::metrics::counter!(PEER_REFUSED_TOTAL, "reason" => "handshake").increment(1);
                    tracing::debug!(%error, "a handshake on the peer listener failed");
                }
                Err(_) => ::metrics::counter!(PEER_REFUSED_TOTAL, "reason" => "handshake").increment(1),
            }
        });
    }
}

/// A connection whose peer is known.
struct PeerStream {
    stream: Box<dyn Stream>,
    caller: Caller,
}

impl Connected for PeerStream {
    type ConnectInfo = Caller;

    fn connect_info(&self) -> Caller {
        self.caller.clone()
    }
}

impl AsyncRead for PeerStream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for PeerStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
