//! Pages that name what the code has: runbooks, metrics, alert rules. Reads sources and pages only.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_yaml_ng::Value;

use crate::syslog::{skip, tool};

/// Crates whose metrics a broker exports. A connector and a client listen on nothing.
const EXPORTING: [&str; 3] = ["storage", "cluster", "broker"];
/// What a metric's name may end with.
const SUFFIXES: [&str; 24] = [
    "_bytes",
    "_commands",
    "_connections",
    "_entries",
    "_files",
    "_flows",
    "_held",
    "_hops",
    "_idle",
    "_index",
    "_leader",
    "_limit",
    "_milliseconds",
    "_pending",
    "_percent",
    "_pipes",
    "_records",
    "_requests",
    "_rows",
    "_seconds",
    "_sessions",
    "_streams",
    "_total",
    "_watchers",
];
/// A gauge of a thing that has no unit of its own.
const BARE: [&str; 2] = ["selvedge_cluster_term", "selvedge_edge_tickets"];

#[test]
fn every_code_in_the_sources_and_the_alerts_has_its_runbook_and_the_other_way_round() {
    let mut used: BTreeMap<String, PathBuf> = BTreeMap::new();
    for file in sources(&["proto", "storage", "cluster", "broker", "connector", "cli"]) {
        let text = without_tests(&read(&file));
        used.extend(codes(&text).into_iter().map(|code| (code, file.clone())));
    }
    let alerts = docs().join("alerts.yaml");
    used.extend(codes(&read(&alerts)).into_iter().map(|code| (code, alerts.clone())));

    let mut pages = BTreeSet::new();
    for entry in std::fs::read_dir(docs().join("runbooks")).expect("the runbooks") {
        let path = entry.expect("a page").path();
        let Some(code) = path.file_stem().and_then(|stem| stem.to_str()).filter(|stem| stem.starts_with("SE")) else {
            continue;
        };
        let text = read(&path);
        assert!(text.starts_with(&format!("# {code}: ")), "{} does not begin with its code", path.display());
        for wanted in ["**What you see.**", "**What to do.**"] {
            assert!(text.contains(wanted), "{} does not say {wanted}", path.display());
        }
        for other in codes(&text) {
            assert!(docs().join(format!("runbooks/{other}.md")).exists(), "{}: no page {other}", path.display());
        }
        pages.insert(code.to_owned());
    }
    for (code, file) in &used {
        assert!(pages.contains(code), "{} names {code}, which has no page", file.display());
    }
    for page in &pages {
        assert!(used.contains_key(page), "nothing leads to {page}");
    }
    let table: BTreeSet<String> = read(&docs().join("runbooks/README.md"))
        .lines()
        .filter(|line| line.starts_with("| [SE"))
        .flat_map(|line| codes(line).into_iter().take(1))
        .collect();
    assert_eq!(table, pages, "the table of the runbooks lists each page once");
}

#[test]
fn the_reference_of_metrics_has_every_metric_of_the_code_with_its_own_words_and_no_other() {
    let mut named: BTreeMap<String, (String, PathBuf)> = BTreeMap::new();
    let mut described: BTreeMap<String, (String, String)> = BTreeMap::new();
    for file in sources(&EXPORTING) {
        let text = without_tests(&read(&file));
        let names = constants(&text);
        for (constant, words) in descriptions(&text) {
            let Some(name) = names.get(&constant) else {
                panic!("{}: `{constant}` is described where it is not defined", file.display())
            };
            assert!(described.insert(name.clone(), words).is_none(), "`{name}` is described twice");
        }
        named.extend(names.into_iter().map(|(constant, name)| (name, (constant, file.clone()))));
    }
    assert!(named.len() > 60, "only {} metrics were found", named.len());

    let page = read(&docs().join("reference/metrics.md"));
    let mut rows: BTreeMap<String, (String, String)> = BTreeMap::new();
    for row in page.lines().filter(|line| line.starts_with("| `selvedge_")) {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        let (name, kind, words) = (cells[1].trim_matches('`'), cells[2], cells[4]);
        assert!(rows.insert(name.to_owned(), (kind.to_owned(), words.to_owned())).is_none(), "two rows: {name}");
    }
    for (name, (constant, file)) in &named {
        let at = format!("`{name}` ({constant} in {})", file.display());
        assert!(
            SUFFIXES.iter().any(|suffix| name.ends_with(suffix)) || BARE.contains(&name.as_str()),
            "{at} does not end with its unit"
        );
        let words = described.get(name).unwrap_or_else(|| panic!("{at} is not described"));
        let row = rows.get(name).unwrap_or_else(|| panic!("{at} is not in the reference"));
        assert_eq!(row, words, "{at} is another thing in the reference");
        assert_eq!(row.0 == "counter", name.ends_with("_total"), "{at}: counters and nothing else end with _total");
    }
    for name in rows.keys() {
        assert!(named.contains_key(name), "the reference has `{name}`, which is nowhere in the code");
    }
}

#[test]
fn every_alert_has_a_runbook_a_test_and_metrics_that_exist() {
    let (rules, tests) = (yaml("alerts.yaml"), yaml("alerts_test.yaml"));
    let tested: BTreeSet<&str> = list(&tests["tests"]).map(|test| test["name"].as_str().expect("a name")).collect();
    let reference = read(&docs().join("reference/metrics.md"));
    let mut alerts = BTreeSet::new();
    for rule in list(&rules["groups"]).flat_map(|group| list(&group["rules"])) {
        let alert = rule["alert"].as_str().expect("its name");
        assert!(alerts.insert(alert), "{alert} stands there twice");
        let runbook = rule["annotations"]["runbook"].as_str().unwrap_or_else(|| panic!("{alert} has no runbook"));
        assert!(docs().join(runbook).exists(), "{alert}: there is no {runbook}");
        assert!(rule["annotations"]["summary"].is_string(), "{alert} says nothing");
        assert!(
            ["page", "ticket"].map(Some).contains(&rule["labels"]["severity"].as_str()),
            "{alert}: whom does it wake?"
        );
        for metric in metrics_of(rule["expr"].as_str().expect("an expression")) {
            assert!(reference.contains(&format!("| `{metric}` |")), "{alert}: there is no metric `{metric}`");
        }
        assert!(tested.contains(alert), "{alert} has no test in alerts_test.yaml");
    }
    assert_eq!(alerts, tested, "a test of an alert that is not there");
}

#[test]
fn promtool_accepts_the_alert_rules_and_their_tests_hold() {
    let Some(prometheus) = tool("prometheus") else { return skip("promtool_accepts_the_alert_rules", "prometheus") };
    let promtool = prometheus.with_file_name("root").join("usr/bin/promtool");
    for args in [["check", "rules", "alerts.yaml"], ["test", "rules", "alerts_test.yaml"]] {
        let output = Command::new(&promtool).args(args).current_dir(docs()).output().expect("promtool runs");
        let said = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
        assert!(output.status.success(), "{args:?}: {said}");
    }
}

#[test]
fn the_reference_of_the_configuration_has_every_field_with_its_variable_and_its_default() {
    let page = read(&docs().join("reference/configuration.md"));
    let rows: Vec<Vec<&str>> = page
        .lines()
        .filter(|line| line.starts_with("| `"))
        .map(|line| line.split('|').map(str::trim).skip(1).collect())
        .collect();
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/config-right.toml");
    let mut command = Command::new(env!("CARGO_BIN_EXE_selvedge"));
    let ours = std::env::vars_os().map(|(name, _)| name);
    for name in ours.filter(|name| name.to_string_lossy().starts_with("SELVEDGE_")) {
        command.env_remove(name);
    }
    let shown = command.args(["config", "show", "--json"]).arg(file).output().expect("the binary runs");
    let shown: serde_json::Value = serde_json::from_slice(&shown.stdout).expect("JSON");
    for value in shown["values"].as_array().expect("values") {
        let field = value["field"].as_str().expect("a field");
        // The keys of a table of pairs are the operator's.
        let field = field.split_once(".\"").map_or(field, |(table, _)| table);
        let row = rows.iter().find(|row| row[0].contains(&format!("`{field}`")));
        let row = row.unwrap_or_else(|| panic!("`{field}` is not in the reference"));
        let variable = match field {
            "log" | "otlp_endpoint" => format!("SELVEDGE_{}", field.to_uppercase()),
            _ => format!("SELVEDGE_BROKER_{}", field.replace('.', "_").to_uppercase()),
        };
        assert!(row[1].contains(&format!("`{variable}`")), "`{field}`: {variable} is not in the reference");
        if let (true, Some(default)) = (value["default"] == true, value["value"].as_str()) {
            assert_eq!(row[2].trim_matches('`'), default.trim_matches('"'), "`{field}` has another default");
        }
    }
}

/// Names of metrics in an expression, without what a histogram adds.
pub fn metrics_of(expression: &str) -> BTreeSet<String> {
    let words = expression.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    let names = words.filter(|word| word.starts_with("selvedge_"));
    names
        .map(|name| {
            ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end)).unwrap_or(name).to_owned()
        })
        .collect()
}

/// Every metric that an alert rule asks for.
pub fn metrics_of_alerts() -> BTreeSet<String> {
    let rules = yaml("alerts.yaml");
    list(&rules["groups"])
        .flat_map(|group| list(&group["rules"]))
        .flat_map(|rule| metrics_of(rule["expr"].as_str().expect("an expression")))
        .collect()
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_sequence().into_iter().flatten()
}

fn yaml(name: &str) -> Value {
    serde_yaml_ng::from_str(&read(&docs().join(name))).unwrap_or_else(|error| panic!("{name}: {error}"))
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn docs() -> PathBuf {
    root().join("docs")
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The Rust files of some crates, without files of tests.
fn sources(crates: &[&str]) -> Vec<PathBuf> {
    let mut open: Vec<PathBuf> = crates.iter().map(|name| root().join(name).join("src")).collect();
    let mut found = Vec::new();
    while let Some(dir) = open.pop() {
        for entry in std::fs::read_dir(&dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display())) {
            let path = entry.expect("an entry").path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
            if path.is_dir() && name != "tests" {
                open.push(path);
            } else if name.ends_with(".rs") && name != "tests.rs" {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

/// A source up to its own tests.
fn without_tests(text: &str) -> String {
    text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default().to_owned()
}

/// Every `SE` with four digits.
fn codes(text: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for (at, _) in text.match_indices("SE") {
        let digits: String = text[at + 2..].chars().take_while(char::is_ascii_digit).collect();
        if digits.len() == 4 {
            found.insert(format!("SE{digits}"));
        }
    }
    found
}

/// Constants that name a metric.
fn constants(text: &str) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    for line in text.lines().filter(|line| line.contains("const ") && line.contains("\"selvedge_")) {
        let constant = line.split("const ").nth(1).and_then(|rest| rest.split(':').next()).expect("a constant");
        let name = line.split('"').nth(1).expect("its name");
        found.insert(constant.trim().to_owned(), name.to_owned());
    }
    found
}

/// What each constant is described as: kind and words.
fn descriptions(text: &str) -> Vec<(String, (String, String))> {
    let mut found = Vec::new();
    for kind in ["counter", "gauge", "histogram"] {
        let call = format!("describe_{kind}!(");
        for (at, _) in text.match_indices(&call) {
            let inside = &text[at + call.len()..];
            let constant = inside.split(',').next().expect("a constant").trim().to_owned();
            let words = inside.split('"').nth(1).expect("words").to_owned();
            // Times have buckets; what else is measured in batches is a summary.
            let shown = match kind {
                "histogram" if !is_time(text, &constant) => "summary",
                other => other,
            };
            found.push((constant, (shown.to_owned(), words)));
        }
    }
    found
}

fn is_time(text: &str, constant: &str) -> bool {
    constants(text).get(constant).is_some_and(|name| name.ends_with("_seconds"))
}
