//! The driver as a whole, against the peer.

mod basics;
mod compressed;
mod concurrency;
mod crash;
mod creation;
mod faults;
mod fuzz;
mod snapshots;
