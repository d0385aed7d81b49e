use std::collections::BTreeMap;
use std::sync::Arc;

use cedar_policy::{Effect, EntityUid, Policy, PolicyId, PolicySet, PrincipalConstraint, ResourceConstraint};
use serde_json::Value;

use super::PolicyRef;
use super::template::{Times, each_entity};
use crate::id::Id;
use crate::rows::{self, PolicyMode};
use crate::state::State;

/// Why a stored policy cannot be evaluated.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    /// The stored form is not JSON, or not that of a policy.
    #[error("the stored form does not load: {0}")]
    Form(String),
    /// A reference has no number or no id.
    #[error("`{0}` stands for nothing")]
    Reference(String),
}

/// The policies of a state, loaded and arranged by what their scopes can match. Built once per policy revision.
#[derive(Clone, Debug, Default)]
pub struct PolicyIndex {
    revision: u64,
    by_id: BTreeMap<Id, Arc<Loaded>>,
    by_scope: BTreeMap<Scope, BTreeMap<Scope, Vec<Arc<Loaded>>>>,
}

/// What the scope of a policy can match on one side. A policy that does not load can match anything.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Scope {
    Any,
    Kind(String),
    Entity(String, Id),
}

impl Scope {
    pub fn kind(kind: &str) -> Self {
        Self::Kind(kind.to_owned())
    }

    pub fn entity(kind: &str, id: Id) -> Self {
        Self::Entity(kind.to_owned(), id)
    }

    fn of(uid: &EntityUid) -> Result<Self, Broken> {
        let id = uid.id().unescaped();
        let id = id.parse().map_err(|_| Broken::Reference(id.to_string()))?;
        Ok(Self::Entity(uid.type_name().to_string(), id))
    }
}

#[derive(Debug)]
pub(super) struct Loaded {
    pub row: rows::Policy,
    pub body: Result<Body, Broken>,
}

#[derive(Debug)]
pub(super) struct Body {
    /// The policy alone: evaluating policies one by one tells which of them failed, and needs no set per request.
    pub alone: PolicySet,
    pub effect: Effect,
    pub times: Times,
    principal: Scope,
    resource: Scope,
}

impl PolicyIndex {
    /// Loads and arranges the policies of a state.
    pub fn build(state: &State) -> Self {
        Self::default().rebuild(state)
    }

    /// The index of another state; policies that are the same are not loaded again.
    pub fn rebuild(&self, state: &State) -> Self {
        let mut index = Self { revision: super::revision(state), ..Self::default() };
        for row in state.rows::<rows::Policy>() {
            let loaded = match self.by_id.get(&row.id()) {
                Some(loaded) if loaded.row == row => loaded.clone(),
                _ => Arc::new(Loaded::new(row)),
            };
            let (principal, resource) = loaded.scopes();
            index.by_scope.entry(principal).or_default().entry(resource).or_default().push(loaded.clone());
            index.by_id.insert(loaded.row.id(), loaded);
        }
        index
    }

    /// The policy revision that it was built from.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// Number of policies.
    pub fn len(&self) -> usize {
        self.by_id.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.by_id.is_empty()
    }

    /// Policies that do not load, and so deny everything they could match.
    pub fn broken(&self) -> impl Iterator<Item = (PolicyRef, &Broken)> {
        self.by_id.values().filter_map(|loaded| Some((loaded.policy_ref(), loaded.body.as_ref().err()?)))
    }

    /// Policies of which both scopes can match, in the order of their ids.
    pub(super) fn candidates(&self, principals: &[Scope], resources: &[Scope]) -> Vec<&Arc<Loaded>> {
        let by_resource = principals.iter().filter_map(|principal| self.by_scope.get(principal));
        Self::of_resources(by_resource, resources)
    }

    /// Policies of which the resource's scope can match, in the order of their ids.
    pub(super) fn about(&self, resources: &[Scope]) -> Vec<&Arc<Loaded>> {
        Self::of_resources(self.by_scope.values(), resources)
    }

    fn of_resources<'a>(
        by_resource: impl Iterator<Item = &'a BTreeMap<Scope, Vec<Arc<Loaded>>>>,
        resources: &[Scope],
    ) -> Vec<&'a Arc<Loaded>> {
        let mut found: Vec<&Arc<Loaded>> = by_resource
            .flat_map(|by_resource| resources.iter().filter_map(|resource| by_resource.get(resource)).flatten())
            .collect();
        found.sort_by_key(|loaded| loaded.row.id());
        found
    }
}

impl Loaded {
    fn new(row: rows::Policy) -> Self {
        let body = Body::load(&row);
        Self { row, body }
    }

    pub fn policy_ref(&self) -> PolicyRef {
        PolicyRef { id: self.row.id(), name: self.row.name.clone() }
    }

    pub fn is_simulated(&self) -> bool {
        self.row.mode == PolicyMode::Simulate as i32
    }

    fn scopes(&self) -> (Scope, Scope) {
        match &self.body {
            Ok(body) => (body.principal.clone(), body.resource.clone()),
            Err(_) => (Scope::Any, Scope::Any),
        }
    }
}

impl Body {
    fn load(row: &rows::Policy) -> Result<Self, Broken> {
        let form = |error: &dyn std::fmt::Display| Broken::Form(error.to_string());
        let json = bound(row, |reference| reference.id.map(|id| id.to_string()))?;
        let times = Times::read_by(&json);
        let policy = Policy::from_json(Some(PolicyId::new(row.id().to_string())), json).map_err(|e| form(&e))?;
        let principal = match policy.principal_constraint() {
            PrincipalConstraint::Any => Scope::Any,
            PrincipalConstraint::Is(kind) => Scope::Kind(kind.to_string()),
            PrincipalConstraint::In(uid) | PrincipalConstraint::Eq(uid) | PrincipalConstraint::IsIn(_, uid) => {
                Scope::of(&uid)?
            }
        };
        let resource = match policy.resource_constraint() {
            ResourceConstraint::Any => Scope::Any,
            ResourceConstraint::Is(kind) => Scope::Kind(kind.to_string()),
            ResourceConstraint::In(uid) | ResourceConstraint::Eq(uid) | ResourceConstraint::IsIn(_, uid) => {
                Scope::of(&uid)?
            }
        };
        let effect = policy.effect();
        let alone = PolicySet::from_policies([policy]).map_err(|e| form(&e))?;
        Ok(Self { alone, effect, times, principal, resource })
    }
}

/// The stored form of a policy with something in the place of each `$n`.
pub(super) fn bound(row: &rows::Policy, with: impl Fn(&rows::Reference) -> Option<String>) -> Result<Value, Broken> {
    let mut json: Value = serde_json::from_str(&row.template).map_err(|error| Broken::Form(error.to_string()))?;
    let too_deep = || Broken::Form("nested too deeply".into());
    each_entity(&mut json, too_deep, |kind, id| {
        if kind == "Action" {
            return Ok(());
        }
        let reference = id.strip_prefix('$').and_then(|number| row.references.get(number.parse::<usize>().ok()?));
        let bound = reference.filter(|reference| reference.kind == kind).and_then(&with);
        *id = bound.ok_or_else(|| Broken::Reference(id.clone()))?;
        Ok(())
    })?;
    Ok(json)
}
