//! Users and groups as JSON, and back.

use selvedge_domain::command::UserFields;
use selvedge_domain::rows::{Group, Members, User};
use selvedge_domain::state::IndexKey;
use selvedge_domain::{Id, State};
use serde_json::{Map, Value, json};

use super::attributes::{Attribute, ENTERPRISE, Form, Resource, enterprise};
use super::error::Error;

/// A user as the directory sees it.
pub(super) fn user_json(state: &State, user: &User, base: &str) -> Value {
    let mut object: Map<String, Value> = serde_json::from_str(&user.attributes).unwrap_or_default();
    let mut schemas = vec![Resource::User.schema()];
    if object.contains_key(ENTERPRISE) {
        schemas.push(ENTERPRISE);
    }
    object.insert("schemas".to_owned(), json!(schemas));
    object.insert("id".to_owned(), user.id().to_string().into());
    object.insert("userName".to_owned(), user.user_name.clone().into());
    object.insert("active".to_owned(), user.active.into());
    put_text(&mut object, "externalId", &user.external_id);
    put_text(&mut object, "displayName", &user.display_name);
    let group = |group: Group| {
        let id = group.id().to_string();
        json!({ "value": id, "display": group.display_name, "type": "direct", "$ref": format!("{base}/Groups/{id}") })
    };
    let groups: Vec<Value> = state.groups_of(user).map(group).collect();
    if !groups.is_empty() {
        object.insert("groups".to_owned(), groups.into());
    }
    let location = format!("{base}/Users/{}", user.id());
    object.insert("meta".to_owned(), meta("User", user.created_ms, user.modified_ms, user.version, &location));
    Value::Object(object)
}

/// A group as the directory sees it; its members only when they are wanted.
pub(super) fn group_json(state: &State, group: &Group, base: &str, with_members: bool) -> Value {
    let mut object = Map::new();
    object.insert("schemas".to_owned(), json!([Resource::Group.schema()]));
    object.insert("id".to_owned(), group.id().to_string().into());
    object.insert("displayName".to_owned(), group.display_name.clone().into());
    put_text(&mut object, "externalId", &group.external_id);
    if with_members {
        let members: Vec<Value> = members(state, group).map(|user| member(&user, base)).collect();
        object.insert("members".to_owned(), members.into());
    }
    let location = format!("{base}/Groups/{}", group.id());
    object.insert("meta".to_owned(), meta("Group", group.created_ms, group.modified_ms, group.version, &location));
    Value::Object(object)
}

/// Those who are in a group.
pub(super) fn members<'a>(state: &'a State, group: &Group) -> impl Iterator<Item = User> + use<'a> {
    let chunks: Vec<Members> = state.rows_under::<Members>(&group.number.to_be_bytes()).collect();
    let numbers = chunks.into_iter().flat_map(|chunk| chunk.users);
    numbers.filter_map(|number| state.find::<User>(IndexKey::Number(number)))
}

/// One of a group's members.
pub(super) fn member(user: &User, base: &str) -> Value {
    let id = user.id().to_string();
    let display = if user.display_name.is_empty() { &user.user_name } else { &user.display_name };
    json!({ "value": id, "display": display, "type": "User", "$ref": format!("{base}/Users/{id}") })
}

fn put_text(object: &mut Map<String, Value>, name: &str, text: &str) {
    if !text.is_empty() {
        object.insert(name.to_owned(), text.into());
    }
}

fn meta(kind: &str, created_ms: u64, modified_ms: u64, version: u64, location: &str) -> Value {
    json!({
        "resourceType": kind,
        "created": timestamp(created_ms),
        "lastModified": timestamp(modified_ms),
        "version": etag(version),
        "location": location,
    })
}

/// A version as an ETag.
pub(super) fn etag(version: u64) -> String {
    format!("W/\"{version}\"")
}

fn timestamp(ms: u64) -> String {
    let at = i64::try_from(ms).ok().and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok()).unwrap_or_default();
    format!("{at:.3}")
}

/// What a body says of a user. What only we say (`id`, `meta`, `schemas`, `groups`) and passwords are passed over;
/// attributes that are not known are too, but not those of other extensions.
///
/// **Errors** `invalidValue`, `invalidSyntax`.
pub(super) fn user_fields(body: Value, active_otherwise: bool) -> Result<UserFields, Error> {
    let mut object = known(body, Resource::User)?;
    let user_name = take_text(&mut object, "userName")?;
    if user_name.trim().is_empty() {
        return Err(Error::value("`userName` is needed"));
    }
    let external_id = take_text(&mut object, "externalId")?;
    let display_name = take_text(&mut object, "displayName")?;
    let active = match object.remove("active") {
        None => active_otherwise,
        Some(value) => flag(&value).ok_or_else(|| Error::value("`active` is true or false"))?,
    };
    let attributes = Value::Object(object).to_string();
    Ok(UserFields { user_name, external_id, display_name, active, attributes })
}

/// What a body says of a group.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct GroupBody {
    /// `displayName`.
    pub display_name: String,
    /// `externalId`, or empty.
    pub external_id: String,
    /// Members, when the body has any list of them.
    pub members: Option<Vec<Id>>,
}

/// What a body says of a group.
///
/// **Errors** `invalidValue`, `invalidSyntax`.
pub(super) fn group_fields(body: Value) -> Result<GroupBody, Error> {
    let mut object = known(body, Resource::Group)?;
    let display_name = take_text(&mut object, "displayName")?;
    if display_name.trim().is_empty() {
        return Err(Error::value("`displayName` is needed"));
    }
    let external_id = take_text(&mut object, "externalId")?;
    let members = object.remove("members").map(|members| member_ids(&members)).transpose()?;
    Ok(GroupBody { display_name, external_id, members })
}

/// The ids in `[{"value": "1-2"}, ...]`; a single object and bare strings are taken too.
pub(super) fn member_ids(members: &Value) -> Result<Vec<Id>, Error> {
    let elements = match members {
        Value::Array(elements) => elements.as_slice(),
        Value::Null => &[],
        one => std::slice::from_ref(one),
    };
    let parse = |element: &Value| {
        let id = match element {
            Value::Object(object) => object.iter().find(|(key, _)| key.eq_ignore_ascii_case("value")).map(|(_, id)| id),
            other => Some(other),
        };
        let id = id.and_then(Value::as_str);
        let id = id.ok_or_else(|| Error::value("a member is an object with the id of a user as `value`"))?;
        let clipped = || id.chars().take(64).collect::<String>();
        id.parse().map_err(|_| Error::value(format!("member `{}` is not a user", clipped())))
    };
    elements.iter().map(parse).collect()
}

/// `true`, `false`, or what Entra ID writes instead.
pub(super) fn flag(value: &Value) -> Option<bool> {
    match value {
        Value::Bool(flag) => Some(*flag),
        Value::String(text) => text.to_ascii_lowercase().parse().ok(),
        _ => None,
    }
}

/// The attributes of a body by the names that the RFC gives them, without what only we say.
fn known(body: Value, resource: Resource) -> Result<Map<String, Value>, Error> {
    let Value::Object(object) = body else { return Err(Error::syntax("the body is not a JSON object")) };
    let mut known = Map::new();
    for (key, value) in object {
        let (key, value) = if key.eq_ignore_ascii_case(ENTERPRISE) && resource == Resource::User {
            let Value::Object(fields) = value else { continue };
            let mut extension = Map::new();
            for (key, value) in fields {
                if let Some(attribute) = enterprise().iter().find(|a| a.name.eq_ignore_ascii_case(&key)) {
                    put(&mut extension, attribute.name.to_owned(), form(attribute, value)?)?;
                }
            }
            (ENTERPRISE.to_owned(), (!extension.is_empty()).then_some(Value::Object(extension)))
        } else if let Some(attribute) = resource.attributes().iter().find(|a| a.name.eq_ignore_ascii_case(&key)) {
            if attribute.read_only {
                continue;
            }
            (attribute.name.to_owned(), form(attribute, value)?)
        } else if key.get(..4).is_some_and(|head| head.eq_ignore_ascii_case("urn:")) && value.is_object() {
            (key, Some(value))
        } else {
            continue;
        };
        put(&mut known, key, value)?;
    }
    Ok(known)
}

fn put(object: &mut Map<String, Value>, key: String, value: Option<Value>) -> Result<(), Error> {
    let Some(value) = value else { return Ok(()) };
    if object.contains_key(&key) {
        return Err(Error::syntax(format!("`{key}` is there twice")));
    }
    object.insert(key, value);
    Ok(())
}

/// A value in the form of its attribute; none when it is unassigned.
fn form(attribute: &Attribute, value: Value) -> Result<Option<Value>, Error> {
    let wrong = |what: &str| Error::value(format!("`{}` is {what}", attribute.name));
    match (attribute.form, value) {
        (_, Value::Null) => Ok(None),
        (Form::Text, Value::String(text)) => Ok(Some(text.into())),
        (Form::Text, _) => Err(wrong("a text")),
        (Form::Flag, value) => flag(&value).map(|flag| Some(flag.into())).ok_or_else(|| wrong("true or false")),
        (Form::Complex, Value::Object(fields)) => Ok(subs(attribute, fields).filter(|object| object != &json!({}))),
        // `manager` as a bare id is seen too.
        (Form::Complex, Value::String(text)) if attribute.subs.contains(&"value") => Ok(Some(json!({ "value": text }))),
        (Form::Complex, _) => Err(wrong("an object")),
        (Form::Many, Value::Array(elements)) => {
            let elements = elements.into_iter().filter_map(|element| match element {
                Value::Object(fields) => subs(attribute, fields),
                Value::Null => None,
                other => Some(json!({ "value": other })),
            });
            let elements: Vec<_> = elements.collect();
            Ok((!elements.is_empty()).then_some(elements.into()))
        }
        (Form::Many, Value::Object(fields)) => Ok(subs(attribute, fields).map(|one| json!([one]))),
        (Form::Many, _) => Err(wrong("a list")),
    }
}

/// Sub-attributes by the names that the RFC gives them.
fn subs(attribute: &Attribute, fields: Map<String, Value>) -> Option<Value> {
    let mut object = Map::new();
    for (key, value) in fields {
        let Some(name) = attribute.sub(&key).filter(|_| !value.is_null()) else { continue };
        let value = if name == "primary" { flag(&value).map_or(value, Value::Bool) } else { value };
        object.insert(name.to_owned(), value);
    }
    Some(Value::Object(object))
}

fn take_text(object: &mut Map<String, Value>, name: &str) -> Result<String, Error> {
    match object.remove(name) {
        None => Ok(String::new()),
        Some(Value::String(text)) => Ok(text),
        Some(_) => Err(Error::value(format!("`{name}` is a text"))),
    }
}

/// Which attributes an answer has.
#[derive(Clone, Debug, Default)]
pub(super) struct Projection {
    only: Option<Vec<String>>,
    without: Vec<String>,
}

impl Projection {
    /// From `attributes` and `excludedAttributes`.
    pub fn new(only: Option<&str>, without: Option<&str>) -> Self {
        let names = |text: &str| -> Vec<String> {
            text.split(',').map(|name| name.trim().to_lowercase()).filter(|name| !name.is_empty()).collect()
        };
        Self {
            only: only.map(names).filter(|names| !names.is_empty()),
            without: without.map(names).unwrap_or_default(),
        }
    }

    /// Whether an attribute is in the answer at all.
    pub fn takes(&self, attribute: &str) -> bool {
        let attribute = attribute.to_lowercase();
        let names = |list: &[String]| list.iter().any(|name| name == &attribute || top(name) == attribute);
        match &self.only {
            Some(only) => names(only),
            None => !self.without.contains(&attribute),
        }
    }

    /// Leaves out what is not wanted. `id` and `schemas` always stay.
    pub fn project(&self, resource: Value, kind: Resource) -> Value {
        let Value::Object(object) = resource else { return resource };
        let mut kept = Map::new();
        for (key, value) in object {
            if matches!(key.as_str(), "id" | "schemas") {
                kept.insert(key, value);
                continue;
            }
            let lower = key.to_lowercase();
            let wanted = |list: &[String]| -> Vec<Option<String>> {
                list.iter().filter_map(|name| part_of(name, &lower, kind)).collect()
            };
            if let Some(only) = &self.only {
                let parts = wanted(only);
                if parts.iter().any(Option::is_none) {
                    kept.insert(key, value);
                } else if !parts.is_empty() {
                    let parts: Vec<String> = parts.into_iter().flatten().collect();
                    kept.insert(key, filter_subs(value, &|sub| parts.contains(&sub.to_lowercase())));
                }
                continue;
            }
            let parts = wanted(&self.without);
            if !parts.iter().any(Option::is_none) {
                let parts: Vec<String> = parts.into_iter().flatten().collect();
                kept.insert(key, filter_subs(value, &|sub| !parts.contains(&sub.to_lowercase())));
            }
        }
        Value::Object(kept)
    }
}

/// Of `name.givenName` the part `givenName` when the key is `name`; nothing for the whole.
fn part_of(name: &str, key: &str, kind: Resource) -> Option<Option<String>> {
    let schema = format!("{}:", kind.schema().to_lowercase());
    let name = name.strip_prefix(&schema).unwrap_or(name);
    if name == key {
        return Some(None);
    }
    let rest = name.strip_prefix(key)?;
    let part = rest.strip_prefix(['.', ':'])?;
    Some(Some(top(part).to_owned()))
}

fn top(name: &str) -> &str {
    if name.starts_with("urn:") { name } else { name.split('.').next().unwrap_or(name) }
}

fn filter_subs(value: Value, keep: &impl Fn(&str) -> bool) -> Value {
    match value {
        Value::Object(object) => Value::Object(object.into_iter().filter(|(key, _)| keep(key)).collect()),
        Value::Array(elements) => elements.into_iter().map(|element| filter_subs(element, keep)).collect(),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_only_we_say_is_not_taken_from_a_body() {
        let fields = user_fields(
            json!({
                "schemas": ["urn:evil"], "id": "9-9", "meta": { "version": "W/\"99\"" }, "groups": [{ "value": "1-1" }],
                "password": "secret", "isAdmin": true, "USERNAME": "anna", "Active": "False",
                "Emails": [{ "Value": "a@b", "Primary": "True", "evil": 1 }], "name": { "givenname": "Anna" },
                "title": null, ENTERPRISE: { "Department": "R&D", "manager": "1-4" },
            }),
            true,
        )
        .unwrap();
        assert_eq!((fields.user_name.as_str(), fields.active), ("anna", false));
        let attributes: Value = serde_json::from_str(&fields.attributes).unwrap();
        assert_eq!(
            attributes,
            json!({
                "emails": [{ "value": "a@b", "primary": true }], "name": { "givenName": "Anna" },
                ENTERPRISE: { "department": "R&D", "manager": { "value": "1-4" } },
            })
        );
    }

    #[test]
    fn bodies_of_the_wrong_shape_are_refused() {
        for (body, scim_type) in [
            (json!([]), "invalidSyntax"),
            (json!({}), "invalidValue"),
            (json!({ "userName": 7 }), "invalidValue"),
            (json!({ "userName": "" }), "invalidValue"),
            (json!({ "userName": "a", "active": "maybe" }), "invalidValue"),
            (json!({ "userName": "a", "active": 1 }), "invalidValue"),
            (json!({ "userName": "a", "emails": "x" }), "invalidValue"),
            (json!({ "userName": "a", "USERNAME": "b" }), "invalidSyntax"),
        ] {
            assert_eq!(user_fields(body.clone(), true).unwrap_err().scim_type, Some(scim_type), "{body}");
        }
        assert!(group_fields(json!({ "displayName": "x", "members": [{ "value": "nobody" }] })).is_err());
        assert!(group_fields(json!({ "displayName": "x", "members": [{}] })).is_err());
    }

    #[test]
    fn an_answer_has_the_attributes_that_were_asked_for() {
        let resource = json!({
            "schemas": [], "id": "1-1", "userName": "a", "name": { "givenName": "A", "familyName": "B" },
            "emails": [{ "value": "x", "type": "work" }], "meta": {}, ENTERPRISE: { "department": "d" },
        });
        let project = |only, without| Projection::new(only, without).project(resource.clone(), Resource::User);
        assert_eq!(project(Some("userName"), None), json!({ "schemas": [], "id": "1-1", "userName": "a" }));
        assert_eq!(
            project(Some("USERNAME, name.givenName, emails.value"), None),
            json!({ "schemas": [], "id": "1-1", "userName": "a", "name": { "givenName": "A" }, "emails": [{ "value": "x" }] })
        );
        assert_eq!(
            project(Some("urn:ietf:params:scim:schemas:extension:enterprise:2.0:User:department"), None)[ENTERPRISE],
            json!({ "department": "d" })
        );
        let without = project(None, Some("emails,name.familyName,id"));
        assert_eq!(without["id"], "1-1");
        assert_eq!(without["name"], json!({ "givenName": "A" }));
        assert!(without.get("emails").is_none() && without.get("userName").is_some());
        assert!(!Projection::new(None, Some("members")).takes("members"));
        assert!(!Projection::new(Some("displayName"), None).takes("members"));
        assert!(Projection::new(Some("members.value"), None).takes("members"));
    }
}
