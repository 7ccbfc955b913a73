//! Engines: how a loop's operations reach the kernel and how their results come back.
//!
//! ```text
//!   Local::submit ──► Engine::submit ──► ring: an SQE, flushed once a turn      ┐
//!                                        threads: a pool thread, preadv & co.   ├─► Engine::reap ──► Sink::complete
//!   Local::read_at & co. (safe) ─► the same, with memory owned by the operation ┘    (in the loop's turn)
//! ```
//!
//! Both engines keep the same promises, and the tests run over both:
//!
//! E1. `submit` neither fails, nor blocks, nor completes anything: results are delivered by the
//!     loop's turn only, so a sink that submits again uses no stack (W18).
//! E2. Each operation completes exactly once, on the loop's thread, with a result ≥ 0 or -errno.
//! E3. An operation once submitted owns its sink until it completes, whatever the kernel says to a
//!     call that was to carry it (W13).
//! E4. No lock or cell is borrowed while a sink runs.
//! E5. The ring engine has no more operations in flight than the completion queue has entries; the
//!     rest waits in order (W14).

mod op;
mod pool;
mod ring;
mod slots;
mod submit;
mod threads;

pub use op::Operation;
pub(crate) use op::{Orphans, Verb};
pub(crate) use pool::{Job, Pool};
pub(crate) use ring::{Ring, clear_event};
pub(crate) use threads::Threads;

use std::os::fd::RawFd;
use std::time::Duration;

/// A positioned operation with raw memory. Offsets and lengths are bytes. On a descriptor without
/// positions (a pipe, a socket) the offset is ignored.
#[derive(Clone, Copy, Debug)]
pub enum RawOp {
    /// Does nothing and results in 0: for measurements, and to pass through the engine's order.
    Nop,
    /// Reads up to `len` bytes at `offset` into `ptr`; results in the count.
    Read {
        /// The file.
        fd: RawFd,
        /// Where in the file.
        offset: u64,
        /// Where to.
        ptr: *mut u8,
        /// How much at most.
        len: u32,
    },
    /// Writes up to `len` bytes from `ptr` at `offset`; results in the count.
    Write {
        /// The file.
        fd: RawFd,
        /// Where in the file.
        offset: u64,
        /// Where from.
        ptr: *const u8,
        /// How much at most.
        len: u32,
        /// Whether the data is to be durable when the write completes.
        dsync: bool,
    },
    /// As `Read`, scattered over `count` pieces.
    Readv {
        /// The file.
        fd: RawFd,
        /// Where in the file.
        offset: u64,
        /// The pieces.
        iov: *const libc::iovec,
        /// How many there are; the kernel takes 1024.
        count: u32,
    },
    /// As `Write`, gathered from `count` pieces.
    Writev {
        /// The file.
        fd: RawFd,
        /// Where in the file.
        offset: u64,
        /// The pieces.
        iov: *const libc::iovec,
        /// How many there are; the kernel takes 1024.
        count: u32,
        /// Whether the data is to be durable when the write completes.
        dsync: bool,
    },
    /// Makes completed writes durable.
    Fsync {
        /// The file.
        fd: RawFd,
        /// Leave out metadata that reading the data back does not need.
        data_only: bool,
    },
    /// `fallocate(2)`: allocates, zeroes or punches by `mode`.
    Fallocate {
        /// The file.
        fd: RawFd,
        /// FALLOC_FL_* bits.
        mode: i32,
        /// Where in the file.
        offset: u64,
        /// How much.
        len: u64,
    },
    /// Waits once until the descriptor is ready for any of `events` (POLLIN and so on); results in
    /// the events that are there. A regular file is always ready.
    PollAdd {
        /// The descriptor.
        fd: RawFd,
        /// POLL* bits.
        events: u32,
    },
}

/// Who is told that an operation has completed.
pub trait Sink {
    /// `token` is what was given at submission; `result` is ≥ 0 or a negative errno. Called once
    /// per operation, on the loop's own thread, from its turn. It may submit, spawn and wake; what
    /// it submits starts at the end of the turn. A panic in it is caught and logged.
    fn complete(&self, token: u64, result: i32);
}

/// Whether a result only means "try again": the caller should, a bounded number of times. The
/// futures of [`Local`](crate::event_loop::Local) do so themselves.
pub fn is_transient(result: i32) -> bool {
    matches!(-result, libc::EINTR | libc::EAGAIN)
}

/// Names a submitted operation, to cancel it. Harmless once that has completed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct OpId(u64);

impl OpId {
    /// Names nothing: no slab grows that large.
    pub(crate) const NONE: OpId = OpId(u64::MAX);

    fn new(index: u32, generation: u32) -> OpId {
        OpId(u64::from(generation) << 32 | u64::from(index))
    }

    fn from_bits(bits: u64) -> OpId {
        OpId(bits)
    }

    fn bits(self) -> u64 {
        self.0
    }

    fn index(self) -> u32 {
        self.0 as u32 // the lower half is the index
    }

    fn generation(self) -> u32 {
        (self.0 >> 32) as u32 // the upper half is the generation
    }
}

/// Which engine a loop is to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EngineChoice {
    /// io_uring where the kernel lets us, else threads.
    #[default]
    Auto,
    /// io_uring, or an error.
    Ring,
    /// A pool of threads that block in system calls.
    Threads,
}

/// What a loop's engine is and can do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EngineFeatures {
    /// The kernel runs completions only when the loop asks for them (DEFER_TASKRUN).
    pub defer_taskrun: bool,
    /// The kernel does not interrupt the loop to run completions (COOP_TASKRUN).
    pub coop_taskrun: bool,
    /// Operations that the kernel holds at once; 0 for threads, where it is the pool's size.
    pub in_flight_limit: u32,
}

/// The engine of one loop; used by the loop's thread only.
#[expect(clippy::large_enum_variant, reason = "there is one per loop, on the heap already")]
pub(crate) enum Engine {
    Ring(Ring),
    Threads(Threads),
}

impl Engine {
    /// Tries to end an operation early: if it had not started it completes with -ECANCELED.
    pub(crate) fn cancel(&self, id: OpId) {
        match self {
            Engine::Ring(ring) => ring.cancel(id),
            Engine::Threads(threads) => threads.cancel(id),
        }
    }

    /// Tries to end all operations, or all that wait for readiness.
    pub(crate) fn cancel_all(&self, only_polls: bool) {
        match self {
            Engine::Ring(ring) => ring.cancel_all(only_polls),
            Engine::Threads(threads) => threads.cancel_all(only_polls),
        }
    }

    /// Hands what was submitted to the kernel, and lets it post what has completed.
    pub(crate) fn flush(&self) {
        match self {
            Engine::Ring(ring) => ring.flush(),
            Engine::Threads(threads) => threads.flush(),
        }
    }

    /// Delivers up to `budget` results; returns how many.
    pub(crate) fn reap(&self, budget: usize) -> usize {
        match self {
            Engine::Ring(ring) => ring.reap(budget),
            Engine::Threads(threads) => threads.reap(budget),
        }
    }

    /// Whether there is something to reap, as far as can be seen without a system call.
    pub(crate) fn is_ready(&self) -> bool {
        match self {
            Engine::Ring(ring) => ring.is_ready(),
            Engine::Threads(threads) => threads.is_ready(),
        }
    }

    /// Whether something submitted has not reached the kernel although it could have.
    pub(crate) fn has_refused(&self) -> bool {
        match self {
            Engine::Ring(ring) => ring.has_refused(),
            Engine::Threads(_) => false,
        }
    }

    /// Flushes, then sleeps until something completes, the loop is kicked or `timeout` is over.
    pub(crate) fn wait(&self, timeout: Option<Duration>) {
        match self {
            Engine::Ring(ring) => ring.wait(timeout),
            Engine::Threads(threads) => threads.wait(timeout),
        }
    }

    /// Operations submitted and not delivered.
    pub(crate) fn in_flight(&self) -> usize {
        match self {
            Engine::Ring(ring) => ring.in_flight(),
            Engine::Threads(threads) => threads.in_flight(),
        }
    }

    /// Takes the result that a pool thread brought.
    pub(crate) fn finish(&self, id: OpId, result: i32) {
        match self {
            Engine::Ring(_) => debug_assert!(false, "a ring's results do not come by thread"),
            Engine::Threads(threads) => threads.finish(id, result),
        }
    }
}

/// Tells a sink; a panic in it must not lose the results behind it.
fn deliver(sink: &dyn Sink, token: u64, result: i32) {
    let told = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        sink.complete(token, result);
    }));
    if told.is_err() {
        tracing::error!(token, result, "a sink panicked; the loop goes on");
    }
}
