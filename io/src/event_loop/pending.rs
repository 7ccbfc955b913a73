//! The state word of something that is queued at most once and may be scheduled at any time.
//!
//! | bits | meaning | who moves it |
//! |---|---|---|
//! | none | at rest | `take`, by the owner |
//! | QUEUED | on a queue, but cancelled: `take` says not to run | `cancel` |
//! | QUEUED + SCHEDULED | on a queue, will run | `schedule` |
//! | … + IDLE | will run, but need not be hurried | `schedule_idle` |
//! | DELETED | never runs again; kept for ever | `delete` |
//!
//! P1. Whoever sets QUEUED puts the thing on the queue: it is there at most once.
//! P2. `take` clears QUEUED and SCHEDULED in one read-modify-write *before* the run, so a
//!     `schedule` either is seen by that run or queues the next one (W02). A plain store could
//!     overwrite a schedule that came in between.

use crate::sync::atomic::{AtomicU32, Ordering};

const QUEUED: u32 = 1;
const SCHEDULED: u32 = 2;
const IDLE: u32 = 4;
const DELETED: u32 = 8;

/// What the owner is to do with what it took off its queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    /// Run it.
    Run,
    /// Run it; it does not count as progress.
    RunIdle,
    /// It was cancelled or deleted: leave it.
    Leave,
}

/// What a scheduler has to do.
#[must_use = "a thing marked as queued must be put on the queue"]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheduled {
    /// Put it on the queue.
    Enqueue,
    /// It is on the queue without hurry, and now there is hurry: wake the owner.
    Hurry,
    /// Nothing: it will run (or never again, if it was deleted).
    Already,
}

/// The state word.
#[derive(Default)]
pub struct Pending(AtomicU32);

impl Pending {
    /// At rest.
    pub fn new() -> Pending {
        Pending(AtomicU32::new(0))
    }

    /// Asks for one run from now on. Any thread.
    pub fn schedule(&self) -> Scheduled {
        self.set(|word| (word | QUEUED | SCHEDULED) & !IDLE)
    }

    /// As [`Pending::schedule`], without hurry; takes no hurry away from an earlier schedule.
    pub fn schedule_idle(&self) -> Scheduled {
        self.set(|word| {
            let hurried = word & (SCHEDULED | IDLE) == SCHEDULED;
            word | QUEUED | SCHEDULED | if hurried { 0 } else { IDLE }
        })
    }

    fn set(&self, next: impl Fn(u32) -> u32) -> Scheduled {
        // AcqRel, also when nothing changes: what the scheduler wrote before is visible to the run
        // (partner: `take`), even if an earlier scheduler did the queueing.
        let change = self.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, |w| Some(next(w)));
        let (Ok(before) | Err(before)) = change;
        match before {
            b if b & DELETED != 0 => Scheduled::Already,
            b if b & QUEUED == 0 => Scheduled::Enqueue,
            b if b & IDLE != 0 && next(b) & IDLE == 0 => Scheduled::Hurry,
            _ => Scheduled::Already,
        }
    }

    /// Takes back a schedule that has not run. Any thread.
    pub fn cancel(&self) {
        // AcqRel: keeps this word one chain of read-modify-writes for `set` and `take`.
        self.0.fetch_and(!(SCHEDULED | IDLE), Ordering::AcqRel);
    }

    /// It never runs again. Any thread.
    pub fn delete(&self) {
        // AcqRel: partner `take` and `is_deleted`.
        self.0.fetch_or(DELETED, Ordering::AcqRel);
    }

    /// Whether it was deleted.
    pub fn is_deleted(&self) -> bool {
        // Acquire: partner `delete`.
        self.0.load(Ordering::Acquire) & DELETED != 0
    }

    /// Whether a run is due.
    pub fn is_scheduled(&self) -> bool {
        // Acquire: partner `set`.
        self.0.load(Ordering::Acquire) & (SCHEDULED | DELETED) == SCHEDULED
    }

    /// Whether nothing on the queue waits for it in a hurry.
    pub fn is_idle(&self) -> bool {
        // Acquire: partner `set`.
        self.0.load(Ordering::Acquire) & (SCHEDULED | IDLE) != SCHEDULED
    }

    /// The owner took it off the queue and is about to run it, or not.
    pub fn take(&self) -> Taken {
        // AcqRel: see `set` and P2.
        let before = self.0.fetch_and(DELETED, Ordering::AcqRel);
        match before {
            b if b & DELETED != 0 || b & SCHEDULED == 0 => Taken::Leave,
            b if b & IDLE != 0 => Taken::RunIdle,
            _ => Taken::Run,
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn many_schedules_before_a_run_are_one_run() {
        let word = Pending::new();
        assert_eq!(word.schedule(), Scheduled::Enqueue);
        assert_eq!(word.schedule(), Scheduled::Already);
        assert_eq!(word.take(), Taken::Run);
        assert!(!word.is_scheduled());
        assert_eq!(word.schedule(), Scheduled::Enqueue, "after the clear, the next run");
    }

    #[test]
    fn a_cancelled_schedule_stays_queued_and_does_not_run() {
        let word = Pending::new();
        assert_eq!(word.schedule(), Scheduled::Enqueue);
        word.cancel();
        assert_eq!(word.schedule(), Scheduled::Already, "it is still on the queue");
        word.cancel();
        assert_eq!(word.take(), Taken::Leave);
    }

    #[test]
    fn hurry_wins_over_idleness_in_either_order() {
        let word = Pending::new();
        assert_eq!(word.schedule_idle(), Scheduled::Enqueue);
        assert_eq!(word.schedule(), Scheduled::Hurry);
        assert_eq!(word.schedule_idle(), Scheduled::Already);
        assert_eq!(word.take(), Taken::Run);
        assert_eq!(word.schedule_idle(), Scheduled::Enqueue);
        assert_eq!(word.take(), Taken::RunIdle);
    }

    #[test]
    fn what_was_deleted_neither_queues_nor_runs() {
        let word = Pending::new();
        assert_eq!(word.schedule(), Scheduled::Enqueue);
        word.delete();
        assert_eq!(word.take(), Taken::Leave);
        assert_eq!(word.schedule(), Scheduled::Already);
        assert!(!word.is_scheduled());
    }
}
