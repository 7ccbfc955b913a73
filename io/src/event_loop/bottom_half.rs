//! Bottom halves: callbacks that any thread may schedule and the loop runs once each.

use super::local::{self, Local};
use super::pending::{Pending, Scheduled, Taken};
use super::shared::{Message, Shared};
use crate::sync::{Arc, Mutex};

type Callback = Box<dyn FnMut(&Local) + Send>;

/// The record behind a [`BottomHalf`]; queues hold it while it is scheduled.
pub(crate) struct Half {
    pending: Pending,
    /// Absent while it runs, and once deleted.
    callback: Mutex<Option<Callback>>,
    shared: Arc<Shared>,
}

impl Half {
    /// Runs it if that is due. Owner only. Says whether that was progress.
    pub(super) fn run(&self, local: &Local) -> bool {
        let taken = self.pending.take();
        if taken == Taken::Leave {
            return false;
        }
        // Taken out, so that no lock is held while it runs and it may delete itself.
        let Some(mut callback) = self.callback.lock().take() else { return false };
        super::core::contain("bottom half", || callback(local));
        let mut place = self.callback.lock();
        // Under the lock: whoever deletes sets the mark first and empties the place afterwards.
        let gone = if self.pending.is_deleted() { Some(callback) } else { place.replace(callback) };
        drop(place);
        drop(gone);
        taken == Taken::Run
    }

    /// Whether it waits for a run without hurry.
    pub(super) fn is_idle(&self) -> bool {
        self.pending.is_idle()
    }
}

/// A callback on a loop, to be scheduled from any thread. Dropping it deletes the callback, also
/// from inside it; a run that is under way on the loop's thread is not waited for.
pub struct BottomHalf {
    half: Arc<Half>,
}

impl BottomHalf {
    pub(super) fn new(shared: Arc<Shared>, callback: Callback) -> BottomHalf {
        let callback = Mutex::new(Some(callback));
        BottomHalf { half: Arc::new(Half { pending: Pending::new(), callback, shared }) }
    }

    /// Has the callback run once in the loop's next turn. Any number of calls before that run make
    /// one run; a call from the callback on makes one more. Does nothing once the loop has ended.
    pub fn schedule(&self) {
        self.enqueue(self.half.pending.schedule());
    }

    /// As [`schedule`](Self::schedule), but the loop does not hurry: the run comes with its next
    /// turn, or after 10 ms.
    pub fn schedule_idle(&self) {
        self.enqueue(self.half.pending.schedule_idle());
    }

    fn enqueue(&self, scheduled: Scheduled) {
        let half = &self.half;
        match scheduled {
            Scheduled::Already => {}
            // A loop that has closed runs nothing any more.
            Scheduled::Hurry => drop(half.shared.follow(Message::Nudge)),
            Scheduled::Enqueue => {
                let at_home = local::with_current(|core| {
                    let home = Arc::ptr_eq(core.shared(), &half.shared);
                    if home {
                        core.enqueue_half(Arc::clone(half));
                    }
                    home
                });
                if at_home != Some(true) {
                    drop(half.shared.follow(Message::BottomHalf(Arc::clone(half))));
                }
            }
        }
    }

    /// Takes back a schedule whose run has not started.
    pub fn cancel(&self) {
        self.half.pending.cancel();
    }

    /// Whether a run is due that has not started.
    pub fn is_scheduled(&self) -> bool {
        self.half.pending.is_scheduled()
    }
}

impl Drop for BottomHalf {
    fn drop(&mut self) {
        self.half.pending.delete();
        // Out of the lock first: the callback's own drop may do anything.
        let callback = self.half.callback.lock().take();
        drop(callback);
    }
}

impl std::fmt::Debug for BottomHalf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BottomHalf").field("is_scheduled", &self.is_scheduled()).finish()
    }
}
