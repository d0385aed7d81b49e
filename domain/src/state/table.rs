use std::sync::Arc;

use crate::id::Id;
use crate::rows::{self, Row};

macro_rules! tables {
    ($($(#[$doc:meta])* $name:ident = $number:literal: $row:ty,)*) => {
        /// Tables of the state. The number is stored: it is never reused.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u8)]
        pub enum Table {
            $($(#[$doc])* $name = $number,)*
        }

        impl Table {
            /// All tables, by number.
            pub const ALL: [Self; Self::COUNT] = [$(Self::$name,)*];
            /// How many there are; numbers run from 0.
            pub const COUNT: usize = [$($number,)*].len();

            /// The table with this number.
            pub fn from_number(number: u8) -> Option<Self> {
                match number {
                    $($number => Some(Self::$name),)*
                    _ => None,
                }
            }

            /// Its name, for people and scripts.
            pub fn name(self) -> String {
                let mut name = String::new();
                for c in format!("{self:?}").chars() {
                    if c.is_ascii_uppercase() && !name.is_empty() {
                        name.push('_');
                    }
                    name.push(c.to_ascii_lowercase());
                }
                name
            }

            /// What else a stored row is found by; also checks that it decodes.
            pub(crate) fn index_of(self, value: &Arc<[u8]>) -> Result<Vec<IndexKey>, prost::DecodeError> {
                use prost::Message as _;
                match self {
                    $(Self::$name => <$row>::decode(&value[..]).map(|row| row.index()),)*
                }
            }
        }
    };
}

tables! {
    /// The cluster.
    Cluster = 0: rows::Cluster,
    /// Brokers.
    Broker = 1: rows::Broker,
    /// Regions.
    Region = 2: rows::Region,
    /// Zones.
    Zone = 3: rows::Zone,
    /// Connector groups.
    ConnectorGroup = 4: rows::ConnectorGroup,
    /// Segment groups.
    SegmentGroup = 5: rows::SegmentGroup,
    /// Segments.
    Segment = 6: rows::Segment,
    /// Policies.
    Policy = 7: rows::Policy,
    /// Log receivers.
    Receiver = 8: rows::Receiver,
    /// Tokens.
    Token = 9: rows::Token,
    /// Directories.
    Directory = 10: rows::Directory,
    /// Users.
    User = 11: rows::User,
    /// Groups.
    Group = 12: rows::Group,
    /// Members of groups, in chunks.
    Members = 13: rows::Members,
    /// Enrolment secrets.
    EnrolKey = 14: rows::EnrolKey,
    /// Enrolments.
    Enrolment = 15: rows::Enrolment,
    /// Devices.
    Device = 16: rows::Device,
    /// Workloads.
    Workload = 17: rows::Workload,
    /// Connectors.
    Connector = 18: rows::Connector,
    /// Certificates.
    Certificate = 19: rows::Certificate,
    /// Availability.
    Availability = 20: rows::Availability,
    /// Proposing clients.
    Client = 21: rows::Client,
    /// Outcomes by idempotency key.
    Idempotency = 22: rows::Idempotency,
    /// Export cursors.
    Cursor = 23: rows::Cursor,
    /// Outcomes of proposing clients' requests.
    ClientOutcomes = 24: rows::ClientOutcomes,
}

/// What a row is found by besides its key; unique within its table.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum IndexKey {
    /// A name without regard to case, within a scope (a directory, or nothing).
    Name(Id, String),
    /// SHA-256 of a secret.
    Secret(Vec<u8>),
    /// A dense number.
    Number(u32),
    /// An id that a directory gave.
    External(Id, String),
}

impl IndexKey {
    /// A name that is unique in the cluster.
    pub fn name(name: &str) -> Self {
        Self::scoped(Id::default(), name)
    }

    /// A name that is unique in its scope.
    pub fn scoped(scope: Id, name: &str) -> Self {
        // Most names are ASCII, for which this is the same and takes less.
        Self::Name(scope, if name.is_ascii() { name.to_ascii_lowercase() } else { name.to_lowercase() })
    }

    /// A secret by its hash.
    pub fn secret(sha256: &[u8; 32]) -> Self {
        Self::Secret(sha256.to_vec())
    }
}
