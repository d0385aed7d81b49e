//! A broker in a temporary directory, with its web routes.

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::path::Path;
use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::http::{Request, Response, StatusCode, header};
use http_body_util::BodyExt as _;
use selvedge_cluster::{Blocking, Cluster, LogLimits, NothingToEnforce, Options, Preset, ShiftedClock, Tls};
use selvedge_domain::command::{CertificateIssued, InitCluster, PutBroker, Subject};
use selvedge_domain::rows::{BrokerRole, Token};
use selvedge_domain::state::IndexKey;
use selvedge_domain::{Actor, Asker, Body as Asked, Credential};
use selvedge_proto::identity::Kind;
use selvedge_proto::tls::{self, Identity, NotBefore};
use selvedge_storage::DataDir;
use selvedge_storage::audit::{Journal, StreamId};
use serde_json::{Value, json};
use tempfile::TempDir;
use tower::ServiceExt as _;

use crate::audit;
use crate::decision::Decider;
use crate::issuer::{Issued, Issuer, Seal};
use crate::web::listener::Source;
use crate::web::{Context, Parts, router, sha256};

pub(super) const DOMAIN: &str = "demo.test";
const CLUSTER_ID: [u8; 16] = [5; 16];
pub(crate) const OWNER: &str = "svt_the-first-owner-of-this-house";

pub(crate) struct House {
    pub(crate) context: Arc<Context>,
    pub(crate) clock: Arc<ShiftedClock>,
    router: Router,
    journal: Arc<Journal>,
    /// The broker's own certificate.
    pub(super) own: Identity,
    _dir: TempDir,
}

/// What came back.
pub(super) struct Got {
    pub(super) status: StatusCode,
    pub(super) headers: axum::http::HeaderMap,
    pub(super) text: String,
}

impl Got {
    pub(super) fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error}: {}", self.text))
    }

    pub(super) fn expect(self, status: u16) -> Value {
        assert_eq!(self.status.as_u16(), status, "{}", self.text);
        if self.text.is_empty() { Value::Null } else { self.json() }
    }
}

impl House {
    /// A broker whose cluster was not made yet.
    pub(super) async fn empty() -> (Self, Issued) {
        tls::install_provider();
        let dir = TempDir::new().unwrap();
        let data = Arc::new(DataDir::open(&dir.path().join("data")).unwrap());
        let now_ms = (tls::system_time())();
        let seal = Seal::File(dir.path().join("seal.key"));
        let (issuer, _) = Issuer::create(&dir.path().join("issuer"), &seal, DOMAIN, CLUSTER_ID, now_ms).unwrap();
        let anchors = Arc::new(issuer.anchors().clone());
        let (key, csr) = tls::new_key_and_csr().unwrap();
        let issued = issuer.issue(Kind::Broker, &data.node_id().to_string(), &csr, now_ms).unwrap();
        let identity = Identity::from_pem(&format!("{}{}", issued.chain_pem, *key)).unwrap();
        let journal = journal(dir.path(), &data);
        let time = tls::system_time();
        let clock = Arc::new(ShiftedClock::default());
        let cluster = Cluster::start(Options {
            dir: data,
            cluster_id: CLUSTER_ID,
            preset: Preset::Test,
            transport: Tls::shared(
                TcpListener::bind("127.0.0.1:0").unwrap(),
                Arc::new(tls::peer_server(&identity, &anchors, NotBefore::judged(), &time).unwrap()),
                Arc::new(tls::peer_client(&identity, &anchors, None, NotBefore::judged(), &time).unwrap()),
            ),
            clock: clock.clone(),
            seed: None,
            blocking: Blocking::Threads,
            enforcer: Arc::new(NothingToEnforce),
            seeds: BTreeMap::new(),
            dial: None,
            services: None,
            log_limits: LogLimits::default(),
            runtime: None,
        })
        .await
        .unwrap();
        let context = Context::new(Parts {
            cluster,
            decider: Decider::new(),
            edge: None,
            routing: None,
            audit: audit::Log::new(journal.clone(), tls::system_time()),
            issuer: Some(Arc::new(issuer)),
            anchors,
        });
        let router = router::router(context.clone());
        (Self { context, clock, router, journal, own: identity, _dir: dir }, issued)
    }

    /// A broker that is a cluster.
    pub(crate) async fn new() -> Self {
        let (house, issued) = Self::empty().await;
        let cluster = &house.context.cluster;
        let init = InitCluster {
            cluster_id: CLUSTER_ID,
            trust_domain: DOMAIN.to_owned(),
            anchors: house.context.anchors.to_json().into_bytes(),
            owner_sha256: sha256(OWNER),
            knock_secret: [3; 32],
            lease_ms: 10_000,
            hold_ms: 30_000,
        };
        cluster.initialize(init).await.unwrap();
        let broker = PutBroker {
            node: cluster.node(),
            name: "b1".to_owned(),
            region: "eu".to_owned(),
            host: "b1.demo.test".to_owned(),
            edge: "127.0.0.1:1".to_owned(),
            web: "127.0.0.1:2".to_owned(),
            peer: "127.0.0.1:3".to_owned(),
            roles: [BrokerRole::Voter, BrokerRole::Issuer, BrokerRole::Web].map(|role| role as i32).into(),
        };
        cluster.propose(Asker::BOOTSTRAP, Asked::PutBroker(broker), None).await.unwrap();
        let certificate = CertificateIssued {
            serial: issued.serial,
            subject: issued.id.to_string(),
            key_sha256: issued.spki_sha256,
            not_after_ms: issued.not_after_ms,
            of: Subject::Broker(cluster.node()),
        };
        cluster.propose(Asker::BOOTSTRAP, Asked::CertificateIssued(certificate), None).await.unwrap();
        house
    }

    pub(super) async fn send(&self, request: Request<Body>) -> Got {
        let mut request = request;
        request.extensions_mut().insert(Source(([127, 0, 0, 1], 4_000).into()));
        let response: Response<Body> = self.router.clone().oneshot(request).await.unwrap();
        let (parts, body) = response.into_parts();
        let bytes = body.collect().await.unwrap().to_bytes();
        Got { status: parts.status, headers: parts.headers, text: String::from_utf8(bytes.to_vec()).unwrap() }
    }

    /// An answer whose body has not ended.
    pub(super) async fn open(&self, path: &str, token: &str) -> Body {
        let mut request = Request::get(path).header(header::HOST, "web.demo.test");
        request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        let mut request = request.body(Body::empty()).unwrap();
        request.extensions_mut().insert(Source(([127, 0, 0, 1], 4_000).into()));
        let response = self.router.clone().oneshot(request).await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        response.into_body()
    }

    pub(super) async fn call(&self, method: &str, path: &str, token: &str, body: impl Into<Option<Value>>) -> Got {
        self.call_with(method, path, token, body, &[]).await
    }

    pub(super) async fn call_with(
        &self,
        method: &str,
        path: &str,
        token: &str,
        body: impl Into<Option<Value>>,
        headers: &[(&str, &str)],
    ) -> Got {
        let mut request = Request::builder().method(method).uri(path).header(header::HOST, "web.demo.test");
        if !token.is_empty() {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let body = body.into().map(|body: Value| body.to_string()).unwrap_or_default();
        self.send(request.body(Body::from(body)).unwrap()).await
    }

    /// A command that the first owner asks for.
    pub(super) async fn as_owner(&self, body: Asked) {
        let owner = self.context.cluster.state().find::<Token>(IndexKey::name("owner")).unwrap();
        let asker = Asker::holder(Actor::token(owner.id(), owner.generation), Credential::new(OWNER));
        self.context.cluster.propose(asker, body, None).await.unwrap();
    }

    pub(super) async fn token(&self, role: &str) -> String {
        let made = self.call("POST", "/api/v1/tokens", OWNER, json!({ "name": role, "role": role })).await.expect(201);
        made["token"].as_str().unwrap().to_owned()
    }

    pub(super) async fn directory(&self, name: &str) -> String {
        let made = self.call("POST", "/api/v1/directories", OWNER, json!({ "name": name })).await.expect(201);
        made["token"].as_str().unwrap().to_owned()
    }

    pub(super) async fn key(&self, body: Value) -> String {
        let made = self.call("POST", "/api/v1/keys", OWNER, body).await.expect(201);
        made["secret"].as_str().unwrap().to_owned()
    }

    pub(super) fn records(&self) -> Vec<Value> {
        let mut reader = self.journal.reader(self.journal.stream(), 1).unwrap();
        let records = reader.next_batch(10_000, 64 << 20).unwrap();
        records.iter().map(|record| serde_json::from_slice(record.body()).unwrap()).collect()
    }
}

fn journal(dir: &Path, data: &DataDir) -> Arc<Journal> {
    let stream = StreamId { broker: data.node_id(), boot: data.boot() };
    Arc::new(Journal::open(&dir.join("audit"), stream, selvedge_storage::audit::Options::default()).unwrap())
}
