//! Which request comes next: one sequence for each iothread, decided by the
//! seed alone. O(1) a request, no allocation.
//!
//! Random order draws any block of the disk, with repetition, so iothreads
//! meet each other's blocks as a multiqueue guest's would. Sequential order
//! gives each iothread a slice of its own and starts over at its end: several
//! sequential streams over the same blocks would only measure the cache.

use crate::command_line::{Access, Order};
use crate::random::Random;

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Read a block.
    Read,
    /// Write a block.
    Write,
}

/// One request; all of a workload have the same length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// What it does.
    pub direction: Direction,
    /// Where, in bytes; a multiple of the block size.
    pub offset: u64,
}

/// Where the requests of a workload may go. Several iothreads on one disk share
/// its shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Order and direction.
    pub access: Access,
    /// Bytes of each request, above 0.
    pub block_bytes: u64,
    /// From the start of one block to the start of the next, above 0: at least `block_bytes`, or
    /// blocks overlap.
    pub step_bytes: u64,
    /// The part of the disk used, from its start, in bytes. What is left of it
    /// after the last whole block is not touched.
    pub span_bytes: u64,
    /// How many iothreads work on this disk, above 0.
    pub iothreads: u32,
}

/// The disk has less than one block for each sequential iothread, or less than
/// one at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooSmall {
    /// The bytes there would have to be.
    pub needed: u64,
}

impl std::fmt::Display for TooSmall {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let needed = crate::units::size(self.needed);
        write!(formatter, "the disk is too small for this load, which needs {needed}")
    }
}

impl std::error::Error for TooSmall {}

/// The requests of one iothread.
#[derive(Clone, Debug)]
pub struct Workload {
    random: Random,
    access: Access,
    step_bytes: u64,
    /// The blocks this iothread goes to: `first..first + blocks`, `blocks` > 0.
    first: u64,
    blocks: u64,
    /// The next block in sequential order, from `first`.
    next: u64,
}

impl Workload {
    /// The workload of iothread number `iothread` (below `shape.iothreads`).
    ///
    /// # Errors
    /// If there is no block for it.
    pub fn new(shape: &Shape, seed: u64, iothread: u32) -> Result<Self, TooSmall> {
        let steps = |room: u64| room / shape.step_bytes + 1;
        let total = shape.span_bytes.checked_sub(shape.block_bytes).map_or(0, steps);
        let iothreads = u64::from(shape.iothreads);
        let (first, blocks) = match shape.access.order {
            Order::Random => (0, total),
            Order::Sequential => {
                let slice = total / iothreads;
                (slice * u64::from(iothread), slice)
            }
        };
        if blocks == 0 {
            let fewest = match shape.access.order {
                Order::Random => 1,
                Order::Sequential => iothreads,
            };
            let others = (fewest - 1).saturating_mul(shape.step_bytes);
            return Err(TooSmall { needed: others.saturating_add(shape.block_bytes) });
        }
        Ok(Self {
            random: Random::new(seed, u64::from(iothread)),
            access: shape.access,
            step_bytes: shape.step_bytes,
            first,
            blocks,
            next: 0,
        })
    }

    /// The next request.
    pub fn request(&mut self) -> Request {
        let direction = match self.access.read_percent {
            100 => Direction::Read,
            0 => Direction::Write,
            percent if self.random.percent(percent) => Direction::Read,
            _ => Direction::Write,
        };
        let block = match self.access.order {
            Order::Random => self.random.below(self.blocks),
            Order::Sequential => {
                let block = self.next;
                self.next = if block + 1 == self.blocks { 0 } else { block + 1 };
                block
            }
        };
        Request { direction, offset: (self.first + block) * self.step_bytes }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(access: &str, span_bytes: u64, iothreads: u32) -> Shape {
        let access = access.parse().unwrap();
        Shape { access, block_bytes: 4096, step_bytes: 4096, span_bytes, iothreads }
    }

    #[test]
    fn blocks_lie_a_step_apart() {
        let shape = Shape { step_bytes: 65536, ..shape("write", 2 * 65536 + 4096, 1) };
        let mut workload = Workload::new(&shape, 1, 0).unwrap();
        let offsets = [0, 1, 2, 0].map(|step| step * 65536);
        assert_eq!(offsets.map(|_| workload.request().offset), offsets);
    }

    #[test]
    fn sequential_iothreads_walk_disjoint_slices_and_start_over() {
        let shape = shape("read", 8 * 4096 + 512, 2);
        for (iothread, blocks) in [(0, [0, 1, 2, 3, 0]), (1, [4, 5, 6, 7, 4])] {
            let mut workload = Workload::new(&shape, 1, iothread).unwrap();
            for block in blocks {
                let expected = Request { direction: Direction::Read, offset: block * 4096 };
                assert_eq!(workload.request(), expected);
            }
        }
    }

    #[test]
    fn random_requests_reach_every_block_and_nothing_else() {
        let mut workload = Workload::new(&shape("randread", 16 * 4096 + 4095, 4), 1, 3).unwrap();
        let mut seen = [false; 16];
        for _ in 0..1000 {
            let offset = workload.request().offset;
            assert_eq!(offset % 4096, 0);
            seen[(offset / 4096) as usize] = true;
        }
        assert_eq!(seen, [true; 16]);
    }

    #[test]
    fn the_mix_of_directions_is_the_one_asked_for() {
        let mut workload = Workload::new(&shape("randrw:70", 1 << 20, 1), 1, 0).unwrap();
        let reads = (0..100_000).filter(|_| workload.request().direction == Direction::Read);
        assert!((69_000..71_000).contains(&reads.count()));
        let mut writes = Workload::new(&shape("write", 1 << 20, 1), 1, 0).unwrap();
        assert!((0..100).all(|_| writes.request().direction == Direction::Write));
    }

    #[test]
    fn a_seed_repeats_and_iothreads_differ() {
        let offsets = |seed, iothread| {
            let mut workload =
                Workload::new(&shape("randrw:50", 1 << 30, 2), seed, iothread).unwrap();
            (0..32).map(|_| workload.request()).collect::<Vec<_>>()
        };
        assert_eq!(offsets(5, 0), offsets(5, 0));
        assert_ne!(offsets(5, 0), offsets(5, 1));
        assert_ne!(offsets(5, 0), offsets(6, 0));
    }

    #[test]
    fn a_disk_without_a_block_for_each_is_too_small() {
        assert_eq!(
            Workload::new(&shape("randread", 4095, 1), 1, 0).unwrap_err(),
            TooSmall { needed: 4096 }
        );
        assert_eq!(
            Workload::new(&shape("read", 3 * 4096, 4), 1, 0).unwrap_err(),
            TooSmall { needed: 4 * 4096 }
        );
    }
}
