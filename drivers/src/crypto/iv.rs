//! Initialisation vectors: what makes equal sectors differ.

use super::cipher::{BlockKey, CipherAlgorithm};
use super::hash::HashAlgorithm;
use super::mode::Iv;
use blockplex_graph::{Error, ErrorKind, Result};

/// How the number of a sector becomes an initialisation vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IvAlgorithm {
    /// The lower 32 bits of the number, little endian.
    Plain,
    /// The number, little endian.
    Plain64,
    /// The number, encrypted with the hash of the key.
    Essiv,
}

impl IvAlgorithm {
    /// All of them, by their names in options and headers.
    pub const NAMES: [(&'static str, IvAlgorithm); 3] = [
        ("plain", IvAlgorithm::Plain),
        ("plain64", IvAlgorithm::Plain64),
        ("essiv", IvAlgorithm::Essiv),
    ];

    /// The algorithm with this name.
    pub fn by_name(name: &str) -> Option<IvAlgorithm> {
        Self::NAMES.iter().find(|(known, _)| *known == name).map(|(_, iv)| *iv)
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        Self::NAMES.iter().find(|(_, iv)| *iv == self).map_or("?", |(name, _)| name)
    }
}

/// The cipher that ESSIV uses beside `algorithm`, whose key is a digest of `hash`.
pub(super) fn essiv_cipher(
    algorithm: CipherAlgorithm,
    hash: HashAlgorithm,
) -> Result<CipherAlgorithm> {
    let refuse = |text: String| Err(Error::new(ErrorKind::InvalidArgument, text));
    if algorithm == CipherAlgorithm::Cast5 {
        return refuse(format!("Cipher {} not supported with essiv", algorithm.name()));
    }
    match algorithm.with_key_bytes(hash.digest_bytes()) {
        Some(cipher) => Ok(cipher),
        None => refuse(format!(
            "no {} cipher has a key of {} bytes, which essiv needs with {}",
            algorithm.header_name(),
            hash.digest_bytes(),
            hash.name()
        )),
    }
}

/// Makes the vectors of one key.
pub(super) enum IvGenerator {
    Plain,
    Plain64,
    Essiv(Box<dyn BlockKey>),
}

impl IvGenerator {
    pub(super) fn vector(&self, sector: u64) -> Iv {
        match self {
            IvGenerator::Plain => u128::from(sector as u32).to_le_bytes(),
            IvGenerator::Plain64 => u128::from(sector).to_le_bytes(),
            IvGenerator::Essiv(key) => {
                let mut vector = u128::from(sector).to_le_bytes();
                key.encrypt(&mut vector);
                vector
            }
        }
    }
}
