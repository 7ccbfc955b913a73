//! The gate of an origin: whatever starts I/O by itself has one, and only its own requests pass it.
//!
//! A request increments its queue's [`Slot`], passes the [`barrier`], and looks
//! at `frozen`; a drainer increments `frozen`, passes the barrier, and sums the slots.
//!
//! G1. `frozen` equals the number of live sections (frozen or announced) that list the gate; it
//!     changes only under `slow`.
//! G2. No request is admitted whose look at `frozen` comes after a drainer's `heavy`; every request
//!     admitted before is seen by the drainer's sum. (B1: slot + 1 against `frozen` + 1.)
//! G3. Every change that can bring the sum to zero is followed by a look at `frozen`, and if that is
//!     not zero by a kick under `slow`. (B1 again: slot − 1 against `frozen` + 1. A drainer either
//!     sums up the decrement or is woken for it; `frozen` stays, so every later exit kicks too.)
//! G4. A sum is never too small: a refused request's +1 and −1 hit the same counter. It may be too
//!     large for a moment, so *idle* is latched when first seen and holds until `frozen` is 0 again:
//!     by G2 nothing can be admitted in between.
//! G5. A slot opened during a section is either in the list that the drainer sums or sees `frozen`:
//!     opening, freezing and summing are ordered by `slow`.
//! G6. All effects of a request happen before the section that waited for it (exit's Release, the
//!     sum's Acquire), and all effects of a section before the requests admitted after it (thaw's
//!     Release, `try_enter`'s Acquire).
//! G7. `slow` is never held while a waker or a hook runs.
//!
//! A request that was refused re-runs the whole of `try_enter` after it was woken. One that counted
//! itself on the strength of having been woken would slip into a second section begun in between.

use crate::barrier;
use crate::hooks::{DrainHooks, HookCall, HookState};
use crate::slot::{Slot, SlotShared};
use crate::sync::Mutex;
use crate::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use crossbeam_utils::CachePadded;
use std::fmt;
use std::sync::Arc;
use std::task::{Poll, Waker};

/// What the request path reads: one line, written only by sections and graph changes.
#[derive(Debug)]
struct Hot {
    frozen: AtomicU32,
    generation: AtomicU64,
}

/// A registered slot and the waker of the request path that waits for a thaw (one at most).
struct Registered {
    slot: Arc<SlotShared>,
    blocked: Option<Waker>,
}

#[derive(Default)]
struct Slow {
    slots: Vec<Registered>,
    /// Waiting sections, by key; taken as a whole when they may have settled.
    waiters: Vec<(u64, Waker)>,
    next_waiter: u64,
    /// G4's latch.
    idle: bool,
    hooks: HookState,
}

/// Admission of one origin's requests. Shared by its queues, the graph and the sections.
///
/// Methods may be called from any thread; none blocks for longer than a short critical section.
pub struct Gate {
    hot: CachePadded<Hot>,
    slow: Mutex<Slow>,
    name: String,
    hooks: Option<Box<dyn DrainHooks>>,
}

impl Gate {
    /// A gate that admits. `name` is how reports name the origin, as a noun phrase: `backend
    /// 'disk0'`. To have it born shut, make a section of it before anybody else sees it.
    pub fn new(name: impl Into<String>, hooks: Option<Box<dyn DrainHooks>>) -> Arc<Gate> {
        barrier::prepare();
        Arc::new(Gate {
            hot: CachePadded::new(Hot { frozen: AtomicU32::new(0), generation: AtomicU64::new(0) }),
            slow: Mutex::new(Slow::default()),
            name: name.into(),
            hooks,
        })
    }

    /// The origin's name in reports.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether a section holds this gate shut. May be out of date when it returns.
    #[inline]
    pub fn is_frozen(&self) -> bool {
        self.frozen_count() != 0
    }

    /// How many sections hold this gate shut.
    #[inline]
    pub fn frozen_count(&self) -> u32 {
        // Acquire: partner of the Release in `thaw` (G6).
        self.hot.frozen.load(Ordering::Acquire)
    }

    /// The generation of the graph that this origin sees. A request reads it *after* it was
    /// admitted; read before, it may name a graph that was retired meanwhile.
    #[inline]
    pub fn generation(&self) -> u64 {
        // Acquire: partner of `bump_generation`; who sees the number sees the published graph.
        self.hot.generation.load(Ordering::Acquire)
    }

    /// Says that the origin's part of the graph has changed. Called by a graph change while it
    /// holds this gate shut and settled, after it published the new graph.
    pub fn bump_generation(&self) {
        // Release: partner of `generation`.
        self.hot.generation.fetch_add(1, Ordering::Release);
    }

    /// The requests now admitted, over all slots. It may count a request that is just being refused
    /// (G4), and outside of a section it is out of date when it returns.
    pub fn in_flight(&self) -> u64 {
        self.slow.lock().sum()
    }

    /// Opens a slot for one queue of this origin. The slot belongs to the calling thread. `label`
    /// is how reports name it: `queue 'loop 1'`.
    pub fn open_slot(self: &Arc<Self>, label: impl Into<String>) -> Slot {
        let shared = Arc::new(SlotShared::new(label.into()));
        self.slow.lock().slots.push(Registered { slot: shared.clone(), blocked: None });
        Slot::new(self.clone(), shared)
    }
}

/// The request path's part: what [`Slot`] needs.
impl Gate {
    /// The read of `try_enter`. Acquire: partner of the Release in `thaw` (G6).
    #[inline]
    pub(crate) fn admits(&self) -> bool {
        self.hot.frozen.load(Ordering::Acquire) == 0
    }

    /// The read of `exit`. Relaxed: it decides only whether to take `slow`, which orders the rest.
    #[inline]
    pub(crate) fn wants_kick(&self) -> bool {
        self.hot.frozen.load(Ordering::Relaxed) != 0
    }

    /// G3: a slot has come down to zero; wakes the sections that may have settled by it.
    #[cold]
    pub(crate) fn kick(&self) {
        let woken = {
            let mut slow = self.slow.lock();
            // Only a drainer may latch `idle`: this thread's sum is not behind a `heavy`.
            if slow.sum() == 0 { slow.take_waiters() } else { Vec::new() }
        };
        wake_all(woken);
    }

    /// Test-and-enqueue: `Ready` if the gate admits, otherwise `waker` replaces the slot's waker.
    pub(crate) fn poll_thawed(&self, slot: &Arc<SlotShared>, waker: Waker) -> Poll<()> {
        let (outcome, _replaced) = {
            let mut slow = self.slow.lock();
            // Relaxed: `frozen` changes only under `slow`, which is held (G1).
            let admits = self.hot.frozen.load(Ordering::Relaxed) == 0;
            let blocked = slow.blocked_of(slot);
            if admits {
                (Poll::Ready(()), blocked.and_then(Option::take))
            } else {
                (Poll::Pending, blocked.and_then(|blocked| blocked.replace(waker)))
            }
        };
        outcome
    }

    /// Forgets a slot. What it still counted is counted no more, so that no section waits for it.
    pub(crate) fn close_slot(&self, slot: &Arc<SlotShared>) {
        let (blocked, woken) = {
            let mut slow = self.slow.lock();
            let index = slow.slots.iter().position(|entry| Arc::ptr_eq(&entry.slot, slot));
            let blocked = index.and_then(|index| slow.slots.swap_remove(index).blocked);
            let woken = if slow.sum() == 0 { slow.take_waiters() } else { Vec::new() };
            (blocked, woken)
        };
        wake_all(woken);
        // A task that still waits for this slot would never be woken again.
        wake_all(blocked);
    }
}

/// The control path's part: what sections need.
impl Gate {
    /// G1, + 1. A `heavy` has to follow before anybody relies on it.
    pub(crate) fn freeze(&self) {
        let _slow = self.slow.lock();
        // Relaxed: the `heavy` that follows orders it against requests (G2), `slow` the rest.
        self.hot.frozen.fetch_add(1, Ordering::Relaxed);
    }

    /// G1, + 1, for a section that takes over an already drained gate. False: nobody had seen it
    /// idle yet, so that the caller needs a barrier of its own.
    pub(crate) fn freeze_inherited(&self) -> bool {
        let slow = self.slow.lock();
        // Relaxed: as in `freeze`.
        let before = self.hot.frozen.fetch_add(1, Ordering::Relaxed);
        debug_assert!(before > 0, "{}: adopted, but not drained by its adopter", self.name);
        debug_assert!(slow.idle || slow.sum() == 0, "{}: adopted while busy", self.name);
        slow.idle
    }

    /// Counts an announced section; `run_hooks` has to follow.
    pub(crate) fn announce(&self) {
        self.slow.lock().hooks.announce();
    }

    /// G1, − 1; also takes back an announcement. Returns who has to be woken; `run_hooks` follows.
    pub(crate) fn thaw(&self, announced: bool) -> Vec<Waker> {
        let mut slow = self.slow.lock();
        if announced {
            slow.hooks.retract();
        }
        // Release: partner of the Acquire in `admits` (G6).
        let before = self.hot.frozen.fetch_sub(1, Ordering::Release);
        debug_assert!(before > 0, "{}: thawed more often than frozen", self.name);
        if before != 1 {
            return Vec::new();
        }
        slow.idle = false;
        slow.slots.iter_mut().filter_map(|entry| entry.blocked.take()).collect()
    }

    /// Moves the hooks after the level (see `hooks`). Returns when they agree or another thread is
    /// at it.
    pub(crate) fn run_hooks(&self) {
        let Some(hooks) = &self.hooks else { return };
        loop {
            let Some(call) = self.slow.lock().hooks.claim() else {
                return;
            };
            let _finish = FinishHook(self);
            match call {
                HookCall::Begin => hooks.drain_begin(),
                HookCall::End => hooks.drain_end(),
            }
        }
    }

    /// Whether the gate has come to rest; the caller's `heavy` lies between its freeze and this.
    pub(crate) fn is_settled(&self) -> bool {
        let mut slow = self.slow.lock();
        self.has_settled(&mut slow)
    }

    /// As `is_settled`; if not, `waker` is kept under `key` (or a new key, which is returned).
    pub(crate) fn poll_settled(&self, key: Option<u64>, waker: Waker) -> Result<(), u64> {
        let (outcome, _replaced) = {
            let mut slow = self.slow.lock();
            let known = slow.waiters.iter().position(|(other, _)| Some(*other) == key);
            if self.has_settled(&mut slow) {
                (Ok(()), known.map(|index| slow.waiters.swap_remove(index).1))
            } else if let Some((index, key)) = known.zip(key) {
                let replaced = std::mem::replace(&mut slow.waiters[index].1, waker);
                (Err(key), Some(replaced))
            } else {
                let key = slow.next_waiter;
                slow.next_waiter += 1;
                slow.waiters.push((key, waker));
                (Err(key), None)
            }
        };
        outcome
    }

    /// Takes a waiter's waker out again, if it is still there.
    pub(crate) fn forget_waiter(&self, key: u64) {
        let _dropped_unlocked = {
            let mut slow = self.slow.lock();
            let known = slow.waiters.iter().position(|(other, _)| *other == key);
            known.map(|index| slow.waiters.swap_remove(index))
        };
    }

    /// The slots that count something now.
    pub(crate) fn busy_slots(&self) -> Vec<Arc<SlotShared>> {
        let slow = self.slow.lock();
        let slots = slow.slots.iter().map(|entry| &entry.slot);
        slots.filter(|slot| slot.in_flight() != 0).cloned().collect()
    }

    fn has_settled(&self, slow: &mut Slow) -> bool {
        slow.idle = slow.idle || slow.sum() == 0;
        slow.idle && (self.hooks.is_none() || slow.hooks.is_ready())
    }
}

/// Ends a hook call, also one that panicked, and lets sections look again (D2).
struct FinishHook<'a>(&'a Gate);

impl Drop for FinishHook<'_> {
    fn drop(&mut self) {
        let woken = {
            let mut slow = self.0.slow.lock();
            slow.hooks.finish();
            slow.take_waiters()
        };
        wake_all(woken);
    }
}

impl Slow {
    fn sum(&self) -> u64 {
        let counts = self.slots.iter().map(|entry| entry.slot.in_flight());
        counts.fold(0, u64::saturating_add)
    }

    fn blocked_of(&mut self, slot: &Arc<SlotShared>) -> Option<&mut Option<Waker>> {
        let mut slots = self.slots.iter_mut();
        let entry = slots.find(|entry| Arc::ptr_eq(&entry.slot, slot))?;
        Some(&mut entry.blocked)
    }

    fn take_waiters(&mut self) -> Vec<Waker> {
        self.waiters.drain(..).map(|(_, waker)| waker).collect()
    }
}

/// Called without locks (G7): a waker may run anything.
pub(crate) fn wake_all(wakers: impl IntoIterator<Item = Waker>) {
    wakers.into_iter().for_each(Waker::wake);
}

impl fmt::Debug for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gate")
            .field("name", &self.name)
            .field("frozen", &self.frozen_count())
            .field("generation", &self.generation())
            .field("in_flight", &self.in_flight())
            .finish_non_exhaustive()
    }
}
