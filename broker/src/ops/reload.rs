//! Putting a changed configuration into force without a restart: on SIGHUP, and by `POST /reload` on `ops`.
//!
//! **Invariant:** everything is read and checked before anything changes; a file that is refused changes nothing.

use std::sync::Arc;

use parking_lot::Mutex;
use serde::Serialize;

use crate::config::{Config, Error, Loaded, Problem, RELOADED, Shown, Sources};
use crate::edge::Edge;
use crate::web;

/// Takes another filter of log lines; it was checked before.
pub type SetLog = Box<dyn Fn(&str) -> Result<(), String> + Send + Sync>;

/// The configuration of a running process, and what it is read from again.
pub struct Configured {
    /// What it is read from.
    pub sources: Sources,
    /// What is in force.
    pub loaded: Loaded,
    /// Changes the filter of log lines.
    pub set_log: SetLog,
}

/// Reads the configuration again and puts what it can into force.
pub struct Reload {
    sources: Sources,
    set_log: SetLog,
    edge: Arc<Edge>,
    certificates: Option<Arc<web::Certificates>>,
    /// What is in force, and since when this broker runs with the rest.
    running: Mutex<Vec<Shown>>,
}

/// What became of a reload.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Reloaded {
    /// In force now.
    pub changed: Vec<Change>,
    /// Different in the file, and in force only after a restart.
    pub needs_restart: Vec<Change>,
    /// The web listener shows another certificate from now on.
    pub certificate: bool,
}

/// A field whose value is another one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Change {
    /// Which field.
    pub field: String,
    /// What was in force; none when there was no value.
    pub from: Option<String>,
    /// What the file, a variable or a flag says now.
    pub to: Option<String>,
}

impl Reload {
    pub(crate) fn new(
        sources: Sources,
        set_log: SetLog,
        running: Vec<Shown>,
        edge: Arc<Edge>,
        certificates: Option<Arc<web::Certificates>>,
    ) -> Self {
        Self { sources, set_log, edge, certificates, running: Mutex::new(running) }
    }

    /// Reads the configuration again, and the web listener's certificate files with it. Says in the log what it did.
    ///
    /// **Errors** with everything that is wrong; then nothing has changed.
    pub fn run(&self) -> Result<Reloaded, Error> {
        let result = self.try_run();
        match &result {
            Ok(Reloaded { changed, needs_restart, certificate }) => {
                let names =
                    |changes: &[Change]| changes.iter().map(|change| &*change.field).collect::<Vec<_>>().join(" ");
                let (changed, needs_restart) = (names(changed), names(needs_restart));
                tracing::info!(changed, needs_restart, certificate, "the configuration was read again");
            }
            Err(error) => {
                tracing::warn!(code = Error::CODE, %error, "the configuration was not changed");
            }
        }
        result
    }

    fn try_run(&self) -> Result<Reloaded, Error> {
        let mut running = self.running.lock();
        let read = Config::read(&self.sources)?;
        let changes = changes(&running, &read.shown);
        let (changed, needs_restart): (Vec<_>, Vec<_>) =
            changes.into_iter().partition(|change| is_reloaded(&change.field));
        let files = || read.config.web_files();
        let prepared = self.certificates.as_ref().map_or(Ok(None), |certificates| certificates.prepare(files()));
        let certificate = prepared.map_err(|error| Error {
            problems: vec![Problem { at: self.sources.file.display().to_string(), message: chain(&error) }],
        })?;
        (self.set_log)(&read.config.log).map_err(|why| Error {
            problems: vec![Problem { at: self.sources.file.display().to_string(), message: format!("`log`: {why}") }],
        })?;
        self.edge.set_limits(read.config.limits);
        let certificate = self.certificates.as_ref().is_some_and(|certificates| certificates.take(certificate));
        *running = running
            .iter()
            .filter(|shown| !is_reloaded(&shown.field))
            .chain(read.shown.iter().filter(|shown| is_reloaded(&shown.field)))
            .cloned()
            .collect();
        Ok(Reloaded { changed, needs_restart, certificate })
    }
}

fn is_reloaded(field: &str) -> bool {
    RELOADED.iter().any(|name| field == *name || (name.ends_with('.') && field.starts_with(name)))
}

/// What differs between two configurations, in the order of the fields.
fn changes(before: &[Shown], after: &[Shown]) -> Vec<Change> {
    let value_in = |all: &[Shown], field: &str| all.iter().find(|shown| shown.field == field).cloned();
    let gone = before.iter().filter(|shown| value_in(after, &shown.field).is_none());
    let of = |field: &str| {
        let (from, to) = (value_in(before, field).and_then(|s| s.value), value_in(after, field).and_then(|s| s.value));
        (from != to).then(|| Change { field: field.to_owned(), from, to })
    };
    after.iter().chain(gone).filter_map(|shown| of(&shown.field)).collect()
}

/// An error with its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Origin;

    fn shown(field: &str, value: Option<&str>) -> Shown {
        Shown { field: field.to_owned(), value: value.map(str::to_owned), origin: Origin::Default }
    }

    #[test]
    fn what_differs_is_named_once_with_both_values() {
        let before = [shown("log", Some("info")), shown("host", Some("a")), shown("peer_via.x", Some("y"))];
        let after = [shown("log", Some("debug")), shown("host", Some("a")), shown("web.key", Some("k"))];
        let change = |field: &str, from: Option<&str>, to: Option<&str>| Change {
            field: field.to_owned(),
            from: from.map(str::to_owned),
            to: to.map(str::to_owned),
        };
        assert_eq!(
            changes(&before, &after),
            [
                change("log", Some("info"), Some("debug")),
                change("web.key", None, Some("k")),
                change("peer_via.x", Some("y"), None)
            ]
        );
    }

    #[test]
    fn only_what_can_change_while_it_runs_is_reloaded() {
        for field in ["log", "limits.sessions", "web.certificate", "web.key"] {
            assert!(is_reloaded(field), "{field}");
        }
        for field in ["data_dir", "web.bind", "limits", "logs", "seal.file"] {
            assert!(!is_reloaded(field), "{field}");
        }
    }
}
