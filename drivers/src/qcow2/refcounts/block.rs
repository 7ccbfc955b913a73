//! A refcount block in memory.

use crate::qcow2::refcount_block::{self, RefcountError};
use std::ops::Range;

/// The granularity of writing blocks back, in bytes: what a page cache handles whole.
const WRITE_UNIT: usize = 4096;

/// See the page.
pub(super) struct Block {
    bytes: Box<[u8]>,
    order: u32,
    /// Refcounts that are zero.
    free: u64,
    /// None before it is zero.
    free_from: usize,
    /// What differs from the file.
    dirty: Option<Range<usize>>,
    /// A write of a snapshot is under way: the file is not up to date.
    pub(super) writing: bool,
    /// When it was last used, in the table's own time.
    pub(super) stamp: u64,
}

impl Block {
    /// The block with these bytes, as the file has it.
    pub(super) fn new(bytes: Box<[u8]>, order: u32) -> Block {
        let mut block =
            Block { bytes, order, free: 0, free_from: 0, dirty: None, writing: false, stamp: 0 };
        block.free = block.count_free();
        block
    }

    /// A block of zeros that the file does not have yet.
    pub(super) fn fresh(size: usize, order: u32) -> Block {
        let mut block = Block::new(vec![0; size].into_boxed_slice(), order);
        block.dirty = Some(0..size);
        block
    }

    pub(super) fn len(&self) -> usize {
        (self.bytes.len() * 8) >> self.order
    }

    pub(super) fn free(&self) -> u64 {
        self.free
    }

    pub(super) fn is_clean(&self) -> bool {
        self.dirty.is_none() && !self.writing
    }

    /// The refcount at `index`; 0 past the end.
    pub(super) fn get(&self, index: usize) -> u64 {
        refcount_block::get(&self.bytes, self.order, index).unwrap_or(0)
    }

    pub(super) fn set(&mut self, index: usize, value: u64) -> Result<(), RefcountError> {
        let before = self.get(index);
        refcount_block::set(&mut self.bytes, self.order, index, value)?;
        match (before, value) {
            (0, 1..) => self.free -= 1,
            (1.., 0) => {
                self.free += 1;
                self.free_from = self.free_from.min(index);
            }
            _ => {}
        }
        let start = ((index << self.order) / 8) & !(WRITE_UNIT - 1);
        let end = (start + WRITE_UNIT).min(self.bytes.len());
        self.mark(start..end);
        Ok(())
    }

    /// The first run of at most `want` zero refcounts at or after `from`.
    pub(super) fn free_run(&mut self, from: usize, want: u64) -> Option<(usize, u64)> {
        let first = self.first_free(from.max(self.free_from));
        if from <= self.free_from {
            self.free_from = first;
        }
        if first >= self.len() {
            return None;
        }
        let most = want.min((self.len() - first) as u64);
        let rest = (1..most).take_while(|step| self.get(first + *step as usize) == 0).count();
        Some((first, 1 + rest as u64))
    }

    /// The zero refcounts. A block has up to 2^24, so the common widths go by whole words.
    fn count_free(&self) -> u64 {
        fn zeros<const WIDTH: usize>(bytes: &[u8]) -> u64 {
            bytes.as_chunks::<WIDTH>().0.iter().filter(|word| **word == [0; WIDTH]).count() as u64
        }
        match self.order {
            0 => self.bytes.iter().map(|byte| u64::from(byte.count_zeros())).sum(),
            3 => zeros::<1>(&self.bytes),
            4 => zeros::<2>(&self.bytes),
            5 => zeros::<4>(&self.bytes),
            6 => zeros::<8>(&self.bytes),
            _ => (0..self.len()).filter(|index| self.get(*index) == 0).count() as u64,
        }
    }

    /// The first zero refcount at or after `from`; the length without one.
    fn first_free(&self, from: usize) -> usize {
        fn zero<const WIDTH: usize>(bytes: &[u8], from: usize) -> Option<usize> {
            let words = bytes.as_chunks::<WIDTH>().0.get(from..)?;
            words.iter().position(|word| *word == [0; WIDTH]).map(|steps| from + steps)
        }
        let found = match self.order {
            3 => zero::<1>(&self.bytes, from),
            4 => zero::<2>(&self.bytes, from),
            5 => zero::<4>(&self.bytes, from),
            6 => zero::<8>(&self.bytes, from),
            order => {
                // Several to a byte: skip the bytes that are all ones, as narrow refcounts are.
                let per_byte = 8 >> order;
                let skipped = self.bytes.get(from / per_byte..).map_or(0, |rest| {
                    rest.iter().take_while(|byte| **byte == u8::MAX).count() * per_byte
                });
                let start = if skipped == 0 { from } else { from - from % per_byte + skipped };
                (start..self.len()).find(|index| self.get(*index) == 0)
            }
        };
        found.unwrap_or(self.len())
    }

    /// The last refcount that is not zero.
    pub(super) fn last_used(&self) -> Option<usize> {
        (0..self.len()).rev().find(|index| self.get(*index) != 0)
    }

    fn mark(&mut self, range: Range<usize>) {
        self.dirty = Some(match &self.dirty {
            Some(dirty) => dirty.start.min(range.start)..dirty.end.max(range.end),
            None => range,
        });
    }

    /// Takes a snapshot of what differs from the file: its start and bytes.
    pub(super) fn take_dirty(&mut self) -> Option<(usize, Vec<u8>)> {
        let range = self.dirty.take()?;
        self.writing = true;
        let bytes = self.bytes.get(range.clone())?.to_vec();
        Some((range.start, bytes))
    }

    /// Takes back a snapshot whose write failed.
    pub(super) fn put_back(&mut self, start: usize, length: usize) {
        self.mark(start..start + length);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_search_finds_what_was_freed_below_its_mark() {
        let mut block = Block::new(vec![0; 512].into_boxed_slice(), 4);
        for index in 0..256 {
            block.set(index, 1).unwrap();
        }
        assert_eq!((block.free(), block.free_run(0, 9)), (0, None));
        for index in [7, 8, 200] {
            block.set(index, 0).unwrap();
        }
        assert_eq!(block.free_run(0, 9), Some((7, 2)));
        assert_eq!(block.free_run(8, 9), Some((8, 1)));
        assert_eq!(block.free_run(9, 1), Some((200, 1)));
        assert_eq!(block.free(), 3);
        assert_eq!(block.last_used(), Some(255));
    }

    #[test]
    fn every_width_finds_the_same_free_refcounts() {
        for order in 0..=6 {
            let mut block = Block::new(vec![0xff; 512].into_boxed_slice(), order);
            assert_eq!((block.free(), block.free_run(0, 1)), (0, None), "order {order}");
            let (first, last) = (block.len() / 3, block.len() - 1);
            for index in [first, last] {
                block.set(index, 0).unwrap();
            }
            assert_eq!(Block::new(block.bytes.clone(), order).free(), 2, "order {order}");
            for from in 0..block.len() {
                let expected = if from <= first { first } else { last };
                assert_eq!(block.free_run(from, 9), Some((expected, 1)), "order {order}, {from}");
            }
        }
    }

    #[test]
    fn only_the_changed_units_are_written() {
        let mut block = Block::new(vec![0; 65536].into_boxed_slice(), 4);
        block.set(2048, 3).unwrap();
        let (start, bytes) = block.take_dirty().unwrap();
        assert_eq!((start, bytes.len(), bytes[1]), (4096, 4096, 3));
        assert!(block.take_dirty().is_none() && !block.is_clean());
        block.put_back(start, bytes.len());
        assert_eq!(block.take_dirty().unwrap().0, 4096);
    }
}
