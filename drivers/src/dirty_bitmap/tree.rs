//! The bits of a dirty bitmap: a sparse tree of words. Its model, which takes in this file, is
//! `io/tests/loom_dirty_bitmap.rs`.

#[cfg(loom)]
use loom::sync::atomic::{AtomicU64, Ordering};
use std::sync::OnceLock;
#[cfg(not(loom))]
use std::sync::atomic::{AtomicU64, Ordering};

/// Base-2 logarithms: bits of a leaf, leaves of a middle, middles.
const LEAF_BITS: u32 = if cfg!(loom) { 7 } else { 15 };
const MIDDLE_BITS: u32 = 8;
const TOP_BITS: u32 = 9;
/// The bits of a tree.
pub(crate) const MAX_CHUNKS: u64 = 1 << (LEAF_BITS + MIDDLE_BITS + TOP_BITS);

const LEAF: u64 = 1 << LEAF_BITS;
const MIDDLE: u64 = 1 << (LEAF_BITS + MIDDLE_BITS);

type Leaf = Box<[AtomicU64]>;
type Top = Box<[OnceLock<Box<Middle>>]>;

/// See the page.
#[derive(Default)]
pub(crate) struct Tree {
    top: OnceLock<Top>,
}

struct Middle {
    leaves: Box<[OnceLock<Leaf>]>,
    /// A bit for each leaf all of whose bits are set, whatever its words say.
    full: [AtomicU64; 1 << (MIDDLE_BITS - 6)],
}

/// What there is of a leaf.
enum Found<'a> {
    /// No bit is set in this many bits from the beginning of the leaf on, or more.
    Clear(u64),
    Full,
    Words(&'a Leaf),
}

impl Middle {
    fn new() -> Box<Middle> {
        Box::new(Middle {
            leaves: (0..1 << MIDDLE_BITS).map(|_| OnceLock::new()).collect(),
            full: std::array::from_fn(|_| AtomicU64::new(0)),
        })
    }

    fn is_full(&self, leaf: usize) -> bool {
        // Relaxed, here and for all words: bits stand for themselves. Whoever must see them is
        // ordered after those who set them by other means: the completion of their requests.
        let word = self.full.get(leaf / 64).map_or(0, |word| word.load(Ordering::Relaxed));
        word >> (leaf % 64) & 1 != 0
    }

    fn set_full(&self, leaf: usize, full: bool) {
        let Some(word) = self.full.get(leaf / 64) else { return };
        match full {
            true => word.fetch_or(1 << (leaf % 64), Ordering::Relaxed),
            false => word.fetch_and(!(1 << (leaf % 64)), Ordering::Relaxed),
        };
    }

    fn leaf(&self, leaf: usize) -> Option<&Leaf> {
        let make = || (0..LEAF / 64).map(|_| AtomicU64::new(0)).collect();
        self.leaves.get(leaf).map(|place| place.get_or_init(make))
    }
}

/// The bits of one word of a leaf that lie in `first..=last`, bits of the leaf.
fn mask(word: u64, first: u64, last: u64) -> u64 {
    let low = first.saturating_sub(word * 64);
    let high = (last - word * 64).min(63);
    (u64::MAX << low) & (u64::MAX >> (63 - high))
}

impl Tree {
    fn middle(&self, chunk: u64) -> Option<&Middle> {
        let place = self.top.get()?.get((chunk / MIDDLE) as usize)?;
        place.get().map(|middle| &**middle)
    }

    fn make_middle(&self, chunk: u64) -> Option<&Middle> {
        let make = || (0..1 << TOP_BITS).map(|_| OnceLock::new()).collect();
        let place = self.top.get_or_init(make).get((chunk / MIDDLE) as usize)?;
        Some(place.get_or_init(Middle::new))
    }

    /// The leaf of a chunk.
    fn find(&self, chunk: u64) -> Found<'_> {
        if self.top.get().is_none() {
            return Found::Clear(MAX_CHUNKS);
        }
        let Some(middle) = self.middle(chunk) else { return Found::Clear(MIDDLE) };
        let leaf = leaf_index(chunk);
        if middle.is_full(leaf) {
            return Found::Full;
        }
        middle.leaves.get(leaf).and_then(OnceLock::get).map_or(Found::Clear(LEAF), Found::Words)
    }

    /// Sets `first..=last`.
    #[inline]
    pub(crate) fn set(&self, first: u64, last: u64) {
        for (first, last) in by_leaf(first, last) {
            let Some(middle) = self.make_middle(first) else { return };
            let leaf = leaf_index(first);
            if middle.is_full(leaf) {
                continue;
            }
            if last - first == LEAF - 1 {
                middle.set_full(leaf, true);
                continue;
            }
            let Some(words) = middle.leaf(leaf) else { return };
            for (word, bits) in masks(words, first, last) {
                // Read first: a line that is dirty already stays shared.
                if word.load(Ordering::Relaxed) & bits != bits {
                    word.fetch_or(bits, Ordering::Relaxed);
                }
            }
        }
    }

    /// Clears `first..=last`.
    pub(crate) fn clear(&self, first: u64, last: u64) {
        let mut at = first;
        while at <= last {
            let end = last.min(at | (LEAF - 1));
            at = match self.find(at) {
                Found::Clear(span) => (at | (span - 1)) + 1,
                Found::Words(words) => {
                    for (word, bits) in masks(words, at, end) {
                        word.fetch_and(!bits, Ordering::Relaxed);
                    }
                    end + 1
                }
                Found::Full => {
                    self.clear_full(at, end);
                    end + 1
                }
            };
        }
    }

    /// Clears a part of a full leaf: the words say so before the leaf does.
    fn clear_full(&self, first: u64, last: u64) {
        let Some(middle) = self.middle(first) else { return };
        let leaf = leaf_index(first);
        let Some(words) = middle.leaf(leaf) else { return };
        for word in words {
            word.store(u64::MAX, Ordering::Relaxed);
        }
        for (word, bits) in masks(words, first, last) {
            word.fetch_and(!bits, Ordering::Relaxed);
        }
        middle.set_full(leaf, false);
    }

    /// The 64 bits from `chunk` on, a multiple of 64.
    pub(crate) fn word(&self, chunk: u64) -> u64 {
        match self.find(chunk) {
            Found::Clear(_) => 0,
            Found::Full => u64::MAX,
            Found::Words(words) => word_of(words, chunk),
        }
    }

    /// Sets bits of the 64 from `chunk` on.
    pub(crate) fn set_word(&self, chunk: u64, bits: u64) {
        if bits == 0 || self.word(chunk) & bits == bits {
            return;
        }
        let words = self.make_middle(chunk).and_then(|middle| middle.leaf(leaf_index(chunk)));
        if let Some(word) = words.and_then(|words| words.get(((chunk % LEAF) / 64) as usize)) {
            word.fetch_or(bits, Ordering::Relaxed);
        }
    }

    /// The first bit that is set, from `chunk` on.
    pub(crate) fn next_set(&self, chunk: u64) -> Option<u64> {
        let mut at = chunk;
        while at < MAX_CHUNKS {
            match self.find(at) {
                Found::Clear(span) => at = (at | (span - 1)) + 1,
                Found::Full => return Some(at),
                Found::Words(words) => {
                    let bits = word_of(words, at) & (u64::MAX << (at % 64));
                    if bits != 0 {
                        return Some((at & !63) + u64::from(bits.trailing_zeros()));
                    }
                    at = (at | 63) + 1;
                }
            }
        }
        None
    }

    /// The first bit that is clear, from `chunk` to `last`.
    pub(crate) fn next_clear(&self, chunk: u64, last: u64) -> Option<u64> {
        let mut at = chunk;
        while at <= last {
            match self.find(at) {
                Found::Clear(_) => return Some(at),
                Found::Full => at = (at | (LEAF - 1)) + 1,
                Found::Words(words) => {
                    let bits = !word_of(words, at) & (u64::MAX << (at % 64));
                    if bits != 0 {
                        let found = (at & !63) + u64::from(bits.trailing_zeros());
                        return Some(found).filter(|found| *found <= last);
                    }
                    at = (at | 63) + 1;
                }
            }
        }
        None
    }

    /// Whether any of `first..=last` is set.
    #[inline]
    pub(crate) fn touches(&self, first: u64, last: u64) -> bool {
        if self.top.get().is_none() {
            return false;
        }
        by_leaf(first, last).any(|(first, last)| match self.find(first) {
            Found::Clear(_) => false,
            Found::Full => true,
            Found::Words(words) => masks(words, first, last)
                .any(|(word, bits)| word.load(Ordering::Relaxed) & bits != 0),
        })
    }

    /// The bits that are set.
    pub(crate) fn count(&self) -> u64 {
        let mut count = 0;
        let mut at = 0;
        while at < MAX_CHUNKS {
            at = match self.find(at) {
                Found::Clear(span) => (at | (span - 1)) + 1,
                Found::Full => {
                    count += LEAF;
                    at + LEAF
                }
                Found::Words(words) => {
                    let ones = words.iter().map(|word| word.load(Ordering::Relaxed).count_ones());
                    count += ones.map(u64::from).sum::<u64>();
                    at + LEAF
                }
            };
        }
        count
    }
}

fn leaf_index(chunk: u64) -> usize {
    (chunk % MIDDLE / LEAF) as usize
}

fn word_of(words: &Leaf, chunk: u64) -> u64 {
    let word = words.get(((chunk % LEAF) / 64) as usize);
    word.map_or(0, |word| word.load(Ordering::Relaxed))
}

/// `first..=last`, cut at the ends of leaves.
fn by_leaf(first: u64, last: u64) -> impl Iterator<Item = (u64, u64)> {
    let mut next = Some(first);
    std::iter::from_fn(move || {
        let first = next.filter(|first| *first <= last)?;
        let end = last.min(first | (LEAF - 1));
        next = end.checked_add(1);
        Some((first, end))
    })
}

/// The words of a leaf that `first..=last`, which lies in it, touches, and the bits there.
fn masks(words: &Leaf, first: u64, last: u64) -> impl Iterator<Item = (&AtomicU64, u64)> {
    let (first, last) = (first % LEAF, last % LEAF);
    let touched = words.iter().enumerate().take((last / 64 + 1) as usize);
    touched
        .skip((first / 64) as usize)
        .map(move |(index, word)| (word, mask(index as u64, first, last)))
}
