//! Connections to other brokers: where they are, and that it is them.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use parking_lot::{Mutex, RwLock};
use selvedge_proto::identity::{Kind, Peer as PeerIdentity, SpiffeId};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};
use tower::service_fn;

use crate::listen::Claim;
use crate::published::Published;
use crate::transport::{Stream, Transport};

/// How long a connection may take to be there, handshake included.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// HTTP/2 window of one stream between brokers, bytes.
pub const STREAM_WINDOW_BYTES: u32 = 4 << 20;
/// HTTP/2 window of a connection between brokers, bytes.
pub const CONNECTION_WINDOW_BYTES: u32 = 16 << 20;
// A link that swallows everything must not hold a connection for as long as TCP would.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(1);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(2);

/// A connection to another broker, over which every call carries who calls. Connects when it is used, and again when
/// it broke.
pub type PeerChannel = InterceptedService<Channel, Stamp>;

/// Writes cluster id, epoch and node id into the metadata of a call.
#[derive(Clone)]
pub struct Stamp {
    cluster: String,
    node: u64,
    published: Arc<Published>,
}

impl Interceptor for Stamp {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        let claim = Claim { cluster: self.cluster.clone(), node: self.node, epoch: epoch(&self.published) };
        claim.write(request.metadata_mut())?;
        Ok(request)
    }
}

/// The epoch that this broker knows; 0 before it knows any.
pub(crate) fn epoch(published: &Published) -> u32 {
    let state = published.state();
    if state.is_initialised() { state.position().epoch } else { 0 }
}

/// What a connection is for; each purpose has its own, so that none waits behind another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Purpose {
    Raft,
    Snapshot,
    Control,
    Propose,
    Extra,
}

/// Gives the address to dial for a node instead of the one it advertises.
pub type DialOverride = Arc<dyn Fn(u64) -> Option<String> + Send + Sync>;

/// The connections of this broker.
#[derive(Clone)]
pub(crate) struct Dialer {
    inner: Arc<Inner>,
}

struct Inner {
    stamp: Stamp,
    transport: Arc<dyn Transport>,
    via: Option<DialOverride>,
    /// Addresses of nodes that the state does not know yet.
    learned: RwLock<BTreeMap<u64, String>>,
    channels: Mutex<HashMap<(u64, Purpose), PeerChannel>>,
}

impl Dialer {
    pub(crate) fn new(
        cluster: &[u8; 16],
        node: u64,
        published: Arc<Published>,
        transport: Arc<dyn Transport>,
        via: Option<DialOverride>,
    ) -> Self {
        let stamp = Stamp { cluster: hex::encode(cluster), node, published };
        Self {
            inner: Arc::new(Inner { stamp, transport, via, learned: RwLock::default(), channels: Mutex::default() }),
        }
    }

    /// Remembers where a node listens until the state says so.
    pub(crate) fn learn(&self, node: u64, address: &str) {
        self.inner.learned.write().insert(node, address.to_owned());
    }

    /// The channel to a node.
    pub(crate) fn channel(&self, node: u64, purpose: Purpose) -> PeerChannel {
        let mut channels = self.inner.channels.lock();
        channels.entry((node, purpose)).or_insert_with(|| self.connect_lazy(Target::Node(node))).clone()
    }

    /// A channel to whichever broker of this cluster listens at an address.
    pub(crate) fn channel_to_address(&self, address: &str) -> PeerChannel {
        self.connect_lazy(Target::Address(address.to_owned()))
    }

    fn connect_lazy(&self, target: Target) -> PeerChannel {
        let inner = self.inner.clone();
        let connector = service_fn(move |_| {
            let (inner, target) = (inner.clone(), target.clone());
            async move { inner.connect(&target).await.map(TokioIo::new) }
        });
        // TLS is ours; the address is looked up at each connection.
        let channel = Endpoint::from_static("http://broker.selvedge")
            .connect_timeout(CONNECT_TIMEOUT)
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
            .keep_alive_timeout(KEEPALIVE_TIMEOUT)
            .keep_alive_while_idle(true)
            .connect_with_connector_lazy(connector);
        InterceptedService::new(channel, self.inner.stamp.clone())
    }
}

#[derive(Clone)]
enum Target {
    Node(u64),
    Address(String),
}

impl Inner {
    fn address(&self, node: u64) -> Option<String> {
        let advertised = || {
            let broker = self.stamp.published.state().broker(node)?;
            (!broker.peer.is_empty()).then_some(broker.peer)
        };
        self.via
            .as_ref()
            .and_then(|via| via(node))
            .or_else(advertised)
            .or_else(|| self.learned.read().get(&node).cloned())
    }

    async fn connect(&self, target: &Target) -> io::Result<Box<dyn Stream>> {
        let address = match target {
            Target::Node(node) => self
                .address(*node)
                .ok_or_else(|| io::Error::other(format!("the address of broker `{node}` is not known")))?,
            Target::Address(address) => address.clone(),
        };
        let link = self.transport.connect(&address).await?;
        if let Target::Node(node) = target
            && node_of(&link.peer) != Some(*node)
        {
            return Err(io::Error::other(format!("`{address}` is `{}`, not broker `{node}`", link.peer.id)));
        }
        Ok(link.stream)
    }
}

/// The SPIFFE id of a broker: its node id in decimal.
///
/// **Errors**: when the trust domain is none.
pub fn broker_id(trust_domain: &str, node: u64) -> Result<SpiffeId, selvedge_proto::identity::Error> {
    SpiffeId::new(trust_domain, Kind::Broker, &node.to_string())
}

/// The node id of a broker, exactly as [`broker_id`] writes it.
pub fn node_of(peer: &PeerIdentity) -> Option<u64> {
    if peer.id.kind() != Kind::Broker {
        return None;
    }
    let node: u64 = peer.id.id().parse().ok()?;
    (node.to_string() == peer.id.id()).then_some(node)
}
