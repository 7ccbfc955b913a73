//! The anti-forensic splitter of LUKS: spreads a key over so many bytes that to overwrite some of
//! them destroys it.

use super::fill_random;
use super::hash::HashAlgorithm;
use blockplex_graph::Result;
use zeroize::Zeroizing;

/// `stripes` times the length of `key`, which must not be empty.
pub(super) fn split(hash: HashAlgorithm, key: &[u8], stripes: usize) -> Result<Zeroizing<Vec<u8>>> {
    let mut material = Zeroizing::new(vec![0; key.len() * stripes]);
    let random = key.len() * stripes.saturating_sub(1);
    let (head, last) = material.split_at_mut(random);
    fill_random(head)?;
    let block = diffused(hash, head, key.len());
    for ((to, a), b) in last.iter_mut().zip(key).zip(&*block) {
        *to = a ^ b;
    }
    Ok(material)
}

/// The key of `key_bytes` (not 0) that was split into `material`.
pub(super) fn merge(hash: HashAlgorithm, material: &[u8], key_bytes: usize) -> Zeroizing<Vec<u8>> {
    let (head, last) = material.split_at(material.len().saturating_sub(key_bytes));
    let mut key = diffused(hash, head, key_bytes);
    xor(&mut key, last);
    key
}

/// What all stripes but the last come to.
fn diffused(hash: HashAlgorithm, stripes: &[u8], key_bytes: usize) -> Zeroizing<Vec<u8>> {
    let mut block = Zeroizing::new(vec![0; key_bytes]);
    for stripe in stripes.chunks_exact(key_bytes) {
        xor(&mut block, stripe);
        diffuse(hash, &mut block);
    }
    block
}

fn xor(bytes: &mut [u8], with: &[u8]) {
    for (byte, other) in bytes.iter_mut().zip(with) {
        *byte ^= other;
    }
}

/// Each part of a digest's length becomes the digest of its number and itself.
fn diffuse(hash: HashAlgorithm, block: &mut [u8]) {
    let mut digest = hash.start();
    for (number, part) in (0_u32..).zip(block.chunks_mut(hash.digest_bytes())) {
        digest.update(&number.to_be_bytes());
        digest.update(part);
        let result = Zeroizing::new(digest.finalize_reset());
        part.iter_mut().zip(&**result).for_each(|(to, from)| *to = *from);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_comes_back_from_all_its_stripes_and_from_no_fewer() {
        for (name, hash) in HashAlgorithm::NAMES {
            for key_bytes in [16, 24, 32, 48, 64] {
                let key: Vec<u8> = (0..key_bytes as u8).collect();
                let mut material = split(hash, &key, 40).unwrap();
                assert_eq!(material.len(), key_bytes * 40);
                assert_eq!(*merge(hash, &material, key_bytes), key, "{name}");
                material[key_bytes + 1] ^= 1;
                assert_ne!(*merge(hash, &material, key_bytes), key, "{name}");
            }
        }
    }
}
