//! A set of host clusters, by number.

use std::collections::HashSet;
use std::hash::{BuildHasherDefault, Hasher};

/// A set of cluster numbers. Looked up for every entry of a slice that is read, so it hashes with
/// one multiplication; whoever chooses the numbers chooses only how slow his own image is.
pub(super) type ClusterSet = HashSet<u64, BuildHasherDefault<ClusterHasher>>;

/// See [`ClusterSet`].
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
