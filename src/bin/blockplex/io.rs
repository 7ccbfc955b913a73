//! `io`: reads, writes and breaks disk images by hand or by script. The options, commands, messages
//! and exit statuses are `qemu-io`'s.
//!
//! ```text
//!   -c COMMAND …, or lines of stdin ──► command: words, table ──► a page of commands
//!                                                                     │
//!   main thread: opens, closes, prints ◄── session: events ── loop thread: requests
//! ```
//!
//! | page | for |
//! |---|---|
//! | [`command`] | the table of commands, and how one is called |
//! | [`session`] | what is open, requests, what runs meanwhile |
//! | [`transfer`] | `read`, `write`, `readv`, `writev` |
//! | [`background`] | `aio_read`, `aio_write`, `aio_flush` |
//! | [`extent`] | `discard`, `alloc`, `map`, `truncate`, `length`, `flush`, `info` |
//! | [`file`] | `open`, `close`, `reopen` |
//! | [`breakpoint`] | `break`, `remove_break`, `resume`, `wait_break` |
//! | [`process`] | `help`, `quit`, `sleep`, `sigraise`, `abort` |
//! | [`zone`] | `zone_*` |
//! | [`report`] | sizes, times, rates and dumps as they are printed |
//! | [`buffer`] | patterns, numbers and memory |
//!
//! Requests run on a loop of their own thread, so what is asynchronous is so. What they have to say
//! is printed by the main thread, when it waits for something: the order of the output is that of
//! the script.

mod background;
mod breakpoint;
mod buffer;
mod command;
mod extent;
mod file;
mod help;
mod process;
mod report;
mod session;
mod transfer;
mod zone;

use std::io::{BufRead, Read};
use std::process::ExitCode;

use crate::tool::getopt::{Opt, Parser, long, long_with, opt, with};
use crate::tool::{Failure, Tool};
use command::Status;
use file::Access;
use report::say;
use session::Session;

/// The longest line of a script, in bytes.
const MAX_LINE: u64 = 1 << 20;

const OPTIONS: &[Opt] = &[
    opt("help", 'h'),
    opt("version", 'V'),
    with("cmd", 'c'),
    with("format", 'f'),
    opt("read-only", 'r'),
    opt("snapshot", 's'),
    opt("nocache", 'n'),
    opt("copy-on-read", 'C'),
    opt("misalign", 'm'),
    opt("native-aio", 'k'),
    with("aio", 'i'),
    with("cache", 't'),
    with("discard", 'd'),
    with("trace", 'T'),
    opt("force-share", 'U'),
    long_with("object"),
    long("image-opts"),
];

/// What the command line asks for.
#[derive(Default)]
struct Arguments {
    commands: Vec<String>,
    access: Access,
    misalign: bool,
}

/// What there is to do, or what was done already.
enum Plan {
    Run(Arguments),
    Done(ExitCode),
}

/// Runs the tool.
pub fn run(tool: Tool, words: Vec<String>) -> ExitCode {
    let status = exercise(tool, words);
    report::flush();
    status
}

fn exercise(mut tool: Tool, words: Vec<String>) -> ExitCode {
    let plan = match parse(&mut tool, words) {
        Ok(plan) => plan,
        Err(failure) => {
            failure.print(&tool, None);
            return ExitCode::FAILURE;
        }
    };
    let arguments = match plan {
        Plan::Run(arguments) => arguments,
        Plan::Done(status) => return status,
    };
    let mut session = match Session::new(tool, arguments.access.image_opts, arguments.misalign) {
        Ok(session) => session,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::FAILURE;
        }
    };
    if arguments.access.file.is_some() && session.open(arguments.access) == Status::Failed {
        return ExitCode::FAILURE;
    }
    let succeeded = if arguments.commands.is_empty() {
        run_script(&mut session)
    } else {
        run_commands(&mut session, &arguments.commands)
    };
    let closed = session.finish();
    if succeeded && closed { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn parse(tool: &mut Tool, words: Vec<String>) -> Result<Plan, Failure> {
    let words = tool.take_policy(words)?;
    let mut parser = Parser::new(tool.name(), None, OPTIONS, words);
    let mut arguments = Arguments::default();
    loop {
        let option = match parser.next() {
            Ok(Some(option)) => option,
            Ok(None) => break,
            Err(_) => {
                print!("{}", help::usage(tool.name()));
                return Ok(Plan::Done(ExitCode::FAILURE));
            }
        };
        match option.name {
            "help" => {
                print!("{}", help::usage(tool.name()));
                return Ok(Plan::Done(ExitCode::SUCCESS));
            }
            "version" => {
                say(format!("{} version {} (Blockplex)", tool.name(), env!("CARGO_PKG_VERSION")));
                return Ok(Plan::Done(ExitCode::SUCCESS));
            }
            "cmd" => arguments.commands.push(option.value),
            "misalign" => arguments.misalign = true,
            "trace" => warn_of_trace(tool, &option.value),
            "object" => tool.add_object(&option.value)?,
            "image-opts" => arguments.access.image_opts = true,
            "format" => arguments.access.format = Some(option.value),
            name => arguments.access.set(name, &option.value)?,
        }
    }
    let mut files = parser.positional();
    if files.len() > 1 {
        print!("{}", help::usage(tool.name()));
        return Ok(Plan::Done(ExitCode::FAILURE));
    }
    arguments.access.file = files.pop();
    if arguments.access.format.is_some() && arguments.access.image_opts {
        return Err(Failure::new("--image-opts and -f are mutually exclusive"));
    }
    Ok(Plan::Run(arguments))
}

/// There are no trace events of that kind: what happens is told by `RUST_LOG`.
fn warn_of_trace(tool: &Tool, value: &str) {
    for part in value.split(',') {
        let pattern = part.strip_prefix("enable=").unwrap_or(part);
        match pattern.split_once('=') {
            Some((what @ ("events" | "file"), _)) => {
                tool.warn(format!("trace option '{what}' is not supported (RUST_LOG is)"));
            }
            _ => tool.warn(format!("trace event '{pattern}' does not exist")),
        }
    }
}

/// Runs the commands of the command line; whether all succeeded.
fn run_commands(session: &mut Session, commands: &[String]) -> bool {
    let mut succeeded = true;
    for line in commands {
        match command::run(session, line) {
            Status::Done => {}
            Status::Failed => succeeded = false,
            Status::Quit => break,
        }
    }
    succeeded
}

/// Runs the lines of stdin; whether all succeeded.
fn run_script(session: &mut Session) -> bool {
    let mut stdin = std::io::stdin().lock();
    let mut succeeded = true;
    loop {
        session.print_events(false);
        report::prompt(session.tool.name());
        let mut line = Vec::new();
        match (&mut stdin).take(MAX_LINE).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => break,
            Ok(_) => {}
        }
        let line = String::from_utf8_lossy(&line);
        match command::run(session, line.trim_end_matches(['\n', '\r'])) {
            Status::Done => {}
            Status::Failed => succeeded = false,
            Status::Quit => break,
        }
    }
    // A prompt may stand there.
    report::flush();
    succeeded
}
