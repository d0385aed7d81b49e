//! What client and connector say to each other inside their TLS session, before the application's bytes: one frame each.
//!
//! The client sends [`Start`], the connector answers [`Started`] or [`Frame::Failed`]. A frame is a two-byte length, big
//! endian, and that many bytes of protobuf. A UDP session goes on with [`Datagram`]s, a TCP session with bare bytes.
//!
//! Invariants: a reader takes no byte beyond its frame, for application bytes may follow at once; a frame that decodes
//! holds only values that are allowed.
//!
//! This module does not know what was agreed: whoever holds the `Dial` compares it with `Start`.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use prost::Message;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio_util::codec::{Decoder, Encoder};

/// Version of the end-to-end frames that this build speaks.
pub const FRAME_VERSION: u32 = 1;
/// Longest frame, without its length.
pub const FRAME_BYTES_MAX: usize = 4 * 1024;
/// Longest host in a frame.
pub const HOST_BYTES_MAX: usize = 255;
/// Longest payload of a datagram: what UDP over IPv4 can carry.
pub const DATAGRAM_BYTES_MAX: usize = 65_507;

const DATAGRAM_HEADER_BYTES: usize = 6;

/// Why a frame could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The length is zero or above the limit.
    #[error("a frame of `{0}` bytes, allowed are 1 to `{FRAME_BYTES_MAX}`")]
    Length(usize),
    /// The bytes are not a frame.
    #[error("the frame does not decode")]
    Decode(#[from] prost::DecodeError),
    /// A field has a value that is not allowed.
    #[error("the frame has a wrong or missing `{0}`")]
    Field(&'static str),
    /// A datagram is longer than UDP carries.
    #[error("a datagram of `{0}` bytes, allowed are `{DATAGRAM_BYTES_MAX}`")]
    Datagram(usize),
    /// The peer ended the stream before its frame began.
    #[error("the stream ended before the frame")]
    Ended,
    /// The stream failed, or ended within the frame.
    #[error("the stream failed")]
    Io(#[from] std::io::Error),
}

/// Why a hop or a session ended or did not begin. Closed: a code that this build does not know decodes as `Unspecified`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum SessionCode {
    /// Not said, or a code of a newer peer.
    Unspecified = 0,
    /// Denied, unknown or wrong port: one answer for all.
    Refused = 1,
    /// The name does not exist for this caller.
    NoSuchName = 2,
    /// The caller's login is too old or its posture must be proven again.
    Reauthenticate = 3,
    /// The caller's version is not served any more.
    Upgrade = 4,
    /// A limit of the caller or the broker is reached.
    Busy = 5,
    /// The broker holds no freshness lease.
    Stale = 6,
    /// Allowed, but no connector can reach the application now.
    Unavailable = 7,
    /// The application refused the connection.
    AppRefused = 8,
    /// The application did not answer in time.
    AppTimeout = 9,
    /// No route to the application, or its name did not resolve at the connector.
    AppUnreachable = 10,
    /// The connector's own configuration does not allow the target.
    NotAllowed = 11,
    /// The connector did not confirm the dial in time.
    DialTimeout = 12,
    /// A hop did not arrive in time.
    HopTimeout = 13,
    /// The end-to-end handshake failed.
    HandshakeFailed = 14,
    /// The peer's certificate is not the one that the broker named.
    WrongPeer = 15,
    /// Ticket, leaf, `Start` and `Dial` do not agree.
    StartMismatch = 16,
    /// The broker's lease ran out and did not return.
    LeaseOver = 17,
    /// User, device, workload, connector or grant was revoked.
    Revoked = 18,
    /// The policy does not allow the session any more.
    PolicyChanged = 19,
    /// The verdict's time ran out and the next one denied.
    Expired = 20,
    /// The broker is being stopped.
    BrokerDraining = 21,
    /// The connector is being stopped.
    ConnectorDraining = 22,
    /// The peer broke the protocol.
    ProtocolError = 23,
    /// The peer's end closed or reset the connection.
    PeerGone = 24,
    /// A failure inside that its log explains.
    Internal = 25,
    /// The session outlived the deadline of its broker's drain.
    Drained = 26,
}

impl SessionCode {
    /// The code's name, stable, for records and metric labels.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Unspecified => "unspecified",
            Self::Refused => "refused",
            Self::NoSuchName => "no_such_name",
            Self::Reauthenticate => "reauthenticate",
            Self::Upgrade => "upgrade",
            Self::Busy => "busy",
            Self::Stale => "stale",
            Self::Unavailable => "unavailable",
            Self::AppRefused => "app_refused",
            Self::AppTimeout => "app_timeout",
            Self::AppUnreachable => "app_unreachable",
            Self::NotAllowed => "not_allowed",
            Self::DialTimeout => "dial_timeout",
            Self::HopTimeout => "hop_timeout",
            Self::HandshakeFailed => "handshake_failed",
            Self::WrongPeer => "wrong_peer",
            Self::StartMismatch => "start_mismatch",
            Self::LeaseOver => "lease_over",
            Self::Revoked => "revoked",
            Self::PolicyChanged => "policy_changed",
            Self::Expired => "expired",
            Self::BrokerDraining => "broker_draining",
            Self::ConnectorDraining => "connector_draining",
            Self::ProtocolError => "protocol_error",
            Self::PeerGone => "peer_gone",
            Self::Internal => "internal",
            Self::Drained => "drained",
        }
    }

    /// The code of a number on the wire.
    pub fn from_wire(code: i32) -> Self {
        Self::try_from(code).unwrap_or(Self::Unspecified)
    }
}

impl std::fmt::Display for SessionCode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What a session carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Transport {
    /// A byte stream.
    Tcp,
    /// Datagrams, many flows in one session.
    Udp,
}

/// The client's frame: what it wants to reach, to be compared with what the broker told the connector.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Start {
    /// [`FRAME_VERSION`] of the sender. **Shape**: not zero.
    pub version: u32,
    /// The session's id.
    pub session: u128,
    /// What it carries.
    pub transport: Transport,
    /// The canonical host. **Shape**: 1 to [`HOST_BYTES_MAX`] bytes of printable ASCII.
    pub host: String,
    /// The port. **Shape**: not zero.
    pub port: u16,
    /// A bit for each feature that the sender would use.
    pub features: u64,
}

/// The connector's frame: the application is connected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Started {
    /// The version that both use from here on. **Shape**: not zero.
    pub version: u32,
    /// The session's id, as in [`Start`].
    pub session: u128,
    /// The features that both use from here on.
    pub features: u64,
}

/// One end-to-end frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// Client to connector.
    Start(Start),
    /// Connector to client: it runs.
    Started(Started),
    /// Connector to client: it does not.
    Failed {
        /// Why.
        code: SessionCode,
    },
}

impl Frame {
    /// The frame with its length in front.
    ///
    /// **Errors**: [`Error::Field`] when a value is not allowed, so that nothing leaves that no peer would read.
    pub fn encode(&self) -> Result<Bytes, Error> {
        let body = wire::Body::from(self);
        Self::try_from(body.clone())?;
        let message = wire::Frame { body: Some(body) };
        let len = message.encoded_len();
        let prefix = u16::try_from(len).ok().filter(|_| len <= FRAME_BYTES_MAX).ok_or(Error::Length(len))?;
        let mut out = BytesMut::with_capacity(size_of::<u16>() + len);
        out.put_u16(prefix);
        out.put_slice(&message.encode_to_vec());
        Ok(out.freeze())
    }

    /// The frame in `bytes`, which are without the length.
    pub fn decode(bytes: &[u8]) -> Result<Self, Error> {
        if bytes.is_empty() || bytes.len() > FRAME_BYTES_MAX {
            return Err(Error::Length(bytes.len()));
        }
        wire::Frame::decode(bytes)?.body.ok_or(Error::Field("body"))?.try_into()
    }
}

/// Reads one frame and no byte beyond it.
///
/// **Cancel safety**: none; a frame that was read in part is lost with the future.
///
/// **Errors**: [`Error::Ended`] when the stream ends before the first byte, else any.
pub async fn read_frame<R: AsyncRead + Unpin>(stream: &mut R) -> Result<Frame, Error> {
    let mut prefix = [0; size_of::<u16>()];
    if stream.read(&mut prefix[..1]).await? == 0 {
        return Err(Error::Ended);
    }
    stream.read_exact(&mut prefix[1..]).await?;
    let len = usize::from(u16::from_be_bytes(prefix));
    if len == 0 || len > FRAME_BYTES_MAX {
        return Err(Error::Length(len));
    }
    let mut bytes = vec![0; len];
    stream.read_exact(&mut bytes).await?;
    Frame::decode(&bytes)
}

/// Writes one frame and flushes it.
///
/// **Cancel safety**: none; a frame that was written in part leaves the stream unusable.
pub async fn write_frame<W: AsyncWrite + Unpin>(stream: &mut W, frame: &Frame) -> Result<(), Error> {
    stream.write_all(&frame.encode()?).await?;
    stream.flush().await?;
    Ok(())
}

/// One UDP packet of one flow of a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Datagram {
    /// The flow: a socket of the client's side.
    pub flow: u32,
    /// The packet's payload. **Shape**: 0 to [`DATAGRAM_BYTES_MAX`] bytes.
    pub payload: Bytes,
}

/// Codec of [`Datagram`]: `flow` (4 bytes), `length` (2 bytes), payload; big endian.
#[derive(Clone, Copy, Debug, Default)]
pub struct DatagramCodec;

impl Encoder<Datagram> for DatagramCodec {
    type Error = Error;

    fn encode(&mut self, datagram: Datagram, out: &mut BytesMut) -> Result<(), Error> {
        let len = datagram.payload.len();
        let short = u16::try_from(len).ok().filter(|_| len <= DATAGRAM_BYTES_MAX).ok_or(Error::Datagram(len))?;
        out.reserve(DATAGRAM_HEADER_BYTES + len);
        out.put_u32(datagram.flow);
        out.put_u16(short);
        out.put_slice(&datagram.payload);
        Ok(())
    }
}

impl Decoder for DatagramCodec {
    type Item = Datagram;
    type Error = Error;

    fn decode(&mut self, input: &mut BytesMut) -> Result<Option<Datagram>, Error> {
        let Some(header) = input.first_chunk::<DATAGRAM_HEADER_BYTES>() else { return Ok(None) };
        let [f0, f1, f2, f3, l0, l1] = *header;
        let len = usize::from(u16::from_be_bytes([l0, l1]));
        if len > DATAGRAM_BYTES_MAX {
            return Err(Error::Datagram(len));
        }
        if input.len() < DATAGRAM_HEADER_BYTES + len {
            input.reserve(DATAGRAM_HEADER_BYTES + len - input.len());
            return Ok(None);
        }
        input.advance(DATAGRAM_HEADER_BYTES);
        Ok(Some(Datagram { flow: u32::from_be_bytes([f0, f1, f2, f3]), payload: input.split_to(len).freeze() }))
    }
}

/// The protobuf messages, as they are on the wire. Field numbers are never used again.
mod wire {
    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Frame {
        #[prost(oneof = "Body", tags = "1, 2, 3")]
        pub(super) body: Option<Body>,
    }

    #[derive(Clone, PartialEq, prost::Oneof)]
    pub(super) enum Body {
        #[prost(message, tag = "1")]
        Start(Start),
        #[prost(message, tag = "2")]
        Started(Started),
        #[prost(message, tag = "3")]
        Failed(Failed),
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Start {
        #[prost(uint32, tag = "1")]
        pub(super) version: u32,
        #[prost(bytes = "vec", tag = "2")]
        pub(super) session: Vec<u8>,
        #[prost(enumeration = "Transport", tag = "3")]
        pub(super) transport: i32,
        #[prost(string, tag = "4")]
        pub(super) host: String,
        #[prost(uint32, tag = "5")]
        pub(super) port: u32,
        #[prost(fixed64, tag = "6")]
        pub(super) features: u64,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Started {
        #[prost(uint32, tag = "1")]
        pub(super) version: u32,
        #[prost(bytes = "vec", tag = "2")]
        pub(super) session: Vec<u8>,
        #[prost(fixed64, tag = "3")]
        pub(super) features: u64,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Failed {
        #[prost(enumeration = "super::SessionCode", tag = "1")]
        pub(super) code: i32,
    }

    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
    #[repr(i32)]
    pub(super) enum Transport {
        Unspecified = 0,
        Tcp = 1,
        Udp = 2,
    }
}

impl From<&Frame> for wire::Body {
    fn from(frame: &Frame) -> Self {
        match frame {
            Frame::Start(start) => {
                let transport = match start.transport {
                    Transport::Tcp => wire::Transport::Tcp,
                    Transport::Udp => wire::Transport::Udp,
                };
                Self::Start(wire::Start {
                    version: start.version,
                    session: start.session.to_be_bytes().to_vec(),
                    transport: transport.into(),
                    host: start.host.clone(),
                    port: start.port.into(),
                    features: start.features,
                })
            }
            Frame::Started(started) => Self::Started(wire::Started {
                version: started.version,
                session: started.session.to_be_bytes().to_vec(),
                features: started.features,
            }),
            Frame::Failed { code } => Self::Failed(wire::Failed { code: (*code).into() }),
        }
    }
}

impl TryFrom<wire::Body> for Frame {
    type Error = Error;

    fn try_from(body: wire::Body) -> Result<Self, Error> {
        Ok(match body {
            wire::Body::Start(start) => Self::Start(Start {
                version: version(start.version)?,
                session: session(&start.session)?,
                transport: match wire::Transport::try_from(start.transport) {
                    Ok(wire::Transport::Tcp) => Transport::Tcp,
                    Ok(wire::Transport::Udp) => Transport::Udp,
                    Ok(wire::Transport::Unspecified) | Err(_) => return Err(Error::Field("transport")),
                },
                host: host(start.host)?,
                port: u16::try_from(start.port).ok().filter(|port| *port != 0).ok_or(Error::Field("port"))?,
                features: start.features,
            }),
            wire::Body::Started(started) => Self::Started(Started {
                version: version(started.version)?,
                session: session(&started.session)?,
                features: started.features,
            }),
            wire::Body::Failed(failed) => Self::Failed { code: SessionCode::from_wire(failed.code) },
        })
    }
}

fn version(version: u32) -> Result<u32, Error> {
    if version == 0 { Err(Error::Field("version")) } else { Ok(version) }
}

fn session(bytes: &[u8]) -> Result<u128, Error> {
    bytes.try_into().map(u128::from_be_bytes).map_err(|_| Error::Field("session"))
}

fn host(host: String) -> Result<String, Error> {
    let allowed = (1..=HOST_BYTES_MAX).contains(&host.len()) && host.bytes().all(|byte| byte.is_ascii_graphic());
    if allowed { Ok(host) } else { Err(Error::Field("host")) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn start() -> Start {
        Start {
            version: FRAME_VERSION,
            session: 0x0123_4567_89ab_cdef_0011_2233_4455_6677,
            transport: Transport::Tcp,
            host: "crm.internal".into(),
            port: 8080,
            features: 5,
        }
    }

    #[test]
    fn the_bytes_of_a_frame_do_not_change() {
        let bytes = Frame::Start(start()).encode().unwrap();
        let golden = "00320a3008011210\
                      0123456789abcdef0011223344556677\
                      1801220c63726d2e696e7465726e616c28903f310500000000000000";
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, golden);
        let failed = Frame::Failed { code: SessionCode::AppRefused }.encode().unwrap();
        assert_eq!(failed[..], [0, 4, 0x1a, 2, 8, 8]);
    }

    #[tokio::test]
    async fn a_reader_takes_no_byte_beyond_the_frame() {
        let (mut client, mut connector) = tokio::io::duplex(7);
        let sent = [
            Frame::Start(start()),
            Frame::Started(Started { version: 1, session: 9, features: 0 }),
            Frame::Failed { code: SessionCode::StartMismatch },
        ];
        let frames = sent.clone();
        let writer = tokio::spawn(async move {
            for frame in &frames {
                write_frame(&mut client, frame).await.unwrap();
            }
            client.write_all(b"application").await.unwrap();
        });
        for frame in sent {
            assert_eq!(read_frame(&mut connector).await.unwrap(), frame);
        }
        let mut rest = String::new();
        connector.read_to_string(&mut rest).await.unwrap();
        assert_eq!(rest, "application");
        assert!(matches!(read_frame(&mut connector).await, Err(Error::Ended)));
        writer.await.unwrap();
    }

    #[tokio::test]
    async fn a_frame_of_a_wrong_length_is_refused_before_it_is_read() {
        for (bytes, ended) in [(&[0u8, 0][..], false), (&[0x10, 1], false), (&[0xff, 0xff, 1], false), (&[0], true)] {
            let read = read_frame(&mut &bytes[..]).await;
            assert_eq!(matches!(read, Err(Error::Io(_))), ended);
            assert_eq!(matches!(read, Err(Error::Length(_))), !ended);
        }
    }

    #[test]
    fn values_that_are_not_allowed_neither_leave_nor_enter() {
        let wrong = [
            ("version", Start { version: 0, ..start() }),
            ("host", Start { host: String::new(), ..start() }),
            ("host", Start { host: "a b".into(), ..start() }),
            ("host", Start { host: "a\r\n".into(), ..start() }),
            ("host", Start { host: "a".repeat(256), ..start() }),
            ("port", Start { port: 0, ..start() }),
        ];
        for (field, start) in wrong {
            let body = wire::Body::from(&Frame::Start(start.clone()));
            let bytes = wire::Frame { body: Some(body) }.encode_to_vec();
            assert!(matches!(Frame::decode(&bytes), Err(Error::Field(name)) if name == field));
            assert!(matches!(Frame::Start(start).encode(), Err(Error::Field(name)) if name == field));
        }
        assert!(matches!(Frame::decode(&[0x22, 0]), Err(Error::Field("body"))));
        assert!(matches!(Frame::decode(&[0x1a, 3, 8, 0x80]), Err(Error::Decode(_))));
    }

    #[test]
    fn a_code_of_a_newer_peer_is_unspecified() {
        let frame = Frame::decode(&[0x1a, 3, 8, 0xff, 1]).unwrap();
        assert_eq!(frame, Frame::Failed { code: SessionCode::Unspecified });
    }

    #[test]
    fn datagrams_come_out_as_they_went_in_however_they_are_split() {
        let sent: Vec<_> = [0, 1, 1200, DATAGRAM_BYTES_MAX]
            .map(|len| Datagram { flow: len as u32 * 7, payload: vec![len as u8; len].into() })
            .into();
        let mut bytes = BytesMut::new();
        for datagram in sent.clone() {
            DatagramCodec.encode(datagram, &mut bytes).unwrap();
        }
        for size in [1, 5, 6, 7, 1000, bytes.len()] {
            let (mut input, mut got) = (BytesMut::new(), Vec::new());
            for piece in bytes.chunks(size) {
                input.extend_from_slice(piece);
                while let Some(datagram) = DatagramCodec.decode(&mut input).unwrap() {
                    got.push(datagram);
                }
            }
            assert_eq!(got, sent);
        }
        let long = Datagram { flow: 0, payload: vec![0; DATAGRAM_BYTES_MAX + 1].into() };
        assert!(matches!(DatagramCodec.encode(long, &mut bytes), Err(Error::Datagram(_))));
        let mut lie = BytesMut::from(&[0, 0, 0, 1, 0xff, 0xff][..]);
        assert!(matches!(DatagramCodec.decode(&mut lie), Err(Error::Datagram(_))));
    }

    proptest! {
        #[test]
        fn no_bytes_make_a_decoder_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(frame) = Frame::decode(&bytes) {
                let again = frame.encode().unwrap();
                prop_assert_eq!(Frame::decode(&again[2..]).unwrap(), frame);
            }
            let mut input = BytesMut::from(&bytes[..]);
            while let Ok(Some(_)) = DatagramCodec.decode(&mut input) {}
        }

        #[test]
        fn what_is_encoded_decodes_the_same(session: u128, features: u64, port in 1u16.., host in "[!-~]{1,255}", udp: bool) {
            let transport = if udp { Transport::Udp } else { Transport::Tcp };
            let frame = Frame::Start(Start { session, features, port, host, transport, ..start() });
            let bytes = frame.encode().unwrap();
            prop_assert_eq!(Frame::decode(&bytes[2..]).unwrap(), frame);
        }
    }
}
