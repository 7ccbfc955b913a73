//! `aio_read`, `aio_write`, `aio_flush`: requests that the next command does not wait for.

use blockplex::graph::Limits;
use blockplex::{Error, ErrorKind, IoVector, Request};

use super::buffer::{self, UNREAD, WRITTEN};
use super::command::{Status, usage};
use super::report::{Transferred, say};
use super::session::{Session, Timed};
use super::transfer::{Data, Flags, failed, report_read};
use crate::tool::getopt::{Opt, short, short_with};

const READ: &[Opt] = &[
    short("C", 'C'),
    short("i", 'i'),
    short_with("P", 'P'),
    short("q", 'q'),
    short("r", 'r'),
    short("v", 'v'),
];

const WRITE: &[Opt] = &[
    short("C", 'C'),
    short("f", 'f'),
    short("i", 'i'),
    short_with("P", 'P'),
    short("q", 'q'),
    short("r", 'r'),
    short("u", 'u'),
    short("z", 'z'),
];

/// `aio_read`.
pub fn read(session: &mut Session, words: &[String]) -> Status {
    let Some((flags, rest)) = Flags::parse(words, READ) else { return Status::Failed };
    let [offset, lengths @ ..] = &rest[..] else { return usage("aio_read") };
    if lengths.is_empty() {
        return usage("aio_read");
    }
    let Some(offset) = buffer::number(offset) else { return Status::Failed };
    let Some((lengths, total)) = buffer::lengths(lengths) else { return Status::Failed };
    if flags.invalid {
        say("injecting invalid read request");
        return Status::Done;
    }
    let vector = buffer::scattered(&lengths, UNREAD, session.misalign);
    let memory = vector.clone();
    start(session, Request::read(offset, vector), move |timed| {
        let Timed { completion, time } = timed;
        match completion.result {
            Err(error) => Some(failed("readv", &error)),
            Ok(_) => {
                let (text, _) = report_read(&flags, (offset, 0, total), &memory, time);
                (!text.is_empty()).then_some(text)
            }
        }
    })
}

/// `aio_write`.
pub fn write(session: &mut Session, words: &[String]) -> Status {
    let Some((flags, rest)) = Flags::parse(words, WRITE) else { return Status::Failed };
    let [offset, lengths @ ..] = &rest[..] else { return usage("aio_write") };
    if lengths.is_empty() {
        return usage("aio_write");
    }
    if flags.zeroes && lengths.len() != 1 {
        say("-z supports only a single length parameter");
        return Status::Failed;
    }
    if flags.unmap && !flags.zeroes {
        say("-u requires -z to be specified");
        return Status::Failed;
    }
    if flags.zeroes && flags.registered {
        say("cannot combine zero write with registered I/O buffer");
        return Status::Failed;
    }
    let Some(offset) = buffer::number(offset) else { return Status::Failed };
    let Some((data, length)) = data(session, &flags, lengths) else { return Status::Failed };
    if flags.invalid {
        say("injecting invalid write request");
        return Status::Done;
    }
    let request = flags.request(offset, data, session.is_writethrough());
    let report = move |timed: Timed| {
        let Timed { completion, time } = timed;
        match completion.result {
            Err(error) => Some(failed("aio_write", &error)),
            Ok(_) if flags.quiet => None,
            Ok(_) => {
                let did = Transferred { verb: "wrote", offset, length, time };
                Some(did.lines(flags.machine))
            }
        }
    };
    if length > Limits::MAX_REQUEST {
        // Longer than a request may be, so in no disk that takes it at once.
        let error = Error::new(ErrorKind::OutOfRange, "a request this long");
        session.report_later(failed("aio_write", &error));
        return Status::Done;
    }
    start(session, request, report)
}

fn start(
    session: &mut Session,
    request: Request,
    report: impl FnOnce(Timed) -> Option<String> + Send + 'static,
) -> Status {
    match session.start(request, report) {
        Ok(()) => Status::Done,
        Err(error) => {
            session.tool.report(error);
            Status::Failed
        }
    }
}

/// What is written, and its length; what is wrong has been told.
fn data(session: &Session, flags: &Flags, lengths: &[String]) -> Option<(Data, u64)> {
    if flags.zeroes {
        let length = buffer::number(lengths.first()?)?;
        return Some((Data::Zeroes(length), length));
    }
    let (lengths, total) = buffer::lengths(lengths)?;
    let byte = flags.pattern.unwrap_or(WRITTEN);
    let vector: IoVector = buffer::scattered(&lengths, byte, session.misalign);
    Some((Data::Bytes(vector), total))
}

/// `aio_flush`.
pub fn flush(session: &mut Session, _words: &[String]) -> Status {
    if session.settle() {
        return Status::Done;
    }
    session.tool.report("a request is suspended at a breakpoint: resume it first");
    Status::Failed
}
