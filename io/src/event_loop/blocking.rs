//! Blocking calls on the loop's thread pool, as futures.
//!
//! | stage | who moves it on |
//! |---|---|
//! | Queued | a pool thread (Running), or the dropped future (Over): one of them, under the lock |
//! | Running | the pool thread (Done) |
//! | Done | the future (Over) |

use super::core::{Core, Life};
use crate::engine::Job;
use crate::sync::{Arc, Mutex};
use std::future::Future;
use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

type Work<T> = Box<dyn FnOnce() -> T + Send>;

enum Stage<T> {
    Queued(Work<T>),
    Running,
    Done(std::thread::Result<T>),
    Over,
}

struct Call<T> {
    state: Mutex<(Stage<T>, Option<Waker>)>,
}

impl<T: Send> Job for Call<T> {
    fn run(&self) -> bool {
        let work = {
            let stage = &mut self.state.lock().0;
            match mem::replace(stage, Stage::Running) {
                Stage::Queued(work) => work,
                other => {
                    *stage = other;
                    return false;
                }
            }
        };
        let result = catch_unwind(AssertUnwindSafe(work));
        let waker = {
            let mut state = self.state.lock();
            state.0 = Stage::Done(result);
            state.1.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
        true
    }
}

/// The result of a call on the thread pool: see [`Local::blocking`](super::Local::blocking). Never
/// ends if the loop was ending when it was made.
#[must_use = "dropping it before the call has started means that it never will"]
pub struct Blocking<T> {
    core: Rc<Core>,
    call: Option<Arc<Call<T>>>,
}

impl<T: Send + 'static> Blocking<T> {
    pub(super) fn new(core: Rc<Core>, work: Work<T>) -> Blocking<T> {
        if core.life.get() != Life::Running {
            return Blocking { core, call: None };
        }
        let call = Arc::new(Call { state: Mutex::new((Stage::Queued(work), None)) });
        core.calls.set(core.calls.get() + 1);
        core.pool.call(Arc::clone(&call) as Arc<dyn Job>);
        Blocking { core, call: Some(call) }
    }
}

impl<T> Blocking<T> {
    /// Whether a pool thread has begun with it: from then on it runs to its end.
    pub fn has_started(&self) -> bool {
        self.call.as_ref().is_some_and(|call| !matches!(call.state.lock().0, Stage::Queued(_)))
    }
}

impl<T> Future for Blocking<T> {
    type Output = T;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<T> {
        let Some(call) = &self.call else { return Poll::Pending };
        let mut state = call.state.lock();
        match &mut state.0 {
            Stage::Queued(_) | Stage::Running => {
                state.1 = Some(context.waker().clone());
                Poll::Pending
            }
            Stage::Over => panic!("a blocking call was polled after it had ended"),
            stage @ Stage::Done(_) => {
                let Stage::Done(result) = mem::replace(stage, Stage::Over) else { unreachable!() };
                drop(state);
                Poll::Ready(result.unwrap_or_else(|panic| resume_unwind(panic)))
            }
        }
    }
}

impl<T> Drop for Blocking<T> {
    fn drop(&mut self) {
        let Some(call) = &self.call else { return };
        // What is replaced is dropped out of the lock.
        let before = {
            let stage = &mut call.state.lock().0;
            match stage {
                // It goes on; nobody will look at its result.
                Stage::Running => return,
                stage => mem::replace(stage, Stage::Over),
            }
        };
        if matches!(before, Stage::Queued(_)) {
            // The pool will find nothing to run and say nothing.
            self.core.calls.set(self.core.calls.get() - 1);
        }
    }
}
