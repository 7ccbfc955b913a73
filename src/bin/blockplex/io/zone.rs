//! `zone_*`: commands for zoned block devices. No driver here knows zones, so each of them reads its
//! arguments and then says that.

use super::buffer;
use super::command::Status;
use super::report::say;
use super::session::Session;
use crate::tool::message::strerror;

fn refuse(what: &str, numbers: &[String]) -> Status {
    if numbers.iter().all(|word| buffer::number(word).is_some()) {
        say(format!("zone {what} failed: {}", strerror(libc::ENOTSUP)));
    }
    Status::Failed
}

/// `zone_report`.
pub fn report(_session: &mut Session, words: &[String]) -> Status {
    refuse("report", &words[1..])
}

/// `zone_open`.
pub fn open(_session: &mut Session, words: &[String]) -> Status {
    refuse("open", &words[1..])
}

/// `zone_close`.
pub fn close(_session: &mut Session, words: &[String]) -> Status {
    refuse("close", &words[1..])
}

/// `zone_finish`.
pub fn finish(_session: &mut Session, words: &[String]) -> Status {
    refuse("finish", &words[1..])
}

/// `zone_reset`.
pub fn reset(_session: &mut Session, words: &[String]) -> Status {
    refuse("reset", &words[1..])
}

/// `zone_append`.
pub fn append(_session: &mut Session, words: &[String]) -> Status {
    let numbers = words[1..].iter().filter(|word| *word != "-p").cloned().collect::<Vec<_>>();
    refuse("append", &numbers)
}
