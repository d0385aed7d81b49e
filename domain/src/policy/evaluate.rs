use std::collections::HashSet;
use std::sync::{Arc, LazyLock};

use cedar_policy::{
    Authorizer, Effect, Entities, Entity, EntityId, EntityTypeName, EntityUid, PolicySet, RestrictedExpression,
};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::index::{Loaded, Scope};
use super::{Context, PolicyIndex, PolicyRef, Principal, Request};
use crate::id::Id;
use crate::rows;
use crate::segment::{Endpoint, Matched, SegmentIndex};
use crate::state::{IndexKey, State};

/// A verdict in which the time itself or the age of a login was read is good for no longer than this, milliseconds.
pub const TIMED_VERDICT_MS_MAX: u64 = 60_000;

/// What the policy says, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Allowed.
    pub allowed: bool,
    /// Whether the verdict would be another if simulated policies counted; none when no simulated policy was looked at.
    pub simulated_differs: Option<bool>,
    /// The most specific matched segment that a deciding permit reaches: it gives connectors, health and timeouts.
    pub segment: Option<Id>,
    /// Segments that the endpoint matched, most specific first.
    pub matched: Vec<Matched>,
    /// The policies that made the verdict.
    pub deciding: Vec<PolicyRef>,
    /// Why.
    pub reason: Reason,
    /// The policy revision that it was made from.
    pub revision: u64,
    /// Evaluate again then, milliseconds since the Unix epoch; `u64::MAX` when nothing timed was read.
    pub good_until_ms: u64,
}

/// Why a request is allowed or denied: a closed set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "code", rename_all = "snake_case")]
pub enum Reason {
    /// A permit applies and nothing stands against it.
    Allowed,
    /// No segment has the host.
    NoSegment,
    /// A segment has the host, but none has the port.
    WrongPort,
    /// No permit applies.
    NoPermit,
    /// A forbid applies.
    Forbidden {
        /// The forbid.
        policy: PolicyRef,
    },
    /// A policy looked at could not be evaluated.
    PolicyError {
        /// The policy.
        policy: PolicyRef,
        /// What failed.
        message: String,
    },
    /// The principal does not exist, or no longer.
    PrincipalUnknown,
    /// The user's directory disabled the user.
    PrincipalInactive,
    /// The workload or device is revoked.
    PrincipalRevoked,
    /// The device that the principal uses is revoked or unknown.
    DeviceRevoked,
    /// The cluster was restored from an earlier state, and nobody has vouched for the principal or its device since.
    Restored,
    /// The indexes are of another policy revision than the state.
    Stale,
    /// The request could not be put to the policies.
    Unanswerable {
        /// What failed.
        message: String,
    },
}

impl Reason {
    /// The code alone, for records and metrics.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Allowed => "allowed",
            Self::NoSegment => "no_segment",
            Self::WrongPort => "wrong_port",
            Self::NoPermit => "no_permit",
            Self::Forbidden { .. } => "forbidden",
            Self::PolicyError { .. } => "policy_error",
            Self::PrincipalUnknown => "principal_unknown",
            Self::PrincipalInactive => "principal_inactive",
            Self::PrincipalRevoked => "principal_revoked",
            Self::DeviceRevoked => "device_revoked",
            Self::Restored => "restored",
            Self::Stale => "stale",
            Self::Unanswerable { .. } => "unanswerable",
        }
    }
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Allowed => f.write_str("a policy permits it"),
            Self::NoSegment => f.write_str("no segment has this host"),
            Self::WrongPort => f.write_str("no segment that counts for this host has this port"),
            Self::NoPermit => f.write_str("no policy permits it"),
            Self::Forbidden { policy } => write!(f, "policy `{}` forbids it", policy.name),
            Self::PolicyError { policy, message } => write!(f, "policy `{}` failed: {message}", policy.name),
            Self::PrincipalUnknown => f.write_str("the principal does not exist"),
            Self::PrincipalInactive => f.write_str("the user is not active"),
            Self::PrincipalRevoked => f.write_str("the principal is revoked"),
            Self::DeviceRevoked => f.write_str("the device is revoked or unknown"),
            Self::Restored => f.write_str("the cluster was restored, and nobody has vouched for it since"),
            Self::Stale => f.write_str("the policy is being loaded"),
            Self::Unanswerable { message } => write!(f, "the request could not be evaluated: {message}"),
        }
    }
}

/// Decides a request. Default is deny.
///
/// `segments` and `policies` must be of the state's policy revision; otherwise the verdict is [`Reason::Stale`].
pub fn decide(state: &State, segments: &SegmentIndex, policies: &PolicyIndex, request: &Request) -> Verdict {
    let matched = segments.matched(&request.endpoint);
    let mut verdict = Verdict {
        allowed: false,
        simulated_differs: None,
        segment: None,
        deciding: Vec::new(),
        reason: Reason::NoPermit,
        revision: policies.revision(),
        good_until_ms: u64::MAX,
        matched,
    };
    match prepare(state, segments, policies, request, &verdict.matched) {
        Ok(asked) => asked.judge(policies, &mut verdict),
        Err(reason) => verdict.reason = reason,
    }
    verdict
}

/// Everything that must hold before a policy is asked.
fn prepare<'a>(
    state: &State,
    segments: &SegmentIndex,
    policies: &PolicyIndex,
    request: &'a Request,
    matched: &[Matched],
) -> Result<Asked<'a>, Reason> {
    let revision = super::revision(state);
    if segments.revision() != revision || policies.revision() != revision {
        return Err(Reason::Stale);
    }
    let subject = Subject::standing(state, request)?;
    if matched.is_empty() {
        let host_known = !segments.considered(&request.endpoint).is_empty();
        return Err(if host_known { Reason::WrongPort } else { Reason::NoSegment });
    }
    Asked::new(subject, request)
}

/// Who asks, as policies see them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Subject {
    pub kind: &'static str,
    pub id: Id,
    pub name: String,
    pub groups: Vec<Id>,
}

impl Subject {
    /// Who asks, also when they may not: a reason stands beside it.
    pub fn find(state: &State, principal: Principal) -> Option<(Self, Option<Reason>)> {
        let subject = |kind, id, name, groups| Self { kind, id, name, groups };
        let held = |id, vouched_epoch| state.is_held(id, vouched_epoch).then_some(Reason::Restored);
        match principal {
            Principal::User(id) => {
                let user: rows::User = state.by_id(id)?;
                let group_of =
                    |number: &u32| state.find::<rows::Group>(IndexKey::Number(*number)).map(|group| group.id());
                let groups = user.groups.iter().filter_map(group_of).collect();
                let barred =
                    (!user.active).then_some(Reason::PrincipalInactive).or_else(|| held(id, user.vouched_epoch));
                Some((subject("User", id, user.user_name, groups), barred))
            }
            Principal::Workload(id) => {
                let workload: rows::Workload = state.by_id(id)?;
                let barred = workload.revoked.then_some(Reason::PrincipalRevoked);
                let barred = barred.or_else(|| held(id, workload.vouched_epoch));
                Some((subject("Workload", id, workload.name, Vec::new()), barred))
            }
            Principal::Device(id) => {
                let device: rows::Device = state.by_id(id)?;
                let barred = device.revoked.then_some(Reason::PrincipalRevoked);
                let barred = barred.or_else(|| held(id, device.vouched_epoch));
                Some((subject("Device", id, device.name, Vec::new()), barred))
            }
        }
    }

    fn standing(state: &State, request: &Request) -> Result<Self, Reason> {
        let (subject, barred) = Self::find(state, request.principal).ok_or(Reason::PrincipalUnknown)?;
        if let Some(reason) = barred {
            return Err(reason);
        }
        let Some(id) = request.context.device else { return Ok(subject) };
        match state.by_id::<rows::Device>(id).filter(|device| !device.revoked) {
            None => Err(Reason::DeviceRevoked),
            Some(device) if state.is_held(id, device.vouched_epoch) => Err(Reason::Restored),
            Some(_) => Ok(subject),
        }
    }

    pub fn scopes(&self) -> Vec<Scope> {
        let own = [Scope::Any, Scope::kind(self.kind), Scope::entity(self.kind, self.id)];
        own.into_iter().chain(self.groups.iter().map(|&group| Scope::entity("Group", group))).collect()
    }
}

pub(super) fn resource_scopes(matched: &[Matched]) -> Vec<Scope> {
    let mut scopes = vec![Scope::Any, Scope::kind("Endpoint")];
    scopes.extend(matched.iter().map(|segment| Scope::entity("Segment", segment.segment)));
    let mut groups: Vec<Id> = matched.iter().flat_map(|segment| segment.groups.iter().copied()).collect();
    groups.sort();
    groups.dedup();
    scopes.extend(groups.into_iter().map(|group| Scope::entity("SegmentGroup", group)));
    scopes
}

/// What one policy says of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Satisfied,
    Unsatisfied,
    Failed(String),
}

/// A request in Cedar's terms.
pub(super) struct Asked<'a> {
    pub subject: Subject,
    request: cedar_policy::Request,
    endpoint: &'a Endpoint,
    context: &'a Context,
}

impl<'a> Asked<'a> {
    pub fn new(subject: Subject, request: &'a Request) -> Result<Self, Reason> {
        let unanswerable = |message: String| Reason::Unanswerable { message };
        let context = request.context.to_cedar(&request.endpoint).map_err(|error| unanswerable(error.to_string()))?;
        let cedar = cedar_policy::Request::new(
            uid(subject.kind, subject.id),
            CONNECT.clone(),
            endpoint_uid(&request.endpoint),
            context,
            None,
        )
        .map_err(|error| unanswerable(error.to_string()))?;
        Ok(Self { subject, request: cedar, endpoint: &request.endpoint, context: &request.context })
    }

    fn judge(&self, policies: &PolicyIndex, verdict: &mut Verdict) {
        let entities = match self.entities(&verdict.matched) {
            Ok(entities) => entities,
            Err(reason) => return verdict.reason = reason,
        };
        let candidates = policies.candidates(&self.subject.scopes(), &resource_scopes(&verdict.matched));
        let outcomes: Vec<(&Arc<Loaded>, Outcome)> =
            candidates.into_iter().map(|loaded| (loaded, self.ask(loaded, &entities))).collect();

        let enforced = || outcomes.iter().filter(|(loaded, _)| !loaded.is_simulated());
        let (reason, deciding) = conclude(enforced());
        verdict.allowed = reason == Reason::Allowed;
        if outcomes.iter().any(|(loaded, _)| loaded.is_simulated()) {
            let (with_simulated, _) = conclude(outcomes.iter());
            verdict.simulated_differs = Some((with_simulated == Reason::Allowed) != verdict.allowed);
        }
        verdict.good_until_ms =
            enforced().map(|(loaded, _)| good_until_ms(loaded, self.context)).min().unwrap_or(u64::MAX);
        if verdict.allowed {
            verdict.segment = self.reached(&verdict.matched, &deciding);
        }
        verdict.deciding = deciding.iter().map(|loaded| loaded.policy_ref()).collect();
        verdict.reason = reason;
    }

    /// The most specific segment that alone would satisfy a deciding permit.
    fn reached(&self, matched: &[Matched], deciding: &[&Arc<Loaded>]) -> Option<Id> {
        let first = matched.first()?.segment;
        if matched.len() == 1 {
            return Some(first);
        }
        let reaches = |segment: &&Matched| {
            self.entities(std::slice::from_ref(*segment))
                .is_ok_and(|entities| deciding.iter().any(|loaded| self.ask(loaded, &entities) == Outcome::Satisfied))
        };
        Some(matched.iter().find(reaches).map_or(first, |segment| segment.segment))
    }

    pub fn ask(&self, loaded: &Loaded, entities: &Entities) -> Outcome {
        match &loaded.body {
            Ok(body) => self.ask_alone(&body.alone, entities),
            Err(broken) => Outcome::Failed(broken.to_string()),
        }
    }

    /// What the only policy of a set says.
    pub fn ask_alone(&self, alone: &PolicySet, entities: &Entities) -> Outcome {
        let response = AUTHORIZER.is_authorized(&self.request, alone, entities);
        let diagnostics = response.diagnostics();
        if let Some(error) = diagnostics.errors().next() {
            return Outcome::Failed(error.to_string());
        }
        if diagnostics.reason().next().is_some() { Outcome::Satisfied } else { Outcome::Unsatisfied }
    }

    /// The entities of this request and no others: the principal with its groups, the endpoint with its segments and theirs.
    pub fn entities(&self, matched: &[Matched]) -> Result<Entities, Reason> {
        let failed = |message: String| Reason::Unanswerable { message };
        let subject = &self.subject;
        let groups: HashSet<EntityUid> = subject.groups.iter().map(|&group| uid("Group", group)).collect();
        let name = ("name".to_owned(), RestrictedExpression::new_string(subject.name.clone()));
        let mut entities = vec![
            Entity::new(uid(subject.kind, subject.id), [name].into(), groups)
                .map_err(|error| failed(error.to_string()))?,
        ];
        let segments = matched.iter().map(|segment| uid("Segment", segment.segment)).collect();
        entities.push(Entity::new_no_attrs(endpoint_uid(self.endpoint), segments));
        entities.extend(matched.iter().map(|segment| {
            let groups = segment.groups.iter().map(|&group| uid("SegmentGroup", group)).collect();
            Entity::new_no_attrs(uid("Segment", segment.segment), groups)
        }));
        Entities::from_entities(entities, None).map_err(|error| failed(error.to_string()))
    }
}

/// A failure denies, a forbid beats every permit, and without a permit nothing is allowed.
fn conclude<'a>(
    outcomes: impl Iterator<Item = &'a (&'a Arc<Loaded>, Outcome)> + Clone,
) -> (Reason, Vec<&'a Arc<Loaded>>) {
    let failure = outcomes.clone().find_map(|(loaded, outcome)| match outcome {
        Outcome::Failed(message) => Some((*loaded, message)),
        _ => None,
    });
    if let Some((loaded, message)) = failure {
        let reason = Reason::PolicyError { policy: loaded.policy_ref(), message: message.clone() };
        return (reason, vec![loaded]);
    }
    let satisfied = |effect| {
        outcomes
            .clone()
            .filter(move |(loaded, outcome)| {
                *outcome == Outcome::Satisfied && loaded.body.as_ref().is_ok_and(|body| body.effect == effect)
            })
            .map(|(loaded, _)| *loaded)
            .collect::<Vec<_>>()
    };
    let forbids = satisfied(Effect::Forbid);
    if let Some(first) = forbids.first() {
        return (Reason::Forbidden { policy: first.policy_ref() }, forbids);
    }
    let permits = satisfied(Effect::Permit);
    let reason = if permits.is_empty() { Reason::NoPermit } else { Reason::Allowed };
    (reason, permits)
}

/// The earliest moment at which the passing of time alone could change what a policy says.
fn good_until_ms(loaded: &Loaded, context: &Context) -> u64 {
    let Ok(body) = &loaded.body else { return u64::MAX };
    let times = &body.times;
    let mut until_ms = u64::MAX;
    if times.hour {
        until_ms = until_ms.min(context.hour_end_ms());
    }
    if times.now || (times.auth_age && context.auth_time_ms.is_some()) {
        until_ms = until_ms.min(context.now_ms.saturating_add(TIMED_VERDICT_MS_MAX));
    }
    if let (true, Some(login_ms)) = (times.auth_age, context.auth_time_ms) {
        // The age changes what a comparison with `n` says when it becomes `n`, and when it becomes `n + 1`.
        let edges = times
            .numbers
            .iter()
            .filter_map(|&number| u64::try_from(number).ok())
            .flat_map(|age_s| [age_s, age_s.saturating_add(1)]);
        let edges_ms = edges.map(|age_s| login_ms.saturating_add(age_s.saturating_mul(1_000)));
        until_ms = edges_ms.filter(|&edge_ms| edge_ms > context.now_ms).fold(until_ms, u64::min);
    }
    until_ms
}

static AUTHORIZER: LazyLock<Authorizer> = LazyLock::new(Authorizer::new);
static CONNECT: LazyLock<EntityUid> = LazyLock::new(|| named("Action", "connect"));

pub(super) fn uid(kind: &str, id: Id) -> EntityUid {
    named(kind, &id.to_string())
}

fn endpoint_uid(endpoint: &Endpoint) -> EntityUid {
    named("Endpoint", &endpoint.to_string())
}

fn named(kind: &str, id: &str) -> EntityUid {
    let kind: EntityTypeName = kind.parse().expect("kinds are the literals of the schema's entity types");
    EntityUid::from_type_name_and_id(kind, EntityId::new(id))
}
