//! Whose turn it is to write: chunks are written in the order in which they lie on the disk, one
//! at a time, whatever lane and thread has read them.

use std::collections::BTreeMap;
use std::future::poll_fn;
use std::task::{Poll, Waker};

use parking_lot::Mutex;

/// See the page. Positions are offsets; each chunk's turn comes when the one before has passed it
/// on.
#[derive(Default)]
pub struct Turn {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    next: u64,
    waiting: BTreeMap<u64, Waker>,
    over: bool,
}

impl Turn {
    /// Waits for the turn of the chunk at `offset`; `false`: there will be none, since another
    /// lane has failed.
    pub async fn wait(&self, offset: u64) -> bool {
        poll_fn(|context| {
            let mut state = self.state.lock();
            if state.over {
                return Poll::Ready(false);
            }
            if state.next == offset {
                return Poll::Ready(true);
            }
            state.waiting.insert(offset, context.waker().clone());
            Poll::Pending
        })
        .await
    }

    /// Gives the turn to the chunk at `offset`.
    pub fn pass(&self, offset: u64) {
        let waker = {
            let mut state = self.state.lock();
            state.next = offset;
            state.waiting.remove(&offset)
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// No chunk has a turn any more.
    pub fn end(&self) {
        let waiting = {
            let mut state = self.state.lock();
            state.over = true;
            std::mem::take(&mut state.waiting)
        };
        for waker in waiting.into_values() {
            waker.wake();
        }
    }
}
