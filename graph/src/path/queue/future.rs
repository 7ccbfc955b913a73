//! The future of one request.

use super::core::QueueCore;
use super::table::Door;
use crate::request::Completion;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

/// The future of a request. Its output carries the result and the memory.
#[must_use = "futures do nothing unless polled; the request runs in any case"]
pub struct IoFuture {
    pub(super) core: Rc<QueueCore>,
    pub(super) state: IoState,
}

pub(super) enum IoState {
    Ended(Option<Completion>),
    Running(u32),
}

impl Future for IoFuture {
    type Output = Completion;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Completion> {
        let index = match &mut self.state {
            IoState::Ended(completion) => {
                return match completion.take() {
                    Some(completion) => Poll::Ready(completion),
                    None => panic!("an IoFuture was polled after it had ended"),
                };
            }
            IoState::Running(index) => *index,
        };
        let completion = {
            let mut table = self.core.table.borrow_mut();
            let entry = table.entry(index);
            match entry.ended.take() {
                Some(completion) => {
                    table.free.push(index);
                    completion
                }
                None => {
                    entry.waker = Some(cx.waker().clone());
                    return Poll::Pending;
                }
            }
        };
        self.state = IoState::Ended(None);
        Poll::Ready(completion)
    }
}

impl Drop for IoFuture {
    fn drop(&mut self) {
        if let IoState::Running(index) = self.state {
            let mut table = self.core.table.borrow_mut();
            let entry = table.entry(index);
            if entry.ended.take().is_some() {
                table.free.push(index);
            } else {
                entry.door = Door::Nobody;
                entry.waker = None;
            }
        }
    }
}
