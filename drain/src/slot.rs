//! A queue's slot at its origin's gate: the counter of admitted requests, written by the one thread
//! that owns the queue, by plain loads and stores.
//!
//! S1. Only the owning thread writes the counter, so a load and a store are an increment. The type
//!     is neither `Send` nor `Sync`; what others read is behind [`SlotShared`].
//! S2. The counter is at least the number of admitted requests (G4).
//! S3. At most one waker waits for a thaw per slot: one task drives a queue's blocked requests.

use crate::barrier;
use crate::gate::Gate;
use crate::ledger::{Ledger, RequestRecord};
use crate::sync::atomic::{AtomicU64, Ordering};
use crossbeam_utils::CachePadded;
use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;
use std::task::{Context, Poll};

/// What the gate and the reports read. Padded: no other thread's line is written by a request.
#[derive(Debug)]
pub(crate) struct SlotShared {
    count: CachePadded<AtomicU64>,
    label: String,
    ledger: Ledger,
}

impl SlotShared {
    pub(crate) fn new(label: String) -> Self {
        SlotShared { count: CachePadded::new(AtomicU64::new(0)), label, ledger: Ledger::new() }
    }

    /// Acquire: partner of the Release stores that take requests back; who sees the count fall sees
    /// what the requests did (G6).
    pub(crate) fn in_flight(&self) -> u64 {
        self.count.load(Ordering::Acquire)
    }

    pub(crate) fn label(&self) -> &str {
        &self.label
    }

    pub(crate) fn requests(&self) -> Vec<RequestRecord> {
        self.ledger.snapshot()
    }
}

/// One queue's place at a [`Gate`]. It stays on the thread that opened it; dropping it (with
/// nothing in flight) closes it.
///
/// ```compile_fail
/// fn needs_send<T: Send>() {}
/// needs_send::<blockplex_drain::Slot>();
/// ```
pub struct Slot {
    shared: Arc<SlotShared>,
    gate: Arc<Gate>,
    /// S1: neither `Send` nor `Sync`.
    _owned_by_its_thread: PhantomData<*const ()>,
}

impl Slot {
    pub(crate) fn new(gate: Arc<Gate>, shared: Arc<SlotShared>) -> Self {
        Slot { shared, gate, _owned_by_its_thread: PhantomData }
    }

    /// Admits a request, or refuses it because a section holds the gate shut. An admitted request
    /// is counted until [`Slot::exit`]. A refused one waits by [`Slot::poll_thawed`] and then tries
    /// again; it is not in flight meanwhile. Never blocks while it admits.
    #[inline]
    #[must_use = "an admitted request has to exit, a refused one must not run"]
    pub fn try_enter(&self) -> bool {
        // Relaxed, both: nobody else writes (S1), and `light` orders the store before the look at
        // `frozen` (G2).
        let before = self.shared.count.load(Ordering::Relaxed);
        self.shared.count.store(before + 1, Ordering::Relaxed);
        barrier::light();
        if self.gate.admits() {
            return true;
        }
        self.back_out(before);
        false
    }

    /// A drainer may have summed up the transient +1 and gone to sleep over it, so it is told (G3).
    #[cold]
    fn back_out(&self, before: u64) {
        // Release: keeps the counter's stores one chain for `in_flight`'s Acquire.
        self.shared.count.store(before, Ordering::Release);
        if before == 0 {
            self.gate.kick();
        }
    }

    /// Ends an admitted request: its last effect, after its completion was delivered. Wakes the
    /// sections that waited for it alone.
    #[inline]
    pub fn exit(&self) {
        self.exit_many(1);
    }

    /// Ends `count` admitted requests at once: as [`Slot::exit`] so many times, at the price of one.
    #[inline]
    pub fn exit_many(&self, count: u64) {
        // Relaxed: nobody else writes (S1).
        let before = self.shared.count.load(Ordering::Relaxed);
        debug_assert!(before >= count, "a request exits once");
        let rest = before.saturating_sub(count);
        // Release: partner of the sum's Acquire (G6).
        self.shared.count.store(rest, Ordering::Release);
        barrier::light();
        // While this slot counts more, no sum is zero, and a later exit comes by here.
        if rest == 0 && self.gate.wants_kick() {
            self.gate.kick();
        }
    }

    /// The requests admitted through this slot and not ended.
    #[inline]
    pub fn in_flight(&self) -> u64 {
        // Relaxed: the owner reads what it wrote.
        self.shared.count.load(Ordering::Relaxed)
    }

    /// Whether a request would probably be admitted now. Only [`Slot::try_enter`] decides.
    #[inline]
    pub fn is_admitting(&self) -> bool {
        self.gate.admits()
    }

    /// `Ready` once the gate admits; the caller then has to run [`Slot::try_enter`] again, which
    /// may refuse again. One task per slot may wait: a later call's waker replaces the earlier one.
    /// To give up waiting, just stop polling; a stale waker is woken at most once.
    pub fn poll_thawed(&self, context: &mut Context<'_>) -> Poll<()> {
        self.gate.poll_thawed(&self.shared, context.waker().clone())
    }

    /// The gate this slot belongs to.
    #[inline]
    pub fn gate(&self) -> &Arc<Gate> {
        &self.gate
    }

    /// The name of this slot in reports.
    pub fn label(&self) -> &str {
        &self.shared.label
    }

    /// Notes what request `index` does, for [`Section::holders`](crate::Section::holders). A few
    /// plain stores. `index` is a small dense number of the owner's choosing that is unique among
    /// its requests in flight; records from [`MAX_RECORDS`](crate::MAX_RECORDS) on are not kept.
    #[inline]
    pub fn record(&self, index: u32, record: RequestRecord) {
        self.shared.ledger.record(index, record);
    }

    /// Notes which node request `index` has got to. One plain store.
    #[inline]
    pub fn set_node(&self, index: u32, node: u32) {
        self.shared.ledger.set_node(index, node);
    }

    /// Forgets what was noted for request `index`. One plain store.
    #[inline]
    pub fn clear_record(&self, index: u32) {
        self.shared.ledger.clear(index);
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.gate.close_slot(&self.shared);
        let lost = self.in_flight();
        if lost != 0 {
            let (gate, slot) = (self.gate.name(), self.label());
            tracing::error!(gate, slot, lost, "slot dropped with requests in flight");
            // A second panic would hide the first.
            debug_assert!(
                std::thread::panicking(),
                "{gate} {slot}: dropped with {lost} requests in flight"
            );
        }
    }
}

impl fmt::Debug for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Slot")
            .field("gate", &self.gate.name())
            .field("label", &self.label())
            .field("in_flight", &self.in_flight())
            .finish_non_exhaustive()
    }
}

#[cfg(all(test, not(loom), not(shuttle)))]
mod tests {
    use super::*;
    use crate::Section;
    use crate::testing::CountingWake;
    use std::future::Future;
    use std::pin::Pin;
    use std::task::Waker;

    fn poll(slot: &Slot, waker: &Waker) -> Poll<()> {
        slot.poll_thawed(&mut Context::from_waker(waker))
    }

    fn drain(gate: &Arc<Gate>) -> Section {
        Section::freeze([gate.clone()]).announce()
    }

    #[test]
    fn an_admitted_request_counts_until_it_exits() {
        let gate = Gate::new("disk", None);
        let slots = [gate.open_slot("0"), gate.open_slot("1")];
        assert!(slots[0].try_enter() && slots[0].try_enter() && slots[1].try_enter());
        assert_eq!((slots[0].in_flight(), slots[1].in_flight()), (2, 1));
        assert_eq!(gate.in_flight(), 3);
        slots[0].exit();
        slots[0].exit();
        slots[1].exit();
        assert_eq!(gate.in_flight(), 0);
    }

    #[test]
    fn a_refused_request_is_not_in_flight_while_it_waits() {
        let gate = Gate::new("disk", None);
        let slot = gate.open_slot("queue");
        let section = drain(&gate);
        assert!(!slot.is_admitting() && !slot.try_enter());
        assert!(poll(&slot, Waker::noop()).is_pending());
        assert_eq!(slot.in_flight(), 0);
        assert!(section.is_settled(), "a waiting request would hold its own section up");
    }

    #[test]
    fn a_woken_request_is_refused_again_by_a_second_section() {
        let gate = Gate::new("disk", None);
        let slot = gate.open_slot("queue");
        let (wake, waker) = CountingWake::new();
        let first = drain(&gate);
        assert!(!slot.try_enter());
        assert!(poll(&slot, &waker).is_pending());
        drop(first);
        assert_eq!(wake.count(), 1);
        let second = drain(&gate);
        assert!(second.is_settled());
        assert!(!slot.try_enter());
        assert!(poll(&slot, &waker).is_pending());
        drop(second);
        assert_eq!(wake.count(), 2);
        assert!(poll(&slot, &waker).is_ready());
        assert!(slot.try_enter());
        slot.exit();
    }

    #[test]
    fn a_thaw_wakes_every_slot_once_and_the_latest_waker_of_each() {
        let gate = Gate::new("disk", None);
        let slots = [gate.open_slot("0"), gate.open_slot("1")];
        let counters = [CountingWake::new(), CountingWake::new(), CountingWake::new()];
        let section = drain(&gate);
        assert!(poll(&slots[0], &counters[0].1).is_pending());
        assert!(poll(&slots[0], &counters[1].1).is_pending());
        assert!(poll(&slots[1], &counters[2].1).is_pending());
        drop(section);
        drop(drain(&gate));
        let counts = counters.map(|(counter, _)| counter.count());
        assert_eq!(counts, [0, 1, 1]);
    }

    #[test]
    fn an_open_gate_is_ready_and_keeps_no_waker() {
        let gate = Gate::new("disk", None);
        let slot = gate.open_slot("queue");
        let (wake, waker) = CountingWake::new();
        assert!(poll(&slot, &waker).is_ready());
        drop(drain(&gate));
        assert_eq!(wake.count(), 0);
    }

    #[test]
    fn a_slot_closed_while_its_request_waits_wakes_it() {
        let gate = Gate::new("disk", None);
        let slot = gate.open_slot("queue");
        let (wake, waker) = CountingWake::new();
        let section = drain(&gate);
        assert!(poll(&slot, &waker).is_pending());
        drop(slot);
        assert_eq!(wake.count(), 1);
        drop(section);
        assert_eq!(wake.count(), 1);
    }

    #[test]
    fn a_slot_lost_with_a_request_in_flight_is_a_bug_but_hangs_no_drain() {
        let gate = Gate::new("disk", None);
        let slot = gate.open_slot("queue");
        assert!(slot.try_enter());
        let section = drain(&gate);
        let (wake, waker) = CountingWake::new();
        let mut wait = section.wait();
        assert!(Pin::new(&mut wait).poll(&mut Context::from_waker(&waker)).is_pending());
        let dropped = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| drop(slot)));
        assert_eq!(dropped.is_err(), cfg!(debug_assertions));
        assert_eq!(wake.count(), 1);
        assert!(section.is_settled());
    }
}
