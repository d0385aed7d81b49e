//! Credentials: secrets that a caller shows, that the log keeps as hashes only, and whom they stand for.
//!
//! **Invariant:** a secret is never in a command, an event or a row; it travels beside the command, from the broker that
//! was asked to the leader.

use sha2::{Digest as _, Sha256};

use crate::command::Actor;
use crate::rows::{Directory, EnrolKey, Token};
use crate::state::{IndexKey, State};

/// A secret that a caller showed. Prints as `***`.
#[derive(Clone, PartialEq, Eq)]
pub struct Credential(String);

impl Credential {
    /// A secret's whole text.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The text, for the wire only.
    pub fn reveal(&self) -> &str {
        &self.0
    }

    /// SHA-256 of the text: what the log keeps.
    pub fn sha256(&self) -> [u8; 32] {
        Sha256::digest(self.0.as_bytes()).into()
    }

    /// Whom it stands for in this state: an administrator's token that was not revoked, a directory, or an enrolment
    /// secret (whether that is still good is decided with its use).
    pub fn actor(&self, state: &State) -> Option<Actor> {
        let hash = self.sha256();
        if let Some(token) = state.find::<Token>(IndexKey::secret(&hash)).filter(|token| !token.revoked) {
            return Some(Actor::token(token.id(), token.generation));
        }
        if let Some(directory) = state.find::<Directory>(IndexKey::secret(&hash)) {
            return Some(Actor::directory(directory.id(), directory.generation));
        }
        state.find::<EnrolKey>(IndexKey::secret(&hash)).map(|key| Actor::enrolment(key.id()))
    }
}

impl std::fmt::Debug for Credential {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("***")
    }
}

/// Who asks for a change, with what the leader needs to believe it.
#[derive(Clone, Debug)]
pub struct Asker {
    /// As the log will name them.
    pub actor: Actor,
    /// What they showed. None for brokers and at the first start, which no other broker may propose.
    pub credential: Option<Credential>,
}

impl Asker {
    /// This broker, for itself.
    pub const BROKER: Self = Self { actor: Actor::BROKER, credential: None };
    /// Someone on the machine itself, at the first start.
    pub const BOOTSTRAP: Self = Self { actor: Actor::BOOTSTRAP, credential: None };

    /// Whoever holds this credential.
    pub fn holder(actor: Actor, credential: Credential) -> Self {
        Self { actor, credential: Some(credential) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_credential_prints_as_stars() {
        let asker = Asker::holder(Actor::BROKER, Credential::new("svt_secret"));
        assert!(!format!("{asker:?}").contains("svt_"), "{asker:?}");
    }
}
