//! The attributes that users and groups have, by the names that the RFC gives them.
//!
//! **Source** RFC 7643, sections 4 and 8.7.

/// Schema of users.
pub(super) const USER: &str = "urn:ietf:params:scim:schemas:core:2.0:User";
/// Schema of groups.
pub(super) const GROUP: &str = "urn:ietf:params:scim:schemas:core:2.0:Group";
/// Schema of the enterprise extension of users.
pub(super) const ENTERPRISE: &str = "urn:ietf:params:scim:schemas:extension:enterprise:2.0:User";

/// What kind of object a request is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Resource {
    /// A person.
    User,
    /// A group.
    Group,
}

/// What a value looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// One string.
    Text,
    /// True or false.
    Flag,
    /// One object.
    Complex,
    /// A list of objects.
    Many,
}

/// An attribute.
#[derive(Debug)]
pub(super) struct Attribute {
    /// Its name.
    pub name: &'static str,
    /// Its form.
    pub form: Form,
    /// Letters' case counts when it is compared.
    pub case_exact: bool,
    /// Sub-attributes.
    pub subs: &'static [&'static str],
    /// The caller cannot set it.
    pub read_only: bool,
}

const fn text(name: &'static str) -> Attribute {
    Attribute { name, form: Form::Text, case_exact: false, subs: &[], read_only: false }
}

const fn many(name: &'static str) -> Attribute {
    const SUBS: &[&str] = &["value", "display", "type", "primary", "$ref"];
    Attribute { name, form: Form::Many, case_exact: false, subs: SUBS, read_only: false }
}

const ID: Attribute = Attribute { case_exact: true, read_only: true, ..text("id") };
const EXTERNAL_ID: Attribute = Attribute { case_exact: true, ..text("externalId") };
const SCHEMAS: Attribute = Attribute { case_exact: true, read_only: true, ..text("schemas") };
const META: Attribute = Attribute {
    name: "meta",
    form: Form::Complex,
    case_exact: true,
    subs: &["resourceType", "created", "lastModified", "location", "version"],
    read_only: true,
};
const NAME: Attribute = Attribute {
    name: "name",
    form: Form::Complex,
    case_exact: false,
    subs: &["formatted", "familyName", "givenName", "middleName", "honorificPrefix", "honorificSuffix"],
    read_only: false,
};
const ADDRESSES: Attribute = Attribute {
    name: "addresses",
    form: Form::Many,
    case_exact: false,
    subs: &["formatted", "streetAddress", "locality", "region", "postalCode", "country", "type", "primary"],
    read_only: false,
};
const MANAGER: Attribute = Attribute {
    name: "manager",
    form: Form::Complex,
    case_exact: false,
    subs: &["value", "$ref", "displayName"],
    read_only: false,
};

static USER_ATTRIBUTES: &[Attribute] = &[
    ID,
    EXTERNAL_ID,
    SCHEMAS,
    META,
    text("userName"),
    text("displayName"),
    Attribute { form: Form::Flag, ..text("active") },
    NAME,
    text("nickName"),
    text("profileUrl"),
    text("title"),
    text("userType"),
    text("preferredLanguage"),
    text("locale"),
    text("timezone"),
    many("emails"),
    many("phoneNumbers"),
    many("ims"),
    many("photos"),
    many("entitlements"),
    many("roles"),
    many("x509Certificates"),
    ADDRESSES,
    Attribute { case_exact: true, read_only: true, ..many("groups") },
];

static GROUP_ATTRIBUTES: &[Attribute] =
    &[ID, EXTERNAL_ID, SCHEMAS, META, text("displayName"), Attribute { case_exact: true, ..many("members") }];

static ENTERPRISE_ATTRIBUTES: &[Attribute] =
    &[text("employeeNumber"), text("costCenter"), text("organization"), text("division"), text("department"), MANAGER];

/// An attribute, or a part of one, that a caller named.
#[derive(Clone, Copy, Debug)]
pub(super) struct Named {
    /// It is in the enterprise extension.
    pub enterprise: bool,
    /// The attribute.
    pub attribute: &'static Attribute,
    /// The sub-attribute.
    pub sub: Option<&'static str>,
}

impl Resource {
    /// The schema's name.
    pub fn schema(self) -> &'static str {
        match self {
            Self::User => USER,
            Self::Group => GROUP,
        }
    }

    /// Its core attributes.
    pub fn attributes(self) -> &'static [Attribute] {
        match self {
            Self::User => USER_ATTRIBUTES,
            Self::Group => GROUP_ATTRIBUTES,
        }
    }

    /// The attribute that `userName`, `name.givenName`, `urn:...:User:department` mean, without regard to case.
    pub fn named(self, path: &str) -> Option<Named> {
        if let Some(rest) = strip_schema(path, ENTERPRISE).filter(|_| self == Self::User) {
            return find(ENTERPRISE_ATTRIBUTES, rest, true);
        }
        find(self.attributes(), strip_schema(path, self.schema()).unwrap_or(path), false)
    }
}

/// Attributes of the enterprise extension.
pub(super) fn enterprise() -> &'static [Attribute] {
    ENTERPRISE_ATTRIBUTES
}

fn strip_schema<'a>(path: &'a str, schema: &str) -> Option<&'a str> {
    let (head, rest) = (path.get(..schema.len())?, path.get(schema.len()..)?);
    if head.eq_ignore_ascii_case(schema) { rest.strip_prefix(':') } else { None }
}

fn find(attributes: &'static [Attribute], path: &str, enterprise: bool) -> Option<Named> {
    let (name, sub) = match path.split_once('.') {
        Some((name, sub)) => (name, Some(sub)),
        None => (path, None),
    };
    let attribute = attributes.iter().find(|attribute| attribute.name.eq_ignore_ascii_case(name))?;
    let sub = match sub {
        Some(sub) => Some(attribute.sub(sub)?),
        None => None,
    };
    Some(Named { enterprise, attribute, sub })
}

impl Attribute {
    /// The sub-attribute that a caller named, without regard to case.
    pub fn sub(&self, name: &str) -> Option<&'static str> {
        self.subs.iter().find(|sub| sub.eq_ignore_ascii_case(name)).copied()
    }
}
