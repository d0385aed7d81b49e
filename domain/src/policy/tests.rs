use super::*;
use crate::name::Host;
use crate::rows::{self, PolicyMode, Transport};
use crate::segment::SegmentIndex;
use crate::spec;

fn compiled(cedar: &str) -> Result<crate::command::CompiledPolicy, Error> {
    compile(&spec::Policy { name: "p".into(), cedar: cedar.into(), simulate: false })
}

fn id(seq: u64) -> Id {
    Id::new(1, seq)
}

const ALICE: Id = Id::new(1, 1);
const BOB: Id = Id::new(1, 2);
const SALES: Id = Id::new(1, 3);
const BILLING: Id = Id::new(1, 4);
const CRM: Id = Id::new(1, 5);
const WILD: Id = Id::new(1, 6);
const OFFICE: Id = Id::new(1, 7);
const LAPTOP: Id = Id::new(1, 8);

/// A small company: `alice` is in `sales`, `bob` is not, `billing` is a workload.
struct World {
    state: State,
    next: u64,
}

impl World {
    fn new() -> Self {
        let mut world = Self { state: State::default(), next: 100 };
        world.put(&rows::Cluster { policy_revision: 7, ..Default::default() });
        world.put(&rows::Group { id: Some(SALES), number: 3, display_name: "sales".into(), ..Default::default() });
        let user = |id, number, name: &str, groups: Vec<u32>| rows::User {
            id: Some(id),
            number,
            user_name: name.into(),
            active: true,
            groups,
            ..Default::default()
        };
        world.put(&user(ALICE, 1, "alice", vec![3]));
        world.put(&user(BOB, 2, "bob", vec![]));
        world.put(&rows::Workload { id: Some(BILLING), name: "billing".into(), ..Default::default() });
        world.put(&rows::Device { id: Some(LAPTOP), user: Some(ALICE), name: "laptop".into(), ..Default::default() });
        world.put(&rows::SegmentGroup { id: Some(OFFICE), name: "office".into() });
        world.put(&rows::Zone { id: Some(id(9)), name: "internal".into() });
        world.put(&segment(CRM, "crm", "crm.internal", true, vec![OFFICE]));
        world.put(&segment(WILD, "wild", "*.internal", true, vec![]));
        world
    }

    fn put<R: rows::Row>(&mut self, row: &R) {
        self.state.put(row);
    }

    /// Compiles and stores a policy as `apply` does.
    fn policy_in(mut self, mode: PolicyMode, cedar: &str) -> Self {
        let compiled = compiled(cedar).unwrap_or_else(|error| panic!("{error}"));
        let resolve = |name: &str| match name {
            "alice" => Some(ALICE),
            "bob" => Some(BOB),
            "sales" => Some(SALES),
            "billing" => Some(BILLING),
            "crm" => Some(CRM),
            "wild" => Some(WILD),
            "office" => Some(OFFICE),
            "gone" => Some(id(99)),
            _ => None,
        };
        let references = compiled.references.into_iter();
        self.next += 1;
        let row = rows::Policy {
            id: Some(id(self.next)),
            name: format!("p{}", self.next),
            source: cedar.into(),
            template: compiled.template,
            references: references.map(|(kind, name)| rows::Reference { kind, id: resolve(&name), name }).collect(),
            mode: mode as i32,
        };
        self.put(&row);
        self
    }

    fn policy(self, cedar: &str) -> Self {
        self.policy_in(PolicyMode::Enforce, cedar)
    }

    fn simulated(self, cedar: &str) -> Self {
        self.policy_in(PolicyMode::Simulate, cedar)
    }

    fn decide(&self, request: &Request) -> Verdict {
        decide(&self.state, &SegmentIndex::build(&self.state), &PolicyIndex::build(&self.state), request)
    }

    fn explain(&self, request: &Request) -> Explanation {
        explain(&self.state, &SegmentIndex::build(&self.state), &PolicyIndex::build(&self.state), request)
    }
}

fn segment(id: Id, name: &str, host: &str, inclusive: bool, groups: Vec<Id>) -> rows::Segment {
    rows::Segment {
        id: Some(id),
        name: name.into(),
        hosts: vec![host.into()],
        ports: vec![rows::PortRange { transport: Transport::Tcp as i32, first: 8080, last: 8080 }],
        inclusive,
        groups,
        ..Default::default()
    }
}

fn ask(principal: Principal, host: &str, port: u16) -> Request {
    let endpoint = Endpoint { host: Host::parse(host).unwrap(), port, transport: Transport::Tcp };
    Request { principal, endpoint, context: Context { now_ms: 1_000_000_000_000, ..Default::default() } }
}

fn alice() -> Request {
    ask(Principal::User(ALICE), "crm.internal", 8080)
}

fn bob() -> Request {
    ask(Principal::User(BOB), "crm.internal", 8080)
}

const SALES_MAY: &str =
    r#"permit(principal in Group::"sales", action == Action::"connect", resource in Segment::"crm");"#;

#[test]
fn names_become_numbered_references_wherever_they_stand() {
    let compiled = compiled(
        r#"permit(principal is User in Group::"sales", action, resource in SegmentGroup::"office")
           when { principal in [Group::"sales", Group::"ops"] && resource in Segment::"crm" && principal != User::"$0" };"#,
    )
    .unwrap();
    let names: Vec<&str> = compiled.references.iter().map(|(_, name)| name.as_str()).collect();
    assert_eq!(names, ["sales", "office", "ops", "crm", "$0"]);
    assert!(!compiled.template.contains("sales") && compiled.template.contains("$4"));
}

#[test]
fn a_policy_that_is_not_one_valid_policy_is_refused_with_a_reason() {
    let long =
        format!("permit(principal, action, resource) when {{ {} }};", ["context.observed.port == 1"; 400].join(" || "));
    for (cedar, reason) in [
        ("", "0 policies"),
        ("permit(principal, action, resource);permit(principal, action, resource);", "2 policies"),
        ("permit(principal == ?principal, action, resource);", "template"),
        ("permit(principal, action", "not Cedar"),
        ("permit(principal, action, resource) when { context.nothing == 1 };", "does not fit the schema"),
        ("permit(principal, action, resource) when { context.observed.port == \"80\" };", "does not fit the schema"),
        ("permit(principal, action == Action::\"delete\", resource);", "does not fit the schema"),
        ("permit(principal in Team::\"x\", action, resource);", "does not fit the schema"),
        ("permit(principal == Device::\"1-2\", action, resource);", "only users"),
        ("permit(principal, action, resource == Endpoint::\"tcp/x:1\");", "only users"),
        ("permit(principal in Segment::\"crm\", action, resource);", "does not fit the schema"),
        (&long, "nested too deeply"),
        (&" ".repeat(crate::limits::POLICY_BYTES_MAX + 1), "more than"),
    ] {
        let error = compiled(cedar).expect_err(cedar).to_string();
        assert_eq!(error.matches("policy `p`").count(), 1, "{error}");
        assert!(error.contains(reason), "{cedar}: {error}");
    }
}

#[test]
fn deeply_nested_text_is_refused_and_breaks_nothing() {
    let times = |text: &str, count: usize| text.repeat(count);
    let conditions = |bytes: usize| {
        [
            times("(", bytes),
            format!("{}true{}", times("(", bytes / 2 - 4), times(")", bytes / 2 - 4)),
            format!("{}true", times("!", bytes - 4)),
            format!("{}true", times("!(", bytes / 2)),
            format!("{}true{} == []", times("[", bytes / 2 - 8), times("]", bytes / 2 - 8)),
            times("true||", bytes / 6) + "true",
            times("true&&", bytes / 6) + "true",
            times("1+", bytes / 2 - 8) + "1 == 1",
            times("if true then ", bytes / 13),
            format!("context{}", times(".a", bytes / 2 - 8)),
        ]
    };
    // All of the permitted length, and as much as is let through to the parser.
    for bytes in [crate::limits::POLICY_BYTES_MAX - 100, 2_000, 1_700, 600, 300, 200] {
        for condition in conditions(bytes) {
            let shown: String = condition.chars().take(12).collect();
            let result = compiled(&format!("permit(principal, action, resource) when {{ {condition} }};"));
            assert!(result.is_err() || bytes < 400, "{shown}");
        }
    }
    let clauses = format!("permit(principal, action, resource) {};", times("when { context.observed.port > 1 } ", 70));
    assert!(compiled(&clauses).is_ok(), "{:?}", compiled(&clauses));
}

#[test]
fn an_optional_attribute_without_has_is_refused() {
    for (cedar, fine) in [
        ("context.auth_age < 3600", false),
        ("context has auth_age && context.auth_age < 3600", true),
        ("context.attested.disk_encrypted", false),
        ("context has attested && context.attested.disk_encrypted", false),
        ("context has attested && context.attested has disk_encrypted && context.attested.disk_encrypted", true),
        ("context has attested.disk_encrypted && context.attested.disk_encrypted", true),
        ("context.observed has source && context.observed.source.isInRange(ip(\"10.0.0.0/8\"))", true),
    ] {
        let result = compiled(&format!("permit(principal, action, resource) when {{ {cedar} }};"));
        assert_eq!(result.is_ok(), fine, "{cedar}: {result:?}");
    }
}

#[test]
fn the_default_is_deny() {
    let verdict = World::new().decide(&alice());
    assert!(!verdict.allowed);
    assert_eq!(verdict.reason, Reason::NoPermit);
    assert_eq!((verdict.revision, verdict.good_until_ms, verdict.simulated_differs), (7, u64::MAX, None));
}

#[test]
fn a_member_of_the_group_is_allowed_and_another_is_not() {
    let world = World::new().policy(SALES_MAY);
    let verdict = world.decide(&alice());
    assert!(verdict.allowed, "{verdict:?}");
    assert_eq!(verdict.segment, Some(CRM));
    assert_eq!(verdict.deciding[0].name, "p101");
    assert_eq!(world.decide(&bob()).reason, Reason::NoPermit);
}

#[test]
fn a_workload_reaches_what_it_may_and_nothing_else() {
    let world =
        World::new().policy(r#"permit(principal == Workload::"billing", action, resource in Segment::"wild");"#);
    assert!(world.decide(&ask(Principal::Workload(BILLING), "ledger.internal", 8080)).allowed);
    assert!(!world.decide(&ask(Principal::Workload(id(50)), "ledger.internal", 8080)).allowed);
    assert!(!world.decide(&ask(Principal::User(ALICE), "ledger.internal", 8080)).allowed);
}

#[test]
fn segment_groups_are_ancestors_of_the_endpoint() {
    let world = World::new().policy(r#"permit(principal, action, resource in SegmentGroup::"office");"#);
    assert!(world.decide(&bob()).allowed);
    assert!(!world.decide(&ask(Principal::User(BOB), "other.internal", 8080)).allowed);
}

#[test]
fn a_forbid_beats_every_permit() {
    let world = World::new().policy(SALES_MAY).policy(r#"forbid(principal == User::"alice", action, resource);"#);
    let verdict = world.decide(&alice());
    assert_eq!(verdict.reason.code(), "forbidden");
    assert_eq!(verdict.deciding[0].name, "p102");
}

#[test]
fn the_segment_is_the_most_specific_one_that_a_deciding_permit_reaches() {
    let world = World::new().policy(r#"permit(principal, action, resource in Segment::"wild");"#);
    let verdict = world.decide(&alice());
    assert_eq!(verdict.matched.iter().map(|m| m.segment).collect::<Vec<_>>(), [CRM, WILD]);
    assert_eq!(verdict.segment, Some(WILD));
    assert_eq!(world.policy(SALES_MAY).decide(&alice()).segment, Some(CRM));
}

#[test]
fn unknown_hosts_and_ports_are_denied_before_any_policy() {
    let world = World::new().policy("permit(principal, action, resource);");
    assert_eq!(world.decide(&ask(Principal::User(ALICE), "crm.elsewhere", 8080)).reason, Reason::NoSegment);
    assert_eq!(world.decide(&ask(Principal::User(ALICE), "crm.internal", 22)).reason, Reason::WrongPort);
}

#[test]
fn the_inactive_the_deleted_and_the_revoked_are_denied_before_any_policy() {
    let mut world = World::new().policy("permit(principal, action, resource);");
    let mut with_laptop = alice();
    with_laptop.context.device = Some(LAPTOP);
    assert!(world.decide(&with_laptop).allowed);
    assert!(world.decide(&ask(Principal::Device(LAPTOP), "crm.internal", 8080)).allowed);

    assert_eq!(world.decide(&ask(Principal::User(id(50)), "crm.internal", 8080)).reason, Reason::PrincipalUnknown);
    let user: rows::User = world.state.by_id(ALICE).unwrap();
    world.put(&rows::User { active: false, ..user });
    assert_eq!(world.decide(&alice()).reason, Reason::PrincipalInactive);
    let workload: rows::Workload = world.state.by_id(BILLING).unwrap();
    world.put(&rows::Workload { revoked: true, ..workload });
    assert_eq!(world.decide(&ask(Principal::Workload(BILLING), "crm.internal", 8080)).reason, Reason::PrincipalRevoked);
    let device: rows::Device = world.state.by_id(LAPTOP).unwrap();
    world.put(&rows::Device { revoked: true, ..device });
    let mut with_laptop = bob();
    with_laptop.context.device = Some(LAPTOP);
    assert_eq!(world.decide(&with_laptop).reason, Reason::DeviceRevoked);
}

#[test]
fn a_deleted_group_that_a_policy_names_matches_nobody() {
    let world = World::new().policy(r#"permit(principal in Group::"gone", action, resource);"#);
    assert_eq!(world.decide(&alice()).reason, Reason::NoPermit);

    let mut world = World::new().policy(SALES_MAY);
    world.state.delete(crate::state::Table::Group, SALES.key().to_vec());
    assert_eq!(world.decide(&alice()).reason, Reason::NoPermit, "the number of a deleted group is ignored");
}

#[test]
fn a_policy_that_fails_denies_and_is_named() {
    let overflow = r#"permit(principal, action, resource in Segment::"crm") when { 9223372036854775807 + context.observed.port > 0 };"#;
    let world = World::new().policy(SALES_MAY).policy(overflow);
    let verdict = world.decide(&alice());
    assert!(matches!(&verdict.reason, Reason::PolicyError { policy, .. } if policy.name == "p102"), "{verdict:?}");
    assert!(!verdict.allowed);

    let elsewhere = overflow.replace("crm", "wild");
    let world = World::new().policy(SALES_MAY).policy(&elsewhere);
    assert!(!world.decide(&alice()).allowed, "both segments were matched");
    let world =
        World::new().policy(SALES_MAY).policy(&overflow.replace(r#"(principal,"#, r#"(principal == User::"bob","#));
    assert!(world.decide(&alice()).allowed, "a policy that cannot concern the request is not looked at");
}

#[test]
fn a_policy_that_does_not_load_denies_everything_it_could_match() {
    for broken in [
        rows::Policy { template: "{".into(), ..Default::default() },
        rows::Policy { template: compiled(SALES_MAY).unwrap().template, ..Default::default() },
    ] {
        let mut world = World::new().policy(SALES_MAY);
        world.put(&rows::Policy { id: Some(id(500)), name: "broken".into(), ..broken });
        let verdict = world.decide(&alice());
        assert!(matches!(&verdict.reason, Reason::PolicyError { policy, .. } if policy.id == id(500)), "{verdict:?}");
        assert_eq!(PolicyIndex::build(&world.state).broken().count(), 1);
        assert_eq!(world.explain(&alice()).change.unwrap(), "correct policy `broken`");
    }
}

#[test]
fn simulated_policies_are_recorded_and_do_not_count() {
    let world = World::new().simulated(SALES_MAY);
    let verdict = world.decide(&alice());
    assert!(!verdict.allowed);
    assert_eq!(verdict.simulated_differs, Some(true));
    assert_eq!(world.explain(&alice()).change.unwrap(), "enforce policy `p101`, which is simulated");

    let world = World::new()
        .policy(SALES_MAY)
        .simulated(r#"forbid(principal, action, resource) when { context.observed.port == 1 };"#);
    let verdict = world.decide(&alice());
    assert!(verdict.allowed);
    assert_eq!(verdict.simulated_differs, Some(false));
}

#[test]
fn indexes_of_another_revision_deny() {
    let mut world = World::new().policy(SALES_MAY);
    let (segments, policies) = (SegmentIndex::build(&world.state), PolicyIndex::build(&world.state));
    world.put(&rows::Cluster { policy_revision: 8, ..Default::default() });
    assert_eq!(decide(&world.state, &segments, &policies, &alice()).reason, Reason::Stale);
    let policies = policies.rebuild(&world.state);
    assert!(decide(&world.state, &SegmentIndex::build(&world.state), &policies, &alice()).allowed);
}

#[test]
fn a_verdict_that_read_a_time_is_good_until_the_earliest_edge() {
    let may_when =
        |condition: &str| World::new().policy(&format!("permit(principal, action, resource) when {{ {condition} }};"));
    let mut request = alice();
    let now_ms = request.context.now_ms;
    request.context.auth_time_ms = Some(now_ms - 3_590_000);

    let age = may_when("context has auth_age && context.auth_age <= 3600").decide(&request);
    assert!(age.allowed);
    assert_eq!(age.good_until_ms, now_ms + 10_000);
    let far = may_when("context has auth_age && context.auth_age <= 86400").decide(&request);
    assert_eq!(far.good_until_ms, now_ms + TIMED_VERDICT_MS_MAX);
    let hour = may_when("context.clock.hour < 24").decide(&request);
    assert_eq!(hour.good_until_ms, (now_ms / 3_600_000 + 1) * 3_600_000);
    let now = may_when("context.clock.now < datetime(\"2001-09-09T01:46:41Z\")").decide(&request);
    assert!(now.allowed && now.good_until_ms <= now_ms + TIMED_VERDICT_MS_MAX);
    let untimed = may_when("context has auth_age && context.observed.port == 8080").decide(&request);
    assert!(untimed.allowed);
    assert_eq!(untimed.good_until_ms, u64::MAX);
}

#[test]
fn posture_that_is_absent_is_not_met_and_does_not_fail() {
    let world = World::new().policy(
        "permit(principal, action, resource) when { context has attested.disk_encrypted && context.attested.disk_encrypted };",
    );
    assert_eq!(world.decide(&alice()).reason, Reason::NoPermit);
    let mut request = alice();
    request.context.attested = Some(Attested::default());
    assert_eq!(world.decide(&request).reason, Reason::NoPermit);
    request.context.attested = Some(Attested { disk_encrypted: Some(true), ..Default::default() });
    assert!(world.decide(&request).allowed);
}

#[test]
fn an_explanation_names_the_first_unmet_condition_and_the_smallest_change() {
    let world = World::new().policy(SALES_MAY);
    let denied = world.explain(&bob());
    assert!(!denied.allowed);
    assert_eq!(denied.zone.as_deref(), Some("internal"));
    assert_eq!(denied.segments[0].name, "crm");
    let unmet = denied.policies[0].unmet.as_ref().unwrap();
    assert_eq!((unmet.part.as_str(), unmet.text.as_str()), ("principal", r#"principal in Group::"sales""#));
    assert_eq!(denied.change.as_deref(), Some("add `bob` to group `sales`"));
    let printed = denied.to_string();
    assert!(
        printed.starts_with("DENIED: no policy permits it\n") && printed.contains("to change  add `bob`"),
        "{printed}"
    );

    let allowed = world.explain(&alice());
    assert!(allowed.allowed && allowed.policies[0].deciding && allowed.change.is_none());
    assert_eq!(allowed.segment.as_deref(), Some("crm"));
    assert_eq!(allowed.groups, ["sales"]);
}

#[test]
fn an_explanation_takes_conditions_apart() {
    let first_unmet = |conditions: &str| {
        let world =
            World::new().policy(&format!(r#"permit(principal, action, resource in Segment::"crm") {conditions};"#));
        let mut request = bob();
        request.context.broker_region = "eu".into();
        let explanation = world.explain(&request);
        let unmet = explanation.policies[0].unmet.clone().unwrap();
        (unmet.part, unmet.text, explanation.change.unwrap())
    };
    let (part, text, change) =
        first_unmet(r#"when { context.observed.broker_region == "eu" && principal in Group::"sales" }"#);
    assert_eq!((part.as_str(), text.as_str()), ("when", r#"principal in Group::"sales""#));
    assert_eq!(change, "add `bob` to group `sales`");

    let (part, text, _) =
        first_unmet(r#"when { context.observed.port == 8080 } unless { context.observed.broker_region == "eu" }"#);
    assert_eq!(part, "unless");
    assert!(text.contains("broker_region") && text.contains("\"eu\""), "{text}");

    let (part, text, _) = first_unmet(r#"when { principal is Workload }"#);
    assert_eq!((part.as_str(), text.as_str()), ("when", "principal is Workload"));

    let (_, text, change) = first_unmet("when { context has auth_age && context.auth_age < 60 }");
    assert_eq!(text, "context has auth_age");
    assert!(change.contains("context has auth_age"), "{change}");
}

#[test]
fn an_explanation_says_what_stands_before_policy() {
    let mut world = World::new().policy("permit(principal, action, resource);");
    let explained = |world: &World, host, port| world.explain(&ask(Principal::User(ALICE), host, port));
    assert_eq!(explained(&world, "a.elsewhere", 1).change.unwrap(), "add `a.elsewhere` to a segment");
    assert_eq!(explained(&world, "crm.internal", 22).change.unwrap(), "add tcp port 22 to segment `crm`");
    assert_eq!(explained(&world, "a.elsewhere", 1).zone, None);
    let user: rows::User = world.state.by_id(ALICE).unwrap();
    world.put(&rows::User { active: false, ..user });
    let inactive = world.explain(&alice());
    assert_eq!(inactive.change.unwrap(), "activate `alice` in its directory");
    assert_eq!(inactive.policies.len(), 1, "what policy would say is still shown");
    let unknown = world.explain(&ask(Principal::User(id(77)), "crm.internal", 8080));
    assert_eq!((unknown.reason.code(), unknown.principal.as_str()), ("principal_unknown", "User 1-77"));
}

#[test]
fn only_policies_whose_scope_can_match_are_looked_at() {
    let mut world = World::new();
    for _ in 0..50 {
        world = world.policy(r#"permit(principal == User::"bob", action, resource in Segment::"wild");"#);
    }
    world = world.policy(SALES_MAY);
    let index = PolicyIndex::build(&world.state);
    let subject = evaluate::Subject::find(&world.state, Principal::User(ALICE)).unwrap().0;
    let matched = SegmentIndex::build(&world.state).matched(&alice().endpoint);
    assert_eq!(index.candidates(&subject.scopes(), &evaluate::resource_scopes(&matched)).len(), 1);
    assert_eq!(index.len(), 51);
}
