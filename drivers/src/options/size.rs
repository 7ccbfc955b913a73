//! Sizes as people write them: `65536`, `64k`, `1.5G`, `0x10000`.
//!
//! All arithmetic is in whole numbers: a size that passed through a float would lose bytes from
//! 8 PiB on.

/// The unit letters, each 1024 times the one before; `B` is the byte itself.
const UNITS: [u8; 7] = *b"BKMGTPE";

/// How many digits of a fraction count. 10^18 times the largest unit fits into 128 bits, and
/// further digits are worth less than a byte.
const FRACTION_DIGITS: usize = 18;

/// Parses a size into bytes.
///
/// Accepted are decimal digits, optionally with a fraction, optionally followed by one of the
/// units `B K M G T P E` (powers of 1024, either case), or a whole hexadecimal number after `0x`.
/// A fraction is rounded to the nearest byte, and needs a unit above `B`.
///
/// # Errors
///
/// What is wrong, as the end of a sentence that began with the text.
pub fn parse_size(text: &str) -> Result<u64, &'static str> {
    if let Some(digits) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        return parse_hexadecimal(digits);
    }
    let (number, unit) = split_unit(text)?;
    let (whole, fraction) = match number.split_once('.') {
        Some((whole, fraction)) => (whole, Some(fraction)),
        None => (number, None),
    };
    let has_digits = !whole.is_empty() || fraction.is_some_and(|digits| !digits.is_empty());
    if !has_digits || !all_digits(whole) || !fraction.is_none_or(all_digits) {
        return Err("is not a size");
    }
    let fraction_bytes = match fraction {
        Some(digits) if unit == 1 && digits.bytes().any(|digit| digit != b'0') => {
            return Err("asks for a fraction of a byte");
        }
        Some(digits) => scale_fraction(digits, unit),
        None => 0,
    };
    decimal(whole)
        .and_then(|whole| whole.checked_mul(unit))
        .and_then(|bytes| bytes.checked_add(fraction_bytes))
        .ok_or("is larger than 2^64 - 1 bytes")
}

/// Splits off the unit letter; returns the number's text and the unit in bytes.
fn split_unit(text: &str) -> Result<(&str, u64), &'static str> {
    let Some(&last) = text.as_bytes().last() else {
        return Err("is not a size");
    };
    if last.is_ascii_digit() || last == b'.' {
        return Ok((text, 1));
    }
    let unit = UNITS
        .iter()
        .position(|unit| *unit == last.to_ascii_uppercase())
        .ok_or("is not a size (units are B, K, M, G, T, P, E)")?;
    Ok((&text[..text.len() - 1], 1 << (10 * unit)))
}

fn all_digits(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_digit())
}

/// The number of decimal digits `text` (none at all mean 0), unless it is too large.
fn decimal(text: &str) -> Option<u64> {
    text.bytes().try_fold(0u64, |number, digit| {
        number.checked_mul(10)?.checked_add(u64::from(digit - b'0'))
    })
}

/// `0.digits` of `unit`, rounded to the nearest whole.
fn scale_fraction(digits: &str, unit: u64) -> u64 {
    let mut numerator: u128 = 0;
    let mut denominator: u128 = 1;
    for digit in digits.bytes().take(FRACTION_DIGITS) {
        numerator = numerator * 10 + u128::from(digit - b'0');
        denominator *= 10;
    }
    let rounded = (numerator * u128::from(unit) + denominator / 2) / denominator;
    // At most one whole unit, which itself came from a `u64`.
    u64::try_from(rounded).unwrap_or(unit)
}

fn parse_hexadecimal(digits: &str) -> Result<u64, &'static str> {
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Err("is not a size (hexadecimal sizes are whole and have no unit)");
    }
    u64::from_str_radix(digits, 16).map_err(|_| "is larger than 2^64 - 1 bytes")
}

#[cfg(test)]
mod tests {
    use super::parse_size;

    #[test]
    fn suffixes_are_powers_of_1024_in_either_case() {
        for (text, bytes) in [
            ("0", 0),
            ("12345", 12345),
            ("0012", 12),
            ("1B", 1),
            ("1k", 1 << 10),
            ("1K", 1 << 10),
            ("2M", 2 << 20),
            ("3g", 3 << 30),
            ("4T", 4 << 40),
            ("5P", 5 << 50),
            ("6E", 6 << 60),
            ("0x10000", 0x10000),
            ("0XfF", 0xff),
            ("18446744073709551615", u64::MAX),
            ("0xffffffffffffffff", u64::MAX),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn fractions_are_exact_and_rounded_to_the_byte() {
        for (text, bytes) in [
            ("1.5k", 1536),
            (".5k", 512),
            ("1.k", 1024),
            ("0.5E", 1 << 59),
            ("12.345M", 12_944_671),
            ("1.0", 1),
            ("1.0B", 1),
            // A float would round this one to 9 PiB + 0.
            ("9007199254740993.0", 9_007_199_254_740_993),
            ("0.00048828125k", 1),
            ("0.0004k", 0),
            ("15.999999999999999999999999999999E", u64::MAX),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn overflow_is_an_error_not_a_wrap() {
        for text in [
            "18446744073709551616",
            "16E",
            "99999999999999999999999E",
            "0x10000000000000000",
            "17179869184G",
        ] {
            assert_eq!(parse_size(text), Err("is larger than 2^64 - 1 bytes"), "{text}");
        }
    }

    #[test]
    fn junk_is_refused() {
        for text in [
            "", " ", "k", ".", ".k", "-1", "+1", " 1", "1 ", "1kk", "1kB", "1e3", "1.2.3k", "0x",
            "0xg", "0x1k", "0x1.8", "1x", "inf", "nan", "1,5k", "1.5", "1.1B", "é", "1é",
        ] {
            assert!(parse_size(text).is_err(), "{text:?}");
        }
    }
}
