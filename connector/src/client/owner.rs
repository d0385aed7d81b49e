//! Whose a local connection is.

use std::io;
use std::net::{IpAddr, SocketAddr};

/// The user at the other end of a loopback connection, as the kernel's socket tables say.
///
/// **Source** proc_pid_net(5): `/proc/net/tcp` and `tcp6`.
pub(super) fn uid_of(peer: SocketAddr, own: SocketAddr) -> io::Result<Option<u32>> {
    for table in ["/proc/net/tcp", "/proc/net/tcp6"] {
        let text = match std::fs::read_to_string(table) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            text => text?,
        };
        if let Some(uid) = find(&text, peer, own) {
            return Ok(Some(uid));
        }
    }
    Ok(None)
}

fn find(table: &str, peer: SocketAddr, own: SocketAddr) -> Option<u32> {
    // A connection between a mapped and a plain address is in the table of its socket's family.
    let ends = [(written(peer, false), written(own, false)), (written(peer, true), written(own, true))];
    table.lines().skip(1).find_map(|line| {
        let mut columns = line.split_ascii_whitespace().skip(1);
        let (local, remote) = (columns.next()?, columns.next()?);
        let is_it = ends.iter().any(|(peer, own)| peer.eq_ignore_ascii_case(local) && own.eq_ignore_ascii_case(remote));
        if is_it { columns.nth(4)?.parse().ok() } else { None }
    })
}

/// An address as the tables have it: words in the machine's byte order.
fn written(address: SocketAddr, mapped: bool) -> String {
    let word = |bytes: &[u8]| bytes.first_chunk().map_or(0, |word| u32::from_ne_bytes(*word));
    let words = match address.ip() {
        IpAddr::V4(v4) if !mapped => format!("{:08X}", word(&v4.octets())),
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets().chunks(4).map(|bytes| format!("{:08X}", word(bytes))).collect(),
        IpAddr::V6(v6) => v6.octets().chunks(4).map(|bytes| format!("{:08X}", word(bytes))).collect(),
    };
    format!("{words}:{:04X}", address.port())
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn a_connection_of_this_process_is_this_users() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (far, peer) = listener.accept().unwrap();
        let uid = uid_of(peer, far.local_addr().unwrap()).unwrap();
        assert_eq!(uid, Some(rustix::process::geteuid().as_raw()));
        drop(near);
    }

    #[test]
    fn a_connection_that_is_not_there_is_nobodys() {
        let nobody = "127.0.0.1:1".parse().unwrap();
        assert_eq!(find("header\n  0: garbage\n  1:\n", nobody, nobody), None);
        assert_eq!(uid_of(nobody, nobody).unwrap(), None);
    }
}
