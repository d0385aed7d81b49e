//! Audit records, as they are stored (JSON) and sent.

use serde::{Deserialize, Serialize};

use selvedge_domain::Id;

/// Characters of a field that comes from outside; what is longer is cut and marked.
const FIELD_CHARS_MAX: usize = 512;

/// One audit record.
///
/// **Shape** a JSON object with `kind`; stored inside the journal's envelope, which adds stream, sequence number, time
/// and the hash of the record before.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind")]
pub enum Record {
    /// A session was admitted.
    #[serde(rename = "session.open")]
    SessionOpen(Box<SessionOpen>),
    /// A session ended.
    #[serde(rename = "session.close")]
    SessionClose(SessionClose),
    /// An attempt was refused.
    #[serde(rename = "session.denied")]
    SessionDenied(Box<Denied>),
    /// A session of an earlier boot whose end nobody saw.
    #[serde(rename = "session.lost")]
    SessionLost(SessionLost),
    /// A name in a zone that no segment has.
    #[serde(rename = "name.unknown")]
    NameUnknown(NameUnknown),
    /// An administrator or a directory changed something.
    #[serde(rename = "admin.change")]
    AdminChange(AdminChange),
    /// Who enforced a change, and how that is known.
    #[serde(rename = "enforce.receipt")]
    EnforceReceipt(EnforceReceipt),
    /// Attempts without a proven identity, counted.
    #[serde(rename = "edge.strangers")]
    Strangers(Strangers),
    /// Records that a log receiver will never get.
    #[serde(rename = "export.gap")]
    ExportGap(ExportGap),
}

impl Record {
    /// The record's kind.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::SessionOpen(_) => "session.open",
            Self::SessionClose(_) => "session.close",
            Self::SessionDenied(_) => "session.denied",
            Self::SessionLost(_) => "session.lost",
            Self::NameUnknown(_) => "name.unknown",
            Self::AdminChange(_) => "admin.change",
            Self::EnforceReceipt(_) => "enforce.receipt",
            Self::Strangers(_) => "edge.strangers",
            Self::ExportGap(_) => "export.gap",
        }
    }
}

/// What kind of end began a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Initiator {
    /// A person's client.
    Person,
    /// A workload.
    Workload,
    /// A gateway that presents a workload.
    Gateway,
    /// Browser access.
    Web,
    /// An agent that presents a process.
    Agent,
    /// A device before anyone has logged in.
    Device,
}

/// Whose rights count, and whose certificate was shown.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Party {
    /// Kind of initiator.
    pub initiator: Initiator,
    /// `user/1-42`, `workload/1-43`, `device/1-44`.
    pub principal: String,
    /// The principal's name at the time.
    pub name: String,
    /// SPIFFE id of the certificate shown.
    pub presenter: String,
    /// Address that the control stream came from.
    pub source: String,
}

/// A path that was considered.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Candidate {
    /// Broker's node id.
    pub broker: u64,
    /// Connector.
    pub connector: String,
    /// Cost, milliseconds.
    pub cost_ms: f64,
    /// Why it lost; empty for the chosen one.
    pub lost: String,
}

/// A session was admitted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SessionOpen {
    /// 32 hexadecimal digits.
    pub session: String,
    /// Who.
    pub party: Party,
    /// Host as asked, canonical.
    pub host: String,
    /// Port.
    pub port: u16,
    /// `tcp` or `udp`.
    pub transport: String,
    /// Segment's id.
    pub segment: String,
    /// Segment's name at the time.
    pub segment_name: String,
    /// Names of the deciding policies.
    pub policies: Vec<String>,
    /// Position of the state that was decided on.
    pub position: Id,
    /// Policy revision that was decided on.
    pub revision: u64,
    /// The verdict with simulated policies counted, when it differs.
    pub simulated: Option<bool>,
    /// Connector that was chosen.
    pub connector: String,
    /// All paths that were considered.
    pub candidates: Vec<Candidate>,
    /// OpenTelemetry trace id of the attempt.
    pub trace: String,
}

/// A session ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SessionClose {
    /// 32 hexadecimal digits.
    pub session: String,
    /// Why: `ended`, `revoked`, `lease_over`, ...
    pub why: String,
    /// Bytes from the client.
    pub up_bytes: u64,
    /// Bytes from the application.
    pub down_bytes: u64,
    /// From open to close, milliseconds.
    pub duration_ms: u64,
}

/// An attempt was refused.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Denied {
    /// Random; what the caller was told.
    pub denial: String,
    /// Who.
    pub party: Party,
    /// Host as asked.
    pub host: String,
    /// Port.
    pub port: u16,
    /// `tcp` or `udp`.
    pub transport: String,
    /// Closed set: `no_segment`, `no_permit`, `forbidden`, ...
    pub reason: String,
    /// Segment's name, when one was matched.
    pub segment_name: String,
    /// Names of the policies that decided or failed.
    pub policies: Vec<String>,
    /// Position of the state that was decided on.
    pub position: Id,
    /// Policy revision that was decided on.
    pub revision: u64,
    /// The verdict with simulated policies counted, when it differs.
    pub simulated: Option<bool>,
    /// OpenTelemetry trace id of the attempt.
    pub trace: String,
}

/// A session of an earlier boot whose end nobody saw.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SessionLost {
    /// 32 hexadecimal digits.
    pub session: String,
    /// The stream that has its open record.
    pub stream: String,
}

/// A name in a zone that no segment has.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NameUnknown {
    /// Who asked.
    pub party: Party,
    /// The name, canonical when it is a name at all.
    pub host: String,
}

/// An administrator or a directory changed something, or tried to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdminChange {
    /// `token/1-2`, `directory/1-7`, `enrolment`, `bootstrap`, `broker/123`.
    pub actor: String,
    /// The actor's name at the time.
    pub actor_name: String,
    /// What was asked: `apply`, `user.create`, ...
    pub action: String,
    /// What it was done to.
    pub target: String,
    /// `done`, or the code of the refusal.
    pub outcome: String,
    /// Position after it, when done.
    pub position: Option<Id>,
    /// Address of the caller.
    pub source: String,
}

/// Who enforced a change, and how that is known.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EnforceReceipt {
    /// Position of the change.
    pub position: Id,
    /// Broker's node id.
    pub broker: u64,
    /// `reported` or `lease_over`.
    pub how: String,
    /// Cluster time.
    pub at_ms: u64,
}

/// Attempts on the edge without a proven identity, one record a minute at most per prefix and reason.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Strangers {
    /// Address prefix (/24 or /48).
    pub prefix: String,
    /// `no_knock`, `bad_hello`, `unknown_ticket`, `handshake`, ...
    pub reason: String,
    /// How many since the last such record.
    pub count: u64,
}

/// Records that a log receiver will never get.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ExportGap {
    /// Receiver's id.
    pub receiver: String,
    /// Receiver's name at the time.
    pub receiver_name: String,
    /// The stream.
    pub stream: String,
    /// The first record that it lacks.
    pub from: u64,
    /// The last one; none when the end of the stream cannot be read.
    pub upto: Option<u64>,
    /// `deleted` by retention before the receiver was added, or `broken` on the disk.
    pub why: String,
}

/// A text from outside, cut to a bounded length with a marker.
pub fn clipped(text: &str) -> String {
    if text.chars().count() <= FIELD_CHARS_MAX {
        return text.to_owned();
    }
    let kept: String = text.chars().take(FIELD_CHARS_MAX).collect();
    format!("{kept}[cut: {} bytes]", text.len())
}
