//! The event stream: whole, ordered, resumable, provable; how long the journal behind it is kept, and where a broker
//! that installed a snapshot gets what is before it.

use std::net::TcpListener;
use std::ops::ControlFlow;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures::{Stream, StreamExt as _};
use prost::Message as _;
use selvedge_cluster::{Cluster, Error, FRAME_BYTES_MAX, Frame, LogLimits, ShiftedClock};
use selvedge_domain::command::{Apply, ApplyPut};
use selvedge_domain::limits::{JOURNAL_KEEP_MS_MIN, RECEIVERS_MAX};
use selvedge_domain::{Asker, Body, Envelope, Id, spec};
use selvedge_storage::engine::mem::Disk;
use selvedge_storage::engine::{Engine, Space};
use tempfile::TempDir;

use crate::brokers::{Broker, PATIENCE, Setup, init, leader_of, until};

async fn next(frames: &mut (impl Stream<Item = Result<Frame, Error>> + Unpin)) -> Result<Frame, Error> {
    tokio::time::timeout(PATIENCE, frames.next()).await.expect("there is a frame").expect("the stream goes on")
}

/// What a stream says first.
async fn first(cluster: &Cluster, from: Id) -> Result<Frame, Error> {
    next(&mut pin!(cluster.events(from))).await
}

/// A subscriber that checks what every subscriber may rely on.
struct Follower {
    next: Id,
    journal_hash: Vec<u8>,
    /// The last frame was the last of its command.
    whole: bool,
}

impl Follower {
    fn new() -> Self {
        Self { next: Id::new(1, 1), journal_hash: Vec::new(), whole: true }
    }

    fn take(&mut self, frame: &Frame) {
        match frame {
            Frame::Events { position, events, last } => {
                let mut bytes = 0;
                for event in events {
                    assert_eq!(event.id, Some(self.next), "no event is left out or comes twice");
                    let encoded = event.encode_to_vec();
                    bytes += encoded.len();
                    self.journal_hash = Envelope::chain(&self.journal_hash, &encoded).to_vec();
                    self.next.seq += 1;
                }
                assert!(bytes <= FRAME_BYTES_MAX || events.len() == 1, "{bytes} bytes in a frame");
                assert_eq!(position.seq + 1, self.next.seq);
                let lasts: Vec<bool> = events.iter().map(|event| event.last).collect();
                assert_eq!(*last, lasts[lasts.len() - 1]);
                assert!(!lasts[..lasts.len() - 1].contains(&true), "a frame has events of one command");
                self.whole = *last;
            }
            Frame::Bookmark { position, journal_hash, .. } => {
                assert!(self.whole, "a bookmark follows whole commands only");
                assert_eq!(position.seq + 1, self.next.seq);
                assert_eq!(*journal_hash, self.journal_hash, "what was followed is what the cluster holds");
            }
        }
    }

    /// Follows to a position; answers the state's hash that the bookmark there has.
    async fn follow(&mut self, cluster: &Cluster, to: Id) -> [u8; 32] {
        let mut frames = pin!(cluster.events(self.next));
        loop {
            let frame = next(&mut frames).await.unwrap();
            self.take(&frame);
            if let Frame::Bookmark { position, state_hash, .. } = frame
                && position == to
            {
                return state_hash;
            }
        }
    }
}

fn zones(count: usize) -> Body {
    let zone = |n| spec::Object::Zone(spec::Zone { name: format!("zone{n}.example") });
    let puts = (0..count).map(|n| ApplyPut { object: zone(n), compiled: None }).collect();
    Body::Apply(Apply { puts, deletes: Vec::new(), expect_revision: None })
}

#[tokio::test(flavor = "multi_thread")]
async fn events_are_gap_free_over_a_leader_change_and_end_in_a_bookmark_of_state_and_journal() {
    let brokers = Setup::new().voters(3).await;
    let leader = leader_of(&brokers).await;
    let (watcher, writer) = (&brokers[(leader + 1) % 3], &brokers[(leader + 2) % 3]);
    let mut follower = Follower::new();
    for n in 0..10 {
        writer.create_token(&format!("token-{n}")).await.unwrap();
        if n == 4 {
            // Half of it is followed before, the rest after.
            follower.follow(&watcher.cluster, writer.cluster.state().position()).await;
            brokers[leader].cluster.hand_over(None).await.unwrap();
        }
    }
    let end = writer.cluster.state().position();
    let state_hash = follower.follow(&watcher.cluster, end).await;
    until("the watcher has applied what the writer has", || {
        watcher.cluster.status().applied == writer.cluster.status().applied
    })
    .await;
    assert_eq!(watcher.cluster.state().state_hash(), writer.cluster.state().state_hash());
    assert_eq!(state_hash, writer.cluster.state().state_hash());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_command_comes_in_frames_that_fit_and_no_bookmark_stands_between_them() {
    let broker = Setup::new().first().await;
    let before = broker.cluster.state().position();
    let receiver = |n| {
        spec::Object::Receiver(spec::Receiver {
            name: format!("siem{n}"),
            address: "127.0.0.1:514".to_owned(),
            tls_ca: "x".repeat(100_000),
            tls_name: String::new(),
        })
    };
    let puts = (0..RECEIVERS_MAX).map(|n| ApplyPut { object: receiver(n), compiled: None }).collect();
    let body = Body::Apply(Apply { puts, deletes: Vec::new(), expect_revision: None });
    broker.cluster.propose(broker.owner(), body, None).await.unwrap();
    Follower::new().follow(&broker.cluster, broker.cluster.state().position()).await;
    let mut frames = pin!(broker.cluster.events(Id::new(1, before.seq + 1)));
    let mut parts = 0;
    loop {
        parts += 1;
        match next(&mut frames).await.unwrap() {
            Frame::Events { last: false, .. } => {}
            Frame::Events { last: true, .. } => break,
            Frame::Bookmark { position, .. } => panic!("a bookmark at {position} within a command"),
        }
    }
    assert!(parts >= 4, "{parts} frames");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_resumes_where_it_was_waits_for_what_is_to_come_and_is_reset_in_another_epoch() {
    let broker = Setup::new().first().await;
    broker.create_token("one").await.unwrap();
    let position = broker.cluster.state().position();
    match first(&broker.cluster, position).await.unwrap() {
        Frame::Events { events, .. } => assert_eq!(events[0].id, Some(position)),
        other => panic!("{other:?}"),
    }
    // A position that this broker has not reached is waited for.
    let mut later = pin!(broker.cluster.events(Id::new(position.epoch, position.seq + 2)));
    assert!(tokio::time::timeout(Duration::from_millis(200), later.next()).await.is_err());
    broker.create_token("two").await.unwrap();
    broker.create_token("three").await.unwrap();
    let begun = loop {
        // The event before it may be all that there is for a moment; then a bookmark says so.
        if let Frame::Events { events, .. } = next(&mut later).await.unwrap() {
            break events[0].id;
        }
    };
    assert_eq!(begun, Some(Id::new(position.epoch, position.seq + 2)));
    for epoch in [position.epoch - 1, position.epoch + 1].into_iter().filter(|epoch| *epoch != 0) {
        let mut other = pin!(broker.cluster.events(Id::new(epoch, 1)));
        match next(&mut other).await {
            Err(Error::Reset { position }) => assert_eq!(position, broker.cluster.state().position()),
            other => panic!("{other:?}"),
        }
        assert!(other.next().await.is_none());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_compacted_is_said_to_be_gone() {
    let broker = Setup::new().first().await;
    for n in 0..3 {
        broker.create_token(&format!("token-{n}")).await.unwrap();
    }
    let upto_seq = broker.cluster.state().position().seq - 1;
    broker.cluster.propose(Asker::BROKER, Body::CompactJournal { upto_seq }, None).await.unwrap();
    let mut gone = pin!(broker.cluster.events(Id::new(1, 1)));
    match gone.next().await {
        Some(Err(Error::Compacted { upto })) => assert_eq!(upto, upto_seq),
        other => panic!("{other:?}"),
    }
    assert!(gone.next().await.is_none());
    assert!(matches!(first(&broker.cluster, Id::new(1, upto_seq + 1)).await, Ok(Frame::Events { .. })));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_leader_forgets_events_when_they_were_kept_for_as_long_as_the_setting_says() {
    let setup = Setup::new();
    let dir = TempDir::new().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let clock = Arc::new(ShiftedClock::default());
    let options = selvedge_cluster::Options { clock: clock.clone(), ..setup.options(dir.path(), listener, None).await };
    let node = options.dir.node_id();
    let broker = Broker { cluster: Cluster::start(options).await.unwrap(), address, node, dir };
    broker.cluster.initialize(init(setup.cluster_id)).await.unwrap();
    broker.register().await;
    let keep = |keep_ms| Body::KeepJournal { keep_ms };
    let refused = broker.cluster.propose(broker.owner(), keep(JOURNAL_KEEP_MS_MIN - 1), None).await;
    assert!(refused.is_err(), "so short a time is refused");
    broker.cluster.propose(broker.owner(), keep(JOURNAL_KEEP_MS_MIN), None).await.unwrap();
    broker.create_token("old").await.unwrap();
    let old = broker.cluster.state().position();

    clock.advance(JOURNAL_KEEP_MS_MIN / 2);
    broker.create_token("middle").await.unwrap();
    let middle = broker.cluster.state().position();
    assert_eq!(broker.cluster.state().meta().journal_compacted, 0);
    clock.advance(JOURNAL_KEEP_MS_MIN * 3 / 4);
    until("the leader forgets", || broker.cluster.state().meta().journal_compacted != 0).await;
    assert_eq!(broker.cluster.state().meta().journal_compacted, old.seq, "what is younger stays");
    assert!(matches!(first(&broker.cluster, old).await, Err(Error::Compacted { upto }) if upto == old.seq));
    match first(&broker.cluster, middle).await.unwrap() {
        Frame::Events { events, .. } => assert_eq!(events[0].id, Some(middle)),
        other => panic!("{other:?}"),
    }
}

/// The index of the first entry in a log.
fn log_begin(log: &dyn Engine) -> u64 {
    let mut begin = 0;
    let visit = &mut |key: &[u8], _: &[u8]| {
        begin = key.try_into().map_or(0, u64::from_be_bytes);
        ControlFlow::Break(())
    };
    log.iterate(Space::Log, &[], None, visit).unwrap();
    begin
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_from_a_snapshot_names_who_has_older_events_and_believes_only_those_of_its_own_chain() {
    let mut setup = Setup::new();
    setup.log_limits = LogLimits { snapshot_bytes: 10_000, keep_entries: 2, ..LogLimits::default() };
    let (log, state) = (Disk::new(), Disk::new());
    let (log_engine, state_engine) = (Arc::new(log.open().unwrap()), Arc::new(state.open().unwrap()));
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let old = setup.start_on(TempDir::new().unwrap(), listener, log_engine.clone(), state_engine).await;
    old.cluster.initialize(init(setup.cluster_id)).await.unwrap();
    old.register().await;
    // More than one piece of events, and enough entries behind them.
    old.cluster.propose(old.owner(), zones(2_500), None).await.unwrap();
    let mut made = 0;
    while log_begin(&*log_engine) < 20 {
        old.create_token(&format!("token-{made}")).await.unwrap();
        made += 1;
    }
    // One of the oldest is not what it was.
    let changed = 5u64.to_be_bytes();
    let flip = |value: &mut Vec<u8>| {
        let end = value.len() - 1;
        value[end] ^= 1;
    };
    state.corrupt(Space::Journal, &changed, flip);

    let new = setup.start(TempDir::new().unwrap()).await;
    old.enrol(&new).await;
    new.cluster.join(std::slice::from_ref(&old.address), &new.address).await.unwrap();
    new.register().await;
    let live = new.cluster.state().position();
    match first(&new.cluster, live).await.unwrap() {
        Frame::Events { events, .. } => assert_eq!(events[0].id, Some(live), "from its snapshot on it serves"),
        other => panic!("{other:?}"),
    }
    // The newer pieces are whole and come; the one with the changed row never does.
    let arrived = async {
        loop {
            match first(&new.cluster, Id::new(1, 1_500)).await {
                Ok(_) => break,
                Err(Error::Elsewhere { upto, brokers }) => {
                    assert_eq!((upto >= 1_500, brokers), (true, vec![old.node]));
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                Err(error) => panic!("{error}"),
            }
        }
    };
    tokio::time::timeout(PATIENCE, arrived).await.expect("the newer pieces come");
    for _ in 0..3 {
        match first(&new.cluster, Id::new(1, 1)).await {
            Err(Error::Elsewhere { upto, brokers }) => assert_eq!((upto > 5, brokers), (true, vec![old.node])),
            other => panic!("{other:?}"),
        }
        tokio::time::sleep(Duration::from_millis(400)).await;
    }

    state.corrupt(Space::Journal, &changed, flip);
    let whole = async {
        while first(&new.cluster, Id::new(1, 1)).await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, whole).await.expect("the oldest piece comes");
    Follower::new().follow(&new.cluster, new.cluster.state().position()).await;
    // And it keeps what it fetched.
    let new = new.restart(&setup).await;
    until("it has the state again", || new.has_token("token-0")).await;
    Follower::new().follow(&new.cluster, new.cluster.state().position()).await;
}
