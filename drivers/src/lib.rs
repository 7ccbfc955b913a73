//! blockplex-drivers
#![deny(missing_docs)]

pub mod file;
pub mod open_gate;
pub mod options;
pub mod probe;
pub mod qcow2;
