//! What is printed: sizes, times, rates, dumps.

use std::fmt::{Display, Write as _};
use std::io::{IsTerminal as _, Write as _};
use std::time::Duration;

use parking_lot::Mutex;

/// What was printed and not written yet: like C's standard output, stdout is written in blocks
/// unless it is a terminal. So the output of a process that aborts ends where QEMU's does.
static PRINTED: Mutex<String> = Mutex::new(String::new());
/// Bytes of a block.
const BLOCK: usize = 4096;

/// Prints a line on stdout. When nobody reads any more, nobody is told.
pub fn say(text: impl Display) {
    let mut printed = PRINTED.lock();
    printed.push_str(&format!("{text}\n"));
    if printed.len() >= BLOCK || std::io::stdout().is_terminal() {
        write_out(&mut printed);
    }
}

/// Writes all that was printed.
pub fn flush() {
    write_out(&mut PRINTED.lock());
}

fn write_out(printed: &mut String) {
    let mut out = std::io::stdout();
    drop(out.write_all(printed.as_bytes()).and_then(|()| out.flush()));
    printed.clear();
}

/// Prints the prompt.
pub fn prompt(program: &str) {
    flush();
    let mut out = std::io::stdout();
    drop(write!(out, "{program}> ").and_then(|()| out.flush()));
}

const UNITS: [(&str, f64); 6] = [
    ("EiB", (1_u64 << 60) as f64),
    ("PiB", (1_u64 << 50) as f64),
    ("TiB", (1_u64 << 40) as f64),
    ("GiB", (1_u64 << 30) as f64),
    ("MiB", (1_u64 << 20) as f64),
    ("KiB", (1_u64 << 10) as f64),
];

/// A number of bytes for people: `64 KiB`, `1.500 KiB`, `513 bytes`.
pub fn size(bytes: f64) -> String {
    let unit = UNITS.iter().find(|(_, unit)| bytes >= *unit);
    let (mut number, name) = match unit {
        Some((name, unit)) => (format!("{:.3}", bytes / unit), *name),
        None => (format!("{bytes:.6}"), "bytes"),
    };
    // A fraction that begins with three zeros is none.
    if let Some(end) = number.find(".000") {
        number.truncate(end);
    }
    format!("{number} {name}")
}

/// A time: `00.25 sec`, or with `fixed`, and from a minute on, `0:01:02.50`.
fn time(time: Duration, fixed: bool) -> String {
    let (seconds, hundredths) = (time.as_secs(), time.subsec_millis() / 10);
    let (hours, minutes) = (seconds / 3600, seconds / 60 % 60);
    if fixed || hours > 0 || minutes > 0 {
        return format!("{hours}:{minutes:02}:{:02}.{hundredths:02}", seconds % 60);
    }
    format!("{seconds:02}.{hundredths:02} sec")
}

/// What an operation did.
pub struct Transferred {
    /// `read`, `wrote`, `discard`.
    pub verb: &'static str,
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    pub time: Duration,
}

impl Transferred {
    /// The two lines about it, or the one that programs read.
    pub fn lines(&self, machine: bool) -> String {
        let Transferred { verb, offset, length, .. } = *self;
        // A clock that stands still must not divide by zero.
        let seconds = self.time.as_secs_f64().max(1e-9);
        let (bytes, operations) = (length as f64 / seconds, 1.0 / seconds);
        if machine {
            return format!("{length},1,{},{bytes:.3},{operations:.3}", time(self.time, true));
        }
        format!(
            "{verb} {length}/{length} bytes at offset {offset}\n{}, 1 ops; {} ({}/sec and \
             {operations:.4} ops/sec)",
            size(length as f64),
            time(self.time, false),
            size(bytes),
        )
    }
}

/// Bytes in hexadecimal and as letters and digits, 16 in a line; `offset` is that of the first.
pub fn dump(bytes: &[u8], offset: u64) -> String {
    let mut text = String::with_capacity(bytes.len() * 5);
    for (index, line) in (0..).zip(bytes.chunks(16)) {
        if index > 0 {
            text.push('\n');
        }
        // Writing to a string does not fail.
        let _ = write!(text, "{:08x}:  ", offset + index * 16);
        for byte in line {
            let _ = write!(text, "{byte:02x} ");
        }
        text.push(' ');
        text.extend(line.iter().map(|byte| match byte.is_ascii_alphanumeric() {
            true => char::from(*byte),
            false => '.',
        }));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_three_decimals_or_none() {
        for (bytes, text) in [
            (0.0, "0 bytes"),
            (513.0, "513 bytes"),
            (0.374438, "0.374438 bytes"),
            (1024.0, "1 KiB"),
            (1536.0, "1.500 KiB"),
            (1048064.0, "1023.500 KiB"),
            (4.0 * 1024.0 * 1024.0 * 1024.0, "4 GiB"),
        ] {
            assert_eq!(size(bytes), text);
        }
    }

    #[test]
    fn reports_are_for_people_or_programs() {
        let did = Transferred {
            verb: "read",
            offset: 512,
            length: 1024,
            time: Duration::from_millis(250),
        };
        assert_eq!(
            did.lines(false),
            "read 1024/1024 bytes at offset 512\n1 KiB, 1 ops; 00.25 sec (4 KiB/sec and 4.0000 \
             ops/sec)"
        );
        assert_eq!(did.lines(true), "1024,1,0:00:00.25,4096.000,4.000");
        assert_eq!(time(Duration::from_millis(3_723_450), false), "1:02:03.45");
    }

    #[test]
    fn a_dump_shows_letters_and_digits() {
        let mut bytes = vec![0; 18];
        bytes[..4].copy_from_slice(b"a!Z9");
        bytes[17] = 0xff;
        assert_eq!(
            dump(&bytes, 3),
            "00000003:  61 21 5a 39 00 00 00 00 00 00 00 00 00 00 00 00  a.Z9............\n\
             00000013:  00 ff  .."
        );
    }
}
