//! What a broker is started with.

use std::collections::BTreeMap;
use std::sync::Arc;

use openraft::SnapshotPolicy;
use selvedge_storage::DataDir;
use selvedge_storage::room::BALLAST_BYTES;
use serde::{Deserialize, Serialize};
use tonic::service::Routes;

use crate::blocking::Blocking;
use crate::clock::Clock;
use crate::dial::DialOverride;
use crate::enforce::Enforcer;
use crate::transport::Transport;

/// How far apart the brokers are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Preset {
    /// In one region.
    Lan,
    /// Between regions, up to 150 ms of round trip.
    #[default]
    Wan,
    /// Tests and demonstrations, on machines that are slow at times.
    Test,
}

impl Preset {
    /// Between heartbeats, milliseconds. The consensus library gives a heartbeat up after one interval, so this must
    /// lie above the round trip to a majority: otherwise no read is ever confirmed and no lease renewed.
    pub fn heartbeat_ms(self) -> u64 {
        match self {
            Self::Lan => 50,
            Self::Wan => 250,
            Self::Test => 200,
        }
    }

    /// Shortest and longest time without a leader until an election, milliseconds.
    pub fn election_ms(self) -> (u64, u64) {
        match self {
            Self::Lan => (150, 300),
            Self::Wan => (600, 900),
            Self::Test => (500, 1_000),
        }
    }

    /// Bytes of ballast on each database disk.
    pub(crate) fn ballast_bytes(self) -> u64 {
        match self {
            Self::Lan | Self::Wan => BALLAST_BYTES,
            // Many brokers on one small disk.
            Self::Test => 1 << 20,
        }
    }

    pub(crate) fn raft(self, cluster: &str) -> openraft::Config {
        let (election_timeout_min, election_timeout_max) = self.election_ms();
        openraft::Config {
            cluster_name: cluster.to_owned(),
            heartbeat_interval: self.heartbeat_ms(),
            election_timeout_min,
            election_timeout_max,
            install_snapshot_timeout: 10 * 60_000,
            max_payload_entries: 256,
            snapshot_policy: SnapshotPolicy::Never,
            max_in_snapshot_log_to_keep: u64::MAX,
            quorum_loss_probe_interval: Some(2 * election_timeout_max),
            enable_pre_vote: Some(true),
            enable_leader_restore: Some(false),
            ..openraft::Config::default()
        }
    }
}

/// When the log is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogLimits {
    /// A snapshot is made when the log has grown by so many bytes.
    pub snapshot_bytes: u64,
    /// Entries that are kept behind the last snapshot, for followers that are a little behind.
    pub keep_entries: u64,
    /// Unless that many entries are more bytes than these: then fewer are kept.
    pub keep_bytes: u64,
}

impl Default for LogLimits {
    fn default() -> Self {
        Self { snapshot_bytes: 256 << 20, keep_entries: 100_000, keep_bytes: 256 << 20 }
    }
}

/// What a broker is started with.
pub struct Options {
    /// The data directory; says the node id and the boot, and is kept locked.
    pub dir: Arc<DataDir>,
    /// The cluster.
    pub cluster_id: [u8; 16],
    /// How far apart the brokers are.
    pub preset: Preset,
    /// How brokers reach each other: [`crate::Tls`].
    pub transport: Arc<dyn Transport>,
    /// The clocks.
    pub clock: Arc<dyn Clock>,
    /// What election timeouts are drawn from; the system's randomness when there is none.
    pub seed: Option<u64>,
    /// How work that blocks is run: [`Blocking::Threads`].
    pub blocking: Blocking,
    /// Judges again what a change touches.
    pub enforcer: Arc<dyn Enforcer>,
    /// Addresses of brokers that the state does not know yet.
    pub seeds: BTreeMap<u64, String>,
    /// Dials another address than the advertised one, for links that pass through a proxy.
    pub dial: Option<DialOverride>,
    /// Further services of the peer listener; [`crate::Caller::of`] says who calls.
    pub services: Option<Routes>,
    /// When the log is cut.
    pub log_limits: LogLimits,
    /// The runtime that Raft, its network and the lease run on; the caller's when there is none.
    pub runtime: Option<tokio::runtime::Handle>,
}
