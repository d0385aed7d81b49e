//! Retention on real files, and delivery from a real cluster of one broker to a real socket.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use selvedge_domain::command::{Apply, ApplyPut, Command, CursorMove, InitCluster, Outcome, PutBroker};
use selvedge_domain::rows::{BrokerRole, Cursor, Receiver, Token};
use selvedge_domain::{Actor, Asker, Body, Changes, Credential, Id, State, spec};
use selvedge_storage::audit::{self as stored, Journal, Options, StreamId, verify_stream};
use tempfile::TempDir;
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::retention::{RETENTION, sweep};
use super::{ExportGap, Exporter, Log, Record};
use crate::web::tests::house::{House, OWNER};

const NODE: u64 = 7;
const EARLIER: StreamId = StreamId { broker: NODE, boot: 1 };
const OWN: StreamId = StreamId { broker: NODE, boot: 2 };
/// When the records of these tests are made.
const MADE_MS: u64 = 1_000_000;
const PATIENCE: Duration = Duration::from_secs(30);

/// So small that few records fill a segment.
fn small() -> Options {
    Options { segment_bytes: 250, ..Options::default() }
}

fn fill(journal: &Journal, count: u64) {
    for n in 0..count {
        let body = format!("{{\"kind\":\"test\",\"n\":{n}}}");
        let ticket = journal.append(MADE_MS, body.as_bytes()).unwrap();
        tokio::task::block_in_place(|| ticket.wait()).unwrap();
    }
}

/// An earlier boot with twelve records, and the open journal of this one with as many.
fn two_boots(root: &Path, options: Options) -> Journal {
    fill(&Journal::open(root, EARLIER, small()).unwrap(), 12);
    let journal = Journal::open(root, OWN, options).unwrap();
    fill(&journal, 12);
    journal
}

/// The first record that is left of a stream, and how many there are; none when the stream is gone.
fn left(journal: &Journal, stream: StreamId) -> Option<(u64, u64)> {
    stored::streams(journal.root()).unwrap().contains(&stream).then(|| {
        let report = verify_stream(journal.root(), stream).unwrap();
        (report.first_seq, report.records)
    })
}

/// A state with log receivers.
struct Ground {
    state: State,
    owner: Actor,
}

impl Ground {
    fn new(receivers: &[&str]) -> Self {
        let mut ground = Self { state: State::default(), owner: Actor::BOOTSTRAP };
        let init = InitCluster {
            cluster_id: [1; 16],
            trust_domain: "demo.test".to_owned(),
            anchors: Vec::new(),
            owner_sha256: [2; 32],
            knock_secret: [3; 32],
            lease_ms: 10_000,
            hold_ms: 30_000,
        };
        ground.apply(Actor::BOOTSTRAP, Body::InitCluster(init));
        ground.owner = owner(&ground.state);
        let broker = PutBroker {
            node: NODE,
            name: "b1".to_owned(),
            region: "here".to_owned(),
            host: "b1.demo.test".to_owned(),
            edge: "127.0.0.1:1".to_owned(),
            web: "127.0.0.1:2".to_owned(),
            peer: "127.0.0.1:3".to_owned(),
            roles: vec![BrokerRole::Web as i32],
        };
        ground.apply(Actor::BOOTSTRAP, Body::PutBroker(broker));
        for name in receivers {
            ground.apply(ground.owner.clone(), receiver(name, "127.0.0.1:514"));
        }
        ground
    }

    fn apply(&mut self, actor: Actor, body: Body) {
        let command = Command::new(actor, NODE, None, body);
        let outcome = self.state.apply(MADE_MS, &command, &mut Changes::default());
        assert!(matches!(outcome, Outcome::Done { .. }), "{outcome:?}");
    }

    fn acknowledge(&mut self, receiver: &str, stream: StreamId, upto: u64) {
        let receiver = id_of(&self.state, receiver);
        let to = CursorMove { receiver, broker: stream.broker, boot: stream.boot, next_seq: upto + 1 };
        self.apply(Actor::BROKER, Body::MoveCursors(vec![to]));
    }
}

fn owner(state: &State) -> Actor {
    Actor::token(state.rows::<Token>().next().unwrap().id(), 1)
}

fn id_of(state: &State, receiver: &str) -> Id {
    state.rows::<Receiver>().find(|row| row.name == receiver).unwrap().id()
}

fn receiver(name: &str, address: &str) -> Body {
    let object = spec::Object::Receiver(spec::Receiver {
        name: name.to_owned(),
        address: address.to_owned(),
        tls_ca: String::new(),
        tls_name: String::new(),
    });
    let puts = vec![ApplyPut { object, compiled: None }];
    Body::Apply(Apply { puts, deletes: Vec::new(), expect_revision: None })
}

/// A time at which the records of these tests are old.
fn old_ms() -> u64 {
    MADE_MS + u64::try_from(RETENTION.as_millis()).unwrap() + 1
}

#[test]
fn what_every_receiver_has_goes_when_it_is_old_and_in_whole_segments() {
    let dir = TempDir::new().unwrap();
    let journal = two_boots(dir.path(), small());
    let mut ground = Ground::new(&["one", "two"]);
    for (receiver, earlier, own) in [("one", 12, 7), ("two", 6, 12)] {
        ground.acknowledge(receiver, EARLIER, earlier);
        ground.acknowledge(receiver, OWN, own);
    }
    assert_eq!(sweep(&ground.state, old_ms() - 1, &journal).unwrap(), 0, "it is not old yet");
    let before = journal.disk_bytes();
    let freed = sweep(&ground.state, old_ms(), &journal).unwrap();
    assert!(freed > 0);
    assert_eq!(journal.disk_bytes(), before - freed);
    for (stream, acknowledged) in [(EARLIER, 6), (OWN, 7)] {
        let (first, records) = left(&journal, stream).unwrap();
        assert!(first > 1 && first <= acknowledged + 1, "{first}");
        assert_eq!(first + records - 1, 12, "only the beginning went");
        assert!(acknowledged + 1 - first < 2, "whole segments that nobody needs are gone: {first}");
    }
    ground.acknowledge("two", EARLIER, 12);
    sweep(&ground.state, old_ms(), &journal).unwrap();
    assert_eq!(left(&journal, EARLIER), None, "a stream that everybody has goes whole");
}

#[test]
fn the_segment_that_is_being_written_never_goes() {
    let dir = TempDir::new().unwrap();
    let journal = two_boots(dir.path(), small());
    let ground = Ground::new(&[]);
    sweep(&ground.state, u64::MAX, &journal).unwrap();
    assert_eq!(left(&journal, EARLIER), None, "without receivers only the age counts");
    let (first, records) = left(&journal, OWN).unwrap();
    assert!(records >= 1 && first + records - 1 == 12);
    fill(&journal, 1);
    assert_eq!(left(&journal, OWN).unwrap().0, first);
    assert_eq!(journal.head().0, 13, "its numbers go on");
}

#[test]
fn a_receiver_that_has_no_cursor_yet_or_was_removed_counts_as_what_it_is() {
    let dir = TempDir::new().unwrap();
    let journal = two_boots(dir.path(), small());
    let mut ground = Ground::new(&["one", "new"]);
    ground.acknowledge("one", EARLIER, 12);
    ground.acknowledge("one", OWN, 12);
    assert_eq!(sweep(&ground.state, old_ms(), &journal).unwrap(), 0, "the new one lacks everything");
    let deletes = vec![spec::Key { kind: spec::Kind::Receiver, name: "new".to_owned() }];
    let remove = Body::Apply(Apply { puts: Vec::new(), deletes, expect_revision: None });
    ground.apply(ground.owner.clone(), remove);
    assert!(sweep(&ground.state, old_ms(), &journal).unwrap() > 0, "who was removed lacks nothing");
    assert_eq!(left(&journal, EARLIER), None);
}

#[test]
fn what_a_receiver_lacks_stays_when_the_quota_is_used_up_and_the_journal_refuses() {
    let dir = TempDir::new().unwrap();
    let options = Options { quota_bytes: 4_000, ..small() };
    let journal = two_boots(dir.path(), options);
    let mut ground = Ground::new(&["one"]);
    while let Ok(ticket) = journal.append(MADE_MS, b"{\"kind\":\"test\"}") {
        ticket.wait().unwrap();
    }
    let end = journal.head().0;
    assert_eq!(sweep(&ground.state, old_ms(), &journal).unwrap(), 0);
    assert!(journal.append(MADE_MS, b"{\"kind\":\"test\"}").is_err(), "nothing came free");
    assert_eq!(left(&journal, EARLIER), Some((1, 12)));
    assert_eq!(left(&journal, OWN), Some((1, end)));

    // The receiver is back, and everything is young.
    ground.acknowledge("one", EARLIER, 12);
    assert!(sweep(&ground.state, MADE_MS, &journal).unwrap() > 0);
    assert_eq!(left(&journal, EARLIER), None);
    assert_eq!(left(&journal, OWN), Some((1, end)), "this it still lacks");
    fill(&journal, 1);
}

#[test]
fn what_every_receiver_has_goes_however_young_only_when_the_quota_runs_low() {
    let dir = TempDir::new().unwrap();
    let journal = two_boots(dir.path(), small());
    let used = journal.disk_bytes();
    drop(journal);
    let mut ground = Ground::new(&["one"]);
    ground.acknowledge("one", EARLIER, 12);
    for (quota_bytes, goes) in [(used * 2, false), (used * 5 / 4, true)] {
        let journal = Journal::open(dir.path(), OWN, Options { quota_bytes, ..small() }).unwrap();
        assert_eq!(sweep(&ground.state, MADE_MS, &journal).unwrap() > 0, goes, "{quota_bytes}");
        assert_eq!(left(&journal, EARLIER).is_none(), goes);
        assert_eq!(left(&journal, OWN), Some((1, 12)));
    }
}

#[test]
fn a_broken_segment_stays_is_told_and_keeps_no_other_stream() {
    let dir = TempDir::new().unwrap();
    let journal = two_boots(dir.path(), small());
    let flipped = damage(dir.path(), EARLIER, 5);
    assert!(journal.broken_streams().is_empty());
    let ground = Ground::new(&[]);
    sweep(&ground.state, u64::MAX, &journal).unwrap();
    assert!(flipped.exists(), "evidence is not deleted");
    assert!(left(&journal, OWN).unwrap().0 > 1, "the other stream was freed");
    let broken = journal.broken_streams();
    assert_eq!((broken.len(), broken[0].stream.as_str()), (1, EARLIER.to_string().as_str()));
}

/// Flips a byte in the segment that has a record; answers its path.
fn damage(root: &Path, stream: StreamId, seq: u64) -> std::path::PathBuf {
    let mut segments: Vec<_> =
        std::fs::read_dir(root.join(stream.to_string())).unwrap().map(|entry| entry.unwrap().path()).collect();
    segments.sort();
    let first = |path: &Path| path.file_stem().unwrap().to_str().unwrap().parse::<u64>().unwrap();
    let path = segments.into_iter().rfind(|path| first(path) <= seq).unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[20] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    path
}

/// A syslog receiver that remembers the ids that it was sent, in order.
struct Siem {
    address: String,
    ids: Arc<Mutex<Vec<String>>>,
}

impl Siem {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, ids) = (listener.local_addr().unwrap().to_string(), Arc::<Mutex<Vec<String>>>::default());
        let kept = ids.clone();
        tokio::spawn(async move {
            while let Ok((mut socket, _)) = listener.accept().await {
                let kept = kept.clone();
                tokio::spawn(async move {
                    let mut buffer = Vec::new();
                    while socket.read_buf(&mut buffer).await.is_ok_and(|read| read > 0) {
                        while let Some(message) = take(&mut buffer) {
                            let id = message.split("[selvedge@32473 id=\"").nth(1).unwrap();
                            kept.lock().push(id.split('"').next().unwrap().to_owned());
                        }
                    }
                });
            }
        });
        Self { address, ids }
    }

    fn has_all(&self, wanted: &[String]) -> bool {
        let ids = self.ids.lock();
        wanted.iter().all(|id| ids.contains(id))
    }
}

/// The next message with its octet count, when it is whole.
fn take(buffer: &mut Vec<u8>) -> Option<String> {
    let space = buffer.iter().position(|byte| *byte == b' ')?;
    let length: usize = std::str::from_utf8(&buffer[..space]).unwrap().parse().unwrap();
    (buffer.len() > space + length).then(|| {
        let message = buffer.drain(..=space + length).skip(space + 1).collect();
        String::from_utf8(message).unwrap()
    })
}

fn ids(stream: StreamId, seqs: impl IntoIterator<Item = u64>) -> Vec<String> {
    seqs.into_iter().map(|seq| format!("{stream}/{seq}")).collect()
}

async fn until(what: &str, mut is: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is() {
        assert!(begun.elapsed() < PATIENCE, "{what} did not happen");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// The gap records of a journal.
fn gaps(journal: &Journal) -> Vec<ExportGap> {
    let mut reader = journal.reader_of_kept(journal.stream(), 1).unwrap();
    let records = reader.next_batch(usize::MAX, usize::MAX).unwrap();
    let gap = |record: &stored::Record| match serde_json::from_slice(record.body()) {
        Ok(Record::ExportGap(gap)) => Some(gap),
        _ => None,
    };
    records.iter().filter_map(gap).collect()
}

fn export(house: &House, journal: &Arc<Journal>) -> (CancellationToken, tokio::task::JoinHandle<()>) {
    let stop = CancellationToken::new();
    let log = Log::new(journal.clone(), Arc::new(|| MADE_MS));
    let exporter = Exporter::new(house.context.cluster.clone(), log, "b1".to_owned());
    (stop.clone(), tokio::spawn(exporter.run(stop)))
}

async fn add_receiver(house: &House, siem: &Siem) {
    let cluster = &house.context.cluster;
    let asker = Asker::holder(owner(&cluster.state()), Credential::new(OWNER));
    cluster.propose(asker, receiver("siem", &siem.address), None).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_receiver_that_is_added_late_gets_what_retention_left_and_the_gap_is_told_once() {
    let (house, dir, siem) = (House::new().await, TempDir::new().unwrap(), Siem::start().await);
    let node = house.context.cluster.node();
    let (earlier, own) = (StreamId { broker: node, boot: 1 }, StreamId { broker: node, boot: 2 });
    fill(&Journal::open(dir.path(), earlier, small()).unwrap(), 12);
    let journal = Arc::new(Journal::open(dir.path(), own, small()).unwrap());
    fill(&journal, 12);
    journal.delete_sealed_before(u64::MAX, |stream| if stream == earlier { 6 } else { 9 }).unwrap();
    let (earlier_first, own_first) = (left(&journal, earlier).unwrap().0, left(&journal, own).unwrap().0);
    assert!(earlier_first > 1 && own_first > 1);

    let (stop, exporter) = export(&house, &journal);
    add_receiver(&house, &siem).await;
    // Two more than were there: the records of the gaps.
    let mut wanted = ids(earlier, earlier_first..=12);
    wanted.extend(ids(own, own_first..=14));
    until("delivery of what is left", || siem.has_all(&wanted)).await;
    let found = gaps(&journal);
    let told: Vec<_> = found.iter().map(|gap| (gap.stream.clone(), gap.from, gap.upto, gap.why.as_str())).collect();
    let gap = |stream: StreamId, first: u64| (stream.to_string(), 1, Some(first - 1), "deleted");
    assert_eq!(told, [gap(earlier, earlier_first), gap(own, own_first)]);
    assert_eq!(found[0].receiver_name, "siem");
    let state = || house.context.cluster.state();
    let cursor = |stream: StreamId| {
        state().rows::<Cursor>().find(|cursor| cursor.boot == stream.boot).map(|cursor| cursor.next_seq)
    };
    until("both cursors", || cursor(earlier) == Some(13) && cursor(own) == Some(15)).await;
    stop.cancel();
    exporter.await.unwrap();

    // Another start goes on behind what was acknowledged, and has nothing to tell.
    let (stop, exporter) = export(&house, &journal);
    fill(&journal, 1);
    until("the record after it", || siem.has_all(&ids(own, [15]))).await;
    assert_eq!(*siem.ids.lock(), [wanted, ids(own, [15])].concat(), "each once, in order");
    assert_eq!(gaps(&journal).len(), 2);
    stop.cancel();
    exporter.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn delivery_goes_round_what_is_broken_in_an_earlier_stream_and_on_with_the_next() {
    let (house, dir, siem) = (House::new().await, TempDir::new().unwrap(), Siem::start().await);
    let stream = |boot| StreamId { broker: house.context.cluster.node(), boot };
    fill(&Journal::open(dir.path(), stream(1), small()).unwrap(), 12);
    fill(&Journal::open(dir.path(), stream(2), Options::default()).unwrap(), 5);
    let damaged = damage(dir.path(), stream(1), 5);
    let broken_at: u64 = damaged.file_stem().unwrap().to_str().unwrap().parse().unwrap();
    assert!(broken_at > 1, "not the first segment");
    damage(dir.path(), stream(2), 1);
    let journal = Arc::new(Journal::open(dir.path(), stream(3), small()).unwrap());
    let at_start: Vec<_> = journal.broken_streams().iter().map(|place| place.stream.clone()).collect();
    assert_eq!(at_start, [stream(2).to_string()], "a start looks at the last segments");
    fill(&journal, 3);

    let (stop, exporter) = export(&house, &journal);
    add_receiver(&house, &siem).await;
    until("the last stream", || siem.has_all(&ids(stream(3), 1..=5))).await;
    let found = gaps(&journal);
    let behind = found[0].upto.unwrap() + 1;
    assert!(behind > broken_at && behind <= 12);
    let told: Vec<_> = found.iter().map(|gap| (gap.stream.clone(), gap.from, gap.upto, gap.why.as_str())).collect();
    let first = (stream(1).to_string(), broken_at, Some(behind - 1), "broken");
    assert_eq!(told, [first, (stream(2).to_string(), 1, None, "broken")]);
    let wanted = ids(stream(1), (1..broken_at).chain(behind..=12));
    assert_eq!(*siem.ids.lock(), [wanted, ids(stream(3), 1..=5)].concat());
    assert_eq!(journal.broken_streams().len(), 2, "what a reader met is known from then on");
    stop.cancel();
    exporter.await.unwrap();
}
