//! `img amend`: what an image was created with, changed.

mod key_slots;

use blockplex::Request;
use blockplex::drivers::crypto::luks::SlotChange;
use blockplex::drivers::qcow2::amend::{AmendOptions, amend};
use blockplex::drivers::qcow2::entry::Version;
use blockplex::graph::Child;

use super::progress::Progress;
use super::source::{FORMAT, HELP, IMAGE_OPTS, OBJECT, QUIET, Source, cache_mode};
use super::{Command, DONE, print_command_help};
use crate::tool::create::{CreationOption, format_named, is_known, print_option};
use crate::tool::getopt::{Opt, Parser, long, opt, with};
use crate::tool::open::ImageOpenOptions;
use crate::tool::option_list::OptionList;
use crate::tool::{Failure, Tool};

pub const COMMAND: Command = Command {
    name: "amend",
    help: HELP_TEXT,
    run,
    summary: "change what an image was created with",
};

const HELP_TEXT: &str = "\
Change what a disk image was created with.

Usage: {tool} amend [-f FMT | --image-opts] [-t CACHE] [--force] [-p] [-q] -o OPTIONS FILE

  -h, --help                 print this help and exit
  -q, --quiet                print nothing that is no error
  -p, --progress             show how far it is
  -f, --format FMT           format of FILE, instead of finding it out
      --image-opts           FILE is a list of options, driver=...,file.filename=...
  -t, --cache CACHE          none, writeback (the default), writethrough, directsync, unsafe
  -o, --options OPTIONS      what to change, key=value,...; 'help' lists it
      --force                do what may lose the way to encrypted data, too
      --object OBJECT        define a secret
";

const OPTIONS: &[Opt] = &[
    HELP,
    QUIET,
    opt("progress", 'p'),
    FORMAT,
    IMAGE_OPTS,
    with("cache", 't'),
    long("force"),
    with("options", 'o'),
    OBJECT,
];

/// What can be changed of a qcow2 image.
const AMENDABLE: [&str; 8] = [
    "backing_file",
    "backing_fmt",
    "compat",
    "data_file",
    "data_file_raw",
    "lazy_refcounts",
    "refcount_bits",
    "size",
];

fn run(tool: &mut Tool, words: Vec<String>) -> Result<u8, Failure> {
    let mut source = Source::default();
    let (mut quiet, mut show, mut force) = (false, false, false);
    let mut cache = "writeback".to_owned();
    let (mut options, mut is_given) = (OptionList::default(), false);
    let mut parser = Parser::new(tool.name(), Some("amend"), OPTIONS, words);
    while let Some(option) = parser.next()? {
        match option.name {
            "help" => return print_command_help(tool, &COMMAND),
            "quiet" => quiet = true,
            "progress" => show = true,
            "cache" => cache = option.value,
            // Only the key slots of encrypted images ask for it.
            "force" => force = true,
            "options" => {
                is_given = true;
                options.add(&option.value)?;
            }
            _ => drop(source.take(tool, &option)?),
        }
    }
    if !is_given {
        return Err(Failure::usage("Must specify options (-o)"));
    }
    let mut words = parser.positional().into_iter();
    let (filename, rest) = (words.next(), words.next());
    if options.wants_help()
        && let Some(format) = &source.format
    {
        return print_amendable(format);
    }
    let one = || Failure::new("Expecting one image file name");
    let filename = filename.filter(|_| rest.is_none()).ok_or_else(one)?;
    let cache = cache_mode("", &cache)?;
    let how = ImageOpenOptions { write: true, cache, ..source.open_options(&filename)? };
    let image = tool.open(&how)?;
    let format = image.format()?;
    let slots = match options.wants_help() {
        true => Ok(None),
        false => wishes_of(tool, format, &options),
    };
    let (wishes, slots) = match slots {
        Ok(Some((wishes, slots))) => (Some(wishes), slots),
        Ok(None) => (None, None),
        Err(failure) => {
            image.close()?;
            return Err(failure);
        }
    };
    let changed = slots.map_or(Ok(()), |slots| key_slots::change(&image, slots, force));
    image.close()?;
    changed?;
    let Some(wishes) = wishes else { return print_amendable(format) };
    if format == "qcow2" {
        change(tool, &how, &wishes, show && !quiet)?;
    }
    Ok(DONE)
}

fn not_amendable(format: &str) -> Failure {
    Failure::new(format!("Format driver '{format}' does not support option amendment"))
}

fn print_amendable(name: &str) -> Result<u8, Failure> {
    if !matches!(name, "luks" | "qcow2") && is_known(name) {
        return Err(not_amendable(name));
    }
    let format = format_named(name)?;
    println!("Amend options for '{name}':");
    let mut options: Vec<CreationOption> = format.own_options().to_vec();
    match name {
        "luks" => options = key_slots::OF_LUKS.to_vec(),
        _ => {
            options.retain(|option| AMENDABLE.contains(&option.name));
            options.extend(key_slots::OF_QCOW2);
        }
    }
    options.sort_by_key(|option| option.name);
    options.iter().for_each(print_option);
    Ok(DONE)
}

/// What is to change, of the image and of its key slots.
fn wishes_of(
    tool: &Tool,
    name: &str,
    options: &OptionList,
) -> Result<Option<(Wishes, Option<SlotChange>)>, Failure> {
    if !matches!(name, "luks" | "qcow2") {
        return Err(not_amendable(name));
    }
    let wishes = Wishes::read(name, options)?;
    Ok(Some((wishes, key_slots::wanted(tool, name, options)?)))
}

/// What is to change.
#[derive(Default)]
struct Wishes {
    amend: AmendOptions,
    size: Option<u64>,
}

impl Wishes {
    fn read(name: &str, options: &OptionList) -> Result<Wishes, Failure> {
        let format = format_named(name)?;
        let is_luks = name == "luks";
        let slots = if is_luks { key_slots::OF_LUKS } else { key_slots::OF_QCOW2 };
        for key in options.keys() {
            let known = AMENDABLE.contains(&key) && !is_luks;
            if !known && !slots.iter().any(|option| option.name == key) {
                let for_creation = format.own_options().iter().any(|option| option.name == key);
                let hint = match for_creation {
                    true => "\nThis option is only supported for image creation",
                    false => "",
                };
                return Err(Failure::new(format!("Invalid parameter '{key}'{hint}")));
            }
        }
        if is_luks {
            return Ok(Wishes::default());
        }
        let bytes = |key| options.get(key).map(|text: &str| text.as_bytes().to_vec());
        let version = match options.get("compat") {
            None => None,
            Some("0.10" | "v2") => Some(Version::V2),
            Some("1.1" | "v3") => Some(Version::V3),
            Some(other) => {
                return Err(Failure::new(format!("Unknown compatibility level {other}")));
            }
        };
        let amend = AmendOptions {
            version,
            refcount_bits: options.number("refcount_bits")?,
            lazy_refcounts: options.switch("lazy_refcounts")?,
            data_file: bytes("data_file"),
            data_file_raw: options.switch("data_file_raw")?,
            backing_file: bytes("backing_file"),
            backing_format: bytes("backing_fmt"),
        };
        Ok(Wishes { amend, size: options.size("size")? })
    }
}

/// An image grows after it has become version 3, and before it becomes version 2.
fn change(
    tool: &Tool,
    how: &ImageOpenOptions,
    wishes: &Wishes,
    shown: bool,
) -> Result<(), Failure> {
    let progress = std::sync::Arc::new(Progress::new(shown, 1.0));
    progress.set(0.0);
    let first = match wishes.size {
        Some(_) if wishes.amend.version == Some(Version::V2) => {
            AmendOptions { version: None, ..wishes.amend.clone() }
        }
        _ => wishes.amend.clone(),
    };
    let is_split = first != wishes.amend;
    if first != AmendOptions::default() {
        amend_file(tool, how, first, &progress)?;
    }
    if let Some(size) = wishes.size {
        let image = tool.open(how)?;
        let resized = image.disk().run(Request::truncate(size)).map(drop);
        let closed = image.close();
        resized?;
        closed?;
    }
    if is_split {
        amend_file(tool, how, wishes.amend.clone(), &progress)?;
    }
    progress.set(100.0);
    progress.end();
    Ok(())
}

fn amend_file(
    tool: &Tool,
    how: &ImageOpenOptions,
    options: AmendOptions,
    progress: &std::sync::Arc<Progress>,
) -> Result<(), Failure> {
    let progress = progress.clone();
    let work = async move |file: &Child| {
        let mut tell = |done: u64, whole: u64| {
            if whole > 0 {
                progress.set(done as f32 * 100.0 / whole as f32);
            }
        };
        amend(file, &options, &mut tell).await
    };
    tool.with_image_file(how, work)?.map_err(Failure::from)
}
