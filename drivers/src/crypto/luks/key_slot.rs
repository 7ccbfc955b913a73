//! Key slots: the payload's key, wrapped in a password, and back.

use super::header::{DIGEST_BYTES, LuksHeader, STRIPES};
use super::{Place, SLOTS, most_iterations};
use crate::crypto::SECTOR;
use crate::crypto::hash::HashAlgorithm;
use crate::crypto::key_memory::KeyMemory;
use crate::crypto::secret::Secret;
use crate::crypto::sectors::{CipherSuite, SectorCipher};
use crate::crypto::split;
use blockplex_graph::{Error, ErrorKind, Result};
use std::fmt;
use std::sync::Arc;
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

/// The key of a payload. Cloning shares it; the last owner wipes it (K1).
#[derive(Clone)]
pub struct MasterKey(Arc<KeyMemory>);

impl MasterKey {
    pub(super) fn new(bytes: &[u8]) -> MasterKey {
        MasterKey(Arc::new(KeyMemory::new(bytes)))
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// The cipher of the payload.
    ///
    /// # Errors
    ///
    /// A key of another length than `suite` wants.
    pub fn cipher(&self, suite: &CipherSuite) -> Result<SectorCipher> {
        suite.keyed(self.bytes())
    }
}

impl fmt::Debug for MasterKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MasterKey(…)")
    }
}

/// What wraps the key of one slot.
#[derive(Clone)]
pub(super) struct Wrapping {
    pub(super) suite: CipherSuite,
    pub(super) hash: HashAlgorithm,
    pub(super) salt: [u8; 32],
    pub(super) iterations: u32,
}

impl Wrapping {
    fn cipher(&self, password: &Secret) -> Result<SectorCipher> {
        let length = self.suite.key_bytes();
        let key = self.hash.derive(password.bytes(), &self.salt, self.iterations, length);
        self.suite.keyed(&key)
    }

    /// The material of a slot: whole sectors. Takes long (K3).
    pub(super) fn wrap(&self, password: &Secret, key: &MasterKey) -> Result<Vec<u8>> {
        let mut material = split::split(self.hash, key.bytes(), STRIPES as usize)?;
        let sectors = material.len().next_multiple_of(SECTOR);
        // A larger buffer would leave the old one unwiped.
        let mut whole = Vec::with_capacity(sectors);
        whole.extend_from_slice(&material);
        whole.resize(sectors, 0);
        zeroize::Zeroize::zeroize(&mut *material);
        self.cipher(password)?.encrypt(0, &mut whole);
        Ok(whole)
    }

    /// What `material` holds, if the password is the right one. Takes long (K3).
    fn unwrap(&self, password: &Secret, mut material: Vec<u8>) -> Result<Zeroizing<Vec<u8>>> {
        self.cipher(password)?.decrypt(0, &mut material);
        let key_bytes = self.suite.key_bytes();
        material.truncate(key_bytes * STRIPES as usize);
        let material = Zeroizing::new(material);
        Ok(split::merge(self.hash, &material, key_bytes))
    }
}

impl LuksHeader {
    /// Tries a password on every active key slot.
    ///
    /// # Errors
    ///
    /// `PermissionDenied` when it opens none; `LimitExceeded` when a slot, or the digest, has more
    /// than `max_iterations` (K01, K02), before anything is tried; those of the file.
    pub async fn unlock(
        &self,
        place: Place<'_>,
        password: &Secret,
        max_iterations: u32,
    ) -> Result<MasterKey> {
        self.check_iterations(max_iterations)?;
        for number in 0..SLOTS {
            if let Some(key) = self.try_slot(place, number, password).await? {
                return Ok(key);
            }
        }
        let text = "Invalid password, cannot unlock any keyslot";
        Err(Error::new(ErrorKind::PermissionDenied, text))
    }

    pub(super) fn check_iterations(&self, max_iterations: u32) -> Result<()> {
        let check = |what: &str, iterations: u32, length: usize| {
            let most = most_iterations(max_iterations, self.hash, length);
            if iterations <= most {
                return Ok(());
            }
            let text = format!(
                "LUKS header: {what} has {iterations} iterations, more than the {most} that are \
                 accepted (max-iterations)"
            );
            Err(Error::new(ErrorKind::LimitExceeded, text))
        };
        check("the digest of the key", self.digest_iterations, DIGEST_BYTES)?;
        for (number, slot) in self.slots.iter().enumerate().filter(|(_, slot)| slot.active) {
            check(&format!("key slot {number}"), slot.iterations, self.suite.key_bytes())?;
        }
        Ok(())
    }

    /// The key, if slot `number` is active and `password` opens it.
    pub(super) async fn try_slot(
        &self,
        place: Place<'_>,
        number: usize,
        password: &Secret,
    ) -> Result<Option<MasterKey>> {
        let Some(slot) = self.slots.get(number).filter(|slot| slot.active) else {
            return Ok(None);
        };
        let start = u64::from(slot.material_sector) * SECTOR as u64;
        let length = self.material_sectors() as usize * SECTOR;
        let material = place.read(start, length).await?;
        let wrapping = Wrapping {
            suite: self.suite,
            hash: self.hash,
            salt: slot.salt,
            iterations: slot.iterations,
        };
        let (digest, password) = (self.key_digest(), password.clone());
        let work = move || {
            let key = wrapping.unwrap(&password, material)?;
            Ok(digest.is_of(&key).then(|| MasterKey::new(&key)))
        };
        place.file.local().blocking(work).await
    }

    fn key_digest(&self) -> KeyDigest {
        KeyDigest {
            hash: self.hash,
            salt: self.digest_salt,
            iterations: self.digest_iterations,
            digest: self.digest,
        }
    }
}

/// What the header knows of the right key.
struct KeyDigest {
    hash: HashAlgorithm,
    salt: [u8; 32],
    iterations: u32,
    digest: [u8; DIGEST_BYTES],
}

impl KeyDigest {
    fn is_of(&self, key: &[u8]) -> bool {
        let digest = self.hash.derive(key, &self.salt, self.iterations, DIGEST_BYTES);
        digest.ct_eq(&self.digest).into()
    }
}
