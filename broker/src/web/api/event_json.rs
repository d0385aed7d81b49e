//! Events as JSON, for people and scripts. Hashes of secrets are shown as `***`.

use selvedge_domain::Id;
use selvedge_domain::event::{Envelope, Event};
use selvedge_domain::rows::{self, AdminRole, BrokerRole, EnrolKind, PolicyMode, Transport};
use selvedge_domain::state::Table;
use serde_json::{Value, json};

use super::keys::kind_name;
use crate::web::auth::role_name;

const HIDDEN: &str = "***";

/// One event with where, when and by whom.
pub(super) fn envelope(envelope: &Envelope) -> Value {
    let event = envelope.event.as_ref();
    json!({
        "id": id(envelope.id),
        "time_ms": envelope.time_ms,
        "proposer": envelope.proposer.to_string(),
        "actor": match envelope.actor_id {
            Some(actor) => format!("{}/{actor}", envelope.actor),
            None => envelope.actor.clone(),
        },
        "last": envelope.last,
        "event": event.map_or("unknown", Event::name),
        "row": event.map_or(Value::Null, row),
    })
}

fn id(id: Option<Id>) -> Value {
    id.map_or(Value::Null, |id| Value::String(id.to_string()))
}

fn ids(ids: &[Id]) -> Vec<String> {
    ids.iter().map(Id::to_string).collect()
}

fn row(event: &Event) -> Value {
    match event {
        Event::ClusterPut(r) => json!({
            "cluster_id": hex::encode(&r.cluster_id), "trust_domain": r.trust_domain, "version": r.version,
            "lease_ms": r.lease_ms, "hold_ms": r.hold_ms, "policy_revision": r.policy_revision, "knock_secret": HIDDEN,
            "held_before_epoch": r.held_before_epoch,
        }),
        Event::BrokerPut(r) => json!({
            "node": r.node.to_string(), "name": r.name, "region": r.region, "host": r.host, "edge": r.edge,
            "web": r.web, "peer": r.peer, "roles": r.roles().map(BrokerRole::name).collect::<Vec<_>>(),
            "generation": r.generation, "removed": r.removed, "draining": r.draining, "drain_until_ms": r.drain_until_ms, "joined_ms": r.joined_ms,
        }),
        Event::RegionPut(r) => json!({
            "id": id(r.id), "name": r.name, "latitude": r.latitude, "longitude": r.longitude,
        }),
        Event::ZonePut(r) => json!({ "id": id(r.id), "name": r.name }),
        Event::ConnectorGroupPut(r) => json!({ "id": id(r.id), "name": r.name, "region": r.region }),
        Event::SegmentGroupPut(r) => json!({ "id": id(r.id), "name": r.name }),
        Event::SegmentPut(r) => json!({
            "id": id(r.id), "name": r.name, "hosts": r.hosts, "networks": r.networks,
            "ports": r.ports.iter().map(|range| json!({
                "transport": if range.transport() == Transport::Udp { "udp" } else { "tcp" },
                "first": range.first, "last": range.last,
            })).collect::<Vec<_>>(),
            "inclusive": r.inclusive, "connector_groups": ids(&r.connector_groups), "groups": ids(&r.groups),
            "idle_ms": r.idle_ms, "absolute_ms": r.absolute_ms,
        }),
        Event::PolicyPut(r) => json!({
            "id": id(r.id), "name": r.name, "cedar": r.source,
            "references": r.references.iter().map(|reference| json!({
                "kind": reference.kind, "id": id(reference.id), "name": reference.name,
            })).collect::<Vec<_>>(),
            "mode": if r.mode() == PolicyMode::Simulate { "simulate" } else { "enforce" },
        }),
        Event::ReceiverPut(r) => json!({
            "id": id(r.id), "name": r.name, "address": r.address, "tls_ca": r.tls_ca, "tls_name": r.tls_name,
        }),
        Event::Deleted(r) => json!({ "table": table(r.table), "id": id(r.id), "name": r.name }),
        Event::TokenPut(r) => json!({
            "id": id(r.id), "name": r.name, "role": role_name(AdminRole::try_from(r.role).unwrap_or(AdminRole::Unspecified)),
            "generation": r.generation, "revoked": r.revoked, "secret_sha256": HIDDEN,
        }),
        Event::DirectoryPut(r) => json!({
            "id": id(r.id), "name": r.name, "generation": r.generation, "token_sha256": HIDDEN,
        }),
        Event::UserPut(r) => json!({
            "id": id(r.id), "number": r.number, "directory": id(r.directory), "user_name": r.user_name,
            "external_id": r.external_id, "display_name": r.display_name, "active": r.active, "groups": r.groups,
            "generation": r.generation, "version": r.version, "created_ms": r.created_ms, "modified_ms": r.modified_ms,
            "vouched_epoch": r.vouched_epoch,
        }),
        Event::GroupPut(r) => json!({
            "id": id(r.id), "number": r.number, "directory": id(r.directory), "display_name": r.display_name,
            "external_id": r.external_id, "version": r.version, "created_ms": r.created_ms, "modified_ms": r.modified_ms,
        }),
        Event::MembersChanged(r) => json!({ "group": id(r.group), "added": r.added, "removed": r.removed }),
        Event::EnrolKeyPut(r) => json!({
            "id": id(r.id), "kind": kind_name(EnrolKind::try_from(r.kind).unwrap_or(EnrolKind::Unspecified)),
            "name": r.name, "target": id(r.target), "uses": r.uses, "uses_max": r.uses_max,
            "expires_ms": r.expires_ms, "revoked": r.revoked, "secret_sha256": HIDDEN,
        }),
        Event::Enrolled(r) => json!({
            "key": id(r.key), "key_sha256": hex::encode(&r.key_sha256), "made": id(r.made),
            "node": r.node.to_string(), "at_ms": r.at_ms,
        }),
        Event::DevicePut(r) => json!({
            "id": id(r.id), "user": id(r.user), "name": r.name, "key_sha256": hex::encode(&r.key_sha256),
            "generation": r.generation, "revoked": r.revoked, "enrolled_ms": r.enrolled_ms,
            "vouched_epoch": r.vouched_epoch,
        }),
        Event::WorkloadPut(r) => json!({
            "id": id(r.id), "name": r.name, "keys_sha256": r.keys_sha256.iter().map(hex::encode).collect::<Vec<_>>(),
            "generation": r.generation, "revoked": r.revoked, "vouched_epoch": r.vouched_epoch,
        }),
        Event::ConnectorPut(r) => json!({
            "id": id(r.id), "name": r.name, "group": id(r.group), "key_sha256": hex::encode(&r.key_sha256),
            "generation": r.generation, "revoked": r.revoked, "enrolled_ms": r.enrolled_ms,
            "vouched_epoch": r.vouched_epoch,
        }),
        Event::CertificatePut(r) => json!({
            "serial": r.serial, "subject": r.subject, "key_sha256": hex::encode(&r.key_sha256),
            "not_after_ms": r.not_after_ms, "revoked": r.revoked, "generation": r.generation,
        }),
        Event::AvailabilityPut(r) => availability(r),
        Event::ClientPut(r) => {
            json!({ "id": id(r.id), "node": r.node.to_string(), "boot": format!("{:016x}", r.boot) })
        }
        Event::JournalCompacted(r) => json!({ "upto_seq": r.upto_seq }),
        Event::EpochBegan(r) => json!({ "after": id(r.after), "holds": r.holds }),
        Event::TimeSet(r) => json!({ "from_ms": r.from_ms, "to_ms": r.to_ms }),
    }
}

fn availability(r: &rows::Availability) -> Value {
    json!({
        "connector": id(r.connector), "broker": r.broker.to_string(), "stream": r.stream, "up": r.up, "down": r.down,
        "since_ms": r.since_ms,
    })
}

fn table(number: u32) -> &'static str {
    match u8::try_from(number).ok().and_then(Table::from_number) {
        Some(Table::Region) => "region",
        Some(Table::Zone) => "zone",
        Some(Table::ConnectorGroup) => "connector_group",
        Some(Table::SegmentGroup) => "segment_group",
        Some(Table::Segment) => "segment",
        Some(Table::Policy) => "policy",
        Some(Table::Receiver) => "receiver",
        Some(Table::User) => "user",
        Some(Table::Group) => "group",
        _ => "other",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_of_secrets_are_not_shown() {
        let secret = vec![0xab; 32];
        let events = [
            Event::TokenPut(rows::Token { secret_sha256: secret.clone(), ..Default::default() }),
            Event::DirectoryPut(rows::Directory { token_sha256: secret.clone(), ..Default::default() }),
            Event::EnrolKeyPut(rows::EnrolKey { secret_sha256: secret.clone(), ..Default::default() }),
            Event::ClusterPut(rows::Cluster { knock_secret: secret, ..Default::default() }),
        ];
        for event in events {
            let text = envelope(&Envelope { event: Some(event), ..Default::default() }).to_string();
            assert!(text.contains(HIDDEN) && !text.contains("abab") && !text.contains("171"), "{text}");
        }
    }
}
