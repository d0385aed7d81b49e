//! What brokers remember of each other, and what follows from it.
//!
//! A broker that lost its disk, or was given back an old copy of it, has forgotten votes and entries that it answered
//! for. If it took part again, a write that was acknowledged could be lost. So two brokers greet each other before any
//! call of Raft: each says where it stands and what it remembers of the other, and who stands behind that must stop.
//!
//! One word is not enough to stop a broker, or whoever has the certificate of one could stop them all. Only a voter's
//! word counts, and only of what it may have seen. A broker that is told so is *in doubt*: it neither votes nor stands
//! until it has what it is said to have forgotten, or has applied all that a majority knows to be committed and still
//! lacks it, so that it never was. It stops when most of the other voters stand where it should, before it takes part;
//! and at once when it has nothing at all.
//!
//! **Invariant:** remembered is only what cannot be undone: votes that a broker granted to this one, and committed
//! entries that it said it holds.
//! **Invariant:** a broker neither votes nor stands before it has asked every voter, and a majority of them has met it,
//! in this process; nor while it is in doubt.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use openraft::async_runtime::WatchReceiver as _;
use parking_lot::Mutex;
use prost::Message as _;
use selvedge_proto::peer as wire;
use selvedge_proto::peer::raft_client::RaftClient;
use selvedge_storage::log::Log;
use tokio::sync::watch;
use tonic::{Code, Request, Status};

use crate::clock::Clock;
use crate::convert;
use crate::core::Core;
use crate::dial::Purpose;
use crate::error::Fatal;
use crate::listen::REMOVED;
use crate::metrics::PEER_REFUSED_TOTAL;
use crate::raft_types::{LogId, Membership, Raft, Vote};

/// Between two greetings of a broker that may not vote yet.
const IMPATIENT_INTERVAL: Duration = Duration::from_millis(100);
/// And of one that may.
const INTERVAL: Duration = Duration::from_secs(1);
/// A greeting that is not answered for so long is given up.
pub(crate) const GREET_TIMEOUT: Duration = Duration::from_secs(1);
/// Who was met longer ago does not count as present.
const PRESENT_MS: u64 = 3_000;
/// One attempt to learn from a majority whether a doubt is justified.
const LOOK_INTO_TIMEOUT: Duration = Duration::from_secs(2);

/// The brokers that this one knows. Clones share it.
#[derive(Clone)]
pub(crate) struct Acquaintances {
    inner: Arc<Inner>,
}

struct Inner {
    own: u64,
    log: Log,
    clock: Arc<dyn Clock>,
    fatal: watch::Sender<Option<Fatal>>,
    members: OnceLock<Members>,
    peers: Mutex<Peers>,
    /// This process may take part.
    welcome: AtomicBool,
    /// A doubt is being looked into.
    looking: AtomicBool,
}

/// The newest membership that this broker knows.
type Members = Box<dyn Fn() -> Membership + Send + Sync>;

#[derive(Default)]
struct Peers {
    nodes: BTreeMap<u64, Peer>,
    /// Whether something is remembered that was not noted yet.
    changed: bool,
}

#[derive(Default)]
struct Peer {
    memory: wire::Memory,
    met: Option<Met>,
    /// A greeting is under way.
    greeting: bool,
    /// One was answered, or was not, in this process.
    asked: bool,
    /// It says that this broker was removed.
    removed_us: bool,
    /// What it says that this broker has forgotten.
    doubt: Option<wire::Memory>,
    /// The most of that which turned out to be nothing.
    dismissed: wire::Memory,
}

/// That each has heard where the other stands, and neither knew better.
struct Met {
    standing: wire::Standing,
    at_ms: u64,
}

impl Acquaintances {
    /// Remembers what was noted before.
    pub(crate) fn new(own: u64, log: Log, clock: Arc<dyn Clock>, fatal: watch::Sender<Option<Fatal>>) -> Self {
        let noted = log.note().and_then(|note| wire::Memories::decode(&*note).ok()).unwrap_or_default();
        let nodes = noted.nodes.into_iter().map(|noted| {
            let peer = Peer { memory: noted.memory.unwrap_or_default(), ..Peer::default() };
            (noted.node, peer)
        });
        let peers = Peers { nodes: nodes.collect(), changed: false };
        Self {
            inner: Arc::new(Inner {
                own,
                log,
                clock,
                fatal,
                members: OnceLock::new(),
                peers: Mutex::new(peers),
                welcome: AtomicBool::new(false),
                looking: AtomicBool::new(false),
            }),
        }
    }

    /// Tells where the newest membership is found.
    pub(crate) fn look_at(&self, raft: &Raft) {
        let metrics = raft.server_metrics();
        let members = move || metrics.borrow_watched().membership_config.membership().clone();
        // It is told once.
        let _ = self.inner.members.set(Box::new(members));
    }

    fn membership(&self) -> Membership {
        self.inner.members.get().map(|members| members()).unwrap_or_default()
    }

    /// Where this broker stands.
    fn standing(&self) -> wire::Standing {
        let log = &self.inner.log;
        wire::Standing {
            vote: log.vote().map(|vote| convert::vote(&convert::stored_vote_back(&vote))),
            last: log.bounds().last.map(|last| convert::log_id(&convert::stored_log_id_back(&last))),
            suspect: log.suspect().is_some(),
        }
    }

    /// What is said to a broker that is met.
    pub(crate) fn greeting(&self, to: u64) -> wire::GreetRequest {
        wire::GreetRequest { own: Some(self.standing()), of_you: Some(self.memory(to)) }
    }

    /// Takes a greeting, and answers it.
    ///
    /// **Errors**: when this broker is the one that has forgotten; it stops then.
    pub(crate) fn greeted(&self, by: u64, request: wire::GreetRequest) -> Result<wire::GreetReply, Status> {
        self.meet(by, request.own.unwrap_or_default(), &request.of_you.unwrap_or_default())?;
        Ok(wire::GreetReply { own: Some(self.standing()), of_you: Some(self.memory(by)) })
    }

    /// Takes the answer to a greeting.
    ///
    /// **Errors**: when one of both has forgotten; this broker stops if it is the one.
    pub(crate) fn answered(&self, by: u64, reply: wire::GreetReply) -> Result<(), Status> {
        self.meet(by, reply.own.unwrap_or_default(), &reply.of_you.unwrap_or_default())?;
        if self.has_met(by) { Ok(()) } else { Err(Status::unavailable(format!("broker `{by}` has forgotten"))) }
    }

    fn meet(&self, peer: u64, standing: wire::Standing, of_us: &wire::Memory) -> Result<(), Status> {
        self.told(peer, &standing, of_us)?;
        let mut peers = self.inner.peers.lock();
        let known = peers.nodes.entry(peer).or_default();
        match behind(&standing, &known.memory) {
            None => known.met = Some(Met { standing, at_ms: self.inner.clock.boottime_ms() }),
            Some(why) => {
                known.met = None;
                ::metrics::counter!(PEER_REFUSED_TOTAL, "reason" => "forgot").increment(1);
                tracing::error!(
                    code = "SE0113",
                    peer,
                    why,
                    "this broker has forgotten what it answered for; it is not talked to"
                );
            }
        }
        Ok(())
    }

    /// Takes a broker's word on what this one has answered for.
    ///
    /// **Errors**: when this broker believes it, or cannot tell.
    fn told(&self, peer: u64, standing: &wire::Standing, of_us: &wire::Memory) -> Result<(), Status> {
        let Some(why) = behind(&self.standing(), of_us) else {
            self.inner.peers.lock().nodes.entry(peer).or_default().doubt = None;
            return Ok(());
        };
        let empty = self.inner.log.bounds().last.is_none();
        if !empty && self.inner.members.get().is_none() {
            return Err(Status::unavailable("this broker is starting"));
        }
        let counts = empty || self.membership().voter_ids().any(|voter| voter == peer);
        // Nobody has seen what is beyond itself.
        if !counts || behind(standing, of_us).is_some() {
            ::metrics::counter!(PEER_REFUSED_TOTAL, "reason" => "claim").increment(1);
            tracing::warn!(peer, why, "what a broker says that this one has forgotten does not count");
            return Ok(());
        }
        let fatal = Fatal::Forgot { peer, why };
        let refused = Status::failed_precondition(format!("{}: {fatal}", fatal.code()));
        let mut peers = self.inner.peers.lock();
        let known = peers.nodes.entry(peer).or_default();
        if covers(&known.dismissed, of_us) && !empty {
            return Ok(());
        }
        known.met = None;
        if known.doubt.replace(*of_us) != Some(*of_us) {
            ::metrics::counter!(PEER_REFUSED_TOTAL, "reason" => "doubt").increment(1);
            tracing::error!(code = fatal.code(), reason = %fatal, "this broker is in doubt: it does not vote");
        }
        drop(peers);
        if empty {
            fatal.report(&self.inner.fatal);
        }
        self.judge_doubts(&self.membership());
        Err(refused)
    }

    /// Stops this broker when most of the other voters stand where one of them says that it should.
    fn judge_doubts(&self, membership: &Membership) {
        if self.inner.welcome.load(Ordering::Acquire) {
            return;
        }
        let (standing, peers) = (self.standing(), self.inner.peers.lock());
        let others: Vec<u64> = membership.voter_ids().filter(|node| *node != self.inner.own).collect();
        for node in &others {
            let Some(doubt) = peers.nodes.get(node).and_then(|peer| peer.doubt) else { continue };
            let Some(why) = behind(&standing, &doubt) else { continue };
            let agrees = |other: &&u64| {
                *other == node
                    || peers.nodes.get(other).is_some_and(|peer| {
                        peer.doubt.is_some()
                            || peer
                                .met
                                .as_ref()
                                .is_some_and(|met| !met.standing.suspect && behind(&met.standing, &doubt).is_none())
                    })
            };
            if others.iter().filter(agrees).count() * 2 > others.len() {
                return Fatal::Forgot { peer: *node, why }.report(&self.inner.fatal);
            }
        }
    }

    /// What voters say that this broker has forgotten, and that it still lacks.
    fn doubts(&self, membership: &Membership) -> Vec<(u64, wire::Memory)> {
        let (standing, peers) = (self.standing(), self.inner.peers.lock());
        let doubts = membership.voter_ids().filter_map(|node| Some((node, peers.nodes.get(&node)?.doubt?)));
        doubts.filter(|(_, doubt)| behind(&standing, doubt).is_some()).collect()
    }

    /// Lets doubts go that turned out to be about nothing.
    fn dismiss(&self, doubts: &[(u64, wire::Memory)]) {
        let mut peers = self.inner.peers.lock();
        for (node, doubt) in doubts {
            let known = peers.nodes.entry(*node).or_default();
            if known.doubt == Some(*doubt) {
                tracing::warn!(peer = node, "what this broker was said to have forgotten has never been");
                known.doubt = None;
                known.dismissed = *doubt;
            }
        }
    }

    fn memory(&self, of: u64) -> wire::Memory {
        self.inner.peers.lock().nodes.get(&of).map(|peer| peer.memory).unwrap_or_default()
    }

    /// Whether Raft may talk with a broker.
    pub(crate) fn has_met(&self, node: u64) -> bool {
        self.inner.peers.lock().nodes.get(&node).is_some_and(|peer| peer.met.is_some())
    }

    /// A broker has started again, or says so: it must be met anew.
    pub(crate) fn part(&self, node: u64) {
        if let Some(peer) = self.inner.peers.lock().nodes.get_mut(&node) {
            peer.met = None;
        }
    }

    /// Begins a greeting, unless one is under way.
    fn begin(&self, node: u64) -> bool {
        let mut peers = self.inner.peers.lock();
        !std::mem::replace(&mut peers.nodes.entry(node).or_default().greeting, true)
    }

    fn end(&self, node: u64) {
        let mut peers = self.inner.peers.lock();
        let peer = peers.nodes.entry(node).or_default();
        (peer.greeting, peer.asked) = (false, true);
    }

    /// Takes a broker's word that this one was removed.
    fn dismissed_by(&self, node: u64) {
        self.inner.peers.lock().nodes.entry(node).or_default().removed_us = true;
    }

    /// Whether this broker was removed while it did not run: a voter says so, and none has met it since it started.
    fn is_removed(&self, membership: &Membership) -> bool {
        let peers = self.inner.peers.lock();
        let voters = || membership.voter_ids().filter_map(|node| peers.nodes.get(&node));
        voters().any(|peer| peer.removed_us) && !voters().any(|peer| peer.met.is_some())
    }

    /// Remembers that a broker granted a vote.
    pub(crate) fn granted(&self, node: u64, vote: &Vote) {
        let granted = convert::vote(vote);
        self.remember(node, |memory| {
            let newer = memory.vote.is_none_or(|known| ballot(&known) < ballot(&granted));
            newer.then(|| memory.vote = Some(granted)).is_some()
        });
    }

    /// Remembers that a broker holds the log up to `held`, of which what is committed stays.
    pub(crate) fn holds(&self, node: u64, held: Option<LogId>, committed: Option<LogId>) {
        let (Some(held), Some(committed)) = (held, committed) else { return };
        let acked = convert::log_id(if held.index <= committed.index { &held } else { &committed });
        self.remember(node, |memory| {
            let newer = memory.acked.is_none_or(|known| known.index < acked.index);
            newer.then(|| memory.acked = Some(acked)).is_some()
        });
    }

    fn remember(&self, node: u64, change: impl FnOnce(&mut wire::Memory) -> bool) {
        let mut peers = self.inner.peers.lock();
        let changed = change(&mut peers.nodes.entry(node).or_default().memory);
        peers.changed |= changed;
    }

    /// Keeps what is remembered of members with the log.
    fn note(&self, members: &[u64]) {
        let mut peers = self.inner.peers.lock();
        if !std::mem::take(&mut peers.changed) {
            return;
        }
        peers.nodes.retain(|node, _| members.contains(node));
        let nodes = peers.nodes.iter();
        let nodes = nodes.map(|(node, peer)| wire::Remembered { node: *node, memory: Some(peer.memory) }).collect();
        self.inner.log.save_note(wire::Memories { nodes }.encode_to_vec());
    }

    /// Whether this process has asked all voters, has met a majority of them, and is not in doubt.
    fn is_welcome(&self, membership: &Membership) -> bool {
        if !self.doubts(membership).is_empty() {
            return false;
        }
        if self.inner.welcome.load(Ordering::Acquire) {
            return true;
        }
        let peers = self.inner.peers.lock();
        let known = |node: &u64| peers.nodes.get(node);
        let met = |node: &u64| *node == self.inner.own || known(node).is_some_and(|peer| peer.met.is_some());
        let asked = |node: &u64| met(node) || known(node).is_some_and(|peer| peer.asked);
        let configs = membership.get_joint_config();
        let enough = |voters: &BTreeSet<u64>| {
            voters.iter().filter(|node| met(node)).count() * 2 > voters.len() && voters.iter().all(asked)
        };
        let welcome = !configs.is_empty() && configs.iter().all(enough);
        self.inner.welcome.fetch_or(welcome, Ordering::AcqRel);
        welcome
    }

    /// The end of the longest log among all voters, if all of them are present.
    fn longest_present(&self, membership: &Membership) -> Option<(u64, u64)> {
        let now_ms = self.inner.clock.boottime_ms();
        let mut longest = end(&self.standing());
        let peers = self.inner.peers.lock();
        for node in membership.voter_ids().filter(|node| *node != self.inner.own) {
            let met = peers.nodes.get(&node)?.met.as_ref()?;
            if now_ms > met.at_ms + PRESENT_MS {
                return None;
            }
            longest = longest.max(end(&met.standing));
        }
        Some(longest)
    }

    /// Whether this broker may stand in an election.
    fn may_stand(&self, membership: &Membership) -> bool {
        self.is_welcome(membership) && self.may_follow(membership, end(&self.standing()))
    }

    /// Whether this broker may vote for one whose log ends so.
    ///
    /// One that lost the end of its log may have acknowledged what is gone. Whoever holds it has the longest log, so
    /// when all voters are present, and only then, it votes, and only for that one.
    fn may_follow(&self, membership: &Membership, candidate: (u64, u64)) -> bool {
        self.inner.log.suspect().is_none()
            || self.longest_present(membership).is_some_and(|longest| candidate >= longest)
    }

    /// Whether this broker may vote for a candidate.
    ///
    /// **Errors**: why not.
    pub(crate) fn judge_candidate(&self, last: Option<&wire::LogId>) -> Result<(), Status> {
        let membership = self.membership();
        if !self.is_welcome(&membership) {
            return Err(Status::unavailable(
                "this broker does not vote before it has met a majority of the voters, nor while it is in doubt",
            ));
        }
        if !self.may_follow(&membership, last.map_or((0, 0), |last| (last.term, last.index))) {
            return Err(Status::unavailable(
                "this broker lost the end of its log: it votes when it has caught up, or all voters are present",
            ));
        }
        Ok(())
    }
}

/// Order of logs: whose last entry is of a later term, or of the same and longer.
fn end(standing: &wire::Standing) -> (u64, u64) {
    standing.last.as_ref().map_or((0, 0), |last| (last.term, last.index))
}

fn ballot(vote: &wire::Vote) -> (u64, u64) {
    (vote.term, vote.node)
}

/// What is remembered of a broker that it has forgotten.
fn behind(standing: &wire::Standing, memory: &wire::Memory) -> Option<String> {
    if let Some(granted) = &memory.vote
        && standing.vote.as_ref().is_none_or(|vote| ballot(vote) < ballot(granted))
    {
        return Some(format!("it voted in term {}", granted.term));
    }
    let acked = memory.acked.as_ref()?;
    let holds = standing.last.as_ref().is_some_and(|last| last.index >= acked.index && last.term >= acked.term);
    // One that knows what it lost takes no part until that is mended.
    (!holds && !standing.suspect).then(|| format!("it held entry {} of term {}", acked.index, acked.term))
}

/// Whether everything that one says is said by the other, too.
fn covers(more: &wire::Memory, less: &wire::Memory) -> bool {
    let index = |memory: &wire::Memory| memory.acked.map(|acked| (acked.term, acked.index));
    more.vote.as_ref().map(ballot) >= less.vote.as_ref().map(ballot) && index(more) >= index(less)
}

/// Greets the voters, lets this broker stand once it may, and notes what it remembers.
pub(crate) async fn keep(core: Arc<Core>) {
    loop {
        let acquaintances = &core.acquaintances;
        let membership = acquaintances.membership();
        let in_doubt = !acquaintances.doubts(&membership).is_empty();
        if in_doubt && !acquaintances.inner.looking.swap(true, Ordering::AcqRel) {
            core.tasks.spawn(look_into(core.clone()));
        }
        let anew = in_doubt || core.log.log().suspect().is_some();
        let others = core.voters().into_iter().filter(|node| *node != core.node);
        for node in others.filter(|node| anew || !acquaintances.has_met(*node)) {
            // One that does not answer keeps nobody else waiting.
            if acquaintances.begin(node) {
                core.tasks.spawn(greet(core.clone(), node));
            }
        }
        if acquaintances.is_removed(&membership) {
            core.fail(Fatal::Removed);
        }
        acquaintances.judge_doubts(&membership);
        let stands = acquaintances.may_stand(&membership);
        core.raft.runtime_config().elect(stands);
        acquaintances.note(&core.members());
        let interval = if stands { INTERVAL } else { IMPATIENT_INTERVAL };
        if core.pause(interval).await.is_err() {
            core.acquaintances.note(&core.members());
            return;
        }
    }
}

/// Lets doubts go when this broker has applied everything that a majority knows to be committed by now, and still lacks
/// what it is said to have held.
async fn look_into(core: Arc<Core>) {
    let acquaintances = &core.acquaintances;
    let doubts = acquaintances.doubts(&acquaintances.membership());
    if core.linearizable(LOOK_INTO_TIMEOUT).await.is_ok() {
        acquaintances.dismiss(&doubts);
    }
    acquaintances.inner.looking.store(false, Ordering::Release);
}

async fn greet(core: Arc<Core>, node: u64) {
    let mut client = RaftClient::new(core.dialer.channel(node, Purpose::Control));
    let mut request = Request::new(core.acquaintances.greeting(node));
    request.set_timeout(GREET_TIMEOUT);
    match tokio::time::timeout(GREET_TIMEOUT, client.greet(request)).await {
        // What it has to say about it, it has said.
        Ok(Ok(reply)) => drop(core.acquaintances.answered(node, reply.into_inner())),
        Ok(Err(status)) => {
            tracing::debug!(node, %status, "a greeting was not answered");
            if status.code() == Code::PermissionDenied && status.message() == REMOVED {
                core.acquaintances.dismissed_by(node);
            }
        }
        Err(_) => tracing::debug!(node, "a greeting was not answered in time"),
    }
    core.acquaintances.end(node);
}

#[cfg(test)]
mod tests {
    use openraft::EmptyNode;
    use selvedge_storage::engine::{Space, mem::Disk};
    use selvedge_storage::log::{self, Payload, Record};

    use super::*;
    use crate::clock::testing::Manual;
    use crate::raft_types::LeaderId;

    /// Node 1 of three, on a disk.
    fn on(disk: &Disk) -> (Acquaintances, watch::Receiver<Option<Fatal>>, Arc<Manual>) {
        let log = Log::open(Arc::new(disk.open().unwrap())).unwrap();
        let (fatal, stops) = watch::channel(None);
        let clock = Arc::new(Manual::default());
        (Acquaintances::new(1, log, clock.clone(), fatal), stops, clock)
    }

    fn three() -> Membership {
        let nodes = BTreeMap::from([1, 2, 3].map(|node| (node, EmptyNode::new())));
        Membership::new(vec![BTreeSet::from([1, 2, 3])], nodes).unwrap()
    }

    fn greeting(own: wire::Standing) -> wire::GreetRequest {
        wire::GreetRequest { own: Some(own), of_you: None }
    }

    #[test]
    fn a_broker_votes_once_a_majority_has_met_it_and_never_where_there_are_no_voters() {
        let (me, _stops, _) = on(&Disk::new());
        assert!(!me.is_welcome(&Membership::default()), "an empty disk knows no voters");
        assert!(!me.may_stand(&three()), "nobody has met it");
        me.greeted(2, greeting(standing(1, 1))).unwrap();
        assert!(!me.may_stand(&three()), "the third may know better");
        assert!(me.begin(3));
        me.end(3);
        assert!(me.may_stand(&three()), "two of three have met, and the third does not answer");
    }

    #[test]
    fn who_forgot_is_told_and_not_met_and_whoever_is_told_stops() {
        let (me, stops, _) = on(&Disk::new());
        me.granted(2, &Vote { leader_id: LeaderId { term: 3, node_id: 1 }, committed: false });
        let reply = me.greeted(2, greeting(standing(2, 1))).unwrap();
        assert_eq!(reply.of_you.unwrap().vote.unwrap().term, 3, "so that it learns it");
        assert!(!me.has_met(2) && stops.borrow().is_none());
        me.greeted(2, greeting(standing(3, 1))).unwrap();
        assert!(me.has_met(2), "with its vote it is welcome");

        let refused = me.greeted(3, claim(standing(1, 1), memory(1, 1, 1))).unwrap_err();
        assert!(refused.message().contains("SE0113"), "{refused}");
        assert_eq!(stops.borrow().as_ref().map(Fatal::code), Some("SE0113"));
    }

    fn claim(own: wire::Standing, of_you: wire::Memory) -> wire::GreetRequest {
        wire::GreetRequest { own: Some(own), of_you: Some(of_you) }
    }

    #[test]
    fn one_voters_word_leaves_a_broker_in_doubt_and_most_of_the_others_stop_it() {
        let disk = Disk::new();
        drop(filled(&disk, 4));
        let (me, stops, _) = on(&disk);
        me.inner.members.set(Box::new(three)).ok().unwrap();
        me.greeted(9, claim(standing(7, 9), memory(7, 7, 9))).unwrap();
        me.greeted(2, claim(standing(1, 3), memory(7, 7, 9))).unwrap();
        assert!(me.doubts(&three()).is_empty(), "no voter, and one that has not seen it itself");
        me.greeted(2, claim(standing(7, 9), memory(7, 7, 9))).unwrap_err();
        me.greeted(3, greeting(standing(1, 3))).unwrap();
        me.judge_doubts(&three());
        assert!(!me.is_welcome(&three()) && stops.borrow().is_none(), "it is one word against another");
        me.greeted(3, greeting(standing(7, 9))).unwrap();
        me.judge_doubts(&three());
        assert_eq!(stops.borrow().as_ref().map(Fatal::code), Some("SE0113"), "they stand where it should");
    }

    #[test]
    fn a_doubt_ends_with_what_was_lacking_or_when_it_turns_out_to_be_about_nothing() {
        let disk = Disk::new();
        let log = filled(&disk, 4);
        let me = Acquaintances::new(1, log.clone(), Arc::new(Manual::default()), watch::channel(None).0);
        me.inner.members.set(Box::new(three)).ok().unwrap();
        me.greeted(3, greeting(standing(0, 3))).unwrap();
        me.begin(2);
        me.greeted(2, claim(standing(1, 5), acked(1, 5))).unwrap_err();
        me.end(2);
        assert!(!me.is_welcome(&three()));
        append(&log, 4..6);
        assert!(me.is_welcome(&three()), "it holds it again");
        me.greeted(2, claim(standing(1, 8), acked(1, 8))).unwrap_err();
        assert!(!me.is_welcome(&three()), "also one that has taken part does not vote in doubt");
        me.dismiss(&me.doubts(&three()));
        assert!(me.is_welcome(&three()));
        me.greeted(2, claim(standing(1, 8), acked(1, 8))).unwrap();
        assert!(me.is_welcome(&three()), "that was looked into");
        me.greeted(2, claim(standing(1, 9), acked(1, 9))).unwrap_err();
        assert!(!me.is_welcome(&three()), "that was not");
    }

    #[test]
    fn what_is_remembered_of_members_outlives_the_process_and_only_committed_entries_are() {
        let disk = Disk::new();
        let (me, _stops, _) = on(&disk);
        let id = |index| Some(LogId { leader_id: LeaderId { term: 2, node_id: 1 }, index });
        me.holds(2, id(9), None);
        assert_eq!(me.memory(2), wire::Memory::default(), "nothing is committed");
        me.holds(2, id(9), id(7));
        me.holds(2, id(5), id(7));
        assert_eq!(me.memory(2).acked.unwrap().index, 7, "what is not committed may be cut");
        me.holds(4, id(9), id(9));
        me.note(&[1, 2, 3]);
        drop(me);
        let (me, _stops, _) = on(&disk);
        assert_eq!(me.memory(2).acked.unwrap().index, 7);
        assert_eq!(me.memory(4), wire::Memory::default(), "it is no member any more");
    }

    #[test]
    fn a_suspect_follows_only_the_longest_log_and_only_when_all_voters_are_present() {
        let disk = Disk::new();
        drop(filled(&disk, 4));
        disk.corrupt(Space::Log, &3_u64.to_be_bytes(), |value| value[1] ^= 1);
        let (me, _stops, clock) = on(&disk);
        me.greeted(2, greeting(standing(1, 2))).unwrap();
        assert!(!me.may_follow(&three(), (1, 9)), "one is missing");
        me.greeted(3, greeting(standing(1, 3))).unwrap();
        assert!(me.may_follow(&three(), (1, 3)), "it has what was lost here");
        assert!(!me.may_follow(&three(), (1, 2)) && !me.may_stand(&three()), "these have not");
        clock.boottime.store(PRESENT_MS + 1, Ordering::SeqCst);
        assert!(!me.may_follow(&three(), (1, 3)), "who was met long ago may be gone");
    }

    /// A log of so many entries of term 1, in which nobody was voted for.
    fn filled(disk: &Disk, entries: u64) -> Log {
        let log = Log::open(Arc::new(disk.open().unwrap())).unwrap();
        append(&log, 0..entries);
        log
    }

    fn append(log: &Log, indices: std::ops::Range<u64>) {
        let record = |index| Record { id: log::LogId { term: 1, node: 1, index }, payload: Payload::Blank };
        let (tell, told) = std::sync::mpsc::sync_channel(8);
        log.append(indices.map(record).collect(), Box::new(move |result| tell.send(result).unwrap()));
        told.recv().unwrap().unwrap();
    }

    fn acked(term: u64, index: u64) -> wire::Memory {
        wire::Memory { vote: None, acked: Some(wire::LogId { term, node: 1, index }) }
    }

    fn standing(term: u64, index: u64) -> wire::Standing {
        let vote = Some(wire::Vote { term, node: 1, committed: false });
        wire::Standing { vote, last: Some(wire::LogId { term, node: 1, index }), suspect: false }
    }

    fn memory(voted: u64, term: u64, index: u64) -> wire::Memory {
        let vote = Some(wire::Vote { term: voted, node: 1, committed: false });
        wire::Memory { vote, acked: Some(wire::LogId { term, node: 1, index }) }
    }

    #[test]
    fn who_forgot_a_vote_or_a_committed_entry_is_behind_and_nobody_else() {
        assert_eq!(behind(&wire::Standing::default(), &wire::Memory::default()), None, "strangers");
        assert_eq!(behind(&standing(3, 9), &memory(3, 3, 9)), None);
        assert_eq!(behind(&standing(4, 12), &memory(3, 3, 9)), None, "it went on since");
        assert!(behind(&standing(3, 9), &memory(4, 3, 9)).is_some(), "a vote is gone");
        assert!(behind(&standing(3, 8), &memory(3, 3, 9)).is_some(), "an entry is gone");
        assert!(behind(&standing(3, 20), &memory(3, 4, 9)).is_some(), "its log is of an older term");
        assert!(behind(&wire::Standing::default(), &memory(1, 1, 1)).is_some(), "everything is gone");
        let suspect = wire::Standing { suspect: true, ..standing(3, 8) };
        assert_eq!(behind(&suspect, &memory(3, 3, 9)), None, "it knows, and waits");
        assert!(behind(&suspect, &memory(4, 3, 9)).is_some(), "votes are not in the end that was lost");
    }
}
