//! The request path: from a queue down the graph to the current loop's ring.
//!
//! ```text
//!   Queue::submit ── gate ── view ──► walk: map(), map(), … ──► leaf op ──► ring ──► reap
//!                                        │ cannot be answered at once
//!                                        └► serve: a task on this loop (align, bounce, tier 2)
//! ```
//!
//! R1. A request runs on the loop of its queue, from submission to completion.
//! R2. Admission comes first, then the generation check: an admitted request sees the version
//!     that is current, and keeps it (`Rc<QueueView>`) until it ends.
//! R3. A request completes exactly once; its admission ends after its last operation has left
//!     the kernel, even if the task that waited for it is gone.
//! R4. Pins and range tokens are given back after the last operation of the request that took
//!     them.
//! R5. The hot path (tier 1 down to one leaf) allocates nothing and takes no lock.

mod align;
mod children;
mod context;
mod erase;
mod hold;
mod leaf;
mod queue;
mod serve;
mod view;
mod walk;

pub use children::{Child, NodeIo};
pub use queue::{IoFuture, Queue};
