//! What an iothread does: a sequence of operations drawn from the seed, the
//! same in every run with the same options. (How they overlap is up to the
//! machine.)
//!
//! Writes stay inside sectors the thread owns; reads go anywhere. Most
//! operations are whole blocks, some a few sectors off their borders, for the
//! paths that align and split. One in eight goes to the thread's first chunk,
//! so that operations on the same sectors overlap even on a large disk. Erasing
//! operations prefer whole coarse chunks, the only ones that free clusters.

use super::layout::{Extent, Layout, Region};
use crate::random::Random;

/// One operation of an iothread. Extents are never empty, lie on the disk, and
/// those of reads and writes have at most one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Read and verify, whoever owns the sectors.
    Read(Extent),
    /// Write stamped sectors.
    Write {
        /// Where.
        extent: Extent,
        /// Durable by itself.
        force_unit_access: bool,
    },
    /// Write zeroes.
    WriteZeroes {
        /// Where.
        extent: Extent,
        /// The clusters may be freed.
        may_unmap: bool,
    },
    /// Give up the content: zeroes, or as before.
    Discard(Extent),
    /// Make durable what was completed.
    Flush,
}

/// Shares of a hundred operations; the rest are flushes.
const WRITE: u64 = 40;
const READ_OWN: u64 = 30;
const READ_ANY: u64 = 12;
const WRITE_ZEROES: u64 = 7;
const DISCARD: u64 = 7;

/// The operations of one iothread.
#[derive(Clone, Debug)]
pub struct Plan {
    random: Random,
    layout: Layout,
    thread: u32,
}

impl Plan {
    /// The plan of a thread of the layout.
    pub fn new(layout: &Layout, seed: u64, thread: u32) -> Self {
        Self { random: Random::new(seed, u64::from(thread)), layout: *layout, thread }
    }

    /// The next operation.
    pub fn operation(&mut self) -> Operation {
        let mut draw = self.random.below(100);
        // Whether the draw fell into the next share.
        let mut falls_in = |share: u64| {
            let inside = draw < share;
            draw = draw.wrapping_sub(share);
            inside
        };
        if falls_in(WRITE) {
            let force_unit_access = self.random.percent(5);
            Operation::Write { extent: self.owned(), force_unit_access }
        } else if falls_in(READ_OWN) {
            Operation::Read(self.owned())
        } else if falls_in(READ_ANY) {
            Operation::Read(self.anywhere())
        } else if falls_in(WRITE_ZEROES) {
            let may_unmap = self.random.percent(50);
            Operation::WriteZeroes { extent: self.erasable(), may_unmap }
        } else if falls_in(DISCARD) {
            Operation::Discard(self.erasable())
        } else {
            Operation::Flush
        }
    }

    /// A region, and one of the thread's chunks in it.
    fn owned_chunk(&mut self, coarse_percent: u8) -> Extent {
        let coarse = self.random.percent(coarse_percent);
        let region: Region = *if coarse { self.layout.coarse() } else { self.layout.fine() };
        let hot = self.random.below(8) == 0;
        let row = if hot { 0 } else { self.random.below(region.rows()) };
        self.layout.chunk(&region, self.thread, row)
    }

    /// At most a block of the thread's sectors.
    fn owned(&mut self) -> Extent {
        let chunk = self.owned_chunk(50);
        let block = self.layout.block_sectors();
        if self.random.percent(75) {
            // A chunk holds at least one block.
            let offset = self.random.below(chunk.count / block) * block;
            return Extent { first: chunk.first + offset, count: block };
        }
        self.part_of(chunk)
    }

    /// Some sectors of an extent, at most a block.
    fn part_of(&mut self, extent: Extent) -> Extent {
        let offset = self.random.below(extent.count);
        let most = self.layout.block_sectors().min(extent.count - offset);
        Extent { first: extent.first + offset, count: 1 + self.random.below(most) }
    }

    /// Sectors of any owners, or of none.
    fn anywhere(&mut self) -> Extent {
        self.part_of(Extent { first: 0, count: self.layout.sectors() })
    }

    /// Sectors of the thread to erase: a whole chunk, or part of one.
    fn erasable(&mut self) -> Extent {
        let chunk = self.owned_chunk(75);
        if self.random.percent(60) { chunk } else { self.part_of(chunk) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn operations(seed: u64, thread: u32) -> Vec<Operation> {
        let layout = Layout::new(1 << 14, 3, 8).unwrap();
        let mut plan = Plan::new(&layout, seed, thread);
        (0..20_000).map(|_| plan.operation()).collect()
    }

    #[test]
    fn a_seed_repeats_and_threads_differ() {
        assert_eq!(operations(1, 0), operations(1, 0));
        assert_ne!(operations(1, 0), operations(1, 1));
        assert_ne!(operations(1, 0), operations(2, 0));
    }

    #[test]
    fn changes_stay_inside_the_threads_own_sectors() {
        let layout = Layout::new(1 << 14, 3, 8).unwrap();
        for thread in 0..3 {
            for operation in operations(5, thread) {
                let (extent, most, changes) = match operation {
                    Operation::Write { extent, .. } => (extent, 8, true),
                    Operation::WriteZeroes { extent, .. } | Operation::Discard(extent) => {
                        (extent, 128, true)
                    }
                    Operation::Read(extent) => (extent, 8, false),
                    Operation::Flush => continue,
                };
                assert!((1..=most).contains(&extent.count), "{operation:?}");
                assert!(extent.first + extent.count <= 1 << 14, "{operation:?}");
                for sector in extent.first..extent.first + extent.count {
                    let owner = layout.place(sector).map(|place| place.owner);
                    assert!(!changes || owner == Some(thread), "{operation:?}");
                }
            }
        }
    }

    #[test]
    fn every_kind_and_every_sector_gets_its_turn() {
        let operations = operations(9, 1);
        let share = |wanted: fn(&Operation) -> bool| {
            operations.iter().filter(|operation| wanted(operation)).count() * 100 / 20_000
        };
        assert!((38..=42).contains(&share(|o| matches!(o, Operation::Write { .. }))));
        assert!((40..=44).contains(&share(|o| matches!(o, Operation::Read(_)))));
        assert!((6..=8).contains(&share(|o| matches!(o, Operation::WriteZeroes { .. }))));
        assert!((6..=8).contains(&share(|o| matches!(o, Operation::Discard(_)))));
        assert!((3..=5).contains(&share(|o| matches!(o, Operation::Flush))));
        assert!(share(|o| matches!(o, Operation::Discard(extent) if extent.count == 128)) > 0);
        let mut read = vec![false; 1 << 14];
        for operation in &operations {
            if let Operation::Read(extent) = operation {
                read[extent.first as usize..][..extent.count as usize].fill(true);
            }
        }
        assert!(read.iter().filter(|&&read| read).count() > read.len() * 6 / 10);
    }
}
