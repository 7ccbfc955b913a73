//! Tasks: futures that a loop polls. Headers and wake-up states are `async-task`'s; here is where a
//! task's runnable goes, who knows of its future, and how a `Send` task moves.
//!
//! A wake-up makes a runnable and hands it to the task's home: to the run queue when the home is
//! the calling thread's loop, else to its inbox.
//!
//! K1. A local task's runnable never leaves its loop: the loop ends only when all futures that it
//!     knows are dropped, and until then its inbox takes runnables (C2).
//! K2. A roaming task's home changes only while it is being polled, and async-task hands a runnable
//!     out only after that poll. So no runnable reaches a loop that is not its home (W05), and the
//!     target cannot enter the task before it has left.

use super::core::{Core, Life};
use super::local::{self, Local};
use super::notify::Gate;
use super::shared::{Closed, LoopHandle, Message, Shared};
use crate::sync::{Arc, Mutex};
use async_task::{Builder, FallibleTask, Runnable};
use pin_project_lite::pin_project;
use std::cell::RefCell;
use std::future::{Future, poll_fn};
use std::mem;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

/// The task was cancelled, panicked, or its loop ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cancelled;

impl std::fmt::Display for Cancelled {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the task ended without a result")
    }
}

impl std::error::Error for Cancelled {}

/// Why a task could not move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MoveError {
    /// The target has ended or is ending.
    Closed,
    /// This is not a task made by [`LoopHandle::spawn`].
    NotMovable,
}

impl std::fmt::Display for MoveError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            MoveError::Closed => "the event loop to move to has ended",
            MoveError::NotMovable => "only a task made by LoopHandle::spawn can move",
        })
    }
}

impl std::error::Error for MoveError {}

/// Hands a runnable to the loop behind `shared`, from whatever thread.
fn dispatch(shared: &Arc<Shared>, runnable: Runnable, new: bool) -> Result<(), Runnable> {
    let mut runnable = Some(runnable);
    local::with_current(|core| {
        if Arc::ptr_eq(core.shared(), shared)
            && core.life.get() != Life::Closed
            && let Some(runnable) = runnable.take()
        {
            core.enqueue_task(runnable);
        }
    });
    let Some(runnable) = runnable else { return Ok(()) };
    let message = Message::Task(runnable);
    let sent = if new { shared.begin(message) } else { shared.follow(message) };
    match sent {
        Err(Message::Task(runnable)) => Err(runnable),
        _ => Ok(()),
    }
}

pin_project! {
    /// A future that its loop knows of until it is dropped.
    struct Resident<F> {
        #[pin]
        future: F,
        core: Rc<Core>,
        key: usize,
    }

    impl<F> PinnedDrop for Resident<F> {
        fn drop(this: Pin<&mut Self>) {
            let waker = this.core.tasks.borrow_mut().remove(this.key);
            drop(waker);
        }
    }
}

impl<F: Future> Future for Resident<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<F::Output> {
        self.project().future.poll(context)
    }
}

pub(super) fn spawn_local<F>(core: &Rc<Core>, future: F) -> JoinHandle<F::Output>
where
    F: Future + 'static,
    F::Output: 'static,
{
    if core.life.get() != Life::Running {
        return JoinHandle { stage: Stage::Ended };
    }
    let key = core.tasks.borrow_mut().reserve();
    let future = Resident { future, core: Rc::clone(core), key };
    let shared = Arc::clone(core.shared());
    let schedule = move |runnable| {
        let homeless = dispatch(&shared, runnable, false).err();
        debug_assert!(homeless.is_none(), "a loop outlives its local tasks (K1)");
    };
    let (runnable, task) = Builder::new().spawn_local(|()| future, schedule);
    core.tasks.borrow_mut().fill(key, runnable.waker());
    core.enqueue_task(runnable);
    JoinHandle { stage: Stage::Task(task.fallible()) }
}

/// Where a roaming task is at home.
struct Home {
    place: Mutex<Place>,
}

struct Place {
    home: LoopHandle,
    /// Where it came from, until it has arrived: it goes back if the target does not take it.
    origin: Option<LoopHandle>,
    /// Under which number its home knows it.
    key: Option<usize>,
}

thread_local! {
    /// The roaming task that this thread polls.
    static ROAMER: RefCell<Option<Arc<Home>>> = const { RefCell::new(None) };
}

impl Home {
    fn dispatch(&self, runnable: Runnable) {
        let (home, origin) = {
            let place = self.place.lock();
            (place.home.clone(), place.origin.clone())
        };
        let Err(runnable) = dispatch(home.shared(), runnable, origin.is_some()) else { return };
        let Some(origin) = origin else { return };
        {
            let mut place = self.place.lock();
            place.home = origin.clone();
            place.origin = None;
        }
        // If that has ended too, the future is dropped here: it is `Send`.
        drop(dispatch(origin.shared(), runnable, false));
    }

    /// The task is polled on its home, which now knows of it.
    fn arrive(&self, context: &Context<'_>) {
        let mut place = self.place.lock();
        place.origin = None;
        if place.key.is_none() {
            place.key = local::with_current(|core| {
                debug_assert!(Arc::ptr_eq(core.shared(), place.home.shared()), "K2");
                let mut tasks = core.tasks.borrow_mut();
                let key = tasks.reserve();
                tasks.fill(key, context.waker().clone());
                key
            });
        }
    }

    /// The home forgets the task, if this is its thread. (Elsewhere it has ended and forgot.)
    fn leave(&self) {
        let mut place = self.place.lock();
        let Some(key) = place.key.take() else { return };
        let waker = local::with_current(|core| {
            let at_home = Arc::ptr_eq(core.shared(), place.home.shared());
            if at_home { core.tasks.borrow_mut().remove(key) } else { None }
        });
        drop(place);
        drop(waker);
    }
}

pin_project! {
    /// A `Send` future that may change loops.
    struct Roaming<F> {
        #[pin]
        future: F,
        home: Arc<Home>,
    }

    impl<F> PinnedDrop for Roaming<F> {
        fn drop(this: Pin<&mut Self>) {
            this.home.leave();
        }
    }
}

impl<F: Future> Future for Roaming<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<F::Output> {
        /// Clears the mark also when the poll panics.
        struct Mark;
        impl Drop for Mark {
            fn drop(&mut self) {
                ROAMER.take();
            }
        }
        let this = self.project();
        this.home.arrive(context);
        ROAMER.set(Some(Arc::clone(this.home)));
        let _mark = Mark;
        this.future.poll(context)
    }
}

pub(super) fn spawn_send<F>(target: &LoopHandle, future: F) -> Result<JoinHandle<F::Output>, Closed>
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    let place = Place { home: target.clone(), origin: None, key: None };
    let home = Arc::new(Home { place: Mutex::new(place) });
    let future = Roaming { future, home: Arc::clone(&home) };
    let (runnable, task) =
        Builder::new().spawn(|()| future, move |runnable| home.dispatch(runnable));
    // Through the inbox in any case: only its gate knows whether the loop takes new work.
    match target.shared().begin(Message::Task(runnable)) {
        Ok(()) => Ok(JoinHandle { stage: Stage::Task(task.fallible()) }),
        Err(_) => Err(Closed),
    }
}

/// Goes on with the calling task on `target`. Only in a task made by [`LoopHandle::spawn`]; any
/// other stays where it is and gets an error, as does one whose target has ended.
pub async fn move_to(target: &LoopHandle) -> Result<(), MoveError> {
    let mut left = false;
    poll_fn(|context| {
        if target.is_current() {
            return Poll::Ready(Ok(()));
        }
        let Some(home) = ROAMER.with_borrow(Clone::clone) else {
            return Poll::Ready(Err(MoveError::NotMovable));
        };
        let at_target = home.place.lock().home == *target;
        if at_target {
            // Polled once more before it has left.
            return Poll::Pending;
        }
        if left || target.shared().inbox().gate() != Gate::Open {
            return Poll::Ready(Err(MoveError::Closed));
        }
        left = true;
        home.leave();
        let mut place = home.place.lock();
        place.origin = Some(mem::replace(&mut place.home, target.clone()));
        drop(place);
        context.waker().wake_by_ref();
        Poll::Pending
    })
    .await
}

/// Lets the loop do everything else that it has to do, once, before the calling task goes on.
pub async fn yield_now() {
    let mut yielded = false;
    poll_fn(|context| {
        if mem::replace(&mut yielded, true) {
            return Poll::Ready(());
        }
        context.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

/// A task's result, when it has ended. Dropping the handle lets the task run on.
#[must_use = "dropping the handle detaches the task; say so with drop()"]
pub struct JoinHandle<T> {
    stage: Stage<T>,
}

enum Stage<T> {
    Task(FallibleTask<T>),
    /// Still to be made, on its loop.
    Promised(Arc<Promise<T>>),
    Ended,
}

impl<T> JoinHandle<T> {
    /// Has the task's future dropped, on its loop, unless it has ended; does not wait for that. The
    /// handle then results in [`Cancelled`], and the future is polled no more.
    pub fn cancel(&mut self) {
        match mem::replace(&mut self.stage, Stage::Ended) {
            Stage::Task(task) => drop(task), // async-task: this cancels
            Stage::Promised(promise) => promise.refuse(Promised::Unwanted),
            Stage::Ended => {}
        }
    }

    /// Whether a result is there, or will never be. Any thread; advisory.
    pub fn is_finished(&self) -> bool {
        match &self.stage {
            Stage::Task(task) => task.is_finished(),
            Stage::Promised(promise) => promise.is_finished(),
            Stage::Ended => true,
        }
    }
}

impl<T> Future for JoinHandle<T> {
    type Output = Result<T, Cancelled>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        loop {
            match &mut self.stage {
                Stage::Task(task) => {
                    let output = std::task::ready!(Pin::new(task).poll(context));
                    self.stage = Stage::Ended;
                    return Poll::Ready(output.ok_or(Cancelled));
                }
                Stage::Promised(promise) => {
                    let stage = std::task::ready!(promise.poll(context));
                    self.stage = stage;
                }
                Stage::Ended => return Poll::Ready(Err(Cancelled)),
            }
        }
    }
}

impl<T> Drop for JoinHandle<T> {
    fn drop(&mut self) {
        match mem::replace(&mut self.stage, Stage::Ended) {
            Stage::Task(task) => task.detach(),
            Stage::Promised(promise) => promise.refuse(Promised::Detached),
            Stage::Ended => {}
        }
    }
}

impl<T> std::fmt::Debug for JoinHandle<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("JoinHandle").field("is_finished", &self.is_finished()).finish()
    }
}

/// A task that another thread's loop is to make.
struct Promise<T> {
    state: Mutex<Promised<T>>,
}

enum Promised<T> {
    Waiting(Option<Waker>),
    Kept(FallibleTask<T>),
    /// Nobody waits: make it, and let it run.
    Detached,
    /// Cancelled before it was made: do not make it.
    Unwanted,
    /// The loop ended before it was made.
    Broken,
}

impl<T> Promise<T> {
    /// The side that waits goes away.
    fn refuse(&self, state: Promised<T>) {
        let cancel = matches!(state, Promised::Unwanted);
        let before = mem::replace(&mut *self.state.lock(), state);
        if let Promised::Kept(task) = before
            && !cancel
        {
            task.detach();
        }
    }

    /// The side that makes it has come to a result.
    fn settle(&self, state: Promised<T>) {
        let before = {
            let mut place = self.state.lock();
            match &*place {
                Promised::Waiting(_) => mem::replace(&mut *place, state),
                Promised::Detached => {
                    drop(place);
                    if let Promised::Kept(task) = state {
                        task.detach();
                    }
                    return;
                }
                // Dropping the task, out of the lock, cancels it.
                _ => return,
            }
        };
        if let Promised::Waiting(Some(waker)) = before {
            waker.wake();
        }
    }

    fn is_finished(&self) -> bool {
        match &*self.state.lock() {
            Promised::Waiting(_) => false,
            Promised::Kept(task) => task.is_finished(),
            _ => true,
        }
    }

    fn poll(&self, context: &Context<'_>) -> Poll<Stage<T>> {
        let mut state = self.state.lock();
        if let Promised::Waiting(waker) = &mut *state {
            *waker = Some(context.waker().clone());
            return Poll::Pending;
        }
        Poll::Ready(match mem::replace(&mut *state, Promised::Unwanted) {
            Promised::Kept(task) => Stage::Task(task),
            _ => Stage::Ended,
        })
    }
}

/// Breaks a promise that was not kept.
struct Keeper<T>(Arc<Promise<T>>);

impl<T> Drop for Keeper<T> {
    fn drop(&mut self) {
        self.0.settle(Promised::Broken);
    }
}

pub(super) fn spawn_with<M, F>(
    target: &LoopHandle,
    make: M,
) -> Result<JoinHandle<F::Output>, Closed>
where
    M: FnOnce(Local) -> F + Send + 'static,
    F: Future + 'static,
    F::Output: Send + 'static,
{
    let promise = Arc::new(Promise { state: Mutex::new(Promised::Waiting(None)) });
    let keeper = Keeper(Arc::clone(&promise));
    target.post(move |local| {
        if matches!(&*keeper.0.state.lock(), Promised::Unwanted) {
            return;
        }
        let mut handle = local.spawn(make(local.clone()));
        if let Stage::Task(task) = mem::replace(&mut handle.stage, Stage::Ended) {
            keeper.0.settle(Promised::Kept(task));
        }
    })?;
    Ok(JoinHandle { stage: Stage::Promised(promise) })
}
