//! Rows of the replicated state, as they are stored.
//!
//! Protobuf messages: a field's number is for ever. Ids bind, names are for people. Times are cluster time in
//! milliseconds since the Unix epoch.

mod admin;
mod cluster;
mod end;
mod person;
mod policy;
mod segment;

pub use admin::{AdminRole, Cursor, Receiver, Token};
pub use cluster::{Broker, BrokerRole, Client, ClientOutcomes, Cluster, Idempotency, KeptOutcome, Region};
pub use end::{Availability, Certificate, Connector, Device, EnrolKey, EnrolKind, Enrolment, Workload};
pub use person::{Directory, Group, Members, User};
pub use policy::{Policy, PolicyMode, Reference};
pub use segment::{ConnectorGroup, PortRange, Segment, SegmentGroup, Transport, Zone};

use crate::state::{IndexKey, Table};

/// A row of one of the state's tables.
pub trait Row: prost::Message + Default + Clone {
    /// The table it is stored in.
    const TABLE: Table;

    /// Its key in the table; sorts as the rows should.
    fn key(&self) -> Vec<u8>;

    /// What else it is found by.
    fn index(&self) -> Vec<IndexKey> {
        Vec::new()
    }

    /// [`Row::index`] of a row as it is stored.
    fn index_of(stored: &[u8]) -> Vec<IndexKey> {
        crate::state::decoded::<Self>(stored).index()
    }
}

macro_rules! by_id {
    ($row:ty, $table:expr, |$this:ident| $index:expr) => {
        impl Row for $row {
            const TABLE: Table = $table;

            fn key(&self) -> Vec<u8> {
                self.id.unwrap_or_default().key().to_vec()
            }

            fn index(&self) -> Vec<IndexKey> {
                let $this = self;
                $index
            }
        }

        impl $row {
            /// The row's id.
            pub fn id(&self) -> Id {
                self.id.unwrap_or_default()
            }
        }
    };
}

use by_id;
