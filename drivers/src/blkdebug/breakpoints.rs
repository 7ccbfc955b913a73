//! Breakpoints: who announces an event waits until somebody lets it go on.

use blockplex_graph::DebugEvent;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::fmt;
use std::future::poll_fn;
use std::task::{Poll, Waker};

/// There is no breakpoint, or nobody waits, under that name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BreakpointError;

impl fmt::Display for BreakpointError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("there is no breakpoint or suspended request of that name")
    }
}

impl std::error::Error for BreakpointError {}

/// What a watcher is told, with the name of the breakpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice<'a> {
    /// A request waits from now on.
    Suspended(&'a str),
    /// It goes on.
    Resumed(&'a str),
}

type Watcher = Box<dyn Fn(Notice<'_>) + Send + Sync>;

/// The breakpoints of a node, and who waits at one.
#[derive(Default)]
pub(super) struct Breakpoints {
    waiting: Mutex<Waiting>,
    watcher: Mutex<Option<Watcher>>,
}

#[derive(Default)]
struct Waiting {
    breakpoints: Vec<(DebugEvent, String)>,
    /// By the order in which they came.
    suspended: BTreeMap<u64, Suspended>,
    next: u64,
    /// Who waits for somebody to be suspended.
    spectators: Vec<Waker>,
}

struct Suspended {
    tag: String,
    waker: Option<Waker>,
}

impl Breakpoints {
    pub(super) fn add(&self, event: DebugEvent, tag: &str) {
        self.waiting.lock().breakpoints.push((event, tag.to_owned()));
    }

    pub(super) fn remove(&self, tag: &str) -> Result<(), BreakpointError> {
        let mut waiting = self.waiting.lock();
        let before = waiting.breakpoints.len();
        waiting.breakpoints.retain(|(_, of)| of != tag);
        let removed = waiting.breakpoints.len() < before;
        drop(waiting);
        let mut released = false;
        while self.resume(tag).is_ok() {
            released = true;
        }
        if removed || released { Ok(()) } else { Err(BreakpointError) }
    }

    pub(super) fn resume(&self, tag: &str) -> Result<(), BreakpointError> {
        let mut waiting = self.waiting.lock();
        let mut of_tag = waiting.suspended.iter().filter(|(_, who)| who.tag == tag);
        let number = of_tag.next().map(|(number, _)| *number).ok_or(BreakpointError)?;
        let released = waiting.suspended.remove(&number);
        drop(waiting);
        if let Some(waker) = released.and_then(|who| who.waker) {
            waker.wake();
        }
        Ok(())
    }

    pub(super) fn is_suspended(&self, tag: &str) -> bool {
        self.waiting.lock().suspended.values().any(|who| who.tag == tag)
    }

    pub(super) fn release_all(&self) {
        let released = {
            let mut waiting = self.waiting.lock();
            waiting.breakpoints.clear();
            std::mem::take(&mut waiting.suspended)
        };
        released.into_values().filter_map(|who| who.waker).for_each(Waker::wake);
    }

    pub(super) async fn wait_suspended(&self, tag: Option<&str>) {
        poll_fn(|cx| {
            let mut waiting = self.waiting.lock();
            let meant = |who: &Suspended| tag.is_none_or(|tag| who.tag == tag);
            if waiting.suspended.values().any(meant) {
                return Poll::Ready(());
            }
            waiting.spectators.retain(|waker| !waker.will_wake(cx.waker()));
            waiting.spectators.push(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }

    pub(super) fn watch(&self, watcher: Watcher) {
        *self.watcher.lock() = Some(watcher);
    }

    /// Passes the breakpoints at `event`, if there are any: each is used up by who comes first.
    pub(super) async fn pass(&self, event: DebugEvent) {
        let met: Vec<String> = {
            let mut waiting = self.waiting.lock();
            if waiting.breakpoints.is_empty() {
                return;
            }
            let met = waiting.breakpoints.extract_if(.., |(at, _)| *at == event);
            met.map(|(_, tag)| tag).collect()
        };
        for tag in met {
            self.suspend(&tag).await;
        }
    }

    async fn suspend(&self, tag: &str) {
        let (place, spectators) = {
            let mut waiting = self.waiting.lock();
            waiting.next += 1;
            let number = waiting.next;
            let who = Suspended { tag: tag.to_owned(), waker: None };
            waiting.suspended.insert(number, who);
            let place = Place { breakpoints: self, number };
            (place, std::mem::take(&mut waiting.spectators))
        };
        self.tell(Notice::Suspended(tag));
        spectators.into_iter().for_each(Waker::wake);
        poll_fn(|cx| match self.waiting.lock().suspended.get_mut(&place.number) {
            Some(who) => {
                who.waker = Some(cx.waker().clone());
                Poll::Pending
            }
            None => Poll::Ready(()),
        })
        .await;
        self.tell(Notice::Resumed(tag));
    }

    fn tell(&self, notice: Notice<'_>) {
        if let Some(watcher) = &*self.watcher.lock() {
            watcher(notice);
        }
    }
}

/// The place of one who waits; given up when its request is torn down.
struct Place<'a> {
    breakpoints: &'a Breakpoints,
    number: u64,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.breakpoints.waiting.lock().suspended.remove(&self.number);
    }
}
