//! Tickets: single-use secrets, each of which admits one hop.
//!
//! A client's ticket lives as long as its control stream and is used by one `Open` on that stream together with one hop,
//! in either order. A connector's ticket parks a hop until a session needs it, or is minted for one dial.
//!
//! **Invariants**: a ticket is used once; what nobody minted, what was used and what belonged to a stream that is gone
//! are the same: unknown.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;
use selvedge_proto::hello::Ticket;
use tokio::net::TcpStream;
use tokio::sync::oneshot;

use super::metrics;

/// Unused tickets at one client's or workload's control stream.
pub const TICKETS_PER_STREAM_MAX: usize = 16;
/// Hops that one connector keeps parked here, tickets for further ones included.
pub const PARKED_HOPS_MAX: usize = 4;

/// Names a control stream of this boot; never reused.
pub(super) type StreamKey = u64;

/// A connection whose ClientHello was read.
#[derive(Debug)]
pub(super) struct Hop {
    pub(super) stream: TcpStream,
    /// All that was read.
    pub(super) raw: Bytes,
    /// Bytes of `raw` that are the ClientHello.
    pub(super) hello_len: usize,
}

impl Hop {
    /// A connector's hop begins with a hello that only carries its ticket; it must have sent nothing behind it.
    fn is_bare(&self) -> bool {
        self.raw.len() == self.hello_len
    }

    /// A parked hop that has ended or speaks before it is spoken to is of no use.
    fn is_quiet(&self) -> bool {
        let mut byte = [0];
        matches!(self.stream.try_read(&mut byte), Err(error) if error.kind() == std::io::ErrorKind::WouldBlock)
    }
}

/// What became of a hop that showed a ticket.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Claim {
    /// It was given to whoever waited for it.
    Given,
    /// It waits for its `Open`; after a while it is to be [`Tickets::expire`]d.
    WaitsForOpen,
    /// It waits for a session.
    Parked,
    /// Nobody knows the ticket; the hop is closed.
    Unknown,
}

enum Slot {
    /// A client's, unused.
    Unused(StreamKey),
    /// A client's; the hop came before the `Open`.
    Came(StreamKey, Hop),
    /// The hop is waited for: a client's, or a connector's of one dial.
    Awaited(oneshot::Sender<Hop>, Side),
    /// A connector's, to park a hop with.
    Parking(StreamKey),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    Client,
    Connector,
}

#[derive(Default)]
struct Stream {
    unused: HashSet<Ticket>,
    parked: VecDeque<(Ticket, Hop)>,
}

#[derive(Default)]
struct Inner {
    slots: HashMap<Ticket, Slot>,
    streams: HashMap<StreamKey, Stream>,
    /// Over all streams.
    parked: usize,
}

/// All tickets that are live at this broker.
#[derive(Default)]
pub(super) struct Tickets {
    inner: Mutex<Inner>,
}

/// Waits for the hop of a ticket; dropped, it forgets the ticket.
pub(super) struct Awaited {
    tickets: Arc<Tickets>,
    ticket: Ticket,
    hop: oneshot::Receiver<Hop>,
}

impl Awaited {
    /// The hop; none when it cannot come any more.
    ///
    /// **Cancel safety**: the hop is lost when it had come; drop the whole then.
    pub(super) async fn hop(&mut self) -> Option<Hop> {
        (&mut self.hop).await.ok()
    }
}

impl Drop for Awaited {
    fn drop(&mut self) {
        let mut inner = self.tickets.inner.lock();
        if matches!(inner.slots.get(&self.ticket), Some(Slot::Awaited(..))) {
            inner.slots.remove(&self.ticket);
        }
    }
}

impl Tickets {
    pub(super) fn open_stream(&self, key: StreamKey) {
        self.inner.lock().streams.entry(key).or_default();
    }

    /// Forgets every unused ticket and every parked hop of a stream.
    pub(super) fn close_stream(&self, key: StreamKey) {
        let mut inner = self.inner.lock();
        let Some(stream) = inner.streams.remove(&key) else { return };
        inner.parked -= stream.parked.len();
        inner.slots.retain(|_, slot| match slot {
            Slot::Unused(of) | Slot::Parking(of) | Slot::Came(of, _) => *of != key,
            Slot::Awaited(..) => true,
        });
        inner.count();
    }

    /// Mints tickets for a client's stream, up to [`TICKETS_PER_STREAM_MAX`] unused ones.
    pub(super) fn mint(&self, key: StreamKey) -> Vec<Ticket> {
        self.fill(key, TICKETS_PER_STREAM_MAX, Slot::Unused)
    }

    /// Mints tickets for hops that a connector parks, up to [`PARKED_HOPS_MAX`] with those that are parked.
    pub(super) fn mint_parking(&self, key: StreamKey) -> Vec<Ticket> {
        {
            let mut inner = self.inner.lock();
            let Some(stream) = inner.streams.get_mut(&key) else { return Vec::new() };
            let before = stream.parked.len();
            stream.parked.retain(|(_, hop)| hop.is_quiet());
            let gone = before - stream.parked.len();
            inner.parked -= gone;
        }
        self.fill(key, PARKED_HOPS_MAX, Slot::Parking)
    }

    fn fill(&self, key: StreamKey, up_to: usize, slot: impl Fn(StreamKey) -> Slot) -> Vec<Ticket> {
        let mut inner = self.inner.lock();
        let Some(stream) = inner.streams.get_mut(&key) else { return Vec::new() };
        let missing = up_to.saturating_sub(stream.unused.len() + stream.parked.len());
        let made: Vec<Ticket> = (0..missing).map(|_| Ticket::random()).collect();
        stream.unused.extend(made.iter().cloned());
        inner.slots.extend(made.iter().map(|ticket| (ticket.clone(), slot(key))));
        inner.count();
        made
    }

    /// Mints the ticket of one dial and waits for its hop.
    pub(super) fn mint_dial(self: &Arc<Self>) -> (Ticket, Awaited) {
        let ticket = Ticket::random();
        let (given, hop) = oneshot::channel();
        let mut inner = self.inner.lock();
        inner.slots.insert(ticket.clone(), Slot::Awaited(given, Side::Connector));
        inner.count();
        (ticket.clone(), Awaited { tickets: self.clone(), ticket, hop })
    }

    /// Uses a ticket of this stream for an `Open`; none when it is unknown, used, or of another stream.
    pub(super) fn expect(self: &Arc<Self>, key: StreamKey, ticket: &Ticket) -> Option<Awaited> {
        let (given, hop) = oneshot::channel();
        let mut inner = self.inner.lock();
        match inner.slots.get(ticket)? {
            Slot::Unused(of) | Slot::Came(of, _) if *of == key => {}
            _ => return None,
        }
        if let Some(stream) = inner.streams.get_mut(&key) {
            stream.unused.remove(ticket);
        }
        if let Some(Slot::Came(_, came)) = inner.slots.remove(ticket) {
            // The receiver is in this very function.
            let _ = given.send(came);
        } else {
            inner.slots.insert(ticket.clone(), Slot::Awaited(given, Side::Client));
        }
        inner.count();
        Some(Awaited { tickets: self.clone(), ticket: ticket.clone(), hop })
    }

    /// A hop shows a ticket.
    pub(super) fn claim(&self, ticket: &Ticket, hop: Hop) -> Claim {
        let mut inner = self.inner.lock();
        let claim = match inner.slots.remove(ticket) {
            None => Claim::Unknown,
            Some(used @ Slot::Came(..)) => {
                inner.slots.insert(ticket.clone(), used);
                Claim::Unknown
            }
            Some(Slot::Unused(key)) => {
                inner.slots.insert(ticket.clone(), Slot::Came(key, hop));
                Claim::WaitsForOpen
            }
            Some(Slot::Awaited(_, Side::Connector)) if !hop.is_bare() => Claim::Unknown,
            Some(Slot::Awaited(given, _)) => match given.send(hop) {
                Ok(()) => Claim::Given,
                Err(_) => Claim::Unknown,
            },
            Some(Slot::Parking(key)) => match inner.streams.get_mut(&key) {
                Some(stream) if hop.is_bare() => {
                    stream.unused.remove(ticket);
                    stream.parked.push_back((ticket.clone(), hop));
                    inner.parked += 1;
                    Claim::Parked
                }
                _ => Claim::Unknown,
            },
        };
        inner.count();
        claim
    }

    /// Closes a hop whose `Open` did not come.
    pub(super) fn expire(&self, ticket: &Ticket) {
        let mut inner = self.inner.lock();
        if let Some(Slot::Came(key, _)) = inner.slots.get(ticket) {
            let key = *key;
            inner.slots.remove(ticket);
            if let Some(stream) = inner.streams.get_mut(&key) {
                stream.unused.remove(ticket);
            }
            metrics::refused("open_missing");
        }
        inner.count();
    }

    /// Takes a parked hop of a connector that is still good.
    pub(super) fn take_parked(&self, key: StreamKey) -> Option<(Ticket, Hop)> {
        let mut inner = self.inner.lock();
        let stream = inner.streams.get_mut(&key)?;
        let before = stream.parked.len();
        let taken = std::iter::from_fn(|| stream.parked.pop_front()).find(|(_, hop)| hop.is_quiet());
        let gone = before - stream.parked.len();
        inner.parked -= gone;
        inner.count();
        taken
    }
}

impl Inner {
    fn count(&self) {
        metrics::tickets(self.slots.len());
        metrics::parked(self.parked);
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt as _;
    use tokio::net::TcpListener;

    use super::*;

    async fn hop() -> (Hop, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (ours, theirs) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
        let raw = Bytes::from_static(b"hello");
        (Hop { stream: ours.unwrap(), hello_len: raw.len(), raw }, theirs.unwrap().0)
    }

    #[tokio::test]
    async fn open_and_hop_meet_in_either_order_and_only_once() {
        let tickets = Arc::new(Tickets::default());
        tickets.open_stream(1);
        let minted = tickets.mint(1);
        assert_eq!(minted.len(), TICKETS_PER_STREAM_MAX);
        assert!(tickets.mint(1).is_empty(), "no more than the limit are unused at a time");

        let mut awaited = tickets.expect(1, &minted[0]).unwrap();
        assert_eq!(tickets.claim(&minted[0], hop().await.0), Claim::Given);
        assert!(awaited.hop().await.is_some());
        assert_eq!(tickets.claim(&minted[0], hop().await.0), Claim::Unknown, "it was used");
        assert!(tickets.expect(1, &minted[0]).is_none());

        assert_eq!(tickets.claim(&minted[1], hop().await.0), Claim::WaitsForOpen);
        assert_eq!(tickets.claim(&minted[1], hop().await.0), Claim::Unknown, "a second hop takes nothing away");
        assert!(tickets.expect(1, &minted[1]).unwrap().hop().await.is_some());
        assert_eq!(tickets.mint(1).len(), 2, "used ones are replaced");
    }

    #[tokio::test]
    async fn a_ticket_is_bound_to_its_stream_and_ends_with_it() {
        let tickets = Arc::new(Tickets::default());
        tickets.open_stream(1);
        tickets.open_stream(2);
        let ticket = tickets.mint(1).remove(0);
        assert!(tickets.expect(2, &ticket).is_none(), "another stream cannot use it");
        tickets.close_stream(1);
        assert!(tickets.expect(1, &ticket).is_none());
        assert_eq!(tickets.claim(&ticket, hop().await.0), Claim::Unknown);
        assert_eq!(tickets.claim(&Ticket::random(), hop().await.0), Claim::Unknown);
    }

    #[tokio::test]
    async fn a_hop_without_its_open_expires() {
        let tickets = Arc::new(Tickets::default());
        tickets.open_stream(1);
        let ticket = tickets.mint(1).remove(0);
        assert_eq!(tickets.claim(&ticket, hop().await.0), Claim::WaitsForOpen);
        tickets.expire(&ticket);
        assert!(tickets.expect(1, &ticket).is_none());
    }

    #[tokio::test]
    async fn an_open_that_gave_up_leaves_no_ticket() {
        let tickets = Arc::new(Tickets::default());
        let (ticket, awaited) = tickets.mint_dial();
        drop(awaited);
        assert_eq!(tickets.claim(&ticket, hop().await.0), Claim::Unknown);
    }

    #[tokio::test]
    async fn parked_hops_that_died_or_spoke_are_passed_over() {
        let tickets = Arc::new(Tickets::default());
        tickets.open_stream(7);
        let minted = tickets.mint_parking(7);
        assert_eq!(minted.len(), PARKED_HOPS_MAX);
        let (first, mut talks) = hop().await;
        let (second, dies) = hop().await;
        let (third, _lives) = hop().await;
        talks.write_all(b"x").await.unwrap();
        drop(dies);
        first.stream.readable().await.unwrap();
        second.stream.readable().await.unwrap();
        for (ticket, hop) in minted.iter().zip([first, second, third]) {
            assert_eq!(tickets.claim(ticket, hop), Claim::Parked);
        }
        let (ticket, _) = tickets.take_parked(7).expect("the third is good");
        assert_eq!(ticket, minted[2]);
        assert!(tickets.take_parked(7).is_none());
        assert_eq!(tickets.mint_parking(7).len(), PARKED_HOPS_MAX - 1);
    }

    #[tokio::test]
    async fn a_connector_that_speaks_behind_its_hello_is_refused() {
        let tickets = Arc::new(Tickets::default());
        let (ticket, _awaited) = tickets.mint_dial();
        let (mut talking, _other) = hop().await;
        talking.hello_len -= 1;
        assert_eq!(tickets.claim(&ticket, talking), Claim::Unknown);
    }
}
