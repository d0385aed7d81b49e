//! What whoever runs a broker does with it: checks its configuration, asks what is wrong, changes it while it runs.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::{FileExt as _, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

use crate::reference::metrics_of_alerts;
use crate::shop::Shop;
use crate::world::{World, http_get, text, wait};

/// What depends on the machine that the tests run on.
const OF_THE_MACHINE: [&str; 4] = ["SE0403", "SE0404", "SE0405", "SE0406"];

const WRONG: &str = include_str!("../golden/config-wrong.toml");
const RIGHT: &str = include_str!("../golden/config-right.toml");

#[test]
fn every_mistake_of_a_configuration_is_told_at_once_with_its_place() {
    let files = Files::new();
    let file = files.put("wrong.toml", WRONG);
    let variables = [("SELVEDGE_BROKER_LIMITS_SESSIONS", "few"), ("SELVEDGE_BROKER_NMAE", "a")];
    let check = files.run(&["config", "check", &file, "--set", "edge.bnid=127.0.0.1:1"], &variables);
    assert_eq!(check.status.code(), Some(2));
    files.golden(&check.stdout, "config-wrong.txt");
    let json = files.run(&["config", "check", &file, "--json"], &[]);
    let json: Value = serde_json::from_slice(&json.stdout).expect("JSON");
    assert_eq!(json["ok"], false);
    assert!(json["problems"].as_array().is_some_and(|problems| problems.len() > 5), "{json}");

    let broker = files.run(&["broker", "--config", &file], &[]);
    assert_eq!(broker.status.code(), Some(2));
    let said = String::from_utf8_lossy(&broker.stderr).into_owned();
    assert!(said.contains("SE0301") && said.contains("wrong.toml:3: "), "{said}");
}

#[test]
fn a_right_configuration_is_shown_with_where_each_value_came_from() {
    let files = Files::new();
    let file = files.put("right.toml", RIGHT);
    let check = files.run(&["config", "check", &file], &[]);
    assert_eq!(check.status.code(), Some(0), "{}", String::from_utf8_lossy(&check.stdout));
    let variables = [("SELVEDGE_BROKER_REGION", "eu-west"), ("SELVEDGE_LOG", "debug")];
    let args = [
        "config",
        "show",
        &file,
        "--origin",
        "--set",
        "limits.sessions=9000",
        "--otlp-endpoint",
        "http://127.0.0.1:4317",
    ];
    files.golden(&files.run(&args, &variables).stdout, "config-origin.txt");
    // What is shown without origins is a file again, which means the same.
    let shown = files.run(&["config", "show", &file], &[]);
    files.golden(&shown.stdout, "config-show.txt");
    let again = files.put("again.toml", &String::from_utf8(shown.stdout).expect("text"));
    files.golden(&files.run(&["config", "show", &again], &[]).stdout, "config-show.txt");
}

#[test]
fn the_doctor_looks_at_brokers_that_run_at_one_that_is_down_and_at_one_that_is_alone() {
    let mut world = World::start(Path::new(env!("CARGO_BIN_EXE_selvedge")), 3);
    let region = "kind: Region\nname: here\nlatitude: 50.1\nlongitude: 8.7\n";
    assert!(world.apply(region).status.success());
    let position = world.json(&["cluster", "status", "--json"])["position"].clone();

    let mut found = Vec::new();
    wait("the region at b1", || {
        found = doctor(&world, "b1").1;
        found.iter().any(|finding| finding.check == "regions" && finding.level == "fine")
    });
    let unexpected: Vec<&Finding> = found
        .iter()
        .filter(|finding| ["warning", "error"].contains(&&*finding.level) && !is_of_the_machine(finding))
        .collect();
    assert!(unexpected.is_empty(), "{unexpected:#?}");
    let fine = |check: &str| found.iter().filter(|finding| finding.check == check && finding.level == "fine").count();
    for check in ["edge listener", "web listener", "peer listener", "ops listener", "leader", "freshness lease"] {
        assert_eq!(fine(check), 1, "{check}: {found:#?}");
    }
    for check in ["certificate", "issuer", "issuers", "voters", "log", "state", "snapshot", "audit journal"] {
        assert_eq!(fine(check), 1, "{check}: {found:#?}");
    }
    assert_eq!(fine("other brokers"), 2, "{found:#?}");
    let roles = found.iter().find(|finding| finding.check == "roles").expect("roles");
    assert!(roles.level == "note" && roles.message.contains("every role"), "{roles:?}");
    assert_eq!(report(&world, "b1")["running"], world.broker_pid(0));
    // It took nothing from the broker that runs.
    world.ok(&["cluster", "settings", "--lease", "12s", "--hold", "30s"]);
    assert_ne!(world.json(&["cluster", "status", "--json"])["position"], position);

    world.kill_broker(0);
    let (code, found) = doctor(&world, "b1");
    assert!(report(&world, "b1")["running"].is_null());
    assert!(code < Some(2), "{found:#?}");
    for check in ["edge listener", "web listener", "peer listener", "ops listener"] {
        let listener = found.iter().find(|finding| finding.check == check).expect("a listener");
        assert!(listener.level == "fine" && listener.message.contains("is free"), "{listener:?}");
    }
    let state = found.iter().find(|finding| finding.check == "state").expect("the state");
    assert!(state.level == "fine" && state.message.contains("applied entry"), "{state:?}");
    assert_eq!(found.iter().filter(|finding| finding.code == "SE0408" && finding.level == "fine").count(), 2);

    world.kill_broker(1);
    world.kill_broker(2);
    let (code, found) = doctor(&world, "b1");
    assert_eq!(code, Some(2), "{found:#?}");
    assert_eq!(found.iter().filter(|finding| finding.code == "SE0408" && finding.level == "warning").count(), 2);
    assert!(found.iter().any(|finding| finding.check == "majority" && finding.level == "error"), "{found:#?}");

    // It is as it was: all three come back with what they had.
    (0..3).for_each(|number| world.spawn_broker(number));
    (0..3).for_each(|number| world.wait_ready(number));
    assert_eq!(world.json(&["cluster", "status", "--json"])["lease_ms"], 12_000);
}

#[test]
fn the_doctor_names_what_was_damaged_on_purpose() {
    let mut world = World::start(Path::new(env!("CARGO_BIN_EXE_selvedge")), 1);
    world.directory("people");
    let (code, found) = doctor(&world, "b1");
    assert_eq!(code, Some(1), "one broker is one issuer: {found:#?}");
    assert!(found.iter().any(|finding| finding.code == "SE0409" && finding.level == "warning"), "{found:#?}");
    world.kill_broker(0);
    let data = world.path("b1");
    let errors = |world: &World| -> BTreeSet<String> {
        let (code, found) = doctor(world, "b1");
        let errors: BTreeSet<String> =
            found.iter().filter(|finding| finding.level == "error").map(|finding| finding.code.clone()).collect();
        assert_eq!(code == Some(2), !errors.is_empty(), "{found:#?}");
        for finding in found.iter().filter(|finding| ["warning", "error"].contains(&&*finding.level)) {
            assert!(finding.next.is_some(), "{finding:?} does not say what to do next");
        }
        errors.into_iter().filter(|code| !OF_THE_MACHINE.contains(&code.as_str())).collect()
    };
    assert_eq!(errors(&world), BTreeSet::new(), "it is down, and nothing is broken");
    let only = |code: &str| BTreeSet::from([code.to_owned()]);

    let taken = TcpListener::bind(world.brokers[0].web).expect("its port is free");
    assert_eq!(errors(&world), only("SE0407"));
    drop(taken);

    let identity = data.join("node/identity.pem");
    with_mode(&identity, 0o644, || assert_eq!(errors(&world), only("SE0401")));
    let segment = file_under(&data.join("audit"), "seg");
    flipped(&segment, 40, || assert_eq!(errors(&world), only("SE0202")));
    flipped(&data.join("node.id"), 30, || assert_eq!(errors(&world), only("SE0114")));
    let manifest = file_under(&data.join("log"), "MANIFEST");
    flipped(&manifest, 20, || assert!(!errors(&world).is_empty(), "a log that cannot be opened"));
    let seal = data.join("node/seal.key");
    flipped(&seal, 3, || assert_eq!(errors(&world), only("SE0409")));

    let config = world.path("b1.toml");
    let right = std::fs::read_to_string(&config).expect("the configuration");
    let bind = format!("web = {{ bind = \"{}\"", world.brokers[0].web);
    let files = format!("{bind}, certificate = {:?}, key = {:?}", world.path("web.pem"), world.path("web.key"));
    std::fs::write(&config, right.replace(&bind, &files)).expect("written");
    assert_eq!(errors(&world), only("SE0402"), "there are no such files");
    let one = rcgen::generate_simple_self_signed(vec!["web.test".to_owned()]).expect("a certificate");
    let other = rcgen::generate_simple_self_signed(vec!["web.test".to_owned()]).expect("a certificate");
    std::fs::write(world.path("web.pem"), one.cert.pem()).expect("written");
    std::fs::write(world.path("web.key"), other.signing_key.serialize_pem()).expect("written");
    assert_eq!(errors(&world), only("SE0402"), "the key is another one's");
    std::fs::write(world.path("web.key"), one.signing_key.serialize_pem()).expect("written");
    assert_eq!(errors(&world), BTreeSet::new());
    let (_, found) = doctor(&world, "b1");
    let web = found.iter().find(|finding| finding.code == "SE0402").expect("the web certificate");
    assert!(web.level == "warning" && web.message.contains("web.test"), "its name is not the listener's: {web:?}");

    std::fs::write(&config, right.replace("data_dir", "data_dri")).expect("written");
    assert_eq!(errors(&world), only("SE0301"));
    std::fs::write(&config, right.replace("/b1\"", "/nowhere\"")).expect("written");
    assert_eq!(errors(&world), only("SE0302"));
    std::fs::write(&config, &right).expect("written");

    let human = world.run(&["cluster", "doctor", "--config", text(&config), "--quiet"]);
    let said = String::from_utf8(human.stdout).expect("text");
    assert!(said.contains("warning  issuers") && said.contains("SE0409: join a second issuer"), "{said}");
    assert!(!said.contains("fine "), "{said}");
    world.start_broker(0);
}

#[test]
fn a_reload_puts_log_level_limits_and_certificate_into_force_and_a_bad_file_changes_nothing() {
    let mut shop = Shop::open(1);
    let ann = shop.world.client("ann", "ann@test.example");
    let port = shop.app.port();
    wait("a session", || shop.nc(&ann, "shop.internal", port).0 == "HELLO\n");
    let config = shop.world.path("b1.toml");
    let right = std::fs::read_to_string(&config).expect("the configuration");
    let log = shop.world.path("b1.log");
    let lines = |what: &str| std::fs::read_to_string(&log).expect("the log").matches(what).count();
    let reload = |shop: &Shop| shop.world.run(&["config", "reload", text(&config), "--json"]);
    let reloaded = |shop: &Shop| -> Value {
        let output = reload(shop);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).expect("JSON")
    };
    let fields = |answer: &Value, name: &str| -> Vec<String> {
        let changes = answer[name].as_array().expect("a list").iter();
        changes.map(|change| change["field"].as_str().expect("a field").to_owned()).collect()
    };
    let same = reloaded(&shop);
    assert_eq!((fields(&same, "changed"), fields(&same, "needs_restart")), (vec![], vec![]));

    // The connector's control stream is the one that there may be.
    assert_eq!(lines(" DEBUG "), 0);
    let changed =
        format!("log = \"debug\"\n{}[limits]\ncontrol_streams = 1\n", right.replace("\"b1.brokers", "\"b9.brokers"));
    std::fs::write(&config, &changed).expect("written");
    let answer = reloaded(&shop);
    assert_eq!(fields(&answer, "changed"), ["log", "limits.control_streams"]);
    assert_eq!(fields(&answer, "needs_restart"), ["host"]);
    assert_eq!(answer["changed"][1]["from"], "20000");
    wait("lines of the new level", || lines(" DEBUG ") > 0);
    let (printed, said, _) = shop.nc(&ann, "shop.internal", port);
    assert_eq!(printed, "", "a second control stream is one too many: {said}");

    std::fs::write(&config, changed.replace("control_streams = 1", "control_streams = 0\nsesions = 1"))
        .expect("written");
    let refused = reload(&shop);
    assert_eq!(refused.status.code(), Some(2));
    let before = lines("the configuration was not changed");
    // The file is wrong here too, so this command does not even ask; the broker judges by itself.
    hang_up(&shop.world);
    wait("the broker's own judgement", || lines("the configuration was not changed") > before);
    let log_text = std::fs::read_to_string(&log).expect("the log");
    assert!(
        log_text.contains("b1.toml:12") && log_text.contains("limits.sessions"),
        "every mistake with its line: {log_text}"
    );
    assert_eq!(shop.nc(&ann, "shop.internal", port).0, "", "the limit is still the one before");

    std::fs::write(&config, &right).expect("written");
    let before = lines("the configuration was read again");
    hang_up(&shop.world);
    wait("the signal's work", || lines("the configuration was read again") > before);
    wait("a session", || shop.nc(&ann, "shop.internal", port).0 == "HELLO\n");

    certificates(&mut shop, &config, &right, &reload, &reloaded);
}

/// The web listener shows the operator's certificate from a reload on, and goes on with it when the files are bad.
fn certificates(
    shop: &mut Shop,
    config: &Path,
    right: &str,
    reload: &dyn Fn(&Shop) -> Output,
    reloaded: &dyn Fn(&Shop) -> Value,
) {
    let web = shop.world.brokers[0].web;
    let make = || rcgen::generate_simple_self_signed(vec!["web.test".to_owned()]).expect("a certificate");
    let (one, two) = (make(), make());
    let put = |certificate: &str, key: &str| {
        std::fs::write(shop.world.path("web.pem"), certificate).expect("written");
        std::fs::write(shop.world.path("web.key"), key).expect("written");
    };
    put(&one.cert.pem(), &one.signing_key.serialize_pem());
    let bind = format!("web = {{ bind = \"{web}\"");
    let files =
        format!("{bind}, certificate = {:?}, key = {:?}", shop.world.path("web.pem"), shop.world.path("web.key"));
    std::fs::write(config, right.replace(&bind, &files)).expect("written");
    assert!(!trusts(web, &one.cert.pem()));
    let answer = reloaded(shop);
    assert_eq!(answer["certificate"], true, "{answer}");
    assert!(trusts(web, &one.cert.pem()));

    put(&two.cert.pem(), &one.signing_key.serialize_pem());
    let refused = reload(shop);
    assert_eq!(refused.status.code(), Some(2));
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(said.contains("changed nothing") && said.contains("web certificate"), "{said}");
    assert!(trusts(web, &one.cert.pem()), "the old one stays");
    put(&two.cert.pem(), &two.signing_key.serialize_pem());
    // Taken by itself as well, and then there is nothing new to take.
    let answer = reloaded(shop);
    assert!(answer["certificate"].is_boolean(), "{answer}");
    assert!(trusts(web, &two.cert.pem()) && !trusts(web, &one.cert.pem()));
}

#[test]
fn a_running_broker_exports_every_metric_that_an_alert_asks_for() {
    let world = World::start(Path::new(env!("CARGO_BIN_EXE_selvedge")), 2);
    let wanted = metrics_of_alerts();
    assert!(wanted.len() > 15, "{wanted:?}");
    let mut missing = BTreeSet::new();
    wait("every metric", || {
        let answer = http_get(world.brokers[0].ops, "/metrics").expect("the ops listener answers");
        let exported: BTreeSet<&str> =
            answer.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next()).collect();
        missing = wanted.iter().filter(|name| !exported.contains(name.as_str())).cloned().collect();
        missing.is_empty()
    });
    assert!(missing.is_empty(), "{missing:?}");
}

#[derive(Debug)]
struct Finding {
    level: String,
    code: String,
    check: String,
    message: String,
    next: Option<String>,
}

fn report(world: &World, name: &str) -> Value {
    let config = world.path(&format!("{name}.toml"));
    let output = world.run(&["cluster", "doctor", "--config", text(&config), "--json"]);
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
}

/// Exit code and findings.
fn doctor(world: &World, name: &str) -> (Option<i32>, Vec<Finding>) {
    let config = world.path(&format!("{name}.toml"));
    let output = world.run(&["cluster", "doctor", "--config", text(&config), "--json"]);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"));
    let of = |finding: &Value, name: &str| finding[name].as_str().unwrap_or_default().to_owned();
    let findings = report["findings"].as_array().expect("findings").iter().map(|finding| Finding {
        level: of(finding, "level"),
        code: of(finding, "code"),
        check: of(finding, "check"),
        message: of(finding, "message"),
        next: finding["next"].as_str().map(str::to_owned),
    });
    (output.status.code(), findings.collect())
}

fn is_of_the_machine(finding: &Finding) -> bool {
    OF_THE_MACHINE.contains(&finding.code.as_str())
}

/// Files of a test, and commands that see no variables but those given.
struct Files(tempfile::TempDir);

impl Files {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a directory"))
    }

    fn put(&self, name: &str, content: &str) -> String {
        let path = self.0.path().join(name);
        std::fs::write(&path, content).expect("written");
        text(&path).to_owned()
    }

    fn run(&self, args: &[&str], variables: &[(&str, &str)]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_selvedge"));
        let ours = std::env::vars_os().map(|(name, _)| name);
        for name in ours.filter(|name| name.to_string_lossy().starts_with("SELVEDGE_")) {
            command.env_remove(name);
        }
        command.args(args).envs(variables.iter().copied()).output().expect("the binary runs")
    }

    /// Compares with a golden file; `SELVEDGE_BLESS=1` writes it instead.
    fn golden(&self, printed: &[u8], name: &str) {
        let printed = String::from_utf8(printed.to_vec()).expect("text");
        let printed = printed.replace(&format!("{}/", self.0.path().display()), "");
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
        if std::env::var_os("SELVEDGE_BLESS").is_some() {
            std::fs::write(&path, &printed).expect("written");
        }
        let golden = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        assert_eq!(printed, golden, "{} (SELVEDGE_BLESS=1 takes what is printed now)", path.display());
    }
}

fn hang_up(world: &World) {
    let pid = rustix::process::Pid::from_raw(i32::try_from(world.broker_pid(0)).expect("a pid")).expect("a pid");
    rustix::process::kill_process(pid, rustix::process::Signal::HUP).expect("it runs");
}

/// Whether a web listener shows a chain of this authority.
fn trusts(web: SocketAddr, ca_pem: &str) -> bool {
    let asked = async {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let ca = reqwest::Certificate::from_pem(ca_pem.as_bytes())?;
        let client = reqwest::Client::builder().tls_certs_only([ca]).resolve("web.test", web).build()?;
        client.get(format!("https://web.test:{}/api/v1/openapi.json", web.port())).send().await
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(asked).is_ok()
}

/// Runs with one byte of a file changed, and puts it back.
fn flipped(path: &Path, at: u64, run: impl FnOnce()) {
    let file = std::fs::File::options().read(true).write(true).open(path);
    let file = file.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).expect("the file is longer");
    file.write_all_at(&[byte[0] ^ 0x55], at).expect("written");
    run();
    file.write_all_at(&byte, at).expect("written");
}

/// Runs with another mode of a file, and puts it back.
fn with_mode(path: &Path, mode: u32, run: impl FnOnce()) {
    let before = std::fs::metadata(path).expect("a file").permissions();
    std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).expect("changed");
    run();
    std::fs::set_permissions(path, before).expect("changed back");
}

/// The first file under a directory whose name holds `part`, that is not empty.
fn file_under(dir: &Path, part: &str) -> PathBuf {
    let mut open = vec![dir.to_owned()];
    let mut found: BTreeMap<String, PathBuf> = BTreeMap::new();
    while let Some(dir) = open.pop() {
        for entry in std::fs::read_dir(&dir).expect("a directory").map(|entry| entry.expect("an entry")) {
            let (path, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
            if path.is_dir() {
                open.push(path);
            } else if name.contains(part) && entry.metadata().expect("a file").len() > 0 {
                found.insert(text(&path).to_owned(), path);
            }
        }
    }
    found.into_values().next().unwrap_or_else(|| panic!("no `{part}` under {}", dir.display()))
}
