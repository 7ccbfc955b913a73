//! Dirty bitmaps: which parts of a disk were written to since some moment.
//!
//! One bit stands for a *chunk* of the disk, a power of two of bytes. The bits lie in a tree of
//! fixed depth that grows where bits are set, so a bitmap of a huge disk that was hardly written to
//! costs next to nothing; a leaf all of whose bits are set needs no memory either.
//!
//! ```text
//!   top: 512 middles ─► middle: 256 leaves, and which of them are full ─► leaf: 32768 bits
//! ```
//!
//! M1. Marking takes no lock and loses nothing: any number of threads mark at once. A word that
//!     has the bits already is only read.
//! M2. Clearing is for whoever has made sure that nobody marks the same chunks meanwhile (a drain):
//!     such a mark may be lost. Marks of other chunks are not.
//! M3. No bit past the end of the disk is set, but for marks that overtake a smaller size; those
//!     are never stored.

pub(crate) mod tree;

use blockplex_graph::{Error, ErrorKind, Result};
use std::sync::atomic::{AtomicU64, Ordering};
use tree::{MAX_CHUNKS, Tree};

/// The smallest granularity, as a base-2 logarithm of bytes.
pub const MIN_GRANULARITY_BITS: u32 = 9;
/// The largest granularity, as a base-2 logarithm of bytes.
pub const MAX_GRANULARITY_BITS: u32 = 31;

/// See the page. Any thread may use one.
pub struct DirtyBitmap {
    granularity_bits: u32,
    /// Bytes of the disk.
    size: AtomicU64,
    tree: Tree,
}

impl DirtyBitmap {
    /// A bitmap of a disk of `size` bytes, all clean. One bit stands for `granularity` bytes.
    ///
    /// # Errors
    ///
    /// `InvalidArgument`: the granularity is not a power of two from 512 bytes to 2 GiB;
    /// `LimitExceeded`: more than 2^32 bits.
    pub fn new(size: u64, granularity: u64) -> Result<DirtyBitmap> {
        let range = 1 << MIN_GRANULARITY_BITS..=1_u64 << MAX_GRANULARITY_BITS;
        if !granularity.is_power_of_two() || !range.contains(&granularity) {
            let text =
                format!("granularity {granularity} is not a power of two from 512 to 2147483648");
            return Err(Error::new(ErrorKind::InvalidArgument, text));
        }
        let granularity_bits = granularity.trailing_zeros();
        check_size(size, granularity_bits)?;
        Ok(DirtyBitmap { granularity_bits, size: AtomicU64::new(size), tree: Tree::default() })
    }

    /// The bytes that one bit stands for.
    pub fn granularity(&self) -> u64 {
        1 << self.granularity_bits
    }

    /// The bytes of the disk.
    pub fn size(&self) -> u64 {
        // Relaxed: a number on its own; it changes while no request runs past it.
        self.size.load(Ordering::Relaxed)
    }

    /// The bits that stand for the disk.
    pub fn chunks(&self) -> u64 {
        self.size().div_ceil(self.granularity())
    }

    /// Marks what `length` bytes from `offset` on touch (M1). Nothing past the end.
    #[inline]
    pub fn mark(&self, offset: u64, length: u64) {
        let end = offset.saturating_add(length).min(self.size());
        if offset < end {
            self.tree.set(self.chunk(offset), self.chunk(end - 1));
        }
    }

    /// Cleans the chunks that lie in the range whole; the last one of the disk does when the range
    /// reaches the end of the disk (M2).
    pub fn clear(&self, offset: u64, length: u64) {
        let end = offset.saturating_add(length);
        let first = offset.div_ceil(self.granularity());
        let last = if end >= self.size() { self.chunks() } else { self.chunk(end) };
        if first < last {
            self.tree.clear(first, last - 1);
        }
    }

    /// Whether the chunk of this byte is dirty.
    pub fn is_dirty(&self, offset: u64) -> bool {
        offset < self.size() && self.tree.next_set(self.chunk(offset)) == Some(self.chunk(offset))
    }

    /// How many chunks are dirty.
    pub fn dirty_chunks(&self) -> u64 {
        self.tree.count()
    }

    /// The first dirty byte from `start` on, before `end`.
    pub fn next_dirty(&self, start: u64, end: u64) -> Option<u64> {
        let end = end.min(self.size());
        if start >= end {
            return None;
        }
        let found = self.tree.next_set(self.chunk(start))?;
        Some(start.max(found << self.granularity_bits)).filter(|at| *at < end)
    }

    /// The first clean byte from `start` on, before `end`.
    pub fn next_clean(&self, start: u64, end: u64) -> Option<u64> {
        let end = end.min(self.size());
        if start >= end {
            return None;
        }
        let found = self.tree.next_clear(self.chunk(start), self.chunk(end - 1))?;
        Some(start.max(found << self.granularity_bits)).filter(|at| *at < end)
    }

    /// The first dirty area from `start` on, before `end`, of at most `most` bytes: offset and
    /// length.
    pub fn next_dirty_area(&self, start: u64, end: u64, most: u64) -> Option<(u64, u64)> {
        let end = end.min(self.size());
        let first = self.next_dirty(start, end)?;
        let limit = end.min(first.saturating_add(most));
        let last = self.next_clean(first, limit).unwrap_or(limit);
        (last > first).then_some((first, last - first))
    }

    /// Marks all that is dirty in `other`, whose granularity may be another (M1).
    ///
    /// # Errors
    ///
    /// `InvalidArgument`: it is of a disk of another size.
    pub fn merge(&self, other: &DirtyBitmap) -> Result<()> {
        if self.size() != other.size() {
            let text = format!(
                "bitmaps are of different sizes (destination size is {}, source size is {}) and \
                 cannot be merged",
                self.size(),
                other.size()
            );
            return Err(Error::new(ErrorKind::InvalidArgument, text));
        }
        let mut at = 0;
        while let Some((offset, length)) = other.next_dirty_area(at, u64::MAX, u64::MAX) {
            self.mark(offset, length);
            at = offset + length;
        }
        Ok(())
    }

    /// Whether a disk may get this size, as far as the bitmap goes.
    ///
    /// # Errors
    ///
    /// As for [`DirtyBitmap::new`].
    pub fn check_size(&self, size: u64) -> Result<()> {
        check_size(size, self.granularity_bits)
    }

    /// The disk has another size, which was checked; what is new is clean. While nobody marks
    /// beyond the smaller of the two sizes.
    pub fn set_size(&self, size: u64) {
        let before = self.chunks();
        // Relaxed: as in `size`.
        self.size.store(size, Ordering::Relaxed);
        if self.chunks() < before {
            self.tree.clear(self.chunks(), before - 1);
        }
    }

    /// The bits from `chunk` on as bytes, the first bit the lowest of the first byte; `None` when
    /// all of them are clean. `chunk` is a multiple of 64, and so many bytes are a multiple of 8.
    pub(crate) fn bytes_at(&self, chunk: u64, length: usize) -> Option<Vec<u8>> {
        let end = chunk + length as u64 * 8;
        self.tree.next_set(chunk).filter(|found| *found < end)?;
        // A write that overtook a smaller size may have left marks behind the end.
        let words = (0..length as u64 / 8).map(|word| {
            let at = chunk + word * 64;
            self.tree.word(at) & self.inside(at)
        });
        Some(words.flat_map(u64::to_le_bytes).collect())
    }

    /// Marks the chunks of the bits in `bytes`, from `chunk` on, a multiple of 64.
    pub(crate) fn mark_bytes(&self, chunk: u64, bytes: &[u8]) {
        for (index, part) in (0..).zip(bytes.chunks(8)) {
            let mut word = [0; 8];
            for (byte, from) in word.iter_mut().zip(part) {
                *byte = *from;
            }
            let at = chunk + index * 64;
            self.tree.set_word(at, u64::from_le_bytes(word) & self.inside(at));
        }
    }

    /// Which of the 64 bits from `chunk` on are before the end of the disk.
    fn inside(&self, chunk: u64) -> u64 {
        let left = self.chunks().saturating_sub(chunk);
        if left >= 64 { u64::MAX } else { (1 << left) - 1 }
    }

    /// Marks `count` chunks from `chunk` on.
    pub(crate) fn mark_chunks(&self, chunk: u64, count: u64) {
        let end = chunk.saturating_add(count).min(self.chunks());
        if chunk < end {
            self.tree.set(chunk, end - 1);
        }
    }

    fn chunk(&self, offset: u64) -> u64 {
        offset >> self.granularity_bits
    }
}

impl std::fmt::Debug for DirtyBitmap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DirtyBitmap")
            .field("granularity", &self.granularity())
            .field("size", &self.size())
            .finish_non_exhaustive()
    }
}

fn check_size(size: u64, granularity_bits: u32) -> Result<()> {
    if size.div_ceil(1 << granularity_bits) > MAX_CHUNKS {
        let text = format!(
            "a bitmap of a disk of {size} bytes with granularity {} takes too much space: use a \
             larger granularity",
            1_u64 << granularity_bits
        );
        return Err(Error::new(ErrorKind::LimitExceeded, text));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
