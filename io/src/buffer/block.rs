//! One aligned allocation, and its owner.
#![expect(unsafe_code, reason = "allocates and frees aligned memory by hand")]

use super::pool::Shelf;
use super::vector::IoVector;
use crate::sync::Arc;
use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

/// Raw aligned memory; freed, or put back on its pool's shelf, with its last reference.
pub(super) struct Block {
    start: NonNull<u8>,
    layout: Layout,
    shelf: Option<Arc<Shelf>>,
}

// SAFETY: a block is plain memory; who may touch it when is the business of `IoBuffer` (sole
// owner) and `IoVector` (raw copies only), not of the thread that holds it.
unsafe impl Send for Block {}
// SAFETY: as above: a shared block hands out nothing but its address.
unsafe impl Sync for Block {}

impl Block {
    /// Allocates `layout`, zeroed. `layout` must not be of size 0.
    pub(super) fn allocate(layout: Layout, shelf: Option<Arc<Shelf>>) -> Block {
        assert!(layout.size() > 0, "a block has at least one byte");
        // SAFETY: the size is not 0 (asserted above).
        let start = unsafe { alloc_zeroed(layout) };
        let Some(start) = NonNull::new(start) else { handle_alloc_error(layout) };
        Block { start, layout, shelf }
    }

    /// Takes over memory that a block of the same layout gave to a shelf.
    pub(super) fn reuse(spare: Spare, shelf: Arc<Shelf>) -> Block {
        let spare = std::mem::ManuallyDrop::new(spare);
        Block { start: spare.start, layout: spare.layout, shelf: Some(shelf) }
    }

    pub(super) fn start(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    pub(super) fn capacity(&self) -> usize {
        self.layout.size()
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        let spare = Spare { start: self.start, layout: self.layout };
        if let Some(shelf) = &self.shelf {
            shelf.put(spare);
        }
    }
}

/// Memory at rest on a shelf; frees itself when dropped.
pub(super) struct Spare {
    start: NonNull<u8>,
    layout: Layout,
}

// SAFETY: nobody else knows the address of memory at rest.
unsafe impl Send for Spare {}

impl Spare {
    pub(super) fn layout(&self) -> Layout {
        self.layout
    }
}

impl Drop for Spare {
    fn drop(&mut self) {
        // SAFETY: allocated by `Block::allocate` with this very layout, and owned by us alone.
        unsafe { dealloc(self.start.as_ptr(), self.layout) }
    }
}

/// An aligned, owned buffer. Any thread may hold it; it becomes an [`IoVector`] for a request and
/// comes back from it with [`IoVector::into_buffer`].
pub struct IoBuffer {
    block: Arc<Block>,
    length: usize,
}

impl IoBuffer {
    /// The alignment in bytes of buffers made by [`IoBuffer::zeroed`]: enough for O_DIRECT on every
    /// common device.
    pub const ALIGNMENT: usize = 4096;

    /// A zeroed buffer of `length` bytes, aligned to [`IoBuffer::ALIGNMENT`].
    pub fn zeroed(length: usize) -> IoBuffer {
        let layout = Layout::from_size_align(length.max(1), Self::ALIGNMENT)
            .unwrap_or_else(|_| panic!("a buffer of {length} bytes exceeds the address space"));
        IoBuffer { block: Arc::new(Block::allocate(layout, None)), length }
    }

    /// A buffer that holds a copy of `bytes`.
    pub fn from_slice(bytes: &[u8]) -> IoBuffer {
        let mut buffer = IoBuffer::zeroed(bytes.len());
        buffer.copy_from_slice(bytes);
        buffer
    }

    pub(super) fn from_block(block: Arc<Block>, length: usize) -> IoBuffer {
        assert!(length <= block.capacity(), "a buffer fits its block");
        IoBuffer { block, length }
    }

    pub(super) fn into_block(self) -> (Arc<Block>, usize) {
        (self.block, self.length)
    }

    /// Gives the memory to a request as a scatter list of one piece.
    pub fn into_vector(self) -> IoVector {
        IoVector::from(self)
    }
}

impl Deref for IoBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the block holds at least `length` initialised bytes, and we are its sole owner
        // (B2): no vector, hence no request, refers to it.
        unsafe { std::slice::from_raw_parts(self.block.start(), self.length) }
    }
}

impl DerefMut for IoBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`; `&mut self` makes this the only reference.
        unsafe { std::slice::from_raw_parts_mut(self.block.start(), self.length) }
    }
}

impl std::fmt::Debug for IoBuffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IoBuffer").field("length", &self.length).finish_non_exhaustive()
    }
}
