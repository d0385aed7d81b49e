//! Cedar's JSON form of a policy: walking it, and putting something else in the place of what it names.

use serde_json::{Value, json};

/// Entity types that policies name, and that are stored as references.
pub(super) const REFERENCED_KINDS: [&str; 5] = ["User", "Group", "Workload", "Segment", "SegmentGroup"];

/// Calls `change` with the type and id of each entity that a policy names, in a fixed order.
///
/// **Errors** the first that `change` returns, and `deep()` when the policy is nested deeper than JSON is read back.
pub(super) fn each_entity<E>(
    policy: &mut Value,
    deep: impl Fn() -> E,
    mut change: impl FnMut(&str, &mut String) -> Result<(), E>,
) -> Result<(), E> {
    for scope in ["principal", "action", "resource"] {
        let Some(scope) = policy.get_mut(scope) else { continue };
        if let Some(entity) = scope.get_mut("entity") {
            visit(entity, &mut change)?;
        }
        if let Some(entity) = scope.get_mut("in").and_then(|inner| inner.get_mut("entity")) {
            visit(entity, &mut change)?;
        }
        for entity in scope.get_mut("entities").and_then(Value::as_array_mut).into_iter().flatten() {
            visit(entity, &mut change)?;
        }
    }
    match policy.get_mut("conditions") {
        Some(conditions) => walk(conditions, 0, &deep, &mut change),
        None => Ok(()),
    }
}

/// `serde_json` reads no deeper than 128 levels.
const DEPTH_MAX: usize = 120;

fn walk<E>(
    value: &mut Value,
    depth: usize,
    deep: &impl Fn() -> E,
    change: &mut impl FnMut(&str, &mut String) -> Result<(), E>,
) -> Result<(), E> {
    if depth > DEPTH_MAX {
        return Err(deep());
    }
    match value {
        Value::Object(fields) => {
            for (key, field) in fields {
                match field.get_mut("__entity") {
                    Some(entity) if key == "Value" => visit(entity, change)?,
                    _ => walk(field, depth + 1, deep, change)?,
                }
            }
            Ok(())
        }
        Value::Array(items) => items.iter_mut().try_for_each(|item| walk(item, depth + 1, deep, change)),
        _ => Ok(()),
    }
}

fn visit<E>(entity: &mut Value, change: &mut impl FnMut(&str, &mut String) -> Result<(), E>) -> Result<(), E> {
    let kind = entity.get("type").and_then(Value::as_str).unwrap_or_default().to_owned();
    if let Some(Value::String(id)) = entity.get_mut("id") {
        change(&kind, id)?;
    }
    Ok(())
}

/// A part of a policy that must hold: what it is of, and a policy that consists of it alone.
pub(super) struct Part {
    pub of: PartOf,
    pub alone: Value,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PartOf {
    Principal,
    Action,
    Resource,
    When,
    Unless,
}

/// Takes a policy apart: scope, then each clause; a `when` that joins conditions by `&&` is taken apart further.
pub(super) fn parts(policy: &Value) -> Vec<Part> {
    let all = || json!({ "op": "All" });
    let alone = |scope: Option<&str>, conditions: Value| {
        let mut alone = json!({ "effect": "permit", "principal": all(), "action": all(), "resource": all(), "conditions": conditions });
        if let Some(scope) = scope {
            alone[scope] = policy[scope].clone();
        }
        alone
    };
    let mut parts = vec![
        Part { of: PartOf::Principal, alone: alone(Some("principal"), json!([])) },
        Part { of: PartOf::Action, alone: alone(Some("action"), json!([])) },
        Part { of: PartOf::Resource, alone: alone(Some("resource"), json!([])) },
    ];
    for clause in policy["conditions"].as_array().into_iter().flatten() {
        if clause["kind"] == "unless" {
            parts.push(Part { of: PartOf::Unless, alone: alone(None, json!([clause])) });
            continue;
        }
        let mut joined = Vec::new();
        conjuncts(&clause["body"], &mut joined);
        for body in joined {
            parts.push(Part { of: PartOf::When, alone: alone(None, json!([{ "kind": "when", "body": body }])) });
        }
    }
    parts
}

fn conjuncts<'a>(body: &'a Value, into: &mut Vec<&'a Value>) {
    match body.get("&&") {
        Some(and) => {
            conjuncts(&and["left"], into);
            conjuncts(&and["right"], into);
        }
        None => into.push(body),
    }
}

/// What a policy's verdict depends on besides who asks for what: the passing of time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Times {
    /// It reads the hour or the weekday.
    pub hour: bool,
    /// It reads the time itself.
    pub now: bool,
    /// It reads the age of the login.
    pub auth_age: bool,
    /// Every whole number that it names; ages are compared with these.
    pub numbers: Vec<i64>,
}

impl Times {
    /// What times a policy reads.
    pub fn read_by(policy: &Value) -> Self {
        let mut times = Self::default();
        times.scan(&policy["conditions"]);
        times
    }

    fn scan(&mut self, value: &Value) {
        match value {
            Value::Object(fields) => {
                for (key, field) in fields {
                    match key.as_str() {
                        "." => match context_path(value) {
                            Some(path) => self.read(&path),
                            None => self.scan(field),
                        },
                        // Whether an attribute is there does not change with time.
                        "has" if context_path(&field["left"]).is_some() => {}
                        "Var" if field == "context" => self.read(&[]),
                        "Value" => self.numbers.extend(field.as_i64()),
                        _ => self.scan(field),
                    }
                }
            }
            Value::Array(items) => items.iter().for_each(|item| self.scan(item)),
            _ => {}
        }
    }

    fn read(&mut self, path: &[&str]) {
        match path {
            [] => (self.hour, self.now, self.auth_age) = (true, true, true),
            ["clock", "hour" | "weekday", ..] => self.hour = true,
            ["clock", "now", ..] => self.now = true,
            ["clock", ..] => (self.hour, self.now) = (true, true),
            ["auth_age", ..] => self.auth_age = true,
            _ => {}
        }
    }
}

/// `context.a.b` as `[a, b]`; none when the expression is something else.
fn context_path(expression: &Value) -> Option<Vec<&str>> {
    if expression.get("Var").is_some_and(|var| var == "context") {
        return Some(Vec::new());
    }
    let access = expression.get(".")?;
    let mut path = context_path(&access["left"])?;
    path.push(access["attr"].as_str()?);
    Some(path)
}
