//! Which segments a requested endpoint matches, before any policy is asked.
//!
//! A name matches only names, an address only addresses. What matches is ordered in *levels* of specificity: the exact
//! name, then wildcards from the longest to the shortest domain; for addresses, networks from the longest prefix to the
//! shortest. Segments of one level are told apart by the port; those that are not are a [`conflict`], which is refused.
//!
//! **Invariant:** if the most specific segment is exclusive, no other segment is matched, whether or not it has the port.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::id::Id;
use crate::name::{Host, Pattern};
use crate::rows::{self, Transport};
use crate::state::State;

/// What someone asks to reach.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Endpoint {
    /// Canonical host.
    pub host: Host,
    /// Port.
    pub port: u16,
    /// Transport.
    pub transport: Transport,
}

impl std::fmt::Display for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.host {
            Host::Address(IpAddr::V6(address)) => {
                write!(f, "{}/[{address}]:{}", transport_name(self.transport), self.port)
            }
            host => write!(f, "{}/{host}:{}", transport_name(self.transport), self.port),
        }
    }
}

/// `tcp` or `udp`.
pub fn transport_name(transport: Transport) -> &'static str {
    match transport {
        Transport::Tcp => "tcp",
        Transport::Udp => "udp",
    }
}

/// A segment that an endpoint matched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Matched {
    /// The segment.
    pub segment: Id,
    /// Its name.
    pub name: String,
    /// The host pattern or network by which it matched.
    pub by: String,
    /// Its segment groups.
    pub groups: Vec<Id>,
    /// Connector groups that reach it.
    pub connector_groups: Vec<Id>,
}

/// A segment that has the host, and what became of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Considered {
    /// The segment.
    pub segment: Id,
    /// Its name.
    pub name: String,
    /// The host pattern or network that is the host's.
    pub by: String,
    /// It lets less specific ones be tried.
    pub inclusive: bool,
    /// What became of it.
    pub fate: Fate,
}

/// Why a segment that has the host was matched or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Fate {
    /// Matched: it has the port and nothing more specific stood before it.
    Matched,
    /// It does not have the port.
    LacksPort,
    /// A more specific segment ended the search before it.
    Hidden,
}

/// Segments and zones, arranged for looking up. Built once per policy revision.
#[derive(Clone, Debug, Default)]
pub struct SegmentIndex {
    revision: u64,
    segments: Vec<Entry>,
    exact: BTreeMap<String, Vec<usize>>,
    below: BTreeMap<String, Vec<usize>>,
    networks: BTreeMap<IpNet, Vec<usize>>,
    prefixes_v4: BTreeSet<u8>,
    prefixes_v6: BTreeSet<u8>,
    zones: BTreeSet<String>,
}

#[derive(Clone, Debug)]
struct Entry {
    id: Id,
    name: String,
    ports: Vec<rows::PortRange>,
    inclusive: bool,
    groups: Vec<Id>,
    connector_groups: Vec<Id>,
}

impl Entry {
    fn has_port(&self, transport: Transport, port: u16) -> bool {
        self.ports
            .iter()
            .any(|range| range.transport == transport as i32 && (range.first..=range.last).contains(&u32::from(port)))
    }
}

impl SegmentIndex {
    /// Arranges the segments and zones of a state.
    pub fn build(state: &State) -> Self {
        let mut index = Self { revision: crate::policy::revision(state), ..Self::default() };
        for zone in state.rows::<rows::Zone>() {
            index.zones.insert(zone.name);
        }
        for segment in state.rows::<rows::Segment>() {
            index.insert(segment);
        }
        index
    }

    fn insert(&mut self, segment: rows::Segment) {
        let at = self.segments.len();
        for target in targets(&segment) {
            match target {
                Target::Host(Pattern::Exact(name)) => self.exact.entry(name).or_default().push(at),
                Target::Host(Pattern::Below(domain)) => self.below.entry(domain).or_default().push(at),
                Target::Network(network) => {
                    match network {
                        IpNet::V4(v4) => self.prefixes_v4.insert(v4.prefix_len()),
                        IpNet::V6(v6) => self.prefixes_v6.insert(v6.prefix_len()),
                    };
                    self.networks.entry(network).or_default().push(at);
                }
            }
        }
        self.segments.push(Entry {
            id: segment.id(),
            name: segment.name,
            ports: segment.ports,
            inclusive: segment.inclusive,
            groups: segment.groups,
            connector_groups: segment.connector_groups,
        });
    }

    /// The policy revision that it was built from.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// The zone that a host lies in: the longest one, when zones are nested. Addresses lie in none.
    pub fn zone_of(&self, host: &Host) -> Option<&str> {
        let Host::Name(name) = host else { return None };
        domains_from(name).find_map(|domain| self.zones.get(domain)).map(String::as_str)
    }

    /// Whether a host lies in a zone.
    pub fn in_zone(&self, host: &Host) -> bool {
        self.zone_of(host).is_some()
    }

    /// The segments that an endpoint matches, most specific first.
    pub fn matched(&self, endpoint: &Endpoint) -> Vec<Matched> {
        self.walk(endpoint)
            .into_iter()
            .filter(|step| step.fate == Fate::Matched)
            .map(|step| {
                let entry = &self.segments[step.at];
                Matched {
                    segment: entry.id,
                    name: entry.name.clone(),
                    by: step.by,
                    groups: entry.groups.clone(),
                    connector_groups: entry.connector_groups.clone(),
                }
            })
            .collect()
    }

    /// Every segment that has the endpoint's host, most specific first, and what became of it.
    pub fn considered(&self, endpoint: &Endpoint) -> Vec<Considered> {
        self.walk(endpoint)
            .into_iter()
            .map(|step| {
                let entry = &self.segments[step.at];
                Considered {
                    segment: entry.id,
                    name: entry.name.clone(),
                    by: step.by,
                    inclusive: entry.inclusive,
                    fate: step.fate,
                }
            })
            .collect()
    }

    /// The name of a segment.
    pub fn name_of(&self, segment: Id) -> Option<&str> {
        self.segments.iter().find(|entry| entry.id == segment).map(|entry| entry.name.as_str())
    }

    fn walk(&self, endpoint: &Endpoint) -> Vec<Step> {
        let mut steps = Vec::new();
        let mut seen = BTreeSet::new();
        let mut ended = false;
        for (depth, (by, level)) in self.levels(&endpoint.host).into_iter().enumerate() {
            // A segment counts where it is most specific; what is new at this level stands for the level.
            let level: Vec<usize> = level.iter().copied().filter(|&at| seen.insert(at)).collect();
            let has_port = |at: usize| self.segments[at].has_port(endpoint.transport, endpoint.port);
            // The port tells segments of one level apart; only where none has it do all of them stand for the level.
            let some_have_port = level.iter().any(|&at| has_port(at));
            let exclusive = level.iter().any(|&at| !self.segments[at].inclusive && (has_port(at) || !some_have_port));
            ended |= exclusive && depth > 0;
            steps.extend(level.into_iter().map(|at| {
                let fate = match has_port(at) {
                    _ if ended => Fate::Hidden,
                    true => Fate::Matched,
                    false => Fate::LacksPort,
                };
                Step { at, by: by.clone(), fate }
            }));
            ended |= exclusive;
        }
        steps
    }

    /// What has this host, from the most specific level to the least.
    fn levels(&self, host: &Host) -> Vec<(String, &[usize])> {
        match host {
            Host::Name(name) => {
                let exact = self.exact.get(name).map(|level| (name.clone(), &level[..]));
                let below = domains_from(name)
                    .skip(1)
                    .filter_map(|domain| self.below.get(domain).map(|level| (format!("*.{domain}"), &level[..])));
                exact.into_iter().chain(below).collect()
            }
            Host::Address(address) => {
                let prefixes = if address.is_ipv4() { &self.prefixes_v4 } else { &self.prefixes_v6 };
                prefixes
                    .iter()
                    .rev()
                    .filter_map(|&length| {
                        let network = IpNet::new(*address, length).ok()?.trunc();
                        self.networks.get(&network).map(|level| (network.to_string(), &level[..]))
                    })
                    .collect()
            }
        }
    }
}

struct Step {
    at: usize,
    by: String,
    fate: Fate,
}

/// `a.b.c`, `b.c`, `c`.
fn domains_from(name: &str) -> impl Iterator<Item = &str> {
    std::iter::successors(Some(name), |rest| rest.split_once('.').map(|(_, parent)| parent))
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Target {
    Host(Pattern),
    Network(IpNet),
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Host(pattern) => pattern.fmt(f),
            Self::Network(network) => network.fmt(f),
        }
    }
}

/// Hosts and networks of a segment in the one form in which equal ones are equal. What does not parse is left out:
/// `decide` refused it.
fn targets(segment: &rows::Segment) -> BTreeSet<Target> {
    let hosts = segment.hosts.iter().filter_map(|host| Pattern::parse(host).ok()).map(Target::Host);
    let networks = segment.networks.iter().filter_map(|network| parse_network(network)).map(Target::Network);
    hosts.chain(networks).collect()
}

/// Parses an address or a network, without host bits; IPv4-mapped networks become IPv4.
pub fn parse_network(text: &str) -> Option<IpNet> {
    let network = match text.parse::<IpNet>() {
        Ok(network) => network,
        Err(_) => IpNet::from(text.parse::<IpAddr>().ok()?),
    };
    let canonical = match network {
        IpNet::V6(v6) if v6.prefix_len() >= 96 => v6
            .addr()
            .to_ipv4_mapped()
            .and_then(|v4| Ipv4Net::new(v4, v6.prefix_len() - 96).ok())
            .map_or(network, IpNet::V4),
        _ => network,
    };
    Some(canonical.trunc())
}

/// Two segments that would be chosen for the same endpoint.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("segments `{}` and `{}` both have `{target}` with {} port {port}", .segments.0, .segments.1, transport_name(*.transport))]
pub struct Conflict {
    /// Their names.
    pub segments: (String, String),
    /// The host pattern or network that both have.
    pub target: String,
    /// The transport that both have.
    pub transport: Transport,
    /// The first port that both have.
    pub port: u32,
}

/// The first two segments that have a host pattern or network, a transport and a port in common.
pub fn conflict(all: impl Iterator<Item = rows::Segment>) -> Option<Conflict> {
    let mut names = Vec::new();
    let mut claims: BTreeMap<Target, Vec<(rows::PortRange, usize)>> = BTreeMap::new();
    for (at, segment) in all.enumerate() {
        for target in targets(&segment) {
            let claimed = claims.entry(target.clone()).or_default();
            for ports in &segment.ports {
                let others = claimed.iter().filter(|(_, other)| *other != at);
                if let Some((port, other)) =
                    others.filter_map(|(theirs, other)| common_port(ports, theirs).zip(Some(*other))).next()
                {
                    return Some(Conflict {
                        segments: (std::mem::take(&mut names[other]), segment.name),
                        target: target.to_string(),
                        transport: ports.transport(),
                        port,
                    });
                }
                claimed.push((*ports, at));
            }
        }
        names.push(segment.name);
    }
    None
}

fn common_port(ours: &rows::PortRange, theirs: &rows::PortRange) -> Option<u32> {
    let first = ours.first.max(theirs.first);
    (ours.transport == theirs.transport && first <= ours.last.min(theirs.last)).then_some(first)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn segment(seq: u64, targets: &[&str], ports: &[u32], inclusive: bool) -> rows::Segment {
        let (networks, hosts): (Vec<&str>, Vec<&str>) =
            targets.iter().copied().partition(|t| parse_network(t).is_some());
        rows::Segment {
            id: Some(Id::new(1, seq)),
            name: format!("s{seq}"),
            hosts: hosts.into_iter().map(String::from).collect(),
            networks: networks.into_iter().map(String::from).collect(),
            ports: ports
                .iter()
                .map(|&port| rows::PortRange { transport: Transport::Tcp as i32, first: port, last: port })
                .collect(),
            inclusive,
            ..Default::default()
        }
    }

    fn index(segments: &[rows::Segment]) -> SegmentIndex {
        let mut index = SegmentIndex::default();
        segments.iter().cloned().for_each(|segment| index.insert(segment));
        index
    }

    fn endpoint(host: &str, port: u16) -> Endpoint {
        Endpoint { host: Host::parse(host).unwrap(), port, transport: Transport::Tcp }
    }

    fn names(index: &SegmentIndex, host: &str, port: u16) -> Vec<String> {
        index.matched(&endpoint(host, port)).into_iter().map(|m| m.name).collect()
    }

    const EXCLUSIVE: bool = false;
    const INCLUSIVE: bool = true;

    #[test]
    fn the_exact_name_beats_the_longer_wildcard_which_beats_the_shorter() {
        let index = index(&[
            segment(1, &["*.corp"], &[80], EXCLUSIVE),
            segment(2, &["*.eu.corp"], &[80], EXCLUSIVE),
            segment(3, &["crm.eu.corp"], &[80], EXCLUSIVE),
        ]);
        assert_eq!(names(&index, "crm.eu.corp", 80), ["s3"]);
        assert_eq!(names(&index, "hr.eu.corp", 80), ["s2"]);
        assert_eq!(names(&index, "a.b.eu.corp", 80), ["s2"]);
        assert_eq!(names(&index, "hr.us.corp", 80), ["s1"]);
        assert!(names(&index, "corp", 80).is_empty());
        assert!(names(&index, "xcorp", 80).is_empty());
    }

    #[test]
    fn the_longer_prefix_beats_the_shorter() {
        let index = index(&[
            segment(1, &["10.0.0.0/8"], &[80], EXCLUSIVE),
            segment(2, &["10.1.2.0/24"], &[80], EXCLUSIVE),
            segment(3, &["10.1.2.3"], &[80], EXCLUSIVE),
            segment(4, &["fd00::/8"], &[80], EXCLUSIVE),
        ]);
        assert_eq!(names(&index, "10.1.2.3", 80), ["s3"]);
        assert_eq!(names(&index, "10.1.2.4", 80), ["s2"]);
        assert_eq!(names(&index, "10.9.9.9", 80), ["s1"]);
        assert_eq!(names(&index, "::ffff:10.9.9.9", 80), ["s1"]);
        assert_eq!(names(&index, "fd00::1", 80), ["s4"]);
        assert!(names(&index, "11.0.0.1", 80).is_empty());
    }

    #[test]
    fn a_name_matches_only_names_and_an_address_only_addresses() {
        let index =
            index(&[segment(1, &["0.0.0.0/0", "::/0"], &[80], EXCLUSIVE), segment(2, &["*.corp"], &[80], EXCLUSIVE)]);
        assert_eq!(names(&index, "a.corp", 80), ["s2"]);
        assert!(names(&index, "a.other", 80).is_empty());
        assert_eq!(names(&index, "1.2.3.4", 80), ["s1"]);
    }

    #[test]
    fn a_port_that_the_exclusive_segment_lacks_is_dropped_and_not_tried_elsewhere() {
        let index = index(&[segment(1, &["*.corp"], &[22], EXCLUSIVE), segment(2, &["crm.corp"], &[80], EXCLUSIVE)]);
        assert!(names(&index, "crm.corp", 22).is_empty());
        let fates: Vec<Fate> = index.considered(&endpoint("crm.corp", 22)).into_iter().map(|c| c.fate).collect();
        assert_eq!(fates, [Fate::LacksPort, Fate::Hidden]);
    }

    #[test]
    fn equal_specificity_is_told_apart_by_the_port() {
        let index = index(&[
            segment(1, &["crm.corp"], &[80], EXCLUSIVE),
            segment(2, &["crm.corp"], &[443], EXCLUSIVE),
            segment(3, &["*.corp"], &[22, 80, 443], EXCLUSIVE),
        ]);
        assert_eq!(names(&index, "crm.corp", 80), ["s1"]);
        assert_eq!(names(&index, "crm.corp", 443), ["s2"]);
        assert!(names(&index, "crm.corp", 22).is_empty());
    }

    #[test]
    fn an_inclusive_segment_lets_less_specific_ones_match_up_to_the_first_exclusive_one() {
        let index = index(&[
            segment(1, &["crm.a.b.corp"], &[80, 22], INCLUSIVE),
            segment(2, &["*.a.b.corp"], &[80], INCLUSIVE),
            segment(3, &["*.b.corp"], &[80], EXCLUSIVE),
            segment(4, &["*.corp"], &[80, 22], INCLUSIVE),
        ]);
        assert_eq!(names(&index, "crm.a.b.corp", 80), ["s1", "s2"]);
        assert_eq!(names(&index, "crm.a.b.corp", 22), ["s1"], "an exclusive one ends the search even without the port");
        assert_eq!(names(&index, "x.b.corp", 80), ["s3"]);
        assert_eq!(names(&index, "x.corp", 22), ["s4"]);
    }

    #[test]
    fn an_inclusive_segment_without_the_port_is_passed_over() {
        let index = index(&[segment(1, &["crm.corp"], &[80], INCLUSIVE), segment(2, &["*.corp"], &[22], INCLUSIVE)]);
        assert_eq!(names(&index, "crm.corp", 22), ["s2"]);
    }

    #[test]
    fn the_transport_is_part_of_the_port() {
        let index = index(&[segment(1, &["crm.corp"], &[53], EXCLUSIVE)]);
        let udp = Endpoint { transport: Transport::Udp, ..endpoint("crm.corp", 53) };
        assert!(index.matched(&udp).is_empty());
    }

    #[test]
    fn the_same_name_transport_and_port_in_two_segments_conflict() {
        let first = segment(1, &["crm.corp", "*.x", "10.1.2.0/24"], &[80], EXCLUSIVE);
        let with =
            |target, ports: &[u32]| conflict([first.clone(), segment(2, &[target], ports, EXCLUSIVE)].into_iter());
        for target in ["crm.corp", "*.x", "10.1.2.99/24", "::ffff:10.1.2.0/120"] {
            assert!(with(target, &[79, 80]).is_some(), "{target}");
            assert!(with(target, &[81]).is_none(), "{target}");
        }
        for target in ["x", "a.x", "10.1.2.0/25", "10.1.2.3"] {
            assert!(with(target, &[80]).is_none(), "{target}");
        }
        let twice = segment(1, &["crm.corp"], &[80, 80], EXCLUSIVE);
        assert!(conflict([twice].into_iter()).is_none(), "a segment does not conflict with itself");
        let found = with("CRM.corp", &[80]).unwrap();
        assert_eq!(found.to_string(), "segments `s1` and `s2` both have `crm.corp` with tcp port 80");
    }

    #[test]
    fn zones_hold_their_domain_and_what_lies_below() {
        let mut index = SegmentIndex::default();
        index.zones.insert("corp.example".into());
        for (host, inside) in [
            ("corp.example", true),
            ("a.b.corp.example", true),
            ("example", false),
            ("xcorp.example", false),
            ("10.0.0.1", false),
        ] {
            assert_eq!(index.in_zone(&Host::parse(host).unwrap()), inside, "{host}");
        }
    }

    /// The rules of specificity, said without any index.
    fn naive(segments: &[rows::Segment], endpoint: &Endpoint) -> Vec<Id> {
        let specificity = |segment: &rows::Segment| -> Option<usize> {
            match &endpoint.host {
                Host::Name(name) => segment
                    .hosts
                    .iter()
                    .filter_map(|host| match Pattern::parse(host).unwrap() {
                        Pattern::Exact(exact) => (exact == *name).then_some(1_000),
                        Pattern::Below(domain) => name.ends_with(&format!(".{domain}")).then_some(domain.len()),
                    })
                    .max(),
                Host::Address(address) => segment
                    .networks
                    .iter()
                    .map(|network| network.parse::<IpNet>().unwrap())
                    .filter(|network| network.contains(address))
                    .map(|network| usize::from(network.prefix_len()))
                    .max(),
            }
        };
        let has_port =
            |segment: &rows::Segment| segment.ports.iter().any(|range| range.first == u32::from(endpoint.port));
        let mut levels: BTreeMap<usize, Vec<&rows::Segment>> = BTreeMap::new();
        for segment in segments {
            if let Some(specificity) = specificity(segment) {
                levels.entry(specificity).or_default().push(segment);
            }
        }
        let mut matched = Vec::new();
        for (depth, level) in levels.values().rev().enumerate() {
            let with_port: Vec<&rows::Segment> = level.iter().copied().filter(|s| has_port(s)).collect();
            let standing = if with_port.is_empty() { level.clone() } else { with_port.clone() };
            let exclusive = standing.iter().any(|s| !s.inclusive);
            if !exclusive || depth == 0 {
                matched.extend(with_port.iter().map(|s| s.id()));
            }
            if exclusive {
                break;
            }
        }
        matched
    }

    const TARGETS: [&str; 12] = [
        "a",
        "b.a",
        "c.b.a",
        "d.c.b.a",
        "*.a",
        "*.b.a",
        "*.c.b.a",
        "10.0.0.0/8",
        "10.1.0.0/16",
        "10.1.1.0/24",
        "10.1.1.1/32",
        "0.0.0.0/0",
    ];
    const HOSTS: [&str; 9] = ["a", "b.a", "c.b.a", "d.c.b.a", "e.d.c.b.a", "x.a", "10.1.1.1", "10.1.1.2", "10.1.2.1"];

    proptest! {
        #[test]
        fn the_index_agrees_with_the_rules_said_naively(
            drawn in prop::collection::vec((prop::collection::btree_set(0..TARGETS.len(), 1..3), prop::collection::btree_set(1..4u32, 1..3), any::<bool>()), 0..8),
            host in 0..HOSTS.len(),
            port in 1..5u16,
        ) {
            let mut segments: Vec<rows::Segment> = Vec::new();
            for (seq, (targets, ports, inclusive)) in drawn.into_iter().enumerate() {
                let targets: Vec<&str> = targets.into_iter().map(|t| TARGETS[t]).collect();
                let candidate = segment(seq as u64 + 1, &targets, &ports.into_iter().collect::<Vec<_>>(), inclusive);
                segments.push(candidate);
                if conflict(segments.iter().cloned()).is_some() {
                    segments.pop();
                }
            }
            let endpoint = endpoint(HOSTS[host], port);
            let found: Vec<Id> = index(&segments).matched(&endpoint).into_iter().map(|m| m.segment).collect();
            prop_assert_eq!(found, naive(&segments, &endpoint));
        }
    }
}
