//! Brokers that leave in order: nobody loses a session that ends in time.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use crate::regions::{attachments, only, records, sessions, stitched_by};
use crate::shop::{Shop, exchange, is_cut};
use crate::world::{text, wait};

/// Sessions that are open at any time during an upgrade.
const LOAD: usize = 4;
/// Lines of one session, and the pause between two.
const LINES: usize = 6;
const PAUSE: Duration = Duration::from_millis(100);

#[test]
fn three_brokers_started_anew_one_after_the_other_cut_no_session_that_ends_in_time() {
    let mut shop = Shop::open(3);
    let ann = shop.world.client("ann", "ann@test.example");
    let address = shop.listener(&ann);
    let load = Load::begin(address);
    for number in 0..3 {
        wait("client and connector at two brokers", || usable(&shop, &ann) >= 2 && attachments(&shop.world).len() >= 2);
        let before = load.done.load(Ordering::SeqCst);
        wait("sessions during the upgrade", || load.done.load(Ordering::SeqCst) > before + LOAD);
        shop.world.ask_broker_to_stop(number);
        shop.world.wait_stopped(number);
        let log = shop.world.log_of(number);
        assert!(log.contains("sessions_cut=0"), "{log}");
        shop.world.start_broker(number);
    }
    let (done, cut) = load.end();
    assert_eq!(cut, [] as [String; 0], "of {done}");
    for number in 0..3 {
        let cut = records(&shop.world, number).into_iter().find(|record| record["why"] == "drained");
        assert_eq!(cut, None);
    }
}

#[test]
fn a_drain_gives_sessions_until_its_deadline_and_a_restart_does_not_forget_it() {
    let mut shop = Shop::open(3);
    let ann = shop.world.client("ann", "ann@test.example");
    let address = shop.listener(&ann);
    let mut opened = None;
    wait("a session", || {
        opened = exchange(address).ok();
        opened.is_some()
    });
    let mut live = opened.expect("waited for");
    let name = stitched_by(&shop.world, &sessions(&shop.world)[0]);
    let number = shop.world.brokers.iter().position(|broker| broker.name == name).expect("one of ours");

    let said = shop.world.ok(&["cluster", "drain", &name, "--deadline", "3s"]);
    assert!(said.contains("drained sessions_cut=1"), "{said}");
    assert!(is_cut(&mut live));
    let closed = records(&shop.world, number).into_iter().find(|record| record["why"] == "drained");
    assert!(closed.is_some_and(|record| record["kind"] == "session.close"));
    let mut next = None;
    wait("a session that goes through another broker", || {
        next = exchange(address).ok();
        next.is_some() && sessions(&shop.world).iter().all(|session| stitched_by(&shop.world, session) != name)
    });
    wait("another leader", || shop.world.leader() != number);

    shop.world.ask_broker_to_stop(number);
    shop.world.wait_stopped(number);
    shop.world.start_broker(number);
    let bob = shop.world.client("ann-again", "ann@test.example");
    let (out, said, code) = nc_via(&shop, &bob, &name);
    assert_eq!((out.as_str(), code), ("", Some(2)), "it drains still: {said}");
    let said = shop.world.ok(&["cluster", "drain", &name]);
    assert!(said.contains("drained sessions_cut=0"), "{said}");
    shop.world.ok(&["cluster", "drain", &name, "--undo"]);
    wait("sessions there again", || nc_via(&shop, &bob, &name).0 == "HELLO\n");
}

#[test]
fn a_second_signal_ends_the_patience_of_a_broker_that_stops() {
    let mut shop = Shop::open(1);
    let ann = shop.world.client("ann", "ann@test.example");
    let address = shop.listener(&ann);
    let mut live = exchange(address).expect("a session");
    shop.world.ask_broker_to_stop(0);
    wait("it has begun to stop", || shop.world.log_of(0).contains("draining"));
    live.write_all(b"still\n").expect("taken");
    let mut answer = [0; 6];
    live.read_exact(&mut answer).expect("it goes on");
    assert_eq!(&answer, b"STILL\n");
    shop.world.ask_broker_to_stop(0);
    assert!(is_cut(&mut live));
    shop.world.wait_stopped(0);
    let log = shop.world.log_of(0);
    assert!(log.contains("sessions_cut=1"), "{log}");
    shop.world.start_broker(0);
    let records = records(&shop.world, 0);
    let lost = records.iter().find(|record| record["kind"] == "session.lost");
    assert_eq!(lost, None, "the session's end was recorded before the broker ended");
}

/// Sessions that are open, one after the other, in a few threads.
struct Load {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicUsize>,
    cut: Arc<Mutex<Vec<String>>>,
    threads: Vec<thread::JoinHandle<()>>,
}

impl Load {
    fn begin(address: SocketAddr) -> Self {
        let (stop, done) = <(Arc<AtomicBool>, Arc<AtomicUsize>)>::default();
        let cut = Arc::<Mutex<Vec<String>>>::default();
        let run = || {
            let (stop, done, cut) = (stop.clone(), done.clone(), cut.clone());
            thread::spawn(move || {
                while !stop.load(Ordering::SeqCst) {
                    // Who is refused tries again, as people do.
                    let Ok(opened) = exchange(address) else {
                        thread::sleep(PAUSE);
                        continue;
                    };
                    match to_its_end(opened) {
                        Ok(()) => drop(done.fetch_add(1, Ordering::SeqCst)),
                        Err(error) => cut.lock().expect("no thread panicked").push(error.to_string()),
                    }
                }
            })
        };
        let threads = (0..LOAD).map(|_| run()).collect();
        Self { stop, done, cut, threads }
    }

    /// How many ended in order, and why others ended.
    fn end(self) -> (usize, Vec<String>) {
        self.stop.store(true, Ordering::SeqCst);
        self.threads.into_iter().for_each(|thread| thread.join().expect("no thread panicked"));
        let cut = self.cut.lock().expect("no thread panicked").clone();
        (self.done.load(Ordering::SeqCst), cut)
    }
}

/// The rest of a session that was opened, in order.
fn to_its_end(mut stream: TcpStream) -> std::io::Result<()> {
    for _ in 1..LINES {
        thread::sleep(PAUSE);
        stream.write_all(b"hello\n")?;
        stream.read_exact(&mut [0; 6])?;
    }
    stream.shutdown(Shutdown::Write)?;
    match stream.read(&mut [0])? {
        0 => Ok(()),
        _ => Err(std::io::Error::other("more than was asked for")),
    }
}

/// Brokers that a client may use now.
fn usable(shop: &Shop, state: &Path) -> usize {
    let status = shop.world.json(&["client", "status", "--state", text(state), "--json"]);
    status["brokers"].as_array().into_iter().flatten().filter(|broker| broker["usable"] == true).count()
}

/// `client nc` through one broker alone.
fn nc_via(shop: &Shop, state: &Path, broker: &str) -> (String, String, Option<i32>) {
    let via: Vec<String> = only(broker).iter().map(|(other, nowhere)| format!("{other}={nowhere}")).collect();
    let port = shop.app.port().to_string();
    let mut args = vec!["client", "nc", "shop.internal", &port, "--state", text(state)];
    via.iter().for_each(|via| args.extend(["--via", via]));
    let mut command: Command = shop.world.command(&args);
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("a client");
    let _ = child.stdin.take().expect("piped").write_all(b"hello\n");
    let output = child.wait_with_output().expect("it ends");
    let text = |bytes| String::from_utf8(bytes).expect("text");
    (text(output.stdout), text(output.stderr), output.status.code())
}
