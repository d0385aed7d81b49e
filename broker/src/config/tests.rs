use std::path::PathBuf;

use super::*;

const GOOD: &str = r#"data_dir = "/var/lib/selvedge"
name = "eu-1"
region = "eu"
host = "eu-1.brokers.example"
preset = "lan"
edge = { bind = "127.0.0.1:443" }
web = { bind = "127.0.0.1:8443" }
peer = { bind = "127.0.0.1:7443" }
ops = { bind = "127.0.0.1:9443" }
"#;

/// A file that goes away with the value.
struct File(tempfile::TempDir);

impl File {
    fn new(text: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("broker.toml"), text).unwrap();
        Self(dir)
    }

    fn sources(&self) -> Sources {
        Sources::file(&self.0.path().join("broker.toml"))
    }

    /// Everything that is wrong, with the file's name alone in front of the line.
    fn problems(&self, sources: &Sources) -> Vec<String> {
        let error = Config::read(sources).unwrap_err();
        let dir = format!("{}/", self.0.path().display());
        error.problems.iter().map(|problem| problem.to_string().replace(&dir, "")).collect()
    }
}

fn problems(text: &str) -> Vec<String> {
    let file = File::new(text);
    file.problems(&file.sources())
}

fn with(variables: &[(&str, &str)], flags: &[(&str, &str)], mut sources: Sources) -> Sources {
    sources.variables = variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    let flag = |(field, value): &(&str, &str)| (format!("--set {field}"), (*field).to_owned(), (*value).to_owned());
    sources.flags = flags.iter().map(flag).collect();
    sources
}

#[test]
fn every_mistake_is_told_at_once_with_its_line() {
    let text = GOOD
        .replace("name = \"eu-1\"", "name = 5\nlisten = 3")
        .replace("\"eu-1.brokers.example\"", "\"10.0.0.1\"")
        .replace("\"lan\"", "\"far\"")
        .replace("127.0.0.1:443\"", "localhost:443\", advertize = \"a:1\"")
        + "[limits]\nsessions = \"many\"\nsession_per_principal = 4\n";
    assert_eq!(
        problems(&text),
        [
            "broker.toml:2: `name` must be a text, not `5`",
            "broker.toml:3: unknown field `listen`",
            "broker.toml:6: `preset` must be `lan`, `wan` or `test`, not `far`",
            "broker.toml:7: `edge.bind` must be an address with a port, as `0.0.0.0:443`, not `localhost:443`",
            "broker.toml:7: unknown field `edge.advertize`; did you mean `edge.advertise`?",
            "broker.toml:12: `limits.sessions` must be a whole number, not `many`",
            "broker.toml:13: unknown field `limits.session_per_principal`; did you mean `limits.sessions_per_principal`?",
        ]
    );
}

#[test]
fn relations_are_judged_once_every_value_is_there() {
    let text = GOOD
        .replace("\"eu-1.brokers.example\"", "\"10.0.0.1\"")
        .replace("127.0.0.1:443\"", "0.0.0.0:8443\"")
        .replace("127.0.0.1:7443\"", "127.0.0.1:0\"")
        .replace("127.0.0.1:8443\"", "127.0.0.1:8443\", key = \"k\"")
        + "log = \"selvedge_broker=loud\"\n[limits]\nsessions = 10\nopens_per_second = 0\n";
    let found = problems(&text);
    let wanted = [
        ("broker.toml:4: `host`: ", "host name"),
        ("broker.toml:6: `edge.bind`: ", "advertise"),
        ("broker.toml:7: `web.bind`: ", "taken by `edge.bind`"),
        ("broker.toml:7: `web.key`: ", "belong together"),
        ("broker.toml:8: `peer.bind`: ", "advertise"),
        ("broker.toml:10: `log`: ", ""),
        ("broker.toml:13: `limits.opens_per_second`: ", "admits nothing"),
        ("broker.toml: `limits.sessions_per_principal`: ", "over `limits.sessions`"),
    ];
    assert_eq!(found.len(), wanted.len(), "{found:#?}");
    for (at, why) in wanted {
        assert!(found.iter().any(|problem| problem.starts_with(at) && problem.contains(why)), "{at}: {found:#?}");
    }
}

#[test]
fn what_is_missing_is_named_with_what_it_must_be() {
    let found = problems("name = \"a\"\n[edge]\nadvertise = \"a:1\"\n");
    assert_eq!(
        found,
        [
            "broker.toml: `data_dir` is missing: a path",
            "broker.toml: `region` is missing: a text",
            "broker.toml: `host` is missing: a text",
            "broker.toml: `web.bind` of `[web]` is missing: an address with a port, as `0.0.0.0:443`",
            "broker.toml: `peer.bind` of `[peer]` is missing: an address with a port, as `0.0.0.0:443`",
            "broker.toml: `ops.bind` of `[ops]` is missing: an address with a port, as `0.0.0.0:443`",
            "broker.toml:2: `edge.bind` of `[edge]` is missing: an address with a port, as `0.0.0.0:443`",
        ]
    );
}

#[test]
fn text_that_is_no_toml_is_told_with_its_line_and_the_rest_is_read() {
    let found = problems(&GOOD.replace("region = \"eu\"", "region = \"eu").replace("preset = \"lan\"", "preset = 1"));
    assert!(found[0].starts_with("broker.toml:3: "), "{found:?}");
    assert!(found.iter().any(|problem| problem.starts_with("broker.toml:5: `preset`")), "{found:?}");
    let missing = Config::read(&Sources::file(&PathBuf::from("/nowhere/at/all.toml"))).unwrap_err();
    assert!(missing.to_string().contains("/nowhere/at/all.toml: cannot be read"), "{missing}");
}

#[test]
fn a_flag_goes_before_a_variable_and_a_variable_before_the_file() {
    let file = File::new(GOOD);
    let sources = with(
        &[
            ("SELVEDGE_BROKER_NAME", "by-variable"),
            ("SELVEDGE_BROKER_REGION", "by-variable"),
            ("SELVEDGE_BROKER_EDGE_BIND", "127.0.0.2:443"),
            ("SELVEDGE_BROKER_HOST", ""),
            ("SELVEDGE_LOG", "debug"),
            ("SELVEDGE_BROKER_CONFIG", "elsewhere"),
            ("HOME", "/root"),
        ],
        &[("name", "by-flag"), ("limits.sessions", "9000")],
        file.sources(),
    );
    let loaded = Config::read(&sources).unwrap();
    assert_eq!((&*loaded.config.name, &*loaded.config.region), ("by-flag", "by-variable"));
    assert_eq!(loaded.config.limits.sessions, 9_000);
    let origin = |field: &str| {
        let shown = loaded.shown.iter().find(|shown| shown.field == field).unwrap();
        let dir = format!("{}/", file.0.path().display());
        format!("{} from {}", shown.value.as_deref().unwrap_or("-"), shown.origin).replace(&dir, "")
    };
    assert_eq!(origin("name"), "\"by-flag\" from --set name");
    assert_eq!(origin("region"), "\"by-variable\" from SELVEDGE_BROKER_REGION");
    assert_eq!(origin("edge.bind"), "\"127.0.0.2:443\" from SELVEDGE_BROKER_EDGE_BIND");
    assert_eq!(origin("host"), "\"eu-1.brokers.example\" from broker.toml:4", "an empty variable is none");
    assert_eq!(origin("log"), "\"debug\" from SELVEDGE_LOG");
    assert_eq!(origin("edge.advertise"), "- from default");
    assert_eq!(origin("limits.sessions_per_principal"), "2000 from default");
}

#[test]
fn a_variable_or_flag_that_means_nothing_is_refused() {
    let file = File::new(GOOD);
    let sources = with(
        &[("SELVEDGE_BROKER_EGDE_BIND", "127.0.0.1:1"), ("SELVEDGE_BROKER_LIMITS_SESSIONS", "few")],
        &[("hots", "a.example")],
        file.sources(),
    );
    assert_eq!(
        file.problems(&sources),
        [
            "--set hots: unknown field `hots`; did you mean `host`?",
            "SELVEDGE_BROKER_EGDE_BIND: no field has this variable; did you mean `SELVEDGE_BROKER_EDGE_BIND`?",
            "SELVEDGE_BROKER_LIMITS_SESSIONS: `limits.sessions` must be a whole number, not `few`",
        ]
    );
}

#[test]
fn links_through_a_proxy_are_pairs_in_a_file_and_in_a_variable() {
    let file = File::new(&format!("{GOOD}[peer_via]\n\"a.example:1\" = \"127.0.0.1:9\"\n"));
    let loaded = Config::read(&file.sources()).unwrap();
    assert_eq!(loaded.config.peer_via["a.example:1"], "127.0.0.1:9");
    assert!(loaded.shown.iter().any(|shown| shown.field == "peer_via.\"a.example:1\""));
    let sources = with(&[("SELVEDGE_BROKER_PEER_VIA", "b:2=c:3, d:4=e:5")], &[], file.sources());
    let via = Config::read(&sources).unwrap().config.peer_via.clone();
    assert_eq!(via.into_iter().collect::<Vec<_>>(), [("b:2".into(), "c:3".into()), ("d:4".into(), "e:5".into())]);
    let sources = with(&[("SELVEDGE_BROKER_PEER_VIA", "b:2")], &[], file.sources());
    assert_eq!(file.problems(&sources), ["SELVEDGE_BROKER_PEER_VIA: `b:2` of `peer_via` must be `FROM=TO`"]);
}

#[test]
fn keys_are_sealed_in_one_way() {
    let file = File::new(&format!("{GOOD}[seal]\nfile = \"/k\"\nenv = \"KEY\"\n"));
    assert_eq!(file.problems(&file.sources()), ["broker.toml:12: `seal.file` and `seal.env` exclude each other"]);
    let file = File::new(&format!("{GOOD}seal.env = \"KEY\"\n"));
    assert!(matches!(&Config::read(&file.sources()).unwrap().config.seal, SealConfig::Env(name) if name == "KEY"));
}

#[test]
fn every_field_is_shown_once_with_its_default() {
    let file = File::new(GOOD);
    let shown = Config::read(&file.sources()).unwrap().shown;
    let lines: Vec<String> =
        shown.iter().map(|shown| format!("{} {}", shown.field, shown.value.as_deref().unwrap_or("-"))).collect();
    assert_eq!(
        lines,
        [
            "data_dir \"/var/lib/selvedge\"",
            "name \"eu-1\"",
            "region \"eu\"",
            "host \"eu-1.brokers.example\"",
            "preset \"lan\"",
            "log \"info\"",
            "edge.bind \"127.0.0.1:443\"",
            "edge.advertise -",
            "web.bind \"127.0.0.1:8443\"",
            "web.advertise -",
            "web.certificate -",
            "web.key -",
            "peer.bind \"127.0.0.1:7443\"",
            "peer.advertise -",
            "ops.bind \"127.0.0.1:9443\"",
            "seal.file -",
            "seal.env -",
            "otlp_endpoint -",
            "limits.sessions 50000",
            "limits.sessions_per_principal 2000",
            "limits.control_streams 20000",
            "limits.opens_per_second 200",
            "limits.resolves_per_second 100",
            "drain_on_stop_s 20",
        ]
    );
}
