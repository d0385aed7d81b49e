//! What the data directory says of the cluster: log, state, journal; roles, voters and regions.

use std::collections::{BTreeMap, BTreeSet};

use selvedge_cluster::LogLimits;
use selvedge_cluster::at_rest::{self, AtRest};
use selvedge_domain::rows::{self, BrokerRole};
use selvedge_storage::{audit, inspect};

use super::node::Node;
use super::{Report, bytes, chain, machine};
use crate::config::{Config, Valid};

/// Issuers and roles.
const ROLES: &str = "SE0409";
/// Voters.
const VOTERS: &str = "SE0410";
/// Log and state.
const STORED: &str = "SE0411";
/// A log whose end is lost.
const LOST_END: &str = "SE0118";
/// Snapshots and the log's length.
const SNAPSHOT: &str = "SE0412";
/// Audit streams.
const AUDIT: &str = "SE0202";
/// Brokers that can sign certificates, at least.
const ISSUERS_MIN: usize = 2;
/// All brokers may have all roles in a cluster of up to so many.
const SMALL_CLUSTER_MAX: usize = 5;

/// Reads log and state.
pub(super) async fn stored(config: &Valid<Config>, node: &Node, report: &mut Report) -> Option<AtRest> {
    let dir = config.data_dir.clone();
    let begun = inspect::databases(&dir).iter().any(|database| database.exists());
    if !begun {
        report.note(STORED, "log", "this broker has not been started yet: there is no log and no state");
        return None;
    }
    let read = tokio::task::spawn_blocking(move || {
        // In this order, so that a state that a running broker goes on writing is not behind the log.
        let state = at_rest::look(&dir);
        (inspect::log(&dir), state)
    });
    let Ok((log, state)) = read.await else {
        report.error(
            STORED,
            "log",
            "reading it panicked",
            "keep the directory for a report, and join this broker again",
        );
        return None;
    };
    let again = "do not edit the directory; move it away and join this broker again, unless it is the last one";
    let last = match log {
        Ok(log) => {
            let last = log.bounds.last.map(|id| id.index);
            let number = |index: Option<u64>| index.map_or("none".to_owned(), |index| index.to_string());
            let message = format!(
                "entries {} to {}, committed {}, vote in term {}",
                log.bounds.last_purged.map_or(0, |id| id.index + 1),
                number(last),
                number(log.committed.map(|id| id.index)),
                log.vote.map_or(0, |vote| vote.term),
            );
            match (&log.damaged_end, log.suspect) {
                (Some((index, why)), _) => {
                    let message = format!("{message}; the end from entry {index} on is damaged: {why}");
                    let next = "start the broker: it drops that end, and does not vote until a leader has replaced it";
                    report.warn(LOST_END, "log", message, next);
                }
                (None, Some(suspect)) => {
                    let message = format!("{message}; an end up to entry {suspect} was lost");
                    report.warn(
                        LOST_END,
                        "log",
                        message,
                        "let it run: it votes again once a leader has replaced that end",
                    );
                }
                (None, None) => report.fine(STORED, "log", message),
            }
            last
        }
        Err(error) => {
            report.error(error.code().unwrap_or(STORED), "log", chain(&error), again);
            None
        }
    };
    let state = match state {
        Ok(state) => state,
        Err(error) => {
            report.error(STORED, "state", chain(&error), again);
            return None;
        }
    };
    let applied = state.applied.map_or("none".to_owned(), |index| index.to_string());
    let message = format!("position {}, applied entry {applied}", state.state.position());
    match (state.applied, last) {
        (Some(applied), Some(last)) if applied > last && node.running.is_none() => {
            let message = format!("{message}, but the log ends at {last}: one of the two was replaced");
            report.error(STORED, "state", message, again);
        }
        _ => report.fine(STORED, "state", message),
    }
    snapshots(config, report);
    Some(state)
}

fn snapshots(config: &Valid<Config>, report: &mut Report) {
    let [log, _] = inspect::databases(&config.data_dir);
    let entries = |dir: std::path::PathBuf| std::fs::read_dir(dir).into_iter().flatten().filter_map(Result::ok);
    let log_bytes: u64 = entries(log).filter_map(|file| Some(file.metadata().ok()?.len())).sum();
    let snapshots = entries(config.data_dir.join("snapshots"));
    let newest = snapshots.filter_map(|entry| machine::age(&entry.path())).min();
    let age = newest.as_ref().map_or("none since the last start".to_owned(), |(_, ago)| format!("{ago} ago"));
    let message = format!("last snapshot: {age}; the log takes {}", bytes(log_bytes));
    // Twice what makes a snapshot, and what the database itself keeps beside.
    if log_bytes > 4 * LogLimits::default().snapshot_bytes {
        let next = "look in the broker's log for why snapshots fail or the log is not cut";
        report.warn(SNAPSHOT, "snapshot", message, next);
    } else {
        report.fine(SNAPSHOT, "snapshot", message);
    }
}

/// Roles, voters and regions.
pub(super) fn shape(config: &Valid<Config>, node: &Node, stored: Option<&AtRest>, report: &mut Report) {
    let Some(stored) = stored.filter(|stored| stored.state.cluster().is_some()) else { return };
    let brokers: Vec<rows::Broker> = stored.state.rows::<rows::Broker>().filter(|broker| !broker.removed).collect();
    let has = |broker: &rows::Broker, role: BrokerRole| broker.roles.contains(&(role as i32));
    roles(&brokers, &has, node, report);
    voters(&brokers, stored, report);
    let declared: BTreeSet<String> = stored.state.rows::<rows::Region>().map(|region| region.name).collect();
    let used: BTreeSet<&String> = brokers.iter().map(|broker| &broker.region).chain([&config.region]).collect();
    let unknown: Vec<&str> = used.iter().filter(|name| !declared.contains(**name)).map(|name| name.as_str()).collect();
    if unknown.is_empty() {
        report.fine(VOTERS, "regions", format!("{} in use, all with a place on the map", used.len()));
    } else {
        let message =
            format!("`{}` has no place on the map: paths from there are chosen blindly", unknown.join("`, `"));
        report.warn(VOTERS, "regions", message, "apply a `kind: Region` with latitude and longitude for each");
    }
    if let Some(own) = brokers.iter().find(|broker| broker.node == node.id)
        && (own.region != config.region || own.name != config.name || own.host != config.host)
    {
        let message = "name, region or host of this file are not those that the cluster knows";
        report.note(VOTERS, "regions", format!("{message}; the next start tells it"));
    }
}

fn roles(brokers: &[rows::Broker], has: &impl Fn(&rows::Broker, BrokerRole) -> bool, node: &Node, report: &mut Report) {
    let issuers: Vec<&str> =
        brokers.iter().filter(|broker| has(broker, BrokerRole::Issuer)).map(|broker| broker.name.as_str()).collect();
    if issuers.len() < ISSUERS_MIN {
        let message = format!("{} broker signs certificates ({})", issuers.len(), issuers.join(", "));
        let next = "join a second issuer: if this one is lost, nobody enrols and no certificate is renewed";
        report.warn(ROLES, "issuers", message, next);
    } else {
        report.fine(ROLES, "issuers", issuers.join(", "));
    }
    let own = brokers.iter().find(|broker| broker.node == node.id);
    if own.is_some_and(|own| has(own, BrokerRole::Issuer)) && !node.is_issuer {
        let message = "the cluster counts this broker as an issuer, but it has no usable keys";
        report.warn(ROLES, "issuers", message, "join this broker again as an issuer, or give it its seal back");
    }
    let all = [BrokerRole::Voter, BrokerRole::Issuer, BrokerRole::Web, BrokerRole::Edge];
    let everything = brokers.iter().all(|broker| all.iter().all(|role| has(broker, *role)));
    if everything && brokers.len() <= SMALL_CLUSTER_MAX {
        let message =
            "every broker has every role: right for a small cluster; whoever takes one edge has a voter and an issuer";
        report.note(ROLES, "roles", message);
    } else {
        let names = |role| brokers.iter().filter(|broker| has(broker, role)).count();
        let [voters, issuers, web, edge] = all.map(names);
        report.fine(ROLES, "roles", format!("{voters} voter, {issuers} issuer, {web} web, {edge} edge"));
    }
}

fn voters(brokers: &[rows::Broker], stored: &AtRest, report: &mut Report) {
    let count = stored.voters.len();
    let learners = stored.learners.len();
    let bears = count.saturating_sub(1) / 2;
    let message = format!("{count} voter(s), {learners} learner(s): {bears} may be lost");
    match count {
        0 => return report.note(VOTERS, "voters", "this broker does not know yet who votes"),
        1 => report.note(VOTERS, "voters", format!("{message}; three or five bear the loss of one or two")),
        even if even % 2 == 0 => {
            let next = "promote one more or remove one: an even number bears no more than one less, and fails sooner";
            report.warn(VOTERS, "voters", message, next);
        }
        _ => report.fine(VOTERS, "voters", message),
    }
    let mut regions: BTreeMap<&str, usize> = BTreeMap::new();
    for voter in brokers.iter().filter(|broker| stored.voters.contains(&broker.node)) {
        *regions.entry(&voter.region).or_default() += 1;
    }
    let Some((region, most)) = regions.iter().max_by_key(|(_, voters)| **voters) else { return };
    if count > 1 && regions.len() == 1 {
        report.note(VOTERS, "voters", format!("all are in `{region}`: the cluster does not outlive that region"));
    } else if count > 1 && *most > count / 2 {
        let message = format!("{most} of {count} voters are in `{region}`: without it there is no majority");
        report.warn(VOTERS, "voters", message, "spread the voters so that no region has most of them");
    }
}

/// Every byte of the audit journal.
pub(super) async fn journal(config: &Valid<Config>, report: &mut Report) {
    let root = inspect::audit(&config.data_dir);
    if !root.exists() {
        return report.note(AUDIT, "audit journal", "there is none yet");
    }
    let Ok(verified) = tokio::task::spawn_blocking(move || audit::verify(&root)).await else {
        return report.error(AUDIT, "audit journal", "reading it panicked", "keep the directory for a report");
    };
    match verified {
        Ok(verified) => {
            for broken in &verified.broken {
                report.error(AUDIT, "audit journal", broken.to_string(), "keep the disk as it is, and see the runbook");
            }
            if verified.broken.is_empty() {
                let (records, streams) = (verified.records(), verified.streams.len());
                report.fine(AUDIT, "audit journal", format!("{records} records of {streams} streams are as written"));
            }
        }
        Err(error) => {
            report.error(error.code().unwrap_or(AUDIT), "audit journal", chain(&error), "see that it can be read");
        }
    }
}
