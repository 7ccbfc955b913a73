//! Opening the image that a command line names.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use blockplex::drivers::options::Value;
use blockplex::drivers::raw::Raw;
use blockplex::file_name::FileName;
use blockplex::graph::{Child, NodeView};
use blockplex::{Backend, Blocking, Blockplex, NodeId, OpenOptions, OptionTree};

use super::message::describe;
use super::{Failure, Tool, wait};

/// The formats and protocols that can be opened.
const DRIVERS: [&str; 8] =
    ["raw", "qcow2", "luks", "file", "host_device", "null-co", "memory", "blkdebug"];

/// The two words that `-t` and `-T` stand for, and who flushes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheMode {
    /// Past the page cache.
    pub direct: bool,
    /// Flushes are not passed on.
    pub no_flush: bool,
    /// Every write is to be durable on return: the caller sets FUA.
    pub writethrough: bool,
}

impl CacheMode {
    /// The mode of that name: `none`, `off`, `directsync`, `writeback`, `unsafe`, `writethrough`.
    pub fn parse(name: &str) -> Option<CacheMode> {
        let (direct, no_flush, writethrough) = match name {
            "none" | "off" => (true, false, false),
            "directsync" => (true, false, true),
            "writeback" => (false, false, false),
            "unsafe" => (false, true, false),
            "writethrough" => (false, false, true),
            _ => return None,
        };
        Some(CacheMode { direct, no_flush, writethrough })
    }
}

/// Which image, and how.
#[derive(Clone, Debug, Default)]
pub struct ImageOpenOptions {
    /// The name, or with `image_opts` the options.
    pub filename: String,
    /// `--image-opts`: the name is `key=value,…`.
    pub image_opts: bool,
    /// `-f`; without it, the image's first bytes decide.
    pub format: Option<String>,
    /// For writing.
    pub write: bool,
    /// `-U`: whatever others do with it meanwhile.
    pub force_share: bool,
    /// Without what the image names as its backing file and, for reading, its data file.
    pub image_alone: bool,
    /// Encrypted images also without their keys: their data is of no interest.
    pub metadata_only: bool,
    /// `-t`, `-T`.
    pub cache: CacheMode,
    /// Discards reach the file.
    pub unmap: bool,
    /// Further options of the image's node, by their dotted names (`detect-zeroes`,
    /// `encrypt.key-secret`).
    pub options: Vec<(String, String)>,
    /// The same, but whatever the name says.
    pub overrides: Vec<(String, String)>,
}

impl ImageOpenOptions {
    /// The image called `filename`, for reading.
    pub fn new(filename: impl Into<String>) -> ImageOpenOptions {
        ImageOpenOptions { filename: filename.into(), ..ImageOpenOptions::default() }
    }

    /// The description of the image's nodes.
    ///
    /// # Errors
    ///
    /// The name, or a driver in it, is none.
    pub fn tree(&self) -> Result<OptionTree, Failure> {
        let mut tree = if self.image_opts { self.tree_of_options()? } else { self.tree_of_name()? };
        let named = |tree: &OptionTree, name| tree.get(name).cloned();
        if let Some(Value::String(driver)) = named(&tree, "driver")
            && !DRIVERS.contains(&driver.as_str())
        {
            return Err(Failure::new(format!("Unknown driver '{driver}'")));
        }
        if let Some(Value::String(name)) = named(&tree, "file") {
            let text = format!("Cannot find device='{name}' nor node-name='{name}'");
            return Err(Failure::new(text));
        }
        Ok(tree_with_file_driver(&mut tree))
    }

    fn tree_of_options(&self) -> Result<OptionTree, Failure> {
        let tree = OptionTree::from_keyval(&last_of_each(&self.filename), Some("file"))
            .map_err(|error| Failure::new(error.to_string()))?;
        if !tree.contains("driver") && !tree.contains("file") {
            return Err(Failure::new("Must specify either driver or file"));
        }
        Ok(tree)
    }

    fn tree_of_name(&self) -> Result<OptionTree, Failure> {
        let name = FileName::parse(&self.filename)?;
        let is_protocol = name.is_protocol();
        let mut tree = name.into_tree();
        if is_protocol
            && let Some(format) = self.format.as_deref().filter(|it| is_protocol_driver(it))
        {
            return self.tree_of_protocol(tree, format);
        }
        if is_protocol {
            let mut image = OptionTree::new();
            image.set("file", Value::Tree(self.file_of_name(tree)));
            tree = image;
        }
        if let Some(format) = &self.format {
            tree.set("driver", Value::from(format.as_str()));
        }
        Ok(tree)
    }

    /// The file that a name stands for. Where the options say that it is a `blkdebug`, the name is
    /// that of the file below.
    fn file_of_name(&self, tree: OptionTree) -> OptionTree {
        let mut options = self.options.iter().chain(&self.overrides);
        let is_debug = options.any(|(key, value)| key == "file.driver" && value == "blkdebug");
        match tree.get("filename") {
            Some(filename) if is_debug => {
                let mut debug = OptionTree::new();
                debug.set("x-image", filename.clone());
                debug
            }
            _ => tree,
        }
    }

    /// The node that a name stands for, opened without a format above it.
    fn tree_of_protocol(&self, mut tree: OptionTree, format: &str) -> Result<OptionTree, Failure> {
        let named = match tree.get("driver") {
            Some(Value::String(driver)) => driver.clone(),
            _ => String::new(),
        };
        if format == "blkdebug" {
            if named != format {
                let image = tree;
                tree = OptionTree::new();
                tree.set("driver", format.into());
                tree.set("image", Value::Tree(image));
            }
            let is_format = |(name, driver): &(String, String)| {
                name == "image.driver" && !is_protocol_driver(driver)
            };
            // The name is that of the file of the image then.
            if self.overrides.iter().any(is_format)
                && let Some(file) = tree.get("image").cloned()
            {
                let mut image = OptionTree::new();
                image.set("file", file);
                tree.set("image", Value::Tree(image));
            }
            return Ok(tree);
        }
        if format == "null-co" && named != format {
            let text = "The only allowed filename for this driver is 'null-co://'";
            return Err(Failure::new(text));
        }
        tree.set("driver", format.into());
        Ok(tree)
    }

    /// The same, complete, for the library.
    fn open_options(&self, tool: &Tool) -> Result<OpenOptions, Failure> {
        let tree = self.tree()?;
        let directory = file_of(&tree).and_then(|path| path.parent().map(Path::to_owned));
        let directory = directory.map(|path| match path.as_os_str().is_empty() {
            true => PathBuf::from("."),
            false => path,
        });
        let mut options = OpenOptions::from(tree)
            .gate(tool.gate(directory.as_deref())?)
            .secrets(tool.secrets.clone())
            .probe_formats()
            .whole_sectors();
        if self.image_alone {
            options = options.image_alone();
        }
        if self.metadata_only {
            options = options.metadata_only();
        }
        let mut preset = |name: &str, value: Value| {
            if options.tree().get(name).is_none() {
                options = options.clone().set(name, value);
            }
        };
        if !self.write {
            preset("read-only", true.into());
        }
        if self.force_share {
            preset("force-share", true.into());
        }
        if self.unmap {
            preset("discard", "unmap".into());
        }
        for (name, value) in &self.options {
            preset(name, value.as_str().into());
        }
        if options.tree().get("cache").is_none() {
            options = options
                .set("cache.direct", self.cache.direct)
                .set("cache.no-flush", self.cache.no_flush);
        }
        for (name, value) in &self.overrides {
            options = options.set(name, value.as_str());
        }
        Ok(options)
    }
}

/// Options `key=value,…` of which the last of each key counts, as QEMU's tools take them. (The
/// library refuses a key that is given twice.)
pub fn last_of_each(options: &str) -> String {
    let mut pairs: Vec<&str> = Vec::new();
    let (mut start, mut at) = (0, 0);
    while let Some(comma) = options.get(at..).and_then(|rest| rest.find(',')) {
        let end = at + comma;
        if options.get(end + 1..).is_some_and(|rest| rest.starts_with(',')) {
            // A comma within a value.
            at = end + 2;
            continue;
        }
        pairs.extend(options.get(start..end));
        (start, at) = (end + 1, end + 1);
    }
    pairs.extend(options.get(start..));
    let key = |pair: &&str| pair.split_once('=').map(|(key, _)| key.to_owned());
    let last = |index: usize, pair: &&str| {
        let wanted = key(pair);
        let mut later = pairs.iter().skip(index + 1);
        wanted.is_none() || !later.any(|other| key(other) == wanted)
    };
    let kept = pairs.iter().enumerate().filter(|(index, pair)| last(*index, pair));
    kept.map(|(_, pair)| *pair).collect::<Vec<_>>().join(",")
}

/// A file below a format may be given by its name alone: then it is the driver for what is there.
fn tree_with_file_driver(tree: &mut OptionTree) -> OptionTree {
    if let Some(Value::Tree(file)) = tree.get("file") {
        let mut file = file.clone();
        if let (None, Some(Value::String(name))) = (file.get("driver"), file.get("filename"))
            && let Ok(parsed) = FileName::parse(name)
            && parsed.is_protocol()
            && let Some(driver) = parsed.into_tree().get("driver")
        {
            file.set("driver", driver.clone());
            tree.set("file", Value::Tree(file));
        }
    }
    tree.clone()
}

/// The file at the bottom of a description.
fn file_of(tree: &OptionTree) -> Option<PathBuf> {
    match (tree.get("filename"), tree.get("file")) {
        (Some(Value::String(path)), _) => Some(path.into()),
        (None, Some(Value::Tree(file))) => file_of(file),
        _ => None,
    }
}

/// An open image.
pub struct Image {
    /// Its user.
    pub backend: Backend,
    /// How the command line named it.
    pub filename: String,
    /// The name by which it is shown: its file's, or a description.
    pub shown_name: String,
    /// How its nodes were described.
    pub description: OptionTree,
    /// The node on top.
    pub root: NodeId,
    /// Writes are to be durable on return.
    pub writethrough: bool,
    layer: Blockplex,
}

impl Tool {
    /// Opens an image. It must be closed.
    ///
    /// # Errors
    ///
    /// `Could not open 'NAME': …`, as QEMU's tools say it.
    pub fn open(&self, options: &ImageOpenOptions) -> Result<Image, Failure> {
        let image = self.open_quietly(options).map_err(|failure| {
            failure.prefixed(&format!("Could not open '{}': ", options.filename))
        })?;
        self.warn_if_guarded(&image);
        Ok(image)
    }

    /// Warns of an image that was guessed to be raw.
    pub fn warn_if_guarded(&self, image: &Image) {
        let view = image.view().ok();
        let raw = view.as_ref().and_then(|view| view.driver_as::<Raw>());
        if raw.is_some_and(Raw::is_guarded) {
            let name = &image.filename;
            eprintln!(
                "WARNING: Image format was not specified for '{name}' and probing guessed raw.\n\
                 \x20        Automatically detecting the format is dangerous for raw images, write \
                 operations on block 0 will be restricted.\n\
                 \x20        Specify the 'raw' format explicitly to remove the restrictions."
            );
        }
    }

    /// Runs `work` on the file of an image, as long as nobody has it open as an image.
    ///
    /// # Errors
    ///
    /// `Could not open 'NAME': …`; what `work` says, as it is.
    pub fn with_image_file<T: Send + 'static>(
        &self,
        options: &ImageOpenOptions,
        work: impl AsyncFnOnce(&Child) -> blockplex::Result<T> + Send + 'static,
    ) -> Result<blockplex::Result<T>, Failure> {
        let before = format!("Could not open '{}': ", options.filename);
        let description =
            self.file_description(options).map_err(|failure| failure.prefixed(&before))?;
        // What the work says is told from what keeps it from being done.
        let work = async move |file: &Child| Ok(work(file).await);
        wait(self.layer()?.with_image_file(description, work))
            .map_err(|failure| failure.prefixed(&before))
    }

    fn file_description(&self, options: &ImageOpenOptions) -> Result<OpenOptions, Failure> {
        let whole = options.open_options(self)?;
        let Some(Value::Tree(file)) = whole.tree().get("file") else {
            return Err(Failure::new("the image has no file"));
        };
        let mut description = OpenOptions::from(file.clone()).secrets(self.secrets.clone());
        for name in ["read-only", "force-share", "cache"] {
            if let (Some(value), None) = (whole.tree().get(name), file.get(name)) {
                description = description.set(name, value.clone());
            }
        }
        Ok(description)
    }

    /// The same, without the words before the error and without the warning.
    ///
    /// # Errors
    ///
    /// Why it cannot be opened.
    pub fn open_quietly(&self, options: &ImageOpenOptions) -> Result<Image, Failure> {
        let layer = self.layer()?.clone();
        let description = options.open_options(self)?;
        let shown_name = super::names::of_tree(description.tree());
        let tree = description.tree().clone();
        let driver = match description.tree().get("driver") {
            Some(Value::String(driver)) => driver.clone(),
            _ => String::new(),
        };
        let backend = wait(layer.open("image", description))
            .map_err(|failure| failure.map(|text| about_options(text, &driver)))?;
        let root = backend.root();
        let root = root.ok_or_else(|| Failure::new("the image has no root node"))?;
        Ok(Image {
            backend,
            filename: options.filename.clone(),
            shown_name,
            description: tree,
            root,
            writethrough: options.cache.writethrough,
            layer,
        })
    }
}

impl Image {
    /// The layer it is part of.
    pub fn layer(&self) -> &Blockplex {
        &self.layer
    }

    /// The node on top, as it is now.
    ///
    /// # Errors
    ///
    /// It is gone.
    pub fn view(&self) -> Result<Arc<NodeView>, Failure> {
        let topology = self.layer.graph().topology();
        let view = topology.node(self.root).cloned();
        view.ok_or_else(|| Failure::new("the image's node is gone"))
    }

    /// The name of its driver: its format.
    ///
    /// # Errors
    ///
    /// Its node is gone.
    pub fn format(&self) -> Result<&'static str, Failure> {
        Ok(self.view()?.driver().driver_name())
    }

    /// The bytes of its disk.
    ///
    /// # Errors
    ///
    /// Its node is gone.
    pub fn length(&self) -> Result<u64, Failure> {
        Ok(self.backend.length()?)
    }

    /// Blocking calls on it.
    pub fn disk(&self) -> Blocking {
        self.backend.blocking()
    }

    /// Closes it.
    ///
    /// # Errors
    ///
    /// Its last writes failed.
    pub fn close(self) -> Result<(), Failure> {
        wait(self.backend.close())
    }
}

/// An error about an option in the words of QEMU's tools.
fn about_options(text: String, driver: &str) -> String {
    let option = text.strip_prefix("option '").and_then(|rest| rest.split_once("': "));
    match option {
        Some(("file", "must be given")) => {
            "A block device must be specified for \"file\"".to_owned()
        }
        Some((name, "is unknown here")) if !driver.is_empty() && !name.contains('.') => {
            format!("Block format '{driver}' does not support the option '{name}'")
        }
        _ => text,
    }
}

/// Whether a driver stands at the bottom, where a file name leads, or passes on what does.
pub fn is_protocol_driver(name: &str) -> bool {
    ["file", "host_device", "null-co", "memory", "blkdebug"].contains(&name)
}

/// Whether the library knows a driver of that name.
pub fn is_driver(name: &str) -> bool {
    DRIVERS.contains(&name)
}

/// The message of an error of opening `filename`.
pub fn could_not_open(filename: &str, error: &blockplex::Error) -> Failure {
    Failure::new(format!("Could not open '{filename}': {}", describe(error)))
}
