//! A data directory of the next epoch: from a snapshot, or from what is left of the brokers of a cluster.
//!
//! **Invariant:** everything is read and checked before anything is written, and nothing is written but the new
//! directory, which no broker opens before it is whole.

mod revocations;

use std::path::{Path, PathBuf};

use selvedge_cluster::restore::{Begun, Source, Survivor, begin};
use selvedge_domain::command::PutBroker;
use selvedge_domain::decide::{BeginEpoch, Beyond};
use selvedge_domain::rows::BrokerRole;
use selvedge_proto::identity;
use selvedge_proto::tls::{self, Identity};
use selvedge_storage::DataDir;
use selvedge_storage::audit::{self, Journal, StreamId};

use super::Error;
use super::home::{Home, identity_path, make_node_dir, new_owner_token, random_bytes};
use crate::audit::{AdminChange, Record, clipped};
use crate::config::{SealConfig, Valid};
use crate::issuer::{Issuer, Seal};

/// What a new epoch begins from.
#[derive(Clone, Debug)]
pub enum From {
    /// A snapshot that was saved.
    Snapshot(PathBuf),
    /// Data directories of brokers that are stopped.
    Survivors(Vec<PathBuf>),
}

/// How a new epoch is begun.
#[derive(Clone, Debug)]
pub struct Options {
    /// The state.
    pub from: From,
    /// A data directory, or a copy of one, with the sealed keys of an issuer; one of the survivors when none.
    pub issuer: Option<PathBuf>,
    /// What may know of revocations after that state: data directories, and files of events or audit records.
    pub revocations: Vec<PathBuf>,
}

/// What was begun.
pub struct Restored {
    /// Where the log stood and stands, and the new node.
    pub begun: Begun,
    /// Cluster id, hexadecimal.
    pub cluster_id: String,
    /// What clients pin, hexadecimal.
    pub pin: String,
    /// The token of the new epoch's first owner.
    pub owner_token: zeroize::Zeroizing<String>,
    /// Who is in the state is held until somebody vouches for them.
    pub holds: bool,
    /// The data directories that were looked at.
    pub survivors: Vec<Survivor>,
    /// What was known of revocations after the state.
    pub beyond: Beyond,
}

/// Makes the data directory of the next epoch, with this machine's broker as its one voter.
///
/// **Durability**: when it returns. One that was cut short is begun anew by the next.
/// **Errors**: what cannot be used, and then nothing was written.
pub fn restore(config: &Valid, options: &Options) -> Result<Restored, Error> {
    let (source, survivors) = match &options.from {
        From::Snapshot(path) => (Source::snapshot(path)?, Vec::new()),
        From::Survivors(paths) => Source::survivors(paths)?,
    };
    let issuer = open_issuer(config, options, &survivors)?;
    let anchors = issuer.anchors().clone();
    let cluster_id = source.cluster_id();
    if anchors.cluster_id() != cluster_id {
        return Err(Error::OtherIssuer(hex::encode(anchors.cluster_id()), hex::encode(cluster_id)));
    }
    let mut beyond = Beyond::default();
    for path in &options.revocations {
        revocations::merge(path, source.state(), &mut beyond)?;
    }
    let holds = !source.is_whole();
    let now_ms = (tls::system_time())();
    let owner_token = zeroize::Zeroizing::new(new_owner_token());

    let dir = DataDir::make(&config.data_dir)?;
    make_node_dir(config)?;
    let command = BeginEpoch {
        cluster_id,
        epoch: next_epoch(source.state().position().epoch, now_ms),
        broker: description(config, dir.node_id()),
        owner_sha256: identity::sha256(owner_token.as_bytes()),
        holds,
        beyond: beyond.clone(),
    };
    let begun = begin(&dir, source, &command, now_ms)?;
    let key = random_bytes();
    let issuer = Issuer::from_sealed(&issuer.seal_for(&key)?, &key, &config.issuer_dir(), &config.issuer_seal())?;
    let (key, csr) = tls::new_key_and_csr()?;
    let issued = issuer.issue_broker(&dir.node_id().to_string(), std::slice::from_ref(&config.host), &csr, now_ms)?;
    Identity::from_pem(&format!("{}{}", issued.chain_pem, *key))?.save(&identity_path(config))?;
    record(&dir, options, &begun, now_ms)?;
    Home::of_the_only_broker(anchors.clone()).store(config)?;
    dir.finish()?;
    Ok(Restored {
        begun,
        cluster_id: hex::encode(cluster_id),
        pin: anchors.pin().to_string(),
        owner_token,
        holds,
        survivors,
        beyond,
    })
}

/// Higher than the state's, and than one that was begun from the same state before and given up: what that gave out must
/// not count in this one. Hence by the clock.
fn next_epoch(last: u32, now_ms: u64) -> u32 {
    last.saturating_add(1).max(u32::try_from(now_ms / 1_000).unwrap_or(u32::MAX))
}

/// The first record of the epoch's first broker.
fn record(dir: &DataDir, options: &Options, begun: &Begun, now_ms: u64) -> Result<(), Error> {
    let (action, from) = match &options.from {
        From::Snapshot(path) => ("cluster.restore", path.display().to_string()),
        From::Survivors(paths) => {
            let paths: Vec<_> = paths.iter().map(|path| path.display().to_string()).collect();
            ("cluster.recover", paths.join(" "))
        }
    };
    let record = Record::AdminChange(AdminChange {
        actor: "bootstrap".to_owned(),
        actor_name: String::new(),
        action: action.to_owned(),
        target: format!("epoch/{}", begun.position.epoch),
        outcome: "done".to_owned(),
        position: Some(begun.position),
        source: clipped(&from),
    });
    let path = dir.audit_path();
    let body = serde_json::to_vec(&record).map_err(|error| Error::Damaged(path.clone(), error.to_string()))?;
    let stream = StreamId { broker: dir.node_id(), boot: dir.boot() };
    Ok(Journal::open(&path, stream, audit::Options::default())?.append(now_ms, &body)?.wait()?)
}

/// The sealed issuer of the earlier epoch.
fn open_issuer(config: &Valid, options: &Options, survivors: &[Survivor]) -> Result<Issuer, Error> {
    let has_one = |path: &&PathBuf| path.join("issuer").join("issuer.sealed").exists();
    let of_survivor = || survivors.iter().map(|survivor| &survivor.path).find(has_one);
    let path = options.issuer.as_ref().or_else(of_survivor).ok_or(Error::NoIssuer)?;
    Ok(Issuer::open(&path.join("issuer"), &seal_of(config, path))?)
}

/// The seal of the issuer in a data directory that is sealed as this broker's configuration says.
fn seal_of(config: &Valid, data_dir: &Path) -> Seal {
    match &config.seal {
        SealConfig::Local => Seal::File(data_dir.join("node").join("seal.key")),
        SealConfig::File(_) | SealConfig::Env(_) => config.issuer_seal(),
    }
}

fn description(config: &Valid, node: u64) -> PutBroker {
    let roles = BrokerRole::ALL.iter().map(|role| *role as i32).collect();
    super::described(config, node, roles)
}
