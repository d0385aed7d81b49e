use std::collections::BTreeMap;

use cedar_policy::{Policy, PolicyId, PolicySet, ValidationMode, ValidationWarning};

use super::nesting::{BRACKETS_DEPTH_MAX, OPERATORS_MAX, is_shallow};
use super::schema::{DEREFERENCES_MAX, VALIDATOR};
use super::template::{REFERENCED_KINDS, each_entity};
use crate::command::CompiledPolicy;
use crate::limits::POLICY_BYTES_MAX;
use crate::spec;

/// Why a policy was not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Too long.
    #[error("policy `{name}` has {bytes} bytes, more than {POLICY_BYTES_MAX}")]
    TooLong {
        /// The policy.
        name: String,
        /// Its length.
        bytes: usize,
    },
    /// Not Cedar.
    #[error("policy `{name}` is not Cedar: {message}")]
    Syntax {
        /// The policy.
        name: String,
        /// What the parser says.
        message: String,
    },
    /// No policy, several, or a template.
    #[error("policy `{name}` must be exactly one `permit` or `forbid` without slots, found {found}")]
    NotOne {
        /// The policy.
        name: String,
        /// What was found.
        found: String,
    },
    /// It does not fit the schema.
    #[error("policy `{name}` does not fit the schema: {message}")]
    Invalid {
        /// The policy.
        name: String,
        /// What the validator says.
        message: String,
    },
    /// It names an entity of a kind that has no name.
    #[error(
        "policy `{name}` names {kind}::\"{id}\": only users, groups, workloads, segments and segment groups have names"
    )]
    Entity {
        /// The policy.
        name: String,
        /// The entity's type.
        kind: String,
        /// The entity's id.
        id: String,
    },
    /// Nested too deeply.
    #[error(
        "policy `{name}` is nested too deeply (at most {BRACKETS_DEPTH_MAX} open brackets, {OPERATORS_MAX} operators, \
         chains of about 50): split it, or use sets instead of chains of `||`"
    )]
    TooDeep {
        /// The policy.
        name: String,
    },
}

/// Compiles a policy: one Cedar policy that fits the schema, with what it names as numbered references.
///
/// **Errors** [`Error`]; messages are for the person who wrote the policy.
pub fn compile(policy: &spec::Policy) -> Result<CompiledPolicy, Error> {
    let name = || policy.name.clone();
    if policy.cedar.len() > POLICY_BYTES_MAX {
        return Err(Error::TooLong { name: name(), bytes: policy.cedar.len() });
    }
    if !is_shallow(&policy.cedar) {
        return Err(Error::TooDeep { name: name() });
    }
    let parsed = parse(policy)?;
    validate(&policy.name, &parsed)?;

    let too_deep = || Error::TooDeep { name: name() };
    let mut template = parsed.to_json().map_err(|error| Error::Syntax { name: name(), message: error.to_string() })?;
    let mut numbers: BTreeMap<(String, String), usize> = BTreeMap::new();
    let mut references = Vec::new();
    each_entity(&mut template, too_deep, |kind, id| {
        if kind == "Action" {
            return Ok(());
        }
        if !REFERENCED_KINDS.contains(&kind) {
            return Err(Error::Entity { name: name(), kind: kind.to_owned(), id: id.clone() });
        }
        let key = (kind.to_owned(), id.clone());
        let number = *numbers.entry(key.clone()).or_insert_with(|| {
            references.push(key);
            references.len() - 1
        });
        *id = format!("${number}");
        Ok(())
    })?;
    let template = template.to_string();
    // Every broker will read it back; what cannot be read back is refused here.
    let back = serde_json::from_str(&template).map_err(|_| too_deep())?;
    let back =
        Policy::from_json(None, back).map_err(|error| Error::Syntax { name: name(), message: error.to_string() })?;
    // A name that stayed a name would match nothing: for a `forbid` that would be an open door.
    let unbound = back
        .entity_literals()
        .into_iter()
        .find(|uid| uid.type_name().to_string() != "Action" && !uid.id().unescaped().starts_with('$'));
    if let Some(uid) = unbound {
        let (kind, id) = (uid.type_name().to_string(), uid.id().unescaped().to_string());
        return Err(Error::Entity { name: name(), kind, id });
    }
    Ok(CompiledPolicy { template, references })
}

fn parse(policy: &spec::Policy) -> Result<Policy, Error> {
    let set: PolicySet = policy.cedar.parse().map_err(|errors: cedar_policy::ParseErrors| Error::Syntax {
        name: policy.name.clone(),
        message: joined(errors.iter().map(ToString::to_string)),
    })?;
    let not_one = |found: String| Error::NotOne { name: policy.name.clone(), found };
    if set.num_of_templates() > 0 {
        return Err(not_one("a template".into()));
    }
    let mut policies = set.policies();
    match (policies.next(), set.num_of_policies()) {
        (Some(one), 1) => Ok(one.new_id(PolicyId::new(&policy.name))),
        (_, count) => Err(not_one(format!("{count} policies"))),
    }
}

fn validate(name: &str, policy: &Policy) -> Result<(), Error> {
    // The error names the policy already.
    let prefix = format!("for policy `{name}`, ");
    let invalid = |message: String| Error::Invalid { name: name.to_owned(), message: message.replace(&prefix, "") };
    let set = PolicySet::from_policies([policy.clone()]).map_err(|error| invalid(error.to_string()))?;
    let result = VALIDATOR.validate_with_level(&set, ValidationMode::Strict, DEREFERENCES_MAX);
    let errors: Vec<String> = result.validation_errors().map(ToString::to_string).collect();
    if !errors.is_empty() {
        return Err(invalid(joined(errors.into_iter())));
    }
    // Names of objects may mix scripts; what hides or can never apply is a mistake or worse.
    let refused =
        result.validation_warnings().filter(|warning| !matches!(warning, ValidationWarning::MixedScriptString(_)));
    let warnings: Vec<String> = refused.map(ToString::to_string).collect();
    if warnings.is_empty() { Ok(()) } else { Err(invalid(joined(warnings.into_iter()))) }
}

fn joined(messages: impl Iterator<Item = String>) -> String {
    let mut messages: Vec<String> = messages.collect();
    messages.sort();
    messages.dedup();
    messages.join("; ")
}
