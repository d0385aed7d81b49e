//! What this connector may reach, judged on the address that it connects to.

use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::ops::RangeInclusive;
use std::str::FromStr;

use ipnet::IpNet;

/// Networks that a wider rule never opens: only a rule that lies inside one of them does.
const SPECIAL: &[(&str, &str)] = &[
    ("0.0.0.0/8", "unspecified"),
    ("::/128", "unspecified"),
    ("127.0.0.0/8", "loopback"),
    ("::1/128", "loopback"),
    ("169.254.0.0/16", "link-local"),
    ("fe80::/10", "link-local"),
    ("169.254.169.254/32", "metadata"),
    ("169.254.170.2/32", "metadata"),
    ("100.100.100.200/32", "metadata"),
    ("168.63.129.16/32", "metadata"),
    ("fd00:ec2::254/128", "metadata"),
    ("224.0.0.0/4", "multicast"),
    ("ff00::/8", "multicast"),
    ("255.255.255.255/32", "broadcast"),
];

/// One line of the allow list: a network, and ports if not all.
///
/// **Shape**: `10.0.0.0/8`, `10.1.2.3`, `10.0.0.0/8:443`, `127.77.0.0/16:8080-8090`, `fd00::/8`, `[fd00::]/8:443`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    network: IpNet,
    ports: RangeInclusive<u16>,
}

impl FromStr for Rule {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is not a network with optional ports, as in `10.0.0.0/8:8080-8090`");
        let (network, ports) = match text.strip_prefix('[') {
            Some(rest) => {
                let (address, rest) = rest.split_once(']').ok_or_else(wrong)?;
                let (prefix, ports) = match rest.split_once(':') {
                    Some((prefix, ports)) => (prefix, Some(ports)),
                    None => (rest, None),
                };
                (format!("{address}{prefix}"), ports)
            }
            None if text.matches(':').count() > 1 => (text.to_owned(), None),
            None => match text.split_once(':') {
                Some((network, ports)) => (network.to_owned(), Some(ports)),
                None => (text.to_owned(), None),
            },
        };
        let network = match network.parse::<IpAddr>() {
            Ok(address) => IpNet::from(address.to_canonical()),
            Err(_) => network.parse::<IpNet>().map_err(|_| wrong())?.trunc(),
        };
        let ports = match ports {
            None | Some("*") => 1..=u16::MAX,
            Some(ports) => {
                let (first, last) = ports.split_once('-').unwrap_or((ports, ports));
                let port = |text: &str| text.parse::<u16>().ok().filter(|port| *port > 0).ok_or_else(wrong);
                port(first)?..=port(last)?
            }
        };
        if ports.is_empty() {
            return Err(wrong());
        }
        Ok(Self { network, ports })
    }
}

impl Rule {
    fn matches(&self, address: IpAddr, port: u16) -> bool {
        self.network.contains(&address) && self.ports.contains(&port)
    }

    fn is_one_address(&self) -> bool {
        self.network.prefix_len() == self.network.max_prefix_len()
    }
}

/// Why a target is not reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// No rule has it.
    NoRule,
    /// A range that only a rule inside it opens.
    Special(&'static str),
    /// An address of this machine, which only a rule for that one address opens.
    Own,
    /// An address of a broker, which only a rule for that one address opens.
    Broker,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoRule => f.write_str("no rule allows it"),
            Self::Special(what) => write!(f, "a {what} address, and no rule names it"),
            Self::Own => f.write_str("an address of this machine, and no rule names it"),
            Self::Broker => f.write_str("an address of a broker, and no rule names it"),
        }
    }
}

/// The allow list of one connector.
#[derive(Clone, Debug)]
pub struct Allow {
    rules: Vec<Rule>,
    special: Vec<(IpNet, &'static str)>,
}

impl Allow {
    /// Reads the lines of a configuration. No line means that nothing is allowed.
    ///
    /// **Errors**: the sentence that says which line is wrong.
    pub fn parse(lines: &[String]) -> Result<Self, String> {
        let rules = lines.iter().map(|line| line.parse()).collect::<Result<_, _>>()?;
        let special = SPECIAL.iter().filter_map(|(network, what)| Some((network.parse().ok()?, *what))).collect();
        Ok(Self { rules, special })
    }

    /// Whether `target` may be connected to; `brokers` are the addresses of all brokers.
    pub fn check(&self, target: SocketAddr, brokers: &BTreeSet<IpAddr>) -> Result<(), Refusal> {
        let address = target.ip().to_canonical();
        let matching = || self.rules.iter().filter(|rule| rule.matches(address, target.port()));
        if matching().next().is_none() {
            return Err(Refusal::NoRule);
        }
        for (range, what) in self.special.iter().filter(|(range, _)| range.contains(&address)) {
            if !matching().any(|rule| range.contains(&rule.network)) {
                return Err(Refusal::Special(what));
            }
        }
        if matching().any(Rule::is_one_address) {
            return Ok(());
        }
        if brokers.contains(&address) {
            return Err(Refusal::Broker);
        }
        if is_own(address) {
            return Err(Refusal::Own);
        }
        Ok(())
    }
}

/// Whether the machine answers to this address itself: a socket towards it then has it as its own. Sends nothing.
fn is_own(address: IpAddr) -> bool {
    if address.is_loopback() {
        // Judged as a range; every loopback address is ours.
        return false;
    }
    let any: SocketAddr = if address.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0_u16; 8], 0).into() };
    let local = UdpSocket::bind(any).and_then(|socket| {
        socket.connect((address, 9))?;
        socket.local_addr()
    });
    local.is_ok_and(|local| local.ip() == address)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(rules: &[&str], target: &str) -> Result<(), Refusal> {
        let rules: Vec<_> = rules.iter().map(|rule| (*rule).to_owned()).collect();
        let brokers = BTreeSet::from(["198.51.100.7".parse().unwrap(), "127.0.0.1".parse().unwrap()]);
        Allow::parse(&rules).unwrap().check(target.parse().unwrap(), &brokers)
    }

    #[test]
    fn what_no_rule_has_is_refused() {
        assert_eq!(check(&[], "10.0.0.1:80"), Err(Refusal::NoRule));
        assert_eq!(check(&["10.0.0.0/8"], "11.0.0.1:80"), Err(Refusal::NoRule));
        assert_eq!(check(&["10.0.0.0/8:443"], "10.0.0.1:80"), Err(Refusal::NoRule));
        assert_eq!(check(&["10.0.0.0/8:443", "10.1.0.0/16:80-90"], "10.1.0.1:85"), Ok(()));
        assert_eq!(check(&["10.0.0.0/8"], "[::ffff:10.0.0.1]:80"), Ok(()));
        assert_eq!(check(&["[2001:db8::]/32:443"], "[2001:db8::1]:443"), Ok(()));
        assert_eq!(check(&["[2001:db8::]/32:443"], "[2001:db8::1]:444"), Err(Refusal::NoRule));
    }

    #[test]
    fn special_ranges_need_a_rule_inside_them() {
        let wide = &["0.0.0.0/0", "::/0"];
        for (target, what) in [
            ("127.0.0.2:80", "loopback"),
            ("[::1]:80", "loopback"),
            ("[::ffff:127.0.0.2]:80", "loopback"),
            ("169.254.1.1:80", "link-local"),
            ("[fe80::1]:80", "link-local"),
            ("100.100.100.200:80", "metadata"),
            ("[fd00:ec2::254]:80", "metadata"),
            ("0.0.0.0:80", "unspecified"),
            ("224.0.0.1:80", "multicast"),
        ] {
            assert_eq!(check(wide, target), Err(Refusal::Special(what)), "{target}");
        }
        assert_eq!(check(&["127.77.0.0/16:8080-8090"], "127.77.0.1:8080"), Ok(()));
        assert_eq!(
            check(&["127.77.0.0/16:8080-8090", "0.0.0.0/0"], "127.77.0.1:80"),
            Err(Refusal::Special("loopback"))
        );
        assert_eq!(check(&["169.254.0.0/16"], "169.254.169.254:80"), Err(Refusal::Special("metadata")));
        assert_eq!(check(&["169.254.0.0/16"], "169.254.1.1:80"), Ok(()));
        assert_eq!(check(&["169.254.169.254"], "169.254.169.254:80"), Ok(()));
    }

    #[test]
    fn a_brokers_address_needs_a_rule_of_its_own() {
        assert_eq!(check(&["198.51.100.0/24"], "198.51.100.7:443"), Err(Refusal::Broker));
        assert_eq!(check(&["198.51.100.7:8443"], "198.51.100.7:443"), Err(Refusal::NoRule));
        assert_eq!(check(&["198.51.100.7:443"], "198.51.100.7:443"), Ok(()));
        assert_eq!(check(&["127.0.0.0/8"], "127.0.0.1:80"), Err(Refusal::Broker));
        assert_eq!(check(&["127.0.0.1"], "127.0.0.1:80"), Ok(()));
    }

    #[test]
    fn odd_lines_are_refused_with_a_sentence() {
        for line in [
            "",
            ":",
            "10.0.0.0/33",
            "10.0.0.0/8:",
            "10.0.0.0/8:0",
            "10.0.0.0/8:9-8",
            "10.0.0.0/8:x",
            "[::1",
            "[]",
            "crm",
        ] {
            assert!(line.parse::<Rule>().is_err(), "{line}");
        }
    }
}
