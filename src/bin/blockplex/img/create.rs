//! `img create`: a new image.

use super::{Command, DONE, print_command_help};
use crate::tool::create::{
    CreationFormat, check_options, file_path, format_named, print_options, told,
};
use crate::tool::getopt::{Opt, Parser, long_with, opt, with};
use crate::tool::names::beside;
use crate::tool::open::ImageOpenOptions;
use crate::tool::option_list::OptionList;
use crate::tool::{Failure, Tool, size};

pub const COMMAND: Command = Command { name: "create", help: HELP, run, summary: "make an image" };

const HELP: &str = "\
Make a new disk image.

Usage: {tool} create [-f FMT] [-o OPTIONS] [-b BACKING [-F FMT]] [-u] [-q] FILE [SIZE]

  -h, --help                 print this help and exit
  -q, --quiet                print nothing that is no error
  -f, --format FMT           format of the image (default: raw)
  -o, --options OPTIONS      options of the format, key=value,...; 'help' lists them
  -b, --backing BACKING      the image below the new one
  -F, --backing-format FMT   the format of BACKING
  -u, --backing-unsafe       do not open BACKING
      --object OBJECT        define a secret: secret,id=ID,file=FILE|data=TEXT
  FILE                       the file to make; one that is there is overwritten
  SIZE                       bytes, or with a suffix k, M, G, T, P, E; default: BACKING's size
";

const OPTIONS: &[Opt] = &[
    opt("help", 'h'),
    opt("quiet", 'q'),
    long_with("object"),
    with("format", 'f'),
    with("backing", 'b'),
    with("backing-format", 'F'),
    opt("backing-unsafe", 'u'),
    with("options", 'o'),
];

#[derive(Default)]
struct Arguments {
    format: Option<String>,
    backing: Option<String>,
    backing_format: Option<String>,
    is_unsafe: bool,
    is_quiet: bool,
    options: OptionList,
    filename: String,
    size: Option<u64>,
}

fn run(tool: &mut Tool, words: Vec<String>) -> Result<u8, Failure> {
    let mut arguments = Arguments::default();
    let mut parser = Parser::new(tool.name(), Some("create"), OPTIONS, words);
    while let Some(option) = parser.next()? {
        match option.name {
            "help" => return print_command_help(tool, &COMMAND),
            "quiet" => arguments.is_quiet = true,
            "object" => tool.add_object(&option.value)?,
            "format" => arguments.format = Some(option.value),
            "backing" => arguments.backing = Some(option.value),
            "backing-format" => arguments.backing_format = Some(option.value),
            "backing-unsafe" => arguments.is_unsafe = true,
            _ => arguments.options.add(&option.value)?,
        }
    }
    let mut words = parser.positional().into_iter();
    let name = arguments.format.clone().unwrap_or_else(|| "raw".to_owned());
    if arguments.options.wants_help() {
        let format = format_named(&name)?;
        let file = words.next();
        if let Some(file) = &file {
            file_path(file)?;
        }
        print_options(format, file.is_some());
        return Ok(DONE);
    }
    arguments.filename = words.next().ok_or_else(|| Failure::usage("Expecting image file name"))?;
    arguments.size = words.next().map(|text| size::parse_bytes("image size", &text)).transpose()?;
    if let Some(word) = words.next() {
        return Err(Failure::usage(format!("Unexpected argument: {word}")));
    }
    let before = format!("{}: ", arguments.filename);
    create(tool, arguments, &name).map_err(|failure| failure.prefixed(&before))?;
    Ok(DONE)
}

fn create(tool: &Tool, arguments: Arguments, format: &str) -> Result<(), Failure> {
    let Arguments { filename, mut options, .. } = arguments;
    let format = format_named(format)?;
    file_path(&filename)?;
    check_options(format, &options)?;
    if let Some(size) = arguments.size {
        if options.get("size").is_some() {
            return Err(Failure::new("The image size must be specified only once"));
        }
        options.set("size", size.to_string());
    }
    set_backing(format, &mut options, "backing_file", arguments.backing)?;
    set_backing(format, &mut options, "backing_fmt", arguments.backing_format)?;
    let backing = options.get("backing_file").map(str::to_owned);
    if let Some(backing) = backing {
        check_backing(tool, &filename, &backing, &mut options, arguments.is_unsafe)?;
    }
    if options.get("size").is_none() {
        return Err(Failure::new("Image creation needs a size parameter"));
    }
    if !arguments.is_quiet {
        println!("Formatting '{filename}', fmt={}{}", format.name, told(format, &options)?);
    }
    tool.create_image(&filename, format, &options)
}

fn set_backing(
    format: &CreationFormat,
    options: &mut OptionList,
    key: &str,
    value: Option<String>,
) -> Result<(), Failure> {
    let Some(value) = value else { return Ok(()) };
    if !format.takes_backing {
        let what = if key == "backing_file" { "Backing file" } else { "Backing format" };
        let text = format!("{what} not supported for file format '{}'", format.name);
        return Err(Failure::new(text));
    }
    options.set(key, value);
    Ok(())
}

/// Looks at the backing file, and takes the size from it where none was given.
fn check_backing(
    tool: &Tool,
    filename: &str,
    backing: &str,
    options: &mut OptionList,
    is_unsafe: bool,
) -> Result<(), Failure> {
    if backing.is_empty() {
        return Err(Failure::new("Expected backing file name, got empty string"));
    }
    if backing == filename {
        let text = "Error: Trying to create an image with the same filename as the backing file";
        return Err(Failure::new(text));
    }
    let format = options.get("backing_fmt").map(str::to_owned);
    const NO_FORMAT: &str = "Backing file specified without backing format";
    if is_unsafe {
        return match format {
            None => Err(Failure::new(NO_FORMAT)),
            Some(_) => Ok(()),
        };
    }
    let full = beside(filename, backing);
    let how = ImageOpenOptions {
        format: format.clone(),
        force_share: true,
        // Its size is all that counts.
        metadata_only: true,
        ..ImageOpenOptions::new(full)
    };
    let image = tool.open_quietly(&how).map_err(|failure| {
        let text = failure.text().unwrap_or_default();
        Failure::new(format!("{text}\nCould not open backing image."))
    })?;
    let (length, detected) = (image.length()?, image.format()?);
    image.close()?;
    if format.is_none() {
        return Err(Failure::new(format!("{NO_FORMAT}\nDetected format of {detected}.")));
    }
    if options.get("size").is_none() {
        options.set("size", length.to_string());
    }
    Ok(())
}
