//! A slice: a part of one L2 table in memory, readable without a lock.
//!
//! The entries are the raw 64-bit words of the table, in the machine's byte order, one atomic
//! each. Readers load single words at any time. An extended entry has two words, which only together
//! say something: they are read under a sequence count (S3). Writers change several words as one step, under
//! `update`, and only through [`SliceCache::change`](super::slice_cache::SliceCache::change),
//! which also remembers that the slice has to be written back.
//!
//! S1. Words of a slice change only under its `update` mutex.
//! S2. A slice that has ever to be written back again is reachable through the list of dirty
//!     slices, whose reference keeps it from being evicted.
//! S3. The two words of an extended entry change together within the slice's sequence count, and are
//!     read as one. Who holds the editor reads them through it, never through the slice.

use blockplex_io::lock::SequenceCount;
use parking_lot::{Mutex, MutexGuard};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// The number of a slice: the guest offset of what it maps, divided by the bytes that a slice
/// maps.
pub(super) type SliceNumber = u64;

/// See the page.
pub(super) struct Slice {
    number: SliceNumber,
    entries: Box<[AtomicU64]>,
    /// The second words of extended entries; empty otherwise.
    subclusters: Box<[AtomicU64]>,
    sequence: SequenceCount,
    /// One bit for each entry whose host cluster lies on metadata; empty when there is none.
    suspects: Box<[u64]>,
    update: Mutex<()>,
    /// Changed since the last snapshot. Under `update`.
    dirty: AtomicBool,
    /// Looked at since eviction last came by.
    used: AtomicBool,
}

impl Slice {
    /// A slice of the big-endian words in `bytes`. `is_suspect` says whether the word of an
    /// entry points where its data cannot be.
    pub(super) fn new(
        number: SliceNumber,
        bytes: &[u8],
        is_suspect: impl FnMut(usize, u64) -> bool,
    ) -> Slice {
        let words = bytes.as_chunks::<8>().0.iter().map(|word| u64::from_be_bytes(*word));
        Slice::of_words(number, words, Box::default(), is_suspect)
    }

    /// As [`Slice::new`], of extended entries.
    pub(super) fn extended(
        number: SliceNumber,
        bytes: &[u8],
        is_suspect: impl FnMut(usize, u64) -> bool,
    ) -> Slice {
        let pairs = bytes.as_chunks::<16>().0;
        let words = pairs.iter().map(|pair| u128::from_be_bytes(*pair));
        // The low half by intent.
        let second = words.clone().map(|pair| AtomicU64::new(pair as u64)).collect();
        let first = words.map(|pair| (pair >> 64) as u64);
        Slice::of_words(number, first, second, is_suspect)
    }

    fn of_words(
        number: SliceNumber,
        words: impl ExactSizeIterator<Item = u64>,
        subclusters: Box<[AtomicU64]>,
        mut is_suspect: impl FnMut(usize, u64) -> bool,
    ) -> Slice {
        let count = words.len();
        let mut suspects = Vec::new();
        let mut entries = Vec::with_capacity(count);
        for (index, raw) in words.enumerate() {
            if raw != 0 && is_suspect(index, raw) {
                suspects.resize(count.div_ceil(64), 0);
                if let Some(bits) = suspects.get_mut(index / 64) {
                    *bits |= 1 << (index % 64);
                }
            }
            entries.push(AtomicU64::new(raw));
        }
        Slice {
            number,
            entries: entries.into_boxed_slice(),
            subclusters,
            sequence: SequenceCount::new(),
            suspects: suspects.into_boxed_slice(),
            update: Mutex::new(()),
            dirty: AtomicBool::new(false),
            used: AtomicBool::new(true),
        }
    }

    #[inline]
    pub(super) fn number(&self) -> SliceNumber {
        self.number
    }

    /// The raw entry at `index`; 0 past the end, where there is none.
    #[inline]
    pub(super) fn entry(&self, index: usize) -> u64 {
        // Acquire: partner of the Release in `SliceEditor::set`; whoever sees an entry sees the
        // data that was written before it.
        self.entries.get(index).map_or(0, |entry| entry.load(Ordering::Acquire))
    }

    /// The extended entry at `index`, both words as one (S3).
    pub(super) fn pair(&self, index: usize) -> (u64, u64) {
        self.sequence.read(|| self.load_pair(index)).unwrap_or_else(|| {
            let _update = self.update.lock();
            self.load_pair(index)
        })
    }

    fn load_pair(&self, index: usize) -> (u64, u64) {
        // Relaxed: the sequence count, or the lock, orders both words.
        let second = self.subclusters.get(index).map_or(0, |word| word.load(Ordering::Relaxed));
        (self.entry(index), second)
    }

    /// Whether any entry was.
    #[inline]
    pub(super) fn has_suspects(&self) -> bool {
        !self.suspects.is_empty()
    }

    /// Whether the entry at `index` was found to point onto metadata when the slice was read.
    pub(super) fn is_suspect(&self, index: usize) -> bool {
        self.suspects.get(index / 64).is_some_and(|bits| bits >> (index % 64) & 1 != 0)
    }

    /// Remembers that it is in use.
    #[inline]
    pub(super) fn touch(&self) {
        // Relaxed, both: a hint to eviction. Read first, so that a hot slice's line stays shared.
        if !self.used.load(Ordering::Relaxed) {
            self.used.store(true, Ordering::Relaxed);
        }
    }

    /// Whether it was used since the last call.
    pub(super) fn take_used(&self) -> bool {
        // Relaxed: a hint.
        self.used.swap(false, Ordering::Relaxed)
    }

    /// Whether it differs from its table on disk, or from what is on its way there.
    pub(super) fn is_dirty(&self) -> bool {
        // Relaxed: for who knows that nobody changes it.
        self.dirty.load(Ordering::Relaxed)
    }

    /// Takes the right to change entries (S1).
    pub(super) fn edit(&self) -> SliceEditor<'_> {
        SliceEditor { slice: self, _update: self.update.lock() }
    }
}

/// The right to change a slice.
pub(super) struct SliceEditor<'a> {
    slice: &'a Slice,
    _update: MutexGuard<'a, ()>,
}

impl SliceEditor<'_> {
    /// The raw entry at `index`.
    pub(super) fn get(&self, index: usize) -> u64 {
        self.slice.entry(index)
    }

    /// The extended entry at `index`.
    pub(super) fn pair(&self, index: usize) -> (u64, u64) {
        self.slice.load_pair(index)
    }

    /// Replaces the entry at `index`; an extended one has no subclusters then.
    pub(super) fn set(&mut self, index: usize, raw: u64) {
        if !self.slice.subclusters.is_empty() {
            self.set_pair(index, raw, 0);
            return;
        }
        if let Some(entry) = self.slice.entries.get(index) {
            // Release: partner of the Acquire in `Slice::entry`.
            entry.store(raw, Ordering::Release);
        }
    }

    /// Replaces both words of the extended entry at `index`.
    pub(super) fn set_pair(&mut self, index: usize, raw: u64, subclusters: u64) {
        let slice = self.slice;
        if let (Some(first), Some(second)) =
            (slice.entries.get(index), slice.subclusters.get(index))
        {
            slice.sequence.change(|| {
                // Release, as in `set`, for those who look at the first word alone.
                first.store(raw, Ordering::Release);
                // Relaxed: the sequence count orders it.
                second.store(subclusters, Ordering::Relaxed);
            });
        }
    }

    /// Marks the slice as changed; says whether it was not before.
    pub(super) fn mark_dirty(&mut self) -> bool {
        // Relaxed: under `update`.
        !self.slice.dirty.swap(true, Ordering::Relaxed)
    }

    /// The entries as bytes of the table; from here on the slice counts as unchanged.
    pub(super) fn snapshot(&mut self) -> Vec<u8> {
        // Relaxed: under `update`, like the words.
        self.slice.dirty.store(false, Ordering::Relaxed);
        let word = |word: &AtomicU64| word.load(Ordering::Relaxed).to_be_bytes();
        let Slice { entries, subclusters, .. } = self.slice;
        if subclusters.is_empty() {
            return entries.iter().flat_map(word).collect();
        }
        let pairs = entries.iter().zip(subclusters);
        pairs.flat_map(|(first, second)| [word(first), word(second)]).flatten().collect()
    }
}
