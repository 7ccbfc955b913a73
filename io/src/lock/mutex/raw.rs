//! The lock word and the waiters of a [`CoMutex`](super::CoMutex), without the value.
//!
//! The lock word has two bits, [`LOCKED`] and [`WAITERS`]:
//!
//! | word | what holds | who leaves it |
//! |---|---|---|
//! | `0` | free, queue empty; a notified waiter may be on its way | a newcomer or that waiter, by CAS to `LOCKED` |
//! | `LOCKED` | held, queue empty | the holder, by CAS to `0`; a new waiter, adding `WAITERS` |
//! | `LOCKED+WAITERS` | held, queue not empty | the holder, in `pass_lock`; the last waiter giving up |
//! | `WAITERS` | free, queue not empty, a notified waiter is on its way | whoever comes first, under the list's mutex |
//!
//! 1. (CM1) With the list's mutex held, `WAITERS` is set exactly if the queue is not empty. Both
//!    fast paths expect it clear, so while the queue is not empty the word changes only under the
//!    list's mutex.
//! 2. (CM2) A free lock with waiters has a notified waiter on its way, which takes the lock, queues
//!    again because somebody else holds it, or is dropped and notifies the next: no wake is lost.
//! 3. (CM3) While a starving waiter is queued the lock is held: it queued because of a holder, and
//!    unlocking with a starving waiter in front hands over without freeing. With the queue in
//!    order of arrival (WL1), starving waiters are in front.

use crate::lock::wait_list::{Key, WaitList, wake};
use crate::sync::Mutex;
use crate::sync::atomic::AtomicUsize;
use crate::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

/// Somebody holds the lock, or has been handed it.
const LOCKED: usize = 1;
/// The queue is not empty (CM1).
const WAITERS: usize = 2;

/// Where a waiter is on its way to the lock.
#[derive(Debug, PartialEq, Eq)]
enum Phase {
    /// Linked in the queue; `starving` after it has lost one race.
    Waiting { starving: bool },
    /// Detached: the lock was freed and this waiter was told.
    Notified,
    /// Detached: holds the lock already and has only to notice.
    Granted,
}

/// A mutex without a value.
#[derive(Debug)]
pub(super) struct RawMutex {
    word: AtomicUsize,
    list: Mutex<WaitList<Phase>>,
    /// False in the models' negative control.
    #[cfg(loom)]
    passes_on: bool,
}

impl RawMutex {
    pub(super) fn new() -> Self {
        RawMutex {
            word: AtomicUsize::new(0),
            list: Mutex::new(WaitList::new()),
            #[cfg(loom)]
            passes_on: true,
        }
    }

    #[cfg(loom)]
    pub(super) fn new_without_pass_on() -> Self {
        RawMutex { passes_on: false, ..Self::new() }
    }

    /// Takes the lock if it is free and nobody waits.
    #[inline]
    pub(super) fn try_lock(&self) -> bool {
        // Acquire: pairs with the Release of the unlock that stored the 0. A failed attempt reads
        // nothing that the lock guards.
        self.word.compare_exchange(0, LOCKED, Acquire, Relaxed).is_ok()
    }

    /// Resolves once the caller holds the lock.
    #[inline]
    pub(super) fn lock(&self) -> RawLock<'_> {
        RawLock { mutex: self, key: None }
    }

    /// Gives the lock up. The caller holds it, whichever thread took it.
    #[inline]
    pub(super) fn unlock(&self) {
        // Release: pairs with the Acquire of the next taker. A failure only leads to the slow path.
        if self.word.compare_exchange(LOCKED, 0, Release, Relaxed).is_err() {
            self.unlock_slow();
        }
    }

    #[cold]
    fn unlock_slow(&self) {
        let woken = {
            let mut list = self.list.lock();
            self.pass_lock(&mut list)
        };
        wake(woken);
    }

    /// Frees the lock and notifies the first waiter, or hands the lock to it if it is starving.
    /// The caller holds the lock; or the lock is free and the queue is not empty (CM1: stable).
    fn pass_lock(&self, list: &mut WaitList<Phase>) -> Option<Waker> {
        // Plain stores are enough: by CM1 nobody else writes the word now, and if the queue is
        // empty, because its last waiter has just given up, the caller is the holder. Release:
        // pairs with the Acquire of `try_lock` and `take_or_mark`.
        let Some(key) = list.front() else {
            self.word.store(0, Release);
            return None;
        };
        list.unlink(key);
        let rest = if list.is_empty() { 0 } else { WAITERS };
        if *list.state(key) == (Phase::Waiting { starving: true }) {
            *list.state_mut(key) = Phase::Granted;
            // Relaxed: nobody takes the lock from this value. The granted waiter learns of it, and
            // sees what we did, under the list's mutex.
            self.word.store(LOCKED | rest, Relaxed);
        } else {
            *list.state_mut(key) = Phase::Notified;
            self.word.store(rest, Release);
        }
        list.take_waker(key)
    }

    /// Takes the lock and returns true, or sets `WAITERS` for a caller that queues before it
    /// releases the list's mutex.
    fn take_or_mark(&self, _list: &mut WaitList<Phase>) -> bool {
        // Relaxed: only a guess for the exchange, which decides.
        let mut seen = self.word.load(Relaxed);
        loop {
            let free = seen & LOCKED == 0;
            let next = seen | if free { LOCKED } else { WAITERS };
            // Acquire: as in `try_lock`. (Setting WAITERS needs no ordering: the holder that sees
            // it goes through the list's mutex.)
            match self.word.compare_exchange(seen, next, Acquire, Relaxed) {
                Ok(_) => return free,
                Err(now) => seen = now,
            }
        }
    }

    /// A notified waiter is gone: tells the next one, if the lock is still free. If it is held,
    /// that holder finds `WAITERS` when it unlocks.
    fn pass_on(&self, list: &mut WaitList<Phase>) -> Option<Waker> {
        #[cfg(loom)]
        if !self.passes_on {
            return None;
        }
        // An empty queue first: then the word may change under our eyes and is not ours to write.
        // Relaxed: with a queue the lock was freed under the list's mutex (CM1), so we see what
        // its last holder did, and `pass_lock` may overwrite that holder's Release with ours.
        if list.is_empty() || self.word.load(Relaxed) & LOCKED != 0 {
            return None;
        }
        self.pass_lock(list)
    }
}

/// The future of [`RawMutex::lock`].
#[derive(Debug)]
pub(super) struct RawLock<'a> {
    mutex: &'a RawMutex,
    /// The entry in the list, from the first Pending until Ready.
    key: Option<Key>,
}

impl Future for RawLock<'_> {
    type Output = ();

    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = self.get_mut();
        let taken = match this.key {
            None => this.mutex.try_lock() || this.poll_first(cx),
            Some(key) => this.poll_queued(key, cx),
        };
        if taken { Poll::Ready(()) } else { Poll::Pending }
    }
}

impl RawLock<'_> {
    #[cold]
    fn poll_first(&mut self, cx: &mut Context<'_>) -> bool {
        let waker = cx.waker().clone();
        let mut list = self.mutex.list.lock();
        if self.mutex.take_or_mark(&mut list) {
            drop(list);
            return true;
        }
        let waiting = Phase::Waiting { starving: false };
        self.key = Some(list.push_back(waiting, Some(waker)));
        false
    }

    #[cold]
    fn poll_queued(&mut self, key: Key, cx: &mut Context<'_>) -> bool {
        // Declared before the list's guard, so dropped after it (WL3).
        let (_removed, _stale);
        let waker = cx.waker().clone();
        let mut list = self.mutex.list.lock();
        let taken = match list.state(key) {
            Phase::Waiting { .. } => false,
            Phase::Granted => true,
            Phase::Notified => self.mutex.take_or_mark(&mut list),
        };
        if taken {
            _removed = list.remove(key);
            self.key = None;
            return true;
        }
        if *list.state(key) == Phase::Notified {
            *list.state_mut(key) = Phase::Waiting { starving: true };
            list.relink(key);
        }
        _stale = list.set_waker(key, waker);
        false
    }
}

impl Drop for RawLock<'_> {
    fn drop(&mut self) {
        let Some(key) = self.key else { return };
        let mutex = self.mutex;
        let mut list = mutex.list.lock();
        let removed = list.remove(key);
        let woken = match removed.state {
            Phase::Waiting { .. } => {
                if list.is_empty() {
                    // Relaxed: keeps CM1. It guards nothing, and as a read-modify-write it leaves
                    // a Release by the last holder visible to the next.
                    mutex.word.fetch_and(!WAITERS, Relaxed);
                }
                None
            }
            Phase::Notified => mutex.pass_on(&mut list),
            Phase::Granted => mutex.pass_lock(&mut list),
        };
        drop(list);
        drop(removed);
        wake(woken);
    }
}
