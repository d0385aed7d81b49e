//! Three etcd servers with mutual TLS on client and peer ports, and a client of their key-value service.

#[allow(clippy::all, clippy::pedantic, missing_docs)]
mod wire {
    tonic::include_proto!("etcdserverpb");
}

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose,
};
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::PrivateKeyDer;

use crate::grpc::Endpoint;
use crate::world::{free_ports, text};

const NODES: usize = 3;
/// Without compaction the history of a whole run stays: more than the default quota may hold.
const QUOTA_BYTES: u64 = 8 << 30;

/// The servers, on ports of this machine; they end with the value.
pub struct Etcd {
    processes: Vec<Child>,
    clients: Vec<SocketAddr>,
    tls: Arc<ClientConfig>,
    pub version: String,
    _dir: tempfile::TempDir,
}

impl Etcd {
    pub fn start() -> anyhow::Result<Self> {
        let bin = unpacked()?;
        let version = Command::new(&bin).arg("--version").output()?.stdout;
        let version = String::from_utf8_lossy(&version).lines().take(3).collect::<Vec<_>>().join(", ");
        let dir = tempfile::tempdir()?;
        let tls = certificates(dir.path())?;
        let clients: [SocketAddr; NODES] = free_ports();
        let peers: [SocketAddr; NODES] = free_ports();
        let cluster: Vec<String> =
            peers.iter().enumerate().map(|(node, address)| format!("e{node}=https://{address}")).collect();
        let mut etcd = Self { processes: Vec::new(), clients: clients.to_vec(), tls, version, _dir: dir };
        let path = |name: &str| etcd._dir.path().join(name);
        let (ca, certificate, key) = (path("ca.pem"), path("node.pem"), path("node.key"));
        for (node, (client, peer)) in clients.iter().zip(&peers).enumerate() {
            let log = std::fs::File::create(etcd._dir.path().join(format!("e{node}.log")))?;
            let (client, peer) = (format!("https://{client}"), format!("https://{peer}"));
            let mut command = Command::new(&bin);
            command
                .args(["--name", &format!("e{node}")])
                .args(["--data-dir", text(&etcd._dir.path().join(format!("e{node}")))])
                .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
                .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
                .args(["--initial-cluster", &cluster.join(","), "--initial-cluster-state", "new"])
                .args(["--client-cert-auth", "--trusted-ca-file", text(&ca)])
                .args(["--cert-file", text(&certificate), "--key-file", text(&key)])
                .args(["--peer-client-cert-auth", "--peer-trusted-ca-file", text(&ca)])
                .args(["--peer-cert-file", text(&certificate), "--peer-key-file", text(&key)])
                .args(["--quota-backend-bytes", &QUOTA_BYTES.to_string(), "--logger", "zap", "--log-level", "warn"]);
            let process = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn()?;
            etcd.processes.push(process);
        }
        Ok(etcd)
    }

    pub fn pids(&self) -> Vec<u32> {
        self.processes.iter().map(Child::id).collect()
    }

    /// A client with one connection to each server.
    pub fn client(&self) -> anyhow::Result<Client> {
        let endpoints = self.clients.iter().map(|address| Endpoint::new(*address, &self.tls, &[]));
        Ok(Client { endpoints: endpoints.collect::<anyhow::Result<_>>()? })
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        for process in &mut self.processes {
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

/// Spreads its calls over the servers; one that does not lead passes a write on by itself.
pub struct Client {
    endpoints: Vec<Endpoint>,
}

impl Client {
    pub async fn put(&self, endpoint: usize, key: Vec<u8>, value: Vec<u8>) -> anyhow::Result<()> {
        let put = wire::PutRequest { key, value };
        self.at(endpoint).call::<_, wire::PutResponse>("/etcdserverpb.KV/Put", &put).await.map(drop)
    }

    /// A linearizable read; answers the value.
    pub async fn read(&self, endpoint: usize, key: Vec<u8>) -> anyhow::Result<Vec<u8>> {
        let range = wire::RangeRequest { key, serializable: false };
        let mut answer: wire::RangeResponse = self.at(endpoint).call("/etcdserverpb.KV/Range", &range).await?;
        answer.kvs.pop().map(|pair| pair.value).context("the key is not there")
    }

    /// Waits until every server takes writes.
    pub async fn ready(&self) -> anyhow::Result<()> {
        let all = async {
            for endpoint in 0..self.endpoints.len() {
                while self.put(endpoint, b"ready".to_vec(), Vec::new()).await.is_err() {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(60), all).await.context("etcd does not take writes")
    }

    fn at(&self, endpoint: usize) -> &Endpoint {
        &self.endpoints[endpoint % self.endpoints.len()]
    }
}

fn unpacked() -> anyhow::Result<PathBuf> {
    let tool = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/tool")).arg("etcd").output()?;
    ensure!(tool.status.success(), "etcd cannot be had: {}", String::from_utf8_lossy(&tool.stderr));
    Ok(PathBuf::from(String::from_utf8(tool.stdout)?.trim().lines().last().context("no path")?))
}

/// An authority and one certificate that every server and the client show; answers what the client dials with.
fn certificates(dir: &Path) -> anyhow::Result<Arc<ClientConfig>> {
    let mut authority = CertificateParams::default();
    authority.distinguished_name.push(DnType::CommonName, "bench");
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    authority.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
    let authority = CertifiedIssuer::self_signed(authority, KeyPair::generate()?)?;
    let key = KeyPair::generate()?;
    let mut leaf = CertificateParams::new(vec!["127.0.0.1".to_owned(), "localhost".to_owned()])?;
    leaf.distinguished_name.push(DnType::CommonName, "node");
    leaf.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    let leaf = leaf.signed_by(&key, &authority)?;
    std::fs::write(dir.join("ca.pem"), authority.pem())?;
    std::fs::write(dir.join("node.pem"), leaf.pem())?;
    std::fs::write(dir.join("node.key"), key.serialize_pem())?;
    let mut roots = RootCertStore::empty();
    roots.add(authority.der().clone())?;
    let key = PrivateKeyDer::try_from(key.serialize_der()).map_err(anyhow::Error::msg)?;
    let mut tls = ClientConfig::builder_with_provider(selvedge_proto::tls::provider().clone())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots)
        .with_client_auth_cert(vec![leaf.der().clone()], key)?;
    tls.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Arc::new(tls))
}
