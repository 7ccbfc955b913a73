//! The wait of a section, as a future that any executor may poll.
//!
//! It looks at one gate after the other. A gate that has settled stays so while the section lives
//! (G4), so the wait registers with the first gate that has not, and goes on from there when woken.

use crate::gate::Gate;
use crate::section::Section;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

/// Made by [`Section::wait`]. Dropping it forgets the wait and leaves the section as it is.
#[must_use = "a future waits only when it is polled"]
pub struct Settle<'a> {
    section: &'a Section,
    /// Where this wait's waker lies, and under which key. At most one place.
    registered: Option<(Arc<Gate>, u64)>,
}

impl<'a> Settle<'a> {
    pub(crate) fn new(section: &'a Section) -> Self {
        Settle { section, registered: None }
    }

    /// The key at `gate`, if the waker lies there; takes it away from anywhere else (another wait
    /// may have seen that gate settled meanwhile).
    fn key_at(&mut self, gate: &Arc<Gate>) -> Option<u64> {
        if let Some((known, key)) = &self.registered
            && Arc::ptr_eq(known, gate)
        {
            return Some(*key);
        }
        self.forget();
        None
    }

    fn forget(&mut self) {
        if let Some((gate, key)) = self.registered.take() {
            gate.forget_waiter(key);
        }
    }
}

impl Future for Settle<'_> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        while let Some((index, gate)) = self.section.next_unsettled() {
            // Due only if the gate was adopted and its adopter never announced it.
            gate.run_hooks();
            let key = self.key_at(&gate);
            match gate.poll_settled(key, context.waker().clone()) {
                Ok(()) => {
                    self.registered = None;
                    self.section.mark_settled(index);
                }
                Err(key) => {
                    self.registered = Some((gate, key));
                    return Poll::Pending;
                }
            }
        }
        self.forget();
        Poll::Ready(())
    }
}

impl Drop for Settle<'_> {
    fn drop(&mut self) {
        self.forget();
    }
}

impl fmt::Debug for Settle<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let waits_at = self.registered.as_ref().map(|(gate, _)| gate.name());
        f.debug_struct("Settle").field("waits_at", &waits_at).finish()
    }
}
