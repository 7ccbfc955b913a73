//! `discard`, `alloc`, `map`, `truncate`, `length`, `flush`, `info`.

use blockplex::drivers::qcow2::Qcow2;
use blockplex::graph::{Limits, Preallocation};
use blockplex::{Backend, BlockStatus, Error, ErrorKind, Outcome, Request, Result};

use super::buffer;
use super::command::{Status, usage};
use super::report::{Transferred, say, size};
use super::session::{Session, Timed};
use super::transfer::{Flags, failed, print_report};
use crate::img;
use crate::tool::getopt::{Opt, Parser, short, short_with};
use crate::tool::message::{describe, strerror};
use crate::tool::open::is_protocol_driver;

const DISCARD: &[Opt] = &[short("C", 'C'), short("q", 'q')];
const TRUNCATE: &[Opt] = &[short_with("m", 'm')];

/// A sector, in bytes.
const SECTOR: u64 = 512;
/// The most bytes looked at in one step.
const MAX_STEP: u64 = 1 << 30;

/// `discard`.
pub fn discard(session: &mut Session, words: &[String]) -> Status {
    let Some((flags, rest)) = Flags::parse(words, DISCARD) else { return Status::Failed };
    let [offset, length] = &rest[..] else { return usage("discard") };
    let Some(offset) = buffer::number(offset) else { return Status::Failed };
    let Some(count) = buffer::number(length) else { return Status::Failed };
    if count > Limits::MAX_REQUEST {
        say(format!("length cannot exceed {}, given {length}", Limits::MAX_REQUEST));
        return Status::Failed;
    }
    let ended = session.request(Request::discard(offset, count));
    let ended = ended.and_then(|Timed { completion, time }| completion.result.map(|_| time));
    match ended {
        Ok(time) => {
            print_report(&flags, &Transferred { verb: "discard", offset, length: count, time });
            Status::Done
        }
        Err(error) => {
            say(failed("discard", &error));
            Status::Failed
        }
    }
}

/// The status at `offset`; length 0 at the end of the disk.
fn status(session: &Session, offset: u64, length: u64) -> Result<BlockStatus> {
    let backend: Backend = session.backend()?;
    let rest = backend.length()?.saturating_sub(offset);
    if rest == 0 || length == 0 {
        return Ok(BlockStatus::default());
    }
    let request = Request::block_status(offset, length.min(rest).min(MAX_STEP));
    match session.request(request)?.completion.result? {
        Outcome::Status(status) => Ok(*status),
        Outcome::Done => Err(Error::new(ErrorKind::Io, "block-status gave no status")),
    }
}

/// `alloc`.
pub fn alloc(session: &mut Session, words: &[String]) -> Status {
    let Some(start) = words.get(1).and_then(|word| buffer::number(word)) else {
        return Status::Failed;
    };
    let count = match words.get(2) {
        Some(word) => buffer::number(word),
        None => Some(SECTOR),
    };
    let Some(count) = count else { return Status::Failed };
    let (mut looked_at, mut allocated) = (0, 0);
    while looked_at < count {
        match status(session, start.saturating_add(looked_at), count - looked_at) {
            Ok(status) if status.length == 0 => break,
            Ok(status) => {
                let length = status.length.min(count - looked_at);
                looked_at += length;
                allocated += if status.allocated { length } else { 0 };
            }
            Err(error) => {
                say(failed("is_allocated", &error));
                return Status::Failed;
            }
        }
    }
    let at = size(start as f64);
    say(format!("{allocated}/{looked_at} bytes allocated at offset {at}"));
    Status::Done
}

/// `map`.
pub fn map(session: &mut Session, _words: &[String]) -> Status {
    let mut offset = 0;
    let mut run: Option<(u64, u64, bool)> = None;
    loop {
        let status = match status(session, offset, MAX_STEP) {
            Ok(status) => status,
            Err(error) => {
                let text = strerror(error.errno());
                session.tool.report(format!("Failed to get allocation status: {text}"));
                return Status::Failed;
            }
        };
        match &mut run {
            Some((_, length, allocated)) if status.length > 0 && *allocated == status.allocated => {
                *length += status.length;
            }
            ended => {
                if let Some(extent) = ended.replace((offset, status.length, status.allocated)) {
                    print_extent(extent);
                }
            }
        }
        if status.length == 0 {
            return Status::Done;
        }
        offset += status.length;
    }
}

fn print_extent((offset, length, allocated): (u64, u64, bool)) {
    let word = if allocated { "    allocated" } else { "not allocated" };
    let (at, long) = (size(offset as f64), size(length as f64));
    say(format!("{long} ({length:#x}) bytes {word} at offset {at} ({offset:#x})"));
}

/// `truncate`.
pub fn truncate(session: &mut Session, words: &[String]) -> Status {
    let mut parser = Parser::new(&words[0], None, TRUNCATE, words[1..].to_vec());
    let mut mode = Preallocation::Off;
    loop {
        match parser.next() {
            Ok(None) => break,
            Err(_) => return usage("truncate"),
            Ok(Some(option)) => match Preallocation::from_name(&option.value) {
                Some(given) => mode = given,
                None => {
                    let text = format!("Invalid preallocation mode '{}'", option.value);
                    session.tool.report(text);
                    return Status::Failed;
                }
            },
        }
    }
    let rest = parser.positional();
    let Some(offset) = buffer::number(rest.first().unwrap_or(&words[1])) else {
        return Status::Failed;
    };
    let request = Request::truncate(offset).preallocated(mode);
    match session.request(request).and_then(|timed| timed.completion.result) {
        Ok(_) => Status::Done,
        Err(error) => {
            session.tool.report(describe(&error));
            Status::Failed
        }
    }
}

/// `length`.
pub fn length(session: &mut Session, _words: &[String]) -> Status {
    match session.backend().and_then(|backend| backend.length()) {
        Ok(length) => {
            say(size(length as f64));
            Status::Done
        }
        Err(error) => {
            say(format!("getlength: {}", strerror(error.errno())));
            Status::Failed
        }
    }
}

/// `flush`.
pub fn flush(session: &mut Session, _words: &[String]) -> Status {
    match session.request(Request::flush()).and_then(|timed| timed.completion.result) {
        Ok(_) => Status::Done,
        Err(error) => {
            tracing::debug!(%error, "flush");
            Status::Failed
        }
    }
}

/// `info`.
pub fn info(session: &mut Session, _words: &[String]) -> Status {
    let Some(view) = session.file.as_ref().and_then(|file| file.image.view().ok()) else {
        return Status::Failed;
    };
    let driver = view.driver().driver_name();
    say(format!("format name: {driver}"));
    if is_protocol_driver(driver) {
        // The peer prints both names of such a driver.
        say(format!("format name: {driver}"));
    }
    if ["null-co", "memory"].contains(&driver) {
        return Status::Failed;
    }
    let qcow2 = view.driver_as::<Qcow2>();
    let (cluster, vm_state) =
        qcow2.map_or((0, 0), |driver| (driver.information().cluster_size, driver.vm_state_start()));
    say(format!("cluster size: {}", size(cluster as f64)));
    say(format!("vm state offset: {}", size(vm_state as f64)));
    let Some(file) = &session.file else { return Status::Failed };
    match img::info::specific(&file.image) {
        Ok(text) if text.is_empty() => Status::Done,
        Ok(text) => {
            say("Format specific information:");
            say(text.trim_end_matches('\n'));
            Status::Done
        }
        Err(failure) => {
            failure.print(&session.tool, None);
            Status::Failed
        }
    }
}
