//! The table of commands, and how one is called.
//!
//! A line is split at spaces; there are no quotes. The first word names the command, by its name or
//! by its short one.

use super::session::Session;
use super::{background, breakpoint, extent, file, process, transfer, zone};
use crate::io::report::say;

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Well.
    Done,
    /// Not well; it has been said why.
    Failed,
    /// Nothing more is to be run.
    Quit,
}

/// A command.
pub struct Command {
    pub name: &'static str,
    /// Its short name; empty without one.
    pub alias: &'static str,
    /// The fewest words after the name.
    pub min: usize,
    /// The most; none without a bound.
    pub max: Option<usize>,
    /// Its arguments, for the help.
    pub arguments: Option<&'static str>,
    pub summary: &'static str,
    /// It makes no sense without an open file.
    pub needs_file: bool,
    /// It needs a file that may be written.
    pub writes: bool,
    /// Does it; `words` begin with the name by which it was called.
    pub run: fn(&mut Session, words: &[String]) -> Status,
}

impl Command {
    /// The line about it in the help; `name` is what it was called.
    pub fn line(&self, name: &str) -> String {
        match self.arguments {
            Some(arguments) => format!("{name} {arguments} -- {}", self.summary),
            None => format!("{name} -- {}", self.summary),
        }
    }
}

/// Says how the command of that name is used, and that it was used otherwise.
pub fn usage(name: &str) -> Status {
    if let Some(command) = find(name) {
        say(command.line(command.name));
    }
    Status::Failed
}

/// The command of that name.
pub fn find(name: &str) -> Option<&'static Command> {
    let is_called = |command: &&Command| command.name == name || command.alias == name;
    COMMANDS.iter().find(is_called).filter(|_| !name.is_empty())
}

/// Runs one line.
pub fn run(session: &mut Session, line: &str) -> Status {
    let words: Vec<String> =
        line.split(' ').filter(|word| !word.is_empty()).map(str::to_owned).collect();
    let Some(name) = words.first() else { return Status::Done };
    let Some(command) = find(name) else {
        eprintln!("command \"{name}\" not found");
        return Status::Failed;
    };
    if command.needs_file && !session.has_file() {
        eprintln!("no file open, try 'help open'");
        return Status::Failed;
    }
    let count = words.len() - 1;
    if count < command.min || command.max.is_some_and(|max| count > max) {
        eprintln!("bad argument count {count} to {name}, expected {}", expected(command));
        return Status::Failed;
    }
    if command.writes && session.is_read_only() {
        session.tool.report("Block node is read-only");
        return Status::Failed;
    }
    let status = (command.run)(session, &words);
    session.print_events(false);
    status
}

fn expected(command: &Command) -> String {
    match command.max {
        None => format!("at least {} arguments", command.min),
        Some(max) if max == command.min => format!("{max} arguments"),
        Some(max) => format!("between {} and {max} arguments", command.min),
    }
}

/// What most commands have in common.
const PLAIN: Command = Command {
    name: "",
    alias: "",
    min: 0,
    max: Some(0),
    arguments: None,
    summary: "",
    needs_file: true,
    writes: false,
    run: process::quit,
};

/// All commands, in the order of their names.
pub const COMMANDS: &[Command] = &[
    Command {
        name: "abort",
        needs_file: false,
        summary: "simulate a program crash using abort(3)",
        run: process::abort,
        ..PLAIN
    },
    Command {
        name: "aio_flush",
        summary: "completes all outstanding aio requests",
        run: background::flush,
        ..PLAIN
    },
    Command {
        name: "aio_read",
        min: 2,
        max: None,
        arguments: Some("[-Ciqrv] [-P pattern] off len [len..]"),
        summary: "asynchronously reads a number of bytes",
        run: background::read,
        ..PLAIN
    },
    Command {
        name: "aio_write",
        min: 2,
        max: None,
        arguments: Some("[-Cfiqruz] [-P pattern] off len [len..]"),
        summary: "asynchronously writes a number of bytes",
        writes: true,
        run: background::write,
        ..PLAIN
    },
    Command {
        name: "alloc",
        alias: "a",
        min: 1,
        max: Some(2),
        arguments: Some("offset [count]"),
        summary: "checks if offset is allocated in the file",
        run: extent::alloc,
        ..PLAIN
    },
    Command {
        name: "break",
        min: 2,
        max: Some(2),
        arguments: Some("event tag"),
        summary: "sets a breakpoint on event and tags the stopped request as tag",
        run: breakpoint::set,
        ..PLAIN
    },
    Command {
        name: "close",
        alias: "c",
        summary: "close the current open file",
        run: file::close,
        ..PLAIN
    },
    Command {
        name: "discard",
        alias: "d",
        min: 2,
        max: None,
        arguments: Some("[-Cq] off len"),
        summary: "discards a number of bytes at a specified offset",
        writes: true,
        run: extent::discard,
        ..PLAIN
    },
    Command {
        name: "flush",
        alias: "f",
        summary: "flush all in-core file state to disk",
        run: extent::flush,
        ..PLAIN
    },
    Command {
        name: "help",
        alias: "?",
        max: Some(1),
        needs_file: false,
        arguments: Some("[command]"),
        summary: "help for one or all commands",
        run: process::help,
        ..PLAIN
    },
    Command {
        name: "info",
        alias: "i",
        summary: "prints information about the current file",
        run: extent::info,
        ..PLAIN
    },
    Command {
        name: "length",
        alias: "l",
        summary: "gets the length of the current file",
        run: extent::length,
        ..PLAIN
    },
    Command {
        name: "map",
        arguments: Some(""),
        summary: "prints the allocated areas of a file",
        run: extent::map,
        ..PLAIN
    },
    Command {
        name: "open",
        alias: "o",
        min: 1,
        max: None,
        needs_file: false,
        arguments: Some("[-rsCnkU] [-t cache] [-d discard] [-o options] [path]"),
        summary: "open the file specified by path",
        run: file::open,
        ..PLAIN
    },
    Command {
        name: "quit",
        alias: "q",
        max: None,
        needs_file: false,
        summary: "exit the program",
        run: process::quit,
        ..PLAIN
    },
    Command {
        name: "read",
        alias: "r",
        min: 2,
        max: None,
        arguments: Some("[-abCqrv] [-P pattern [-s off] [-l len]] off len"),
        summary: "reads a number of bytes at a specified offset",
        run: transfer::read,
        ..PLAIN
    },
    Command {
        name: "readv",
        min: 2,
        max: None,
        arguments: Some("[-Cqrv] [-P pattern] off len [len..]"),
        summary: "reads a number of bytes at a specified offset",
        run: transfer::read_vector,
        ..PLAIN
    },
    Command {
        name: "remove_break",
        min: 1,
        max: Some(1),
        arguments: Some("tag"),
        summary: "remove a breakpoint by tag",
        run: breakpoint::remove,
        ..PLAIN
    },
    Command {
        name: "reopen",
        max: None,
        arguments: Some("[(-r|-w)] [-c cache] [-o options]"),
        summary: "reopens an image with new options",
        run: file::reopen,
        ..PLAIN
    },
    Command {
        name: "resume",
        min: 1,
        max: Some(1),
        arguments: Some("tag"),
        summary: "resumes the request tagged as tag",
        run: breakpoint::resume,
        ..PLAIN
    },
    Command {
        name: "sigraise",
        min: 1,
        max: Some(1),
        needs_file: false,
        arguments: Some("signal"),
        summary: "raises a signal",
        run: process::raise,
        ..PLAIN
    },
    Command {
        name: "sleep",
        min: 1,
        max: Some(1),
        needs_file: false,
        summary: "waits for the given value in milliseconds",
        run: process::sleep,
        ..PLAIN
    },
    Command {
        name: "truncate",
        alias: "t",
        min: 1,
        max: Some(3),
        arguments: Some("[-m prealloc_mode] off"),
        summary: "truncates the current file at the given offset",
        writes: true,
        run: extent::truncate,
        ..PLAIN
    },
    Command {
        name: "wait_break",
        min: 1,
        max: Some(1),
        arguments: Some("tag"),
        summary: "waits for the suspension of a request",
        run: breakpoint::wait,
        ..PLAIN
    },
    Command {
        name: "write",
        alias: "w",
        min: 2,
        max: None,
        arguments: Some("[-bcCfnqruz] [-P pattern | -s source_file] off len"),
        summary: "writes a number of bytes at a specified offset",
        writes: true,
        run: transfer::write,
        ..PLAIN
    },
    Command {
        name: "writev",
        min: 2,
        max: None,
        arguments: Some("[-Cfqr] [-P pattern] off len [len..]"),
        summary: "writes a number of bytes at a specified offset",
        writes: true,
        run: transfer::write_vector,
        ..PLAIN
    },
    Command {
        name: "zone_append",
        alias: "zap",
        min: 3,
        max: Some(4),
        arguments: Some("offset len [len..]"),
        summary: "append write a number of bytes at a specified offset",
        writes: true,
        run: zone::append,
        ..PLAIN
    },
    Command {
        name: "zone_close",
        alias: "zc",
        min: 2,
        max: Some(2),
        arguments: Some("offset len"),
        summary: "close a range of zones in zone block device",
        run: zone::close,
        ..PLAIN
    },
    Command {
        name: "zone_finish",
        alias: "zf",
        min: 2,
        max: Some(2),
        arguments: Some("offset len"),
        summary: "finish a range of zones in zone block device",
        run: zone::finish,
        ..PLAIN
    },
    Command {
        name: "zone_open",
        alias: "zo",
        min: 2,
        max: Some(2),
        arguments: Some("offset len"),
        summary: "explicit open a range of zones in zone block device",
        run: zone::open,
        ..PLAIN
    },
    Command {
        name: "zone_report",
        alias: "zrp",
        min: 2,
        max: Some(2),
        arguments: Some("offset number"),
        summary: "report zone information",
        run: zone::report,
        ..PLAIN
    },
    Command {
        name: "zone_reset",
        alias: "zrs",
        min: 2,
        max: Some(2),
        arguments: Some("offset len"),
        summary: "reset a zone write pointer in zone block device",
        run: zone::reset,
        ..PLAIN
    },
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_sorted_and_no_two_commands_share_one() {
        let names: Vec<&str> = COMMANDS.iter().map(|command| command.name).collect();
        assert!(names.is_sorted());
        let mut all = names.clone();
        all.extend(COMMANDS.iter().map(|command| command.alias).filter(|name| !name.is_empty()));
        let distinct: std::collections::BTreeSet<&str> = all.iter().copied().collect();
        assert_eq!(distinct.len(), all.len());
        assert!(find("").is_none() && find("r").is_some_and(|command| command.name == "read"));
    }

    #[test]
    fn a_line_about_a_command_begins_with_what_it_was_called() {
        assert_eq!(
            find("a").unwrap().line("a"),
            "a offset [count] -- checks if offset is allocated in the file"
        );
        assert_eq!(
            find("map").unwrap().line("map"),
            "map  -- prints the allocated areas of a file"
        );
    }
}
