//! How many requests ended in each stretch of time, for the plot.
//!
//! The main thread adds a sample of all counters several times a second. When
//! a run gets long, neighbouring stretches are joined, so that an hour takes no
//! more memory than a minute.

use std::time::Duration;

/// The most stretches kept; joined in pairs when reached.
const STRETCHES_MAX: usize = 512;

/// What happened between two samples.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stretch {
    /// From the start of the measurement to the end of this stretch.
    pub end: Duration,
    /// Requests that ended in it, for each iothread.
    pub requests: Vec<u64>,
}

/// The course of a measurement.
#[derive(Clone, Debug)]
pub struct Timeline {
    stretches: Vec<Stretch>,
    /// The counters at the last sample.
    counted: Vec<u64>,
    /// Samples that make one stretch, doubled at each joining.
    samples_in_stretch: u32,
    /// Samples in the last stretch so far.
    samples: u32,
}

impl Timeline {
    /// A timeline of so many iothreads that have done nothing yet.
    pub fn new(iothreads: usize) -> Self {
        Self {
            stretches: Vec::new(),
            counted: vec![0; iothreads],
            samples_in_stretch: 1,
            samples: 0,
        }
    }

    /// Adds a sample: the time since the start, later than that of the sample
    /// before (a sample that is not is ignored), and the requests that each
    /// iothread has done since the start.
    pub fn sample(&mut self, since_start: Duration, counters: &[u64]) {
        let last = self.stretches.last().map_or(Duration::ZERO, |stretch| stretch.end);
        if since_start <= last {
            return;
        }
        let new = counters.iter().zip(&self.counted);
        let requests = new.map(|(now, before)| now.saturating_sub(*before)).collect();
        self.counted = counters.to_vec();
        let stretch = Stretch { end: since_start, requests };
        self.samples += 1;
        match self.stretches.last_mut() {
            Some(last) if self.samples > 1 => join(last, &stretch),
            _ => self.stretches.push(stretch),
        }
        if self.samples == self.samples_in_stretch {
            self.samples = 0;
            if self.stretches.len() == STRETCHES_MAX {
                self.halve();
            }
        }
    }

    /// The stretches, one after the other from the start.
    pub fn stretches(&self) -> &[Stretch] {
        &self.stretches
    }

    /// Joins neighbours in pairs; their number is even.
    fn halve(&mut self) {
        let mut joined = Vec::with_capacity(STRETCHES_MAX);
        let mut stretches = self.stretches.drain(..);
        while let Some(mut first) = stretches.next() {
            if let Some(second) = stretches.next() {
                join(&mut first, &second);
            }
            joined.push(first);
        }
        drop(stretches);
        self.stretches = joined;
        self.samples_in_stretch = self.samples_in_stretch.saturating_mul(2);
    }
}

/// Makes one stretch of two neighbours.
fn join(first: &mut Stretch, second: &Stretch) {
    first.end = second.end;
    for (sum, more) in first.requests.iter_mut().zip(&second.requests) {
        *sum += more;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_become_differences() {
        let mut timeline = Timeline::new(2);
        timeline.sample(Duration::from_millis(100), &[10, 1]);
        timeline.sample(Duration::from_millis(200), &[30, 1]);
        let expected = [
            Stretch { end: Duration::from_millis(100), requests: vec![10, 1] },
            Stretch { end: Duration::from_millis(200), requests: vec![20, 0] },
        ];
        assert_eq!(timeline.stretches(), expected);
    }

    #[test]
    fn a_sample_out_of_order_changes_nothing() {
        let mut timeline = Timeline::new(1);
        timeline.sample(Duration::ZERO, &[5]);
        assert!(timeline.stretches().is_empty());
        timeline.sample(Duration::from_secs(1), &[5]);
        timeline.sample(Duration::from_secs(1), &[9]);
        timeline.sample(Duration::from_secs(2), &[9]);
        let counts: Vec<u64> = timeline.stretches().iter().map(|s| s.requests[0]).collect();
        assert_eq!(counts, [5, 4]);
    }

    #[test]
    fn a_long_run_stays_bounded_and_loses_no_request() {
        let mut timeline = Timeline::new(1);
        for step in 1..=100_001_u64 {
            timeline.sample(Duration::from_millis(step), &[3 * step]);
            assert!(timeline.stretches().len() <= STRETCHES_MAX);
        }
        let total: u64 = timeline.stretches().iter().map(|stretch| stretch.requests[0]).sum();
        assert_eq!(total, 300_003);
        assert!(timeline.stretches().is_sorted_by(|a, b| a.end < b.end));
        assert!(timeline.stretches().len() >= STRETCHES_MAX / 4);
    }
}
