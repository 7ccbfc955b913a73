//! The inbox of a loop: how other threads reach it, and why it never sleeps on a full inbox.
//!
//! Any thread pushes; the owner alone takes, sleeps and wakes. One kick (a write to the loop's
//! eventfd) is due when the owner said that it is about to sleep. Modelled in
//! `tests/loom_wake.rs`, which runs this very file.
//!
//! ```text
//! push:  lock, append, pending = true, unlock      sleep:  notify_me = true
//!        fence(SeqCst)                                     fence(SeqCst)
//!        notify_me? CAS(true -> false) -> kick             pending? -> do not sleep
//! ```
//!
//! N1. Either the pusher sees `notify_me`, or the owner sees `pending` (the two fences are a
//!     Dekker pair), so an item pushed before the owner sleeps is never slept on (W01).
//! N2. However many threads push while the owner sleeps, one of them kicks: the CAS has one winner.
//! N3. After `close` nothing enters, and what was inside has been handed back to the owner.

use crate::sync::Mutex;
use crate::sync::atomic::{AtomicBool, Ordering, fence};
use std::mem;

/// What an inbox still lets in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Gate {
    /// Everything.
    Open,
    /// Only [`Class::Follow`]: what belongs to work that the loop already has.
    Ending,
    /// Nothing.
    Closed,
}

/// Whether an item is new work or follows from work that the loop has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// New work: refused once the loop is ending.
    New,
    /// A wake-up, a completion: let in until the loop has closed.
    Follow,
}

/// Whether the pusher must now wake the owner up.
#[must_use = "an owner that is owed a kick sleeps for ever without it"]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kick {
    /// The owner sleeps, or is about to: write its eventfd.
    Due,
    /// The owner is awake and will look.
    NotDue,
}

struct List<T> {
    items: Vec<T>,
    gate: Gate,
}

/// Items for one owner thread, from any thread.
pub struct Inbox<T> {
    list: Mutex<List<T>>,
    /// The list is not empty. Written under the list's lock only; read by the owner without it.
    pending: AtomicBool,
    /// The owner sleeps or is about to, and wants a kick.
    notify_me: AtomicBool,
}

impl<T> Default for Inbox<T> {
    fn default() -> Inbox<T> {
        Inbox::new()
    }
}

impl<T> Inbox<T> {
    /// An empty, open inbox.
    pub fn new() -> Inbox<T> {
        Inbox {
            list: Mutex::new(List { items: Vec::new(), gate: Gate::Open }),
            pending: AtomicBool::new(false),
            notify_me: AtomicBool::new(false),
        }
    }

    /// Adds `item`, or gives it back if the gate does not let it in. Any thread.
    pub fn push(&self, item: T, class: Class) -> Result<Kick, T> {
        {
            let mut list = self.list.lock();
            let open = match class {
                Class::New => list.gate == Gate::Open,
                Class::Follow => list.gate != Gate::Closed,
            };
            if !open {
                return Err(item);
            }
            list.items.push(item);
            // Relaxed: ordered against `take` by the lock, against `prepare_sleep` by the fence.
            self.pending.store(true, Ordering::Relaxed);
        }
        // Partner: the fence in `prepare_sleep` (N1).
        fence(Ordering::SeqCst);
        // Relaxed: the flag carries no data, the items travel through the lock. A CAS and not a
        // plain store, so that one pusher wins (N2).
        if self.notify_me.load(Ordering::Relaxed)
            && self
                .notify_me
                .compare_exchange(true, false, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok()
        {
            return Ok(Kick::Due);
        }
        Ok(Kick::NotDue)
    }

    /// Whether something waits to be taken. A hint on any thread; on the owner's thread an item
    /// pushed by the owner itself is always seen.
    pub fn is_pending(&self) -> bool {
        // Relaxed: a stale `false` is caught by `prepare_sleep` before it matters.
        self.pending.load(Ordering::Relaxed)
    }

    /// Swaps what has come in into `items`, which must be empty. Owner only.
    pub fn take(&self, items: &mut Vec<T>) {
        debug_assert!(items.is_empty(), "the owner finishes one batch before it takes the next");
        if !self.is_pending() {
            return;
        }
        let mut list = self.list.lock();
        mem::swap(&mut list.items, items);
        // Relaxed: every other write is under the lock that we hold.
        self.pending.store(false, Ordering::Relaxed);
    }

    /// Asks for a kick. If it says `false`, something is pending and the owner must not sleep.
    /// Owner only; paired with [`Inbox::awake`] when it says `true`.
    #[must_use = "sleeping although something is pending loses a wake-up"]
    pub fn prepare_sleep(&self) -> bool {
        // Relaxed: see the fence.
        self.notify_me.store(true, Ordering::Relaxed);
        // Partner: the fence in `push` (N1).
        fence(Ordering::SeqCst);
        // Relaxed: if the pusher's store is not visible here, its load sees our flag.
        if self.pending.load(Ordering::Relaxed) {
            self.awake();
            return false;
        }
        true
    }

    /// The owner is awake: no kicks are wanted. A kick that is on its way already only makes the
    /// next sleep shorter.
    pub fn awake(&self) {
        // Relaxed: a pusher that still sees `true` kicks once too often, nothing else.
        self.notify_me.store(false, Ordering::Relaxed);
    }

    /// Narrows the gate: it never opens again. Owner only.
    pub fn narrow(&self, gate: Gate) {
        let mut list = self.list.lock();
        list.gate = list.gate.max(gate);
    }

    /// How far the gate is open now. Any thread; it may narrow at any time.
    pub fn gate(&self) -> Gate {
        self.list.lock().gate
    }

    /// Closes the gate and hands back what is inside (N3). Owner only.
    pub fn close(&self) -> Vec<T> {
        let mut list = self.list.lock();
        list.gate = Gate::Closed;
        // Relaxed: under the lock.
        self.pending.store(false, Ordering::Relaxed);
        mem::take(&mut list.items)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn only_one_of_many_pushes_to_a_sleeper_kicks() {
        let inbox = Inbox::new();
        assert!(inbox.prepare_sleep());
        assert_eq!(inbox.push(1, Class::New), Ok(Kick::Due));
        assert_eq!(inbox.push(2, Class::New), Ok(Kick::NotDue));
        inbox.awake();
        let mut items = Vec::new();
        inbox.take(&mut items);
        assert_eq!(items, [1, 2]);
        assert!(!inbox.is_pending());
    }

    #[test]
    fn a_full_inbox_forbids_sleep_and_asks_for_no_kick() {
        let inbox = Inbox::new();
        assert_eq!(inbox.push(1, Class::New), Ok(Kick::NotDue));
        assert!(!inbox.prepare_sleep());
        assert_eq!(inbox.push(2, Class::New), Ok(Kick::NotDue));
    }

    #[test]
    fn an_ending_inbox_takes_what_follows_and_refuses_what_is_new() {
        let inbox = Inbox::new();
        inbox.narrow(Gate::Ending);
        assert_eq!(inbox.push(1, Class::New), Err(1));
        assert_eq!(inbox.push(2, Class::Follow), Ok(Kick::NotDue));
        assert_eq!(inbox.close(), [2]);
        assert_eq!(inbox.push(3, Class::Follow), Err(3));
        inbox.narrow(Gate::Open);
        assert_eq!(inbox.gate(), Gate::Closed);
    }
}
