//! Queues: where requests enter the graph, one per user and loop.
//!
//! | state of an entry | what holds | who moves it on |
//! |---|---|---|
//! | free | nothing; its index is in `free` | `QueueCore::allocate` |
//! | parked | its request waits at the gate, not admitted | the resume task, in order |
//! | running | admitted; `left` pieces have not ended | completions and serve tasks |
//! | ended | a future has not yet taken the result | [`IoFuture`] |
//!
//! A request that tier 1 serves on the spot never has an entry.

mod check;
mod core;
mod future;
mod parked;
mod table;

pub use self::future::IoFuture;

use self::core::QueueCore;
use self::future::IoState;
use super::view::ROOT;
use crate::block_graph::BlockGraph;
use crate::error::{Error, ErrorKind};
use crate::node::NodeView;
use crate::origin::Origin;
use crate::request::{Completion, Request};
use blockplex_io::event_loop::Local;
use std::future::{Future, poll_fn};
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;

/// A queue of one origin on one loop. It stays on that loop's thread; its completions are reaped
/// there and nowhere else.
///
/// Requests are submitted through one of two doors: [`submit`](Queue::submit) and
/// [`reap`](Queue::reap), or [`request`](Queue::request) and its future. A submitted request
/// counts as in flight until it is reaped, so a drained section waits for that; a future's
/// request, until its I/O has ended. Dropping the queue lets requests in flight run to their end;
/// those that wait for a drained section are cancelled.
pub struct Queue {
    core: Rc<QueueCore>,
}

impl Queue {
    /// Opens a queue of `origin` on the current loop. `label` names it in reports.
    pub fn open(graph: &BlockGraph, origin: &Arc<Origin>, local: &Local, label: &str) -> Queue {
        Queue { core: QueueCore::new(graph, origin, local, label) }
    }

    /// Submits a request; its completion, whatever it is, carries `cookie`. Never waits.
    #[inline]
    pub fn submit(&self, request: Request, cookie: u64) {
        self.core.submit(request, cookie);
    }

    /// Takes up to `max` completions, appending them to `into`; gives their number. Never waits.
    pub fn reap(&self, into: &mut Vec<Completion>, max: usize) -> usize {
        let count = self.core.take_completions(into, max);
        self.core.leave_many(count);
        count
    }

    /// Waits until there is something to [`reap`](Queue::reap). One task at a time.
    pub fn ready(&self) -> impl Future<Output = ()> + '_ {
        poll_fn(|cx| {
            if !self.core.done.borrow().is_empty() {
                return Poll::Ready(());
            }
            *self.core.reaper.borrow_mut() = Some(cx.waker().clone());
            self.core.reaper_waits.set(true);
            Poll::Pending
        })
    }

    /// Submits a request and gives its completion as a future. Dropping the future lets the
    /// request run to its end unobserved.
    pub fn request(&self, request: Request) -> IoFuture {
        let state = match self.core.request(request) {
            Ok(completion) => IoState::Ended(Some(completion)),
            Err(index) => IoState::Running(index),
        };
        IoFuture { core: self.core.clone(), state }
    }

    /// Requests that have been admitted and have not ended (or, submitted ones, not been reaped).
    pub fn in_flight(&self) -> u64 {
        self.core.slot.in_flight()
    }

    /// Requests that wait for a drained section to end.
    pub fn parked(&self) -> usize {
        self.core.parked.borrow().len()
    }

    /// The root node as the queue sees it now.
    pub fn root(&self) -> Option<Arc<NodeView>> {
        let view = self.core.current_view();
        (!view.is_empty()).then(|| view.node(ROOT).view.clone())
    }

    /// The origin that it belongs to.
    pub fn origin(&self) -> &Arc<Origin> {
        &self.core.origin
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        self.core.closed.set(true);
        if let Some(mut resume) = self.core.resume.borrow_mut().take() {
            resume.cancel();
        }
        let parked = std::mem::take(&mut *self.core.parked.borrow_mut());
        for index in parked {
            let text = "the queue was dropped while the request waited for a drained section";
            self.core.end_parked(index, Error::new(ErrorKind::Cancelled, text));
        }
        self.core.discard_completions();
    }
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Queue")
            .field("origin", &self.core.origin.name())
            .field("in_flight", &self.in_flight())
            .finish_non_exhaustive()
    }
}
