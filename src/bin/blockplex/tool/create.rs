//! Making images: the options that each format takes, and [`Tool::create_image`].
//!
//! [`CREATION`] describes the options once: for `-o help`, for the line that `create` prints, and
//! for finding what is no option. What the options mean is checked here in the words of QEMU's
//! tools, and once more by the library.

use blockplex::drivers::luks;
use blockplex::drivers::qcow2::entry::Version;
use blockplex::drivers::qcow2::header::CompressionType;
use blockplex::drivers::qcow2::{self, CreateOptions};
use blockplex::file_name::FileName;
use blockplex::graph::{Child, Preallocation};

use super::names::beside;
use super::option_list::OptionList;
use super::{Failure, Tool, wait};

/// What an option's value is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Text.
    Text,
    /// `on` or `off`.
    Switch,
    /// A whole number.
    Number,
    /// Bytes, with a suffix.
    Size,
}

/// An option of `-o`.
#[derive(Clone, Copy, Debug)]
pub struct CreationOption {
    /// Its name.
    pub name: &'static str,
    /// What its value is.
    pub kind: Kind,
    /// One line about it.
    pub help: &'static str,
    /// Its value where none is given, if there is one that is worth saying.
    pub default: Option<&'static str>,
}

const fn option(name: &'static str, kind: Kind, help: &'static str) -> CreationOption {
    CreationOption { name, kind, help, default: None }
}

impl CreationOption {
    const fn or(self, value: &'static str) -> CreationOption {
        CreationOption { default: Some(value), ..self }
    }
}

/// A format that images can be made in.
#[derive(Debug)]
pub struct CreationFormat {
    /// Its name.
    pub name: &'static str,
    /// Its options, in the order in which they are told.
    pub options: &'static [CreationOption],
    /// The number of them that are the format's; those after are its file's.
    own: usize,
    /// Whether images may have a backing file.
    pub takes_backing: bool,
}

impl CreationFormat {
    /// The options that are the format's, without its file's.
    pub fn own_options(&self) -> &'static [CreationOption] {
        self.options.get(..self.own).unwrap_or(self.options)
    }
}

pub mod encryption;

use Kind::{Number, Size, Switch, Text};

const SIZE: CreationOption = option("size", Size, "Virtual disk size");
const NOCOW: CreationOption =
    option("nocow", Switch, "Turn off copy-on-write (valid only on btrfs)");
const EXTENT_SIZE: CreationOption =
    option("extent_size_hint", Size, "Extent size hint for the image file, 0 to disable");

const RAW: &[CreationOption] = &[
    SIZE,
    NOCOW,
    option("preallocation", Text, "Preallocation mode (allowed values: off, falloc, full)"),
    EXTENT_SIZE,
];

const CIPHER: &str = "Name of encryption cipher algorithm";
const MODE: &str = "Name of encryption cipher mode";
const IVGEN: &str = "Name of IV generator algorithm";
const IVGEN_HASH: &str = "Name of IV generator hash algorithm";
const HASH: &str = "Name of encryption hash algorithm";
const TIME: &str = "Time to spend in PBKDF in milliseconds";

const LUKS: &[CreationOption] = &[
    SIZE,
    option("key-secret", Text, "ID of the secret that provides the keyslot passphrase"),
    option("cipher-alg", Text, CIPHER),
    option("cipher-mode", Text, MODE),
    option("ivgen-alg", Text, IVGEN),
    option("ivgen-hash-alg", Text, IVGEN_HASH),
    option("hash-alg", Text, HASH),
    option("iter-time", Number, TIME),
    option("detached-header", Switch, "Create a detached LUKS header"),
    NOCOW,
    option("preallocation", Text, "Preallocation mode (allowed values: off, falloc, full)"),
    EXTENT_SIZE,
];

const QCOW2: &[CreationOption] = &[
    option(
        "encryption",
        Switch,
        "Encrypt the image with format 'aes'. (Deprecated in favor of encrypt.format=aes)",
    ),
    option("encrypt.format", Text, "Encrypt the image, format choices: 'aes', 'luks'"),
    option("encrypt.key-secret", Text, "ID of secret providing qcow AES key or LUKS passphrase"),
    option("encrypt.cipher-alg", Text, CIPHER),
    option("encrypt.cipher-mode", Text, MODE),
    option("encrypt.ivgen-alg", Text, IVGEN),
    option("encrypt.ivgen-hash-alg", Text, IVGEN_HASH),
    option("encrypt.hash-alg", Text, HASH),
    option("encrypt.iter-time", Number, TIME),
    option("cluster_size", Size, "qcow2 cluster size").or("65536"),
    option("extended_l2", Switch, "Extended L2 tables").or("off"),
    option(
        "preallocation",
        Text,
        "Preallocation mode (allowed values: off, metadata, falloc, full)",
    ),
    option("compression_type", Text, "Compression method used for image cluster compression")
        .or("zlib"),
    SIZE,
    option("compat", Text, "Compatibility level (v2 [0.10] or v3 [1.1])"),
    option("backing_file", Text, "File name of a base image"),
    option("backing_fmt", Text, "Image format of the base image"),
    option("data_file", Text, "File name of an external data file"),
    option("data_file_raw", Switch, "The external data file must stay valid as a raw image"),
    option("lazy_refcounts", Switch, "Postpone refcount updates").or("off"),
    option("refcount_bits", Number, "Width of a reference count entry in bits").or("16"),
    NOCOW,
    EXTENT_SIZE,
];

/// The formats that images can be made in.
pub const CREATION: &[CreationFormat] = &[
    CreationFormat { name: "raw", options: RAW, own: 1, takes_backing: false },
    CreationFormat { name: "file", options: RAW, own: RAW.len(), takes_backing: false },
    CreationFormat { name: "luks", options: LUKS, own: LUKS.len() - 3, takes_backing: false },
    CreationFormat { name: "qcow2", options: QCOW2, own: QCOW2.len() - 2, takes_backing: true },
];

/// Formats and filters of the peer's that nobody makes images in.
const NEVER_CREATED: [&str; 15] = [
    "bochs",
    "cloop",
    "dmg",
    "vvfat",
    "null-aio",
    "quorum",
    "blkverify",
    "blklogwrites",
    "throttle",
    "copy-on-read",
    "copy-before-write",
    "compress",
    "preallocate",
    "replication",
    "snapshot-access",
];

/// The format of that name.
///
/// # Errors
///
/// There is none, or none that images can be made in.
pub fn format_named(name: &str) -> Result<&'static CreationFormat, Failure> {
    if let Some(format) = CREATION.iter().find(|format| format.name == name) {
        return Ok(format);
    }
    if is_known(name) {
        return Err(Failure::new(format!(
            "Format driver '{name}' does not support image creation"
        )));
    }
    Err(Failure::new(format!("Unknown file format '{name}'")))
}

/// Whether there is such a format or driver, here or with the peer.
pub fn is_known(name: &str) -> bool {
    super::open::is_driver(name) || NEVER_CREATED.contains(&name)
}

/// Checks that `options` are options of `format`, each with a value of its kind.
///
/// # Errors
///
/// Which is not, and why.
pub fn check_options(format: &CreationFormat, options: &OptionList) -> Result<(), Failure> {
    for key in options.keys() {
        let Some(option) = format.options.iter().find(|option| option.name == key) else {
            return Err(Failure::new(format!("Invalid parameter '{key}'")));
        };
        match option.kind {
            Text => {}
            Switch => drop(options.switch(key)?),
            Number => drop(options.number(key)?),
            Size => drop(options.size(key)?),
        }
    }
    Ok(())
}

/// The options as `create` tells them: those given, and the defaults that are worth it.
///
/// # Errors
///
/// A value that is none.
pub fn told(format: &CreationFormat, options: &OptionList) -> Result<String, Failure> {
    let mut text = String::new();
    for option in format.options {
        let name = option.name;
        let value = match (option.kind, options.get(name)) {
            (_, None) => option.default.map(str::to_owned),
            (Size, Some(_)) => options.size(name)?.map(|size| size.to_string()),
            (Number, Some(_)) => options.number(name)?.map(|number| number.to_string()),
            (Text | Switch, Some(value)) => Some(value.replace(',', ",,")),
        };
        if let Some(value) = value {
            text.push_str(&format!(" {name}={value}"));
        }
    }
    Ok(text)
}

/// Prints what `-o help` asks for. Without a file name only the format's own options are known.
pub fn print_options(format: &CreationFormat, with_file: bool) {
    let mut options = if with_file { format.options } else { format.own_options() }.to_vec();
    options.sort_by_key(|option| option.name);
    match with_file {
        true => println!("Supported options:"),
        false => println!("Supported {} options:", format.name),
    }
    options.iter().for_each(print_option);
    if !with_file {
        println!("\nThe protocol level may support further options.");
        println!("Specify the target filename to include those options.");
    }
}

/// Prints one option and what it is about.
pub fn print_option(option: &CreationOption) {
    let kind = match option.kind {
        Text => "str",
        Switch => "bool (on/off)",
        Number => "num",
        Size => "size",
    };
    println!("{:24} - {}", format!("  {}=<{kind}>", option.name), option.help);
}

impl Tool {
    /// Makes an image of `format` in the file called `filename`, which is overwritten. `options`
    /// hold all that is to be known, its size and backing file among it. What it prints nothing.
    ///
    /// # Errors
    ///
    /// The file cannot be made; options that cannot be.
    pub fn create_image(
        &self,
        filename: &str,
        format: &CreationFormat,
        options: &OptionList,
    ) -> Result<(), Failure> {
        check_options(format, options)?;
        let path = file_path(filename)?;
        let size = options.size("size")?.unwrap_or(0);
        if options.switch("nocow")? == Some(true) {
            turn_off_copy_on_write(&path);
        }
        if options.size("extent_size_hint")?.is_some_and(|hint| hint != 0) {
            // Few file systems know of such hints, and ours goes to none.
            self.warn("Failed to set extent size hint: Operation not supported");
        }
        let layer = self.layer()?;
        if matches!(format.name, "raw" | "file") {
            let mode = raw_preallocation(options, size)?;
            let work = async move |file: &Child| file.truncate_with(size, mode).await;
            return wait(layer.create_over(path, work)).map_err(|failure| match failure.text() {
                Some("File too large") => Failure::new(TOO_LARGE_FOR_RAW),
                _ => failure,
            });
        }
        if format.name == "luks" {
            let mode = raw_preallocation(options, size)?;
            let create = encryption::of_luks(options, &self.secrets)?;
            let work = async move |file: &Child| luks::create(file, &create, size, mode).await;
            return wait(layer.create_over(path, work));
        }
        let mut create = qcow2_options(options, size)?;
        create.encryption = encryption::of_qcow2(options, &self.secrets)?;
        let Some(name) = options.get("data_file") else {
            return wait(
                layer.create_over(path, async move |file| qcow2::create(file, &create).await),
            );
        };
        // As with QEMU, whose behaviour this is to be in full: where the program runs.
        let data = match self.trusts_images() {
            true => file_path(name)?,
            false => file_path(&beside(filename, name))?,
        };
        wait(layer.create_over_two(path, data, async move |file, data| {
            qcow2::create_with_data_file(file, data, &create).await
        }))
    }
}

/// Asks the file system to write the file in place, as long as it is empty; most do so anyway, and
/// know nothing of it.
fn turn_off_copy_on_write(path: &str) {
    let file = std::fs::OpenOptions::new().write(true).create(true).truncate(false).open(path);
    // What goes wrong with the file is told when it is made.
    let Ok(file) = file else { return };
    if let Ok(flags) = rustix::fs::ioctl_getflags(&file) {
        // It is a wish.
        let _ = rustix::fs::ioctl_setflags(&file, flags | rustix::fs::IFlags::NOCOW);
    }
}

/// The path that a file name stands for.
///
/// # Errors
///
/// It stands for something that images cannot be made in.
pub fn file_path(filename: &str) -> Result<String, Failure> {
    if filename.starts_with("json:") {
        return Err(Failure::new("Unknown protocol 'json'"));
    }
    let mut tree = FileName::parse(filename)?.into_tree();
    let driver = tree.take_str("driver").ok().flatten().unwrap_or_default();
    if driver != "file" && driver != "host_device" {
        let text = format!("Protocol driver '{driver}' does not support image creation");
        return Err(Failure::new(text));
    }
    let path = tree.take_str("filename").ok().flatten();
    path.ok_or_else(|| Failure::new("The 'file' block driver requires a file name"))
}

const TOO_LARGE_FOR_RAW: &str = "The image size is too large for file format 'raw'";

fn raw_preallocation(options: &OptionList, size: u64) -> Result<Preallocation, Failure> {
    let name = options.get("preallocation").unwrap_or("off");
    let mode = Preallocation::from_name(name)
        .ok_or_else(|| Failure::new(format!("invalid parameter value: {name}")))?;
    if mode == Preallocation::Metadata {
        return Err(Failure::new("Unsupported preallocation mode: metadata"));
    }
    if size > blockplex::Limits::MAX_LENGTH {
        return Err(Failure::new(TOO_LARGE_FOR_RAW));
    }
    Ok(mode)
}

/// The most bytes of an L1 table.
const MAX_L1_BYTES: u64 = 32 << 20;

/// What a new image is to be: the meaning of `options`, in the order in which QEMU looks at them.
///
/// # Errors
///
/// What cannot be.
pub fn qcow2_options(options: &OptionList, size: u64) -> Result<CreateOptions, Failure> {
    let mut create = CreateOptions::new(size.next_multiple_of(512));
    read_words(options, &mut create)?;
    create.cluster_size = options.size("cluster_size")?.unwrap_or(create.cluster_size);
    create.extended_l2 = options.switch("extended_l2")?.unwrap_or(false);
    create.lazy_refcounts = options.switch("lazy_refcounts")?.unwrap_or(false);
    let bytes = |key| options.get(key).map(|name| name.as_bytes().to_vec());
    create.backing_name = bytes("backing_file");
    create.backing_format = bytes("backing_fmt");
    create.data_file = bytes("data_file");
    create.data_file_raw = options.switch("data_file_raw")?.unwrap_or(false);
    let bits = options.number("refcount_bits")?.unwrap_or(16);
    create.refcount_bits = u32::try_from(bits).unwrap_or(u32::MAX);
    match objection(&create) {
        Some(text) => Err(Failure::new(text)),
        None => Ok(create),
    }
}

fn read_words(options: &OptionList, create: &mut CreateOptions) -> Result<(), Failure> {
    let refuse = |name: &str, value: &str| {
        Err(Failure::new(format!("Parameter '{name}' does not accept value '{value}'")))
    };
    create.version = match options.get("compat") {
        None | Some("1.1" | "v3") => Version::V3,
        Some("0.10" | "v2") => Version::V2,
        Some(other) => return refuse("version", other),
    };
    create.compression_type = match options.get("compression_type") {
        None | Some("zlib") => CompressionType::Deflate,
        Some("zstd") => CompressionType::Zstd,
        Some(other) => return refuse("compression-type", other),
    };
    let mode = options.get("preallocation").unwrap_or("off");
    match Preallocation::from_name(mode) {
        Some(mode) => create.preallocation = mode,
        None => return refuse("preallocation", mode),
    }
    Ok(())
}

/// Why there can be no such image.
fn objection(create: &CreateOptions) -> Option<&'static str> {
    let is_v2 = create.version == Version::V2;
    let has_backing = create.backing_name.is_some();
    let preallocates = create.preallocation != Preallocation::Off;
    let size_range = 512..=2 << 20;
    let has_wrong_size =
        !create.cluster_size.is_power_of_two() || !size_range.contains(&create.cluster_size);
    let is_zlib = create.compression_type == CompressionType::Deflate;
    let entry_bytes = if create.extended_l2 { 16 } else { 8 };
    let table_reach = || create.cluster_size * create.cluster_size / entry_bytes;
    let rules = [
        (has_wrong_size, "Cluster size must be a power of two between 512 and 2048k"),
        (
            create.extended_l2 && is_v2,
            "Extended L2 entries are only supported with compatibility level 1.1 and above (use \
             version=v3 or greater)",
        ),
        (
            create.extended_l2 && create.cluster_size < 16384,
            "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes",
        ),
        (
            has_backing && preallocates && !create.extended_l2,
            "Backing file and preallocation can only be used at the same time if extended_l2 is on",
        ),
        (
            create.backing_format.is_some() && !has_backing,
            "Backing format cannot be used without backing file",
        ),
        (
            create.lazy_refcounts && is_v2,
            "Lazy refcounts only supported with compatibility level 1.1 and above (use version=v3 \
             or greater)",
        ),
        (
            create.refcount_bits > 64 || !create.refcount_bits.is_power_of_two(),
            "Refcount width must be a power of two and may not exceed 64 bits",
        ),
        (
            create.refcount_bits != 16 && is_v2,
            "Different refcount widths than 16 bits require compatibility level 1.1 or above (use \
             version=v3 or greater)",
        ),
        (create.data_file_raw && create.data_file.is_none(), "data-file-raw requires data-file"),
        (
            create.data_file_raw && has_backing,
            "Backing file and data-file-raw cannot be used at the same time",
        ),
        (
            create.data_file.is_some() && is_v2,
            "External data files are only supported with compatibility level 1.1 and above (use \
             version=v3 or greater)",
        ),
        (
            !is_zlib && is_v2,
            "Non-zlib compression type is only supported with compatibility level 1.1 and above \
             (use version=v3 or greater)",
        ),
        (
            !has_wrong_size && create.size.div_ceil(table_reach()) > MAX_L1_BYTES / 8,
            "The image size is too large for file format 'qcow2' (try using a larger cluster size)",
        ),
    ];
    rules.into_iter().find_map(|(applies, text)| applies.then_some(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(text: &str) -> OptionList {
        let mut list = OptionList::default();
        list.add(text).unwrap();
        list
    }

    #[test]
    fn what_is_told_is_what_was_given_and_the_defaults() {
        let format = format_named("qcow2").unwrap();
        assert_eq!(
            told(format, &list("size=1M,backing_file=a,,b")).unwrap(),
            " cluster_size=65536 extended_l2=off compression_type=zlib size=1048576 backing_file=a,,b \
             lazy_refcounts=off refcount_bits=16"
        );
    }

    #[test]
    fn options_that_cannot_be_are_refused_in_the_words_of_the_peers_tools() {
        for (text, problem) in [
            ("compat=9", "Parameter 'version' does not accept value '9'"),
            ("cluster_size=3k", "Cluster size must be a power of two between 512 and 2048k"),
            ("refcount_bits=3", "Refcount width must be a power of two and may not exceed 64 bits"),
            ("backing_fmt=raw", "Backing format cannot be used without backing file"),
        ] {
            let failure = qcow2_options(&list(text), 1 << 20).unwrap_err();
            assert_eq!(failure.text(), Some(problem), "{text}");
        }
        assert!(qcow2_options(&list("cluster_size=512"), 1 << 40).is_err());
        let unknown = check_options(format_named("raw").unwrap(), &list("x=1")).unwrap_err();
        assert_eq!(unknown.text(), Some("Invalid parameter 'x'"));
    }
}
