//! Who this broker is: its data directory, its certificates, and the issuer's keys on this disk.

use std::os::unix::fs::PermissionsExt as _;
use std::sync::Arc;

use selvedge_domain::rows::BrokerRole;
use selvedge_proto::identity::{self, Kind, SpiffeId};
use selvedge_proto::tls::{self, Identity};
use selvedge_storage::inspect;
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

use super::{Report, chain, span};
use crate::config::{Config, Valid};
use crate::issuer::{self, Issuer};
use crate::node::{Home, identity_path};

/// Data directory and membership.
const DIRECTORY: &str = "SE0302";
/// The broker's certificate.
const CERTIFICATE: &str = "SE0401";
/// The web listener's certificate.
const WEB: &str = "SE0402";
/// The issuer's keys.
const ISSUER: &str = "SE0409";

/// What the other checks need of it.
pub(super) struct Node {
    pub(super) id: u64,
    pub(super) home: Home,
    pub(super) identity: Option<Arc<Identity>>,
    pub(super) running: Option<u32>,
    pub(super) is_issuer: bool,
}

pub(super) fn examine(config: &Valid<Config>, report: &mut Report) -> Option<Node> {
    let dir = &config.data_dir;
    let found = match inspect::identity(dir) {
        Ok(found) => found,
        Err(_) if !dir.exists() => {
            let next = "make a cluster with `selvedge cluster init`, or join one with `selvedge cluster join`";
            report.error(DIRECTORY, "data directory", format!("`{}` does not exist", dir.display()), next);
            return None;
        }
        Err(error) => {
            let next = "see the runbook before anything is changed in the directory";
            report.error(error.code().unwrap_or(DIRECTORY), "data directory", chain(&error), next);
            return None;
        }
    };
    if let Ok(mode) = std::fs::metadata(dir).map(|metadata| metadata.permissions().mode() & 0o777)
        && mode & 0o077 != 0
    {
        let message = format!("others than its owner may enter `{}` (mode {mode:o})", dir.display());
        report.warn(DIRECTORY, "data directory", message, format!("chmod 700 {}", dir.display()));
    }
    let home = match Home::load(config) {
        Ok(home) => home,
        Err(error) => {
            let next =
                "run `selvedge cluster init` or `selvedge cluster join`; a join that broke off goes on where it was";
            report.error(DIRECTORY, "data directory", chain(&error), next);
            return None;
        }
    };
    let cluster_id = u128::from_be_bytes(home.anchors.cluster_id());
    if found.cluster_id != Some(cluster_id) {
        let stored = found.cluster_id.map_or("none".to_owned(), |id| format!("{id:032x}"));
        let message = format!("the directory is of cluster `{stored}`, its trust anchors are of `{cluster_id:032x}`");
        report.error("SE0117", "data directory", message, "put back the directory that belongs together");
        return None;
    }
    let running = inspect::holder(dir);
    let state = running.map_or("no broker uses it".to_owned(), |pid| format!("process {pid} uses it"));
    let message = format!("node {} of cluster {cluster_id:032x}, boot {}; {state}", found.node_id, found.boot);
    report.fine(DIRECTORY, "data directory", message);

    let now_ms = (tls::system_time())();
    let identity = certificate(config, &home, found.node_id, now_ms, report).map(Arc::new);
    let keys = issuer(config, report);
    if home.roles.contains(&BrokerRole::Web) {
        web(config, keys, now_ms, report);
    }
    let is_issuer = keys == Keys::Usable;
    Some(Node { id: found.node_id, home, identity, running, is_issuer })
}

fn certificate(config: &Valid<Config>, home: &Home, node: u64, now_ms: u64, report: &mut Report) -> Option<Identity> {
    let path = identity_path(config);
    let again = "join this broker again with a new join token";
    let identity = match Identity::load(&path) {
        Ok(identity) => identity,
        Err(error @ tls::Error::Exposed { .. }) => {
            let next = format!("chmod 600 {}; if others could log in here, replace this broker", path.display());
            report.error(CERTIFICATE, "certificate", chain(&error), next);
            return None;
        }
        Err(error) => {
            report.error(CERTIFICATE, "certificate", chain(&error), again);
            return None;
        }
    };
    let validity = identity.validity_ms();
    let (begin_ms, end_ms) = match validity {
        Ok(validity) => validity,
        Err(error) => {
            report.error(CERTIFICATE, "certificate", chain(&error), again);
            return None;
        }
    };
    // The chain is judged at a time at which it holds, so that its end is told apart from everything else.
    let within_ms = now_ms.clamp(begin_ms, end_ms.saturating_sub(1));
    let peer = match identity::peer(identity.chain(), &home.anchors, tls::BROKERS, within_ms) {
        Ok(peer) => peer,
        Err(error) => {
            let message = format!("`{}` does not chain to this cluster's issuer: {}", path.display(), chain(&error));
            report.error(CERTIFICATE, "certificate", message, again);
            return Some(identity);
        }
    };
    let own = SpiffeId::new(home.anchors.trust_domain(), Kind::Broker, &node.to_string());
    if own.as_ref().ok() != Some(&peer.id) {
        let message = format!("`{}` is for `{}`, but this is node {node}", path.display(), peer.id);
        report.error(CERTIFICATE, "certificate", message, again);
        return Some(identity);
    }
    let names = names(&identity);
    if !names.iter().any(|name| covers(name, &config.host)) {
        let message = format!("it is for `{}`, but `host` is `{}`", names.join("`, `"), config.host);
        let next = "put back the host name, or wait: the next renewal, after a third of its life, carries the new one";
        report.warn(CERTIFICATE, "certificate", message, next);
    }
    let lifetime_ms = end_ms.saturating_sub(begin_ms);
    if now_ms >= end_ms {
        let message = format!("it ended {} ago", span(now_ms - end_ms));
        let next = "start the broker: it renews by itself up to 30 days late; after that, join it again";
        report.error(CERTIFICATE, "certificate", message, next);
    } else if now_ms < begin_ms {
        let message = format!("it begins only in {}", span(begin_ms - now_ms));
        report.error(CERTIFICATE, "certificate", message, "set this machine's clock right");
    } else if end_ms - now_ms < lifetime_ms / 3 {
        let message =
            format!("{} of {} are left; it should have been renewed", span(end_ms - now_ms), span(lifetime_ms));
        report.warn(
            CERTIFICATE,
            "certificate",
            message,
            "let this broker reach an issuer; see its log for why it did not",
        );
    } else {
        report.fine(CERTIFICATE, "certificate", format!("`{}`, {} left", peer.id, span(end_ms - now_ms)));
    }
    Some(identity)
}

/// The issuer's keys on this disk.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Keys {
    None,
    Usable,
    Unusable,
}

fn issuer(config: &Valid<Config>, report: &mut Report) -> Keys {
    match Issuer::open(&config.issuer_dir(), &config.issuer_seal()) {
        Ok(_) => {
            report.fine(ISSUER, "issuer", "this broker holds the issuer's keys, and its seal opens them");
            Keys::Usable
        }
        Err(issuer::Error::Missing(_)) => {
            report.note(ISSUER, "issuer", "this broker is no issuer");
            Keys::None
        }
        Err(error) => {
            let next = "give the broker its seal back (`seal.file`, `seal.env`); without it another issuer must sign";
            report.error(ISSUER, "issuer", chain(&error), next);
            Keys::Unusable
        }
    }
}

fn web(config: &Valid<Config>, keys: Keys, now_ms: u64, report: &mut Report) {
    let Some(files) = config.web_files() else {
        match keys {
            Keys::Usable => {
                report.fine(WEB, "web certificate", "none configured: signed by the issuer, known by the pin");
            }
            Keys::None => {
                let next = "set `web.certificate` and `web.key`";
                report.error(WEB, "web certificate", "none configured, and this broker is no issuer", next);
            }
            // Said already.
            Keys::Unusable => {}
        }
        return;
    };
    let next = "replace both files; the broker takes them within seconds, or at once by `selvedge config reload`";
    let identity = match Identity::load_files(&files.certificate, &files.key) {
        Ok(identity) => identity,
        Err(error) => return report.error(WEB, "web certificate", chain(&error), next),
    };
    let (begin_ms, end_ms) = match identity.validity_ms() {
        Ok(validity) => validity,
        Err(error) => return report.error(WEB, "web certificate", chain(&error), next),
    };
    let advertised = config.web.advertised();
    let host = advertised.rsplit_once(':').map_or(&*advertised, |(host, _)| host).trim_matches(['[', ']']);
    let names = names(&identity);
    if now_ms >= end_ms || now_ms < begin_ms {
        report.error(WEB, "web certificate", "it does not hold now: it has ended or not begun", next);
    } else if !names.iter().any(|name| covers(name, host)) {
        let message = format!("it is for `{}`, but the web listener is advertised as `{host}`", names.join("`, `"));
        report.warn(WEB, "web certificate", message, next);
    } else if end_ms - now_ms < (end_ms - begin_ms) / 5 {
        report.warn(WEB, "web certificate", format!("only {} are left", span(end_ms - now_ms)), next);
    } else {
        report.fine(WEB, "web certificate", format!("for `{host}`, {} left", span(end_ms - now_ms)));
    }
}

/// Names and addresses that a leaf is for.
fn names(identity: &Identity) -> Vec<String> {
    let Some(leaf) = identity.chain().first() else { return Vec::new() };
    let Ok((_, leaf)) = X509Certificate::from_der(leaf) else { return Vec::new() };
    let Ok(Some(names)) = leaf.subject_alternative_name() else { return Vec::new() };
    let name = |name: &GeneralName<'_>| match name {
        GeneralName::DNSName(name) => Some((*name).to_owned()),
        GeneralName::IPAddress(bytes) => match bytes.len() {
            4 => <[u8; 4]>::try_from(*bytes).ok().map(|ip| std::net::Ipv4Addr::from(ip).to_string()),
            _ => <[u8; 16]>::try_from(*bytes).ok().map(|ip| std::net::Ipv6Addr::from(ip).to_string()),
        },
        _ => None,
    };
    names.value.general_names.iter().filter_map(name).collect()
}

/// **Source** RFC 6125, 6.4.3: a star stands for one label, the leftmost.
fn covers(pattern: &str, host: &str) -> bool {
    let (pattern, host) = (pattern.to_ascii_lowercase(), host.to_ascii_lowercase());
    match pattern.strip_prefix("*.") {
        Some(rest) => host.split_once('.').is_some_and(|(_, domain)| domain == rest),
        None => pattern == host,
    }
}

#[cfg(test)]
mod tests {
    use super::covers;

    #[test]
    fn a_star_covers_one_label() {
        assert!(covers("a.example", "A.example") && covers("*.example", "a.example"));
        assert!(!covers("*.example", "b.a.example") && !covers("*.example", "example") && !covers("a.example", "b"));
    }
}
