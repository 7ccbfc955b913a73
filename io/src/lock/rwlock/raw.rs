//! The lock word and the waiters of a [`CoRwLock`](super::CoRwLock), without the value.
//!
//! The lock word is `readers * READER + WAITERS? + WRITER?`:
//!
//! | word | what holds | who changes it |
//! |---|---|---|
//! | `0` | free, queue empty | anyone, by CAS |
//! | `n * READER` | n readers, queue empty | a reader coming or going, by CAS; a new waiter |
//! | `WRITER` | one writer, queue empty | the writer, by CAS; a new waiter |
//! | `… + WAITERS` | as without it, queue not empty | only holders of the list's mutex |
//!
//! 1. (RW1) `WRITER` excludes readers and other writers. A granted waiter is counted from the
//!    moment it is granted, not from when it notices.
//! 2. (RW2) With the list's mutex held, `WAITERS` is set exactly if the queue is not empty. All
//!    fast paths expect it clear, so while the queue is not empty the word changes only under the
//!    list's mutex.
//! 3. (RW3) When the list's mutex is released, whoever is at the front of the queue cannot go on:
//!    every change that could let it in runs `grant`. So no waiter is forgotten, and no newcomer
//!    overtakes (order of arrival).

use crate::lock::wait_list::{Key, WaitList, Wakers, wake};
use crate::sync::Mutex;
use crate::sync::atomic::AtomicUsize;
use crate::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::pin::Pin;
use std::task::{Context, Poll};

/// Somebody writes.
const WRITER: usize = 1;
/// The queue is not empty (RW2).
const WAITERS: usize = 2;
/// One reader. The rest of the word counts them; 2^62 guards do not fit into any memory.
const READER: usize = 4;

/// What a holder may do with the value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    Read,
    Write,
}

impl Access {
    /// What a holder adds to the lock word.
    fn unit(self) -> usize {
        match self {
            Access::Read => READER,
            Access::Write => WRITER,
        }
    }

    /// The bits of the lock word that keep this access out, queue aside.
    fn excluded_by(self) -> usize {
        match self {
            Access::Read => WRITER,
            Access::Write => !WAITERS,
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Phase {
    /// Linked in the queue.
    Waiting(Access),
    /// Detached: counted in the lock word, and has only to notice.
    Granted(Access),
}

/// A readers-writer lock without a value.
#[derive(Debug)]
pub(super) struct RawRwLock {
    word: AtomicUsize,
    list: Mutex<WaitList<Phase>>,
}

impl RawRwLock {
    pub(super) fn new() -> Self {
        RawRwLock { word: AtomicUsize::new(0), list: Mutex::new(WaitList::new()) }
    }

    /// Takes the lock if nothing excludes `access` and nobody waits.
    #[inline]
    pub(super) fn try_lock(&self, access: Access) -> bool {
        let keeps_out = access.excluded_by() | WAITERS;
        // Relaxed: only a guess for the exchange, which decides.
        let mut seen = self.word.load(Relaxed);
        while seen & keeps_out == 0 {
            // Acquire: pairs with the Release of `unlock`, `downgrade` and `grant`. All writes of
            // the word in between are read-modify-writes, so a writer sees the end of every reader.
            match self.word.compare_exchange_weak(seen, seen + access.unit(), Acquire, Relaxed) {
                Ok(_) => return true,
                Err(now) => seen = now,
            }
        }
        false
    }

    /// Resolves once the caller holds the lock for `access`.
    #[inline]
    pub(super) fn lock(&self, access: Access) -> RawLock<'_> {
        RawLock { lock: self, stage: Stage::Start(access) }
    }

    /// Gives up one holder's `access`, whichever thread took it.
    #[inline]
    pub(super) fn unlock(&self, access: Access) {
        // Relaxed: only a guess for the exchange, which decides.
        let mut seen = self.word.load(Relaxed);
        while seen & WAITERS == 0 {
            // Release: pairs with the Acquire of the next taker. A failure is retried.
            match self.word.compare_exchange_weak(seen, seen - access.unit(), Release, Relaxed) {
                Ok(_) => return,
                Err(now) => seen = now,
            }
        }
        self.unlock_slow(access);
    }

    #[cold]
    fn unlock_slow(&self, access: Access) {
        let woken = {
            let mut list = self.list.lock();
            self.leave(access, &mut list)
        };
        wake(woken);
    }

    /// Turns the caller's shared access into exclusive access, if nobody else reads or waits.
    pub(super) fn try_upgrade(&self) -> bool {
        // Acquire: pairs with the Release of the readers that left.
        self.word.compare_exchange(READER, WRITER, Acquire, Relaxed).is_ok()
    }

    /// Gives up the caller's shared access and asks for exclusive access, in one step as seen by
    /// everyone else. The future is queued already, so it owns the request if it is dropped.
    pub(super) fn upgrade(&self) -> RawLock<'_> {
        let mut list = self.list.lock();
        // A waker follows at the first poll; a grant before that is noticed there.
        let key = list.push_back(Phase::Waiting(Access::Write), None);
        // Keeps RW2. Relaxed: the bit guards nothing; who sees it takes the list's mutex.
        self.word.fetch_or(WAITERS, Relaxed);
        let woken = self.leave(Access::Read, &mut list);
        drop(list);
        wake(woken);
        RawLock { lock: self, stage: Stage::Queued(key) }
    }

    /// Turns the caller's exclusive access into shared access.
    pub(super) fn downgrade(&self) {
        // Release: pairs with the Acquire of readers that join.
        if self.word.compare_exchange(WRITER, READER, Release, Relaxed).is_ok() {
            return;
        }
        let woken = {
            let mut list = self.list.lock();
            // Release as above; `grant` acquires for itself.
            self.word.fetch_add(READER - WRITER, Release);
            self.grant(&mut list)
        };
        wake(woken);
    }

    /// Takes one holder's `access` out of the word and lets in who can go on.
    fn leave(&self, access: Access, list: &mut WaitList<Phase>) -> Wakers {
        // Release: pairs with the Acquire of a taker on the fast path, should the queue be empty
        // by now; `grant` acquires for itself.
        self.word.fetch_sub(access.unit(), Release);
        self.grant(list)
    }

    /// Lets waiters in from the front as long as the word admits them (RW3), and clears `WAITERS`
    /// if that or the caller has emptied the queue (RW2).
    fn grant(&self, list: &mut WaitList<Phase>) -> Wakers {
        let mut woken = Wakers::new();
        if list.is_empty() {
            // The fast paths may be at work, so not a store. Relaxed: it guards nothing, and as a
            // read-modify-write it leaves an earlier Release visible to the next taker.
            self.word.fetch_and(!WAITERS, Relaxed);
            return woken;
        }
        // From here to the store nobody else writes the word (RW2). Acquire: collects what those
        // who left have released, for the granted ones, who learn of it under the list's mutex,
        // and for the store to release again.
        let mut word = self.word.load(Acquire);
        while let Some(key) = list.front() {
            let Phase::Waiting(access) = *list.state(key) else {
                unreachable!("a granted waiter is detached");
            };
            if word & access.excluded_by() != 0 {
                break;
            }
            word += access.unit();
            list.unlink(key);
            *list.state_mut(key) = Phase::Granted(access);
            woken.extend(list.take_waker(key));
        }
        if list.is_empty() {
            word &= !WAITERS;
        }
        self.word.store(word, Release);
        woken
    }

    /// Takes the lock and returns true, or sets `WAITERS` for a caller that queues before it
    /// releases the list's mutex.
    fn take_or_mark(&self, access: Access, _list: &mut WaitList<Phase>) -> bool {
        let keeps_out = access.excluded_by() | WAITERS;
        // Relaxed: only a guess for the exchange, which decides.
        let mut seen = self.word.load(Relaxed);
        loop {
            let free = seen & keeps_out == 0;
            let next = if free { seen + access.unit() } else { seen | WAITERS };
            // Acquire: as in `try_lock`; setting WAITERS alone needs no ordering.
            match self.word.compare_exchange_weak(seen, next, Acquire, Relaxed) {
                Ok(_) => return free,
                Err(now) => seen = now,
            }
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Stage {
    Start(Access),
    /// The entry in the list, waiting or granted.
    Queued(Key),
    /// The access belongs to the caller.
    Done,
}

/// The future of [`RawRwLock::lock`] and [`RawRwLock::upgrade`].
#[derive(Debug)]
pub(super) struct RawLock<'a> {
    lock: &'a RawRwLock,
    stage: Stage,
}

impl Future for RawLock<'_> {
    type Output = ();

    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = self.get_mut();
        let taken = match this.stage {
            Stage::Start(access) => this.lock.try_lock(access) || this.poll_first(access, cx),
            Stage::Queued(key) => this.poll_queued(key, cx),
            Stage::Done => true,
        };
        if !taken {
            return Poll::Pending;
        }
        this.stage = Stage::Done;
        Poll::Ready(())
    }
}

impl RawLock<'_> {
    #[cold]
    fn poll_first(&mut self, access: Access, cx: &mut Context<'_>) -> bool {
        // Before the list's guard, so dropped after it (WL3).
        let waker = cx.waker().clone();
        let mut list = self.lock.list.lock();
        if self.lock.take_or_mark(access, &mut list) {
            drop(list);
            return true;
        }
        let key = list.push_back(Phase::Waiting(access), Some(waker));
        self.stage = Stage::Queued(key);
        false
    }

    #[cold]
    fn poll_queued(&mut self, key: Key, cx: &mut Context<'_>) -> bool {
        // Before the list's guard, so dropped after it (WL3).
        let (_removed, _stale);
        let waker = cx.waker().clone();
        let mut list = self.lock.list.lock();
        match list.state(key) {
            Phase::Waiting(_) => {
                _stale = list.set_waker(key, waker);
                false
            }
            Phase::Granted(_) => {
                _removed = list.remove(key);
                true
            }
        }
    }
}

impl Drop for RawLock<'_> {
    fn drop(&mut self) {
        let lock = self.lock;
        match self.stage {
            Stage::Start(_) | Stage::Done => {}
            Stage::Queued(key) => {
                let mut list = lock.list.lock();
                let removed = list.remove(key);
                let woken = match removed.state {
                    // It may have kept those behind it waiting.
                    Phase::Waiting(_) => lock.grant(&mut list),
                    Phase::Granted(access) => lock.leave(access, &mut list),
                };
                drop(list);
                drop(removed);
                wake(woken);
            }
        }
    }
}
