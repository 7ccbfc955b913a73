//! Encryption of sectors, and the LUKS format that keeps the keys.
//!
//! Nothing here knows of qcow2 or of nodes: ciphers work on bytes, [`luks`] on the bytes of a
//! header and on a [`Child`](blockplex_graph::Child) with the offset at which the header starts.
//!
//! | module | what it knows |
//! |---|---|
//! | [`secret`] | passwords: what an option names and nobody prints |
//! | [`secret_object`] | `secret,id=…,data=…`, the way in which tools are given them |
//! | `key_memory` | memory for passwords and keys |
//! | [`hash`] | hash functions, and keys derived from passwords |
//! | [`cipher`] | block ciphers by name and size |
//! | `mode`, `xts` | how blocks make a sector |
//! | [`iv`] | what makes equal sectors differ |
//! | [`sectors`] | the three together: [`SectorCipher`](sectors::SectorCipher) |
//! | `split` | the anti-forensic splitter |
//! | [`luks`] | LUKS version 1: opening, creating, changing key slots |
//! | [`legacy_aes`] | the obsolete scheme of old qcow2 images |
//! | [`transfer`] | encrypted reads and writes of a child |
//!
//! Truths:
//!
//! - **K1** Passwords, derived keys, master keys and expanded key schedules are wiped when they are
//!   dropped; `Debug` shows none of them.
//! - **K2** What depends on a key is compared in constant time.
//! - **K3** Work that takes long (derivation, large transfers) runs on the loop's thread pool, never
//!   on the loop; its length is bounded by a limit of the caller, not by the image.
//! - **K4** Passwords and master keys are locked in memory and left out of core dumps, as far as
//!   the system lets them be.

pub mod cipher;
pub mod hash;
pub mod iv;
mod key_memory;
pub mod legacy_aes;
pub mod luks;
mod mode;
pub mod secret;
pub mod secret_object;
pub mod sectors;
mod split;
pub mod transfer;
mod xts;

pub use secret::{Secret, Secrets};

use blockplex_graph::{Error, ErrorKind, Result};

/// Bytes of a sector, the unit of encryption.
pub const SECTOR: usize = 512;

/// Fills `bytes` with what nobody can guess.
fn fill_random(bytes: &mut [u8]) -> Result<()> {
    getrandom::fill(bytes).map_err(|error| {
        Error::new(ErrorKind::Io, format!("the system gives no random bytes: {error}"))
    })
}

#[cfg(test)]
mod tests;
