//! The `blockplex` program: measure an image (`bench`), or try to break it
//! (`stress`), through the same library an embedder uses; and the image tools
//! that everybody knows, `blockplex img` and `blockplex io`.
//!
//! Called through a link named `qemu-img` or `qemu-io`, the program is that
//! tool and calls itself so. `img` and `io` have their own pages, options,
//! messages and statuses; what follows is about the others.
//!
//! `command_line` turns arguments into checked options, `bench` and `stress`
//! do the work, and this page only sends one to the other and turns what went
//! wrong into a message and an exit status:
//!
//! | status | meaning |
//! |---|---|
//! | 0 | done |
//! | 1 | it could not be done, or a stress run found a mismatch; the reason is on stderr after `blockplex: ` |
//! | 2 | the arguments make no sense (printed by clap) |
//!
//! Results go to stdout, everything else to stderr.

mod bench;
mod command_line;
mod images;
mod img;
mod io;
mod random;
mod stress;
mod tool;
mod units;

use std::error::Error;
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use command_line::Command;
use tool::Tool;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

fn main() -> ExitCode {
    if let Some(status) = run_tool(std::env::args_os()) {
        return status;
    }
    let command = match command_line::parse(std::env::args_os()) {
        Ok(command) => command,
        // Help and version end here as well; clap knows their stream and status.
        Err(error) => error.exit(),
    };
    install_log(LevelFilter::WARN);
    let outcome = match &command {
        Command::Bench(options) => bench::run::run(options).map(|()| ExitCode::SUCCESS),
        Command::Stress(options) => stress::run::run(options),
    };
    match outcome {
        Ok(status) => status,
        Err(error) if is_broken_pipe(error.as_ref()) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("blockplex: {}", message(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

/// An image tool: its subcommand, the name of its link, and what runs it.
type ImageTool = (&'static str, &'static str, fn(Tool, Vec<String>) -> ExitCode);

const IMAGE_TOOLS: &[ImageTool] = &[("img", "qemu-img", img::run), ("io", "qemu-io", io::run)];

/// Runs the image tool that the arguments call, if they call one.
fn run_tool(mut words: impl Iterator<Item = OsString>) -> Option<ExitCode> {
    let program = PathBuf::from(words.next()?);
    let link = program.file_name()?.to_str()?;
    let (name, run) = match IMAGE_TOOLS.iter().find(|(_, name, _)| *name == link) {
        Some((_, name, run)) => ((*name).to_owned(), run),
        None => {
            let word = words.next()?;
            let found = IMAGE_TOOLS.iter().find(|(name, ..)| word == *name);
            found.map(|(name, _, run)| (format!("blockplex {name}"), run))?
        }
    };
    // What they print is compared with what QEMU's tools print.
    tool::log::install();
    end_with_the_reader();
    let words: Option<Vec<String>> = words.map(|word| word.into_string().ok()).collect();
    let Some(words) = words else {
        eprintln!("{name}: an argument is not valid UTF-8");
        return Some(ExitCode::FAILURE);
    };
    Some(run(Tool::new(name), words))
}

/// Has a broken pipe end the program without a word, as it ends QEMU's tools: nobody reads what they
/// print any more. (`println!` panics on it, and Rust programs ignore the signal.)
fn end_with_the_reader() {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let text = panic.payload().downcast_ref::<String>().map_or("", String::as_str);
        if text.starts_with("failed printing to stdout") && text.contains("Broken pipe") {
            std::process::exit(1);
        }
        hook(panic);
    }));
}

/// What the library has to say from `level` on goes to stderr; `RUST_LOG` asks for more or less.
fn install_log(level: LevelFilter) {
    let filter = EnvFilter::builder().with_default_directive(level.into()).from_env_lossy();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
}

/// Whether the reader of our output went away: nobody is left to tell.
fn is_broken_pipe(error: &(dyn Error + 'static)) -> bool {
    error
        .downcast_ref::<std::io::Error>()
        .is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}

/// An error and its sources in one line, outermost first.
fn message(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let part = error.to_string();
        // Some errors quote their source themselves; do not say it twice.
        if !text.ends_with(&part) {
            text.push_str(": ");
            text.push_str(&part);
        }
        source = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Outer(std::io::Error, &'static str);

    impl std::fmt::Display for Outer {
        fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            formatter.write_str(self.1)
        }
    }

    impl Error for Outer {
        fn source(&self) -> Option<&(dyn Error + 'static)> {
            Some(&self.0)
        }
    }

    #[test]
    fn a_message_names_the_source_once() {
        let plain = Outer(std::io::Error::other("no such disk"), "cannot open a.qcow2");
        assert_eq!(message(&plain), "cannot open a.qcow2: no such disk");
        let quoting = Outer(std::io::Error::other("no such disk"), "a.qcow2: no such disk");
        assert_eq!(message(&quoting), "a.qcow2: no such disk");
    }

    #[test]
    fn only_a_broken_pipe_is_silent() {
        assert!(is_broken_pipe(&std::io::Error::from(std::io::ErrorKind::BrokenPipe)));
        assert!(!is_broken_pipe(&std::io::Error::from(std::io::ErrorKind::NotFound)));
    }
}
