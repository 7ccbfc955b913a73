//! LUKS, version 1: a header that keeps a payload's key under up to eight passwords.
//!
//! | part | what it does |
//! |---|---|
//! | [`header`] | the header: from bytes, with every rule checked, and back to bytes |
//! | `key_slot` | a key in a slot, from a password and back |
//! | `create` | a new header |
//! | `change` | passwords come and go |
//! | [`options`] | options by their names |
//! | `speed` | how many iterations a time is worth |
//!
//! The header may start anywhere in a file: functions take the [`Place`].

mod change;
mod create;
pub mod header;
mod key_slot;
pub mod options;
mod speed;

pub use change::{SlotChange, change_slots};
pub use create::{Fresh, LuksCreateOptions, create, header_bytes};
pub use header::{KeySlot, LuksHeader};
pub use key_slot::MasterKey;

use crate::crypto::hash::HashAlgorithm;
use blockplex_graph::{Child, Result};
use blockplex_io::buffer::IoVector;

/// The most iterations of a key derivation that are accepted, unless the caller says otherwise
/// (`max-iterations`): of two blocks of the hash or more, as the 64 bytes of AES-256-XTS are with
/// SHA-256; of one block, which costs half of that, twice as many. A fast machine makes slots of
/// 4.5 million of the former and 11.4 million of the latter in the two seconds that the peer takes.
pub const DEFAULT_MAX_ITERATIONS: u32 = 10_000_000;

/// Key slots of a header.
pub const SLOTS: usize = 8;

/// The most iterations that are accepted for a key of `length` bytes.
fn most_iterations(max_iterations: u32, hash: HashAlgorithm, length: usize) -> u32 {
    match length > hash.digest_bytes() {
        true => max_iterations,
        false => max_iterations.saturating_mul(2),
    }
}

/// Where a header is.
#[derive(Clone, Copy)]
pub struct Place<'a> {
    /// The file.
    pub file: &'a Child,
    /// The first byte of the header.
    pub offset: u64,
    /// Bytes of the file from there on that belong to the header: key slots lie within.
    pub length: u64,
}

impl Place<'_> {
    async fn read(&self, start: u64, length: usize) -> Result<Vec<u8>> {
        let memory = IoVector::zeroed(length);
        self.file.read(self.offset + start, memory.clone()).await?;
        Ok(memory.to_vec())
    }
}
