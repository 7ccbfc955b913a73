//! Sizes as QEMU's tools print and read them.

use blockplex::drivers::options::parse_size;

use super::Failure;

const SUFFIXES: [&str; 7] = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];

/// A size for people, in three digits: `1 MiB`, `1.5 GiB`, `999 B`.
pub fn human(bytes: u64) -> String {
    let mut unit = 0;
    // A unit is used from 1000 of the one below on.
    while unit + 1 < SUFFIXES.len() && bytes as f64 / (1_u64 << (10 * unit)) as f64 >= 1000.0 {
        unit += 1;
    }
    let value = bytes as f64 / (1_u64 << (10 * unit)) as f64;
    format!("{} {}B", three_digits(value), SUFFIXES[unit])
}

/// As C's `%0.3g`.
fn three_digits(value: f64) -> String {
    if value == 0.0 {
        return "0".to_owned();
    }
    let scientific = format!("{value:.2e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    let trim = |text: &str| match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text.to_owned(),
    };
    if !(-4..3).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{}e{sign}{:02}", trim(digits), exponent.abs());
    }
    trim(&format!("{value:.*}", (2 - exponent).max(0) as usize))
}

/// What is wrong with a number on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SizeError {
    /// It is none.
    Invalid,
    /// It is negative, or larger than any size.
    OutOfRange,
}

/// Reads a size with its suffix.
///
/// # Errors
///
/// Not a size that a 64-bit number can hold.
pub fn parse(text: &str) -> Result<u64, SizeError> {
    let text = text.trim_start_matches([' ', '\t', '\n']);
    let text = text.strip_prefix('+').unwrap_or(text);
    // As in the peer, only whole numbers without a unit can be out of range by themselves.
    if let Some(number) = text.strip_prefix('-') {
        let is_number = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
        return Err(if is_number { SizeError::OutOfRange } else { SizeError::Invalid });
    }
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let fits = digits == 0 || text[..digits].parse::<u64>().is_ok();
    parse_size(text).map_err(|problem| {
        let is_large = problem.contains("larger than") && (fits || digits == text.len());
        if is_large { SizeError::OutOfRange } else { SizeError::Invalid }
    })
}

/// Reads the number that a message calls `what`, which must lie within `range`.
///
/// # Errors
///
/// The message of QEMU's tools.
pub fn parse_within(
    what: &str,
    text: &str,
    range: std::ops::RangeInclusive<u64>,
) -> Result<u64, Failure> {
    let (min, max) = (range.start(), range.end());
    match parse(text) {
        Ok(size) if range.contains(&size) => Ok(size),
        Err(SizeError::Invalid) => {
            Err(Failure::new(format!("Invalid {what} specified: '{text}'.")))
        }
        _ => {
            Err(Failure::new(format!("Invalid {what} specified. Must be between {min} and {max}.")))
        }
    }
}

/// Reads a number of bytes up to the largest that QEMU counts with.
///
/// # Errors
///
/// As [`parse_within`].
pub fn parse_bytes(what: &str, text: &str) -> Result<u64, Failure> {
    parse_within(what, text, 0..=i64::MAX as u64)
}

/// The message about an option whose value is no size.
pub fn expected_size(name: &str) -> String {
    format!(
        "Parameter '{name}' expects a non-negative number below 2^64\nOptional suffix k, M, G, T, \
         P or E means kilo-, mega-, giga-, tera-, peta-\nand exabytes, respectively."
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_printed_with_three_digits() {
        for (bytes, text) in [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "0.977 KiB"),
            (197_120, "192 KiB"),
            (1 << 20, "1 MiB"),
            (3 << 29, "1.5 GiB"),
            (1_023_897, "1e+03 KiB"),
            (i64::MAX as u64, "8 EiB"),
        ] {
            assert_eq!(human(bytes), text, "{bytes}");
        }
    }

    #[test]
    fn what_is_no_size_and_what_is_none_of_ours_are_told_apart() {
        let text = |result: Result<u64, Failure>| result.unwrap_err().text().unwrap().to_owned();
        assert_eq!(parse_bytes("image size", "1.5M").unwrap(), 3 << 19);
        assert_eq!(text(parse_bytes("image size", "1x")), "Invalid image size specified: '1x'.");
        for outside in ["-1", "99E", "9223372036854775808"] {
            assert_eq!(
                text(parse_bytes("image size", outside)),
                "Invalid image size specified. Must be between 0 and 9223372036854775807."
            );
        }
    }
}
