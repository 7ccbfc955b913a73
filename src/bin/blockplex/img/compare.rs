//! `compare`: whether two images have the same content.
//!
//! | status | meaning |
//! |---|---|
//! | 0 | the same |
//! | 1 | not the same (or the arguments make no sense) |
//! | 2 | an image could not be opened |
//! | 3 | its block status could not be had |
//! | 4 | it could not be read |

mod comparison;

use std::cmp::{max, min};
use std::sync::Arc;

use super::disk::Disk;
use super::progress::{InOrder, Progress};
use super::{Command, print_command_help};
use crate::tool::getopt::{Opt, Parser, long, long_with, opt, with};
use crate::tool::message::strerror;
use crate::tool::open::{CacheMode, Image, ImageOpenOptions};
use crate::tool::{Failure, Tool};
use comparison::{Comparison, Finding, Moved, Side};

/// The command.
pub const COMMAND: Command = Command {
    name: "compare",
    help: HELP,
    run,
    summary: "tell whether two images have the same content",
};

const HELP: &str = "\
Usage: {tool} compare [-f FMT | --image-opts] [-F FMT] [-s] [-U] [-T CACHE] [-p | -q]
        [--object OBJDEF] FILE1 FILE2

Tell whether two images have the same content. Where one is longer, the rest must be zeros.

  -f, --a-format FMT     format of FILE1, instead of finding it out
  -F, --b-format FMT     format of FILE2, instead of finding it out
      --image-opts       FILE1 and FILE2 are options (driver=...,file.filename=...)
  -s, --strict           sizes and what is allocated must be the same as well
  -U, --force-share      open the images even though others write to them
  -T, --cache CACHE      cache mode of both images [writeback]
  -p, --progress         show how far it has come
  -q, --quiet            print nothing but errors
      --object OBJDEF    define a secret
  -h, --help             print this help and exit

Status: 0 the same, 1 not the same, 2 could not open, 3 no block status, 4 could not read.
";

const OPTIONS: &[Opt] = &[
    opt("help", 'h'),
    with("a-format", 'f'),
    with("b-format", 'F'),
    opt("strict", 's'),
    opt("force-share", 'U'),
    with("cache", 'T'),
    opt("progress", 'p'),
    opt("quiet", 'q'),
    long_with("object"),
    long("image-opts"),
];

#[derive(Default)]
struct Options {
    formats: [Option<String>; 2],
    image_opts: bool,
    strict: bool,
    force_share: bool,
    progress: bool,
    quiet: bool,
}

fn run(tool: &mut Tool, words: Vec<String>) -> Result<u8, Failure> {
    let mut options = Options::default();
    let mut cache = "writeback".to_owned();
    let mut parser = Parser::new(tool.name(), Some("compare"), OPTIONS, words);
    while let Some(option) = parser.next()? {
        match option.name {
            "help" => return print_command_help(tool, &COMMAND),
            "a-format" => options.formats[0] = Some(option.value),
            "b-format" => options.formats[1] = Some(option.value),
            "strict" => options.strict = true,
            "force-share" => options.force_share = true,
            "cache" => cache = option.value,
            "progress" => options.progress = true,
            "quiet" => options.quiet = true,
            "object" => tool.add_object(&option.value)?,
            _ => options.image_opts = true,
        }
    }
    options.progress &= !options.quiet;
    let names: Result<[String; 2], _> = parser.positional().try_into();
    let names = names.map_err(|_| Failure::usage("Expecting two image file names"))?;
    let progress = Arc::new(Progress::new(options.progress, 2.0));
    let result = compare(tool, &options, &cache, names, &progress);
    progress.end();
    result
}

fn compare(
    tool: &Tool,
    options: &Options,
    cache: &str,
    names: [String; 2],
    progress: &Arc<Progress>,
) -> Result<u8, Failure> {
    let cache = CacheMode::parse(cache)
        .ok_or_else(|| Failure::new(format!("Invalid source cache option: {cache}")));
    let cache = cache.map_err(|failure| failure.with_status(2))?;
    if options.image_opts && options.formats[0].is_some() {
        let text = "--image-opts and --format are mutually exclusive";
        return Err(Failure::new(text).with_status(2));
    }
    let open = |index: usize| {
        let how = ImageOpenOptions {
            image_opts: options.image_opts,
            format: options.formats[index].clone(),
            force_share: options.force_share,
            cache,
            ..ImageOpenOptions::new(names[index].clone())
        };
        tool.open(&how).map_err(|failure| failure.with_status(2))
    };
    let first = open(0)?;
    let second = match open(1) {
        Ok(second) => second,
        Err(failure) => {
            first.close()?;
            return Err(failure);
        }
    };
    let result = compare_open(tool, options, [&first, &second], progress);
    first.close()?;
    second.close()?;
    result
}

fn compare_open(
    tool: &Tool,
    options: &Options,
    images: [&Image; 2],
    progress: &Arc<Progress>,
) -> Result<u8, Failure> {
    let say = |text: &str| {
        if !options.quiet {
            println!("{text}");
        }
    };
    let disk = |image: &Image| Disk::new(image.backend.clone());
    let (first, second) = (disk(images[0])?, disk(images[1])?);
    let lengths = [first.length(), second.length()];
    progress.set(0.0);
    if options.strict && lengths[0] != lengths[1] {
        say("Strict mode: Image size mismatch!");
        return Ok(1);
    }
    let (end, whole) = (min(lengths[0], lengths[1]), max(lengths[0], lengths[1]));
    let moved = |start| Moved { parts: InOrder::new(progress.clone(), start), whole };
    let both = Comparison::of_both(first.clone(), second.clone(), end, options.strict, moved(0));
    let mut found = both.run()?;
    if found.is_none() && end < whole {
        say("Warning: Image size mismatch!");
        let (disk, side) =
            if lengths[0] > lengths[1] { (first, Side::First) } else { (second, Side::Second) };
        found = Comparison::with_zeros(disk, side, end, moved(end)).run()?;
    }
    let name = |side| match side {
        Side::First => &images[0].filename,
        Side::Second => &images[1].filename,
    };
    let Some((offset, finding)) = found else {
        say("Images are identical.");
        return Ok(0);
    };
    match finding {
        Finding::Content => say(&format!("Content mismatch at offset {offset}!")),
        Finding::Status => say(&format!("Strict mode: Offset {offset} block status mismatch!")),
        Finding::StatusError(side) => {
            tool.report(format!("Sector allocation test failed for {}", name(side)));
            return Ok(3);
        }
        Finding::ReadError(side, error) => {
            let reason = strerror(error.errno());
            tool.report(format!("Error while reading offset {offset} of {}: {reason}", name(side)));
            return Ok(4);
        }
    }
    Ok(1)
}
