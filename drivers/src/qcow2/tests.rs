//! The driver as a whole, against the peer.

mod basics;
mod crash;
mod creation;
mod faults;
