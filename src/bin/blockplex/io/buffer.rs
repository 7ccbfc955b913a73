//! Numbers, patterns and memory of the commands.

use std::io::Read;

use blockplex::graph::Limits;
use blockplex::{IoBuffer, IoVector};

use super::report::say;
use crate::tool::message::strerror;
use crate::tool::size::{self, SizeError};

/// What fills memory that is to be written, unless the user says otherwise.
pub const WRITTEN: u8 = 0xcd;
/// What fills memory that is to be read into.
pub const UNREAD: u8 = 0xab;
/// By how much memory is off its alignment when it is to be.
const MISALIGNMENT: usize = 16;

/// A number of bytes, up to the largest offset; what is none has been told.
pub fn number(text: &str) -> Option<u64> {
    match size::parse(text) {
        Ok(number) if number <= i64::MAX as u64 => Some(number),
        Err(SizeError::Invalid) => {
            let what = "non-numeric argument, or extraneous/unrecognized suffix";
            say(format!("Parsing error: {what} -- {text}"));
            None
        }
        _ => {
            say(format!("Parsing error: argument too large -- {text}"));
            None
        }
    }
}

/// A byte; what is none has been told.
pub fn pattern(text: &str) -> Option<u8> {
    let byte = integer(text).and_then(|number| u8::try_from(number).ok());
    if byte.is_none() {
        say(format!("{text} is not a valid pattern byte"));
    }
    byte
}

/// A whole number: decimal, hexadecimal after `0x`, octal after `0`.
pub fn integer(text: &str) -> Option<i64> {
    let text = text.trim_start();
    let (sign, digits) = match text.strip_prefix('-') {
        Some(digits) => (-1, digits),
        None => (1, text.strip_prefix('+').unwrap_or(text)),
    };
    let hexadecimal = digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X"));
    let number = match (hexadecimal, digits.strip_prefix('0')) {
        (Some(digits), _) => i64::from_str_radix(digits, 16),
        (None, Some(octal)) if !octal.is_empty() => i64::from_str_radix(octal, 8),
        _ => digits.parse(),
    };
    // A second sign is none.
    let plain = digits.starts_with(|first: char| first.is_ascii_hexdigit());
    number.ok().filter(|_| plain).map(|number: i64| sign * number)
}

/// The lengths of a scatter list, and their sum; what is wrong has been told.
pub fn lengths(words: &[String]) -> Option<(Vec<usize>, u64)> {
    let (max, mut total) = (Limits::MAX_REQUEST, 0);
    let mut lengths = Vec::with_capacity(words.len());
    for word in words {
        let length = number(word)?;
        if length > max {
            say(format!("Argument '{word}' exceeds maximum size {max}"));
            return None;
        }
        total += length;
        if total > max {
            say(format!("The total number of bytes exceed the maximum size {max}"));
            return None;
        }
        // At most 2 GiB.
        lengths.push(length as usize);
    }
    Some((lengths, total))
}

/// Memory of that length, filled with `fill`; off its alignment if `misalign` says so.
pub fn memory(length: usize, fill: u8, misalign: bool) -> IoVector {
    let offset = if misalign { MISALIGNMENT } else { 0 };
    let whole: IoVector = IoBuffer::zeroed(length + offset).into();
    let vector = whole.slice(offset, length);
    vector.fill(0, length, fill);
    vector
}

/// A scatter list of these lengths.
pub fn scattered(lengths: &[usize], fill: u8, misalign: bool) -> IoVector {
    let parts: Vec<IoVector> =
        lengths.iter().map(|length| memory(*length, fill, misalign)).collect();
    match <[IoVector; 1]>::try_from(parts) {
        Ok([whole]) => whole,
        Err(parts) => IoVector::concatenate(&parts),
    }
}

/// Memory of that length, filled with the beginning of a file, over and over; what is wrong has
/// been told.
pub fn from_file(path: &str, length: usize, misalign: bool) -> Option<IoVector> {
    let mut bytes = Vec::new();
    let read =
        std::fs::File::open(path).and_then(|file| file.take(length as u64).read_to_end(&mut bytes));
    if let Err(error) = read {
        eprintln!("{path}: {}", strerror(error.raw_os_error().unwrap_or(0)));
        return None;
    }
    if bytes.is_empty() && length > 0 {
        eprintln!("{path}: file is empty");
        return None;
    }
    let vector = memory(length, 0, misalign);
    let mut at = 0;
    while at < length {
        let count = bytes.len().min(length - at);
        vector.slice(at, count).copy_from_slice(0, &bytes[..count]);
        at += count;
    }
    Some(vector)
}

/// Whether all bytes of a range are `byte`.
pub fn is_filled(bytes: &[u8], byte: u8) -> bool {
    bytes.iter().all(|found| *found == byte)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers_are_read_as_in_c() {
        for (text, number) in [
            ("10", Some(10)),
            ("0x1f", Some(31)),
            ("010", Some(8)),
            ("0", Some(0)),
            ("-3", Some(-3)),
            ("+3", Some(3)),
            ("--3", None),
            ("x", None),
            ("", None),
            ("08", None),
        ] {
            assert_eq!(integer(text), number, "{text}");
        }
    }

    #[test]
    fn memory_is_filled_and_scattered_and_off_its_alignment() {
        for misalign in [false, true] {
            let vector = scattered(&[3, 5], 7, misalign);
            assert_eq!((vector.len(), vector.to_vec()), (8, vec![7; 8]));
            assert!(!vector.is_aligned(512));
            assert_eq!(memory(512, 1, misalign).is_aligned(512), !misalign);
        }
    }
}
