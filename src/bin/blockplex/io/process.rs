//! `help`, `quit`, `sleep`, `sigraise`, `abort`.

use std::time::Duration;

use super::buffer;
use super::command::{COMMANDS, Status, find};
use super::help;
use super::report::{self, say};
use super::session::Session;

/// `help`.
pub fn help(_session: &mut Session, words: &[String]) -> Status {
    let Some(name) = words.get(1) else {
        for command in COMMANDS {
            say(command.line(command.name));
        }
        say("\nUse 'help commandname' for extended help.");
        return Status::Done;
    };
    let Some(command) = find(name) else {
        say(format!("command {name} not found"));
        return Status::Failed;
    };
    say(command.line(name));
    if let Some(text) = help::of(command.name) {
        say(text);
    }
    Status::Done
}

/// `quit`.
pub fn quit(_session: &mut Session, _words: &[String]) -> Status {
    Status::Quit
}

/// `sleep`.
pub fn sleep(session: &mut Session, words: &[String]) -> Status {
    let Some(word) = words.get(1) else { return Status::Failed };
    let time = buffer::integer(word).and_then(|number| u64::try_from(number).ok());
    let Some(milliseconds) = time else {
        say(format!("{word} is not a valid number"));
        return Status::Failed;
    };
    session.sleep(Duration::from_millis(milliseconds));
    Status::Done
}

/// `sigraise`.
pub fn raise(_session: &mut Session, words: &[String]) -> Status {
    let Some(word) = words.get(1) else { return Status::Failed };
    let Some(number) = buffer::number(word) else { return Status::Failed };
    // The kernel's signals are 1 to 64; 0 only asks.
    if number > 64 {
        say(format!("signal argument '{word}' is too large to be a valid signal"));
        return Status::Failed;
    }
    report::flush();
    let Some(signal) = rustix::process::Signal::from_named_raw(number as i32) else {
        if number > 0 {
            say(format!("signal {number} cannot be raised"));
        }
        return Status::Done;
    };
    if let Err(error) = rustix::process::kill_process(rustix::process::getpid(), signal) {
        say(format!("signal {number}: {error}"));
        return Status::Failed;
    }
    Status::Done
}

/// `abort`: what was printed into a pipe or file is lost, as it is with QEMU's tool.
pub fn abort(_session: &mut Session, _words: &[String]) -> Status {
    std::process::abort()
}
