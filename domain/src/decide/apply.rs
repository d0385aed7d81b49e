//! One transaction of configuration objects: all or nothing.

use std::collections::BTreeSet;

use crate::command::{Apply, CompiledPolicy, Rejected, RejectedCode};
use crate::event::{Deleted, Event};
use crate::id::Id;
use crate::limits::{
    APPLY_OBJECTS_MAX, POLICIES_MAX, POLICY_BYTES_MAX, RECEIVERS_MAX, SEGMENT_PORTS_MAX, SEGMENT_TARGETS_MAX,
};
use crate::name::{Host, Pattern};
use crate::rows::{self, AdminRole, Row, Transport};
use crate::spec::{self, Kind, Object};
use crate::state::{IndexKey, State, Table, Unnamed};

use super::{Draft, check_name, invalid, not_found};

pub(super) fn apply(draft: &mut Draft, change: &Apply) -> Result<(), Rejected> {
    draft.need_role(AdminRole::Admin)?;
    if change.puts.len() + change.deletes.len() > APPLY_OBJECTS_MAX {
        return Err(Rejected::new(RejectedCode::Limit, format!("at most {APPLY_OBJECTS_MAX} objects at once")));
    }
    let mut cluster = draft.state.cluster().unwrap_or_default();
    if let Some(revision) = change.expect_revision
        && revision != cluster.policy_revision
    {
        return Err(Rejected::new(
            RejectedCode::VersionMismatch,
            format!("the policy revision is {}, not {revision}", cluster.policy_revision),
        ));
    }
    let mut seen = BTreeSet::new();
    for key in change.puts.iter().map(|put| put.object.key()).chain(change.deletes.iter().cloned()) {
        if !seen.insert(key.clone()) {
            return Err(invalid(format!("{:?} `{}` is there twice", key.kind, key.name)));
        }
    }
    // What is named comes before what names it; what names goes before what is named.
    let before = draft.state.position();
    let mut deletes: Vec<_> = change.deletes.iter().collect();
    deletes.sort_by_key(|key| std::cmp::Reverse(rank(key.kind)));
    for key in deletes {
        delete(draft, key)?;
    }
    let mut puts: Vec<_> = change.puts.iter().collect();
    puts.sort_by_key(|put| rank(put.object.key().kind));
    for one in puts {
        put(draft, &one.object, one.compiled.as_ref())?;
    }
    check_references(draft)?;
    if draft.state.position() != before {
        cluster.policy_revision += 1;
        draft.emit(Event::ClusterPut(cluster));
    }
    Ok(())
}

fn rank(kind: Kind) -> u8 {
    match kind {
        Kind::Region => 0,
        Kind::Zone | Kind::Receiver => 1,
        Kind::ConnectorGroup => 2,
        Kind::SegmentGroup => 3,
        Kind::Segment => 4,
        Kind::Policy => 5,
    }
}

fn delete(draft: &mut Draft, key: &spec::Key) -> Result<(), Rejected> {
    let name = IndexKey::name(&key.name);
    let (table, id) = match key.kind {
        Kind::Region => (Table::Region, draft.state.find::<rows::Region>(name).map(|row| row.id())),
        Kind::Zone => (Table::Zone, draft.state.find::<rows::Zone>(name).map(|row| row.id())),
        Kind::ConnectorGroup => {
            (Table::ConnectorGroup, draft.state.find::<rows::ConnectorGroup>(name).map(|row| row.id()))
        }
        Kind::SegmentGroup => (Table::SegmentGroup, draft.state.find::<rows::SegmentGroup>(name).map(|row| row.id())),
        Kind::Segment => (Table::Segment, draft.state.find::<rows::Segment>(name).map(|row| row.id())),
        Kind::Policy => (Table::Policy, draft.state.find::<rows::Policy>(name).map(|row| row.id())),
        Kind::Receiver => (Table::Receiver, draft.state.find::<rows::Receiver>(name).map(|row| row.id())),
    };
    let id = id.ok_or_else(|| not_found(&format!("{:?}", key.kind), &key.name))?;
    draft.emit(Event::Deleted(Deleted { table: table as u32, id: Some(id), name: key.name.clone() }));
    Ok(())
}

/// Emits the event unless the row is what it was; answers the row's id.
fn put_row<R: Row + PartialEq>(
    draft: &mut Draft,
    name: &str,
    row: impl FnOnce(Id) -> R,
    event: impl FnOnce(R) -> Event,
    id_of: impl Fn(&R) -> Id,
) {
    let old = draft.state.find::<R>(IndexKey::name(name));
    let id = old.as_ref().map_or(draft.next_id(), id_of);
    let row = row(id);
    if old.as_ref() != Some(&row) {
        draft.emit(event(row));
    }
    draft.ids.push(id);
}

fn put(draft: &mut Draft, object: &Object, compiled: Option<&CompiledPolicy>) -> Result<(), Rejected> {
    let name = object.key().name;
    check_name(&name)?;
    match object {
        Object::Region(region) => {
            let (latitude, longitude) = (region.latitude, region.longitude);
            if !(-90.0..=90.0).contains(&latitude) || !(-180.0..=180.0).contains(&longitude) {
                return Err(invalid(format!("region `{name}`: latitude is -90 to 90, longitude -180 to 180")));
            }
            let row = |id| rows::Region { id: Some(id), name: name.clone(), latitude, longitude };
            put_row(draft, &name, row, Event::RegionPut, rows::Region::id);
        }
        Object::Zone(_) => {
            let Ok(Host::Name(domain)) = Host::parse(&name) else {
                return Err(invalid(format!("zone `{name}` is not a domain")));
            };
            put_row(
                draft,
                &domain,
                |id| rows::Zone { id: Some(id), name: domain.clone() },
                Event::ZonePut,
                rows::Zone::id,
            );
        }
        Object::ConnectorGroup(group) => {
            if draft.state.find::<rows::Region>(IndexKey::name(&group.region)).is_none() {
                return Err(not_found("region", &group.region));
            }
            let row = |id| rows::ConnectorGroup { id: Some(id), name: name.clone(), region: group.region.clone() };
            put_row(draft, &name, row, Event::ConnectorGroupPut, rows::ConnectorGroup::id);
        }
        Object::SegmentGroup(_) => {
            let row = |id| rows::SegmentGroup { id: Some(id), name: name.clone() };
            put_row(draft, &name, row, Event::SegmentGroupPut, rows::SegmentGroup::id);
        }
        Object::Segment(segment) => {
            let row = segment_row(&draft.state, segment)?;
            let row = |id| rows::Segment { id: Some(id), ..row };
            put_row(draft, &name, row, Event::SegmentPut, rows::Segment::id);
        }
        Object::Policy(policy) => put_policy(draft, policy, compiled)?,
        Object::Receiver(receiver) => {
            if receiver
                .address
                .rsplit_once(':')
                .is_none_or(|(host, port)| host.is_empty() || port.parse::<u16>().is_err())
            {
                return Err(invalid(format!("receiver `{name}`: `{}` is not `host:port`", receiver.address)));
            }
            let row = |id| rows::Receiver {
                id: Some(id),
                name: name.clone(),
                address: receiver.address.clone(),
                tls_ca: receiver.tls_ca.clone(),
                tls_name: receiver.tls_name.clone(),
            };
            put_row(draft, &name, row, Event::ReceiverPut, rows::Receiver::id);
            if draft.state.count(Table::Receiver) > RECEIVERS_MAX {
                return Err(Rejected::new(RejectedCode::Limit, format!("at most {RECEIVERS_MAX} log receivers")));
            }
        }
    }
    Ok(())
}

fn segment_row(state: &State, segment: &spec::Segment) -> Result<rows::Segment, Rejected> {
    let name = &segment.name;
    let wrong = |message: String| invalid(format!("segment `{name}`: {message}"));
    if segment.hosts.is_empty() && segment.networks.is_empty() {
        return Err(wrong("it needs `hosts` or `networks`".to_owned()));
    }
    if segment.hosts.len() + segment.networks.len() > SEGMENT_TARGETS_MAX {
        return Err(wrong(format!("at most {SEGMENT_TARGETS_MAX} hosts and networks")));
    }
    if segment.tcp.len() + segment.udp.len() > SEGMENT_PORTS_MAX || segment.tcp.len() + segment.udp.len() == 0 {
        return Err(wrong(format!("it needs 1 to {SEGMENT_PORTS_MAX} entries in `tcp` and `udp`")));
    }
    let mut hosts = Vec::new();
    for host in &segment.hosts {
        hosts.push(Pattern::parse(host).map_err(|error| wrong(error.to_string()))?.to_string());
    }
    let mut networks = Vec::new();
    for network in &segment.networks {
        let parsed = crate::segment::parse_network(network).filter(|net| net.prefix_len() > 0);
        let parsed =
            parsed.ok_or_else(|| wrong(format!("`{network}` is not a network in CIDR form, longer than /0")))?;
        networks.push(parsed.to_string());
    }
    let mut ports = Vec::new();
    for (transport, list) in [(Transport::Tcp, &segment.tcp), (Transport::Udp, &segment.udp)] {
        for text in list {
            let (first, last) = text.split_once('-').unwrap_or((text, text));
            match (first.trim().parse::<u16>(), last.trim().parse::<u16>()) {
                (Ok(first), Ok(last)) if first > 0 && first <= last => {
                    let (first, last) = (first.into(), last.into());
                    ports.push(rows::PortRange { transport: transport as i32, first, last });
                }
                _ => return Err(wrong(format!("`{text}` is not a port or a range of ports"))),
            }
        }
    }
    if segment.connector_groups.is_empty() {
        return Err(wrong("it needs `connector_groups`".to_owned()));
    }
    let mut connector_groups = Vec::new();
    for group in &segment.connector_groups {
        let row = state.find::<rows::ConnectorGroup>(IndexKey::name(group));
        connector_groups.push(row.ok_or_else(|| not_found("connector group", group))?.id());
    }
    let mut groups = Vec::new();
    for group in &segment.groups {
        let row = state.find::<rows::SegmentGroup>(IndexKey::name(group));
        groups.push(row.ok_or_else(|| not_found("segment group", group))?.id());
    }
    Ok(rows::Segment {
        id: None,
        name: name.clone(),
        hosts,
        networks,
        ports,
        inclusive: segment.inclusive,
        connector_groups,
        groups,
        idle_ms: u64::from(segment.idle_timeout_s) * 1_000,
        absolute_ms: u64::from(segment.absolute_timeout_s) * 1_000,
    })
}

fn put_policy(draft: &mut Draft, policy: &spec::Policy, compiled: Option<&CompiledPolicy>) -> Result<(), Rejected> {
    let name = &policy.name;
    let compiled = compiled.ok_or_else(|| invalid(format!("policy `{name}` was not compiled")))?;
    if policy.cedar.len() > POLICY_BYTES_MAX || compiled.template.len() > 8 * POLICY_BYTES_MAX {
        return Err(Rejected::new(
            RejectedCode::Limit,
            format!("policy `{name}` is longer than {POLICY_BYTES_MAX} bytes"),
        ));
    }
    let mut references = Vec::new();
    for (kind, referred) in &compiled.references {
        let id = resolve(&draft.state, kind, referred).map_err(|error| {
            invalid(match error {
                Unnamed::Unknown => format!("policy `{name}`: {kind} `{referred}` is not there"),
                Unnamed::Ambiguous => format!(
                    "policy `{name}`: several directories have {kind} `{referred}`: write `directory/{referred}`"
                ),
            })
        })?;
        references.push(rows::Reference { kind: kind.clone(), id: Some(id), name: referred.clone() });
    }
    let mode = if policy.simulate { rows::PolicyMode::Simulate } else { rows::PolicyMode::Enforce };
    let row = |id| rows::Policy {
        id: Some(id),
        name: name.clone(),
        source: policy.cedar.clone(),
        template: compiled.template.clone(),
        references,
        mode: mode as i32,
    };
    put_row(draft, name, row, Event::PolicyPut, rows::Policy::id);
    if draft.state.count(Table::Policy) > POLICIES_MAX {
        return Err(Rejected::new(RejectedCode::Limit, format!("at most {POLICIES_MAX} policies")));
    }
    Ok(())
}

fn resolve(state: &State, kind: &str, name: &str) -> Result<Id, Unnamed> {
    let index = IndexKey::name(name);
    let found = match kind {
        "User" => return state.user_named(name).map(|row| row.id()),
        "Group" => return state.group_named(name).map(|row| row.id()),
        "Workload" => state.find::<rows::Workload>(index).map(|row| row.id()),
        "Segment" => state.find::<rows::Segment>(index).map(|row| row.id()),
        "SegmentGroup" => state.find::<rows::SegmentGroup>(index).map(|row| row.id()),
        _ => None,
    };
    found.ok_or(Unnamed::Unknown)
}

/// After all changes: nothing names what is gone, no two segments claim the same name and port.
fn check_references(draft: &Draft) -> Result<(), Rejected> {
    let state = &draft.state;
    let in_use = |message: String| Rejected::new(RejectedCode::InUse, message);
    for segment in state.rows::<rows::Segment>() {
        if segment.connector_groups.iter().any(|id| state.by_id::<rows::ConnectorGroup>(*id).is_none()) {
            return Err(in_use(format!("segment `{}` needs a connector group that is being deleted", segment.name)));
        }
        if segment.groups.iter().any(|id| state.by_id::<rows::SegmentGroup>(*id).is_none()) {
            return Err(in_use(format!("segment `{}` is in a segment group that is being deleted", segment.name)));
        }
    }
    for group in state.rows::<rows::ConnectorGroup>() {
        if state.find::<rows::Region>(IndexKey::name(&group.region)).is_none() {
            return Err(in_use(format!("connector group `{}` is in a region that is being deleted", group.name)));
        }
    }
    for policy in state.rows::<rows::Policy>() {
        for reference in &policy.references {
            let id = reference.id.unwrap_or_default();
            let gone = match reference.kind.as_str() {
                "Segment" => state.by_id::<rows::Segment>(id).is_none(),
                "SegmentGroup" => state.by_id::<rows::SegmentGroup>(id).is_none(),
                _ => false,
            };
            if gone {
                return Err(in_use(format!(
                    "policy `{}` names {} `{}`, which is being deleted",
                    policy.name, reference.kind, reference.name
                )));
            }
        }
    }
    match crate::segment::conflict(state.rows::<rows::Segment>()) {
        Some(conflict) => Err(Rejected::new(RejectedCode::Conflict, conflict.to_string())),
        None => Ok(()),
    }
}
