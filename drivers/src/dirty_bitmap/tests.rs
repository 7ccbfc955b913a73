//! Against a plain bitmap of one flag a chunk.

use super::*;
use proptest::prelude::*;

const LEAF: u64 = 32768;

/// The plain bitmap.
struct Shadow {
    granularity: u64,
    size: u64,
    dirty: Vec<bool>,
}

impl Shadow {
    fn new(size: u64, granularity: u64) -> Shadow {
        Shadow { granularity, size, dirty: vec![false; size.div_ceil(granularity) as usize] }
    }

    fn mark(&mut self, offset: u64, length: u64) {
        let end = (offset + length).min(self.size);
        if offset < end {
            let chunks = offset / self.granularity..=(end - 1) / self.granularity;
            chunks.for_each(|chunk| self.dirty[chunk as usize] = true);
        }
    }

    fn clear(&mut self, offset: u64, length: u64) {
        let end = offset + length;
        for (index, dirty) in (0..).zip(&mut self.dirty) {
            let start: u64 = index * self.granularity;
            if start >= offset && (start + self.granularity).min(self.size) <= end {
                *dirty = false;
            }
        }
    }

    fn resize(&mut self, size: u64) {
        self.size = size;
        self.dirty.resize(size.div_ceil(self.granularity) as usize, false);
    }

    fn is_dirty(&self, offset: u64) -> bool {
        offset < self.size && self.dirty[(offset / self.granularity) as usize]
    }

    fn next(&self, start: u64, end: u64, wanted: bool) -> Option<u64> {
        let end = end.min(self.size);
        let chunks = start / self.granularity..end.div_ceil(self.granularity);
        let mut chunks = chunks.filter(|chunk| self.dirty[*chunk as usize] == wanted);
        let found = chunks.next()? * self.granularity;
        Some(found.max(start)).filter(|at| *at < end)
    }

    fn area(&self, start: u64, end: u64, most: u64) -> Option<(u64, u64)> {
        let first = self.next(start, end, true)?;
        let limit = end.min(self.size).min(first.saturating_add(most));
        let last = self.next(first, limit, false).unwrap_or(limit);
        (last > first).then_some((first, last - first))
    }
}

#[track_caller]
fn compare(bitmap: &DirtyBitmap, shadow: &Shadow) {
    let dirty = shadow.dirty.iter().filter(|dirty| **dirty).count() as u64;
    assert_eq!(bitmap.dirty_chunks(), dirty);
    let mut at = 0;
    while let Some(expected) = shadow.area(at, u64::MAX, u64::MAX) {
        assert_eq!(bitmap.next_dirty_area(at, u64::MAX, u64::MAX), Some(expected));
        at = expected.0 + expected.1;
    }
    assert_eq!(bitmap.next_dirty(at, u64::MAX), None);
}

#[test]
fn a_bitmap_of_nothing_has_nothing() {
    let bitmap = DirtyBitmap::new(0, 512).unwrap();
    bitmap.mark(0, 1000);
    bitmap.clear(0, u64::MAX);
    assert_eq!((bitmap.dirty_chunks(), bitmap.chunks()), (0, 0));
    assert_eq!(bitmap.next_dirty(0, u64::MAX), None);
    assert_eq!(bitmap.next_clean(0, u64::MAX), None);
    assert!(!bitmap.is_dirty(0));
}

#[test]
fn granularity_and_size_have_limits() {
    for granularity in [0, 1, 256, 513, 768, 1 << 32, u64::MAX] {
        let error = DirtyBitmap::new(1 << 20, granularity).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{granularity}");
    }
    for bits in MIN_GRANULARITY_BITS..=MAX_GRANULARITY_BITS {
        let most = MAX_CHUNKS << bits;
        let bitmap = DirtyBitmap::new(most, 1 << bits).unwrap();
        bitmap.mark(most - 1, 1);
        assert_eq!(bitmap.next_dirty(0, u64::MAX), Some(most - (1 << bits)));
        assert_eq!(bitmap.dirty_chunks(), 1);
        let error = DirtyBitmap::new(most + 1, 1 << bits).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::LimitExceeded, "{bits}");
    }
}

#[test]
fn everything_marked_costs_no_words() {
    let size = (MAX_CHUNKS / 8) << 9;
    let bitmap = DirtyBitmap::new(size, 512).unwrap();
    bitmap.mark(0, u64::MAX);
    assert_eq!(bitmap.dirty_chunks(), MAX_CHUNKS / 8);
    assert_eq!(bitmap.next_clean(0, u64::MAX), None);
    bitmap.clear(5 * 512, 512);
    assert_eq!(bitmap.next_clean(0, u64::MAX), Some(5 * 512));
    assert_eq!(bitmap.dirty_chunks(), MAX_CHUNKS / 8 - 1);
    bitmap.clear(0, u64::MAX);
    assert_eq!(bitmap.dirty_chunks(), 0);
}

#[test]
fn resetting_while_iterating_is_safe() {
    let bitmap = DirtyBitmap::new(LEAF * 3 * 512, 512).unwrap();
    let mut expected = 0;
    for chunk in (0..LEAF * 3).step_by(7) {
        bitmap.mark(chunk * 512, 1);
        expected += 1;
    }
    let mut at = 0;
    while let Some((offset, length)) = bitmap.next_dirty_area(at, u64::MAX, 512) {
        bitmap.clear(offset, length);
        (at, expected) = (offset + length, expected - 1);
    }
    assert_eq!((expected, bitmap.dirty_chunks()), (0, 0));
}

#[test]
fn the_border_bit_stays_when_the_disk_grows_and_goes_when_it_shrinks_past_it() {
    for (old, new) in
        [(1000, 1000), (1000, 1001), (1000, 5000), (5000, 1000), (LEAF * 512 + 1, 100), (3, 0)]
    {
        let bitmap = DirtyBitmap::new(old, 512).unwrap();
        let mut shadow = Shadow::new(old, 512);
        bitmap.mark(0, old);
        shadow.mark(0, old);
        bitmap.check_size(new).unwrap();
        bitmap.set_size(new);
        shadow.resize(new);
        compare(&bitmap, &shadow);
        // What was cut off does not come back.
        bitmap.set_size(old.max(new));
        shadow.resize(old.max(new));
        compare(&bitmap, &shadow);
    }
}

#[test]
fn threads_that_mark_at_once_lose_nothing() {
    let bitmap = DirtyBitmap::new(LEAF * 4 * 512, 512).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let bitmap = &bitmap;
            scope.spawn(move || {
                for chunk in (thread..LEAF * 4).step_by(4) {
                    bitmap.mark(chunk * 512 + 511, 1);
                }
            });
        }
    });
    assert_eq!(bitmap.dirty_chunks(), LEAF * 4);
    assert_eq!(bitmap.next_clean(0, u64::MAX), None);
}

/// One operation of a random run; numbers are parts of the disk.
#[derive(Clone, Debug)]
enum Operation {
    Mark(f64, f64),
    Clear(f64, f64),
    Resize(f64),
}

fn operation() -> impl Strategy<Value = Operation> {
    let length = prop_oneof![0.0..1.0, 0.0..0.001];
    prop_oneof![
        4 => (0.0..1.0, length.clone()).prop_map(|(at, length)| Operation::Mark(at, length)),
        3 => (0.0..1.0, length).prop_map(|(at, length)| Operation::Clear(at, length)),
        1 => (0.0..1.5).prop_map(Operation::Resize),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn random_operations_agree_with_a_plain_bitmap(
        bits in 9..14_u32,
        chunks in 1..LEAF * 2 + 100,
        ragged in 0..512_u64,
        operations in prop::collection::vec(operation(), 1..12),
    ) {
        let size = (chunks << bits) - ragged;
        let bitmap = DirtyBitmap::new(size, 1 << bits).unwrap();
        let mut shadow = Shadow::new(size, 1 << bits);
        let part = |size: u64, part: f64| (size as f64 * part) as u64;
        for operation in operations {
            let size = shadow.size;
            match operation {
                Operation::Mark(at, length) => {
                    bitmap.mark(part(size, at), part(size, length));
                    shadow.mark(part(size, at), part(size, length));
                }
                Operation::Clear(at, length) => {
                    bitmap.clear(part(size, at), part(size, length));
                    shadow.clear(part(size, at), part(size, length));
                }
                Operation::Resize(factor) => {
                    bitmap.set_size(part(size, factor));
                    shadow.resize(part(size, factor));
                }
            }
            compare(&bitmap, &shadow);
            for at in [0.0, 0.3, 0.999] {
                let at = part(shadow.size, at);
                prop_assert_eq!(bitmap.is_dirty(at), shadow.is_dirty(at));
                for end in [at + 100, shadow.size / 2, u64::MAX] {
                    prop_assert_eq!(bitmap.next_dirty(at, end), shadow.next(at, end, true));
                    prop_assert_eq!(bitmap.next_clean(at, end), shadow.next(at, end, false));
                    let area = bitmap.next_dirty_area(at, end, 5000);
                    prop_assert_eq!(area, shadow.area(at, end, 5000));
                }
            }
        }
        // As bytes, and merged into one of another granularity.
        let copy = DirtyBitmap::new(shadow.size, 1 << bits).unwrap();
        for piece in 0..=bitmap.chunks() / 512 {
            if let Some(bytes) = bitmap.bytes_at(piece * 512, 64) {
                copy.mark_bytes(piece * 512, &bytes);
            }
        }
        compare(&copy, &shadow);
        for other in [9_u32, 12, 20] {
            let merged = DirtyBitmap::new(shadow.size, 1 << other).unwrap();
            merged.merge(&bitmap).unwrap();
            let mut expected = Shadow::new(shadow.size, 1 << other);
            let mut at = 0;
            while let Some((offset, length)) = shadow.area(at, u64::MAX, u64::MAX) {
                expected.mark(offset, length);
                at = offset + length;
            }
            compare(&merged, &expected);
        }
    }
}
