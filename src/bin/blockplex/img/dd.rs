//! `dd`: copies a part of an image, in blocks, into a new one. All of it is written, zeros too.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use blockplex::{Error, IoBuffer};

use super::disk::{Disk, OpenDisk, SECTOR};
use super::turn::Turn;
use super::{Command, lanes, print_command_help};
use crate::tool::create::format_named;
use crate::tool::getopt::{Opt, Parser, long, long_with, opt, with};
use crate::tool::message::strerror;
use crate::tool::open::{Image, ImageOpenOptions};
use crate::tool::option_list::OptionList;
use crate::tool::size::parse_within;
use crate::tool::{Failure, Tool};

/// The command.
pub const COMMAND: Command =
    Command { name: "dd", help: HELP, run, summary: "copy a part of an image into a new one" };

const HELP: &str = "\
Copy a part of an image into a new one.

Usage: {tool} dd [-f FMT | --image-opts] [-O FMT] [-U] [bs=SIZE] [count=N] [skip=N] if=FILE of=FILE

  -f, --format FMT           format of the input, instead of finding it out
      --image-opts           the input is options (driver=...,file.filename=...)
  -O, --output-format FMT    format of the output [raw]
  -U, --force-share          open the input even though others write to it
      --object OBJECT        define a secret
      bs=SIZE                bytes of a block [512]
      count=N                blocks of the input, from its beginning [all]
      skip=N                 of which the first N are left out [0]
      if=FILE                input
      of=FILE                output; it is overwritten
  -h, --help                 print this help and exit
";

const OPTIONS: &[Opt] = &[
    opt("help", 'h'),
    with("format", 'f'),
    with("output-format", 'O'),
    opt("force-share", 'U'),
    long("image-opts"),
    long_with("object"),
];

/// The largest block.
const LARGEST: u64 = i32::MAX as u64;

/// Bytes that are copied at once, and how many times at a time.
const CHUNK: u64 = 1 << 20;
const LANES: usize = 8;

#[derive(Default)]
struct Operands {
    block: Option<u64>,
    count: Option<u64>,
    skip: Option<u64>,
    input: Option<String>,
    output: Option<String>,
}

impl Operands {
    fn take(&mut self, word: &str) -> Result<(), Failure> {
        let most = i64::MAX as u64;
        let unknown = |name| Failure::new(format!("unrecognized operand {name}"));
        let (name, value) = word.split_once('=').ok_or_else(|| unknown(word))?;
        match name {
            "bs" => self.block = Some(parse_within("bs", value, 1..=LARGEST)?),
            "count" => self.count = Some(parse_within("count", value, 0..=most)?),
            "skip" => self.skip = Some(parse_within("skip", value, 0..=most)?),
            "if" => self.input = Some(value.to_owned()),
            "of" => self.output = Some(value.to_owned()),
            _ => return Err(unknown(name)),
        }
        Ok(())
    }

    /// The range of an input of `length` bytes that is copied; none when it begins beyond.
    fn range(&self, length: u64) -> (u64, Option<u64>) {
        let block = self.block.unwrap_or(512);
        let end = self.count.and_then(|count| count.checked_mul(block)).unwrap_or(u64::MAX);
        let end = end.min(length);
        let start = self.skip.unwrap_or(0).checked_mul(block);
        (end, start.filter(|start| *start <= end))
    }
}

fn run(tool: &mut Tool, words: Vec<String>) -> Result<u8, Failure> {
    let mut input = ImageOpenOptions::default();
    let mut format = "raw".to_owned();
    let mut parser = Parser::new(tool.name(), Some("dd"), OPTIONS, words);
    while let Some(option) = parser.next()? {
        match option.name {
            "help" => return print_command_help(tool, &COMMAND),
            "format" => input.format = Some(option.value),
            "output-format" => format = option.value,
            "force-share" => input.force_share = true,
            "object" => tool.add_object(&option.value)?,
            _ => input.image_opts = true,
        }
    }
    let mut operands = Operands::default();
    for word in parser.positional() {
        operands.take(&word)?;
    }
    let (Some(name), Some(output)) = (operands.input.clone(), operands.output.clone()) else {
        return Err(Failure::new("Must specify both input and output files"));
    };
    if input.image_opts && input.format.is_some() {
        return Err(Failure::new("--image-opts and --format are mutually exclusive"));
    }
    input.filename = name;
    let image = tool.open(&input)?;
    let result = copy(tool, &operands, &image, &format, &output);
    image.close()?;
    result.map(|()| 0)
}

fn copy(
    tool: &Tool,
    operands: &Operands,
    input: &Image,
    format: &str,
    output: &str,
) -> Result<(), Failure> {
    let format = format_named(format).map_err(|failure| match failure.text() {
        Some(text) if text.starts_with("Unknown") => Failure::new("Unknown file format"),
        _ => failure,
    })?;
    let source = Disk::new(input.backend.clone())?;
    let (end, start) = operands.range(source.length());
    let mut options = OptionList::default();
    let length = end - start.unwrap_or(end);
    options.set("size", length.next_multiple_of(SECTOR).to_string());
    tool.create_image(output, format, &options).map_err(|failure| {
        failure.prefixed(&format!("{output}: error while creating output image: "))
    })?;
    let how = ImageOpenOptions {
        format: Some(format.name.to_owned()),
        write: true,
        ..ImageOpenOptions::new(output)
    };
    let image = tool.open(&how)?;
    if start.is_none() {
        tool.report(format!("{}: cannot skip to specified offset", input.filename));
    }
    let result = copy_range(source, &image, start.unwrap_or(end), end);
    image.close()?;
    result
}

/// Copies a range to the beginning of an image.
fn copy_range(source: Disk, image: &Image, start: u64, end: u64) -> Result<(), Failure> {
    let target = Disk::new(image.backend.clone())?;
    let shared = Arc::new(Shared { position: AtomicU64::new(start), turn: Turn::default() });
    let copied = lanes::run(LANES, move |_| {
        let (source, target, shared) = (source.clone(), target.clone(), shared.clone());
        async move {
            let lane = Lane { source: source.open()?, target: target.open()?, shared: &shared };
            let result = lane.copy(start, end).await;
            if result.is_err() {
                shared.turn.end();
            }
            result
        }
    });
    copied.map_err(|error: CopyError| Failure::new(error.to_string()))
}

/// What the lanes share.
struct Shared {
    /// Where the next chunk begins.
    position: AtomicU64,
    turn: Turn,
}

enum CopyError {
    Reading(Error),
    Writing(Error),
    Other(Error),
}

impl From<Error> for CopyError {
    fn from(error: Error) -> CopyError {
        CopyError::Other(error)
    }
}

impl std::fmt::Display for CopyError {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (doing, error) = match self {
            CopyError::Reading(error) => ("reading from input", error),
            CopyError::Writing(error) => ("writing to output", error),
            CopyError::Other(error) => return error.fmt(formatter),
        };
        write!(formatter, "error while {doing} image file: {}", strerror(error.errno()))
    }
}

struct Lane<'a> {
    source: OpenDisk,
    target: OpenDisk,
    shared: &'a Shared,
}

impl Lane<'_> {
    /// Copies chunks up to `end` until none is left, in order; what lies at `start` goes to 0.
    async fn copy(&self, start: u64, end: u64) -> Result<(), CopyError> {
        let mut buffer = IoBuffer::zeroed(CHUNK.min(end - start) as usize);
        loop {
            // Relaxed: only that each chunk is taken once matters.
            let offset = self.shared.position.fetch_add(CHUNK, Ordering::Relaxed);
            if offset >= end {
                return Ok(());
            }
            let (length, to) = (CHUNK.min(end - offset), offset - start);
            let (filled, read) = self.source.read(offset, buffer, 0, length as usize).await;
            read.map_err(CopyError::Reading)?;
            if !self.shared.turn.wait(to).await {
                return Ok(());
            }
            let (spare, written) = self.target.write(to, filled, 0, length as usize, false).await;
            written.map_err(CopyError::Writing)?;
            self.shared.turn.pass(to + length);
            buffer = spare;
        }
    }
}
