//! A scatter list that keeps its memory alive.
#![expect(unsafe_code, reason = "copies to and from memory that others may be writing")]

use super::IoBuffer;
use super::block::Block;
use crate::sync::Arc;
use smallvec::SmallVec;
use std::ptr;

/// Memory of an embedder (guest RAM, say) that requests may use.
///
/// # Safety
///
/// 1. Every range that the implementor's owner puts into an [`IoVector`] together with this value
///    is mapped, readable and writable until the value is dropped.
/// 2. The mapping does not move.
///
/// Other parties may write to the memory at any time (a guest does): Blockplex only copies to and
/// from it and never makes a Rust reference to it.
pub unsafe trait StableMemory: Send + Sync {}

/// Pieces that a list has without an allocation of its own.
const FEW: usize = 4;

#[derive(Clone)]
enum Keep {
    Block(Arc<Block>),
    Memory(#[expect(dead_code, reason = "held, not read")] Arc<dyn StableMemory>),
    Several(#[expect(dead_code, reason = "held, not read")] Box<[IoVector]>),
}

/// A scatter list of bytes, with what keeps them alive. Cloning shares the memory and the list.
///
/// One pointer wide: requests and completions carry it from place to place, and what was written
/// to memory word by word is slow to copy. The price is an allocation when it is made; who uses
/// the vectors that come back with completions again allocates nothing.
///
/// Positions and lengths are bytes. Copies beyond the end panic: lengths are always known to the
/// caller, never taken from input.
#[derive(Clone, Default)]
pub struct IoVector(Option<Arc<List>>);

struct List {
    keep: Keep,
    pieces: SmallVec<[libc::iovec; FEW]>,
    length: usize,
}

// SAFETY: the pieces point into memory that `keep` keeps valid from any thread (`Block` and
// `StableMemory` are Send + Sync), and are only used for raw copies and system calls.
unsafe impl Send for List {}
// SAFETY: as above.
unsafe impl Sync for List {}

impl List {
    fn of(keep: Keep, pieces: impl Iterator<Item = libc::iovec>) -> List {
        let pieces: SmallVec<[libc::iovec; FEW]> =
            pieces.filter(|piece| piece.iov_len > 0).collect();
        let length = pieces.iter().map(|piece| piece.iov_len).sum();
        List { keep, pieces, length }
    }
}

impl From<IoBuffer> for IoVector {
    fn from(buffer: IoBuffer) -> IoVector {
        let (block, length) = buffer.into_block();
        let piece = libc::iovec { iov_base: block.start().cast(), iov_len: length };
        IoVector::of(Keep::Block(block), std::iter::once(piece))
    }
}

impl IoVector {
    fn of(keep: Keep, pieces: impl Iterator<Item = libc::iovec>) -> IoVector {
        IoVector(Some(Arc::new(List::of(keep, pieces))))
    }

    /// A vector of no bytes, for requests without data.
    pub const fn empty() -> IoVector {
        IoVector(None)
    }

    /// A zeroed vector of `length` bytes in one aligned piece.
    pub fn zeroed(length: usize) -> IoVector {
        IoBuffer::zeroed(length).into()
    }

    /// A vector over an embedder's memory.
    ///
    /// # Safety
    ///
    /// Each piece lies wholly in memory for which `memory` keeps the promises of
    /// [`StableMemory`].
    pub unsafe fn from_memory(memory: Arc<dyn StableMemory>, pieces: &[libc::iovec]) -> IoVector {
        IoVector::of(Keep::Memory(memory), pieces.iter().copied())
    }

    /// Points a vector over an embedder's memory at other pieces of the same memory. The list's
    /// room is used again: a frontend that keeps the vectors that come back with completions
    /// allocates nothing for scattered requests.
    ///
    /// # Safety
    ///
    /// As for [`IoVector::from_memory`], with the memory that the vector was made with.
    pub unsafe fn set_pieces(&mut self, pieces: &[libc::iovec]) {
        let Some(shared) = &mut self.0 else { return };
        match Arc::get_mut(shared) {
            Some(list) => {
                list.pieces.clear();
                list.pieces.extend(pieces.iter().filter(|piece| piece.iov_len > 0).copied());
                list.length = list.pieces.iter().map(|piece| piece.iov_len).sum();
            }
            // A clone goes on with the old list.
            None => *self = IoVector::of(shared.keep.clone(), pieces.iter().copied()),
        }
    }

    /// The vectors' bytes, one after the other, without copying.
    pub fn concatenate(parts: &[IoVector]) -> IoVector {
        let pieces = parts.iter().flat_map(|part| part.iovecs().iter().copied());
        IoVector::of(Keep::Several(parts.into()), pieces)
    }

    /// Its length in bytes.
    #[inline]
    pub fn len(&self) -> usize {
        self.0.as_ref().map_or(0, |list| list.length)
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The pieces, as the kernel wants them. Valid as long as the vector lives.
    pub fn iovecs(&self) -> &[libc::iovec] {
        self.0.as_ref().map_or(&[], |list| &list.pieces)
    }

    /// Whether every piece starts and ends at a multiple of `alignment` bytes (a power of two).
    pub fn is_aligned(&self, alignment: usize) -> bool {
        let mask = alignment - 1;
        self.iovecs().iter().all(|p| (p.iov_base.addr() | p.iov_len) & mask == 0)
    }

    /// The `length` bytes at `start`, sharing the memory.
    pub fn slice(&self, start: usize, length: usize) -> IoVector {
        let mut pieces = SmallVec::new();
        self.for_each_piece(start, length, |base, count| {
            pieces.push(libc::iovec { iov_base: base.cast(), iov_len: count });
        });
        let list = self.0.as_ref();
        IoVector(list.map(|list| Arc::new(List { keep: list.keep.clone(), pieces, length })))
    }

    /// The address of `length` bytes at `start` when they lie in one piece.
    pub fn contiguous(&self, start: usize, length: usize) -> Option<*mut u8> {
        let mut skip = start;
        for piece in self.iovecs() {
            if skip < piece.iov_len {
                let fits = length <= piece.iov_len - skip;
                return fits.then(|| piece.iov_base.cast::<u8>().wrapping_add(skip));
            }
            skip -= piece.iov_len;
        }
        None
    }

    /// Copies `bytes` in, from position `start` on.
    pub fn copy_from_slice(&self, start: usize, bytes: &[u8]) {
        let mut rest = bytes.as_ptr();
        self.for_each_piece(start, bytes.len(), |base, count| {
            // SAFETY: `base` is valid for `count` bytes by B1; `rest` has at least `count` bytes
            // left, since the counts add up to `bytes.len()`; a Rust slice that overlaps the
            // vector's memory cannot exist by B2.
            unsafe { ptr::copy_nonoverlapping(rest, base, count) };
            rest = rest.wrapping_add(count);
        });
    }

    /// Copies bytes out, from position `start` on, filling `bytes`.
    pub fn copy_to_slice(&self, start: usize, bytes: &mut [u8]) {
        let mut rest = bytes.as_mut_ptr();
        self.for_each_piece(start, bytes.len(), |base, count| {
            // SAFETY: as in `copy_from_slice`, the other way round.
            unsafe { ptr::copy_nonoverlapping(base.cast_const(), rest, count) };
            rest = rest.wrapping_add(count);
        });
    }

    /// Copies `length` bytes of `source` (at `source_start`) to position `start`. The two may
    /// share memory.
    pub fn copy_from_vector(
        &self,
        start: usize,
        source: &IoVector,
        source_start: usize,
        length: usize,
    ) {
        let mut done = 0;
        source.for_each_piece(source_start, length, |from, count| {
            let mut from = from.cast_const();
            self.for_each_piece(start + done, count, |to, part| {
                // SAFETY: both are valid for `part` bytes by B1; `copy` allows overlap.
                unsafe { ptr::copy(from, to, part) };
                from = from.wrapping_add(part);
            });
            done += count;
        });
    }

    /// Sets `length` bytes from position `start` on to `byte`.
    pub fn fill(&self, start: usize, length: usize, byte: u8) {
        self.for_each_piece(start, length, |base, count| {
            // SAFETY: `base` is valid for `count` bytes by B1.
            unsafe { ptr::write_bytes(base, byte, count) };
        });
    }

    /// Whether the `length` bytes at `start` are zero at this moment.
    pub fn is_zero(&self, start: usize, length: usize) -> bool {
        let mut scratch = [0u8; 512];
        let mut done = 0;
        while done < length {
            let count = (length - done).min(scratch.len());
            let part = &mut scratch[..count];
            self.copy_to_slice(start + done, part);
            if part.iter().any(|byte| *byte != 0) {
                return false;
            }
            done += count;
        }
        true
    }

    /// A copy of all bytes.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len()];
        self.copy_to_slice(0, &mut bytes);
        bytes
    }

    /// The buffer that this vector was made from, when it is whole and nobody else shares it;
    /// otherwise the vector itself.
    pub fn into_buffer(mut self) -> Result<IoBuffer, IoVector> {
        let taken = match self.0.as_mut().and_then(Arc::get_mut) {
            Some(List { keep: Keep::Block(block), pieces, length }) => {
                let alone = Arc::get_mut(block).is_some();
                let whole = pieces.iter().all(|piece| piece.iov_base == block.start().cast());
                (alone && whole).then(|| (block.clone(), *length))
            }
            _ => None,
        };
        match taken {
            Some((block, length)) => {
                drop(self);
                Ok(IoBuffer::from_block(block, length))
            }
            None => Err(self),
        }
    }

    /// Calls `visit` with each contiguous part of `length` bytes at `start`.
    fn for_each_piece(&self, start: usize, length: usize, mut visit: impl FnMut(*mut u8, usize)) {
        let end = start.checked_add(length);
        assert!(
            end.is_some_and(|end| end <= self.len()),
            "{length} bytes at {start} lie outside a vector of {} bytes",
            self.len()
        );
        let (mut skip, mut left) = (start, length);
        for piece in self.iovecs() {
            if left == 0 {
                break;
            }
            if skip >= piece.iov_len {
                skip -= piece.iov_len;
                continue;
            }
            let count = (piece.iov_len - skip).min(left);
            visit(piece.iov_base.cast::<u8>().wrapping_add(skip), count);
            skip = 0;
            left -= count;
        }
    }
}

impl std::fmt::Debug for IoVector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IoVector")
            .field("length", &self.len())
            .field("pieces", &self.iovecs().len())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scattered() -> IoVector {
        IoVector::concatenate(&[
            IoBuffer::from_slice(b"abc").into(),
            IoVector::empty(),
            IoBuffer::from_slice(b"defgh").into(),
            IoBuffer::from_slice(b"i").into(),
        ])
    }

    #[test]
    fn slices_and_copies_cross_pieces() {
        let vector = scattered();
        assert_eq!(vector.len(), 9);
        assert_eq!(vector.slice(2, 6).to_vec(), b"cdefgh");
        vector.slice(1, 4).copy_from_slice(1, b"XY");
        assert_eq!(vector.to_vec(), b"abXYefghi");
        vector.fill(7, 2, 0);
        assert!(vector.is_zero(7, 2) && !vector.is_zero(6, 3));
        let target = IoVector::zeroed(6);
        target.copy_from_vector(1, &vector, 2, 5);
        assert_eq!(target.to_vec(), b"\0XYefg");
        assert!(vector.contiguous(3, 5).is_some() && vector.contiguous(2, 2).is_none());
    }

    struct Guest(#[expect(dead_code, reason = "keeps the bytes alive")] Box<[u8]>);

    // SAFETY: the bytes are boxed, so they stay where they are, until the value is dropped.
    unsafe impl StableMemory for Guest {}

    #[test]
    fn guest_memory_is_scattered_and_its_list_used_again() {
        let mut bytes = vec![0u8; 64].into_boxed_slice();
        let start = bytes.as_mut_ptr();
        let piece = |at: usize, length: usize| libc::iovec {
            iov_base: start.wrapping_add(at).cast(),
            iov_len: length,
        };
        let guest: Arc<dyn StableMemory> = Arc::new(Guest(bytes));
        // SAFETY: all pieces lie in the 64 bytes that `guest` keeps.
        let mut vector =
            unsafe { IoVector::from_memory(guest, &[piece(8, 4), piece(0, 0), piece(0, 2)]) };
        vector.copy_from_slice(0, b"abcdef");
        // SAFETY: as above.
        unsafe { vector.set_pieces(&[piece(0, 2), piece(8, 4)]) };
        assert_eq!(vector.to_vec(), b"efabcd");
        assert_eq!(vector.iovecs().len(), 2);
        let clone = vector.clone();
        // SAFETY: as above.
        unsafe { vector.set_pieces(&[piece(10, 2)]) };
        assert_eq!((vector.to_vec(), clone.to_vec()), (b"cd".to_vec(), b"efabcd".to_vec()));
        assert!(vector.into_buffer().is_err());
    }

    #[test]
    fn a_buffer_comes_back_only_when_it_is_not_shared() {
        let vector = IoBuffer::from_slice(b"data").into_vector();
        let clone = vector.clone();
        let vector = vector.into_buffer().unwrap_err();
        drop(clone);
        assert_eq!(&*vector.into_buffer().unwrap(), b"data");
        assert!(scattered().into_buffer().is_err());
        let tail = IoBuffer::from_slice(b"data").into_vector().slice(1, 3);
        assert!(tail.into_buffer().is_err(), "a slice is not the whole buffer");
    }

    #[test]
    #[should_panic(expected = "outside a vector")]
    fn copies_beyond_the_end_are_refused() {
        scattered().copy_from_slice(8, b"xy");
    }
}
