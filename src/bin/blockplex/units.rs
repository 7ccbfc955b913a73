//! Numbers for people: sizes, rates and times in few digits with a unit, for
//! tables, progress lines and plots. JSON never goes through here.

use std::time::Duration;

/// Kibi-, mebi- … names for powers of 1024.
const BINARY: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];

/// A size in bytes: `4 KiB`, `1.5 GiB`. Exact up to three digits after the
/// point; rounded beyond.
pub fn size(bytes: u64) -> String {
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < BINARY.len() {
        value /= 1024.0;
        unit += 1;
    }
    let digits = format!("{value:.3}");
    let digits = digits.trim_end_matches('0').trim_end_matches('.');
    format!("{digits} {}", BINARY[unit])
}

/// A count or a rate in about four digits: `950`, `12.34k`, `1.045M`.
pub fn count(value: f64) -> String {
    let (value, unit) = match value {
        value if value >= 999_950_000.0 => (value / 1e9, "G"),
        value if value >= 999_950.0 => (value / 1e6, "M"),
        value if value >= 9_999.5 => (value / 1e3, "k"),
        value => return format!("{}", value.round()),
    };
    format!("{}{unit}", four_digits(value))
}

/// A latency in nanoseconds: `850 ns`, `37.25 µs`, `1.204 ms`, `2.5 s`.
pub fn latency(nanoseconds: f64) -> String {
    let (value, unit) = match nanoseconds {
        value if value >= 999.95e6 => (value / 1e9, "s"),
        value if value >= 999.95e3 => (value / 1e6, "ms"),
        value if value >= 999.5 => (value / 1e3, "µs"),
        value => return format!("{} ns", value.round()),
    };
    format!("{} {unit}", four_digits(value))
}

/// A duration in seconds: `0.50 s`, `12.3 s`, `3600 s`.
pub fn seconds(duration: Duration) -> String {
    let value = duration.as_secs_f64();
    let places = if value < 10.0 {
        2
    } else if value < 100.0 {
        1
    } else {
        0
    };
    format!("{value:.places$} s")
}

/// Three to four significant digits, for values of 1 to 1000.
pub fn four_digits(value: f64) -> String {
    // The borders are where rounding would add a digit.
    if value < 9.9995 {
        format!("{value:.3}")
    } else if value < 99.995 {
        format!("{value:.2}")
    } else {
        format!("{value:.1}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_use_binary_units() {
        assert_eq!(size(0), "0 B");
        assert_eq!(size(512), "512 B");
        assert_eq!(size(4096), "4 KiB");
        assert_eq!(size(3 << 29), "1.5 GiB");
        assert_eq!(size(u64::MAX), "16384 PiB");
    }

    #[test]
    fn counts_keep_four_digits_across_the_unit_borders() {
        assert_eq!(count(0.0), "0");
        assert_eq!(count(9_999.4), "9999");
        assert_eq!(count(9_999.6), "10.00k");
        assert_eq!(count(999_949.0), "999.9k");
        assert_eq!(count(999_951.0), "1.000M");
        assert_eq!(count(1.5e9), "1.500G");
    }

    #[test]
    fn latencies_choose_their_unit() {
        assert_eq!(latency(0.0), "0 ns");
        assert_eq!(latency(850.2), "850 ns");
        assert_eq!(latency(37_250.0), "37.25 µs");
        assert_eq!(latency(1_204_000.0), "1.204 ms");
        assert_eq!(latency(2.5e9), "2.500 s");
    }

    #[test]
    fn seconds_lose_decimals_as_they_grow() {
        assert_eq!(seconds(Duration::from_millis(500)), "0.50 s");
        assert_eq!(seconds(Duration::from_millis(12_340)), "12.3 s");
        assert_eq!(seconds(Duration::from_secs(3600)), "3600 s");
    }
}
