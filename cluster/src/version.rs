//! Versions of the rules: which is in force, which each broker knows, and what holds a raise back.
//!
//! Brokers of two builds are one cluster: all decide by the version in force, which the state holds. Whoever meets what
//! only a newer build can decide stops before it decides anything.
//!
//! **Invariant:** no command enters the log that a member is known not to be able to decide.

use selvedge_domain::decide::VERSION;
use selvedge_domain::rows::Broker;
use selvedge_domain::state::LoadError;
use selvedge_domain::{Body, Command, Rejected, RejectedCode, State};

use crate::core::Core;
use crate::error::Fatal;

/// What another broker said of itself longer ago does not count: it may be another build by now.
const HEARD_MS_MAX: u64 = 5_000;

/// A build, as its broker reports it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Build {
    /// The newest version of the rules that it knows.
    pub(crate) version: u32,
    /// Its own name, for people.
    pub(crate) name: String,
}

impl Build {
    /// This one.
    pub(crate) fn own() -> Self {
        Self { version: VERSION, name: env!("CARGO_PKG_VERSION").to_owned() }
    }

    /// What a broker said; one that says nothing knows the first version.
    pub(crate) fn reported(version: u32, name: String) -> Self {
        Self { version: version.max(1), name }
    }
}

impl Core {
    /// The build that a member runs, if it was heard lately.
    pub(crate) fn build_of(&self, node: u64) -> Option<Build> {
        if node == self.node {
            return Some(Build::own());
        }
        let now_ms = self.clock.boottime_ms();
        self.reports.lock().build(node).filter(|(_, at_ms)| now_ms < at_ms + HEARD_MS_MAX).map(|(build, _)| build)
    }

    /// Why a command may not enter the log, as the leader sees it.
    pub(crate) fn held_back(&self, command: &Command) -> Option<Rejected> {
        let Body::RaiseMinVersion { version } = command.body else { return None };
        let state = self.published.state();
        let who = self.members().into_iter().filter_map(|node| {
            let name = state.row::<Broker>(&node.to_be_bytes()).map_or_else(|| node.to_string(), |row| row.name);
            match self.build_of(node) {
                Some(build) if build.version >= version => None,
                Some(build) => {
                    Some(format!("broker `{name}` runs {}, which knows version {}", build.name, build.version))
                }
                None => Some(format!("broker `{name}` was not heard lately")),
            }
        });
        let who: Vec<String> = who.collect();
        let message = format!("version {version} of the rules is held back: {}", who.join("; "));
        (!who.is_empty()).then(|| Rejected::new(RejectedCode::Conflict, message))
    }
}

/// A command that is not to be proposed yet: the others may not know it.
pub(crate) fn too_early(state: &State, body: &Body) -> Option<Rejected> {
    let (since, now) = (body.since_version(), state.version());
    let message = || {
        format!(
            "version {since} of the rules is not in force: upgrade every broker, then `selvedge cluster raise-version`"
        )
    };
    (since > now.max(1)).then(|| Rejected::new(RejectedCode::Conflict, message()))
}

/// Reads a command of an entry.
///
/// **Errors**: only a newer build can decide it. What the log holds is checked when it is read, so that what does not
/// decode was not damaged.
pub(crate) fn read(bytes: &[u8]) -> Result<Command, Fatal> {
    let newer = |what| Fatal::Newer { what, known: VERSION };
    let command = Command::decode(bytes).map_err(|error| newer(error.to_string()))?;
    match command.needs_version() {
        needed if needed > VERSION => Err(newer(format!("version {needed} of the rules"))),
        _ => Ok(command),
    }
}

/// Whether this build can go on from a state that was loaded.
///
/// **Errors**: only a newer one can.
pub(crate) fn loaded(state: &Result<State, LoadError>) -> Result<(), Fatal> {
    let what = match state {
        Ok(state) if state.version() > VERSION => format!("version {} of the rules", state.version()),
        Err(LoadError::Table(table)) => format!("table {table}"),
        Ok(_) | Err(_) => return Ok(()),
    };
    Err(Fatal::Newer { what, known: VERSION })
}

#[cfg(test)]
mod tests {
    use selvedge_domain::Actor;

    use super::*;

    fn encoded(body: Body) -> Vec<u8> {
        Command::new(Actor::BROKER, 1, None, body).encode()
    }

    #[test]
    fn what_only_a_newer_build_can_decide_is_not_read_as_anything_else() {
        assert!(read(&encoded(Body::Tick)).is_ok());
        assert!(read(&encoded(Body::RaiseMinVersion { version: VERSION })).is_ok());
        let raise = read(&encoded(Body::RaiseMinVersion { version: VERSION + 1 })).unwrap_err();
        assert_eq!(raise.code(), "SE0105", "{raise}");
        // A kind that is not there yet, in the place of the last field but those of a tick.
        let mut later = encoded(Body::Tick);
        *later.last_mut().unwrap() = 200;
        let unknown = read(&later).unwrap_err();
        assert_eq!(unknown.code(), "SE0105", "{unknown}");
        let mut layout = encoded(Body::Tick);
        layout[0] += 1;
        assert_eq!(read(&layout).unwrap_err().code(), "SE0105");
    }
}
