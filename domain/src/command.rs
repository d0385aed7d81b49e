//! Commands: what is proposed to the log, and what becomes of it.
//!
//! Stored bytes: one version byte, then bincode of [`Command`] (fixed layout: a change of any type here is a new version).

use serde::{Deserialize, Serialize};

use crate::id::Id;
use crate::rows::BrokerRole;
use crate::spec;

/// Version byte of an encoded command.
pub const COMMAND_VERSION: u8 = 2;

/// A proposed change.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Command {
    /// Who asked for it.
    pub actor: Actor,
    /// Node id of the broker that proposes it.
    pub proposer: u64,
    /// What the change is about; always the body's.
    pub class: Class,
    /// Makes a retry harmless.
    pub dedupe: Option<Dedupe>,
    /// What is asked.
    pub body: Body,
}

impl Command {
    /// A command of its body's class.
    pub fn new(actor: Actor, proposer: u64, dedupe: Option<Dedupe>, body: Body) -> Self {
        Self { actor, proposer, class: body.class(), dedupe, body }
    }

    /// The version of the rules that a build must know to decide this.
    pub fn needs_version(&self) -> u32 {
        match &self.body {
            Body::RaiseMinVersion { version } => *version,
            body => body.since_version(),
        }
    }

    /// The stored bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![COMMAND_VERSION];
        bincode::serde::encode_into_std_write(self, &mut bytes, bincode::config::standard())
            .expect("writing to a vector does not fail, and every type here is encodable");
        bytes
    }

    /// Reads stored bytes.
    ///
    /// **Errors** unknown version, malformed bytes, trailing bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let (&version, body) = bytes.split_first().ok_or(DecodeError::Malformed)?;
        if version != COMMAND_VERSION {
            return Err(DecodeError::Version(version));
        }
        let config = bincode::config::standard().with_limit::<{ 16 << 20 }>();
        let (command, read) = bincode::serde::decode_from_slice(body, config).map_err(|_| DecodeError::Malformed)?;
        if read == body.len() { Ok(command) } else { Err(DecodeError::Malformed) }
    }
}

/// Stored bytes are not a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// Written by a version that this one does not know.
    #[error("a command of version {0} is not known")]
    Version(u8),
    /// Not a command.
    #[error("malformed command")]
    Malformed,
}

/// Who asked. `decide` checks rights and generation in the state that it decides on.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Actor {
    /// Kind.
    pub kind: ActorKind,
    /// Token, directory or enrolment secret; for brokers and bootstrap none.
    pub id: Option<Id>,
    /// Generation of the credential that was verified.
    pub generation: u64,
}

impl Actor {
    /// A broker acting for itself (availability, cursors, membership, ticks).
    pub const BROKER: Self = Self { kind: ActorKind::Broker, id: None, generation: 0 };
    /// Someone on the machine itself.
    pub const BOOTSTRAP: Self = Self { kind: ActorKind::Bootstrap, id: None, generation: 0 };

    /// An administrator's token.
    pub fn token(id: Id, generation: u64) -> Self {
        Self { kind: ActorKind::Token, id: Some(id), generation }
    }

    /// A directory's SCIM token.
    pub fn directory(id: Id, generation: u64) -> Self {
        Self { kind: ActorKind::Directory, id: Some(id), generation }
    }

    /// An enrolment secret.
    pub fn enrolment(id: Id) -> Self {
        Self { kind: ActorKind::Enrolment, id: Some(id), generation: 0 }
    }
}

/// Kinds of actors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ActorKind {
    /// The proposing broker itself.
    Broker,
    /// An administrator's token.
    Token,
    /// A directory's token.
    Directory,
    /// On the machine itself, at `cluster init`.
    Bootstrap,
    /// An enrolment secret.
    Enrolment,
}

/// What a command is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Class {
    /// Who may reach what.
    Policy,
    /// Who there is: people, groups, and what was enrolled.
    Identity,
    /// Tokens and enrolment secrets.
    Secret,
    /// The running of the cluster itself.
    Operations,
}

/// Identifies a request of a registered client, so that it is applied once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dedupe {
    /// The registered client.
    pub client: Id,
    /// Counter of the client's requests, from 1.
    pub seq: u64,
    /// Every outcome below this was received.
    pub acked_below: u64,
    /// SHA-256 of caller and `Idempotency-Key`, when the caller sent one.
    pub idempotency: Option<[u8; 32]>,
}

/// What is asked.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Body {
    /// The first command of a cluster.
    InitCluster(InitCluster),
    /// Raises the version of the rules in force.
    RaiseMinVersion {
        /// The version.
        version: u32,
    },
    /// Moves cluster time when there is nothing to write. State only, no journal row.
    Tick,
    /// Registers a proposing client (a broker's boot).
    RegisterClient {
        /// The broker's boot.
        boot: u64,
    },
    /// A broker says what it is; also its first registration.
    PutBroker(PutBroker),
    /// Removes a broker for ever.
    RemoveBroker {
        /// Node id.
        node: u64,
    },
    /// A broker begins or ends draining.
    DrainBroker {
        /// Node id.
        node: u64,
        /// Draining.
        draining: bool,
        /// What is left of its sessions after so many milliseconds is cut.
        within_ms: u64,
    },
    /// A transaction of configuration objects: all or nothing.
    Apply(Apply),
    /// Changes lease and hold.
    PutSettings {
        /// Freshness lease, milliseconds.
        lease_ms: u64,
        /// Hold, milliseconds.
        hold_ms: u64,
    },
    /// Makes an administrator's token.
    CreateToken {
        /// For people.
        name: String,
        /// `AdminRole`.
        role: i32,
        /// SHA-256 of the token.
        secret_sha256: [u8; 32],
    },
    /// Revokes an administrator's token.
    RevokeToken {
        /// Token.
        id: Id,
    },
    /// Makes a directory, or replaces its token.
    PutDirectory {
        /// Unique name.
        name: String,
        /// SHA-256 of its SCIM token.
        token_sha256: [u8; 32],
    },
    /// Makes a user.
    CreateUser(UserFields),
    /// Replaces what the directory says of a user.
    ReplaceUser {
        /// User.
        id: Id,
        /// `If-Match`.
        version: Option<u64>,
        /// Everything.
        fields: UserFields,
    },
    /// Deletes a user.
    DeleteUser {
        /// User.
        id: Id,
        /// `If-Match`.
        version: Option<u64>,
    },
    /// Makes a group.
    CreateGroup(GroupFields),
    /// Changes a group: name, and members added and removed, or all replaced.
    ChangeGroup(ChangeGroup),
    /// Deletes a group.
    DeleteGroup {
        /// Group.
        id: Id,
        /// `If-Match`.
        version: Option<u64>,
    },
    /// Makes an enrolment secret.
    CreateEnrolKey(CreateEnrolKey),
    /// Revokes an enrolment secret.
    RevokeEnrolKey {
        /// Secret.
        id: Id,
    },
    /// Uses an enrolment secret. The proposer checked the CSR's proof of possession.
    Enrol(Enrol),
    /// The issuer signed a certificate.
    CertificateIssued(CertificateIssued),
    /// Revokes a device, workload or connector: its generation rises and its certificates are void.
    Revoke {
        /// What.
        subject: Subject,
    },
    /// Transitions of availability that one broker saw.
    Availability(Vec<AvailabilityChange>),
    /// Receivers acknowledged. State only, no journal row.
    MoveCursors(Vec<CursorMove>),
    /// Forgets journal rows up to here.
    CompactJournal {
        /// Position.
        upto_seq: u64,
    },
    /// Changes for how long the event journal is kept.
    KeepJournal {
        /// Milliseconds.
        keep_ms: u64,
    },
    /// Lets be what is held since the state was restored from an earlier one.
    Release(Release),
    /// Sets cluster time forward: by more than the leader follows the voters' clocks by itself.
    SetTime {
        /// Milliseconds.
        time_ms: u64,
    },
    /// Gives an administrator's token another name.
    #[cfg(feature = "next")]
    RenameToken {
        /// Token.
        id: Id,
        /// For people.
        name: String,
    },
}

impl Body {
    /// The version of the rules that has this kind: it is not proposed before that is in force.
    pub fn since_version(&self) -> u32 {
        match self {
            #[cfg(feature = "next")]
            Self::RenameToken { .. } => 2,
            _ => 1,
        }
    }

    /// What the change is about.
    pub fn class(&self) -> Class {
        match self {
            Self::Apply(_) => Class::Policy,
            Self::CreateUser(_)
            | Self::ReplaceUser { .. }
            | Self::DeleteUser { .. }
            | Self::CreateGroup(_)
            | Self::ChangeGroup(_)
            | Self::DeleteGroup { .. }
            | Self::Enrol(_)
            | Self::CertificateIssued(_)
            | Self::Revoke { .. }
            | Self::Release(_) => Class::Identity,
            Self::CreateToken { .. }
            | Self::RevokeToken { .. }
            | Self::PutDirectory { .. }
            | Self::CreateEnrolKey(_)
            | Self::RevokeEnrolKey { .. } => Class::Secret,
            #[cfg(feature = "next")]
            Self::RenameToken { .. } => Class::Secret,
            Self::InitCluster(_)
            | Self::RaiseMinVersion { .. }
            | Self::Tick
            | Self::RegisterClient { .. }
            | Self::PutBroker(_)
            | Self::RemoveBroker { .. }
            | Self::DrainBroker { .. }
            | Self::PutSettings { .. }
            | Self::Availability(_)
            | Self::MoveCursors(_)
            | Self::CompactJournal { .. }
            | Self::KeepJournal { .. }
            | Self::SetTime { .. } => Class::Operations,
        }
    }

    /// The role that a broker needs to propose this; none when every broker may.
    pub fn proposer_role(&self) -> Option<BrokerRole> {
        match self {
            Self::Enrol(_) | Self::CertificateIssued(_) => Some(BrokerRole::Issuer),
            Self::Availability(_) => Some(BrokerRole::Edge),
            // Administrators and directories are heard on `web` only.
            Self::RaiseMinVersion { .. }
            | Self::RemoveBroker { .. }
            | Self::PutSettings { .. }
            | Self::KeepJournal { .. }
            | Self::SetTime { .. } => Some(BrokerRole::Web),
            _ => match self.class() {
                Class::Policy | Class::Identity | Class::Secret => Some(BrokerRole::Web),
                Class::Operations => None,
            },
        }
    }
}

/// The first command of a cluster.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct InitCluster {
    /// Random.
    pub cluster_id: [u8; 16],
    /// Never changes.
    pub trust_domain: String,
    /// Encoded trust anchors.
    pub anchors: Vec<u8>,
    /// SHA-256 of the first owner's token.
    pub owner_sha256: [u8; 32],
    /// Random; knock keys are derived from it.
    pub knock_secret: [u8; 32],
    /// Freshness lease, milliseconds.
    pub lease_ms: u64,
    /// Hold, milliseconds.
    pub hold_ms: u64,
}

/// What a broker says of itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PutBroker {
    /// Node id.
    pub node: u64,
    /// Unique name.
    pub name: String,
    /// Region name.
    pub region: String,
    /// Host name in TLS server names.
    pub host: String,
    /// Advertised edge address.
    pub edge: String,
    /// Advertised web address.
    pub web: String,
    /// Advertised peer address.
    pub peer: String,
    /// `BrokerRole`s.
    pub roles: Vec<i32>,
}

/// A transaction of configuration objects.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Apply {
    /// Objects to make or replace, any order.
    pub puts: Vec<ApplyPut>,
    /// Objects to delete.
    pub deletes: Vec<spec::Key>,
    /// Refuse when the policy revision is another by now.
    pub expect_revision: Option<u64>,
}

/// An object to put, with what the proposer judged of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ApplyPut {
    /// The object.
    pub object: spec::Object,
    /// For a policy: its compiled form.
    pub compiled: Option<CompiledPolicy>,
}

/// A Cedar policy as the proposer compiled it: JSON form with numbered references.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CompiledPolicy {
    /// Cedar's JSON form, in which the n-th reference is the entity id `$n`.
    pub template: String,
    /// (entity type, name as written) of `$0`, `$1`, ...
    pub references: Vec<(String, String)>,
}

/// What a directory says of a user.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct UserFields {
    /// SCIM `userName`.
    pub user_name: String,
    /// SCIM `externalId`, or empty.
    pub external_id: String,
    /// SCIM `displayName`, or empty.
    pub display_name: String,
    /// SCIM `active`.
    pub active: bool,
    /// Every other attribute, a JSON object.
    pub attributes: String,
}

/// What a directory says of a group.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GroupFields {
    /// SCIM `displayName`.
    pub display_name: String,
    /// SCIM `externalId`, or empty.
    pub external_id: String,
    /// Users.
    pub members: Vec<Id>,
}

/// A change of a group.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ChangeGroup {
    /// Group.
    pub id: Id,
    /// `If-Match`.
    pub version: Option<u64>,
    /// New `displayName`.
    pub display_name: Option<String>,
    /// New `externalId`.
    pub external_id: Option<String>,
    /// All members, replacing those there are; `add` and `remove` come after.
    pub members: Option<Vec<Id>>,
    /// Members to add.
    pub add: Vec<Id>,
    /// Members to remove; unknown ones are ignored.
    pub remove: Vec<Id>,
}

/// A new enrolment secret.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CreateEnrolKey {
    /// `EnrolKind`.
    pub kind: i32,
    /// For people.
    pub name: String,
    /// Connector group name, workload name, or `userName` (with `directory/` before it when not unique). For brokers the
    /// roles, with commas between them; all when empty.
    pub target: String,
    /// SHA-256 of the secret.
    pub secret_sha256: [u8; 32],
    /// Uses.
    pub uses_max: u32,
    /// Life from now, milliseconds.
    pub life_ms: u64,
}

/// The use of an enrolment secret.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Enrol {
    /// SHA-256 of the secret.
    pub secret_sha256: [u8; 32],
    /// `EnrolKind` that the caller asks for; must be the secret's.
    pub kind: i32,
    /// SHA-256 of the public key (SPKI) whose possession was proven.
    pub key_sha256: [u8; 32],
    /// What the caller calls itself.
    pub name: String,
    /// For brokers, the node id.
    pub node: u64,
}

/// A certificate that was signed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CertificateIssued {
    /// Lower-case hex.
    pub serial: String,
    /// SPIFFE id.
    pub subject: String,
    /// SHA-256 of the public key (SPKI).
    pub key_sha256: [u8; 32],
    /// Expires.
    pub not_after_ms: u64,
    /// Whose.
    pub of: Subject,
}

/// An enrolled thing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Subject {
    /// A device.
    Device(Id),
    /// A workload.
    Workload(Id),
    /// A connector.
    Connector(Id),
    /// A broker.
    Broker(u64),
}

/// What is let be again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Release {
    /// A device, workload or connector.
    Subject(Subject),
    /// Everything, users too, of the cluster that is named.
    Everything {
        /// Cluster id.
        cluster_id: [u8; 16],
    },
}

/// A connector came, went, or found targets down.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AvailabilityChange {
    /// Connector.
    pub connector: Id,
    /// The connector's stream number.
    pub stream: u64,
    /// Connected to the proposer.
    pub up: bool,
    /// Targets (`host:port`) that do not answer.
    pub down: Vec<String>,
}

/// A receiver acknowledged a stream up to before `next_seq`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CursorMove {
    /// Receiver.
    pub receiver: Id,
    /// Broker of the stream.
    pub broker: u64,
    /// Boot of the stream.
    pub boot: u64,
    /// The next sequence number to send.
    pub next_seq: u64,
}

/// What became of a command: a committed value, also when it was refused.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Outcome {
    /// Applied.
    Done {
        /// Position of the log after it.
        position: Id,
        /// Ids of the objects that it made, in order.
        ids: Vec<Id>,
    },
    /// Refused; nothing was changed.
    Refused(Rejected),
}

/// Why a command was refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Rejected {
    /// Closed set, for programs.
    pub code: RejectedCode,
    /// For people.
    pub message: String,
}

/// Codes of refusal: a closed set, stored and sent by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, prost::Enumeration)]
#[repr(i32)]
pub enum RejectedCode {
    /// Not refused.
    None = 0,
    /// A field is wrong.
    Invalid = 1,
    /// The object is not there.
    NotFound = 2,
    /// The name is taken, or another object stands in the way.
    Conflict = 3,
    /// `If-Match` or the expected revision is another by now.
    VersionMismatch = 4,
    /// The actor may not do this.
    Forbidden = 5,
    /// The credential is revoked or of an older generation.
    Unauthenticated = 6,
    /// A limit is reached.
    Limit = 7,
    /// The enrolment secret is unknown.
    KeyUnknown = 8,
    /// The enrolment secret has no uses left.
    KeyExhausted = 9,
    /// The enrolment secret has expired or was revoked.
    KeyVoid = 10,
    /// The enrolment secret is for another role or target.
    KeyMismatch = 11,
    /// The retry is outside the window in which outcomes are kept.
    DedupeWindow = 12,
    /// The proposing client is not registered.
    DedupeUnknown = 13,
    /// The cluster was initialised before.
    AlreadyInitialised = 14,
    /// The cluster was not initialised.
    NotInitialised = 15,
    /// What a policy or segment names is still in use.
    InUse = 16,
    /// The same key came with an outcome that was refused before; the message is not kept.
    Before = 17,
}

impl Rejected {
    /// A refusal.
    pub fn new(code: RejectedCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }
}
