//! Blockplex
#![deny(missing_docs)]
