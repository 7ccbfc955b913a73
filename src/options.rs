//! How a tree of nodes is described: QEMU's option names, in three spellings, or typed.

use blockplex_drivers::crypto::{Secret, Secrets};
use blockplex_drivers::open_gate::OpenGate;
use blockplex_drivers::options::{OptionError, OptionTree, Value};
use blockplex_graph::{Error, ErrorKind, Result};
use std::path::Path;

/// What to open, and what the images in it may open by themselves.
///
/// ```
/// use blockplex::OpenOptions;
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let a = OpenOptions::parse("driver=qcow2,file.driver=file,file.filename=disk.qcow2")?;
/// let b = OpenOptions::parse(
///     r#"{"driver": "qcow2", "file": {"driver": "file", "filename": "disk.qcow2"}}"#,
/// )?;
/// let c = OpenOptions::image("qcow2", "disk.qcow2");
/// assert_eq!(a.tree(), b.tree());
/// assert_eq!(b.tree(), c.tree());
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct OpenOptions {
    tree: OptionTree,
    gate: OpenGate,
    secrets: Secrets,
    probe_formats: bool,
    image_alone: bool,
    metadata_only: bool,
    whole_sectors: bool,
}

impl OpenOptions {
    /// From `driver=…,file.filename=…`, from JSON, or from `json:{…}`.
    pub fn parse(text: &str) -> Result<OpenOptions, OptionError> {
        Ok(OpenOptions::from(OptionTree::parse(text, None)?))
    }

    /// An image file in a format: `raw` or `qcow2`. The format is never guessed.
    pub fn image(format: &str, path: impl AsRef<Path>) -> OpenOptions {
        let mut file = OptionTree::new();
        file.set("driver", Value::String("file".into()));
        file.set("filename", Value::String(path.as_ref().to_string_lossy().into_owned()));
        let mut tree = OptionTree::new();
        tree.set("driver", Value::String(format.to_owned()));
        tree.set("file", Value::Tree(file));
        OpenOptions::from(tree)
    }

    /// Sets an option by its dotted name.
    #[must_use]
    pub fn set(mut self, name: &str, value: impl Into<Value>) -> OpenOptions {
        set_dotted(&mut self.tree, name, value.into());
        self
    }

    /// Opens it for reading only.
    #[must_use]
    pub fn read_only(self) -> OpenOptions {
        self.set("read-only", Value::Bool(true))
    }

    /// Lets images open what `gate` grants; by default they may open nothing.
    #[must_use]
    pub fn gate(mut self, gate: OpenGate) -> OpenOptions {
        self.gate = gate;
        self
    }

    /// Adds a secret, which options such as `encrypt.key-secret` refer to by `id`.
    #[must_use]
    pub fn secret(mut self, id: impl Into<String>, secret: Secret) -> OpenOptions {
        self.secrets.insert(id, secret);
        self
    }

    /// Sets all secrets that options may refer to.
    #[must_use]
    pub fn secrets(mut self, secrets: Secrets) -> OpenOptions {
        self.secrets = secrets;
        self
    }

    /// Lets the first bytes of a file decide its format where nothing states it, in the tree
    /// and in backing files. For tools whose user asked for it by saying nothing: a guest that
    /// owns a raw disk decides what its first bytes are. What is taken for raw and can be written
    /// is [guarded](crate::drivers::raw::Raw::is_guarded).
    #[must_use]
    pub fn probe_formats(mut self) -> OpenOptions {
        self.probe_formats = true;
        self
    }

    /// Opens the image alone, without what it names as its backing file and, for reading, its data
    /// file (unless the tree says what these are to be): for looking at the image itself.
    #[must_use]
    pub fn image_alone(mut self) -> OpenOptions {
        self.image_alone = true;
        self
    }

    /// Opens encrypted images also without a key: what their metadata says can be used, their data
    /// cannot. A key that is given must be right.
    #[must_use]
    pub fn metadata_only(mut self) -> OpenOptions {
        self.metadata_only = true;
        self
    }

    /// Has raw disks end with a whole sector of 512 bytes, as the peer's do: what the file lacks of
    /// it reads as zeros, and comes to be when it is written. Otherwise a raw disk has the bytes
    /// that its file has.
    #[must_use]
    pub fn whole_sectors(mut self) -> OpenOptions {
        self.whole_sectors = true;
        self
    }

    pub(crate) fn has_whole_sectors(&self) -> bool {
        self.whole_sectors
    }

    pub(crate) fn is_metadata_only(&self) -> bool {
        self.metadata_only
    }

    pub(crate) fn is_image_alone(&self) -> bool {
        self.image_alone
    }

    pub(crate) fn probes_formats(&self) -> bool {
        self.probe_formats
    }

    /// The options as a tree.
    pub fn tree(&self) -> &OptionTree {
        &self.tree
    }

    pub(crate) fn into_parts(self) -> (OptionTree, OpenGate, Secrets) {
        (self.tree, self.gate, self.secrets)
    }

    /// Whether the root is opened read-only.
    pub(crate) fn is_read_only(&self) -> Result<bool> {
        let value = self.tree.clone().take_bool("read-only").map_err(invalid)?;
        Ok(value.unwrap_or(false))
    }
}

impl From<OptionTree> for OpenOptions {
    fn from(tree: OptionTree) -> OpenOptions {
        OpenOptions {
            tree,
            gate: OpenGate::deny_all(),
            secrets: Secrets::default(),
            probe_formats: false,
            image_alone: false,
            metadata_only: false,
            whole_sectors: false,
        }
    }
}

/// An option error as the layer's error.
pub(crate) fn invalid(error: OptionError) -> Error {
    Error::new(ErrorKind::InvalidArgument, error.to_string()).caused_by(error)
}

fn set_dotted(tree: &mut OptionTree, name: &str, value: Value) {
    let Some((first, rest)) = name.split_once('.') else {
        tree.set(name, value);
        return;
    };
    let mut inner = match tree.get(first) {
        Some(Value::Tree(inner)) => inner.clone(),
        _ => OptionTree::new(),
    };
    set_dotted(&mut inner, rest, value);
    tree.set(first, Value::Tree(inner));
}
