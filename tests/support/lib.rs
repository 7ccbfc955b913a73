//! Shared fixtures of the scenario tests.
#![deny(missing_docs)]
