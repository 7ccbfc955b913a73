//! blockplex-drivers
#![deny(missing_docs)]
