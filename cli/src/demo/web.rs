//! A small HTTP client of a broker's `web` listener, its issuer pinned: what a directory pushes, and what is timed.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use selvedge_proto::identity::Pin;
use selvedge_proto::tls;
use serde_json::Value;
use tokio::net::TcpStream;

use super::clock::Moment;

/// Longest wait for an answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(15);

/// Who calls: a directory that pushes users and groups, or an administrator.
#[derive(Clone)]
pub struct Caller {
    tls: Arc<rustls::ClientConfig>,
    token: String,
}

impl Caller {
    /// With a bearer token.
    pub fn new(pin: Pin, token: String) -> anyhow::Result<Self> {
        let tls = tls::pinned_web_client(pin, &tls::system_time())?;
        Ok(Self { tls: Arc::new(tls), token })
    }

    /// `POST /scim/v2/{kind}`; the new object's id.
    pub async fn create(&self, web: SocketAddr, kind: &str, body: &Value) -> anyhow::Result<String> {
        let answer = self.call(web, "POST", &format!("/scim/v2/{kind}"), body).await?;
        answer.body["id"].as_str().map(str::to_owned).context("the answer has no `id`")
    }

    /// `PATCH /scim/v2/Users/{id}` of one attribute; the moment of the answer.
    pub async fn patch(&self, web: SocketAddr, id: &str, attribute: &str, value: Value) -> anyhow::Result<Moment> {
        let body = serde_json::json!({
            "schemas": ["urn:ietf:params:scim:api:messages:2.0:PatchOp"],
            "Operations": [{ "op": "replace", "path": attribute, "value": value }],
        });
        Ok(self.call(web, "PATCH", &format!("/scim/v2/Users/{id}"), &body).await?.at)
    }

    /// `POST /api/v1/apply` of one object; the moment of the answer.
    pub async fn apply(&self, web: SocketAddr, object: Value) -> anyhow::Result<Moment> {
        let body = serde_json::json!({ "objects": [object] });
        Ok(self.call(web, "POST", "/api/v1/apply", &body).await?.at)
    }

    async fn call(&self, web: SocketAddr, method: &str, path: &str, body: &Value) -> anyhow::Result<Answer> {
        let work = self.exchange(web, method, path, body);
        tokio::time::timeout(ANSWER_LIMIT, work).await.with_context(|| format!("{method} {path}: no answer"))?
    }

    async fn exchange(&self, web: SocketAddr, method: &str, path: &str, body: &Value) -> anyhow::Result<Answer> {
        let socket = TcpStream::connect(web).await?;
        socket.set_nodelay(true)?;
        let name = ServerName::from(web.ip());
        let stream = tokio_rustls::TlsConnector::from(self.tls.clone()).connect(name, socket).await?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let driver = tokio::spawn(connection);
        let request = http::Request::builder()
            .method(method)
            .uri(path)
            .header("host", web.to_string())
            .header("authorization", format!("Bearer {}", self.token))
            .header(
                "content-type",
                if path.starts_with("/scim/") { "application/scim+json" } else { "application/json" },
            )
            .body(Full::new(Bytes::from(serde_json::to_vec(body)?)))?;
        let response = sender.send_request(request).await?;
        let status = response.status();
        let bytes = response.into_body().collect().await?.to_bytes();
        let at = Moment::now();
        driver.abort();
        if !status.is_success() {
            bail!(
                "{method} {path}: {status}: {}",
                String::from_utf8_lossy(&bytes).chars().take(400).collect::<String>()
            );
        }
        Ok(Answer { body: serde_json::from_slice(&bytes).unwrap_or(Value::Null), at })
    }
}

struct Answer {
    body: Value,
    at: Moment,
}
