//! blockplex-graph
#![deny(missing_docs)]
