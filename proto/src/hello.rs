//! The first bytes of every connection to the edge: a TLS ClientHello, read as a message.
//!
//! ALPN says what a connection wants. [`ALPN_CONTROL`] with a [`Knock`] is a control stream, [`ALPN_HOP`] with a
//! [`Ticket`] is a hop, anything else is [`Kind::Other`] and deserves neither an answer nor cryptography.
//!
//! Invariants: what was read is never lost ([`Hello::raw`] holds it all, byte for byte); a message beyond
//! [`HELLO_BYTES_MAX`] is refused before it is stored; no input panics.
//!
//! This module does not know which tickets are live or which knock keys are current, and it verifies nothing of TLS:
//! whoever terminates the handshake does.

use std::fmt;
use std::hash::{Hash, Hasher};
use std::net::IpAddr;

use aws_lc_rs::{constant_time, hmac, rand};
use tokio::io::{AsyncRead, AsyncReadExt};

/// Longest ClientHello that is read, its record headers included.
pub const HELLO_BYTES_MAX: usize = 16 * 1024;
/// Most extensions a ClientHello may carry.
pub const HELLO_EXTENSIONS_MAX: usize = 64;
/// Most ALPN entries a ClientHello may carry.
pub const HELLO_ALPN_ENTRIES_MAX: usize = 16;

/// ALPN entry of a control stream: gRPC over HTTP/2 follows.
pub const ALPN_CONTROL: &[u8] = b"selvedge-control/1";
/// ALPN entry of a hop: one session's bytes follow.
pub const ALPN_HOP: &[u8] = b"selvedge-hop/1";

const KNOCK_PREFIX: &[u8] = b"k/";
const KNOCK_RANDOM_BYTES: usize = 16;
const KNOCK_TAG_BYTES: usize = 32;
const TICKET_PREFIX: &[u8] = b"t/";
const TICKET_BYTES: usize = 32;

const RECORD_HEADER_BYTES: usize = 5;
const RECORD_BYTES_MAX: usize = 1 << 14;
const RECORD_HANDSHAKE: u8 = 22;
const MESSAGE_HEADER_BYTES: usize = 4;
const MESSAGE_CLIENT_HELLO: u8 = 1;
const EXTENSION_SERVER_NAME: u16 = 0;
const EXTENSION_ALPN: u16 = 16;
const READ_BYTES: usize = 4 * 1024;

/// Why the first bytes of a connection are not a ClientHello that the edge reads on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The bytes are not handshake records of TLS.
    #[error("not a TLS handshake record")]
    NotTls,
    /// A record without content, which only serves to make the reader work.
    #[error("an empty TLS record")]
    EmptyRecord,
    /// A record or message is longer than the limit.
    #[error("the ClientHello is longer than `{HELLO_BYTES_MAX}` bytes")]
    TooLong,
    /// The first handshake message is another one.
    #[error("the first message is of type `{0}`, not a ClientHello")]
    NotClientHello(u8),
    /// The message does not parse.
    #[error("the ClientHello is malformed: {0}")]
    Malformed(&'static str),
    /// The peer ended the connection first.
    #[error("the connection ended within the ClientHello")]
    Ended,
    /// The connection failed.
    #[error("reading the ClientHello failed")]
    Io(#[from] std::io::Error),
}

/// Reads a ClientHello from bytes as they arrive, in pieces of any size.
#[derive(Default)]
pub struct HelloReader {
    raw: Vec<u8>,
    message: Vec<u8>,
    record_at: usize,
    done: bool,
}

impl HelloReader {
    /// A reader that has seen nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the next bytes; returns the hello once it is whole, and leaves the reader empty then.
    ///
    /// **Shape**: what `bytes` holds beyond the ClientHello is in [`Hello::raw`] too, so memory is bounded by
    /// [`HELLO_BYTES_MAX`] plus the length of the last piece.
    ///
    /// **Errors**: any; the reader refuses everything afterwards.
    pub fn push(&mut self, bytes: &[u8]) -> Result<Option<Hello>, Error> {
        if self.done {
            return Err(Error::Malformed("refused before"));
        }
        let outcome = self.advance(bytes);
        self.done = outcome.is_err();
        outcome
    }

    fn advance(&mut self, bytes: &[u8]) -> Result<Option<Hello>, Error> {
        let within = bytes.len().min(HELLO_BYTES_MAX - self.raw.len());
        let (within, beyond) = bytes.split_at(within);
        self.raw.extend_from_slice(within);
        while let Some(whole) = self.take_record()? {
            if whole {
                let (server_name, alpn) = parse_client_hello(&self.message[MESSAGE_HEADER_BYTES..])?;
                let reader = std::mem::take(self);
                let mut raw = reader.raw;
                raw.extend_from_slice(beyond);
                return Ok(Some(Hello { server_name, alpn, raw, hello_len: reader.record_at }));
            }
        }
        if self.raw.len() == HELLO_BYTES_MAX {
            return Err(Error::TooLong);
        }
        Ok(None)
    }

    /// Moves the next record's content to the message. `None`: it is not here yet; `Some(true)`: the message is whole.
    fn take_record(&mut self) -> Result<Option<bool>, Error> {
        let rest = &self.raw[self.record_at..];
        match *rest {
            [] => return Ok(None),
            [kind, ..] if kind != RECORD_HANDSHAKE => return Err(Error::NotTls),
            [_, major, ..] if major != 3 => return Err(Error::NotTls),
            _ => {}
        }
        let [_, _, _, high, low, content @ ..] = rest else { return Ok(None) };
        let len = usize::from(u16::from_be_bytes([*high, *low]));
        if len == 0 {
            return Err(Error::EmptyRecord);
        }
        if len > RECORD_BYTES_MAX || self.record_at + RECORD_HEADER_BYTES + len > HELLO_BYTES_MAX {
            return Err(Error::TooLong);
        }
        if let (true, Some(kind)) = (self.message.is_empty(), content.first())
            && *kind != MESSAGE_CLIENT_HELLO
        {
            return Err(Error::NotClientHello(*kind));
        }
        let Some(content) = content.get(..len) else { return Ok(None) };
        self.message.extend_from_slice(content);
        self.record_at += RECORD_HEADER_BYTES + len;
        let [_, a, b, c, body @ ..] = self.message.as_slice() else { return Ok(Some(false)) };
        let expected = u32::from_be_bytes([0, *a, *b, *c]) as usize;
        if expected > HELLO_BYTES_MAX {
            return Err(Error::TooLong);
        }
        if body.len() > expected {
            return Err(Error::Malformed("something follows in the same record"));
        }
        Ok(Some(body.len() == expected))
    }
}

/// Reads a ClientHello from `stream`.
///
/// **Cancel safety**: none; what was read is lost with the future. The caller's deadline closes the connection.
///
/// **Errors**: those of [`HelloReader::push`], [`Error::Ended`], [`Error::Io`].
pub async fn read<R: AsyncRead + Unpin>(stream: &mut R) -> Result<Hello, Error> {
    let mut reader = HelloReader::new();
    let mut piece = vec![0; READ_BYTES];
    loop {
        let len = stream.read(&mut piece).await?;
        if len == 0 {
            return Err(Error::Ended);
        }
        if let Some(hello) = reader.push(&piece[..len])? {
            return Ok(hello);
        }
    }
}

/// A ClientHello as it was read. `Debug` leaves out the bytes, which hold a ticket.
pub struct Hello {
    /// The server name asked for, as sent.
    pub server_name: Option<String>,
    /// The ALPN entries in order.
    pub alpn: Vec<Vec<u8>>,
    /// All that was read: the records of the ClientHello and what came behind them.
    pub raw: Vec<u8>,
    /// How many bytes of `raw` are the ClientHello's records.
    pub hello_len: usize,
}

impl Hello {
    /// What this connection asks to be. Exactly one of knock and ticket, beside its own protocol and not the other's.
    pub fn kind(&self) -> Kind {
        let has = |protocol: &[u8]| self.alpn.iter().any(|entry| entry == protocol);
        match (has(ALPN_CONTROL), has(ALPN_HOP)) {
            (true, false) => self.only(Knock::from_alpn).map_or(Kind::Other, |knock| Kind::Control { knock }),
            (false, true) => self.only(Ticket::from_alpn).map_or(Kind::Other, |ticket| Kind::Hop { ticket }),
            _ => Kind::Other,
        }
    }

    /// What was read behind the ClientHello.
    pub fn beyond(&self) -> &[u8] {
        &self.raw[self.hello_len..]
    }

    fn only<T>(&self, parse: impl Fn(&[u8]) -> Option<T>) -> Option<T> {
        let mut found = self.alpn.iter().filter_map(|entry| parse(entry));
        let first = found.next()?;
        found.next().is_none().then_some(first)
    }
}

impl fmt::Debug for Hello {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hello")
            .field("server_name", &self.server_name)
            .field("kind", &self.kind())
            .finish_non_exhaustive()
    }
}

/// What a connection asks to be.
#[derive(Debug, PartialEq, Eq)]
pub enum Kind {
    /// A control stream, if a current key admits the knock.
    Control {
        /// The proof of having been here before.
        knock: Knock,
    },
    /// A hop, if the ticket is live.
    Hop {
        /// The ticket shown.
        ticket: Ticket,
    },
    /// Neither. To be closed without a byte.
    Other,
}

/// A single-use secret that admits one hop. Prints as `***`, compares in constant time.
#[derive(Clone)]
pub struct Ticket([u8; TICKET_BYTES]);

impl Ticket {
    /// A new ticket from the system's randomness.
    pub fn random() -> Self {
        Self(random())
    }

    /// The ticket of these bytes; `None` if they are not 32.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    /// The ticket in an ALPN entry, if it is one.
    pub fn from_alpn(entry: &[u8]) -> Option<Self> {
        Self::from_bytes(entry.strip_prefix(TICKET_PREFIX)?)
    }

    /// The ALPN entry that shows this ticket.
    pub fn alpn(&self) -> Vec<u8> {
        [TICKET_PREFIX, &self.0].concat()
    }

    /// The secret itself, to be sent over a control stream.
    pub fn as_bytes(&self) -> &[u8; TICKET_BYTES] {
        &self.0
    }
}

impl PartialEq for Ticket {
    fn eq(&self, other: &Self) -> bool {
        constant_time::verify_slices_are_equal(&self.0, &other.0).is_ok()
    }
}

impl Eq for Ticket {}

impl Hash for Ticket {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.hash(state);
    }
}

impl fmt::Debug for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// The key under which knocks are made. Prints as `***`.
#[derive(Clone)]
pub struct KnockKey([u8; KNOCK_TAG_BYTES]);

impl KnockKey {
    /// A new key from the system's randomness.
    pub fn random() -> Self {
        Self(random())
    }

    /// The key of these bytes; `None` if they are not 32.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    /// A fresh knock, as an ALPN entry.
    pub fn knock(&self) -> Vec<u8> {
        let random: [u8; KNOCK_RANDOM_BYTES] = random();
        let tag = hmac::sign(&self.hmac(), &random);
        [KNOCK_PREFIX, &random, tag.as_ref()].concat()
    }

    /// Whether the knock was made with this key. Takes the same time whatever the answer.
    pub fn admits(&self, knock: &Knock) -> bool {
        hmac::verify(&self.hmac(), &knock.random, &knock.tag).is_ok()
    }

    /// The secret itself, to be sent over a control stream.
    pub fn as_bytes(&self) -> &[u8; KNOCK_TAG_BYTES] {
        &self.0
    }

    fn hmac(&self) -> hmac::Key {
        hmac::Key::new(hmac::HMAC_SHA256, &self.0)
    }
}

impl PartialEq for KnockKey {
    fn eq(&self, other: &Self) -> bool {
        constant_time::verify_slices_are_equal(&self.0, &other.0).is_ok()
    }
}

impl Eq for KnockKey {}

impl fmt::Debug for KnockKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// Sixteen random bytes and their HMAC: a filter against strangers, not an identity.
#[derive(Clone, PartialEq, Eq)]
pub struct Knock {
    random: [u8; KNOCK_RANDOM_BYTES],
    tag: [u8; KNOCK_TAG_BYTES],
}

impl Knock {
    /// The knock in an ALPN entry, if it is one.
    pub fn from_alpn(entry: &[u8]) -> Option<Self> {
        let (random, tag) = entry.strip_prefix(KNOCK_PREFIX)?.split_first_chunk()?;
        Some(Self { random: *random, tag: tag.try_into().ok()? })
    }
}

impl fmt::Debug for Knock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// A ClientHello that carries a server name and a ticket and begins no handshake: the broker swallows it.
///
/// **Shape**: one record; looks like a TLS 1.3 client to what stands between. `host` is left out when it is an address
/// (RFC 6066, section 3) or longer than a name can be.
pub fn ticket_hello(host: &str, ticket: &Ticket) -> Vec<u8> {
    let mut extensions = Vec::with_capacity(256);
    if host.parse::<IpAddr>().is_err() && (1..=255).contains(&host.len()) {
        let name = [&[0][..], &vector16(host.as_bytes())].concat();
        extension(&mut extensions, EXTENSION_SERVER_NAME, &vector16(&name));
    }
    extension(&mut extensions, 10, &vector16(&[0x00, 0x1d]));
    extension(&mut extensions, 13, &vector16(&[0x04, 0x03, 0x08, 0x04, 0x08, 0x07]));
    let mut protocols = Vec::with_capacity(64);
    for entry in [ALPN_HOP, &ticket.alpn()] {
        protocols.push(entry.len() as u8);
        protocols.extend_from_slice(entry);
    }
    extension(&mut extensions, EXTENSION_ALPN, &vector16(&protocols));
    extension(&mut extensions, 43, &[2, 0x03, 0x04]);
    let share = [&[0x00, 0x1d][..], &vector16(&random::<32>())].concat();
    extension(&mut extensions, 51, &vector16(&share));

    let mut body = vec![0x03, 0x03];
    body.extend_from_slice(&random::<32>());
    body.push(32);
    body.extend_from_slice(&random::<32>());
    body.extend_from_slice(&vector16(&[0x13, 0x02, 0x13, 0x01, 0x13, 0x03]));
    body.extend_from_slice(&[1, 0]);
    body.extend_from_slice(&vector16(&extensions));

    let message = [&[MESSAGE_CLIENT_HELLO, 0][..], &vector16(&body)].concat();
    [&[RECORD_HANDSHAKE, 3, 1][..], &vector16(&message)].concat()
}

fn extension(out: &mut Vec<u8>, kind: u16, content: &[u8]) {
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&vector16(content));
}

/// A vector with a two-byte length; the callers above stay far below its limit.
fn vector16(content: &[u8]) -> Vec<u8> {
    [&(content.len() as u16).to_be_bytes()[..], content].concat()
}

fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    // RAND_bytes of AWS-LC aborts the process rather than return without randomness.
    rand::fill(&mut bytes).expect("the system's randomness never fails");
    bytes
}

/// RFC 8446, section 4.1.2.
fn parse_client_hello(body: &[u8]) -> Result<(Option<String>, Vec<Vec<u8>>), Error> {
    let mut body = Cursor(body);
    body.take(2, "version")?;
    body.take(32, "random")?;
    if body.vector8("session id")?.0.len() > 32 {
        return Err(Error::Malformed("session id"));
    }
    let suites = body.vector16("cipher suites")?.0.len();
    if suites == 0 || suites % 2 != 0 {
        return Err(Error::Malformed("cipher suites"));
    }
    if body.vector8("compression methods")?.0.is_empty() {
        return Err(Error::Malformed("compression methods"));
    }
    let mut server_name = None;
    let mut alpn = Vec::new();
    let mut seen = Vec::new();
    let mut extensions = body.vector16("extensions")?;
    while !extensions.0.is_empty() {
        let kind = extensions.u16("extension type")?;
        let content = extensions.vector16("extension")?;
        if seen.contains(&kind) {
            return Err(Error::Malformed("an extension is there twice"));
        }
        seen.push(kind);
        if seen.len() > HELLO_EXTENSIONS_MAX {
            return Err(Error::Malformed("too many extensions"));
        }
        match kind {
            EXTENSION_SERVER_NAME => server_name = Some(parse_server_name(content)?),
            EXTENSION_ALPN => alpn = parse_alpn(content)?,
            _ => {}
        }
    }
    body.end("bytes after the extensions")?;
    Ok((server_name, alpn))
}

/// RFC 6066, section 3: one host name, of letters that a name may have.
fn parse_server_name(mut content: Cursor<'_>) -> Result<String, Error> {
    const WHAT: &str = "server name";
    let mut names = content.vector16(WHAT)?;
    content.end(WHAT)?;
    if names.u8(WHAT)? != 0 {
        return Err(Error::Malformed(WHAT));
    }
    let name = names.vector16(WHAT)?.0;
    names.end(WHAT)?;
    let allowed = |byte: &u8| byte.is_ascii_alphanumeric() || b"-._".contains(byte);
    if name.is_empty() || name.len() > 255 || !name.iter().all(allowed) {
        return Err(Error::Malformed(WHAT));
    }
    Ok(name.iter().copied().map(char::from).collect())
}

/// RFC 7301, section 3.1.
fn parse_alpn(mut content: Cursor<'_>) -> Result<Vec<Vec<u8>>, Error> {
    const WHAT: &str = "protocol names";
    let mut list = content.vector16(WHAT)?;
    content.end(WHAT)?;
    let mut entries = Vec::new();
    while !list.0.is_empty() {
        let entry = list.vector8(WHAT)?.0;
        if entry.is_empty() || entries.len() == HELLO_ALPN_ENTRIES_MAX {
            return Err(Error::Malformed(WHAT));
        }
        entries.push(entry.to_vec());
    }
    if entries.is_empty() {
        return Err(Error::Malformed(WHAT));
    }
    Ok(entries)
}

struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    fn take(&mut self, len: usize, what: &'static str) -> Result<&'a [u8], Error> {
        let (taken, rest) = self.0.split_at_checked(len).ok_or(Error::Malformed(what))?;
        self.0 = rest;
        Ok(taken)
    }

    fn u8(&mut self, what: &'static str) -> Result<u8, Error> {
        Ok(self.take(1, what)?[0])
    }

    fn u16(&mut self, what: &'static str) -> Result<u16, Error> {
        let bytes = self.take(2, what)?;
        Ok(u16::from_be_bytes([bytes[0], bytes[1]]))
    }

    fn vector8(&mut self, what: &'static str) -> Result<Cursor<'a>, Error> {
        let len = usize::from(self.u8(what)?);
        self.take(len, what).map(Cursor)
    }

    fn vector16(&mut self, what: &'static str) -> Result<Cursor<'a>, Error> {
        let len = usize::from(self.u16(what)?);
        self.take(len, what).map(Cursor)
    }

    fn end(&self, what: &'static str) -> Result<(), Error> {
        if self.0.is_empty() { Ok(()) } else { Err(Error::Malformed(what)) }
    }
}

#[cfg(test)]
mod tests;
