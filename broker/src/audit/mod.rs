//! The audit stream: one record for each decision, chained in a journal, delivered to log receivers.
//!
//! **Invariant:** a session's open record is durable before its first byte is forwarded; a refusal's before it is
//! answered. What does not fit the journal is not admitted.

mod export;
mod log;
mod metrics;
mod record;
pub mod retention;
#[cfg(test)]
mod tests;

pub use export::{Exporter, line};
pub use log::{Appended, Error, Log};
pub use record::{
    AdminChange, Candidate, Denied, EnforceReceipt, ExportGap, Initiator, NameUnknown, Party, Record, SessionClose,
    SessionLost, SessionOpen, Strangers, clipped,
};
