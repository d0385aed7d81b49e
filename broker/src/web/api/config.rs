//! Configuration objects: zones, segments, groups, policies, receivers.

use std::collections::BTreeSet;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use selvedge_domain::command::{Apply, ApplyPut, Body};
use selvedge_domain::rows::{self, PolicyMode, PortRange, Transport};
use selvedge_domain::spec::{self, Key, Kind, Object};
use selvedge_domain::{Command, Envelope, Event, Id, Outcome, State as Applied, policy};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::super::auth::Caller;
use crate::web::change::{ChangedInfo, Wanted};
use crate::web::input::{Input, Params};
use crate::web::read::Seen;
use crate::web::{Context, Problem};

/// Which objects.
#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(super) struct Which {
    /// Kind, as in `kind: Segment`.
    kind: Option<Kind>,
    /// Exact name, without regard to case.
    name: Option<String>,
}

/// Objects as people write them.
#[derive(Serialize, ToSchema)]
pub(super) struct ObjectList {
    /// Policy revision; give it to `apply` as `expect_revision` to be sure that nobody changed anything meanwhile.
    revision: u64,
    /// Position of the state.
    position: String,
    /// Objects, by kind and name.
    objects: Vec<Object>,
}

/// The configuration, as people write it.
#[utoipa::path(get, path = "/api/v1/objects", tag = "configuration", params(Which),
    responses((status = 200, body = ObjectList)))]
pub(super) async fn list(Seen(state): Seen, Params(which): Params<Which>) -> Json<ObjectList> {
    let mut objects = all(&state);
    objects.retain(|object| {
        let key = object.key();
        which.kind.is_none_or(|kind| kind == key.kind)
            && which.name.as_ref().is_none_or(|name| name.to_lowercase() == key.name.to_lowercase())
    });
    Json(ObjectList { revision: policy::revision(&state), position: state.position().to_string(), objects })
}

/// A transaction: all of it or nothing.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct ApplyRequest {
    /// Objects to make or replace.
    #[serde(default)]
    objects: Vec<Object>,
    /// Objects to delete.
    #[serde(default)]
    deletes: Vec<Key>,
    /// Refuse (412) when the policy revision is another by now.
    #[serde(default)]
    expect_revision: Option<u64>,
    /// Say what would change, and change nothing.
    #[serde(default)]
    dry_run: bool,
    /// Delete every object that is not among `objects`.
    #[serde(default)]
    prune: bool,
}

/// What a transaction changed.
#[derive(Serialize, ToSchema)]
pub(super) struct ApplyAnswer {
    /// Policy revision after it.
    revision: u64,
    /// Nothing was changed, because it was asked what would be.
    dry_run: bool,
    /// What changed, or would; objects that stay as they are do not appear.
    changed: Vec<ObjectChange>,
    #[serde(flatten)]
    info: Option<ChangedInfo>,
}

/// One object that changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub(super) struct ObjectChange {
    /// Kind.
    kind: Kind,
    /// Name.
    name: String,
    /// `created`, `changed` or `deleted`.
    change: &'static str,
}

/// Applies a transaction of configuration objects.
#[utoipa::path(post, path = "/api/v1/apply", tag = "configuration", request_body = ApplyRequest,
    responses((status = 200, body = ApplyAnswer), (status = 409, body = Problem), (status = 412, body = Problem),
        (status = 422, body = Problem)))]
pub(super) async fn apply(
    State(context): State<Arc<Context>>,
    caller: Caller,
    wanted: Wanted,
    Input(request): Input<ApplyRequest>,
) -> Result<Response, Problem> {
    let state = context.cluster.state();
    let dry_run = request.dry_run;
    // Policies are compiled here, by this version of the engine; the log carries the outcome. That takes a while.
    let built = tokio::task::spawn_blocking(move || build(&state, request)).await;
    let command = built.map_err(|error| Problem::internal(&error))??;
    let target = target(&command);
    let body = Body::Apply(command);
    if dry_run {
        let command = Command::new(caller.actor.clone(), context.cluster.node(), None, body);
        let (state, now_ms) = (context.cluster.state(), context.cluster.now_ms());
        let previewed = tokio::task::spawn_blocking(move || preview_of(&state, now_ms, &command)).await;
        let (revision, changed) = previewed.map_err(|error| Problem::internal(&error))??;
        return Ok(Json(ApplyAnswer { revision, dry_run, changed, info: None }).into_response());
    }
    let done = context.change(&caller, &wanted, "apply", &target, body).await?;
    let changed = changed_by(context.cluster.events_of(done.done.position).await?);
    let revision = policy::revision(&context.cluster.state());
    let answer = ApplyAnswer { revision, dry_run, changed, info: Some(done.info(&context)) };
    Ok(done.answer(StatusCode::OK, answer))
}

fn build(state: &Applied, request: ApplyRequest) -> Result<Apply, Problem> {
    let mut apply = Apply { puts: Vec::new(), deletes: request.deletes, expect_revision: request.expect_revision };
    if request.prune {
        let kept: BTreeSet<Key> = request.objects.iter().map(|object| lower(object.key())).collect();
        let gone = all(state).into_iter().map(|object| object.key()).filter(|key| !kept.contains(&lower(key.clone())));
        let gone: Vec<_> = gone.filter(|key| !apply.deletes.contains(key)).collect();
        apply.deletes.extend(gone);
        // What was made meanwhile must not be kept by chance.
        apply.expect_revision = apply.expect_revision.or(Some(policy::revision(state)));
    }
    let mut wrong = Vec::new();
    for object in request.objects {
        let compiled = match &object {
            Object::Policy(written) => match policy::compile(written) {
                Ok(compiled) => Some(compiled),
                Err(error) => {
                    wrong.push(error.to_string());
                    None
                }
            },
            _ => None,
        };
        apply.puts.push(ApplyPut { object, compiled });
    }
    if wrong.is_empty() { Ok(apply) } else { Err(Problem::invalid(wrong.join("\n"))) }
}

fn lower(key: Key) -> Key {
    Key { kind: key.kind, name: key.name.to_lowercase() }
}

fn target(apply: &Apply) -> String {
    let puts = apply.puts.iter().map(|put| put.object.key());
    let names = puts.chain(apply.deletes.iter().cloned()).map(|key| format!("{:?}/{}", key.kind, key.name));
    names.collect::<Vec<_>>().join(" ")
}

/// What a command would do to a state.
fn preview_of(state: &Applied, now_ms: u64, command: &Command) -> Result<(u64, Vec<ObjectChange>), Problem> {
    let (mut after, mut changes) = (state.clone(), Default::default());
    if let Outcome::Refused(rejected) = after.apply(now_ms, command, &mut changes) {
        return Err(rejected.into());
    }
    Ok((policy::revision(&after), changed_by(changes.events)))
}

/// What the events of one command changed.
fn changed_by(events: Vec<Envelope>) -> Vec<ObjectChange> {
    let changed = events.into_iter().filter_map(|envelope| {
        let (kind, name, id) = match envelope.event? {
            Event::RegionPut(row) => (Kind::Region, row.name, row.id),
            Event::ZonePut(row) => (Kind::Zone, row.name, row.id),
            Event::ConnectorGroupPut(row) => (Kind::ConnectorGroup, row.name, row.id),
            Event::SegmentGroupPut(row) => (Kind::SegmentGroup, row.name, row.id),
            Event::SegmentPut(row) => (Kind::Segment, row.name, row.id),
            Event::PolicyPut(row) => (Kind::Policy, row.name, row.id),
            Event::ReceiverPut(row) => (Kind::Receiver, row.name, row.id),
            Event::Deleted(gone) => {
                return Some(ObjectChange { kind: kind_of_table(gone.table)?, name: gone.name, change: "deleted" });
            }
            _ => return None,
        };
        // An object's id is that of the event that made it.
        let change = if id == envelope.id { "created" } else { "changed" };
        Some(ObjectChange { kind, name, change })
    });
    changed.collect()
}

fn kind_of_table(number: u32) -> Option<Kind> {
    use selvedge_domain::state::Table;
    match Table::from_number(u8::try_from(number).ok()?)? {
        Table::Region => Some(Kind::Region),
        Table::Zone => Some(Kind::Zone),
        Table::ConnectorGroup => Some(Kind::ConnectorGroup),
        Table::SegmentGroup => Some(Kind::SegmentGroup),
        Table::Segment => Some(Kind::Segment),
        Table::Policy => Some(Kind::Policy),
        Table::Receiver => Some(Kind::Receiver),
        _ => None,
    }
}

/// Every configuration object of a state as people write it, by kind and name.
fn all(state: &Applied) -> Vec<Object> {
    let mut objects: Vec<Object> = Vec::new();
    objects.extend(
        state.rows::<rows::Region>().map(|row| {
            Object::Region(spec::Region { name: row.name, latitude: row.latitude, longitude: row.longitude })
        }),
    );
    objects.extend(state.rows::<rows::Zone>().map(|row| Object::Zone(spec::Zone { name: row.name })));
    objects.extend(
        state
            .rows::<rows::ConnectorGroup>()
            .map(|row| Object::ConnectorGroup(spec::ConnectorGroup { name: row.name, region: row.region })),
    );
    let group = |row: rows::SegmentGroup| Object::SegmentGroup(spec::SegmentGroup { name: row.name });
    objects.extend(state.rows::<rows::SegmentGroup>().map(group));
    objects.extend(state.rows::<rows::Segment>().map(|row| Object::Segment(segment(state, row))));
    objects.extend(state.rows::<rows::Policy>().map(|row| {
        let simulate = row.mode() == PolicyMode::Simulate;
        Object::Policy(spec::Policy { name: row.name, cedar: row.source, simulate })
    }));
    objects.extend(state.rows::<rows::Receiver>().map(|row| {
        let (name, address, tls_ca, tls_name) = (row.name, row.address, row.tls_ca, row.tls_name);
        Object::Receiver(spec::Receiver { name, address, tls_ca, tls_name })
    }));
    objects.sort_by_cached_key(Object::key);
    objects
}

fn segment(state: &Applied, row: rows::Segment) -> spec::Segment {
    let ports = |transport: Transport| {
        row.ports.iter().filter(|range| range.transport() == transport).map(port_text).collect::<Vec<_>>()
    };
    let connector_group = |id: &Id| state.by_id::<rows::ConnectorGroup>(*id).map(|row| row.name);
    let group = |id: &Id| state.by_id::<rows::SegmentGroup>(*id).map(|row| row.name);
    spec::Segment {
        tcp: ports(Transport::Tcp),
        udp: ports(Transport::Udp),
        inclusive: row.inclusive,
        connector_groups: row.connector_groups.iter().filter_map(connector_group).collect(),
        groups: row.groups.iter().filter_map(group).collect(),
        idle_timeout_s: seconds(row.idle_ms),
        absolute_timeout_s: seconds(row.absolute_ms),
        name: row.name,
        hosts: row.hosts,
        networks: row.networks,
    }
}

fn port_text(range: &PortRange) -> String {
    if range.first == range.last { range.first.to_string() } else { format!("{}-{}", range.first, range.last) }
}

fn seconds(ms: u64) -> u32 {
    u32::try_from(ms / 1_000).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use selvedge_domain::command::{InitCluster, PutBroker};
    use selvedge_domain::rows::{BrokerRole, Token};
    use selvedge_domain::{Actor, Changes};

    use super::*;

    fn house() -> (Applied, Actor) {
        let mut state = Applied::default();
        let init = InitCluster {
            cluster_id: [1; 16],
            trust_domain: "demo.test".to_owned(),
            anchors: Vec::new(),
            owner_sha256: [2; 32],
            knock_secret: [3; 32],
            lease_ms: 10_000,
            hold_ms: 30_000,
        };
        let init = Command::new(Actor::BOOTSTRAP, 1, None, Body::InitCluster(init));
        state.apply(1, &init, &mut Changes::default());
        let broker = PutBroker {
            node: 1,
            name: "b1".to_owned(),
            region: "here".to_owned(),
            host: "b1.demo.test".to_owned(),
            edge: String::new(),
            web: String::new(),
            peer: String::new(),
            roles: vec![BrokerRole::Web as i32],
        };
        let broker = Command::new(Actor::BOOTSTRAP, 1, None, Body::PutBroker(broker));
        state.apply(1, &broker, &mut Changes::default());
        let token = state.rows::<Token>().next().unwrap();
        (state, Actor::token(token.id(), token.generation))
    }

    fn objects() -> Vec<Object> {
        serde_json::from_value(serde_json::json!([
            { "Region": { "name": "eu", "latitude": 50.0, "longitude": 8.0 } },
            { "Zone": { "name": "internal" } },
            { "ConnectorGroup": { "name": "dc", "region": "eu" } },
            { "Segment": { "name": "crm", "hosts": ["crm.internal"], "tcp": ["8080", "9000-9010"],
                "connector_groups": ["dc"] } },
            { "Policy": { "name": "crm", "cedar": "permit(principal, action, resource in Segment::\"crm\");" } },
        ]))
        .unwrap()
    }

    fn request(objects: Vec<Object>, prune: bool) -> ApplyRequest {
        ApplyRequest { objects, deletes: Vec::new(), expect_revision: None, dry_run: false, prune }
    }

    #[test]
    fn what_was_applied_reads_back_and_applies_again_as_nothing() {
        let (mut state, actor) = house();
        let command = |state: &Applied, request| {
            let body = Body::Apply(build(state, request).unwrap());
            Command::new(actor.clone(), 1, None, body)
        };
        let first = command(&state, request(objects(), false));
        let (_, changed) = preview_of(&state, 2, &first).unwrap();
        assert_eq!(changed.len(), 5);
        assert!(changed.iter().all(|change| change.change == "created"));
        let outcome = state.apply(2, &first, &mut Changes::default());
        assert!(matches!(outcome, Outcome::Done { .. }), "{outcome:?}");

        let read = all(&state);
        let again = command(&state, request(read.clone(), true));
        assert_eq!(preview_of(&state, 3, &again).unwrap().1, []);
        assert!(read.contains(&objects()[3]), "{read:?}");

        let pruned = command(&state, request(objects()[..3].to_vec(), true));
        let (_, changed) = preview_of(&state, 3, &pruned).unwrap();
        let gone: Vec<_> = changed.iter().map(|change| (change.kind, change.change)).collect();
        assert_eq!(gone, [(Kind::Policy, "deleted"), (Kind::Segment, "deleted")]);
    }

    #[test]
    fn every_policy_that_does_not_compile_is_named() {
        let (state, _) = house();
        let policy = |name: &str| {
            Object::Policy(spec::Policy { name: name.to_owned(), cedar: "permit(".to_owned(), simulate: false })
        };
        let problem = build(&state, request(vec![policy("one"), policy("two")], false)).unwrap_err();
        assert_eq!(problem.status, 422);
        assert!(problem.detail.contains("`one`") && problem.detail.contains("`two`"), "{}", problem.detail);
    }

    #[test]
    fn fields_that_are_not_there_and_numbers_that_are_none_are_refused() {
        for body in [
            r#"{"objects": [{"Zone": {"name": "x", "is_admin": true}}]}"#,
            r#"{"objects": [], "tenant_id": 4}"#,
            r#"{"expect_revision": -1}"#,
            r#"{"expect_revision": 99999999999999999999999}"#,
            r#"{"objects": {"Zone": 1}}"#,
        ] {
            let refused = crate::web::input::json::<ApplyRequest>(body.as_bytes()).map(|_| ()).unwrap_err();
            assert_eq!(refused.status, 422, "{body}");
        }
        assert_eq!(crate::web::input::json::<ApplyRequest>(b"{").map(|_| ()).unwrap_err().status, 400);
    }
}
