//! This broker's part of the cluster as its data directory holds it, without starting it; and asking the others from there.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use prost::Message as _;
use selvedge_domain::rows::Row as _;
use selvedge_domain::state::Meta;
use selvedge_domain::{State, rows};
use selvedge_proto::peer as wire;
use selvedge_proto::peer::peer_client::PeerClient;
use selvedge_storage::inspect;
use tonic::Request;

use crate::clock::{Clock, SystemClock};
use crate::convert;
use crate::dial::{DialOverride, Dialer, Purpose};
use crate::error::Error;
use crate::published::Published;
use crate::transport::DialOnly;

/// How long another broker may take to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// What the state says of the cluster, as a data directory holds it.
#[derive(Clone)]
pub struct AtRest {
    /// Index of the last entry applied.
    pub applied: Option<u64>,
    /// Node ids of voters.
    pub voters: Vec<u64>,
    /// Node ids of learners.
    pub learners: Vec<u64>,
    /// Brokers, regions and the cluster's own row; no other row is in it.
    pub state: Arc<State>,
}

/// Reads the state of a data directory, whether its broker runs or not.
///
/// **Errors**: storage; [`Error::State`] when its rows cannot be read.
pub fn look(dir: &Path) -> Result<AtRest, Error> {
    let tables = [rows::Cluster::TABLE, rows::Region::TABLE, rows::Broker::TABLE].map(|table| table as u8);
    let found = inspect::state(dir, &tables)?;
    let meta = wire::StateMeta::decode(&*found.meta.unwrap_or_default());
    let meta = meta.map_err(|_| Error::State(convert::invalid("the stored meta of the state is none")))?;
    let domain = Meta::decode(&*meta.domain);
    let mut domain = domain.map_err(|_| Error::State(convert::invalid("the stored meta of the state is none")))?;
    // Of all rows, and these are few of them.
    domain.state_hash.clear();
    let state = State::load(domain, found.rows).map_err(|error| Error::State(io::Error::other(error)))?;
    let membership = convert::stored_membership_back(meta.membership.as_ref()).map_err(Error::State)?;
    let membership = membership.membership();
    Ok(AtRest {
        applied: meta.last_applied.as_ref().map(|id| id.index),
        voters: membership.voter_ids().collect(),
        learners: membership.learner_ids().collect(),
        state: Arc::new(state),
    })
}

/// What another broker answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answered {
    /// Its wall clock minus ours, milliseconds.
    pub offset_ms: i64,
    /// How long that took, milliseconds; the offset is known to half of it.
    pub round_trip_ms: u64,
}

/// Asks other brokers on their peer listeners, as this node would.
pub struct Peers {
    dialer: Dialer,
}

impl Peers {
    /// `seeds` are addresses of nodes that the state does not know yet.
    pub async fn new(
        cluster_id: &[u8; 16],
        node: u64,
        at_rest: Option<&AtRest>,
        tls: Arc<rustls::ClientConfig>,
        dial: Option<DialOverride>,
        seeds: &BTreeMap<u64, String>,
    ) -> Self {
        let (published, _nobody_enforces) = Published::new(SystemClock::shared(), 0);
        if let Some(at_rest) = at_rest {
            published.replace(at_rest.state.clone(), at_rest.applied).await;
        }
        let dialer = Dialer::new(cluster_id, node, published, Arc::new(DialOnly(tls)), dial);
        for (seed, address) in seeds {
            dialer.learn(*seed, address);
        }
        Self { dialer }
    }

    /// Whether a broker is reached with TLS, is who it should be, and takes this node's call; and its clock.
    ///
    /// **Errors** with what failed, causes included.
    pub async fn ask(&self, node: u64) -> Result<Answered, String> {
        // The first call waits for the connection to be there, which says nothing of clocks.
        self.clock(node).await?;
        self.clock(node).await
    }

    async fn clock(&self, node: u64) -> Result<Answered, String> {
        let mut client = PeerClient::new(self.dialer.channel(node, Purpose::Control));
        let (begun, wall_ms) = (Instant::now(), SystemClock.wall_ms());
        let mut request = Request::new(wire::ClockRequest {});
        request.set_timeout(ANSWER_TIMEOUT);
        let asked = tokio::time::timeout(ANSWER_TIMEOUT, client.clock(request)).await;
        let reply = asked.map_err(|_| "no answer in time".to_owned())?.map_err(|status| because(&status))?.into_inner();
        let round_trip_ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        let ours_ms = i128::from(wall_ms) + i128::from(round_trip_ms / 2);
        let offset_ms = i64::try_from(i128::from(reply.wall_ms) - ours_ms).unwrap_or(i64::MAX);
        Ok(Answered { offset_ms, round_trip_ms })
    }
}

/// What a call failed with; the innermost cause says most.
fn because(status: &tonic::Status) -> String {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = std::error::Error::source(status);
    let mut innermost = None;
    while let Some(error) = cause {
        innermost = Some(error.to_string());
        cause = error.source();
    }
    innermost.unwrap_or_else(|| status.message().to_owned())
}
