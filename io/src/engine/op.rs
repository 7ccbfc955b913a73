//! Operations as futures. Each owns its descriptor and memory until the kernel has done with them,
//! whatever becomes of the future (C01): the engine's slot holds the record, not the future.
#![expect(unsafe_code, reason = "promises that the record's memory outlives the operation")]

use super::{OpId, RawOp, Sink, is_transient};
use crate::buffer::IoVector;
use crate::event_loop::{Core, Sleep};
use crate::sync::Arc;
use std::cell::{Cell, RefCell};
use std::future::Future;
use std::os::fd::{AsRawFd, OwnedFd};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

/// Most pieces that the kernel takes in one call (IOV_MAX).
const PIECES_MAX: usize = 1024;
/// "Try again" answers taken before the caller gets one, and how many of them are followed at once.
const RETRIES: u32 = 16;
const EAGER_RETRIES: u32 = 4;
const RETRY_PAUSE: Duration = Duration::from_micros(200);

/// How many operations outlived their futures.
#[derive(Default)]
pub(crate) struct Orphans(Cell<usize>);

impl Orphans {
    pub(crate) fn count(&self) -> usize {
        self.0.get()
    }
}

pub(crate) enum Verb {
    Read,
    Write { dsync: bool },
    Fsync { data_only: bool },
    Fallocate { mode: i32, len: u64 },
    Poll { events: u32 },
}

/// What the kernel uses while the operation runs. Lives in an `Rc` that never moves it.
struct Record {
    core: Rc<Core>,
    fd: Arc<OwnedFd>,
    memory: IoVector,
    verb: Verb,
    offset: u64,
    result: Cell<Option<i32>>,
    waker: RefCell<Option<Waker>>,
    orphaned: Cell<bool>,
}

impl Sink for Record {
    fn complete(&self, _token: u64, result: i32) {
        if self.orphaned.get() {
            let orphans = &self.core.orphans.0;
            orphans.set(orphans.get() - 1);
            return;
        }
        self.result.set(Some(result));
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }
}

impl Record {
    fn raw(&self) -> RawOp {
        let (fd, offset) = (self.fd.as_raw_fd(), self.offset);
        let pieces = self.memory.iovecs();
        let pieces = &pieces[..pieces.len().min(PIECES_MAX)];
        let (iov, count) = (pieces.as_ptr(), pieces.len() as u32); // ≤ PIECES_MAX
        match (&self.verb, pieces) {
            (Verb::Read, [one]) => {
                RawOp::Read { fd, offset, ptr: one.iov_base.cast(), len: length(one) }
            }
            (Verb::Read, _) => RawOp::Readv { fd, offset, iov, count },
            (&Verb::Write { dsync }, [one]) => {
                RawOp::Write { fd, offset, ptr: one.iov_base.cast(), len: length(one), dsync }
            }
            (&Verb::Write { dsync }, _) => RawOp::Writev { fd, offset, iov, count, dsync },
            (&Verb::Fsync { data_only }, _) => RawOp::Fsync { fd, data_only },
            (&Verb::Fallocate { mode, len }, _) => RawOp::Fallocate { fd, mode, offset, len },
            (&Verb::Poll { events }, _) => RawOp::PollAdd { fd, events },
        }
    }
}

/// The kernel moves less than 2 GiB a call; what is cut off makes a short count.
fn length(piece: &libc::iovec) -> u32 {
    u32::try_from(piece.iov_len).unwrap_or(u32::MAX)
}

enum Phase {
    Unstarted,
    InFlight(OpId),
    Pausing(Sleep),
    Done,
}

/// An operation on the loop that made it: a future of the count or value that the kernel gave, or a
/// negative errno. Starts when first polled.
///
/// EINTR and EAGAIN are tried again a bounded number of times. A short count is the caller's to go
/// on from. Dropping the future detaches it: a read or write goes on to its end and keeps its memory
/// and descriptor; a wait for readiness is cancelled.
#[must_use = "an operation starts when it is polled"]
pub struct Operation {
    record: Rc<Record>,
    phase: Phase,
    retries: u32,
}

impl Operation {
    pub(crate) fn new(
        core: Rc<Core>,
        fd: Arc<OwnedFd>,
        memory: IoVector,
        offset: u64,
        verb: Verb,
    ) -> Operation {
        let record = Rc::new(Record {
            core,
            fd,
            memory,
            verb,
            offset,
            result: Cell::new(None),
            waker: RefCell::new(None),
            orphaned: Cell::new(false),
        });
        Operation { record, phase: Phase::Unstarted, retries: 0 }
    }

    /// Asks for an early end. Best effort: the operation completes as if nothing had been asked, or
    /// with -ECANCELED, and must still be awaited (or dropped).
    pub fn cancel(&self) {
        if let Phase::InFlight(id) = self.phase {
            self.record.core.cancel(id);
        }
    }

    fn start(&mut self) {
        let sink = Rc::clone(&self.record);
        // SAFETY: the memory, the vector of pieces and the descriptor belong to the record, which
        // the sink keeps alive and in place until it is told.
        let id = unsafe { self.record.core.submit(self.record.raw(), sink, 0) };
        self.phase = Phase::InFlight(id);
    }

    /// What to do about a result: `Some` hands it to the caller.
    fn settle(&mut self, result: i32) -> Option<i32> {
        if !is_transient(result) || self.retries == RETRIES {
            self.phase = Phase::Done;
            return Some(result);
        }
        self.retries += 1;
        if self.retries <= EAGER_RETRIES {
            self.start();
        } else {
            self.phase = Phase::Pausing(Sleep::new(Rc::clone(&self.record.core), RETRY_PAUSE));
        }
        None
    }
}

impl Future for Operation {
    type Output = i32;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<i32> {
        loop {
            let this = &mut *self;
            match &mut this.phase {
                Phase::Unstarted => this.start(),
                Phase::InFlight(_) => match this.record.result.take() {
                    Some(result) => {
                        if let Some(result) = this.settle(result) {
                            return Poll::Ready(result);
                        }
                    }
                    None => {
                        this.record.waker.replace(Some(context.waker().clone()));
                        return Poll::Pending;
                    }
                },
                Phase::Pausing(pause) => match Pin::new(pause).poll(context) {
                    Poll::Ready(()) => this.start(),
                    Poll::Pending => return Poll::Pending,
                },
                Phase::Done => panic!("an operation was polled after it had completed"),
            }
        }
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        let Phase::InFlight(id) = self.phase else { return };
        if self.record.result.get().is_some() {
            return;
        }
        self.record.orphaned.set(true);
        let orphans = &self.record.core.orphans.0;
        orphans.set(orphans.get() + 1);
        if matches!(self.record.verb, Verb::Poll { .. }) {
            self.record.core.cancel(id);
        }
    }
}
