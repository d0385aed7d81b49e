//! Enrolment: an end makes its key, shows a secret at the web listener, and is given a certificate.
//!
//! Invariants: the secret is sent only to a listener whose key the secret itself names; the key is on disk before the
//! request, so that a repeated enrolment asks for the same key and is answered the same.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use prost::Message as _;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use selvedge_proto::control::{Brokers, KnockKeys, SignedGrant};
use selvedge_proto::https;
use selvedge_proto::identity::{self, Anchors, Kind, Pin, SpiffeId};
use selvedge_proto::renewal::{self, KnownBrokers, Renewal, Renewed};
use selvedge_proto::tls::{self, Identity};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::state::{self, STATE_VERSION, SignedBrokers, State, identity_path, prepare_dir, write_private};
use crate::{clock, trust};

/// Longest text of a secret.
pub const SECRET_CHARS_MAX: usize = 256;

const HOLD_MS_DEFAULT: u64 = 30_000;
const PENDING_FILE: &str = "pending.pem";

/// Why an enrolment failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The text is not an enrolment secret.
    #[error("not an enrolment secret: {0}")]
    Secret(&'static str),
    /// Something else is enrolled there.
    #[error("`{dir}` holds the enrolled {kind} `{name}` already")]
    AlreadyEnrolled {
        /// The state directory.
        dir: String,
        /// What is enrolled there.
        kind: String,
        /// Its name.
        name: String,
    },
    /// The web listener could not be asked.
    #[error(transparent)]
    Web(#[from] https::Error),
    /// The cluster refused.
    #[error("enrolment refused ({status}): {detail}")]
    Refused {
        /// HTTP status.
        status: u16,
        /// Code of the refusal, when there is one.
        code: String,
        /// What the cluster said.
        detail: String,
    },
    /// The answer is not what it should be.
    #[error("the answer to the enrolment is malformed: {0}")]
    Answer(String),
    /// The answer does not verify.
    #[error("the answer to the enrolment does not verify: {0}")]
    Untrusted(#[from] trust::Error),
    /// The anchors that came back are not those that the secret names.
    #[error("the anchors that came back are not those that the secret names")]
    WrongAnchors,
    /// A certificate or key cannot be used.
    #[error("identity: {0}")]
    Identity(#[from] tls::Error),
    /// The state cannot be stored.
    #[error(transparent)]
    State(#[from] state::Error),
}

/// What is enrolled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EnrolKind {
    /// An app connector.
    Connector,
    /// A workload.
    Workload,
    /// A person's device.
    Device,
}

impl EnrolKind {
    /// The kind as it is written.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Connector => "connector",
            Self::Workload => "workload",
            Self::Device => "device",
        }
    }

    /// The kind of identity that it gets.
    pub const fn identity(self) -> Kind {
        match self {
            Self::Connector => Kind::Connector,
            Self::Workload => Kind::Workload,
            Self::Device => Kind::Client,
        }
    }
}

impl fmt::Display for EnrolKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for EnrolKind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        [Self::Connector, Self::Workload, Self::Device]
            .into_iter()
            .find(|kind| kind.as_str() == text)
            .ok_or_else(|| format!("`{text}` is not `connector`, `workload` or `device`"))
    }
}

/// An enrolment secret: `sv1.<pin>.<random>`, both base64url. Prints as `***`.
#[derive(Clone)]
pub struct Secret {
    text: Zeroizing<String>,
    pin: Pin,
}

impl Secret {
    /// Reads the text; white space around it is dropped.
    ///
    /// **Errors**: [`Error::Secret`].
    pub fn parse(text: &str) -> Result<Self, Error> {
        let text = text.trim();
        if text.len() > SECRET_CHARS_MAX {
            return Err(Error::Secret("it is too long"));
        }
        let rest = text.strip_prefix("sv1.").ok_or(Error::Secret("it does not begin with `sv1.`"))?;
        let (pin, random) = rest.split_once('.').ok_or(Error::Secret("it needs two parts after `sv1.`"))?;
        let part = |text: &str| URL_SAFE_NO_PAD.decode(text).ok().and_then(|bytes| <[u8; 32]>::try_from(bytes).ok());
        let pin = part(pin).ok_or(Error::Secret("its pin is not 32 bytes in base64url"))?;
        part(random).ok_or(Error::Secret("its last part is not 32 bytes in base64url"))?;
        Ok(Self { text: Zeroizing::new(text.to_owned()), pin: Pin::from(pin) })
    }

    /// The key by which the web listener is known.
    pub fn pin(&self) -> Pin {
        self.pin
    }

    /// The secret itself.
    pub fn text(&self) -> &str {
        &self.text
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// What to enrol, where.
#[derive(Clone)]
pub struct Options {
    /// `host:port` of a broker's web listener.
    pub web: String,
    /// The enrolment secret.
    pub secret: String,
    /// What is enrolled.
    pub kind: EnrolKind,
    /// Its name.
    pub name: String,
    /// Where its state goes.
    pub state_dir: PathBuf,
}

/// Enrols and stores what came back. Repeating it with the same secret answers what is stored already.
///
/// **Durability**: identity and state are synced before it returns.
pub async fn enrol(options: Options) -> Result<State, Error> {
    let Options { web, secret, kind, name, state_dir } = options;
    let secret = Secret::parse(&secret)?;
    let secret_sha256 = hex::encode(identity::sha256(secret.text().as_bytes()));
    prepare_dir(&state_dir)?;
    match State::load(&state_dir) {
        Ok(state) if state.secret_sha256 == secret_sha256 && state.kind == kind.as_str() => return Ok(state),
        Ok(state) => {
            let dir = state_dir.display().to_string();
            return Err(Error::AlreadyEnrolled { dir, kind: state.kind, name: state.name });
        }
        Err(state::Error::NotEnrolled(_)) => {}
        Err(error) => return Err(error.into()),
    }

    let key_pem = pending_key(&state_dir)?;
    let answer = exchange(&web, &secret, kind.as_str(), &name, &tls::csr(&key_pem)?, None).await?;
    let chain = verify(&answer, &secret, kind.identity())?;
    let key = PrivateKeyDer::from_pem_slice(key_pem.as_bytes()).map_err(|_| tls::Error::Pem("no private key"))?;
    Identity::new(chain, key)?.save(&identity_path(&state_dir))?;
    let state = State {
        version: STATE_VERSION,
        kind: kind.as_str().to_owned(),
        name,
        id: answer.id,
        spiffe: answer.spiffe,
        web,
        anchors: answer.anchors,
        knock_keys: answer.knock_keys,
        brokers: answer.brokers.unwrap_or_default(),
        grants: answer.grant.into_iter().collect(),
        hold_ms: answer.hold_ms.unwrap_or(HOLD_MS_DEFAULT),
        secret_sha256,
        stream: 0,
    };
    state.save(&state_dir)?;
    // Left behind it would only be a second copy of a key that is stored.
    let _ = fs::remove_file(state_dir.join(PENDING_FILE));
    Ok(state)
}

/// What a web listener answers to an enrolment.
#[derive(Clone, Debug, Deserialize)]
pub struct Answer {
    /// The cluster's id for what was enrolled.
    pub id: String,
    /// Its identity.
    pub spiffe: SpiffeId,
    /// Certificates in PEM, leaf first.
    pub chain: Vec<String>,
    /// What to trust.
    #[serde(deserialize_with = "anchors")]
    pub anchors: Anchors,
    /// The trust domain.
    pub trust_domain: String,
    /// The cluster's id, hex.
    pub cluster_id: String,
    /// A login grant, base64.
    #[serde(default)]
    pub grant: Option<String>,
    /// Knock keys, base64.
    #[serde(default)]
    pub knock_keys: Vec<String>,
    /// The list of brokers.
    #[serde(default)]
    pub brokers: Option<SignedBrokers>,
    /// How long sessions are held.
    #[serde(default)]
    pub hold_ms: Option<u64>,
    /// The issuer's bundle, sealed; for brokers.
    #[serde(default)]
    pub issuer_sealed: Option<String>,
    /// The cluster's members; for brokers.
    #[serde(default)]
    pub peers: Vec<serde_json::Value>,
    /// What it is for; for brokers.
    #[serde(default)]
    pub roles: Vec<String>,
}

/// Sends one enrolment request and reads the answer; verifies the listener, not the answer.
pub async fn exchange(
    web: &str,
    secret: &Secret,
    kind: &str,
    name: &str,
    csr_der: &[u8],
    node: Option<u64>,
) -> Result<Answer, Error> {
    let body = Zeroizing::new(
        serde_json::json!({
            "secret": secret.text(),
            "kind": kind,
            "name": name,
            "csr": STANDARD.encode(csr_der),
            "node": node.map(|node| node.to_string()),
        })
        .to_string(),
    );
    ask(web, secret.pin(), "/enrol/v1", &body).await
}

async fn ask<A: DeserializeOwned>(web: &str, pin: Pin, path: &str, body: &str) -> Result<A, Error> {
    let (status, bytes) = https::post(web, pin, &tls::system_time(), path, body).await?;
    if status != 200 && status != 201 {
        return Err(refusal(status, &bytes));
    }
    serde_json::from_slice(&bytes).map_err(|error| Error::Answer(error.to_string()))
}

/// Certifies a new key with the certificate of `old`, which may have ended a while ago, at the web listener at `web`.
///
/// **Errors**: when no listener of this cluster is there, it refuses, or its answer does not verify.
pub async fn renew(web: &str, anchors: &Anchors, old: &Identity) -> Result<Identity, Error> {
    let (key, csr) = tls::new_key_and_csr()?;
    let body = serde_json::to_string(&Renewal::new(old, csr)?).map_err(|error| Error::Answer(error.to_string()))?;
    let renewed: Renewed = ask(web, anchors.pin(), renewal::PATH, &body).await?;
    let new = Identity::from_pem(&format!("{}{}", renewed.chain_pem, *key))?;
    let id = old.peer().map_err(trust::Error::from)?.id;
    trust::verify_own(anchors, new.chain(), &id, clock::unix_ms())?;
    Ok(new)
}

/// Asks a web listener which brokers there are, with the key of the certificate.
///
/// **Errors**: as [`enrol`].
pub(crate) async fn brokers(web: &str, anchors: &Anchors, own: &Identity) -> Result<(Brokers, KnockKeys), Error> {
    let malformed = |error: &dyn std::fmt::Display| Error::Answer(error.to_string());
    let body = serde_json::to_string(&Renewal::new(own, Vec::new())?).map_err(|error| malformed(&error))?;
    let known: KnownBrokers = ask(web, anchors.pin(), renewal::BROKERS_PATH, &body).await?;
    let keys = known.knock_keys.iter().map(hex::decode).collect::<Result<_, _>>().map_err(|error| malformed(&error))?;
    let KnownBrokers { list, signature, signer, .. } = known;
    Ok((Brokers { list, signature, signer }, KnockKeys { keys }))
}

fn refusal(status: u16, bytes: &[u8]) -> Error {
    #[derive(Default, Deserialize)]
    #[serde(default)]
    struct Problem {
        code: String,
        title: String,
        detail: String,
    }
    let problem: Problem = serde_json::from_slice(bytes).unwrap_or_default();
    let detail = [problem.detail, problem.title].into_iter().find(|text| !text.is_empty());
    Error::Refused { status, code: problem.code, detail: detail.unwrap_or_else(|| "no reason given".to_owned()) }
}

/// The pin names the anchors, the chain ends at them, and the id is of the kind that was asked for.
fn verify(answer: &Answer, secret: &Secret, kind: Kind) -> Result<Vec<CertificateDer<'static>>, Error> {
    if answer.anchors.pin() != secret.pin() {
        return Err(Error::WrongAnchors);
    }
    if answer.spiffe.kind() != kind || answer.spiffe.trust_domain() != answer.anchors.trust_domain() {
        return Err(Error::Answer(format!("`{}` is not a {kind} of this cluster", answer.spiffe)));
    }
    let mut chain = Vec::new();
    for pem in &answer.chain {
        for certificate in CertificateDer::pem_slice_iter(pem.as_bytes()) {
            chain.push(certificate.map_err(|_| Error::Answer("a certificate is not PEM".to_owned()))?);
        }
    }
    let now_ms = clock::unix_ms();
    trust::verify_own(&answer.anchors, &chain, &answer.spiffe, now_ms)?;
    let brokers = answer.brokers.as_ref().ok_or_else(|| Error::Answer("no list of brokers".to_owned()))?;
    // The listener proved the pinned key, so a list without a signature comes from the cluster too.
    trust::verify_brokers(&answer.anchors, &decode_brokers(brokers)?, true, now_ms)?;
    if answer.knock_keys.is_empty() {
        return Err(Error::Answer("no knock keys".to_owned()));
    }
    if let Some(grant) = &answer.grant {
        let bytes = STANDARD.decode(grant).map_err(|_| Error::Answer("the grant is not base64".to_owned()))?;
        SignedGrant::decode(&bytes[..]).map_err(|_| Error::Answer("the grant does not decode".to_owned()))?;
    }
    Ok(chain)
}

/// The stored text of a list as the message that carries it.
pub(crate) fn decode_brokers(signed: &SignedBrokers) -> Result<Brokers, Error> {
    let decode =
        |text: &str| STANDARD.decode(text).map_err(|_| Error::Answer("the list of brokers is not base64".to_owned()));
    Ok(Brokers { list: decode(&signed.list)?, signature: decode(&signed.signature)?, signer: decode(&signed.signer)? })
}

/// The key of an enrolment that was begun, or a new one, stored before it is used.
fn pending_key(dir: &Path) -> Result<Zeroizing<String>, Error> {
    let path = dir.join(PENDING_FILE);
    match fs::read_to_string(&path) {
        Ok(key) => Ok(Zeroizing::new(key)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let (key, _) = tls::new_key_and_csr()?;
            write_private(&path, key.as_bytes())?;
            Ok(key)
        }
        Err(source) => Err(state::Error::File { path: path.display().to_string(), source }.into()),
    }
}

/// The anchors as a JSON object, or as a string that holds it.
fn anchors<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Anchors, D::Error> {
    use serde::de::Error as _;
    match serde_json::Value::deserialize(deserializer)? {
        serde_json::Value::String(text) => Anchors::from_json(&text).map_err(D::Error::custom),
        value => serde_json::from_value(value).map_err(D::Error::custom),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret(pin: &[u8], random: &[u8]) -> String {
        format!("sv1.{}.{}", URL_SAFE_NO_PAD.encode(pin), URL_SAFE_NO_PAD.encode(random))
    }

    #[test]
    fn a_secret_names_the_key_to_expect_and_prints_nothing() {
        let text = secret(&[7; 32], &[9; 32]);
        let parsed = Secret::parse(&format!(" {text}\n")).unwrap();
        assert_eq!(parsed.pin().as_bytes(), &[7; 32]);
        assert_eq!(parsed.text(), text);
        assert_eq!(format!("{parsed:?}"), "***");
    }

    #[test]
    fn other_texts_are_no_secrets() {
        let long = format!("sv1.{}", "A".repeat(10_000));
        for text in [
            "",
            "sv1",
            "sv1.",
            "sv1..",
            "sv2.AAAA.AAAA",
            &secret(&[7; 31], &[9; 32]),
            &secret(&[7; 32], &[9; 33]),
            &format!("{}.x", secret(&[7; 32], &[9; 32])),
            &format!("{}=", secret(&[7; 32], &[9; 32])),
            "sv1.ü.ü",
            &long,
        ] {
            assert!(matches!(Secret::parse(text), Err(Error::Secret(_))), "{text}");
        }
    }

    #[test]
    fn a_repeated_enrolment_uses_the_same_key() {
        let temp = tempfile::tempdir().unwrap();
        let first = pending_key(temp.path()).unwrap();
        assert_eq!(*first, *pending_key(temp.path()).unwrap());
    }

    #[test]
    fn a_refusal_says_what_the_cluster_said() {
        let error = refusal(403, br#"{"code":"SE0042","title":"t","detail":"the key is used up"}"#);
        assert_eq!(error.to_string(), "enrolment refused (403): the key is used up");
        assert_eq!(refusal(500, b"\xff").to_string(), "enrolment refused (500): no reason given");
    }
}
