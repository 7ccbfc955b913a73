//! Block ciphers by name and key size.

use blockplex_graph::{Error, ErrorKind, Result};
use cipher::array::Array;
use cipher::{BlockCipherDecrypt, BlockCipherEncrypt, BlockSizeUser, KeyInit};

/// Bytes of the largest block.
pub(super) const MAX_BLOCK: usize = 16;

/// A block cipher with the size of its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CipherAlgorithm {
    /// AES.
    Aes128,
    /// AES.
    Aes192,
    /// AES.
    Aes256,
    /// CAST5, with blocks of 8 bytes.
    Cast5,
    /// Serpent.
    Serpent128,
    /// Serpent.
    Serpent192,
    /// Serpent.
    Serpent256,
    /// Twofish.
    Twofish128,
    /// Twofish.
    Twofish192,
    /// Twofish.
    Twofish256,
}

/// Name in options, name in a LUKS header, bytes of the key.
const TABLE: [(CipherAlgorithm, &str, &str, usize); 10] = [
    (CipherAlgorithm::Aes128, "aes-128", "aes", 16),
    (CipherAlgorithm::Aes192, "aes-192", "aes", 24),
    (CipherAlgorithm::Aes256, "aes-256", "aes", 32),
    (CipherAlgorithm::Cast5, "cast5-128", "cast5", 16),
    (CipherAlgorithm::Serpent128, "serpent-128", "serpent", 16),
    (CipherAlgorithm::Serpent192, "serpent-192", "serpent", 24),
    (CipherAlgorithm::Serpent256, "serpent-256", "serpent", 32),
    (CipherAlgorithm::Twofish128, "twofish-128", "twofish", 16),
    (CipherAlgorithm::Twofish192, "twofish-192", "twofish", 24),
    (CipherAlgorithm::Twofish256, "twofish-256", "twofish", 32),
];

impl CipherAlgorithm {
    fn row(self) -> (&'static str, &'static str, usize) {
        let row = TABLE.iter().find(|row| row.0 == self);
        row.map_or(("?", "?", 0), |row| (row.1, row.2, row.3))
    }

    /// The algorithm that an option names.
    pub fn by_name(name: &str) -> Option<CipherAlgorithm> {
        TABLE.iter().find(|row| row.1 == name).map(|row| row.0)
    }

    /// All names, for messages and help.
    pub fn names() -> impl Iterator<Item = &'static str> {
        TABLE.iter().map(|row| row.1)
    }

    /// The algorithm that a LUKS header means.
    pub(super) fn in_header(name: &str, key_bytes: usize) -> Option<CipherAlgorithm> {
        TABLE.iter().find(|row| row.2 == name && row.3 == key_bytes).map(|row| row.0)
    }

    /// Its name in options.
    pub fn name(self) -> &'static str {
        self.row().0
    }

    /// Its name in a LUKS header, which does not say the size.
    pub(super) fn header_name(self) -> &'static str {
        self.row().1
    }

    /// Bytes of a key.
    pub fn key_bytes(self) -> usize {
        self.row().2
    }

    /// Bytes of a block.
    pub(super) fn block_bytes(self) -> usize {
        if self == CipherAlgorithm::Cast5 { 8 } else { MAX_BLOCK }
    }

    /// The same cipher with a key of `bytes`.
    pub(super) fn with_key_bytes(self, bytes: usize) -> Option<CipherAlgorithm> {
        CipherAlgorithm::in_header(self.header_name(), bytes)
    }

    /// The cipher with `key`.
    pub(super) fn keyed(self, key: &[u8]) -> Result<Box<dyn BlockKey>> {
        let keyed = match self {
            _ if key.len() != self.key_bytes() => None,
            CipherAlgorithm::Aes128 => boxed::<aes::Aes128>(key),
            CipherAlgorithm::Aes192 => boxed::<aes::Aes192>(key),
            CipherAlgorithm::Aes256 => boxed::<aes::Aes256>(key),
            CipherAlgorithm::Cast5 => boxed::<cast5::Cast5>(key),
            CipherAlgorithm::Serpent128
            | CipherAlgorithm::Serpent192
            | CipherAlgorithm::Serpent256 => boxed::<serpent::Serpent>(key),
            CipherAlgorithm::Twofish128
            | CipherAlgorithm::Twofish192
            | CipherAlgorithm::Twofish256 => boxed::<twofish::Twofish>(key),
        };
        keyed.ok_or_else(|| {
            let text = format!("{} takes no key of {} bytes", self.name(), key.len());
            Error::new(ErrorKind::InvalidArgument, text)
        })
    }
}

fn boxed<C: BlockKey + KeyInit + 'static>(key: &[u8]) -> Option<Box<dyn BlockKey>> {
    C::new_from_slice(key).ok().map(|keyed| Box::new(keyed) as Box<dyn BlockKey>)
}

/// A block cipher with its key, which it wipes when dropped.
pub(super) trait BlockKey: Send + Sync {
    /// Bytes of a block: 8 or 16.
    fn block_bytes(&self) -> usize;
    /// Encrypts each block of `bytes`, which has whole blocks.
    fn encrypt(&self, bytes: &mut [u8]);
    /// Decrypts each block of `bytes`, which has whole blocks.
    fn decrypt(&self, bytes: &mut [u8]);
}

impl<C> BlockKey for C
where
    C: BlockCipherEncrypt + BlockCipherDecrypt + Send + Sync,
{
    fn block_bytes(&self) -> usize {
        <C as BlockSizeUser>::block_size()
    }

    fn encrypt(&self, bytes: &mut [u8]) {
        let (blocks, rest) = Array::<u8, C::BlockSize>::slice_as_chunks_mut(bytes);
        debug_assert!(rest.is_empty(), "whole blocks");
        self.encrypt_blocks(blocks);
    }

    fn decrypt(&self, bytes: &mut [u8]) {
        let (blocks, rest) = Array::<u8, C::BlockSize>::slice_as_chunks_mut(bytes);
        debug_assert!(rest.is_empty(), "whole blocks");
        self.decrypt_blocks(blocks);
    }
}
