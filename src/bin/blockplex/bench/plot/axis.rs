//! Axes: from values to places on the picture, and where the grid lines go.

use std::f64::consts::LN_10;

/// A value that gets a grid line.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Tick {
    /// The value.
    pub(super) value: f64,
    /// What stands beside the line.
    pub(super) label: String,
}

/// A mapping of a range of values to a range of places. Values outside are
/// placed at its ends, so nothing is drawn outside a panel.
#[derive(Clone, Copy, Debug)]
pub(super) struct Axis {
    /// The ends of the range, rising, never equal.
    from: f64,
    to: f64,
    /// Where the ends are placed.
    places: (f64, f64),
    logarithmic: bool,
}

impl Axis {
    /// A linear axis from 0 or so to a round number at or above the end of
    /// `values`.
    pub(super) fn linear(values: (f64, f64), places: (f64, f64)) -> Self {
        let step = round_step(values.1 - values.0);
        Self::linear_exact((values.0, (values.1 / step).ceil() * step), places)
    }

    /// A linear axis that ends exactly where `values` do.
    pub(super) fn linear_exact(values: (f64, f64), places: (f64, f64)) -> Self {
        Self { from: values.0, to: values.1, places, logarithmic: false }
    }

    /// A logarithmic axis that holds `values`, both above 0, and ends in 1, 2
    /// or 5 times a power of ten.
    pub(super) fn logarithmic(values: (f64, f64), places: (f64, f64)) -> Self {
        let from = series_125(values.0).1;
        let mut to = series_125(values.1).2;
        if to <= from {
            to = from * 10.0;
        }
        Self { from, to, places, logarithmic: true }
    }

    /// The place of a value.
    pub(super) fn place(&self, value: f64) -> f64 {
        let value = value.clamp(self.from, self.to);
        let share = if self.logarithmic {
            (value / self.from).ln() / (self.to / self.from).ln()
        } else {
            (value - self.from) / (self.to - self.from)
        };
        self.places.0 + share * (self.places.1 - self.places.0)
    }

    /// The end of the range.
    pub(super) fn end(&self) -> f64 {
        self.to
    }

    /// About five round values of a linear axis.
    pub(super) fn steps(&self, label: impl Fn(f64) -> String) -> Vec<Tick> {
        let step = round_step(self.to - self.from);
        let count = ((self.to - self.from) / step + 1e-9).floor() as usize;
        (0..=count)
            .map(|index| {
                let exact = self.from + step * index as f64;
                // Away with the error of adding up: 0.30000000000000004.
                let value = (exact * 1e9).round() / 1e9;
                Tick { value, label: label(value) }
            })
            .collect()
    }

    /// The latencies to mark on a logarithmic axis of nanoseconds: every 1, 2
    /// and 5 if there are few decades, else the powers of ten.
    pub(super) fn decades(&self) -> Vec<Tick> {
        let dense = (self.to / self.from).ln() / LN_10 < 4.0;
        let mut ticks = Vec::new();
        let mut power = power_of_ten_below(self.from);
        while power <= self.to * 1.000_001 {
            for factor in if dense { [1.0, 2.0, 5.0].as_slice() } else { &[1.0] } {
                let value = power * factor;
                if value >= self.from * 0.999_999 && value <= self.to * 1.000_001 {
                    ticks.push(Tick { value, label: latency_label(value) });
                }
            }
            power *= 10.0;
        }
        ticks
    }
}

/// A step of 1, 2 or 5 times a power of ten that divides a length into four to
/// ten parts.
fn round_step(length: f64) -> f64 {
    series_125(length / 10.0).2
}

fn power_of_ten_below(value: f64) -> f64 {
    10_f64.powf((value * 1.000_000_1).log10().floor())
}

/// The power of ten at or below `value`, and the neighbours of `value`, at or
/// below and at or above, in the series 1, 2, 5, 10, 20, 50 …
fn series_125(value: f64) -> (f64, f64, f64) {
    let power = power_of_ten_below(value);
    let series = [1.0, 2.0, 5.0, 10.0].map(|factor| factor * power);
    let below = series.iter().rev().find(|&&each| each <= value * 1.000_001);
    let above = series.iter().find(|&&each| each >= value * 0.999_999);
    (power, below.copied().unwrap_or(power), above.copied().unwrap_or(power * 10.0))
}

/// A round latency without decimals: `200 ns`, `5 µs`.
fn latency_label(nanoseconds: f64) -> String {
    let (value, unit) = match nanoseconds {
        value if value >= 0.999e9 => (value / 1e9, "s"),
        value if value >= 0.999e6 => (value / 1e6, "ms"),
        value if value >= 0.999e3 => (value / 1e3, "µs"),
        value => (value, "ns"),
    };
    format!("{} {unit}", value.round())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(ticks: &[Tick]) -> Vec<&str> {
        ticks.iter().map(|tick| tick.label.as_str()).collect()
    }

    #[test]
    fn a_logarithmic_axis_gives_each_decade_the_same_room() {
        let axis = Axis::logarithmic((100.0, 10_000.0), (0.0, 200.0));
        assert!((axis.place(1000.0) - 100.0).abs() < 1e-6);
        assert_eq!(
            labels(&axis.decades()),
            ["100 ns", "200 ns", "500 ns", "1 µs", "2 µs", "5 µs", "10 µs"]
        );
        let wide = Axis::logarithmic((90.0, 7e9), (0.0, 1.0));
        assert_eq!(labels(&wide.decades())[..3], ["100 ns", "1 µs", "10 µs"]);
    }

    #[test]
    fn a_range_of_one_value_still_has_a_length() {
        for value in [1.0, 100.0, 333.0, 1e18] {
            let axis = Axis::logarithmic((value, value), (0.0, 1.0));
            assert!(axis.place(value).is_finite(), "{value}");
            assert!(axis.decades().len() >= 2, "{value}");
        }
        let axis = Axis::linear((0.0, 1.0), (0.0, 1.0));
        assert_eq!(axis.place(1.0), 1.0);
    }

    #[test]
    fn linear_axes_end_at_a_round_number_with_few_ticks() {
        for most in [1.0, 7.3, 99.0, 123_456.0, 999_999.0] {
            let axis = Axis::linear((0.0, most), (0.0, 1.0));
            let ticks = axis.steps(|value| value.to_string());
            assert!((5..=11).contains(&ticks.len()), "{most}: {ticks:?}");
            assert!(axis.end() >= most);
            let last = ticks.last().unwrap().value;
            assert!((last - axis.end()).abs() < 1e-6 * axis.end(), "{most}: {ticks:?}");
        }
    }

    #[test]
    fn values_outside_stay_on_the_edge() {
        let axis = Axis::linear_exact((0.0, 10.0), (100.0, 0.0));
        assert_eq!(axis.place(-5.0), 100.0);
        assert_eq!(axis.place(50.0), 0.0);
    }
}
