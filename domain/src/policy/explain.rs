use std::fmt;

use cedar_policy::{Effect, Entities, Policy, PolicySet};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use super::evaluate::{Asked, Outcome, Subject, resource_scopes};
use super::index::{Loaded, bound};
use super::template::{Part, PartOf, parts};
use super::{PolicyIndex, PolicyRef, Principal, Reason, Request, Verdict, decide};
use crate::id::Id;
use crate::rows;
use crate::segment::{Fate, SegmentIndex, transport_name};
use crate::state::State;

/// Policies in one explanation; the others are counted.
pub const EXPLAINED_POLICIES_MAX: usize = 200;

/// Why a request is allowed or denied.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Explanation {
    /// The verdict.
    pub allowed: bool,
    /// Why.
    pub reason: Reason,
    /// The reason in words.
    pub message: String,
    /// Who asks: kind and name, or the id of what does not exist.
    pub principal: String,
    /// Names of the groups that the principal belongs to.
    pub groups: Vec<String>,
    /// Canonical host.
    pub host: String,
    /// Port.
    pub port: u16,
    /// `tcp` or `udp`.
    pub transport: String,
    /// The zone that the host lies in.
    pub zone: Option<String>,
    /// Every segment that has the host, most specific first.
    pub segments: Vec<SegmentTrace>,
    /// The segment that gives connectors, health and timeouts.
    pub segment: Option<String>,
    /// Every policy about these segments, in the order in which they were made.
    pub policies: Vec<PolicyTrace>,
    /// Policies about these segments that are left out of `policies`.
    pub policies_left_out: usize,
    /// The policies that made the verdict.
    pub deciding: Vec<PolicyRef>,
    /// Whether simulated policies would turn the verdict; none when there are none.
    pub simulated_differs: Option<bool>,
    /// The smallest change that would turn a denial, when one is evident.
    pub change: Option<String>,
    /// The policy revision.
    pub revision: u64,
    /// The log position of the state.
    #[schema(value_type = String)]
    pub position: Id,
}

/// A segment that has the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SegmentTrace {
    /// Its id.
    #[schema(value_type = String)]
    pub id: Id,
    /// Its name.
    pub name: String,
    /// The pattern or network that is the host's.
    pub by: String,
    /// It lets less specific ones be tried.
    pub inclusive: bool,
    /// What became of it.
    pub fate: Fate,
}

/// A policy that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PolicyTrace {
    /// Which.
    pub policy: PolicyRef,
    /// `permit` or `forbid`; `broken` when it does not load.
    pub effect: String,
    /// It is evaluated but does not count.
    pub simulated: bool,
    /// What it says.
    pub outcome: PolicyOutcome,
    /// The first condition that is not met, or that failed.
    pub unmet: Option<Unmet>,
    /// It made the verdict.
    pub deciding: bool,
}

/// What a policy says of the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum PolicyOutcome {
    /// It applies.
    Applies,
    /// It does not apply.
    DoesNotApply,
    /// It could not be evaluated; that denies.
    Failed,
}

/// A condition that is not met.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Unmet {
    /// `principal`, `action`, `resource`, `when` or `unless`.
    pub part: String,
    /// The condition in Cedar, with names.
    pub text: String,
    /// What failed, when it could not be evaluated.
    pub error: Option<String>,
}

/// Explains the verdict that [`decide`] makes of the same request.
pub fn explain(state: &State, segments: &SegmentIndex, policies: &PolicyIndex, request: &Request) -> Explanation {
    let verdict = decide(state, segments, policies, request);
    let found = Subject::find(state, request.principal).map(|(subject, _)| subject);
    let mut explanation = Explanation {
        allowed: verdict.allowed,
        message: verdict.reason.to_string(),
        principal: describe(request.principal, found.as_ref()),
        groups: found.iter().flat_map(|subject| &subject.groups).filter_map(|&id| group_name(state, id)).collect(),
        host: request.endpoint.host.to_string(),
        port: request.endpoint.port,
        transport: transport_name(request.endpoint.transport).to_owned(),
        zone: segments.zone_of(&request.endpoint.host).map(str::to_owned),
        segments: segment_traces(segments, request),
        segment: verdict.segment.and_then(|id| segments.name_of(id)).map(str::to_owned),
        policies: Vec::new(),
        policies_left_out: 0,
        deciding: verdict.deciding.clone(),
        simulated_differs: verdict.simulated_differs,
        change: None,
        revision: verdict.revision,
        position: state.position(),
        reason: verdict.reason.clone(),
    };
    let asked = found.clone().and_then(|subject| Asked::new(subject, request).ok());
    let mut traced = Vec::new();
    if let Some(asked) = asked.filter(|_| !verdict.matched.is_empty() && verdict.reason != Reason::Stale) {
        let about = policies.about(&resource_scopes(&verdict.matched));
        explanation.policies_left_out = about.len().saturating_sub(EXPLAINED_POLICIES_MAX);
        if let Ok(entities) = asked.entities(&verdict.matched) {
            traced =
                chosen_for_display(about, &verdict).map(|loaded| trace(&asked, loaded, &entities, &verdict)).collect();
        }
    }
    explanation.change = change(&explanation, found.as_ref(), &traced);
    explanation.policies = traced.into_iter().map(|traced| traced.trace).collect();
    explanation
}

/// The first policies, and always those that decided.
fn chosen_for_display<'a>(
    about: Vec<&'a std::sync::Arc<Loaded>>,
    verdict: &'a Verdict,
) -> impl Iterator<Item = &'a Loaded> + 'a {
    let decided = |loaded: &Loaded| verdict.deciding.iter().any(|policy| policy.id == loaded.row.id());
    let decided_count = about.iter().filter(|loaded| decided(loaded)).count().min(EXPLAINED_POLICIES_MAX);
    let mut others_left = EXPLAINED_POLICIES_MAX - decided_count;
    about.into_iter().map(AsRef::as_ref).filter(move |loaded| {
        let shown = decided(loaded) || others_left > 0;
        others_left = others_left.saturating_sub(usize::from(!decided(loaded)));
        shown
    })
}

fn describe(principal: Principal, found: Option<&Subject>) -> String {
    let (kind, id) = match principal {
        Principal::User(id) => ("User", id),
        Principal::Workload(id) => ("Workload", id),
        Principal::Device(id) => ("Device", id),
    };
    found.map_or_else(|| format!("{kind} {id}"), |subject| format!("{kind} {}", subject.name))
}

fn group_name(state: &State, id: Id) -> Option<String> {
    state.by_id::<rows::Group>(id).map(|group| group.display_name)
}

fn segment_traces(segments: &SegmentIndex, request: &Request) -> Vec<SegmentTrace> {
    let considered = segments.considered(&request.endpoint).into_iter();
    considered
        .map(|c| SegmentTrace { id: c.segment, name: c.name, by: c.by, inclusive: c.inclusive, fate: c.fate })
        .collect()
}

struct Traced {
    trace: PolicyTrace,
    /// Every condition that is not met, for finding the smallest change.
    unmet: Vec<(PartOf, Value, Unmet)>,
}

fn trace(asked: &Asked<'_>, loaded: &Loaded, entities: &Entities, verdict: &Verdict) -> Traced {
    let outcome = asked.ask(loaded, entities);
    let unmet = match outcome {
        Outcome::Satisfied => Vec::new(),
        _ => unmet_parts(asked, loaded, entities).unwrap_or_default(),
    };
    let failure = |message: &String| Unmet { part: "policy".into(), text: String::new(), error: Some(message.clone()) };
    let first = match &outcome {
        Outcome::Failed(message) => {
            let failed = unmet.iter().find(|(_, _, unmet)| unmet.error.is_some()).map(|(_, _, unmet)| unmet.clone());
            Some(failed.unwrap_or_else(|| failure(message)))
        }
        _ => unmet.first().map(|(_, _, unmet)| unmet.clone()),
    };
    let effect = match loaded.body.as_ref().map(|body| body.effect) {
        Ok(Effect::Permit) => "permit",
        Ok(Effect::Forbid) => "forbid",
        Err(_) => "broken",
    };
    let trace = PolicyTrace {
        policy: loaded.policy_ref(),
        effect: effect.into(),
        simulated: loaded.is_simulated(),
        outcome: match outcome {
            Outcome::Satisfied => PolicyOutcome::Applies,
            Outcome::Unsatisfied => PolicyOutcome::DoesNotApply,
            Outcome::Failed(_) => PolicyOutcome::Failed,
        },
        unmet: first,
        deciding: verdict.deciding.iter().any(|policy| policy.id == loaded.row.id()),
    };
    Traced { trace, unmet }
}

/// Evaluates each part of a policy by itself; none when the policy cannot be taken apart.
fn unmet_parts(asked: &Asked<'_>, loaded: &Loaded, entities: &Entities) -> Option<Vec<(PartOf, Value, Unmet)>> {
    let by_id = parts(&bound(&loaded.row, |reference| reference.id.map(|id| id.to_string())).ok()?);
    let by_name = parts(&bound(&loaded.row, |reference| Some(reference.name.clone())).ok()?);
    let mut unmet = Vec::new();
    for (part, named) in by_id.into_iter().zip(by_name) {
        let error = match asked.ask_alone(&alone(part.alone)?, entities) {
            Outcome::Satisfied => continue,
            Outcome::Unsatisfied => None,
            Outcome::Failed(message) => Some(message),
        };
        // After the first clause that is not met, later clauses may lack what it guards: their failures say nothing.
        if error.is_some() && unmet.iter().any(|(of, _, _)| *of == PartOf::When) {
            continue;
        }
        let text = text_of(&named);
        unmet.push((part.of, named.alone, Unmet { part: part.of.to_string(), text, error }));
    }
    Some(unmet)
}

fn alone(json: Value) -> Option<PolicySet> {
    PolicySet::from_policies([Policy::from_json(None, json).ok()?]).ok()
}

impl fmt::Display for PartOf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Principal => "principal",
            Self::Action => "action",
            Self::Resource => "resource",
            Self::When => "when",
            Self::Unless => "unless",
        })
    }
}

/// A part as Cedar text: its constraint in the scope, or what stands inside the braces of its clause.
fn text_of(part: &Part) -> String {
    if !matches!(part.of, PartOf::When | PartOf::Unless) {
        let variable = part.of.to_string();
        return scope_text(&variable, &part.alone[&variable]);
    }
    let Ok(policy) = Policy::from_json(None, part.alone.clone()) else { return String::new() };
    let text = policy.to_string();
    let clause = text.find('{').zip(text.rfind('}')).and_then(|(open, close)| text.get(open + 1..close));
    clause.unwrap_or(&text).split_whitespace().collect::<Vec<_>>().join(" ")
}

fn scope_text(variable: &str, scope: &Value) -> String {
    let entity = |entity: &Value| {
        let (kind, id) = (entity["type"].as_str().unwrap_or_default(), entity["id"].as_str().unwrap_or_default());
        format!("{kind}::{id:?}")
    };
    match (scope["op"].as_str(), scope.get("entity"), scope.get("entities").and_then(Value::as_array)) {
        (Some("is"), ..) => {
            let kind = scope["entity_type"].as_str().unwrap_or_default();
            let inside = scope.get("in").and_then(|inside| inside.get("entity"));
            inside.map_or_else(
                || format!("{variable} is {kind}"),
                |inside| format!("{variable} is {kind} in {}", entity(inside)),
            )
        }
        (Some(op), Some(one), _) => format!("{variable} {op} {}", entity(one)),
        (Some(op), None, Some(several)) => {
            format!("{variable} {op} [{}]", several.iter().map(entity).collect::<Vec<_>>().join(", "))
        }
        _ => variable.to_owned(),
    }
}

/// The smallest change that would turn a denial.
fn change(explanation: &Explanation, subject: Option<&Subject>, traced: &[Traced]) -> Option<String> {
    let (host, port, transport) = (&explanation.host, explanation.port, &explanation.transport);
    match &explanation.reason {
        Reason::Allowed | Reason::Stale | Reason::PrincipalUnknown | Reason::Unanswerable { .. } => None,
        Reason::NoSegment => Some(format!("add `{host}` to a segment")),
        Reason::WrongPort => {
            let first = explanation.segments.first()?;
            Some(format!("add {transport} port {port} to segment `{}`", first.name))
        }
        Reason::PrincipalInactive => Some(format!("activate `{}` in its directory", subject?.name)),
        Reason::PrincipalRevoked => Some(format!("enrol `{}` again", subject?.name)),
        Reason::Restored => Some(match subject?.kind {
            "User" => format!("have the directory push `{}` again, or release the device", subject?.name),
            _ => format!("release `{}`", subject?.name),
        }),
        Reason::DeviceRevoked => Some("enrol the device again".into()),
        Reason::Forbidden { policy } => Some(format!("narrow or remove policy `{}`", policy.name)),
        Reason::PolicyError { policy, .. } => Some(format!("correct policy `{}`", policy.name)),
        Reason::NoPermit => permit_change(explanation, subject?, traced),
    }
}

fn permit_change(explanation: &Explanation, subject: &Subject, traced: &[Traced]) -> Option<String> {
    let permits = || traced.iter().filter(|traced| traced.trace.effect == "permit");
    let one_short = || {
        permits().filter(|traced| !traced.trace.simulated).filter_map(|traced| match &traced.unmet[..] {
            [(of, named, unmet)] => Some((&traced.trace.policy, *of, named, unmet)),
            _ => None,
        })
    };
    let into_group = one_short().find_map(|(_, of, named, _)| {
        let group = missing_group(of, named).filter(|_| subject.kind == "User")?;
        Some(format!("add `{}` to group `{group}`", subject.name))
    });
    let enforce = || {
        let simulated = permits().find(|t| t.trace.simulated && t.trace.outcome == PolicyOutcome::Applies)?;
        Some(format!("enforce policy `{}`, which is simulated", simulated.trace.policy.name))
    };
    let meet = || {
        one_short().next().map(|(policy, of, _, unmet)| match of {
            PartOf::Unless => format!("policy `{}` would permit it if this did not hold: {}", policy.name, unmet.text),
            _ => format!("policy `{}` would permit it if this held: {}", policy.name, unmet.text),
        })
    };
    let write = || {
        let segment = explanation.segments.iter().find(|segment| segment.fate == Fate::Matched)?;
        Some(format!("write a policy that permits `{}` to reach segment `{}`", subject.name, segment.name))
    };
    into_group.or_else(enforce).or_else(meet).or_else(write)
}

/// The group that a scope or a condition `principal in Group::"g"` asks for.
fn missing_group(of: PartOf, named: &Value) -> Option<&str> {
    let entity = match of {
        PartOf::Principal => {
            let scope = &named["principal"];
            scope.get("entity").or_else(|| scope.get("in")?.get("entity"))?
        }
        PartOf::When => {
            let membership = named["conditions"][0]["body"].get("in")?;
            let about_principal = membership["left"]["Var"] == "principal";
            about_principal.then(|| membership["right"]["Value"].get("__entity"))??
        }
        _ => return None,
    };
    (entity["type"] == "Group").then(|| entity["id"].as_str())?
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = if self.allowed { "ALLOWED" } else { "DENIED" };
        writeln!(f, "{verdict}: {}", self.message)?;
        writeln!(f, "  principal  {}", self.principal)?;
        if !self.groups.is_empty() {
            writeln!(f, "  groups     {}", self.groups.join(", "))?;
        }
        let host = if self.host.contains(':') { format!("[{}]", self.host) } else { self.host.clone() };
        writeln!(f, "  target     {}/{host}:{}", self.transport, self.port)?;
        match &self.zone {
            Some(zone) => writeln!(f, "  zone       {zone}")?,
            None => writeln!(f, "  zone       none")?,
        }
        if self.segments.is_empty() {
            writeln!(f, "  segments   none has this host")?;
        }
        for segment in &self.segments {
            let fate = match segment.fate {
                Fate::Matched if self.segment.as_ref() == Some(&segment.name) => "matched, gives the connectors",
                Fate::Matched => "matched",
                Fate::LacksPort => "does not have this port",
                Fate::Hidden => "not tried: a more specific segment stands before it",
            };
            writeln!(f, "  segment    {} (by {}): {fate}", segment.name, segment.by)?;
        }
        for policy in &self.policies {
            write!(
                f,
                "  policy     {} ({}{}): ",
                policy.policy.name,
                policy.effect,
                if policy.simulated { ", simulated" } else { "" }
            )?;
            match (policy.outcome, &policy.unmet) {
                (PolicyOutcome::Applies, _) => write!(f, "applies")?,
                (_, Some(Unmet { error: Some(error), .. })) => write!(f, "failed: {error}")?,
                (_, Some(unmet)) if unmet.part == "when" || unmet.part == "unless" => {
                    write!(f, "{} {{ {} }} is not met", unmet.part, unmet.text)?;
                }
                (_, Some(unmet)) => write!(f, "{} is not met", unmet.text)?,
                (_, None) => write!(f, "does not apply")?,
            }
            writeln!(f, "{}", if policy.deciding { "  <- decides" } else { "" })?;
        }
        if self.policies_left_out > 0 {
            writeln!(f, "  policy     and {} more", self.policies_left_out)?;
        }
        if self.simulated_differs == Some(true) {
            writeln!(f, "  simulated  policies that are simulated would turn this verdict")?;
        }
        if let Some(change) = &self.change {
            writeln!(f, "  to change  {change}")?;
        }
        write!(f, "  revision   {} at {}", self.revision, self.position)
    }
}
