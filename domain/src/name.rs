//! Names: of objects, of hosts, and the patterns that hosts are matched by.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::limits::NAME_CHARS_MAX;

/// Why a name was not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// An object's name is empty, too long or has characters that names do not have.
    #[error(
        "`{0}` is not a name: letters, digits, `.`, `_`, `-`, `@` and spaces inside, at most {NAME_CHARS_MAX} characters"
    )]
    Object(String),
    /// Not a host name or address.
    #[error("`{0}` is not a host name")]
    Host(String),
    /// Not a pattern of host names.
    #[error("`{0}` is not a host name or a pattern of the form `*.domain`")]
    Pattern(String),
}

/// Checks the name of an object (segment, group, policy, ...).
pub fn check_object(name: &str) -> Result<(), Error> {
    let fine = !name.is_empty()
        && name.chars().count() <= NAME_CHARS_MAX
        && name.trim() == name
        && name.chars().all(|c| c.is_alphanumeric() || matches!(c, '.' | '_' | '-' | '@' | ' ' | '/'));
    if fine { Ok(()) } else { Err(Error::Object(name.chars().take(64).collect())) }
}

/// A host in canonical form: a lower-case ASCII name without a trailing dot, or an address.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Host {
    /// A DNS name.
    Name(String),
    /// An address; IPv4-mapped IPv6 addresses become IPv4.
    Address(IpAddr),
}

impl Host {
    /// Parses and makes canonical what a person or a program wrote.
    ///
    /// **Source** RFC 1035 (lengths), UTS 46 (Unicode folding).
    pub fn parse(text: &str) -> Result<Self, Error> {
        let wrong = || Error::Host(text.chars().take(64).collect());
        let bare = text.strip_prefix('[').and_then(|t| t.strip_suffix(']')).unwrap_or(text);
        if let Ok(address) = bare.parse::<IpAddr>() {
            return Ok(Self::Address(address.to_canonical()));
        }
        let undotted = text.strip_suffix('.').unwrap_or(text);
        if undotted.is_empty() || undotted.len() > 1_000 {
            return Err(wrong());
        }
        let ascii = idna::domain_to_ascii_cow(undotted.as_bytes(), idna::AsciiDenyList::URL)
            .map_err(|_| wrong())?
            .to_ascii_lowercase();
        let ascii = ascii.strip_suffix('.').unwrap_or(&ascii).to_owned();
        let labels_fine = ascii.split('.').all(|label| {
            !label.is_empty()
                && label.len() <= 63
                && !label.starts_with('-')
                && !label.ends_with('-')
                && label.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'_'))
        });
        let numeric_end = ascii.rsplit('.').next().is_some_and(|last| last.bytes().all(|b| b.is_ascii_digit()));
        if ascii.len() > 253 || !labels_fine || numeric_end {
            return Err(wrong());
        }
        Ok(Self::Name(ascii))
    }
}

impl std::fmt::Display for Host {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Name(name) => f.write_str(name),
            Self::Address(address) => address.fmt(f),
        }
    }
}

/// Names that a segment has: one exact name, or any depth below a domain (`*.x`, which is not `x`).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Pattern {
    /// One name.
    Exact(String),
    /// Any depth below this domain.
    Below(String),
}

impl Pattern {
    /// Parses `name` or `*.name`.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let wrong = || Error::Pattern(text.chars().take(64).collect());
        let (below, rest) = match text.strip_prefix("*.") {
            Some(rest) => (true, rest),
            None => (false, text),
        };
        match Host::parse(rest) {
            Ok(Host::Name(name)) if below => Ok(Self::Below(name)),
            Ok(Host::Name(name)) => Ok(Self::Exact(name)),
            _ => Err(wrong()),
        }
    }

    /// Whether a canonical name is one of these.
    pub fn matches(&self, name: &str) -> bool {
        match self {
            Self::Exact(exact) => exact == name,
            Self::Below(domain) => is_below(name, domain),
        }
    }
}

impl std::fmt::Display for Pattern {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Exact(name) => f.write_str(name),
            Self::Below(domain) => write!(f, "*.{domain}"),
        }
    }
}

/// Whether `name` lies below `domain` (at any depth, not the domain itself).
pub fn is_below(name: &str, domain: &str) -> bool {
    name.strip_suffix(domain).is_some_and(|rest| rest.len() > 1 && rest.ends_with('.'))
}

/// Whether `name` is `domain` or lies below it.
pub fn is_in_zone(name: &str, domain: &str) -> bool {
    name == domain || is_below(name, domain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_become_canonical() {
        assert_eq!(Host::parse("CRM.Internal.").unwrap().to_string(), "crm.internal");
        assert_eq!(Host::parse("[::ffff:10.0.0.1]").unwrap().to_string(), "10.0.0.1");
        assert_eq!(Host::parse("bücher.example").unwrap().to_string(), "xn--bcher-kva.example");
    }

    #[test]
    fn odd_hosts_are_refused() {
        for text in
            ["", ".", "a..b", "*.x", "-a.b", "a b", "a/b", "1.2.3", "0x7f.1", "127.1", "a\0b", &"a.".repeat(200)]
        {
            assert!(Host::parse(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_wildcard_matches_any_depth_below_but_not_the_domain_itself() {
        let pattern = Pattern::parse("*.corp.example").unwrap();
        assert!(pattern.matches("a.corp.example"));
        assert!(pattern.matches("a.b.corp.example"));
        assert!(!pattern.matches("corp.example"));
        assert!(!pattern.matches("acorp.example"));
        assert!(Pattern::parse("*").is_err() && Pattern::parse("*.").is_err() && Pattern::parse("a.*.b").is_err());
    }
}
