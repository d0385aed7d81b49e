//! Machines on this machine: a network, mount and host name namespace for each, joined by a bridge. Everything is made by
//! the run and goes away with it; nothing outside is touched, and no address is given to anything outside.
//!
//! A test calls itself again inside the namespaces ([`inside`]), where it is root, may make more of them ([`Machine`]), and
//! stands on the bridge itself, as the rest of the internet.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

/// Set in the environment of the inner run.
const MARK: &str = "SELVEDGE_TEST_INSIDE";
/// What a machine keeps of this one's `/etc`: how programs start, and how names are found.
const ETC: [&str; 5] = ["passwd", "group", "nsswitch.conf", "ld.so.cache", "host.conf"];

/// Where a test is.
pub enum Inside {
    /// In namespaces of its own.
    Yes,
    /// Outside; the inner run of the same test ended like this.
    Ran(Output),
    /// Namespaces cannot be made here; what they need.
    No(&'static str),
}

/// Runs the test `name` of this binary again in fresh namespaces, or says that this is that run.
pub fn inside(name: &str) -> Inside {
    if std::env::var_os(MARK).is_some() {
        return Inside::Yes;
    }
    if ip().is_none() {
        return Inside::No("ip (iproute2)");
    }
    let own = ["--net", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"];
    let user = ["--user", "--map-root-user"];
    // Root needs no user namespace, and a plain user may be allowed one.
    let user = if rustix::process::geteuid().is_root() { &[][..] } else { &user[..] };
    let unshare = || {
        let mut command = Command::new("unshare");
        command.args(user).args(own).stdin(Stdio::null());
        command
    };
    let probe = unshare()
        .args(["sh", "-c", "\"$1\" link add internet type bridge", "sh"])
        .arg(ip().unwrap_or_default())
        .output();
    if !probe.is_ok_and(|output| output.status.success()) {
        return Inside::No("root, or user namespaces for everybody");
    }
    let this = std::env::current_exe().expect("a test is a program");
    let output = unshare().arg(this).args(["--exact", name, "--nocapture"]).env(MARK, "1").output();
    Inside::Ran(output.expect("`unshare` was there a moment ago"))
}

/// The program `ip`: this machine's, or unpacked from its archive.
fn ip() -> Option<PathBuf> {
    let usual = ["/usr/sbin/ip", "/sbin/ip", "/usr/bin/ip", "/bin/ip"];
    let there = usual.map(PathBuf::from).into_iter().find(|path| path.exists());
    there.or_else(|| crate::syslog::tool("ip"))
}

/// Runs `ip`, which must succeed.
fn ip_run(line: &str) {
    let output =
        Command::new(ip().expect("it was there a moment ago")).args(line.split(' ')).output().expect("`ip` runs");
    assert!(output.status.success(), "ip {line}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A bridge, with an address of this run on it.
pub fn bridge(name: &str, address: &str) {
    ip_run(&format!("link add {name} type bridge"));
    ip_run(&format!("addr add {address} dev {name}"));
    ip_run(&format!("link set {name} up"));
}

/// A machine: its namespaces live as long as this.
pub struct Machine {
    name: String,
    dir: PathBuf,
    holder: Child,
    cards: usize,
}

impl Machine {
    /// A machine whose `/etc`, `/var/lib` and home are directories in `dir`, with `bin` as the program `selvedge`.
    pub fn new(name: &str, dir: &Path, bin: &Path) -> Self {
        let dir = dir.join(name);
        for sub in ["etc", "var-lib", "home", "bin"] {
            std::fs::create_dir_all(dir.join(sub)).expect("a directory");
        }
        for file in ETC {
            // What is not there is not needed there either.
            let _ = std::fs::copy(Path::new("/etc").join(file), dir.join("etc").join(file));
        }
        std::fs::write(dir.join("etc/hosts"), format!("127.0.0.1 localhost {name}\n")).expect("a file");
        std::os::unix::fs::symlink(bin, dir.join("bin/selvedge")).expect("a link");
        let script = "hostname \"$1\" && mount --bind \"$2/etc\" /etc && mount --bind \"$2/var-lib\" /var/lib && echo made && exec cat";
        let mut holder = Command::new("unshare")
            .args(["--net", "--mount", "--uts", "sh", "-c", script, "sh", name])
            .arg(&dir)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("a machine");
        let mut line = String::new();
        BufReader::new(holder.stdout.take().expect("piped")).read_line(&mut line).expect("it says a line");
        assert_eq!(line, "made\n", "the machine `{name}` could not be made");
        let machine = Self { name: name.to_owned(), dir, holder, cards: 0 };
        machine.enter(&ip().expect("it was there a moment ago").display().to_string(), &["link", "set", "lo", "up"]);
        machine
    }

    /// A network card with an address, on a bridge.
    pub fn plug(&mut self, bridge: &str, address: &str) {
        let (pid, card) = (self.holder.id(), format!("eth{}", self.cards));
        // Names of links have 15 characters at most.
        let cable = format!("{}-{}", self.name, self.cards);
        self.cards += 1;
        ip_run(&format!("link add {cable} type veth peer name {card} netns {pid}"));
        ip_run(&format!("link set {cable} master {bridge} up"));
        let ip = ip().expect("it was there a moment ago").display().to_string();
        self.enter(&ip, &["addr", "add", address, "dev", &card]);
        self.enter(&ip, &["link", "set", &card, "up"]);
    }

    /// A file, as `path` says it inside; relative ones are in the home.
    pub fn write(&self, path: &str, text: &str) {
        let path = match path.strip_prefix("/etc/") {
            Some(rest) => self.dir.join("etc").join(rest),
            None if path.starts_with('/') => {
                panic!("machines have files of their own in /etc and at home, not `{path}`")
            }
            None => self.dir.join("home").join(path),
        };
        std::fs::create_dir_all(path.parent().expect("it is in a directory")).expect("a directory");
        if path.ends_with("etc/hosts") {
            let lines = std::fs::read_to_string(&path).expect("it is there");
            return std::fs::write(&path, lines + text).expect("a file");
        }
        std::fs::write(&path, text).expect("a file");
    }

    /// A shell on this machine that does what `line` says, and nothing besides when it is one command.
    pub fn shell(&self, line: &str) -> Command {
        let line = if line.contains('|') { line.to_owned() } else { format!("exec {line}") };
        let mut command = self.program("sh");
        command.args(["-c", &line]);
        command
    }

    /// A file for what a program says.
    pub fn log(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    fn enter(&self, program: &str, args: &[&str]) {
        let output = self.program(program).args(args).output().expect("a program");
        assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// A program in this machine's namespaces; it takes the place of `nsenter`, so that its child is the program itself.
    fn program(&self, program: &str) -> Command {
        let home = self.dir.join("home");
        let mut command = Command::new("nsenter");
        command.arg(format!("--target={}", self.holder.id())).args(["--net", "--mount", "--uts"]);
        command.arg(format!("--wd={}", home.display())).arg(program);
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("SELVEDGE_")) {
            command.env_remove(name);
        }
        let path =
            format!("{}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", self.dir.join("bin").display());
        command.env("HOME", &home).env("PATH", path).env_remove("XDG_CONFIG_HOME").stdin(Stdio::null());
        command
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}
