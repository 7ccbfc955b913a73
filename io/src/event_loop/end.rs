//! How a loop ends.
//!
//! ```text
//! grace   timers frozen, waits for readiness cancelled; everything else goes on
//! drop    gate Ending: posts refused; tasks and messages dropped until none is left
//! drain   all operations cancelled; results delivered until none is in flight, no call running
//! close   gate Closed; pool threads joined; index free; the ring goes with the last `Local`
//! ```

use super::EventLoop;
use super::core::{Life, contain, monotonic_now};
use super::local;
use super::notify::Gate;
use std::time::Duration;

/// How long to wait for what was cancelled before cancelling again.
const CANCEL_AGAIN: Duration = Duration::from_millis(50);

impl EventLoop {
    /// Ends the loop; nothing happens the second time.
    pub(super) fn end(&mut self) {
        if self.core.life.get() == Life::Closed {
            return;
        }
        self.grace();
        let core = &self.core;
        core.shared().inbox().narrow(Gate::Ending);
        core.life.set(Life::Ending);
        self.drop_tasks();
        self.drain();
        let core = &self.core;
        for message in core.shared().inbox().close() {
            contain("dropped message", || drop(message));
        }
        core.pool.end();
        core.life.set(Life::Closed);
        core.shared().retire();
        debug_assert_eq!(core.orphans.count(), 0, "an orphan is an operation in flight");
    }

    /// Lets what is under way come to its end, up to the grace period.
    fn grace(&mut self) {
        self.core.timers.borrow_mut().freeze();
        let grace = u64::try_from(self.stop_grace.as_nanos()).unwrap_or(u64::MAX);
        let deadline = monotonic_now().saturating_add(grace);
        loop {
            // Each time: tasks may start to wait anew.
            self.core.engine.cancel_all(true);
            self.core.turn();
            let idle = !self.core.is_waiting() && !self.core.has_work();
            let left = deadline.saturating_sub(monotonic_now());
            if idle || left == 0 {
                return;
            }
            self.rest(Some(Duration::from_nanos(left)));
        }
    }

    /// Drops all tasks, here. A runnable that another thread is about to hand over is waited for.
    fn drop_tasks(&mut self) {
        loop {
            self.core.wake_all_tasks();
            self.core.ending_turn();
            if self.core.tasks.borrow().is_empty() {
                return;
            }
            self.rest(None);
        }
    }

    fn drain(&mut self) {
        loop {
            // Each time: a cancellation misses an operation that is just changing hands.
            self.core.engine.cancel_all(false);
            self.core.ending_turn();
            if !self.core.is_waiting() {
                return;
            }
            self.rest(Some(CANCEL_AGAIN));
        }
    }
}

impl Drop for EventLoop {
    fn drop(&mut self) {
        self.end();
        local::set_current(None);
    }
}
