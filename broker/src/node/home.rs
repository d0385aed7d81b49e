use std::path::PathBuf;

use selvedge_domain::command::InitCluster;
use selvedge_domain::limits::{HOLD_MS_DEFAULT, LEASE_MS_DEFAULT};
use selvedge_domain::rows::BrokerRole;
use selvedge_proto::identity::{Anchors, Kind, SpiffeId};
use selvedge_proto::private_file;
use selvedge_proto::tls::{self, Identity};
use selvedge_storage::DataDir;
use serde::{Deserialize, Serialize};

use crate::config::{Config, Valid};
use crate::issuer::Issuer;

use super::Error;

/// What a broker knows of its cluster before it has read a log.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Home {
    pub version: u32,
    /// Trust anchors, with cluster id and trust domain.
    pub anchors: Anchors,
    /// Node id and peer address of brokers that were there when this one joined.
    pub seeds: Vec<Seed>,
    /// What this broker was made for, by name.
    #[serde(with = "role_names")]
    pub roles: Vec<BrokerRole>,
    /// This broker makes the cluster when it first starts.
    pub first: Option<First>,
}

/// Where another broker is.
#[derive(Clone, Serialize, Deserialize)]
pub struct Seed {
    /// Node id, decimal.
    #[serde(with = "decimal")]
    pub node: u64,
    /// `host:port` of its peer listener.
    pub peer: String,
}

/// What the first command of the cluster says.
#[derive(Serialize, Deserialize)]
pub(crate) struct First {
    lease_ms: u64,
    hold_ms: u64,
}

impl First {
    /// The first command.
    pub fn command(&self, anchors: &Anchors, owner_token: &str) -> InitCluster {
        InitCluster {
            cluster_id: anchors.cluster_id(),
            trust_domain: anchors.trust_domain().to_owned(),
            anchors: anchors.to_json().into_bytes(),
            owner_sha256: selvedge_proto::identity::sha256(owner_token.as_bytes()),
            knock_secret: random_bytes(),
            lease_ms: self.lease_ms,
            hold_ms: self.hold_ms,
        }
    }
}

const VERSION: u32 = 1;

impl Home {
    pub fn load(config: &Config) -> Result<Self, Error> {
        let path = path(config);
        let text = std::fs::read_to_string(&path).map_err(|source| {
            if source.kind() != std::io::ErrorKind::NotFound {
                Error::file(&path, source)
            } else if DataDir::is_unfinished(&config.data_dir) {
                selvedge_storage::Error::Unfinished { path: config.data_dir.clone() }.into()
            } else {
                Error::NotMember
            }
        })?;
        let home: Self =
            serde_json::from_str(&text).map_err(|error| Error::Damaged(path.clone(), error.to_string()))?;
        if home.version == VERSION { Ok(home) } else { Err(Error::Damaged(path, format!("version {}", home.version))) }
    }

    /// The home of a broker that has nobody beside it.
    pub fn of_the_only_broker(anchors: Anchors) -> Self {
        Self { version: VERSION, anchors, seeds: Vec::new(), roles: BrokerRole::ALL.into(), first: None }
    }

    pub fn store(&self, config: &Config) -> Result<(), Error> {
        let path = path(config);
        let text =
            serde_json::to_string_pretty(self).map_err(|error| Error::Damaged(path.clone(), error.to_string()))?;
        private_file::replace(&path, text.as_bytes()).map_err(|source| Error::file(&path, source))
    }
}

/// How a cluster is made.
#[derive(Clone, Debug)]
pub struct InitOptions {
    /// Trust domain of every id; never changes.
    pub trust_domain: String,
    /// Freshness lease, milliseconds.
    pub lease_ms: u64,
    /// Hold, milliseconds.
    pub hold_ms: u64,
}

impl InitOptions {
    /// The defaults of a new cluster.
    pub fn new(trust_domain: impl Into<String>) -> Self {
        Self { trust_domain: trust_domain.into(), lease_ms: LEASE_MS_DEFAULT, hold_ms: HOLD_MS_DEFAULT }
    }
}

/// What making a cluster leaves in the operator's hands.
pub struct Initialised {
    /// The root's key: to be kept away from the machines.
    pub root_key: crate::issuer::RootKeyPem,
    /// What clients pin, hexadecimal.
    pub pin: String,
    /// Cluster id, hexadecimal.
    pub cluster_id: String,
}

/// Makes data directory, issuer and this broker's identity. The cluster begins when the broker first starts.
///
/// **Errors** when the directory has been used before: nothing in it is changed.
pub fn init(config: &Valid, options: &InitOptions) -> Result<Initialised, Error> {
    if path(config).exists() {
        return Err(Error::AlreadyMember);
    }
    let dir = DataDir::open(&config.data_dir)?;
    make_node_dir(config)?;
    let cluster_id: [u8; 16] = random_bytes();
    let now_ms = (tls::system_time())();
    let (issuer, root_key) =
        Issuer::create(&config.issuer_dir(), &config.issuer_seal(), &options.trust_domain, cluster_id, now_ms)?;
    dir.join_cluster(u128::from_be_bytes(cluster_id))?;
    let (key, csr) = tls::new_key_and_csr()?;
    let issued = issuer.issue_broker(&dir.node_id().to_string(), std::slice::from_ref(&config.host), &csr, now_ms)?;
    Identity::from_pem(&format!("{}{}", issued.chain_pem, *key))?.save(&identity_path(config))?;
    let first = Some(First { lease_ms: options.lease_ms, hold_ms: options.hold_ms });
    let home = Home { first, ..Home::of_the_only_broker(issuer.anchors().clone()) };
    home.store(config)?;
    Ok(Initialised { root_key, pin: issuer.anchors().pin().to_string(), cluster_id: hex::encode(cluster_id) })
}

/// What a broker that joins asks for.
pub struct JoinRequest {
    /// Its node id.
    pub node: u64,
    /// Certificate signing request, DER. The key stays here.
    pub csr: Vec<u8>,
    key: zeroize::Zeroizing<String>,
}

/// What it is answered.
pub struct JoinReply {
    /// Its certificate chain, PEM.
    pub chain_pem: String,
    /// Trust anchors.
    pub anchors: Anchors,
    /// The issuer's keys, sealed under the join token; none when this broker is not to be an issuer.
    pub issuer_sealed: Option<Vec<u8>>,
    /// Brokers to join.
    pub seeds: Vec<Seed>,
    /// The roles that the join token gave it.
    pub roles: Vec<BrokerRole>,
}

/// The key under which the issuer travels to a broker that joins with this token.
pub fn join_seal_key(token: &str) -> [u8; 32] {
    selvedge_proto::identity::sha256(&[b"selvedge issuer seal".as_slice(), token.as_bytes()].concat())
}

/// Begins joining: makes the data directory and a key. A second try sends the same key.
pub fn join_request(config: &Valid) -> Result<JoinRequest, Error> {
    if path(config).exists() {
        return Err(Error::AlreadyMember);
    }
    let dir = DataDir::open(&config.data_dir)?;
    make_node_dir(config)?;
    let key_path = config.node_dir().join("joining.key");
    let key = match std::fs::read_to_string(&key_path) {
        Ok(key) => zeroize::Zeroizing::new(key),
        Err(_) => {
            let (key, _) = tls::new_key_and_csr()?;
            private_file::replace(&key_path, key.as_bytes()).map_err(|source| Error::file(&key_path, source))?;
            key
        }
    };
    Ok(JoinRequest { node: dir.node_id(), csr: tls::csr(&key)?, key })
}

/// Ends joining: keeps identity, anchors, and the issuer's keys under this broker's own seal.
pub fn join_complete(config: &Valid, request: &JoinRequest, reply: &JoinReply, token: &str) -> Result<(), Error> {
    let identity = Identity::from_pem(&format!("{}{}", reply.chain_pem, *request.key))?;
    let id = SpiffeId::new(reply.anchors.trust_domain(), Kind::Broker, &request.node.to_string())?;
    if identity.peer()?.id != id {
        return Err(Error::OtherIdentity(identity.peer()?.id.to_string()));
    }
    let dir = DataDir::open(&config.data_dir)?;
    dir.join_cluster(u128::from_be_bytes(reply.anchors.cluster_id()))?;
    if let Some(sealed) = &reply.issuer_sealed {
        match Issuer::from_sealed(sealed, &join_seal_key(token), &config.issuer_dir(), &config.issuer_seal()) {
            Ok(_) | Err(crate::issuer::Error::Exists(_)) => {}
            Err(error) => return Err(error.into()),
        }
    }
    identity.save(&identity_path(config))?;
    let home = Home {
        version: VERSION,
        anchors: reply.anchors.clone(),
        seeds: reply.seeds.clone(),
        roles: reply.roles.clone(),
        first: None,
    };
    home.store(config)?;
    let key_path = config.node_dir().join("joining.key");
    std::fs::remove_file(&key_path).map_err(|source| Error::file(&key_path, source))
}

/// The node id of this machine's broker; none before it belongs to a cluster.
pub fn member(config: &Valid) -> Result<Option<u64>, Error> {
    if !path(config).exists() {
        return Ok(None);
    }
    let peer = Identity::load(&identity_path(config))?.peer()?;
    Ok(selvedge_cluster::node_of(&peer))
}

pub(crate) fn identity_path(config: &Config) -> PathBuf {
    config.node_dir().join("identity.pem")
}

fn path(config: &Config) -> PathBuf {
    config.node_dir().join("cluster.json")
}

pub(super) fn make_node_dir(config: &Config) -> Result<(), Error> {
    use std::os::unix::fs::DirBuilderExt as _;
    let dir = config.node_dir();
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir).map_err(|source| Error::file(&dir, source))
}

/// Random bytes from the cryptographic provider.
pub(super) fn random_bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    aws_lc_rs::rand::fill(&mut bytes).expect("the provider's generator does not fail once it is seeded");
    bytes
}

/// A token for the first owner.
pub(super) fn new_owner_token() -> String {
    format!("svt_{}", base64::Engine::encode(&base64::prelude::BASE64_URL_SAFE_NO_PAD, random_bytes::<32>()))
}

/// Roles as one text with commas.
mod role_names {
    use selvedge_domain::rows::BrokerRole;
    use serde::{Deserialize as _, Deserializer, Serializer, de};

    pub fn serialize<S: Serializer>(roles: &[BrokerRole], serializer: S) -> Result<S::Ok, S::Error> {
        let names: Vec<_> = roles.iter().map(|role| role.name()).collect();
        serializer.serialize_str(&names.join(","))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<BrokerRole>, D::Error> {
        let text = String::deserialize(deserializer)?;
        BrokerRole::parse_list(&text).ok_or_else(|| de::Error::custom("not a list of roles"))
    }
}

/// Node ids as decimal strings: JSON numbers lose digits.
mod decimal {
    use serde::{Deserialize as _, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(number: &u64, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(number)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}
