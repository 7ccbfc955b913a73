//! What is said of an image while it is used, to whoever listens: events of `tracing` with targets
//! of their own.

use super::Qcow2;
use super::entry::{EntryError, EntryRule, OFFSET_MASK, Table, ZERO};
use super::lookup::Fault;

/// An image was found to be corrupt: with the fields `error` and `fatal`, which is false for an image
/// that is open for reading.
pub const CORRUPT: &str = "blockplex::qcow2::corrupt";
/// A line about the repair of an image that was not closed.
pub const REPAIR: &str = "blockplex::qcow2::repair";
/// All of them.
pub const TARGETS: [&str; 2] = [CORRUPT, REPAIR];

impl Qcow2 {
    /// What is said of an entry that a request met at a guest offset: in the peer's words, where it
    /// has some, since people look for those.
    pub(super) fn words_for(&self, guest: u64, fault: Fault, writes: bool) -> String {
        let position = self.position(guest);
        let l1_index = self.l1_index(position.number);
        let l2_offset = self.l1.get(l1_index) & OFFSET_MASK;
        match fault {
            Fault::Entry(EntryError { table: Table::L1, raw, rule: EntryRule::Unaligned }) => {
                format!(
                    "L2 table offset {:#x} unaligned (L1 index: {})",
                    raw & OFFSET_MASK,
                    hex(l1_index)
                )
            }
            Fault::Entry(EntryError { table: Table::L2, raw, rule: EntryRule::Unaligned }) => {
                let host = raw & OFFSET_MASK;
                if !writes {
                    let index = hex(position.index as u64);
                    return format!(
                        "Cluster allocation offset {host:#x} unaligned (L2 offset: {l2_offset:#x}, L2 \
                         index: {index})"
                    );
                }
                let kind = if raw & ZERO != 0 { "Preallocated zero" } else { "Data" };
                let cluster = hex(guest - position.in_cluster);
                format!("{kind} cluster offset {host:#x} unaligned (guest offset: {cluster})")
            }
            Fault::Misplaced(raw) if writes => {
                let host = raw & OFFSET_MASK;
                match self.refcounts.find_overlap(host, self.geometry.cluster_size(), &[]) {
                    Some(hit) => {
                        let hit = hit.described();
                        format!("Preventing invalid write on metadata (overlaps with {hit})")
                    }
                    None => fault.at(guest).message().to_owned(),
                }
            }
            _ => fault.at(guest).message().to_owned(),
        }
    }
}

/// As C's `%#x`.
fn hex(number: u64) -> String {
    if number == 0 { "0".to_owned() } else { format!("{number:#x}") }
}
