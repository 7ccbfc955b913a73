//! The qcow2 format.
//!
//! What stands here so far is the *format* alone: structures on disk turned into values and
//! back, by pure functions. Nothing in these modules reads a file, takes a lock, keeps state or
//! knows of the graph; that is the driver's business, which calls them.
//!
//! | module | what it knows |
//! |---|---|
//! | [`header`] | the header: validation, extensions, serialisation |
//! | [`extension`] | one header extension after the other, from bytes and to bytes |
//! | [`geometry`] | cluster arithmetic: what a guest or host offset means in tables |
//! | [`entry`] | one L1, L2 or refcount-table entry |
//! | [`refcount_block`] | one refcount of 1 to 64 bits in a block |
//! | [`codec`] | compressed clusters |
//! | [`image_layout`] | the bytes of a fresh image |
//! | [`format_error`] | what all of them say when bytes are not as the format wants |
//!
//! Truths of all these modules, cited by number:
//!
//! - **Q1** No input makes them panic, loop without end, or allocate more than one cluster or
//!   the length of the input, whichever is larger (`image_layout`: the metadata of the image).
//! - **Q2** Arithmetic on values from an image is checked; a shift happens only by a number
//!   that was checked against the width.
//! - **Q3** An error names the field, its value, where it stands, and the rule it breaks; text
//!   that came from the image is escaped and cut before it is shown.

pub mod codec;
pub mod entry;
pub mod extension;
pub mod format_error;
pub mod geometry;
pub mod header;
pub mod image_layout;
pub mod refcount_block;
#[cfg(test)]
mod testing;
