//! One session attempt: `Open` on a control stream and the hop's ClientHello at the same moment, then the end-to-end
//! handshake with the connector that the broker names.

use std::io;
use std::time::Duration;

use selvedge_domain::name::Host;
use selvedge_proto::control::{OpenRefused, Opened};
use selvedge_proto::frame::{FRAME_VERSION, Frame, SessionCode, Start, Transport, write_frame};
use selvedge_proto::identity::Kind;
use selvedge_proto::tls;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::client::TlsStream;
use tracing::{Instrument as _, debug, debug_span, info_span};

use super::source::{Begun, Verdict, Wish};
use super::{Client, Error, Source, Tunnel};
use crate::{dial, end, metrics, trace};

/// Longest time for one broker: it tries two connectors for 2 s each.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(6);
/// Brokers that are asked for one session, one after the other.
const ATTEMPTS_MAX: usize = 3;
/// When the hop stands or has failed, the broker's answer is on its way.
const ANSWER_GRACE: Duration = Duration::from_secs(1);

/// How an attempt failed.
enum Failure {
    /// For good.
    Final(Error),
    /// Another broker may do better.
    Retry(u64, Error),
}

/// Opens a session, with more attempts through other brokers when the first fails before any byte.
pub(super) async fn open(client: &Client, host: &str, port: u16, transport: Transport) -> Result<Tunnel, Error> {
    let no_such_name = || Error::NoSuchName(host.to_owned());
    let name = Host::parse(host).map_err(|_| no_such_name())?.to_string();
    if port == 0 {
        return Err(no_such_name());
    }
    let (mut avoid, mut left) = (None, ATTEMPTS_MAX);
    let outcome = loop {
        left -= 1;
        match once(client, &name, port, transport, avoid).await {
            Err(Failure::Retry(node, error)) if left > 0 => {
                debug!(node, %error, "trying another broker");
                avoid = Some(node);
            }
            Err(Failure::Final(error) | Failure::Retry(_, error)) => break Err(error),
            Ok(tunnel) => break Ok(tunnel),
        }
    };
    let code = match &outcome {
        Ok(_) => "opened",
        Err(Error::NoSuchName(_)) => "no_such_name",
        Err(Error::Session { code, .. }) => code.as_str(),
        Err(_) => "failed",
    };
    if outcome.is_err() {
        ::metrics::counter!(metrics::SESSIONS_ENDED, "code" => code).increment(1);
    }
    outcome
}

async fn once(
    client: &Client,
    host: &str,
    port: u16,
    transport: Transport,
    avoid: Option<u64>,
) -> Result<Tunnel, Failure> {
    let span = info_span!("session.attempt", traceparent = tracing::field::Empty, session = tracing::field::Empty);
    let traceparent = trace::traceparent(&span);
    span.record("traceparent", &traceparent);
    let initiator = if client.0.spiffe.kind() == Kind::Workload { "workload" } else { "person" };
    let wish = Wish {
        host: host.to_owned(),
        port,
        transport: match transport {
            Transport::Tcp => 0,
            Transport::Udp => 1,
        },
        traceparent,
        initiator: initiator.to_owned(),
    };
    attempt(client, &wish, transport, avoid).instrument(span).await
}

async fn attempt(client: &Client, wish: &Wish, transport: Transport, avoid: Option<u64>) -> Result<Tunnel, Failure> {
    let begun = match client.source().await.map_err(Failure::Final)? {
        Source::Own(own) => own.begin(wish, avoid).await,
        Source::Guest => client.guest().await.map_err(Failure::Final)?.begin(wish, avoid).await,
    };
    let begun = begun.map_err(Failure::Final)?;
    let node = begun.broker.node;
    match timeout(ATTEMPT_TIMEOUT, join(client, wish, transport, begun)).await {
        Ok(outcome) => outcome,
        Err(_) => Err(Failure::Retry(node, Error::TimedOut(wish.host.clone()))),
    }
}

/// What came of `Open` and hop together.
enum Met {
    Opened(Opened, io::Result<Box<TlsStream<TcpStream>>>),
    Not(Verdict),
}

async fn join(client: &Client, wish: &Wish, transport: Transport, begun: Begun) -> Result<Tunnel, Failure> {
    let Begun { broker, ticket, mut answer } = begun;
    let node = broker.node;
    let session_error = |code| Error::Session { host: wish.host.clone(), code };
    let connector = client.hop_connector().map_err(Failure::Final)?;
    let server = end::server_name(&broker).map_err(|error| Failure::Final(Error::Detached(error.to_string())))?;
    let hop = async {
        let dial = dial::broker(&client.0.options.via, &broker);
        let stream = dial.instrument(debug_span!("session.dial", broker = node)).await?;
        let alpn = vec![tls::HOP_ALPN.to_vec(), ticket.alpn()];
        let handshake = connector.with_alpn(alpn).connect(server, stream);
        handshake.instrument(debug_span!("session.handshake")).await.map(Box::new)
    };
    let met = {
        let verdict = answer.verdict();
        tokio::pin!(hop, verdict);
        tokio::select! {
            verdict = &mut verdict => match verdict {
                Verdict::Opened(opened) => Met::Opened(opened, hop.await),
                other => Met::Not(other),
            },
            outcome = &mut hop => match timeout(ANSWER_GRACE, verdict).await {
                Ok(Verdict::Opened(opened)) => Met::Opened(opened, outcome),
                Ok(other) => Met::Not(other),
                Err(_) => Met::Not(Verdict::Lost),
            },
        }
    };
    let (opened, hop) = match met {
        Met::Opened(opened, Ok(hop)) => (opened, hop),
        Met::Opened(opened, Err(error)) => {
            debug!(%error, "the end-to-end handshake failed");
            answer.report(opened.session, SessionCode::HandshakeFailed);
            return Err(Failure::Retry(node, session_error(SessionCode::HandshakeFailed)));
        }
        Met::Not(Verdict::Refused(refused)) => return Err(refusal(wish, node, &refused)),
        Met::Not(_) => {
            let reason = "the control stream or the hop was lost".to_owned();
            return Err(Failure::Retry(node, Error::Detached(reason)));
        }
    };
    finish(wish, transport, opened, *hop).await.map_err(|(session, code)| {
        answer.report(session, code);
        Failure::Final(session_error(code))
    })
}

/// Checks who answered, and says what this session is.
async fn finish(
    wish: &Wish,
    transport: Transport,
    opened: Opened,
    mut hop: TlsStream<TcpStream>,
) -> Result<Tunnel, (Vec<u8>, SessionCode)> {
    let Ok(session) = <[u8; 16]>::try_from(opened.session.as_slice()).map(u128::from_be_bytes) else {
        return Err((opened.session, SessionCode::ProtocolError));
    };
    tracing::Span::current().record("session", tracing::field::display(format_args!("{session:032x}")));
    let is_expected = tls::peer_of(hop.get_ref().1).is_ok_and(|peer| peer.id.to_string() == opened.connector);
    if !is_expected {
        return Err((opened.session, SessionCode::WrongPeer));
    }
    let start =
        Start { version: FRAME_VERSION, session, transport, host: wish.host.clone(), port: wish.port, features: 0 };
    match write_frame(&mut hop, &Frame::Start(start)).await {
        Ok(()) => Ok(Tunnel::new(hop, session)),
        Err(error) => {
            debug!(%error, "`Start` could not be sent");
            Err((opened.session, SessionCode::PeerGone))
        }
    }
}

fn refusal(wish: &Wish, node: u64, refused: &OpenRefused) -> Failure {
    let code = SessionCode::from_wire(i32::try_from(refused.code).unwrap_or(0));
    debug!(%code, denial = refused.denial, "refused");
    let host = wish.host.clone();
    match code {
        SessionCode::Refused | SessionCode::NoSuchName => Failure::Final(Error::NoSuchName(host)),
        SessionCode::Unavailable => Failure::Final(Error::Unavailable(host)),
        SessionCode::Reauthenticate => Failure::Final(Error::Reauthenticate),
        SessionCode::Upgrade => Failure::Final(Error::Upgrade),
        SessionCode::Busy => Failure::Final(Error::Busy { retry_after_ms: refused.retry_after_ms }),
        SessionCode::Stale
        | SessionCode::BrokerDraining
        | SessionCode::HopTimeout
        | SessionCode::DialTimeout
        | SessionCode::HandshakeFailed => Failure::Retry(node, Error::Session { host, code }),
        code => Failure::Final(Error::Session { host, code }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(code: SessionCode) -> Failure {
        let wish = Wish {
            host: "crm.internal".into(),
            port: 1,
            transport: 0,
            traceparent: String::new(),
            initiator: String::new(),
        };
        refusal(&wish, 7, &OpenRefused { code: code as u32, ..OpenRefused::default() })
    }

    #[test]
    fn denied_and_unknown_read_the_same() {
        for code in [SessionCode::Refused, SessionCode::NoSuchName] {
            let Failure::Final(error) = refused(code) else { panic!("retried") };
            assert_eq!(error.to_string(), "no such name `crm.internal`");
            assert_eq!(error.exit_code(), 1);
        }
    }

    #[test]
    fn a_broker_that_cannot_now_is_left_for_another() {
        for code in [SessionCode::Stale, SessionCode::BrokerDraining, SessionCode::HopTimeout] {
            assert!(matches!(refused(code), Failure::Retry(7, _)));
        }
        assert!(matches!(refused(SessionCode::Unavailable), Failure::Final(Error::Unavailable(_))));
    }
}
