//! The second word of an extended L2 entry: what each of the 32 subclusters of a cluster is.
//!
//! A subcluster is allocated (its bytes are in the cluster's place), or reads as zeros, or is neither:
//! then it is the backing file's. Both at once (T16), an allocated one in a cluster that has no place
//! (T16b), and any bit beside a compressed cluster mean that the metadata is damaged.

#![cfg_attr(not(test), deny(clippy::indexing_slicing))]

use super::entry::{Cluster, EntryError, EntryRule, Table};

/// The subclusters of a cluster.
pub const SUBCLUSTERS: u32 = 32;

/// What the subclusters of a cluster are; bit `i` is subcluster `i`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Subclusters {
    /// Those whose bytes are in the cluster's place.
    pub allocated: u32,
    /// Those that read as zeros.
    pub zero: u32,
}

/// What one subcluster is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subcluster {
    /// Nowhere in this image.
    Unallocated,
    /// It reads as zeros.
    Zero,
    /// In its cluster's place.
    Data,
}

impl Subclusters {
    /// None of them is anything.
    pub const NONE: Subclusters = Subclusters { allocated: 0, zero: 0 };
    /// All read as zeros.
    pub const ALL_ZERO: Subclusters = Subclusters { allocated: 0, zero: u32::MAX };
    /// All are data.
    pub const ALL_DATA: Subclusters = Subclusters { allocated: u32::MAX, zero: 0 };

    /// What the word says.
    pub fn from_word(word: u64) -> Self {
        // Both halves by intent.
        Subclusters { allocated: word as u32, zero: (word >> 32) as u32 }
    }

    /// The word that says this.
    pub fn word(self) -> u64 {
        u64::from(self.zero) << 32 | u64::from(self.allocated)
    }

    /// Checks the bits against the entry's first word, `raw`, which says `cluster`.
    ///
    /// # Errors
    ///
    /// They cannot be; see the page.
    pub fn check(self, raw: u64, cluster: Cluster) -> Result<(), EntryError> {
        let refuse = |rule| Err(EntryError { table: Table::L2, raw, rule });
        let has_place = matches!(cluster, Cluster::Normal { .. });
        if self.allocated & self.zero != 0 {
            return refuse(EntryRule::SubclusterBoth(self.word()));
        }
        if matches!(cluster, Cluster::Compressed { .. }) && self != Subclusters::NONE {
            return refuse(EntryRule::CompressedSubclusters(self.word()));
        }
        if self.allocated != 0 && !has_place {
            return refuse(EntryRule::SubclusterNowhere(self.word()));
        }
        Ok(())
    }

    /// What subcluster `index` is, and the index of the first one after it that is something else.
    pub fn run(self, index: u32) -> (Subcluster, u32) {
        let bit = 1_u32.checked_shl(index).unwrap_or(0);
        let (kind, same) = if self.allocated & bit != 0 {
            (Subcluster::Data, self.allocated)
        } else if self.zero & bit != 0 {
            (Subcluster::Zero, self.zero)
        } else {
            (Subcluster::Unallocated, !(self.allocated | self.zero))
        };
        let others = !same & u32::MAX.checked_shl(index).unwrap_or(0);
        (kind, others.trailing_zeros())
    }
}

/// The bits of subclusters `first` up to `end`, which is not among them.
pub fn mask(first: u32, end: u32) -> u32 {
    let below = |index: u32| 1_u32.checked_shl(index).map_or(u32::MAX, |bit| bit - 1);
    below(end) & !below(first)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_end_where_something_else_begins() {
        let word = Subclusters::from_word(0x0000_0030_0000_0002);
        assert_eq!(word, Subclusters { allocated: 2, zero: 0x30 });
        assert_eq!(word.word(), 0x0000_0030_0000_0002);
        assert_eq!(word.run(0), (Subcluster::Unallocated, 1));
        assert_eq!(word.run(1), (Subcluster::Data, 2));
        assert_eq!(word.run(2), (Subcluster::Unallocated, 4));
        assert_eq!(word.run(4), (Subcluster::Zero, 6));
        assert_eq!(word.run(6), (Subcluster::Unallocated, 32));
        assert_eq!(Subclusters::ALL_DATA.run(31), (Subcluster::Data, 32));
        assert_eq!(Subclusters::ALL_ZERO.run(0), (Subcluster::Zero, 32));
    }

    #[test]
    fn masks_cover_their_range() {
        assert_eq!((mask(0, 32), mask(0, 0), mask(32, 32)), (u32::MAX, 0, 0));
        assert_eq!((mask(31, 32), mask(4, 6)), (1 << 31, 0x30));
    }

    #[test]
    fn impossible_bits_are_refused() {
        let place = Cluster::Normal { host: 65536, copied: true };
        let compressed = Cluster::Compressed { host: 65536, length: 512 };
        let judge = |word: u64, cluster| Subclusters::from_word(word).check(0, cluster).is_ok();
        assert!(!judge(0x0000_0001_ffff_ffff, place), "T16");
        assert!(!judge(1, Cluster::Unallocated), "T16b");
        assert!(!judge(1 << 32, compressed));
        assert!(judge(1 << 32, Cluster::Unallocated));
        assert!(judge(0xffff_0000_0000_ffff, place));
        assert!(judge(0, compressed) && judge(0, place));
    }
}
