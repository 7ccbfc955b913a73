//! What a loop's thread owns, and one turn of it.
//!
//! ```text
//! turn: results (≤ completion_budget) → run queue (≤ task_budget) → inbox → bottom halves → timers
//! then: flush what was submitted; look again, spin or sleep (`event_loop`)
//! ```
//!
//! C1. No cell is borrowed while a task, callback, sink or waker runs: they may do anything with
//!     the loop but turn it.
//! C2. A future is polled and dropped on the loop's thread only. Those of `Local::spawn` are known
//!     to `tasks` until they are dropped, and the inbox closes only after the last of them.
//! C3. Nothing is freed that the kernel may write: the loop closes when no operation is in flight.

use super::bottom_half::Half;
use super::local::Local;
use super::shared::{Message, Shared};
use super::timer::Timers;
use crate::engine::{Engine, OpId, Orphans, Pool, Sink};
use crate::sync::Arc;
use async_task::Runnable;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::task::Waker;
use std::time::Duration;

/// How long an idle bottom half may wait for a turn.
const IDLE_DELAY: Duration = Duration::from_millis(10);

/// How far a loop is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Life {
    /// It does everything.
    Running,
    /// Timers do not fire, tasks are dropped and not polled, operations are refused.
    Ending,
    /// All is over.
    Closed,
}

/// The half of a loop that its thread alone touches.
pub(crate) struct Core {
    shared: Arc<Shared>,
    run_queue: RefCell<VecDeque<Runnable>>,
    halves: RefCell<Vec<Arc<Half>>>,
    /// Spare memory for batches from the inbox.
    messages: RefCell<Vec<Message>>,
    pub(super) tasks: RefCell<Tasks>,
    pub(super) timers: RefCell<Timers>,
    /// CLOCK_MONOTONIC in nanoseconds as first read in this turn; 0: not read yet.
    clock: Cell<u64>,
    pub(crate) orphans: Orphans,
    /// Blocking calls queued or running.
    pub(super) calls: Cell<usize>,
    pub(super) life: Cell<Life>,
    /// Operations submitted to an ending loop, to be told so.
    refused: RefCell<VecDeque<(Rc<dyn Sink>, u64)>>,
    task_budget: usize,
    completion_budget: usize,
    pub(super) pool: Arc<Pool>,
    /// Last: everything above goes before the ring does.
    pub(super) engine: Engine,
}

impl Core {
    pub(super) fn new(
        shared: Arc<Shared>,
        pool: Arc<Pool>,
        engine: Engine,
        task_budget: usize,
        completion_budget: usize,
    ) -> Core {
        Core {
            shared,
            run_queue: RefCell::new(VecDeque::with_capacity(64)),
            halves: RefCell::default(),
            messages: RefCell::default(),
            tasks: RefCell::default(),
            timers: RefCell::default(),
            clock: Cell::new(0),
            orphans: Orphans::default(),
            calls: Cell::new(0),
            life: Cell::new(Life::Running),
            refused: RefCell::default(),
            task_budget: task_budget.max(1),
            completion_budget: completion_budget.max(1),
            pool,
            engine,
        }
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    pub(crate) fn engine(&self) -> &Engine {
        &self.engine
    }

    /// Whether operations are taken; else see [`Core::refuse`].
    #[inline]
    pub(crate) fn takes_operations(&self) -> bool {
        self.life.get() == Life::Running
    }

    /// Tells the sink of an operation that comes too late: from the next turn, or at once when there
    /// will be none.
    #[cold]
    pub(crate) fn refuse(&self, sink: Rc<dyn Sink>, token: u64) {
        if self.life.get() == Life::Closed {
            sink.complete(token, -libc::ECANCELED);
        } else {
            self.refused.borrow_mut().push_back((sink, token));
        }
    }

    pub(crate) fn cancel(&self, id: OpId) {
        self.engine.cancel(id);
    }

    pub(super) fn enqueue_task(&self, runnable: Runnable) {
        self.run_queue.borrow_mut().push_back(runnable);
    }

    pub(super) fn enqueue_half(&self, half: Arc<Half>) {
        self.halves.borrow_mut().push(half);
    }

    /// The time, read once a turn.
    pub(super) fn now(&self) -> u64 {
        if self.clock.get() == 0 { self.refresh_now() } else { self.clock.get() }
    }

    /// The time, read now.
    pub(super) fn refresh_now(&self) -> u64 {
        let now = monotonic_now();
        self.clock.set(now);
        now
    }

    /// One turn, without sleeping. Says whether anything was done.
    ///
    /// The thread is pinned meanwhile: pins within the turn are then a count each, and only this
    /// one takes a full barrier. What was retired is freed when every loop has ended the turn it
    /// was in; since nothing may block in a turn, that is soon.
    pub(super) fn turn(self: &Rc<Self>) -> bool {
        let _pinned = crossbeam_epoch::pin();
        self.clock.set(0);
        let local = Local::new(Rc::clone(self));
        let mut progress = self.engine.reap(self.completion_budget) > 0;
        progress |= self.run_tasks();
        progress |= self.take_messages(&local);
        progress |= self.run_halves(&local);
        progress |= self.fire_timers();
        progress
    }

    fn run_tasks(&self) -> bool {
        for done in 0..self.task_budget {
            let runnable = self.run_queue.borrow_mut().pop_front();
            let Some(runnable) = runnable else { return done > 0 };
            contain("task", || {
                runnable.run();
            });
        }
        true
    }

    fn take_messages(&self, local: &Local) -> bool {
        if !self.shared.inbox().is_pending() {
            return false;
        }
        let mut messages = mem::take(&mut *self.messages.borrow_mut());
        self.shared.inbox().take(&mut messages);
        let mut progress = false;
        for message in messages.drain(..) {
            progress |= !matches!(message, Message::Nudge | Message::BottomHalf(_));
            match message {
                Message::Task(runnable) => self.enqueue_task(runnable),
                Message::Call(call) => contain("posted closure", || call(local)),
                Message::BottomHalf(half) => self.enqueue_half(half),
                Message::OperationDone(id, result) => self.engine.finish(id, result),
                Message::CallDone => self.calls.set(self.calls.get() - 1),
                Message::Nudge => {}
            }
        }
        *self.messages.borrow_mut() = messages;
        progress
    }

    /// Runs the bottom halves that are queued by now; those queued by them wait for the next turn.
    fn run_halves(&self, local: &Local) -> bool {
        if self.halves.borrow().is_empty() {
            return false;
        }
        let halves = mem::take(&mut *self.halves.borrow_mut());
        halves.iter().fold(false, |progress, half| half.run(local) | progress)
    }

    fn fire_timers(&self) -> bool {
        if self.timers.borrow().next().is_none() {
            return false;
        }
        let now = self.now();
        let mut progress = false;
        loop {
            let expired = self.timers.borrow_mut().pop_expired(now);
            let Some(waker) = expired else { return progress };
            waker.wake();
            progress = true;
        }
    }

    /// Whether a turn would find something to do, timers aside.
    pub(super) fn has_work(&self) -> bool {
        !self.run_queue.borrow().is_empty()
            || self.shared.inbox().is_pending()
            || self.halves.borrow().iter().any(|half| !half.is_idle())
            || self.engine.is_ready()
            || !self.refused.borrow().is_empty()
    }

    /// How long the loop may sleep: until the next timer, an idle bottom half's turn, or `limit`.
    pub(super) fn sleep_limit(&self, limit: Option<Duration>) -> Option<Duration> {
        let timer = self.timers.borrow().next();
        let timer =
            timer.map(|deadline| Duration::from_nanos(deadline.saturating_sub(self.refresh_now())));
        let idle = (!self.halves.borrow().is_empty()).then_some(IDLE_DELAY);
        [limit, timer, idle].into_iter().flatten().min()
    }

    /// Whether work is under way that will report by itself.
    pub(super) fn is_waiting(&self) -> bool {
        self.engine.in_flight() > 0 || self.calls.get() > 0 || !self.refused.borrow().is_empty()
    }

    /// One turn of an ending loop: results are delivered, everything else is dropped unrun.
    pub(super) fn ending_turn(&self) {
        self.engine.reap(self.completion_budget);
        let refused = mem::take(&mut *self.refused.borrow_mut());
        for (sink, token) in refused {
            contain("sink", || sink.complete(token, -libc::ECANCELED));
        }
        let mut messages = Vec::new();
        self.shared.inbox().take(&mut messages);
        for message in messages {
            match message {
                Message::OperationDone(id, result) => self.engine.finish(id, result),
                Message::CallDone => self.calls.set(self.calls.get() - 1),
                other => contain("dropped message", || drop(other)),
            }
        }
        self.drop_queues();
    }

    fn drop_queues(&self) {
        loop {
            let runnable = self.run_queue.borrow_mut().pop_front();
            let Some(runnable) = runnable else { break };
            contain("dropped task", || drop(runnable));
        }
        drop(mem::take(&mut *self.halves.borrow_mut()));
    }

    /// Has every task that is left come to the run queue, to be dropped there.
    pub(super) fn wake_all_tasks(&self) {
        let wakers = self.tasks.borrow().wakers.iter().flatten().cloned().collect::<Vec<_>>();
        wakers.into_iter().for_each(Waker::wake);
    }
}

/// Runs `f`; a panic in it is logged and goes no further (C12).
pub(super) fn contain(what: &str, f: impl FnOnce()) {
    if catch_unwind(AssertUnwindSafe(f)).is_err() {
        tracing::error!(what, "caught a panic; the event loop goes on");
    }
}

/// CLOCK_MONOTONIC in nanoseconds.
pub(super) fn monotonic_now() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    // Neither part is negative on this clock, and 584 years fit.
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// The tasks whose futures live on this loop.
#[derive(Default)]
pub(super) struct Tasks {
    wakers: Vec<Option<Waker>>,
    free: Vec<usize>,
}

impl Tasks {
    /// A place for a task that is about to be made.
    pub(super) fn reserve(&mut self) -> usize {
        self.free.pop().unwrap_or_else(|| {
            self.wakers.push(None);
            self.wakers.len() - 1
        })
    }

    pub(super) fn fill(&mut self, key: usize, waker: Waker) {
        self.wakers[key] = Some(waker);
    }

    /// The future is gone. The waker is to be dropped outside of the borrow.
    pub(super) fn remove(&mut self, key: usize) -> Option<Waker> {
        self.free.push(key);
        self.wakers[key].take()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.free.len() == self.wakers.len()
    }
}
