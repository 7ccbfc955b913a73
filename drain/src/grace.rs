//! Grace periods: a resource that requests may have been told of (a freed host cluster, say) is not
//! used again before every such request has ended.
//!
//! A reader *pins* before it looks a resource up and unpins when it no longer uses what it found.
//! A retirer makes the resource impossible to find, takes a *tag*, and lets it be used again once
//! the tag has [elapsed](Grace::elapsed). Nobody waits; somebody calls [`Grace::try_advance`] from
//! time to time. Unlike an epoch collector it costs nothing to hold a pin for seconds, except that
//! reuse is held up.
//!
//! The epoch only grows; pins of epoch `e` count in bucket `e mod 2` of their loop.
//!
//! R1. A loop's counters are written by that loop's thread only.
//! R2. The epoch goes from `e` to `e + 1` only after the bucket of `e − 1` was seen empty on every
//!     loop, and a `heavy` follows each step before the next scan. Steps are made one at a time.
//! R3. A pin of epoch `e` is valid only if the epoch was still `e` after the counter was raised and
//!     a `light` passed; otherwise it is taken back.
//! R4. A tag `t` has elapsed when the epoch is at least `t + 3`.
//!
//! *Claim: when `t` has elapsed, no valid pin is left whose holder may have found what was retired
//! under `t`; and all its holder did happens before.*
//!
//! 1. Let H(e) be the barrier after the step to `e`. A valid pin of epoch `e` has its `light` before
//!    H(e + 1), or it would have seen the step and been taken back (R3, B1). So its count is visible
//!    to every scan after H(e + 1), in particular to the one that allows the step to `e + 2` (R2).
//!    A loop's counter is never below its valid pins, since one thread writes it (R1), and no pin of
//!    epoch `e` becomes valid any more; so each loop may be scanned in its turn, and "seen zero"
//!    lasts. Hence at epoch `e + 2` all pins of epochs up to `e` are gone.
//! 2. At epoch `t + 3` all pins of epochs up to `t + 1` are gone. What about pins of `t + 2` and
//!    later? The retirer unlinks, passes a `light`, and reads `t`. It did not see the step to
//!    `t + 1`, so its `light` comes before H(t + 1) (B1), so the unlinking is visible after H(t + 1)
//!    (B2), so also to a reader that read epoch `t + 2` or later (Acquire), whose store (Release)
//!    came after H(t + 1). Such readers do not find the resource.
//!    Two steps would not do: a reader may have read `t + 1` before H(t + 1) made the unlinking
//!    visible, its own `light` being no instruction. (With fences on both sides two steps do, so no
//!    model shows the need of the third.) A step more is cheaper than a `heavy` for each retirement.
//! 3. Unpin's Release, the scan's Acquire, the step's Release, `elapsed`'s Acquire: whatever a pin's
//!    holder did happens before the reuse.
//!
//! The drawback: one request that lasts holds up all reuse of this `Grace`, whatever it pinned for.

use crate::barrier;
use crate::sync::Mutex;
use crate::sync::atomic::{AtomicU64, Ordering};
use crossbeam_utils::CachePadded;
use std::fmt;
use std::sync::OnceLock;

/// Loops that can pin; loop indices lie below it.
pub const MAX_LOOPS: usize = 256;

/// A valid pin: what the holder found while it lasts is not used again. Give it back with
/// [`Grace::unpin`], on the same loop, exactly once. It names its bucket.
#[must_use = "a pin that is not given back stops all reuse"]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GracePin(u8);

impl GracePin {
    /// The pin as a number, for whoever has to carry it as one; not the pin itself any more.
    pub fn into_number(self) -> u64 {
        u64::from(self.0)
    }

    /// The pin again, from what [`GracePin::into_number`] gave.
    pub fn from_number(number: u64) -> GracePin {
        debug_assert!(number < 2, "{number} names no bucket");
        GracePin((number % 2) as u8)
    }
}

/// A point in a [`Grace`]'s own time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GraceEpoch(u64);

/// The valid pins of one loop (and, for a moment, invalid ones), by bucket.
#[derive(Debug)]
struct Buckets([AtomicU64; 2]);

/// See the page. Shared by all loops.
pub struct Grace {
    epoch: CachePadded<AtomicU64>,
    loops: Box<[OnceLock<Box<CachePadded<Buckets>>>]>,
    /// R2: held by whoever makes a step.
    stepping: Mutex<()>,
}

impl Grace {
    /// Nothing pinned, nothing retired.
    pub fn new() -> Grace {
        barrier::prepare();
        Grace {
            epoch: CachePadded::new(AtomicU64::new(0)),
            loops: (0..MAX_LOOPS).map(|_| OnceLock::new()).collect(),
            stepping: Mutex::new(()),
        }
    }

    /// Pins, before looking anything up. Only on the thread of loop `loop_index`. Tries again only
    /// when the epoch moved meanwhile.
    ///
    /// # Panics
    /// If `loop_index` is not below [`MAX_LOOPS`].
    #[inline]
    pub fn pin(&self, loop_index: usize) -> GracePin {
        let buckets = self.loops[loop_index].get_or_init(Buckets::new);
        loop {
            // Acquire: partner of the step's Release; the unlinkings before that step are seen.
            let epoch = self.epoch.load(Ordering::Acquire);
            let counter = &buckets.0[bucket_of(epoch)];
            // Relaxed, both: one writer (R1); `light` orders the store before the second look.
            let before = counter.load(Ordering::Relaxed);
            counter.store(before + 1, Ordering::Relaxed);
            barrier::light();
            // Acquire: keeps the look-ups that follow after it.
            if self.epoch.load(Ordering::Acquire) == epoch {
                return GracePin(bucket_of(epoch) as u8);
            }
            // Release: as in `unpin`, so that a zero always carries the pins before it.
            counter.store(before, Ordering::Release);
        }
    }

    /// Gives a pin back: the last thing a request does. Only on the thread that took it, with the
    /// same index. One store.
    ///
    /// # Panics
    /// If `loop_index` is not below [`MAX_LOOPS`].
    #[inline]
    pub fn unpin(&self, loop_index: usize, pin: GracePin) {
        let Some(buckets) = self.loops[loop_index].get() else {
            debug_assert!(false, "loop {loop_index} unpins and never pinned");
            return;
        };
        let counter = &buckets.0[usize::from(pin.0)];
        // Relaxed: one writer (R1).
        let before = counter.load(Ordering::Relaxed);
        debug_assert!(before > 0, "a pin is given back once");
        // Release: partner of the scan's Acquire (claim 3).
        counter.store(before.saturating_sub(1), Ordering::Release);
    }

    /// The tag for what the caller has *already* made impossible to find. Any thread.
    pub fn current(&self) -> GraceEpoch {
        // Claim 2: the unlinking before, the look at the epoch after.
        barrier::light();
        // Relaxed: the number alone is used; `light` has the ordering that claim 2 needs.
        GraceEpoch(self.epoch.load(Ordering::Relaxed))
    }

    /// Makes one step of the epoch if no pin stands in the way and nobody else is at it, and returns
    /// the epoch. Never waits; a step costs one [`heavy`](barrier::heavy). Any thread. Without pins,
    /// a tag elapses after three steps.
    pub fn try_advance(&self) -> GraceEpoch {
        let Some(_stepping) = self.stepping.try_lock() else {
            return self.reached();
        };
        // Relaxed: only the holder of `stepping` writes the epoch.
        let epoch = self.epoch.load(Ordering::Relaxed);
        if !self.is_empty(bucket_of(epoch + 1)) {
            return GraceEpoch(epoch);
        }
        // Release: partner of the Acquires in `pin` and `reached`.
        self.epoch.store(epoch + 1, Ordering::Release);
        // R2: no later scan takes the old epoch's bucket for empty while a pin of it is not yet
        // visible. Inside of the lock, so that the next step's scan comes after it.
        barrier::heavy();
        GraceEpoch(epoch + 1)
    }

    /// Whether every pin that may know what was retired under `tag` has been given back; all that
    /// its holders did happens before a `true`. Any thread.
    pub fn elapsed(&self, tag: GraceEpoch) -> bool {
        self.reached().0 >= tag.0.saturating_add(3)
    }

    /// Acquire: partner of the step's Release (claim 3).
    fn reached(&self) -> GraceEpoch {
        GraceEpoch(self.epoch.load(Ordering::Acquire))
    }

    /// A loop without buckets has never pinned: one that pinned validly made them before its
    /// `light`, so that a scan behind the `heavy` sees them like the count (claim 1).
    fn is_empty(&self, bucket: usize) -> bool {
        let loops = self.loops.iter().filter_map(OnceLock::get);
        // Acquire: partner of unpin's Release (claim 3).
        loops.into_iter().all(|buckets| buckets.0[bucket].load(Ordering::Acquire) == 0)
    }
}

#[inline]
fn bucket_of(epoch: u64) -> usize {
    (epoch % 2) as usize
}

impl Buckets {
    fn new() -> Box<CachePadded<Buckets>> {
        Box::new(CachePadded::new(Buckets([AtomicU64::new(0), AtomicU64::new(0)])))
    }
}

impl Default for Grace {
    fn default() -> Self {
        Grace::new()
    }
}

impl fmt::Debug for Grace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grace").field("epoch", &self.reached().0).finish_non_exhaustive()
    }
}

#[cfg(all(test, not(loom), not(shuttle)))]
mod tests {
    use super::*;

    #[test]
    fn without_pins_a_tag_elapses_after_three_steps() {
        let grace = Grace::new();
        let tag = grace.current();
        for _ in 0..3 {
            assert!(!grace.elapsed(tag));
            grace.try_advance();
        }
        assert!(grace.elapsed(tag));
        assert!(!grace.elapsed(grace.current()));
    }

    #[test]
    fn a_pin_before_the_tag_holds_it_up_until_given_back() {
        let grace = Grace::new();
        let pin = grace.pin(0);
        let tag = grace.current();
        for _ in 0..10 {
            grace.try_advance();
        }
        assert!(!grace.elapsed(tag));
        grace.unpin(0, pin);
        for _ in 0..3 {
            grace.try_advance();
        }
        assert!(grace.elapsed(tag));
    }

    #[test]
    fn overlapping_pins_of_several_loops_each_count() {
        let grace = Grace::new();
        let pins = [grace.pin(0), grace.pin(0), grace.pin(MAX_LOOPS - 1)];
        let tag = grace.current();
        let elapses = |grace: &Grace| {
            for _ in 0..6 {
                grace.try_advance();
            }
            grace.elapsed(tag)
        };
        grace.unpin(0, pins[0]);
        assert!(!elapses(&grace));
        grace.unpin(MAX_LOOPS - 1, pins[2]);
        assert!(!elapses(&grace));
        grace.unpin(0, pins[1]);
        assert!(elapses(&grace));
    }

    #[test]
    fn a_stream_of_short_pins_does_not_hold_a_tag_up() {
        let grace = Grace::new();
        let mut pin = grace.pin(7);
        let tag = grace.current();
        for _ in 0..6 {
            grace.try_advance();
            let next = grace.pin(7);
            grace.unpin(7, pin);
            pin = next;
        }
        assert!(grace.elapsed(tag), "never without a pin, and yet the tag elapses");
        grace.unpin(7, pin);
    }

    #[test]
    fn a_step_that_another_thread_is_making_is_not_waited_for() {
        let grace = Grace::new();
        let stepping = grace.stepping.lock();
        assert_eq!(grace.try_advance(), GraceEpoch(0));
        drop(stepping);
        assert_eq!(grace.try_advance(), GraceEpoch(1));
    }

    #[test]
    fn a_reader_never_holds_what_is_used_again() {
        use std::sync::atomic::{AtomicBool, AtomicU64 as Cell};
        // `published` names the live resource; its content is its own number while it lives.
        const RETIRED: u64 = u64::MAX;
        let (grace, stop) = (Grace::new(), AtomicBool::new(false));
        let content: Vec<_> = (0..64).map(Cell::new).collect();
        let published = Cell::new(0);
        std::thread::scope(|scope| {
            for loop_index in 0..2 {
                let (grace, stop, content, published) = (&grace, &stop, &content, &published);
                scope.spawn(move || {
                    while !stop.load(Ordering::Relaxed) {
                        let pin = grace.pin(loop_index);
                        let found = published.load(Ordering::Acquire);
                        for _ in 0..20 {
                            let seen = content[found as usize].load(Ordering::Relaxed);
                            assert_eq!(seen, found, "used again under a reader");
                        }
                        grace.unpin(loop_index, pin);
                        // A reader put to sleep is seldom one with a pin, so that steps go on.
                        std::thread::yield_now();
                    }
                });
            }
            for round in 1..300u64 {
                let old = published.load(Ordering::Relaxed);
                let new = round % 64;
                content[new as usize].store(new, Ordering::Relaxed);
                published.store(new, Ordering::Release);
                let tag = grace.current();
                while !grace.elapsed(tag) {
                    grace.try_advance();
                    std::thread::yield_now();
                }
                content[old as usize].store(RETIRED, Ordering::Relaxed);
            }
            stop.store(true, Ordering::Relaxed);
        });
    }
}
