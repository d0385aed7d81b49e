//! `selvedge demo` and `selvedge tour` as a person runs them. A binary of its own, and one test at a time: each fills the
//! machine, and the tour measures.

mod terminal;

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Output, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use terminal::Terminal;

/// The last line of the banner.
const BANNER_END: &str = "Ctrl-C ends it.";
/// The first usual port: of the broker in frankfurt.
const USUAL_PORT: u16 = 7_101;
/// Keys and their order in the tour's last line.
const RESULT_KEYS: [&str; 9] = [
    "steps",
    "failed",
    "failover_ms",
    "reroute_ms",
    "broker_loss_ms",
    "revoke_ms",
    "isolated_stop_ms",
    "audit_missing",
    "audit_dup",
];

static ALONE: Mutex<()> = Mutex::new(());

/// A place for temporary files that only the programs of one test know, by which they are found again.
struct Place {
    dir: tempfile::TempDir,
    _alone: MutexGuard<'static, ()>,
}

impl Place {
    fn new() -> Self {
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        Self { dir: tempfile::tempdir().expect("a directory"), _alone: alone }
    }

    /// A command of the binary. What the caller's environment says of other clusters must not lead it astray.
    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_selvedge"));
        command.args(args).env("TMPDIR", self.dir.path()).stdin(Stdio::null());
        command.env("SELVEDGE_CONTEXT", "another").env("SELVEDGE_ENDPOINT", "https://192.0.2.1:1");
        command.env("SELVEDGE_TOKEN", "svt_of_another").env("SELVEDGE_STATE", "/nowhere");
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().expect("the binary runs")
    }

    /// A line of the banner, as a person pastes it.
    fn paste(&self, line: &str) -> Output {
        Command::new("sh").args(["-c", line]).env("TMPDIR", self.dir.path()).output().expect("a shell")
    }

    /// Process ids of everything that was started here and still runs.
    fn processes(&self) -> Vec<u32> {
        let mark = format!("TMPDIR={}", self.dir.path().display());
        let all = std::fs::read_dir("/proc").expect("/proc").flatten();
        let numbers = all.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        let ours = |pid: &u32| {
            let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            environment.split(|byte| *byte == 0).any(|variable| variable == mark.as_bytes())
        };
        numbers.filter(ours).collect()
    }

    /// No process and no file is left.
    fn is_clean(&self) {
        let left = self.processes();
        assert!(left.is_empty(), "processes are left: {left:?}");
        let files: Vec<_> = std::fs::read_dir(self.dir.path()).expect("it is there").flatten().collect();
        assert!(files.is_empty(), "files are left: {files:?}");
    }
}

#[test]
fn the_demo_says_what_is_there_and_ctrl_c_leaves_nothing() {
    let place = Place::new();
    // Ours now, or somebody's already.
    let _taken = TcpListener::bind(("127.0.0.1", USUAL_PORT));
    let mut terminal = Terminal::open(&place.command(&["demo"]));
    let banner = terminal.read_until(BANNER_END).to_owned();
    for text in ["broker     frankfurt", "broker     virginia", "broker     singapore", "connector  singapore-1"] {
        assert!(banner.contains(text), "{banner}");
    }
    for text in [
        "allowed@demo.test",
        "denied@demo.test",
        "leaver@demo.test",
        "ledger.internal:9000",
        "frankfurt-virginia 90 ms",
    ] {
        assert!(banner.contains(text), "{banner}");
    }
    assert!(banner.contains("goes away with Ctrl-C"), "{banner}");

    let instead = after(&banner, &format!("port {USUAL_PORT} was taken: "));
    assert!(banner.contains(&format!("edge 127.0.0.1:{instead} ")), "{banner}");
    assert!(banner.contains(&format!("port {USUAL_PORT} was taken: {instead} is used instead")), "{banner}");

    let second = place.run(&["demo"]);
    assert_eq!(second.status.code(), Some(2));
    let said = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(said.contains("a demo of yours runs already") && said.contains("selvedge demo status"), "{said}");

    next_commands(&place, &banner);
    first_steps(&place, &banner);

    let ask = |action: &str, name: &str| place.run(&["demo", action, name]);
    assert!(ask("stop", "virginia-1").status.success());
    assert!(ask("partition", "singapore").status.success());
    let status = text(&place.run(&["demo", "status"]));
    assert!(status.contains("connector  virginia-1   stopped"), "{status}");
    assert!(status.contains("cut off from the other brokers"), "{status}");
    for name in ["virginia-1", "singapore", "frankfurt", "virginia"] {
        assert!(ask("heal", name).status.success(), "{name}");
    }
    let status = text(&place.run(&["demo", "status"]));
    assert_eq!(status.matches(" runs\n").count(), 8, "{status}");
    assert_eq!(ask("kill", "nobody").status.code(), Some(2));

    assert!(place.processes().len() > 7, "brokers, connectors and clients are processes of their own");
    terminal.interrupt();
    assert_eq!(terminal.ended().code(), Some(0));
    place.is_clean();
    let nobody = place.run(&["demo", "status"]);
    assert!(String::from_utf8_lossy(&nobody.stderr).contains("no demo of yours runs"));
}

/// The banner's three commands do what they are there for.
fn next_commands(place: &Place, banner: &str) {
    reaches_crm(banner);
    let line =
        |of: &str| banner.lines().find(|line| line.contains(of)).unwrap_or_else(|| panic!("no `{of}`: {banner}"));
    let explained = place.paste(line(" explain --user "));
    assert_eq!(explained.status.code(), Some(1), "{}", String::from_utf8_lossy(&explained.stderr));
    assert!(text(&explained).contains("denied"), "{}", text(&explained));
    let status = place.paste(line(" cluster status"));
    assert!(status.status.success(), "{}", String::from_utf8_lossy(&status.stderr));
    let status = text(&status);
    assert!(["frankfurt", "virginia", "singapore"].iter().all(|name| status.contains(name)), "{status}");
    for name in ["frankfurt", "virginia", "singapore"] {
        assert!(place.run(&["demo", "heal", name]).status.success(), "{name}");
    }
}

/// Every command of the tutorial works, in its order.
fn first_steps(place: &Place, banner: &str) {
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/tutorial/first-steps.md");
    let page = std::fs::read_to_string(page).expect("the page");
    let home = format!("SELVEDGE_HOME={}", after(banner, "SELVEDGE_HOME="));
    let mut taken = 0;
    // Every second part is inside a fence.
    for line in page.split("\n```").skip(1).step_by(2).flat_map(str::lines) {
        if line.starts_with("curl ") {
            reaches_crm(banner);
        } else if let Some(rest) = line.strip_prefix("selvedge ") {
            taken += 1;
            let done = place.paste(&format!("{home} {} {rest}", env!("CARGO_BIN_EXE_selvedge")));
            let wanted = i32::from(rest.starts_with("explain --user denied@"));
            assert_eq!(done.status.code(), Some(wanted), "{line}: {}", String::from_utf8_lossy(&done.stderr));
            assert!(!done.stdout.is_empty(), "{line}");
        }
    }
    assert!(taken > 7, "only {taken} commands were found in the tutorial");
}

/// The client behind the banner's port carries a request. It was started, or lost its broker, a moment ago.
fn reaches_crm(banner: &str) {
    let address = after(banner, "curl http://").trim_end_matches('/');
    let address: SocketAddr = address.parse().expect("an address");
    let begun = Instant::now();
    while !get(address).is_some_and(|answer| answer.contains("This is crm.internal.")) {
        assert!(begun.elapsed() < Duration::from_secs(60), "no session through {address}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn a_closed_terminal_leaves_nothing_of_the_demo() {
    let place = Place::new();
    let mut terminal = Terminal::open(&place.command(&["demo"]));
    terminal.read_until(BANNER_END);
    terminal.close();
    place.is_clean();
}

#[test]
fn ctrl_c_leaves_nothing_of_a_demo_that_is_being_built() {
    let place = Place::new();
    let mut terminal = Terminal::open(&place.command(&["demo"]));
    terminal.read_until("a directory pushes three people");
    assert!(place.processes().len() > 3);
    terminal.interrupt();
    assert_eq!(terminal.ended().code(), Some(130));
    place.is_clean();
}

#[test]
fn the_tour_walks_every_step_and_each_holds() {
    let place = Place::new();
    let output = place.run(&["tour"]);
    let said = text(&output);
    assert_eq!(output.status.code(), Some(0), "{said}{}", String::from_utf8_lossy(&output.stderr));
    let result = said.lines().last().and_then(|line| line.strip_prefix("RESULT tour ")).expect("a last line");
    let pairs: Vec<(&str, &str)> = result.split(' ').map(|pair| pair.split_once('=').expect("`key=value`")).collect();
    assert!(pairs.iter().map(|(key, _)| *key).eq(RESULT_KEYS), "{result}");
    assert!(pairs.iter().all(|(_, value)| value.parse::<f64>().is_ok()), "{result}");
    for (key, wanted) in [("steps", "11"), ("failed", "0"), ("audit_missing", "0"), ("audit_dup", "0")] {
        assert!(pairs.contains(&(key, wanted)), "{result}");
    }
    place.is_clean();
}

/// The word after a text.
fn after<'a>(said: &'a str, before: &str) -> &'a str {
    let (_, rest) = said.split_once(before).unwrap_or_else(|| panic!("`{before}` was not said:\n{said}"));
    rest.split_whitespace().next().unwrap_or_default()
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn get(address: SocketAddr) -> Option<String> {
    let mut stream = TcpStream::connect(address).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(10))).ok()?;
    write!(stream, "GET / HTTP/1.1\r\nhost: {address}\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    Some(answer)
}
