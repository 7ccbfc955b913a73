//! Single values: sizes, durations, seeds and bounded numbers.
//!
//! Each function is a clap value parser; clap puts the option's name before
//! the reason given here.

use std::time::Duration;

use super::{BLOCK_BYTES_MAX, DEPTH_MAX, IOTHREADS_MAX};
use crate::units;

/// Sectors are what everything is counted in.
const SECTOR: u64 = 512;
/// Longer than any run, short enough for every clock: ten years.
const RUNTIME_MAX: f64 = 10.0 * 366.0 * 86_400.0;
/// More than this would be more than a mutator thread can do.
const RATE_MAX: f64 = 1_000_000.0;

/// Bytes with a suffix of 1024s as in QEMU and fio: `4k`, `1.5G`, `512`,
/// `64MiB`. Fractions must come out as whole bytes.
pub(super) fn size(text: &str) -> Result<u64, String> {
    let wrong = || format!("`{text}` is not a size such as 4k, 64M or 1.5G");
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    let unit = unit(suffix).ok_or_else(wrong)?;
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() || number.ends_with('.') || fraction.len() > 18 {
        return Err(wrong());
    }
    let too_large = || format!("`{text}` is too large");
    let whole: u64 = match whole.parse() {
        Ok(whole) => whole,
        Err(_) if whole.bytes().all(|digit| digit.is_ascii_digit()) => return Err(too_large()),
        Err(_) => return Err(wrong()),
    };
    let bytes = whole.checked_mul(unit).ok_or_else(too_large)?;
    if fraction.is_empty() {
        return Ok(bytes);
    }
    // At most 18 digits, so below 10^18; times 2^60 that fits 128 bits.
    let numerator: u64 = fraction.parse().map_err(|_| wrong())?;
    let denominator = 10_u128.pow(fraction.len() as u32);
    let scaled = u128::from(numerator) * u128::from(unit);
    if scaled % denominator != 0 {
        return Err(format!("`{text}` is not a whole number of bytes"));
    }
    // Less than one unit, so it fits.
    bytes.checked_add((scaled / denominator) as u64).ok_or_else(too_large)
}

/// The factor a suffix stands for.
fn unit(suffix: &str) -> Option<u64> {
    let lower = suffix.to_ascii_lowercase();
    let letter = match lower.as_str() {
        "" | "b" => return Some(1),
        other => other.strip_suffix("ib").or(other.strip_suffix('b')).unwrap_or(other),
    };
    let power = ["k", "m", "g", "t", "p", "e"].iter().position(|&name| name == letter)?;
    Some(1 << (10 * (power + 1)))
}

/// `--bs` (C1).
pub(super) fn block_bytes(text: &str) -> Result<u64, String> {
    let bytes = size(text)?;
    if bytes == 0 || bytes % SECTOR != 0 || bytes > BLOCK_BYTES_MAX {
        return Err(format!(
            "a block is a multiple of {SECTOR} bytes, at most {}",
            units::size(BLOCK_BYTES_MAX)
        ));
    }
    Ok(bytes)
}

/// `--size` (C3, in part).
pub(super) fn disk_bytes(text: &str) -> Result<u64, String> {
    let bytes = size(text)?;
    if bytes == 0 || bytes % SECTOR != 0 || i64::try_from(bytes).is_err() {
        return Err(format!("a size is a multiple of {SECTOR} bytes, above 0 and below 8 EiB"));
    }
    Ok(bytes)
}

/// `--depth` (C1).
pub(super) fn depth(text: &str) -> Result<u32, String> {
    bounded(text, DEPTH_MAX)
}

/// `--iothreads` (C1).
pub(super) fn iothreads(text: &str) -> Result<u32, String> {
    bounded(text, IOTHREADS_MAX)
}

fn bounded(text: &str, most: u32) -> Result<u32, String> {
    match text.parse() {
        Ok(number) if (1..=most).contains(&number) => Ok(number),
        _ => Err(format!("expected a number from 1 to {most}")),
    }
}

/// `--count`.
pub(super) fn request_count(text: &str) -> Result<u64, String> {
    match text.parse() {
        Ok(count) if count > 0 => Ok(count),
        _ => Err("expected a number of requests above 0".to_owned()),
    }
}

/// `--runtime`: seconds, with a fraction if need be, or with one of the
/// suffixes s, m, h.
pub(super) fn runtime(text: &str) -> Result<Duration, String> {
    let (number, factor) = match text.as_bytes().last() {
        Some(b's') => (&text[..text.len() - 1], 1.0),
        Some(b'm') => (&text[..text.len() - 1], 60.0),
        Some(b'h') => (&text[..text.len() - 1], 3600.0),
        _ => (text, 1.0),
    };
    match number.parse::<f64>().map(|number| number * factor) {
        // Comparisons with a NaN are false, so it ends in the second arm.
        Ok(seconds) if (1e-3..=RUNTIME_MAX).contains(&seconds) => {
            Ok(Duration::from_secs_f64(seconds))
        }
        _ => Err("expected seconds above 0, such as 10, 0.5 or 2m".to_owned()),
    }
}

/// `--mutations-per-second`.
pub(super) fn rate(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(rate) if (0.0..=RATE_MAX).contains(&rate) => Ok(rate),
        _ => Err(format!("expected a number from 0 to {RATE_MAX}")),
    }
}

/// `--seed`: decimal, or hexadecimal after `0x`.
pub(super) fn seed(text: &str) -> Result<u64, String> {
    let parsed = match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    parsed.map_err(|_| "expected a number of 64 bits, decimal or after 0x".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_take_suffixes_of_1024() {
        let cases = [
            ("0", 0),
            ("512", 512),
            ("512b", 512),
            ("4k", 4096),
            ("4K", 4096),
            ("4KiB", 4096),
            ("64M", 64 << 20),
            ("1.5G", 3 << 29),
            ("0.5k", 512),
            ("2T", 2 << 40),
            ("18446744073709551615", u64::MAX),
        ];
        for (text, bytes) in cases {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn sizes_that_mean_nothing_or_too_much_are_refused() {
        for text in [
            "",
            "k",
            ".5k",
            "1.",
            "-1",
            "1 k",
            "1x",
            "1kk",
            "1ib",
            "0x10",
            "1.3",
            "0.3k",
            "1.2.3k",
            "16E",
            "18446744073709551616",
            "99999999999999999999999",
            "1.0000000000000000001k",
        ] {
            assert!(size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn blocks_are_whole_sectors() {
        assert_eq!(block_bytes("1536"), Ok(1536));
        for text in ["0", "511", "513", "65M"] {
            assert!(block_bytes(text).is_err(), "{text}");
        }
        assert!(disk_bytes("8E").is_err());
        assert!(disk_bytes("0").is_err());
    }

    #[test]
    fn bounded_numbers_stop_at_their_bounds() {
        assert_eq!(depth("4096"), Ok(4096));
        assert!(depth("4097").is_err());
        assert!(depth("0").is_err());
        assert_eq!(iothreads("256"), Ok(256));
        assert!(iothreads("257").is_err());
        assert!(request_count("0").is_err());
    }

    #[test]
    fn runtimes_are_positive_and_finite() {
        assert_eq!(runtime("0.5"), Ok(Duration::from_millis(500)));
        assert_eq!(runtime("2m"), Ok(Duration::from_secs(120)));
        assert_eq!(runtime("1h"), Ok(Duration::from_secs(3600)));
        for text in ["", "s", "0", "-1", "nan", "inf", "1e300", "é"] {
            assert!(runtime(text).is_err(), "{text}");
        }
    }

    #[test]
    fn rates_and_seeds_keep_their_ranges() {
        assert_eq!(rate("0"), Ok(0.0));
        assert_eq!(rate("12.5"), Ok(12.5));
        for text in ["-1", "nan", "inf", "x"] {
            assert!(rate(text).is_err(), "{text}");
        }
        assert_eq!(seed("0xff"), Ok(255));
        assert_eq!(seed("18446744073709551615"), Ok(u64::MAX));
        assert!(seed("-1").is_err());
    }
}
