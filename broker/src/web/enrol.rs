//! Enrolment: a secret with counted uses, and the proof of a key, become a certificate.
//!
//! **Invariant:** the request's proof of possession is checked before anything is proposed, and a certificate is signed
//! only for an enrolment that is committed.
//!
//! **Source** DESIGN "Identity and trust": secrets are bound to role, target, uses and expiry; repeating a request with
//! the same key is answered the same.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use axum::Json;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use axum::routing::post;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use prost::Message as _;
use selvedge_domain::command::{Enrol, Subject};
use selvedge_domain::rows::{Broker, BrokerRole, Device, EnrolKey, EnrolKind, User};
use selvedge_domain::state::IndexKey;
use selvedge_domain::{ActorKind, Asker, Body, Credential, Id, Rejected, RejectedCode, State as Applied};
use selvedge_proto::control::{Brokers, LoginGrant};
use selvedge_proto::grant::{self, GRANT_VERSION};
use selvedge_proto::identity::{Anchors, Kind, chain_pem};
use serde::{Deserialize, Serialize};

use super::api::keys::{Kind as Asked, kind_name};
use super::auth::{self, Need};
use super::input::Input;
use super::limit::{Who, prefix};
use super::listener::Source;
use super::metrics::REQUESTS_REFUSED_TOTAL;
use super::router::Route;
use super::{Context, EnrolSecret, Problem, sha256};
use crate::edge::{knock, push};
use crate::issuer::{Csr, Issued, Issuer};

/// A login by a one-time code is good for so long.
pub const GRANT_LIFE_MS: u64 = 7 * 24 * 3_600_000;

/// A repeated enrolment of a device is answered with its login for so long; later it takes a new code.
pub const GRANT_REPEAT_MS: u64 = 600_000;

pub(super) fn routes() -> Vec<Route> {
    vec![Route { path: "/enrol/v1".to_owned(), need: Need::Nothing, read: None, handlers: post(enrol) }]
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct EnrolRequest {
    secret: String,
    kind: Asked,
    #[serde(default)]
    name: String,
    csr: String,
    /// For brokers: the node id, decimal.
    #[serde(default)]
    node: Option<String>,
    /// For brokers: names and addresses that stand in the certificate beside the id.
    #[serde(default)]
    hosts: Vec<String>,
}

/// What was enrolled, and everything that it needs to begin.
#[derive(Serialize)]
struct Enrolled {
    id: String,
    spiffe: String,
    chain: Vec<String>,
    anchors: Anchors,
    trust_domain: String,
    cluster_id: String,
    not_after_ms: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    grant: Option<String>,
    knock_keys: Vec<String>,
    brokers: SignedBrokers,
    hold_ms: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    issuer_sealed: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    peers: Vec<PeerView>,
    /// For brokers: what their row says that they are for.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    roles: Vec<&'static str>,
}

#[derive(Serialize)]
struct SignedBrokers {
    list: String,
    signature: String,
    signer: String,
}

#[derive(Serialize)]
struct PeerView {
    node: String,
    peer: String,
    host: String,
}

async fn enrol(State(context): State<Arc<Context>>, request: Request) -> Result<Response, Problem> {
    let source = limit(&context, &request)?;
    let Input(request) =
        <Input<EnrolRequest> as axum::extract::FromRequest<_>>::from_request(request, &context).await?;
    // What is begun is ended, whether or not the caller waits: a use of the secret must lead to its certificate.
    let task = tokio::spawn(async move { whole(&context, request, source).await });
    let enrolled = task.await.map_err(|error| Problem::internal(&error))??;
    Ok((StatusCode::CREATED, Json(enrolled)).into_response())
}

/// Where an enrolment or renewal comes from, if it is not one too many.
pub(super) fn limit(context: &Context, request: &Request) -> Result<SocketAddr, Problem> {
    let source = request.extensions().get::<Source>().map(|source| source.0);
    let source = source.ok_or_else(|| Problem::malformed("the caller's address is not known"))?;
    let who = Who::Enrolments(prefix(source.ip()));
    context.limiter.take(who, Instant::now()).map_err(|retry_after_s| {
        ::metrics::counter!(REQUESTS_REFUSED_TOTAL, "reason" => "rate").increment(1);
        Problem::too_many(retry_after_s)
    })?;
    Ok(source)
}

async fn whole(context: &Context, request: EnrolRequest, source: SocketAddr) -> Result<Enrolled, Problem> {
    let kind = EnrolKind::from(request.kind);
    if !EnrolSecret::is_one(&request.secret) {
        return Err(Problem::invalid("`secret` is not an enrolment secret"));
    }
    let node = match (kind, &request.node) {
        (EnrolKind::Broker, Some(node)) => node.parse().ok().filter(|node| *node != 0),
        (EnrolKind::Broker, None) => None,
        _ => Some(0),
    };
    let node: u64 = node.ok_or_else(|| Problem::invalid("`node` is the node id of the broker, in decimal"))?;
    let csr = STANDARD.decode(&request.csr).map_err(|_| Problem::invalid("`csr` is not base64"))?;
    let proven = Csr::parse(&csr).map_err(|error| Problem::invalid(error.to_string()))?;
    proven.check_asks_nothing().map_err(|error| Problem::invalid(error.to_string()))?;
    let issuer = context.issuer.clone().ok_or_else(|| elsewhere(&context.cluster.state()))?;

    let credential = Credential::new(request.secret.as_str());
    let secret_sha256 = credential.sha256();
    // What nobody knows is not proposed: strangers fill no log.
    let (state, actor) = auth::whose(context, &credential).await?;
    let Some(actor) = actor.filter(|actor| actor.kind == ActorKind::Enrolment) else {
        ::metrics::counter!(REQUESTS_REFUSED_TOTAL, "reason" => "credential").increment(1);
        return Err(Rejected::new(RejectedCode::KeyUnknown, "the enrolment secret is not known").into());
    };
    let key = state.find::<EnrolKey>(IndexKey::secret(&secret_sha256)).unwrap_or_default();
    let key_sha256 = proven.spki_sha256();
    let name = request.name.clone();
    let body = Body::Enrol(Enrol { secret_sha256, kind: kind as i32, key_sha256, name: name.clone(), node });
    let result = context.cluster.propose(Asker::holder(actor, credential), body, None).await;
    let target = match &result {
        Ok(done) => done.ids.last().map_or_else(|| format!("broker/{node}"), |id| format!("{}/{id}", kind_name(kind))),
        Err(_) => format!("{}:{name}", kind_name(kind)),
    };
    let actor = format!("enrolment/{}", key.id());
    context.record(&actor, &key.name, &source.to_string(), "enrol", &target, &result).await;
    let done = result?;
    let made = Made::of(kind, done.ids.last().copied(), node)?;
    let issued = certify(context, &issuer, &made, &request.hosts, &csr).await?;
    answer(context, &issuer, &made, &issued, &request.secret).await
}

/// What an enrolment made.
#[derive(Clone, Copy)]
enum Made {
    Connector(Id),
    Workload(Id),
    Device(Id),
    Broker(u64),
}

impl Made {
    fn of(kind: EnrolKind, id: Option<Id>, node: u64) -> Result<Self, Problem> {
        match (kind, id) {
            (EnrolKind::Connector, Some(id)) => Ok(Self::Connector(id)),
            (EnrolKind::Workload, Some(id)) => Ok(Self::Workload(id)),
            (EnrolKind::Device, Some(id)) => Ok(Self::Device(id)),
            (EnrolKind::Broker, _) => Ok(Self::Broker(node)),
            _ => Err(Problem::conflict("the enrolment made nothing")),
        }
    }

    fn kind(self) -> Kind {
        match self {
            Self::Connector(_) => Kind::Connector,
            Self::Workload(_) => Kind::Workload,
            Self::Device(_) => Kind::Client,
            Self::Broker(_) => Kind::Broker,
        }
    }

    fn id(self) -> String {
        match self {
            Self::Connector(id) | Self::Workload(id) | Self::Device(id) => id.to_string(),
            Self::Broker(node) => node.to_string(),
        }
    }

    fn subject(self) -> Subject {
        match self {
            Self::Connector(id) => Subject::Connector(id),
            Self::Workload(id) => Subject::Workload(id),
            Self::Device(id) => Subject::Device(id),
            Self::Broker(node) => Subject::Broker(node),
        }
    }
}

/// Signs, and lets the log know before anybody gets the certificate.
async fn certify(
    context: &Context,
    issuer: &Issuer,
    made: &Made,
    hosts: &[String],
    csr: &[u8],
) -> Result<Issued, Problem> {
    let now_ms = context.cluster.now_ms();
    let issued = match made {
        Made::Broker(_) if !hosts.is_empty() => issuer.issue_broker(&made.id(), hosts, csr, now_ms),
        _ => issuer.issue(made.kind(), &made.id(), csr, now_ms),
    };
    let issued = issued.map_err(refused_request)?;
    context.cluster.propose(Asker::BROKER, issued.command(made.subject()), None).await?;
    Ok(issued)
}

/// Why the issuer signed nothing.
pub(super) fn refused_request(error: crate::issuer::Error) -> Problem {
    use crate::issuer::Error;
    match error {
        Error::Request(_) | Error::Host(_) | Error::Hosts(_) => Problem::invalid(error.to_string()),
        other => Problem::internal(&other),
    }
}

async fn answer(
    context: &Context,
    issuer: &Issuer,
    made: &Made,
    issued: &Issued,
    secret: &str,
) -> Result<Enrolled, Problem> {
    let (state, now_ms) = (context.cluster.state(), context.cluster.now_ms());
    let cluster = state.cluster().unwrap_or_default();
    let encoded = |bytes: &[u8]| STANDARD.encode(bytes);
    let grant = match made {
        Made::Device(id) => Some(grant_of(&state, issuer, *id, issued, now_ms)?),
        _ => None,
    };
    let (row, peers) = match made {
        Made::Broker(node) => (state.broker(*node), peers(&state, made)),
        _ => (None, Vec::new()),
    };
    let issuer_sealed = match row.as_ref().is_some_and(|row| row.has(BrokerRole::Issuer)) {
        true => {
            let key = sha256(&format!("selvedge issuer seal{secret}"));
            Some(encoded(&issuer.seal_for(&key).map_err(|error| Problem::internal(&error))?))
        }
        false => None,
    };
    let brokers = brokers(context, issuer, &state, now_ms)?;
    Ok(Enrolled {
        id: made.id(),
        spiffe: issued.id.to_string(),
        chain: issued.chain.iter().map(|certificate| chain_pem(std::slice::from_ref(certificate))).collect(),
        anchors: (*context.anchors).clone(),
        trust_domain: cluster.trust_domain,
        cluster_id: hex::encode(&cluster.cluster_id),
        not_after_ms: issued.not_after_ms,
        grant: grant.as_deref().map(encoded),
        knock_keys: knock::keys_at(&cluster.knock_secret, now_ms).iter().map(|key| encoded(key)).collect(),
        brokers: SignedBrokers {
            list: encoded(&brokers.list),
            signature: encoded(&brokers.signature),
            signer: encoded(&brokers.signer),
        },
        hold_ms: cluster.hold_ms,
        issuer_sealed,
        peers,
        roles: row.iter().flat_map(|row| row.roles().map(BrokerRole::name)).collect(),
    })
}

/// A login by the one-time code, bound to the device's key.
fn grant_of(state: &Applied, issuer: &Issuer, device: Id, issued: &Issued, now_ms: u64) -> Result<Vec<u8>, Problem> {
    let device = state.by_id::<Device>(device).filter(|device| !device.revoked);
    let user = device.as_ref().and_then(|device| state.by_id::<User>(device.user?)).filter(|user| user.active);
    let user = user.filter(|user| !state.is_held(user.id(), user.vouched_epoch));
    let (Some(device), Some(user)) = (device, user) else {
        return Err(Problem::forbidden("the person or the device was disabled meanwhile"));
    };
    // The one login of the code, however often it is asked for: who was disabled meanwhile does not come back by it.
    let login_ms = device.enrolled_ms.min(now_ms);
    if now_ms - login_ms > GRANT_REPEAT_MS {
        return Err(Problem::forbidden("this code was used to log in before: ask for another one"));
    }
    let login = LoginGrant {
        version: GRANT_VERSION,
        user: user.id().to_string(),
        user_generation: user.generation,
        device: device.id().to_string(),
        device_key_sha256: issued.spki_sha256.to_vec(),
        login_ms,
        expires_ms: login_ms + GRANT_LIFE_MS,
        method: "code".to_owned(),
        directory: user.directory.unwrap_or_default().to_string(),
        asserted_groups: Vec::new(),
        epoch: state.position().epoch,
    };
    grant::sign(&login, |bytes| issuer.sign_grant(bytes)).map_err(|error| Problem::internal(&error))
}

pub(super) fn brokers(context: &Context, issuer: &Issuer, state: &Applied, now_ms: u64) -> Result<Brokers, Problem> {
    if let Some(signed) = context.edge.as_ref().and_then(|edge| edge.broker_list()) {
        return Ok(signed);
    }
    let list = push::broker_list(state, now_ms).encode_to_vec();
    let (signature, signer) = issuer.sign_list(&list).map_err(|error| Problem::internal(&error))?;
    Ok(Brokers { list, signature, signer })
}

fn peers(state: &Applied, made: &Made) -> Vec<PeerView> {
    let others = state.rows::<Broker>().filter(|broker| !broker.removed && !broker.peer.is_empty());
    let others = others.filter(|broker| !matches!(made, Made::Broker(node) if *node == broker.node));
    others.map(|broker| PeerView { node: broker.node.to_string(), peer: broker.peer, host: broker.host }).collect()
}

/// This broker is no issuer: names those that are.
pub(super) fn elsewhere(state: &Applied) -> Problem {
    let issuers = state.rows::<Broker>().filter(|broker| !broker.removed && broker.has(BrokerRole::Issuer));
    let addresses: Vec<_> = issuers.map(|broker| format!("`{}` ({})", broker.name, broker.web)).collect();
    let at = if addresses.is_empty() { "no broker is one".to_owned() } else { addresses.join(", ") };
    Problem::unavailable("no_issuer", format!("this broker signs no certificates; issuers: {at}"))
}

#[cfg(test)]
mod tests {
    use super::super::input::json;
    use super::*;

    #[test]
    fn a_request_with_fields_that_are_not_there_is_refused() {
        for (body, status) in [
            (r#"{"secret":"x","kind":"owner","csr":""}"#, 422),
            (r#"{"secret":"x","kind":"device","csr":"","role":"admin"}"#, 422),
            (r#"{"secret":"x","kind":"device"}"#, 422),
            ("{", 400),
        ] {
            assert_eq!(json::<EnrolRequest>(body.as_bytes()).map(|_| ()).unwrap_err().status, status, "{body}");
        }
    }
}
