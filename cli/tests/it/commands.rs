//! Commands that need no cluster: help, configuration files, contexts, unreachable endpoints.

use std::io::Write as _;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};

const PIN: &str = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";

/// The binary with a home of its own.
struct Home(tempfile::TempDir);

impl Home {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a directory"))
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_selvedge"));
        for name in ["CONTEXT", "ENDPOINT", "TOKEN", "PIN", "STATE", "LOG", "LOG_FORMAT", "OTLP_ENDPOINT"] {
            command.env_remove(format!("SELVEDGE_{name}"));
        }
        command.args(args).env("SELVEDGE_HOME", self.0.path()).stdin(Stdio::null());
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().expect("the binary runs")
    }

    fn run_with(&self, args: &[&str], input: &str) -> Output {
        let mut child = self
            .command(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary runs");
        child.stdin.take().expect("piped").write_all(input.as_bytes()).expect("it reads");
        child.wait_with_output().expect("it ends")
    }
}

fn err(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn out(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// An endpoint where nobody listens.
fn nobody() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    format!("https://{}", listener.local_addr().expect("bound"))
}

/// The commands that a help text lists.
fn listed(help: &str) -> Vec<String> {
    let commands = help.lines().skip_while(|line| *line != "Commands:").skip(1);
    let named =
        commands.take_while(|line| !line.is_empty()).filter(|line| line.starts_with("  ") && !line.starts_with("   "));
    named.filter_map(|line| line.split_whitespace().next()).filter(|name| *name != "help").map(str::to_owned).collect()
}

#[test]
fn every_command_has_its_help() {
    let home = Home::new();
    let mut open: Vec<Vec<String>> = vec![Vec::new()];
    let mut seen = 0;
    while let Some(path) = open.pop() {
        let mut args: Vec<&str> = path.iter().map(String::as_str).collect();
        args.push("--help");
        let output = home.run(&args);
        assert!(output.status.success(), "{args:?}: {}", err(&output));
        seen += 1;
        open.extend(listed(&out(&output)).into_iter().map(|name| [path.clone(), vec![name]].concat()));
    }
    assert!(seen > 50, "only {seen} commands were found");
}

#[test]
fn a_wrong_command_line_exits_2() {
    let home = Home::new();
    for args in [
        &["nonsense"][..],
        &["explain", "--host", "a.internal", "--port", "1"],
        &["explain", "--user", "a", "--workload", "b", "--host", "a", "--port", "1"],
        &["key", "create", "--kind", "connector", "--life", "soon"],
        &["context", "add", "x", "--endpoint", "http://127.0.0.1:1", "--pin", PIN, "--token", "t"],
        &["context", "add", "x", "--endpoint", "https://127.0.0.1:1", "--pin", "12", "--token", "t"],
        &["get", "users"],
        &["client", "connect", "nowhere"],
    ] {
        assert_eq!(home.run(args).status.code(), Some(2), "{args:?}");
    }
}

#[test]
fn without_a_context_commands_say_how_to_make_one() {
    let output = Home::new().run(&["cluster", "status"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(err(&output).contains("selvedge context add"), "{}", err(&output));
}

#[test]
fn contexts_are_kept_for_this_user_only_and_never_show_a_token() {
    let home = Home::new();
    let endpoint = nobody();
    let add = |name: &str| {
        home.run_with(&["context", "add", name, "--endpoint", &endpoint, "--pin", PIN, "--token", "-"], "svt_secret\n")
    };
    assert!(add("one").status.success());
    assert!(add("two").status.success());
    let file = home.0.path().join("contexts.json");
    assert_eq!(std::fs::metadata(&file).expect("written").permissions().mode() & 0o777, 0o600);
    assert!(home.run(&["context", "use", "two"]).status.success());
    let list = home.run(&["context", "list", "--json"]);
    let contexts: serde_json::Value = serde_json::from_slice(&list.stdout).expect("JSON");
    assert_eq!(contexts["contexts"][1]["name"], "two");
    assert_eq!(contexts["contexts"][1]["current"], true);
    assert!(!out(&list).contains("svt_"));
    assert_eq!(home.run(&["context", "use", "three"]).status.code(), Some(2));
    let three = home.run(&["cluster", "status", "--context", "three"]);
    assert!(err(&three).contains("`three`"), "{}", err(&three));

    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644)).expect("changed");
    let open = home.run(&["cluster", "status"]);
    assert_eq!(open.status.code(), Some(2));
    assert!(err(&open).contains("0600"), "{}", err(&open));
}

#[test]
fn an_endpoint_where_nobody_is_exits_2_and_is_named() {
    let home = Home::new();
    let (first, second) = (nobody(), nobody());
    let add = ["context", "add", "x", "--endpoint", &first, "--endpoint", &second, "--pin", PIN, "--token", "svt_x"];
    assert!(home.run(&add).status.success());
    let zone = home.0.path().join("zone.yaml");
    std::fs::write(&zone, "kind: Zone\nname: internal\n").expect("a file");
    let zone = zone.to_str().expect("text");
    for args in [
        &["cluster", "status"][..],
        &["get"],
        &["apply", "-f", zone],
        &["diff", "-f", zone],
        &["explain", "--user", "a", "--host", "b", "--port", "1"],
        &["events"],
        &["audit", "tail"],
        &["token", "create", "x", "--role", "admin"],
    ] {
        let output = home.run(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {}", out(&output));
        assert!(err(&output).contains(&first) && err(&output).contains(&second), "{args:?}: {}", err(&output));
        assert!(!err(&output).contains("svt_x") && !err(&output).contains("unknown"), "{args:?}: {}", err(&output));
    }
}

#[test]
fn the_environment_goes_before_the_context() {
    let home = Home::new();
    let endpoint = nobody();
    let mut command = home.command(&["get"]);
    command.env("SELVEDGE_ENDPOINT", &endpoint).env("SELVEDGE_PIN", PIN).env("SELVEDGE_TOKEN", "svt_x");
    let output = command.output().expect("the binary runs");
    assert!(err(&output).contains(&endpoint), "{}", err(&output));
}

#[test]
fn configuration_files_that_cannot_be_read_are_named_with_their_line() {
    let home = Home::new();
    let dir = home.0.path().join("policy");
    std::fs::create_dir(&dir).expect("a directory");
    let dir = dir.to_str().expect("text");
    let refused = |file: &str, text: &str| {
        let path = Path::new(dir).join(file);
        std::fs::write(&path, text).expect("a file");
        let output = home.run(&["apply", "-f", dir]);
        std::fs::remove_file(path).expect("removed");
        assert_eq!(output.status.code(), Some(2));
        err(&output)
    };
    assert!(
        refused("a.yaml", "kind: Zone\nname: a\n---\nkind: Zone\nnome: b\n").contains("a.yaml:5: unknown field `nome`")
    );
    assert!(refused("b.yml", "\nkind: Nonsense\n").contains("b.yml:2: `Nonsense` is no kind"));
    assert!(refused("c.yaml", "kind: Zone\nname: [\n").contains("c.yaml:"));
    assert!(refused("d.yaml", &" ".repeat(9 << 20)).contains("d.yaml"));
    let empty = home.run(&["apply", "-f", dir]);
    assert!(err(&empty).contains("no `*.yaml`"), "{}", err(&empty));
    let missing = home.run(&["apply", "-f", "/nowhere/at/all.yaml"]);
    assert!(err(&missing).contains("/nowhere/at/all.yaml"), "{}", err(&missing));
    let piped = home.run_with(&["apply", "-f", "-"], "kind: Zone\n");
    assert!(err(&piped).contains("-:1: missing field `name`"), "{}", err(&piped));
}

#[test]
fn a_broker_s_configuration_is_checked_before_anything_is_made() {
    let home = Home::new();
    let config = home.0.path().join("b.toml");
    let data = home.0.path().join("data");
    std::fs::write(&config, format!("data_dir = {data:?}\nname = \"b\"\nlisten = 1\n")).expect("a file");
    let config = config.to_str().expect("text");
    for args in
        [&["broker", "--config", config][..], &["cluster", "init", "--config", config, "--trust-domain", "a.test"]]
    {
        let output = home.run(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(err(&output).contains("b.toml"), "{}", err(&output));
    }
    assert!(!data.exists());
}

#[test]
fn verify_accepts_an_empty_journal_and_names_what_is_no_journal() {
    let home = Home::new();
    let dir = home.0.path().join("audit");
    std::fs::create_dir(&dir).expect("a directory");
    let text = dir.to_str().expect("text");
    assert_eq!(home.run(&["audit", "verify", text]).status.code(), Some(0));
    std::fs::create_dir(dir.join("something")).expect("a directory");
    let output = home.run(&["audit", "verify", text]);
    assert_eq!(output.status.code(), Some(1));
    assert!(out(&output).contains("something"), "{}", out(&output));
    assert_eq!(home.run(&["audit", "verify", "/nowhere/at/all"]).status.code(), Some(2));
}

#[test]
fn a_completion_script_is_printed_for_each_shell() {
    let home = Home::new();
    for shell in ["bash", "zsh", "fish"] {
        let output = home.run(&["completions", shell]);
        assert!(output.status.success() && out(&output).contains("selvedge"), "{shell}");
    }
}
