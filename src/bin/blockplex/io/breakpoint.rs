//! `break`, `remove_break`, `resume`, `wait_break`: requests that wait for each other at a
//! `blkdebug` node.

use blockplex::drivers::blkdebug::{Blkdebug, BreakpointError};
use blockplex::graph::DebugEvent;

use super::command::Status;
use super::report::say;
use super::session::{OpenFile, Session};
use crate::tool::message::strerror;

/// Does something with the breakpoints; says `what` could not be done, where it could not.
fn with(
    session: &Session,
    what: &str,
    work: impl FnOnce(&Blkdebug) -> Result<(), BreakpointError>,
) -> Status {
    let view = session.file.as_ref().and_then(OpenFile::blkdebug);
    let errno = match view.as_ref().and_then(|view| view.driver_as::<Blkdebug>()) {
        None => libc::ENOTSUP,
        Some(blkdebug) => match work(blkdebug) {
            Ok(()) => return Status::Done,
            Err(BreakpointError) => libc::ENOENT,
        },
    };
    say(format!("Could not {what}: {}", strerror(errno)));
    Status::Failed
}

/// `break`.
pub fn set(session: &mut Session, words: &[String]) -> Status {
    let [_, event, tag] = words else { return Status::Failed };
    with(session, "set breakpoint", |blkdebug| {
        let event = DebugEvent::parse(event).ok_or(BreakpointError)?;
        blkdebug.break_at(event, tag);
        Ok(())
    })
}

/// `remove_break`.
pub fn remove(session: &mut Session, words: &[String]) -> Status {
    let [_, tag] = words else { return Status::Failed };
    with(session, &format!("remove breakpoint {tag}"), |blkdebug| blkdebug.remove_break(tag))
}

/// `resume`.
pub fn resume(session: &mut Session, words: &[String]) -> Status {
    let [_, tag] = words else { return Status::Failed };
    with(session, "resume request", |blkdebug| blkdebug.resume(tag))
}

/// `wait_break`.
pub fn wait(session: &mut Session, words: &[String]) -> Status {
    let [_, tag] = words else { return Status::Failed };
    if session.wait_suspended(tag) {
        return Status::Done;
    }
    session.tool.report(format!("no request is left that could be suspended as '{tag}'"));
    Status::Failed
}
