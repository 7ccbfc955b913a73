//! A loop that an embedder's own poll or epoll drives.
//!
//! ```text
//! loop { let wait = lp.prepare(); poll(fd, wait); lp.dispatch(); }
//! ```
//!
//! The descriptor is an epoll of two eventfds: the one that the ring signals when something
//! completes, and the loop's wake-up. Not the ring's own descriptor: that misses events under
//! DEFER_TASKRUN. Both are cleared *before* results are taken, so what comes in between shows again.

use super::EventLoop;
use crate::engine::{Engine, clear_event};
use rustix::event::epoll;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

/// How soon to come back for something that the kernel refused.
const RETRY: Duration = Duration::from_millis(1);

/// How long an embedder may wait for [`EventLoop::fd`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Not at all: call [`EventLoop::dispatch`] now.
    Now,
    /// So long; then dispatch, ready or not.
    Until(Duration),
    /// Until it is ready.
    Forever,
}

/// What the ring engine needs to be polled from outside. (The threads engine has an epoll anyway.)
pub(super) struct Embedding {
    epoll: OwnedFd,
    completed: OwnedFd,
}

impl EventLoop {
    /// A descriptor that is readable when the loop has something to do, provided that
    /// [`prepare`](EventLoop::prepare) was called since the last dispatch. The same one each time.
    pub fn fd(&mut self) -> io::Result<BorrowedFd<'_>> {
        let ring = match &self.core.engine {
            Engine::Threads(threads) => return Ok(threads.fd()),
            Engine::Ring(ring) => ring,
        };
        if self.embedding.is_none() {
            let flags =
                rustix::event::EventfdFlags::CLOEXEC | rustix::event::EventfdFlags::NONBLOCK;
            let completed = rustix::event::eventfd(0, flags)?;
            let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
            for event in [completed.as_fd(), self.core.shared().wake_fd()] {
                let data = epoll::EventData::new_u64(0);
                epoll::add(&epoll, event, data, epoll::EventFlags::IN)?;
            }
            ring.register_event(&completed)?;
            self.embedding = Some(Embedding { epoll, completed });
        }
        match &self.embedding {
            Some(embedding) => Ok(embedding.epoll.as_fd()),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }

    /// Before waiting: hands what was submitted to the kernel and asks other threads for kicks.
    /// Follow it with a wait of at most that long, and [`dispatch`](EventLoop::dispatch).
    pub fn prepare(&mut self) -> Wait {
        let core = &self.core;
        core.engine.flush();
        let limit = core.sleep_limit(core.engine.has_refused().then_some(RETRY));
        if limit == Some(Duration::ZERO)
            || core.has_work()
            || !core.shared().inbox().prepare_sleep()
        {
            return Wait::Now;
        }
        limit.map_or(Wait::Forever, Wait::Until)
    }

    /// After waiting: one turn, which never blocks. Says whether anything was done.
    pub fn dispatch(&mut self) -> bool {
        let core = &self.core;
        core.shared().inbox().awake();
        match &core.engine {
            Engine::Threads(threads) => threads.look(),
            Engine::Ring(_) => {
                clear_event(core.shared().wake_fd().as_raw_fd());
                if let Some(embedding) = &self.embedding {
                    clear_event(embedding.completed.as_raw_fd());
                }
            }
        }
        core.engine.flush();
        let progress = core.turn();
        core.engine.flush();
        progress
    }
}
