//! `img snapshot`: internal snapshots.

use blockplex::drivers::qcow2::{NewSnapshot, SnapshotSelector};
use blockplex::{Error, ErrorKind};

use super::source::{FORCE_SHARE, FORMAT, HELP, IMAGE_OPTS, OBJECT, QUIET, Source};
use super::{Command, DONE, one_file, print_command_help, snapshot_list};
use crate::tool::getopt::{Opt, Parser, opt, with};
use crate::tool::message::{describe, strerror};
use crate::tool::open::{Image, ImageOpenOptions};
use crate::tool::{Failure, Tool};

pub const COMMAND: Command =
    Command { name: "snapshot", help: HELP_TEXT, run, summary: "internal snapshots" };

const HELP_TEXT: &str = "\
List, take, apply or delete the internal snapshots of a disk image.

Usage: {tool} snapshot [-f FMT | --image-opts] [-U] [-q] [-l | -c NAME | -a NAME | -d NAME] FILE

  -h, --help                 print this help and exit
  -q, --quiet                print nothing that is no error
  -f, --format FMT           format of FILE, instead of finding it out
      --image-opts           FILE is a list of options, driver=...,file.filename=...
  -U, --force-share          whatever other programs do with the image meanwhile
  -l, --list                 list the snapshots (the default)
  -c, --create NAME          take a snapshot
  -a, --apply NAME           make the disk what it was then
  -d, --delete NAME          delete a snapshot
      --object OBJECT        define a secret
";

const OPTIONS: &[Opt] = &[
    HELP,
    QUIET,
    FORMAT,
    IMAGE_OPTS,
    FORCE_SHARE,
    opt("list", 'l'),
    with("apply", 'a'),
    with("create", 'c'),
    with("delete", 'd'),
    OBJECT,
];

enum Action {
    List,
    Apply(String),
    Create(String),
    Delete(String),
}

fn run(tool: &mut Tool, words: Vec<String>) -> Result<u8, Failure> {
    let mut source = Source::default();
    let mut action = None;
    let mut parser = Parser::new(tool.name(), Some("snapshot"), OPTIONS, words);
    while let Some(option) = parser.next()? {
        let wanted = match option.name {
            "help" => return print_command_help(tool, &COMMAND),
            "quiet" => continue,
            "list" => Action::List,
            "apply" => Action::Apply(option.value),
            "create" => Action::Create(option.value),
            "delete" => Action::Delete(option.value),
            _ => {
                source.take(tool, &option)?;
                continue;
            }
        };
        if action.replace(wanted).is_some() {
            return Err(Failure::usage("Cannot mix '-l', '-a', '-c', '-d'"));
        }
    }
    let action = action.unwrap_or(Action::List);
    let filename = one_file(parser.positional())?;
    let write = !matches!(action, Action::List);
    let options = ImageOpenOptions { write, unmap: true, ..source.open_options(&filename)? };
    let image = tool.open(&options)?;
    let result = act(tool, &image, action);
    let closed = image.close();
    result.and(closed)?;
    Ok(DONE)
}

fn act(tool: &Tool, image: &Image, action: Action) -> Result<(), Failure> {
    let (layer, node) = (image.layer(), image.root);
    let all = |name: &str| SnapshotSelector::Name(name.as_bytes().to_vec());
    let (verb, name, result) = match action {
        Action::List => {
            list(image);
            return Ok(());
        }
        Action::Create(name) => {
            let new = NewSnapshot::of_disk(name.as_bytes());
            let work = layer.internal_snapshot_create(node, new);
            ("create", name, blockplex::block_on(work))
        }
        Action::Apply(name) => {
            let work = layer.internal_snapshot_apply(node, all(&name));
            ("apply", name, blockplex::block_on(work))
        }
        Action::Delete(name) => {
            let work = layer.internal_snapshot_delete(node, all(&name));
            ("delete", name, blockplex::block_on(work))
        }
    };
    match result {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => {
            if verb == "apply" && describe(&error).starts_with("Snapshot L1 table ") {
                // What is wrong with it comes first, in a line of its own.
                tool.report(describe(&error));
                let number = if describe(&error).ends_with("too large") { EFBIG } else { EINVAL };
                return Err(Failure::new(format!(
                    "Could not apply snapshot '{name}': Failed to load snapshot: {}",
                    strerror(number)
                )));
            }
            let text = format!("Could not {verb} snapshot '{name}': {}", reason(verb, &error));
            Err(Failure::new(text))
        }
        Err(error) => Err(Failure::new(error.to_string())),
    }
}

fn list(image: &Image) {
    // What has no snapshots lists none.
    let snapshots = image.layer().internal_snapshots(image.root).unwrap_or_default();
    if snapshots.is_empty() {
        return;
    }
    println!("Snapshot list:");
    println!("{}", snapshot_list::HEADING);
    for snapshot in snapshots {
        println!("{}", snapshot_list::row(&snapshot.entry));
    }
}

/// The numbers of errors of a snapshot's table: it is too large, and anything else.
const EFBIG: i32 = 27;
const EINVAL: i32 = 22;

fn reason(verb: &str, error: &Error) -> String {
    match error.kind() {
        // Only the number of what went wrong reaches the user here.
        _ if verb == "create" => strerror(error.errno()),
        ErrorKind::NotSupported if verb == "apply" => {
            "Block driver does not support snapshots".to_owned()
        }
        ErrorKind::NotSupported => "snapshot not found".to_owned(),
        ErrorKind::NotFound if verb == "apply" => {
            format!("Failed to load snapshot: {}", strerror(error.errno()))
        }
        ErrorKind::NotFound => "snapshot not found".to_owned(),
        _ => describe(error),
    }
}
