//! `img bitmap`: persistent bitmaps added, removed, cleared, switched, merged.

use blockplex::ErrorKind;
use blockplex::drivers::qcow2::NewBitmap;

use super::source::{FORMAT, HELP, IMAGE_OPTS, OBJECT, Source};
use super::{Command, DONE, print_command_help};
use crate::tool::getopt::{Opt, Parser, long, long_with, with};
use crate::tool::open::{Image, ImageOpenOptions};
use crate::tool::{Failure, Tool, size, wait};

pub const COMMAND: Command =
    Command { name: "bitmap", help: HELP_TEXT, run, summary: "persistent bitmaps" };

const HELP_TEXT: &str = "\
Change a persistent bitmap of a disk image, in the order in which it is asked for.

Usage: {tool} bitmap (--add [-g SIZE] | --remove | --clear | --enable | --disable |
           --merge BITMAP)... [-b FILE [-F FMT]] [-f FMT | --image-opts] FILE BITMAP

  -h, --help                 print this help and exit
  -f, --format FMT           format of FILE, instead of finding it out
      --image-opts           FILE is a list of options, driver=...,file.filename=...
      --add                  add the bitmap, which records from now on
  -g, --granularity SIZE     what a bit of the added bitmap stands for
      --remove               remove it
      --clear                make all of it clean
      --enable, --disable    let it record, or not
      --merge BITMAP         mark all that is dirty in another bitmap
  -b, --source-file FILE     of this image
  -F, --source-format FMT    which is in this format
      --object OBJECT        define a secret
";

const OPTIONS: &[Opt] = &[
    HELP,
    with("source-file", 'b'),
    with("source-format", 'F'),
    FORMAT,
    with("granularity", 'g'),
    IMAGE_OPTS,
    OBJECT,
    long("add"),
    long("remove"),
    long("clear"),
    long("enable"),
    long("disable"),
    long_with("merge"),
];

enum Action {
    Add,
    Remove,
    Clear,
    Enable,
    Disable,
    Merge(String),
}

impl Action {
    fn name(&self) -> &'static str {
        match self {
            Action::Add => "add",
            Action::Remove => "remove",
            Action::Clear => "clear",
            Action::Enable => "enable",
            Action::Disable => "disable",
            Action::Merge(_) => "merge",
        }
    }
}

#[derive(Default)]
struct Arguments {
    source: Source,
    actions: Vec<Action>,
    granularity: Option<u64>,
    merge_file: Option<String>,
    merge_format: Option<String>,
}

fn run(tool: &mut Tool, words: Vec<String>) -> Result<u8, Failure> {
    let mut arguments = Arguments::default();
    let mut parser = Parser::new(tool.name(), Some("bitmap"), OPTIONS, words);
    while let Some(option) = parser.next()? {
        match option.name {
            "help" => return print_command_help(tool, &COMMAND),
            "source-file" => arguments.merge_file = Some(option.value),
            "source-format" => arguments.merge_format = Some(option.value),
            "granularity" => {
                let bytes = size::parse_within("granularity", &option.value, 1..=i64::MAX as u64)?;
                arguments.granularity = Some(bytes);
            }
            "add" => arguments.actions.push(Action::Add),
            "remove" => arguments.actions.push(Action::Remove),
            "clear" => arguments.actions.push(Action::Clear),
            "enable" => arguments.actions.push(Action::Enable),
            "disable" => arguments.actions.push(Action::Disable),
            "merge" => arguments.actions.push(Action::Merge(option.value)),
            _ => drop(arguments.source.take(tool, &option)?),
        }
    }
    let words: Result<[String; 2], _> = parser.positional().try_into();
    check(&arguments)?;
    let [filename, bitmap] =
        words.map_err(|_| Failure::new("Expecting filename and bitmap name"))?;
    let options = arguments.source.open_options(&filename)?;
    let image = tool.open(&ImageOpenOptions { write: true, image_alone: true, ..options })?;
    let done = act(tool, &arguments, &image, &bitmap);
    let closed = image.close();
    done.and(closed)?;
    Ok(DONE)
}

fn check(arguments: &Arguments) -> Result<(), Failure> {
    let Arguments { actions, granularity, merge_file, merge_format, .. } = arguments;
    let adds = actions.iter().any(|action| matches!(action, Action::Add));
    let merges = actions.iter().any(|action| matches!(action, Action::Merge(_)));
    let problem = if actions.is_empty() {
        "Need at least one of --add, --remove, --clear, --enable, --disable, or --merge"
    } else if granularity.is_some() && !adds {
        "granularity only supported with --add"
    } else if merge_format.is_some() && merge_file.is_none() {
        "-F only supported with -b"
    } else if merge_file.is_some() && !merges {
        "Merge bitmap source file only supported with --merge"
    } else {
        return Ok(());
    };
    Err(Failure::new(problem))
}

fn act(tool: &Tool, arguments: &Arguments, image: &Image, bitmap: &str) -> Result<(), Failure> {
    let other = match &arguments.merge_file {
        Some(name) => Some(tool.open(&ImageOpenOptions {
            format: arguments.merge_format.clone(),
            image_alone: true,
            ..ImageOpenOptions::new(name)
        })?),
        None => None,
    };
    let mut done = Ok(());
    for action in &arguments.actions {
        done = one(arguments, image, other.as_ref().unwrap_or(image), action, bitmap);
        if let Err(failure) = done {
            let before = format!("Operation {} on bitmap {bitmap} failed: ", action.name());
            done = Err(failure.prefixed(&before));
            break;
        }
    }
    let closed = other.map_or(Ok(()), Image::close);
    done.and(closed)
}

fn one(
    arguments: &Arguments,
    image: &Image,
    source: &Image,
    action: &Action,
    bitmap: &str,
) -> Result<(), Failure> {
    let (layer, node, name) = (image.layer(), image.root, bitmap.as_bytes());
    let done = match action {
        Action::Add => {
            let granularity = arguments.granularity;
            wait(layer.bitmap_add(node, NewBitmap { granularity, ..NewBitmap::persistent(name) }))
        }
        Action::Remove => wait(layer.bitmap_remove(node, name)),
        Action::Clear => wait(layer.bitmap_clear(node, name)),
        Action::Enable => wait(layer.bitmap_enable(node, name)),
        Action::Disable => wait(layer.bitmap_disable(node, name)),
        Action::Merge(other) => {
            wait(layer.bitmap_merge((node, name), (source.root, other.as_bytes())))
        }
    };
    done.map_err(|failure| in_other_words(failure, action, bitmap))
}

/// The library's refusals in the words of QEMU's tools.
fn in_other_words(failure: Failure, action: &Action, bitmap: &str) -> Failure {
    let text = failure.text().unwrap_or_default();
    let other = match action {
        Action::Merge(name) => name,
        _ => bitmap,
    };
    if text.starts_with("granularity ") {
        return Failure::new("Granularity must be power of 2 and at least 512");
    }
    if text.contains("has no such operation") {
        return Failure::new(match action {
            Action::Add => "Can't store persistent bitmaps: Operation not supported".to_owned(),
            _ => format!("Dirty bitmap '{other}' not found"),
        });
    }
    if let Some(text) = text.strip_suffix(": only remove it") {
        let hint = "Try block-dirty-bitmap-remove to delete this bitmap from disk";
        return Failure::new(format!("{text}\n{hint}"));
    }
    match failure.kind {
        Some(ErrorKind::NotSupported) if matches!(action, Action::Add) => {
            failure.prefixed(&format!("Can't make bitmap '{bitmap}' persistent: "))
        }
        _ => failure,
    }
}
