//! SCIM 2.0: a directory pushes its users and groups, in the dialects of Okta and Entra ID.
//!
//! **Invariant:** a directory sees and changes its own objects only; another's are not there.
//! **Invariant:** a PATCH is read, changed and written against one version, or not at all.
//!
//! **Source** RFC 7643, RFC 7644.

mod attributes;
mod discovery;
mod error;
mod filter;
mod patch;
mod resource;

use std::sync::Arc;

use axum::extract::{Path, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, get};
use selvedge_cluster::Mode;
use selvedge_domain::command::{Body, ChangeGroup, GroupFields};
use selvedge_domain::rows::{Group, User};
use selvedge_domain::state::IndexKey;
use selvedge_domain::{Id, State as Applied};
use serde::Deserialize;
use serde_json::{Value, json};

use super::auth::{Caller, Need};
use super::change::{Changed, Wanted};
use super::input::{Params, Whole, json as read_json};
use super::read::{READ_WAIT, Seen};
use super::router::Route;
use super::{Context, Problem};
use attributes::Resource;
use error::Error;
use filter::Filter;
use resource::{Projection, etag};

/// Where SCIM is.
pub(super) const BASE: &str = "/scim/v2";
/// Resources in one list.
pub(super) const COUNT_MAX: usize = 200;
/// A PATCH that meets other changes is done again so often.
const ATTEMPTS_MAX: usize = 16;

pub(super) fn routes() -> Vec<Route> {
    let route = |path: &str, read, handlers: MethodRouter<Arc<Context>>| Route {
        path: format!("{BASE}/{path}"),
        need: Need::Directory,
        read,
        handlers,
    };
    let fixed = |path, handlers| route(path, None, handlers);
    let rows = |path, handlers| route(path, Some(Mode::Linearizable), handlers);
    vec![
        fixed("ServiceProviderConfig", get(service_provider_config)),
        fixed("ResourceTypes", get(resource_types)),
        fixed("ResourceTypes/{id}", get(resource_type)),
        fixed("Schemas", get(schemas)),
        fixed("Schemas/{id}", get(schema)),
        rows("Users", get(list_users).post(create_user)),
        rows("Users/{id}", get(read_user).put(replace_user).patch(patch_user).delete(delete_user)),
        rows("Groups", get(list_groups).post(create_group)),
        rows("Groups/{id}", get(read_group).put(replace_group).patch(patch_group).delete(delete_group)),
    ]
}

/// A problem as SCIM says it.
pub(super) fn problem(problem: Problem) -> Response {
    Error::from(problem).into_response()
}

fn scim_json(status: StatusCode, body: &Value) -> Response {
    let content_type = [(header::CONTENT_TYPE, HeaderValue::from_static("application/scim+json"))];
    (status, content_type, body.to_string()).into_response()
}

fn list(resources: Vec<Value>, total: usize, start_index: usize) -> Value {
    json!({
        "schemas": ["urn:ietf:params:scim:api:messages:2.0:ListResponse"],
        "totalResults": total,
        "startIndex": start_index,
        "itemsPerPage": resources.len(),
        "Resources": resources,
    })
}

/// What a request says besides its body.
struct Asked {
    caller: Caller,
    directory: Id,
    base: String,
    wanted: Wanted,
    if_match: Option<Vec<String>>,
    if_none_match: Option<Vec<String>>,
    projection: Projection,
    query: Query,
}

#[derive(Clone, Default, Deserialize)]
struct Query {
    filter: Option<String>,
    #[serde(rename = "startIndex")]
    start_index: Option<String>,
    count: Option<String>,
    attributes: Option<String>,
    #[serde(rename = "excludedAttributes")]
    excluded: Option<String>,
}

impl axum::extract::FromRequestParts<Arc<Context>> for Asked {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut axum::http::request::Parts, context: &Arc<Context>) -> Result<Self, Error> {
        let caller = Caller::from_request_parts(parts, context).await?;
        let directory = caller.directory.ok_or_else(|| Problem::forbidden("a directory's token is needed"))?;
        let Params(query) = Params::<Query>::from_request_parts(parts, context).await?;
        Ok(Self {
            directory,
            base: base(&parts.headers, &parts.uri, context),
            wanted: Wanted::of(&parts.headers)?,
            if_match: tags(&parts.headers, header::IF_MATCH),
            if_none_match: tags(&parts.headers, header::IF_NONE_MATCH),
            projection: Projection::new(query.attributes.as_deref(), query.excluded.as_deref()),
            caller,
            query,
        })
    }
}

/// The address that the caller used, for `location`.
fn base(headers: &HeaderMap, uri: &Uri, context: &Context) -> String {
    let asked = uri.authority().map(|authority| authority.as_str().to_owned());
    let host = asked.or_else(|| headers.get(header::HOST)?.to_str().ok().map(str::to_owned));
    let host = host.unwrap_or_else(|| {
        context.cluster.state().broker(context.cluster.node()).map(|broker| broker.web).unwrap_or_default()
    });
    format!("https://{host}{BASE}")
}

fn tags(headers: &HeaderMap, name: header::HeaderName) -> Option<Vec<String>> {
    let value = headers.get(name)?.to_str().ok()?;
    Some(value.split(',').map(|tag| tag.trim().trim_start_matches("W/").to_owned()).collect())
}

impl Asked {
    /// Whether `If-Match` allows a change of this version; the version to insist on.
    fn precondition(&self, version: u64) -> Result<Option<u64>, Error> {
        match &self.if_match {
            None => Ok(None),
            Some(tags) if tags.iter().any(|tag| tag == "*") => Ok(None),
            Some(tags) if tags.contains(&format!("\"{version}\"")) => Ok(Some(version)),
            Some(_) => Err(Error::precondition(version)),
        }
    }

    fn is_unchanged(&self, version: u64) -> bool {
        let tags = self.if_none_match.as_deref().unwrap_or_default();
        tags.iter().any(|tag| tag == "*" || *tag == format!("\"{version}\""))
    }

    fn user(&self, state: &Applied, id: &str) -> Option<User> {
        let user = state.by_id::<User>(id.parse().ok()?)?;
        (user.directory == Some(self.directory)).then_some(user)
    }

    fn group(&self, state: &Applied, id: &str) -> Option<Group> {
        let group = state.by_id::<Group>(id.parse().ok()?)?;
        (group.directory == Some(self.directory)).then_some(group)
    }

    fn answer_user(&self, state: &Applied, status: StatusCode, user: &User) -> Response {
        let body = resource::user_json(state, user, &self.base);
        self.answer(status, body, Resource::User, user.version)
    }

    fn answer_group(&self, state: &Applied, status: StatusCode, group: &Group) -> Response {
        let with_members = self.projection.takes("members");
        let body = resource::group_json(state, group, &self.base, with_members);
        self.answer(status, body, Resource::Group, group.version)
    }

    fn answer(&self, status: StatusCode, body: Value, kind: Resource, version: u64) -> Response {
        let location = body["meta"]["location"].as_str().and_then(|location| HeaderValue::from_str(location).ok());
        let mut response = scim_json(status, &self.projection.project(body, kind));
        let headers = response.headers_mut();
        if let Ok(tag) = HeaderValue::from_str(&etag(version)) {
            headers.insert(header::ETAG, tag);
        }
        if let Some(location) = location.filter(|_| status == StatusCode::CREATED) {
            headers.insert(header::LOCATION, location);
        }
        response
    }
}

/// The body as JSON; what is no JSON is `invalidSyntax`.
fn body(Whole(bytes): &Whole) -> Result<Value, Error> {
    Ok(read_json(bytes)?)
}

type Answer = Result<Response, Error>;

async fn service_provider_config(asked: Asked) -> Response {
    scim_json(StatusCode::OK, &discovery::config(&asked.base))
}

async fn resource_types(asked: Asked) -> Response {
    scim_json(StatusCode::OK, &discovery::resource_types(&asked.base))
}

async fn resource_type(Path(id): Path<String>, asked: Asked) -> Answer {
    let found = discovery::resource_type(&id, &asked.base);
    Ok(scim_json(StatusCode::OK, &found.ok_or_else(|| Error::not_found("resource type", &id))?))
}

async fn schemas(asked: Asked) -> Response {
    scim_json(StatusCode::OK, &discovery::schemas(&asked.base))
}

async fn schema(Path(id): Path<String>, asked: Asked) -> Answer {
    let found = discovery::schema(&id, &asked.base);
    Ok(scim_json(StatusCode::OK, &found.ok_or_else(|| Error::not_found("schema", &id))?))
}

/// What a change begins from: a state that holds everything that was answered before, by any broker.
async fn read(context: &Context) -> Result<Arc<Applied>, Error> {
    Ok(context.cluster.linearizable(READ_WAIT).await.map_err(Problem::from)?)
}

async fn create_user(State(context): State<Arc<Context>>, asked: Asked, whole: Shaped<Whole>) -> Answer {
    let fields = resource::user_fields(body(&whole.0)?, true)?;
    let name = fields.user_name.clone();
    let changed = context.change(&asked.caller, &asked.wanted, "user.create", &name, Body::CreateUser(fields)).await?;
    let id = changed.done.ids.first().copied().unwrap_or_default();
    let user = context.cluster.state().by_id::<User>(id).ok_or_else(|| Error::not_found("user", &id.to_string()))?;
    Ok(marked(asked.answer_user(&context.cluster.state(), StatusCode::CREATED, &user), &changed))
}

async fn read_user(Seen(state): Seen, Path(id): Path<String>, asked: Asked) -> Answer {
    let user = asked.user(&state, &id).ok_or_else(|| Error::not_found("user", &id))?;
    if asked.is_unchanged(user.version) {
        return Ok(StatusCode::NOT_MODIFIED.into_response());
    }
    Ok(asked.answer_user(&state, StatusCode::OK, &user))
}

async fn replace_user(
    State(context): State<Arc<Context>>,
    Path(id): Path<String>,
    asked: Asked,
    whole: Shaped<Whole>,
) -> Answer {
    let body = body(&whole.0)?;
    change_user(&context, &asked, &id, "user.replace", |user| {
        // A body that does not say must not let anyone in who was shut out.
        resource::user_fields(body.clone(), user.active)
    })
    .await
}

async fn patch_user(
    State(context): State<Arc<Context>>,
    Path(id): Path<String>,
    asked: Asked,
    whole: Shaped<Whole>,
) -> Answer {
    let operations = patch::parse(body(&whole.0)?, Resource::User)?;
    let state = context.cluster.state();
    change_user(&context, &asked, &id, "user.patch", |user| {
        let mut json = resource::user_json(&state, user, &asked.base);
        patch::apply_to_user(&mut json, &operations)?;
        resource::user_fields(json, user.active)
    })
    .await
}

/// Reads a user, changes it and writes it against the version that was read; again when somebody else was quicker.
async fn change_user(
    context: &Arc<Context>,
    asked: &Asked,
    id: &str,
    action: &str,
    change: impl Fn(&User) -> Result<selvedge_domain::command::UserFields, Error>,
) -> Answer {
    let mut attempt = 0;
    loop {
        let state = read(context).await?;
        let user = asked.user(&state, id).ok_or_else(|| Error::not_found("user", id))?;
        asked.precondition(user.version)?;
        let body = Body::ReplaceUser { id: user.id(), version: Some(user.version), fields: change(&user)? };
        let wanted = asked.wanted.of_attempt(attempt);
        match context.change(&asked.caller, &wanted, action, &format!("user/{id}"), body).await {
            Ok(changed) => {
                let user = asked.user(&context.cluster.state(), id).ok_or_else(|| Error::not_found("user", id))?;
                return Ok(marked(asked.answer_user(&context.cluster.state(), StatusCode::OK, &user), &changed));
            }
            Err(problem)
                if problem.code == "version_mismatch" && asked.if_match.is_none() && attempt < ATTEMPTS_MAX =>
            {
                attempt += 1;
            }
            Err(problem) => return Err(problem.into()),
        }
    }
}

async fn delete_user(State(context): State<Arc<Context>>, Path(id): Path<String>, asked: Asked) -> Answer {
    let state = read(&context).await?;
    let user = match asked.user(&state, &id) {
        Some(user) => user,
        // A retry of a deletion that was done finds nothing, but its key knows.
        None if asked.wanted.idempotency_key.is_some() => User { id: id.parse().ok(), ..User::default() },
        None => return Err(Error::not_found("user", &id)),
    };
    let body = Body::DeleteUser { id: user.id(), version: asked.precondition(user.version)? };
    let changed = context.change(&asked.caller, &asked.wanted, "user.delete", &format!("user/{id}"), body).await?;
    Ok(marked(StatusCode::NO_CONTENT.into_response(), &changed))
}

async fn create_group(State(context): State<Arc<Context>>, asked: Asked, whole: Shaped<Whole>) -> Answer {
    let group = resource::group_fields(body(&whole.0)?)?;
    let name = group.display_name.clone();
    let (display_name, external_id, members) =
        (group.display_name, group.external_id, group.members.unwrap_or_default());
    let body = Body::CreateGroup(GroupFields { display_name, external_id, members });
    let changed = context.change(&asked.caller, &asked.wanted, "group.create", &name, body).await?;
    let id = changed.done.ids.first().copied().unwrap_or_default();
    let group = context.cluster.state().by_id::<Group>(id).ok_or_else(|| Error::not_found("group", &id.to_string()))?;
    Ok(marked(asked.answer_group(&context.cluster.state(), StatusCode::CREATED, &group), &changed))
}

async fn read_group(Seen(state): Seen, Path(id): Path<String>, asked: Asked) -> Answer {
    let group = asked.group(&state, &id).ok_or_else(|| Error::not_found("group", &id))?;
    if asked.is_unchanged(group.version) {
        return Ok(StatusCode::NOT_MODIFIED.into_response());
    }
    Ok(asked.answer_group(&state, StatusCode::OK, &group))
}

async fn replace_group(
    State(context): State<Arc<Context>>,
    Path(id): Path<String>,
    asked: Asked,
    whole: Shaped<Whole>,
) -> Answer {
    let new = resource::group_fields(body(&whole.0)?)?;
    change_group(&context, &asked, &id, "group.replace", |_, _| {
        Ok(patch::GroupChange {
            display_name: Some(new.display_name.clone()),
            external_id: Some(new.external_id.clone()),
            members: Some(new.members.iter().flatten().copied().collect()),
            ..Default::default()
        })
    })
    .await
}

async fn patch_group(
    State(context): State<Arc<Context>>,
    Path(id): Path<String>,
    asked: Asked,
    whole: Shaped<Whole>,
) -> Answer {
    let operations = patch::parse(body(&whole.0)?, Resource::Group)?;
    change_group(&context, &asked, &id, "group.patch", |state, group| {
        let present =
            || resource::members(state, group).map(|user| (user.id(), resource::member(&user, &asked.base))).collect();
        patch::group_change(&operations, present)
    })
    .await
}

/// Adds and removes members by difference, so that two callers at once both have their way; what depends on who is in
/// the group is written against the version that was read.
async fn change_group(
    context: &Arc<Context>,
    asked: &Asked,
    id: &str,
    action: &str,
    change: impl Fn(&Applied, &Group) -> Result<patch::GroupChange, Error>,
) -> Answer {
    let mut attempt = 0;
    loop {
        let state = read(context).await?;
        let group = asked.group(&state, id).ok_or_else(|| Error::not_found("group", id))?;
        let insisted = asked.precondition(group.version)?;
        let wish = change(&state, &group)?;
        let body = Body::ChangeGroup(ChangeGroup {
            id: group.id(),
            version: insisted.or(wish.depends.then_some(group.version)),
            display_name: wish.display_name,
            external_id: wish.external_id,
            members: wish.members.map(|members| members.into_iter().collect()),
            add: wish.add.into_iter().collect(),
            remove: wish.remove.into_iter().collect(),
        });
        let wanted = asked.wanted.of_attempt(attempt);
        match context.change(&asked.caller, &wanted, action, &format!("group/{id}"), body).await {
            Ok(changed) => {
                let group = asked.group(&context.cluster.state(), id).ok_or_else(|| Error::not_found("group", id))?;
                return Ok(marked(asked.answer_group(&context.cluster.state(), StatusCode::OK, &group), &changed));
            }
            Err(problem)
                if problem.code == "version_mismatch" && asked.if_match.is_none() && attempt < ATTEMPTS_MAX =>
            {
                attempt += 1;
            }
            Err(problem) => return Err(problem.into()),
        }
    }
}

async fn delete_group(State(context): State<Arc<Context>>, Path(id): Path<String>, asked: Asked) -> Answer {
    let state = read(&context).await?;
    let group = match asked.group(&state, &id) {
        Some(group) => group,
        None if asked.wanted.idempotency_key.is_some() => Group { id: id.parse().ok(), ..Group::default() },
        None => return Err(Error::not_found("group", &id)),
    };
    let body = Body::DeleteGroup { id: group.id(), version: asked.precondition(group.version)? };
    let changed = context.change(&asked.caller, &asked.wanted, "group.delete", &format!("group/{id}"), body).await?;
    Ok(marked(StatusCode::NO_CONTENT.into_response(), &changed))
}

fn marked(mut response: Response, changed: &Changed) -> Response {
    changed.mark(&mut response);
    response
}

async fn list_users(Seen(state): Seen, asked: Asked) -> Answer {
    let filter = asked.query.filter.as_deref().map(|text| Filter::parse(text, Resource::User)).transpose()?;
    let page = Page::of(&asked.query)?;
    listed(move || {
        let users = users(&state, asked.directory, filter.as_ref());
        let json = |user: &User| resource::user_json(&state, user, &asked.base);
        let (resources, total) = page.cut(users, filter.as_ref(), json, json);
        let projected = resources.into_iter().map(|resource| asked.projection.project(resource, Resource::User));
        list(projected.collect(), total, page.start)
    })
    .await
}

async fn list_groups(Seen(state): Seen, asked: Asked) -> Answer {
    let filter = asked.query.filter.as_deref().map(|text| Filter::parse(text, Resource::Group)).transpose()?;
    let page = Page::of(&asked.query)?;
    listed(move || {
        let about_members = asked.query.filter.as_deref().is_some_and(|text| text.to_lowercase().contains("members"));
        let shown = asked.projection.takes("members");
        let groups = groups(&state, asked.directory, filter.as_ref());
        let asked_of = |group: &Group| resource::group_json(&state, group, &asked.base, about_members);
        let shown = |group: &Group| resource::group_json(&state, group, &asked.base, shown);
        let (resources, total) = page.cut(groups, filter.as_ref(), asked_of, shown);
        let projected = resources.into_iter().map(|resource| asked.projection.project(resource, Resource::Group));
        list(projected.collect(), total, page.start)
    })
    .await
}

/// Lists are made where they may take a while.
async fn listed(make: impl FnOnce() -> Value + Send + 'static) -> Answer {
    let made = tokio::task::spawn_blocking(make).await.map_err(|error| Problem::internal(&error))?;
    Ok(scim_json(StatusCode::OK, &made))
}

/// Which part of a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Page {
    start: usize,
    count: usize,
}

impl Page {
    fn of(query: &Query) -> Result<Self, Error> {
        let number = |name: &str, text: &Option<String>, otherwise: i64| match text {
            None => Ok(otherwise),
            Some(text) => text.parse().map_err(|_| Error::value(format!("`{name}` is a whole number"))),
        };
        // Values out of bounds mean the nearest one that is in.
        let start = number("startIndex", &query.start_index, 1)?.max(1);
        let count = number("count", &query.count, COUNT_MAX as i64)?.clamp(0, COUNT_MAX as i64);
        Ok(Self { start: usize::try_from(start).unwrap_or(usize::MAX), count: usize::try_from(count).unwrap_or(0) })
    }

    fn cut<R>(
        self,
        rows: Box<dyn Iterator<Item = R> + '_>,
        filter: Option<&Filter>,
        asked_of: impl Fn(&R) -> Value,
        shown: impl Fn(&R) -> Value,
    ) -> (Vec<Value>, usize) {
        let (mut resources, mut total) = (Vec::new(), 0);
        for row in rows {
            if filter.is_some_and(|filter| !filter.matches(&asked_of(&row))) {
                continue;
            }
            total += 1;
            if total >= self.start && resources.len() < self.count {
                resources.push(shown(&row));
            }
        }
        (resources, total)
    }
}

/// Users of a directory that a filter may match: found by an index where it names a value, else all.
fn users<'s>(state: &'s Applied, directory: Id, filter: Option<&Filter>) -> Box<dyn Iterator<Item = User> + 's> {
    let own = move |user: &User| user.directory == Some(directory);
    let required = |name: &str| filter.and_then(|filter| filter.required(name, None));
    if let Some(name) = required("userName") {
        return Box::new(state.find::<User>(IndexKey::scoped(directory, name)).into_iter());
    }
    if let Some(id) = required("externalId").filter(|id| !id.is_empty()) {
        return Box::new(state.find::<User>(IndexKey::External(directory, id.to_owned())).into_iter());
    }
    if let Some(id) = required("id") {
        return Box::new(id.parse().ok().and_then(|id| state.by_id::<User>(id)).into_iter().filter(own));
    }
    Box::new(state.rows::<User>().filter(own))
}

fn groups<'s>(state: &'s Applied, directory: Id, filter: Option<&Filter>) -> Box<dyn Iterator<Item = Group> + 's> {
    let own = move |group: &Group| group.directory == Some(directory);
    let required = |name: &str, sub| filter.and_then(|filter| filter.required(name, sub));
    if let Some(name) = required("displayName", None) {
        return Box::new(state.find::<Group>(IndexKey::scoped(directory, name)).into_iter());
    }
    if let Some(id) = required("id", None) {
        return Box::new(id.parse().ok().and_then(|id| state.by_id::<Group>(id)).into_iter().filter(own));
    }
    if let Some(member) = required("members", Some("value")) {
        let user =
            member.parse().ok().and_then(|id| state.by_id::<User>(id)).filter(|u| u.directory == Some(directory));
        let groups: Vec<Group> = user.map(|user| state.groups_of(&user).collect()).unwrap_or_default();
        return Box::new(groups.into_iter().filter(own));
    }
    Box::new(state.rows::<Group>().filter(own))
}

/// An extractor whose refusal is said as SCIM says it.
struct Shaped<T>(T);

impl<S: Send + Sync> axum::extract::FromRequest<S> for Shaped<Whole> {
    type Rejection = Error;

    async fn from_request(request: axum::extract::Request, state: &S) -> Result<Self, Error> {
        Ok(Self(Whole::from_request(request, state).await?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_out_of_bounds_are_brought_in() {
        let page = |start: Option<&str>, count: Option<&str>| {
            Page::of(&Query {
                start_index: start.map(str::to_owned),
                count: count.map(str::to_owned),
                ..Query::default()
            })
        };
        assert_eq!(page(None, None), Ok(Page { start: 1, count: 200 }));
        assert_eq!(page(Some("0"), Some("-1")), Ok(Page { start: 1, count: 0 }));
        assert_eq!(page(Some("-7"), Some("1000000000")), Ok(Page { start: 1, count: 200 }));
        assert_eq!(page(Some("3"), Some("1")), Ok(Page { start: 3, count: 1 }));
        assert_eq!(page(Some("x"), None).unwrap_err().scim_type, Some("invalidValue"));
        assert_eq!(page(None, Some("99999999999999999999")).unwrap_err().scim_type, Some("invalidValue"));
    }
}
