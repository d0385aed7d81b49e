//! PATCH, as the RFC, Okta and Entra ID write it.
//!
//! **Source** RFC 7644, section 3.5.2.

use std::collections::BTreeSet;

use selvedge_domain::Id;
use serde_json::{Map, Value, json};

use super::attributes::{Attribute, ENTERPRISE, Form, Named, Resource};
use super::error::Error;
use super::filter::Filter;
use super::resource::member_ids;

/// Operations in one request.
pub(super) const OPERATIONS_MAX: usize = 1_000;

/// What an operation does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Adds to what is there.
    Add,
    /// Replaces what is there.
    Replace,
    /// Removes.
    Remove,
}

/// One operation on one target.
#[derive(Clone, Debug)]
pub(super) struct Operation {
    kind: Kind,
    target: Target,
    value: Value,
}

#[derive(Clone, Debug)]
enum Target {
    /// An attribute or a part of one, of all or of some of its elements.
    At { named: Named, filter: Option<Filter> },
    /// The enterprise extension as a whole.
    Enterprise,
}

/// Reads a PATCH body.
///
/// **Errors** `invalidSyntax`, `invalidPath`, `invalidFilter`, `noTarget`.
pub(super) fn parse(body: Value, resource: Resource) -> Result<Vec<Operation>, Error> {
    let Value::Object(body) = body else { return Err(Error::syntax("the body is not a JSON object")) };
    let operations = body.into_iter().find(|(key, _)| key.eq_ignore_ascii_case("operations"));
    let Some((_, Value::Array(operations))) = operations else {
        return Err(Error::syntax("a PATCH has a list of `Operations`"));
    };
    if operations.is_empty() || operations.len() > OPERATIONS_MAX {
        return Err(Error::syntax(format!("a PATCH has 1 to {OPERATIONS_MAX} operations")));
    }
    let mut parsed = Vec::new();
    for operation in operations {
        parse_one(operation, resource, &mut parsed)?;
    }
    Ok(parsed)
}

fn parse_one(operation: Value, resource: Resource, parsed: &mut Vec<Operation>) -> Result<(), Error> {
    let Value::Object(operation) = operation else { return Err(Error::syntax("an operation is an object")) };
    let (mut kind, mut path, mut value) = (None, None, Value::Null);
    for (key, given) in operation {
        match key.to_ascii_lowercase().as_str() {
            "op" => kind = given.as_str().map(str::to_ascii_lowercase),
            "path" => path = Some(given),
            "value" => value = given,
            _ => {}
        }
    }
    let kind = match kind.as_deref() {
        Some("add") => Kind::Add,
        Some("replace") => Kind::Replace,
        Some("remove") => Kind::Remove,
        _ => return Err(Error::syntax("`op` is `add`, `replace` or `remove`")),
    };
    match path {
        Some(Value::String(path)) => parsed.push(Operation { kind, target: target(&path, resource)?, value }),
        Some(Value::Null) | None => {
            let Value::Object(fields) = value else {
                return match kind {
                    Kind::Remove => Err(Error::bad("noTarget", "`remove` needs a `path`")),
                    _ => Err(Error::value("without a `path` the value is an object of attributes")),
                };
            };
            if kind == Kind::Remove {
                return Err(Error::bad("noTarget", "`remove` needs a `path`"));
            }
            for (key, value) in fields {
                // Attributes that are not known are passed over here, as in a whole resource.
                if let Ok(target) = target(&key, resource) {
                    parsed.push(Operation { kind, target, value });
                }
            }
        }
        Some(_) => return Err(Error::path("`path` is a text")),
    }
    Ok(())
}

fn target(path: &str, resource: Resource) -> Result<Target, Error> {
    let unknown = || Error::path(format!("`{}` is not a path", path.chars().take(64).collect::<String>()));
    let path = path.trim();
    if path.eq_ignore_ascii_case(ENTERPRISE) && resource == Resource::User {
        return Ok(Target::Enterprise);
    }
    let Some((head, rest)) = path.split_once('[') else {
        return Ok(Target::At { named: resource.named(path).ok_or_else(unknown)?, filter: None });
    };
    let named = resource.named(head).filter(|named| named.sub.is_none()).ok_or_else(unknown)?;
    if named.attribute.form != Form::Many {
        return Err(unknown());
    }
    let (filter, rest) = Filter::parse_within(rest, named, resource)?;
    let sub = match rest.strip_prefix('.') {
        Some(sub) => Some(named.attribute.sub(sub).ok_or_else(unknown)?),
        None if rest.is_empty() => None,
        None => return Err(unknown()),
    };
    Ok(Target::At { named: Named { sub, ..named }, filter: Some(filter) })
}

/// Applies operations to a user's JSON, in order.
///
/// **Errors** `invalidValue` when a value does not fit its attribute.
pub(super) fn apply_to_user(user: &mut Value, operations: &[Operation]) -> Result<(), Error> {
    let Value::Object(object) = user else { return Err(Error::syntax("a user is a JSON object")) };
    for operation in operations {
        match &operation.target {
            Target::Enterprise => enterprise(object, operation)?,
            Target::At { named, .. } if named.attribute.read_only => {}
            Target::At { named, filter } => {
                let holder = if named.enterprise { extension(object)? } else { &mut *object };
                at(holder, *named, filter.as_ref(), operation)?;
            }
        }
    }
    Ok(())
}

fn enterprise(object: &mut Map<String, Value>, operation: &Operation) -> Result<(), Error> {
    if operation.kind == Kind::Remove || operation.value.is_null() {
        object.remove(ENTERPRISE);
        return Ok(());
    }
    let Value::Object(fields) = &operation.value else {
        return Err(Error::value("the value of an extension is an object of its attributes"));
    };
    for (key, value) in fields {
        if let Some(named) = Resource::User.named(&format!("{ENTERPRISE}:{key}")) {
            let one = Operation { kind: operation.kind, target: Target::Enterprise, value: value.clone() };
            at(extension(object)?, named, None, &one)?;
        }
    }
    Ok(())
}

fn extension(object: &mut Map<String, Value>) -> Result<&mut Map<String, Value>, Error> {
    let extension = object.entry(ENTERPRISE).or_insert_with(|| json!({}));
    extension.as_object_mut().ok_or_else(|| Error::value("the enterprise extension is an object"))
}

fn at(
    holder: &mut Map<String, Value>,
    named: Named,
    filter: Option<&Filter>,
    operation: &Operation,
) -> Result<(), Error> {
    let attribute = named.attribute;
    // A value of null is no value.
    let removes = operation.kind == Kind::Remove || operation.value.is_null();
    match (filter, named.sub) {
        (Some(filter), sub) => {
            let elements = list(holder, attribute)?;
            elements_at(elements, filter, sub, operation, removes)
        }
        (None, Some(sub)) if attribute.form == Form::Many => {
            let elements = list(holder, attribute)?;
            if elements.is_empty() && !removes {
                elements.push(json!({}));
            }
            for element in elements.iter_mut().filter_map(Value::as_object_mut) {
                put_sub(element, sub, operation, removes);
            }
            Ok(())
        }
        (None, Some(sub)) => {
            let object = holder.entry(attribute.name).or_insert_with(|| json!({}));
            if !object.is_object() {
                *object = json!({});
            }
            if let Some(object) = object.as_object_mut() {
                put_sub(object, sub, operation, removes);
            }
            Ok(())
        }
        (None, None) if removes => {
            remove_whole(holder, attribute, operation);
            Ok(())
        }
        (None, None) => put_whole(holder, attribute, operation),
    }
}

/// `remove` of a list with a value removes those elements, as Entra ID writes it; else all of it goes.
fn remove_whole(holder: &mut Map<String, Value>, attribute: &Attribute, operation: &Operation) {
    let gone: Vec<&Value> = match &operation.value {
        Value::Array(gone) if attribute.form == Form::Many => gone.iter().map(value_of).collect(),
        _ => Vec::new(),
    };
    match holder.get_mut(attribute.name) {
        Some(Value::Array(elements)) if !gone.is_empty() => {
            elements.retain(|element| !gone.contains(&value_of(element)))
        }
        _ => drop(holder.remove(attribute.name)),
    }
}

fn put_whole(holder: &mut Map<String, Value>, attribute: &Attribute, operation: &Operation) -> Result<(), Error> {
    let value = operation.value.clone();
    match (attribute.form, value) {
        (Form::Complex, Value::Object(fields)) => {
            let object = holder.entry(attribute.name).or_insert_with(|| json!({}));
            if !object.is_object() {
                *object = json!({});
            }
            if let Some(object) = object.as_object_mut() {
                for (key, value) in fields {
                    // Names without regard to case, so that a part does not stand there twice.
                    let name = attribute.sub(&key).unwrap_or_default();
                    if !name.is_empty() {
                        object.insert(name.to_owned(), value);
                    }
                }
            }
        }
        (Form::Many, value) => {
            let new = match value {
                Value::Array(elements) => elements,
                one => vec![one],
            };
            if operation.kind == Kind::Replace {
                holder.insert(attribute.name.to_owned(), new.into());
                return Ok(());
            }
            let elements = list(holder, attribute)?;
            for element in new {
                match elements.iter_mut().find(|there| value_of(there) == value_of(&element)) {
                    // Again the same one: its other parts are brought up to date.
                    Some(there) => *there = element,
                    None => elements.push(element),
                }
            }
        }
        (_, value) => drop(holder.insert(attribute.name.to_owned(), value)),
    }
    Ok(())
}

fn elements_at(
    elements: &mut Vec<Value>,
    filter: &Filter,
    sub: Option<&'static str>,
    operation: &Operation,
    removes: bool,
) -> Result<(), Error> {
    if removes && sub.is_none() {
        elements.retain(|element| !filter.element(element));
        return Ok(());
    }
    if !removes && !elements.iter().any(|element| filter.element(element)) {
        // Entra ID sets `emails[type eq "work"].value` on users who have no such address yet.
        let made = filter.equalities().ok_or_else(|| Error::bad("noTarget", "no element satisfies the filter"))?;
        elements.push(Value::Object(made));
    }
    for element in elements.iter_mut().filter(|element| filter.element(element)) {
        let Some(object) = element.as_object_mut() else { continue };
        match (sub, &operation.value) {
            (Some(sub), _) => put_sub(object, sub, operation, removes),
            (None, Value::Object(fields)) => object.extend(fields.clone()),
            (None, other) => drop(object.insert("value".to_owned(), other.clone())),
        }
    }
    Ok(())
}

fn put_sub(object: &mut Map<String, Value>, sub: &str, operation: &Operation, removes: bool) {
    if removes {
        object.remove(sub);
    } else {
        object.insert(sub.to_owned(), operation.value.clone());
    }
}

fn list<'h>(holder: &'h mut Map<String, Value>, attribute: &Attribute) -> Result<&'h mut Vec<Value>, Error> {
    let list = holder.entry(attribute.name).or_insert_with(|| json!([]));
    list.as_array_mut().ok_or_else(|| Error::value(format!("`{}` is a list", attribute.name)))
}

fn value_of(element: &Value) -> &Value {
    let value = element.as_object().and_then(|object| object.iter().find(|(key, _)| key.eq_ignore_ascii_case("value")));
    value.map_or(element, |(_, value)| value)
}

/// What operations on a group come to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct GroupChange {
    /// New `displayName`.
    pub display_name: Option<String>,
    /// New `externalId`.
    pub external_id: Option<String>,
    /// All members, replacing those there are; the rest comes after.
    pub members: Option<BTreeSet<Id>>,
    /// Members to add.
    pub add: BTreeSet<Id>,
    /// Members to remove.
    pub remove: BTreeSet<Id>,
    /// It depends on who is in the group now: it holds for that version only.
    pub depends: bool,
}

/// Adds operations on a group up, in order. `present` are the members as they are now, and is asked only when a filter
/// other than `value eq` needs them.
///
/// **Errors** `invalidValue`, `noTarget`.
pub(super) fn group_change(
    operations: &[Operation],
    mut present: impl FnMut() -> Vec<(Id, Value)>,
) -> Result<GroupChange, Error> {
    let mut change = GroupChange::default();
    for operation in operations {
        let Target::At { named, filter } = &operation.target else { continue };
        match (named.attribute.name, filter) {
            ("displayName", _) => match (&operation.value, operation.kind) {
                (Value::String(name), Kind::Add | Kind::Replace) => change.display_name = Some(name.clone()),
                _ => return Err(Error::value("`displayName` is a text and stays")),
            },
            ("externalId", _) => match (&operation.value, operation.kind) {
                (Value::String(id), Kind::Add | Kind::Replace) => change.external_id = Some(id.clone()),
                (_, Kind::Remove) | (Value::Null, _) => change.external_id = Some(String::new()),
                _ => return Err(Error::value("`externalId` is a text")),
            },
            ("members", Some(filter)) => {
                let ids =
                    match filter.equalities().filter(|wanted| wanted.len() == 1).and_then(|mut w| w.remove("value")) {
                        Some(id) => member_ids(&id)?,
                        None => {
                            change.depends = true;
                            let now = present();
                            now.into_iter().filter(|(_, member)| filter.element(member)).map(|(id, _)| id).collect()
                        }
                    };
                match operation.kind {
                    Kind::Remove => change.take_out(ids),
                    _ => return Err(Error::bad("mutability", "members are added and removed, not changed")),
                }
            }
            ("members", None) => match operation.kind {
                Kind::Add => change.put_in(member_ids(&operation.value)?),
                Kind::Remove if operation.value.is_null() || operation.value == json!([]) => change.replace(Vec::new()),
                Kind::Remove => change.take_out(member_ids(&operation.value)?),
                Kind::Replace => change.replace(member_ids(&operation.value)?),
            },
            _ => {}
        }
    }
    Ok(change)
}

impl GroupChange {
    fn put_in(&mut self, ids: Vec<Id>) {
        for id in ids {
            self.remove.remove(&id);
            self.add.insert(id);
        }
    }

    fn take_out(&mut self, ids: Vec<Id>) {
        for id in ids {
            self.add.remove(&id);
            if let Some(members) = &mut self.members {
                members.remove(&id);
            }
            self.remove.insert(id);
        }
    }

    fn replace(&mut self, ids: Vec<Id>) {
        self.members = Some(ids.into_iter().collect());
        self.add.clear();
        self.remove.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::super::resource::user_fields;
    use super::*;

    fn user() -> Value {
        json!({
            "userName": "anna", "active": true, "name": { "givenName": "Anna", "familyName": "A" },
            "emails": [{ "type": "work", "value": "old@x" }, { "type": "home", "value": "h@x" }],
        })
    }

    fn patched(operations: Value) -> Result<Value, Error> {
        let mut user = user();
        apply_to_user(&mut user, &parse(json!({ "schemas": [], "Operations": operations }), Resource::User)?)?;
        Ok(user)
    }

    #[test]
    fn a_user_is_disabled_in_every_dialect() {
        for operations in [
            json!([{ "op": "replace", "value": { "active": false } }]),
            json!([{ "op": "Replace", "path": "active", "value": "False" }]),
            json!([{ "op": "replace", "path": "active", "value": false }]),
            json!([{ "op": "Add", "path": "ACTIVE", "value": "false" }]),
            json!([{ "OP": "replace", "Path": "urn:ietf:params:scim:schemas:core:2.0:User:active", "Value": false }]),
            json!([{ "op": "replace", "path": null, "value": { "id": "9-9", "Active": "False" } }]),
        ] {
            let fields = user_fields(patched(operations.clone()).unwrap(), true).unwrap();
            assert!(!fields.active, "{operations}");
            assert_eq!(fields.user_name, "anna");
        }
    }

    #[test]
    fn paths_reach_what_they_name() {
        let enterprise = "urn:ietf:params:scim:schemas:extension:enterprise:2.0:User";
        for (operations, pointer, expected) in [
            (json!([{ "op": "replace", "path": "name.givenName", "value": "B" }]), "/name/givenName", json!("B")),
            (json!([{ "op": "replace", "value": { "name.givenName": "B" } }]), "/name/givenName", json!("B")),
            (
                json!([{ "op": "replace", "value": { "name": { "GivenName": "B" } } }]),
                "/name",
                json!({ "givenName": "B", "familyName": "A" }),
            ),
            (
                json!([{ "op": "replace", "path": "emails[type eq \"work\"].value", "value": "n@x" }]),
                "/emails/0/value",
                json!("n@x"),
            ),
            (
                json!([{ "op": "Add", "path": "emails[type eq \"other\"].value", "value": "o@x" }]),
                "/emails/2",
                json!({ "type": "other", "value": "o@x" }),
            ),
            (
                json!([{ "op": "add", "path": "phoneNumbers[type eq \"mobile\"].value", "value": "1" }]),
                "/phoneNumbers/0",
                json!({ "type": "mobile", "value": "1" }),
            ),
            (
                json!([{ "op": "remove", "path": "emails[type eq \"work\"]" }]),
                "/emails",
                json!([{ "type": "home", "value": "h@x" }]),
            ),
            (json!([{ "op": "remove", "path": "emails" }]), "/emails", Value::Null),
            (json!([{ "op": "remove", "path": "name.familyName" }]), "/name", json!({ "givenName": "Anna" })),
            (
                json!([{ "op": "add", "path": "emails", "value": [{ "value": "z@x" }] }]),
                "/emails/2",
                json!({ "value": "z@x" }),
            ),
            (json!([{ "op": "add", "path": "emails", "value": [{ "value": "h@x" }] }]), "/emails/2", Value::Null),
            (
                json!([{ "op": "replace", "path": "emails", "value": [{ "value": "z@x" }] }]),
                "/emails",
                json!([{ "value": "z@x" }]),
            ),
            (
                json!([{ "op": "add", "path": format!("{enterprise}:department"), "value": "R" }]),
                "/urn:ietf:params:scim:schemas:extension:enterprise:2.0:User/department",
                json!("R"),
            ),
            (
                json!([{ "op": "add", "path": format!("{enterprise}:manager"), "value": "1-4" }]),
                "/urn:ietf:params:scim:schemas:extension:enterprise:2.0:User/manager",
                json!("1-4"),
            ),
            (
                json!([{ "op": "add", "value": { enterprise: { "Division": "D" } } }]),
                "/urn:ietf:params:scim:schemas:extension:enterprise:2.0:User/division",
                json!("D"),
            ),
            (
                json!([{ "op": "add", "path": "title", "value": "x" }, { "op": "replace", "path": "title", "value": "y" }]),
                "/title",
                json!("y"),
            ),
            (json!([{ "op": "replace", "path": "id", "value": "9-9" }]), "/id", Value::Null),
            (json!([{ "op": "replace", "path": "groups", "value": [{ "value": "1-1" }] }]), "/groups", Value::Null),
        ] {
            let patched = patched(operations.clone()).unwrap_or_else(|error| panic!("{operations}: {error:?}"));
            assert_eq!(patched.pointer(pointer).cloned().unwrap_or_default(), expected, "{operations}");
        }
    }

    #[test]
    fn what_is_no_patch_is_refused() {
        for (body, scim_type) in [
            (json!([]), "invalidSyntax"),
            (json!({}), "invalidSyntax"),
            (json!({ "Operations": [] }), "invalidSyntax"),
            (json!({ "Operations": [{ "op": "move", "path": "title" }] }), "invalidSyntax"),
            (json!({ "Operations": [{ "op": "remove" }] }), "noTarget"),
            (json!({ "Operations": [{ "op": "replace", "value": "x" }] }), "invalidValue"),
            (json!({ "Operations": [{ "op": "replace", "path": "colour", "value": "x" }] }), "invalidPath"),
            (json!({ "Operations": [{ "op": "replace", "path": "a[", "value": "x" }] }), "invalidPath"),
            (json!({ "Operations": [{ "op": "replace", "path": "emails[type eq", "value": "x" }] }), "invalidFilter"),
            (
                json!({ "Operations": [{ "op": "replace", "path": "emails[type eq \"x\"].colour", "value": "x" }] }),
                "invalidPath",
            ),
            (json!({ "Operations": [{ "op": "replace", "path": 7, "value": "x" }] }), "invalidPath"),
        ] {
            assert_eq!(parse(body.clone(), Resource::User).unwrap_err().scim_type, Some(scim_type), "{body}");
        }
    }

    #[test]
    fn members_are_added_and_removed_in_every_dialect() {
        let id = |seq| Id::new(1, seq);
        let change = |operations: Value| {
            let operations = parse(json!({ "Operations": operations }), Resource::Group).unwrap();
            let present = || vec![(id(8), json!({ "value": "1-8", "display": "eve" }))];
            group_change(&operations, present).unwrap()
        };
        let sets = |change: &GroupChange| {
            (
                change.add.iter().map(|id| id.seq).collect::<Vec<_>>(),
                change.remove.iter().map(|id| id.seq).collect::<Vec<_>>(),
            )
        };
        for (operations, add, remove) in [
            (
                json!([{ "op": "add", "path": "members", "value": [{ "value": "1-2" }, { "value": "1-3" }] }]),
                vec![2, 3],
                vec![],
            ),
            (json!([{ "op": "Add", "path": "members", "value": { "value": "1-2" } }]), vec![2], vec![]),
            (json!([{ "op": "add", "value": { "members": [{ "value": "1-2" }] } }]), vec![2], vec![]),
            (json!([{ "op": "remove", "path": "members[value eq \"1-2\"]" }]), vec![], vec![2]),
            (json!([{ "op": "Remove", "path": "members", "value": [{ "value": "1-2" }] }]), vec![], vec![2]),
            (json!([{ "op": "remove", "path": "members[display eq \"Eve\"]" }]), vec![], vec![8]),
            (
                json!([{ "op": "add", "path": "members", "value": [{ "value": "1-2" }] },
                { "op": "remove", "path": "members[value eq \"1-2\"]" }]),
                vec![],
                vec![2],
            ),
            (
                json!([{ "op": "remove", "path": "members[value eq \"1-2\"]" },
                { "op": "add", "path": "members", "value": [{ "value": "1-2" }] }]),
                vec![2],
                vec![],
            ),
        ] {
            let change = change(operations.clone());
            assert_eq!(sets(&change), (add, remove), "{operations}");
            assert_eq!(change.members, None, "{operations}");
        }
        let replaced = change(json!([
            { "op": "add", "path": "members", "value": [{ "value": "1-9" }] },
            { "op": "replace", "path": "members", "value": [{ "value": "1-2" }, { "value": "1-3" }] },
            { "op": "remove", "path": "members[value eq \"1-3\"]" },
            { "op": "replace", "value": { "id": "1-77", "displayName": "new" } },
        ]));
        assert_eq!(replaced.members, Some(BTreeSet::from([id(2)])));
        assert_eq!(sets(&replaced), (vec![], vec![3]));
        assert_eq!(replaced.display_name.as_deref(), Some("new"));
        assert_eq!(change(json!([{ "op": "remove", "path": "members" }])).members, Some(BTreeSet::new()));
        assert!(change(json!([{ "op": "remove", "path": "members[display eq \"Eve\"]" }])).depends);
    }
}
