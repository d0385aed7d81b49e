use std::sync::atomic::AtomicUsize;
use std::time::Instant;

use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::*;

const PREFACE: &[u8] = b"hello from the client";
const DEADLINE: Duration = Duration::from_secs(30);
const BULK_BYTES: usize = 64 << 20;

/// A gate that counts how often a flow came to wait at it.
struct TestGate {
    open: watch::Sender<bool>,
    waits: AtomicUsize,
}

impl TestGate {
    fn set(&self, open: bool) {
        self.open.send_replace(open);
    }

    fn waits(&self) -> usize {
        self.waits.load(Ordering::SeqCst)
    }
}

#[async_trait]
impl Gate for TestGate {
    fn open(&self) -> bool {
        *self.open.borrow()
    }

    async fn wait_open(&self) {
        self.waits.fetch_add(1, Ordering::SeqCst);
        let _ = self.open.subscribe().wait_for(|open| *open).await;
    }
}

/// A flow that runs, seen from both its ends.
struct World {
    relay: Relay,
    client: TcpStream,
    connector: TcpStream,
    gate: Arc<TestGate>,
    counters: Arc<Counters>,
    cut: CancellationToken,
    closed: JoinHandle<Closed>,
}

impl World {
    async fn new() -> Self {
        Self::with(Relay::new(RELAY_PIPES_MAX), None).await
    }

    async fn with(relay: Relay, answer_within: Option<Duration>) -> Self {
        Self::over(pair().await, relay, answer_within).await
    }

    async fn over((client, near): (TcpStream, TcpStream), relay: Relay, answer_within: Option<Duration>) -> Self {
        let (connector, far) = pair().await;
        let gate = Arc::new(TestGate { open: watch::Sender::new(true), waits: AtomicUsize::new(0) });
        let counters = Arc::new(Counters::new());
        let cut = CancellationToken::new();
        let flow = Flow {
            client: near,
            connector: far,
            preface: Bytes::from_static(PREFACE),
            gate: gate.clone(),
            counters: counters.clone(),
            cut: cut.clone(),
            answer_within,
        };
        let runs = relay.clone();
        let closed = tokio::spawn(async move { runs.run(flow).await });
        Self { relay, client, connector, gate, counters, cut, closed }
    }

    /// Reads the preface and answers one byte, so that both directions have moved.
    async fn greet(&mut self) {
        expect(&mut self.connector, PREFACE).await;
        self.connector.write_all(b"!").await.unwrap();
        expect(&mut self.client, b"!").await;
    }

    async fn closed(self) -> Closed {
        tokio::time::timeout(DEADLINE, self.closed).await.expect("the flow ends").unwrap()
    }
}

async fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (near, far) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
    let (near, far) = (near.unwrap(), far.unwrap().0);
    tune(&near).unwrap();
    tune(&far).unwrap();
    (near, far)
}

async fn expect(stream: &mut TcpStream, bytes: &[u8]) {
    let mut got = vec![0; bytes.len()];
    tokio::time::timeout(DEADLINE, stream.read_exact(&mut got)).await.expect("the bytes come").unwrap();
    assert_eq!(got, bytes);
}

async fn expect_reset(stream: &mut TcpStream) {
    let mut rest = Vec::new();
    let read = tokio::time::timeout(DEADLINE, stream.read_to_end(&mut rest)).await.expect("it ends");
    assert_eq!(read.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
}

async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let since = Instant::now();
    while !condition() {
        assert!(since.elapsed() < DEADLINE, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// Bytes that look random and are the same for the same seed.
fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    (0..len / 8).flat_map(|_| next()).collect()
}

async fn both_ways(relay: Relay) -> Pipes {
    let world = World::with(relay, None).await;
    let World { client, mut connector, relay, counters, closed, .. } = world;
    expect(&mut connector, PREFACE).await;
    let exchange = |mut stream: TcpStream, seed: u64| {
        tokio::spawn(async move {
            let sent = noise(seed, BULK_BYTES);
            let hash = Sha256::digest(&sent);
            let (mut read, mut write) = stream.split();
            let mut received = Vec::with_capacity(BULK_BYTES);
            let (wrote, got) = tokio::join!(
                async {
                    write.write_all(&sent).await?;
                    write.shutdown().await
                },
                read.read_to_end(&mut received)
            );
            wrote.unwrap();
            got.unwrap();
            (hash, Sha256::digest(&received), received.len())
        })
    };
    let (near, far) = tokio::join!(exchange(client, 7), exchange(connector, 11));
    let ((near_sent, near_got, near_len), (far_sent, far_got, far_len)) = (near.unwrap(), far.unwrap());
    assert_eq!((near_len, far_len), (BULK_BYTES, BULK_BYTES));
    assert!(near_sent == far_got && far_sent == near_got);
    let closed = closed.await.unwrap();
    assert_eq!(closed.why, Why::Ended);
    assert_eq!(closed.up_bytes, (PREFACE.len() + BULK_BYTES) as u64);
    assert_eq!(closed.down_bytes, BULK_BYTES as u64);
    assert!(closed.client.is_none() && closed.error.is_none());
    assert!(counters.active_at_ms() > 0);
    relay.pipes()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bulk_goes_both_ways_intact_and_returns_its_pipes() {
    let Pipes { open, idle } = both_ways(Relay::new(RELAY_PIPES_MAX)).await;
    assert!(open == idle && (1..=2).contains(&open), "{open} pipes, {idle} idle");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bulk_goes_both_ways_intact_when_no_pipe_is_to_be_had() {
    assert_eq!(both_ways(Relay::new(0)).await, Pipes { open: 0, idle: 0 });
    assert_eq!(both_ways(Relay::new(1)).await, Pipes { open: 1, idle: 1 });
}

#[tokio::test]
async fn half_close_passes_through() {
    let mut world = World::new().await;
    world.client.write_all(b" and more").await.unwrap();
    world.client.shutdown().await.unwrap();
    let mut all = Vec::new();
    world.connector.read_to_end(&mut all).await.unwrap();
    assert_eq!(all, [PREFACE, b" and more"].concat());
    world.connector.write_all(b"answer").await.unwrap();
    expect(&mut world.client, b"answer").await;
    assert!(!world.closed.is_finished());
    world.connector.write_all(b" to the end").await.unwrap();
    world.connector.shutdown().await.unwrap();
    let mut all = Vec::new();
    world.client.read_to_end(&mut all).await.unwrap();
    assert_eq!(all, b" to the end");
    assert_eq!(world.closed().await.why, Why::Ended);
}

#[tokio::test]
async fn a_reset_of_one_side_is_a_reset_of_the_other() {
    let mut world = World::new().await;
    world.greet().await;
    reset(&world.client);
    drop(std::mem::replace(&mut world.client, pair().await.0));
    expect_reset(&mut world.connector).await;
    let closed = world.closed().await;
    assert_eq!(closed.why, Why::ClientFailed);
    assert!(closed.client.is_none());

    let mut world = World::new().await;
    world.greet().await;
    reset(&world.connector);
    drop(std::mem::replace(&mut world.connector, pair().await.0));
    expect_reset(&mut world.client).await;
    let closed = world.closed().await;
    assert_eq!(closed.why, Why::ConnectorFailed);
    assert!(closed.client.is_none(), "after an answer there is no second choice");
}

#[tokio::test]
async fn a_reset_after_half_close_is_noticed_while_nothing_moves() {
    let mut world = World::new().await;
    world.greet().await;
    world.client.shutdown().await.unwrap();
    let mut end = [0; 1];
    assert_eq!(world.connector.read(&mut end).await.unwrap(), 0);
    reset(&world.client);
    drop(std::mem::replace(&mut world.client, pair().await.0));
    assert_eq!(world.closed().await.why, Why::ClientFailed);
}

#[tokio::test]
async fn a_closed_gate_holds_what_comes_and_an_open_one_lets_it_go_on() {
    let (client, near) = pair().await;
    let kept = SockRef::from(&near).try_clone().unwrap();
    let mut world = World::over((client, near), Relay::new(1), None).await;
    world.greet().await;
    world.gate.set(false);
    let forwarded = world.counters.up_bytes();
    world.client.write_all(b"held").await.unwrap();
    until("the flow waits at the gate", || world.gate.waits() > 0).await;
    assert_eq!(world.counters.up_bytes(), forwarded);
    assert_eq!(rustix::io::ioctl_fionread(&kept).unwrap(), 4, "nothing is read");
    let nothing = world.connector.try_read(&mut [0; 1]).unwrap_err();
    assert_eq!(nothing.kind(), io::ErrorKind::WouldBlock);
    world.gate.set(true);
    expect(&mut world.connector, b"held").await;
    world.connector.write_all(b"and back").await.unwrap();
    expect(&mut world.client, b"and back").await;
}

#[tokio::test]
async fn what_lies_in_a_pipe_is_not_forwarded_after_the_gate_closed() {
    let World { relay, client, mut connector, gate, counters, cut, closed } = World::new().await;
    expect(&mut connector, PREFACE).await;
    let (client_read, mut client) = client.into_split();
    let writer = tokio::spawn(async move { client.write_all(&noise(3, BULK_BYTES)).await.map(|()| client) });
    stalled(&counters).await;
    assert_eq!(relay.pipes(), Pipes { open: 1, idle: 0 }, "a flow whose reader sleeps keeps its pipe");
    gate.set(false);
    let forwarded = counters.up_bytes();
    let mut got = PREFACE.len() as u64;
    let mut buffer = vec![0; 1 << 20];
    while got < counters.up_bytes() || gate.waits() == 0 {
        let read = tokio::time::timeout(Duration::from_millis(20), connector.read(&mut buffer)).await;
        got += read.map_or(0, |len| len.unwrap() as u64);
    }
    assert_eq!((got, counters.up_bytes()), (forwarded, forwarded));
    assert_eq!(relay.pipes(), Pipes { open: 1, idle: 0 });
    assert_eq!(connector.try_read(&mut buffer).unwrap_err().kind(), io::ErrorKind::WouldBlock);

    gate.set(true);
    while got < (PREFACE.len() + BULK_BYTES) as u64 {
        got += connector.read(&mut buffer).await.unwrap() as u64;
    }
    let client = writer.await.unwrap().unwrap();
    until("the quiet flow has given its pipe back", || relay.pipes() == Pipes { open: 1, idle: 1 }).await;
    cut.cancel();
    assert_eq!(closed.await.unwrap().why, Why::Cut);
    drop((client, client_read));
}

#[tokio::test]
async fn a_cut_resets_both_sides_and_keeps_no_pipe_that_holds_bytes() {
    let World { relay, client, mut connector, counters, cut, closed, .. } = World::new().await;
    expect(&mut connector, PREFACE).await;
    let (mut client_read, mut client) = client.into_split();
    let writer = tokio::spawn(async move { client.write_all(&noise(5, BULK_BYTES)).await });
    stalled(&counters).await;
    cut.cancel();
    let closed = closed.await.unwrap();
    assert_eq!(closed.why, Why::Cut);
    assert!(closed.client.is_none());
    assert_eq!(closed.up_bytes, counters.up_bytes());
    assert!(writer.await.unwrap().is_err());
    assert!(client_read.read(&mut [0; 1]).await.map_or(true, |len| len == 0));
    expect_reset(&mut connector).await;
    assert_eq!(relay.pipes(), Pipes { open: 0, idle: 0 });
}

#[tokio::test]
async fn a_held_flow_can_be_cut() {
    let mut world = World::new().await;
    world.greet().await;
    world.gate.set(false);
    world.client.write_all(b"held").await.unwrap();
    until("the flow waits at the gate", || world.gate.waits() > 0).await;
    world.cut.cancel();
    expect_reset(&mut world.connector).await;
    assert_eq!(world.closed().await.why, Why::Cut);
}

#[tokio::test]
async fn a_side_that_does_not_read_does_not_hold_up_the_other_direction() {
    let World { client, mut connector, counters, cut, closed, .. } = World::new().await;
    expect(&mut connector, PREFACE).await;
    let (_client_read, mut client) = client.into_split();
    let (mut from_client, mut connector) = connector.into_split();
    let writer = tokio::spawn(async move { connector.write_all(&noise(9, BULK_BYTES)).await });
    stalled(&counters).await;
    for _ in 0..100 {
        client.write_all(b"still here").await.unwrap();
        let mut got = [0; 10];
        tokio::time::timeout(DEADLINE, from_client.read_exact(&mut got)).await.expect("it passes").unwrap();
        assert_eq!(&got, b"still here");
    }
    cut.cancel();
    assert_eq!(closed.await.unwrap().why, Why::Cut);
    assert!(writer.await.unwrap().is_err());
}

#[tokio::test]
async fn an_idle_flow_holds_no_pipe() {
    let mut world = World::new().await;
    world.greet().await;
    for _ in 0..10 {
        world.client.write_all(b"keystroke").await.unwrap();
        expect(&mut world.connector, b"keystroke").await;
    }
    assert_eq!(world.relay.pipes(), Pipes { open: 0, idle: 0 }, "small talk borrows none");
    let bulk = noise(1, 8 << 20);
    let (wrote, ()) = tokio::join!(world.client.write_all(&bulk), expect(&mut world.connector, &bulk));
    wrote.unwrap();
    until("the pipe is back", || world.relay.pipes() == Pipes { open: 1, idle: 1 }).await;
    assert!(!world.closed.is_finished());
}

#[tokio::test]
async fn a_connector_that_fails_before_it_answers_gives_the_client_back() {
    for with_reset in [true, false] {
        let mut world = World::new().await;
        expect(&mut world.connector, PREFACE).await;
        if with_reset {
            reset(&world.connector);
        }
        drop(std::mem::replace(&mut world.connector, pair().await.0));
        let closed = (&mut world.closed).await.unwrap();
        assert_eq!(closed.why, Why::ConnectorFailed);

        let (mut second, far) = pair().await;
        let flow = Flow {
            client: closed.client.expect("the client is given back"),
            connector: far,
            preface: Bytes::from_static(PREFACE),
            gate: world.gate.clone(),
            counters: world.counters.clone(),
            cut: world.cut.clone(),
            answer_within: Some(DEADLINE),
        };
        let relay = world.relay.clone();
        let runs = tokio::spawn(async move { relay.run(flow).await });
        expect(&mut second, PREFACE).await;
        second.write_all(b"second").await.unwrap();
        expect(&mut world.client, b"second").await;
        world.client.shutdown().await.unwrap();
        second.shutdown().await.unwrap();
        assert_eq!(runs.await.unwrap().why, Why::Ended);
    }
}

#[tokio::test]
async fn a_client_that_said_more_than_the_preface_is_not_given_to_a_second_connector() {
    let mut world = World::new().await;
    expect(&mut world.connector, PREFACE).await;
    world.client.write_all(b"more").await.unwrap();
    expect(&mut world.connector, b"more").await;
    reset(&world.connector);
    drop(std::mem::replace(&mut world.connector, pair().await.0));
    expect_reset(&mut world.client).await;
    let closed = world.closed().await;
    assert_eq!(closed.why, Why::ConnectorFailed);
    assert!(closed.client.is_none());
}

#[tokio::test]
async fn a_connector_that_never_answers_is_given_up_and_reset() {
    let mut world = World::with(Relay::new(1), Some(Duration::from_millis(50))).await;
    expect(&mut world.connector, PREFACE).await;
    expect_reset(&mut world.connector).await;
    let closed = world.closed().await;
    assert_eq!(closed.why, Why::NoAnswer);
    assert!(closed.client.is_some());
}

/// Waits until a flow whose reader sleeps has come to rest: the buffers are full and the count stands still.
async fn stalled(counters: &Counters) {
    let sum = || counters.up_bytes() + counters.down_bytes();
    let since = Instant::now();
    let mut last = 0;
    let mut same = 0;
    while same < 25 {
        assert!(since.elapsed() < DEADLINE, "the flow does not come to rest");
        tokio::time::sleep(Duration::from_millis(4)).await;
        same = if sum() == last && last > 1 << 16 { same + 1 } else { 0 };
        last = sum();
    }
}
