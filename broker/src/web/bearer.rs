//! Secrets that are shown once and stored hashed.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use selvedge_proto::identity::Pin;
use sha2::{Digest as _, Sha256};

/// How administrators' tokens begin.
pub const TOKEN_PREFIX: &str = "svt_";
/// How directories' SCIM tokens begin.
pub const DIRECTORY_PREFIX: &str = "svd_";
/// Characters of the longest credential that is looked at.
pub(super) const BEARER_CHARS_MAX: usize = 128;

const ENROL_VERSION: &str = "sv1";
const RANDOM_BYTES: usize = 32;

/// SHA-256 of a secret's whole text: what the log keeps.
pub fn sha256(secret: &str) -> [u8; 32] {
    Sha256::digest(secret.as_bytes()).into()
}

/// A new random secret that begins with `prefix`. None when the system gives no randomness.
pub fn new_secret(prefix: &str) -> Option<String> {
    Some(format!("{prefix}{}", random_text()?))
}

/// An enrolment secret: `sv1.<pin of the issuer>.<random>`. Prints as `***`.
pub struct EnrolSecret {
    text: String,
}

impl EnrolSecret {
    /// A new one for the cluster with this pin. None when the system gives no randomness.
    pub fn generate(pin: &Pin) -> Option<Self> {
        Some(Self { text: format!("{ENROL_VERSION}.{}.{}", URL_SAFE_NO_PAD.encode(pin.as_bytes()), random_text()?) })
    }

    /// The text, to be shown once.
    pub fn reveal(&self) -> &str {
        &self.text
    }

    /// Whether a text has the form of one.
    pub fn is_one(text: &str) -> bool {
        let decoded = |part: &str| URL_SAFE_NO_PAD.decode(part).is_ok_and(|bytes| bytes.len() == RANDOM_BYTES);
        text.len() <= BEARER_CHARS_MAX
            && matches!(text.split('.').collect::<Vec<_>>()[..], [ENROL_VERSION, pin, random] if decoded(pin) && decoded(random))
    }
}

impl std::fmt::Debug for EnrolSecret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("EnrolSecret(***)")
    }
}

fn random_text() -> Option<String> {
    let mut bytes = [0; RANDOM_BYTES];
    aws_lc_rs::rand::fill(&mut bytes).ok()?;
    Some(URL_SAFE_NO_PAD.encode(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_enrolment_secret_has_its_form_and_prints_as_stars() {
        let secret = EnrolSecret::generate(&Pin::from([7; 32])).unwrap();
        assert!(EnrolSecret::is_one(secret.reveal()));
        assert_eq!(format!("{secret:?}"), "EnrolSecret(***)");
        for wrong in ["", "sv1..", "sv2.a.b", &format!("{}.x", secret.reveal()), &secret.reveal()[..80]] {
            assert!(!EnrolSecret::is_one(wrong), "{wrong}");
        }
    }
}
