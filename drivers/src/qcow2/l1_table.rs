//! The L1 table in memory: read without a lock, growing without moving.
//!
//! Entries are atomics in segments, each as long as all before it; a segment never moves, so a
//! reader needs no guard while the table grows (Q14). Changed entries are remembered by sector and
//! written back after the L2 tables that they name.

use super::geometry::TABLE_ENTRY_BYTES;
use parking_lot::Mutex;
use std::collections::BTreeSet;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// Entries that are written together: a sector of 512 bytes.
const SECTOR_ENTRIES: u64 = 64;
/// Segments after the first: enough for 2^32 entries.
const SEGMENTS: usize = 26;

/// See the page.
pub(super) struct L1Table {
    first: Box<[AtomicU64]>,
    more: [OnceLock<Box<[AtomicU64]>>; SEGMENTS],
    place: Mutex<L1Place>,
}

/// Where the table is in the file, and what of it has to be written.
struct L1Place {
    offset: u64,
    entries: u64,
    dirty: BTreeSet<u64>,
}

/// A changed part of the table.
pub(super) struct DirtySector {
    sector: u64,
    pub(super) offset: u64,
    pub(super) bytes: Vec<u8>,
}

impl L1Table {
    /// The table at `offset` with these entries.
    pub(super) fn new(offset: u64, entries: &[u64]) -> L1Table {
        let length = entries.len().next_multiple_of(SECTOR_ENTRIES as usize).max(64);
        let first: Box<[AtomicU64]> =
            (0..length).map(|i| AtomicU64::new(entries.get(i).copied().unwrap_or(0))).collect();
        let place = L1Place { offset, entries: entries.len() as u64, dirty: BTreeSet::new() };
        L1Table { first, more: [const { OnceLock::new() }; SEGMENTS], place: Mutex::new(place) }
    }

    /// The number of the segment of an entry past the first, and its index there.
    fn locate(&self, index: u64) -> (usize, usize) {
        let base = self.first.len() as u64;
        let segment = (index / base).ilog2();
        (segment as usize, (index - (base << segment)) as usize)
    }

    /// The raw entry at `index`; 0 past the end.
    pub(super) fn get(&self, index: u64) -> u64 {
        let entry = if index < self.first.len() as u64 {
            self.first.get(index as usize)
        } else {
            let (segment, at) = self.locate(index);
            self.more.get(segment).and_then(OnceLock::get).and_then(|entries| entries.get(at))
        };
        // Acquire: partner of the Release in `set`: the L2 table it names is ready.
        entry.map_or(0, |entry| entry.load(Ordering::Acquire))
    }

    /// Replaces an entry and remembers to write it.
    pub(super) fn set(&self, index: u64, raw: u64) {
        // The mark comes under the same lock as the value, so that a snapshot takes both or none.
        let mut place = self.place.lock();
        place.dirty.insert(index / SECTOR_ENTRIES);
        self.store(index, raw);
    }

    /// Under the mutex.
    fn store(&self, index: u64, raw: u64) {
        let entry = if index < self.first.len() as u64 {
            self.first.get(index as usize)
        } else {
            let (segment, at) = self.locate(index);
            let length = self.first.len() << segment;
            self.more.get(segment).and_then(|entries| {
                let make = || (0..length).map(|_| AtomicU64::new(0)).collect();
                entries.get_or_init(make).get(at)
            })
        };
        if let Some(entry) = entry {
            // Release: partner of the Acquire in `get`.
            entry.store(raw, Ordering::Release);
        }
    }

    /// Where the table is in the file, in bytes, and how many entries it has there.
    pub(super) fn place(&self) -> (u64, u64) {
        let place = self.place.lock();
        (place.offset, place.entries)
    }

    /// The table is now at `offset`, with `entries` entries, where `written` was written of it.
    /// What has changed since that snapshot is dirty.
    pub(super) fn moved(&self, offset: u64, entries: u64, written: &[u8]) {
        let mut place = self.place.lock();
        (place.offset, place.entries) = (offset, entries);
        for (index, word) in (0..entries).zip(written.as_chunks::<8>().0) {
            if self.get(index) != u64::from_be_bytes(*word) {
                place.dirty.insert(index / SECTOR_ENTRIES);
            }
        }
    }

    /// The table is another one: that at `offset`, with `entries`, as the file has it. While nobody
    /// looks anything up.
    pub(super) fn replace(&self, offset: u64, entries: &[u64]) {
        let mut place = self.place.lock();
        let most = place.entries.max(entries.len() as u64);
        for index in 0..most {
            self.store(index, entries.get(index as usize).copied().unwrap_or(0));
        }
        *place = L1Place { offset, entries: entries.len() as u64, dirty: BTreeSet::new() };
    }

    /// Takes the changed parts; whoever takes them writes them or puts them back. With them, as of
    /// the same moment, the table as the bytes of `whole` entries.
    pub(super) fn take_dirty(&self, whole: u64) -> (Vec<DirtySector>, Vec<u8>) {
        let mut place = self.place.lock();
        let dirty = std::mem::take(&mut place.dirty);
        let (offset, entries) = (place.offset, place.entries);
        let part = |sector: u64| {
            let start = sector * SECTOR_ENTRIES;
            let end = (start + SECTOR_ENTRIES).min(entries);
            let bytes = (start..end).flat_map(|index| self.get(index).to_be_bytes()).collect();
            DirtySector { sector, offset: offset + start * TABLE_ENTRY_BYTES, bytes }
        };
        let table = (0..whole).flat_map(|index| self.get(index).to_be_bytes()).collect();
        (dirty.into_iter().map(part).collect(), table)
    }

    /// Takes back parts whose write failed.
    pub(super) fn put_back(&self, sectors: &[DirtySector]) {
        self.place.lock().dirty.extend(sectors.iter().map(|sector| sector.sector));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_keep_their_value_while_the_table_grows() {
        let table = L1Table::new(65536, &[1, 2, 3]);
        for index in [3, 63, 64, 127, 128, 5000, 4_194_303] {
            assert_eq!(table.get(index), 0);
            table.set(index, index << 16);
        }
        for index in [3, 63, 64, 127, 128, 5000, 4_194_303] {
            assert_eq!(table.get(index), index << 16);
        }
        assert_eq!((table.get(0), table.get(2), table.get(4999)), (1, 3, 0));
    }

    #[test]
    fn entries_set_while_the_table_moves_are_written_to_its_new_place() {
        let table = L1Table::new(65536, &[0; 70]);
        let (_, snapshot) = table.take_dirty(200);
        table.set(3, 7);
        drop(table.take_dirty(0).0);
        table.moved(1 << 20, 200, &snapshot);
        let taken = table.take_dirty(0).0;
        assert_eq!((taken[0].offset, taken[0].bytes[31]), (1 << 20, 7));
    }

    #[test]
    fn only_changed_sectors_are_written_and_not_past_the_table() {
        let table = L1Table::new(65536, &[0; 70]);
        table.set(69, 7);
        let taken = table.take_dirty(0).0;
        assert_eq!(taken.len(), 1);
        assert_eq!((taken[0].offset, taken[0].bytes.len()), (65536 + 512, 48));
        assert!(table.take_dirty(0).0.is_empty());
        table.put_back(&taken);
        assert_eq!(table.take_dirty(0).0[0].bytes[47], 7);
    }
}
