//! [`RangeLock`]: tasks that need a byte range for themselves, or want to share it, in order of
//! arrival.
//!
//! All requests, held and waiting, stand in one list in order of arrival. Two requests *conflict*
//! if their ranges have a byte in common and one of them is exclusive.
//!
//! 1. (RL1) A request is held exactly if no earlier request in the list conflicts with it. A
//!    waiting request counts its *blockers*, the earlier conflicting ones still listed; it is held
//!    from the moment the count is zero.
//! 2. (RL2) So two held requests never conflict: one of them is earlier, and would block the other.
//! 3. (RL3) So nobody starves: a request waits only for earlier ones. A shared request that
//!    overlaps a waiting shared one does not wait for it; it cannot delay it either.
//!
//! Cost: joining and leaving scan the list under its mutex, O(n) for n requests held or waiting.
//! It is meant for the tens of requests in flight on one node; an interval tree would pay above
//! some hundreds.

use crate::lock::wait_list::{Key, Removed, WaitList, Wakers, wake};
use crate::sync::Mutex;
use std::fmt;
use std::ops::Range;
use std::pin::Pin;
use std::task::{Context, Poll};

/// Whether a range may be held together with others that overlap it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RangeMode {
    /// Together with other shared ranges.
    Shared,
    /// Alone.
    Exclusive,
}

/// Locks on byte ranges `[start, end)`.
///
/// Conflicting requests get their turn in order of arrival: a newcomer that conflicts with a
/// waiting request waits behind it, even if it could go on now. Requests that do not conflict
/// never wait for each other. An empty range (`start >= end`) conflicts with nothing.
///
/// Any thread may call any method. A task that asks for a range it already holds, in a conflicting
/// mode, waits for ever.
pub struct RangeLock {
    table: Mutex<Table>,
}

/// Names a held range without borrowing its lock, for a request slot that outlives the borrow.
///
/// It is a plain value: dropping it releases nothing, and it is released exactly once with
/// [`RangeLock::release`] of the lock it came from.
#[must_use = "the range stays locked until the token is released"]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RangeToken(Key);

impl RangeLock {
    /// A lock with nothing held.
    pub fn new() -> Self {
        RangeLock { table: Mutex::new(Table { requests: WaitList::new(), waiting: 0 }) }
    }

    /// Waits until `range` (bytes) can be held in `mode`. The task queues at the first poll; a
    /// future that is dropped leaves the queue, or releases the range it was just given, and lets
    /// those behind it go on.
    pub async fn lock(&self, range: Range<u64>, mode: RangeMode) -> RangeGuard<'_> {
        let (token, held) = self.table.lock().join(range, mode);
        let guard = RangeGuard { lock: self, token };
        if !held {
            // The guard owns the request while it waits too: leaving the list is the same step
            // for a waiting request and for a held one.
            RangeWait { guard: &guard }.await;
        }
        guard
    }

    /// Holds `range` (bytes) in `mode` if no request, held or waiting, conflicts with it.
    pub fn try_lock(&self, range: Range<u64>, mode: RangeMode) -> Option<RangeGuard<'_>> {
        let token = self.try_acquire(range, mode)?;
        Some(RangeGuard { lock: self, token })
    }

    /// As [`try_lock`](Self::try_lock), but the caller keeps a plain [`RangeToken`] and must
    /// [`release`](Self::release) it.
    pub fn try_acquire(&self, range: Range<u64>, mode: RangeMode) -> Option<RangeToken> {
        self.table.lock().try_join(range, mode)
    }

    /// Gives a held range up and wakes the tasks that only waited for it.
    ///
    /// # Panics
    ///
    /// If `token` was released before: then two requests believed to hold one range.
    pub fn release(&self, token: RangeToken) {
        let mut woken = Wakers::new();
        let left = self.table.lock().leave(token, &mut woken);
        drop(left);
        wake(woken);
    }

    /// Whether any task waits for a range. For checks: the answer may be old at once.
    pub fn has_waiters(&self) -> bool {
        self.table.lock().waiting > 0
    }

    /// Whether no range is held or waited for. For checks: the answer may be old at once.
    pub fn is_idle(&self) -> bool {
        self.table.lock().requests.is_empty()
    }
}

impl Default for RangeLock {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for RangeLock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RangeLock").finish_non_exhaustive()
    }
}

/// A held range of a [`RangeLock`]; dropping it, on any thread, releases it.
#[must_use = "dropping the guard releases the range at once"]
pub struct RangeGuard<'a> {
    lock: &'a RangeLock,
    token: RangeToken,
}

impl RangeGuard<'_> {
    /// Keeps the range held and hands the duty to [`release`](RangeLock::release) it to the caller.
    pub fn into_token(self) -> RangeToken {
        std::mem::ManuallyDrop::new(self).token
    }
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        self.lock.release(self.token);
    }
}

impl fmt::Debug for RangeGuard<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RangeGuard").finish_non_exhaustive()
    }
}

/// Resolves once the request of `guard` is held.
struct RangeWait<'a> {
    guard: &'a RangeGuard<'a>,
}

impl Future for RangeWait<'_> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        // Before the table's guard, so dropped after it (WL3).
        let _stale;
        let waker = cx.waker().clone();
        let mut table = self.guard.lock.table.lock();
        let key = self.guard.token.0;
        if table.requests.state(key).blockers == 0 {
            return Poll::Ready(());
        }
        _stale = table.requests.set_waker(key, waker);
        Poll::Pending
    }
}

/// A range that is held, or waited for while it has blockers (RL1).
#[derive(Debug)]
struct Request {
    range: Range<u64>,
    mode: RangeMode,
    blockers: u32,
}

impl Request {
    fn conflicts(&self, range: &Range<u64>, mode: RangeMode) -> bool {
        let both_shared = self.mode == RangeMode::Shared && mode == RangeMode::Shared;
        // Two non-empty ranges have a byte in common if each starts before the other ends.
        !both_shared
            && !self.range.is_empty()
            && !range.is_empty()
            && self.range.start < range.end
            && range.start < self.range.end
    }
}

/// What the mutex guards.
#[derive(Debug)]
struct Table {
    /// Every request, held or waiting, linked in order of arrival. None is ever detached.
    requests: WaitList<Request>,
    /// How many of them have blockers.
    waiting: usize,
}

impl Table {
    /// Adds a request, and tells whether it is held at once.
    fn join(&mut self, range: Range<u64>, mode: RangeMode) -> (RangeToken, bool) {
        let mut blockers = 0;
        let mut cursor = self.requests.front();
        while let Some(key) = cursor {
            // No overflow: a list has fewer than 2^32 entries.
            blockers += u32::from(self.requests.state(key).conflicts(&range, mode));
            cursor = self.requests.next(key);
        }
        self.waiting += usize::from(blockers > 0);
        (self.add(range, mode, blockers), blockers == 0)
    }

    /// Adds a request only if it is held at once.
    fn try_join(&mut self, range: Range<u64>, mode: RangeMode) -> Option<RangeToken> {
        let mut cursor = self.requests.front();
        while let Some(key) = cursor {
            if self.requests.state(key).conflicts(&range, mode) {
                return None;
            }
            cursor = self.requests.next(key);
        }
        Some(self.add(range, mode, 0))
    }

    fn add(&mut self, range: Range<u64>, mode: RangeMode, blockers: u32) -> RangeToken {
        let request = Request { range, mode, blockers };
        RangeToken(self.requests.push_back(request, None))
    }

    /// Takes a request out, and one blocker off every later request that conflicts with it. What
    /// it returns is dropped after unlocking (WL3).
    fn leave(&mut self, token: RangeToken, woken: &mut Wakers) -> Removed<Request> {
        let key = token.0;
        assert!(
            self.requests.contains(key),
            "a range token is released once, to the lock it came from"
        );
        let mut cursor = self.requests.next(key);
        let left = self.requests.remove(key);
        let gone = &left.state;
        self.waiting -= usize::from(gone.blockers > 0);
        while let Some(key) = cursor {
            let later = self.requests.state_mut(key);
            if later.conflicts(&gone.range, gone.mode) {
                later.blockers -= 1;
                if later.blockers == 0 {
                    self.waiting -= 1;
                    woken.extend(self.requests.take_waker(key));
                }
            }
            cursor = self.requests.next(key);
        }
        left
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::RangeMode::{Exclusive, Shared};
    use super::*;
    use crate::lock::testing::{Probe, block_on, on_threads};
    use proptest::prelude::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn is_send<T: Send>(_: &T) {}

    #[test]
    fn contended_counters_equal_the_atomic_counter() {
        // Thread n adds to cells n and n+1 under the lock of both; a cell is read, then written,
        // so an overlap loses a count.
        let lock = RangeLock::new();
        let cells = [(); 5].map(|()| AtomicUsize::new(0));
        let atomic = AtomicUsize::new(0);
        on_threads(4, |thread| {
            for _ in 0..3_000 {
                let future = async {
                    let start = thread as u64;
                    let _guard = lock.lock(start..start + 2, Exclusive).await;
                    for cell in &cells[thread..thread + 2] {
                        cell.store(cell.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
                        atomic.fetch_add(1, Ordering::Relaxed);
                    }
                };
                is_send(&future);
                block_on(future);
            }
        });
        let sum: usize = cells.into_iter().map(AtomicUsize::into_inner).sum();
        assert_eq!(sum, atomic.into_inner());
        assert!(lock.is_idle());
    }

    #[test]
    fn only_a_common_byte_and_an_exclusive_side_conflict() {
        let cases = [
            (0..10, Exclusive, 10..20, Exclusive, true),
            (0..10, Exclusive, 9..20, Exclusive, false),
            (0..10, Shared, 5..6, Exclusive, false),
            (0..10, Exclusive, 5..6, Shared, false),
            (0..10, Shared, 5..6, Shared, true),
            (0..10, Exclusive, 5..5, Exclusive, true),
            (5..5, Exclusive, 0..10, Exclusive, true),
            (0..u64::MAX, Exclusive, u64::MAX - 1..u64::MAX, Shared, false),
            (0..u64::MAX, Exclusive, Range { start: 9, end: 3 }, Shared, true),
        ];
        for (first, first_mode, second, second_mode, together) in cases {
            let lock = RangeLock::new();
            let _held = lock.try_lock(first, first_mode).unwrap();
            assert_eq!(lock.try_lock(second, second_mode).is_some(), together);
        }
    }

    #[test]
    fn a_newcomer_waits_behind_a_waiting_request_it_overlaps() {
        let lock = RangeLock::new();
        let held = lock.try_lock(0..10, Exclusive).unwrap();
        let mut waiting = Probe::new(lock.lock(5..20, Exclusive));
        assert!(waiting.poll().is_none());
        assert!(lock.has_waiters());
        assert!(lock.try_lock(15..25, Exclusive).is_none());
        let mut newcomer = Probe::new(lock.lock(15..25, Exclusive));
        assert!(newcomer.poll().is_none());
        assert!(lock.try_lock(30..40, Exclusive).is_some());
        drop(held);
        assert_eq!((waiting.wakes(), newcomer.wakes()), (1, 0));
        drop(waiting.poll().unwrap());
        assert!(newcomer.poll().is_some());
        assert!(lock.is_idle() && !lock.has_waiters());
    }

    #[test]
    fn a_dropped_waiter_unblocks_those_behind_it() {
        let lock = RangeLock::new();
        let held = lock.try_lock(0..10, Shared).unwrap();
        let mut writer = Probe::new(lock.lock(0..10, Exclusive));
        let mut reader = Probe::new(lock.lock(0..10, Shared));
        assert!(writer.poll().is_none());
        assert!(reader.poll().is_none());
        drop(writer);
        assert_eq!(reader.wakes(), 1);
        drop(held);
        assert!(reader.poll().is_some());
        assert!(lock.is_idle());
    }

    #[test]
    fn a_dropped_grant_goes_to_the_next() {
        let lock = RangeLock::new();
        let held = lock.try_lock(0..10, Exclusive).unwrap();
        let mut one = Probe::new(lock.lock(0..10, Exclusive));
        let mut two = Probe::new(lock.lock(0..10, Exclusive));
        assert!(one.poll().is_none());
        assert!(two.poll().is_none());
        drop(held);
        assert_eq!((one.wakes(), two.wakes()), (1, 0));
        drop(one);
        assert_eq!(two.wakes(), 1);
        assert!(two.poll().is_some());
    }

    #[test]
    fn a_token_outlives_its_borrow_and_releases() {
        let lock = RangeLock::new();
        let token = block_on(lock.lock(0..10, Exclusive)).into_token();
        assert!(lock.try_acquire(0..1, Shared).is_none());
        lock.release(token);
        let token = lock.try_acquire(0..1, Shared).unwrap();
        lock.release(token);
        assert!(lock.is_idle());
    }

    #[test]
    #[should_panic(expected = "released once")]
    fn a_token_released_twice_is_caught_even_if_its_slot_is_in_use_again() {
        let lock = RangeLock::new();
        let token = lock.try_acquire(0..10, Exclusive).unwrap();
        lock.release(token);
        let _other = lock.try_acquire(0..10, Exclusive).unwrap();
        lock.release(token);
    }

    /// One request of the naive model: the bytes it wants, one by one.
    struct Wanted {
        id: usize,
        bytes: Vec<u64>,
        mode: RangeMode,
    }

    /// The definition (RL1), word by word: held if no earlier request shares a byte with it, unless
    /// both are shared.
    fn held(requests: &[Wanted], index: usize) -> bool {
        let wanted = &requests[index];
        requests[..index].iter().all(|earlier| {
            (earlier.mode == Shared && wanted.mode == Shared)
                || !earlier.bytes.iter().any(|byte| wanted.bytes.contains(byte))
        })
    }

    #[derive(Clone, Debug)]
    enum Step {
        Lock(Range<u64>, RangeMode),
        Try(Range<u64>, RangeMode),
        Drop(prop::sample::Index),
    }

    fn step() -> impl Strategy<Value = Step> {
        let range = (0..12u64, 0..6u64).prop_map(|(start, len)| start..start + len);
        let mode = prop_oneof![Just(Shared), Just(Exclusive)];
        prop_oneof![
            3 => (range.clone(), mode.clone()).prop_map(|(range, mode)| Step::Lock(range, mode)),
            1 => (range, mode).prop_map(|(range, mode)| Step::Try(range, mode)),
            3 => any::<prop::sample::Index>().prop_map(Step::Drop),
        ]
    }

    /// A request of the real lock: pending, or held by its guard.
    struct Real<'a> {
        probe: Option<Probe<'a, RangeGuard<'a>>>,
        guard: Option<RangeGuard<'a>>,
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        #[test]
        fn holds_exactly_what_the_naive_model_holds(steps in prop::collection::vec(step(), 1..60)) {
            let lock = RangeLock::new();
            let mut model: Vec<Wanted> = Vec::new();
            let mut real: Vec<Real<'_>> = Vec::new();
            for (id, step) in steps.into_iter().enumerate() {
                match step {
                    Step::Lock(range, mode) => {
                        model.push(Wanted { id, bytes: range.clone().collect(), mode });
                        let mut probe = Probe::new(lock.lock(range, mode));
                        let guard = probe.poll();
                        real.push(Real { probe: Some(probe), guard });
                    }
                    Step::Try(range, mode) => {
                        model.push(Wanted { id, bytes: range.clone().collect(), mode });
                        let guard = lock.try_lock(range, mode);
                        prop_assert_eq!(guard.is_some(), held(&model, model.len() - 1));
                        if guard.is_some() {
                            real.push(Real { probe: None, guard });
                        } else {
                            model.pop();
                        }
                    }
                    Step::Drop(index) if !model.is_empty() => {
                        let index = index.index(model.len());
                        model.remove(index);
                        real.remove(index);
                    }
                    Step::Drop(_) => {}
                }
                for (index, real) in real.iter_mut().enumerate() {
                    let expected = held(&model, index);
                    // Every second request is polled only when it is woken: no grant without a wake.
                    if let (None, Some(probe)) = (&real.guard, &mut real.probe)
                        && (model[index].id.is_multiple_of(2) || probe.wakes() > 0)
                    {
                        real.guard = probe.poll();
                    }
                    prop_assert_eq!(real.guard.is_some(), expected);
                }
                let waiting = real.iter().filter(|real| real.guard.is_none()).count();
                prop_assert_eq!(lock.has_waiters(), waiting > 0);
                prop_assert_eq!(lock.is_idle(), model.is_empty());
            }
            drop(real);
            prop_assert!(lock.is_idle());
        }
    }
}
