//! The oracle: our `qemu-img` and `qemu-io` beside the installed ones.
//!
//! A test runs the same command lines in two folders, once with each, and demands the same
//! printed text, the same exit status, images that both programs call clean, and the same bytes
//! for the guest. What may differ (times, host allocation) is masked in `mask`, and nowhere else.
//! Needs QEMU's tools, which `tests/run` installs.

#![expect(clippy::unwrap_used, reason = "a test that cannot run its programs should fail loudly")]

mod chain;
mod change;
mod copy;
mod create;
mod description;
mod encryption;
mod info;
mod io;
mod io_faults;
mod left;
mod mask;
mod pair;
mod policy;
mod scripts;
mod sequence;
