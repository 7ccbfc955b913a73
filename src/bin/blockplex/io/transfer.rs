//! `read`, `write`, `readv`, `writev`: one request, and a wait for it.

use std::time::{Duration, Instant};

use blockplex::drivers::qcow2::Qcow2;
use blockplex::graph::Limits;
use blockplex::{Error, ErrorKind, IoVector, Request, Result};

use super::buffer::{self, UNREAD, WRITTEN};
use super::command::{Status, usage};
use super::report::{Transferred, dump, say};
use super::session::{Session, Timed};
use crate::tool::getopt::{Opt, Parser, short, short_with};
use crate::tool::message::strerror;

/// A sector, in bytes: what VM state and compressed writes are counted in.
const SECTOR: u64 = 512;
/// The most bytes of one write of zeros.
const MAX_ZEROES: u64 = 1 << 30;

const READ: &[Opt] = &[
    short("b", 'b'),
    short("C", 'C'),
    short_with("l", 'l'),
    short("p", 'p'),
    short_with("P", 'P'),
    short("q", 'q'),
    short("r", 'r'),
    short_with("s", 's'),
    short("v", 'v'),
];

const WRITE: &[Opt] = &[
    short("b", 'b'),
    short("c", 'c'),
    short("C", 'C'),
    short("f", 'f'),
    short("n", 'n'),
    short("p", 'p'),
    short_with("P", 'P'),
    short("q", 'q'),
    short("r", 'r'),
    short_with("s", 's'),
    short("u", 'u'),
    short("z", 'z'),
];

const READ_VECTOR: &[Opt] =
    &[short("C", 'C'), short_with("P", 'P'), short("q", 'q'), short("r", 'r'), short("v", 'v')];

const WRITE_VECTOR: &[Opt] =
    &[short("C", 'C'), short("f", 'f'), short_with("P", 'P'), short("q", 'q'), short("r", 'r')];

/// What the flags of a transfer say. `-p` and `-r` say nothing: there is one way to a disk, and
/// memory need not be registered.
#[derive(Clone, Debug, Default)]
pub struct Flags {
    pub vm_state: bool,
    pub compressed: bool,
    pub machine: bool,
    pub fua: bool,
    pub no_fallback: bool,
    pub quiet: bool,
    pub registered: bool,
    pub unmap: bool,
    pub zeroes: bool,
    pub verbose: bool,
    pub invalid: bool,
    pub pattern: Option<u8>,
    /// `-s` of a write.
    pub source: Option<String>,
    /// `-s` and `-l` of a read: the part that is compared.
    pub start: Option<u64>,
    pub length: Option<u64>,
}

impl Flags {
    /// The flags, and the words after them. None: something was wrong, and has been told.
    pub fn parse(words: &[String], options: &'static [Opt]) -> Option<(Flags, Vec<String>)> {
        let name = words.first()?;
        let writes = options.iter().any(|option| option.name() == "f");
        let mut parser = Parser::new(name, None, options, words[1..].to_vec());
        let mut flags = Flags::default();
        loop {
            let option = match parser.next() {
                Ok(Some(option)) => option,
                Ok(None) => return Some((flags, parser.positional())),
                Err(_) => {
                    usage(name);
                    return None;
                }
            };
            match option.name {
                "b" => flags.vm_state = true,
                "c" => flags.compressed = true,
                "C" => flags.machine = true,
                "f" => flags.fua = true,
                "i" => flags.invalid = true,
                "n" => flags.no_fallback = true,
                "q" => flags.quiet = true,
                "r" => flags.registered = true,
                "u" => flags.unmap = true,
                "v" => flags.verbose = true,
                "z" => flags.zeroes = true,
                "P" => flags.pattern = Some(buffer::pattern(&option.value)?),
                "l" => flags.length = Some(buffer::number(&option.value)?),
                "s" if writes => flags.source = Some(option.value),
                "s" => flags.start = Some(buffer::number(&option.value)?),
                _ => {}
            }
        }
    }

    /// What a write of `data`, or of zeros, asks for.
    pub fn request(&self, offset: u64, data: Data, writethrough: bool) -> Request {
        let mut request = match data {
            Data::Bytes(vector) => Request::write(offset, vector),
            Data::Zeroes(length) => Request::write_zeroes(offset, length),
        };
        request.flags.fua = self.fua || writethrough;
        request.flags.may_unmap = self.unmap;
        request.flags.no_fallback = self.no_fallback;
        request.flags.compressed = self.compressed;
        request
    }
}

/// What is written.
pub enum Data {
    Bytes(IoVector),
    Zeroes(u64),
}

/// The message of a failed operation.
pub fn failed(what: &str, error: &Error) -> String {
    format!("{what} failed: {}", strerror(error.errno()))
}

/// Prints what an operation did, unless it is to be quiet.
pub fn print_report(flags: &Flags, did: &Transferred) {
    if !flags.quiet {
        say(did.lines(flags.machine));
    }
}

/// `read`.
pub fn read(session: &mut Session, words: &[String]) -> Status {
    let Some((flags, rest)) = Flags::parse(words, READ) else { return Status::Failed };
    let [offset, length] = &rest[..] else { return usage("read") };
    let Some(offset) = buffer::number(offset) else { return Status::Failed };
    let Some(count) = buffer::number(length) else { return Status::Failed };
    if count > Limits::MAX_REQUEST {
        say(format!("length cannot exceed {}, given {length}", Limits::MAX_REQUEST));
        return Status::Failed;
    }
    if flags.pattern.is_none() && (flags.start.is_some() || flags.length.is_some()) {
        return usage("read");
    }
    let start = flags.start.unwrap_or(0);
    let compared = flags.length.unwrap_or(count.saturating_sub(start));
    if start.checked_add(compared).is_none_or(|end| end > count) {
        say("pattern verification range exceeds end of read data");
        return Status::Failed;
    }
    if flags.vm_state && !is_in_sectors(offset, count) {
        return Status::Failed;
    }
    let vector = buffer::memory(count as usize, UNREAD, session.misalign);
    let result = if flags.vm_state {
        vm_state(session, offset, vector.clone(), false)
    } else {
        ended(session.request(Request::read(offset, vector.clone())))
    };
    finish_read(&flags, ("read", result), (offset, start, compared), &vector)
}

/// `readv`.
pub fn read_vector(session: &mut Session, words: &[String]) -> Status {
    let Some((flags, rest)) = Flags::parse(words, READ_VECTOR) else { return Status::Failed };
    let [offset, lengths @ ..] = &rest[..] else { return usage("readv") };
    if lengths.is_empty() {
        return usage("readv");
    }
    let Some(offset) = buffer::number(offset) else { return Status::Failed };
    let Some((lengths, total)) = buffer::lengths(lengths) else { return Status::Failed };
    let vector = buffer::scattered(&lengths, UNREAD, session.misalign);
    let result = ended(session.request(Request::read(offset, vector.clone())));
    finish_read(&flags, ("readv", result), (offset, 0, total), &vector)
}

/// Compares, dumps, reports. `at`: the offset, and start and length of what is compared.
fn finish_read(
    flags: &Flags,
    (what, result): (&str, Result<Duration>),
    at: (u64, u64, u64),
    vector: &IoVector,
) -> Status {
    match result {
        Err(error) => {
            say(failed(what, &error));
            Status::Failed
        }
        Ok(time) => {
            let (text, matches) = report_read(flags, at, vector, time);
            if !text.is_empty() {
                say(text);
            }
            if matches { Status::Done } else { Status::Failed }
        }
    }
}

/// What there is to be said of a read that went well, and whether it read what it should.
pub fn report_read(
    flags: &Flags,
    (offset, start, compared): (u64, u64, u64),
    vector: &IoVector,
    time: Duration,
) -> (String, bool) {
    let mut lines = Vec::new();
    let bytes = vector.to_vec();
    let part = &bytes[start as usize..(start + compared) as usize];
    let matches = flags.pattern.is_none_or(|byte| buffer::is_filled(part, byte));
    if !matches {
        let at = offset + start;
        lines.push(format!("Pattern verification failed at offset {at}, {compared} bytes"));
    }
    if !flags.quiet {
        if flags.verbose && !bytes.is_empty() {
            lines.push(dump(&bytes, offset));
        }
        let did = Transferred { verb: "read", offset, length: bytes.len() as u64, time };
        lines.push(did.lines(flags.machine));
    }
    (lines.join("\n"), matches)
}

/// `write`.
pub fn write(session: &mut Session, words: &[String]) -> Status {
    let Some((flags, rest)) = Flags::parse(words, WRITE) else { return Status::Failed };
    let [offset, length] = &rest[..] else { return usage("write") };
    if let Some(problem) = contradiction(&flags) {
        say(problem);
        return Status::Failed;
    }
    let Some(offset) = buffer::number(offset) else { return Status::Failed };
    let Some(count) = buffer::number(length) else { return Status::Failed };
    if count > Limits::MAX_REQUEST && !flags.no_fallback {
        let max = Limits::MAX_REQUEST;
        say(format!("length cannot exceed {max} without -n, given {length}"));
        return Status::Failed;
    }
    if (flags.vm_state || flags.compressed) && !is_in_sectors(offset, count) {
        return Status::Failed;
    }
    let data = if flags.zeroes {
        if flags.registered {
            say("cannot combine zero write with registered I/O buffer");
            return Status::Failed;
        }
        Data::Zeroes(count)
    } else if let Some(source) = &flags.source {
        match buffer::from_file(source, count as usize, session.misalign) {
            Some(vector) => Data::Bytes(vector),
            None => return Status::Failed,
        }
    } else {
        let byte = flags.pattern.unwrap_or(WRITTEN);
        Data::Bytes(buffer::memory(count as usize, byte, session.misalign))
    };
    let result = match data {
        Data::Bytes(vector) if flags.vm_state => vm_state(session, offset, vector, true),
        Data::Zeroes(count) => write_zeroes(session, &flags, offset, count),
        data => {
            let request = flags.request(offset, data, session.is_writethrough());
            ended(session.request(request))
        }
    };
    finish_write(&flags, ("write", result), offset, count)
}

/// `writev`.
pub fn write_vector(session: &mut Session, words: &[String]) -> Status {
    let Some((flags, rest)) = Flags::parse(words, WRITE_VECTOR) else { return Status::Failed };
    let [offset, lengths @ ..] = &rest[..] else { return usage("writev") };
    if lengths.is_empty() {
        return usage("writev");
    }
    let Some(offset) = buffer::number(offset) else { return Status::Failed };
    let Some((lengths, total)) = buffer::lengths(lengths) else { return Status::Failed };
    let byte = flags.pattern.unwrap_or(WRITTEN);
    let vector = buffer::scattered(&lengths, byte, session.misalign);
    let request = flags.request(offset, Data::Bytes(vector), session.is_writethrough());
    let result = ended(session.request(request));
    finish_write(&flags, ("writev", result), offset, total)
}

fn finish_write(
    flags: &Flags,
    (what, result): (&str, Result<Duration>),
    offset: u64,
    length: u64,
) -> Status {
    match result {
        Ok(time) => {
            print_report(flags, &Transferred { verb: "wrote", offset, length, time });
            Status::Done
        }
        Err(error) => {
            say(failed(what, &error));
            Status::Failed
        }
    }
}

/// What of the flags of a write does not go together.
fn contradiction(flags: &Flags) -> Option<&'static str> {
    let sources = [flags.zeroes, flags.pattern.is_some(), flags.source.is_some()];
    if flags.vm_state && flags.zeroes {
        Some("-b and -z cannot be specified at the same time")
    } else if flags.fua && (flags.vm_state || flags.compressed) {
        Some("-f and -b or -c cannot be specified at the same time")
    } else if flags.no_fallback && !flags.zeroes {
        Some("-n requires -z to be specified")
    } else if flags.unmap && !flags.zeroes {
        Some("-u requires -z to be specified")
    } else if sources.iter().filter(|given| **given).count() > 1 {
        Some("Only one of -z, -P, and -s can be specified at the same time")
    } else {
        None
    }
}

/// Whether both are whole sectors; what is not has been told.
fn is_in_sectors(offset: u64, length: u64) -> bool {
    for (name, value) in [("offset", offset), ("count", length)] {
        if value % SECTOR != 0 {
            say(format!("{value} is not a sector-aligned value for '{name}'"));
            return false;
        }
    }
    true
}

/// How long a request took that went well.
fn ended(timed: Result<Timed>) -> Result<Duration> {
    let Timed { completion, time } = timed?;
    completion.result.map(|_| time)
}

/// Writes zeros, in pieces where one request cannot be so long.
fn write_zeroes(session: &Session, flags: &Flags, offset: u64, length: u64) -> Result<Duration> {
    let mut time = Duration::ZERO;
    let disk = session.backend()?.length()?;
    if offset.checked_add(length).is_none_or(|end| end > disk) {
        return Err(Error::new(ErrorKind::OutOfRange, "zeros past the end of the disk"));
    }
    let mut done = 0;
    loop {
        let count = (length - done).min(MAX_ZEROES);
        let data = Data::Zeroes(count);
        let request = flags.request(offset + done, data, session.is_writethrough());
        time += ended(session.request(request))?;
        done += count;
        if done >= length {
            return Ok(time);
        }
    }
}

/// Reads or writes VM state.
fn vm_state(session: &Session, offset: u64, vector: IoVector, writes: bool) -> Result<Duration> {
    let Some(file) = &session.file else {
        return Err(Error::new(ErrorKind::NoMedium, "no file is open"));
    };
    let begun = Instant::now();
    let work = file.image.layer().manage(file.image.root, async move |driver: &Qcow2, io| {
        if writes {
            driver.write_vm_state(io, offset, &vector).await
        } else {
            driver.read_vm_state(io, offset, &vector).await
        }
    });
    session.manage(work)?;
    Ok(begun.elapsed())
}
