//! One session at the connector: application and hop are opened at once, the hop's end-to-end handshake is answered,
//! and bytes are moved until an end.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use selvedge_domain::name::Host;
use selvedge_proto::control::{Broker, Dial, DialAnswer, HopFailed, SessionEnded, from_end};
use selvedge_proto::frame::{FRAME_VERSION, Frame, SessionCode, Start, Started, Transport, read_frame, write_frame};
use selvedge_proto::hello::Ticket;
use selvedge_proto::identity::SpiffeId;
use selvedge_proto::tls;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::server::TlsStream;
use tracing::{Instrument as _, debug, debug_span, info_span};

use super::{Entry, Role, parked, session_id, udp};
use crate::copy::{self, Counts, Ended, Limits};
use crate::end::Fenced;
use crate::link::Link;
use crate::{clock, dial, metrics, trace};

/// Longest time an application and a hop have to stand, whatever the broker says.
const READY_MAX: Duration = Duration::from_secs(2);
/// From the answer to the dial to the end of the handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
const START_TIMEOUT: Duration = Duration::from_secs(3);

/// Serves one `Dial` to its end.
pub(super) async fn run(role: Arc<Role>, link: Arc<Link>, dial: Dial) {
    let span = info_span!("connector.session", session = %hex::encode(&dial.session), principal = dial.principal, traceparent = dial.traceparent);
    trace::follow(&span, &dial.traceparent);
    serve(role, link, dial).instrument(span).await;
}

async fn serve(role: Arc<Role>, link: Arc<Link>, dial: Dial) {
    let session = dial.session.clone();
    let request = match Request::parse(dial) {
        Ok(request) => request,
        Err(what) => {
            debug!(what, "a malformed `Dial`");
            return answer(&link, session, SessionCode::ProtocolError, 0).await;
        }
    };
    let Some(entry) = role.enter(request.session) else {
        return answer(&link, session, SessionCode::ProtocolError, 0).await;
    };
    let fence = role.end.fence(request.broker.node);
    fence.open_by_dial(clock::boot_ms(), request.lease_left_ms);
    let fence = fence.enter();
    if role.links.to(request.broker.node).is_none() {
        role.links.demand(&request.broker);
    }
    let counts = Counts::default();
    // Whatever it holds is closed when this is over, before `done` says so.
    let outcome = join(&role, &link, &request, &entry, &fence, &counts).await;
    role.leave(request.session, &entry);
    drop(fence);

    let (up, down) = (counts.back.load(Ordering::Relaxed), counts.forth.load(Ordering::Relaxed));
    ::metrics::counter!(metrics::BYTES, "direction" => "up").increment(up);
    ::metrics::counter!(metrics::BYTES, "direction" => "down").increment(down);
    let code = outcome.code();
    ::metrics::counter!(metrics::SESSIONS_ENDED, "code" => code.as_str()).increment(1);
    debug!(%code, up, down, "session ended");
    let told = match outcome {
        Outcome::Ended(code) => {
            let code = code as u32;
            from_end::Message::SessionEnded(SessionEnded { session, code, up_bytes: up, down_bytes: down })
        }
        Outcome::NotJoined(code) => from_end::Message::HopFailed(HopFailed { session, code: code as u32 }),
        Outcome::NotReady(_) | Outcome::Cut => return,
    };
    let link = role.links.to(request.broker.node).unwrap_or(link);
    // A stream that is gone cannot be told.
    let _ = link.send(told).await;
}

enum Outcome {
    /// Application or hop could not be had; the broker was told.
    NotReady(SessionCode),
    /// Client and connector did not come together.
    NotJoined(SessionCode),
    /// It was cut before bytes moved.
    Cut,
    /// It ran, and ended; `Unspecified` means in order.
    Ended(SessionCode),
}

impl Outcome {
    fn code(&self) -> SessionCode {
        match self {
            Self::NotReady(code) | Self::NotJoined(code) | Self::Ended(code) => *code,
            Self::Cut => SessionCode::Revoked,
        }
    }
}

/// What a `Dial` asks for, parsed.
struct Request {
    session: u128,
    ticket: Ticket,
    is_parked: bool,
    broker: Broker,
    host: Host,
    port: u16,
    transport: Transport,
    presenter: SpiffeId,
    lease_left_ms: u64,
    ready: Duration,
    idle: Option<Duration>,
}

impl Request {
    fn parse(dial: Dial) -> Result<Self, &'static str> {
        let deadline = Duration::from_millis(dial.deadline_ms);
        Ok(Self {
            session: session_id(&dial.session).ok_or("session")?,
            ticket: Ticket::from_bytes(&dial.ticket).ok_or("ticket")?,
            is_parked: dial.parked,
            broker: dial.broker.ok_or("broker")?,
            host: Host::parse(&dial.host).map_err(|_| "host")?,
            port: u16::try_from(dial.port).ok().filter(|port| *port > 0).ok_or("port")?,
            transport: match dial.transport {
                0 => Transport::Tcp,
                1 => Transport::Udp,
                _ => return Err("transport"),
            },
            presenter: dial.presenter.parse().map_err(|_| "presenter")?,
            lease_left_ms: dial.lease_left_ms,
            ready: if deadline.is_zero() { READY_MAX } else { deadline.min(READY_MAX) },
            idle: (dial.idle_ms > 0).then(|| Duration::from_millis(dial.idle_ms)),
        })
    }

    fn agrees_with(&self, start: &Start) -> bool {
        start.session == self.session
            && start.transport == self.transport
            && start.port == self.port
            && Host::parse(&start.host).is_ok_and(|host| host == self.host)
    }
}

/// The application's side of a session.
enum App {
    Tcp(TcpStream),
    Udp(SocketAddr),
}

async fn join(role: &Role, link: &Link, request: &Request, entry: &Entry, fence: &Fenced, counts: &Counts) -> Outcome {
    let ready = tokio::select! {
        () = entry.cut.cancelled() => return Outcome::Cut,
        ready = timeout(request.ready, open(role, request)) => ready.unwrap_or(Err(SessionCode::AppTimeout)),
    };
    let session = request.session.to_be_bytes().to_vec();
    let (mut app, hop, app_rtt_us) = match ready {
        Ok(ready) => ready,
        Err(code) => {
            answer(link, session, code, 0).await;
            return Outcome::NotReady(code);
        }
    };
    if let App::Tcp(app) = &app {
        // Until a session's bytes end in order, closing is a reset.
        dial::reset_on_close(app);
    }
    answer(link, session, SessionCode::Unspecified, app_rtt_us).await;
    let accepted = tokio::select! {
        () = entry.cut.cancelled() => return Outcome::Cut,
        accepted = accept(role, request, hop).instrument(debug_span!("connector.handshake")) => accepted,
    };
    let mut hop = match accepted {
        Ok(hop) => hop,
        Err(code) => return Outcome::NotJoined(code),
    };
    let limits = Limits { cut: Some(&entry.cut), fence: Some((fence, role.hold)), idle: request.idle };
    let ended = match &mut app {
        App::Tcp(app) => copy::pump(app, &mut hop, counts, limits).await,
        App::Udp(address) => udp::pump(*address, &mut hop, counts, limits).await,
    };
    let code = match &ended {
        Ended::Clean => {
            if let App::Tcp(app) = &app {
                dial::close_in_order(app);
            }
            return Outcome::Ended(SessionCode::Unspecified);
        }
        Ended::First(_) | Ended::Second(_) => SessionCode::PeerGone,
        Ended::Cut => SessionCode::Revoked,
        Ended::LeaseOver => SessionCode::LeaseOver,
        Ended::Idle => SessionCode::Expired,
    };
    debug!(%ended, "both sides are reset");
    dial::reset_on_close(hop.get_ref().0);
    Outcome::Ended(code)
}

/// Opens application and hop at once, after the allow list was asked.
async fn open(role: &Role, request: &Request) -> Result<(App, TcpStream, u64), SessionCode> {
    let address = role.permitted(&request.host, request.port).await?;
    let app = async {
        if request.transport == Transport::Udp {
            return Ok((App::Udp(address), 0));
        }
        let began = Instant::now();
        let span = debug_span!("connector.app_connect");
        let stream =
            dial::application(address, request.ready).instrument(span).await.map_err(|error| app_code(&error))?;
        let rtt_us = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX).max(1);
        Ok((App::Tcp(stream), rtt_us))
    };
    let hop = async {
        let parked = request.is_parked.then(|| role.parked.take(request.broker.node, &request.ticket)).flatten();
        match parked {
            Some(stream) => Ok(stream),
            None if request.is_parked => Err(SessionCode::HopTimeout),
            None => parked::open(&role.end.via, &request.broker, &request.ticket).await.map_err(|error| {
                debug!(%error, "no hop");
                SessionCode::HopTimeout
            }),
        }
    };
    let hop = hop.instrument(debug_span!("connector.dial", broker = request.broker.node, parked = request.is_parked));
    let ((app, rtt_us), hop) = tokio::try_join!(app, hop)?;
    Ok((app, hop, rtt_us))
}

/// Answers the end-to-end handshake and the first frame.
async fn accept(role: &Role, request: &Request, hop: TcpStream) -> Result<TlsStream<TcpStream>, SessionCode> {
    let acceptor = role.acceptor().map_err(|error| {
        tracing::warn!(%error, "this connector's identity cannot be used");
        SessionCode::Internal
    })?;
    let mut hop = timeout(HANDSHAKE_TIMEOUT, acceptor.accept(hop))
        .await
        .map_err(|_| SessionCode::HandshakeFailed)?
        .map_err(|error| {
            debug!(%error, "end-to-end handshake");
            SessionCode::HandshakeFailed
        })?;
    let peer = tls::peer_of(hop.get_ref().1).map_err(|_| SessionCode::HandshakeFailed)?;
    if peer.id != request.presenter {
        return fail(hop, SessionCode::WrongPeer).await;
    }
    let start = match timeout(START_TIMEOUT, read_frame(&mut hop)).await {
        Ok(Ok(Frame::Start(start))) => start,
        Ok(Ok(_)) => return fail(hop, SessionCode::ProtocolError).await,
        Ok(Err(error)) => {
            debug!(%error, "no `Start`");
            return fail(hop, SessionCode::ProtocolError).await;
        }
        Err(_) => return fail(hop, SessionCode::ProtocolError).await,
    };
    if !request.agrees_with(&start) {
        return fail(hop, SessionCode::StartMismatch).await;
    }
    let started = Started { version: FRAME_VERSION.min(start.version), session: request.session, features: 0 };
    write_frame(&mut hop, &Frame::Started(started)).await.map_err(|_| SessionCode::PeerGone)?;
    Ok(hop)
}

/// Tells the client, as far as it still listens, and answers the code.
async fn fail<T>(mut hop: TlsStream<TcpStream>, code: SessionCode) -> Result<T, SessionCode> {
    use tokio::io::AsyncWriteExt as _;
    let tell = async {
        write_frame(&mut hop, &Frame::Failed { code }).await.ok()?;
        hop.shutdown().await.ok()
    };
    // Telling is a courtesy; the code goes to the broker in any case.
    let _ = timeout(Duration::from_secs(1), tell).await;
    Err(code)
}

async fn answer(link: &Link, session: Vec<u8>, code: SessionCode, app_rtt_us: u64) {
    let answer = DialAnswer { session, code: code as u32, app_rtt_us };
    // A stream that is gone cannot be told.
    let _ = link.send(from_end::Message::DialAnswer(answer)).await;
}

fn app_code(error: &io::Error) -> SessionCode {
    match error.kind() {
        io::ErrorKind::ConnectionRefused | io::ErrorKind::ConnectionReset => SessionCode::AppRefused,
        io::ErrorKind::TimedOut => SessionCode::AppTimeout,
        _ => SessionCode::AppUnreachable,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dial() -> Dial {
        Dial {
            session: vec![1; 16],
            ticket: vec![2; 32],
            broker: Some(Broker::default()),
            host: "CRM.internal.".into(),
            port: 8080,
            presenter: "spiffe://td/client/1-2".into(),
            ..Dial::default()
        }
    }

    fn start() -> Start {
        Start {
            version: 1,
            session: u128::from_be_bytes([1; 16]),
            transport: Transport::Tcp,
            host: "crm.internal".into(),
            port: 8080,
            features: 0,
        }
    }

    #[test]
    fn a_start_that_says_anything_else_than_the_dial_does_not_agree() {
        let request = Request::parse(dial()).unwrap();
        assert!(request.agrees_with(&start()));
        assert!(!request.agrees_with(&Start { session: 7, ..start() }));
        assert!(!request.agrees_with(&Start { port: 8081, ..start() }));
        assert!(!request.agrees_with(&Start { host: "erp.internal".into(), ..start() }));
        assert!(!request.agrees_with(&Start { transport: Transport::Udp, ..start() }));
    }

    #[test]
    fn a_malformed_dial_says_what_is_wrong() {
        type Change = fn(&mut Dial);
        let cases: [(Change, &str); 7] = [
            (|dial| dial.session.truncate(3), "session"),
            (|dial| dial.ticket.clear(), "ticket"),
            (|dial| dial.broker = None, "broker"),
            (|dial| dial.host = " ".into(), "host"),
            (|dial| dial.port = 65_536, "port"),
            (|dial| dial.transport = 2, "transport"),
            (|dial| dial.presenter = "user/1".into(), "presenter"),
        ];
        for (change, what) in cases {
            let mut dial = dial();
            change(&mut dial);
            assert_eq!(Request::parse(dial).err(), Some(what));
        }
    }
}
