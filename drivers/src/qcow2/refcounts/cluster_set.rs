//! Hashing of cluster numbers.

use std::hash::Hasher;

/// Metadata is looked up for every entry of a slice that is read, so this hashes with one
/// multiplication; whoever chooses the numbers chooses only how slow his own image is.
#[derive(Default)]
pub(super) struct ClusterHasher(u64);

impl Hasher for ClusterHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(self.0.rotate_left(8) ^ u64::from(*byte));
        }
    }

    fn write_u64(&mut self, number: u64) {
        // The set takes its bits from both ends.
        self.0 = number.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(32) ^ number;
    }
}
