//! New headers.

use super::header::{DIGEST_BYTES, KeySlot, LuksHeader, STRIPES, material_sectors};
use super::key_slot::{MasterKey, Wrapping};
use super::{SLOTS, speed};
use crate::crypto::SECTOR;
use crate::crypto::cipher::CipherAlgorithm;
use crate::crypto::fill_random;
use crate::crypto::hash::HashAlgorithm;
use crate::crypto::iv::IvAlgorithm;
use crate::crypto::secret::Secret;
use crate::crypto::sectors::{CipherMode, CipherSuite};
use blockplex_graph::Result;
use blockplex_io::event_loop::Local;
use std::time::Duration;
use zeroize::Zeroizing;

/// Key material is aligned to so many sectors, the first one follows so many.
const ALIGNMENT_SECTORS: u64 = 8;

/// What a new header should be. The names are those of the peer's options.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LuksCreateOptions {
    /// The password of the first key slot.
    pub password: Secret,
    /// `cipher-alg`, `cipher-mode`, `ivgen-alg`, `ivgen-hash-alg`.
    pub suite: CipherSuite,
    /// `hash-alg`.
    pub hash: HashAlgorithm,
    /// `iter-time`: how long it should take to try a password.
    pub iteration_time: Duration,
}

impl LuksCreateOptions {
    /// The defaults of the peer: AES-256 in XTS with `plain64`, SHA-256, two seconds.
    pub fn new(password: Secret) -> LuksCreateOptions {
        let suite = CipherSuite {
            algorithm: CipherAlgorithm::Aes256,
            mode: CipherMode::Xts,
            iv: IvAlgorithm::Plain64,
            iv_hash: None,
        };
        let iteration_time = Duration::from_secs(2);
        LuksCreateOptions { password, suite, hash: HashAlgorithm::Sha256, iteration_time }
    }
}

/// A header with one key slot, ready to be written.
#[derive(Debug)]
pub struct Fresh {
    /// The header.
    pub header: LuksHeader,
    /// The payload's key.
    pub key: MasterKey,
    material: Vec<u8>,
}

impl Fresh {
    /// Offsets from the start of the header, and what is to be written there. Up to
    /// [`header_bytes`] all else should be zero.
    pub fn writes(&self) -> [(u64, Vec<u8>); 2] {
        let material = ALIGNMENT_SECTORS * SECTOR as u64;
        [(0, self.header.to_bytes()), (material, self.material.clone())]
    }
}

/// Bytes from the start of a header to its payload.
pub fn header_bytes(suite: &CipherSuite) -> u64 {
    let slot = material_sectors(suite.key_bytes()).next_multiple_of(ALIGNMENT_SECTORS);
    (ALIGNMENT_SECTORS + SLOTS as u64 * slot) * SECTOR as u64
}

/// A new header with a new key. The work is done on the loop's thread pool (K3).
///
/// # Errors
///
/// Parts of a suite that do not go together; no random bytes.
pub async fn create(local: &Local, options: &LuksCreateOptions) -> Result<Fresh> {
    options.suite.check()?;
    let options = options.clone();
    local.blocking(move || fresh(&options)).await
}

fn fresh(options: &LuksCreateOptions) -> Result<Fresh> {
    let LuksCreateOptions { suite, hash, iteration_time, .. } = *options;
    let mut key = Zeroizing::new(vec![0; suite.key_bytes()]);
    fill_random(&mut key)?;
    let mut digest_salt = [0; 32];
    fill_random(&mut digest_salt)?;
    // Anyone can try the digest as often as they like only after the slot: an eighth will do.
    let digest_iterations = speed::iterations(hash, DIGEST_BYTES, iteration_time / 8);
    let derived = hash.derive(&key, &digest_salt, digest_iterations, DIGEST_BYTES);
    let mut digest = [0; DIGEST_BYTES];
    digest.iter_mut().zip(&**derived).for_each(|(to, from)| *to = *from);
    let key = MasterKey::new(&key);
    let slot_sectors = material_sectors(suite.key_bytes()).next_multiple_of(ALIGNMENT_SECTORS);
    let mut slots = [KeySlot { stripes: STRIPES, ..KeySlot::default() }; SLOTS];
    let mut sector = ALIGNMENT_SECTORS;
    for slot in &mut slots {
        // At most 8 slots of 500 sectors.
        slot.material_sector = sector as u32;
        sector += slot_sectors;
    }
    let (salt, iterations, material) =
        wrapped(suite, hash, &options.password, &key, iteration_time)?;
    if let Some(first) = slots.first_mut() {
        *first = KeySlot { active: true, iterations, salt, ..*first };
    }
    let header = LuksHeader {
        suite,
        hash,
        payload_sector: sector as u32,
        digest,
        digest_salt,
        digest_iterations,
        uuid: new_uuid()?,
        slots,
    };
    Ok(Fresh { header, key, material })
}

/// Salt, iterations and material of a new key slot.
pub(super) fn wrapped(
    suite: CipherSuite,
    hash: HashAlgorithm,
    password: &Secret,
    key: &MasterKey,
    time: Duration,
) -> Result<([u8; 32], u32, Vec<u8>)> {
    let mut salt = [0; 32];
    fill_random(&mut salt)?;
    let iterations = speed::iterations(hash, suite.key_bytes(), time);
    let material = Wrapping { suite, hash, salt, iterations }.wrap(password, key)?;
    Ok((salt, iterations, material))
}

/// A random UUID (version 4) as text.
fn new_uuid() -> Result<String> {
    let mut bytes = [0; 16];
    fill_random(&mut bytes)?;
    let number = u128::from_be_bytes(bytes);
    let number = number & !(0xf << 76) & !(0x3 << 62) | 0x4 << 76 | 0x2 << 62;
    let digits = format!("{number:032x}");
    let mut uuid = String::with_capacity(36);
    for (index, digit) in digits.chars().enumerate() {
        if matches!(index, 8 | 12 | 16 | 20) {
            uuid.push('-');
        }
        uuid.push(digit);
    }
    Ok(uuid)
}
