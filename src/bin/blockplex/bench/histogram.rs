//! How often each latency occurred: an array of buckets that one thread counts
//! in, a few nanoseconds a request.
//!
//! Below 64 ns every nanosecond has a bucket. Above, each power of two is
//! divided into 64 equal buckets, so that a bucket is never wider than 1/64 of
//! its values: what [`Histogram::percentile`] says is at most 1.6 % above the
//! true value and never below it. All of `u64` has buckets (30 KiB in all), so
//! nothing is clamped or lost. Minimum, maximum and mean are exact.
//!
//! A bucket's index is read off the value's bits (its exponent, then the six
//! bits after the leading one): no loop, no division, no floating point.

use std::time::Duration;

/// Bits of a value that tell buckets of one power of two apart.
const PRECISION: u32 = 6;
/// Buckets in each power of two.
const STEPS: u64 = 1 << PRECISION;
/// Values 0..64, then 58 powers of two.
const BUCKETS: usize = ((64 - PRECISION as usize) + 1) << PRECISION;

/// Counts of latencies in nanoseconds.
#[derive(Clone, Debug)]
pub struct Histogram {
    counts: Box<[u64; BUCKETS]>,
    total: u64,
    sum: u128,
    least: u64,
    most: u64,
}

/// Some neighbouring values that are counted together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bucket {
    /// The smallest value of the bucket, in nanoseconds.
    pub low: u64,
    /// The largest.
    pub high: u64,
    /// How many of them there were.
    pub count: u64,
}

/// The bucket of a value.
fn index_of(value: u64) -> usize {
    if value < STEPS {
        return value as usize;
    }
    // 0 for values in 64..128, and one more for each power of two.
    let shift = 63 - PRECISION - value.leading_zeros();
    // The leading one counts as the 64 buckets of the powers before.
    ((u64::from(shift) << PRECISION) + (value >> shift)) as usize
}

/// The smallest and largest values of a bucket.
fn range_of(index: usize) -> (u64, u64) {
    let index = index as u64;
    if index < 2 * STEPS {
        return (index, index);
    }
    let shift = (index >> PRECISION) - 1;
    let low = (STEPS + index % STEPS) << shift;
    (low, low + ((1 << shift) - 1))
}

impl Default for Histogram {
    fn default() -> Self {
        Self { counts: Box::new([0; BUCKETS]), total: 0, sum: 0, least: u64::MAX, most: 0 }
    }
}

impl Histogram {
    /// Counts one latency. O(1), no allocation.
    pub fn record(&mut self, latency: Duration) {
        // 584 years fit.
        self.record_nanoseconds(u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX));
    }

    /// Counts one latency given in nanoseconds.
    pub fn record_nanoseconds(&mut self, value: u64) {
        self.counts[index_of(value)] += 1;
        self.total += 1;
        self.sum += u128::from(value);
        self.least = self.least.min(value);
        self.most = self.most.max(value);
    }

    /// Adds what another histogram counted.
    pub fn merge(&mut self, other: &Self) {
        for (mine, theirs) in self.counts.iter_mut().zip(other.counts.iter()) {
            *mine += theirs;
        }
        self.total += other.total;
        self.sum += other.sum;
        self.least = self.least.min(other.least);
        self.most = self.most.max(other.most);
    }

    /// How many latencies were counted.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// The smallest latency in nanoseconds; `None` if there are none.
    pub fn least(&self) -> Option<u64> {
        (self.total > 0).then_some(self.least)
    }

    /// The largest latency in nanoseconds; `None` if there are none.
    pub fn most(&self) -> Option<u64> {
        (self.total > 0).then_some(self.most)
    }

    /// The mean in nanoseconds; `None` if there are none.
    pub fn mean(&self) -> Option<f64> {
        (self.total > 0).then(|| self.sum as f64 / self.total as f64)
    }

    /// The latency that `percent` of all do not exceed, in nanoseconds, up to
    /// 1.6 % too high; `None` if there are none.
    pub fn percentile(&self, percent: f64) -> Option<u64> {
        let most = self.most()?;
        let share = (percent / 100.0).clamp(0.0, 1.0);
        // The rank of the value asked for, 1 being the smallest.
        let rank = ((share * self.total as f64).ceil() as u64).clamp(1, self.total);
        let mut seen = 0;
        for bucket in self.buckets() {
            seen += bucket.count;
            if seen >= rank {
                return Some(bucket.high.min(most));
            }
        }
        Some(most)
    }

    /// The buckets that counted anything, in rising order.
    pub fn buckets(&self) -> impl Iterator<Item = Bucket> + '_ {
        self.counts.iter().enumerate().filter(|&(_, &count)| count > 0).map(|(index, &count)| {
            let (low, high) = range_of(index);
            Bucket { low, high, count }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;

    #[test]
    fn buckets_cover_every_value_once_and_in_order() {
        let mut expected_low = 0;
        for index in 0..BUCKETS {
            let (low, high) = range_of(index);
            assert_eq!(low, expected_low, "bucket {index}");
            assert_eq!(index_of(low), index);
            assert_eq!(index_of(high), index);
            expected_low = high.wrapping_add(1);
        }
        assert_eq!(expected_low, 0, "the last bucket ends at u64::MAX");
    }

    #[test]
    fn no_bucket_is_wider_than_a_64th_of_its_values() {
        for index in 0..BUCKETS {
            let (low, high) = range_of(index);
            assert!(high - low < low / 64 + 1, "bucket {index}: {low}..={high}");
        }
    }

    #[test]
    fn percentiles_are_within_their_bound_of_the_sorted_truth() {
        let mut random = Random::new(3, 0);
        let mut histogram = Histogram::default();
        let mut values: Vec<u64> = (0..20_000)
            .map(|_| {
                let shift = random.below(40);
                random.bits() >> (20 + shift)
            })
            .collect();
        for &value in &values {
            histogram.record(Duration::from_nanos(value));
        }
        values.sort_unstable();
        for percent in [0.0, 1.0, 50.0, 90.0, 99.0, 99.9, 99.99, 100.0] {
            let rank = ((percent / 100.0 * values.len() as f64).ceil() as usize).max(1);
            let truth = values[rank - 1];
            let said = histogram.percentile(percent).unwrap();
            assert!(said >= truth, "p{percent}: {said} < {truth}");
            assert!(said - truth <= truth / 64, "p{percent}: {said} for {truth}");
        }
        assert_eq!(histogram.least(), values.first().copied());
        assert_eq!(histogram.percentile(100.0), values.last().copied());
        let mean = values.iter().map(|&value| value as f64).sum::<f64>() / values.len() as f64;
        assert!((histogram.mean().unwrap() / mean - 1.0).abs() < 1e-9);
    }

    #[test]
    fn a_percentile_is_the_smallest_value_that_so_many_do_not_exceed() {
        let mut histogram = Histogram::default();
        for value in 1..=60 {
            histogram.record_nanoseconds(value);
        }
        for (percent, value) in [(0.0, 1), (50.0, 30), (90.0, 54), (99.0, 60), (100.0, 60)] {
            assert_eq!(histogram.percentile(percent), Some(value), "p{percent}");
        }
    }

    #[test]
    fn merging_equals_recording_together() {
        let (mut left, mut right, mut both) =
            (Histogram::default(), Histogram::default(), Histogram::default());
        for value in [5, 70, 1_000_000, u64::MAX] {
            left.record_nanoseconds(value);
            both.record_nanoseconds(value);
        }
        for value in [1, 70, 3_000] {
            right.record_nanoseconds(value);
            both.record_nanoseconds(value);
        }
        left.merge(&right);
        assert_eq!(left.total(), 7);
        assert!(left.buckets().eq(both.buckets()));
        assert_eq!((left.least(), left.most()), (both.least(), both.most()));
        assert_eq!(left.mean(), both.mean());
    }

    #[test]
    fn an_empty_histogram_says_so() {
        let mut histogram = Histogram::default();
        assert_eq!(histogram.percentile(50.0), None);
        assert_eq!(histogram.mean(), None);
        assert_eq!(histogram.least(), None);
        histogram.merge(&Histogram::default());
        assert_eq!(histogram.most(), None);
    }
}
