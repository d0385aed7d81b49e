use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use selvedge_domain::name::Host;
use serde::Deserialize;

use super::Error;
use super::allow::Allow;
use crate::dial::Via;

/// Most sessions that may be configured.
pub const SESSIONS_MAX: usize = 100_000;
/// Most hops that are kept parked at one broker.
pub const PARKED_HOPS_MAX: usize = 4;

/// Configuration of an app connector (TOML).
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The directory that `enrol` filled.
    pub state: PathBuf,
    /// A name for logs; that of the enrolment when left out.
    #[serde(default)]
    pub name: String,
    /// Networks that may be reached, with optional ports: `10.0.0.0/8`, `127.77.0.0/16:8080-8090`.
    #[serde(default)]
    pub allow: Vec<String>,
    /// Addresses of names that the machine's resolver does not know.
    #[serde(default)]
    pub hosts: BTreeMap<String, IpAddr>,
    /// Where to dial instead of a broker's advertised edge address.
    #[serde(default)]
    pub via: Via,
    /// Hops kept parked at each broker.
    #[serde(default = "parked_hops")]
    pub parked_hops: usize,
    /// Sessions at once.
    #[serde(default = "sessions_max")]
    pub sessions_max: usize,
    /// How long a session is held when its broker's lease has run out; the cluster's own value when left out.
    #[serde(default)]
    pub hold_ms: Option<u64>,
    /// How often applications are checked.
    #[serde(default = "check_ms")]
    pub check_ms: u64,
}

fn parked_hops() -> usize {
    2
}

fn sessions_max() -> usize {
    4_096
}

fn check_ms() -> u64 {
    5_000
}

/// A configuration whose parts were parsed and fit together.
#[derive(Clone, Debug)]
pub struct Valid {
    pub(super) state: PathBuf,
    pub(super) name: String,
    pub(super) allow: Allow,
    pub(super) hosts: BTreeMap<Host, IpAddr>,
    pub(super) via: Via,
    pub(super) parked_hops: usize,
    pub(super) sessions_max: usize,
    pub(super) hold: Option<Duration>,
    pub(super) check: Duration,
}

impl Config {
    /// Reads a TOML file.
    ///
    /// **Errors**: [`Error::Config`].
    pub fn load(path: &Path) -> Result<Self, Error> {
        let wrong = |reason: String| Error::Config(format!("file `{}`: {reason}", path.display()));
        let text = std::fs::read_to_string(path).map_err(|error| wrong(error.to_string()))?;
        toml::from_str(&text).map_err(|error| wrong(error.to_string()))
    }

    /// Checks values and parses them.
    ///
    /// **Errors**: [`Error::Config`], with the sentence that says what is wrong.
    pub fn validate(self) -> Result<Valid, Error> {
        let within = |name: &str, value: usize, min: usize, max: usize| {
            if (min..=max).contains(&value) {
                return Ok(value);
            }
            Err(Error::Config(format!("`{name}` is {value}, allowed are {min} to {max}")))
        };
        let parse_host = |(name, address): (String, IpAddr)| {
            Ok((Host::parse(&name).map_err(|error| Error::Config(format!("`hosts`: {error}")))?, address))
        };
        let check_ms = within("check_ms", usize::try_from(self.check_ms).unwrap_or(usize::MAX), 100, 600_000)?;
        Ok(Valid {
            allow: Allow::parse(&self.allow).map_err(|reason| Error::Config(format!("`allow`: {reason}")))?,
            hosts: self.hosts.into_iter().map(parse_host).collect::<Result<_, Error>>()?,
            parked_hops: within("parked_hops", self.parked_hops, 0, PARKED_HOPS_MAX)?,
            sessions_max: within("sessions_max", self.sessions_max, 1, SESSIONS_MAX)?,
            hold: self.hold_ms.map(Duration::from_millis),
            check: Duration::from_millis(check_ms as u64),
            state: self.state,
            name: self.name,
            via: self.via,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn valid(text: &str) -> Result<Valid, String> {
        let config: Config = toml::from_str(text).map_err(|error| error.to_string())?;
        config.validate().map_err(|error| error.to_string())
    }

    #[test]
    fn a_configuration_needs_only_its_state_directory() {
        let config = valid("state = '/x'").unwrap();
        assert_eq!((config.parked_hops, config.sessions_max), (2, 4_096));
    }

    #[test]
    fn a_whole_configuration_is_read() {
        let text = r#"
            state = "/x"
            name = "oslo-1"
            allow = ["127.77.0.0/16:8080-8090"]
            parked_hops = 0
            hold_ms = 3000
            [hosts]
            "CRM.internal" = "127.77.0.1"
            [via]
            "127.0.0.1:7101" = "127.0.0.1:9101"
        "#;
        let config = valid(text).unwrap();
        assert!(config.hosts.contains_key(&Host::parse("crm.internal").unwrap()));
        assert_eq!(config.hold, Some(Duration::from_secs(3)));
    }

    #[test]
    fn wrong_configurations_say_what_is_wrong() {
        for (text, needle) in [
            ("", "state"),
            ("state = '/x'\nstat = 1", "stat"),
            ("state = '/x'\nallow = ['crm']", "crm"),
            ("state = '/x'\nparked_hops = 99", "parked_hops"),
            ("state = '/x'\nsessions_max = 0", "sessions_max"),
            ("state = '/x'\ncheck_ms = 1", "check_ms"),
            ("state = '/x'\n[hosts]\n'a b' = '10.0.0.1'", "a b"),
        ] {
            let error = valid(text).unwrap_err();
            assert!(error.contains(needle), "{error}");
        }
    }
}
