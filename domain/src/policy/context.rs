use std::net::IpAddr;

use cedar_policy::{ExpressionConstructionError, RestrictedExpression};
use serde::{Deserialize, Serialize};

use crate::id::Id;
use crate::segment::{Endpoint, transport_name};

/// The circumstances of a request.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Context {
    /// The time, milliseconds since the Unix epoch.
    pub now_ms: u64,
    /// Region of the deciding broker.
    pub broker_region: String,
    /// When the person logged in, milliseconds since the Unix epoch.
    pub auth_time_ms: Option<u64>,
    /// The device that the principal uses. A revoked or unknown one denies.
    pub device: Option<Id>,
    /// Where the control stream comes from.
    pub source: Option<IpAddr>,
    /// What the device signed.
    pub attested: Option<Attested>,
    /// What the client says.
    pub claimed: Option<Claimed>,
}

/// What a device signed about itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attested {
    /// Name of the operating system.
    pub os: Option<String>,
    /// Its version.
    pub os_version: Option<String>,
    /// The disk is encrypted.
    pub disk_encrypted: Option<bool>,
    /// A firewall is on.
    pub firewall: Option<bool>,
    /// The screen locks itself.
    pub screen_lock: Option<bool>,
}

/// What a client says without proof.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claimed {
    /// Name of the program that connects.
    pub program: Option<String>,
}

const HOUR_MS: u64 = 3_600_000;
const DAY_MS: u64 = 24 * HOUR_MS;

impl Context {
    /// Seconds since the login.
    pub fn auth_age_s(&self) -> Option<u64> {
        self.auth_time_ms.map(|at_ms| self.now_ms.saturating_sub(at_ms) / 1_000)
    }

    /// When the hour is over, milliseconds since the Unix epoch.
    pub(super) fn hour_end_ms(&self) -> u64 {
        (self.now_ms / HOUR_MS + 1) * HOUR_MS
    }

    /// **Errors** only a fault in this program leads to one.
    pub(super) fn to_cedar(&self, endpoint: &Endpoint) -> Result<cedar_policy::Context, Box<dyn std::error::Error>> {
        let mut observed = vec![
            ("transport", text(transport_name(endpoint.transport))),
            ("host", text(&endpoint.host.to_string())),
            ("port", number(u64::from(endpoint.port))),
            ("broker_region", text(&self.broker_region)),
        ];
        observed.extend(self.device.map(|device| ("device", text(&device.to_string()))));
        observed.extend(self.source.map(|source| ("source", RestrictedExpression::new_ip(source.to_string()))));
        let clock = vec![
            ("now", RestrictedExpression::new_datetime(datetime(self.now_ms))),
            ("hour", number(self.now_ms % DAY_MS / HOUR_MS)),
            ("weekday", number(weekday(self.now_ms))),
        ];
        let mut context = vec![("observed".to_owned(), record(observed)?), ("clock".to_owned(), record(clock)?)];
        context.extend(self.auth_age_s().map(|age_s| ("auth_age".to_owned(), number(age_s))));
        if let Some(attested) = &self.attested {
            context.push(("attested".to_owned(), record(attested.attributes())?));
        }
        if let Some(claimed) = &self.claimed {
            let program = claimed.program.iter().map(|program| ("program", text(program)));
            context.push(("claimed".to_owned(), record(program)?));
        }
        Ok(cedar_policy::Context::from_pairs(context)?)
    }
}

impl Attested {
    fn attributes(&self) -> impl Iterator<Item = (&'static str, RestrictedExpression)> {
        let texts = [("os", &self.os), ("os_version", &self.os_version)];
        let flags =
            [("disk_encrypted", self.disk_encrypted), ("firewall", self.firewall), ("screen_lock", self.screen_lock)];
        let texts = texts.into_iter().filter_map(|(name, value)| Some((name, text(value.as_deref()?))));
        let flags = flags.into_iter().filter_map(|(name, value)| Some((name, RestrictedExpression::new_bool(value?))));
        texts.chain(flags)
    }
}

fn text(value: &str) -> RestrictedExpression {
    RestrictedExpression::new_string(value.to_owned())
}

fn number(value: u64) -> RestrictedExpression {
    RestrictedExpression::new_long(i64::try_from(value).unwrap_or(i64::MAX))
}

fn record(
    fields: impl IntoIterator<Item = (&'static str, RestrictedExpression)>,
) -> Result<RestrictedExpression, ExpressionConstructionError> {
    RestrictedExpression::new_record(fields.into_iter().map(|(name, value)| (name.to_owned(), value)))
}

/// Monday is 1. The epoch was a Thursday.
fn weekday(at_ms: u64) -> u64 {
    (at_ms / DAY_MS + 3) % 7 + 1
}

/// `2026-01-31T23:59:59.999Z`; Cedar knows four-digit years.
///
/// **Source** Howard Hinnant, chrono-compatible low-level date algorithms (`civil_from_days`).
fn datetime(at_ms: u64) -> String {
    const LAST_MS: u64 = 253_402_300_799_999;
    let at_ms = at_ms.min(LAST_MS);
    let shifted = at_ms / DAY_MS + 719_468;
    let era = shifted / 146_097;
    let day_of_era = shifted % 146_097;
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (at_ms % DAY_MS / HOUR_MS, at_ms % HOUR_MS / 60_000, at_ms % 60_000 / 1_000);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{:03}Z", at_ms % 1_000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_as_cedar_reads_them() {
        for (at_ms, expected) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_400_000, "2000-02-29T00:00:00.000Z"),
            (1_767_225_599_999, "2025-12-31T23:59:59.999Z"),
            (u64::MAX, "9999-12-31T23:59:59.999Z"),
        ] {
            assert_eq!(datetime(at_ms), expected);
        }
        assert_eq!(weekday(0), 4);
        assert_eq!(weekday(951_782_400_000), 2);
    }
}
