//! Names: which exist for whom.
//!
//! **Invariant:** a denied name, a name that no segment has and one without a connector get the same bytes at the same
//! time.

use std::net::Ipv6Addr;
use std::sync::Arc;
use std::time::Instant;

use aws_lc_rs::digest;
use selvedge_domain::State;
use selvedge_domain::name::Host;
use selvedge_domain::rows::{Segment, Transport};
use selvedge_domain::segment::Endpoint;
use selvedge_proto::control::from_broker::Message as Out;
use selvedge_proto::control::{Resolve, ResolveAnswer, Why};

use super::ends::End;
use super::opens::REFUSAL_FLOOR;
use super::standing::Caller;
use super::{Edge, metrics};
use crate::audit::{NameUnknown, Record, clipped};

/// Port ranges of one host that are asked for when a name is resolved.
pub const PORTS_ASKED_MAX: usize = 64;

/// Answers a `Resolve`.
pub(super) async fn resolve(edge: Arc<Edge>, end: Arc<End>, ask: Resolve) {
    let begun = Instant::now();
    let within = end.resolves.lock().take(begun, edge.limits().resolves_per_second);
    let address = if within {
        address(&edge, &end, &ask.host)
    } else {
        metrics::limited("resolves");
        None
    };
    if address.is_none() {
        tokio::time::sleep_until((begun + REFUSAL_FLOOR).into()).await;
    }
    metrics::resolve(if address.is_some() { "found" } else { "no_such_name" });
    end.send(Out::ResolveAnswer(ResolveAnswer { request: ask.request, address: address.unwrap_or_default() }));
}

fn address(edge: &Edge, end: &End, host: &str) -> Option<Vec<u8>> {
    let caller = end.caller.as_ref()?;
    let state = edge.ground.state();
    let host = Host::parse(host).ok()?;
    let Host::Name(name) = &host else { return None };
    if !edge.ground.lease_open() || caller.check(&state, edge.ground.now_ms()).is_err() {
        return None;
    }
    let groups = reachable(edge, &state, caller, &host);
    let healthy = edge.routing.any_healthy(&state, groups.as_deref().unwrap_or_default());
    let indexes = edge.decider.indexes(&state);
    let endpoint = Endpoint { host: host.clone(), port: 443, transport: Transport::Tcp };
    if indexes.segments.in_zone(&host) && indexes.segments.considered(&endpoint).is_empty() {
        let record = NameUnknown { party: caller.party(&state), host: clipped(name) };
        // The log says so when the journal does not accept; the answer is the same.
        let _ = edge.audit.append(&Record::NameUnknown(record));
    }
    groups.filter(|_| healthy)?;
    let cluster = state.cluster().map(|row| row.cluster_id).unwrap_or_default();
    Some(synthetic(&cluster, name).octets().to_vec())
}

/// The connector groups of what this caller could reach at a host, on any port; none when it could reach nothing.
pub(super) fn reachable(edge: &Edge, state: &State, caller: &Caller, host: &Host) -> Option<Vec<selvedge_domain::Id>> {
    let indexes = edge.decider.indexes(state);
    let context = caller.context(edge.ground.now_ms(), &edge.region, None);
    let asked = Endpoint { host: host.clone(), port: 443, transport: Transport::Tcp };
    let mut ports: Vec<(Transport, u16)> = indexes
        .segments
        .considered(&asked)
        .iter()
        .filter_map(|considered| state.by_id::<Segment>(considered.segment))
        .flat_map(|segment| segment.ports)
        .filter_map(|range| Some((Transport::try_from(range.transport).ok()?, u16::try_from(range.first).ok()?)))
        .take(PORTS_ASKED_MAX)
        .collect();
    // A name that nobody has costs a verdict too.
    if ports.is_empty() {
        ports.push((Transport::Tcp, asked.port));
    }
    let mut groups = None;
    for (transport, port) in ports {
        let endpoint = Endpoint { host: host.clone(), port, transport };
        let verdict = edge.decider.decide(state, caller.principal, &endpoint, &context);
        let segment = verdict.segment.filter(|_| verdict.allowed).and_then(|id| state.by_id::<Segment>(id));
        if let Some(segment) = segment {
            groups.get_or_insert_with(Vec::new).extend(segment.connector_groups);
        }
    }
    groups
}

/// An address that stands for a name: the same at every broker, different for each name.
fn synthetic(cluster: &[u8], name: &str) -> Ipv6Addr {
    let hash = digest::digest(&digest::SHA256, &[cluster, name.as_bytes()].concat());
    let mut octets = [0; 16];
    octets[0] = 0xfd;
    octets[1..].copy_from_slice(&hash.as_ref()[..15]);
    octets.into()
}

/// What a person may be told of a name: no more than trying it would tell.
pub(super) fn why(edge: &Edge, end: &End, ask: &Why) -> String {
    let Some(caller) = &end.caller else { return "log in: this device holds no valid login".into() };
    let state = edge.ground.state();
    if caller.check(&state, edge.ground.now_ms()).is_err() {
        return "log in again: the login or the device is no longer valid".into();
    }
    if !edge.ground.lease_open() {
        return "this broker is cut off from the others; try another one".into();
    }
    let (Ok(host), Ok(port)) = (Host::parse(&ask.host), u16::try_from(ask.port)) else {
        return "this is not a host and port".into();
    };
    let endpoint = Endpoint { host, port, transport: Transport::Tcp };
    let context = caller.context(edge.ground.now_ms(), &edge.region, None);
    let verdict = edge.decider.decide(&state, caller.principal, &endpoint, &context);
    let Some(segment) = verdict.segment.filter(|_| verdict.allowed).and_then(|id| state.by_id::<Segment>(id)) else {
        return "there is no such application for you: an administrator can look it up by the denial id".into();
    };
    if edge.routing.any_healthy(&state, &segment.connector_groups) {
        "you may use it, and a connector is there".into()
    } else {
        "you may use it, but no connector reaches it now".into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_has_one_address_and_another_name_another() {
        let address = synthetic(&[1; 16], "crm.internal");
        assert_eq!(address, synthetic(&[1; 16], "crm.internal"));
        assert_ne!(address, synthetic(&[1; 16], "hr.internal"));
        assert_ne!(address, synthetic(&[2; 16], "crm.internal"));
        assert_eq!(address.octets()[0], 0xfd);
    }
}
