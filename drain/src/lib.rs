//! Coming to rest: in-flight accounting, drained sections and grace periods.
//!
//! This crate knows neither loops nor graphs: gates are named, counted and frozen here; which gates
//! a node concerns is the graph's business. See `design.md`.
//!
//! ```text
//!  loop thread                     any thread
//!  Slot::try_enter ──┐             Section::freeze ─► Frozen::announce ─► Section::wait
//!     (one counter)  ├──► Gate ◄───┘  (counts up)      (heavy barrier,     (counters are 0)
//!  Slot::exit ───────┘    frozen                        drain_begin)            │
//!                         generation      admission again ◄── drain_end ◄── drop(Section)
//! ```
//!
//! * [`Gate`]: one per origin (a backend, a job, a driver's background task).
//! * [`Slot`]: one per queue, written by one thread; the only line the request path writes.
//! * [`Section`]: gates held shut together; [`Settle`] is its wait.
//! * [`Holder`]: who is being waited for, readable without the owner's help.
//! * [`Grace`]: delays the reuse of a resource until every request that may know it has ended.
//! * [`barrier`]: the asymmetric memory barrier that makes the request side cheap.
//!
//! Locks, in the order in which they may nest: the caller's own (the graph's master mutex), then a
//! section's member list, then one gate's slow mutex. None is ever held while a waker or a hook
//! runs, nor across an await.
//!
//! Deliberately absent: a blocking wait (the loop crate owns the parking of threads), any wait
//! inside a drop, and any `unsafe` code.
#![forbid(unsafe_code)]
#![deny(missing_docs)]

pub mod barrier;
mod blame;
mod gate;
mod grace;
mod hooks;
mod ledger;
mod section;
mod settle;
mod slot;
mod sync;
#[cfg(all(test, not(loom), not(shuttle)))]
mod testing;

pub use blame::Holder;
pub use gate::Gate;
pub use grace::{Grace, GraceEpoch, GracePin, MAX_LOOPS};
pub use hooks::DrainHooks;
pub use ledger::{MAX_RECORDS, RequestRecord, kind, monotonic_ns};
pub use section::{Frozen, Section, SectionRef};
pub use settle::Settle;
pub use slot::Slot;
