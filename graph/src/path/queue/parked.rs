//! Requests that wait at the gate for a drained section to end.

use super::check::{blame, check, outcome_of_nothing};
use super::core::QueueCore;
use super::table::Door;
use crate::error::Error;
use crate::path::hold::Holds;
use crate::path::view::ROOT;
use crate::path::walk::{rest_of, walk};
use crate::request::{Completion, Outcome, Request};
use std::future::poll_fn;
use std::rc::Rc;

/// Waiting at the gate.
impl QueueCore {
    pub(super) fn park(&self, request: Request, door: Door) -> u32 {
        let index = self.allocate(request, door);
        self.parked.borrow_mut().push_back(index);
        let mut resume = self.resume.borrow_mut();
        if resume.is_none()
            && let Some(core) = self.this.upgrade()
        {
            *resume = Some(self.local.spawn(core.resume_parked()));
        }
        index
    }

    /// Admits what waits, in order, whenever the gate opens.
    async fn resume_parked(self: Rc<Self>) {
        loop {
            poll_fn(|cx| self.slot.poll_thawed(cx)).await;
            loop {
                if self.parked.borrow().is_empty() {
                    self.resume.borrow_mut().take();
                    return;
                }
                // Admission runs anew from the top: another section may have begun (D02).
                if !self.slot.try_enter() {
                    break;
                }
                let Some(index) = self.parked.borrow_mut().pop_front() else { break };
                self.run_parked(index);
            }
        }
    }

    fn run_parked(&self, index: u32) {
        let view = self.current_view();
        let (step, holds) = {
            let mut table = self.table.borrow_mut();
            let entry = table.entry(index);
            let checked = check(&view, &entry.request);
            match checked.map(|()| outcome_of_nothing(&view, &mut entry.request)) {
                Ok(None) => {
                    let mut holds = Holds::default();
                    let mut request = rest_of(&entry.request, 0, self.loop_index);
                    let step = walk(&view, ROOT, false, &mut request, &mut holds);
                    (step, holds)
                }
                ended => {
                    (entry.left, entry.result) = (1, Ok(Outcome::Done));
                    drop(table);
                    return self.end_piece(index, ended.map(|some| some.unwrap_or(Outcome::Done)));
                }
            }
        };
        self.launch(index, view, step, holds);
    }

    /// Ends a request that was never admitted.
    pub(super) fn end_parked(&self, index: u32, error: Error) {
        let mut table = self.table.borrow_mut();
        let entry = table.entry(index);
        let error = blame(error, &entry.request);
        let vector = std::mem::take(&mut entry.request.vector);
        match entry.door {
            Door::Future => {
                entry.ended = Some(Completion { cookie: 0, result: Err(error), vector });
                let waker = entry.waker.take();
                drop(table);
                if let Some(waker) = waker {
                    waker.wake();
                }
            }
            Door::Cookie(_) | Door::Nobody => table.free.push(index),
        }
    }
}
