//! A count for every host cluster, in memory that follows what is counted and not how long a file
//! claims to be: clusters that nobody refers to cost nothing, one that somebody does about two
//! bytes (with its neighbours).

use std::collections::BTreeMap;
use std::ops::Range;

/// Clusters of a chunk: no more than the smallest refcount block counts.
pub(in crate::qcow2) const CHUNK: u64 = 64;
/// In a chunk: the count does not fit and stands in `large`.
const LARGE: u8 = u8::MAX;

/// See the page.
#[derive(Default)]
pub(in crate::qcow2) struct Counters {
    chunks: BTreeMap<u64, [u8; CHUNK as usize]>,
    large: BTreeMap<u64, u64>,
}

impl Counters {
    pub(in crate::qcow2) fn get(&self, cluster: u64) -> u64 {
        let Some(chunk) = self.chunks.get(&(cluster / CHUNK)) else { return 0 };
        match chunk.get((cluster % CHUNK) as usize) {
            Some(&LARGE) => self.large.get(&cluster).copied().unwrap_or(0),
            Some(&count) => u64::from(count),
            None => 0,
        }
    }

    pub(in crate::qcow2) fn set(&mut self, cluster: u64, count: u64) {
        if count == 0 && !self.chunks.contains_key(&(cluster / CHUNK)) {
            return;
        }
        let chunk = self.chunks.entry(cluster / CHUNK).or_insert([0; CHUNK as usize]);
        let Some(slot) = chunk.get_mut((cluster % CHUNK) as usize) else { return };
        if *slot == LARGE {
            self.large.remove(&cluster);
        }
        match u8::try_from(count) {
            Ok(count) if count != LARGE => *slot = count,
            _ => {
                *slot = LARGE;
                self.large.insert(cluster, count);
            }
        }
    }

    /// Counts `times` more; the new count.
    pub(in crate::qcow2) fn add(&mut self, cluster: u64, times: u64) -> u64 {
        let chunk = self.chunks.entry(cluster / CHUNK).or_insert([0; CHUNK as usize]);
        let slot = chunk.get_mut((cluster % CHUNK) as usize).expect("less than a chunk");
        let small = u64::from(*slot).saturating_add(times);
        if *slot != LARGE && small < LARGE.into() {
            // Less than 255.
            *slot = small as u8;
            return small;
        }
        let count = self.get(cluster).saturating_add(times);
        self.set(cluster, count);
        count
    }

    /// The counts of the 64 clusters from `first` on, a multiple of 64, if any of them was ever
    /// counted; 255 stands for 255 and more.
    pub(in crate::qcow2) fn chunk(&self, first: u64) -> Option<&[u8; CHUNK as usize]> {
        self.chunks.get(&(first / CHUNK))
    }

    /// The first cluster at or after `cluster` that is counted.
    pub(in crate::qcow2) fn next_counted(&self, cluster: u64) -> Option<u64> {
        let chunks = self.chunks.range(cluster / CHUNK..);
        chunks
            .flat_map(|(number, chunk)| (number * CHUNK..).zip(chunk))
            .find(|(at, count)| *at >= cluster && **count > 0)
            .map(|(at, _)| at)
    }

    /// The clusters of `range` that are counted, with their counts.
    pub(in crate::qcow2) fn counted(
        &self,
        range: Range<u64>,
    ) -> impl Iterator<Item = (u64, u64)> + '_ {
        let mut next = range.start;
        std::iter::from_fn(move || {
            let found = self.next_counted(next).filter(|found| range.contains(found))?;
            next = found + 1;
            Some((found, self.get(found)))
        })
    }

    /// The last cluster that is counted.
    pub(in crate::qcow2) fn last_counted(&self) -> Option<u64> {
        let chunks = self.chunks.iter().rev();
        chunks
            .filter_map(|(number, chunk)| {
                let at = chunk.iter().rposition(|count| *count > 0)?;
                Some(number * CHUNK + at as u64)
            })
            .next()
    }
}

/// A set of host clusters, as compact as [`Counters`].
#[derive(Default)]
pub(in crate::qcow2) struct Marks(BTreeMap<u64, u64>);

impl Marks {
    /// False when it is there already.
    pub(in crate::qcow2) fn insert(&mut self, cluster: u64) -> bool {
        let word = self.0.entry(cluster / 64).or_insert(0);
        let bit = 1 << (cluster % 64);
        let is_new = *word & bit == 0;
        *word |= bit;
        is_new
    }

    pub(in crate::qcow2) fn contains(&self, cluster: u64) -> bool {
        self.0.get(&(cluster / 64)).is_some_and(|word| word >> (cluster % 64) & 1 != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_any_size_are_kept_and_found_in_order() {
        let mut counters = Counters::default();
        let wanted = [(0, 1), (63, 254), (64, 255), (65, 256), (1 << 40, u64::MAX)];
        for (cluster, count) in wanted {
            counters.set(cluster, count);
        }
        assert_eq!(counters.counted(0..u64::MAX).collect::<Vec<_>>(), wanted);
        assert_eq!(counters.counted(1..65).collect::<Vec<_>>(), wanted[1..3]);
        assert_eq!(counters.last_counted(), Some(1 << 40));
        assert_eq!(counters.add(63, 3), 257);
        counters.set(64, 1);
        assert_eq!((counters.get(63), counters.get(64), counters.get(66)), (257, 1, 0));
        counters.set(1 << 40, 0);
        assert_eq!(counters.last_counted(), Some(65));
    }

    #[test]
    fn a_mark_is_set_once() {
        let mut marks = Marks::default();
        assert!(marks.insert(70) && !marks.insert(70) && marks.contains(70) && !marks.contains(6));
    }
}
