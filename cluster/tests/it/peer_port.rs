//! What the peer port refuses, with which code, and that the cluster goes on.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::StreamExt as _;
use hyper_util::rt::TokioIo;
use selvedge_cluster::MESSAGE_BYTES_MAX;
use selvedge_domain::{Actor, Body, Command, RejectedCode};
use selvedge_proto::identity::Role;
use selvedge_proto::peer as wire;
use selvedge_proto::peer::change_reply::Result as Reply;
use selvedge_proto::peer::change_request::Change;
use selvedge_proto::peer::peer_client::PeerClient;
use selvedge_proto::peer::raft_client::RaftClient;
use selvedge_proto::tls::{self, Identity, NotBefore};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::metadata::MetadataValue;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request};

use crate::brokers::{Authority, Broker, CLUSTER_ID, OWNER, PATIENCE, Setup, TRUST_DOMAIN, leader_of, until};
use crate::crash;
use crate::links::Links;

/// A caller at a broker's peer port, with any certificate and any claim.
#[derive(Clone)]
struct Stranger {
    channel: Channel,
    cluster: [u8; 16],
    node: u64,
    epoch: u32,
}

impl Stranger {
    fn new(to: &Broker, authority: &Authority, identity: &Identity, node: u64) -> Self {
        let config = tls::peer_client(identity, &authority.anchors, None, NotBefore::judged(), &tls::system_time());
        let (connector, address) = (TlsConnector::from(Arc::new(config.unwrap())), to.address.clone());
        let connect = move |_| {
            let (connector, address) = (connector.clone(), address.clone());
            async move {
                let stream = TcpStream::connect(address).await?;
                let stream = connector.connect("127.0.0.1".try_into().unwrap(), stream).await?;
                Ok::<_, io::Error>(TokioIo::new(stream))
            }
        };
        let channel = Endpoint::from_static("http://broker").connect_with_connector_lazy(tower::service_fn(connect));
        Self { channel, cluster: CLUSTER_ID, node, epoch: 1 }
    }

    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        let metadata = request.metadata_mut();
        metadata.insert("selvedge-cluster", hex(&self.cluster).parse().unwrap());
        metadata.insert("selvedge-node", MetadataValue::from(self.node));
        metadata.insert("selvedge-epoch", MetadataValue::from(self.epoch));
        request.set_timeout(Duration::from_secs(10));
        request
    }

    async fn clock(&self) -> Result<(), tonic::Status> {
        PeerClient::new(self.channel.clone()).clock(self.request(wire::ClockRequest {})).await.map(drop)
    }

    fn raft(&self) -> RaftClient<Channel> {
        RaftClient::new(self.channel.clone()).max_encoding_message_size(usize::MAX)
    }

    async fn greet(&self) {
        self.raft().greet(self.request(wire::GreetRequest::default())).await.unwrap();
    }

    /// Says that a broker has forgotten a vote and an entry, and that it has both itself.
    async fn claim(&self, term: u64, index: u64) -> Result<(), tonic::Status> {
        let vote = Some(wire::Vote { term, node: self.node, committed: false });
        let last = Some(wire::LogId { term, node: self.node, index });
        let greeting = wire::GreetRequest {
            own: Some(wire::Standing { vote, last, suspect: false }),
            of_you: Some(wire::Memory { vote, acked: last }),
        };
        self.raft().greet(self.request(greeting)).await.map(drop)
    }
}

fn change(change: Change, credential: &str) -> wire::ChangeRequest {
    wire::ChangeRequest { change: Some(change), credential: credential.to_owned() }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn refusal<T: std::fmt::Debug>(result: Result<T, tonic::Status>, code: Code, says: &str) {
    let status = result.unwrap_err();
    assert_eq!(status.code(), code, "{status}");
    assert!(status.message().contains(says), "{status}");
}

async fn goes_on(brokers: &[Broker], name: &str) {
    brokers[leader_of(brokers).await].create_token(name).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_is_of_this_cluster_and_epoch_and_of_the_certificates_node() {
    let setup = Setup::new();
    let brokers = [setup.first().await];
    let member = setup.authority.broker(77);
    let honest = Stranger::new(&brokers[0], &setup.authority, &member, 77);
    honest.clock().await.unwrap();
    let denied = Code::PermissionDenied;
    refusal(Stranger { cluster: [8; 16], ..honest.clone() }.clock().await, denied, "another cluster");
    refusal(Stranger { epoch: 9, ..honest.clone() }.clock().await, denied, "another epoch");
    refusal(Stranger { node: brokers[0].node, ..honest.clone() }.clock().await, denied, "the call claims");
    let unsaid = PeerClient::new(honest.channel.clone()).clock(wire::ClockRequest {}).await;
    refusal(unsaid, denied, "whose it is");
    // It is a broker by its certificate, and nobody ever enrolled it.
    let join = wire::JoinRequest { address: "127.0.0.1:9".to_owned(), version: 1 };
    let reply = PeerClient::new(honest.channel.clone()).join(honest.request(join)).await.unwrap().into_inner();
    let Some(wire::change_reply::Result::Later(why) | wire::change_reply::Result::Failed(why)) = reply.result else {
        panic!("it joined");
    };
    assert!(why.contains("never enrolled"), "{why}");
    assert_eq!(brokers[0].cluster.status().members.len(), 1);
    goes_on(&brokers, "after").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_that_are_no_brokers_shake_no_hands() {
    let setup = Setup::new();
    let brokers = [setup.first().await];
    let node = brokers[0].node;
    let other = Authority::new(CLUSTER_ID);
    let broker_id = format!("spiffe://{TRUST_DOMAIN}/broker/{node}");
    let table = [
        ("a client", setup.authority.certify(Role::Clients, &format!("spiffe://{TRUST_DOMAIN}/client/1-1"))),
        ("a connector", setup.authority.certify(Role::Connectors, &format!("spiffe://{TRUST_DOMAIN}/connector/1-1"))),
        ("a broker by the clients' intermediate", setup.authority.certify(Role::Clients, &broker_id)),
        ("another cluster's broker", other.broker(node)),
        (
            "a broker without a node id",
            setup.authority.certify(Role::Brokers, &format!("spiffe://{TRUST_DOMAIN}/broker/x")),
        ),
    ];
    for (what, identity) in table {
        let error = Stranger::new(&brokers[0], &setup.authority, &identity, node).clock().await;
        // The connection ends: before the call, or with it.
        let code = error.expect_err(what).code();
        assert!(matches!(code, Code::Unavailable | Code::Unknown | Code::Cancelled), "{what}: {code}");
    }
    let mut stream = TcpStream::connect(&brokers[0].address).await.unwrap();
    let noise: Vec<u8> = (0..4_096_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    stream.write_all(&noise).await.unwrap();
    let mut answer = Vec::new();
    // At most an alert comes back before it is closed.
    let _ = stream.read_to_end(&mut answer).await;
    assert!(answer.len() < 64, "{answer:?}");
    goes_on(&brokers, "after").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_was_removed_is_answered_nothing() {
    let setup = Setup::new();
    let brokers = setup.voters(3).await;
    let leader = leader_of(&brokers).await;
    let gone = &brokers[(leader + 1) % 3];
    let caller = Stranger::new(&brokers[leader], &setup.authority, &setup.authority.broker(gone.node), gone.node);
    caller.clock().await.unwrap();
    brokers[leader].remove(gone.node).await;
    refusal(caller.clock().await, Code::PermissionDenied, "removed");
    let propose = wire::ProposeRequest::default();
    let proposed = PeerClient::new(caller.channel.clone()).propose(caller.request(propose)).await;
    refusal(proposed, Code::PermissionDenied, "removed");
    refusal(caller.raft().vote(caller.request(wire::VoteRequest::default())).await, Code::PermissionDenied, "removed");
    brokers[leader].create_token("after").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_membership_is_changed_by_an_owners_credential_and_by_no_brokers_certificate() {
    let setup = Setup::new();
    let brokers = setup.voters(3).await;
    let learner = setup.start(TempDir::new().unwrap()).await;
    brokers[0].enrol(&learner).await;
    learner.cluster.join(std::slice::from_ref(&brokers[0].address), &learner.address).await.unwrap();
    learner.register().await;
    brokers[0].create_token("auditor").await.unwrap();
    let leader = leader_of(&brokers).await;
    let (taken, other) = (&brokers[(leader + 1) % 3], &brokers[(leader + 2) % 3]);
    let members = || brokers[leader].cluster.status().members.iter().map(|at| (at.node, at.voter)).collect::<Vec<_>>();
    let before = members();
    let caller = Stranger::new(&brokers[leader], &setup.authority, &setup.authority.broker(taken.node), taken.node);
    let mut peer = PeerClient::new(caller.channel.clone());
    for wanted in [
        Change::Promote(learner.node),
        Change::Remove(other.node),
        Change::TransferLeader(taken.node),
        Change::TransferLeader(0),
    ] {
        for (credential, code) in [
            ("", RejectedCode::Forbidden),
            ("a guess", RejectedCode::Unauthenticated),
            ("auditor", RejectedCode::Forbidden),
        ] {
            let reply = peer.change(caller.request(change(wanted.clone(), credential))).await.unwrap().into_inner();
            let Some(Reply::Refused(refused)) = reply.result else { panic!("{wanted:?} by `{credential}`: {reply:?}") };
            assert_eq!(refused.code, code as i32, "{wanted:?} by `{credential}`: {}", refused.message);
        }
    }
    assert_eq!((members(), leader_of(&brokers).await), (before, leader));
    // The same calls do it with an owner's.
    let reply = peer.change(caller.request(change(Change::Promote(learner.node), OWNER))).await.unwrap().into_inner();
    assert!(matches!(reply.result, Some(Reply::Done(_))), "{reply:?}");
    let moved = peer.change(caller.request(change(Change::TransferLeader(taken.node), OWNER))).await;
    assert!(matches!(moved.unwrap().into_inner().result, Some(Reply::Done(_))));
    until("it leads", || taken.cluster.leads()).await;
    assert_eq!(voters(taken), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn no_single_broker_stops_others_by_saying_that_they_have_forgotten() {
    let setup = Setup::new();
    let brokers = setup.voters(3).await;
    let leader = leader_of(&brokers).await;
    let taken = &brokers[(leader + 1) % 3];
    for to in brokers.iter().filter(|broker| broker.node != taken.node) {
        // One that is no member, and a voter of what it cannot know.
        let stranger = Stranger::new(to, &setup.authority, &setup.authority.broker(77), 77);
        stranger.claim(1_000, 1_000_000).await.unwrap();
        let voter = Stranger::new(to, &setup.authority, &setup.authority.broker(taken.node), taken.node);
        refusal(voter.claim(1_000, 1_000_000).await, Code::FailedPrecondition, "SE0113");
    }
    goes_on(&brokers, "meanwhile").await;
    // With nobody left who says otherwise, they find out by themselves that there is nothing in it.
    taken.cluster.stop().await;
    for to in brokers.iter().filter(|broker| broker.node != taken.node) {
        let voter = Stranger::new(to, &setup.authority, &setup.authority.broker(taken.node), taken.node);
        let begun = std::time::Instant::now();
        while let Err(status) = voter.claim(1_000, 1_000_000).await {
            assert!(begun.elapsed() < PATIENCE, "{status}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    let left: Vec<&Broker> = brokers.iter().filter(|broker| broker.node != taken.node).collect();
    let other = left.iter().position(|broker| !broker.cluster.leads()).unwrap_or(0);
    let to = left[other].node;
    // And elect each other again.
    left[1 - other].cluster.hand_over(Some(to)).await.unwrap();
    until("the other leads", || left[other].cluster.leads()).await;
    left[other].create_token("after").await.unwrap();
    until("both have it", || left.iter().all(|broker| broker.has_token("after"))).await;
}

fn voters(broker: &Broker) -> usize {
    broker.cluster.status().members.iter().filter(|member| member.voter).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn rafts_calls_are_the_callers_own_of_its_term_and_bounded() {
    let setup = Setup::new();
    let brokers = setup.voters(3).await;
    let leader = leader_of(&brokers).await;
    let (to, follower) = (&brokers[(leader + 1) % 3], &brokers[(leader + 2) % 3]);
    let caller = Stranger::new(to, &setup.authority, &setup.authority.broker(follower.node), follower.node);
    caller.greet().await;
    let status = to.cluster.status();
    let (term, last) = (status.term, status.last_log.unwrap());
    let vote = |term, node| wire::Vote { term, node, committed: true };
    let append = |vote, term, data: usize| wire::AppendRequest {
        vote: Some(vote),
        prev: None,
        entries: vec![wire::Entry {
            id: Some(wire::LogId { term, node: follower.node, index: 0 }),
            payload: Some(wire::entry::Payload::Normal(vec![0; data].into())),
        }],
        leader_commit: None,
    };
    // In another's name: what the leader said, said again by a follower.
    let replayed = caller.raft().append(caller.request(append(vote(term, brokers[leader].node), term, 0))).await;
    refusal(replayed, Code::PermissionDenied, "another node's");
    // Its own, of a term that is over.
    let stale = caller.raft().append(caller.request(append(vote(0, follower.node), 0, 0))).await.unwrap().into_inner();
    assert!(matches!(stale.result, Some(wire::append_reply::Result::HigherVote(_))), "{stale:?}");
    // With a hole before them.
    let mut hole = append(vote(term, follower.node), term, 0);
    hole.entries[0].id.as_mut().unwrap().index = last + 10;
    refusal(caller.raft().append(caller.request(hole)).await, Code::InvalidArgument, "follow each other");
    // Entries and snapshots of a later term than the vote that they come with.
    let beyond = caller.raft().append(caller.request(append(vote(term, follower.node), term + 1, 0))).await;
    refusal(beyond, Code::InvalidArgument, "later term");
    let head = wire::SnapshotHead {
        vote: Some(vote(term, follower.node)),
        last: Some(wire::LogId { term: term + 1, node: follower.node, index: last + 100 }),
        membership: None,
    };
    let chunk = wire::SnapshotChunk { head: Some(head), data: vec![0; 100] };
    let snapshot = caller.raft().snapshot(caller.request(tokio_stream::iter([chunk]))).await;
    refusal(snapshot, Code::InvalidArgument, "later term");
    let headless = wire::SnapshotChunk { head: None, data: vec![0; 100] };
    let snapshot = caller.raft().snapshot(caller.request(tokio_stream::iter([headless]))).await;
    refusal(snapshot, Code::InvalidArgument, "without its head");
    let vast = append(vote(term, follower.node), term, MESSAGE_BYTES_MAX + 1);
    refusal(caller.raft().append(caller.request(vast)).await, Code::OutOfRange, "");
    // Nothing of it has moved anybody.
    assert_eq!(to.cluster.status().term, term);
    assert_eq!(leader_of(&brokers).await, leader);
    goes_on(&brokers, "after").await;
    until("all have it", || brokers.iter().all(|broker| broker.has_token("after"))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn before_there_is_a_cluster_every_call_is_answered_with_nothing() {
    let setup = Setup::new();
    let empty = setup.start(TempDir::new().unwrap()).await;
    let caller = Stranger::new(&empty, &setup.authority, &setup.authority.broker(77), 77);
    let mut peer = PeerClient::new(caller.channel.clone());
    caller.clock().await.unwrap();
    peer.propose(caller.request(wire::ProposeRequest::default())).await.unwrap_err();
    let read = peer.read_index(caller.request(wire::ReadIndexRequest { for_lease: true })).await.unwrap().into_inner();
    assert!(!matches!(read.result, Some(wire::read_index_reply::Result::Index(_))), "{read:?}");
    let remove = change(Change::Remove(empty.node), "");
    let changed = peer.change(caller.request(remove)).await.unwrap().into_inner();
    assert!(!matches!(changed.result, Some(wire::change_reply::Result::Done(_))), "{changed:?}");
    assert!(!empty.cluster.lease().open());
    assert!(empty.cluster.state().cluster().is_none());
    empty.cluster.initialize(crate::brokers::init(setup.cluster_id)).await.unwrap();
    empty.register().await;
    empty.create_token("after").await.unwrap();
}

/// Proposals of one stream: as many as a leader takes of it at a time.
const TAGS: u64 = 4_096;

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_with_too_much_waiting_says_when_to_try_again_and_answers_each_proposal_once() {
    let mut setup = Setup::new();
    let links = Links::default();
    setup.links = Some(links.clone());
    let hosts = crash::voters(&setup, &links, 1).await;
    let member = setup.authority.broker(77);
    let caller = Stranger::new(&hosts[0].broker, &setup.authority, &member, 77);
    let command = Command::new(Actor::BROKER, 77, None, Body::Tick).encode();
    let propose = move || wire::ProposeRequest { command: command.clone().into(), credential: String::new() };

    // Nothing that is written comes back: three streams send more than the queue and the entries under way hold.
    hosts[0].log.set_stalled(true);
    let busy = Arc::new(AtomicUsize::new(0));
    let mut streams = Vec::new();
    for _ in 0..3 {
        let request = propose();
        let frames = (1..=TAGS).map(move |tag| wire::ProposeFrame { tag, request: Some(request.clone()) });
        let frames = futures::stream::iter(frames).chain(futures::stream::pending());
        let answers = PeerClient::new(caller.channel.clone()).propose_stream(caller.request(frames)).await.unwrap();
        let (mut answers, busy) = (answers.into_inner(), busy.clone());
        streams.push(tokio::spawn(async move {
            let mut tags = Vec::new();
            while tags.len() < TAGS as usize {
                let answer = answers.message().await.unwrap().expect("each is answered");
                if matches!(answer.reply.unwrap().result, Some(wire::propose_reply::Result::Busy(_))) {
                    busy.fetch_add(1, Ordering::SeqCst);
                }
                tags.push(answer.tag);
            }
            tags.sort_unstable();
            assert!(tags.into_iter().eq(1..=TAGS), "each is answered once");
        }));
    }
    until("some are answered busy", || busy.load(Ordering::SeqCst) > 0).await;
    let refused = PeerClient::new(caller.channel.clone()).propose(caller.request(propose())).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
    assert_eq!(refused.metadata().get("selvedge-retry-after-ms").unwrap(), "100");

    hosts[0].log.set_stalled(false);
    for stream in streams {
        stream.await.unwrap();
    }
    hosts[0].broker.create_token("after").await.unwrap();
}
