//! `img info`: what an image says of itself.

mod encryption;
mod node;

use std::collections::BTreeSet;

use super::source::{FORCE_SHARE, FORMAT, HELP, IMAGE_OPTS, OBJECT, Source};
use super::{Command, DONE, one_file, print_command_help, wants_json};
use crate::tool::getopt::{Opt, Parser, long_with, opt};
use crate::tool::json::Json;
use crate::tool::open::{Image, ImageOpenOptions};
use crate::tool::{Failure, Tool};
use node::NodeInfo;

pub const COMMAND: Command =
    Command { name: "info", help: HELP_TEXT, run, summary: "show what an image says of itself" };

const HELP_TEXT: &str = "\
Show information about a disk image.

Usage: {tool} info [-f FMT | --image-opts] [-b] [-U] [--output human|json] FILE

  -h, --help                 print this help and exit
  -f, --format FMT           format of FILE, instead of finding it out
      --image-opts           FILE is a list of options, driver=...,file.filename=...
  -b, --backing-chain        show the images below, too
  -U, --force-share          whatever other programs do with the image meanwhile
      --output human|json    how to print it
      --object OBJECT        define a secret
";

/// What only an image's format has, for people; empty where it has nothing.
///
/// # Errors
///
/// A file of it cannot be looked at.
pub fn specific(image: &Image) -> Result<String, Failure> {
    NodeInfo::of(image).map(|told| told.specific(1))
}

const OPTIONS: &[Opt] = &[
    HELP,
    FORMAT,
    IMAGE_OPTS,
    opt("backing-chain", 'b'),
    FORCE_SHARE,
    long_with("output"),
    OBJECT,
];

fn run(tool: &mut Tool, words: Vec<String>) -> Result<u8, Failure> {
    let mut source = Source::default();
    let (mut chain, mut json) = (false, false);
    let mut parser = Parser::new(tool.name(), Some("info"), OPTIONS, words);
    while let Some(option) = parser.next()? {
        match option.name {
            "help" => return print_command_help(tool, &COMMAND),
            "backing-chain" => chain = true,
            "output" => json = wants_json(&option.value)?,
            _ => drop(source.take(tool, &option)?),
        }
    }
    let filename = one_file(parser.positional())?;
    let images = collect(tool, &source, &filename, chain)?;
    match (json, chain) {
        (false, _) => {
            let texts: Vec<_> = images.iter().map(|info| info.for_people("/", 0)).collect();
            print!("{}", texts.join("\n"));
        }
        (true, true) => {
            let list = images.iter().map(NodeInfo::json).collect();
            println!("{}", Json::List(list).pretty());
        }
        (true, false) => images.iter().for_each(|info| println!("{}", info.json().pretty())),
    }
    Ok(DONE)
}

/// The image, and with `chain` those below it, each opened by itself.
fn collect(
    tool: &Tool,
    source: &Source,
    filename: &str,
    chain: bool,
) -> Result<Vec<NodeInfo>, Failure> {
    let mut images: Vec<NodeInfo> = Vec::new();
    let mut seen = BTreeSet::new();
    let mut next = Some(source.open_options(filename)?);
    while let Some(options) = next.take() {
        if !seen.insert(options.filename.clone()) {
            let name = &options.filename;
            return Err(Failure::new(format!("Backing file '{name}' creates an infinite loop.")));
        }
        let image =
            tool.open(&ImageOpenOptions { image_alone: true, metadata_only: true, ..options })?;
        let info = NodeInfo::of(&image)?;
        image.close()?;
        if let Some(backing) = info.backing.as_ref().filter(|_| chain) {
            next = Some(ImageOpenOptions {
                format: backing.format.clone(),
                force_share: source.force_share,
                ..ImageOpenOptions::new(&backing.full_name)
            });
        }
        images.push(info);
    }
    Ok(images)
}
