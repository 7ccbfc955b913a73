//! `commit`: writes what an overlay holds into an image below it.
//!
//! The chain is opened once as a whole, so that every name in it passes the gate; then each image
//! by itself, the overlays without what is below them, the base for writing.

use std::path::Path;
use std::sync::Arc;

use blockplex::OptionTree;
use blockplex::drivers::options::Value;
use blockplex::drivers::qcow2::Qcow2;
use blockplex::graph::NodeIo;

use super::convert::{Copy, CopyError, How, Source as CopySource, TargetBacking};
use super::disk::Disk;
use super::progress::Progress;
use super::source::{FORMAT, HELP, IMAGE_OPTS, OBJECT, QUIET, Source, cache_mode};
use super::zeroes::Sparse;
use super::{Command, one_file, print_command_help};
use crate::tool::getopt::{Opt, Parser, opt, with};
use crate::tool::message::strerror;
use crate::tool::names::beside;
use crate::tool::open::{CacheMode, Image, ImageOpenOptions};
use crate::tool::size::parse_bytes;
use crate::tool::{Failure, Tool, wait};

/// The command.
pub const COMMAND: Command = Command {
    name: "commit",
    help: HELP_TEXT,
    run,
    summary: "write what an overlay holds into an image below it",
};

const HELP_TEXT: &str = "\
Write what an overlay holds into an image below it, and empty the overlay.

Usage: {tool} commit [-f FMT | --image-opts] [-t CACHE] [-b BASE] [-d] [-r RATE] [-p] [-q] FILE

  -f, --format FMT     format of FILE, instead of finding it out
      --image-opts     FILE is options (driver=...,file.filename=...)
  -t, --cache CACHE    cache mode [writeback]
  -b, --base BASE      the image to write to, further down; the overlay is not emptied [the next]
  -d, --drop           do not empty the overlay
  -r, --rate RATE      bytes a second at most
      --object OBJECT  define a secret
  -p, --progress       show how far it has come
  -q, --quiet          print nothing but errors
  -h, --help           print this help and exit
";

const OPTIONS: &[Opt] = &[
    HELP,
    FORMAT,
    with("cache", 't'),
    with("base", 'b'),
    opt("drop", 'd'),
    opt("progress", 'p'),
    QUIET,
    with("rate", 'r'),
    IMAGE_OPTS,
    OBJECT,
];

/// Zeros are committed as such in pieces of the base's clusters, and of this at most.
const LARGEST_GRANULE: u64 = 65536;

#[derive(Default)]
struct Options {
    source: Source,
    cache: CacheMode,
    base: Option<String>,
    drop: bool,
    rate: Option<u64>,
}

fn run(tool: &mut Tool, words: Vec<String>) -> Result<u8, Failure> {
    let mut options = Options::default();
    let (mut cache, mut shown, mut quiet) = ("writeback".to_owned(), false, false);
    let mut parser = Parser::new(tool.name(), Some("commit"), OPTIONS, words);
    while let Some(option) = parser.next()? {
        match option.name {
            "help" => return print_command_help(tool, &COMMAND),
            "cache" => cache = option.value,
            "base" => (options.base, options.drop) = (Some(option.value), true),
            "drop" => options.drop = true,
            "progress" => shown = true,
            "quiet" => quiet = true,
            "rate" => options.rate = Some(parse_bytes("rate limit", &option.value)?),
            _ => drop(options.source.take(tool, &option)?),
        }
    }
    let filename = one_file(parser.positional())?;
    options.cache = cache_mode("", &cache)?;
    let progress = Arc::new(Progress::new(shown && !quiet, 1.0));
    let result = commit(tool, &options, &filename, &progress);
    progress.end();
    result?;
    if !quiet {
        println!("Image committed.");
    }
    Ok(0)
}

/// An image of the chain, as it is opened by itself.
pub struct Level {
    pub filename: String,
    pub format: Option<String>,
    /// The options that the command line gives for it: they say all.
    options: Option<String>,
}

impl Level {
    fn open_options(&self) -> ImageOpenOptions {
        match &self.options {
            Some(options) => {
                ImageOpenOptions { image_opts: true, ..ImageOpenOptions::new(options.clone()) }
            }
            None => ImageOpenOptions {
                format: self.format.clone(),
                ..ImageOpenOptions::new(self.filename.clone())
            },
        }
    }
}

fn commit(
    tool: &Tool,
    options: &Options,
    filename: &str,
    progress: &Arc<Progress>,
) -> Result<(), Failure> {
    let how = options.source.open_options(filename)?;
    let top = ImageOpenOptions { cache: options.cache, ..how };
    let (image_name, mut chain) = chain_below(tool, &top)?;
    progress.set(0.0);
    let base = match &options.base {
        None if chain.is_empty() => {
            return Err(Failure::new("Image does not have a backing file"));
        }
        None => 0,
        Some(base) => {
            // Each image of the chain may name it, in its own directory.
            let mut overlay = image_name.as_str();
            let found = chain.iter().position(|level| {
                let named = beside(std::mem::replace(&mut overlay, &level.filename), base);
                is_same(&level.filename, &named)
            });
            found.ok_or_else(|| {
                let text = format!("Did not find '{base}' in the backing chain of '{filename}'");
                Failure::new(text)
            })?
        }
    };
    chain.truncate(base + 1);
    let mut images = Vec::new();
    let result = open_and_copy(tool, options, &top, &chain, &mut images, progress);
    let mut closed = Ok(());
    for image in images {
        closed = closed.and(image.close());
    }
    result?;
    closed?;
    progress.set(100.0);
    Ok(())
}

/// What is below an image, from the next one down. Nothing stays open.
/// Its own name comes first.
fn chain_below(tool: &Tool, top: &ImageOpenOptions) -> Result<(String, Vec<Level>), Failure> {
    let image = tool.open(&ImageOpenOptions { write: true, ..top.clone() })?;
    let (name, chain) = (image.shown_name.clone(), levels_below(&image));
    image.close()?;
    let mut chain = chain?;
    let mut above = top.tree()?;
    for level in &mut chain {
        let Some(Value::Tree(mut below)) = above.get("backing").cloned() else { break };
        level.options = Some(options_of(&below, level)?);
        std::mem::swap(&mut above, &mut below);
    }
    Ok((name, chain))
}

/// The options for a level alone. They need not say which file it is, as the image above does.
fn options_of(tree: &OptionTree, level: &Level) -> Result<String, Failure> {
    let mut alone = tree.clone();
    alone.set("backing", "".into());
    if let (None, Some(format)) = (alone.get("driver"), &level.format) {
        alone.set("driver", format.as_str().into());
    }
    if !alone.contains("file") && !alone.contains("filename") {
        let mut file = OptionTree::new();
        file.set("filename", level.filename.as_str().into());
        alone.set("file", Value::Tree(file));
    }
    alone.to_keyval().map_err(|error| Failure::new(error.to_string()))
}

/// What is below an open image, from the next one down.
pub fn levels_below(image: &Image) -> Result<Vec<Level>, Failure> {
    let mut levels = Vec::new();
    let mut view = image.view()?;
    let mut filename = image.shown_name.clone();
    while let Some(edge) = view.edge_in_role(blockplex::graph::Role::Backing) {
        let Some(below) = view.child(edge).cloned() else { break };
        let Some(stated) = view.driver_as::<Qcow2>().and_then(Qcow2::backing) else { break };
        filename = beside(&filename, &String::from_utf8_lossy(&stated.name));
        let format = Some(below.driver().driver_name().to_owned());
        levels.push(Level { filename: filename.clone(), format, options: None });
        view = below;
    }
    Ok(levels)
}

/// Whether two names are the same file.
pub fn is_same(name: &str, other: &str) -> bool {
    let real = |name: &str| std::fs::canonicalize(Path::new(name)).ok();
    name == other || real(name).is_some_and(|real_name| Some(real_name) == real(other))
}

/// Opens the images of the chain, each by itself, into `images`; copies, and empties the top.
fn open_and_copy(
    tool: &Tool,
    options: &Options,
    top: &ImageOpenOptions,
    chain: &[Level],
    images: &mut Vec<Image>,
    progress: &Arc<Progress>,
) -> Result<(), Failure> {
    let alone = vec![("backing".to_owned(), String::new())];
    let overlay = ImageOpenOptions { write: !options.drop, unmap: true, ..top.clone() };
    images.push(tool.open(&ImageOpenOptions { overrides: alone.clone(), ..overlay })?);
    let Some((base, between)) = chain.split_last() else { return Ok(()) };
    for level in between {
        let how = ImageOpenOptions {
            cache: options.cache,
            overrides: alone.clone(),
            ..level.open_options()
        };
        images.push(tool.open(&how)?);
    }
    let how =
        ImageOpenOptions { cache: options.cache, write: true, unmap: true, ..base.open_options() };
    images.push(tool.open(&how)?);
    let Some((base, overlays)) = images.split_last() else { return Ok(()) };
    copy_down(tool, options, overlays, base, progress)?;
    match overlays.first() {
        Some(top) if !options.drop => empty(top),
        _ => Ok(()),
    }
}

/// Writes what the overlays hold to the base, which becomes as long as the top.
fn copy_down(
    tool: &Tool,
    options: &Options,
    overlays: &[Image],
    base: &Image,
    progress: &Arc<Progress>,
) -> Result<(), Failure> {
    let Some((top, lower)) = overlays.split_first() else { return Ok(()) };
    let mut disk = Disk::new(top.backend.clone())?;
    for image in lower {
        disk = disk.over(image.backend.clone())?;
    }
    if base.length()? < disk.length() {
        base.disk().truncate(disk.length())?;
    }
    let view = base.view()?;
    let clusters = view.driver_as::<Qcow2>().map(|image| image.information().cluster_size);
    let granule = clusters.unwrap_or(LARGEST_GRANULE).clamp(4096, LARGEST_GRANULE);
    let how = How {
        lanes: 8,
        in_order: true,
        sparse: Some(Sparse { granule, shortest: granule }),
        granule: Some(granule),
        buffer_bytes: 2 << 20,
        compressed_cluster: None,
        salvage: false,
        quiet: true,
        // What no overlay holds is there already.
        target_backing: Some(TargetBacking { length: None }),
        zero_init: false,
        rate: options.rate.filter(|rate| *rate > 0),
        offload: None,
    };
    let source = CopySource { disk, start: 0, backing_length: u64::MAX };
    let target = Disk::new(base.backend.clone())?;
    let copy =
        Arc::new(Copy::new(tool.name().to_owned(), vec![source], target, how, progress.clone()));
    copy.run().map_err(|error| {
        let reason = error.downcast_ref().map(|error: &CopyError| strerror(error.error.errno()));
        Failure::new(format!("Block job failed: {}", reason.unwrap_or_else(|| error.to_string())))
    })?;
    // The overlay is emptied next.
    base.disk()
        .flush()
        .map_err(|error| Failure::new(format!("Block job failed: {}", strerror(error.errno()))))?;
    Ok(())
}

/// Drops what the overlay holds.
fn empty(top: &Image) -> Result<(), Failure> {
    let empty = async |image: &Qcow2, io: &NodeIo| image.make_empty(io).await;
    wait(top.layer().manage::<Qcow2, ()>(top.root, empty)).map_err(|failure| {
        let text = failure.text().unwrap_or_default();
        Failure::new(format!("Failed to empty {}: {text}", top.filename))
    })
}
