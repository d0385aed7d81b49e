//! The plain front ends: a local port for one application, and standard input and output.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use selvedge_proto::frame::Transport;
use tokio::io::AsyncWriteExt as _;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::{Client, Error, Tunnel};
use crate::copy::{self, BUFFER_BYTES, Counts, Ended, Limits};
use crate::{dial, metrics};

/// Connections that one front end serves at once; more are reset.
pub const CONNECTIONS_MAX: usize = 4_096;

const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// What a front end tells whoever started it.
#[derive(Debug)]
pub enum Report {
    /// It listens.
    Listening(SocketAddr),
    /// A connection could not be served.
    Failed {
        /// `host:port` that was wanted.
        target: String,
        /// Why.
        error: Error,
    },
}

/// Listens on a loopback address; each connection to it is one session with `host:port`. Runs until `shutdown`.
pub async fn connect(
    client: &Client,
    host: &str,
    port: u16,
    listen: SocketAddr,
    shutdown: CancellationToken,
    report: impl Fn(Report) + Send + Sync + 'static,
) -> Result<(), Error> {
    let listener = bind(listen).await?;
    report(Report::Listening(listener.local_addr()?));
    let shared = Arc::new((client.clone(), host.to_owned(), report));
    accept(&listener, &shutdown, |stream, place| {
        let shared = shared.clone();
        tokio::spawn(async move {
            let (client, host, report) = &*shared;
            match client.open(host, port, Transport::Tcp).await {
                Ok(tunnel) => carry(stream, tunnel).await,
                Err(error) => {
                    dial::reset_on_close(&stream);
                    report(Report::Failed { target: format!("{host}:{port}"), error });
                }
            }
            drop(place);
        });
    })
    .await;
    Ok(())
}

/// Joins one session with standard input and output, until the application's side has ended.
///
/// Reading standard input cannot be interrupted: end the process afterwards, not only its runtime.
pub async fn nc(client: &Client, host: &str, port: u16) -> Result<(), Error> {
    let tunnel = client.open(host, port, Transport::Tcp).await?;
    let (mut reader, mut writer) = tokio::io::split(tunnel);
    let sending = async {
        let mut input = tokio::io::BufReader::with_capacity(BUFFER_BYTES, tokio::io::stdin());
        let sent = tokio::io::copy_buf(&mut input, &mut writer).await;
        if sent.is_ok() {
            writer.shutdown().await?;
        }
        sent
    };
    let receiving = async move {
        let mut output = tokio::io::stdout();
        tokio::io::copy(&mut reader, &mut output).await?;
        output.flush().await
    };
    tokio::pin!(receiving);
    let sent_first = tokio::select! {
        received = &mut receiving => {
            received?;
            false
        }
        sent = sending => {
            sent?;
            true
        }
    };
    if sent_first {
        receiving.await?;
    } else {
        // The application is done; what standard input would still say has no reader. The session ends in order.
        writer.shutdown().await?;
    }
    Ok(())
}

/// Listens where only this machine's processes come.
pub(super) async fn bind(listen: SocketAddr) -> Result<TcpListener, Error> {
    if !listen.ip().is_loopback() {
        return Err(Error::NotLoopback(listen));
    }
    TcpListener::bind(listen).await.map_err(|source| Error::Listen { address: listen, source })
}

/// Hands each connection to `serve`, with the place that it takes, until `shutdown`.
pub(super) async fn accept(
    listener: &TcpListener,
    shutdown: &CancellationToken,
    mut serve: impl FnMut(TcpStream, OwnedSemaphorePermit),
) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let stream = tokio::select! {
            () = shutdown.cancelled() => return,
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // Out of descriptors, most likely: those that are open will end.
                    debug!(%error, "accept");
                    sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            },
        };
        let Ok(place) = places.clone().try_acquire_owned() else {
            ::metrics::counter!(metrics::FRONT_REFUSED, "reason" => "full").increment(1);
            dial::reset_on_close(&stream);
            continue;
        };
        // Fails only for a connection that is gone, as its first read will say.
        let _ = dial::prepare(&stream);
        serve(stream, place);
    }
}

/// Moves bytes between a local connection and a session; what breaks off on one side is reset on the other.
pub(super) async fn carry(mut stream: TcpStream, mut tunnel: Tunnel) {
    let counts = Counts::default();
    match copy::pump(&mut stream, &mut tunnel, &counts, Limits::default()).await {
        Ended::Clean => {}
        ended => {
            debug!(%ended, "a session broke off");
            dial::reset_on_close(&stream);
        }
    }
}
