//! The listening part: connections, TLS, HTTP/1.1 and HTTP/2.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use parking_lot::Mutex;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::ServiceExt as _;

use super::certificate::{CHECK_INTERVAL, Certificates};
use super::metrics::{CONNECTIONS, CONNECTIONS_REFUSED_TOTAL};
use super::{Context, limit, router};

/// Connections at once.
pub const CONNECTIONS_MAX: usize = 2_048;
/// Connections of one address prefix (/24, /48) at once.
pub const CONNECTIONS_PER_PREFIX_MAX: usize = 512;
/// For a TLS handshake.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// For the head of a request.
pub const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// Requests of one HTTP/2 connection at once.
pub const STREAMS_PER_CONNECTION_MAX: u32 = 64;
const HEADER_BYTES_MAX: usize = 32 * 1024;
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(30);
const STOP_TIMEOUT: Duration = Duration::from_secs(5);
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Where a request came from.
#[derive(Clone, Copy, Debug)]
pub(super) struct Source(pub(super) SocketAddr);

/// A running web listener.
pub struct Web {
    address: SocketAddr,
    stop: CancellationToken,
    tasks: TaskTracker,
}

impl Web {
    /// Serves on a bound socket until [`Web::stop`].
    ///
    /// **Errors**: the socket cannot be used.
    pub fn serve(
        context: Arc<Context>,
        listener: std::net::TcpListener,
        certificates: Arc<Certificates>,
    ) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let listener = TcpListener::from_std(listener)?;
        let address = listener.local_addr()?;
        let (stop, tasks) = (CancellationToken::new(), TaskTracker::new());
        let server = Server {
            router: router::router(context),
            certificates,
            connections: Arc::new(Semaphore::new(CONNECTIONS_MAX)),
            prefixes: Arc::default(),
            stop: stop.clone(),
            tasks: tasks.clone(),
        };
        tasks.spawn(server.run(listener));
        Ok(Self { address, stop, tasks })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Stops accepting, lets running requests end for a few seconds.
    pub async fn stop(&self) {
        self.stop.cancel();
        self.tasks.close();
        if tokio::time::timeout(STOP_TIMEOUT, self.tasks.wait()).await.is_err() {
            tracing::debug!("some web connections were cut");
        }
    }
}

struct Server {
    router: Router,
    certificates: Arc<Certificates>,
    connections: Arc<Semaphore>,
    prefixes: Arc<Mutex<HashMap<IpAddr, usize>>>,
    stop: CancellationToken,
    tasks: TaskTracker,
}

impl Server {
    async fn run(self, listener: TcpListener) {
        let mut check = tokio::time::interval(CHECK_INTERVAL);
        check.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = self.stop.cancelled() => return,
                _ = check.tick() => {
                    let certificates = self.certificates.clone();
                    self.tasks.spawn_blocking(move || certificates.refresh());
                }
                accepted = listener.accept() => match accepted {
                    Ok((stream, source)) => self.accept(stream, source),
                    Err(error) => {
                        // Out of descriptors, or a connection that died in the queue: neither ends the listener.
                        tracing::debug!(%error, "a web connection was not accepted");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                },
            }
        }
    }

    fn accept(&self, stream: TcpStream, source: SocketAddr) {
        let Ok(permit) = self.connections.clone().try_acquire_owned() else {
            return refused("cap");
        };
        let Some(place) = Place::take(&self.prefixes, limit::prefix(source.ip())) else {
            return refused("prefix_cap");
        };
        let acceptor = TlsAcceptor::from(self.certificates.current());
        let (router, stop) = (self.router.clone(), self.stop.clone());
        self.tasks.spawn(async move {
            let _held = (permit, place, Open::new());
            tokio::select! {
                () = connection(stream, source, acceptor, router, &stop) => {}
                // Streams that never end would keep it from ending by itself.
                () = async { stop.cancelled().await; tokio::time::sleep(STOP_TIMEOUT).await } => {}
            }
        });
    }
}

async fn connection(
    stream: TcpStream,
    source: SocketAddr,
    acceptor: TlsAcceptor,
    router: Router,
    stop: &CancellationToken,
) {
    let _ = stream.set_nodelay(true);
    let stream = match tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(_)) => return refused("handshake"),
        Err(_) => return refused("timeout"),
    };
    let service = hyper::service::service_fn(move |mut request: hyper::Request<hyper::body::Incoming>| {
        request.extensions_mut().insert(Source(source));
        router.clone().oneshot(request.map(axum::body::Body::new))
    });
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT).max_buf_size(HEADER_BYTES_MAX);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS_PER_CONNECTION_MAX)
        .max_header_list_size(HEADER_BYTES_MAX as u32)
        .keep_alive_interval(KEEP_ALIVE_INTERVAL);
    let serving = builder.serve_connection(TokioIo::new(stream), service);
    tokio::pin!(serving);
    let ended = tokio::select! {
        ended = serving.as_mut() => ended,
        () = stop.cancelled() => {
            serving.as_mut().graceful_shutdown();
            serving.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a web connection ended badly");
    }
}

fn refused(reason: &'static str) {
    ::metrics::counter!(CONNECTIONS_REFUSED_TOTAL, "reason" => reason).increment(1);
}

/// One connection in the gauge.
struct Open;

impl Open {
    fn new() -> Self {
        ::metrics::gauge!(CONNECTIONS).increment(1);
        Self
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        ::metrics::gauge!(CONNECTIONS).decrement(1);
    }
}

/// One of a prefix's connections.
struct Place {
    prefixes: Arc<Mutex<HashMap<IpAddr, usize>>>,
    prefix: IpAddr,
}

impl Place {
    fn take(prefixes: &Arc<Mutex<HashMap<IpAddr, usize>>>, prefix: IpAddr) -> Option<Self> {
        let mut counts = prefixes.lock();
        let count = counts.entry(prefix).or_default();
        if *count >= CONNECTIONS_PER_PREFIX_MAX {
            return None;
        }
        *count += 1;
        Some(Self { prefixes: prefixes.clone(), prefix })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut counts = self.prefixes.lock();
        if let Some(count) = counts.get_mut(&self.prefix) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.prefix);
            }
        }
    }
}
