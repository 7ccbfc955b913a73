//! The threads engine: pool threads block in pread, pwrite and the like; epoll waits for readiness.
//!
//! For kernels and containers that refuse io_uring. The promises are those of `engine`; what it
//! cannot do is cancel a system call that has started, except a wait on a pipe or socket when the
//! loop ends. Such a wait holds a thread of the pool: whoever reads from many sockets waits with
//! `PollAdd`, which holds none, and reads then.
#![expect(unsafe_code, reason = "system calls on raw memory and borrowed descriptors")]

use super::pool::{Pool, Work};
use super::ring::clear_event;
use super::slots::Slots;
use super::{EngineFeatures, OpId, RawOp, Sink, deliver};
use crate::sync::Arc;
use rustix::event::{PollFd, PollFlags, Timespec, epoll};
use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::rc::Rc;
use std::time::Duration;

/// The epoll data of the wake eventfd; no operation has it.
const WAKE: u64 = u64::MAX;

/// What poll says of a regular file.
const ALWAYS_READY: i32 =
    (libc::POLLIN | libc::POLLOUT | libc::POLLRDNORM | libc::POLLWRNORM) as i32;

struct State {
    slots: Slots,
    /// Submitted in this turn; goes to the pool with the next flush.
    staged: Vec<Work>,
    /// Completed, to be delivered.
    ready: VecDeque<(OpId, i32)>,
    /// Descriptors waited for. Duplicates, since epoll knows each descriptor once only.
    polls: HashMap<u64, OwnedFd>,
}

/// The engine.
pub(crate) struct Threads {
    state: RefCell<State>,
    epoll: OwnedFd,
    wake: RawFd,
    pool: Arc<Pool>,
}

impl Threads {
    /// `wake` must outlive the engine.
    pub(crate) fn new(
        pool: Arc<Pool>,
        wake: BorrowedFd<'_>,
    ) -> io::Result<(Threads, EngineFeatures)> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, wake, epoll::EventData::new_u64(WAKE), epoll::EventFlags::IN)?;
        let state = State {
            slots: Slots::new(),
            staged: Vec::new(),
            ready: VecDeque::new(),
            polls: HashMap::new(),
        };
        let engine = Threads { state: RefCell::new(state), epoll, wake: wake.as_raw_fd(), pool };
        Ok((engine, EngineFeatures::default()))
    }

    /// The descriptor that is readable when `wait` would not sleep.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }

    /// # Safety
    ///
    /// What `op` points to stays valid until its sink has been told.
    pub(crate) unsafe fn submit(&self, op: RawOp, sink: Rc<dyn Sink>, token: u64) -> OpId {
        let state = &mut *self.state.borrow_mut();
        let id = state.slots.insert(sink, token, matches!(op, RawOp::PollAdd { .. }));
        match op {
            RawOp::Nop => state.ready.push_back((id, 0)),
            RawOp::PollAdd { fd, events } => {
                if let Some(result) = self.watch(state, id, fd, events) {
                    state.ready.push_back((id, result));
                }
            }
            op => state.staged.push(Work::Operation(Perform { op, id })),
        }
        id
    }

    /// Starts to wait for `fd`; a result if there is nothing to wait for.
    fn watch(&self, state: &mut State, id: OpId, fd: RawFd, events: u32) -> Option<i32> {
        // SAFETY: fcntl takes any number for a descriptor and fails on a bad one.
        let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 0) };
        if copy < 0 {
            return Some(last_error());
        }
        // SAFETY: the kernel has just given us this descriptor; nobody else knows it.
        let copy = unsafe { OwnedFd::from_raw_fd(copy) };
        let flags = epoll::EventFlags::from_bits_retain(events);
        match epoll::add(&self.epoll, &copy, epoll::EventData::new_u64(id.bits()), flags) {
            Ok(()) => {
                state.polls.insert(id.bits(), copy);
                None
            }
            // A regular file cannot be waited for: it is always ready.
            Err(rustix::io::Errno::PERM) => Some(ALWAYS_READY & events as i32),
            Err(errno) => Some(-errno.raw_os_error()),
        }
    }

    /// Ends a wait and hands over its result.
    fn unwatch(&self, state: &mut State, id: OpId, result: i32) -> bool {
        let Some(copy) = state.polls.remove(&id.bits()) else { return false };
        // Closing the copy would not do: the open file is shared, and epoll would go on watching.
        if let Err(error) = epoll::delete(&self.epoll, &copy) {
            tracing::error!(%error, "cannot take a descriptor out of epoll");
        }
        state.ready.push_back((id, result));
        true
    }

    pub(crate) fn cancel(&self, id: OpId) {
        self.withdraw(|other| other == id);
    }

    pub(crate) fn cancel_all(&self, only_polls: bool) {
        self.withdraw(|_| !only_polls);
        let state = &mut *self.state.borrow_mut();
        for id in state.slots.all_busy(true) {
            self.unwatch(state, id, -libc::ECANCELED);
        }
        if !only_polls {
            self.pool.interrupt();
        }
    }

    /// Ends operations that have not started.
    fn withdraw(&self, wanted: impl Fn(OpId) -> bool) {
        let state = &mut *self.state.borrow_mut();
        let watched: Vec<_> = state.polls.keys().map(|bits| OpId::from_bits(*bits)).collect();
        for id in watched.into_iter().filter(|id| wanted(*id)) {
            self.unwatch(state, id, -libc::ECANCELED);
        }
        let is_wanted = |work: &mut Work| matches!(work, Work::Operation(p) if wanted(p.id));
        for work in state.staged.extract_if(.., is_wanted) {
            if let Work::Operation(operation) = work {
                state.ready.push_back((operation.id, -libc::ECANCELED));
            }
        }
        for operation in self.pool.withdraw(|operation| wanted(operation.id)) {
            state.ready.push_back((operation.id, -libc::ECANCELED));
        }
    }

    pub(crate) fn flush(&self) {
        let staged = &mut self.state.borrow_mut().staged;
        if !staged.is_empty() {
            self.pool.enqueue(staged.drain(..));
        }
    }

    pub(crate) fn reap(&self, budget: usize) -> usize {
        if !self.state.borrow().polls.is_empty() {
            self.look();
        }
        let mut done = 0;
        while done < budget {
            let told = {
                let state = &mut *self.state.borrow_mut();
                let Some((id, result)) = state.ready.pop_front() else { break };
                state.slots.take(id).map(|(sink, token)| (sink, token, result))
            };
            debug_assert!(told.is_some(), "a completion names an operation in flight");
            if let Some((sink, token, result)) = told {
                deliver(&*sink, token, result);
            }
            done += 1;
        }
        done
    }

    pub(crate) fn is_ready(&self) -> bool {
        !self.state.borrow().ready.is_empty()
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.state.borrow().slots.busy()
    }

    pub(crate) fn finish(&self, id: OpId, result: i32) {
        self.state.borrow_mut().ready.push_back((id, result));
    }

    pub(crate) fn wait(&self, timeout: Option<Duration>) {
        self.flush();
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        // poll and not epoll_wait: nanoseconds also where epoll_pwait2 is missing.
        let mut fds = [PollFd::new(&self.epoll, PollFlags::IN)];
        // An interruption is a wake-up like any other; other errors cannot happen here.
        if matches!(rustix::event::poll(&mut fds, timeout.as_ref()), Ok(ready) if ready > 0) {
            self.look();
        }
    }

    /// Collects what epoll has, without waiting.
    pub(crate) fn look(&self) {
        let mut room = [const { std::mem::MaybeUninit::uninit() }; 64];
        let Ok((events, _)) = epoll::wait(&self.epoll, &mut room, Some(&Timespec::default()))
        else {
            return;
        };
        let state = &mut *self.state.borrow_mut();
        for event in events {
            // Copied out: the kernel's record is packed.
            let (data, flags) = (event.data, event.flags);
            if data.u64() == WAKE {
                clear_event(self.wake);
            } else {
                self.unwatch(state, OpId::from_bits(data.u64()), flags.bits() as i32);
            }
        }
    }
}

/// An operation on its way through a pool thread.
pub(super) struct Perform {
    op: RawOp,
    id: OpId,
}

// SAFETY: the pointers in it are used for one system call at a time, by one thread, and what they
// point to stays valid until the completion is delivered (`Threads::submit`).
unsafe impl Send for Perform {}

impl Perform {
    pub(super) fn id(&self) -> OpId {
        self.id
    }

    /// Does it, blocking. A wait on a descriptor without positions ends early when `ended` becomes
    /// readable.
    pub(super) fn perform(&self, ended: BorrowedFd<'_>) -> i32 {
        loop {
            match self.attempt(true) {
                result if result == -libc::EINTR => {}
                result if result == -libc::ESPIPE => return self.perform_stream(ended),
                result => return result,
            }
        }
    }

    /// A read or write on a pipe or a socket: waits in poll, so that it can be interrupted.
    fn perform_stream(&self, ended: BorrowedFd<'_>) -> i32 {
        let (fd, events) = match self.op {
            RawOp::Read { fd, .. } | RawOp::Readv { fd, .. } => (fd, PollFlags::IN),
            RawOp::Write { fd, .. } | RawOp::Writev { fd, .. } => (fd, PollFlags::OUT),
            _ => return -libc::ESPIPE,
        };
        // SAFETY: the submitter keeps the descriptor open until the completion.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        loop {
            let mut fds = [PollFd::new(&fd, events), PollFd::new(&ended, PollFlags::IN)];
            match rustix::event::poll(&mut fds, None) {
                Err(rustix::io::Errno::INTR) => continue,
                Err(errno) => return -errno.raw_os_error(),
                Ok(_) => {}
            }
            if !fds[1].revents().is_empty() {
                return -libc::ECANCELED;
            }
            match self.attempt(false) {
                result if result == -libc::EINTR => {}
                result => return result,
            }
        }
    }

    /// One system call.
    fn attempt(&self, positioned: bool) -> i32 {
        // An offset beyond the signed range becomes negative, which the kernel refuses.
        let at = |offset: u64| if positioned { offset as libc::off64_t } else { -1 };
        let one =
            |ptr: *mut u8, len: u32| libc::iovec { iov_base: ptr.cast(), iov_len: len as usize };
        let result = match self.op {
            RawOp::Read { fd, offset, ptr, len } => {
                // SAFETY: `Threads::submit` promises the memory; the vector lives on this stack.
                unsafe { libc::preadv2(fd, &one(ptr, len), 1, at(offset), 0) }
            }
            RawOp::Readv { fd, offset, iov, count } => {
                // SAFETY: as above, for the vector too.
                unsafe { libc::preadv2(fd, iov, count_of(count), at(offset), 0) }
            }
            RawOp::Write { fd, offset, ptr, len, dsync } => {
                let piece = one(ptr.cast_mut(), len);
                // SAFETY: as above; a write only reads the memory.
                unsafe { libc::pwritev2(fd, &piece, 1, at(offset), write_flags(dsync)) }
            }
            RawOp::Writev { fd, offset, iov, count, dsync } => {
                let flags = write_flags(dsync);
                // SAFETY: as above.
                unsafe { libc::pwritev2(fd, iov, count_of(count), at(offset), flags) }
            }
            // SAFETY: no memory is involved.
            RawOp::Fsync { fd, data_only: true } => unsafe { libc::fdatasync(fd) as isize },
            // SAFETY: no memory is involved.
            RawOp::Fsync { fd, data_only: false } => unsafe { libc::fsync(fd) as isize },
            RawOp::Fallocate { fd, mode, offset, len } => {
                let (offset, len) = (offset as libc::off64_t, len as libc::off64_t);
                // SAFETY: no memory is involved.
                unsafe { libc::fallocate64(fd, mode, offset, len) as isize }
            }
            RawOp::Nop | RawOp::PollAdd { .. } => 0,
        };
        if result < 0 { last_error() } else { i32::try_from(result).unwrap_or(i32::MAX) }
    }
}

fn count_of(count: u32) -> i32 {
    // More pieces than the kernel takes are refused by it.
    i32::try_from(count).unwrap_or(i32::MAX)
}

fn write_flags(dsync: bool) -> i32 {
    if dsync { libc::RWF_DSYNC } else { 0 }
}

fn last_error() -> i32 {
    -io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)
}
