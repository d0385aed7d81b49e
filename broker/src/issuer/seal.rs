use std::env;
use std::fs::{DirBuilder, File};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use aws_lc_rs::rand;
use selvedge_proto::private_file;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::Error;

const MAGIC: &[u8; 8] = b"SLVGSEAL";
const VERSION: u8 = 1;
const HEADER_BYTES: usize = MAGIC.len() + 1;
const KEY_BYTES: usize = 32;
/// Bytes of the largest sealed issuer that is read.
const SEALED_BYTES_MAX: u64 = 1024 * 1024;

/// Where the key is that the issuer's keys are sealed under.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Seal {
    /// A file with 32 bytes, or 64 hexadecimal digits, that only its owner may read. Made when the
    /// issuer is made and the file does not exist.
    File(PathBuf),
    /// An environment variable with 64 hexadecimal digits.
    Env(String),
}

impl Seal {
    pub(super) fn key(&self) -> Result<Zeroizing<[u8; KEY_BYTES]>, Error> {
        match self {
            Seal::File(path) => key_of_file(path),
            Seal::Env(name) => match env::var(name) {
                Ok(text) => parse_hex(&Zeroizing::new(text))
                    .ok_or(Error::SealKey { name: name.clone(), reason: "not 64 hexadecimal digits" }),
                Err(_) => Err(Error::SealKey { name: name.clone(), reason: "the variable is not set" }),
            },
        }
    }

    pub(super) fn key_or_new(&self) -> Result<Zeroizing<[u8; KEY_BYTES]>, Error> {
        match self {
            Seal::File(path) if !path.exists() => {
                let mut key = Zeroizing::new([0; KEY_BYTES]);
                rand::fill(key.as_mut_slice()).map_err(|_| Error::Random)?;
                if let Some(parent) = path.parent().filter(|dir| !dir.as_os_str().is_empty()) {
                    make_private_dir(parent)?;
                }
                private_file::create(path, key.as_slice()).map_err(|source| file_error(path, source))?;
                Ok(key)
            }
            _ => self.key(),
        }
    }
}

/// **Shape**: magic, version, nonce, then ciphertext and tag; the header and `purpose` are
/// authenticated with it.
pub(super) fn seal(key: &[u8; KEY_BYTES], purpose: &[u8], clear: &[u8]) -> Result<Vec<u8>, Error> {
    let mut nonce = [0; NONCE_LEN];
    rand::fill(&mut nonce).map_err(|_| Error::Random)?;
    let header = header();
    let mut body = Vec::with_capacity(clear.len() + AES_256_GCM.tag_len());
    body.extend_from_slice(clear);
    cipher(key)?
        .seal_in_place_append_tag(
            Nonce::assume_unique_for_key(nonce),
            Aad::from([&header, purpose].concat()),
            &mut body,
        )
        .map_err(|_| Error::Unseal("it could not be sealed"))?;
    Ok([&header[..], &nonce, &body].concat())
}

pub(super) fn open(key: &[u8; KEY_BYTES], purpose: &[u8], sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, Error> {
    let (header, rest) = sealed.split_at_checked(HEADER_BYTES).ok_or(Error::Unseal("it is too short"))?;
    if !header.starts_with(MAGIC) {
        return Err(Error::Unseal("it is not a sealed issuer"));
    }
    if header[MAGIC.len()] != VERSION {
        return Err(Error::Unseal("it was sealed by another version"));
    }
    let (nonce, body) = rest.split_first_chunk::<NONCE_LEN>().ok_or(Error::Unseal("it is too short"))?;
    let mut clear = Zeroizing::new(body.to_vec());
    let length = cipher(key)?
        .open_in_place(
            Nonce::assume_unique_for_key(*nonce),
            Aad::from([header, purpose].concat()),
            clear.as_mut_slice(),
        )
        .map_err(|_| Error::Unseal("wrong key, or it was changed"))?
        .len();
    clear.truncate(length);
    Ok(clear)
}

pub(super) fn read_bounded(path: &Path) -> Result<Zeroizing<Vec<u8>>, Error> {
    let mut bytes = Zeroizing::new(Vec::new());
    File::open(path)
        .and_then(|file| file.take(SEALED_BYTES_MAX).read_to_end(&mut bytes))
        .map_err(|source| file_error(path, source))?;
    Ok(bytes)
}

pub(super) fn make_private_dir(path: &Path) -> Result<(), Error> {
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(|source| file_error(path, source))
}

pub(super) fn file_error(path: &Path, source: io::Error) -> Error {
    Error::File { path: path.display().to_string(), source }
}

fn header() -> [u8; HEADER_BYTES] {
    let mut header = [VERSION; HEADER_BYTES];
    header[..MAGIC.len()].copy_from_slice(MAGIC);
    header
}

fn cipher(key: &[u8; KEY_BYTES]) -> Result<LessSafeKey, Error> {
    UnboundKey::new(&AES_256_GCM, key).map(LessSafeKey::new).map_err(|_| Error::Unseal("the key cannot be used"))
}

fn key_of_file(path: &Path) -> Result<Zeroizing<[u8; KEY_BYTES]>, Error> {
    let refuse = |reason| Error::SealKey { name: path.display().to_string(), reason };
    let file = File::open(path).map_err(|source| file_error(path, source))?;
    let mode = file.metadata().map_err(|source| file_error(path, source))?.permissions().mode();
    if mode & 0o077 != 0 {
        return Err(refuse("others than its owner may read the file"));
    }
    let mut bytes = Zeroizing::new(Vec::with_capacity(128));
    file.take(128).read_to_end(&mut bytes).map_err(|source| file_error(path, source))?;
    if let Ok(key) = <[u8; KEY_BYTES]>::try_from(bytes.as_slice()) {
        return Ok(Zeroizing::new(key));
    }
    std::str::from_utf8(&bytes).ok().and_then(parse_hex).ok_or(refuse("neither 32 bytes nor 64 hexadecimal digits"))
}

fn parse_hex(text: &str) -> Option<Zeroizing<[u8; KEY_BYTES]>> {
    let mut key = Zeroizing::new([0; KEY_BYTES]);
    hex::decode_to_slice(text.trim_ascii(), key.as_mut_slice()).ok()?;
    Some(key)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sealed_opens_under_the_same_key_and_purpose_only() {
        let sealed = seal(&[7; 32], b"a", b"secret").unwrap();
        assert_eq!(open(&[7; 32], b"a", &sealed).unwrap().as_slice(), b"secret");
        assert!(open(&[8; 32], b"a", &sealed).is_err());
        assert!(open(&[7; 32], b"b", &sealed).is_err());
        for index in 0..sealed.len() {
            let mut changed = sealed.clone();
            changed[index] ^= 1;
            assert!(open(&[7; 32], b"a", &changed).is_err(), "byte {index}");
            assert!(open(&[7; 32], b"a", &sealed[..index]).is_err());
        }
    }

    #[test]
    fn a_key_is_64_hexadecimal_digits() {
        assert_eq!(*parse_hex(&format!("{}\n", "0a".repeat(32))).unwrap(), [10; 32]);
        assert!(parse_hex("0a").is_none());
        assert!(parse_hex(&"zz".repeat(32)).is_none());
        let unset = Seal::Env("SELVEDGE_TEST_NO_SUCH_VARIABLE".into());
        assert!(matches!(unset.key(), Err(Error::SealKey { .. })));
    }
}
