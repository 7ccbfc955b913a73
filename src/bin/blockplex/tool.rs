//! What `img` and `io` share: one program under several names.
//!
//! | page | for |
//! |---|---|
//! | here | [`Tool`] (name, policy, secrets, the layer), [`Failure`] (what ends a command) |
//! | [`getopt`] | [`Parser`](getopt::Parser): options in the manner of `getopt_long` |
//! | [`open`] | [`ImageOpenOptions`](open::ImageOpenOptions), [`Tool::open`], [`Image`](open::Image) |
//! | [`create`] | [`Tool::create_image`], the options of each format |
//! | [`size`] | sizes as QEMU's tools read and print them |
//! | [`names`] | the names by which images and files are shown |
//! | [`json`] | JSON as QEMU's tools print it |
//! | [`option_list`] | `-o key=value,…` |
//! | [`objects`] | `--object secret,…` |
//! | [`message`] | the library's errors in the words of QEMU's tools |
//!
//! A command is a function `fn(&mut Tool, Vec<String>) -> Result<u8, Failure>`: what it prints on
//! stdout and stderr, and its status, are those of QEMU's program of the same name. To open an
//! image:
//!
//! ```ignore
//! let image = tool.open(&ImageOpenOptions { write: true, ..ImageOpenOptions::new(name) })?;
//! let disk = image.backend.blocking();            // or image.backend.queue(…) on a loop
//! image.close()?;
//! ```
//!
//! # What images may open
//!
//! A backing file that is a local file or block device, for reading; a data file in the image's own
//! directory. More with `--allow DIRECTORY|PROTOCOL` (may be repeated), everything with
//! `--trust-images` or `BLOCKPLEX_TRUST_IMAGES=1`. These options are accepted by every command, are
//! spelt in full, and end at `--`.

pub mod create;
pub mod getopt;
pub mod json;
pub mod log;
pub mod message;
pub mod names;
pub mod objects;
pub mod open;
pub mod option_list;
pub mod size;

use blockplex::drivers::crypto::Secrets;
use blockplex::{Blockplex, ErrorKind, OpenGate, block_on};
use std::cell::OnceCell;
use std::fmt::Display;
use std::future::Future;
use std::path::Path;

/// The status of a command that failed.
pub const FAILED: u8 = 1;

/// A command's end before its time.
#[derive(Debug, PartialEq, Eq)]
pub struct Failure {
    /// The exit status.
    pub status: u8,
    /// What kind of error of the library it is, where it is one.
    pub kind: Option<ErrorKind>,
    /// What to say, after the program's name.
    text: Option<String>,
    /// Whether the command's `--help` is pointed to.
    hint: bool,
}

impl Failure {
    /// Ends with status 1 and `text`.
    pub fn new(text: impl Into<String>) -> Failure {
        Failure { status: FAILED, kind: None, text: Some(text.into()), hint: false }
    }

    /// Ends with status 1, `text`, and where to find help.
    pub fn usage(text: impl Into<String>) -> Failure {
        Failure { status: FAILED, kind: None, text: Some(text.into()), hint: true }
    }

    /// Ends with a status; all has been said.
    pub fn silent(status: u8) -> Failure {
        Failure { status, kind: None, text: None, hint: false }
    }

    /// Ends with status 1 and where to find help; the rest has been said.
    pub fn hint() -> Failure {
        Failure { status: FAILED, kind: None, text: None, hint: true }
    }

    /// The same with another status.
    #[must_use]
    pub fn with_status(self, status: u8) -> Failure {
        Failure { status, ..self }
    }

    /// The same with `before` in front of the text.
    #[must_use]
    pub fn prefixed(self, before: &str) -> Failure {
        Failure { text: self.text.map(|text| format!("{before}{text}")), ..self }
    }

    /// The same with another text.
    #[must_use]
    pub fn map(self, change: impl FnOnce(String) -> String) -> Failure {
        Failure { text: self.text.map(change), ..self }
    }

    /// What it says.
    pub fn text(&self) -> Option<&str> {
        self.text.as_deref()
    }

    /// Prints it. `command` is the subcommand, for the hint.
    pub fn print(&self, tool: &Tool, command: Option<&str>) {
        if let Some(text) = &self.text {
            tool.report(text);
        }
        if self.hint {
            let command = command.map_or_else(String::new, |command| format!(" {command}"));
            eprintln!("Try '{}{command} --help' for more info", tool.name());
        }
    }
}

impl From<blockplex::Error> for Failure {
    fn from(error: blockplex::Error) -> Failure {
        let failure = Failure::new(message::describe(&error));
        Failure { kind: Some(error.kind()), ..failure }
    }
}

/// One run of a tool.
pub struct Tool {
    name: String,
    allowed: Vec<String>,
    trust_images: bool,
    /// The secrets that `--object` gave.
    pub secrets: Secrets,
    layer: OnceCell<Blockplex>,
}

impl Tool {
    /// A tool that calls itself `name` in messages (`qemu-img`, `blockplex img`).
    pub fn new(name: impl Into<String>) -> Tool {
        let trust = std::env::var_os("BLOCKPLEX_TRUST_IMAGES").is_some_and(|value| value == "1");
        Tool {
            name: name.into(),
            allowed: Vec::new(),
            trust_images: trust,
            secrets: Secrets::default(),
            layer: OnceCell::new(),
        }
    }

    /// Whether images may open whatever they name.
    pub fn trusts_images(&self) -> bool {
        self.trust_images
    }

    /// What the program was called by.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Takes the options that say what images may open out of `words`.
    ///
    /// # Errors
    ///
    /// `--allow` without a value.
    pub fn take_policy(&mut self, words: Vec<String>) -> Result<Vec<String>, Failure> {
        let mut left = Vec::with_capacity(words.len());
        let mut words = words.into_iter();
        while let Some(word) = words.next() {
            if word == "--" {
                left.push(word);
                left.extend(words);
                break;
            } else if word == "--trust-images" {
                self.trust_images = true;
            } else if let Some(value) = word.strip_prefix("--allow=") {
                self.allowed.push(value.to_owned());
            } else if word == "--allow" {
                let value = words.next();
                let value =
                    value.ok_or_else(|| Failure::usage("option '--allow' requires an argument"))?;
                self.allowed.push(value);
            } else {
                left.push(word);
            }
        }
        Ok(left)
    }

    /// The gate for the image in `directory`.
    ///
    /// # Errors
    ///
    /// What `--allow` named is neither a directory nor a protocol.
    pub fn gate(&self, directory: Option<&Path>) -> Result<OpenGate, Failure> {
        let fail = |what: &str, error| Failure::new(format!("--allow '{what}': {error}"));
        let gate = OpenGate::deny_all().allow_reading("/").map_err(|error| fail("/", error))?;
        let mut gate = gate.allow_block_devices().allow_file_prefix();
        if self.trust_images {
            let whole = gate.trust_images().allow_directory("/");
            gate = whole.map_err(|error| fail("/", error))?;
        }
        // A directory that cannot be opened has no data files for us either.
        if let Some(directory) = directory
            && let Ok(wider) = gate.clone().allow_directory(directory)
        {
            gate = wider;
        }
        for allowed in &self.allowed {
            let result = if Path::new(allowed).is_dir() {
                gate.allow_directory(allowed)
            } else {
                gate.allow_protocol(allowed)
            };
            gate = result.map_err(|error| fail(allowed, error))?;
        }
        Ok(gate)
    }

    /// The layer in which images are opened.
    ///
    /// # Errors
    ///
    /// Its control thread does not start.
    pub fn layer(&self) -> Result<&Blockplex, Failure> {
        if let Some(layer) = self.layer.get() {
            return Ok(layer);
        }
        let layer = Blockplex::new()?;
        Ok(self.layer.get_or_init(|| layer))
    }

    /// Prints a message on stderr, after the program's name.
    pub fn report(&self, text: impl Display) {
        eprintln!("{}: {text}", self.name);
    }

    /// Prints a warning on stderr, after the program's name.
    pub fn warn(&self, text: impl Display) {
        eprintln!("{}: warning: {text}", self.name);
    }
}

/// Waits for the control plane.
///
/// # Errors
///
/// What the work says.
pub fn wait<T>(work: impl Future<Output = blockplex::Result<T>>) -> Result<T, Failure> {
    match block_on(work) {
        Ok(result) => Ok(result?),
        Err(error) => Err(Failure::new(error.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn the_policy_is_taken_from_anywhere_before_the_end_of_options() {
        let mut tool = Tool::new("t");
        let left = tool.take_policy(words("a --allow /x -f raw --allow=nbd -- --trust-images"));
        assert_eq!(left.unwrap(), words("a -f raw -- --trust-images"));
        assert_eq!(tool.allowed, ["/x", "nbd"]);
        assert!(tool.take_policy(words("--allow")).is_err());
    }
}
