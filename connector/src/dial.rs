//! Opening TCP connections, with the keepalives that every leg has.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use selvedge_proto::control::Broker;
use socket2::{SockRef, TcpKeepalive};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// Limit of a TCP connection to a broker.
pub(crate) const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_PROBES: u32 = 3;

/// Where to dial instead of a broker's advertised edge address.
///
/// **Shape**: keys are `host:port` of the edge, a node id, or a broker's name; values are `host:port`.
pub type Via = BTreeMap<String, String>;

/// Opens a TCP connection to a broker's edge.
pub(crate) async fn broker(via: &Via, broker: &Broker) -> io::Result<TcpStream> {
    let address = edge_address(via, broker);
    let stream = timeout(CONNECT_TIMEOUT, TcpStream::connect(address))
        .await
        .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "the broker did not answer"))??;
    prepare(&stream)?;
    Ok(stream)
}

/// Opens a TCP connection to an application.
pub(crate) async fn application(address: SocketAddr, within: Duration) -> io::Result<TcpStream> {
    let stream = timeout(within, TcpStream::connect(address))
        .await
        .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "the application did not answer"))??;
    prepare(&stream)?;
    Ok(stream)
}

/// No delay, keepalive 30/10/3. There is no limit for unacknowledged data: it would take a program that pauses, or a
/// broker that holds, for dead.
pub(crate) fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = SockRef::from(stream);
    let keepalive =
        TcpKeepalive::new().with_time(KEEPALIVE_IDLE).with_interval(KEEPALIVE_INTERVAL).with_retries(KEEPALIVE_PROBES);
    socket.set_tcp_keepalive(&keepalive)
}

/// Makes closing the socket a reset.
pub(crate) fn reset_on_close(stream: &TcpStream) {
    // Fails only for a socket that is gone already, which is reset enough.
    let _ = stream.set_zero_linger();
}

/// Takes [`reset_on_close`] back.
pub(crate) fn close_in_order(stream: &TcpStream) {
    // As above.
    let _ = SockRef::from(stream).set_linger(None);
}

fn edge_address<'a>(via: &'a Via, broker: &'a Broker) -> &'a str {
    via.get(&broker.edge)
        .or_else(|| via.get(&broker.node.to_string()))
        .or_else(|| via.get(&broker.name))
        .unwrap_or(&broker.edge)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_broker_is_dialled_where_the_override_says() {
        let broker = Broker { node: 7, name: "oslo".into(), edge: "h:1".into(), ..Broker::default() };
        let via = |key: &str| Via::from([(key.to_owned(), "p:9".to_owned())]);
        for key in ["h:1", "7", "oslo"] {
            assert_eq!(edge_address(&via(key), &broker), "p:9", "{key}");
        }
        assert_eq!(edge_address(&via("h:2"), &broker), "h:1");
    }
}
