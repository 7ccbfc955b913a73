//! A loop's thread pool: blocking calls, and the operations of the threads engine.
//!
//! Threads start when work waits and none is idle, up to the limit, and leave when they were idle
//! for `IDLE_LIFE`. Which call started and which did not is decided under the queue's lock or the
//! job's own, so a cancelled call either never runs or runs to its end.

use super::threads::Perform;
use crate::event_loop::{Message, Shared};
use crate::sync::{Arc, Mutex};
use parking_lot::Condvar; // next to `sync`: the pool is not modelled
use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;
use std::{io, mem};

const IDLE_LIFE: Duration = Duration::from_secs(10);

/// A blocking call that can be run once.
pub(crate) trait Job: Send + Sync {
    /// Runs it unless it was cancelled; says whether it ran.
    fn run(&self) -> bool;
}

pub(super) enum Work {
    Call(Arc<dyn Job>),
    Operation(Perform),
}

struct State {
    queue: VecDeque<Work>,
    idle: usize,
    live: usize,
    ending: bool,
}

/// The pool. Its threads hold it; so does its loop.
pub(crate) struct Pool {
    state: Mutex<State>,
    /// Signalled when work comes and when the pool ends.
    work: Condvar,
    /// Signalled when a thread has left.
    left: Condvar,
    /// Readable from the end of the pool on: gets operations on pipes and sockets unstuck.
    ended: OwnedFd,
    shared: Arc<Shared>,
    threads_max: usize,
}

impl Pool {
    pub(crate) fn new(shared: Arc<Shared>, threads_max: usize) -> io::Result<Arc<Pool>> {
        let flags = rustix::event::EventfdFlags::CLOEXEC | rustix::event::EventfdFlags::NONBLOCK;
        let state = State { queue: VecDeque::new(), idle: 0, live: 0, ending: false };
        Ok(Arc::new(Pool {
            state: Mutex::new(state),
            work: Condvar::new(),
            left: Condvar::new(),
            ended: rustix::event::eventfd(0, flags)?,
            shared,
            threads_max: threads_max.max(1),
        }))
    }

    /// Queues a blocking call. The loop is told by `Message::CallDone` once it has run.
    pub(crate) fn call(self: &Arc<Self>, job: Arc<dyn Job>) {
        self.enqueue([Work::Call(job)]);
    }

    pub(super) fn enqueue(self: &Arc<Self>, work: impl IntoIterator<Item = Work>) {
        let missing = {
            let mut state = self.state.lock();
            state.queue.extend(work);
            // As many as there is work for; waking a thread that finds none is harmless.
            for _ in 0..state.queue.len().min(state.idle) {
                self.work.notify_one();
            }
            let wanted = state.queue.len().saturating_sub(state.idle);
            let missing = wanted.min(self.threads_max - state.live);
            state.live += missing;
            missing
        };
        for _ in 0..missing {
            self.start_thread();
        }
    }

    fn start_thread(self: &Arc<Self>) {
        let pool = Arc::clone(self);
        let name = format!("{}-pool", self.shared.name());
        let started = std::thread::Builder::new().name(name).spawn(move || pool.work());
        let Err(error) = started else { return };
        let alone = {
            let mut state = self.state.lock();
            state.live -= 1;
            state.live == 0
        };
        tracing::warn!(%error, "cannot start a pool thread");
        if alone {
            // Nobody else would ever do the work: better late, on the loop's own thread.
            while let Some(work) = self.state.lock().queue.pop_front() {
                self.perform(work);
            }
        }
    }

    fn work(&self) {
        while let Some(work) = self.next() {
            self.perform(work);
        }
        self.state.lock().live -= 1;
        self.left.notify_all();
    }

    fn next(&self) -> Option<Work> {
        let mut state = self.state.lock();
        loop {
            if let Some(work) = state.queue.pop_front() {
                return Some(work);
            }
            if state.ending {
                return None;
            }
            state.idle += 1;
            let timed_out = self.work.wait_for(&mut state, IDLE_LIFE).timed_out();
            state.idle -= 1;
            if timed_out && state.queue.is_empty() {
                return None;
            }
        }
    }

    fn perform(&self, work: Work) {
        let message = match work {
            Work::Call(job) if job.run() => Message::CallDone,
            Work::Call(_) => return,
            Work::Operation(operation) => {
                let result = operation.perform(self.ended.as_fd());
                Message::OperationDone(operation.id(), result)
            }
        };
        // The loop closes only when it has got all of these.
        let sent = self.shared.follow(message).is_ok();
        debug_assert!(sent, "a loop waits for its pool before it closes");
    }

    /// Takes operations that have not started out of the queue.
    pub(super) fn withdraw(&self, mut wanted: impl FnMut(&Perform) -> bool) -> Vec<Perform> {
        let mut state = self.state.lock();
        let mut withdrawn = Vec::new();
        let mut rest = VecDeque::with_capacity(state.queue.len());
        for work in mem::take(&mut state.queue) {
            match work {
                Work::Operation(operation) if wanted(&operation) => withdrawn.push(operation),
                work => rest.push_back(work),
            }
        }
        state.queue = rest;
        withdrawn
    }

    /// Ends waits on pipes and sockets: they result in -ECANCELED.
    pub(crate) fn interrupt(&self) {
        // An error can only be EAGAIN: the counter is full, hence readable.
        let _ = rustix::io::write(&self.ended, &1u64.to_ne_bytes());
    }

    /// Waits until the threads have done what is queued and have left.
    pub(crate) fn end(&self) {
        let mut state = self.state.lock();
        state.ending = true;
        self.work.notify_all();
        while state.live > 0 {
            self.left.wait(&mut state);
        }
    }
}
