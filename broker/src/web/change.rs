//! Changes: proposed once per `Idempotency-Key`, recorded in the audit journal, waited for with `Prefer: enforced`.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use selvedge_cluster::{Done, Enforced, How, ProposeError};
use selvedge_domain::{Asker, Body, Command, Id};
use serde::Serialize;
use sha2::{Digest as _, Sha256};
use utoipa::ToSchema;

use super::auth::Caller;
use super::problem::rejected_code;
use super::read::POSITION_HEADER;
use super::{Context, Problem};
use crate::audit::{AdminChange, EnforceReceipt, Record, clipped};

/// Characters of an `Idempotency-Key`.
pub(crate) const IDEMPOTENCY_KEY_CHARS_MAX: usize = 255;
/// How long `Prefer: enforced` waits when it does not say.
pub(crate) const ENFORCED_WAIT_DEFAULT: Duration = Duration::from_secs(30);
/// The longest that it waits.
pub(crate) const ENFORCED_WAIT_MAX: Duration = Duration::from_secs(120);
/// A refusal by this broker's own state is confirmed by the leader within.
const CONFIRM_WAIT: Duration = Duration::from_secs(5);

/// What the caller wants besides the change itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Wanted {
    /// `Idempotency-Key`.
    pub idempotency_key: Option<String>,
    /// `Prefer: enforced, wait=N`.
    pub enforced: Option<Duration>,
}

impl<S: Send + Sync> FromRequestParts<S> for Wanted {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        Self::of(&parts.headers)
    }
}

impl Wanted {
    /// Reads the headers. Preferences that are not known are passed over, as RFC 7240 wants it.
    pub fn of(headers: &HeaderMap) -> Result<Self, Problem> {
        let mut wanted = Self::default();
        if let Some(key) = headers.get("idempotency-key") {
            let key = key.to_str().ok().filter(|key| !key.is_empty() && key.len() <= IDEMPOTENCY_KEY_CHARS_MAX);
            let key = key.ok_or_else(|| Problem::malformed("`Idempotency-Key` has 1 to 255 ASCII characters"))?;
            wanted.idempotency_key = Some(key.to_owned());
        }
        let (mut enforced, mut wait) = (false, ENFORCED_WAIT_DEFAULT);
        for value in headers.get_all("prefer") {
            for preference in value.to_str().unwrap_or_default().split([',', ';']).map(str::trim) {
                if preference.eq_ignore_ascii_case("enforced") {
                    enforced = true;
                } else if let Some(("wait", seconds)) = preference.split_once('=')
                    && let Ok(seconds) = seconds.trim_matches('"').parse()
                {
                    wait = Duration::from_secs(seconds).min(ENFORCED_WAIT_MAX);
                }
            }
        }
        wanted.enforced = enforced.then_some(wait);
        Ok(wanted)
    }

    /// The same for a later attempt of a read, change and write: its key is another, but always the same other.
    pub fn of_attempt(&self, attempt: usize) -> Self {
        let key = self.idempotency_key.clone();
        let key = if attempt == 0 { key } else { key.map(|key| format!("{key}\n{attempt}")) };
        Self { idempotency_key: key, enforced: self.enforced }
    }

    fn key_of(&self, caller: &Caller) -> Option<[u8; 32]> {
        let key = self.idempotency_key.as_ref()?;
        Some(Sha256::digest(format!("{}\n{key}", caller.label())).into())
    }
}

/// What was done, and how far it reaches.
pub(crate) struct Changed {
    /// What the log answered.
    pub done: Done,
    enforced: Option<Enforced>,
}

/// Part of every answer to a change.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(crate) struct ChangedInfo {
    /// Position of the log after the change.
    #[schema(value_type = String)]
    pub position: Id,
    /// With `Prefer: enforced`: who enforces it, and who is still open.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub enforced: Option<EnforcedInfo>,
}

/// Who enforces a change.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(crate) struct EnforcedInfo {
    /// Nothing that is sent from now on reaches the other side against the change.
    pub complete: bool,
    /// Brokers that enforce it.
    pub receipts: Vec<ReceiptInfo>,
    /// Brokers that may not yet.
    pub open: Vec<OpenInfo>,
}

/// A broker that enforces a change.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(crate) struct ReceiptInfo {
    /// Node id.
    pub broker: String,
    /// Its name.
    pub name: String,
    /// `reported` or `lease_over`.
    pub how: &'static str,
    /// Cluster time, milliseconds.
    pub at_ms: u64,
}

/// A broker that may not enforce a change yet.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(crate) struct OpenInfo {
    /// Node id.
    pub broker: String,
    /// Its name.
    pub name: String,
    /// Until when at most, cluster time in milliseconds.
    pub until_ms: u64,
}

impl Changed {
    /// The part of the answer that says where the change is.
    pub fn info(&self, context: &Context) -> ChangedInfo {
        let state = context.cluster.state();
        let name = |node| state.broker(node).map(|broker| broker.name).unwrap_or_default();
        let enforced = self.enforced.as_ref().map(|enforced| EnforcedInfo {
            complete: enforced.complete,
            receipts: enforced
                .receipts
                .iter()
                .map(|receipt| ReceiptInfo {
                    broker: receipt.node.to_string(),
                    name: name(receipt.node),
                    how: how_name(receipt.how),
                    at_ms: receipt.at_ms,
                })
                .collect(),
            open: enforced
                .open
                .iter()
                .map(|(node, until_ms)| OpenInfo { broker: node.to_string(), name: name(*node), until_ms: *until_ms })
                .collect(),
        });
        ChangedInfo { position: self.done.position, enforced }
    }

    /// Marks an answer with the position, and whether the preference was met.
    pub fn mark(&self, response: &mut Response) {
        let headers = response.headers_mut();
        if let Ok(position) = HeaderValue::from_str(&self.done.position.to_string()) {
            headers.insert(POSITION_HEADER, position);
        }
        if let Some(enforced) = &self.enforced {
            if enforced.complete {
                headers.insert("preference-applied", HeaderValue::from_static("enforced"));
            }
            let open: Vec<_> =
                enforced.open.iter().map(|(node, until_ms)| format!("{node};until={until_ms}")).collect();
            if let Ok(open) = HeaderValue::from_str(&open.join(", "))
                && !open.is_empty()
            {
                headers.insert("selvedge-enforcement-open", open);
            }
        }
    }

    /// An answer with a body.
    pub fn answer(&self, status: StatusCode, body: impl Serialize) -> Response {
        let mut response = (status, Json(body)).into_response();
        self.mark(&mut response);
        response
    }
}

fn how_name(how: How) -> &'static str {
    match how {
        How::Reported => "reported",
        How::LeaseOver => "lease_over",
    }
}

impl Context {
    /// Proposes what a caller asked for, records it, and waits until it is enforced when they want that.
    pub(crate) async fn change(
        self: &Arc<Self>,
        caller: &Caller,
        wanted: &Wanted,
        action: &str,
        target: &str,
        body: Body,
    ) -> Result<Changed, Problem> {
        // A caller that goes away must not leave a change without its record.
        let (context, caller, wanted) = (self.clone(), caller.clone(), wanted.clone());
        let (action, target) = (action.to_owned(), target.to_owned());
        let task = tokio::spawn(async move { context.change_whole(&caller, &wanted, &action, &target, body).await });
        task.await.map_err(|error| Problem::internal(&error))?
    }

    async fn change_whole(
        &self,
        caller: &Caller,
        wanted: &Wanted,
        action: &str,
        target: &str,
        body: Body,
    ) -> Result<Changed, Problem> {
        let result = self.propose_checked(caller.asker(), body, wanted.key_of(caller)).await;
        self.record(&caller.label(), &caller.name, &caller.source.to_string(), action, target, &result).await;
        let done = result?;
        let enforced = match wanted.enforced {
            None => None,
            Some(wait) => Some(self.cluster.enforced(done.position, wait).await?),
        };
        for receipt in enforced.iter().flat_map(|enforced| &enforced.receipts) {
            let record = EnforceReceipt {
                position: done.position,
                broker: receipt.node,
                how: how_name(receipt.how).to_owned(),
                at_ms: receipt.at_ms,
            };
            // Not waited for: it says what is so already.
            let _ = self.audit.append(&Record::EnforceReceipt(record));
        }
        Ok(Changed { done, enforced })
    }

    /// Proposes, unless a state that holds everything committed before would refuse it: that fills no log.
    async fn propose_checked(
        &self,
        asker: Asker,
        body: Body,
        idempotency: Option<[u8; 32]>,
    ) -> Result<Done, ProposeError> {
        // With a key an earlier attempt may have succeeded, and would stand in its own way here.
        if idempotency.is_none() {
            let command = Command::new(asker.actor.clone(), self.cluster.node(), None, body);
            let now_ms = self.cluster.now_ms();
            if self.cluster.state().check(now_ms, &command).is_err() {
                let state = self.cluster.linearizable(CONFIRM_WAIT).await.map_err(|_| ProposeError::Unavailable)?;
                state.check(self.cluster.now_ms(), &command)?;
            }
            return self.cluster.propose(asker, command.body, None).await;
        }
        self.cluster.propose(asker, body, idempotency).await
    }

    /// Writes the record of a change or of an attempt. It is durable before the caller is answered.
    pub(crate) async fn record(
        &self,
        actor: &str,
        actor_name: &str,
        source: &str,
        action: &str,
        target: &str,
        result: &Result<Done, ProposeError>,
    ) {
        let (outcome, position) = match result {
            Ok(done) => ("done", Some(done.position)),
            Err(ProposeError::Refused(rejected)) => (rejected_code(rejected.code), None),
            Err(ProposeError::Unknown) => ("unknown", None),
            Err(ProposeError::Busy { .. }) => ("busy", None),
            Err(ProposeError::NoRoom) => ("no_room", None),
            Err(ProposeError::Unavailable) => ("no_leader", None),
        };
        let record = AdminChange {
            actor: actor.to_owned(),
            actor_name: clipped(actor_name),
            action: action.to_owned(),
            target: clipped(target),
            outcome: outcome.to_owned(),
            position,
            source: source.to_owned(),
        };
        // The change stands whatever becomes of its record; the journal's own alarms say that it does not accept.
        let _ = self.audit.append_durable(&Record::AdminChange(record)).await;
    }
}

#[cfg(test)]
mod tests {
    use selvedge_domain::{Actor, Credential};

    use super::*;

    fn wanted(headers: &[(&'static str, &'static str)]) -> Result<Wanted, Problem> {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.append(*name, HeaderValue::from_static(value));
        }
        Wanted::of(&map)
    }

    #[test]
    fn preferences_are_read_as_rfc_7240_writes_them() {
        for (value, expected) in [
            ("enforced", Some(30)),
            ("enforced, wait=5", Some(5)),
            ("wait=5, enforced", Some(5)),
            ("respond-async; enforced; wait=\"7\"", Some(7)),
            ("Enforced, wait=99999", Some(120)),
            ("wait=5", None),
            ("return=minimal", None),
        ] {
            assert_eq!(wanted(&[("prefer", value)]).unwrap().enforced, expected.map(Duration::from_secs), "{value}");
        }
        assert_eq!(
            wanted(&[("prefer", "enforced"), ("prefer", "wait=3")]).unwrap().enforced,
            Some(Duration::from_secs(3))
        );
    }

    #[test]
    fn an_idempotency_key_belongs_to_its_caller() {
        let wanted = wanted(&[("idempotency-key", "k1")]).unwrap();
        let caller = |seq| Caller {
            actor: Actor::token(Id::new(1, seq), 1),
            credential: Credential::new("svt_x"),
            name: String::new(),
            directory: None,
            source: ([127, 0, 0, 1], 1).into(),
        };
        assert_eq!(wanted.key_of(&caller(1)), wanted.key_of(&caller(1)));
        assert_ne!(wanted.key_of(&caller(1)), wanted.key_of(&caller(2)));
        assert!(super::tests::wanted(&[("idempotency-key", "")]).is_err());
    }
}
