use std::io;
use std::net::SocketAddr;

use selvedge_proto::frame::SessionCode;

use crate::state;

/// Why a client could not do what it was asked. What it prints is what a person sees.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Denied, unknown, or not a name at all: one answer for all.
    #[error("no such name `{0}`")]
    NoSuchName(String),
    /// In no zone: no broker is asked about it.
    #[error("`{0}` is in no private zone; reach it without this proxy")]
    NotPrivate(String),
    /// Allowed, but nothing reaches it now.
    #[error("`{0}` is unavailable")]
    Unavailable(String),
    /// The login is too old.
    #[error("log in again")]
    Reauthenticate,
    /// This version is not served any more.
    #[error("this version is not served any more: upgrade")]
    Upgrade,
    /// A limit is reached.
    #[error("too many sessions; try again in {retry_after_ms} ms")]
    Busy {
        /// When to try again.
        retry_after_ms: u64,
    },
    /// No control stream stands.
    #[error("no broker can be reached: {0}")]
    Detached(String),
    /// Nothing answered in time.
    #[error("`{0}` did not answer in time")]
    TimedOut(String),
    /// The session broke before it began.
    #[error("the session with `{host}` failed: {code}")]
    Session {
        /// Where to.
        host: String,
        /// Why.
        code: SessionCode,
    },
    /// The state cannot be used.
    #[error(transparent)]
    State(#[from] state::Error),
    /// What is enrolled there is not a client or workload.
    #[error("`{0}` is not a client's or workload's state directory")]
    NotAClient(String),
    /// TLS cannot be set up.
    #[error(transparent)]
    Tls(#[from] selvedge_proto::tls::Error),
    /// The running client does not answer as it should.
    #[error("the client that runs on this state directory: {0}")]
    Local(String),
    /// Others could use the port.
    #[error("`{0}` is not a loopback address")]
    NotLoopback(SocketAddr),
    /// The port cannot be listened on.
    #[error("cannot listen on `{address}`: {source}")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Reading or writing failed.
    #[error("{0}")]
    Io(#[from] io::Error),
}

impl Error {
    /// 1 for what policy or absence denies, 2 for everything else.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::NoSuchName(_) => 1,
            _ => 2,
        }
    }
}
