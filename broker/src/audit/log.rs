use std::sync::Arc;

use selvedge_storage::audit::{Journal, StreamId, Ticket};

use super::metrics;
use super::record::Record;

/// Milliseconds of cluster time.
pub type TimeSource = Arc<dyn Fn() -> u64 + Send + Sync>;

/// The journal could not take a record.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The disk or its quota; new sessions are denied meanwhile.
    #[error("the audit journal does not accept records")]
    Journal(#[from] selvedge_storage::Error),
    /// A record that is not JSON; a defect.
    #[error("an audit record does not encode")]
    Encode(#[from] serde_json::Error),
}

/// Writes audit records of this broker's boot.
#[derive(Clone)]
pub struct Log {
    journal: Arc<Journal>,
    now_ms: TimeSource,
}

/// A record that is in the journal, and durable once `durable` says so.
pub struct Appended {
    /// Its id in the stream.
    pub id: String,
    ticket: Ticket,
}

impl Appended {
    /// Waits until the record and all before it are on disk.
    pub async fn durable(self) -> Result<(), Error> {
        Ok(self.ticket.durable().await?)
    }
}

impl Log {
    /// A log over this boot's journal; `now_ms` is cluster time.
    pub fn new(journal: Arc<Journal>, now_ms: TimeSource) -> Self {
        metrics::describe();
        Self { journal, now_ms }
    }

    /// Puts a record into the chain. It is durable only when [`Appended::durable`] says so.
    pub fn append(&self, record: &Record) -> Result<Appended, Error> {
        let appended = self.try_append(record);
        match &appended {
            Ok(_) => ::metrics::counter!(metrics::RECORDS, "kind" => record.kind()).increment(1),
            Err(error) => {
                tracing::warn!(code = "SE0201", %error, kind = record.kind(), "an audit record was not accepted");
            }
        }
        appended
    }

    /// Puts a record into the chain and waits until it is durable.
    pub async fn append_durable(&self, record: &Record) -> Result<(), Error> {
        self.append(record)?.durable().await
    }

    /// The journal itself, for readers.
    pub fn journal(&self) -> &Arc<Journal> {
        &self.journal
    }

    /// This boot's stream.
    pub fn stream(&self) -> StreamId {
        self.journal.stream()
    }

    fn try_append(&self, record: &Record) -> Result<Appended, Error> {
        let ticket = self.journal.append((self.now_ms)(), &serde_json::to_vec(record)?)?;
        Ok(Appended { id: format!("{}/{}", self.journal.stream(), ticket.seq), ticket })
    }
}
