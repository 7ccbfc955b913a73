//! `convert`: copies images, one after the other, into a new one or over one that is there.
//!
//! | page | for |
//! |---|---|
//! | here | the command: what is asked for, and whether it makes sense |
//! | `sources` | the images to copy |
//! | `target` | the image to write: made, opened, looked at |
//! | `bitmaps` | the bitmaps of the source, copied |
//! | `copy` | the copy itself, in lanes |
//! | `walk` | what comes next, by block status |
//! | `offload` | copies that the file system makes |

mod bitmaps;
mod copy;
mod offload;
mod sources;
mod target;
mod walk;

use std::sync::Arc;

use super::disk::SECTOR;
use super::progress::Progress;
use super::zeroes::Sparse;
use super::{Command, print_command_help};
use crate::tool::create::{format_named, print_options};
use crate::tool::getopt::{Opt, Parser, long, long_with, opt, with};
use crate::tool::option_list::OptionList;
use crate::tool::size;
use crate::tool::{Failure, Tool};
pub use copy::{Copy, CopyError, How, Source, TargetBacking};
use offload::Offload;
use sources::Sources;
use target::Target;

/// The command.
pub const COMMAND: Command =
    Command { name: "convert", help: HELP, run, summary: "copy images into another format" };

const HELP: &str = "\
Copy one or more images, one after the other, into a new image.

Usage: {tool} convert [-f FMT | --image-opts] [-T CACHE] [-l SNAPSHOT] [-U] [-p] [-q]
        [-O FMT] [-o OPTIONS] [-B BACKING [-F FMT]] [-c] [-S SIZE] [-t CACHE] [-m N] [-W] [-r RATE]
        [-n [--target-is-zero] [--target-image-opts]] [--salvage] FILE... TARGET

  -f, --source-format FMT      format of FILE, instead of finding it out
      --image-opts             FILE is options (driver=...,file.filename=...)
  -T, --source-cache CACHE     cache mode of FILE [writeback]
  -l, --source-snapshot PARAM  an internal snapshot: its id or name, or
                               snapshot.id=ID,snapshot.name=NAME
  -U, --force-share            open FILE even though others write to it
  -O, --target-format FMT      format of TARGET [raw]
  -o, --target-options OPTIONS options of the format, key=value,...; 'help' lists them
  -B, --backing BACKING        leave out what BACKING shows below TARGET
  -F, --backing-format FMT     format of BACKING
  -c, --compress               compress the data
  -t, --target-cache CACHE     cache mode of TARGET [unsafe]
  -n, --no-create              TARGET is there already
      --target-is-zero         TARGET reads as zeros (with -n)
      --target-image-opts      TARGET is options (with -n)
  -S, --sparse-size SIZE       so many zeros in a row are not written [4k]; 0: write all
  -m, --parallel N             chunks in flight, 1 to 16 [8]
  -W, --oob-writes             write in any order
  -C, --copy-range-offloading  let the file system copy where it can
  -r, --rate RATE              bytes a second at most
      --bitmaps                copy the persistent bitmaps, too
      --skip-broken-bitmaps    but for those that cannot be relied on
      --salvage                take what cannot be read for zeros
      --object OBJECT          define a secret
  -p, --progress               show how far it has come
  -q, --quiet                  print nothing but errors
  -h, --help                   print this help and exit
";

const OPTIONS: &[Opt] = &[
    opt("help", 'h'),
    with("source-format", 'f'),
    with("target-format", 'O'),
    with("backing", 'B'),
    with("backing-format", 'F'),
    opt("compress", 'c'),
    with("target-options", 'o'),
    with("source-snapshot", 'l'),
    with("sparse-size", 'S'),
    opt("progress", 'p'),
    with("target-cache", 't'),
    with("source-cache", 'T'),
    opt("quiet", 'q'),
    opt("no-create", 'n'),
    opt("copy-range-offloading", 'C'),
    with("parallel", 'm'),
    opt("oob-writes", 'W'),
    opt("force-share", 'U'),
    with("rate", 'r'),
    long_with("object"),
    long("source-image-opts"),
    long("image-opts"),
    long("target-image-opts"),
    long("target-is-zero"),
    long("salvage"),
    long("bitmaps"),
    long("skip-broken-bitmaps"),
];

/// What is asked for.
struct Options {
    source_format: Option<String>,
    source_image_opts: bool,
    source_cache: String,
    snapshot: Option<String>,
    force_share: bool,
    target_format: Option<String>,
    target_image_opts: bool,
    target_cache: String,
    target_options: OptionList,
    options_given: bool,
    backing: Option<String>,
    backing_format: Option<String>,
    compress: bool,
    /// The least zeros that are not written; none: as by default.
    sparse: Option<u64>,
    create: bool,
    target_is_zero: bool,
    copy_range: bool,
    lanes: u64,
    in_order: bool,
    rate: Option<u64>,
    salvage: bool,
    bitmaps: bool,
    skip_broken_bitmaps: bool,
    progress: bool,
    quiet: bool,
}

/// The least zeros that are not written, by default.
const SPARSE: u64 = 4096;

/// The largest buffer, and the largest sparse size.
const MOST: u64 = 16 << 20;

/// The most data in a chunk.
const BUFFER: u64 = 2 << 20;

impl Options {
    fn new() -> Options {
        Options {
            source_format: None,
            source_image_opts: false,
            source_cache: "writeback".to_owned(),
            snapshot: None,
            force_share: false,
            target_format: None,
            target_image_opts: false,
            target_cache: "unsafe".to_owned(),
            target_options: OptionList::default(),
            options_given: false,
            backing: None,
            backing_format: None,
            compress: false,
            sparse: None,
            create: true,
            target_is_zero: false,
            copy_range: false,
            lanes: 8,
            in_order: true,
            rate: None,
            salvage: false,
            bitmaps: false,
            skip_broken_bitmaps: false,
            progress: false,
            quiet: false,
        }
    }

    fn take(&mut self, tool: &mut Tool, name: &str, value: String) -> Result<(), Failure> {
        match name {
            "source-format" => self.source_format = Some(value),
            "source-image-opts" | "image-opts" => self.source_image_opts = true,
            "source-cache" => self.source_cache = value,
            "source-snapshot" => {
                check_snapshot(tool, &value)?;
                self.snapshot = Some(value);
            }
            "force-share" => self.force_share = true,
            "target-format" => self.target_format = Some(value),
            "target-image-opts" => self.target_image_opts = true,
            "target-cache" => self.target_cache = value,
            "target-options" => {
                self.target_options.add(&value)?;
                self.options_given = true;
            }
            "backing" => self.backing = Some(value),
            "backing-format" => self.backing_format = Some(value),
            "compress" => self.compress = true,
            "sparse-size" => self.sparse = Some(sparse_size(&value)?),
            "no-create" => self.create = false,
            "target-is-zero" => self.target_is_zero = true,
            "copy-range-offloading" => self.copy_range = true,
            "parallel" => self.lanes = parallel(&value)?,
            "oob-writes" => self.in_order = false,
            "rate" => self.rate = Some(size::parse_bytes("rate limit", &value)?),
            "object" => tool.add_object(&value)?,
            "salvage" => self.salvage = true,
            "bitmaps" => self.bitmaps = true,
            "skip-broken-bitmaps" => self.skip_broken_bitmaps = true,
            "progress" => self.progress = true,
            _ => self.quiet = true,
        }
        Ok(())
    }

    /// What contradicts itself before any image is looked at.
    fn check(&self) -> Result<(), Failure> {
        let fail = |text: &str| Err(Failure::new(text));
        if self.source_image_opts && self.source_format.is_some() {
            return fail("--image-opts and --format are mutually exclusive");
        }
        if self.target_image_opts && self.target_format.is_some() {
            return fail("--image-opts and --format are mutually exclusive");
        }
        if self.skip_broken_bitmaps && !self.bitmaps {
            return fail("Use of --skip-broken-bitmaps requires --bitmaps");
        }
        if self.compress && self.copy_range {
            return fail("Cannot enable copy offloading when -c is used");
        }
        if self.sparse.is_some() && self.copy_range {
            return fail("Cannot enable copy offloading when -S is used");
        }
        if self.salvage && self.copy_range {
            return fail("Cannot use copy offloading in salvaging mode");
        }
        if self.target_image_opts && self.create {
            return fail("--target-image-opts requires use of -n flag");
        }
        if !self.create && self.options_given {
            return fail("-o has no effect when skipping image creation");
        }
        if self.target_is_zero && self.create {
            return fail("--target-is-zero requires use of -n flag");
        }
        Ok(())
    }
}

fn sparse_size(text: &str) -> Result<u64, Failure> {
    let size = size::parse_bytes("buffer size for sparse output", text)?;
    if size % SECTOR == 0 && size <= MOST {
        return Ok(size);
    }
    Err(Failure::new(format!(
        "Invalid buffer size for sparse output specified. Valid sizes are multiples of {SECTOR} up \
         to {MOST}. Select 0 to disable sparse detection (fully allocates output)."
    )))
}

fn parallel(text: &str) -> Result<u64, Failure> {
    let what = "number of coroutines";
    if !text.ends_with(|last: char| last.is_ascii_digit()) {
        return Err(Failure::new(format!("Invalid {what} specified: '{text}'.")));
    }
    size::parse_within(what, text, 1..=16)
}

fn run(tool: &mut Tool, words: Vec<String>) -> Result<u8, Failure> {
    let mut options = Options::new();
    let mut parser = Parser::new(tool.name(), Some("convert"), OPTIONS, words);
    while let Some(option) = parser.next()? {
        if option.name == "help" {
            return print_command_help(tool, &COMMAND);
        }
        options.take(tool, option.name, option.value)?;
    }
    let mut names = parser.positional();
    options.check()?;
    let format = options.target_format.clone().unwrap_or_else(|| "raw".to_owned());
    if options.target_options.wants_help() {
        print_options(format_named(&format)?, !names.is_empty());
        return Ok(0);
    }
    let target = names.pop();
    let (Some(target), false) = (target, names.is_empty()) else {
        return Err(Failure::new("Must specify image file name"));
    };
    let progress = Arc::new(Progress::new(options.progress && !options.quiet, 1.0));
    let result = convert(tool, options, names, &target, &progress);
    progress.end();
    result.map(|()| 0)
}

fn convert(
    tool: &Tool,
    options: Options,
    names: Vec<String>,
    target: &str,
    progress: &Arc<Progress>,
) -> Result<(), Failure> {
    progress.set(0.0);
    let sources = Sources::open(tool, &options, &names)?;
    let result = convert_from(tool, options, &sources, target, progress);
    sources.close()?;
    result
}

fn convert_from(
    tool: &Tool,
    mut options: Options,
    sources: &Sources,
    target: &str,
    progress: &Arc<Progress>,
) -> Result<(), Failure> {
    if options.bitmaps {
        let [source] = sources.images() else {
            return Err(Failure::new("Copying bitmaps only possible with single source"));
        };
        bitmaps::check_source(tool, source, options.skip_broken_bitmaps)?;
    }
    let mut target = Target::prepare(tool, &mut options, sources, target)?;
    let result = copy_into(tool, &options, sources, &mut target, progress);
    let closed = target.close();
    result.and(closed)
}

fn copy_into(
    tool: &Tool,
    options: &Options,
    sources: &Sources,
    target: &mut Target,
    progress: &Arc<Progress>,
) -> Result<(), Failure> {
    let total = sources.length();
    let disk = target.disk(options, total)?;
    if options.create && options.sparse != Some(0) {
        target.clear()?;
    }
    let how = how_of(options, sources, target)?;
    let name = tool.name().to_owned();
    let copy = Arc::new(Copy::new(name, sources.of_copy()?, disk, how, progress.clone()));
    copy.run().map_err(|error| Failure::new(error.to_string()))?;
    if let (true, [source]) = (options.bitmaps, sources.images()) {
        bitmaps::copy(tool, source, target.image())?;
    }
    progress.set(100.0);
    Ok(())
}

/// `snapshot.id=…,snapshot.name=…`, or anything else, which is a name.
///
/// # Errors
///
/// Another key.
pub fn check_snapshot(tool: &Tool, value: &str) -> Result<(), Failure> {
    if !value.starts_with("snapshot.") {
        return Ok(());
    }
    let keys = value.split(',').filter_map(|part| part.split('=').next());
    let unknown = keys.into_iter().find(|key| !["snapshot.id", "snapshot.name"].contains(key));
    let Some(key) = unknown else { return Ok(()) };
    tool.report(format!("Invalid parameter '{key}'"));
    Err(Failure::new(format!("Failed in parsing snapshot param '{value}'")))
}

fn how_of(options: &Options, sources: &Sources, target: &Target) -> Result<How, Failure> {
    let compressed_cluster = if options.compress { Some(target.cluster_size()?) } else { None };
    let sparse = match (options.sparse.unwrap_or(SPARSE), compressed_cluster) {
        (0, _) => None,
        // Clusters are compressed as a whole.
        (_, Some(cluster)) => Some(Sparse { granule: cluster, shortest: cluster }),
        (size, None) => {
            let granule = 1 << size.ilog2();
            let granule = u64::from(target.request_alignment()?).max(granule);
            Some(Sparse { granule, shortest: size })
        }
    };
    let offload = match (options.copy_range, sources.only_view()?) {
        (true, Some(source)) => {
            let target = target.view()?;
            Offload::between(&source, &target)
        }
        _ => None,
    };
    Ok(How {
        lanes: options.lanes as usize,
        in_order: options.in_order,
        sparse,
        granule: None,
        buffer_bytes: BUFFER,
        compressed_cluster,
        salvage: options.salvage,
        quiet: options.quiet,
        target_backing: target.backing(),
        zero_init: target.reads_as_zeros(),
        rate: options.rate.filter(|rate| *rate > 0),
        offload,
    })
}
