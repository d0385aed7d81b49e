use sha2::{Digest, Sha256};

/// Sum modulo 2^256 of SHA-256(table, key length, key, value) over all rows; kept as rows come and go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StateHash([u64; 4]);

impl StateHash {
    /// Counts a row in.
    pub fn add(&mut self, table: u8, key: &[u8], value: &[u8]) {
        let mut carry = false;
        for (limb, term) in self.0.iter_mut().zip(row_hash(table, key, value)) {
            let (first, over) = limb.overflowing_add(term);
            let (second, over_again) = first.overflowing_add(u64::from(carry));
            (*limb, carry) = (second, over || over_again);
        }
    }

    /// Counts a row out.
    pub fn remove(&mut self, table: u8, key: &[u8], value: &[u8]) {
        let mut borrow = false;
        for (limb, term) in self.0.iter_mut().zip(row_hash(table, key, value)) {
            let (first, under) = limb.overflowing_sub(term);
            let (second, under_again) = first.overflowing_sub(u64::from(borrow));
            (*limb, borrow) = (second, under || under_again);
        }
    }

    /// Little-endian bytes.
    pub fn to_array(self) -> [u8; 32] {
        let mut bytes = [0; 32];
        for (chunk, limb) in bytes.chunks_exact_mut(8).zip(self.0) {
            chunk.copy_from_slice(&limb.to_le_bytes());
        }
        bytes
    }

    /// What [`StateHash::to_array`] gave; none when it has another length.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let bytes: [u8; 32] = bytes.try_into().ok()?;
        let mut limbs = [0; 4];
        for (limb, chunk) in limbs.iter_mut().zip(bytes.chunks_exact(8)) {
            *limb = u64::from_le_bytes(chunk.try_into().ok()?);
        }
        Some(Self(limbs))
    }

    pub(super) fn to_bytes(self) -> Vec<u8> {
        self.to_array().to_vec()
    }
}

fn row_hash(table: u8, key: &[u8], value: &[u8]) -> [u64; 4] {
    let mut hasher = Sha256::new();
    hasher.update([table]);
    hasher.update((key.len() as u64).to_be_bytes());
    hasher.update(key);
    hasher.update(value);
    let digest = hasher.finalize();
    let mut limbs = [0; 4];
    for (limb, chunk) in limbs.iter_mut().zip(digest.chunks_exact(8)) {
        *limb = u64::from_le_bytes(chunk.try_into().expect("chunks are of eight bytes"));
    }
    limbs
}
