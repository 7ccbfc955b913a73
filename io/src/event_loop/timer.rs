//! Timers of one loop: a 4-ary heap in which every entry knows its place, so that a sleep that is
//! dropped early leaves nothing behind.
//!
//! T1. `slots[entry.slot].place` is the entry's index in the heap.
//! T2. An entry's deadline is not before its parent's.

use std::task::Waker;

const ARITY: usize = 4;

/// Names one timer; stale once it fired or was removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TimerKey {
    slot: usize,
    generation: u64,
}

struct Entry {
    deadline: u64,
    /// Start order, so that equal deadlines fire in it; doubles as the slot's generation.
    order: u64,
    slot: usize,
}

struct Slot {
    generation: u64,
    place: usize,
    waker: Option<Waker>,
}

/// The heap. Times are nanoseconds of CLOCK_MONOTONIC.
#[derive(Default)]
pub(crate) struct Timers {
    heap: Vec<Entry>,
    slots: Vec<Slot>,
    free: Vec<usize>,
    orders: u64,
    frozen: bool,
}

impl Timers {
    /// Starts a timer that wakes `waker` once at or after `deadline`.
    pub(crate) fn insert(&mut self, deadline: u64, waker: Waker) -> TimerKey {
        self.orders += 1;
        let generation = self.orders;
        let place = self.heap.len();
        let filled = Slot { generation, place, waker: Some(waker) };
        let slot = match self.free.pop() {
            Some(slot) => {
                self.slots[slot] = filled;
                slot
            }
            None => {
                self.slots.push(filled);
                self.slots.len() - 1
            }
        };
        self.heap.push(Entry { deadline, order: generation, slot });
        self.sift_up(place);
        TimerKey { slot, generation }
    }

    /// Replaces the waker of a timer that has not fired; `false` if it has.
    pub(crate) fn update(&mut self, key: TimerKey, waker: &Waker) -> bool {
        match self.slots.get_mut(key.slot) {
            Some(slot) if slot.generation == key.generation => {
                match &mut slot.waker {
                    Some(old) => old.clone_from(waker),
                    none => *none = Some(waker.clone()),
                }
                true
            }
            _ => false,
        }
    }

    /// Takes a timer away; nothing happens if it has fired. The waker is to be dropped outside of
    /// any borrow: it may hold the last reference to a task.
    pub(crate) fn remove(&mut self, key: TimerKey) -> Option<Waker> {
        let slot = self.slots.get(key.slot)?;
        if slot.generation == key.generation { self.take_at(slot.place) } else { None }
    }

    /// The next deadline, if any timer can still fire.
    pub(crate) fn next(&self) -> Option<u64> {
        if self.frozen { None } else { self.heap.first().map(|entry| entry.deadline) }
    }

    /// The waker of one timer whose deadline is `now` or earlier.
    pub(crate) fn pop_expired(&mut self, now: u64) -> Option<Waker> {
        if self.next()? > now {
            return None;
        }
        self.take_at(0)
    }

    /// No timer fires from now on: those that run stay as they are until their owners drop them.
    pub(crate) fn freeze(&mut self) {
        self.frozen = true;
    }

    fn take_at(&mut self, place: usize) -> Option<Waker> {
        let entry = self.heap.swap_remove(place);
        if place < self.heap.len() {
            self.slots[self.heap[place].slot].place = place;
            self.sift_down(place);
            self.sift_up(place);
        }
        let slot = &mut self.slots[entry.slot];
        slot.generation = 0;
        self.free.push(entry.slot);
        slot.waker.take()
    }

    fn key_at(&self, place: usize) -> (u64, u64) {
        (self.heap[place].deadline, self.heap[place].order)
    }

    fn swap(&mut self, a: usize, b: usize) {
        self.heap.swap(a, b);
        self.slots[self.heap[a].slot].place = a;
        self.slots[self.heap[b].slot].place = b;
    }

    fn sift_up(&mut self, mut place: usize) {
        while place > 0 {
            let parent = (place - 1) / ARITY;
            if self.key_at(parent) <= self.key_at(place) {
                break;
            }
            self.swap(parent, place);
            place = parent;
        }
    }

    fn sift_down(&mut self, mut place: usize) {
        loop {
            let first = place * ARITY + 1;
            let children = first..(first + ARITY).min(self.heap.len());
            let Some(least) = children.min_by_key(|child| self.key_at(*child)) else { break };
            if self.key_at(place) <= self.key_at(least) {
                break;
            }
            self.swap(place, least);
            place = least;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn equal_deadlines_fire_in_start_order_and_only_when_due() {
        let mut timers = Timers::default();
        let a = timers.insert(5, Waker::noop().clone());
        let b = timers.insert(5, Waker::noop().clone());
        assert!(timers.pop_expired(4).is_none());
        assert!(timers.pop_expired(5).is_some());
        assert!(!timers.update(a, Waker::noop()));
        assert!(timers.update(b, Waker::noop()));
    }

    #[test]
    fn a_removed_timer_never_fires_and_its_slot_is_reused_safely() {
        let mut timers = Timers::default();
        let old = timers.insert(1, Waker::noop().clone());
        timers.remove(old);
        let new = timers.insert(2, Waker::noop().clone());
        timers.remove(old);
        assert!(timers.update(new, Waker::noop()));
        assert_eq!(timers.next(), Some(2));
        timers.freeze();
        assert_eq!(timers.next(), None);
        assert!(timers.pop_expired(9).is_none());
    }

    proptest! {
        #[test]
        fn timers_fire_in_deadline_order_whatever_is_removed(
            deadlines in prop::collection::vec(0u64..50, 1..80),
            removals in prop::collection::vec(any::<prop::sample::Index>(), 0..40),
        ) {
            let mut timers = Timers::default();
            let mut keys: Vec<_> = deadlines.iter().map(|d| (*d, timers.insert(*d, Waker::noop().clone()))).collect();
            for index in removals {
                if !keys.is_empty() {
                    let (_, key) = keys.swap_remove(index.index(keys.len()));
                    timers.remove(key);
                }
            }
            let mut want: Vec<_> = keys.iter().map(|(deadline, _)| *deadline).collect();
            want.sort_unstable();
            let mut got = Vec::new();
            while let Some(next) = timers.next() {
                prop_assert!(timers.pop_expired(next).is_some());
                got.push(next);
            }
            prop_assert_eq!(got, want);
        }
    }
}
