//! Coming to rest: in-flight accounting, drained sections and grace periods.
//!
//! This crate knows neither loops nor graphs: gates are named, counted and frozen here; which gates
//! a node concerns is the graph's business. See `design.md`.
#![deny(missing_docs)]

mod sync;
