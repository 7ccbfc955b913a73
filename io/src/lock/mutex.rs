//! [`CoMutex`]: a value behind a coroutine mutex.
//!
//! All waiting and waking is in `raw.rs`, which is safe code; this file adds the value, and the
//! only claim its `unsafe` rests on is that [`RawMutex`] lets one holder in at a time.
#![expect(unsafe_code, reason = "the value lives in an UnsafeCell that the raw lock guards")]

mod raw;

use raw::RawMutex;
use std::cell::UnsafeCell;
use std::fmt;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

/// A mutex that suspends the task that waits for it.
///
/// Fairness: waiters are woken in order of arrival, but a newcomer may take the lock while the
/// woken one is on its way (a strict hand-over would pay one wake-up of an event loop for every
/// acquisition). A waiter that finds the lock taken again keeps its place at the front and is
/// handed the lock by the next unlock: it loses that race at most once.
///
/// Any thread may call any method. Dropping the future of [`lock`](Self::lock) at any time is
/// safe; a turn that it had already been given goes to the next waiter.
pub struct CoMutex<T> {
    raw: RawMutex,
    /// Touched by the holder of `raw` only, or through `&mut self`.
    value: UnsafeCell<T>,
}

// SAFETY: a shared `CoMutex` gives access to the value to one holder at a time (`RawMutex`), who
// may be on any thread; that is sending the value, so `T: Send` is what it takes.
unsafe impl<T: Send> Sync for CoMutex<T> {}

impl<T> CoMutex<T> {
    /// An unlocked mutex around `value`.
    pub fn new(value: T) -> Self {
        CoMutex { raw: RawMutex::new(), value: UnsafeCell::new(value) }
    }

    /// A mutex whose cancelled waiters swallow their wake: the negative control of the models.
    #[cfg(loom)]
    #[doc(hidden)]
    pub fn new_without_pass_on(value: T) -> Self {
        CoMutex { raw: RawMutex::new_without_pass_on(), value: UnsafeCell::new(value) }
    }

    /// Waits for the lock. The task queues at the first poll.
    pub async fn lock(&self) -> CoMutexGuard<'_, T> {
        self.raw.lock().await;
        self.guard()
    }

    /// Takes the lock if it is free and nobody waits for it.
    pub fn try_lock(&self) -> Option<CoMutexGuard<'_, T>> {
        self.raw.try_lock().then(|| self.guard())
    }

    /// The value; no locking, because the borrow shows that there is no guard.
    pub fn get_mut(&mut self) -> &mut T {
        self.value.get_mut()
    }

    /// Unwraps the value.
    pub fn into_inner(self) -> T {
        self.value.into_inner()
    }

    /// Only for a caller that has just taken `raw`.
    fn guard(&self) -> CoMutexGuard<'_, T> {
        CoMutexGuard { mutex: self, value: PhantomData }
    }
}

impl<T: Default> Default for CoMutex<T> {
    fn default() -> Self {
        Self::new(T::default())
    }
}

impl<T: fmt::Debug> fmt::Debug for CoMutex<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = f.debug_struct("CoMutex");
        match self.try_lock() {
            Some(guard) => out.field("value", &*guard).finish(),
            None => out.finish_non_exhaustive(),
        }
    }
}

/// Access to the value of a [`CoMutex`]; dropping it, on any thread, unlocks.
#[must_use = "dropping the guard unlocks at once"]
pub struct CoMutexGuard<'a, T> {
    mutex: &'a CoMutex<T>,
    /// Makes the guard `Send` and `Sync` exactly as the `&mut T` that it stands for. Without it a
    /// guard of a `Cell` would be `Sync`.
    value: PhantomData<&'a mut T>,
}

impl<T> Deref for CoMutexGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: the guard exists only while its owner holds `raw`, so no other guard does, and
        // `&mut T` is only made from `&mut` this guard.
        unsafe { &*self.mutex.value.get() }
    }
}

impl<T> DerefMut for CoMutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as in `deref`; `&mut self` shows that no reference from `deref` is alive.
        unsafe { &mut *self.mutex.value.get() }
    }
}

impl<T> Drop for CoMutexGuard<'_, T> {
    fn drop(&mut self) {
        self.mutex.raw.unlock();
    }
}

impl<T: fmt::Debug> fmt::Debug for CoMutexGuard<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&**self, f)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::lock::testing::{Probe, block_on, on_threads};
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn is_send<T: Send>(_: &T) {}

    #[test]
    fn contended_counter_equals_the_atomic_counter() {
        let mutex = CoMutex::new(0);
        let atomic = AtomicUsize::new(0);
        on_threads(4, |_| {
            for _ in 0..5_000 {
                let future = async {
                    let mut guard = mutex.lock().await;
                    *guard += 1;
                    atomic.fetch_add(1, Ordering::Relaxed);
                };
                is_send(&future);
                block_on(future);
            }
        });
        assert_eq!(mutex.into_inner(), atomic.into_inner());
    }

    #[test]
    fn second_locker_waits_until_the_guard_is_dropped() {
        let mutex = CoMutex::new(());
        let guard = mutex.try_lock().unwrap();
        let mut second = Probe::new(mutex.lock());
        assert!(second.poll().is_none());
        assert!(mutex.try_lock().is_none());
        assert_eq!(second.wakes(), 0);
        drop(guard);
        assert_eq!(second.wakes(), 1);
        assert!(second.poll().is_some());
    }

    #[test]
    fn a_guard_is_dropped_on_another_thread() {
        let mutex = CoMutex::new(1);
        let guard = mutex.try_lock().unwrap();
        let mut waiter = Probe::new(mutex.lock());
        assert!(waiter.poll().is_none());
        std::thread::scope(|scope| scope.spawn(move || drop(guard)).join().unwrap());
        assert_eq!(*waiter.poll().unwrap(), 1);
    }

    #[test]
    fn a_woken_waiter_loses_at_most_one_race() {
        let mutex = CoMutex::new(());
        let guard = mutex.try_lock().unwrap();
        let mut first = Probe::new(mutex.lock());
        let mut second = Probe::new(mutex.lock());
        assert!(first.poll().is_none());
        assert!(second.poll().is_none());
        drop(guard); // tells `first`, leaves the lock free
        let barger = block_on(mutex.lock());
        assert!(first.poll().is_none()); // lost, and is owed the lock now
        drop(barger);
        assert_eq!(first.wakes(), 2);
        assert!(Probe::new(mutex.lock()).poll().is_none()); // nobody gets in between
        let guard = first.poll().unwrap();
        assert_eq!(second.wakes(), 0);
        drop(guard);
        assert_eq!(second.wakes(), 1);
        assert!(second.poll().is_some());
    }

    #[test]
    fn losers_keep_their_order_of_arrival() {
        let mutex = CoMutex::new(());
        let guard = mutex.try_lock().unwrap();
        let mut first = Probe::new(mutex.lock());
        let mut second = Probe::new(mutex.lock());
        assert!(first.poll().is_none());
        assert!(second.poll().is_none());
        drop(guard);
        drop(block_on(mutex.lock())); // tells `second` too
        let barger = block_on(mutex.lock());
        assert!(second.poll().is_none());
        assert!(first.poll().is_none());
        drop(barger);
        assert!(second.poll().is_none());
        assert!(first.poll().is_some());
    }

    #[test]
    fn a_dropped_waiter_passes_its_turn_on_in_every_state() {
        // How often the first waiter lost a race before it is dropped: Waiting, Notified, Granted.
        for (told, lost) in [(false, false), (true, false), (true, true)] {
            let mutex = CoMutex::new(());
            let mut holder = mutex.try_lock();
            let mut first = Probe::new(mutex.lock());
            let mut second = Probe::new(mutex.lock());
            assert!(first.poll().is_none());
            assert!(second.poll().is_none());
            if told {
                holder = None;
            }
            if lost {
                let barger = block_on(mutex.lock());
                assert!(first.poll().is_none());
                drop(barger);
            }
            drop(first);
            drop(holder);
            assert_eq!(second.wakes(), 1);
            assert!(second.poll().is_some());
            drop(second);
            assert!(mutex.try_lock().is_some());
        }
    }

    #[test]
    fn the_last_waiter_to_give_up_leaves_the_fast_path_open() {
        let mutex = CoMutex::new(());
        let guard = mutex.try_lock().unwrap();
        let mut waiter = Probe::new(mutex.lock());
        assert!(waiter.poll().is_none());
        drop(waiter);
        drop(guard);
        assert!(mutex.try_lock().is_some());
    }

    #[test]
    fn waiters_that_give_up_after_one_was_told_leave_the_fast_path_open() {
        let mutex = CoMutex::new(());
        let guard = mutex.try_lock().unwrap();
        let mut first = Probe::new(mutex.lock());
        let mut second = Probe::new(mutex.lock());
        assert!(first.poll().is_none());
        assert!(second.poll().is_none());
        drop(guard);
        drop(second);
        drop(first);
        assert!(mutex.try_lock().is_some());
    }

    #[test]
    fn a_waker_that_drops_a_waiter_does_not_deadlock() {
        // The waker of `outer` owns another waiter of the same mutex, as a task's last reference
        // owns the task. Replacing that waker drops the waiter, which locks the wait list.
        let mutex = std::sync::Arc::new(CoMutex::new(()));
        let guard = mutex.try_lock().unwrap();
        let owned = std::sync::Arc::clone(&mutex);
        let mut inner = Probe::new(async move { drop(owned.lock().await) });
        assert!(inner.poll().is_none());
        let mut outer = Probe::new(mutex.lock());
        assert!(outer.poll_with_waker_owning(inner).is_none());
        assert!(outer.poll().is_none());
        drop(guard);
        assert!(outer.poll().is_some());
    }

    #[test]
    fn get_mut_and_debug_show_the_value() {
        let mut mutex = CoMutex::new(1);
        *mutex.get_mut() = 7;
        assert_eq!(format!("{mutex:?}"), "CoMutex { value: 7 }");
        let guard = mutex.try_lock().unwrap();
        assert_eq!(format!("{mutex:?} {guard:?}"), "CoMutex { .. } 7");
    }
}
