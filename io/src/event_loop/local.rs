//! A loop, from its own thread.

use super::blocking::Blocking;
use super::core::Core;
use super::shared::LoopHandle;
use super::sleep::Sleep;
use super::task::{self, JoinHandle};
use crate::buffer::IoVector;
use crate::engine::{OpId, Operation, Verb};
use crate::sync::Arc;
use std::cell::RefCell;
use std::future::Future;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Duration;

thread_local! {
    /// The loop that this thread owns: from `EventLoop::new` until it is dropped.
    static CURRENT: RefCell<Option<Rc<Core>>> = const { RefCell::new(None) };
}

/// The loop that the calling thread owns.
pub fn current() -> Option<Local> {
    with_current(|core| Local::new(Rc::clone(core)))
}

/// Calls `f` with the calling thread's loop. `f` must neither make nor drop an event loop.
pub(super) fn with_current<R>(f: impl FnOnce(&Rc<Core>) -> R) -> Option<R> {
    // While the thread ends it owns no loop.
    CURRENT.try_with(|current| current.borrow().as_ref().map(f)).ok().flatten()
}

/// Makes `core` the calling thread's loop, or none.
pub(super) fn set_current(core: Option<Rc<Core>>) {
    // The old one is dropped outside of the borrow.
    let old = CURRENT.try_with(|current| current.replace(core));
    drop(old);
}

/// A loop, as its own thread sees it: to submit operations, start tasks, sleep. Cloning shares it.
///
/// It may outlive the loop: then operations complete with -ECANCELED before `submit` returns, tasks
/// are dropped unrun, and sleeps never end.
///
/// It stays on its thread, and so does the ring behind it:
///
/// ```compile_fail
/// fn send<T: Send>() {}
/// send::<blockplex_io::event_loop::Local>();
/// ```
#[derive(Clone)]
pub struct Local {
    core: Rc<Core>,
}

impl Local {
    pub(super) fn new(core: Rc<Core>) -> Local {
        Local { core }
    }

    pub(crate) fn core(&self) -> &Rc<Core> {
        &self.core
    }

    /// The loop's handle, for other threads.
    pub fn handle(&self) -> LoopHandle {
        LoopHandle::new(Arc::clone(self.core.shared()))
    }

    /// The loop's number: see [`LoopHandle::index`].
    pub fn index(&self) -> usize {
        self.core.shared().index()
    }

    /// Starts a task on this loop. Dropping the handle lets it run on.
    pub fn spawn<F>(&self, future: F) -> JoinHandle<F::Output>
    where
        F: Future + 'static,
        F::Output: 'static,
    {
        task::spawn_local(&self.core, future)
    }

    /// Waits for `duration` from now.
    pub fn sleep(&self, duration: Duration) -> Sleep {
        Sleep::new(Rc::clone(&self.core), duration)
    }

    /// Waits until [`now_ns`](Self::now_ns) would be at least `deadline`, in nanoseconds.
    pub fn sleep_until(&self, deadline: u64) -> Sleep {
        Sleep::until(Rc::clone(&self.core), deadline)
    }

    /// CLOCK_MONOTONIC in nanoseconds, read once a turn.
    pub fn now_ns(&self) -> u64 {
        self.core.now()
    }

    /// As [`now_ns`](Self::now_ns), read now; the rest of the turn goes by it.
    pub fn refresh_now(&self) -> u64 {
        self.core.refresh_now()
    }

    /// Runs `f` on the loop's thread pool. Dropping the future before `f` has started means that it
    /// never will; once started it runs to its end. A panic in `f` goes on in the awaiting task.
    pub fn blocking<T, F>(&self, f: F) -> Blocking<T>
    where
        T: Send + 'static,
        F: FnOnce() -> T + Send + 'static,
    {
        Blocking::new(Rc::clone(&self.core), Box::new(f))
    }

    /// Tries to end an operation early: best effort. Its sink is told in any case.
    pub fn cancel(&self, id: OpId) {
        self.core.cancel(id);
    }

    /// Hands to the kernel now what was submitted in this turn. It may refuse; it is asked again at
    /// the end of the turn.
    pub fn flush_submissions(&self) {
        self.core.engine.flush();
    }

    /// Operations submitted that have not completed, with those whose futures were dropped.
    pub fn ops_in_flight(&self) -> usize {
        self.core.engine.in_flight()
    }

    /// Of those, the ones whose futures were dropped.
    pub fn orphans(&self) -> usize {
        self.core.orphans.count()
    }

    /// Reads into `memory` from `offset` on (bytes); results in the count, or -errno. At most 1024
    /// pieces or 2 GiB at once: see [`Operation`].
    pub fn read_at(&self, fd: Arc<OwnedFd>, memory: IoVector, offset: u64) -> Operation {
        self.operation(fd, memory, offset, Verb::Read)
    }

    /// Writes `memory` at `offset` (bytes); durable when complete if `dsync`. Results and limits as
    /// [`read_at`](Self::read_at).
    pub fn write_at(
        &self,
        fd: Arc<OwnedFd>,
        memory: IoVector,
        offset: u64,
        dsync: bool,
    ) -> Operation {
        self.operation(fd, memory, offset, Verb::Write { dsync })
    }

    /// Makes the writes that have completed durable; results in 0 or -errno.
    pub fn fsync(&self, fd: Arc<OwnedFd>, data_only: bool) -> Operation {
        self.operation(fd, IoVector::empty(), 0, Verb::Fsync { data_only })
    }

    /// `fallocate(2)` with FALLOC_FL_* bits in `mode`; results in 0 or -errno.
    pub fn fallocate(&self, fd: Arc<OwnedFd>, mode: i32, offset: u64, len: u64) -> Operation {
        self.operation(fd, IoVector::empty(), offset, Verb::Fallocate { mode, len })
    }

    /// Waits until `fd` is ready for any of `events` (POLL* bits); results in those that are there.
    /// Dropping the future ends the wait.
    pub fn poll_fd(&self, fd: Arc<OwnedFd>, events: u32) -> Operation {
        self.operation(fd, IoVector::empty(), 0, Verb::Poll { events })
    }

    fn operation(&self, fd: Arc<OwnedFd>, memory: IoVector, offset: u64, verb: Verb) -> Operation {
        Operation::new(Rc::clone(&self.core), fd, memory, offset, verb)
    }
}

impl std::fmt::Debug for Local {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Local").field(&self.handle()).finish()
    }
}
