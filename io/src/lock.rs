//! Coroutine locks: a waiter suspends its task, never its thread.
//!
//! | lock | what it guards | fairness | uncontended cost |
//! |---|---|---|---|
//! | [`CoMutex`] | one value | barging; a woken waiter loses at most one race | 1 CAS + 1 CAS |
//! | [`CoRwLock`] | one value, shared or alone | strict arrival order | 1 CAS + 1 CAS |
//! | [`CoQueue`] | a condition under the caller's own lock | first in, first out | its list's mutex |
//! | [`RangeLock`] | byte ranges, shared or alone | arrival order among conflicting requests | its table's mutex, one scan |
//!
//! What holds for all of them, and what their models in `tests/loom_lock.rs` check:
//!
//! * They belong to no thread and no event loop. A future may be polled on one thread and then on
//!   another; a guard may be dropped on a third.
//! * A future may be dropped in every state it can be in. A waiter that was already told of its
//!   turn passes it on, so no wake is lost (`drop-is-a-path`).
//! * Wakers are woken, and dropped, only after the list's own mutex is unlocked: a waker may be
//!   the last owner of a task, whose destructor may come back to the same lock.
//! * The list's mutex is a leaf of the lock order: nothing is locked, called or awaited under it,
//!   except `Waker::will_wake`.
//! * In steady state nothing is allocated: waiters live in a slab that keeps the size of the
//!   longest queue there ever was (`lock/wait_list.rs`).
//!
//! [`SequenceCount`] is no coroutine lock and makes nobody wait: it lets several words be read as one.
//!
//! What is deliberately not here: no spinning (the holder may await I/O), no lock-free list (the
//! contended path is dominated by the wake-up), no poisoning (a panic unwinds through the guard
//! and unlocks), no recursion (a task that locks a lock it holds waits for ever) and no owner
//! tracking.

mod mutex;
mod queue;
mod range;
mod rwlock;
mod sequence;
#[cfg(all(test, not(loom)))]
mod testing;
mod wait_list;

pub use mutex::{CoMutex, CoMutexGuard};
pub use queue::{CoQueue, CoQueueWait};
pub use range::{RangeGuard, RangeLock, RangeMode, RangeToken};
pub use rwlock::{CoRwLock, CoRwLockReadGuard, CoRwLockWriteGuard};
pub use sequence::SequenceCount;
