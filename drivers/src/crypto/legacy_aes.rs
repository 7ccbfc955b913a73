//! The obsolete encryption of qcow2 images: AES-128-CBC, the password itself being the key. Weak in
//! every part; here so that data can be rescued.

use super::cipher::CipherAlgorithm;
use super::iv::IvAlgorithm;
use super::secret::Secret;
use super::sectors::{CipherMode, CipherSuite, SectorCipher};
use blockplex_graph::Result;
use zeroize::Zeroizing;

const SUITE: CipherSuite = CipherSuite {
    algorithm: CipherAlgorithm::Aes128,
    mode: CipherMode::Cbc,
    iv: IvAlgorithm::Plain64,
    iv_hash: None,
};

/// The cipher of a password: its first 16 bytes, filled up with zeros.
///
/// # Errors
///
/// None that is known.
pub fn sector_cipher(password: &Secret) -> Result<SectorCipher> {
    let mut key = Zeroizing::new([0; 16]);
    key.iter_mut().zip(password.bytes()).for_each(|(to, from)| *to = *from);
    SUITE.keyed(&*key)
}
