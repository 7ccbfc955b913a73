//! XTS (IEEE 1619), over any cipher with blocks of 16 bytes. Data units are whole blocks, so that
//! no ciphertext is stolen.

use super::cipher::{BlockKey, MAX_BLOCK};
use super::mode::Iv;

/// A cipher with the two keys of XTS.
pub(super) struct Xts {
    pub(super) data: Box<dyn BlockKey>,
    pub(super) tweak: Box<dyn BlockKey>,
}

impl Xts {
    pub(super) fn encrypt(&self, iv: &Iv, unit: &mut [u8]) {
        let first = self.first_tweak(iv);
        whiten(first, unit);
        self.data.encrypt(unit);
        whiten(first, unit);
    }

    pub(super) fn decrypt(&self, iv: &Iv, unit: &mut [u8]) {
        let first = self.first_tweak(iv);
        whiten(first, unit);
        self.data.decrypt(unit);
        whiten(first, unit);
    }

    fn first_tweak(&self, iv: &Iv) -> u128 {
        let mut tweak = *iv;
        self.tweak.encrypt(&mut tweak);
        u128::from_le_bytes(tweak)
    }
}

/// Mixes the tweaks, each the one before times x in GF(2^128), into the blocks.
fn whiten(mut tweak: u128, unit: &mut [u8]) {
    let (blocks, rest) = unit.as_chunks_mut::<MAX_BLOCK>();
    debug_assert!(rest.is_empty(), "whole blocks");
    for block in blocks {
        *block = (u128::from_le_bytes(*block) ^ tweak).to_le_bytes();
        let carry = (tweak >> 127) * 0x87;
        tweak = (tweak << 1) ^ carry;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::cipher::CipherAlgorithm;

    fn xts(algorithm: CipherAlgorithm, data: &[u8], tweak: &[u8]) -> Xts {
        Xts { data: algorithm.keyed(data).unwrap(), tweak: algorithm.keyed(tweak).unwrap() }
    }

    fn hex(text: &str) -> Vec<u8> {
        let digits: Vec<u8> =
            text.chars().filter_map(|c| c.to_digit(16)).map(|d| d as u8).collect();
        digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect()
    }

    fn unit(sector: u64) -> Iv {
        u128::from(sector).to_le_bytes()
    }

    /// IEEE 1619-2007, annex B, vectors 1 to 3: data units of 32 bytes.
    #[test]
    fn the_vectors_of_the_standard_with_two_blocks() {
        let rows = [
            (
                0x00,
                0x00,
                0,
                0x00,
                "917cf69ebd68b2ec9b9fe9a3eadda692cd43d2f59598ed858c02c2652fbf922e",
            ),
            (
                0x11,
                0x22,
                0x33_3333_3333,
                0x44,
                "c454185e6a16936e39334038acef838bfb186fff7480adc4289382ecd6d394f0",
            ),
        ];
        for (key1, key2, sector, plain, wanted) in rows {
            let xts = xts(CipherAlgorithm::Aes128, &[key1; 16], &[key2; 16]);
            let mut bytes = [plain; 32];
            xts.encrypt(&unit(sector), &mut bytes);
            assert_eq!(bytes.to_vec(), hex(wanted));
            xts.decrypt(&unit(sector), &mut bytes);
            assert_eq!(bytes, [plain; 32]);
        }
        let descending: Vec<u8> = (0xf0..=0xff).rev().collect();
        let xts = xts(CipherAlgorithm::Aes128, &descending, &[0x22; 16]);
        let mut bytes = [0x44; 32];
        xts.encrypt(&unit(0x33_3333_3333), &mut bytes);
        let wanted = "af85336b597afc1a900b2eb21ec949d292df4c047e0b21532186a5971a227a89";
        assert_eq!(bytes.to_vec(), hex(wanted));
    }

    /// Annex B, vectors 4 and 10: data units of 512 bytes, by their first blocks.
    #[test]
    fn the_vectors_of_the_standard_with_a_whole_sector() {
        let plain: Vec<u8> = (0..512).map(|i| i as u8).collect();
        let rows = [
            (
                CipherAlgorithm::Aes128,
                "27182818284590452353602874713526",
                "31415926535897932384626433832795",
                0,
                "27a7479befa1d476489f308cd4cfa6e2",
            ),
            (
                CipherAlgorithm::Aes256,
                "2718281828459045235360287471352662497757247093699959574966967627",
                "3141592653589793238462643383279502884197169399375105820974944592",
                0xff,
                "1c3b3a102f770386e4836c99e370cf9b",
            ),
        ];
        for (algorithm, key1, key2, sector, first) in rows {
            let xts = xts(algorithm, &hex(key1), &hex(key2));
            let mut bytes = plain.clone();
            xts.encrypt(&unit(sector), &mut bytes);
            assert_eq!(bytes[..16], hex(first)[..], "{algorithm:?}");
            xts.decrypt(&unit(sector), &mut bytes);
            assert_eq!(bytes, plain);
        }
    }
}
