//! What other threads know of a loop: its handle, its inbox, its place in the process.

use super::bottom_half::{BottomHalf, Half};
use super::local::{self, Local};
use super::notify::{Class, Gate, Inbox, Kick};
use super::task::{self, JoinHandle};
use crate::engine::{EngineFeatures, OpId};
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crate::sync::{Arc, Mutex};
use async_task::Runnable;
use std::future::Future;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// How many loops a process may have at a time: [`LoopHandle::index`] is less.
pub const MAX_LOOPS: usize = 256;

/// Names a loop for the life of the process; never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LoopId(u64);

/// The loop has ended, or is ending, and takes no new work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Closed;

impl std::fmt::Display for Closed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the event loop has ended")
    }
}

impl std::error::Error for Closed {}

/// What comes into a loop from outside.
pub(crate) enum Message {
    /// A task to run.
    Task(Runnable),
    /// A closure to call.
    Call(Box<dyn FnOnce(&Local) + Send>),
    /// A bottom half that was scheduled.
    BottomHalf(Arc<Half>),
    /// A pool thread has performed an operation.
    OperationDone(OpId, i32),
    /// A pool thread has run a blocking call.
    CallDone,
    /// Look around: something outside the inbox has changed.
    Nudge,
}

/// The half of a loop that any thread may touch.
pub(crate) struct Shared {
    id: LoopId,
    index: Index,
    name: String,
    inbox: Inbox<Message>,
    /// Non-blocking eventfd; readable after a kick.
    wake: OwnedFd,
    stop: AtomicBool,
    engine: Mutex<EngineInfo>,
}

/// What became of the choice of engine.
#[derive(Clone, Default)]
pub(crate) struct EngineInfo {
    pub(crate) name: &'static str,
    pub(crate) features: EngineFeatures,
    pub(crate) reason: Option<String>,
}

impl Shared {
    pub(crate) fn new(name: String) -> io::Result<Arc<Shared>> {
        static IDS: AtomicU64 = AtomicU64::new(1);
        if name.contains('\0') {
            // A thread cannot be called so.
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a NUL in a loop's name"));
        }
        let flags = rustix::event::EventfdFlags::CLOEXEC | rustix::event::EventfdFlags::NONBLOCK;
        Ok(Arc::new(Shared {
            // Relaxed: only uniqueness matters.
            id: LoopId(IDS.fetch_add(1, Ordering::Relaxed)),
            index: Index::claim()?,
            name,
            inbox: Inbox::new(),
            wake: rustix::event::eventfd(0, flags)?,
            stop: AtomicBool::new(false),
            engine: Mutex::new(EngineInfo::default()),
        }))
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn index(&self) -> usize {
        self.index.number
    }

    pub(crate) fn inbox(&self) -> &Inbox<Message> {
        &self.inbox
    }

    pub(crate) fn wake_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    pub(crate) fn set_engine(&self, info: EngineInfo) {
        *self.engine.lock() = info;
    }

    /// Gives the index back: the loop has ended, whoever still has handles.
    pub(crate) fn retire(&self) {
        self.index.release();
    }

    pub(crate) fn stop_requested(&self) -> bool {
        // Relaxed: the nudge that follows the store travels through the inbox's lock.
        self.stop.load(Ordering::Relaxed)
    }

    /// Sends what belongs to work that the loop has. Fails only when it has closed.
    pub(crate) fn follow(&self, message: Message) -> Result<(), Message> {
        self.send(message, Class::Follow)
    }

    /// Sends new work.
    pub(crate) fn begin(&self, message: Message) -> Result<(), Message> {
        self.send(message, Class::New)
    }

    fn send(&self, message: Message, class: Class) -> Result<(), Message> {
        if self.inbox.push(message, class)? == Kick::Due {
            // An error can only be EAGAIN: the counter is full, hence readable.
            let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        }
        Ok(())
    }
}

/// A loop, from any thread. Keeps neither the loop nor its thread alive.
#[derive(Clone)]
pub struct LoopHandle {
    shared: Arc<Shared>,
}

impl LoopHandle {
    pub(crate) fn new(shared: Arc<Shared>) -> LoopHandle {
        LoopHandle { shared }
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// The loop's identity.
    pub fn id(&self) -> LoopId {
        self.shared.id
    }

    /// A small number, less than [`MAX_LOOPS`], that no other living loop has. Reused when the
    /// loop has ended.
    pub fn index(&self) -> usize {
        self.shared.index()
    }

    /// The name given at creation.
    pub fn name(&self) -> &str {
        &self.shared.name
    }

    /// Whether the calling thread owns this loop.
    pub fn is_current(&self) -> bool {
        local::with_current(|core| Arc::ptr_eq(core.shared(), &self.shared)).unwrap_or(false)
    }

    /// Has the loop call `f` once, in its next turn. Dropped uncalled if the loop ends first.
    pub fn post(&self, f: impl FnOnce(&Local) + Send + 'static) -> Result<(), Closed> {
        self.shared.begin(Message::Call(Box::new(f))).map_err(|_| Closed)
    }

    /// Starts a task on the loop. It may move to another with [`move_to`](super::move_to).
    pub fn spawn<F>(&self, future: F) -> Result<JoinHandle<F::Output>, Closed>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        task::spawn_send(self, future)
    }

    /// Starts a task on the loop whose future is made there and never leaves, so that it need not
    /// be `Send`.
    pub fn spawn_with<M, F>(&self, make: M) -> Result<JoinHandle<F::Output>, Closed>
    where
        M: FnOnce(Local) -> F + Send + 'static,
        F: Future + 'static,
        F::Output: Send + 'static,
    {
        task::spawn_with(self, make)
    }

    /// Makes a bottom half: `callback` is called in the loop's turn after each time that it was
    /// scheduled.
    pub fn bottom_half(&self, callback: impl FnMut(&Local) + Send + 'static) -> BottomHalf {
        BottomHalf::new(Arc::clone(&self.shared), Box::new(callback))
    }

    /// Asks the loop to end. See [`EventLoop::run`](super::EventLoop::run) for what that means.
    pub fn stop(&self) {
        // Relaxed: see `stop_requested`.
        self.shared.stop.store(true, Ordering::Relaxed);
        // A loop that has closed has nothing left to stop.
        drop(self.shared.follow(Message::Nudge));
    }

    /// Whether the loop takes no new work: it is ending or has ended.
    pub fn is_closed(&self) -> bool {
        self.shared.inbox.gate() != Gate::Open
    }

    /// The engine in use: "io_uring" or "threads".
    pub fn engine_name(&self) -> &'static str {
        self.shared.engine.lock().name
    }

    /// What the engine can do.
    pub fn engine_features(&self) -> EngineFeatures {
        self.shared.engine.lock().features.clone()
    }

    /// Why the loop does not use io_uring, if it would have liked to.
    pub fn engine_reason(&self) -> Option<String> {
        self.shared.engine.lock().reason.clone()
    }
}

impl PartialEq for LoopHandle {
    fn eq(&self, other: &LoopHandle) -> bool {
        Arc::ptr_eq(&self.shared, &other.shared)
    }
}

impl Eq for LoopHandle {}

impl std::fmt::Debug for LoopHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LoopHandle")
            .field("id", &self.shared.id)
            .field("name", &self.shared.name)
            .finish_non_exhaustive()
    }
}

static INDICES: Mutex<[bool; MAX_LOOPS]> = Mutex::new([false; MAX_LOOPS]);

/// A claim on one of the process's loop numbers.
struct Index {
    number: usize,
    held: AtomicBool,
}

impl Index {
    fn claim() -> io::Result<Index> {
        let mut taken = INDICES.lock();
        match taken.iter().position(|taken| !taken) {
            Some(number) => {
                taken[number] = true;
                Ok(Index { number, held: AtomicBool::new(true) })
            }
            None => Err(io::Error::other(format!("a process has at most {MAX_LOOPS} loops"))),
        }
    }

    fn release(&self) {
        let mut taken = INDICES.lock();
        // Relaxed: under the lock.
        if self.held.swap(false, Ordering::Relaxed) {
            taken[self.number] = false;
        }
    }
}

impl Drop for Index {
    fn drop(&mut self) {
        self.release();
    }
}
