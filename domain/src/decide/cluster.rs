//! The cluster itself: initialisation, brokers, settings, proposing clients.

use crate::command::{ActorKind, InitCluster, PutBroker, Rejected, RejectedCode};
use crate::event::{Event, JournalCompacted, TimeSet};
use crate::limits::{CLIENT_IDLE_MS_MAX, CLIENTS_MAX, DRAIN_MS_MAX, JOURNAL_KEEP_MS_MIN, LEASE_MS_MAX, LEASE_MS_MIN};
use crate::rows::{AdminRole, Broker, BrokerRole, Client, Cluster, Token};
use crate::state::Table;

use super::{Draft, VERSION, check_name, forbidden, forget_all, invalid, not_found};

pub(super) fn init(draft: &mut Draft, init: &InitCluster) -> Result<(), Rejected> {
    if draft.state.cluster().is_some() {
        return Err(Rejected::new(RejectedCode::AlreadyInitialised, "the cluster was initialised before"));
    }
    if draft.actor.kind != ActorKind::Bootstrap {
        return Err(forbidden());
    }
    check_lease(init.lease_ms)?;
    draft.emit(Event::ClusterPut(Cluster {
        cluster_id: init.cluster_id.to_vec(),
        trust_domain: init.trust_domain.clone(),
        anchors: init.anchors.clone(),
        version: VERSION,
        lease_ms: init.lease_ms,
        hold_ms: init.hold_ms,
        policy_revision: 1,
        knock_secret: init.knock_secret.to_vec(),
        journal_keep_ms: 0,
        held_before_epoch: 0,
    }));
    let id = draft.next_id();
    draft.emit(Event::TokenPut(Token {
        id: Some(id),
        name: "owner".to_owned(),
        secret_sha256: init.owner_sha256.to_vec(),
        role: AdminRole::Owner as i32,
        generation: 1,
        revoked: false,
    }));
    draft.ids.push(id);
    Ok(())
}

pub(super) fn raise_min_version(draft: &mut Draft, version: u32) -> Result<(), Rejected> {
    draft.need_role(AdminRole::Owner)?;
    let mut cluster = draft.state.cluster().unwrap_or_default();
    // A build never decides a raise beyond what it knows: it stops there, because the others may know it.
    if version < cluster.version || version > VERSION {
        return Err(invalid(format!("the version must be between {} and {VERSION}", cluster.version)));
    }
    if version != cluster.version {
        cluster.version = version;
        draft.emit(Event::ClusterPut(cluster));
    }
    Ok(())
}

pub(super) fn register_client(draft: &mut Draft, boot: u64) -> Result<(), Rejected> {
    let now_ms = draft.now_ms();
    let idle: Vec<_> = draft
        .state
        .rows::<Client>()
        .filter(|client| client.used_ms + CLIENT_IDLE_MS_MAX < now_ms || client.node == draft.proposer)
        .collect();
    if let Some(same) = idle.iter().find(|client| client.node == draft.proposer && client.boot == boot) {
        draft.ids.push(same.id());
        return Ok(());
    }
    if draft.state.count(Table::Client) - idle.len() >= CLIENTS_MAX {
        return Err(Rejected::new(RejectedCode::Limit, "too many proposing clients"));
    }
    for client in idle.into_iter().filter(|client| client.used_ms + CLIENT_IDLE_MS_MAX < now_ms) {
        forget_all(draft, client.id());
        draft.delete_quiet(Table::Client, client.id().key().to_vec());
    }
    let id = draft.next_id();
    let node = draft.proposer;
    draft.emit(Event::ClientPut(Client { id: Some(id), node, boot, used_ms: now_ms, acked_below: 1 }));
    draft.ids.push(id);
    Ok(())
}

pub(super) fn put_broker(draft: &mut Draft, put: &PutBroker) -> Result<(), Rejected> {
    check_name(&put.name)?;
    let old = draft.state.row::<Broker>(&put.node.to_be_bytes());
    let first = draft.actor.kind == ActorKind::Bootstrap && draft.state.rows::<Broker>().all(|broker| broker.removed);
    let own = draft.actor.kind == ActorKind::Broker && draft.proposer == put.node && old.is_some();
    if !first && !own {
        draft.need_role(AdminRole::Owner)?;
    }
    if old.as_ref().is_some_and(|broker| broker.removed) {
        return Err(Rejected::new(RejectedCode::Forbidden, "this broker was removed"));
    }
    // Roles are given when a broker joins, not by what it says of itself later.
    let roles = match &old {
        Some(broker) if own => broker.roles.clone(),
        _ => put.roles.clone(),
    };
    if draft.state.rows::<Broker>().any(|other| !other.removed && other.node != put.node && other.name == put.name) {
        return Err(Rejected::new(RejectedCode::Conflict, format!("there is another broker `{}`", put.name)));
    }
    // What it does not serve, nobody is told of.
    let served = |role, address: &String| if roles.contains(&(role as i32)) { address.clone() } else { String::new() };
    let row = Broker {
        node: put.node,
        name: put.name.clone(),
        region: put.region.clone(),
        host: put.host.clone(),
        edge: served(BrokerRole::Edge, &put.edge),
        web: served(BrokerRole::Web, &put.web),
        peer: put.peer.clone(),
        roles,
        generation: old.as_ref().map_or(1, |broker| broker.generation),
        removed: false,
        draining: old.as_ref().is_some_and(|broker| broker.draining),
        drain_until_ms: old.as_ref().map_or(0, |broker| broker.drain_until_ms),
        joined_ms: old.as_ref().map_or(draft.now_ms(), |broker| broker.joined_ms),
    };
    if old.as_ref() != Some(&row) {
        draft.emit(Event::BrokerPut(row));
    }
    Ok(())
}

pub(super) fn remove_broker(draft: &mut Draft, node: u64) -> Result<(), Rejected> {
    draft.need_role(AdminRole::Owner)?;
    let mut broker = draft.state.row::<Broker>(&node.to_be_bytes()).ok_or_else(|| not_found("broker", node))?;
    if !broker.removed {
        broker.removed = true;
        broker.generation += 1;
        draft.emit(Event::BrokerPut(broker));
    }
    Ok(())
}

/// Begins a drain that has so many milliseconds, or ends it.
pub(super) fn drain_broker(draft: &mut Draft, node: u64, within_ms: Option<u64>) -> Result<(), Rejected> {
    if !(draft.actor.kind == ActorKind::Broker && draft.proposer == node) {
        draft.need_role(AdminRole::Admin)?;
    }
    let mut broker = draft.state.row::<Broker>(&node.to_be_bytes()).ok_or_else(|| not_found("broker", node))?;
    if within_ms.is_some_and(|within_ms| within_ms > DRAIN_MS_MAX) {
        return Err(invalid(format!("a broker drains for {DRAIN_MS_MAX} ms at most")));
    }
    let draining = within_ms.is_some();
    let drain_until_ms = within_ms.map_or(0, |within_ms| draft.now_ms() + within_ms);
    if (broker.draining, broker.drain_until_ms) != (draining, drain_until_ms) {
        (broker.draining, broker.drain_until_ms) = (draining, drain_until_ms);
        draft.emit(Event::BrokerPut(broker));
    }
    Ok(())
}

pub(super) fn put_settings(draft: &mut Draft, lease_ms: u64, hold_ms: u64) -> Result<(), Rejected> {
    draft.need_role(AdminRole::Owner)?;
    check_lease(lease_ms)?;
    let mut cluster = draft.state.cluster().unwrap_or_default();
    cluster.lease_ms = lease_ms;
    cluster.hold_ms = hold_ms;
    draft.emit(Event::ClusterPut(cluster));
    Ok(())
}

pub(super) fn keep_journal(draft: &mut Draft, keep_ms: u64) -> Result<(), Rejected> {
    draft.need_role(AdminRole::Owner)?;
    if keep_ms < JOURNAL_KEEP_MS_MIN {
        return Err(invalid(format!("the event journal is kept for {JOURNAL_KEEP_MS_MIN} ms at least")));
    }
    let mut cluster = draft.state.cluster().unwrap_or_default();
    if cluster.journal_keep_ms() != keep_ms {
        cluster.journal_keep_ms = keep_ms;
        draft.emit(Event::ClusterPut(cluster));
    }
    Ok(())
}

pub(super) fn set_time(draft: &mut Draft, time_ms: u64) -> Result<(), Rejected> {
    draft.need_role(AdminRole::Owner)?;
    let from_ms = draft.now_ms();
    if time_ms <= from_ms {
        return Err(invalid("cluster time never goes back"));
    }
    draft.set_time(time_ms);
    draft.emit(Event::TimeSet(TimeSet { from_ms, to_ms: time_ms }));
    Ok(())
}

pub(super) fn compact_journal(draft: &mut Draft, upto_seq: u64) -> Result<(), Rejected> {
    draft.need_broker()?;
    if upto_seq >= draft.state.position().seq {
        return Err(invalid("the journal keeps at least its last event"));
    }
    if upto_seq > draft.state.meta.journal_compacted {
        draft.compact_journal(upto_seq);
        draft.emit(Event::JournalCompacted(JournalCompacted { upto_seq }));
    }
    Ok(())
}

fn check_lease(lease_ms: u64) -> Result<(), Rejected> {
    if (LEASE_MS_MIN..=LEASE_MS_MAX).contains(&lease_ms) {
        Ok(())
    } else {
        Err(invalid(format!("the lease must be between {LEASE_MS_MIN} and {LEASE_MS_MAX} ms")))
    }
}
