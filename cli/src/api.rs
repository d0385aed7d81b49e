//! The admin API, as its caller: reads go to the first endpoint that answers and is not behind what was changed from
//! here; a change is sent with one `Idempotency-Key` to one endpoint after the other until its outcome is known.

use std::time::Duration;

use futures::StreamExt as _;
use reqwest::{Method, Response, StatusCode, Url};
use selvedge_proto::identity::Pin;
use selvedge_proto::tls;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::time::{Instant, sleep};

use crate::context::{Context, Token};
use crate::seen::Seen;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
const READ_TIMEOUT: Duration = Duration::from_secs(20);
const CHANGE_TIMEOUT: Duration = Duration::from_secs(30);
/// The longest that a broker waits for `Prefer: enforced`; a change that wants it may take so much longer.
const ENFORCED_WAIT: Duration = Duration::from_secs(120);
/// A change is tried again for so long while no leader is there or its outcome is unknown.
const CHANGE_DEADLINE: Duration = Duration::from_secs(20);
const PAUSE: Duration = Duration::from_millis(500);
const READ_HEADER: &str = "selvedge-read";
const POSITION_HEADER: &str = "selvedge-position";
const KEEPALIVE: Duration = Duration::from_secs(30);
/// Bytes of an answer, and of one line of a stream.
const ANSWER_BYTES_MAX: usize = 64 << 20;

/// Why a request has no answer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A request cannot be made.
    #[error("`{0}` is no endpoint: write `https://HOST:PORT`")]
    Endpoint(String),
    /// TLS cannot be set up.
    #[error("tls")]
    Tls(#[from] tls::Error),
    /// HTTP cannot be set up.
    #[error("http")]
    Http(#[source] reqwest::Error),
    /// Nobody could be reached, or nobody could do it now.
    #[error("no endpoint could do it{}", each(.0))]
    Unreachable(Vec<(String, String)>),
    /// It is not known whether the change was applied.
    #[error(
        "the outcome is unknown: the change may have been applied, or may still be{}",
        each(.0)
    )]
    Unknown(Vec<(String, String)>),
    /// The broker refused.
    #[error("{detail} ({code})")]
    Refused {
        /// HTTP status.
        status: u16,
        /// Code of the refusal.
        code: String,
        /// What the broker said.
        detail: String,
    },
    /// The answer is not what it should be.
    #[error("the answer of `{0}` cannot be read: {1}")]
    Answer(String, String),
}

impl Error {
    /// It is not there.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Refused { status: 404, .. })
    }
}

fn each(tried: &[(String, String)]) -> String {
    tried.iter().map(|(endpoint, why)| format!("\n  {endpoint}: {why}")).collect()
}

/// Reads an endpoint: `https://host:port`, without anything behind it.
pub fn endpoint(text: &str) -> Result<String, String> {
    let url = Url::parse(text).ok().filter(|url| {
        let bare = url.path() == "/" && url.query().is_none() && url.username().is_empty() && url.password().is_none();
        url.scheme() == "https" && url.has_host() && bare
    });
    let url = url.ok_or_else(|| Error::Endpoint(text.to_owned()).to_string())?;
    Ok(url.as_str().trim_end_matches('/').to_owned())
}

/// How far a change is waited for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Wait {
    /// Until it is in the log of a majority.
    #[default]
    Committed,
    /// Until no broker forwards a byte against it any more.
    Enforced,
}

/// How fresh what is read must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Read {
    /// As the answering broker has it
    Local,
    /// With everything that was committed before
    Linearizable,
}

/// A caller of one cluster's API.
#[derive(Clone)]
pub struct Client {
    http: reqwest::Client,
    direct: reqwest::Client,
    endpoints: Vec<Url>,
    token: Token,
    /// None leaves it to the broker.
    read: Option<Read>,
    seen: Seen,
}

/// What a query asks.
pub type Query<'a> = &'a [(&'a str, String)];

impl Client {
    /// A caller with a context's endpoints, pin and token, that reads so.
    pub fn new(context: &Context, read: Option<Read>) -> Result<Self, Error> {
        let endpoint = |text: &String| Url::parse(text).map_err(|_| Error::Endpoint(text.clone()));
        Ok(Self {
            http: http(context.pin)?.build().map_err(Error::Http)?,
            direct: http(context.pin)?.no_proxy().build().map_err(Error::Http)?,
            endpoints: context.endpoints.iter().map(endpoint).collect::<Result<_, _>>()?,
            token: context.token.clone(),
            read,
            seen: Seen::of(context.pin),
        })
    }

    /// One caller for each broker that serves `web`, as the cluster names them: what each has by itself lies there.
    pub async fn brokers(&self) -> Result<Vec<Self>, Error> {
        let view: Value = self.read("/api/v1/cluster", &[]).await?;
        let present = view["brokers"].as_array().into_iter().flatten().filter(|row| row["removed"] == false);
        Ok(present.filter_map(|row| self.at(row["web"].as_str()?)).collect())
    }

    /// The first endpoint.
    pub fn name(&self) -> String {
        self.endpoints.first().map(shown).unwrap_or_default()
    }

    /// A caller of the broker whose web listener is at `host:port`.
    pub fn at(&self, address: &str) -> Option<Self> {
        let endpoint = Url::parse(&format!("https://{address}")).ok()?;
        Some(Self { endpoints: vec![endpoint], ..self.clone() })
    }

    /// Reads JSON.
    pub async fn read<T: DeserializeOwned>(&self, path: &str, query: Query<'_>) -> Result<T, Error> {
        let (name, response) = self.get(path, query, Some(READ_TIMEOUT)).await?;
        let bytes = whole(response).await.map_err(|why| Error::Answer(name.clone(), why))?;
        serde_json::from_slice(&bytes).map_err(|error| Error::Answer(name, error.to_string()))
    }

    /// Reads newline-delimited JSON.
    pub async fn lines(&self, path: &str, query: Query<'_>) -> Result<Lines, Error> {
        let (name, response) = self.get(path, query, None).await?;
        Ok(Lines { name, body: response, buffer: Vec::new(), seen: 0 })
    }

    async fn get(&self, path: &str, query: Query<'_>, limit: Option<Duration>) -> Result<(String, Response), Error> {
        match self.get_no_older(path, query, limit).await {
            Err(Error::Refused { code, .. }) if code == "reset" && self.seen.position().is_some() => {
                tracing::warn!("the cluster was restored: what was changed from here before may be gone");
                self.seen.forget();
                self.get_no_older(path, query, limit).await
            }
            got => got,
        }
    }

    async fn get_no_older(
        &self,
        path: &str,
        query: Query<'_>,
        limit: Option<Duration>,
    ) -> Result<(String, Response), Error> {
        let mut tried = Vec::new();
        for endpoint in &self.endpoints {
            let mut url = endpoint.clone();
            url.set_path(path);
            if !query.is_empty() {
                url.query_pairs_mut().extend_pairs(query);
            }
            let mut request = self.request(Method::GET, url);
            if let Some(position) = self.seen.position() {
                request = request.header(POSITION_HEADER, position.to_string());
            }
            if let Some(mode) = self.read.and_then(|read| clap::ValueEnum::to_possible_value(&read)) {
                request = request.header(READ_HEADER, mode.get_name());
            }
            if let Some(limit) = limit {
                request = request.timeout(limit);
            }
            match request.send().await {
                Ok(response) if response.status().is_success() => return Ok((shown(endpoint), response)),
                Ok(response) => match refusal(response).await {
                    // Another broker may be able to answer.
                    Error::Refused { status: 429 | 500.., detail, .. } => tried.push((shown(endpoint), detail)),
                    refused => return Err(refused),
                },
                Err(error) => tried.push((shown(endpoint), cause(&error))),
            }
        }
        Err(Error::Unreachable(tried))
    }

    /// Makes a change; answers what the broker said of it (nothing, for an answer without a body).
    ///
    /// **Errors** [`Error::Unknown`] when some attempt may have been applied and none said so.
    pub async fn change(&self, method: Method, path: &str, body: &Value, wait: Wait) -> Result<Value, Error> {
        let key = uuid::Uuid::now_v7().to_string();
        let deadline = Instant::now() + CHANGE_DEADLINE;
        let mut unknown = false;
        loop {
            let (mut tried, mut reached) = (Vec::new(), false);
            for endpoint in &self.endpoints {
                match self.change_at(endpoint, &method, path, body, wait, &key).await {
                    Attempt::Answered(answer) => return answer,
                    Attempt::NotDone(why) => {
                        reached = true;
                        tried.push((shown(endpoint), why));
                    }
                    Attempt::Unknown(why) => {
                        unknown = true;
                        tried.push((shown(endpoint), why));
                    }
                    Attempt::NotReached(why) => tried.push((shown(endpoint), format!("not reached: {why}"))),
                }
            }
            if !(reached || unknown) || Instant::now() + PAUSE > deadline {
                return Err(if unknown { Error::Unknown(tried) } else { Error::Unreachable(tried) });
            }
            sleep(PAUSE).await;
        }
    }

    async fn change_at(
        &self,
        endpoint: &Url,
        method: &Method,
        path: &str,
        body: &Value,
        wait: Wait,
        key: &str,
    ) -> Attempt {
        let mut url = endpoint.clone();
        url.set_path(path);
        let mut request = self.request(method.clone(), url).header("idempotency-key", key).timeout(CHANGE_TIMEOUT);
        if !body.is_null() {
            request = request.json(body);
        }
        if wait == Wait::Enforced {
            let prefer = format!("enforced, wait={}", ENFORCED_WAIT.as_secs());
            request = request.header("prefer", prefer).timeout(CHANGE_TIMEOUT + ENFORCED_WAIT);
        }
        let response = match request.send().await {
            Ok(response) => response,
            Err(error) if error.is_connect() => return Attempt::NotReached(cause(&error)),
            Err(error) => return Attempt::Unknown(cause(&error)),
        };
        let status = response.status();
        if !status.is_success() {
            return match refusal(response).await {
                Error::Refused { status: 429 | 503, detail, .. } => Attempt::NotDone(detail),
                Error::Refused { status: 500.., detail, .. } => Attempt::Unknown(detail),
                refused => Attempt::Answered(Err(refused)),
            };
        }
        let position = response.headers().get(POSITION_HEADER).and_then(|value| value.to_str().ok()?.parse().ok());
        if let Some(position) = position {
            self.seen.note(position);
        }
        match whole(response).await {
            Ok(_) if status == StatusCode::NO_CONTENT => Attempt::Answered(Ok(Value::Null)),
            Ok(bytes) => {
                let answer = serde_json::from_slice(&bytes);
                Attempt::Answered(answer.map_err(|error| Error::Answer(shown(endpoint), error.to_string())))
            }
            Err(why) => Attempt::Unknown(why),
        }
    }

    fn request(&self, method: Method, url: Url) -> reqwest::RequestBuilder {
        // A proxy on the way out has no way to this machine.
        let local = url.host_str().is_some_and(|host| {
            let address = host.trim_matches(['[', ']']).parse::<std::net::IpAddr>();
            host == "localhost" || address.is_ok_and(|address| address.is_loopback())
        });
        let http = if local { &self.direct } else { &self.http };
        http.request(method, url).bearer_auth(self.token.reveal())
    }
}

enum Attempt {
    Answered(Result<Value, Error>),
    /// The broker says that nothing was changed; another may do it.
    NotDone(String),
    /// Nothing was sent.
    NotReached(String),
    /// It may have been done.
    Unknown(String),
}

fn http(pin: Pin) -> Result<reqwest::ClientBuilder, Error> {
    let tls = tls::pinned_web_client(pin, &tls::system_time())?;
    Ok(reqwest::Client::builder()
        .tls_backend_preconfigured(tls)
        .https_only(true)
        .redirect(reqwest::redirect::Policy::none())
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_keepalive(KEEPALIVE)
        .user_agent(concat!("selvedge/", env!("CARGO_PKG_VERSION"))))
}

fn shown(endpoint: &Url) -> String {
    endpoint.as_str().trim_end_matches('/').to_owned()
}

/// What is at the bottom of an error: that is what a person can act on.
fn cause(error: &reqwest::Error) -> String {
    if error.is_timeout() {
        return "no answer in time".to_owned();
    }
    let mut bottom: &dyn std::error::Error = error;
    while let Some(source) = bottom.source() {
        bottom = source;
    }
    bottom.to_string()
}

async fn refusal(response: Response) -> Error {
    let status = response.status();
    let problem: Value = match whole(response).await {
        Ok(bytes) => serde_json::from_slice(&bytes).unwrap_or(Value::Null),
        Err(_) => Value::Null,
    };
    let text = |field: &str| problem[field].as_str().map(str::to_owned);
    let detail = text("detail").filter(|detail| !detail.is_empty()).or_else(|| text("title"));
    Error::Refused {
        status: status.as_u16(),
        code: text("code").unwrap_or_else(|| status.as_u16().to_string()),
        detail: detail.unwrap_or_else(|| format!("the broker answered {status}")),
    }
}

async fn whole(response: Response) -> Result<Vec<u8>, String> {
    let mut body = response.bytes_stream();
    let mut bytes = Vec::new();
    while let Some(chunk) = body.next().await {
        bytes.extend_from_slice(&chunk.map_err(|error| cause(&error))?);
        if bytes.len() > ANSWER_BYTES_MAX {
            return Err(format!("it has more than {ANSWER_BYTES_MAX} bytes"));
        }
    }
    Ok(bytes)
}

/// Newline-delimited JSON as it arrives.
pub struct Lines {
    name: String,
    body: Response,
    buffer: Vec<u8>,
    /// Bytes of the buffer that are known to hold no line's end.
    seen: usize,
}

impl Lines {
    /// The next object; none at the end.
    ///
    /// **Cancel safety** nothing is lost.
    pub async fn next(&mut self) -> Result<Option<Value>, Error> {
        loop {
            if let Some(at) = self.buffer[self.seen..].iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=self.seen + at).collect();
                self.seen = 0;
                let object: Value = serde_json::from_slice(&line).map_err(|error| self.broken(error.to_string()))?;
                return match object["error"].as_str() {
                    Some(error) => Err(self.broken(error.to_owned())),
                    None => Ok(Some(object)),
                };
            }
            self.seen = self.buffer.len();
            if self.buffer.len() > ANSWER_BYTES_MAX {
                return Err(self.broken(format!("a line has more than {ANSWER_BYTES_MAX} bytes")));
            }
            match self.body.chunk().await {
                Ok(Some(chunk)) => self.buffer.extend_from_slice(&chunk),
                Ok(None) if self.buffer.is_empty() => return Ok(None),
                Ok(None) => return Err(self.broken("it ended within a line".to_owned())),
                Err(error) => return Err(self.broken(cause(&error))),
            }
        }
    }

    fn broken(&self, why: String) -> Error {
        Error::Answer(self.name.clone(), why)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_is_https_and_nothing_behind_the_port() {
        assert_eq!(endpoint("https://127.0.0.1:8443/"), Ok("https://127.0.0.1:8443".to_owned()));
        assert_eq!(endpoint("https://[::1]:8443"), Ok("https://[::1]:8443".to_owned()));
        for text in ["http://a:1", "a:1", "https://a/b", "https://u:p@a", "https://a?x", ""] {
            assert!(endpoint(text).is_err(), "{text}");
        }
    }
}
