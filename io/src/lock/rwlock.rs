//! [`CoRwLock`]: a value behind a coroutine lock that many may read or one may write.
//!
//! As in `mutex.rs`, all waiting and waking is safe code in `raw.rs`; the `unsafe` here rests on
//! one claim: [`RawRwLock`] never has a writer beside anyone else.
#![expect(unsafe_code, reason = "the value lives in an UnsafeCell that the raw lock guards")]

mod raw;

use raw::{Access, RawRwLock};
use std::cell::UnsafeCell;
use std::fmt;
use std::marker::PhantomData;
use std::mem::ManuallyDrop;
use std::ops::{Deref, DerefMut};

/// A readers-writer lock that suspends the task that waits for it.
///
/// Fairness: strict order of arrival. A reader waits behind a queued writer even while others
/// read, so writers do not starve; consecutive readers at the front are let in together. The lock
/// is handed over to who is next, so while that task is being woken nobody can use the lock: for
/// data that is read on every request prefer a snapshot.
///
/// A task that reads must not ask to read again before it drops its guard: a writer that queued in
/// between would wait for the first guard and block the second.
///
/// Any thread may call any method. Dropping a pending future is safe at any time; a turn that it
/// had already been given goes to the next.
pub struct CoRwLock<T> {
    raw: RawRwLock,
    /// Read by holders of `raw`, written by its writer, or through `&mut self`.
    value: UnsafeCell<T>,
}

// SAFETY: a shared `CoRwLock` gives `&T` to several threads at once, which takes `T: Sync`, and
// `&mut T` to one holder on any thread (`RawRwLock`), which takes `T: Send`.
unsafe impl<T: Send + Sync> Sync for CoRwLock<T> {}

impl<T> CoRwLock<T> {
    /// An unlocked lock around `value`.
    pub fn new(value: T) -> Self {
        CoRwLock { raw: RawRwLock::new(), value: UnsafeCell::new(value) }
    }

    /// Waits for shared access. The task queues at the first poll.
    pub async fn read(&self) -> CoRwLockReadGuard<'_, T> {
        self.raw.lock(Access::Read).await;
        CoRwLockReadGuard { lock: self }
    }

    /// Waits for exclusive access. The task queues at the first poll.
    pub async fn write(&self) -> CoRwLockWriteGuard<'_, T> {
        self.raw.lock(Access::Write).await;
        self.write_guard()
    }

    /// Shared access, if nobody writes and nobody waits.
    pub fn try_read(&self) -> Option<CoRwLockReadGuard<'_, T>> {
        self.raw.try_lock(Access::Read).then(|| CoRwLockReadGuard { lock: self })
    }

    /// Exclusive access, if nobody reads, writes or waits.
    pub fn try_write(&self) -> Option<CoRwLockWriteGuard<'_, T>> {
        self.raw.try_lock(Access::Write).then(|| self.write_guard())
    }

    /// The value; no locking, because the borrow shows that there is no guard.
    pub fn get_mut(&mut self) -> &mut T {
        self.value.get_mut()
    }

    /// Unwraps the value.
    pub fn into_inner(self) -> T {
        self.value.into_inner()
    }

    /// Only for a caller that has just taken `raw` for writing.
    fn write_guard(&self) -> CoRwLockWriteGuard<'_, T> {
        CoRwLockWriteGuard { lock: self, value: PhantomData }
    }
}

impl<T: Default> Default for CoRwLock<T> {
    fn default() -> Self {
        Self::new(T::default())
    }
}

impl<T: fmt::Debug> fmt::Debug for CoRwLock<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = f.debug_struct("CoRwLock");
        match self.try_read() {
            Some(guard) => out.field("value", &*guard).finish(),
            None => out.finish_non_exhaustive(),
        }
    }
}

/// Shared access to the value of a [`CoRwLock`]; dropping it, on any thread, unlocks.
#[must_use = "dropping the guard unlocks at once"]
pub struct CoRwLockReadGuard<'a, T> {
    lock: &'a CoRwLock<T>,
}

impl<'a, T> CoRwLockReadGuard<'a, T> {
    /// Turns the shared access into exclusive access. **Not atomic**: unless this is the only
    /// reader and nobody waits, the shared access is given up and the task queues as a writer
    /// behind those who wait already, who may change the value; whatever was read before must be
    /// read again.
    ///
    /// Two readers may upgrade at the same time; they write one after the other. If the future is
    /// dropped, the shared access is gone too.
    pub async fn upgrade(self) -> CoRwLockWriteGuard<'a, T> {
        let guard = ManuallyDrop::new(self);
        let lock = guard.lock;
        if !lock.raw.try_upgrade() {
            // From here the future owns what the guard held.
            lock.raw.upgrade().await;
        }
        lock.write_guard()
    }
}

impl<T> Deref for CoRwLockReadGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: the guard exists only while its owner holds `raw` for reading, so there is no
        // write guard and nobody makes a `&mut T`.
        unsafe { &*self.lock.value.get() }
    }
}

impl<T> Drop for CoRwLockReadGuard<'_, T> {
    fn drop(&mut self) {
        self.lock.raw.unlock(Access::Read);
    }
}

impl<T: fmt::Debug> fmt::Debug for CoRwLockReadGuard<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&**self, f)
    }
}

/// Exclusive access to the value of a [`CoRwLock`]; dropping it, on any thread, unlocks.
#[must_use = "dropping the guard unlocks at once"]
pub struct CoRwLockWriteGuard<'a, T> {
    lock: &'a CoRwLock<T>,
    /// Makes the guard `Send` and `Sync` as the `&mut T` that it stands for.
    value: PhantomData<&'a mut T>,
}

impl<'a, T> CoRwLockWriteGuard<'a, T> {
    /// Turns the exclusive access into shared access without letting a writer in between; readers
    /// at the front of the queue are let in.
    pub fn downgrade(self) -> CoRwLockReadGuard<'a, T> {
        let guard = ManuallyDrop::new(self);
        guard.lock.raw.downgrade();
        CoRwLockReadGuard { lock: guard.lock }
    }
}

impl<T> Deref for CoRwLockWriteGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: the guard exists only while its owner holds `raw` for writing, so no other guard
        // does, and `&mut T` is only made from `&mut` this guard.
        unsafe { &*self.lock.value.get() }
    }
}

impl<T> DerefMut for CoRwLockWriteGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as in `deref`; `&mut self` shows that no reference from `deref` is alive.
        unsafe { &mut *self.lock.value.get() }
    }
}

impl<T> Drop for CoRwLockWriteGuard<'_, T> {
    fn drop(&mut self) {
        self.lock.raw.unlock(Access::Write);
    }
}

impl<T: fmt::Debug> fmt::Debug for CoRwLockWriteGuard<'_, T> {
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
        let lock = CoRwLock::new(0);
        let atomic = AtomicUsize::new(0);
        on_threads(4, |thread| {
            for round in 0..2_000 {
                let future = async {
                    if (round + thread) % 3 == 0 {
                        let before = *lock.read().await;
                        assert!(before <= atomic.load(Ordering::SeqCst));
                    }
                    let mut guard = match round % 2 {
                        0 => lock.read().await.upgrade().await,
                        _ => lock.write().await,
                    };
                    atomic.fetch_add(1, Ordering::SeqCst);
                    *guard += 1;
                    let guard = guard.downgrade();
                    assert_eq!(*guard, atomic.load(Ordering::SeqCst));
                };
                is_send(&future);
                block_on(future);
            }
        });
        assert_eq!(lock.into_inner(), atomic.into_inner());
    }

    #[test]
    fn readers_share_and_a_writer_is_alone() {
        let lock = CoRwLock::new(());
        let one = lock.try_read().unwrap();
        let two = lock.try_read().unwrap();
        assert!(lock.try_write().is_none());
        drop(one);
        assert!(lock.try_write().is_none());
        drop(two);
        let writer = lock.try_write().unwrap();
        assert!(lock.try_read().is_none());
        assert!(lock.try_write().is_none());
        drop(writer);
        assert!(lock.try_read().is_some());
    }

    #[test]
    fn a_reader_waits_behind_a_queued_writer() {
        let lock = CoRwLock::new(());
        let reading = lock.try_read().unwrap();
        let mut writer = Probe::new(lock.write());
        assert!(writer.poll().is_none());
        assert!(lock.try_read().is_none());
        let mut readers = [(); 3].map(|()| Probe::new(lock.read()));
        assert!(readers.iter_mut().all(|reader| reader.poll().is_none()));
        drop(reading);
        assert_eq!(writer.wakes(), 1);
        let writing = writer.poll().unwrap();
        assert!(readers.iter_mut().all(|reader| reader.poll().is_none()));
        drop(writing);
        assert!(readers.iter().all(|reader| reader.wakes() == 1));
        let guards = readers.each_mut().map(|reader| reader.poll().unwrap());
        assert!(lock.try_write().is_none());
        drop(guards);
        assert!(lock.try_write().is_some());
    }

    #[test]
    fn a_cancelled_writer_lets_the_readers_behind_it_in() {
        let lock = CoRwLock::new(());
        let reading = lock.try_read().unwrap();
        let mut writer = Probe::new(lock.write());
        let mut reader = Probe::new(lock.read());
        assert!(writer.poll().is_none());
        assert!(reader.poll().is_none());
        drop(writer);
        assert_eq!(reader.wakes(), 1);
        assert!(reader.poll().is_some());
        drop(reading);
        assert!(lock.try_write().is_some());
    }

    #[test]
    fn a_cancelled_grant_goes_to_the_next() {
        for access in [Access::Read, Access::Write] {
            let lock = CoRwLock::new(());
            let writing = lock.try_write().unwrap();
            let mut granted = Probe::new(async {
                match access {
                    Access::Read => drop(lock.read().await),
                    Access::Write => drop(lock.write().await),
                }
            });
            let mut writer = Probe::new(lock.write());
            assert!(granted.poll().is_none());
            assert!(writer.poll().is_none());
            drop(writing);
            assert_eq!((granted.wakes(), writer.wakes()), (1, 0));
            drop(granted);
            assert_eq!(writer.wakes(), 1);
            assert!(writer.poll().is_some());
            assert!(lock.try_write().is_some());
        }
    }

    #[test]
    fn a_sole_reader_upgrades_at_once() {
        let lock = CoRwLock::new(1);
        let reading = lock.try_read().unwrap();
        let mut upgrade = Probe::new(reading.upgrade());
        let mut writing = upgrade.poll().unwrap();
        *writing += 1;
        assert!(lock.try_read().is_none());
        assert_eq!(*writing.downgrade(), 2);
    }

    #[test]
    fn an_upgrade_queues_behind_a_waiting_writer() {
        let lock = CoRwLock::new(1);
        let reading = lock.try_read().unwrap();
        let mut writer = Probe::new(lock.write());
        assert!(writer.poll().is_none());
        let mut upgrade = Probe::new(reading.upgrade());
        assert!(upgrade.poll().is_none());
        let mut writing = writer.poll().unwrap();
        *writing += 1;
        assert!(upgrade.poll().is_none());
        drop(writing);
        assert_eq!(*upgrade.poll().unwrap(), 2);
    }

    #[test]
    fn two_readers_upgrade_one_after_the_other() {
        let lock = CoRwLock::new(());
        let mut one = Probe::new(lock.try_read().unwrap().upgrade());
        let mut two = Probe::new(lock.try_read().unwrap().upgrade());
        assert!(one.poll().is_none());
        assert!(two.poll().is_none());
        let writing = one.poll().unwrap();
        assert!(two.poll().is_none());
        drop(writing);
        assert!(two.poll().is_some());
    }

    #[test]
    fn a_dropped_upgrade_gives_everything_up() {
        for polls in 0..3 {
            let lock = CoRwLock::new(());
            let other = lock.try_read().unwrap();
            let mut upgrade = Probe::new(lock.try_read().unwrap().upgrade());
            for _ in 0..polls {
                assert!(upgrade.poll().is_none());
            }
            if polls == 2 {
                drop(upgrade);
                drop(other);
            } else {
                drop(other); // grants the upgrade if it is queued
                drop(upgrade);
            }
            assert!(lock.try_write().is_some());
        }
    }

    #[test]
    fn a_downgrade_lets_queued_readers_in_but_no_writer() {
        let lock = CoRwLock::new(());
        let writing = lock.try_write().unwrap();
        let mut reader = Probe::new(lock.read());
        let mut writer = Probe::new(lock.write());
        let mut late = Probe::new(lock.read());
        assert!(reader.poll().is_none());
        assert!(writer.poll().is_none());
        assert!(late.poll().is_none());
        let reading = writing.downgrade();
        let second = reader.poll().unwrap();
        assert!(writer.poll().is_none());
        assert!(late.poll().is_none());
        drop(reading);
        assert!(writer.poll().is_none());
        drop(second);
        drop(writer.poll().unwrap());
        assert!(late.poll().is_some());
    }

    #[test]
    fn get_mut_and_debug_show_the_value() {
        let mut lock = CoRwLock::new(1);
        *lock.get_mut() = 7;
        assert_eq!(format!("{lock:?}"), "CoRwLock { value: 7 }");
        let guard = lock.try_write().unwrap();
        assert_eq!(format!("{lock:?} {guard:?}"), "CoRwLock { .. } 7");
    }
}
