//! `rebase`: puts an overlay on another backing file.
//!
//! Safe, which it is unless told otherwise, the disk stays what it was (`merge`); unsafe, only the
//! name in the image changes, and nothing but the image is opened.

mod merge;

use std::sync::Arc;

use blockplex::drivers::qcow2::Qcow2;
use blockplex::drivers::qcow2::entry::Version;
use blockplex::graph::{NodeIo, Role};
use blockplex::{Error, ErrorKind, block_on};

use super::commit::{is_same, levels_below};
use super::disk::Disk;
use super::progress::{InOrder, Progress};
use super::source::{FORCE_SHARE, FORMAT, HELP, IMAGE_OPTS, OBJECT, QUIET, Source, cache_mode};
use super::{Command, one_file, print_command_help};
use crate::tool::getopt::{Opt, Parser, opt, with};
use crate::tool::message::strerror;
use crate::tool::names::beside;
use crate::tool::open::{CacheMode, Image, ImageOpenOptions, is_driver};
use crate::tool::{Failure, Tool};
use merge::Merge;

/// The command.
pub const COMMAND: Command = Command {
    name: "rebase",
    help: HELP_TEXT,
    run,
    summary: "put an overlay on another backing file",
};

const HELP_TEXT: &str = "\
Put an overlay on another backing file. What its disk shows stays the same.

Usage: {tool} rebase [-f FMT | --image-opts] [-t CACHE] -b BACKING [-F FMT] [-T CACHE] [-u] [-c]
        [-U] [-p] [-q] FILE

  -f, --format FMT           format of FILE, instead of finding it out
      --image-opts           FILE is options (driver=...,file.filename=...)
  -t, --cache CACHE          cache mode of FILE [writeback]
  -b, --backing BACKING      the new backing file; empty: none
  -F, --backing-format FMT   format of BACKING
  -T, --backing-cache CACHE  cache mode of BACKING [writeback]
  -u, --backing-unsafe       change the name and nothing else: what the disk shows may change
  -c, --compress             compress what is written to FILE
  -U, --force-share          open FILE even though others write to it
      --object OBJECT        define a secret
  -p, --progress             show how far it has come
  -q, --quiet                print nothing but errors
  -h, --help                 print this help and exit
";

const OPTIONS: &[Opt] = &[
    HELP,
    FORMAT,
    with("cache", 't'),
    with("backing", 'b'),
    with("backing-format", 'F'),
    with("backing-cache", 'T'),
    opt("backing-unsafe", 'u'),
    opt("compress", 'c'),
    FORCE_SHARE,
    opt("progress", 'p'),
    QUIET,
    IMAGE_OPTS,
    OBJECT,
];

#[derive(Default)]
struct Options {
    source: Source,
    backing: Option<String>,
    backing_format: Option<String>,
    is_unsafe: bool,
    compress: bool,
    cache: String,
    backing_cache: String,
}

fn run(tool: &mut Tool, words: Vec<String>) -> Result<u8, Failure> {
    let writeback = || "writeback".to_owned();
    let mut options =
        Options { cache: writeback(), backing_cache: writeback(), ..Options::default() };
    let (mut shown, mut quiet) = (false, false);
    let mut parser = Parser::new(tool.name(), Some("rebase"), OPTIONS, words);
    while let Some(option) = parser.next()? {
        match option.name {
            "help" => return print_command_help(tool, &COMMAND),
            "cache" => options.cache = option.value,
            "backing" => options.backing = Some(option.value),
            "backing-format" => options.backing_format = Some(option.value),
            "backing-cache" => options.backing_cache = option.value,
            "backing-unsafe" => options.is_unsafe = true,
            "compress" => options.compress = true,
            "progress" => shown = true,
            "quiet" => quiet = true,
            _ => drop(options.source.take(tool, &option)?),
        }
    }
    let filename = one_file(parser.positional())?;
    if options.backing.is_none() && !options.is_unsafe {
        return Err(Failure::usage("Must specify backing file (-b) or use unsafe mode (-u)"));
    }
    let progress = Arc::new(Progress::new(shown && !quiet, 2.0));
    progress.set(0.0);
    let result = rebase(tool, &options, &filename, &progress);
    progress.end();
    result.map(|()| 0)
}

fn rebase(
    tool: &Tool,
    options: &Options,
    filename: &str,
    progress: &Arc<Progress>,
) -> Result<(), Failure> {
    let cache = cache_mode("", &options.cache)?;
    let backing_cache = cache_mode("source ", &options.backing_cache)?;
    let how = ImageOpenOptions {
        cache,
        write: true,
        image_alone: options.is_unsafe,
        // `-U` is about the files below.
        force_share: false,
        ..options.source.open_options(filename)?
    };
    let image = tool.open(&how)?;
    let result = rebase_open(tool, options, &image, backing_cache, progress);
    let closed = image.close();
    result.and(closed)
}

fn rebase_open(
    tool: &Tool,
    options: &Options,
    image: &Image,
    backing_cache: CacheMode,
    progress: &Arc<Progress>,
) -> Result<(), Failure> {
    let view = image.view()?;
    let is_qcow2 = view.driver_as::<Qcow2>().is_some();
    if options.compress && !is_qcow2 {
        return Err(Failure::new("Compression not supported for this file format"));
    }
    if let Some(format) = options.backing_format.as_ref().filter(|format| !is_driver(format)) {
        return Err(Failure::new(format!("Invalid format name: '{format}'")));
    }
    let name = options.backing.as_deref().filter(|name| !name.is_empty());
    if !options.is_unsafe && is_qcow2 {
        match name {
            None => merge_from(options, image, None, None, progress)?,
            Some(name) => {
                let new = open_new(tool, options, image, name, backing_cache)?;
                let result = merge_onto(options, image, &new, progress);
                let closed = new.close();
                result.and(closed)?;
            }
        }
    }
    let changed = change_name(image, name, options.backing_format.as_deref(), is_qcow2);
    progress.set(100.0);
    changed
}

/// Opens the new backing file.
fn open_new(
    tool: &Tool,
    options: &Options,
    image: &Image,
    name: &str,
    cache: CacheMode,
) -> Result<Image, Failure> {
    let how = ImageOpenOptions {
        format: options.backing_format.clone(),
        cache,
        force_share: options.source.force_share,
        ..ImageOpenOptions::new(beside(&image.shown_name, name))
    };
    tool.open_quietly(&how)
        .map_err(|failure| failure.prefixed(&format!("Could not open new backing file '{name}': ")))
}

fn merge_onto(
    options: &Options,
    image: &Image,
    new: &Image,
    progress: &Arc<Progress>,
) -> Result<(), Failure> {
    let chain = levels_below(image)?;
    let same = chain.iter().position(|level| {
        let format = level.format.as_deref();
        is_same(&level.filename, &new.shown_name) && format == new.format().ok()
    });
    // The image itself is at depth 0, the first below it at 1.
    let shared_depth = same.and_then(|index| u32::try_from(index + 1).ok());
    merge_from(options, image, Some(Disk::new(new.backend.clone())?), shared_depth, progress)
}

/// Writes to the image what the new backing file will not show.
fn merge_from(
    options: &Options,
    image: &Image,
    new: Option<Disk>,
    shared_depth: Option<u32>,
    progress: &Arc<Progress>,
) -> Result<(), Failure> {
    let view = image.view()?;
    let driver = view.driver_as::<Qcow2>();
    let driver = driver.ok_or_else(|| Failure::new("could not get block driver info"))?;
    let information = driver.information();
    let unit = match information.extended_l2 {
        // A cluster has 32 subclusters.
        true if !options.compress => information.cluster_size / 32,
        _ => information.cluster_size,
    };
    let overlay = Disk::new(image.backend.clone())?;
    // In version 2, a driver stores no zeros where it stores nothing yet and nothing is below.
    let zero_clusters = information.version >= Version::V3;
    let merge = Merge {
        overlay,
        new,
        unit,
        zero_clusters,
        compress: options.compress,
        shared_depth,
        progress: InOrder::new(progress.clone(), 0),
    };
    merge.run().map_err(Failure::new)?;
    // The clusters come before the name that makes them needed.
    image.disk().flush()?;
    Ok(())
}

/// Has the image name another backing file.
fn change_name(
    image: &Image,
    name: Option<&str>,
    format: Option<&str>,
    is_qcow2: bool,
) -> Result<(), Failure> {
    let shown = name.unwrap_or("");
    let fail = |why: &str| {
        Err(Failure::new(format!("Could not change the backing file to '{shown}': {why}")))
    };
    if !is_qcow2 {
        return fail("Operation not supported");
    }
    if name.is_some() && format.is_none() {
        return fail("backing format must be specified");
    }
    let name = name.map(|name| name.as_bytes().to_vec());
    let format = format.filter(|_| name.is_some()).map(|format| format.as_bytes().to_vec());
    let change = async move |image: &Qcow2, io: &NodeIo| {
        let file = io
            .child_in_role(Role::File)
            .ok_or_else(|| Error::new(ErrorKind::NotFound, "the image has no file"))?;
        image.set_backing(&file, name.as_deref(), format.as_deref()).await
    };
    let changed = block_on(image.layer().manage::<Qcow2, ()>(image.root, change));
    match changed {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) if error.kind() == ErrorKind::NoSpace => {
            fail("No space left in the file header")
        }
        Ok(Err(error)) => fail(&strerror(error.errno())),
        Err(error) => fail(&error.to_string()),
    }
}
