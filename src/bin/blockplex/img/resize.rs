//! `img resize`: another size.

use blockplex::Request;
use blockplex::graph::Preallocation;

use super::source::{FORMAT, HELP, IMAGE_OPTS, OBJECT, QUIET, Source};
use super::{Command, DONE, print_command_help};
use crate::tool::getopt::{Opt, Parser, long, long_with};
use crate::tool::open::{Image, ImageOpenOptions};
use crate::tool::size::{self, SizeError};
use crate::tool::{Failure, Tool};

pub const COMMAND: Command =
    Command { name: "resize", help: HELP_TEXT, run, summary: "give an image another size" };

const HELP_TEXT: &str = "\
Give a disk image another size.

Usage: {tool} resize [-f FMT | --image-opts] [--preallocation MODE] [--shrink] [-q]
           FILE [+|-]SIZE

  -h, --help                 print this help and exit
  -q, --quiet                print nothing that is no error
  -f, --format FMT           format of FILE, instead of finding it out
      --image-opts           FILE is a list of options, driver=...,file.filename=...
      --shrink               SIZE may be less than before; what lies beyond is lost
      --preallocation MODE   what is done about new space: off, metadata, falloc, full
      --object OBJECT        define a secret
  SIZE                       the new size, or how much to add (+) or to take away (-)
";

const OPTIONS: &[Opt] =
    &[HELP, QUIET, FORMAT, IMAGE_OPTS, long("shrink"), long_with("preallocation"), OBJECT];

#[derive(Clone, Copy, PartialEq)]
enum NewSize {
    Of(u64),
    Longer(u64),
    Shorter(u64),
}

fn run(tool: &mut Tool, mut words: Vec<String>) -> Result<u8, Failure> {
    let mut source = Source::default();
    let (mut shrink, mut quiet, mut mode) = (false, false, Preallocation::Off);
    // A size to be taken away looks like an option.
    let is_negative = |word: &String| {
        word.strip_prefix('-').is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
    };
    let last = match words.last().is_some_and(is_negative) && !words.iter().any(|word| word == "--")
    {
        true => words.pop(),
        false => None,
    };
    let mut parser = Parser::new(tool.name(), Some("resize"), OPTIONS, words);
    while let Some(option) = parser.next()? {
        match option.name {
            "help" => return print_command_help(tool, &COMMAND),
            "quiet" => quiet = true,
            "shrink" => shrink = true,
            "preallocation" => {
                let name = &option.value;
                let wrong = || Failure::new(format!("Invalid preallocation mode '{name}'"));
                mode = Preallocation::from_name(name).ok_or_else(wrong)?;
            }
            _ => drop(source.take(tool, &option)?),
        }
    }
    let mut words = parser.positional();
    words.extend(last);
    let mut words = words.into_iter();
    let (Some(filename), Some(text)) = (words.next(), words.next()) else {
        return Err(Failure::usage("Expecting image file name and size"));
    };
    if words.next().is_some() {
        return Err(Failure::usage("Extra argument(s) in command line"));
    }
    let new = parse(&text)?;
    let options = ImageOpenOptions { write: true, ..source.open_options(&filename)? };
    let image = tool.open(&ImageOpenOptions { unmap: true, ..options })?;
    let result = resize(tool, &image, new, (shrink, mode));
    let closed = image.close();
    result.and(closed)?;
    if !quiet {
        println!("Image resized.");
    }
    Ok(DONE)
}

fn parse(text: &str) -> Result<NewSize, Failure> {
    let (number, make): (&str, fn(u64) -> NewSize) = match text.split_at_checked(1) {
        Some(("+", number)) => (number, NewSize::Longer),
        Some(("-", number)) => (number, NewSize::Shorter),
        _ => (text, NewSize::Of),
    };
    size::parse(number).map(make).map_err(|error| match error {
        SizeError::Invalid => Failure::new(size::expected_size("size")),
        SizeError::OutOfRange => {
            Failure::new(format!("Value '{number}' is out of range for parameter 'size'"))
        }
    })
}

fn resize(
    tool: &Tool,
    image: &Image,
    new: NewSize,
    (shrink, mode): (bool, Preallocation),
) -> Result<(), Failure> {
    let old = image.length()?;
    let total = match new {
        NewSize::Of(size) => Some(size),
        NewSize::Longer(more) => old.checked_add(more),
        NewSize::Shorter(less) => old.checked_sub(less),
    };
    let total = total.filter(|total| *total > 0 && i64::try_from(*total).is_ok());
    let total = total.ok_or_else(|| Failure::new("New image size must be positive"))?;
    if total <= old && mode != Preallocation::Off {
        return Err(Failure::new("Preallocation can only be used for growing images"));
    }
    if total < old && !shrink {
        tool.report("Use the --shrink option to perform a shrink operation.");
        tool.warn(
            "Shrinking an image will delete all data beyond the shrunken image's end. Before \
             performing such an operation, make sure there is no important data there.",
        );
        return Err(Failure::silent(1));
    }
    if image.format()? == "qcow2" && total % 512 != 0 {
        return Err(Failure::new("The new size must be a multiple of 512"));
    }
    image.disk().run(Request::truncate(total).preallocated(mode)).map(drop)?;
    Ok(())
}
