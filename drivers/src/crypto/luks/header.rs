//! The header of LUKS version 1, as bytes and as values. All numbers are big endian.
//!
//! | byte | what |
//! |---|---|
//! | 0 | magic, version |
//! | 8, 40, 72 | names of cipher, mode and hash, 32 bytes each, with a NUL |
//! | 104, 108 | sector of the payload; bytes of the key |
//! | 112, 132, 164 | digest of the key, its salt, its iterations |
//! | 168 | UUID as text, 40 bytes with a NUL |
//! | 208 | eight key slots of 48 bytes: state, iterations, salt, sector of the material, stripes |
//!
//! Whatever a header says is checked here (K01 to K10), except the number of iterations, which is
//! the concern of who unlocks it.

#![cfg_attr(not(test), deny(clippy::indexing_slicing))]

use super::{Place, SLOTS};
use crate::crypto::SECTOR;
use crate::crypto::cipher::CipherAlgorithm;
use crate::crypto::hash::HashAlgorithm;
use crate::crypto::iv::IvAlgorithm;
use crate::crypto::sectors::{CipherMode, CipherSuite};
use crate::open_gate::escape_bytes;
use blockplex_graph::{Error, ErrorKind, Result};

/// Bytes of a header.
pub const HEADER_BYTES: usize = 592;
/// Stripes of a key, the only number that is used.
pub const STRIPES: u32 = 4000;
/// Bytes of the digest of the key.
pub(super) const DIGEST_BYTES: usize = 20;
/// Bytes of a salt.
pub(super) const SALT_BYTES: usize = 32;

const MAGIC: [u8; 6] = *b"LUKS\xba\xbe";
const ACTIVE: u32 = 0x00ac_71f3;
const INACTIVE: u32 = 0x0000_dead;
const NAME_BYTES: usize = 32;
const UUID_BYTES: usize = 40;
const FIRST_SLOT: usize = 208;
const SLOT_BYTES: usize = 48;

/// A header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LuksHeader {
    /// How the payload and the key slots are encrypted.
    pub suite: CipherSuite,
    /// The hash of passwords and of the splitter.
    pub hash: HashAlgorithm,
    /// Where the payload starts, in sectors from the header; 0: elsewhere.
    pub payload_sector: u32,
    pub(super) digest: [u8; DIGEST_BYTES],
    pub(super) digest_salt: [u8; SALT_BYTES],
    /// Iterations of the digest of the key.
    pub digest_iterations: u32,
    /// The UUID, escaped.
    pub uuid: String,
    /// The key slots.
    pub slots: [KeySlot; SLOTS],
}

/// A key slot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KeySlot {
    /// Whether it holds a key.
    pub active: bool,
    /// Iterations of the derivation of its password.
    pub iterations: u32,
    pub(super) salt: [u8; SALT_BYTES],
    /// Where its material starts, in sectors from the header.
    pub material_sector: u32,
    /// Stripes of the splitter.
    pub stripes: u32,
}

impl LuksHeader {
    /// Reads and checks the header at `place`.
    ///
    /// # Errors
    ///
    /// Those of the file; `InvalidArgument` for another format, `NotSupported` for a version,
    /// cipher or hash that is not known, `Corrupt` for all else that breaks a rule.
    pub async fn read(place: Place<'_>) -> Result<LuksHeader> {
        if place.length < HEADER_BYTES as u64 {
            return Err(corrupt(format!("{} bytes are too few", place.length)));
        }
        let header = LuksHeader::parse(&place.read(0, HEADER_BYTES).await?)?;
        header.check_place(place.length)?;
        Ok(header)
    }

    /// The header in `bytes`, checked against itself.
    ///
    /// # Errors
    ///
    /// As for [`read`](Self::read).
    pub fn parse(bytes: &[u8]) -> Result<LuksHeader> {
        if bytes.get(..6) != Some(&MAGIC) {
            let text = "the volume is not in LUKS format: the magic is wrong";
            return Err(Error::new(ErrorKind::InvalidArgument, text));
        }
        let version = be16(bytes, 6)?;
        if version != 1 {
            return Err(unsupported(format!("version {version}")));
        }
        let key_bytes = be32(bytes, 108)?;
        let mut slots = [KeySlot::default(); SLOTS];
        for (number, slot) in slots.iter_mut().enumerate() {
            *slot = parse_slot(bytes, number)?;
        }
        let header = LuksHeader {
            suite: parse_suite(bytes, key_bytes)?,
            hash: hash_named(name(bytes, 72, "hash")?)?,
            payload_sector: be32(bytes, 104)?,
            digest: array(bytes, 112)?,
            digest_salt: array(bytes, 132)?,
            digest_iterations: be32(bytes, 164)?,
            uuid: escape_bytes(text(bytes, 168, UUID_BYTES).unwrap_or_default()),
            slots,
        };
        header.check()?;
        Ok(header)
    }

    /// The header's bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER_BYTES);
        bytes.extend(MAGIC);
        bytes.extend(1_u16.to_be_bytes());
        let CipherSuite { algorithm, mode, iv, iv_hash } = self.suite;
        let mut mode_name = format!("{}-{}", mode.name(), iv.name());
        if let Some(hash) = iv_hash {
            mode_name.push(':');
            mode_name.push_str(hash.name());
        }
        for name in [algorithm.header_name(), &mode_name, self.hash.name()] {
            pad(&mut bytes, name.as_bytes(), NAME_BYTES);
        }
        bytes.extend(self.payload_sector.to_be_bytes());
        bytes.extend((self.suite.key_bytes() as u32).to_be_bytes());
        bytes.extend(self.digest);
        bytes.extend(self.digest_salt);
        bytes.extend(self.digest_iterations.to_be_bytes());
        pad(&mut bytes, self.uuid.as_bytes(), UUID_BYTES);
        for slot in &self.slots {
            bytes.extend(if slot.active { ACTIVE } else { INACTIVE }.to_be_bytes());
            bytes.extend(slot.iterations.to_be_bytes());
            bytes.extend(slot.salt);
            bytes.extend(slot.material_sector.to_be_bytes());
            bytes.extend(slot.stripes.to_be_bytes());
        }
        debug_assert_eq!(bytes.len(), HEADER_BYTES);
        bytes
    }

    /// Where the payload starts, in bytes from the header.
    pub fn payload_offset(&self) -> u64 {
        u64::from(self.payload_sector) * SECTOR as u64
    }

    /// Sectors of the material of a key slot.
    pub(super) fn material_sectors(&self) -> u64 {
        material_sectors(self.suite.key_bytes())
    }

    fn check(&self) -> Result<()> {
        if self.digest_iterations == 0 {
            return Err(corrupt("the iterations of the key's digest are 0"));
        }
        let header_sectors = (HEADER_BYTES as u64).div_ceil(SECTOR as u64);
        let payload = u64::from(self.payload_sector);
        let areas = self.slots.iter().map(|slot| {
            let start = u64::from(slot.material_sector);
            (start, start + self.material_sectors())
        });
        let areas: Vec<(u64, u64)> = areas.collect();
        for (number, (slot, &(start, end))) in self.slots.iter().zip(&areas).enumerate() {
            let refuse = |what: String| Err(corrupt(format!("key slot {number} {what}")));
            if slot.stripes != STRIPES {
                return refuse(format!("has {} stripes, not {STRIPES}", slot.stripes));
            }
            if slot.active && slot.iterations == 0 {
                return refuse("has 0 iterations".to_owned());
            }
            if start < header_sectors {
                return refuse(format!("at sector {start} overlaps the header"));
            }
            if payload != 0 && end > payload {
                return refuse(format!(
                    "(sectors {start} to {end}) overlaps the payload at sector {payload}"
                ));
            }
            let other =
                areas.iter().take(number).position(|other| start < other.1 && other.0 < end);
            if let Some(other) = other {
                return refuse(format!("overlaps key slot {other}"));
            }
        }
        Ok(())
    }

    /// Checks that the key slots lie within `length` bytes from the header on.
    fn check_place(&self, length: u64) -> Result<()> {
        for (number, slot) in self.slots.iter().enumerate() {
            let end = (u64::from(slot.material_sector) + self.material_sectors()) * SECTOR as u64;
            // The last sector need not be whole.
            if slot.active && end > length.next_multiple_of(SECTOR as u64) {
                let text = format!("key slot {number} ends at byte {end}, past the {length} bytes");
                return Err(corrupt(format!("{text} that the header has")));
            }
        }
        Ok(())
    }
}

/// Sectors of the material of a key of so many bytes.
pub(super) fn material_sectors(key_bytes: usize) -> u64 {
    (key_bytes as u64 * u64::from(STRIPES)).div_ceil(SECTOR as u64)
}

fn corrupt(what: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::Corrupt, format!("LUKS header: {what}"))
}

fn unsupported(what: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::NotSupported, format!("LUKS header: {what} is not supported"))
}

fn parse_slot(bytes: &[u8], number: usize) -> Result<KeySlot> {
    let at = FIRST_SLOT + number * SLOT_BYTES;
    let active = match be32(bytes, at)? {
        ACTIVE => true,
        INACTIVE => false,
        other => return Err(corrupt(format!("key slot {number} has state {other:#x}"))),
    };
    Ok(KeySlot {
        active,
        iterations: be32(bytes, at + 4)?,
        salt: array(bytes, at + 8)?,
        material_sector: be32(bytes, at + 40)?,
        stripes: be32(bytes, at + 44)?,
    })
}

fn parse_suite(bytes: &[u8], key_bytes: u32) -> Result<CipherSuite> {
    let cipher = name(bytes, 8, "cipher")?;
    let words = name(bytes, 40, "cipher mode")?;
    let unknown = || unsupported(format!("cipher mode '{}'", escape_bytes(words.as_bytes())));
    let (mode, iv) = words.split_once('-').ok_or_else(unknown)?;
    let (iv, iv_hash) = match iv.split_once(':') {
        Some((iv, hash)) => (iv, Some(hash_named(hash)?)),
        None => (iv, None),
    };
    let mode = CipherMode::by_name(mode).ok_or_else(unknown)?;
    let iv = IvAlgorithm::by_name(iv).ok_or_else(unknown)?;
    if iv == IvAlgorithm::Essiv && iv_hash.is_none() {
        return Err(corrupt("the cipher mode has essiv without a hash"));
    }
    let halves = if mode == CipherMode::Xts { 2 } else { 1 };
    let algorithm = key_bytes
        .is_multiple_of(halves)
        .then(|| CipherAlgorithm::in_header(cipher, (key_bytes / halves) as usize))
        .flatten();
    let algorithm = algorithm.ok_or_else(|| {
        let cipher = escape_bytes(cipher.as_bytes());
        unsupported(format!("cipher '{cipher}' with a key of {key_bytes} bytes"))
    })?;
    let suite = CipherSuite { algorithm, mode, iv, iv_hash };
    suite.check()?;
    Ok(suite)
}

fn hash_named(name: &str) -> Result<HashAlgorithm> {
    HashAlgorithm::by_name(name)
        .ok_or_else(|| unsupported(format!("hash '{}'", escape_bytes(name.as_bytes()))))
}

/// The bytes before the NUL that a text must have.
fn text(bytes: &[u8], at: usize, length: usize) -> Option<&[u8]> {
    let field = bytes.get(at..at + length)?;
    field.get(..field.iter().position(|byte| *byte == 0)?)
}

fn name<'a>(bytes: &'a [u8], at: usize, what: &str) -> Result<&'a str> {
    let name = text(bytes, at, NAME_BYTES)
        .ok_or_else(|| corrupt(format!("the name of the {what} is not NUL terminated")))?;
    std::str::from_utf8(name).map_err(|_| unsupported(format!("{what} '{}'", escape_bytes(name))))
}

fn pad(bytes: &mut Vec<u8>, text: &[u8], length: usize) {
    let end = bytes.len() + length;
    // One byte is left for the NUL.
    bytes.extend(text.iter().take(length - 1));
    bytes.resize(end, 0);
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Result<[u8; N]> {
    let field = bytes.get(at..at + N).and_then(|field| field.try_into().ok());
    field.ok_or_else(|| corrupt("it is cut short"))
}

fn be16(bytes: &[u8], at: usize) -> Result<u16> {
    array(bytes, at).map(u16::from_be_bytes)
}

fn be32(bytes: &[u8], at: usize) -> Result<u32> {
    array(bytes, at).map(u32::from_be_bytes)
}
