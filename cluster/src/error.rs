//! What can go wrong.

use selvedge_domain::Rejected;

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
    /// The membership cannot be changed so.
    #[error("the membership cannot be changed: {0}")]
    Membership(String),
    /// The journal does not go back that far here.
    #[error("the journal begins after {upto}")]
    Compacted {
        /// The last sequence number that is gone.
        upto: u64,
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
        }
    }
}
