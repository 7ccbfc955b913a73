//! `img measure`: how large the file of a new image would be.

use blockplex::drivers::crypto::luks::header_bytes;
use blockplex::drivers::qcow2::entry::Version;
use blockplex::drivers::qcow2::geometry::Geometry;
use blockplex::drivers::qcow2::measure::{self, DataBytes, MeasureOptions};
use blockplex::drivers::qcow2::{CreateEncryption, Qcow2};
use blockplex::graph::Preallocation;

use super::convert::check_snapshot;
use super::source::{FORCE_SHARE, FORMAT, HELP, IMAGE_OPTS, OBJECT, Source};
use super::{Command, DONE, print_command_help, wants_json};
use crate::tool::create::{check_options, encryption, format_named, qcow2_options};
use crate::tool::getopt::{Opt, Parser, long_with, with};
use crate::tool::json::Json;
use crate::tool::open::Image;
use crate::tool::option_list::OptionList;
use crate::tool::{Failure, Tool, size};

pub const COMMAND: Command = Command {
    name: "measure",
    help: HELP_TEXT,
    run,
    summary: "say how large the file of a new image would be",
};

const HELP_TEXT: &str = "\
Say how large the file of a new disk image would be.

Usage: {tool} measure [-O FMT] [-o OPTIONS] [--output human|json]
           [-f FMT | --image-opts] [-U] [-l SNAPSHOT] (--size SIZE | FILE)

  -h, --help                 print this help and exit
  -O, --target-format FMT    format of the new image (default: raw)
  -o, --options OPTIONS      options of that format, key=value,...
      --size SIZE            the size of its disk
  FILE                       or the image that it is to be a copy of
  -f, --format FMT           format of FILE, instead of finding it out
      --image-opts           FILE is a list of options, driver=...,file.filename=...
  -l, --snapshot SNAPSHOT    an internal snapshot of FILE instead of its disk
  -U, --force-share          whatever other programs do with FILE meanwhile
      --output human|json    how to print it
      --object OBJECT        define a secret
";

const OPTIONS: &[Opt] = &[
    HELP,
    with("target-format", 'O'),
    FORMAT,
    IMAGE_OPTS,
    with("options", 'o'),
    with("snapshot", 'l'),
    OBJECT,
    long_with("output"),
    long_with("size"),
    FORCE_SHARE,
];

#[derive(Default)]
struct Arguments {
    source: Source,
    target: Option<String>,
    options: OptionList,
    snapshot: Option<String>,
    size: Option<u64>,
    json: bool,
}

/// The sizes, in bytes.
struct Sizes {
    required: u64,
    full: u64,
    /// Of persistent bitmaps, where the formats have them.
    bitmaps: Option<u64>,
}

fn run(tool: &mut Tool, words: Vec<String>) -> Result<u8, Failure> {
    let mut arguments = Arguments::default();
    let mut parser = Parser::new(tool.name(), Some("measure"), OPTIONS, words);
    while let Some(option) = parser.next()? {
        match option.name {
            "help" => return print_command_help(tool, &COMMAND),
            "target-format" => arguments.target = Some(option.value),
            "options" => arguments.options.add(&option.value)?,
            "snapshot" => {
                check_snapshot(tool, &option.value)?;
                arguments.snapshot = Some(option.value);
            }
            "output" => arguments.json = wants_json(&option.value)?,
            "size" => arguments.size = Some(size::parse_bytes("image size", &option.value)?),
            _ => drop(arguments.source.take(tool, &option)?),
        }
    }
    let filename = check(&arguments, parser.positional())?;
    let image = filename.map(|name| open(tool, &arguments, &name)).transpose()?;
    let sizes = measure(tool, &arguments, image.as_ref());
    image.map_or(Ok(()), Image::close)?;
    print(&sizes?, arguments.json);
    Ok(DONE)
}

/// The name of the image to be copied, if there is one.
fn check(arguments: &Arguments, mut words: Vec<String>) -> Result<Option<String>, Failure> {
    if words.len() > 1 {
        return Err(Failure::new("At most one filename argument is allowed."));
    }
    let filename = words.pop();
    let source = &arguments.source;
    let needs_file = source.image_opts || source.format.is_some() || arguments.snapshot.is_some();
    let problem = match (&filename, arguments.size) {
        (None, _) if needs_file => "--image-opts, -f, and -l require a filename argument.",
        (None, None) => "Either --size N or one filename must be specified.",
        (Some(_), Some(_)) => "--size N cannot be used together with a filename.",
        _ => return Ok(filename),
    };
    Err(Failure::new(problem))
}

fn open(tool: &Tool, arguments: &Arguments, filename: &str) -> Result<Image, Failure> {
    let mut options = arguments.source.open_options(filename)?;
    if let Some(snapshot) = &arguments.snapshot {
        options.options.push(("internal-snapshot".to_owned(), snapshot.clone()));
    }
    tool.open(&options).map_err(|failure| {
        let is_missing = failure.text().is_some_and(|text| text.contains("has no snapshot"));
        match is_missing {
            true => Failure::new("Failed to load snapshot: Can't find snapshot"),
            false => failure,
        }
    })
}

fn measure(tool: &Tool, arguments: &Arguments, image: Option<&Image>) -> Result<Sizes, Failure> {
    let target = format_named(arguments.target.as_deref().unwrap_or("raw"))?;
    if let Err(failure) = check_options(target, &arguments.options) {
        tool.report(failure.text().unwrap_or_default());
        return Err(Failure::new(format!("Invalid options for file format '{}'", target.name)));
    }
    let length = match image {
        Some(image) => image.length()?,
        None => arguments.size.unwrap_or(0),
    };
    let length = length.next_multiple_of(512);
    if target.name == "luks" {
        let luks = encryption::of_luks(&arguments.options, &tool.secrets)?;
        let whole = length + header_bytes(&luks.suite);
        return Ok(Sizes { required: whole, full: whole, bitmaps: None });
    }
    if target.name == "raw" {
        return Ok(Sizes { required: length, full: length, bitmaps: None });
    }
    measure_qcow2(tool, &arguments.options, image, length)
}

fn measure_qcow2(
    tool: &Tool,
    options: &OptionList,
    image: Option<&Image>,
    length: u64,
) -> Result<Sizes, Failure> {
    let mode = options.get("preallocation").unwrap_or("off");
    if Preallocation::from_name(mode).is_none() {
        return Err(Failure::new(format!("invalid parameter value: {mode}")));
    }
    // The size is not among them: it is checked with the rest below.
    let wanted = qcow2_options(options, 0)?;
    let encryption_header = match encryption::of_qcow2(options, &tool.secrets)? {
        Some(CreateEncryption::Luks(luks)) => header_bytes(&luks.suite),
        Some(CreateEncryption::Aes(_)) | None => 0,
    };
    let cluster_bits = wanted.cluster_size.trailing_zeros();
    let order = wanted.refcount_bits.trailing_zeros();
    let geometry = Geometry::new(cluster_bits, order, wanted.extended_l2)
        .map_err(|error| Failure::new(error.to_string()))?;
    let data = match image {
        None => DataBytes::new(geometry),
        Some(_) if wanted.backing_name.is_some() => DataBytes::all(geometry, length),
        Some(image) => data_of(image, geometry)?,
    };
    let falloc_or_full = [Preallocation::Falloc, Preallocation::Full];
    let how = MeasureOptions {
        geometry,
        size: length,
        encryption_header,
        data_is_preallocated: falloc_or_full.contains(&wanted.preallocation),
    };
    let measured = measure::measure(&how, data).map_err(|_| {
        Failure::new("The image size is too large (try using a larger cluster size)")
    })?;
    Ok(Sizes {
        required: measured.required,
        full: measured.fully_allocated,
        // Version 2 has none.
        bitmaps: image
            .filter(|_| wanted.version == Version::V3)
            .map(|image| bitmaps_of(image, &geometry, length))
            .transpose()?
            .flatten(),
    })
}

/// The most bytes that one question is about.
const STEP: u64 = 1 << 30;

/// Where the image has data that a copy would have, too.
fn data_of(image: &Image, geometry: Geometry) -> Result<DataBytes, Failure> {
    let mut data = DataBytes::new(geometry);
    let (disk, length) = (image.disk(), image.length()?);
    let mut offset = 0;
    while offset < length {
        let status = disk.block_status(offset, (length - offset).min(STEP))?;
        let end = offset + status.length.max(1);
        offset = match status.data && !status.zero {
            true => data.add(offset, end - offset).max(end),
            false => end,
        };
    }
    Ok(data)
}

fn print(sizes: &Sizes, json: bool) {
    let Sizes { required, full, bitmaps } = sizes;
    if json {
        let mut members: Vec<(&'static str, Json)> = Vec::new();
        members.extend(bitmaps.map(|bytes| ("bitmaps", bytes.into())));
        members.push(("required", (*required).into()));
        members.push(("fully-allocated", (*full).into()));
        println!("{}", Json::Object(members).pretty());
        return;
    }
    println!("required size: {required}");
    println!("fully allocated size: {full}");
    if let Some(bitmaps) = bitmaps {
        println!("bitmaps size: {bitmaps}");
    }
}

/// The bytes that a copy of the image's persistent bitmaps would take.
fn bitmaps_of(image: &Image, geometry: &Geometry, length: u64) -> Result<Option<u64>, Failure> {
    let view = image.view()?;
    let source = view.driver_as::<Qcow2>().map(Qcow2::information);
    Ok(source.filter(|told| told.version == Version::V3).map(|told| {
        // Those that cannot be relied on as well, as in QEMU.
        let bitmaps = told.bitmaps.iter().map(|bitmap| (bitmap.granularity, bitmap.name.len()));
        measure::bitmap_bytes(geometry, length, bitmaps)
    }))
}
