//! What this server can do.
//!
//! **Source** RFC 7643, sections 5 to 7.

use serde_json::{Value, json};

use super::attributes::{Attribute, ENTERPRISE, Form, GROUP, Resource, USER, enterprise};
use super::{COUNT_MAX, list};

/// `ServiceProviderConfig`.
pub(super) fn config(base: &str) -> Value {
    json!({
        "schemas": ["urn:ietf:params:scim:schemas:core:2.0:ServiceProviderConfig"],
        "patch": { "supported": true },
        "bulk": { "supported": false, "maxOperations": 0, "maxPayloadSize": 0 },
        "filter": { "supported": true, "maxResults": COUNT_MAX },
        "changePassword": { "supported": false },
        "sort": { "supported": false },
        "etag": { "supported": true },
        "authenticationSchemes": [{
            "type": "oauthbearertoken", "name": "Bearer token", "primary": true,
            "description": "The directory's token, shown once when the directory was made",
        }],
        "meta": { "resourceType": "ServiceProviderConfig", "location": format!("{base}/ServiceProviderConfig") },
    })
}

/// All resource types.
pub(super) fn resource_types(base: &str) -> Value {
    list(["User", "Group"].map(|id| resource_type(id, base).unwrap_or_default()).to_vec(), 2, 1)
}

/// One resource type.
pub(super) fn resource_type(id: &str, base: &str) -> Option<Value> {
    let (endpoint, schema, extensions) = match id {
        "User" => ("/Users", USER, json!([{ "schema": ENTERPRISE, "required": false }])),
        "Group" => ("/Groups", GROUP, json!([])),
        _ => return None,
    };
    Some(json!({
        "schemas": ["urn:ietf:params:scim:schemas:core:2.0:ResourceType"],
        "id": id, "name": id, "endpoint": endpoint, "schema": schema, "schemaExtensions": extensions,
        "meta": { "resourceType": "ResourceType", "location": format!("{base}/ResourceTypes/{id}") },
    }))
}

/// All schemas.
pub(super) fn schemas(base: &str) -> Value {
    let all = [USER, GROUP, ENTERPRISE].map(|id| schema(id, base).unwrap_or_default());
    list(all.to_vec(), 3, 1)
}

/// One schema.
pub(super) fn schema(id: &str, base: &str) -> Option<Value> {
    let (id, name, attributes) = [
        (USER, "User", Resource::User.attributes()),
        (GROUP, "Group", Resource::Group.attributes()),
        (ENTERPRISE, "EnterpriseUser", enterprise()),
    ]
    .into_iter()
    .find(|(known, ..)| known.eq_ignore_ascii_case(id))?;
    let required =
        |attribute: &Attribute| matches!((name, attribute.name), ("User", "userName") | ("Group", "displayName"));
    // Common attributes stand in no schema.
    let own = attributes.iter().filter(|attribute| !matches!(attribute.name, "id" | "externalId" | "meta" | "schemas"));
    Some(json!({
        "schemas": ["urn:ietf:params:scim:schemas:core:2.0:Schema"],
        "id": id, "name": name, "description": name,
        "attributes": own.map(|attribute| described(attribute, required(attribute))).collect::<Vec<_>>(),
        "meta": { "resourceType": "Schema", "location": format!("{base}/Schemas/{id}") },
    }))
}

fn described(attribute: &Attribute, required: bool) -> Value {
    let mutability = if attribute.read_only { "readOnly" } else { "readWrite" };
    let mut described = json!({
        "name": attribute.name,
        "type": match attribute.form {
            Form::Text => "string",
            Form::Flag => "boolean",
            Form::Complex | Form::Many => "complex",
        },
        "multiValued": attribute.form == Form::Many,
        "description": attribute.name,
        "required": required,
        "caseExact": attribute.case_exact,
        "mutability": mutability,
        "returned": "default",
        "uniqueness": if attribute.name == "userName" || (required && attribute.name == "displayName") { "server" } else { "none" },
    });
    if !attribute.subs.is_empty() {
        let sub = |name: &&str| {
            json!({
                "name": name,
                "type": match *name {
                    "primary" => "boolean",
                    "$ref" => "reference",
                    _ => "string",
                },
                "multiValued": false, "description": name, "required": false, "caseExact": false,
                "mutability": mutability, "returned": "default", "uniqueness": "none",
            })
        };
        described["subAttributes"] = attribute.subs.iter().map(sub).collect();
    }
    described
}
