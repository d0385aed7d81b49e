//! Whether an end that proved a certificate still stands, and whose rights count.
//!
//! Looked up by id and serial in the state, after each handshake, at each `Open` and whenever a change touches a session.

use std::net::IpAddr;

use selvedge_domain::policy::{Claimed, Context, Principal};
use selvedge_domain::rows::{Certificate, Connector, Device, User, Workload};
use selvedge_domain::{Id, State};
use selvedge_proto::control::LoginGrant;
use selvedge_proto::frame::SessionCode;
use selvedge_proto::grant;
use selvedge_proto::identity::{Anchors, Kind, Peer, Role};

use crate::audit::{Initiator, Party};

/// Why an end is not let in. A closed set, for metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unfit {
    /// Nobody has this id, or this broker does not know it yet.
    Unknown,
    /// The certificate's serial number is not in the log, or not in this broker's part of it yet.
    CertificateUnknown,
    Revoked,
    /// Held since the cluster was restored: nobody has vouched for it.
    Restored,
    /// Of an older generation of its subject.
    Superseded,
    Expired,
    /// A kind that has no business here.
    WrongKind,
}

impl Unfit {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Unknown => "unknown_id",
            Self::CertificateUnknown => "unknown_certificate",
            Self::Revoked => "revoked",
            Self::Restored => "restored",
            Self::Superseded => "superseded",
            Self::Expired => "expired",
            Self::WrongKind => "wrong_kind",
        }
    }

    /// A later state may say otherwise: the enrolment may not have arrived here.
    pub(super) fn may_pass(self) -> bool {
        matches!(self, Self::Unknown | Self::CertificateUnknown)
    }
}

/// Checks an end's id, generation and certificate.
pub(crate) fn check(state: &State, peer: &Peer, now_ms: u64) -> Result<Id, Unfit> {
    let id: Id = peer.id.id().parse().map_err(|_| Unfit::Unknown)?;
    let found = match peer.id.kind() {
        Kind::Client => state.by_id::<Device>(id).map(|row| (row.revoked, row.generation, row.vouched_epoch)),
        Kind::Workload => state.by_id::<Workload>(id).map(|row| (row.revoked, row.generation, row.vouched_epoch)),
        Kind::Connector => state.by_id::<Connector>(id).map(|row| (row.revoked, row.generation, row.vouched_epoch)),
        _ => return Err(Unfit::WrongKind),
    };
    if found.is_some_and(|(revoked, _, vouched_epoch)| !revoked && state.is_held(id, vouched_epoch)) {
        return Err(Unfit::Restored);
    }
    let found = found.map(|(revoked, generation, _)| (revoked, generation));
    check_certificate(state, peer, found, now_ms).map(|()| id)
}

/// Checks the certificate of somebody of whom the state says whether it was revoked, and its generation.
pub(crate) fn check_certificate(
    state: &State,
    peer: &Peer,
    found: Option<(bool, u64)>,
    now_ms: u64,
) -> Result<(), Unfit> {
    let (revoked, generation) = found.ok_or(Unfit::Unknown)?;
    if revoked {
        return Err(Unfit::Revoked);
    }
    let row: Certificate = state.row(peer.serial.as_bytes()).ok_or(Unfit::CertificateUnknown)?;
    if row.revoked {
        return Err(Unfit::Revoked);
    }
    if row.subject != peer.id.to_string() || row.key_sha256 != peer.spki_sha256 {
        return Err(Unfit::CertificateUnknown);
    }
    if row.generation != generation {
        return Err(Unfit::Superseded);
    }
    if row.not_after_ms.min(peer.not_after_ms) <= now_ms {
        return Err(Unfit::Expired);
    }
    Ok(())
}

/// A login grant that was verified for the device that presents it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Login {
    pub(super) user: Id,
    generation: u64,
    epoch: u32,
    pub(super) login_ms: u64,
    pub(super) expires_ms: u64,
}

impl Login {
    /// The first of the grants that is this cluster's, this device's and this key's.
    pub(super) fn of(grants: &[Vec<u8>], peer: &Peer, anchors: &Anchors, now_ms: u64) -> Option<(Self, LoginGrant)> {
        grants.iter().take(GRANTS_MAX).find_map(|bytes| {
            let grant = grant::verify(bytes, anchors.certificate(Role::Clients), now_ms)
                .inspect_err(|error| tracing::debug!(%error, "a login grant is not accepted"))
                .ok()?;
            let ours = grant.device == peer.id.id() && grant.device_key_sha256 == peer.spki_sha256;
            let login = Self {
                user: grant.user.parse().ok()?,
                generation: grant.user_generation,
                epoch: grant.epoch,
                login_ms: grant.login_ms,
                expires_ms: grant.expires_ms,
            };
            ours.then_some((login, grant))
        })
    }

    /// Whether it still counts.
    fn check(&self, state: &State, now_ms: u64) -> Result<(), SessionCode> {
        let user: User = state.by_id(self.user).ok_or(SessionCode::Revoked)?;
        if !user.active || user.generation != self.generation {
            return Err(SessionCode::Revoked);
        }
        // A login of an earlier epoch is void, and another one is all that it takes.
        if self.expires_ms <= now_ms || self.epoch != state.position().epoch {
            Err(SessionCode::Reauthenticate)
        } else {
            Ok(())
        }
    }
}

/// Grants of one hello that are looked at.
pub(super) const GRANTS_MAX: usize = 4;

/// Whose rights count, and what they are judged by: everything about the caller that a session keeps.
#[derive(Clone, Debug)]
pub(super) struct Caller {
    pub(super) peer: Peer,
    pub(super) principal: Principal,
    pub(super) device: Option<Id>,
    pub(super) login: Option<Login>,
    pub(super) source: IpAddr,
}

impl Caller {
    /// The caller at a client's or workload's control stream. A client without a login has no rights of its own.
    pub(super) fn new(peer: &Peer, subject: Id, login: Option<Login>, source: IpAddr) -> Option<Self> {
        let (principal, device) = match peer.id.kind() {
            Kind::Client => (Principal::User(login.as_ref()?.user), Some(subject)),
            Kind::Workload => (Principal::Workload(subject), None),
            _ => return None,
        };
        Some(Self { peer: peer.clone(), principal, device, login, source })
    }

    /// Whether presenter and login stand in this state.
    pub(super) fn check(&self, state: &State, now_ms: u64) -> Result<(), SessionCode> {
        match check(state, &self.peer, now_ms) {
            Ok(_) => {}
            Err(Unfit::Expired) => return Err(SessionCode::Reauthenticate),
            Err(_) => return Err(SessionCode::Revoked),
        }
        self.login.as_ref().map_or(Ok(()), |login| login.check(state, now_ms))
    }

    /// No verdict about this caller is good for longer.
    pub(super) fn good_until_ms(&self) -> u64 {
        self.login.as_ref().map_or(u64::MAX, |login| login.expires_ms).min(self.peer.not_after_ms)
    }

    pub(super) fn context(&self, now_ms: u64, broker_region: &str, program: Option<String>) -> Context {
        Context {
            now_ms,
            broker_region: broker_region.to_owned(),
            auth_time_ms: self.login.as_ref().map(|login| login.login_ms),
            device: self.device,
            source: Some(self.source),
            attested: None,
            claimed: program.map(|program| Claimed { program: Some(program) }),
        }
    }

    /// For records.
    pub(super) fn party(&self, state: &State) -> Party {
        let (initiator, name) = match self.principal {
            Principal::User(id) => (Initiator::Person, state.by_id::<User>(id).map(|user| user.user_name)),
            Principal::Workload(id) => (Initiator::Workload, state.by_id::<Workload>(id).map(|row| row.name)),
            Principal::Device(id) => (Initiator::Device, state.by_id::<Device>(id).map(|row| row.name)),
        };
        Party {
            initiator,
            principal: principal_text(self.principal),
            name: name.unwrap_or_default(),
            presenter: self.peer.id.to_string(),
            source: self.source.to_string(),
        }
    }
}

/// `user/1-42`.
pub(super) fn principal_text(principal: Principal) -> String {
    match principal {
        Principal::User(id) => format!("user/{id}"),
        Principal::Workload(id) => format!("workload/{id}"),
        Principal::Device(id) => format!("device/{id}"),
    }
}

/// Reads what [`principal_text`] writes.
pub(super) fn parse_principal(text: &str) -> Option<Principal> {
    let (kind, id) = text.split_once('/')?;
    let id = id.parse().ok()?;
    match kind {
        "user" => Some(Principal::User(id)),
        "workload" => Some(Principal::Workload(id)),
        "device" => Some(Principal::Device(id)),
        _ => None,
    }
}
