//! Filters: parsed with bounds, then asked of a resource's JSON.
//!
//! **Source** RFC 7644, section 3.4.2.2.

use std::cmp::Ordering;

use serde_json::{Map, Value};

use super::attributes::{ENTERPRISE, Form, Named, Resource};
use super::error::Error;

/// Bytes of a filter.
pub(super) const FILTER_BYTES_MAX: usize = 4 * 1024;
/// Nested parentheses, brackets and `not`s.
pub(super) const FILTER_DEPTH_MAX: usize = 20;

/// A filter.
#[derive(Clone, Debug)]
pub(super) enum Filter {
    /// Any of them.
    Or(Vec<Filter>),
    /// All of them.
    And(Vec<Filter>),
    /// Not it.
    Not(Box<Filter>),
    /// There is a value.
    Present(Named),
    /// A value compares.
    Compare(Named, Op, Value),
    /// An element of a list satisfies all of a filter.
    Within(Named, Box<Filter>),
}

/// How values are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Op {
    /// Equal.
    Eq,
    /// Not equal.
    Ne,
    /// Contains.
    Co,
    /// Starts with.
    Sw,
    /// Ends with.
    Ew,
    /// Greater.
    Gt,
    /// Greater or equal.
    Ge,
    /// Less.
    Lt,
    /// Less or equal.
    Le,
}

impl Filter {
    /// Reads a filter.
    ///
    /// **Errors** `invalidFilter`: too long, too deep, not the grammar, an unknown attribute.
    pub fn parse(text: &str, resource: Resource) -> Result<Self, Error> {
        if text.len() > FILTER_BYTES_MAX {
            return Err(Error::filter(format!("a filter has at most {FILTER_BYTES_MAX} bytes")));
        }
        let mut parser = Parser { rest: text, resource, within: None, depth: 0 };
        let filter = parser.or()?;
        parser.space();
        if parser.rest.is_empty() { Ok(filter) } else { Err(parser.wrong("the end")) }
    }

    /// Reads what stands in the brackets of `attribute[...]`; `text` begins after the opening one. Answers the rest
    /// after the closing one too.
    pub fn parse_within(text: &str, of: Named, resource: Resource) -> Result<(Self, &str), Error> {
        if text.len() > FILTER_BYTES_MAX {
            return Err(Error::filter(format!("a filter has at most {FILTER_BYTES_MAX} bytes")));
        }
        let mut parser = Parser { rest: text, resource, within: Some(of), depth: 1 };
        let filter = parser.or()?;
        parser.expect(']')?;
        Ok((filter, parser.rest))
    }

    /// Whether a resource satisfies it.
    pub fn matches(&self, resource: &Value) -> bool {
        match self {
            Self::Or(parts) => parts.iter().any(|part| part.matches(resource)),
            Self::And(parts) => parts.iter().all(|part| part.matches(resource)),
            Self::Not(part) => !part.matches(resource),
            Self::Present(named) => values(*named, resource).iter().any(|value| is_present(value)),
            Self::Compare(named, op, wanted) => {
                let found = values(*named, resource);
                let one = |op| found.iter().any(|value| compare(value, op, wanted, *named));
                if *op == Op::Ne { !one(Op::Eq) } else { one(*op) }
            }
            Self::Within(named, filter) => match at(*named, resource) {
                Some(Value::Array(elements)) => elements.iter().any(|element| filter.element(element)),
                Some(element) => filter.element(element),
                None => false,
            },
        }
    }

    /// Whether an element of a list satisfies a filter that stood in brackets.
    pub fn element(&self, element: &Value) -> bool {
        match self {
            Self::Or(parts) => parts.iter().any(|part| part.element(element)),
            Self::And(parts) => parts.iter().all(|part| part.element(element)),
            Self::Not(part) => !part.element(element),
            Self::Present(named) => sub_value(*named, element).is_some_and(is_present),
            Self::Compare(named, op, wanted) => {
                let found = sub_value(*named, element);
                let one = |op| found.is_some_and(|value| compare(value, op, wanted, *named));
                if *op == Op::Ne { !one(Op::Eq) } else { one(*op) }
            }
            Self::Within(..) => false,
        }
    }

    /// The value that an attribute must have for any match: `attribute eq "value"`, alone or among `and`s.
    pub fn required(&self, name: &str, sub: Option<&str>) -> Option<&str> {
        match self {
            Self::Compare(named, Op::Eq, Value::String(value))
                if !named.enterprise && named.attribute.name == name && named.sub == sub =>
            {
                Some(value)
            }
            Self::And(parts) => parts.iter().find_map(|part| part.required(name, sub)),
            Self::Within(named, filter) if named.attribute.name == name => filter.required(name, sub),
            _ => None,
        }
    }

    /// The equalities that it asks for; none when it asks for anything else.
    pub fn equalities(&self) -> Option<Map<String, Value>> {
        match self {
            Self::Compare(named, Op::Eq, value) => {
                let sub = named.sub?;
                Some(Map::from_iter([(sub.to_owned(), value.clone())]))
            }
            Self::And(parts) => {
                let mut all = Map::new();
                for part in parts {
                    all.extend(part.equalities()?);
                }
                Some(all)
            }
            _ => None,
        }
    }
}

struct Parser<'t> {
    rest: &'t str,
    resource: Resource,
    within: Option<Named>,
    depth: usize,
}

impl<'t> Parser<'t> {
    fn or(&mut self) -> Result<Filter, Error> {
        let mut parts = vec![self.and()?];
        while self.word("or") {
            parts.push(self.and()?);
        }
        Ok(one_or(parts, Filter::Or))
    }

    fn and(&mut self) -> Result<Filter, Error> {
        let mut parts = vec![self.term()?];
        while self.word("and") {
            parts.push(self.term()?);
        }
        Ok(one_or(parts, Filter::And))
    }

    fn term(&mut self) -> Result<Filter, Error> {
        self.space();
        let before = self.rest;
        if self.word("not") {
            self.space();
            if self.rest.starts_with('(') {
                return Ok(Filter::Not(Box::new(self.parentheses()?)));
            }
            self.rest = before;
        }
        if self.rest.starts_with('(') { self.parentheses() } else { self.expression() }
    }

    fn parentheses(&mut self) -> Result<Filter, Error> {
        self.deeper()?;
        self.expect('(')?;
        let inner = self.or()?;
        self.expect(')')?;
        self.depth -= 1;
        Ok(inner)
    }

    fn expression(&mut self) -> Result<Filter, Error> {
        let named = self.path()?;
        if self.rest.starts_with('[') {
            if self.within.is_some() || named.sub.is_some() || named.attribute.subs.is_empty() {
                return Err(self.wrong("an operator"));
            }
            self.deeper()?;
            self.rest = &self.rest[1..];
            self.within = Some(named);
            let inner = self.or()?;
            self.within = None;
            self.expect(']')?;
            self.depth -= 1;
            return Ok(Filter::Within(named, Box::new(inner)));
        }
        self.space();
        let word = self.take_while(|c| c.is_ascii_alphabetic());
        let op = match word.to_ascii_lowercase().as_str() {
            "pr" => return Ok(Filter::Present(named)),
            "eq" => Op::Eq,
            "ne" => Op::Ne,
            "co" => Op::Co,
            "sw" => Op::Sw,
            "ew" => Op::Ew,
            "gt" => Op::Gt,
            "ge" => Op::Ge,
            "lt" => Op::Lt,
            "le" => Op::Le,
            _ => return Err(Error::filter(format!("`{}` is not an operator", clip(word)))),
        };
        let value = self.value()?;
        check(named, op, &value)?;
        Ok(Filter::Compare(named, op, value))
    }

    fn path(&mut self) -> Result<Named, Error> {
        self.space();
        let path = self.take_while(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | ':' | '_' | '-' | '$'));
        if path.is_empty() {
            return Err(self.wrong("an attribute"));
        }
        let unknown = || Error::filter(format!("`{}` is not an attribute that can be filtered by", clip(path)));
        match self.within {
            None => self.resource.named(path).ok_or_else(unknown),
            Some(of) => {
                // Some write the whole path inside the brackets too.
                let sub = path.rsplit('.').next().unwrap_or(path);
                Ok(Named { sub: Some(of.attribute.sub(sub).ok_or_else(unknown)?), ..of })
            }
        }
    }

    fn value(&mut self) -> Result<Value, Error> {
        self.space();
        let mut values = serde_json::Deserializer::from_str(self.rest).into_iter::<Value>();
        match values.next() {
            Some(Ok(value)) if !value.is_array() && !value.is_object() => {
                self.rest = &self.rest[values.byte_offset()..];
                Ok(value)
            }
            _ => {
                // Entra has been seen to write `False` without quotes.
                let before = self.rest;
                let word = self.take_while(|c| c.is_ascii_alphabetic());
                match word.to_ascii_lowercase().as_str() {
                    "true" => Ok(Value::Bool(true)),
                    "false" => Ok(Value::Bool(false)),
                    _ => {
                        self.rest = before;
                        Err(self.wrong("a quoted value, a number, `true`, `false` or `null`"))
                    }
                }
            }
        }
    }

    /// Takes a word without regard to case, when it stands alone.
    fn word(&mut self, word: &str) -> bool {
        let trimmed = self.rest.trim_start_matches([' ', '\t']);
        let alone = |c: char| c == ' ' || c == '\t' || c == '(';
        let found = trimmed.get(..word.len()).is_some_and(|head| head.eq_ignore_ascii_case(word))
            && trimmed[word.len()..].starts_with(alone);
        if found {
            self.rest = &trimmed[word.len()..];
        }
        found
    }

    fn expect(&mut self, wanted: char) -> Result<(), Error> {
        self.space();
        match self.rest.strip_prefix(wanted) {
            Some(rest) => {
                self.rest = rest;
                Ok(())
            }
            None => Err(self.wrong(&format!("`{wanted}`"))),
        }
    }

    fn deeper(&mut self) -> Result<(), Error> {
        self.depth += 1;
        if self.depth > FILTER_DEPTH_MAX {
            return Err(Error::filter(format!("a filter is nested at most {FILTER_DEPTH_MAX} deep")));
        }
        Ok(())
    }

    fn space(&mut self) {
        self.rest = self.rest.trim_start_matches([' ', '\t']);
    }

    fn take_while(&mut self, takes: impl Fn(char) -> bool) -> &'t str {
        let end = self.rest.find(|c| !takes(c)).unwrap_or(self.rest.len());
        let (taken, rest) = self.rest.split_at(end);
        self.rest = rest;
        taken
    }

    fn wrong(&self, wanted: &str) -> Error {
        let found = if self.rest.is_empty() { "the end".to_owned() } else { format!("`{}`", clip(self.rest)) };
        Error::filter(format!("found {found} where {wanted} is expected"))
    }
}

fn one_or(mut parts: Vec<Filter>, many: impl Fn(Vec<Filter>) -> Filter) -> Filter {
    if parts.len() == 1 { parts.remove(0) } else { many(parts) }
}

fn clip(text: &str) -> String {
    text.chars().take(40).collect()
}

/// What cannot be compared is an error of the caller, not a miss.
fn check(named: Named, op: Op, value: &Value) -> Result<(), Error> {
    let substring = matches!(op, Op::Co | Op::Sw | Op::Ew);
    let ordered = matches!(op, Op::Gt | Op::Ge | Op::Lt | Op::Le);
    if substring && value.as_str().is_none_or(str::is_empty) {
        return Err(Error::filter("`co`, `sw` and `ew` need a text that is not empty"));
    }
    if ordered && (value.is_boolean() || value.is_null() || is_flag(named)) {
        return Err(Error::filter("true, false and null have no order"));
    }
    Ok(())
}

fn is_flag(named: Named) -> bool {
    (named.attribute.form == Form::Flag && named.sub.is_none()) || named.sub == Some("primary")
}

fn case_exact(named: Named) -> bool {
    match named.sub {
        // Of members, groups and `meta` only the ids and versions are exact.
        Some(sub) => named.attribute.case_exact && matches!(sub, "value" | "version"),
        None => named.attribute.case_exact,
    }
}

fn at(named: Named, resource: &Value) -> Option<&Value> {
    let holder = if named.enterprise { resource.get(ENTERPRISE)? } else { resource };
    holder.get(named.attribute.name)
}

fn values(named: Named, resource: &Value) -> Vec<&Value> {
    match at(named, resource) {
        Some(Value::Array(elements)) => elements.iter().filter_map(|element| sub_value(named, element)).collect(),
        Some(value) => sub_value(named, value).into_iter().collect(),
        None => Vec::new(),
    }
}

/// Of an element: the sub-attribute that was named, or its `value`, or itself when it is no object.
fn sub_value(named: Named, element: &Value) -> Option<&Value> {
    match element {
        Value::Object(object) => match named.sub {
            Some(sub) => object.get(sub),
            None if named.attribute.form == Form::Many => object.get("value"),
            None => Some(element),
        },
        other if named.sub.is_none() || named.sub == Some("value") => Some(other),
        _ => None,
    }
}

fn is_present(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::String(text) => !text.is_empty(),
        Value::Array(elements) => !elements.is_empty(),
        Value::Object(fields) => !fields.is_empty(),
        _ => true,
    }
}

fn compare(found: &Value, op: Op, wanted: &Value, named: Named) -> bool {
    let order = match (found, wanted) {
        (Value::Bool(found), Value::Bool(wanted)) => found.cmp(wanted),
        (Value::Bool(found), Value::String(wanted)) => match wanted.to_ascii_lowercase().parse() {
            Ok(wanted) => found.cmp(&wanted),
            Err(_) => return false,
        },
        (Value::Number(found), Value::Number(wanted)) => match (found.as_f64(), wanted.as_f64()) {
            (Some(found), Some(wanted)) => found.total_cmp(&wanted),
            _ => return false,
        },
        (Value::String(found), Value::String(wanted)) => return compare_text(found, op, wanted, named),
        (Value::Null, Value::Null) => Ordering::Equal,
        _ => return false,
    };
    holds(order, op)
}

fn compare_text(found: &str, op: Op, wanted: &str, named: Named) -> bool {
    if matches!(named.sub, Some("created" | "lastModified"))
        && let (Ok(found), Ok(wanted)) = (found.parse::<jiff::Timestamp>(), wanted.parse::<jiff::Timestamp>())
    {
        return holds(found.cmp(&wanted), op);
    }
    let (found, wanted) = if case_exact(named) {
        (found.to_owned(), wanted.to_owned())
    } else {
        (found.to_lowercase(), wanted.to_lowercase())
    };
    match op {
        Op::Co => found.contains(&wanted),
        Op::Sw => found.starts_with(&wanted),
        Op::Ew => found.ends_with(&wanted),
        _ => holds(found.cmp(&wanted), op),
    }
}

fn holds(order: Ordering, op: Op) -> bool {
    match op {
        Op::Eq => order.is_eq(),
        Op::Ne => order.is_ne(),
        Op::Gt => order.is_gt(),
        Op::Ge => order.is_ge(),
        Op::Lt => order.is_lt(),
        Op::Le => order.is_le(),
        Op::Co | Op::Sw | Op::Ew => false,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use serde_json::json;

    use super::*;

    fn user() -> Value {
        json!({
            "id": "1-7", "externalId": "Abc", "userName": "Anna@Demo.test", "displayName": "Anna A", "active": true,
            "name": { "givenName": "Anna", "familyName": "Ähre" },
            "emails": [
                { "type": "work", "value": "anna@demo.test", "primary": true },
                { "type": "home", "value": "a@home.test" },
            ],
            "groups": [{ "value": "1-9", "display": "sales" }],
            "meta": { "created": "2026-01-02T03:04:05.000Z" },
            ENTERPRISE: { "department": "R&D", "manager": { "value": "1-1" } },
        })
    }

    #[test]
    fn filters_match_what_the_rfc_says() {
        for (filter, expected) in [
            (r#"userName eq "anna@demo.test""#, true),
            (r#"USERNAME EQ "anna@demo.test""#, true),
            (r#"userName eq "other""#, false),
            (r#"externalId eq "Abc""#, true),
            (r#"externalId eq "abc""#, false),
            (r#"id eq "1-7""#, true),
            (r#"userName sw "anna" and active eq true"#, true),
            (r#"active eq "False""#, false),
            (r#"active eq True"#, true),
            (r#"not (userName co "x")"#, true),
            (r#"userName ew "test" and not (title pr)"#, true),
            (r#"title pr or name.familyName eq "ähre""#, true),
            (r#"emails[type eq "work" and value co "@demo"]"#, true),
            (r#"emails[type eq "home" and value co "@demo"]"#, false),
            (r#"emails.type eq "home""#, true),
            (r#"emails co "home.test""#, true),
            (r#"emails[primary eq true]"#, true),
            (r#"groups.value eq "1-9""#, true),
            (r#"meta.created gt "2026-01-02T03:04:04Z""#, true),
            (r#"meta.created lt "2026-01-02T03:04:05Z""#, false),
            (r#"urn:ietf:params:scim:schemas:core:2.0:User:userName sw "a""#, true),
            (r#"urn:ietf:params:scim:schemas:extension:enterprise:2.0:User:department eq "r&d""#, true),
            (r#"urn:ietf:params:scim:schemas:extension:enterprise:2.0:User:manager.value eq "1-1""#, true),
            (r#"(userName eq "x" or userName eq "y") and active eq true"#, false),
            (r#"userName eq "x" or userName sw "a" and active eq false"#, false),
            (r#"title ne "x""#, true),
            (r#"userName eq "a\"b""#, false),
        ] {
            let parsed = Filter::parse(filter, Resource::User).unwrap_or_else(|error| panic!("{filter}: {error:?}"));
            assert_eq!(parsed.matches(&user()), expected, "{filter}");
        }
    }

    #[test]
    fn what_is_no_filter_is_refused_at_once() {
        let deep = format!("{}userName pr{}", "(".repeat(10_000), ")".repeat(10_000));
        let long = format!(r#"userName eq "{}""#, "x".repeat(1 << 20));
        let nested = format!("{}userName pr{}", "(".repeat(21), ")".repeat(21));
        let nots = format!("{}userName pr{}", "not (".repeat(21), ")".repeat(21));
        let wrong = [
            "",
            " ",
            "userName",
            "userName eq",
            "userName eq x",
            r#"userName eq "x"#,
            r#"userName like "x""#,
            r#"favouriteColour eq "x""#,
            r#"name.colour eq "x""#,
            r#"userName co """#,
            "active gt true",
            "userName eq {}",
            r#"userName eq "x" or"#,
            r#"userName eq "x" userName"#,
            r#"(userName eq "x""#,
            r#"userName eq "x")"#,
            r#"emails[type eq "work""#,
            r#"emails[colour eq "work"]"#,
            r#"userName[type eq "work"]"#,
            r#"emails[emails[type eq "x"]]"#,
            r#"userName eq "x"; drop table users"#,
            r#"members.value eq "1""#,
            "not userName pr",
            &deep,
            &long,
            &nested,
            &nots,
        ];
        for filter in wrong {
            let begun = Instant::now();
            let refused = Filter::parse(filter, Resource::User);
            let short: String = filter.chars().take(60).collect();
            assert_eq!(refused.unwrap_err().scim_type, Some("invalidFilter"), "{short}");
            assert!(begun.elapsed().as_secs() < 1, "{short}");
        }
    }

    #[test]
    fn a_required_value_is_found_through_ands_only() {
        let required = |text: &str, name: &str, sub: Option<&str>| {
            let filter = Filter::parse(text, Resource::Group).unwrap();
            filter.required(name, sub).map(str::to_owned)
        };
        assert_eq!(required(r#"displayName eq "x""#, "displayName", None).as_deref(), Some("x"));
        assert_eq!(required(r#"id pr and displayName eq "x""#, "displayName", None).as_deref(), Some("x"));
        assert_eq!(required(r#"id pr or displayName eq "x""#, "displayName", None), None);
        assert_eq!(required(r#"members[value eq "1-2"]"#, "members", Some("value")).as_deref(), Some("1-2"));
        assert_eq!(required(r#"members.value eq "1-2""#, "members", Some("value")).as_deref(), Some("1-2"));
        assert_eq!(required(r#"not (displayName eq "x")"#, "displayName", None), None);
    }
}
