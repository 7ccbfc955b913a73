//! blockplex-drivers
#![deny(missing_docs)]

pub mod qcow2;
