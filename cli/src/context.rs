//! Which cluster the administrator's commands speak to: endpoints, the pin of its issuer, a token.
//!
//! Kept in `contexts.json` (mode 0600) under `$SELVEDGE_HOME`, else `~/.config/selvedge`.

use std::collections::BTreeMap;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::PathBuf;

use anyhow::{Context as _, bail};
use selvedge_proto::identity::Pin;
use selvedge_proto::private_file;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::args::Global;

const FILE: &str = "contexts.json";
const VERSION: u32 = 1;

/// All contexts.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Contexts {
    version: u32,
    /// The one that is used when none is named.
    pub current: Option<String>,
    /// By name.
    pub contexts: BTreeMap<String, Context>,
}

/// One cluster.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Context {
    /// `https://host:port` of web listeners, tried in order.
    pub endpoints: Vec<String>,
    /// Key of the cluster's issuer.
    pub pin: Pin,
    /// The administrator's token.
    pub token: Token,
}

/// A secret that is not shown by accident.
#[derive(Clone)]
pub struct Token(Zeroizing<String>);

impl Token {
    /// Takes a token.
    pub fn new(text: impl Into<String>) -> Self {
        Self(Zeroizing::new(text.into()))
    }

    /// The token itself.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl Serialize for Token {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for Token {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer).map(Self::new)
    }
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("***")
    }
}

/// Where this user's settings are.
pub fn home() -> anyhow::Result<PathBuf> {
    if let Some(home) = std::env::var_os("SELVEDGE_HOME").filter(|home| !home.is_empty()) {
        return Ok(home.into());
    }
    if let Some(config) = std::env::var_os("XDG_CONFIG_HOME").filter(|config| !config.is_empty()) {
        return Ok(PathBuf::from(config).join("selvedge"));
    }
    let home = std::env::var_os("HOME").context("neither SELVEDGE_HOME nor HOME is set")?;
    Ok(PathBuf::from(home).join(".config/selvedge"))
}

impl Contexts {
    /// What is stored; nothing when the file is not there.
    pub fn load() -> anyhow::Result<Self> {
        let path = home()?.join(FILE);
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => Zeroizing::new(text),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Ok(Self { version: VERSION, current: None, contexts: BTreeMap::new() });
            }
            Err(error) => return Err(error).with_context(|| format!("cannot read `{}`", path.display())),
        };
        let mode = std::fs::metadata(&path)?.permissions().mode();
        if mode & 0o077 != 0 {
            bail!("`{}` can be read by others (mode {:o}); make it 0600", path.display(), mode & 0o777);
        }
        let contexts: Self = serde_json::from_str(&text).with_context(|| format!("`{}` is damaged", path.display()))?;
        if contexts.version != VERSION {
            bail!("`{}` has version {}, which this binary does not know", path.display(), contexts.version);
        }
        Ok(contexts)
    }

    /// Stores them, all or nothing.
    pub fn store(&self) -> anyhow::Result<()> {
        let dir = home()?;
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&dir)
            .with_context(|| format!("cannot make `{}`", dir.display()))?;
        let text = Zeroizing::new(serde_json::to_string_pretty(self)?);
        let path = dir.join(FILE);
        private_file::replace(&path, text.as_bytes()).with_context(|| format!("cannot write `{}`", path.display()))
    }

    /// The context to use: flags and environment over what is stored.
    pub fn resolve(global: &Global) -> anyhow::Result<Context> {
        let stored = Self::load()?;
        let name = global.context.as_ref().or(stored.current.as_ref());
        let base = match name {
            Some(name) => Some(stored.contexts.get(name).with_context(|| format!("there is no context `{name}`"))?),
            None => None,
        };
        let endpoints = match (&global.endpoint[..], base) {
            ([], Some(base)) => base.endpoints.clone(),
            (given, _) => given.to_vec(),
        };
        let token = global.token.as_deref().map(Token::new).or_else(|| base.map(|base| base.token.clone()));
        let pin = global.pin.or_else(|| base.map(|base| base.pin));
        match (endpoints.is_empty(), pin, token) {
            (false, Some(pin), Some(token)) => Ok(Context { endpoints, pin, token }),
            _ => bail!(
                "no cluster is chosen: `selvedge context add NAME --endpoint https://HOST:PORT --pin PIN --token TOKEN`, \
                 or set SELVEDGE_ENDPOINT, SELVEDGE_PIN and SELVEDGE_TOKEN"
            ),
        }
    }
}
