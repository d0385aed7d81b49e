//! Unary gRPC calls straight over HTTP/2: what a call costs the load generator is taken from both, and is to be little.

use std::sync::{Arc, Mutex};

use anyhow::{Context as _, bail, ensure};
use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use h2::client::SendRequest;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Uri, Version};
use prost::Message;
use rustls::ClientConfig;

use crate::dial::{self, CONNECTION_WINDOW_BYTES, STREAM_WINDOW_BYTES};

/// Before each message: whether it is compressed, and its length.
const PREFIX_BYTES: usize = 5;

/// One connection to a server, made when it is used and again when it broke.
pub struct Endpoint {
    address: std::net::SocketAddr,
    tls: Arc<ClientConfig>,
    headers: HeaderMap,
    connection: Mutex<Option<SendRequest<Bytes>>>,
    connecting: tokio::sync::Mutex<()>,
}

impl Endpoint {
    /// With metadata that every call carries.
    pub fn new(
        address: std::net::SocketAddr,
        tls: &Arc<ClientConfig>,
        metadata: &[(&'static str, String)],
    ) -> anyhow::Result<Self> {
        let mut headers = HeaderMap::new();
        headers.insert("content-type", HeaderValue::from_static("application/grpc"));
        headers.insert("te", HeaderValue::from_static("trailers"));
        for (name, value) in metadata {
            headers.insert(HeaderName::from_static(name), value.parse()?);
        }
        let (connection, connecting) = Default::default();
        Ok(Self { address, tls: tls.clone(), headers, connection, connecting })
    }

    /// Calls the method at a path, `/package.Service/Method`.
    pub async fn call<Q: Message, A: Message + Default>(&self, path: &'static str, question: &Q) -> anyhow::Result<A> {
        let mut message = BytesMut::with_capacity(PREFIX_BYTES + question.encoded_len());
        message.put_u8(0);
        message.put_u32(u32::try_from(question.encoded_len())?);
        question.encode(&mut message)?;

        let mut head = Request::new(());
        *head.method_mut() = Method::POST;
        *head.uri_mut() = Uri::builder().scheme("https").authority("endpoint").path_and_query(path).build()?;
        *head.version_mut() = Version::HTTP_2;
        *head.headers_mut() = self.headers.clone();
        let (answer, mut body) = self.connection().await?.send_request(head, false)?;
        body.send_data(message.freeze(), true)?;

        let (head, mut body) = answer.await?.into_parts();
        let mut answer = Bytes::new();
        while let Some(part) = body.data().await {
            let part = part?;
            body.flow_control().release_capacity(part.len())?;
            // Most answers are one part.
            answer = if answer.is_empty() { part } else { [answer, part].concat().into() };
        }
        let trailers = body.trailers().await?;
        // Without a message the status stands among the headers.
        let trailers = trailers.as_ref().unwrap_or(&head.headers);
        let text = |name| trailers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
        if text("grpc-status") != "0" {
            bail!("{path}: status {} `{}`", text("grpc-status"), text("grpc-message"));
        }
        ensure!(answer.len() >= PREFIX_BYTES, "{path}: an answer without a message");
        answer.advance(PREFIX_BYTES);
        Ok(A::decode(answer)?)
    }

    async fn connection(&self) -> anyhow::Result<SendRequest<Bytes>> {
        if let Some(ready) = self.ready().await {
            return Ok(ready);
        }
        let _one_at_a_time = self.connecting.lock().await;
        if let Some(ready) = self.ready().await {
            return Ok(ready);
        }
        let stream = dial::connect(self.address, &self.tls).await?;
        let (sender, connection) = h2::client::Builder::new()
            .initial_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .enable_push(false)
            .handshake(stream)
            .await?;
        // Its calls tell of its end.
        tokio::spawn(connection);
        *self.connection.lock().expect("nobody panics with it") = Some(sender);
        self.ready().await.context("the connection ended at once")
    }

    /// The connection with room for a stream, unless it is gone.
    async fn ready(&self) -> Option<SendRequest<Bytes>> {
        let known = self.connection.lock().expect("nobody panics with it").clone()?;
        known.ready().await.ok()
    }
}
