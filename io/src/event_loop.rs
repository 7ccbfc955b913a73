//! Event loops: one thread's tasks, timers, bottom halves and I/O.
//!
//! ```text
//!   other threads                          │ the loop's thread
//!   LoopHandle ── post, spawn, wake ──► inbox ──► Core::turn ◄── EventLoop: run, block_on,
//!   BottomHalf ── schedule ───────────► (notify)     │                run_once, prepare/dispatch
//!                                          │       Local ── submit, spawn, sleep, blocking
//!                                          │         └──► engine ──► kernel
//! ```
//!
//! A thread owns at most one loop. Nothing here blocks inside a turn, and there is no way to turn a
//! loop from inside it: no nested loop, no stranger's callback in a wait (`block_on` is refused on a
//! loop's thread). A library's user may let a loop have a thread ([`IoThread`]), run it on its own
//! ([`EventLoop::run`]), or drive it from its own epoll ([`EventLoop::fd`]).

mod blocking;
mod bottom_half;
mod core;
mod embed;
mod end;
mod local;
mod notify;
mod pending;
mod shared;
mod sleep;
mod spin;
mod task;
#[cfg(test)]
mod tests;
mod thread;
mod timer;

pub use blocking::Blocking;
pub use bottom_half::BottomHalf;
pub use embed::Wait;
pub use local::{Local, current};
pub use shared::{Closed, LoopHandle, LoopId, MAX_LOOPS};
pub use sleep::Sleep;
pub use task::{Cancelled, JoinHandle, MoveError, move_to, yield_now};
pub use thread::{IoThread, OnLoopThread, block_on};

pub(crate) use self::core::Core;
pub(crate) use shared::{Message, Shared};

use self::core::monotonic_now;
use crate::engine::{Engine, EngineChoice, Pool, Ring, Threads};
use crate::sync::Arc;
use crate::sync::atomic::{AtomicBool, Ordering};
use embed::Embedding;
use shared::EngineInfo;
use spin::Spin;
use std::future::Future;
use std::io;
use std::pin::pin;
use std::rc::Rc;
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

/// How a loop is to be.
#[derive(Clone, Debug)]
pub struct LoopConfig {
    /// For logs, and the thread's name.
    pub name: String,
    /// Which engine.
    pub engine: EngineChoice,
    /// Entries of the ring's submission queue; the kernel rounds up and limits it.
    pub ring_entries: u32,
    /// The longest spin before a sleep; zero never spins.
    pub poll_max: Duration,
    /// The factor by which spins grow; 0 for the default, 2.
    pub poll_grow: u32,
    /// The divisor by which spins shrink; 0 for the default: no spin at once.
    pub poll_shrink: u32,
    /// Tasks polled in one turn at most.
    pub task_budget: usize,
    /// Results delivered in one turn at most.
    pub completion_budget: usize,
    /// Threads for blocking calls (and for operations, without io_uring) at most.
    pub threads_max: usize,
    /// How long a stopped loop lets operations, calls and runnable tasks go on before it cancels.
    pub stop_grace: Duration,
}

impl Default for LoopConfig {
    fn default() -> LoopConfig {
        LoopConfig {
            name: "loop".to_owned(),
            engine: EngineChoice::Auto,
            ring_entries: 256,
            poll_max: Duration::from_micros(32),
            poll_grow: 0,
            poll_shrink: 0,
            task_budget: 64,
            completion_budget: 256,
            threads_max: 64,
            stop_grace: Duration::from_secs(1),
        }
    }
}

/// A loop, as its owner holds it: on the thread that made it, and only there.
///
/// Dropping it ends it as [`run`](EventLoop::run) does after a stop.
///
/// It cannot be turned from inside a turn: that takes `&mut`, and tasks and callbacks only ever get
/// a [`Local`]. Nor can it change threads:
///
/// ```compile_fail
/// fn send<T: Send>() {}
/// send::<blockplex_io::event_loop::EventLoop>();
/// ```
pub struct EventLoop {
    core: Rc<Core>,
    spin: Spin,
    embedding: Option<Embedding>,
    stop_grace: Duration,
}

impl EventLoop {
    /// Makes the calling thread's loop. Fails if it has one, if there are [`MAX_LOOPS`], or if the
    /// kernel does not give what the configuration insists on.
    pub fn new(config: LoopConfig) -> io::Result<EventLoop> {
        if current().is_some() {
            let message = "the calling thread owns an event loop already";
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, message));
        }
        let shared = Shared::new(config.name)?;
        let pool = Pool::new(Arc::clone(&shared), config.threads_max)?;
        let engine = make_engine(config.engine, config.ring_entries, &shared, &pool)?;
        let core = Core::new(shared, pool, engine, config.task_budget, config.completion_budget);
        let core = Rc::new(core);
        local::set_current(Some(Rc::clone(&core)));
        Ok(EventLoop {
            core,
            spin: Spin::new(config.poll_max, config.poll_grow, config.poll_shrink),
            embedding: None,
            stop_grace: config.stop_grace,
        })
    }

    /// The loop, for other threads.
    pub fn handle(&self) -> LoopHandle {
        self.local().handle()
    }

    /// The loop, for this thread.
    pub fn local(&self) -> Local {
        Local::new(Rc::clone(&self.core))
    }

    /// Runs the loop until [`LoopHandle::stop`], and ends it: timers stop firing and waits for
    /// readiness are cancelled at once; operations, blocking calls and tasks that can run may go on
    /// for the grace period; then new work is refused, the tasks left are dropped (on this thread),
    /// operations are cancelled, and it returns when none is in flight and no call is running.
    ///
    /// Whoever wants requests to run to completion ends their senders first.
    pub fn run(&mut self) {
        while !self.core.shared().stop_requested() {
            self.core.turn();
            // Looked at after the turn, which may have eaten the stop's nudge; one that comes after
            // this look finds its nudge in the inbox.
            if !self.core.shared().stop_requested() {
                self.rest(None);
            }
        }
        self.end();
    }

    /// Runs the loop, with all its work, until `future` is done: for a program's own top level. The
    /// future is polled here and need not be `'static`. A stop does not end it.
    pub fn block_on<F: Future>(&mut self, future: F) -> F::Output {
        let alarm =
            Arc::new(Alarm { rung: AtomicBool::new(true), shared: Arc::clone(self.core.shared()) });
        let waker = Waker::from(Arc::clone(&alarm));
        let mut context = Context::from_waker(&waker);
        let mut future = pin!(future);
        loop {
            // AcqRel: partner `Alarm::wake_by_ref`; what the waker did before is seen by the poll.
            if alarm.rung.swap(false, Ordering::AcqRel)
                && let Poll::Ready(output) = future.as_mut().poll(&mut context)
            {
                self.core.engine.flush();
                return output;
            }
            self.core.turn();
            // Acquire: as above. A ring after this look comes with a nudge in the inbox.
            if alarm.rung.load(Ordering::Acquire) {
                self.core.engine.flush();
            } else {
                self.rest(None);
            }
        }
    }

    /// Does what there is to do and, if that is nothing, sleeps up to `timeout` (`None`: until
    /// something comes) and tries again. Says whether anything was done; idle bottom halves do not
    /// count.
    pub fn run_once(&mut self, timeout: Option<Duration>) -> bool {
        if self.core.turn() {
            self.core.engine.flush();
            return true;
        }
        self.rest(timeout);
        let progress = self.core.turn();
        self.core.engine.flush();
        progress
    }

    /// Whether [`LoopHandle::stop`] was called: an embedder that drives the loop should drop it.
    pub fn stop_requested(&self) -> bool {
        self.core.shared().stop_requested()
    }

    /// Between two turns: flushes, and if there is nothing to do spins, then sleeps.
    fn rest(&mut self, limit: Option<Duration>) {
        let core = &self.core;
        let limit = core.sleep_limit(limit);
        if limit == Some(Duration::ZERO) || core.has_work() {
            core.engine.flush();
            return;
        }
        if !self.spin.is_on() {
            sleep(core, limit);
            return;
        }
        let start = monotonic_now();
        if self.spin.window() == 0 || !spin(core, start, self.spin.window(), limit) {
            sleep(core, limit);
        }
        self.spin.learn(monotonic_now() - start);
    }
}

/// Sleeps, if nothing has come in since the last look.
fn sleep(core: &Core, limit: Option<Duration>) {
    let inbox = core.shared().inbox();
    if inbox.prepare_sleep() {
        core.engine.wait(limit);
        inbox.awake();
    } else {
        core.engine.flush();
    }
}

/// Looks for work for up to `window` ns from `start`; `false`: none came, and the time was not
/// limited to less.
fn spin(core: &Core, start: u64, window: u64, limit: Option<Duration>) -> bool {
    core.engine.flush();
    let limit = limit.map_or(u64::MAX, |limit| limit.as_nanos() as u64); // < 584 years
    loop {
        // Plain loads only, no system call.
        if core.has_work() {
            return true;
        }
        let spun = monotonic_now() - start;
        if spun >= limit {
            return true;
        }
        if spun >= window {
            return false;
        }
        std::hint::spin_loop();
    }
}

/// Wakes the future of `EventLoop::block_on`.
struct Alarm {
    rung: AtomicBool,
    shared: Arc<Shared>,
}

impl Wake for Alarm {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        // AcqRel: partner the swap in `block_on`. The first ring since then brings a nudge.
        if !self.rung.swap(true, Ordering::AcqRel) {
            // A loop that has closed polls nothing any more.
            drop(self.shared.follow(Message::Nudge));
        }
    }
}

fn make_engine(
    choice: EngineChoice,
    entries: u32,
    shared: &Arc<Shared>,
    pool: &Arc<Pool>,
) -> io::Result<Engine> {
    let mut info = EngineInfo { name: "io_uring", ..EngineInfo::default() };
    if choice != EngineChoice::Threads {
        match Ring::new(entries, shared.wake_fd()) {
            Ok((ring, features)) => {
                info.features = features;
                shared.set_engine(info);
                return Ok(Engine::Ring(ring));
            }
            Err(error) if choice == EngineChoice::Ring => return Err(error),
            Err(error) => {
                tracing::warn!(%error, name = shared.name(), "no io_uring; using threads");
                info.reason = Some(error.to_string());
            }
        }
    }
    let (threads, features) = Threads::new(Arc::clone(pool), shared.wake_fd())?;
    (info.name, info.features) = ("threads", features);
    shared.set_engine(info);
    Ok(Engine::Threads(threads))
}

impl std::fmt::Debug for EventLoop {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("EventLoop").field(&self.handle()).finish()
    }
}
