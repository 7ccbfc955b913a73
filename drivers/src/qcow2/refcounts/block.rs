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
        block.free = (0..block.len()).filter(|index| block.get(*index) == 0).count() as u64;
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
        let mut first = from.max(self.free_from);
        while first < self.len() && self.get(first) != 0 {
            first += 1;
        }
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
