//! Hash functions by their names, and keys derived from passwords.

use digest::{Digest, DynDigest};
use pbkdf2::pbkdf2_hmac;
use zeroize::Zeroizing;

/// A hash function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HashAlgorithm {
    /// MD5: broken, read for old images.
    Md5,
    /// SHA-1.
    Sha1,
    /// SHA-2 with 224 bits.
    Sha224,
    /// SHA-2 with 256 bits.
    Sha256,
    /// SHA-2 with 384 bits.
    Sha384,
    /// SHA-2 with 512 bits.
    Sha512,
    /// RIPEMD with 160 bits.
    Ripemd160,
    /// SM3.
    Sm3,
}

/// Runs `$body` with `$hash` standing for the type behind an algorithm.
macro_rules! with_hash {
    ($algorithm:expr, $hash:ident => $body:expr) => {
        match $algorithm {
            HashAlgorithm::Md5 => {
                type $hash = md5::Md5;
                $body
            }
            HashAlgorithm::Sha1 => {
                type $hash = sha1::Sha1;
                $body
            }
            HashAlgorithm::Sha224 => {
                type $hash = sha2::Sha224;
                $body
            }
            HashAlgorithm::Sha256 => {
                type $hash = sha2::Sha256;
                $body
            }
            HashAlgorithm::Sha384 => {
                type $hash = sha2::Sha384;
                $body
            }
            HashAlgorithm::Sha512 => {
                type $hash = sha2::Sha512;
                $body
            }
            HashAlgorithm::Ripemd160 => {
                type $hash = ripemd::Ripemd160;
                $body
            }
            HashAlgorithm::Sm3 => {
                type $hash = sm3::Sm3;
                $body
            }
        }
    };
}

impl HashAlgorithm {
    /// All of them, by their names in options and headers.
    pub const NAMES: [(&'static str, HashAlgorithm); 8] = [
        ("md5", HashAlgorithm::Md5),
        ("sha1", HashAlgorithm::Sha1),
        ("sha224", HashAlgorithm::Sha224),
        ("sha256", HashAlgorithm::Sha256),
        ("sha384", HashAlgorithm::Sha384),
        ("sha512", HashAlgorithm::Sha512),
        ("ripemd160", HashAlgorithm::Ripemd160),
        ("sm3", HashAlgorithm::Sm3),
    ];

    /// The function with this name.
    pub fn by_name(name: &str) -> Option<HashAlgorithm> {
        Self::NAMES.iter().find(|(known, _)| *known == name).map(|(_, hash)| *hash)
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        Self::NAMES.iter().find(|(_, hash)| *hash == self).map_or("?", |(name, _)| name)
    }

    /// Bytes of a digest.
    pub fn digest_bytes(self) -> usize {
        with_hash!(self, Hash => <Hash as Digest>::output_size())
    }

    /// A fresh computation.
    pub(super) fn start(self) -> Box<dyn DynDigest> {
        with_hash!(self, Hash => Box::new(Hash::new()))
    }

    /// The digest of `bytes`.
    pub(super) fn digest(self, bytes: &[u8]) -> Zeroizing<Vec<u8>> {
        with_hash!(self, Hash => Zeroizing::new(Hash::digest(bytes).to_vec()))
    }

    /// PBKDF2 with HMAC: a key of `length` bytes. Takes time in proportion to `iterations`, which
    /// the caller has limited (K3).
    pub(super) fn derive(
        self,
        password: &[u8],
        salt: &[u8],
        iterations: u32,
        length: usize,
    ) -> Zeroizing<Vec<u8>> {
        let mut key = Zeroizing::new(vec![0; length]);
        with_hash!(self, Hash => pbkdf2_hmac::<Hash>(password, salt, iterations, &mut key));
        key
    }
}
