//! A sequence count: several words that belong together, read as one without a lock.
//!
//! Not a coroutine lock: nothing here waits. Who changes the words excludes other writers by a lock
//! of its own; the count tells readers whether a change was under way while they looked.
//!
//! Q1. The count is odd while a change is under way, and grows with every change.
//! Q2. A value that [`SequenceCount::read`] gives was loaded while the count stood still at an even
//!     number: all of its words are from the same moment, and whatever happened before the change
//!     that left them is visible.

use crate::sync::atomic::{AtomicU64, Ordering, fence};

/// Looks that a reader takes before it gives up.
const ATTEMPTS: usize = if cfg!(loom) { 2 } else { 32 };

/// See the page.
#[derive(Debug, Default)]
pub struct SequenceCount(AtomicU64);

impl SequenceCount {
    /// A count at rest.
    pub fn new() -> SequenceCount {
        SequenceCount(AtomicU64::new(0))
    }

    /// What `load` gives, whose words must be atomics that change only within
    /// [`SequenceCount::change`]. None when changes came in between again and again: the caller
    /// then looks under the writers' lock. Any thread.
    pub fn read<T>(&self, load: impl Fn() -> T) -> Option<T> {
        for _ in 0..ATTEMPTS {
            // Acquire: partner of the Release at the end of `change`: the words of that change, and
            // what happened before it.
            let before = self.0.load(Ordering::Acquire);
            if before.is_multiple_of(2) {
                let value = load();
                // Partner of the fence in `change`: whoever saw a word of a change sees its count.
                fence(Ordering::Acquire);
                if self.0.load(Ordering::Relaxed) == before {
                    return Some(value);
                }
            }
            std::hint::spin_loop();
        }
        None
    }

    /// Runs `store`, which changes words. Only one thread at a time; `store` is short.
    pub fn change<T>(&self, store: impl FnOnce() -> T) -> T {
        // Relaxed: only this thread changes it now.
        let before = self.0.load(Ordering::Relaxed);
        self.0.store(before.wrapping_add(1), Ordering::Relaxed);
        fence(Ordering::Release);
        let result = store();
        self.0.store(before.wrapping_add(2), Ordering::Release);
        result
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_reader_within_a_change_is_told_to_look_elsewhere() {
        let count = SequenceCount::new();
        assert_eq!(count.read(|| 7), Some(7));
        count.change(|| assert_eq!(count.read(|| 7), None));
        assert_eq!(count.read(|| 7), Some(7));
    }
}
