//! Event loops, rings, tasks, coroutine locks and buffers: the runtime of Blockplex.
//!
//! This crate knows nothing of blocks, nodes or images. See `design.md` for how it meets the rest.
#![deny(missing_docs)]

#[cfg(not(loom))]
pub mod buffer;
#[cfg(not(loom))]
pub mod engine;
#[cfg(not(loom))]
pub mod event_loop;
/// The loop's protocols with other threads, for the models of `tests/loom_wake.rs`.
#[cfg(loom)]
pub mod event_loop {
    pub mod notify;
    pub mod pending;
}
pub mod lock;
mod sync;
