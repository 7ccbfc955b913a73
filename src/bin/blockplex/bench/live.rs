//! The line on stderr that shows a measurement going on, if stderr is a
//! terminal, and the counters it is made from.
//!
//! Each iothread has a [`Counter`] of its own, on a cache line of its own, that
//! only it writes; the main thread reads them a few times a second. A request
//! costs one load and one store, no locked instruction.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::command_line::Goal;
use crate::units;

/// The requests that one iothread has done. 128 bytes, because processors
/// fetch cache lines in pairs.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct Counter {
    requests: AtomicU64,
}

impl Counter {
    /// Counts one request. Only the iothread that owns the counter may call it.
    pub fn add_one(&self) {
        // Relaxed: one writer, and readers want a recent number, nothing that
        // was written before it; the results travel by joining the thread.
        let requests = self.requests.load(Ordering::Relaxed);
        self.requests.store(requests + 1, Ordering::Relaxed);
    }

    /// What was counted so far, or shortly before. Any thread.
    pub fn requests(&self) -> u64 {
        // Relaxed: see `add_one`.
        self.requests.load(Ordering::Relaxed)
    }
}

/// One look at a measurement that is going on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Snapshot {
    /// Since the start.
    pub elapsed: Duration,
    /// Requests done since then, by all iothreads.
    pub requests: u64,
    /// Requests a second since the look before.
    pub iops: f64,
    /// Bytes of each request.
    pub block_bytes: u64,
}

impl Snapshot {
    /// A look at `elapsed`, with `previous` to tell the present rate from.
    pub fn new(
        elapsed: Duration,
        requests: u64,
        block_bytes: u64,
        previous: Option<&Self>,
    ) -> Self {
        let (since, before) = previous.map_or((Duration::ZERO, 0), |p| (p.elapsed, p.requests));
        let seconds = elapsed.saturating_sub(since).as_secs_f64();
        let new = requests.saturating_sub(before) as f64;
        let iops = if seconds > 0.0 { new / seconds } else { 0.0 };
        Self { elapsed, requests, iops, block_bytes }
    }

    /// How much of the goal is reached, 0.0..=1.0.
    pub fn share_of(&self, goal: Goal) -> f64 {
        let share = match goal {
            Goal::Runtime(runtime) => self.elapsed.as_secs_f64() / runtime.as_secs_f64(),
            Goal::Count(count) => self.requests as f64 / count as f64,
        };
        share.clamp(0.0, 1.0)
    }
}

impl std::fmt::Display for Snapshot {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mib = self.iops * self.block_bytes as f64 / f64::from(1 << 20);
        write!(
            formatter,
            "{}  {} IOPS  {} MiB/s",
            units::seconds(self.elapsed),
            units::count(self.iops),
            units::count(mib)
        )
    }
}

/// The line itself. Goes away without a trace when dropped.
#[derive(Debug)]
pub struct Progress {
    bar: ProgressBar,
    goal: Goal,
}

impl Progress {
    /// Steps of the bar; finer than any terminal is wide.
    const STEPS: u64 = 1000;

    /// A line on `target`, for users `ProgressDrawTarget::stderr()`; indicatif
    /// itself hides it if that is not a terminal.
    pub fn new(target: ProgressDrawTarget, goal: Goal) -> Self {
        let bar = ProgressBar::with_draw_target(Some(Self::STEPS), target);
        let style = ProgressStyle::with_template("{bar:30.cyan/blue} {percent:>3} %  {msg}")
            .unwrap_or_else(|_| ProgressStyle::default_bar());
        bar.set_style(style);
        Self { bar, goal }
    }

    /// Shows a look.
    pub fn show(&self, snapshot: &Snapshot) {
        self.bar.set_position((snapshot.share_of(self.goal) * Self::STEPS as f64) as u64);
        self.bar.set_message(snapshot.to_string());
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_that_since_the_look_before() {
        let first = Snapshot::new(Duration::from_secs(1), 1000, 4096, None);
        let second = Snapshot::new(Duration::from_secs(3), 9000, 4096, Some(&first));
        assert_eq!(first.iops, 1000.0);
        assert_eq!(second.iops, 4000.0);
        assert_eq!(second.to_string(), "3.00 s  4000 IOPS  16 MiB/s");
        assert_eq!(Snapshot::new(Duration::ZERO, 5, 512, None).iops, 0.0);
    }

    #[test]
    fn progress_never_leaves_its_range() {
        let look = Snapshot::new(Duration::from_secs(4), 500, 512, None);
        assert_eq!(look.share_of(Goal::Runtime(Duration::from_secs(8))), 0.5);
        assert_eq!(look.share_of(Goal::Count(1000)), 0.5);
        assert_eq!(look.share_of(Goal::Count(100)), 1.0);
    }

    #[test]
    fn the_bar_follows_the_looks() {
        let progress = Progress::new(ProgressDrawTarget::hidden(), Goal::Count(10));
        progress.show(&Snapshot::new(Duration::from_secs(1), 5, 512, None));
        assert_eq!(progress.bar.position(), Progress::STEPS / 2);
        let bar = progress.bar.clone();
        drop(progress);
        assert!(bar.is_finished());
    }

    #[test]
    fn a_counter_counts_and_has_its_cache_line_to_itself() {
        let counters = [Counter::default(), Counter::default()];
        counters[0].add_one();
        counters[0].add_one();
        assert_eq!(counters.each_ref().map(Counter::requests), [2, 0]);
        assert_eq!(size_of_val(&counters), 256);
    }
}
