//! Aligned buffers, recycled.

use super::IoBuffer;
use super::block::{Block, Spare};
use crate::sync::{Arc, Mutex};
use std::alloc::Layout;

/// Smallest and largest size class in bytes, as powers of two. Larger buffers are not kept.
const SMALLEST: u32 = 9;
const LARGEST: u32 = 21;

/// Recycles aligned buffers so that bounce buffers and cluster copies cost no page faults. Any
/// thread may take from it and give back to it; it keeps at most its budget at rest.
#[derive(Clone)]
pub struct BufferPool(Arc<Shelf>);

/// The resting place of a pool's memory, by size class.
pub(super) struct Shelf {
    inner: Mutex<Spares>,
    budget: usize,
}

#[derive(Default)]
struct Spares {
    classes: [Vec<Spare>; (LARGEST - SMALLEST + 1) as usize],
    bytes: usize,
}

impl BufferPool {
    /// A pool that keeps at most `budget` bytes at rest.
    pub fn new(budget: usize) -> BufferPool {
        BufferPool(Arc::new(Shelf { inner: Mutex::new(Spares::default()), budget }))
    }

    /// A buffer of `length` bytes with *unspecified* (initialised, but possibly old) contents: for
    /// callers that overwrite all of it.
    pub fn take(&self, length: usize) -> IoBuffer {
        let Some(class) = class_of(length) else { return IoBuffer::zeroed(length) };
        let spare = {
            let mut spares = self.0.inner.lock();
            let spare = spares.classes.get_mut(class).and_then(Vec::pop);
            if let Some(spare) = &spare {
                spares.bytes -= spare.layout().size();
            }
            spare
        };
        let block = match spare {
            Some(spare) => Block::reuse(spare, self.0.clone()),
            None => Block::allocate(layout_of(class), Some(self.0.clone())),
        };
        IoBuffer::from_block(Arc::new(block), length)
    }

    /// A buffer of `length` zero bytes.
    pub fn take_zeroed(&self, length: usize) -> IoBuffer {
        let mut buffer = self.take(length);
        buffer.fill(0);
        buffer
    }

    /// Bytes at rest now.
    pub fn bytes_at_rest(&self) -> usize {
        self.0.inner.lock().bytes
    }
}

impl Shelf {
    pub(super) fn put(&self, spare: Spare) {
        let size = spare.layout().size();
        let Some(class) = class_of(size) else { return };
        let mut spares = self.inner.lock();
        if spares.bytes + size > self.budget {
            return; // the spare frees itself, after the lock (it was moved in before it)
        }
        spares.bytes += size;
        if let Some(shelf) = spares.classes.get_mut(class) {
            shelf.push(spare);
        }
    }
}

/// The class that holds `length` bytes; none when it is larger than what the pool keeps.
fn class_of(length: usize) -> Option<usize> {
    let bits = length.max(1).checked_next_power_of_two()?.trailing_zeros().max(SMALLEST);
    (bits <= LARGEST).then_some((bits - SMALLEST) as usize)
}

fn layout_of(class: usize) -> Layout {
    let size = 1usize << (SMALLEST as usize + class);
    Layout::from_size_align(size, size.min(IoBuffer::ALIGNMENT))
        .unwrap_or_else(|_| unreachable!("a power of two up to 2 MiB is a valid layout"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_buffer_is_taken_again() {
        let pool = BufferPool::new(1 << 20);
        let mut first = pool.take(5000);
        first.fill(7);
        let address = first.as_ptr();
        drop(first);
        assert_eq!(pool.bytes_at_rest(), 8192);
        let second = pool.take(8192);
        assert_eq!(second.as_ptr(), address);
        assert_eq!(pool.bytes_at_rest(), 0);
        drop(second);
        assert!(pool.take_zeroed(8192).iter().all(|byte| *byte == 0));
    }

    #[test]
    fn the_pool_keeps_no_more_than_its_budget() {
        let pool = BufferPool::new(8192);
        let many: Vec<_> = (0..4).map(|_| pool.take(4096)).collect();
        drop(many);
        assert_eq!(pool.bytes_at_rest(), 8192);
        drop(pool.take(4 << 20));
        assert_eq!(pool.bytes_at_rest(), 8192);
    }

    #[test]
    fn memory_outlives_its_pool() {
        let pool = BufferPool::new(1 << 20);
        let mut buffer = pool.take(512);
        drop(pool);
        buffer.fill(1);
        assert_eq!(buffer.as_ptr().align_offset(512), 0);
    }
}
