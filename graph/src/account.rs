//! Accounting: how many requests of each kind an origin has served.
//!
//! Each queue counts for itself, by plain loads and stores on a line of its own; whoever asks adds
//! the queues up.

use crate::request::RequestKind;
use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

const KINDS: usize = RequestKind::ALL.len();

/// What has been served of one kind of request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Requests that ended well.
    pub operations: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Requests that failed.
    pub failed: u64,
}

/// What an origin has served, all its queues together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics([Tally; KINDS]);

impl Statistics {
    /// The tally of one kind.
    pub fn of(&self, kind: RequestKind) -> Tally {
        self.0[kind as usize]
    }

    /// Requests of all kinds that ended well.
    pub fn operations(&self) -> u64 {
        self.0.iter().map(|tally| tally.operations).sum()
    }

    fn add(&mut self, counters: &Counters) {
        for (tally, counter) in self.0.iter_mut().zip(&counters.0) {
            // Relaxed: figures for people; nothing is concluded from their order.
            let sum = |a: u64, b: &AtomicU64| a.saturating_add(b.load(Ordering::Relaxed));
            tally.operations = sum(tally.operations, &counter.operations);
            tally.bytes = sum(tally.bytes, &counter.bytes);
            tally.failed = sum(tally.failed, &counter.failed);
        }
    }
}

#[derive(Default)]
struct Counter {
    operations: AtomicU64,
    bytes: AtomicU64,
    failed: AtomicU64,
}

/// One queue's counters; written by its thread alone.
#[derive(Default)]
#[repr(align(128))]
pub(crate) struct Counters([Counter; KINDS]);

impl Counters {
    pub(crate) fn count(&self, kind: RequestKind, bytes: u64, succeeded: bool) {
        let counter = &self.0[kind as usize];
        if succeeded {
            bump(&counter.operations, 1);
            bump(&counter.bytes, bytes);
        } else {
            bump(&counter.failed, 1);
        }
    }
}

/// A load and a store, since there is one writer (Relaxed: see `Statistics::add`). Saturates: a few
/// write-zeroes over the largest node are more bytes than there are numbers.
fn bump(counter: &AtomicU64, by: u64) {
    counter.store(counter.load(Ordering::Relaxed).saturating_add(by), Ordering::Relaxed);
}

/// The counters of all queues of an origin, and the sums of those that are gone.
#[derive(Default)]
pub(crate) struct Accounts(Mutex<(Vec<Arc<Counters>>, Statistics)>);

impl Accounts {
    pub(crate) fn open(&self) -> Arc<Counters> {
        let counters = Arc::new(Counters::default());
        self.0.lock().0.push(counters.clone());
        counters
    }

    pub(crate) fn close(&self, counters: &Arc<Counters>) {
        let (open, retired) = &mut *self.0.lock();
        open.retain(|other| !Arc::ptr_eq(other, counters));
        retired.add(counters);
    }

    pub(crate) fn statistics(&self) -> Statistics {
        let (open, mut sum) = {
            let accounts = self.0.lock();
            (accounts.0.clone(), accounts.1)
        };
        open.iter().for_each(|counters| sum.add(counters));
        sum
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_of_closed_queues_are_kept() {
        let accounts = Accounts::default();
        let (first, second) = (accounts.open(), accounts.open());
        first.count(RequestKind::Read, 512, true);
        second.count(RequestKind::Read, 1024, true);
        second.count(RequestKind::Write, 1, false);
        accounts.close(&second);
        let read = accounts.statistics().of(RequestKind::Read);
        assert_eq!((read.operations, read.bytes, read.failed), (2, 1536, 0));
        assert_eq!(accounts.statistics().of(RequestKind::Write).failed, 1);
        assert_eq!(accounts.statistics().operations(), 2);
    }
}
