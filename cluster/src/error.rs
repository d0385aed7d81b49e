//! What can go wrong.

use selvedge_domain::{Id, Rejected};
use tokio::sync::watch;

/// Why the cluster part cannot start or do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Storage failed.
    #[error("storage")]
    Storage(#[from] selvedge_storage::Error),
    /// The stored state cannot be read.
    #[error("the stored state cannot be read")]
    State(#[source] std::io::Error),
    /// Raft cannot start, or has stopped.
    #[error("raft: {0}")]
    Raft(String),
    /// The peer listener failed.
    #[error("the peer listener")]
    Listen(#[source] tonic::transport::Error),
    /// The peer listener cannot be used.
    #[error("the peer listener")]
    Socket(#[source] std::io::Error),
    /// Nobody leads, or no quorum answers.
    #[error("no leader with a quorum can be reached")]
    Unavailable,
    /// It took longer than the caller would wait.
    #[error("timed out")]
    TimedOut,
    /// Who asks may not have it.
    #[error(transparent)]
    Refused(Rejected),
    /// The membership cannot be changed so.
    #[error("the membership cannot be changed: {0}")]
    Membership(String),
    /// The journal does not go back that far here.
    #[error("the journal begins after {upto}")]
    Compacted {
        /// The last sequence number that is gone.
        upto: u64,
    },
    /// This broker installed a snapshot and does not have these events yet.
    #[error("the events up to {upto} are not here yet; other brokers have them: {brokers:?}")]
    Elsewhere {
        /// The last sequence number that is not here.
        upto: u64,
        /// Node ids of brokers that said they have them.
        brokers: Vec<u64>,
    },
    /// The watch is of another epoch: everything must be read again.
    #[error("the log is of another epoch and stands at {position}")]
    Reset {
        /// Where the log stands.
        position: Id,
    },
    /// The watcher took nothing for too long.
    #[error("the watcher is too slow; it resumes at {resume}")]
    Slow {
        /// The first event that it was not given.
        resume: Id,
    },
    /// This broker has not applied what its caller has seen.
    #[error("this broker is at {position} and has not applied {seen} yet")]
    Behind {
        /// Where this broker's state stands.
        position: Id,
        /// What the caller has seen.
        seen: Id,
    },
    /// A journal row that does not decode.
    #[error("journal row {seq} is damaged")]
    Journal {
        /// Its sequence number.
        seq: u64,
    },
    /// Another broker cannot be reached or refused.
    #[error("broker `{node}`: {status}")]
    Peer {
        /// Node id.
        node: u64,
        /// What it said.
        status: Box<tonic::Status>,
    },
    /// This broker must not start.
    #[error("{0} ({code})", code = .0.code())]
    Fatal(#[from] Fatal),
    /// The cluster cannot be initialised.
    #[error("the cluster cannot be initialised: {0}")]
    Initialize(String),
}

/// Why a proposal was not answered with its effect.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProposeError {
    /// Decided and refused: a committed answer.
    #[error(transparent)]
    Refused(#[from] Rejected),
    /// It may have been applied, or may still be. A retry with the same idempotency key is applied once.
    #[error("the outcome is unknown")]
    Unknown,
    /// Not applied: too much waits already.
    #[error("busy; again in {retry_after_ms} ms")]
    Busy {
        /// When it may be tried again.
        retry_after_ms: u64,
    },
    /// Not applied: a disk of the leader is nearly full, and nobody else can lead.
    #[error("the leader's disk is nearly full (SE0110)")]
    NoRoom,
    /// Not applied: no leader could be reached.
    #[error("no leader can be reached")]
    Unavailable,
}

/// Why a broker must stop: it cannot be trusted to hold what it should.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fatal {
    /// Raft stopped by itself: storage failed or it found itself inconsistent.
    #[error("raft has stopped: {0}")]
    Raft(String),
    /// A majority holds another state at the same index.
    #[error("the state at index {index} differs from that of a majority")]
    StateDiffers {
        /// Where.
        index: u64,
    },
    /// A disk is full: the log or the state could not be written.
    #[error("a disk is full: {0}")]
    NoSpace(String),
    /// A write of the log or the state does not come back.
    #[error("a write of the {what} has been waiting for {waiting_ms} ms")]
    DiskStalled {
        /// Of what.
        what: &'static str,
        /// For how long.
        waiting_ms: u64,
    },
    /// Another broker remembers more of this one than it has: its disk was wiped or set back.
    #[error("this broker has forgotten what it answered for: broker `{peer}` remembers that {why}")]
    Forgot {
        /// Who remembers.
        peer: u64,
        /// What.
        why: String,
    },
    /// The rows that were loaded do not add up to the hash that was stored with them.
    #[error("the stored rows do not add up to the state hash at position {position}")]
    StateDamaged {
        /// Where the state stood.
        position: u64,
    },
    /// An administrator removed this broker from the cluster, for ever.
    #[error("this broker was removed from the cluster")]
    Removed,
    /// What was committed can only be decided by a newer build than this one.
    #[error("the log holds what only a newer build knows: {what}; this one knows version {known} of the rules")]
    Newer {
        /// What.
        what: String,
        /// The newest version that this build knows.
        known: u32,
    },
    /// Judging sessions again after a change panicked: what was not judged never counts as enforced.
    #[error("enforcing the changes up to index {index} failed")]
    Enforcing {
        /// The last change of the attempt.
        index: u64,
    },
}

impl Fatal {
    /// The code that an operator looks up.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Raft(_) => "SE0101",
            Self::StateDiffers { .. } => "SE0102",
            Self::Enforcing { .. } => "SE0103",
            Self::Removed => "SE0104",
            Self::Newer { .. } => "SE0105",
            Self::NoSpace(_) => "SE0111",
            Self::DiskStalled { .. } => "SE0112",
            Self::Forgot { .. } => "SE0113",
            Self::StateDamaged { .. } => "SE0114",
        }
    }

    /// Says that this broker must stop; the first reason stays.
    pub(crate) fn report(self, to: &watch::Sender<Option<Fatal>>) {
        to.send_if_modified(|first| {
            if first.is_some() {
                return false;
            }
            tracing::error!(code = self.code(), reason = %self, "this broker must stop");
            *first = Some(self);
            true
        });
    }
}
