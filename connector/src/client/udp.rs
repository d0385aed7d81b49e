//! A local UDP port for one application: one session for all who send to it, each local address a flow of its own.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::{SinkExt as _, StreamExt as _};
use parking_lot::Mutex;
use selvedge_proto::frame::{DATAGRAM_BYTES_MAX, Datagram, DatagramCodec, Transport};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::UdpSocket;
use tokio::time::sleep;
use tokio_util::codec::{FramedRead, FramedWrite};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::front::Report;
use super::{Client, Error};

/// Local addresses that one front end answers; the one that was quiet for longest gives way.
pub const FLOWS_MAX: usize = 256;
/// From a session that failed to the next attempt.
const RETRY_PAUSE: Duration = Duration::from_secs(1);

/// Listens on a loopback address; what is sent to it goes to `host:port` in one session, which begins with the first
/// packet and begins anew when it has ended. Runs until `shutdown`.
pub async fn connect_udp(
    client: &Client,
    host: &str,
    port: u16,
    listen: SocketAddr,
    shutdown: CancellationToken,
    report: impl Fn(Report) + Send + Sync + 'static,
) -> Result<(), Error> {
    if !listen.ip().is_loopback() {
        return Err(Error::NotLoopback(listen));
    }
    let socket = UdpSocket::bind(listen).await.map_err(|source| Error::Listen { address: listen, source })?;
    report(Report::Listening(socket.local_addr()?));
    let sessions = async {
        loop {
            if let Err(error) = socket.peek_from(&mut [0]).await {
                debug!(%error, "the port");
            }
            match client.open(host, port, Transport::Udp).await {
                Ok(tunnel) => {
                    if let Err(error) = carry(&socket, tunnel).await {
                        debug!(%error, "a session broke off");
                        sleep(RETRY_PAUSE).await;
                    }
                }
                Err(error) => {
                    report(Report::Failed { target: format!("{host}:{port}"), error });
                    sleep(RETRY_PAUSE).await;
                    forget(&socket);
                }
            }
        }
    };
    tokio::select! {
        () = shutdown.cancelled() => {}
        () = sessions => {}
    }
    Ok(())
}

/// Throws away what waits: nobody reached what it was for.
fn forget(socket: &UdpSocket) {
    while socket.try_recv_from(&mut [0]).is_ok() {}
}

/// Moves packets until the session ends. Both ways at once: each end reads while it writes, so neither waits for ever.
async fn carry<S: AsyncRead + AsyncWrite>(socket: &UdpSocket, tunnel: S) -> io::Result<()> {
    let (reader, writer) = tokio::io::split(tunnel);
    let (mut reader, mut writer) = (FramedRead::new(reader, DatagramCodec), FramedWrite::new(writer, DatagramCodec));
    let flows = Mutex::new(Flows::default());
    let sending = async {
        let mut packet = vec![0; DATAGRAM_BYTES_MAX + 1];
        loop {
            let (len, from) = socket.recv_from(&mut packet).await?;
            if len > DATAGRAM_BYTES_MAX {
                continue;
            }
            let flow = flows.lock().of(from, Instant::now());
            let payload = Bytes::copy_from_slice(&packet[..len]);
            writer.send(Datagram { flow, payload }).await.map_err(io::Error::other)?;
        }
    };
    let receiving = async {
        while let Some(packet) = reader.next().await {
            let Datagram { flow, payload } = packet.map_err(io::Error::other)?;
            let to = flows.lock().address(flow, Instant::now());
            if let Some(to) = to
                && let Err(error) = socket.send_to(&payload, to).await
            {
                debug!(%error, "a packet was not delivered");
            }
        }
        Ok(())
    };
    tokio::select! {
        ended = sending => ended,
        ended = receiving => ended,
    }
}

/// The local addresses of one session, by the numbers that they have there. A number is not used twice.
#[derive(Default)]
struct Flows {
    next: u32,
    by_address: BTreeMap<SocketAddr, u32>,
    by_number: BTreeMap<u32, (SocketAddr, Instant)>,
}

impl Flows {
    fn of(&mut self, address: SocketAddr, now: Instant) -> u32 {
        if let Some(&number) = self.by_address.get(&address) {
            self.by_number.insert(number, (address, now));
            return number;
        }
        if self.by_number.len() >= FLOWS_MAX
            && let Some((&quiet, &(whose, _))) = self.by_number.iter().min_by_key(|(_, (_, used))| *used)
        {
            self.by_number.remove(&quiet);
            self.by_address.remove(&whose);
        }
        let number = self.next;
        self.next = self.next.wrapping_add(1);
        self.by_address.insert(address, number);
        self.by_number.insert(number, (address, now));
        number
    }

    /// None for one that gave way.
    fn address(&mut self, number: u32, now: Instant) -> Option<SocketAddr> {
        let (address, used) = self.by_number.get_mut(&number)?;
        *used = now;
        Some(*address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_flow_that_was_quiet_for_longest_gives_way() {
        let mut flows = Flows::default();
        let begun = Instant::now();
        let address = |port: usize| SocketAddr::from(([127, 0, 0, 1], 1_000 + port as u16));
        let at = |n: usize| begun + Duration::from_millis(n as u64);
        let numbers: Vec<u32> = (0..FLOWS_MAX).map(|n| flows.of(address(n), at(n))).collect();
        assert_eq!(flows.of(address(0), at(1_000)), numbers[0], "the same address, the same flow");
        let new = flows.of(address(FLOWS_MAX), at(1_001));
        assert!(!numbers.contains(&new));
        assert_eq!(flows.address(numbers[1], at(1_002)), None);
        assert_eq!(flows.address(numbers[0], at(1_002)), Some(address(0)));
        assert_ne!(flows.of(address(1), at(1_003)), numbers[1], "its late answers go to nobody else");
        assert_eq!((flows.by_number.len(), flows.by_address.len()), (FLOWS_MAX, FLOWS_MAX));
    }
}
