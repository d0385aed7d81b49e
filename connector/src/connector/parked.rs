//! Hops that wait at brokers for their session, so that one does not have to be opened when it comes.

use std::collections::BTreeMap;
use std::mem::MaybeUninit;
use std::sync::Arc;

use parking_lot::Mutex;
use selvedge_proto::control::Broker;
use selvedge_proto::hello::{Ticket, ticket_hello};
use socket2::SockRef;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tracing::debug;

use super::Role;
use crate::dial::{self, Via};
use crate::link::Link;
use crate::metrics;

/// The hops parked now, by broker.
pub(super) struct Parked {
    wanted: usize,
    hops: Mutex<BTreeMap<u64, Vec<(Ticket, TcpStream)>>>,
}

impl Parked {
    pub(super) fn new(wanted: usize) -> Self {
        Self { wanted, hops: Mutex::new(BTreeMap::new()) }
    }

    /// Takes the hop of a ticket, if it is parked at this broker.
    pub(super) fn take(&self, node: u64, ticket: &Ticket) -> Option<TcpStream> {
        let mut hops = self.hops.lock();
        let parked = hops.get_mut(&node)?;
        let at = parked.iter().position(|(other, _)| other == ticket)?;
        let (_, stream) = parked.swap_remove(at);
        count(&hops);
        Some(stream)
    }

    /// The tickets of what is parked at a broker.
    pub(super) fn tickets(&self, node: u64) -> Vec<Vec<u8>> {
        let hops = self.hops.lock();
        let tickets =
            |parked: &Vec<(Ticket, TcpStream)>| parked.iter().map(|(ticket, _)| ticket.as_bytes().to_vec()).collect();
        hops.get(&node).map(tickets).unwrap_or_default()
    }

    /// Drops what is parked at a broker: its stream has ended, and the broker forgot the tickets.
    pub(super) fn forget(&self, node: u64) {
        let mut hops = self.hops.lock();
        hops.remove(&node);
        count(&hops);
    }

    /// Drops hops that the broker has closed; answers whether there were any.
    pub(super) fn sweep(&self, node: u64) -> bool {
        let mut hops = self.hops.lock();
        let Some(parked) = hops.get_mut(&node) else { return false };
        let before = parked.len();
        parked.retain(|(_, stream)| !has_ended(stream));
        let swept = parked.len() < before;
        count(&hops);
        swept
    }

    fn missing(&self, node: u64) -> usize {
        self.wanted.saturating_sub(self.hops.lock().get(&node).map_or(0, Vec::len))
    }

    fn add(&self, node: u64, ticket: Ticket, stream: TcpStream) {
        let mut hops = self.hops.lock();
        hops.entry(node).or_default().push((ticket, stream));
        count(&hops);
    }
}

/// Opens hops with the tickets that a stream has, until enough are parked.
pub(super) async fn fill(role: Arc<Role>, link: Arc<Link>) {
    let node = link.broker.node;
    while role.parked.missing(node) > 0 && link.is_usable() {
        let Some(ticket) = link.take_ticket() else { return };
        match open(&role.end.via, &link.broker, &ticket).await {
            Ok(stream) => role.parked.add(node, ticket, stream),
            Err(error) => return debug!(broker = link.broker.name, %error, "no hop could be parked"),
        }
        role.health.changed();
    }
}

/// Opens a hop: a connection to a broker's edge that begins with its ticket.
pub(super) async fn open(via: &Via, broker: &Broker, ticket: &Ticket) -> std::io::Result<TcpStream> {
    let mut stream = dial::broker(via, broker).await?;
    stream.write_all(&ticket_hello(&broker.host, ticket)).await?;
    Ok(stream)
}

/// Whether the peer has closed. A session's first bytes may be there already; they are left.
fn has_ended(stream: &TcpStream) -> bool {
    let mut byte = [MaybeUninit::uninit()];
    match SockRef::from(stream).peek(&mut byte) {
        Ok(0) => true,
        Ok(_) => false,
        Err(error) => error.kind() != std::io::ErrorKind::WouldBlock,
    }
}

fn count(hops: &BTreeMap<u64, Vec<(Ticket, TcpStream)>>) {
    ::metrics::gauge!(metrics::PARKED_HOPS).set(hops.values().map(Vec::len).sum::<usize>() as f64);
}
