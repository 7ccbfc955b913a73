//! What is said of an image while it is used, to whoever listens: events of `tracing` with targets
//! of their own.

/// An image was found to be corrupt: with the field `error`.
pub const CORRUPT: &str = "blockplex::qcow2::corrupt";
/// A line about the repair of an image that was not closed.
pub const REPAIR: &str = "blockplex::qcow2::repair";
/// All of them.
pub const TARGETS: [&str; 2] = [CORRUPT, REPAIR];
