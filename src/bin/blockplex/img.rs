//! `img`: disk images made, examined, changed. The commands, options, messages and exit statuses
//! are `qemu-img`'s.
//!
//! Each command is a page of its own, with a [`Command`] that stands in [`COMMANDS`].

mod amend;
mod bench;
mod bitmap;
mod check;
mod commit;
mod compare;
mod convert;
mod create;
mod dd;
mod disk;
pub mod info;
mod lanes;
mod map;
mod measure;
mod progress;
mod rate;
mod rebase;
mod resize;
mod snapshot;
mod snapshot_list;
mod source;
mod turn;
mod zeroes;

use std::process::ExitCode;

use crate::tool::getopt::{Opt, Parser, opt, with};
use crate::tool::{Failure, Tool};

/// A subcommand.
pub struct Command {
    /// Its name.
    pub name: &'static str,
    /// What `--help` prints, with `{tool}` for the program's name.
    pub help: &'static str,
    /// Does it; `words` are those after the name.
    pub run: fn(tool: &mut Tool, words: Vec<String>) -> Result<u8, Failure>,
    /// One line about it.
    pub summary: &'static str,
}

const COMMANDS: &[Command] = &[
    amend::COMMAND,
    bench::COMMAND,
    bitmap::COMMAND,
    check::COMMAND,
    commit::COMMAND,
    compare::COMMAND,
    convert::COMMAND,
    create::COMMAND,
    dd::COMMAND,
    info::COMMAND,
    map::COMMAND,
    measure::COMMAND,
    rebase::COMMAND,
    resize::COMMAND,
    snapshot::COMMAND,
];

const OPTIONS: &[Opt] = &[opt("help", 'h'), opt("version", 'V'), with("trace", 'T')];

/// Runs the command that `words` say.
pub fn run(mut tool: Tool, words: Vec<String>) -> ExitCode {
    let mut command = None;
    match dispatch(&mut tool, words, &mut command) {
        Ok(status) => ExitCode::from(status),
        Err(failure) => {
            failure.print(&tool, command);
            ExitCode::from(failure.status)
        }
    }
}

fn dispatch(
    tool: &mut Tool,
    words: Vec<String>,
    command: &mut Option<&'static str>,
) -> Result<u8, Failure> {
    let words = tool.take_policy(words)?;
    let mut parser = Parser::new(tool.name(), None, OPTIONS, words).ordered();
    if let Some(option) = parser.next()? {
        match option.name {
            "help" => return print_help(tool),
            "version" => return print_version(tool),
            _ => {
                return Err(Failure::new(
                    "-T: tracing by event names is not supported (RUST_LOG is)",
                ));
            }
        }
    }
    let mut words = parser.positional();
    if words.is_empty() {
        return Err(Failure::usage("Not enough arguments"));
    }
    let rest = words.split_off(1);
    let name = words.pop().unwrap_or_default();
    let found = COMMANDS.iter().find(|command| command.name == name);
    let found = found.ok_or_else(|| Failure::usage(format!("Command not found: {name}")))?;
    *command = Some(found.name);
    (found.run)(tool, rest)
}

/// What a command does with `--help`.
pub fn print_command_help(tool: &Tool, command: &Command) -> Result<u8, Failure> {
    print!("{}", command.help.replace("{tool}", tool.name()));
    Ok(0)
}

fn print_help(tool: &Tool) -> Result<u8, Failure> {
    print_version(tool)?;
    let name = tool.name();
    println!("Disk image utility.\n");
    println!("Usage: {name} [OPTIONS] COMMAND [--help | ARGUMENTS]\n");
    println!("  -h, --help                    print this help and exit");
    println!("  -V, --version                 print the version and exit");
    println!("      --allow DIR|PROTOCOL      let images open files there, or by that protocol");
    println!("      --trust-images            let images open whatever they name\n");
    println!("Commands:");
    for command in COMMANDS {
        println!("  {:10} {}", command.name, command.summary);
    }
    Ok(0)
}

fn print_version(tool: &Tool) -> Result<u8, Failure> {
    println!("{} version {} (Blockplex)", tool.name(), env!("CARGO_PKG_VERSION"));
    Ok(0)
}

/// The status of a command that did what it was told.
pub const DONE: u8 = 0;

/// The value of `--output`: whether it is `json`.
pub fn wants_json(value: &str) -> Result<bool, Failure> {
    match value {
        "human" => Ok(false),
        "json" => Ok(true),
        other => Err(Failure::usage(format!("--output expects 'human' or 'json' not '{other}'"))),
    }
}

/// The one file name that a command expects.
pub fn one_file(words: Vec<String>) -> Result<String, Failure> {
    let [file]: [String; 1] =
        words.try_into().map_err(|_| Failure::usage("Expecting one image file name"))?;
    Ok(file)
}
