//! How long a loop looks for work before it sleeps, adapted to how long it had to wait of late.
//!
//! The rule is QEMU's, whose option names and meanings this keeps: a wait within the window was
//! well predicted; one beyond the longest window shows that spinning is wasted; one in between
//! shows that a longer window would have caught it.

use std::time::Duration;

/// The first window after none.
const FIRST_WINDOW: u64 = 4_000;
const DEFAULT_GROW: u64 = 2;

/// The window and its limits, in nanoseconds.
pub(super) struct Spin {
    window: u64,
    max: u64,
    grow: u64,
    shrink: u64,
}

impl Spin {
    /// `max` of zero never spins; `grow` of 0 means 2, `shrink` of 0 means back to no window.
    pub(super) fn new(max: Duration, grow: u32, shrink: u32) -> Spin {
        let max = u64::try_from(max.as_nanos()).unwrap_or(u64::MAX);
        let grow = if grow == 0 { DEFAULT_GROW } else { u64::from(grow) };
        Spin { window: 0, max, grow, shrink: u64::from(shrink) }
    }

    /// Whether this loop ever spins.
    pub(super) fn is_on(&self) -> bool {
        self.max > 0
    }

    /// How long to look for work now.
    pub(super) fn window(&self) -> u64 {
        self.window
    }

    /// Learns that work came after `waited` nanoseconds, spun or slept.
    pub(super) fn learn(&mut self, waited: u64) {
        if waited <= self.window {
            return;
        }
        if waited > self.max {
            self.window = self.window.checked_div(self.shrink).unwrap_or(0);
        } else if self.window < self.max {
            let longer = match self.window {
                0 => FIRST_WINDOW,
                window => window.saturating_mul(self.grow),
            };
            self.window = longer.min(self.max);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_waits_grow_the_window_to_its_limit_and_a_long_one_closes_it() {
        let mut spin = Spin::new(Duration::from_nanos(10_000), 0, 0);
        assert_eq!(spin.window(), 0);
        spin.learn(500);
        assert_eq!(spin.window(), 4_000);
        spin.learn(500);
        assert_eq!(spin.window(), 4_000, "a wait within the window was well predicted");
        spin.learn(6_000);
        assert_eq!(spin.window(), 8_000);
        spin.learn(9_000);
        assert_eq!(spin.window(), 10_000);
        spin.learn(10_001);
        assert_eq!(spin.window(), 0);
    }

    #[test]
    fn a_shrink_factor_divides_and_a_zero_limit_never_spins() {
        let mut spin = Spin::new(Duration::from_nanos(8_000), 4, 2);
        spin.learn(1);
        spin.learn(5_000);
        assert_eq!(spin.window(), 8_000);
        spin.learn(9_000);
        assert_eq!(spin.window(), 4_000);
        let mut off = Spin::new(Duration::ZERO, 0, 0);
        off.learn(1);
        assert!(!off.is_on());
        assert_eq!(off.window(), 0);
    }
}
