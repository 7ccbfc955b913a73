//! Leaf operations: one transfer between memory and an open file, on the current loop's ring,
//! carried on through short counts and interruptions until it is whole.
#![expect(unsafe_code, reason = "hands memory to the kernel")]

use super::context::Context;
use super::hold::SharedHolds;
use crate::error::{Error, ErrorKind};
use blockplex_io::buffer::IoVector;
use blockplex_io::engine::{RawOp, Sink};
use blockplex_io::event_loop::Local;
use std::cell::{Cell, RefCell};
use std::future::Future;
use std::os::fd::RawFd;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{self, Poll, Waker};

/// How often an operation that the kernel interrupts is tried again.
const MAX_INTERRUPTIONS: u32 = 10_000;

/// One transfer, and how far it is.
#[derive(Clone, Copy)]
pub(crate) struct Transfer {
    pub(crate) writes: bool,
    /// The write is durable when it ends (RWF_DSYNC).
    pub(crate) durable: bool,
    pub(crate) fd: RawFd,
    /// Start in the file.
    pub(crate) offset: u64,
    /// Start in the vector.
    pub(crate) position: usize,
    pub(crate) length: usize,
    done: usize,
    interruptions: u32,
}

/// What follows from a completion.
pub(crate) enum Next {
    /// The transfer is whole.
    Finished,
    /// The rest is to be submitted.
    Again,
    /// It failed.
    Failed(Error),
}

impl Transfer {
    pub(crate) fn new(
        writes: bool,
        durable: bool,
        fd: RawFd,
        offset: u64,
        position: usize,
        length: usize,
    ) -> Transfer {
        Transfer { writes, durable, fd, offset, position, length, done: 0, interruptions: 0 }
    }

    /// Submits what is left, to end in `sink`.
    ///
    /// # Safety
    ///
    /// `vector`, whose list of pieces is on the heap, and its memory live until `sink` gets the
    /// completion.
    pub(crate) unsafe fn submit(
        &self,
        local: &Local,
        vector: &IoVector,
        sink: Rc<dyn Sink>,
        token: u64,
    ) {
        let fd = self.fd;
        let offset = self.offset + self.done as u64;
        let (start, length) = (self.position + self.done, self.length - self.done);
        let op = match vector.contiguous(start, length) {
            Some(ptr) => {
                let len = u32::try_from(length).unwrap_or(!0xfff);
                if self.writes {
                    RawOp::Write { fd, offset, ptr, len, dsync: self.durable }
                } else {
                    RawOp::Read { fd, offset, ptr, len }
                }
            }
            None => {
                debug_assert!(start == 0 && length == vector.len(), "see `whole`");
                let iov = vector.iovecs().as_ptr();
                let count = vector.iovecs().len() as u32;
                if self.writes {
                    RawOp::Writev { fd, offset, iov, count, dsync: self.durable }
                } else {
                    RawOp::Readv { fd, offset, iov, count }
                }
            }
        };
        // SAFETY: the memory outlives the completion, as the caller promises.
        let _operation = unsafe { local.submit(op, sink, token) };
    }

    /// Whether the rest of the transfer can be submitted from `vector` as it is: either it lies in
    /// one piece, or it is all of the vector.
    pub(crate) fn fits(&self, vector: &IoVector) -> bool {
        let (start, length) = (self.position + self.done, self.length - self.done);
        (start == 0 && length == vector.len()) || vector.contiguous(start, length).is_some()
    }

    /// The rest of the transfer over a vector of its own.
    pub(crate) fn rest(&self, vector: &IoVector) -> (Transfer, IoVector) {
        let (start, length) = (self.position + self.done, self.length - self.done);
        let mut rest = *self;
        rest.offset += self.done as u64;
        (rest.position, rest.length, rest.done) = (0, length, 0);
        (rest, vector.slice(start, length))
    }

    /// Takes in a completion: a count of bytes, or minus an errno.
    pub(crate) fn advance(&mut self, vector: &IoVector, result: i32) -> Next {
        if result < 0 {
            let errno = -result;
            if matches!(errno, libc::EINTR | libc::EAGAIN) && self.interruptions < MAX_INTERRUPTIONS
            {
                self.interruptions += 1;
                return Next::Again;
            }
            // The rest of a direct read that the end of the file cut short is misaligned, which some
            // file systems refuse instead of saying that there is no more.
            if !self.writes && self.done > 0 && errno == libc::EINVAL {
                vector.fill(self.position + self.done, self.length - self.done, 0);
                return Next::Finished;
            }
            return Next::Failed(Error::from_errno(errno));
        }
        self.done += result as usize;
        if self.done >= self.length {
            return Next::Finished;
        }
        if result > 0 {
            return Next::Again;
        }
        if self.writes {
            let text = "the file took no more bytes";
            return Next::Failed(Error::new(ErrorKind::NoSpace, text));
        }
        // The end of the file: what lies beyond reads as zeros.
        vector.fill(self.position + self.done, self.length - self.done, 0);
        Next::Finished
    }
}

/// A transfer as a future. Everything that the kernel uses is owned by the operation, so that the
/// future may be dropped at any time (C01); admission and holds go with it (R3, R4).
pub(crate) struct TransferFuture(Rc<InFlight>);

struct InFlight {
    /// Keeps the nodes (and their open files) and the admission (R3).
    context: Context,
    transfer: Cell<Transfer>,
    /// Replaced by its rest after a short count in the middle of several pieces.
    vector: RefCell<IoVector>,
    result: RefCell<Option<Result<(), Error>>>,
    waker: RefCell<Option<Waker>>,
    this: std::rc::Weak<InFlight>,
    /// Kept until the completion (R4).
    _holds: (Rc<SharedHolds>, Option<Rc<SharedHolds>>),
}

impl TransferFuture {
    /// Submits at once; the future only waits.
    pub(crate) fn start(
        context: &Context,
        transfer: Transfer,
        vector: IoVector,
        holds: (Rc<SharedHolds>, Option<Rc<SharedHolds>>),
    ) -> TransferFuture {
        let op = Rc::new_cyclic(|this| InFlight {
            context: context.clone(),
            transfer: Cell::new(transfer),
            vector: RefCell::new(vector),
            result: RefCell::new(None),
            waker: RefCell::new(None),
            this: this.clone(),
            _holds: holds,
        });
        op.clone().submit();
        TransferFuture(op)
    }
}

impl InFlight {
    fn submit(self: Rc<Self>) {
        let transfer = self.transfer.get();
        if !transfer.fits(&self.vector.borrow()) {
            let (rest, vector) = transfer.rest(&self.vector.borrow());
            self.transfer.set(rest);
            *self.vector.borrow_mut() = vector;
        }
        let vector = self.vector.borrow();
        // SAFETY: the sink is this operation, which owns the vector and does not touch it before
        // the completion; the engine keeps the sink until then.
        unsafe { self.transfer.get().submit(&self.context.local, &vector, self.clone(), 0) }
    }
}

impl Sink for InFlight {
    fn complete(&self, _token: u64, result: i32) {
        let mut transfer = self.transfer.get();
        let next = transfer.advance(&self.vector.borrow(), result);
        self.transfer.set(transfer);
        let ended = match next {
            Next::Finished => Ok(()),
            Next::Failed(error) => Err(error),
            Next::Again => {
                if let Some(this) = self.this.upgrade() {
                    this.submit();
                }
                return;
            }
        };
        *self.result.borrow_mut() = Some(ended);
        let waker = self.waker.borrow_mut().take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl Future for TransferFuture {
    type Output = Result<(), Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut task::Context<'_>) -> Poll<Self::Output> {
        if let Some(result) = self.0.result.borrow_mut().take() {
            return Poll::Ready(result);
        }
        *self.0.waker.borrow_mut() = Some(cx.waker().clone());
        Poll::Pending
    }
}
