//! The shape of the house: which crate may use which, and what each may name.
//!
//! These tests read manifests and sources only; they know nothing of what the crates do.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Who may use whom. What is not listed is forbidden, for tests and build scripts too.
const ARROWS: [(&str, &[&str]); 9] = [
    ("domain", &[]),
    ("proto", &["domain"]),
    ("storage", &["domain", "proto"]),
    ("cluster", &["domain", "proto", "storage"]),
    ("broker", &["domain", "proto", "storage", "cluster"]),
    ("connector", &["domain", "proto"]),
    ("cli", &["domain", "proto", "storage", "cluster", "broker", "connector"]),
    ("chaos", &["domain", "proto", "storage", "cluster", "broker", "connector", "cli"]),
    ("benches", &["domain", "proto", "storage", "cluster", "broker", "connector", "cli", "chaos"]),
];

/// A library that one crate fences: nobody else may name it.
const FENCES: [(&str, &str); 2] = [("openraft", "cluster"), ("rocksdb", "storage")];

/// What would give `domain` a socket, a clock, a disk, a thread or a die.
const IMPURE_CRATES: [&str; 12] = [
    "tokio", "mio", "socket2", "hyper", "reqwest", "tonic", "axum", "rustls", "openraft", "rocksdb", "quinn", "turmoil",
];
const IMPURE_NAMES: [&str; 10] = [
    "std::net::Tcp",
    "std::net::Udp",
    "std::fs",
    "std::thread",
    "std::process",
    "SystemTime::now",
    "Instant::now",
    "rand::",
    "Uuid::new_v4",
    "Uuid::now_v7",
];

/// A second cryptography library, or one with a known leak, is a second thing to trust.
const BANNED: [&str; 5] = ["ring", "openssl", "openssl-sys", "native-tls", "rsa"];

#[test]
fn no_dependency_arrow_runs_backwards() {
    let members = members();
    let listed: BTreeSet<&str> = ARROWS.iter().map(|(name, _)| *name).collect();
    let found: BTreeSet<&str> = members.keys().map(String::as_str).collect();
    assert_eq!(listed, found, "a crate that the house does not know, or one that is gone");

    let mut wrong = Vec::new();
    for (member, allowed) in ARROWS {
        for dependency in members[member].dependencies.iter().filter(|d| members.contains_key(*d)) {
            if dependency != member && !allowed.contains(&dependency.as_str()) {
                wrong.push(format!("`{member}` uses `{dependency}`"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_fenced_library_is_named_in_one_crate_only() {
    let members = members();
    let mut wrong = Vec::new();
    for (library, owner) in FENCES {
        for (name, member) in members.iter().filter(|(name, _)| *name != owner) {
            if member.dependencies.contains(library) {
                wrong.push(format!("`{name}` depends on `{library}`"));
            }
            wrong.extend(lines_naming(&member.folder, &format!("{library}::")));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn domain_has_no_runtime_no_socket_no_clock_and_no_randomness() {
    let tree = tree(&["--package", "selvedge-domain"]);
    let impure: Vec<_> = IMPURE_CRATES.iter().filter(|name| tree.contains(**name)).collect();
    assert!(impure.is_empty(), "`domain` reaches {impure:?}");

    let sources = members()["domain"].folder.join("src");
    let wrong: Vec<_> = IMPURE_NAMES.iter().flat_map(|name| lines_naming(&sources, name)).collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn one_cryptography_library_is_compiled() {
    let tree = tree(&["--workspace"]);
    let banned: Vec<_> = BANNED.iter().filter(|name| tree.contains(**name)).collect();
    assert!(banned.is_empty(), "the build contains {banned:?}: see deny.toml for why it must not");
}

/// Cargo compiles a library once for each set of features that it or its own dependencies get, and the tests' own
/// dependencies add some. Where this fails, the line that it names is to be pinned in `storage`'s build dependencies.
#[test]
fn demo_and_tests_compile_rocksdb_once() {
    let below: BTreeSet<String> = tree(&["--package", "librocksdb-sys"]);
    let with_features = |selection: &[&str], edges: &str| -> BTreeSet<String> {
        let mut args = vec!["tree", "--edges", edges, "--prefix", "none", "--no-dedupe", "--format", "{p} [{f}]"];
        args.extend(selection);
        let lines = cargo(&args);
        lines.lines().filter(|l| below.contains(l.split(' ').next().unwrap_or_default())).map(str::to_owned).collect()
    };
    let demo = with_features(&["--package", "selvedge"], "normal,build");
    let tests = with_features(&["--workspace"], "normal,build,dev");
    let twice: Vec<_> = demo.difference(&tests).collect();
    assert!(twice.is_empty(), "the tests compile RocksDB again, because of {twice:?}");
}

struct Member {
    folder: PathBuf,
    /// Of every kind. Other members stand under their folder's name, the rest under their package's.
    dependencies: BTreeSet<String>,
}

/// The workspace's members, by the name of their folder.
fn members() -> BTreeMap<String, Member> {
    let metadata: serde_json::Value =
        serde_json::from_str(&cargo(&["metadata", "--format-version", "1", "--no-deps"])).expect("cargo prints JSON");
    let packages = metadata["packages"].as_array().expect("`packages` is a list");
    packages
        .iter()
        .map(|package| {
            let folder = parent(Path::new(text(&package["manifest_path"])));
            let dependencies = package["dependencies"].as_array().expect("`dependencies` is a list");
            let dependencies = dependencies
                .iter()
                .map(|d| match d["path"].as_str() {
                    Some(path) => file_name(Path::new(path)),
                    None => text(&d["name"]).to_owned(),
                })
                .collect();
            (file_name(&folder), Member { folder, dependencies })
        })
        .collect()
}

/// Names of the packages that are really compiled for this machine. Cargo.lock also names some that are not.
fn tree(selection: &[&str]) -> BTreeSet<String> {
    let mut args = vec!["tree", "--edges", "normal,build", "--prefix", "none", "--format", "{p}"];
    args.extend(selection);
    cargo(&args).lines().filter_map(|line| line.split(' ').next()).map(str::to_owned).collect()
}

fn cargo(args: &[&str]) -> String {
    let output = Command::new(env!("CARGO"))
        .args(args)
        .args(["--offline", "--locked"])
        // A developer's own setting would make `--package` mean the whole workspace.
        .env_remove("CARGO_RESOLVER_FEATURE_UNIFICATION")
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo is running this test");
    assert!(output.status.success(), "cargo {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("cargo prints UTF-8")
}

/// `file:line` of each line of code below `folder` in which the path `name` begins.
fn lines_naming(folder: &Path, name: &str) -> Vec<String> {
    let mut found = Vec::new();
    for file in rust_files(folder) {
        let source = std::fs::read_to_string(&file).expect("a source is readable");
        for (number, line) in source.lines().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            let begins = |at: usize| !code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == '"');
            if code.match_indices(name).any(|(at, _)| begins(at)) {
                found.push(format!("{}:{}: names `{name}`", file.display(), number + 1));
            }
        }
    }
    found
}

fn rust_files(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).expect("a folder of the workspace is readable") {
            let path = entry.expect("an entry is readable").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                files.push(path);
            }
        }
    }
    files.sort();
    files
}

fn parent(path: &Path) -> PathBuf {
    path.parent().expect("a manifest lies in a folder").to_owned()
}

fn file_name(path: &Path) -> String {
    path.file_name().expect("a folder has a name").to_string_lossy().into_owned()
}

fn text(value: &serde_json::Value) -> &str {
    value.as_str().expect("cargo prints a string here")
}
