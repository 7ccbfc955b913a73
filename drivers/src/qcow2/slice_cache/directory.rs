//! Which slices are in memory: a hash table that is read without a lock.
//!
//! Buckets are singly linked lists. All changes are made under the table's mutex; readers walk a
//! list under an epoch guard, which keeps every link they can reach allocated. A reader that
//! stands on a removed link goes on from there: it may miss a slice inserted since, never reach
//! freed memory.
//!
//! D1. A link's slice never changes, and its `next` only while it is in the table.
//! D2. A link is freed only by its removal, which unlinks it first and then defers the rest until
//!     every guard that was there at that moment is gone.
//! D3. Guards end before the functions of this file return: none is held across an await. (A loop
//!     holds one of its own through each of its turns, so that these cost no barrier.)
#![expect(unsafe_code, reason = "readers follow links that are freed through epochs")]

use crate::qcow2::slice::{Slice, SliceNumber};
use crossbeam_epoch::{self as epoch, Atomic, Guard, Owned, Shared};
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;

struct Link {
    slice: Arc<Slice>,
    next: Atomic<Link>,
}

/// See the page.
pub(super) struct SliceDirectory {
    buckets: Box<[Atomic<Link>]>,
    /// The numbers of all slices in the table, in the order in which eviction comes by. Guards
    /// all changes.
    order: Mutex<VecDeque<SliceNumber>>,
}

impl SliceDirectory {
    /// A table for about `capacity` slices.
    pub(super) fn new(capacity: usize) -> SliceDirectory {
        let buckets = (capacity.max(8) * 2).next_power_of_two();
        SliceDirectory {
            buckets: (0..buckets).map(|_| Atomic::null()).collect(),
            order: Mutex::new(VecDeque::new()),
        }
    }

    #[inline]
    fn bucket(&self, number: SliceNumber) -> &Atomic<Link> {
        // Neighbouring slices fall into different buckets.
        let mixed = number.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(20);
        &self.buckets[mixed as usize & (self.buckets.len() - 1)]
    }

    /// Calls `look` with a slice if it is in memory. Any thread; takes no lock. `look` must be
    /// short and must not call this table.
    #[inline]
    pub(super) fn with<R>(&self, number: SliceNumber, look: impl FnOnce(&Slice) -> R) -> Option<R> {
        let guard = epoch::pin();
        let link = find(self.bucket(number), number, &guard)?;
        Some(look(&link.slice))
    }

    /// A reference to a slice in memory, which keeps it there.
    pub(super) fn get(&self, number: SliceNumber) -> Option<Arc<Slice>> {
        // Under the mutex: a reference that eviction did not count must not come into being.
        let _order = self.order.lock();
        let guard = epoch::pin();
        find(self.bucket(number), number, &guard).map(|link| Arc::clone(&link.slice))
    }

    /// Adds a slice, unless there is one of its number; gives the one that is in the table.
    pub(super) fn insert(&self, slice: Slice) -> Arc<Slice> {
        let mut order = self.order.lock();
        let guard = epoch::pin();
        let number = slice.number();
        let bucket = self.bucket(number);
        if let Some(link) = find(bucket, number, &guard) {
            return Arc::clone(&link.slice);
        }
        let slice = Arc::new(slice);
        // Relaxed: the list is changed under the mutex only.
        let next = Atomic::from(bucket.load(Ordering::Relaxed, &guard));
        // Release: partner of the Acquires in `find`; a reader sees the link complete.
        bucket.store(Owned::new(Link { slice: Arc::clone(&slice), next }), Ordering::Release);
        order.push_back(number);
        slice
    }

    /// Removes slices that nobody refers to, longest unused first, until at most `keep` are left
    /// or none can go. Says how many are left.
    pub(super) fn evict(&self, keep: usize) -> usize {
        let mut order = self.order.lock();
        let guard = epoch::pin();
        // Twice around: the first visit may only take the mark of use away.
        let mut visits = order.len() * 2;
        while order.len() > keep && visits > 0 {
            visits -= 1;
            let Some(number) = order.pop_front() else { break };
            if !self.remove(number, false, &guard) {
                order.push_back(number);
            }
        }
        order.len()
    }

    /// Removes all slices, whoever refers to them.
    pub(super) fn clear(&self) {
        let mut order = self.order.lock();
        let guard = epoch::pin();
        for number in order.drain(..) {
            self.remove(number, true, &guard);
        }
    }

    /// Removes the slices that nobody refers to and that were not used since the last visit.
    pub(super) fn remove_all_unused(&self) {
        let mut order = self.order.lock();
        let guard = epoch::pin();
        order.retain(|number| !self.remove(*number, false, &guard));
    }

    /// Slices in memory.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.order.lock().len()
    }

    /// Removes a slice if it is neither referred to nor lately used, or in any case. Under the
    /// mutex.
    fn remove(&self, number: SliceNumber, in_any_case: bool, guard: &Guard) -> bool {
        let mut place = self.bucket(number);
        loop {
            // Relaxed: lists are changed under the mutex only, which the caller holds.
            let found = place.load(Ordering::Relaxed, guard);
            // SAFETY: `found` was read from the table under the mutex, so nobody has removed it,
            // and the guard keeps it allocated (D2).
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
            let next = link.next.load(Ordering::Relaxed, guard);
            // Release: partner of the Acquires in `find`, for the links behind.
            place.store(next, Ordering::Release);
            // SAFETY: the link was just unlinked, by us alone under the mutex, so no new reader
            // reaches it; those that stand on it hold a guard, which the deferral waits for (D2).
            unsafe { guard.defer_destroy(found) };
            return true;
        }
    }
}

/// The link of `number` in a bucket's list.
#[inline]
fn find<'g>(bucket: &Atomic<Link>, number: SliceNumber, guard: &'g Guard) -> Option<&'g Link> {
    // Acquire, here and below: partner of the Releases in `insert` and `remove`.
    let mut place: Shared<'g, Link> = bucket.load(Ordering::Acquire, guard);
    loop {
        // SAFETY: `place` is null or a link that was reachable after the guard was made, which is
        // freed only after the guard is gone (D2).
        let link = unsafe { place.as_ref() }?;
        if link.slice.number() == number {
            return Some(link);
        }
        place = link.next.load(Ordering::Acquire, guard);
    }
}

impl Drop for SliceDirectory {
    fn drop(&mut self) {
        for bucket in &mut self.buckets {
            let mut place = std::mem::replace(bucket, Atomic::null());
            // SAFETY: `&mut self` shows that there is no other reader or writer, and every link in
            // a list is owned by the place that points to it.
            while let Some(link) = unsafe { place.try_into_owned() } {
                place = link.into_box().next;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
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
            for _ in 0..2 {
                scope.spawn(|| {
                    while !stop.load(Ordering::Relaxed) {
                        for number in 0..40 {
                            let seen = directory.with(number, |slice| {
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
}
