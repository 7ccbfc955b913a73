//! The list of waiters that every coroutine lock keeps under its mutex: a slab of entries, linked
//! through indices in the order of their arrival.
//!
//! An entry is in one of two places: *linked* (it stands in the queue) or *detached* (it was taken
//! out of the queue by a waker and its future has not noticed yet). A future owns its entry by
//! [`Key`] and removes it when it completes or is dropped; a waker only detaches.
//!
//! 1. (WL1) The queue is sorted by ticket, and tickets are given in order of arrival: an entry
//!    that is put back with [`WaitList::relink`] comes before everyone who arrived after it.
//! 2. (WL2) A key is valid from [`WaitList::push_back`] until [`WaitList::remove`], and only its
//!    owner removes it; so using a key never meets a free slot.
//! 3. (WL3) No method drops or wakes a waker: what is displaced is returned, to be dropped after
//!    the caller has unlocked.
//!
//! Slots are reused, last freed first, so the slab allocates only when more waiters exist than ever
//! before. Their number is that of the tasks waiting, which admission bounds.

use smallvec::SmallVec;
use std::task::Waker;

/// Wakers taken under the mutex, to be woken by [`wake`] after it is unlocked. Eight cover the
/// usual batch of readers without an allocation.
pub(super) type Wakers = SmallVec<[Waker; 8]>;

/// Wakes everyone in `wakers`. The caller holds no mutex.
pub(super) fn wake(wakers: impl IntoIterator<Item = Waker>) {
    for waker in wakers {
        waker.wake();
    }
}

/// Names an entry of one list (WL2). The ticket tells it from a later entry in the same slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Key {
    slot: u32,
    ticket: u64,
}

/// A queue of waiters with a state `S` each.
#[derive(Debug)]
pub(super) struct WaitList<S> {
    slots: Vec<Slot<S>>,
    first_free: Option<u32>,
    head: Option<Key>,
    tail: Option<Key>,
    next_ticket: u64,
}

#[derive(Debug)]
enum Slot<S> {
    Free { next: Option<u32> },
    Used(Entry<S>),
}

#[derive(Debug)]
struct Entry<S> {
    ticket: u64,
    state: S,
    /// None until the future was polled, and after a waker took it.
    waker: Option<Waker>,
    linked: bool,
    prev: Option<Key>,
    next: Option<Key>,
}

/// What [`WaitList::remove`] took out. Dropped after unlocking (WL3).
#[derive(Debug)]
pub(super) struct Removed<S> {
    pub(super) state: S,
    _waker: Option<Waker>,
}

impl<S> WaitList<S> {
    pub(super) const fn new() -> Self {
        WaitList { slots: Vec::new(), first_free: None, head: None, tail: None, next_ticket: 0 }
    }

    /// Whether nobody stands in the queue; detached entries do not count.
    pub(super) fn is_empty(&self) -> bool {
        self.head.is_none()
    }

    /// The longest waiting entry of the queue.
    pub(super) fn front(&self) -> Option<Key> {
        self.head
    }

    /// The entry that arrived next after the linked entry `key`.
    pub(super) fn next(&self, key: Key) -> Option<Key> {
        self.entry(key).next
    }

    /// Adds an entry at the end of the queue. `waker` may come later, with
    /// [`set_waker`](Self::set_waker).
    pub(super) fn push_back(&mut self, state: S, waker: Option<Waker>) -> Key {
        let entry = Entry {
            // 2^64 arrivals at one per nanosecond take 584 years.
            ticket: self.next_ticket,
            state,
            waker,
            linked: false,
            prev: None,
            next: None,
        };
        self.next_ticket += 1;
        let key = self.store(entry);
        self.link_after(self.tail, key);
        key
    }

    /// Puts a detached entry back in its place by ticket (WL1). The scan passes only entries that
    /// were themselves put back, because everyone else in the queue arrived later.
    pub(super) fn relink(&mut self, key: Key) {
        debug_assert!(!self.entry(key).linked, "only a detached entry is put back");
        let mut before = None;
        let mut cursor = self.head;
        while let Some(other) = cursor {
            if other.ticket > key.ticket {
                break;
            }
            before = Some(other);
            cursor = self.entry(other).next;
        }
        self.link_after(before, key);
    }

    /// Takes a linked entry out of the queue; it stays valid until its owner removes it.
    pub(super) fn unlink(&mut self, key: Key) {
        let entry = self.entry_mut(key);
        debug_assert!(entry.linked, "only a linked entry is detached");
        entry.linked = false;
        let (prev, next) = (entry.prev.take(), entry.next.take());
        match prev {
            Some(prev) => self.entry_mut(prev).next = next,
            None => self.head = next,
        }
        match next {
            Some(next) => self.entry_mut(next).prev = prev,
            None => self.tail = prev,
        }
    }

    /// Frees an entry, linked or detached.
    pub(super) fn remove(&mut self, key: Key) -> Removed<S> {
        if self.entry(key).linked {
            self.unlink(key);
        }
        let next = self.first_free.replace(key.slot);
        match std::mem::replace(&mut self.slots[key.slot as usize], Slot::Free { next }) {
            Slot::Used(entry) => Removed { state: entry.state, _waker: entry.waker },
            Slot::Free { .. } => unreachable!("WL2: a key is removed once"),
        }
    }

    pub(super) fn state(&self, key: Key) -> &S {
        &self.entry(key).state
    }

    pub(super) fn state_mut(&mut self, key: Key) -> &mut S {
        &mut self.entry_mut(key).state
    }

    /// Whether the entry of `key` is still in the list: the only method that may be asked about a
    /// key whose owner is in doubt.
    pub(super) fn contains(&self, key: Key) -> bool {
        match self.slots.get(key.slot as usize) {
            Some(Slot::Used(entry)) => entry.ticket == key.ticket,
            Some(Slot::Free { .. }) | None => false,
        }
    }

    /// Makes `waker` the one to wake, and returns the waker that is not needed any more (WL3).
    pub(super) fn set_waker(&mut self, key: Key, waker: Waker) -> Option<Waker> {
        let slot = &mut self.entry_mut(key).waker;
        match slot {
            Some(old) if old.will_wake(&waker) => Some(waker),
            _ => slot.replace(waker),
        }
    }

    /// The waker to wake after unlocking; None if the future was not polled yet and so will see
    /// its new state at its first poll.
    pub(super) fn take_waker(&mut self, key: Key) -> Option<Waker> {
        self.entry_mut(key).waker.take()
    }

    fn store(&mut self, entry: Entry<S>) -> Key {
        let ticket = entry.ticket;
        let Some(slot) = self.first_free else {
            let slot = u32::try_from(self.slots.len()).expect("fewer than 2^32 tasks wait");
            self.slots.push(Slot::Used(entry));
            return Key { slot, ticket };
        };
        match std::mem::replace(&mut self.slots[slot as usize], Slot::Used(entry)) {
            Slot::Free { next } => self.first_free = next,
            Slot::Used(_) => unreachable!("the free list names free slots only"),
        }
        Key { slot, ticket }
    }

    /// Links `key` behind `prev`, or at the head.
    fn link_after(&mut self, prev: Option<Key>, key: Key) {
        let next = match prev {
            Some(prev) => self.entry_mut(prev).next.replace(key),
            None => self.head.replace(key),
        };
        match next {
            Some(next) => self.entry_mut(next).prev = Some(key),
            None => self.tail = Some(key),
        }
        let entry = self.entry_mut(key);
        entry.linked = true;
        entry.prev = prev;
        entry.next = next;
    }

    fn entry(&self, key: Key) -> &Entry<S> {
        match &self.slots[key.slot as usize] {
            Slot::Used(entry) if entry.ticket == key.ticket => entry,
            _ => unreachable!("WL2: a key outlives its entry"),
        }
    }

    fn entry_mut(&mut self, key: Key) -> &mut Entry<S> {
        match &mut self.slots[key.slot as usize] {
            Slot::Used(entry) if entry.ticket == key.ticket => entry,
            _ => unreachable!("WL2: a key outlives its entry"),
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn order(list: &WaitList<char>) -> String {
        let mut names = String::new();
        let mut cursor = list.front();
        let mut prev = None;
        while let Some(key) = cursor {
            assert_eq!(list.entry(key).prev, prev);
            names.push(*list.state(key));
            prev = cursor;
            cursor = list.next(key);
        }
        assert_eq!(list.tail, prev);
        names
    }

    #[test]
    fn entries_leave_from_any_place() {
        let mut list = WaitList::new();
        let keys: Vec<_> = "abcd".chars().map(|c| list.push_back(c, None)).collect();
        list.remove(keys[1]);
        assert_eq!(order(&list), "acd");
        list.remove(keys[3]);
        assert_eq!(order(&list), "ac");
        list.remove(keys[0]);
        list.remove(keys[2]);
        assert!(list.is_empty());
        assert_eq!(order(&list), "");
    }

    #[test]
    fn a_relinked_entry_stands_where_its_arrival_says() {
        let mut list = WaitList::new();
        let keys: Vec<_> = "abcd".chars().map(|c| list.push_back(c, None)).collect();
        for key in &keys[..3] {
            list.unlink(*key);
        }
        list.relink(keys[1]);
        list.relink(keys[2]);
        list.relink(keys[0]);
        assert_eq!(order(&list), "abcd");
        for key in &keys {
            list.unlink(*key);
        }
        list.relink(keys[3]);
        assert_eq!(order(&list), "d");
    }

    #[test]
    fn slots_are_reused_and_a_stale_key_is_not_found() {
        let mut list = WaitList::new();
        let first = list.push_back('a', None);
        assert!(list.contains(first));
        list.remove(first);
        assert!(!list.contains(first));
        for _ in 0..100 {
            let key = list.push_back('b', None);
            assert!(list.contains(key) && !list.contains(first));
            list.remove(key);
        }
        assert_eq!(list.slots.len(), 1);
    }
}
