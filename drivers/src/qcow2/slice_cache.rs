//! The slices of L2 tables that are in memory: found without a lock, loaded by one task for all,
//! evicted within a budget, and collected for write-back.
//!
//! ```text
//!   map() ─────────► directory ◄─── get / insert ─── tier 2
//!                                        │
//!   change() ──► slice, dirty list ──► take_dirty() ──► write-back
//! ```
//!
//! C1. The budget bounds the clean slices that nobody uses. Dirty slices and those in the hands of
//!     a task stay beyond it: nobody fails for want of a place. Tasks that make slices dirty start
//!     a write-back when half of the budget is dirty (or much in any case), so the excess is small,
//!     and goes when that has run.
//! C2. A slice is dropped from memory only when it is as on disk: whoever changes one holds a
//!     reference, the dirty list holds one until the snapshot is taken, and write-back holds one
//!     until its write has ended.

mod directory;

use super::locks::{self, Held, Ranked};
use super::slice::{Slice, SliceEditor, SliceNumber};
use blockplex_io::lock::{RangeGuard, RangeLock};
use directory::SliceDirectory;
use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Dirty slices that are written back whatever the budget is: what a write-back copies.
const MANY_DIRTY: usize = 1024;

/// See the page.
pub(super) struct SliceCache {
    directory: SliceDirectory,
    capacity: AtomicUsize,
    dirty: Mutex<Vec<Arc<Slice>>>,
    loading: Ranked<RangeLock, { locks::SLICE }>,
}

/// A changed slice and what is to be written of it.
pub(super) struct DirtySlice {
    pub(super) slice: Arc<Slice>,
    pub(super) bytes: Vec<u8>,
}

impl SliceCache {
    /// A cache that keeps `capacity` slices.
    pub(super) fn new(capacity: usize) -> SliceCache {
        SliceCache {
            directory: SliceDirectory::new(capacity),
            capacity: AtomicUsize::new(capacity),
            dirty: Mutex::new(Vec::new()),
            loading: Ranked::new(RangeLock::new()),
        }
    }

    /// Changes the budget, in slices.
    pub(super) fn set_capacity(&self, capacity: usize) {
        // Relaxed: a number on its own.
        self.capacity.store(capacity, Ordering::Relaxed);
        self.directory.evict(capacity);
    }

    /// Lets go what exceeds the budget and is as on disk.
    pub(super) fn trim(&self) {
        self.directory.evict(self.capacity());
    }

    fn capacity(&self) -> usize {
        // Relaxed: a number on its own.
        self.capacity.load(Ordering::Relaxed)
    }

    /// Calls `look` with a slice if it is in memory. Any thread; takes no lock.
    pub(super) fn with<R>(&self, number: SliceNumber, look: impl FnOnce(&Slice) -> R) -> Option<R> {
        self.directory.with(number, |slice| {
            slice.touch();
            look(slice)
        })
    }

    /// A slice, if it is in memory.
    pub(super) fn get(&self, number: SliceNumber) -> Option<Arc<Slice>> {
        let slice = self.directory.get(number)?;
        slice.touch();
        Some(slice)
    }

    /// Waits for the turn to load a slice. Who has it looks again before reading.
    pub(super) async fn loading_turn(&self, number: SliceNumber) -> Held<RangeGuard<'_>> {
        self.loading.turn(number).await
    }

    /// Adds a slice that was loaded, after making room for it.
    pub(super) fn insert(&self, slice: Slice) -> Arc<Slice> {
        self.directory.evict(self.capacity().saturating_sub(1));
        self.directory.insert(slice)
    }

    /// Changes a slice's entries in one step and remembers to write it back.
    pub(super) fn change<R>(
        &self,
        slice: &Arc<Slice>,
        change: impl FnOnce(&mut SliceEditor<'_>) -> R,
    ) -> R {
        let mut editor = slice.edit();
        let result = change(&mut editor);
        if editor.mark_dirty() {
            self.dirty.lock().push(Arc::clone(slice));
        }
        result
    }

    /// Whether so much is dirty that it should be written back.
    pub(super) fn wants_write_back(&self) -> bool {
        self.dirty.lock().len() > (self.capacity() / 2).clamp(4, MANY_DIRTY)
    }

    /// Snapshots of all slices that have changed since the last time. Whoever takes them writes
    /// them or puts them back.
    pub(super) fn take_dirty(&self) -> Vec<DirtySlice> {
        let slices = std::mem::take(&mut *self.dirty.lock());
        let snapshot = |slice: Arc<Slice>| {
            let bytes = slice.edit().snapshot();
            DirtySlice { slice, bytes }
        };
        slices.into_iter().map(snapshot).collect()
    }

    /// Takes back slices whose write failed.
    pub(super) fn put_back(&self, slices: Vec<DirtySlice>) {
        for DirtySlice { slice, .. } in slices {
            self.change(&slice, |_| ());
        }
    }

    /// Forgets all slices, none of which is dirty: the tables in the file have changed. While no
    /// request runs.
    pub(super) fn clear(&self) {
        debug_assert!(self.dirty.lock().is_empty(), "a dirty slice would be lost");
        self.directory.clear();
    }

    /// Forgets the slices that were not used since the last call and are as on disk.
    pub(super) fn remove_unused(&self) {
        self.directory.remove_all_unused();
    }

    /// Slices in memory now.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.directory.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slice_changed_after_its_snapshot_is_dirty_again() {
        let cache = SliceCache::new(4);
        let slice = cache.insert(Slice::new(1, &[0; 512], |_, _| false));
        cache.change(&slice, |editor| editor.set(3, 7));
        let taken = cache.take_dirty();
        assert_eq!(taken[0].bytes[31], 7);
        assert!(cache.take_dirty().is_empty());
        cache.change(&slice, |editor| editor.set(3, 8));
        let again = cache.take_dirty();
        assert_eq!(again[0].bytes[31], 8);
        cache.put_back(again);
        assert_eq!(cache.take_dirty().len(), 1, "a failed write leaves it dirty");
    }

    #[test]
    fn dirty_slices_outlive_the_budget() {
        let cache = SliceCache::new(2);
        for number in 0..8 {
            let slice = cache.insert(Slice::new(number, &[0; 512], |_, _| false));
            cache.change(&slice, |editor| editor.set(0, number + 1));
        }
        assert!(cache.wants_write_back());
        for number in 0..8 {
            assert_eq!(cache.with(number, |slice| slice.entry(0)), Some(number + 1));
        }
        drop(cache.take_dirty());
        cache.set_capacity(2);
        assert_eq!(cache.len(), 2);
    }
}
