//! How blocks make a sector: ECB, CBC and CTR. XTS has a file of its own.

use super::SECTOR;
use super::cipher::{BlockKey, MAX_BLOCK};

/// The bytes of an initialisation vector; ciphers with smaller blocks use its beginning.
pub(super) type Iv = [u8; MAX_BLOCK];

/// One sector.
pub(super) type Sector = [u8; SECTOR];

fn xor(bytes: &mut [u8], with: &[u8]) {
    for (byte, other) in bytes.iter_mut().zip(with) {
        *byte ^= other;
    }
}

pub(super) fn cbc_encrypt(key: &dyn BlockKey, iv: &Iv, sector: &mut Sector) {
    let mut previous = *iv;
    for block in sector.chunks_exact_mut(key.block_bytes()) {
        xor(block, &previous);
        key.encrypt(block);
        previous.iter_mut().zip(&*block).for_each(|(to, from)| *to = *from);
    }
}

pub(super) fn cbc_decrypt(key: &dyn BlockKey, iv: &Iv, sector: &mut Sector) {
    let ciphertext = *sector;
    key.decrypt(sector);
    let size = key.block_bytes();
    let previous = std::iter::once(&iv[..]).chain(ciphertext.chunks_exact(size));
    for (block, previous) in sector.chunks_exact_mut(size).zip(previous) {
        xor(block, previous);
    }
}

/// Both directions.
pub(super) fn ctr(key: &dyn BlockKey, iv: &Iv, sector: &mut Sector) {
    let size = key.block_bytes();
    let mut counter = *iv;
    let mut stream = [0; SECTOR];
    for block in stream.chunks_exact_mut(size) {
        block.iter_mut().zip(&counter).for_each(|(to, from)| *to = *from);
        for byte in counter.iter_mut().take(size).rev() {
            *byte = byte.wrapping_add(1);
            if *byte != 0 {
                break;
            }
        }
    }
    key.encrypt(&mut stream);
    xor(sector, &stream);
}
