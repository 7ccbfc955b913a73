//! What a queue's requests are doing, written by the queue's thread, read by any other without its
//! help: a stuck loop is the very case in which somebody wants to know.
//!
//! A table of records, addressed by the owner's own request index, in buckets of 64, 128, 256 …
//! records. A bucket comes into being when its first record is written and stays, so a look-up is
//! one load and no lock on either side.
//!
//! E1. Only the owner writes; a write is a plain store.
//! E2. A reader may see a mixture of two requests that used one index after the other, or a node
//!     number older than the rest. It never sees a field that nobody wrote. Reports are for people;
//!     nothing may be decided by them.

use crate::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use rustix::time::{ClockId, clock_gettime};
use std::sync::OnceLock;

/// Records in the first bucket; each further bucket doubles.
const FIRST_BUCKET: u32 = 64;
const BUCKETS: usize = 14;

/// Requests of one slot from this index on are counted but not recorded: it bounds the memory of a
/// slot (32 bytes a record, in buckets that exist only if used).
pub const MAX_RECORDS: u32 = FIRST_BUCKET * ((1 << BUCKETS) - 1);

/// The kinds that reports know by name. Other numbers are printed as they are.
pub mod kind {
    /// Reads data.
    pub const READ: u8 = 0;
    /// Writes data.
    pub const WRITE: u8 = 1;
    /// Writes zeroes.
    pub const WRITE_ZEROES: u8 = 2;
    /// Discards data.
    pub const DISCARD: u8 = 3;
    /// Flushes to stable storage.
    pub const FLUSH: u8 = 4;
    /// Asks what a range holds.
    pub const BLOCK_STATUS: u8 = 5;
    /// Changes the length.
    pub const TRUNCATE: u8 = 6;
    /// A step of a job or a background task, whatever it does.
    pub const STEP: u8 = 7;
}

/// What is known about one request in flight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestRecord {
    /// One of [`kind`], or any other number that means something to the caller.
    pub kind: u8,
    /// First byte, in the origin's address space.
    pub offset: u64,
    /// Length in bytes.
    pub length: u64,
    /// When it was admitted, in nanoseconds of `CLOCK_MONOTONIC`.
    pub started_ns: u64,
    /// The node it has got to, by number.
    pub node: u32,
}

/// `CLOCK_MONOTONIC` in nanoseconds: the clock of [`RequestRecord::started_ns`]. Any thread.
pub fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    let nanoseconds = u64::try_from(now.tv_nsec).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(nanoseconds)
}

/// All stores here are Relaxed but one: E2 asks for nothing more than untorn words. `tag` is stored
/// with Release after the other fields and loaded with Acquire before them, so that a record seen
/// to be in use has been filled at least once. Neither costs an instruction where it matters.
#[derive(Debug)]
struct Record {
    /// 0: free; otherwise the kind + 1.
    tag: AtomicU32,
    node: AtomicU32,
    offset: AtomicU64,
    length: AtomicU64,
    started_ns: AtomicU64,
}

impl Record {
    fn new() -> Self {
        Record {
            tag: AtomicU32::new(0),
            node: AtomicU32::new(0),
            offset: AtomicU64::new(0),
            length: AtomicU64::new(0),
            started_ns: AtomicU64::new(0),
        }
    }

    fn read(&self) -> Option<RequestRecord> {
        let tag = self.tag.load(Ordering::Acquire);
        let kind = u8::try_from(tag.checked_sub(1)?).ok()?;
        Some(RequestRecord {
            kind,
            offset: self.offset.load(Ordering::Relaxed),
            length: self.length.load(Ordering::Relaxed),
            started_ns: self.started_ns.load(Ordering::Relaxed),
            node: self.node.load(Ordering::Relaxed),
        })
    }
}

#[derive(Debug)]
pub(crate) struct Ledger {
    buckets: [OnceLock<Box<[Record]>>; BUCKETS],
}

impl Ledger {
    pub(crate) fn new() -> Self {
        Ledger { buckets: [const { OnceLock::new() }; BUCKETS] }
    }

    /// The bucket of an index and its place there: bucket `b` starts at 64 · (2^b − 1).
    #[inline]
    fn locate(index: u32) -> Option<(usize, usize)> {
        if index >= MAX_RECORDS {
            return None;
        }
        let shifted = index + FIRST_BUCKET;
        let bucket = shifted.ilog2() - FIRST_BUCKET.ilog2();
        Some((bucket as usize, (shifted - (FIRST_BUCKET << bucket)) as usize))
    }

    #[inline]
    fn find(&self, index: u32) -> Option<&Record> {
        let (bucket, place) = Self::locate(index)?;
        self.buckets[bucket].get()?.get(place)
    }

    #[inline]
    pub(crate) fn record(&self, index: u32, record: RequestRecord) {
        let Some((bucket, place)) = Self::locate(index) else {
            return;
        };
        let bucket = self.buckets[bucket].get_or_init(|| Self::allocate(bucket));
        let Some(entry) = bucket.get(place) else {
            return;
        };
        entry.node.store(record.node, Ordering::Relaxed);
        entry.offset.store(record.offset, Ordering::Relaxed);
        entry.length.store(record.length, Ordering::Relaxed);
        entry.started_ns.store(record.started_ns, Ordering::Relaxed);
        entry.tag.store(u32::from(record.kind) + 1, Ordering::Release);
    }

    #[cold]
    fn allocate(bucket: usize) -> Box<[Record]> {
        let length = FIRST_BUCKET << bucket;
        (0..length).map(|_| Record::new()).collect()
    }

    #[inline]
    pub(crate) fn set_node(&self, index: u32, node: u32) {
        if let Some(entry) = self.find(index) {
            entry.node.store(node, Ordering::Relaxed);
        }
    }

    #[inline]
    pub(crate) fn clear(&self, index: u32) {
        if let Some(entry) = self.find(index) {
            entry.tag.store(0, Ordering::Relaxed);
        }
    }

    /// The records in use, by index. Any thread.
    pub(crate) fn snapshot(&self) -> Vec<RequestRecord> {
        let buckets = self.buckets.iter().filter_map(OnceLock::get);
        buckets.flat_map(|bucket| bucket.iter()).filter_map(Record::read).collect()
    }
}

#[cfg(all(test, not(loom), not(shuttle)))]
mod tests {
    use super::*;

    fn write_at(offset: u64) -> RequestRecord {
        RequestRecord { kind: kind::WRITE, offset, length: 512, started_ns: 7, node: 1 }
    }

    #[test]
    fn every_index_has_a_place_of_its_own() {
        let mut expected = (0, 0);
        for index in 0..10_000 {
            assert_eq!(Ledger::locate(index), Some(expected), "index {index}");
            expected.1 += 1;
            if expected.1 == (FIRST_BUCKET as usize) << expected.0 {
                expected = (expected.0 + 1, 0);
            }
        }
        let last = (FIRST_BUCKET as usize) << (BUCKETS - 1);
        assert_eq!(Ledger::locate(MAX_RECORDS - 1), Some((BUCKETS - 1, last - 1)));
        assert_eq!(Ledger::locate(MAX_RECORDS), None);
        assert_eq!(Ledger::locate(u32::MAX), None);
    }

    #[test]
    fn a_record_is_seen_until_it_is_cleared() {
        let ledger = Ledger::new();
        ledger.record(3, write_at(0));
        ledger.record(200, write_at(4096));
        ledger.set_node(200, 9);
        let expected = RequestRecord { node: 9, ..write_at(4096) };
        assert_eq!(ledger.snapshot(), [write_at(0), expected]);
        ledger.clear(3);
        assert_eq!(ledger.snapshot(), [expected]);
        ledger.record(3, write_at(8192));
        assert_eq!(ledger.snapshot(), [write_at(8192), expected]);
    }

    #[test]
    fn an_index_beyond_the_bound_is_ignored_and_allocates_nothing() {
        let ledger = Ledger::new();
        ledger.record(u32::MAX, write_at(0));
        ledger.set_node(MAX_RECORDS, 1);
        ledger.clear(MAX_RECORDS);
        ledger.clear(5);
        assert!(ledger.buckets.iter().all(|bucket| bucket.get().is_none()));
    }

    #[test]
    fn another_thread_reads_while_the_owner_writes() {
        let ledger = Ledger::new();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for round in 0..20_000u64 {
                    ledger.record((round % 200) as u32, write_at(round));
                    ledger.clear((round % 150) as u32);
                }
            });
            for _ in 0..100 {
                for record in ledger.snapshot() {
                    assert!(record.offset < 20_000, "a value that nobody wrote: {record:?}");
                    assert_eq!((record.kind, record.length), (kind::WRITE, 512));
                }
            }
        });
        assert!(!ledger.snapshot().is_empty());
    }
}
