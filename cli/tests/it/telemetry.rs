//! What operators see of a running Selvedge: traces at a real OTLP receiver, metrics, log lines.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::Path;
use std::process::Stdio;
use std::sync::{Arc, Mutex};

use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{TraceService, TraceServiceServer};
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use opentelemetry_proto::tonic::common::v1::any_value::Value;

use crate::regions::{FAR, attachments, link};
use crate::world::{World, free_ports, http_get, text, wait};

const METRICS_PAGE: &str = include_str!("../../../docs/reference/metrics.md");
/// What a scrape after one session must have.
const FAMILIES: [&str; 17] = [
    "selvedge_edge_sessions",
    "selvedge_edge_opens_total",
    "selvedge_edge_open_seconds",
    "selvedge_edge_dials_total",
    "selvedge_edge_control_streams",
    "selvedge_relay_flows",
    "selvedge_relay_bytes_total",
    "selvedge_relay_closed_total",
    "selvedge_audit_records_total",
    "selvedge_audit_sync_seconds",
    "selvedge_cluster_leader",
    "selvedge_cluster_term",
    "selvedge_cluster_applied_index",
    "selvedge_cluster_lease_left_seconds",
    "selvedge_cluster_lease_renewals_total",
    "selvedge_log_sync_seconds",
    "selvedge_web_requests_total",
];

#[test]
fn one_trace_runs_through_client_broker_and_connector_and_its_id_is_in_the_audit_record() {
    let collector = Collector::start();
    let shop = Shop::open(vec![("SELVEDGE_OTLP_ENDPOINT".into(), collector.endpoint.clone())]);
    shop.visit("ann");
    assert_eq!(shop.nc("bob", "hello\n").0, "");

    let open = shop.record("session.open");
    let trace = open["trace"].as_str().expect("a trace id").to_owned();
    let wanted = [
        ("selvedge-client", "session.attempt"),
        ("selvedge-client", "session.handshake"),
        ("selvedge-broker", "session"),
        ("selvedge-broker", "policy"),
        ("selvedge-broker", "path"),
        ("selvedge-broker", "dial"),
        ("selvedge-connector", "connector.session"),
        ("selvedge-connector", "connector.dial"),
        ("selvedge-connector", "connector.app_connect"),
        ("selvedge-connector", "connector.handshake"),
    ];
    wait("every span of the session", || {
        let spans = collector.trace(&trace);
        wanted.iter().all(|(service, name)| spans.iter().any(|span| span.service == *service && span.name == *name))
    });
    let spans = collector.trace(&trace);
    let parent = |name: &str| {
        let span = spans.iter().find(|span| span.name == name).expect("it came");
        spans.iter().find(|other| other.id == span.parent).map(|other| other.name.as_str())
    };
    assert_eq!(parent("session.attempt"), None);
    assert_eq!(parent("session.handshake"), Some("session.attempt"));
    assert_eq!(parent("session"), Some("session.attempt"));
    for step in ["policy", "path", "dial"] {
        assert_eq!(parent(step), Some("session"), "{step}");
    }
    assert_eq!(parent("connector.session"), Some("dial"));
    for step in ["connector.dial", "connector.app_connect", "connector.handshake"] {
        assert_eq!(parent(step), Some("connector.session"), "{step}");
    }
    let session = open["session"].as_str().expect("a session's id");
    for name in ["session.attempt", "session", "connector.session"] {
        let span = spans.iter().find(|span| span.name == name).expect("it came");
        assert_eq!(span.attributes.get("session").map(String::as_str), Some(session), "{name}");
    }

    let denied = shop.record("session.denied");
    let trace = denied["trace"].as_str().expect("a trace id");
    wait("the refused attempt", || collector.trace(trace).iter().any(|span| span.name == "policy"));
    assert!(collector.trace(trace).iter().all(|span| span.service != "selvedge-connector"));
    for said in collector.everything_said() {
        assert!(!said.contains("shop.internal") && !said.contains("@test.example"), "a name left the house: {said}");
    }
}

#[test]
fn a_dial_that_another_broker_passes_on_is_a_span_of_the_same_trace() {
    let collector = Collector::start();
    let _shop = Shop::open_at(3, vec![("SELVEDGE_OTLP_ENDPOINT".into(), collector.endpoint.clone())]);
    wait("the spans of both brokers and of the connector", || {
        // Later dials may find the connector here: it has opened a stream to the broker that stitches.
        let all = collector.spans.lock().expect("no thread panicked").clone();
        let Some(passed) = all.iter().find(|span| span.name == "relay.dial") else { return false };
        let spans = collector.trace(&passed.trace);
        let parent = |name: &str| {
            let span = spans.iter().find(|span| span.name == name)?;
            spans.iter().find(|other| other.id == span.parent).map(|other| other.name.as_str())
        };
        parent("relay.dial") == Some("dial") && parent("connector.session") == Some("relay.dial")
    });
}

#[test]
fn a_broker_with_an_endpoint_records_the_attempts_of_clients_that_record_nothing() {
    let collector = Collector::start();
    let mut shop = Shop::open(vec![("SELVEDGE_OTLP_ENDPOINT".into(), collector.endpoint.clone())]);
    shop.world.env.clear();
    shop.visit("ann");
    let trace = shop.record("session.open")["trace"].as_str().expect("a trace id").to_owned();
    wait("spans of broker and connector", || {
        let services: BTreeSet<_> = collector.trace(&trace).into_iter().map(|span| span.service).collect();
        services.into_iter().eq(["selvedge-broker", "selvedge-connector"])
    });
}

#[test]
fn the_metrics_are_those_of_the_reference_with_labels_from_closed_sets() {
    let shop = Shop::open(Vec::new());
    shop.visit("ann");
    assert_eq!(shop.nc("bob", "hello\n").0, "");
    shop.record("session.close");
    let answer = http_get(shop.world.brokers[0].ops, "/metrics").expect("the ops listener answers");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head and a body");
    assert!(head.to_lowercase().contains("content-type: text/plain; version=0.0.4"), "{head}");
    let scrape = Scrape::parse(body);

    for family in FAMILIES {
        assert!(scrape.kinds.contains_key(family), "`{family}` is missing");
    }
    assert!(scrape.sum("selvedge_relay_bytes_total", "direction", "down") >= 6.0);
    assert!(scrape.sum("selvedge_edge_opens_total", "outcome", "opened") >= 1.0);
    assert!(scrape.sum("selvedge_edge_opens_total", "outcome", "refused") >= 1.0);
    assert!(scrape.sum("selvedge_audit_records_total", "kind", "session.open") >= 1.0);
    assert!(scrape.sum("selvedge_audit_records_total", "kind", "session.denied") >= 1.0);

    let reference = reference();
    for (family, kind) in &scrape.kinds {
        let Some((documented, _)) = reference.get(family.as_str()) else {
            panic!("`{family}` is not in the reference")
        };
        assert_eq!(kind, documented, "{family}");
        assert!(scrape.described.contains(family), "`{family}` has no help");
    }
    for (family, labels, _) in &scrape.samples {
        let (_, sets) = &reference[family.as_str()];
        for (label, value) in labels.iter().filter(|(label, _)| !["le", "quantile"].contains(&label.as_str())) {
            let set = sets.get(label.as_str()).unwrap_or_else(|| panic!("`{family}` has an unknown label `{label}`"));
            let is_node = set.contains("*node*") && value.parse::<u64>().is_ok();
            assert!(is_node || set.contains(value.as_str()), "`{family}`: `{label}` is `{value}`");
        }
    }
}

#[test]
fn log_lines_as_json_are_few_and_name_neither_people_nor_destinations() {
    let shop = Shop::open(vec![("SELVEDGE_LOG_FORMAT".into(), "json".into())]);
    for _ in 0..5 {
        shop.visit("ann");
    }
    assert_eq!(shop.nc("bob", "hello\n").0, "");
    let logs = ["b1.log", "connector.log"].map(|log| std::fs::read_to_string(shop.world.path(log)).expect("a log"));
    let before: usize = logs.iter().map(|log| log.lines().count()).sum();
    for line in logs.iter().flat_map(|log| log.lines()) {
        let line: serde_json::Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
        for field in ["timestamp", "level", "target", "fields"] {
            assert!(!line[field].is_null(), "no `{field}` in {line}");
        }
        let text = line.to_string();
        for name in ["shop", "@test.example", "svt_", &shop.code] {
            assert!(!text.contains(name), "`{name}` is in a log line: {text}");
        }
    }
    for _ in 0..5 {
        shop.visit("ann");
    }
    let logs = ["b1.log", "connector.log"].map(|log| std::fs::read_to_string(shop.world.path(log)).expect("a log"));
    let after: usize = logs.iter().map(|log| log.lines().count()).sum();
    assert!(after - before <= 2, "sessions that go well are not told at INFO: {}", logs.concat());
}

/// One broker or two, one connector, an application, `ann` who may and `bob` who may not.
struct Shop {
    world: World,
    port: u16,
    code: String,
    /// What clients cannot dial.
    far: Vec<&'static str>,
}

impl Shop {
    fn open(env: Vec<(String, String)>) -> Self {
        Self::open_at(1, env)
    }

    /// With three brokers clients are attached to the first alone, and the connector to the others.
    fn open_at(brokers: usize, env: Vec<(String, String)>) -> Self {
        let port = echo_server().port();
        let mut world = World::start_with(Path::new(env!("CARGO_BIN_EXE_selvedge")), brokers, env);
        let apart = brokers > 1;
        let near: Vec<_> = apart.then(|| ("b1", link(world.brokers[0].edge, FAR))).into_iter().collect();
        let far = if apart { vec!["b2=127.0.0.1:1", "b3=127.0.0.1:1"] } else { vec![] };
        let token = world.directory("people");
        let ann = world.user(&token, "ann@test.example");
        world.user(&token, "bob@test.example");
        world.group(&token, "sales", &[&ann]);
        world.apply_segments(&[("shop", "shop.internal", port)]);
        let policy = "kind: Policy\nname: sales-shop\ncedar: |\n  permit(principal in Group::\"sales\", action == Action::\"connect\", resource in Segment::\"shop\");\n";
        assert!(world.apply(policy).status.success());
        world.connector_via("connector", &["shop.internal"], &near);
        if apart {
            wait("the connector at the others", || attachments(&world).len() == 2);
        }
        for name in ["ann", "bob"] {
            world.client(name, &format!("{name}@test.example"));
        }
        let code = world.secret("device", "ann@test.example");
        let shop = Self { world, port, code, far };
        wait("the connector", || shop.nc("ann", "hello\n").0 == "hello\n");
        shop
    }

    /// A session that goes well.
    fn visit(&self, who: &str) {
        let (answer, said) = self.nc(who, "hello\n");
        assert_eq!(answer, "hello\n", "{said}");
    }

    fn nc(&self, who: &str, line: &str) -> (String, String) {
        let (port, state) = (self.port.to_string(), self.world.path(who));
        let mut child = self
            .world
            .command(&["client", "nc", "shop.internal", &port, "--state", text(&state)])
            .args(self.far.iter().flat_map(|far| ["--via", far]))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("a client");
        // A client that is refused may have gone already.
        let _ = child.stdin.take().expect("piped").write_all(line.as_bytes());
        let output = child.wait_with_output().expect("it ends");
        let text = |bytes| String::from_utf8(bytes).expect("text");
        (text(output.stdout), text(output.stderr))
    }

    /// The newest record of a kind, once there is one.
    fn record(&self, kind: &str) -> serde_json::Value {
        let mut found = None;
        wait(kind, || {
            let lines = self.world.ok(&["audit", "show", "--json"]);
            let mut records =
                lines.lines().rev().map(|line| serde_json::from_str::<serde_json::Value>(line).expect("JSON"));
            found = records.find(|record| kind_of(record) == kind);
            found.is_some()
        });
        let found = found.expect("waited for");
        if found["record"].is_object() { found["record"].clone() } else { found }
    }
}

fn kind_of(record: &serde_json::Value) -> &str {
    record["kind"].as_str().or_else(|| record["record"]["kind"].as_str()).unwrap_or_default()
}

/// One span as it arrived.
#[derive(Clone)]
struct Span {
    service: String,
    name: String,
    trace: String,
    id: Vec<u8>,
    parent: Vec<u8>,
    attributes: BTreeMap<String, String>,
    said: String,
}

/// A receiver of OTLP over gRPC.
struct Collector {
    endpoint: String,
    spans: Arc<Mutex<Vec<Span>>>,
}

impl Collector {
    fn start() -> Self {
        let [address] = free_ports::<1>();
        let spans = Arc::default();
        let service = TraceServiceServer::new(Receiver(Arc::clone(&spans)));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        std::thread::spawn(move || {
            runtime
                .block_on(tonic::transport::Server::builder().add_service(service).serve(address))
                .expect("it serves");
        });
        wait("the receiver", || std::net::TcpStream::connect(address).is_ok());
        Self { endpoint: format!("http://{address}"), spans }
    }

    fn trace(&self, id: &str) -> Vec<Span> {
        self.spans.lock().expect("whole").iter().filter(|span| span.trace == id).cloned().collect()
    }

    fn everything_said(&self) -> Vec<String> {
        self.spans.lock().expect("whole").iter().map(|span| span.said.clone()).collect()
    }
}

struct Receiver(Arc<Mutex<Vec<Span>>>);

#[tonic::async_trait]
impl TraceService for Receiver {
    async fn export(
        &self,
        request: tonic::Request<ExportTraceServiceRequest>,
    ) -> Result<tonic::Response<ExportTraceServiceResponse>, tonic::Status> {
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let string = |value: Option<Value>| match value {
            Some(Value::StringValue(text)) => text,
            other => format!("{other:?}"),
        };
        let mut spans = self.0.lock().expect("whole");
        for resource in request.into_inner().resource_spans {
            let of_resource = resource.resource.map(|resource| resource.attributes).unwrap_or_default();
            let service = of_resource.into_iter().find(|one| one.key == "service.name").and_then(|one| one.value);
            let service = string(service.and_then(|value| value.value));
            for span in resource.scope_spans.into_iter().flat_map(|scope| scope.spans) {
                let said = format!("{span:?}");
                let attributes = span.attributes.into_iter();
                let attributes = attributes.map(|one| (one.key, string(one.value.and_then(|value| value.value))));
                spans.push(Span {
                    service: service.clone(),
                    name: span.name,
                    trace: hex(&span.trace_id),
                    id: span.span_id,
                    parent: span.parent_span_id,
                    attributes: attributes.collect(),
                    said,
                });
            }
        }
        Ok(tonic::Response::new(ExportTraceServiceResponse::default()))
    }
}

/// An answer in Prometheus' text format, which must be valid.
///
/// **Source** Prometheus text exposition format, 0.0.4.
struct Scrape {
    kinds: BTreeMap<String, String>,
    described: BTreeSet<String>,
    samples: Vec<Sample>,
}

/// Family, labels, value.
type Sample = (String, Vec<(String, String)>, f64);

impl Scrape {
    fn parse(text: &str) -> Self {
        assert!(text.ends_with('\n'), "the last line has no end");
        let mut scrape = Self { kinds: BTreeMap::new(), described: BTreeSet::new(), samples: Vec::new() };
        let mut seen = BTreeSet::new();
        for line in text.lines().filter(|line| !line.is_empty()) {
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').expect("a name and a kind");
                assert!(["counter", "gauge", "histogram", "summary"].contains(&kind), "{line}");
                assert!(scrape.kinds.insert(name.to_owned(), kind.to_owned()).is_none(), "two kinds: {line}");
            } else if let Some(rest) = line.strip_prefix("# HELP ") {
                let (name, _) = rest.split_once(' ').expect("a name and a text");
                assert!(scrape.described.insert(name.to_owned()), "two texts: {line}");
            } else {
                assert!(!line.starts_with('#'), "{line}");
                let (series, value) = line.rsplit_once(' ').expect("a series and a value");
                assert!(seen.insert(series.to_owned()), "twice: {line}");
                let value: f64 = value.parse().unwrap_or_else(|error| panic!("{error}: {line}"));
                let (name, labels) = series
                    .strip_suffix('}')
                    .map_or((series, ""), |series| series.split_once('{').unwrap_or_else(|| panic!("{line}")));
                let valid = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
                assert!(!name.is_empty() && name.chars().all(valid), "{line}");
                let labels = labels.split(',').filter(|label| !label.is_empty()).map(|label| {
                    let (name, value) = label.split_once("=\"").unwrap_or_else(|| panic!("{line}"));
                    let value = value.strip_suffix('"').unwrap_or_else(|| panic!("{line}"));
                    (name.to_owned(), value.to_owned())
                });
                let labels: Vec<_> = labels.collect();
                let family = ["", "_bucket", "_sum", "_count"]
                    .into_iter()
                    .find_map(|suffix| name.strip_suffix(suffix).filter(|family| scrape.kinds.contains_key(*family)));
                let family = family.unwrap_or_else(|| panic!("a sample before its kind: {line}"));
                scrape.samples.push((family.to_owned(), labels, value));
            }
        }
        scrape
    }

    fn sum(&self, family: &str, label: &str, value: &str) -> f64 {
        let has = |labels: &[(String, String)]| labels.iter().any(|(l, v)| l == label && v == value);
        self.samples.iter().filter(|(name, labels, _)| name == family && has(labels)).map(|(.., number)| number).sum()
    }
}

/// Of each metric in the reference: its kind, and the values that each of its labels may have.
fn reference() -> BTreeMap<&'static str, (&'static str, BTreeMap<&'static str, BTreeSet<&'static str>>)> {
    let quoted = |text: &'static str| text.split('`').skip(1).step_by(2);
    let intro = METRICS_PAGE.split_once("*code* is").and_then(|(_, rest)| rest.split_once('.')).expect("the codes").0;
    let rows = METRICS_PAGE.lines().filter(|line| line.starts_with("| `"));
    rows.map(|row| {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        let labels = cells[3].split(';').filter_map(|label| {
            let (name, values) = label.split_once(':')?;
            let mut set: BTreeSet<_> = quoted(values).collect();
            if values.contains("*code*") {
                set.extend(quoted(intro));
            }
            if values.contains("*node*") {
                set.insert("*node*");
            }
            Some((name.trim().trim_matches('`'), set))
        });
        (cells[1].trim_matches('`'), (cells[2], labels.collect()))
    })
    .collect()
}

fn echo_server() -> SocketAddr {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
    let address = listener.local_addr().expect("bound");
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let mut bytes = [0; 1024];
                while let Ok(read @ 1..) = stream.read(&mut bytes) {
                    stream.write_all(&bytes[..read])?;
                }
                Ok::<(), std::io::Error>(())
            });
        }
    });
    address
}
