//! Which slices are in memory: a hash table that is read without a lock.
//!
//! Buckets are singly linked lists. All changes are made under the table's mutex; readers walk a
//! list under a pin of the table's grace period, which keeps every link they can reach allocated. A
//! reader that stands on a removed link goes on from there: it may miss a slice inserted since,
//! never reach freed memory.
//!
//! D1. A link's slice never changes, and its `next` only while it is in the table.
//! D2. A link is freed only after its removal, which unlinks it first and then takes a tag: when
//!     that has elapsed, no pin is left whose holder may stand on the link, or under the mutex.
//! D3. Pins end before the functions of this file return: none is held across an await. So what was
//!     removed is freed soon, however long requests take, and memory stays near the budget.
//!
//! The grace period is one of the table's own, not that of the image: see D3. A pin of it is some
//! loads and two plain stores; a collector for all threads would take a full barrier.
#![expect(unsafe_code, reason = "readers follow links that are freed after grace periods")]

use crate::qcow2::slice::{Slice, SliceNumber};
use blockplex_drain::{Grace, GraceEpoch, GracePin};
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicPtr, Ordering};

/// Removals for which the grace period moves on by one step, which costs a system call.
const STEP: usize = 16;
/// Steps in which a grace period elapses while nobody pins.
const STEPS: usize = 3;

struct Link {
    slice: Arc<Slice>,
    next: AtomicPtr<Link>,
}

/// See the page.
pub(super) struct SliceDirectory {
    buckets: Box<[AtomicPtr<Link>]>,
    readers: Grace,
    changes: Mutex<Changes>,
}

/// What changes need.
#[derive(Default)]
struct Changes {
    /// The numbers of all slices in the table, in the order in which eviction comes by.
    order: VecDeque<SliceNumber>,
    /// Removed links, oldest first, that readers may stand on; each is owned by its place here. (An
    /// atomic, since that may go from thread to thread as those of the lists do.)
    removed: VecDeque<(GraceEpoch, AtomicPtr<Link>)>,
    /// Removals since the last step.
    since_step: usize,
}

/// A reader's pin.
struct Pinned<'a> {
    readers: &'a Grace,
    loop_index: usize,
    pin: GracePin,
}

impl Drop for Pinned<'_> {
    #[inline]
    fn drop(&mut self) {
        self.readers.unpin(self.loop_index, self.pin);
    }
}

impl SliceDirectory {
    /// A table for about `capacity` slices.
    pub(super) fn new(capacity: usize) -> SliceDirectory {
        let buckets = (capacity.max(8) * 2).next_power_of_two();
        SliceDirectory {
            buckets: (0..buckets).map(|_| AtomicPtr::default()).collect(),
            readers: Grace::new(),
            changes: Mutex::default(),
        }
    }

    #[inline]
    fn bucket(&self, number: SliceNumber) -> &AtomicPtr<Link> {
        // Neighbouring slices fall into different buckets.
        let mixed = number.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(20);
        &self.buckets[mixed as usize & (self.buckets.len() - 1)]
    }

    /// Calls `look` with a slice if it is in memory. On the thread of that loop; takes no lock.
    /// `look` must be short.
    #[inline]
    pub(super) fn with<R>(
        &self,
        number: SliceNumber,
        loop_index: usize,
        look: impl FnOnce(&Slice) -> R,
    ) -> Option<R> {
        let pin = self.readers.pin(loop_index);
        let _pinned = Pinned { readers: &self.readers, loop_index, pin };
        // SAFETY: the pin was taken before, and is given back after `look`.
        let link = unsafe { self.find(number) }?;
        Some(look(&link.slice))
    }

    /// The link of a slice.
    ///
    /// # Safety
    ///
    /// From before the call until after the last use of the link, the caller holds either a pin of
    /// `readers` or the mutex.
    #[inline]
    unsafe fn find(&self, number: SliceNumber) -> Option<&Link> {
        // Acquire, here and below: partner of the Releases in `insert` and `remove`.
        let mut place = self.bucket(number).load(Ordering::Acquire);
        loop {
            // SAFETY: `place` is null or a link that was reachable after the caller's pin or lock
            // began, which is not freed before that ends (D2).
            let link = unsafe { place.as_ref() }?;
            if link.slice.number() == number {
                return Some(link);
            }
            place = link.next.load(Ordering::Acquire);
        }
    }

    /// A reference to a slice in memory, which keeps it there.
    pub(super) fn get(&self, number: SliceNumber) -> Option<Arc<Slice>> {
        // Under the mutex: a reference that eviction did not count must not come into being.
        let _changes = self.changes.lock();
        // SAFETY: we hold the mutex.
        unsafe { self.find(number) }.map(|link| Arc::clone(&link.slice))
    }

    /// Adds a slice, unless there is one of its number; gives the one that is in the table.
    pub(super) fn insert(&self, slice: Slice) -> Arc<Slice> {
        let mut changes = self.changes.lock();
        let number = slice.number();
        // SAFETY: we hold the mutex.
        if let Some(link) = unsafe { self.find(number) } {
            return Arc::clone(&link.slice);
        }
        let slice = Arc::new(slice);
        let bucket = self.bucket(number);
        // Relaxed: the list is changed under the mutex only.
        let next = AtomicPtr::new(bucket.load(Ordering::Relaxed));
        let link = Box::into_raw(Box::new(Link { slice: Arc::clone(&slice), next }));
        // Release: partner of the Acquires in `find`; a reader sees the link complete.
        bucket.store(link, Ordering::Release);
        changes.order.push_back(number);
        slice
    }

    /// Removes slices that nobody refers to, longest unused first, until at most `keep` are left
    /// or none can go. Says how many are left.
    pub(super) fn evict(&self, keep: usize) -> usize {
        let mut changes = self.changes.lock();
        // Twice around: the first visit may only take the mark of use away.
        let mut visits = changes.order.len() * 2;
        while changes.order.len() > keep && visits > 0 {
            visits -= 1;
            let Some(number) = changes.order.pop_front() else { break };
            if !self.remove(number, false, &mut changes) {
                changes.order.push_back(number);
            }
        }
        if changes.since_step >= STEP {
            // Many at once go at once.
            let many = changes.removed.len() > (STEPS + 1) * STEP;
            self.free_removed(if many { STEPS } else { 1 }, &mut changes);
        }
        changes.order.len()
    }

    /// Removes all slices, whoever refers to them.
    pub(super) fn clear(&self) {
        self.remove_all(true);
    }

    /// Removes the slices that nobody refers to and that were not used since the last visit.
    pub(super) fn remove_all_unused(&self) {
        self.remove_all(false);
    }

    fn remove_all(&self, in_any_case: bool) {
        let mut changes = self.changes.lock();
        for _ in 0..changes.order.len() {
            let Some(number) = changes.order.pop_front() else { break };
            if !self.remove(number, in_any_case, &mut changes) {
                changes.order.push_back(number);
            }
        }
        self.free_removed(STEPS, &mut changes);
    }

    /// Slices in memory.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.changes.lock().order.len()
    }

    /// Removes a slice if it is neither referred to nor lately used, or in any case.
    fn remove(&self, number: SliceNumber, in_any_case: bool, changes: &mut Changes) -> bool {
        let mut place = self.bucket(number);
        loop {
            // Relaxed: lists are changed under the mutex only, which the caller holds.
            let found = place.load(Ordering::Relaxed);
            // SAFETY: `found` is in the table, and links are removed and freed under the mutex only,
            // which the caller holds.
            let Some(link) = (unsafe { found.as_ref() }) else { return true };
            if link.slice.number() != number {
                place = &link.next;
                continue;
            }
            // New references are made under the mutex, or from ones that exist.
            let is_used = || Arc::strong_count(&link.slice) > 1 || link.slice.take_used();
            if !in_any_case && is_used() {
                return false;
            }
            // S2: what is dirty is referred to by the list of dirty slices.
            debug_assert!(in_any_case || !link.slice.is_dirty(), "S2, C2: a change would be lost");
            let next = link.next.load(Ordering::Relaxed);
            // Release: partner of the Acquires in `find`, for the links behind.
            place.store(next, Ordering::Release);
            // After the unlinking (D2).
            changes.removed.push_back((self.readers.current(), AtomicPtr::new(found)));
            changes.since_step += 1;
            return true;
        }
    }

    /// Moves the grace period on, up to `steps` steps, and frees what nobody can stand on any more.
    fn free_removed(&self, steps: usize, changes: &mut Changes) {
        changes.since_step = 0;
        for _ in 0..steps {
            self.readers.try_advance();
        }
        while let Some((tag, _)) = changes.removed.front()
            && self.readers.elapsed(*tag)
        {
            let Some((_, link)) = changes.removed.pop_front() else { return };
            free(link.into_inner());
        }
    }
}

/// Frees a link, if there is one; gives what came behind it. It must be the caller's alone.
fn free(link: *mut Link) -> *mut Link {
    if link.is_null() {
        return link;
    }
    // SAFETY: links come from `Box::into_raw` in `insert`, and nobody else has this one: it was
    // removed and its grace period is over (D2), or the whole table is going.
    let link = unsafe { Box::from_raw(link) };
    link.next.into_inner()
}

impl Drop for SliceDirectory {
    fn drop(&mut self) {
        // `&mut self` shows that there is no reader, and every link has one place that owns it.
        for bucket in &mut self.buckets {
            let mut place = std::mem::replace(bucket.get_mut(), ptr::null_mut());
            while !place.is_null() {
                place = free(place);
            }
        }
        for (_, link) in self.changes.get_mut().removed.drain(..) {
            free(link.into_inner());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Weak;
    use std::sync::atomic::AtomicBool;

    fn slice(number: SliceNumber) -> Slice {
        let words = [number; 64];
        Slice::new(number, &words.map(u64::to_be_bytes).concat(), |_, _| false)
    }

    #[test]
    fn eviction_spares_slices_that_are_referred_to() {
        let directory = SliceDirectory::new(4);
        let held = directory.insert(slice(3));
        for number in 10..30 {
            directory.insert(slice(number));
        }
        assert_eq!(directory.evict(2), 2);
        assert!(directory.get(3).is_some());
        drop(held);
        assert_eq!(directory.evict(0), 0);
        assert!(directory.get(3).is_none());
    }

    #[test]
    fn a_second_slice_of_one_number_is_not_taken() {
        let directory = SliceDirectory::new(4);
        let first = directory.insert(slice(3));
        assert!(Arc::ptr_eq(&first, &directory.insert(slice(3))));
        assert_eq!(directory.len(), 1);
    }

    #[test]
    fn readers_see_whole_slices_while_others_come_and_go() {
        let directory = SliceDirectory::new(8);
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for reader in 0..2 {
                let (directory, stop) = (&directory, &stop);
                scope.spawn(move || {
                    while !stop.load(Ordering::Relaxed) {
                        for number in 0..40 {
                            let seen = directory.with(number, reader, |slice| {
                                (0..64).all(|index| slice.entry(index) == number)
                            });
                            assert_ne!(seen, Some(false), "slice {number} is torn");
                        }
                    }
                });
            }
            for round in 0..2000_u64 {
                directory.insert(slice(round % 40));
                directory.evict(8);
            }
            stop.store(true, Ordering::Relaxed);
        });
        assert!(directory.len() <= 8);
    }

    #[test]
    fn what_was_removed_is_freed_when_no_reader_stands_on_it() {
        let directory = SliceDirectory::new(4);
        let weak = Arc::downgrade(&directory.insert(slice(3)));
        let looked = directory.with(3, 0, |slice| {
            directory.clear();
            directory.clear();
            assert!(directory.get(3).is_none());
            assert_eq!(weak.strong_count(), 1, "freed under a reader");
            slice.entry(5)
        });
        assert_eq!(looked, Some(3));
        directory.clear();
        assert_eq!(weak.strong_count(), 0, "kept without a reader");
    }

    #[test]
    fn few_removed_slices_wait_to_be_freed_while_others_come_and_go() {
        let directory = SliceDirectory::new(4);
        let mut weak = Vec::new();
        for number in 0..1000 {
            weak.push(Arc::downgrade(&directory.insert(slice(number))));
            directory.evict(4);
        }
        let kept = |weak: &[Weak<Slice>]| weak.iter().filter(|s| s.strong_count() > 0).count();
        assert!(kept(&weak) <= 4 + (STEPS + 1) * STEP, "{} slices in memory", kept(&weak));
        for number in 0..1000 {
            weak.push(Arc::downgrade(&directory.insert(slice(number))));
        }
        directory.evict(4);
        assert_eq!(kept(&weak), 4, "many that go at once are freed at once");
    }
}
