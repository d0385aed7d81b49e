//! Where sessions are asked for: on this process's own control streams, or on those of the process that runs already.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use selvedge_proto::control::{Broker, HopFailed, Open, OpenRefused, Opened, Resolve, Why, from_end};
use selvedge_proto::frame::SessionCode;
use selvedge_proto::hello::Ticket;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::local::{self, Guest};
use super::{Error, Status};
use crate::end::End;
use crate::link::{Answer, Link};
use crate::links::Links;

/// How long an attempt waits for a control stream.
const ATTACH_TIMEOUT: Duration = Duration::from_secs(5);
/// How long an attempt waits for a ticket.
const TICKET_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a question about a name waits.
const ASK_TIMEOUT: Duration = Duration::from_secs(5);
/// Tickets kept unused at each stream.
const TICKETS: usize = 16;
/// Applications whose better broker is remembered.
const REMEMBERED_MAX: usize = 1_024;

/// What a session is asked for with.
#[derive(Clone, Debug)]
pub(super) struct Wish {
    pub(super) host: String,
    pub(super) port: u16,
    pub(super) transport: u32,
    pub(super) traceparent: String,
    pub(super) initiator: String,
}

/// A session that was asked for: where its hop goes, and the answer that is to come.
pub(super) struct Begun {
    pub(super) broker: Broker,
    pub(super) ticket: Ticket,
    pub(super) answer: Waiting,
}

/// The answer to a session that was asked for.
pub(super) enum Waiting {
    Own { own: Arc<Own>, link: Arc<Link>, answer: oneshot::Receiver<Answer>, target: (String, u16) },
    Guest(Guest),
}

/// What became of it.
pub(super) enum Verdict {
    Opened(Opened),
    Refused(OpenRefused),
    /// The control stream was lost.
    Lost,
}

impl Waiting {
    pub(super) async fn verdict(&mut self) -> Verdict {
        match self {
            Self::Own { own, link, answer, target } => match answer.await {
                Ok(Answer::Opened(opened)) => {
                    if let Some(better) = &opened.better {
                        own.remember(target.clone(), better);
                    }
                    Verdict::Opened(*opened)
                }
                Ok(Answer::Refused(refused)) => {
                    if refused.code == SessionCode::BrokerDraining as u32 {
                        // It says so to everybody, and this answer may be quicker.
                        link.leave();
                    }
                    Verdict::Refused(refused)
                }
                Ok(Answer::Why(_) | Answer::Resolved(_)) | Err(_) => Verdict::Lost,
            },
            Self::Guest(guest) => guest.verdict().await,
        }
    }

    /// Tells the broker that client and connector did not come together.
    pub(super) fn report(&self, session: Vec<u8>, code: SessionCode) {
        if let Self::Own { link, .. } = self {
            // A stream that is gone cannot be told.
            let _ = link.try_send(from_end::Message::HopFailed(HopFailed { session, code: code as u32 }));
        }
    }
}

/// This process's own control streams.
pub(super) struct Own {
    pub(super) end: Arc<End>,
    pub(super) links: Arc<Links>,
    better: Mutex<BTreeMap<(String, u16), u64>>,
    tasks: Mutex<Vec<JoinHandle<()>>>,
}

impl Own {
    /// Attaches in the background and serves the other processes of this state directory.
    pub(super) fn start(end: Arc<End>, shutdown: &CancellationToken) -> Arc<Self> {
        let (links, supervisor) = Links::start(end.clone(), TICKETS, None, shutdown.child_token());
        let own =
            Arc::new(Self { end, links, better: Mutex::new(BTreeMap::new()), tasks: Mutex::new(vec![supervisor]) });
        let serving = tokio::spawn(local::serve(own.clone(), shutdown.child_token()));
        own.tasks.lock().push(serving);
        own
    }

    /// Waits until the background tasks ended, after their shutdown.
    pub(super) async fn stopped(&self) {
        let tasks = std::mem::take(&mut *self.tasks.lock());
        for task in tasks {
            // A task that panicked has ended too.
            let _ = task.await;
        }
    }

    /// Asks on the best stream, or on another when that one is lost before it was asked.
    pub(super) async fn begin(self: &Arc<Self>, wish: &Wish, avoid: Option<u64>) -> Result<Begun, Error> {
        let link = self.link(&wish.host, wish.port, avoid).await?;
        match self.begin_on(&link, wish).await {
            Err(error) if avoid.is_none() => {
                debug!(broker = link.broker.name, %error, "not asked there");
                let other = self.link(&wish.host, wish.port, Some(link.broker.node)).await?;
                self.begin_on(&other, wish).await
            }
            outcome => outcome,
        }
    }

    async fn begin_on(self: &Arc<Self>, link: &Arc<Link>, wish: &Wish) -> Result<Begun, Error> {
        let ticket = timeout(TICKET_TIMEOUT, link.ticket())
            .await
            .map_err(|_| Error::Detached("it gave no ticket in time".to_owned()))?
            .map_err(|error| Error::Detached(error.to_string()))?;
        let answer = link
            .ask(|request| {
                from_end::Message::Open(Open {
                    request,
                    ticket: ticket.as_bytes().to_vec(),
                    host: wish.host.clone(),
                    port: u32::from(wish.port),
                    transport: wish.transport,
                    claimed: [("os".to_owned(), std::env::consts::OS.to_owned())].into(),
                    traceparent: wish.traceparent.clone(),
                    initiator: wish.initiator.clone(),
                })
            })
            .map_err(|error| Error::Detached(error.to_string()))?;
        let target = (wish.host.clone(), wish.port);
        let answer = Waiting::Own { own: self.clone(), link: link.clone(), answer, target };
        Ok(Begun { broker: link.broker.clone(), ticket, answer })
    }

    pub(super) async fn why(&self, host: &str, port: u16) -> Result<String, Error> {
        let link = self.link(host, port, None).await?;
        let question = |request| from_end::Message::Why(Why { request, host: host.to_owned(), port: u32::from(port) });
        match ask(&link, question).await? {
            Answer::Why(text) => Ok(text),
            _ => Err(another_answer()),
        }
    }

    pub(super) async fn resolve(&self, name: &str) -> Result<Option<IpAddr>, Error> {
        let link = self.link(name, 0, None).await?;
        let question = |request| from_end::Message::Resolve(Resolve { request, host: name.to_owned() });
        match ask(&link, question).await? {
            Answer::Resolved(address) => Ok(address),
            _ => Err(another_answer()),
        }
    }

    pub(super) fn status(&self) -> Status {
        let zones = self.end.zones.borrow().clone();
        let expires_ms = self.end.identity.load().validity_ms().map_or(0, |(_, end_ms)| end_ms);
        Status {
            id: self.end.spiffe.to_string(),
            brokers: self.links.status(),
            zones: zones.as_ref().map(|zones| zones.zones.clone()),
            names: zones.map(|zones| zones.names).unwrap_or_default(),
            certificate_expires_ms: expires_ms,
            last_error: self.links.last_error(),
        }
    }

    pub(super) async fn ready(&self, within: Duration) -> Result<(), Error> {
        timeout(within, self.links.any(None)).await.map(drop).map_err(|_| self.detached())
    }

    async fn link(&self, host: &str, port: u16, avoid: Option<u64>) -> Result<Arc<Link>, Error> {
        let remembered = self.better.lock().get(&(host.to_owned(), port)).copied();
        if let Some(link) = remembered.filter(|node| Some(*node) != avoid).and_then(|node| self.links.to(node))
            && link.is_usable()
        {
            self.links.demand(&link.broker);
            return Ok(link);
        }
        timeout(ATTACH_TIMEOUT, self.links.any(avoid)).await.map_err(|_| self.detached())
    }

    fn remember(&self, target: (String, u16), better: &Broker) {
        self.links.demand(better);
        let mut remembered = self.better.lock();
        if remembered.len() >= REMEMBERED_MAX && !remembered.contains_key(&target) {
            remembered.pop_first();
        }
        remembered.insert(target, better.node);
    }

    fn detached(&self) -> Error {
        Error::Detached(self.links.last_error().unwrap_or_else(|| "none answered in time".to_owned()))
    }
}

async fn ask(link: &Link, question: impl FnOnce(u64) -> from_end::Message) -> Result<Answer, Error> {
    let answer = link.ask(question).map_err(|error| Error::Detached(error.to_string()))?;
    match timeout(ASK_TIMEOUT, answer).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(_)) => Err(Error::Detached("the control stream was lost".to_owned())),
        Err(_) => Err(Error::TimedOut(link.broker.name.clone())),
    }
}

fn another_answer() -> Error {
    Error::Detached("the broker answered another question".to_owned())
}
