//! One direction of a flow: takes from one socket, forwards to the other, then passes the end on.
//!
//! Invariants: the gate is asked before each read and before each forward; a direction that waits for its source holds
//! neither pipe nor buffer; a turn is bounded, so the other direction and a cut are never kept waiting.

use std::io;
use std::net::Shutdown;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::{Buf, Bytes};
use rustix::io::ioctl_fionread;
use socket2::SockRef;
use tokio::io::Interest;
use tokio::net::TcpStream;

use super::metrics::{self, Counted};
use super::pipe::{Borrowed, PIPE_BYTES, Pool};
use super::{Counters, Gate};

/// What a quiet flow copies at once; one that has more waiting is busy and borrows a pipe. A little above the longest
/// TLS record.
const COPY_BYTES: usize = 32 << 10;
/// What a direction forwards before it lets others run.
const TURN_BYTES: usize = PIPE_BYTES;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Client,
    Connector,
}

/// A socket failed.
#[derive(Debug)]
pub(super) struct Fault {
    pub(super) side: Side,
    pub(super) error: io::Error,
}

/// What both directions of a flow share.
pub(super) struct Shared<'a> {
    pub(super) pool: &'a Arc<Pool>,
    pub(super) gate: &'a dyn Gate,
    pub(super) counters: &'a Counters,
    /// The client said something that is not kept, so that no second connector could be told.
    pub(super) client_spoke: AtomicBool,
}

pub(super) struct Direction<'a> {
    pub(super) from: &'a TcpStream,
    pub(super) to: &'a TcpStream,
    /// The side of `from`.
    pub(super) side: Side,
    pub(super) shared: &'a Shared<'a>,
    pub(super) forwarded: &'a ::metrics::Counter,
    load: Load,
    busy: bool,
}

/// What was taken and is not forwarded yet.
enum Load {
    Nothing,
    Bytes(Bytes),
    Pipe(Borrowed),
}

impl Load {
    fn len(&self) -> usize {
        match self {
            Self::Nothing => 0,
            Self::Bytes(bytes) => bytes.len(),
            Self::Pipe(pipe) => pipe.held(),
        }
    }
}

impl<'a> Direction<'a> {
    pub(super) fn up(
        [client, connector]: [&'a TcpStream; 2],
        preface: Bytes,
        shared: &'a Shared<'a>,
        forwarded: &'a ::metrics::Counter,
    ) -> Self {
        let (side, load) = (Side::Client, Load::Bytes(preface));
        Self { from: client, to: connector, side, shared, forwarded, load, busy: false }
    }

    pub(super) fn down(
        [client, connector]: [&'a TcpStream; 2],
        shared: &'a Shared<'a>,
        forwarded: &'a ::metrics::Counter,
    ) -> Self {
        let (side, load) = (Side::Connector, Load::Nothing);
        Self { from: connector, to: client, side, shared, forwarded, load, busy: false }
    }

    /// Runs until the source ends and the end is passed on.
    pub(super) async fn run(mut self) -> Result<(), Fault> {
        let mut turn = 0;
        loop {
            while self.load.len() > 0 {
                self.hold().await;
                match self.forward() {
                    Ok(len) => {
                        self.count(len);
                        turn += len;
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        self.to.writable().await.map_err(|error| self.fault_of_to(error))?;
                    }
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(self.fault_of_to(error)),
                }
                if turn >= TURN_BYTES {
                    turn = 0;
                    tokio::task::yield_now().await;
                }
            }
            self.hold().await;
            match self.take() {
                Ok(0) => return self.end(),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.load = Load::Nothing;
                    self.from.readable().await.map_err(|error| self.fault_of_from(error))?;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.fault_of_from(error)),
            }
        }
    }

    /// Waits while the gate is closed.
    async fn hold(&mut self) {
        if self.shared.gate.open() {
            return;
        }
        if self.load.len() == 0 {
            self.load = Load::Nothing;
        }
        let _held = Counted::new(metrics::FLOWS_HELD);
        while !self.shared.gate.open() {
            self.shared.gate.wait_open().await;
            tokio::task::consume_budget().await;
        }
    }

    /// Takes what the source has; zero is its end. Nothing is loaded before.
    fn take(&mut self) -> io::Result<usize> {
        if self.busy
            && !matches!(self.load, Load::Pipe(_))
            && let Some(pipe) = self.shared.pool.borrow()
        {
            self.load = Load::Pipe(pipe);
        }
        let taken = match &mut self.load {
            Load::Pipe(pipe) => self.from.try_io(Interest::READABLE, || pipe.fill(self.from))?,
            load => {
                let mut buffer = Vec::with_capacity(COPY_BYTES);
                let taken = self.from.try_read_buf(&mut buffer)?;
                *load = Load::Bytes(buffer.into());
                taken
            }
        };
        self.busy = taken >= COPY_BYTES;
        if self.side == Side::Client {
            self.shared.client_spoke.store(true, Ordering::Relaxed);
        }
        Ok(taken)
    }

    fn forward(&mut self) -> io::Result<usize> {
        let forwarded = match &mut self.load {
            Load::Nothing => return Ok(0),
            Load::Bytes(bytes) => {
                let len = self.to.try_write(bytes)?;
                bytes.advance(len);
                len
            }
            Load::Pipe(pipe) => {
                // `more` only when the next chunk is already there: it delays what is last by 200 ms.
                let more = pipe.held() >= COPY_BYTES && ioctl_fionread(self.from).is_ok_and(|waiting| waiting > 0);
                self.to.try_io(Interest::WRITABLE, || pipe.drain(self.to, more))?
            }
        };
        if forwarded == 0 { Err(io::ErrorKind::WriteZero.into()) } else { Ok(forwarded) }
    }

    fn count(&self, len: usize) {
        self.forwarded.increment(len as u64);
        match self.side {
            Side::Client => self.shared.counters.add_up(len as u64),
            Side::Connector => self.shared.counters.add_down(len as u64),
        }
    }

    /// Passes the source's end on. A connector that ends without a byte while the client could still be given to another
    /// one has failed: no TLS server ends like that.
    fn end(&mut self) -> Result<(), Fault> {
        self.load = Load::Nothing;
        if self.side == Side::Connector
            && !self.shared.counters.answered()
            && !self.shared.client_spoke.load(Ordering::Relaxed)
        {
            return Err(self.fault_of_from(io::ErrorKind::UnexpectedEof.into()));
        }
        SockRef::from(self.to).shutdown(Shutdown::Write).map_err(|error| self.fault_of_to(error))
    }

    fn fault_of_from(&self, error: io::Error) -> Fault {
        Fault { side: self.side, error }
    }

    fn fault_of_to(&self, error: io::Error) -> Fault {
        let side = match self.side {
            Side::Client => Side::Connector,
            Side::Connector => Side::Client,
        };
        Fault { side, error }
    }
}

/// Waits until a socket from which nothing more is read fails.
pub(super) async fn broken(stream: &TcpStream, side: Side) -> Fault {
    let error = match stream.ready(Interest::ERROR).await {
        Ok(_) => SockRef::from(stream).take_error().ok().flatten(),
        Err(error) => Some(error),
    };
    Fault { side, error: error.unwrap_or_else(|| io::ErrorKind::ConnectionReset.into()) }
}
