//! SOCKS5 (RFC 1928) and HTTP CONNECT (RFC 9110, section 9.3.6) on one loopback port, for this user alone.
//!
//! Invariants: another user's connection is closed without a byte; a name outside the zones is refused, never connected
//! to directly.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use selvedge_domain::name::Host;
use selvedge_proto::frame::Transport;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::front::{Report, accept, bind, carry};
use super::{Client, Error, owner};
use crate::metrics;

/// Longest head of an HTTP request.
pub const HEAD_BYTES_MAX: usize = 8 * 1024;
/// A connection has said what it wants within.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

const SOCKS5: u8 = 5;
const NO_AUTHENTICATION: u8 = 0;
const NO_METHOD: u8 = 0xff;
const COMMAND_CONNECT: u8 = 1;

/// Serves SOCKS5 and HTTP CONNECT on a loopback address until `shutdown`.
pub async fn proxy(
    client: &Client,
    listen: SocketAddr,
    shutdown: CancellationToken,
    report: impl Fn(Report) + Send + Sync + 'static,
) -> Result<(), Error> {
    let listener = bind(listen).await?;
    report(Report::Listening(listener.local_addr()?));
    let shared = Arc::new((client.clone(), report));
    accept(&listener, &shutdown, |stream, place| {
        let shared = shared.clone();
        tokio::spawn(async move {
            let (client, report) = &*shared;
            if is_same_user(&stream) {
                serve(client, stream, report).await;
            } else {
                ::metrics::counter!(metrics::FRONT_REFUSED, "reason" => "other_user").increment(1);
                warn!("a connection of another user was refused");
            }
            drop(place);
        });
    })
    .await;
    Ok(())
}

async fn serve(client: &Client, mut stream: TcpStream, report: &(impl Fn(Report) + Sync)) {
    let request = match timeout(REQUEST_TIMEOUT, read_request(&mut stream)).await {
        Ok(Ok(request)) => request,
        Ok(Err(error)) => return debug!(%error, "not a request for a proxy"),
        Err(_) => return debug!("no request in time"),
    };
    let Request { speaks, host, port } = request;
    let outcome = match Host::parse(&host) {
        Err(_) => Err(Error::NoSuchName(host.clone())),
        Ok(name) => match client.is_private(&name).await {
            Ok(true) => client.open(&host, port, Transport::Tcp).await,
            Ok(false) => Err(Error::NotPrivate(host.clone())),
            Err(error) => Err(error),
        },
    };
    match outcome {
        Ok(tunnel) => {
            if stream.write_all(&speaks.accepted()).await.is_ok() {
                carry(stream, tunnel).await;
            }
        }
        Err(error) => {
            // The answer says it; a caller that is gone needs none.
            let _ = stream.write_all(&speaks.refused(&error)).await;
            let _ = stream.shutdown().await;
            report(Report::Failed { target: format!("{host}:{port}"), error });
        }
    }
}

fn is_same_user(stream: &TcpStream) -> bool {
    let uid = stream.peer_addr().and_then(|peer| owner::uid_of(peer, stream.local_addr()?));
    match uid {
        Ok(Some(uid)) => uid == rustix::process::geteuid().as_raw(),
        Ok(None) => false,
        Err(error) => {
            warn!(%error, "the kernel's socket tables cannot be read");
            false
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Request {
    speaks: Speaks,
    host: String,
    port: u16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Speaks {
    Socks,
    Http,
}

impl Speaks {
    fn accepted(self) -> Vec<u8> {
        match self {
            Self::Socks => socks_reply(0),
            Self::Http => b"HTTP/1.1 200 Connection established\r\n\r\n".to_vec(),
        }
    }

    fn refused(self, error: &Error) -> Vec<u8> {
        match self {
            // RFC 1928, section 6.
            Self::Socks => socks_reply(match error {
                Error::NoSuchName(_) => 4,
                Error::Unavailable(_) | Error::TimedOut(_) => 5,
                Error::NotPrivate(_) | Error::Reauthenticate | Error::Upgrade => 2,
                _ => 1,
            }),
            Self::Http => {
                let status = match error {
                    Error::NoSuchName(_) => "502 Bad Gateway",
                    Error::NotPrivate(_) | Error::Reauthenticate | Error::Upgrade => "403 Forbidden",
                    Error::TimedOut(_) => "504 Gateway Timeout",
                    _ => "503 Service Unavailable",
                };
                http_answer(status, &format!("{error}\n"))
            }
        }
    }
}

async fn read_request<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S) -> io::Result<Request> {
    match stream.read_u8().await? {
        SOCKS5 => read_socks(stream).await,
        first => read_http(stream, first).await,
    }
}

/// What follows the version byte.
async fn read_socks<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S) -> io::Result<Request> {
    let count = stream.read_u8().await?;
    let mut methods = vec![0; usize::from(count)];
    stream.read_exact(&mut methods).await?;
    if !methods.contains(&NO_AUTHENTICATION) {
        stream.write_all(&[SOCKS5, NO_METHOD]).await?;
        return Err(malformed("no method that is known"));
    }
    stream.write_all(&[SOCKS5, NO_AUTHENTICATION]).await?;
    stream.flush().await?;

    let mut head = [0; 4];
    stream.read_exact(&mut head).await?;
    let [version, command, _, kind] = head;
    if version != SOCKS5 {
        return Err(malformed("another version"));
    }
    let host = match kind {
        1 => {
            let mut address = [0; 4];
            stream.read_exact(&mut address).await?;
            Some(Ipv4Addr::from(address).to_string())
        }
        3 => {
            let len = stream.read_u8().await?;
            let mut name = vec![0; usize::from(len)];
            stream.read_exact(&mut name).await?;
            String::from_utf8(name).ok().filter(|name| !name.is_empty())
        }
        4 => {
            let mut address = [0; 16];
            stream.read_exact(&mut address).await?;
            Some(Ipv6Addr::from(address).to_string())
        }
        _ => {
            stream.write_all(&socks_reply(8)).await?;
            return Err(malformed("an unknown kind of address"));
        }
    };
    let port = stream.read_u16().await?;
    if command != COMMAND_CONNECT {
        stream.write_all(&socks_reply(7)).await?;
        return Err(malformed("a command other than CONNECT"));
    }
    let Some(host) = host else {
        stream.write_all(&socks_reply(4)).await?;
        return Err(malformed("a name that is none"));
    };
    Ok(Request { speaks: Speaks::Socks, host, port })
}

/// Reads a request head byte by byte, so that what follows it stays in the socket.
async fn read_http<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S, first: u8) -> io::Result<Request> {
    if !first.is_ascii_uppercase() {
        return Err(malformed("neither SOCKS5 nor HTTP"));
    }
    let mut head = vec![first];
    while !head.ends_with(b"\r\n\r\n") {
        if head.len() >= HEAD_BYTES_MAX {
            stream.write_all(&http_answer("431 Request Header Fields Too Large", "")).await?;
            return Err(malformed("a head that is too long"));
        }
        head.push(stream.read_u8().await?);
    }
    match parse_connect(&head) {
        Ok((host, port)) => Ok(Request { speaks: Speaks::Http, host, port }),
        Err(status) => {
            stream.write_all(&http_answer(status, "")).await?;
            Err(malformed(status))
        }
    }
}

fn parse_connect(head: &[u8]) -> Result<(String, u16), &'static str> {
    const BAD: &str = "400 Bad Request";
    let text = std::str::from_utf8(head).map_err(|_| BAD)?;
    let line = text.split("\r\n").next().ok_or(BAD)?;
    let mut words = line.split(' ');
    let (Some(method), Some(target), Some(version), None) = (words.next(), words.next(), words.next(), words.next())
    else {
        return Err(BAD);
    };
    if !version.starts_with("HTTP/1.") {
        return Err(BAD);
    }
    if method != "CONNECT" {
        return Err("405 Method Not Allowed");
    }
    let (host, port) = target.rsplit_once(':').ok_or(BAD)?;
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let port = port.parse().map_err(|_| BAD)?;
    if host.is_empty() { Err(BAD) } else { Ok((host.to_owned(), port)) }
}

fn socks_reply(code: u8) -> Vec<u8> {
    vec![SOCKS5, code, 0, 1, 0, 0, 0, 0, 0, 0]
}

fn http_answer(status: &str, body: &str) -> Vec<u8> {
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}

fn malformed(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use tokio::io::duplex;

    use super::*;

    /// Writes `bytes` and ends; answers what was read from it and what was sent back.
    async fn request(bytes: &[u8]) -> (io::Result<Request>, Vec<u8>) {
        let (mut near, mut far) = duplex(64 * 1024);
        near.write_all(bytes).await.unwrap();
        near.shutdown().await.unwrap();
        let outcome = timeout(Duration::from_secs(5), read_request(&mut far)).await.unwrap();
        drop(far);
        let mut sent = Vec::new();
        near.read_to_end(&mut sent).await.unwrap();
        (outcome, sent)
    }

    fn wanted(speaks: Speaks, host: &str, port: u16) -> Request {
        Request { speaks, host: host.to_owned(), port }
    }

    #[tokio::test]
    async fn socks_requests_for_names_and_addresses_are_read() {
        let name = b"\x05\x02\x01\x00\x05\x01\x00\x03\x0ccrm.internal\x1f\x90";
        let (read, sent) = request(name).await;
        assert_eq!(read.unwrap(), wanted(Speaks::Socks, "crm.internal", 8080));
        assert_eq!(sent, [5, 0]);
        let (read, _) = request(b"\x05\x01\x00\x05\x01\x00\x01\x0a\x00\x00\x01\x00\x50").await;
        assert_eq!(read.unwrap(), wanted(Speaks::Socks, "10.0.0.1", 80));
        let v6 = [b"\x05\x01\x00\x05\x01\x00\x04".as_slice(), &[0; 15], b"\x01\x00\x50"].concat();
        let (read, _) = request(&v6).await;
        assert_eq!(read.unwrap(), wanted(Speaks::Socks, "::1", 80));
    }

    #[tokio::test]
    async fn odd_socks_requests_are_answered_as_the_standard_says() {
        let cases: [(&[u8], &[u8]); 8] = [
            (b"\x05\x01\x02", &[5, 0xff]),
            (b"\x05\x00", &[5, 0xff]),
            (b"\x05\x01\x00\x05\x02\x00\x01\x0a\x00\x00\x01\x00\x50", &[5, 0, 5, 7]),
            (b"\x05\x01\x00\x05\x01\x00\x09", &[5, 0, 5, 8]),
            (b"\x05\x01\x00\x05\x01\x00\x03\x00\x00\x50", &[5, 0, 5, 4]),
            (b"\x05\x01\x00\x05\x01\x00\x03\x02\xff\xfe\x00\x50", &[5, 0, 5, 4]),
            (b"\x05\x01\x00\x04\x01\x00\x01", &[5, 0]),
            (b"\x05", &[]),
        ];
        for (bytes, begins) in cases {
            let (read, sent) = request(bytes).await;
            assert!(read.is_err(), "{bytes:?}");
            assert!(sent.starts_with(begins), "{bytes:?}: {sent:?}");
        }
    }

    #[tokio::test]
    async fn http_connect_is_read_and_other_methods_are_not() {
        let (read, sent) = request(b"CONNECT crm.internal:8080 HTTP/1.1\r\nHost: x\r\n\r\nrest").await;
        assert_eq!(read.unwrap(), wanted(Speaks::Http, "crm.internal", 8080));
        assert!(sent.is_empty());
        let (read, _) = request(b"CONNECT [::1]:80 HTTP/1.1\r\n\r\n").await;
        assert_eq!(read.unwrap(), wanted(Speaks::Http, "::1", 80));
        for (bytes, status) in [
            (b"GET http://x/ HTTP/1.1\r\n\r\n".as_slice(), "405"),
            (b"CONNECT x HTTP/1.1\r\n\r\n", "400"),
            (b"CONNECT x:99999 HTTP/1.1\r\n\r\n", "400"),
            (b"CONNECT :80 HTTP/1.1\r\n\r\n", "400"),
            (b"CONNECT x:80\r\n\r\n", "400"),
            (b"C\xff\r\n\r\n", "400"),
        ] {
            let (read, sent) = request(bytes).await;
            assert!(read.is_err());
            assert!(String::from_utf8_lossy(&sent).starts_with(&format!("HTTP/1.1 {status}")), "{bytes:?}");
        }
        let (read, sent) = request(&[b'A'; HEAD_BYTES_MAX + 1]).await;
        assert!(read.is_err());
        assert!(String::from_utf8_lossy(&sent).starts_with("HTTP/1.1 431"));
        for bytes in [b"\x04\x01".as_slice(), b"\x16\x03\x01", b"\x00", b""] {
            let (read, sent) = request(bytes).await;
            assert!(read.is_err() && sent.is_empty());
        }
    }
}
