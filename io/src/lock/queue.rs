//! [`CoQueue`]: waiting for a condition that the caller keeps under a lock of its own, the
//! counterpart of a condition variable.
//!
//! 1. (CQ1) A waiter is in the queue before the caller's lock is released, so a wake that follows
//!    the change of the condition under that lock cannot miss it.
//! 2. (CQ2) A single wake is consumed by a waiter that resolves. A waiter that is dropped after
//!    being chosen passes it on, if anybody waits.

use crate::lock::wait_list::{Key, WaitList, Wakers, wake};
use crate::sync::Mutex;
use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll};

#[derive(Clone, Copy, Debug)]
enum Phase {
    /// Linked in the queue.
    Waiting,
    /// Detached by [`CoQueue::wake_one`]: owes the wake to the next one if it is dropped.
    Chosen,
    /// Detached by [`CoQueue::wake_all`]: everyone else was woken too.
    Released,
}

/// A queue of tasks, first in first out, for conditions guarded by the caller's lock.
///
/// ```
/// # use blockplex_io::lock::CoQueue;
/// # use parking_lot::Mutex;
/// struct Slots { free: Mutex<u32>, freed: CoQueue }
///
/// async fn take(slots: &Slots) {
///     loop {
///         // The guard must not live across the await, so `wait` takes it.
///         let wait = {
///             let mut free = slots.free.lock();
///             if *free > 0 {
///                 *free -= 1;
///                 return;
///             }
///             slots.freed.wait(free)
///         };
///         wait.await;
///     }
/// }
///
/// fn give(slots: &Slots) {
///     *slots.free.lock() += 1;
///     slots.freed.wake_one();
/// }
/// ```
///
/// The condition is checked again after each wait: between the wake and the waiter's turn somebody
/// else may have come first.
///
/// Any thread may call any method.
pub struct CoQueue {
    list: Mutex<WaitList<Phase>>,
    /// False in the models' negative control.
    #[cfg(loom)]
    passes_on: bool,
}

impl CoQueue {
    /// An empty queue.
    pub fn new() -> Self {
        CoQueue {
            list: Mutex::new(WaitList::new()),
            #[cfg(loom)]
            passes_on: true,
        }
    }

    /// A queue whose cancelled waiters swallow their wake: the negative control of the models.
    #[cfg(loom)]
    #[doc(hidden)]
    pub fn new_without_pass_on() -> Self {
        CoQueue { passes_on: false, ..Self::new() }
    }

    /// Joins the queue, then drops `guard`, then (in the future) waits to be woken. The caller
    /// queues by calling, not by the first poll, so calls under one lock queue in its order.
    ///
    /// `guard` is the guard of the lock that the condition is under: of a `parking_lot` mutex or
    /// of a [`CoMutex`](crate::lock::CoMutex). It is not taken again afterwards. With another lock
    /// than the waker's, or with none, a wake can be missed.
    ///
    /// The future may be dropped at any time; if it was chosen by [`wake_one`](Self::wake_one),
    /// the next waiter is woken in its place.
    pub fn wait<G>(&self, guard: G) -> CoQueueWait<'_> {
        let key = self.list.lock().push_back(Phase::Waiting, None);
        drop(guard);
        CoQueueWait { queue: self, key: Some(key) }
    }

    /// Wakes the task that has waited longest. Returns false if nobody waits.
    ///
    /// Call it after the condition was changed under the caller's lock, and best after releasing
    /// it: it calls the task's waker.
    pub fn wake_one(&self) -> bool {
        let mut list = self.list.lock();
        let Some(key) = list.front() else {
            return false;
        };
        list.unlink(key);
        *list.state_mut(key) = Phase::Chosen;
        let woken = list.take_waker(key);
        drop(list);
        wake(woken);
        true
    }

    /// Wakes every task that waits now, and returns how many. See [`wake_one`](Self::wake_one).
    pub fn wake_all(&self) -> usize {
        let mut list = self.list.lock();
        let mut woken = Wakers::new();
        let mut count = 0;
        while let Some(key) = list.front() {
            list.unlink(key);
            *list.state_mut(key) = Phase::Released;
            woken.extend(list.take_waker(key));
            count += 1;
        }
        drop(list);
        wake(woken);
        count
    }

    /// Whether nobody waits. Unless the caller's lock is held, the answer may be old at once.
    pub fn is_empty(&self) -> bool {
        self.list.lock().is_empty()
    }
}

impl Default for CoQueue {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for CoQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CoQueue").finish_non_exhaustive()
    }
}

/// The future of [`CoQueue::wait`]; resolves when it is woken.
#[must_use = "the queue is left again unless this is awaited"]
#[derive(Debug)]
pub struct CoQueueWait<'a> {
    queue: &'a CoQueue,
    /// None once resolved.
    key: Option<Key>,
}

impl Future for CoQueueWait<'_> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = self.get_mut();
        let Some(key) = this.key else {
            return Poll::Ready(());
        };
        // Before the list's guard, so dropped after it (WL3).
        let (_removed, _stale);
        let waker = cx.waker().clone();
        let mut list = this.queue.list.lock();
        match list.state(key) {
            Phase::Waiting => {
                _stale = list.set_waker(key, waker);
                Poll::Pending
            }
            Phase::Chosen | Phase::Released => {
                _removed = list.remove(key);
                this.key = None;
                Poll::Ready(())
            }
        }
    }
}

impl Drop for CoQueueWait<'_> {
    fn drop(&mut self) {
        let Some(key) = self.key else { return };
        let removed = self.queue.list.lock().remove(key);
        match removed.state {
            Phase::Waiting | Phase::Released => {}
            Phase::Chosen => {
                #[cfg(loom)]
                if !self.queue.passes_on {
                    return;
                }
                self.queue.wake_one();
            }
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::lock::CoMutex;
    use crate::lock::testing::{Probe, block_on, on_threads};
    use parking_lot::Mutex as SyncMutex;

    #[test]
    fn wakes_go_out_in_order_of_arrival() {
        let queue = CoQueue::new();
        let mutex = SyncMutex::new(());
        let mut one = Probe::new(queue.wait(mutex.lock()));
        let mut two = Probe::new(queue.wait(mutex.lock()));
        assert!(two.poll().is_none());
        assert!(one.poll().is_none());
        assert!(queue.wake_one());
        assert_eq!((one.wakes(), two.wakes()), (1, 0));
        assert!(one.poll().is_some());
        assert!(two.poll().is_none());
        assert!(queue.wake_one());
        assert!(!queue.wake_one());
        assert!(two.poll().is_some());
        assert!(queue.is_empty());
    }

    #[test]
    fn wait_releases_the_callers_lock_and_is_in_the_queue_already() {
        let queue = CoQueue::new();
        let mutex = SyncMutex::new(());
        let mut wait = Probe::new(queue.wait(mutex.lock()));
        assert!(mutex.try_lock().is_some());
        assert!(queue.wake_one()); // before the first poll
        assert!(wait.poll().is_some());
    }

    #[test]
    fn wait_takes_the_guard_of_a_coroutine_mutex_too() {
        let queue = CoQueue::new();
        let mutex = CoMutex::new(());
        let mut wait = Probe::new(queue.wait(block_on(mutex.lock())));
        assert!(wait.poll().is_none());
        assert!(mutex.try_lock().is_some());
        assert!(queue.wake_one());
        assert!(wait.poll().is_some());
    }

    #[test]
    fn wake_all_counts_and_wakes_only_those_who_wait_now() {
        let queue = CoQueue::new();
        let mut waits = [(); 10].map(|()| Probe::new(queue.wait(())));
        assert!(waits.iter_mut().all(|wait| wait.poll().is_none()));
        assert_eq!(queue.wake_all(), 10);
        assert_eq!(queue.wake_all(), 0);
        let mut late = Probe::new(queue.wait(()));
        assert!(late.poll().is_none());
        let [first, rest @ ..] = waits;
        drop(first); // its wake was not a single one: nothing to pass on
        assert!(late.poll().is_none());
        for mut wait in rest {
            assert!(wait.poll().is_some());
        }
    }

    #[test]
    fn dropped_waiter_passes_its_wake_on() {
        let queue = CoQueue::new();
        let mut one = Probe::new(queue.wait(()));
        let mut two = Probe::new(queue.wait(()));
        let mut three = Probe::new(queue.wait(()));
        assert!(one.poll().is_none());
        assert!(three.poll().is_none());
        assert!(queue.wake_one());
        drop(one);
        assert!(two.poll().is_some()); // never polled before: learns of it at its first poll
        assert!(queue.wake_one());
        assert_eq!(three.wakes(), 1);
        drop(three);
        assert!(!queue.wake_one());
    }

    #[test]
    fn a_waiter_that_gives_up_leaves_the_queue() {
        let queue = CoQueue::new();
        let mut one = Probe::new(queue.wait(()));
        let mut two = Probe::new(queue.wait(()));
        assert!(one.poll().is_none());
        assert!(two.poll().is_none());
        drop(one);
        assert!(queue.wake_one());
        assert!(two.poll().is_some());
    }

    #[test]
    fn no_permit_is_lost_between_threads() {
        let free = SyncMutex::new(2);
        let freed = CoQueue::new();
        on_threads(4, |_| {
            for _ in 0..2_000 {
                block_on(async {
                    loop {
                        let wait = {
                            let mut free = free.lock();
                            if *free > 0 {
                                *free -= 1;
                                break;
                            }
                            freed.wait(free)
                        };
                        wait.await;
                    }
                });
                *free.lock() += 1;
                freed.wake_one();
            }
        });
        assert_eq!(*free.lock(), 2);
        assert!(freed.is_empty());
    }
}
