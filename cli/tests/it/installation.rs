//! `docs/how-to/run-a-cluster.md`, carried out: six machines, the binary, and what stands on the page.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::Path;
use std::process::{Child, Stdio};

use crate::machines::{Inside, Machine, bridge, inside};
use crate::page::{Step, steps};
use crate::syslog::skip;
use crate::world::{DEADLINE, scim_group, scim_user, wait};

const NAME: &str = "installation::the_how_to_page_makes_a_cluster_on_six_machines";
const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/how-to/run-a-cluster.md");

/// Each machine of the page, and its networks with its address there.
const MACHINES: [(&str, &[(&str, &str)]); 6] = [
    ("fra-1", &[("internet", "198.51.100.11/24")]),
    ("iad-1", &[("internet", "198.51.100.12/24")]),
    ("sin-1", &[("internet", "198.51.100.13/24")]),
    ("fra-c1", &[("internet", "198.51.100.21/24"), ("apps-fra", "10.20.0.2/24")]),
    ("iad-c1", &[("internet", "198.51.100.22/24"), ("apps-iad", "10.30.0.2/24")]),
    ("laptop", &[("internet", "198.51.100.31/24")]),
];
/// The web listener that the directory speaks to.
const WEB: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::new(198, 51, 100, 12)), 8_443);

#[test]
fn the_how_to_page_makes_a_cluster_on_six_machines() {
    match inside(NAME) {
        Inside::Yes => walk(),
        Inside::No(needs) => skip("the_how_to_page_makes_a_cluster_on_six_machines", needs),
        Inside::Ran(output) => {
            let said = [output.stdout, output.stderr].concat();
            // Indented, so that nobody takes it for results of this run.
            let said = String::from_utf8_lossy(&said).replace('\n', "\n    ");
            assert!(output.status.success(), "inside the namespaces:\n    {said}");
        }
    }
}

fn walk() {
    let dir = tempfile::tempdir().expect("a directory");
    bridge("internet", "198.51.100.1/24");
    bridge("apps-fra", "10.20.0.10/24");
    bridge("apps-iad", "10.30.0.10/24");
    application(Ipv4Addr::new(10, 20, 0, 10), "the crm");
    application(Ipv4Addr::new(10, 30, 0, 10), "the wiki");
    let mut site = Site { machines: BTreeMap::new(), running: Vec::new(), pin: String::new(), secret: String::new() };
    for (name, cards) in MACHINES {
        let mut machine = Machine::new(name, dir.path(), Path::new(env!("CARGO_BIN_EXE_selvedge")));
        cards.iter().for_each(|(bridge, address)| machine.plug(bridge, address));
        site.machines.insert(name.to_owned(), machine);
    }
    let page = std::fs::read_to_string(PAGE).expect("the page");
    let mut commands = 0;
    for step in steps(&page) {
        match step {
            Step::File { path, machines, text } => {
                machines.iter().for_each(|name| site.machine(name).write(&path, &text))
            }
            Step::Command { machine, line } => {
                commands += 1;
                site.carry_out(&machine, &line);
            }
        }
    }
    assert!(commands > 20, "only {commands} commands were found on the page");

    // Nobody without a session reaches an application.
    let straight = site.machine("laptop").shell("ip route get 10.20.0.10").output().expect("a shell");
    assert!(!straight.status.success());
    let unknown = site.said("laptop", "printf 'x' | selvedge client nc payroll.internal 8080");
    assert_eq!(unknown.0, Some(1), "{}", unknown.1);

    // One machine is lost; nobody else is told anything.
    site.lose("fra-1", "selvedge broker");
    wait("a session without fra-1", || {
        site.said("laptop", "printf 'GET / HTTP/1.0\\r\\n\\r\\n' | selvedge client nc crm.internal 8080")
            .1
            .contains("the crm")
    });
    wait("a cluster of the other two", || {
        let (code, said) = site.said("fra-1", "selvedge cluster status");
        code == Some(0) && (said.contains("leader iad-1") || said.contains("leader sin-1"))
    });
}

/// The machines, what runs on them, and what was printed for the next step.
struct Site {
    machines: BTreeMap<String, Machine>,
    running: Vec<(String, String, Child)>,
    pin: String,
    secret: String,
}

impl Site {
    fn machine(&self, name: &str) -> &Machine {
        self.machines.get(name).unwrap_or_else(|| panic!("the page names a machine `{name}`"))
    }

    /// Does what a line of the page says, as an operator does: what was printed is written where the page says so.
    fn carry_out(&mut self, machine: &str, line: &str) {
        let line = line.replace(" PIN ", &format!(" {} ", self.pin));
        if ["selvedge broker ", "selvedge connector run "].iter().any(|program| line.starts_with(program)) {
            return self.leave_running(machine, &line);
        }
        // Connectors and brokers that were just started are not everywhere at once: these are asked until they say so.
        let wanted: &[&str] = match line.split(" --").next().unwrap_or_default() {
            "selvedge cluster status" => &["fra-1", "iad-1", "sin-1", "leader"],
            "selvedge connector list" => &["fra-c1", "iad-c1"],
            "selvedge explain" => &["allowed"],
            "selvedge client status" => &["spiffe://example.com/client/", "internal"],
            "selvedge audit tail" => &["session.open", "wiki"],
            _ if line.ends_with("client nc crm.internal 8080") => &["HTTP/1.0 200 OK", "the crm"],
            _ if line.ends_with("client nc wiki.internal 8080") => &["HTTP/1.0 200 OK", "the wiki"],
            _ => {
                let (code, said) = self.said(machine, &line);
                assert_eq!(code, Some(0), "on {machine}: {line}\n{said}");
                return self.keep(&line, &said);
            }
        };
        let mut said = (None, String::new());
        let begun = std::time::Instant::now();
        while said.0 != Some(0) || !wanted.iter().all(|text| said.1.contains(text)) {
            assert!(
                begun.elapsed() < DEADLINE,
                "on {machine}: {line}\n{wanted:?} is not all in it ({:?})\n{}",
                said.0,
                said.1
            );
            said = self.said(machine, &line);
        }
    }

    /// What an operator copies from a terminal.
    fn keep(&mut self, line: &str, said: &str) {
        let after =
            |word: &str| said.lines().find_map(|line| line.strip_prefix(word)).map(|rest| rest.trim().to_owned());
        if let Some(pin) = after("pin ") {
            self.pin = pin;
        }
        if let Some(secret) = after("secret ") {
            self.secret = secret;
        }
        if line.starts_with("selvedge directory create ") {
            let token = after("token ").expect("a directory's token");
            // What the directory does from then on.
            let ann = scim_user(WEB, &token, "ann@example.com");
            scim_group(WEB, &token, "sales", &[&ann]);
        }
    }

    /// Starts a program that keeps its terminal, and waits until it says that it serves.
    fn leave_running(&mut self, machine: &str, line: &str) {
        let log = self.machine(machine).log("program.log");
        let file = std::fs::File::create(&log).expect("a log file");
        let mut command = self.machine(machine).shell(line);
        let mut child = command.stdout(Stdio::piped()).stderr(file).spawn().expect("a program");
        let stdout = child.stdout.take().expect("piped");
        self.running.push((machine.to_owned(), line.to_owned(), child));
        let said = || std::fs::read_to_string(&log).unwrap_or_default();
        if line.starts_with("selvedge broker ") {
            wait(&format!("`serving` of {machine}"), || said().contains("serving"));
        }
        if self.running.len() == 1 {
            let token = BufReader::new(stdout).lines().map_while(Result::ok);
            let token = token.map(|line| line.trim().to_owned()).find(|line| line.starts_with("svt_"));
            self.secret = token.expect("the first start prints the owner's token");
        }
    }

    /// Runs a line to its end, with what was printed last pasted into it; its exit code and all that it said.
    fn said(&self, machine: &str, line: &str) -> (Option<i32>, String) {
        let mut command = self.machine(machine).shell(line);
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("a shell");
        // A command that reads nothing ends without it.
        let _ = child.stdin.take().expect("piped").write_all(format!("{}\n", self.secret).as_bytes());
        let output = child.wait_with_output().expect("it ends");
        let said = [output.stdout, output.stderr].concat();
        (output.status.code(), String::from_utf8_lossy(&said).into_owned())
    }

    /// SIGKILL to a program.
    fn lose(&mut self, machine: &str, program: &str) {
        let at = self.running.iter().position(|(on, line, _)| on == machine && line.starts_with(program));
        let (_, _, mut child) = self.running.remove(at.expect("it runs"));
        child.kill().expect("it runs");
        child.wait().expect("a killed child ends");
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        for (machine, line, mut child) in self.running.drain(..) {
            let _ = child.kill();
            let _ = child.wait();
            if std::thread::panicking() {
                let log = std::fs::read_to_string(self.machines[&machine].log("program.log")).unwrap_or_default();
                let tail: Vec<&str> = log.lines().rev().take(15).collect();
                eprintln!("--- {machine}: {line}");
                tail.into_iter().rev().for_each(|line| eprintln!("{line}"));
            }
        }
    }
}

/// A small HTTP server that says who it is.
fn application(address: Ipv4Addr, what: &'static str) {
    let listener = TcpListener::bind((address, 8_080)).expect("the address is ours");
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let mut head = Vec::new();
                let mut byte = [0];
                while !head.ends_with(b"\r\n\r\n") && stream.read(&mut byte)? == 1 {
                    head.push(byte[0]);
                }
                write!(stream, "HTTP/1.0 200 OK\r\ncontent-length: {}\r\n\r\n{what}\n", what.len() + 1)
            });
        }
    });
}
