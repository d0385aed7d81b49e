//! `Control.Attach`: one stream for as long as an end is attached.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use selvedge_domain::{Id, State};
use selvedge_proto::control::from_broker::Message as Out;
use selvedge_proto::control::from_end::Message as In;
use selvedge_proto::control::{
    self as wire, FromBroker, FromEnd, Hello, LeaseLeft, Ping, Pong, Renewed, Upgrade, WhyAnswer, control_server,
};
use selvedge_proto::frame::SessionCode;
use selvedge_proto::identity::Kind;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::ends::{CONTROL_QUEUE_MAX, End, Refused};
use super::standing::{Caller, Login};
use super::stream::Attached;
use super::{Edge, dial, metrics, opens, push, resolve};

/// The versions of the control protocol that this build speaks.
pub const PROTOCOL: std::ops::RangeInclusive<u32> = 1..=1;
/// The first message must be there by then.
pub const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
/// Between two pings.
pub const PING_INTERVAL: Duration = Duration::from_secs(2);
/// A stream on which no pong came for so long is closed.
pub const PONG_TIMEOUT: Duration = Duration::from_secs(9);
/// After its end, a stream's connection may live so long for what is still to be sent.
const LINGER: Duration = Duration::from_millis(500);
/// Bytes of a certificate request.
const CSR_BYTES_MAX: usize = 8 * 1024;

/// The service on control connections.
pub(super) struct ControlService(pub(super) Arc<Edge>);

#[tonic::async_trait]
impl control_server::Control for ControlService {
    type AttachStream = ReceiverStream<Result<FromBroker, Status>>;

    async fn attach(&self, request: Request<Streaming<FromEnd>>) -> Result<Response<Self::AttachStream>, Status> {
        let attached = request.extensions().get::<Attached>().cloned();
        let attached = attached.ok_or_else(|| Status::unauthenticated("not an edge connection"))?;
        let (out, sent) = mpsc::channel(CONTROL_QUEUE_MAX);
        tokio::spawn(serve(self.0.clone(), attached, request.into_inner(), out));
        Ok(Response::new(ReceiverStream::new(sent)))
    }
}

async fn serve(
    edge: Arc<Edge>,
    attached: Attached,
    mut incoming: Streaming<FromEnd>,
    out: mpsc::Sender<Result<FromBroker, Status>>,
) {
    let (connection, source) = (attached.connection.clone(), attached.source);
    match greet(&edge, attached, &mut incoming, out).await {
        Ok(end) => {
            tracing::debug!(end = %end.peer.id, %source, stream = end.number, "a control stream is attached");
            let link = Link::default();
            run(&edge, &end, &link, &mut incoming).await;
            detach(&edge, &end);
        }
        Err(why) => metrics::control_closed(why),
    }
    tokio::time::sleep(LINGER).await;
    connection.cancel();
}

/// Both hellos; then the end is attached and has been told what it needs.
async fn greet(
    edge: &Arc<Edge>,
    attached: Attached,
    incoming: &mut Streaming<FromEnd>,
    out: mpsc::Sender<Result<FromBroker, Status>>,
) -> Result<Arc<End>, &'static str> {
    let first = tokio::time::timeout(HELLO_TIMEOUT, incoming.message()).await.map_err(|_| "no_hello")?;
    let Ok(Some(FromEnd { message: Some(In::Hello(hello)) })) = first else { return Err("no_hello") };
    let answer = |message| {
        // A queue with no reader is a stream that is over.
        let _ = out.try_send(Ok(FromBroker { message: Some(message) }));
    };
    if hello.protocol_min > *PROTOCOL.end() || hello.protocol_max < *PROTOCOL.start() {
        answer(Out::Upgrade(Upgrade { protocol_min: *PROTOCOL.start(), protocol_max: *PROTOCOL.end() }));
        return Err("upgrade");
    }
    let kind = attached.peer.id.kind();
    if hello.role != kind.as_str() {
        return Err("wrong_role");
    }
    let state = edge.ground.state();
    let now_ms = edge.ground.now_ms();
    let login = match kind {
        Kind::Client => Login::of(&hello.grants, &attached.peer, &edge.anchors, now_ms),
        _ => None,
    };
    let (login, grant) = login.unzip();
    let caller = Caller::new(&attached.peer, attached.subject, login, attached.source.ip());
    let end = End::new(
        edge.ends.next_key(),
        attached.peer,
        attached.subject,
        hello.stream,
        caller,
        grant,
        attached.connection.child_token(),
        out.clone(),
    );
    answer(Out::Hello(own_hello(edge, &state, hello.stream)));
    edge.tickets.open_stream(end.key);
    if let Err(refused) = edge.ends.attach(&end, edge.limits()) {
        edge.tickets.close_stream(end.key);
        let why = match refused {
            Refused::Older => "older",
            Refused::Full => "full",
        };
        end.close(why);
        return Err(why);
    }
    // Attached before it is checked once more, so that a revocation either is in this state or finds the end.
    if let Err(unfit) = super::standing::check(&edge.ground.state(), &end.peer, now_ms) {
        end.close(unfit.as_str());
    }
    edge.tell_of_drain(&end);
    if kind == Kind::Connector {
        edge.routing.attach(end.subject, end.number);
        end.send_tickets(edge.tickets.mint_parking(end.key));
    } else {
        end.send_tickets(edge.tickets.mint(end.key));
    }
    Ok(end)
}

fn own_hello(edge: &Edge, state: &State, stream: u64) -> Hello {
    Hello {
        protocol_min: *PROTOCOL.start(),
        protocol_max: *PROTOCOL.end(),
        build: env!("CARGO_PKG_VERSION").into(),
        role: Kind::Broker.as_str().into(),
        position: Some(position(state.position())),
        stream,
        node: edge.ground.node(),
        name: edge.name.clone(),
        ..Hello::default()
    }
}

pub(super) fn position(id: Id) -> wire::Position {
    wire::Position { epoch: id.epoch, seq: id.seq }
}

fn detach(edge: &Arc<Edge>, end: &Arc<End>) {
    end.closed.cancel();
    edge.ends.detach(end);
    edge.tickets.close_stream(end.key);
    match end.kind() {
        Kind::Connector => edge.routing.detach(end.subject, end.number),
        _ => edge.routing.end_gone(&end.peer.id.to_string()),
    }
    metrics::control_closed(end.why_closed());
    tracing::debug!(end = %end.peer.id, stream = end.number, why = end.why_closed(), "a control stream ended");
}

/// Pings of one stream.
#[derive(Default)]
struct Link {
    nonce: AtomicU64,
    asked: Mutex<Option<Instant>>,
}

impl Link {
    fn ping(&self) -> Ping {
        *self.asked.lock() = Some(Instant::now());
        Ping { nonce: self.nonce.fetch_add(1, Ordering::Relaxed) + 1 }
    }

    /// The RTT, when the pong answers the last ping.
    fn pong(&self, nonce: u64) -> Option<Duration> {
        if nonce != self.nonce.load(Ordering::Relaxed) {
            return None;
        }
        self.asked.lock().take().map(|at| at.elapsed())
    }
}

async fn run(edge: &Arc<Edge>, end: &Arc<End>, link: &Link, incoming: &mut Streaming<FromEnd>) {
    let mut states = edge.ground.subscribe();
    let mut lists = edge.brokers.subscribe();
    lists.mark_changed();
    states.mark_changed();
    let mut told = push::Told::default();
    let mut pings = tokio::time::interval(PING_INTERVAL);
    pings.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut heard = Instant::now();
    loop {
        tokio::select! {
            () = end.closed.cancelled() => return,
            message = incoming.message() => match message {
                Ok(Some(FromEnd { message: Some(message) })) => {
                    if let In::Pong(pong) = &message
                        && let Some(rtt) = link.pong(pong.nonce)
                    {
                        heard = Instant::now();
                        match end.kind() {
                            Kind::Connector => edge.routing.connector_answered(end.subject, rtt),
                            _ => edge.routing.end_answered(&end.peer.id.to_string(), rtt),
                        }
                    }
                    take(edge, end, message);
                }
                // A message of a later version is passed over.
                Ok(Some(FromEnd { message: None })) => {}
                Ok(None) => return end.close("gone"),
                Err(status) => {
                    tracing::debug!(end = %end.peer.id, %status, "a control stream failed");
                    return end.close("failed");
                }
            },
            _ = pings.tick() => {
                if heard.elapsed() > PONG_TIMEOUT {
                    return end.close("silent");
                }
                end.send(Out::Ping(link.ping()));
                told.refresh_keys(edge, end);
            }
            changed = lists.changed() => if changed.is_ok() {
                let list = lists.borrow_and_update().clone();
                if let Some(list) = list {
                    end.send(Out::Brokers(list));
                }
            },
            changed = states.changed() => if changed.is_ok() {
                let state = states.borrow_and_update().clone();
                told.refresh(edge, end, &state);
            },
        }
    }
}

/// What an end asks or answers. Nothing here waits: what takes time runs in a task of its own.
fn take(edge: &Arc<Edge>, end: &Arc<End>, message: In) {
    let is_connector = end.kind() == Kind::Connector;
    match message {
        In::Hello(_) => end.close("second_hello"),
        In::Ping(Ping { nonce }) => {
            end.send(Out::Pong(Pong { nonce }));
        }
        In::Pong(_) => {}
        In::LeaseAsk(ask) => {
            // Ends that are no connectors owe nothing.
            let left_ms = edge.lease_left_for(end.subject);
            end.send(Out::LeaseLeft(LeaseLeft { nonce: ask.nonce, left_ms }));
        }
        In::Health(health) if is_connector => edge.routing.health(end.subject, &health),
        In::DialAnswer(answer) if is_connector => edge.dials.answered(end.subject, &answer),
        In::CutDone(done) if is_connector => edge.dials.cut_done(end.subject, &done.session),
        In::TicketsWanted(_) if is_connector => end.send_tickets(edge.tickets.mint_parking(end.key)),
        In::TicketsWanted(_) => end.send_tickets(edge.tickets.mint(end.key)),
        In::Resolve(ask) if !is_connector => {
            tokio::spawn(resolve::resolve(edge.clone(), end.clone(), ask));
        }
        In::Open(open) if !is_connector => opens::open(edge, end, open),
        In::Why(ask) if !is_connector => {
            let text = resolve::why(edge, end, &ask);
            end.send(Out::WhyAnswer(WhyAnswer { request: ask.request, text }));
        }
        In::HopFailed(failed) => hop_failed(edge, end, &failed),
        In::SessionEnded(ended) => {
            tracing::trace!(end = %end.peer.id, up = ended.up_bytes, down = ended.down_bytes, "an end says a session is over");
        }
        In::Renew(renew) => {
            tokio::spawn(renewal(edge.clone(), end.clone(), renew.csr));
        }
        In::Health(_) | In::DialAnswer(_) | In::CutDone(_) | In::Resolve(_) | In::Open(_) | In::Why(_) => {
            end.close("wrong_role");
        }
    }
}

/// Only a party of the session may say how it failed.
fn hop_failed(edge: &Edge, end: &End, failed: &wire::HopFailed) {
    let code = SessionCode::from_wire(failed.code as i32);
    let Some(session) = dial::session_id(&failed.session).and_then(|id| edge.sessions.find(id)) else { return };
    let party = match end.kind() {
        Kind::Connector => session.connector() == Some(end.subject),
        _ => session.caller.peer.id == end.peer.id,
    };
    if party {
        tracing::info!(session = session.name(), by = %end.peer.id, %code, "a hop failed");
        session.report(code);
    }
}

/// Certifies a new key of an end that is attached, and gives a person's login to it.
async fn renewal(edge: Arc<Edge>, end: Arc<End>, csr: Vec<u8>) {
    let renewed = match renew(&edge, &end, &csr).await {
        Ok((chain, grant)) => Renewed { chain, error: String::new(), grant },
        Err(error) => {
            tracing::info!(end = %end.peer.id, error, "a certificate was not renewed");
            Renewed { error, ..Renewed::default() }
        }
    };
    end.send(Out::Renewed(renewed));
}

async fn renew(edge: &Edge, end: &End, csr: &[u8]) -> Result<(Vec<Vec<u8>>, Vec<u8>), String> {
    use selvedge_domain::command::Subject;
    let Some(issuer) = &edge.issuer else { return Err("this broker is no issuer".into()) };
    if csr.len() > CSR_BYTES_MAX {
        return Err("the request is too long".into());
    }
    let now_ms = edge.ground.now_ms();
    super::standing::check(&edge.ground.state(), &end.peer, now_ms).map_err(|unfit| unfit.as_str().to_owned())?;
    let issued = issuer
        .issue(end.kind(), &end.subject.to_string(), csr, now_ms)
        .map_err(|_| "the request was refused".to_owned())?;
    let of = match end.kind() {
        Kind::Client => Subject::Device(end.subject),
        Kind::Workload => Subject::Workload(end.subject),
        _ => Subject::Connector(end.subject),
    };
    edge.ground.propose(issued.command(of)).await?;
    let grant = match end.login_grant() {
        // The same login, bound to the new key: nothing else of it changes.
        Some(grant) => {
            let bound = wire::LoginGrant { device_key_sha256: issued.spki_sha256.to_vec(), ..grant };
            selvedge_proto::grant::sign(&bound, |bytes| issuer.sign_grant(bytes))
                .map_err(|_| "the grant was not signed")?
        }
        None => Vec::new(),
    };
    Ok((issued.chain.iter().map(|certificate| certificate.to_vec()).collect(), grant))
}
