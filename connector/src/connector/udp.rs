//! A UDP session: many flows in one TLS stream, each a socket of its own towards the application.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::{SinkExt as _, StreamExt as _};
use selvedge_proto::frame::{DATAGRAM_BYTES_MAX, Datagram, DatagramCodec};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::UdpSocket;
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinSet};
use tokio_util::codec::Framed;

use crate::clock;
use crate::copy::{Counts, Ended, Limits, lease_over};

/// Flows of one session; the one that was quiet for longest gives way.
const FLOWS_MAX: usize = 256;
/// Packets that wait for the TLS stream; more are dropped, as a network would.
const PACKETS_MAX: usize = 256;
/// Ends a session in which nothing moves, when the broker names no limit.
const IDLE_DEFAULT: Duration = Duration::from_secs(120);

struct Flow {
    socket: Arc<UdpSocket>,
    used: Instant,
    reader: AbortHandle,
}

/// Moves packets until the stream ends or a limit does.
pub(super) async fn pump<S>(target: SocketAddr, hop: &mut S, counts: &Counts, limits: Limits<'_>) -> Ended
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let Limits { cut, fence, idle } = limits;
    let idle = idle.unwrap_or(IDLE_DEFAULT);
    let open = || fence.is_none_or(|(fence, _)| fence.is_open(clock::boot_ms()));
    let mut hop = Framed::new(hop, DatagramCodec);
    let (packets, mut answers) = mpsc::channel(PACKETS_MAX);
    let mut readers = JoinSet::new();
    let mut flows: BTreeMap<u32, Flow> = BTreeMap::new();
    let over = lease_over(fence);
    tokio::pin!(over);
    let mut moved = Instant::now();
    loop {
        tokio::select! {
            biased;
            () = async { match cut { Some(cut) => cut.cancelled().await, None => std::future::pending().await } } => return Ended::Cut,
            () = &mut over => return Ended::LeaseOver,
            () = tokio::time::sleep(idle.saturating_sub(moved.elapsed())) => return Ended::Idle,
            packet = hop.next() => {
                let datagram: Datagram = match packet {
                    None => return Ended::Clean,
                    Some(Ok(datagram)) => datagram,
                    Some(Err(error)) => return Ended::Second(io::Error::other(error)),
                };
                moved = Instant::now();
                // A closed fence drops packets, as a network would.
                if !open() {
                    continue;
                }
                let flow = match flow(&mut flows, &mut readers, datagram.flow, target, &packets).await {
                    Ok(flow) => flow,
                    Err(error) => return Ended::First(error),
                };
                flow.used = moved;
                if flow.socket.send(&datagram.payload).await.is_ok() {
                    counts.back.fetch_add(datagram.payload.len() as u64, Ordering::Relaxed);
                }
            }
            Some(datagram) = answers.recv() => {
                moved = Instant::now();
                if !open() {
                    continue;
                }
                let len = datagram.payload.len() as u64;
                if let Err(error) = hop.send(datagram).await {
                    return Ended::Second(io::Error::other(error));
                }
                counts.forth.fetch_add(len, Ordering::Relaxed);
            }
        }
    }
}

async fn flow<'a>(
    flows: &'a mut BTreeMap<u32, Flow>,
    readers: &mut JoinSet<()>,
    id: u32,
    target: SocketAddr,
    packets: &mpsc::Sender<Datagram>,
) -> io::Result<&'a mut Flow> {
    if !flows.contains_key(&id) {
        if flows.len() >= FLOWS_MAX
            && let Some(quiet) = flows.iter().min_by_key(|(_, flow)| flow.used).map(|(id, _)| *id)
            && let Some(flow) = flows.remove(&quiet)
        {
            flow.reader.abort();
        }
        let any: SocketAddr = if target.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0_u16; 8], 0).into() };
        let socket = Arc::new(UdpSocket::bind(any).await?);
        socket.connect(target).await?;
        let (reading, packets) = (socket.clone(), packets.clone());
        let reader = readers.spawn(async move {
            let mut packet = vec![0; DATAGRAM_BYTES_MAX];
            loop {
                match reading.recv(&mut packet).await {
                    Ok(len) => {
                        let payload = Bytes::copy_from_slice(&packet[..len]);
                        // Full: dropped, as a network would.
                        let _ = packets.try_send(Datagram { flow: id, payload });
                    }
                    // An ICMP answer to an earlier packet; the application may come back.
                    Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
                    Err(_) => return,
                }
            }
        });
        flows.insert(id, Flow { socket, used: Instant::now(), reader });
    }
    flows.get_mut(&id).ok_or_else(|| io::ErrorKind::NotFound.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn each_flow_gets_its_own_answers() {
        let server = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let target = server.local_addr().unwrap();
        let (near, mut far) = tokio::io::duplex(64 * 1024);
        let pumping = tokio::spawn(async move { pump(target, &mut far, &Counts::default(), Limits::default()).await });
        let mut near = Framed::new(near, DatagramCodec);
        for flow in [7, 9] {
            near.send(Datagram { flow, payload: Bytes::from(format!("from {flow}")) }).await.unwrap();
            let mut packet = [0; 64];
            let (len, from) = server.recv_from(&mut packet).await.unwrap();
            server.send_to(&packet[..len], from).await.unwrap();
            let answer = near.next().await.unwrap().unwrap();
            assert_eq!(answer, Datagram { flow, payload: Bytes::from(format!("from {flow}")) });
        }
        drop(near);
        assert!(matches!(pumping.await.unwrap(), Ended::Clean));
    }
}
