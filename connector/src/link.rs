//! One control stream to one broker.
//!
//! Invariants: nothing is sent before both sides said `Hello`; a stream that has been silent for [`SILENCE_MAX`] is
//! dropped; every question that is open when a stream ends is answered with [`Error::Closed`].

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use selvedge_proto::control::control_client::ControlClient;
use selvedge_proto::control::{
    Broker, Cut, Dial, FromBroker, FromEnd, LeaseAsk, OpenRefused, Opened, Ping, Pong, Position, Renew, Renewed,
    Targets, TicketsWanted, from_broker, from_end,
};
use selvedge_proto::hello::Ticket;
use selvedge_proto::{identity, tls};
use tokio::net::TcpStream;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_rustls::client::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Streaming;
use tonic::transport::{Channel, Endpoint};
use tracing::{info, warn};

use crate::end::{End, Fence, PROTOCOL};
use crate::{clock, trust};

/// Messages that wait to be sent on one stream; a full queue is backpressure to whoever sends.
const OUTBOX: usize = 512;
/// A stream on which nothing came for so long is dropped.
const SILENCE_MAX: Duration = Duration::from_secs(3);
/// Questions that are open on one stream at once.
const PENDING_MAX: usize = 1024;
/// Tickets that are kept, whatever a broker sends.
const TICKETS_KEPT_MAX: usize = 32;
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
const TICK: Duration = Duration::from_secs(1);
const LEASE_ASKS_MAX: usize = 8;

/// Why a control stream did not begin, or ended.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No TCP connection.
    #[error("cannot connect: {0}")]
    Connect(#[source] io::Error),
    /// The TLS handshake failed; the edge closes without a word what it does not know.
    #[error("the handshake failed: {0}")]
    Handshake(#[source] io::Error),
    /// Nothing came in time.
    #[error("the broker was silent for too long")]
    Silent,
    /// The list names a host that is no name.
    #[error("`{0}` is not a server name")]
    Host(String),
    /// An identity cannot be made or read.
    #[error(transparent)]
    Identity(#[from] identity::Error),
    /// A TLS configuration cannot be made.
    #[error(transparent)]
    Tls(#[from] tls::Error),
    /// HTTP/2 could not begin.
    #[error("transport: {0}")]
    Transport(#[from] tonic::transport::Error),
    /// The broker ended the call with a status.
    #[error("the broker said `{code:?}`: {message}", code = .0.code(), message = .0.message())]
    Status(#[source] Box<tonic::Status>),
    /// The broker broke the protocol.
    #[error("the broker broke the protocol: {0}")]
    Protocol(&'static str),
    /// The broker serves other versions.
    #[error("the broker serves protocol versions {min} to {max}, this build speaks {}: upgrade", PROTOCOL.1)]
    Upgrade {
        /// Lowest version served.
        min: u32,
        /// Highest version served.
        max: u32,
    },
    /// The cluster has begun another epoch, and this broker has not.
    #[error("the broker is of an earlier epoch than the cluster")]
    Past,
    /// The stream has ended.
    #[error("the control stream has ended")]
    Closed,
    /// Too many questions are open.
    #[error("too many questions are open on the control stream")]
    Busy,
    /// A renewed certificate was refused or does not verify.
    #[error("renewal: {0}")]
    Renewal(String),
}

impl From<tonic::Status> for Error {
    fn from(status: tonic::Status) -> Self {
        Self::Status(Box::new(status))
    }
}

/// What a role has to do something about.
pub(crate) enum Event {
    /// The stream stands.
    Attached,
    /// A session for this connector.
    Dial(Box<Dial>),
    /// A session to be cut.
    Cut(Cut),
    /// What this connector should check.
    Targets(Targets),
    /// Tickets came.
    Tickets,
    /// The stream has ended.
    Detached,
}

/// Where a link's events go.
pub(crate) type Events = mpsc::Sender<(Arc<Link>, Event)>;

/// A broker's answer to one question.
#[derive(Debug)]
pub(crate) enum Answer {
    Opened(Box<Opened>),
    Refused(OpenRefused),
    Why(String),
    /// None when there is no such name.
    Resolved(Option<IpAddr>),
}

/// One attached control stream.
pub(crate) struct Link {
    pub(crate) broker: Broker,
    pub(crate) fence: Arc<Fence>,
    outbox: mpsc::Sender<FromEnd>,
    closed: CancellationToken,
    draining: AtomicBool,
    rtt_us: AtomicU64,
    tickets: Mutex<VecDeque<Ticket>>,
    tickets_came: Notify,
    tickets_wanted: usize,
    tickets_asked: AtomicU32,
    next_request: AtomicU64,
    /// None once the stream has ended.
    pending: Mutex<Option<BTreeMap<u64, oneshot::Sender<Answer>>>>,
    renewal: Mutex<Option<oneshot::Sender<Renewed>>>,
}

/// The receiving half of an attached stream.
pub(crate) struct Inbound {
    messages: Streaming<FromBroker>,
    /// The connection lives as long as this.
    _client: ControlClient<Channel>,
}

impl Link {
    /// Connects, attaches and exchanges `Hello`.
    pub(crate) async fn attach(
        end: &Arc<End>,
        broker: Broker,
        tickets_wanted: usize,
    ) -> Result<(Arc<Self>, Inbound), Error> {
        let (stream, rtt) = end.connect(&broker).await?;
        let (outbox, messages) = mpsc::channel(OUTBOX);
        let hello = FromEnd { message: Some(from_end::Message::Hello(end.hello())) };
        outbox.try_send(hello).map_err(|_| Error::Closed)?;
        let attach = async {
            let mut client = open_http2(stream).await?;
            let mut inbound = client.attach(ReceiverStream::new(messages)).await?.into_inner();
            let first = inbound.message().await?.ok_or(Error::Closed)?;
            let position = check_hello(first, &broker)?;
            if end.is_of_the_past(position.as_ref()) {
                return Err(Error::Past);
            }
            Ok::<_, Error>(Inbound { messages: inbound, _client: client })
        };
        let inbound = timeout(HELLO_TIMEOUT, attach).await.map_err(|_| Error::Silent)??;
        let link = Self {
            fence: end.fence(broker.node),
            broker,
            outbox,
            closed: CancellationToken::new(),
            draining: AtomicBool::new(false),
            rtt_us: AtomicU64::new(micros(rtt)),
            tickets: Mutex::new(VecDeque::new()),
            tickets_came: Notify::new(),
            tickets_wanted,
            tickets_asked: AtomicU32::new(0),
            next_request: AtomicU64::new(1),
            pending: Mutex::new(Some(BTreeMap::new())),
            renewal: Mutex::new(None),
        };
        Ok((Arc::new(link), inbound))
    }

    /// Serves the stream until it ends, and answers why.
    pub(crate) async fn serve(
        self: &Arc<Self>,
        end: &Arc<End>,
        mut inbound: Inbound,
        events: Option<&Events>,
    ) -> Error {
        self.tell(events, Event::Attached).await;
        self.ask_for_tickets();
        let error = match self.run(end, &mut inbound, events).await {
            Ok(()) => Error::Closed,
            Err(error) => error,
        };
        self.close();
        // Dropping the senders answers every open question.
        self.pending.lock().take();
        self.renewal.lock().take();
        self.tell(events, Event::Detached).await;
        error
    }

    async fn run(
        self: &Arc<Self>,
        end: &Arc<End>,
        inbound: &mut Inbound,
        events: Option<&Events>,
    ) -> Result<(), Error> {
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut heard = Instant::now();
        let mut pings: VecDeque<(u64, Instant)> = VecDeque::new();
        let mut lease_asks: VecDeque<(u64, u64)> = VecDeque::new();
        let mut nonce = 0;
        loop {
            let message = tokio::select! {
                () = self.closed.cancelled() => return Ok(()),
                _ = tick.tick() => {
                    if heard.elapsed() > SILENCE_MAX {
                        return Err(Error::Silent);
                    }
                    nonce += 1;
                    if pings.len() < 8 {
                        pings.push_back((nonce, Instant::now()));
                    }
                    self.try_send(from_end::Message::Ping(Ping { nonce }))?;
                    // A broker that had none to give answers nothing.
                    self.tickets_asked.store(0, Ordering::Release);
                    self.ask_for_tickets();
                    if self.fence.sessions() > 0 {
                        lease_asks.truncate(LEASE_ASKS_MAX);
                        lease_asks.push_front((nonce, clock::boot_ms()));
                        self.try_send(from_end::Message::LeaseAsk(LeaseAsk { nonce }))?;
                    }
                    continue;
                }
                message = inbound.messages.message() => message?.ok_or(Error::Closed)?,
            };
            heard = Instant::now();
            let Some(message) = message.message else { continue };
            match message {
                from_broker::Message::Ping(Ping { nonce }) => self.try_send(from_end::Message::Pong(Pong { nonce }))?,
                from_broker::Message::Pong(Pong { nonce }) => {
                    if let Some(at) = pings.iter().position(|(sent, _)| *sent == nonce) {
                        self.measured(pings[at].1.elapsed());
                        pings.drain(..=at);
                    }
                }
                from_broker::Message::LeaseLeft(left) => {
                    // From the moment of asking, which is never later than the broker's own reckoning.
                    if let Some((_, asked_ms)) = lease_asks.iter().find(|(nonce, _)| *nonce == left.nonce) {
                        self.fence.extend(asked_ms.saturating_add(left.left_ms));
                    }
                }
                other => self.take(end, other, events).await?,
            }
        }
    }

    async fn take(
        self: &Arc<Self>,
        end: &Arc<End>,
        message: from_broker::Message,
        events: Option<&Events>,
    ) -> Result<(), Error> {
        use from_broker::Message;
        match message {
            Message::Opened(opened) => self.answer(opened.request, Answer::Opened(Box::new(opened))),
            Message::OpenRefused(refused) => self.answer(refused.request, Answer::Refused(refused)),
            Message::WhyAnswer(why) => self.answer(why.request, Answer::Why(why.text)),
            Message::ResolveAnswer(resolved) => {
                self.answer(resolved.request, Answer::Resolved(address(&resolved.address)));
            }
            Message::Dial(dial) => self.tell(events, Event::Dial(Box::new(dial))).await,
            Message::Cut(cut) => self.tell(events, Event::Cut(cut)).await,
            Message::Targets(targets) => self.tell(events, Event::Targets(targets)).await,
            Message::Tickets(tickets) => {
                self.keep(&tickets.tickets);
                self.tell(events, Event::Tickets).await;
            }
            Message::Brokers(brokers) => end.take_brokers(&brokers),
            Message::KnockKeys(keys) => end.take_knock_keys(&keys),
            Message::Zones(zones) => drop(end.zones.send_replace(Some(zones))),
            Message::Renewed(renewed) => {
                if let Some(waiting) = self.renewal.lock().take() {
                    // Whoever asked may have stopped waiting.
                    let _ = waiting.send(renewed);
                }
            }
            Message::GoAway(away) => {
                info!(broker = self.broker.name, reason = away.reason, "the broker asks to go elsewhere");
                self.leave();
            }
            Message::Upgrade(upgrade) => {
                return Err(Error::Upgrade { min: upgrade.protocol_min, max: upgrade.protocol_max });
            }
            Message::Hello(_) => return Err(Error::Protocol("a second `Hello`")),
            Message::Ping(_) | Message::Pong(_) | Message::LeaseLeft(_) => {}
        }
        Ok(())
    }

    fn keep(&self, tickets: &[Vec<u8>]) {
        let mut kept = self.tickets.lock();
        kept.extend(tickets.iter().filter_map(|ticket| Ticket::from_bytes(ticket)));
        let excess = kept.len().saturating_sub(TICKETS_KEPT_MAX);
        kept.drain(..excess);
        self.tickets_asked.store(0, Ordering::Release);
        self.tickets_came.notify_waiters();
    }

    /// Sends a message, waiting for room.
    pub(crate) async fn send(&self, message: from_end::Message) -> Result<(), Error> {
        tokio::select! {
            () = self.closed.cancelled() => Err(Error::Closed),
            sent = self.outbox.send(FromEnd { message: Some(message) }) => sent.map_err(|_| Error::Closed),
        }
    }

    /// Sends a message if there is room.
    pub(crate) fn try_send(&self, message: from_end::Message) -> Result<(), Error> {
        if self.closed.is_cancelled() {
            return Err(Error::Closed);
        }
        self.outbox.try_send(FromEnd { message: Some(message) }).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => Error::Busy,
            mpsc::error::TrySendError::Closed(_) => Error::Closed,
        })
    }

    /// Sends a question, made with the number it will be answered under.
    pub(crate) fn ask(
        &self,
        question: impl FnOnce(u64) -> from_end::Message,
    ) -> Result<oneshot::Receiver<Answer>, Error> {
        let request = self.next_request.fetch_add(1, Ordering::Relaxed);
        let (sender, receiver) = oneshot::channel();
        {
            let mut pending = self.pending.lock();
            let pending = pending.as_mut().ok_or(Error::Closed)?;
            if pending.len() >= PENDING_MAX {
                pending.retain(|_, waiting| !waiting.is_closed());
            }
            if pending.len() >= PENDING_MAX {
                return Err(Error::Busy);
            }
            pending.insert(request, sender);
        }
        self.try_send(question(request)).inspect_err(|_| {
            if let Some(pending) = self.pending.lock().as_mut() {
                pending.remove(&request);
            }
        })?;
        Ok(receiver)
    }

    /// The oldest unused ticket, waiting for one to come.
    pub(crate) async fn ticket(&self) -> Result<Ticket, Error> {
        loop {
            let came = self.tickets_came.notified();
            if let Some(ticket) = self.take_ticket() {
                return Ok(ticket);
            }
            tokio::select! {
                () = self.closed.cancelled() => return Err(Error::Closed),
                () = came => {}
            }
        }
    }

    /// The oldest unused ticket, if there is one.
    pub(crate) fn take_ticket(&self) -> Option<Ticket> {
        let ticket = self.tickets.lock().pop_front();
        self.ask_for_tickets();
        ticket
    }

    /// Asks for tickets when fewer than half of what is wanted are left.
    pub(crate) fn ask_for_tickets(&self) {
        let have = self.tickets.lock().len();
        if self.tickets_wanted == 0 || have * 2 > self.tickets_wanted {
            return;
        }
        let count = u32::try_from(self.tickets_wanted - have).unwrap_or(1);
        if self.tickets_asked.compare_exchange(0, count, Ordering::AcqRel, Ordering::Acquire).is_ok()
            && self.try_send(from_end::Message::TicketsWanted(TicketsWanted { count })).is_err()
        {
            self.tickets_asked.store(0, Ordering::Release);
        }
    }

    /// Asks for a certificate for a new key and takes it into use.
    pub(crate) async fn renew(&self, end: &Arc<End>, within: Duration) -> Result<(), Error> {
        let (key_pem, csr) = tls::new_key_and_csr()?;
        let (sender, receiver) = oneshot::channel();
        *self.renewal.lock() = Some(sender);
        self.send(from_end::Message::Renew(Renew { csr })).await?;
        let renewed = timeout(within, receiver).await.map_err(|_| Error::Silent)?.map_err(|_| Error::Closed)?;
        if renewed.chain.is_empty() {
            return Err(Error::Renewal(renewed.error));
        }
        let chain: Vec<_> = renewed.chain.into_iter().map(CertificateDer::from).collect();
        trust::verify_own(&end.anchors, &chain, &end.spiffe, clock::unix_ms())
            .map_err(|error| Error::Renewal(error.to_string()))?;
        let key = PrivateKeyDer::from_pem_slice(key_pem.as_bytes()).map_err(|_| tls::Error::Pem("no private key"))?;
        end.take_identity(tls::Identity::new(chain, key)?, renewed.grant)?;
        Ok(())
    }

    /// Ends the stream.
    pub(crate) fn close(&self) {
        self.closed.cancel();
    }

    /// Asks for no new sessions here: the broker goes.
    pub(crate) fn leave(&self) {
        self.draining.store(true, Ordering::Release);
    }

    /// Whether new sessions may use it.
    pub(crate) fn is_usable(&self) -> bool {
        !self.closed.is_cancelled() && !self.draining.load(Ordering::Acquire)
    }

    /// The smoothed round trip.
    pub(crate) fn rtt_us(&self) -> u64 {
        self.rtt_us.load(Ordering::Relaxed)
    }

    fn measured(&self, sample: Duration) {
        let old = self.rtt_us();
        self.rtt_us.store((old * 7 + micros(sample)) / 8, Ordering::Relaxed);
    }

    fn answer(&self, request: u64, answer: Answer) {
        let waiting = self.pending.lock().as_mut().and_then(|pending| pending.remove(&request));
        // Whoever asked may have stopped waiting; the broker's own deadlines tidy up.
        let _ = waiting.map(|waiting| waiting.send(answer));
    }

    async fn tell(self: &Arc<Self>, events: Option<&Events>, event: Event) {
        if let Some(events) = events {
            // Closed only when the role is being stopped.
            let _ = events.send((self.clone(), event)).await;
        }
    }
}

async fn open_http2(stream: TlsStream<TcpStream>) -> Result<ControlClient<Channel>, Error> {
    let stream = Mutex::new(Some(TokioIo::new(stream)));
    let once = tower::service_fn(move |_| {
        let stream = stream.lock().take().ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected));
        async move { stream }
    });
    // The name is not used: TLS is below, and was verified.
    let channel = Endpoint::from_static("http://broker").tcp_nodelay(true).connect_with_connector(once).await?;
    Ok(ControlClient::new(channel))
}

/// Answers where the broker's log stands.
fn check_hello(first: FromBroker, broker: &Broker) -> Result<Option<Position>, Error> {
    match first.message {
        Some(from_broker::Message::Hello(hello)) => {
            if hello.protocol_max < PROTOCOL.0 || hello.protocol_min > PROTOCOL.1 {
                return Err(Error::Upgrade { min: hello.protocol_min, max: hello.protocol_max });
            }
            if hello.node != broker.node {
                warn!(expected = broker.node, found = hello.node, "a broker with another node id");
                return Err(Error::Protocol("`Hello` of another node"));
            }
            Ok(hello.position)
        }
        Some(from_broker::Message::Upgrade(upgrade)) => {
            Err(Error::Upgrade { min: upgrade.protocol_min, max: upgrade.protocol_max })
        }
        _ => Err(Error::Protocol("no `Hello`")),
    }
}

/// 4 or 16 bytes.
fn address(bytes: &[u8]) -> Option<IpAddr> {
    let four = || <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    <[u8; 16]>::try_from(bytes).map(IpAddr::from).or_else(|_| four()).ok()
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX).max(1)
}
