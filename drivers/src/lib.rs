//! The drivers: protocols, formats and filters.
//!
//! | driver | what it is | children |
//! |---|---|---|
//! | [`file`](mod@file) | a file or block device of the host | none |
//! | [`null`] (`null-co`) | answers at once, keeps nothing | none |
//! | [`memory`] | a disk in memory | none |
//! | [`raw`] | passes on, or shows a window of its file | `file` |
//! | [`blkdebug`] | injects errors, keeps requests waiting, narrows limits | `file` (`image` in options) |
//! | [`luks`] | a disk behind a LUKS header | `file` |
//! | [`qcow2`] | the qcow2 format | `file`, `backing` |
//!
//! Beside them: [`options`] (how nodes are described), [`open_gate`] (what an image may open by
//! itself: nothing, unless granted), [`probe`] (a suggestion of a format, never a decision),
//! [`crypto`] (ciphers, LUKS, secrets) and [`dirty_bitmap`] (what was written since some moment).
#![deny(missing_docs)]

pub mod blkdebug;
pub mod crypto;
pub mod dirty_bitmap;
pub mod file;
mod join;
pub mod luks;
pub mod memory;
pub mod null;
pub mod open_gate;
pub mod options;
pub mod probe;
pub mod qcow2;
pub mod raw;
