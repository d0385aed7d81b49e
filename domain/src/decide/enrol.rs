//! Enrolment: secrets with counted uses, what they make, and the certificates that follow.

use crate::command::{ActorKind, CertificateIssued, CreateEnrolKey, Enrol, Rejected, RejectedCode, Subject};
use crate::event::Event;
use crate::id::Id;
use crate::limits::{KEY_LIFE_MS_MAX, KEY_USES_MAX};
use crate::rows::{
    AdminRole, Broker, BrokerRole, Certificate, Connector, ConnectorGroup, Device, EnrolKey, EnrolKind, Enrolment,
    User, Workload,
};
use crate::state::IndexKey;

use super::{Draft, check_name, forbidden, invalid, not_found};

pub(super) fn create_key(draft: &mut Draft, create: &CreateEnrolKey) -> Result<(), Rejected> {
    draft.need_role(AdminRole::Admin)?;
    check_name(&create.name)?;
    if create.uses_max == 0 || create.uses_max > KEY_USES_MAX {
        return Err(invalid(format!("uses must be between 1 and {KEY_USES_MAX}")));
    }
    if create.life_ms == 0 || create.life_ms > KEY_LIFE_MS_MAX {
        return Err(invalid("the life of an enrolment secret is between a moment and 400 days"));
    }
    let kind = EnrolKind::try_from(create.kind).unwrap_or(EnrolKind::Unspecified);
    let mut roles = Vec::new();
    let target = match kind {
        EnrolKind::Unspecified => return Err(invalid("unknown kind of enrolment secret")),
        EnrolKind::Broker => {
            draft.need_role(AdminRole::Owner)?;
            let named = BrokerRole::parse_list(&create.target);
            let named =
                named.ok_or_else(|| invalid("the roles of a broker are `voter`, `issuer`, `web` and `edge`"))?;
            roles = named.into_iter().map(|role| role as i32).collect();
            None
        }
        EnrolKind::Connector => {
            let group = draft.state.find::<ConnectorGroup>(IndexKey::name(&create.target));
            Some(group.ok_or_else(|| not_found("connector group", &create.target))?.id())
        }
        EnrolKind::Device => Some(find_user(draft, &create.target)?.id()),
        EnrolKind::Workload => {
            check_name(&create.target)?;
            match draft.state.find::<Workload>(IndexKey::name(&create.target)) {
                Some(workload) => Some(workload.id()),
                None => {
                    let id = draft.next_id();
                    draft.emit(Event::WorkloadPut(Workload {
                        id: Some(id),
                        name: create.target.clone(),
                        keys_sha256: Vec::new(),
                        generation: 1,
                        revoked: false,
                        vouched_epoch: 0,
                    }));
                    Some(id)
                }
            }
        }
    };
    let id = draft.next_id();
    draft.emit(Event::EnrolKeyPut(EnrolKey {
        id: Some(id),
        kind: kind as i32,
        secret_sha256: create.secret_sha256.to_vec(),
        target,
        uses_max: create.uses_max,
        uses: 0,
        expires_ms: draft.now_ms() + create.life_ms,
        revoked: false,
        name: create.name.clone(),
        roles,
    }));
    draft.ids.push(id);
    Ok(())
}

pub(super) fn revoke_key(draft: &mut Draft, id: Id) -> Result<(), Rejected> {
    draft.need_role(AdminRole::Admin)?;
    let mut key = draft.state.by_id::<EnrolKey>(id).ok_or_else(|| not_found("enrolment secret", id))?;
    key.revoked = true;
    draft.emit(Event::EnrolKeyPut(key));
    Ok(())
}

pub(super) fn enrol(draft: &mut Draft, enrol: &Enrol) -> Result<(), Rejected> {
    if draft.actor.kind != ActorKind::Enrolment {
        return Err(forbidden());
    }
    let mut key = draft
        .state
        .find::<EnrolKey>(IndexKey::secret(&enrol.secret_sha256))
        .ok_or_else(|| Rejected::new(RejectedCode::KeyUnknown, "the enrolment secret is not known"))?;
    if draft.actor.id != Some(key.id()) {
        return Err(forbidden());
    }
    if key.kind != enrol.kind {
        return Err(Rejected::new(RejectedCode::KeyMismatch, "the enrolment secret is for another role"));
    }
    if key.revoked || key.expires_ms <= draft.now_ms() {
        return Err(Rejected::new(RejectedCode::KeyVoid, "the enrolment secret has expired or was revoked"));
    }
    if let Some(before) = draft.state.row::<Enrolment>(&Enrolment::key_of(key.id(), &enrol.key_sha256)) {
        draft.ids.extend(before.made);
        return Ok(());
    }
    if key.uses >= key.uses_max {
        return Err(Rejected::new(
            RejectedCode::KeyExhausted,
            format!("the enrolment secret was used {} times, as often as it may be", key.uses),
        ));
    }
    let name = if enrol.name.is_empty() { "unnamed" } else { &enrol.name };
    check_name(name)?;
    key.uses += 1;
    draft.emit(Event::EnrolKeyPut(key.clone()));
    let made = make(draft, &key, name, enrol)?;
    let at_ms = draft.now_ms();
    draft.emit(Event::Enrolled(Enrolment {
        key: key.id,
        key_sha256: enrol.key_sha256.to_vec(),
        made,
        node: enrol.node,
        at_ms,
    }));
    draft.ids.extend(made);
    Ok(())
}

fn make(draft: &mut Draft, key: &EnrolKey, name: &str, enrol: &Enrol) -> Result<Option<Id>, Rejected> {
    let id = draft.next_id();
    let target = key.target.unwrap_or_default();
    let enrolled_ms = draft.now_ms();
    match key.kind() {
        EnrolKind::Connector => {
            draft.state.by_id::<ConnectorGroup>(target).ok_or_else(|| not_found("connector group", target))?;
            draft.emit(Event::ConnectorPut(Connector {
                id: Some(id),
                name: name.to_owned(),
                group: Some(target),
                key_sha256: enrol.key_sha256.to_vec(),
                generation: 1,
                revoked: false,
                enrolled_ms,
                vouched_epoch: 0,
            }));
            Ok(Some(id))
        }
        EnrolKind::Device => {
            let user = draft.state.by_id::<User>(target).filter(|user| user.active);
            let user = user.ok_or_else(|| Rejected::new(RejectedCode::KeyVoid, "the person is not active"))?;
            not_held(draft, user.id(), user.vouched_epoch)?;
            draft.emit(Event::DevicePut(Device {
                id: Some(id),
                user: Some(target),
                name: name.to_owned(),
                key_sha256: enrol.key_sha256.to_vec(),
                generation: 1,
                revoked: false,
                enrolled_ms,
                vouched_epoch: 0,
            }));
            Ok(Some(id))
        }
        EnrolKind::Workload => {
            let mut workload = draft.state.by_id::<Workload>(target).ok_or_else(|| not_found("workload", target))?;
            if workload.revoked {
                return Err(Rejected::new(RejectedCode::KeyVoid, "the workload was revoked"));
            }
            not_held(draft, target, workload.vouched_epoch)?;
            workload.keys_sha256.push(enrol.key_sha256.to_vec());
            draft.emit(Event::WorkloadPut(workload));
            Ok(Some(target))
        }
        EnrolKind::Broker => {
            if enrol.node == 0 || draft.state.row::<Broker>(&enrol.node.to_be_bytes()).is_some() {
                return Err(Rejected::new(RejectedCode::Conflict, "this node id was used before"));
            }
            draft.emit(Event::BrokerPut(Broker {
                node: enrol.node,
                name: name.to_owned(),
                generation: 1,
                joined_ms: enrolled_ms,
                roles: key.roles.clone(),
                ..Broker::default()
            }));
            Ok(None)
        }
        EnrolKind::Unspecified => Err(invalid("unknown kind of enrolment secret")),
    }
}

pub(super) fn certificate_issued(draft: &mut Draft, issued: &CertificateIssued) -> Result<(), Rejected> {
    let first = draft.actor.kind == ActorKind::Bootstrap && draft.state.count(crate::state::Table::Broker) <= 1;
    if !first {
        draft.need_broker()?;
    }
    if draft.state.row::<Certificate>(issued.serial.as_bytes()).is_some() {
        return Err(Rejected::new(RejectedCode::Conflict, "the serial number was used before"));
    }
    let found = match issued.of {
        Subject::Device(id) => {
            let device = draft.state.by_id::<Device>(id).filter(|device| !device.revoked);
            device.map(|device| (device.generation, device.vouched_epoch, id))
        }
        Subject::Workload(id) => {
            let workload = draft.state.by_id::<Workload>(id).filter(|workload| !workload.revoked);
            workload.map(|workload| (workload.generation, workload.vouched_epoch, id))
        }
        Subject::Connector(id) => {
            let connector = draft.state.by_id::<Connector>(id).filter(|connector| !connector.revoked);
            connector.map(|connector| (connector.generation, connector.vouched_epoch, id))
        }
        Subject::Broker(node) => {
            let broker = draft.state.row::<Broker>(&node.to_be_bytes());
            let generation = broker.filter(|broker| !broker.removed).map(|broker| broker.generation);
            // Brokers are never held.
            generation.or(first.then_some(1)).map(|generation| (generation, u32::MAX, Id::default()))
        }
    };
    let (generation, vouched_epoch, id) =
        found.ok_or_else(|| Rejected::new(RejectedCode::Forbidden, "the subject is not there or was revoked"))?;
    not_held(draft, id, vouched_epoch)?;
    draft.emit(Event::CertificatePut(Certificate {
        serial: issued.serial.clone(),
        subject: issued.subject.clone(),
        key_sha256: issued.key_sha256.to_vec(),
        not_after_ms: issued.not_after_ms,
        revoked: false,
        generation,
    }));
    Ok(())
}

fn not_held(draft: &Draft, id: Id, vouched_epoch: u32) -> Result<(), Rejected> {
    if draft.state.is_held(id, vouched_epoch) {
        let message = "it is held since the cluster was restored, until somebody vouches for it";
        return Err(Rejected::new(RejectedCode::Forbidden, message));
    }
    Ok(())
}

/// Finds a user by `userName`, or `directory/userName`.
fn find_user(draft: &Draft, name: &str) -> Result<User, Rejected> {
    draft.state.user_named(name).map_err(|error| match error {
        crate::state::Unnamed::Unknown => not_found("user", name),
        crate::state::Unnamed::Ambiguous => {
            invalid(format!("several directories have a user `{name}`: write `directory/{name}`"))
        }
    })
}
