//! What the main thread, the iothreads and the mutator of a run share: when to
//! stop, what went wrong first, and signs of life.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;

use crate::bench::live::Counter;

/// Shared by all threads of a run, each of which may call everything here that
/// does not say otherwise.
#[derive(Debug, Default)]
pub struct Control {
    stop: AtomicBool,
    failure: Mutex<Option<String>>,
    /// Requests that have completed, one counter for each iothread.
    counters: Vec<Counter>,
    /// Mutations begun and ended: odd while one is under way. Only the mutator
    /// writes it.
    steps: AtomicU64,
}

impl Control {
    /// For so many iothreads.
    pub fn new(iothreads: u32) -> Self {
        Self { counters: (0..iothreads).map(|_| Counter::default()).collect(), ..Self::default() }
    }

    /// Asks everyone to begin nothing new.
    pub fn stop(&self) {
        // Relaxed, here and below: a hint that carries no data. Results travel
        // by joining threads and tasks.
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Whether everyone is to begin nothing new.
    pub fn is_stopping(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Ends the run because something could not be done. Only the first reason
    /// is kept: what follows it is often its consequence.
    pub fn fail(&self, reason: impl FnOnce() -> String) {
        self.failure.lock().get_or_insert_with(reason);
        self.stop();
    }

    /// Why the run failed, if it did.
    pub fn failure(&self) -> Option<String> {
        self.failure.lock().clone()
    }

    /// Counts a request that an iothread completed. Only that iothread calls it.
    pub fn count_request(&self, thread: u32) {
        self.counters[thread as usize].add_one();
    }

    /// Requests completed so far, or shortly before.
    pub fn requests(&self) -> u64 {
        self.counters.iter().map(Counter::requests).sum()
    }

    /// The mutator begins or ends a mutation. Only it calls this.
    pub fn count_step(&self) {
        self.steps.fetch_add(1, Ordering::Relaxed);
    }

    /// Mutations begun and ended; odd while one is under way.
    pub fn steps(&self) -> u64 {
        self.steps.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_failure_stops_the_run_and_stays() {
        let control = Control::new(1);
        assert!(!control.is_stopping() && control.failure().is_none());
        control.fail(|| "the disk burns".to_owned());
        control.fail(|| "the house burns".to_owned());
        assert!(control.is_stopping());
        assert_eq!(control.failure().as_deref(), Some("the disk burns"));
    }

    #[test]
    fn requests_of_all_iothreads_are_counted_together() {
        let control = Control::new(3);
        control.count_request(0);
        control.count_request(2);
        control.count_request(2);
        assert_eq!(control.requests(), 3);
    }
}
