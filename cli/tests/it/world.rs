//! A small Selvedge of real processes, made with the documented commands alone. Shared by tests and benchmarks.

use std::fmt::Write as _;
use std::io::{BufRead as _, BufReader, Read as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Longest wait for anything that should happen.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// Brokers, connectors and clients under one directory that goes away with the value.
pub struct World {
    bin: PathBuf,
    dir: tempfile::TempDir,
    pub brokers: Vec<Broker>,
    children: Vec<(String, Child)>,
    /// Timing of Raft.
    preset: String,
    /// What the environment of every command has besides.
    pub env: Vec<(String, String)>,
}

/// One broker: where it is, and its process while it runs.
pub struct Broker {
    pub name: String,
    pub edge: SocketAddr,
    pub web: SocketAddr,
    pub peer: SocketAddr,
    pub ops: SocketAddr,
    config: PathBuf,
    process: Option<Child>,
}

impl World {
    /// A cluster of `brokers` brokers, initialised, with a context for the command line.
    pub fn start(bin: &Path, brokers: usize) -> Self {
        Self::start_with(bin, brokers, Vec::new())
    }

    /// The same, with more in the environment of every command.
    pub fn start_with(bin: &Path, brokers: usize, env: Vec<(String, String)>) -> Self {
        Self::start_preset(bin, brokers, "test", env)
    }

    /// The same, with a preset for the timing of Raft.
    pub fn start_preset(bin: &Path, brokers: usize, preset: &str, env: Vec<(String, String)>) -> Self {
        let dir = tempfile::tempdir().expect("a directory for the world");
        let preset = preset.to_owned();
        let mut world = Self { bin: bin.to_owned(), dir, brokers: Vec::new(), children: Vec::new(), preset, env };
        for number in 1..=brokers {
            world.add_broker(number);
        }
        let config = world.brokers[0].config.clone();
        let root_key = world.path("root.key");
        let init = [
            "cluster",
            "init",
            "--config",
            text(&config),
            "--trust-domain",
            "test.example",
            "--root-key-out",
            text(&root_key),
            "--json",
        ];
        let init = world.json(&init);
        let pin = init["pin"].as_str().expect("`cluster init` says the pin").to_owned();
        let token = world.start_first();
        let endpoints: Vec<String> = world.brokers.iter().map(|broker| format!("https://{}", broker.web)).collect();
        let mut add = vec!["context", "add", "test", "--pin", &pin, "--token", &token];
        for endpoint in &endpoints {
            add.extend(["--endpoint", endpoint]);
        }
        world.ok(&add);
        for number in 1..brokers {
            let key = world.json(&["key", "create", "--kind", "broker", "--name", "join", "--uses", "1", "--json"]);
            let secret = key["secret"].as_str().expect("a join token").to_owned();
            let config = world.brokers[number].config.clone();
            let via = world.brokers[0].web.to_string();
            world.ok(&["cluster", "join", "--config", text(&config), "--token", &secret, "--via", &via]);
            world.start_broker(number);
        }
        world
    }

    /// Configures broker `b<number>`, which belongs to no cluster yet.
    pub fn add_broker(&mut self, number: usize) {
        let [edge, web, peer, ops] = free_ports();
        let name = format!("b{number}");
        let config = self.path(&format!("{name}.toml"));
        let (data, preset) = (self.path(&name), &self.preset);
        let toml = format!(
            "data_dir = {data:?}\nname = \"{name}\"\nregion = \"here\"\nhost = \"{name}.brokers.test\"\npreset = \"{preset}\"\n\
             edge = {{ bind = \"{edge}\" }}\nweb = {{ bind = \"{web}\" }}\npeer = {{ bind = \"{peer}\" }}\nops = {{ bind = \"{ops}\" }}\n"
        );
        std::fs::write(&config, toml).expect("a broker's configuration");
        self.brokers.push(Broker { name, edge, web, peer, ops, config, process: None });
    }

    fn start_first(&mut self) -> String {
        let mut command = self.command(&["broker", "--config", text(&self.brokers[0].config)]);
        let mut child = command.stdout(Stdio::piped()).stderr(self.broker_log(0)).spawn().expect("a broker");
        let stdout = child.stdout.take().expect("piped");
        self.brokers[0].process = Some(child);
        let mut lines = BufReader::new(stdout).lines();
        let token = lines
            .by_ref()
            .map_while(Result::ok)
            .find_map(|line| line.split_whitespace().find(|word| word.starts_with("svt_")).map(str::to_owned))
            .expect("the first start prints the owner's token");
        std::thread::spawn(move || lines.for_each(drop));
        self.wait_ready(0);
        token
    }

    /// Starts (or starts again) a broker and waits until it serves.
    pub fn start_broker(&mut self, number: usize) {
        self.spawn_broker(number);
        self.wait_ready(number);
    }

    /// Starts a broker's process.
    pub fn spawn_broker(&mut self, number: usize) {
        let config = self.brokers[number].config.clone();
        let log = self.broker_log(number);
        let child = self.command(&["broker", "--config", text(&config)]).stdout(Stdio::null()).stderr(log).spawn();
        self.brokers[number].process = Some(child.expect("a broker"));
    }

    fn broker_log(&self, number: usize) -> std::fs::File {
        let path = self.path(&format!("{}.log", self.brokers[number].name));
        std::fs::File::options().create(true).append(true).open(path).expect("a log file")
    }

    /// Waits until a broker's `readyz` answers 200.
    pub fn wait_ready(&self, number: usize) {
        let ops = self.brokers[number].ops;
        wait("readyz", || http_get(ops, "/readyz").is_some_and(|answer| answer.starts_with("HTTP/1.1 200")));
    }

    /// SIGKILL.
    pub fn kill_broker(&mut self, number: usize) {
        if let Some(mut child) = self.brokers[number].process.take() {
            child.kill().expect("the broker runs");
            child.wait().expect("a killed child ends");
        }
    }

    /// SIGTERM: it stops in its own time.
    pub fn ask_broker_to_stop(&mut self, number: usize) {
        let pid = i32::try_from(self.broker_pid(number)).ok().and_then(rustix::process::Pid::from_raw);
        let signal = rustix::process::Signal::TERM;
        rustix::process::kill_process(pid.expect("a process id"), signal).expect("the broker runs");
    }

    /// Waits until a broker that was asked to stop has ended, in order.
    pub fn wait_stopped(&mut self, number: usize) {
        let mut child = self.brokers[number].process.take().expect("the broker runs");
        let mut ended = None;
        wait("the broker stops", || {
            ended = child.try_wait().expect("our child");
            ended.is_some()
        });
        assert!(ended.is_some_and(|status| status.success()), "{ended:?}");
    }

    /// What a broker has written to its log.
    pub fn log_of(&self, number: usize) -> String {
        std::fs::read_to_string(self.path(&format!("{}.log", self.brokers[number].name))).expect("a log file")
    }

    /// Process id of a running broker.
    pub fn broker_pid(&self, number: usize) -> u32 {
        self.brokers[number].process.as_ref().expect("the broker runs").id()
    }

    /// Number of the broker that leads.
    pub fn leader(&self) -> usize {
        let status = self.json(&["cluster", "status", "--json"]);
        let leader = status["leader_name"].as_str().expect("someone leads");
        self.brokers.iter().position(|broker| broker.name == leader).expect("the leader is a broker")
    }

    /// A path under the world's directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A command of the binary, with this world's context.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.bin);
        command.args(args).env("SELVEDGE_HOME", self.path("home")).env_remove("SELVEDGE_CONTEXT").stdin(Stdio::null());
        command.envs(self.env.iter().map(|(name, value)| (name, value)));
        command
    }

    /// Runs a command to its end.
    pub fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().expect("the binary runs")
    }

    /// Runs a command that must succeed; answers what it printed.
    pub fn ok(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("text")
    }

    /// Runs a command that must succeed and print JSON.
    pub fn json(&self, args: &[&str]) -> serde_json::Value {
        let text = self.ok(args);
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{args:?}: {error}: {text}"))
    }

    /// Starts a child that ends with the world.
    pub fn spawn(&mut self, name: &str, args: &[&str]) {
        let log = std::fs::File::create(self.path(&format!("{name}.log"))).expect("a log file");
        let child = self.command(args).stdout(Stdio::null()).stderr(log).spawn().expect("a child");
        self.children.push((name.to_owned(), child));
    }

    /// Process id of a child.
    pub fn pid(&self, name: &str) -> u32 {
        self.children.iter().find(|(child, _)| child == name).expect("a child of this name").1.id()
    }

    /// SIGKILL to a child.
    pub fn kill(&mut self, name: &str) {
        let at = self.children.iter().position(|(child, _)| child == name).expect("a child of this name");
        let (_, mut child) = self.children.remove(at);
        child.kill().expect("the child runs");
        child.wait().expect("a killed child ends");
    }

    /// Applies YAML documents.
    pub fn apply(&self, yaml: &str) -> Output {
        let path = self.path("apply.yaml");
        std::fs::write(&path, yaml).expect("a file");
        self.run(&["apply", "-f", text(&path)])
    }

    /// Region `here`, connector group `here`, zone `internal`, and one segment for each `(name, host, port)`.
    pub fn apply_segments(&self, segments: &[(&str, &str, u16)]) {
        let mut yaml = "kind: Region\nname: here\nlatitude: 50.1\nlongitude: 8.7\n---\nkind: ConnectorGroup\nname: here\nregion: here\n---\nkind: Zone\nname: internal\n".to_owned();
        for (name, host, port) in segments {
            write!(
                yaml,
                "---\nkind: Segment\nname: {name}\nhosts: [{host}]\ntcp: [\"{port}\"]\nconnector_groups: [here]\n"
            )
            .expect("to a string");
        }
        let output = self.apply(&yaml);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    /// Enrols and starts a connector that reaches `host` at 127.0.0.1.
    pub fn connector(&mut self, name: &str, hosts: &[&str]) {
        self.connector_via(name, hosts, &[]);
    }

    /// The same, dialling brokers where `via` says.
    pub fn connector_via(&mut self, name: &str, hosts: &[&str], via: &[(&str, SocketAddr)]) {
        let secret = self.secret("connector", "here");
        let state = self.path(name);
        let web = self.brokers[0].web.to_string();
        self.ok(&["connector", "enrol", "--web", &web, "--secret", &secret, "--name", name, "--state", text(&state)]);
        let config = self.path(&format!("{name}.toml"));
        let mut toml = format!("state = {state:?}\nname = \"{name}\"\nallow = [\"127.0.0.1\"]\n[hosts]\n");
        for host in hosts {
            writeln!(toml, "\"{host}\" = \"127.0.0.1\"").expect("to a string");
        }
        toml.push_str("[via]\n");
        for (broker, address) in via {
            writeln!(toml, "{broker} = \"{address}\"").expect("to a string");
        }
        std::fs::write(&config, toml).expect("a connector's configuration");
        self.spawn(name, &["connector", "run", "--config", text(&config)]);
    }

    /// An enrolment secret with one use.
    pub fn secret(&self, kind: &str, target: &str) -> String {
        let key = self
            .json(&["key", "create", "--kind", kind, "--name", "test", "--target", target, "--uses", "1", "--json"]);
        key["secret"].as_str().expect("a secret").to_owned()
    }

    /// A directory with its SCIM token.
    pub fn directory(&self, name: &str) -> String {
        let directory = self.json(&["directory", "create", name, "--json"]);
        directory["token"].as_str().expect("a token").to_owned()
    }

    /// A request to broker `number`'s web listener; answers status and JSON body.
    pub fn http(
        &self,
        number: usize,
        method: &str,
        path: &str,
        token: &str,
        body: Option<serde_json::Value>,
    ) -> (u16, serde_json::Value) {
        request(self.brokers[number].web, method, path, token, body)
    }

    /// A user pushed by SCIM; answers its id.
    pub fn user(&self, token: &str, user_name: &str) -> String {
        scim_user(self.brokers[0].web, token, user_name)
    }

    /// A group pushed by SCIM; answers its id.
    pub fn group(&self, token: &str, name: &str, members: &[&str]) -> String {
        scim_group(self.brokers[0].web, token, name, members)
    }

    /// Enrols a person's client; answers its state directory.
    pub fn client(&self, name: &str, user: &str) -> PathBuf {
        let code = self.secret("device", user);
        let state = self.path(name);
        let web = self.brokers[0].web.to_string();
        self.ok(&["client", "enrol", "--web", &web, "--code", &code, "--name", name, "--state", text(&state)]);
        state
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let brokers = self.brokers.iter_mut().filter_map(|broker| broker.process.take());
        for mut child in self.children.drain(..).map(|(_, child)| child).chain(brokers) {
            let _ = child.kill();
            let _ = child.wait();
        }
        if std::thread::panicking() {
            for name in self.brokers.iter().map(|broker| broker.name.clone()) {
                let log = std::fs::read_to_string(self.path(&format!("{name}.log"))).unwrap_or_default();
                let tail: Vec<&str> = log.lines().rev().take(20).collect();
                eprintln!("--- {name}");
                tail.into_iter().rev().for_each(|line| eprintln!("{line}"));
            }
        }
    }
}

/// A request to a web listener; answers status and JSON body.
pub fn request(
    web: SocketAddr,
    method: &str,
    path: &str,
    token: &str,
    body: Option<serde_json::Value>,
) -> (u16, serde_json::Value) {
    let url = format!("https://{web}{path}");
    let request = async {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let client = reqwest::Client::builder().tls_danger_accept_invalid_certs(true).timeout(DEADLINE).build()?;
        let mut request = client.request(method.parse().expect("a method"), url).bearer_auth(token);
        if let Some(body) = body {
            request = request.header("content-type", "application/scim+json").body(body.to_string());
        }
        let answer = request.send().await?;
        let status = answer.status().as_u16();
        let text = answer.text().await?;
        Ok::<_, reqwest::Error>((status, serde_json::from_str(&text).unwrap_or(serde_json::Value::String(text))))
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(request).unwrap_or_else(|error| (0, serde_json::Value::String(error.to_string())))
}

/// A user pushed by SCIM; answers its id.
pub fn scim_user(web: SocketAddr, token: &str, user_name: &str) -> String {
    let body = serde_json::json!({"schemas": ["urn:ietf:params:scim:schemas:core:2.0:User"], "userName": user_name, "active": true});
    let (status, user) = request(web, "POST", "/scim/v2/Users", token, Some(body));
    assert_eq!(status, 201, "{user}");
    user["id"].as_str().expect("an id").to_owned()
}

/// A group pushed by SCIM; answers its id.
pub fn scim_group(web: SocketAddr, token: &str, name: &str, members: &[&str]) -> String {
    let members: Vec<_> = members.iter().map(|id| serde_json::json!({"value": id})).collect();
    let body = serde_json::json!({"schemas": ["urn:ietf:params:scim:schemas:core:2.0:Group"], "displayName": name, "members": members});
    let (status, group) = request(web, "POST", "/scim/v2/Groups", token, Some(body));
    assert_eq!(status, 201, "{group}");
    group["id"].as_str().expect("an id").to_owned()
}

/// Waits for a condition.
pub fn wait(what: &str, mut is: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is() {
        assert!(begun.elapsed() < DEADLINE, "{what} did not happen within {DEADLINE:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Addresses on loopback that were free a moment ago, and that no connection is given in the meantime: a broker that is down
/// finds its own again.
pub fn free_ports<const N: usize>() -> [SocketAddr; N] {
    /// Below what systems give to connections.
    const PORTS: std::ops::Range<u16> = 10_000..32_000;
    static NEXT: AtomicU32 = AtomicU32::new(0);
    // Another process that asks at the same time begins elsewhere.
    let begin = std::process::id().wrapping_mul(977);
    [(); N].map(|()| {
        let mut tries = PORTS.map(|_| {
            let place = begin.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)) % PORTS.len() as u32;
            SocketAddr::from((Ipv4Addr::LOCALHOST, PORTS.start + place as u16))
        });
        tries.find(|address| TcpListener::bind(address).is_ok()).expect("a free port")
    })
}

/// A plain HTTP GET; none when nobody answers.
pub fn http_get(address: SocketAddr, path: &str) -> Option<String> {
    use std::io::Write as _;
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(1)).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    Some(answer)
}

/// A path as an argument.
pub fn text(path: &Path) -> &str {
    path.to_str().expect("paths of tests are text")
}
