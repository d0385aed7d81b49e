//! What is wrong with a broker, said by looking at its configuration, data directory, machine and peers.
//!
//! Works whether the broker runs or not: what a running one holds is only read, and nothing is locked. Each finding has
//! the code of a runbook.
//!
//! **Invariant:** nothing is changed; the one thing that is written is a nameless file, to time the data disk.

mod cluster;
mod machine;
mod network;
mod node;

use std::fmt;

use serde::Serialize;

use crate::config::{self, Config, Sources, Valid};

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// As it should be.
    Fine,
    /// Worth knowing.
    Note,
    /// It works, and will not when something else happens.
    Warning,
    /// It does not work.
    Error,
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Fine => "fine",
            Self::Note => "note",
            Self::Warning => "warning",
            Self::Error => "error",
        })
    }
}

/// The result of one check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// How bad it is.
    pub level: Level,
    /// The runbook to look up.
    pub code: &'static str,
    /// What was looked at.
    pub check: &'static str,
    /// What was found.
    pub message: String,
    /// What to do next; none when there is nothing to do.
    pub next: Option<String>,
}

/// Everything that was found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Process id of the broker that uses the data directory; none when none does.
    pub running: Option<u32>,
    /// This broker's node id, decimal.
    pub node: Option<String>,
    /// The findings, in the order of the checks.
    pub findings: Vec<Finding>,
}

impl Report {
    /// The worst of the findings.
    pub fn worst(&self) -> Level {
        self.findings.iter().map(|finding| finding.level).max().unwrap_or(Level::Fine)
    }

    /// How many findings are of a level.
    pub fn count(&self, level: Level) -> usize {
        self.findings.iter().filter(|finding| finding.level == level).count()
    }

    fn fine(&mut self, code: &'static str, check: &'static str, message: impl Into<String>) {
        let (level, message) = (Level::Fine, message.into());
        self.findings.push(Finding { level, code, check, message, next: None });
    }

    fn note(&mut self, code: &'static str, check: &'static str, message: impl Into<String>) {
        let (level, message) = (Level::Note, message.into());
        self.findings.push(Finding { level, code, check, message, next: None });
    }

    fn warn(&mut self, code: &'static str, check: &'static str, message: impl Into<String>, next: impl Into<String>) {
        let (level, message, next) = (Level::Warning, message.into(), Some(next.into()));
        self.findings.push(Finding { level, code, check, message, next });
    }

    fn error(&mut self, code: &'static str, check: &'static str, message: impl Into<String>, next: impl Into<String>) {
        let (level, message, next) = (Level::Error, message.into(), Some(next.into()));
        self.findings.push(Finding { level, code, check, message, next });
    }
}

/// Looks at everything.
pub async fn examine(sources: &Sources) -> Report {
    let mut report = Report::default();
    let config = match Config::read(sources) {
        Ok(loaded) => loaded.config,
        Err(error) => {
            for problem in error.problems {
                report.error(config::Error::CODE, "configuration", problem.to_string(), "correct the file");
            }
            return report;
        }
    };
    report.fine(config::Error::CODE, "configuration", format!("{} is accepted", sources.file.display()));
    of_config(&config, &mut report).await;
    report
}

async fn of_config(config: &Valid<Config>, report: &mut Report) {
    let Some(node) = node::examine(config, report) else {
        machine::examine(config, None, &[], report);
        return;
    };
    report.running = node.running;
    report.node = Some(node.id.to_string());
    let stored = cluster::stored(config, &node, report).await;
    network::listeners(config, &node, report).await;
    let offsets = network::peers(config, &node, stored.as_ref(), report).await;
    machine::examine(config, node.running, &offsets, report);
    cluster::shape(config, &node, stored.as_ref(), report);
    cluster::journal(config, report).await;
}

/// An error with its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| {
        let cause = cause.to_string();
        if text.ends_with(&cause) { text } else { format!("{text}: {cause}") }
    })
}

/// A span of time for people.
fn span(ms: u64) -> String {
    match ms / 1_000 {
        0 => format!("{ms} ms"),
        seconds @ 1..=119 => format!("{seconds} s"),
        seconds @ 120..=7_199 => format!("{} min", seconds / 60),
        seconds @ 7_200..=172_799 => format!("{} h", seconds / 3_600),
        seconds => format!("{} days", seconds / 86_400),
    }
}

/// A number of bytes for people.
fn bytes(bytes: u64) -> String {
    match bytes {
        0..=10_239 => format!("{bytes} B"),
        10_240..=10_485_759 => format!("{} KiB", bytes >> 10),
        10_485_760..=10_737_418_239 => format!("{} MiB", bytes >> 20),
        _ => format!("{} GiB", bytes >> 30),
    }
}
