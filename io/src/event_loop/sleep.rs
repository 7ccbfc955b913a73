//! Waiting for a point in time.

use super::core::Core;
use super::timer::TimerKey;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

/// Ends at a point in time, never before. Dropping it takes the timer away. Never ends once the
/// loop is ending.
#[must_use = "a sleep starts when it is polled"]
pub struct Sleep {
    core: Rc<Core>,
    deadline: u64,
    key: Option<TimerKey>,
}

impl Sleep {
    pub(crate) fn new(core: Rc<Core>, duration: Duration) -> Sleep {
        let length = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        // Read now: the turn's cached time may be old, and the sleep too short.
        let deadline = core.refresh_now().saturating_add(length);
        Sleep::until(core, deadline)
    }

    pub(super) fn until(core: Rc<Core>, deadline: u64) -> Sleep {
        Sleep { core, deadline, key: None }
    }
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let this = &mut *self;
        let mut timers = this.core.timers.borrow_mut();
        if let Some(key) = this.key {
            if timers.update(key, context.waker()) {
                return Poll::Pending;
            }
            this.key = None;
        }
        if this.core.now() >= this.deadline {
            return Poll::Ready(());
        }
        this.key = Some(timers.insert(this.deadline, context.waker().clone()));
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let Some(key) = self.key {
            let waker = self.core.timers.borrow_mut().remove(key);
            drop(waker);
        }
    }
}
