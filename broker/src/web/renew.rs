//! Renewal for those whose certificate has ended, so that no other listener takes it any more, and for brokers that are
//! no issuers themselves.
//!
//! **Invariant:** only the holder of the old key is answered, for at most 30 days after its end, and only while the state
//! says that the old certificate and its subject were not revoked. `decide` checks the subject again.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use axum::routing::post;
use selvedge_domain::command::Subject;
use selvedge_domain::rows::Broker;
use selvedge_domain::{Asker, State as Applied};
use selvedge_proto::control::Brokers;
use selvedge_proto::identity::{Kind, Peer};
use selvedge_proto::renewal::{BROKERS_PATH, Error, KnownBrokers, PATH, Renewal, Renewed};

use super::auth::Need;
use super::enrol::{brokers, elsewhere, limit, refused_request};
use super::input::Input;
use super::metrics::REQUESTS_REFUSED_TOTAL;
use super::router::Route;
use super::{Context, Problem};
use crate::edge::knock;
use crate::edge::standing::{self, Unfit};

/// A renewal is judged on a state that is at most so much in the making.
const FRESH_WAIT: Duration = Duration::from_secs(5);

pub(super) fn routes() -> Vec<Route> {
    vec![
        Route { path: PATH.to_owned(), need: Need::Nothing, read: None, handlers: post(renew) },
        Route { path: BROKERS_PATH.to_owned(), need: Need::Nothing, read: None, handlers: post(known_brokers) },
    ]
}

/// Tells an end that reaches none of the brokers that it knows which ones there are, if it still stands.
async fn known_brokers(State(context): State<Arc<Context>>, request: Request) -> Result<Json<KnownBrokers>, Problem> {
    limit(&context, &request)?;
    let Input(asked) = <Input<Renewal> as axum::extract::FromRequest<_>>::from_request(request, &context).await?;
    let issuer = context.issuer.clone().ok_or_else(|| elsewhere(&context.cluster.state()))?;
    let (state, _) = standing_of(&context, &asked).await?;
    let now_ms = context.cluster.now_ms();
    let Brokers { list, signature, signer } = brokers(&context, &issuer, &state, now_ms)?;
    let secret = state.cluster().unwrap_or_default().knock_secret;
    let knock_keys = knock::keys_at(&secret, now_ms).iter().map(hex::encode).collect();
    Ok(Json(KnownBrokers { list, signature, signer, knock_keys }))
}

async fn renew(State(context): State<Arc<Context>>, request: Request) -> Result<Response, Problem> {
    let source = limit(&context, &request)?;
    let Input(renewal) = <Input<Renewal> as axum::extract::FromRequest<_>>::from_request(request, &context).await?;
    // What is begun is ended, whether or not the caller waits.
    let task = tokio::spawn(async move { whole(&context, &renewal, source).await });
    let renewed = task.await.map_err(|error| Problem::internal(&error))??;
    Ok((StatusCode::CREATED, Json(renewed)).into_response())
}

async fn whole(context: &Context, renewal: &Renewal, source: SocketAddr) -> Result<Renewed, Problem> {
    let issuer = context.issuer.clone().ok_or_else(|| elsewhere(&context.cluster.state()))?;
    let (state, (peer, of)) = standing_of(context, renewal).await?;
    let now_ms = context.cluster.now_ms();
    let (kind, id) = (peer.id.kind(), peer.id.id());
    let host = match of {
        Subject::Broker(node) => state.broker(node).map(|broker| broker.host).filter(|host| !host.is_empty()),
        _ => None,
    };
    let issued = match host {
        Some(host) => issuer.issue_broker(id, &[host], &renewal.csr, now_ms),
        None => issuer.issue(kind, id, &renewal.csr, now_ms),
    };
    let issued = issued.map_err(refused_request)?;
    let result = context.cluster.propose(Asker::BROKER, issued.command(of), None).await;
    context.record(&peer.id.to_string(), "", &source.to_string(), "renew", &format!("{kind}/{id}"), &result).await;
    result?;
    Ok(Renewed { chain_pem: issued.chain_pem })
}

/// Who asks, with a key that was certified, and that they still stand in a state that is fresh.
async fn standing_of(context: &Context, renewal: &Renewal) -> Result<(Arc<Applied>, (Peer, Subject)), Problem> {
    let peer = renewal.verify(&context.anchors, context.cluster.now_ms()).map_err(|error| {
        // A stranger: counted, not recorded.
        ::metrics::counter!(REQUESTS_REFUSED_TOTAL, "reason" => "credential").increment(1);
        match error {
            Error::TooLate => Problem::forbidden(error.to_string()),
            Error::Identity(_) | Error::Signature => Problem::unauthenticated(error.to_string()),
        }
    })?;
    let state = context.cluster.linearizable(FRESH_WAIT).await?;
    let of = stands(&state, &peer, context.cluster.now_ms())
        .map_err(|unfit| Problem::forbidden(format!("`{}` is not certified again: {}", peer.id, unfit.as_str())))?;
    Ok((state, (peer, of)))
}

/// Whether the holder of a certificate may have another, whenever it ended.
fn stands(state: &Applied, peer: &Peer, now_ms: u64) -> Result<Subject, Unfit> {
    let before_its_end_ms = now_ms.min(peer.not_after_ms.saturating_sub(1));
    if peer.id.kind() == Kind::Broker {
        let node = selvedge_cluster::node_of(peer).ok_or(Unfit::Unknown)?;
        let row = state.row::<Broker>(&node.to_be_bytes()).map(|row| (row.removed, row.generation));
        standing::check_certificate(state, peer, row, before_its_end_ms)?;
        return Ok(Subject::Broker(node));
    }
    let id = standing::check(state, peer, before_its_end_ms)?;
    match peer.id.kind() {
        Kind::Client => Ok(Subject::Device(id)),
        Kind::Workload => Ok(Subject::Workload(id)),
        Kind::Connector => Ok(Subject::Connector(id)),
        _ => Err(Unfit::WrongKind),
    }
}
