//! Encryption of sectors: cipher, mode and initialisation vectors together.

use super::SECTOR;
use super::cipher::{BlockKey, CipherAlgorithm};
use super::hash::HashAlgorithm;
use super::iv::{IvAlgorithm, IvGenerator, essiv_cipher};
use super::mode::{cbc_decrypt, cbc_encrypt, ctr};
use super::xts::Xts;
use blockplex_graph::{Error, ErrorKind, Result};
use std::fmt;

/// How blocks make a sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CipherMode {
    /// Every block by itself.
    Ecb,
    /// Each block depends on the one before.
    Cbc,
    /// Each block depends on its place; the key has two halves.
    Xts,
    /// A stream of encrypted numbers.
    Ctr,
}

impl CipherMode {
    /// All of them, by their names in options and headers.
    pub const NAMES: [(&'static str, CipherMode); 4] = [
        ("ecb", CipherMode::Ecb),
        ("cbc", CipherMode::Cbc),
        ("xts", CipherMode::Xts),
        ("ctr", CipherMode::Ctr),
    ];

    /// The mode with this name.
    pub fn by_name(name: &str) -> Option<CipherMode> {
        Self::NAMES.iter().find(|(known, _)| *known == name).map(|(_, mode)| *mode)
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        Self::NAMES.iter().find(|(_, mode)| *mode == self).map_or("?", |(name, _)| name)
    }
}

/// Everything about the encryption of a payload but its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CipherSuite {
    /// The block cipher.
    pub algorithm: CipherAlgorithm,
    /// The mode.
    pub mode: CipherMode,
    /// Where initialisation vectors come from.
    pub iv: IvAlgorithm,
    /// The hash that ESSIV uses; stands in headers without meaning for the others.
    pub iv_hash: Option<HashAlgorithm>,
}

impl CipherSuite {
    /// Bytes of the key, which has two halves in XTS.
    pub fn key_bytes(&self) -> usize {
        let halves = if self.mode == CipherMode::Xts { 2 } else { 1 };
        self.algorithm.key_bytes() * halves
    }

    /// Whether the parts go together.
    ///
    /// # Errors
    ///
    /// XTS with a small block; ESSIV without a cipher that takes the digest as its key.
    pub fn check(&self) -> Result<()> {
        if self.mode == CipherMode::Xts && self.algorithm.block_bytes() != 16 {
            let text = format!("cipher {} does not go with mode xts", self.algorithm.name());
            return Err(Error::new(ErrorKind::InvalidArgument, text));
        }
        if self.iv == IvAlgorithm::Essiv {
            essiv_cipher(self.algorithm, self.essiv_hash()?)?;
        }
        Ok(())
    }

    fn essiv_hash(&self) -> Result<HashAlgorithm> {
        self.iv_hash
            .ok_or_else(|| Error::new(ErrorKind::InvalidArgument, "essiv needs a hash algorithm"))
    }

    /// The cipher with `key`, of [`key_bytes`](Self::key_bytes).
    ///
    /// # Errors
    ///
    /// As [`check`](Self::check); a key of another length.
    pub fn keyed(&self, key: &[u8]) -> Result<SectorCipher> {
        self.check()?;
        let iv = match self.iv {
            IvAlgorithm::Plain => IvGenerator::Plain,
            IvAlgorithm::Plain64 => IvGenerator::Plain64,
            IvAlgorithm::Essiv => {
                let hash = self.essiv_hash()?;
                let cipher = essiv_cipher(self.algorithm, hash)?;
                IvGenerator::Essiv(cipher.keyed(&hash.digest(key))?)
            }
        };
        let algorithm = self.algorithm;
        let keyed = match self.mode {
            CipherMode::Xts => {
                let (data, tweak) = key.split_at(key.len() / 2);
                Keyed::Xts(Xts { data: algorithm.keyed(data)?, tweak: algorithm.keyed(tweak)? })
            }
            CipherMode::Ecb => Keyed::Ecb(algorithm.keyed(key)?),
            CipherMode::Cbc => Keyed::Cbc(algorithm.keyed(key)?),
            CipherMode::Ctr => Keyed::Ctr(algorithm.keyed(key)?),
        };
        Ok(SectorCipher { keyed, iv })
    }
}

enum Keyed {
    Ecb(Box<dyn BlockKey>),
    Cbc(Box<dyn BlockKey>),
    Xts(Xts),
    Ctr(Box<dyn BlockKey>),
}

/// Encrypts and decrypts sectors. Any thread.
pub struct SectorCipher {
    keyed: Keyed,
    iv: IvGenerator,
}

impl fmt::Debug for SectorCipher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SectorCipher(…)")
    }
}

impl SectorCipher {
    /// Encrypts `bytes`, whole sectors of which the first is number `sector`.
    pub fn encrypt(&self, sector: u64, bytes: &mut [u8]) {
        let (sectors, rest) = bytes.as_chunks_mut::<SECTOR>();
        debug_assert!(rest.is_empty(), "whole sectors");
        for (number, bytes) in (sector..).zip(sectors) {
            let iv = self.iv.vector(number);
            match &self.keyed {
                Keyed::Ecb(key) => key.encrypt(bytes),
                Keyed::Cbc(key) => cbc_encrypt(&**key, &iv, bytes),
                Keyed::Xts(xts) => xts.encrypt(&iv, bytes),
                Keyed::Ctr(key) => ctr(&**key, &iv, bytes),
            }
        }
    }

    /// Decrypts `bytes`, whole sectors of which the first is number `sector`.
    pub fn decrypt(&self, sector: u64, bytes: &mut [u8]) {
        let (sectors, rest) = bytes.as_chunks_mut::<SECTOR>();
        debug_assert!(rest.is_empty(), "whole sectors");
        for (number, bytes) in (sector..).zip(sectors) {
            let iv = self.iv.vector(number);
            match &self.keyed {
                Keyed::Ecb(key) => key.decrypt(bytes),
                Keyed::Cbc(key) => cbc_decrypt(&**key, &iv, bytes),
                Keyed::Xts(xts) => xts.decrypt(&iv, bytes),
                Keyed::Ctr(key) => ctr(&**key, &iv, bytes),
            }
        }
    }
}
