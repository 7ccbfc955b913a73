//! Which sector belongs to which iothread.
//!
//! The disk has two regions, each divided into chunks that are dealt out to the
//! iothreads in rows, every row starting with another thread:
//!
//! ```text
//! row 0   0 1 2 3      fine region: a chunk is one block, so that a
//! row 1   3 0 1 2      cluster holds sectors of all threads
//! row 2   2 3 0 1      coarse region: a chunk is 64 KiB or more, so that a
//! …                    thread can discard whole clusters
//! ```
//!
//! What is left over after the last whole row of a region belongs to nobody, is
//! never written, and has to stay zero.
//!
//! Truths: L1: a sector has at most one owner. L2: each thread owns the same
//! number of sectors, numbered from 0 without gaps by [`Place::index`].

use std::fmt;

use crate::command_line::IOTHREADS_MAX;
use crate::units;

/// Sectors in a chunk of the coarse region, at least: qcow2's default cluster.
const COARSE_SECTORS: u64 = 128;

/// Some sectors in a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// The first one.
    pub first: u64,
    /// How many; above 0.
    pub count: u64,
}

/// Where a sector stands among those of its owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The iothread that writes it.
    pub owner: u32,
    /// Its number among the sectors of that thread.
    pub index: usize,
}

/// Rows of chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    first: u64,
    chunk: u64,
    rows: u64,
}

impl Region {
    /// How many chunks each thread has: one in each row.
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// The chunk of a thread in a row.
    fn extent(&self, threads: u64, thread: u32, row: u64) -> Extent {
        let column = (u64::from(thread) + row) % threads;
        Extent { first: self.first + (row * threads + column) * self.chunk, count: self.chunk }
    }

    /// The owner of a sector, and its number among the owner's in this region.
    fn place(&self, threads: u64, sector: u64) -> Option<(u32, u64)> {
        let offset = sector.checked_sub(self.first)?;
        let (chunk, within) = (offset / self.chunk, offset % self.chunk);
        let (row, column) = (chunk / threads, chunk % threads);
        // The inverse of `extent`; below `threads`, which fits.
        let owner = (column + threads - row % threads) % threads;
        (row < self.rows).then_some((owner as u32, row * self.chunk + within))
    }
}

/// The disk is too small to give every iothread a chunk in each region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooSmall {
    /// The sectors there would have to be.
    needed: u64,
}

impl fmt::Display for TooSmall {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let needed = units::size(self.needed.saturating_mul(512));
        write!(formatter, "the disk is too small for so many iothreads, which need {needed}")
    }
}

impl std::error::Error for TooSmall {}

/// The ownership of all sectors of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    sectors: u64,
    threads: u32,
    block: u64,
    fine: Region,
    coarse: Region,
}

impl Layout {
    /// The layout of a disk of so many sectors for so many threads (1 to
    /// [`IOTHREADS_MAX`]) whose requests have at most `block` sectors.
    ///
    /// # Errors
    /// If not every thread gets a chunk of both kinds.
    pub fn new(sectors: u64, threads: u32, block: u64) -> Result<Self, TooSmall> {
        debug_assert!(block > 0 && (1..=IOTHREADS_MAX).contains(&threads));
        let row = u64::from(threads);
        let chunk = COARSE_SECTORS.max(block.next_power_of_two());
        // Whole clusters only, whatever half of the disk is.
        let middle = (sectors / 2).next_multiple_of(chunk);
        let fine = Region { first: 0, chunk: block, rows: middle / (row * block) };
        let rows = sectors.saturating_sub(middle) / (row * chunk);
        let coarse = Region { first: middle, chunk, rows };
        if fine.rows == 0 || coarse.rows == 0 {
            // A coarse row is the longer one; twice it, and the rounding.
            return Err(TooSmall { needed: 2 * (row + 1) * chunk });
        }
        Ok(Self { sectors, threads, block, fine, coarse })
    }

    /// Sectors of the disk.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// The most sectors a read or write may have.
    pub fn block_sectors(&self) -> u64 {
        self.block
    }

    /// The region whose chunks are one block.
    pub fn fine(&self) -> &Region {
        &self.fine
    }

    /// The region whose chunks are whole clusters.
    pub fn coarse(&self) -> &Region {
        &self.coarse
    }

    /// The chunk of a thread in a row of a region of this layout.
    pub fn chunk(&self, region: &Region, thread: u32, row: u64) -> Extent {
        region.extent(u64::from(self.threads), thread, row)
    }

    /// How many sectors each thread owns (L2).
    pub fn owned_sectors(&self) -> usize {
        // Less than the disk has; a stress run's disk has at most 2^25.
        (self.fine.rows * self.fine.chunk + self.coarse.rows * self.coarse.chunk) as usize
    }

    /// All that a thread owns, and for thread 0 what nobody owns as well, in
    /// extents of at most a block: the shares of all threads are the disk.
    pub fn shares(&self, thread: u32) -> impl Iterator<Item = Extent> + use<> {
        let layout = *self;
        let chunks = [layout.fine, layout.coarse].into_iter().flat_map(move |region| {
            (0..region.rows).map(move |row| layout.chunk(&region, thread, row))
        });
        let rest = |region: Region, end: u64| {
            let first = region.first + region.rows * u64::from(layout.threads) * region.chunk;
            Extent { first, count: end - first }
        };
        let rests = [rest(layout.fine, layout.coarse.first), rest(layout.coarse, layout.sectors)];
        let rests = rests.into_iter().filter(move |_| thread == 0);
        let block = layout.block;
        chunks.chain(rests).flat_map(move |extent| {
            (0..extent.count).step_by(block as usize).map(move |offset| Extent {
                first: extent.first + offset,
                count: block.min(extent.count - offset),
            })
        })
    }

    /// Whose a sector is; `None` if nobody's.
    pub fn place(&self, sector: u64) -> Option<Place> {
        let threads = u64::from(self.threads);
        let (before, (owner, index)) = if sector < self.coarse.first {
            (0, self.fine.place(threads, sector)?)
        } else {
            (self.fine.rows * self.fine.chunk, self.coarse.place(threads, sector)?)
        };
        Some(Place { owner, index: (before + index) as usize })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_owner_has_its_sectors_numbered_without_gaps() {
        for (sectors, threads, block) in
            [(4096, 3, 8), (5000, 4, 3), (1024, 1, 1), (70_001, 7, 300)]
        {
            let layout = Layout::new(sectors, threads, block).unwrap();
            let mut seen = vec![vec![false; layout.owned_sectors()]; threads as usize];
            for sector in 0..sectors {
                if let Some(place) = layout.place(sector) {
                    let seen = &mut seen[place.owner as usize][place.index];
                    assert!(!std::mem::replace(seen, true), "sector {sector} twice");
                }
            }
            assert!(seen.iter().flatten().all(|&seen| seen), "{layout:?}");
        }
    }

    #[test]
    fn chunks_are_their_threads_and_lie_on_the_disk() {
        let layout = Layout::new(10_000, 5, 8).unwrap();
        for region in [layout.fine(), layout.coarse()] {
            for thread in 0..5 {
                for row in 0..region.rows() {
                    let extent = layout.chunk(region, thread, row);
                    assert_eq!(extent.count, region.chunk);
                    assert!(extent.first + extent.count <= layout.sectors());
                    for sector in extent.first..extent.first + extent.count {
                        assert_eq!(layout.place(sector).unwrap().owner, thread);
                    }
                }
            }
        }
    }

    #[test]
    fn a_fine_cluster_is_shared_and_a_coarse_one_is_not() {
        let layout = Layout::new(1 << 16, 4, 8).unwrap();
        let owners = |first: u64| {
            let mut owners: Vec<u32> =
                (first..first + 128).map(|sector| layout.place(sector).unwrap().owner).collect();
            owners.sort_unstable();
            owners.dedup();
            owners.len()
        };
        assert_eq!(owners(128), 4);
        let coarse = layout.chunk(layout.coarse(), 2, 1).first;
        assert_eq!(coarse % 128, 0);
        assert_eq!(owners(coarse), 1);
    }

    #[test]
    fn a_disk_of_the_size_asked_for_is_enough() {
        for (threads, block) in [(1, 1), (4, 8), (256, 8), (3, 1000), (2, 131_072)] {
            let TooSmall { needed } = Layout::new(1, threads, block).unwrap_err();
            assert!(Layout::new(needed, threads, block).is_ok(), "{threads} {block}");
        }
        assert!(TooSmall { needed: 2048 }.to_string().contains("1 MiB"));
    }

    #[test]
    fn the_shares_of_all_threads_are_the_disk() {
        for (sectors, threads, block) in [(4096, 3, 8), (5000, 4, 3), (70_001, 7, 300)] {
            let layout = Layout::new(sectors, threads, block).unwrap();
            let mut seen = vec![false; sectors as usize];
            for thread in 0..threads {
                for Extent { first, count } in layout.shares(thread) {
                    assert!((1..=block).contains(&count));
                    for sector in first..first + count {
                        assert!(!std::mem::replace(&mut seen[sector as usize], true), "{sector}");
                        let owner = layout.place(sector).map_or(0, |place| place.owner);
                        assert_eq!(owner, thread);
                    }
                }
            }
            assert!(seen.iter().all(|&seen| seen), "{layout:?}");
        }
    }

    #[test]
    fn nobody_owns_what_lies_beyond() {
        let layout = Layout::new(4096, 3, 8).unwrap();
        assert_eq!(layout.place(4096), None);
        assert_eq!(layout.place(u64::MAX), None);
    }
}
