//! The images that a command works on: those that the user names, or a small chain made for the
//! occasion in a temporary directory that goes away at the end.

use std::error::Error;
use std::io::Read;
use std::path::Path;

use blockplex::drivers::probe::{self, Suggestion};
use blockplex::drivers::qcow2::CreateOptions;
use blockplex::{Backend, Blockplex, IoBuffer, OpenGate, OpenOptions, Request, block_on};
use tempfile::TempDir;

use crate::command_line::ImageSource;
use crate::random::Random;

/// The size of the disk that is made when none is given.
pub const TEMPORARY_SIZE: u64 = 64 << 20;

/// How an image is opened.
#[derive(Clone, Copy, Debug)]
pub struct Wish {
    /// For writing too.
    pub write: bool,
    /// Past the page cache.
    pub direct: bool,
}

/// A chain of two images in a directory of its own.
pub struct TemporaryChain {
    directory: TempDir,
}

impl TemporaryChain {
    /// Makes a base full of data and an empty overlay on it, `size` bytes each.
    ///
    /// # Errors
    /// Whatever keeps the files from being made.
    pub fn create(layer: &Blockplex, size: u64, fill: bool) -> Result<Self, Box<dyn Error>> {
        let directory = tempfile::Builder::new().prefix("blockplex-").tempdir()?;
        let chain = Self { directory };
        let base = chain.path("base.qcow2");
        block_on(layer.create_qcow2(&base, CreateOptions::new(size)))??;
        if fill {
            fill_with_data(layer, &base, size)?;
        }
        let mut overlay = CreateOptions::new(size);
        overlay.backing_name = Some(b"base.qcow2".to_vec());
        overlay.backing_format = Some(b"qcow2".to_vec());
        block_on(layer.create_qcow2(chain.overlay(), overlay))??;
        Ok(chain)
    }

    /// The image on top.
    pub fn overlay(&self) -> std::path::PathBuf {
        self.path("overlay.qcow2")
    }

    /// A file in the chain's directory.
    pub fn path(&self, name: &str) -> std::path::PathBuf {
        self.directory.path().join(name)
    }
}

/// Writes data that no layer takes for zeros to the whole of a disk.
fn fill_with_data(layer: &Blockplex, path: &Path, size: u64) -> Result<(), Box<dyn Error>> {
    const CHUNK: u64 = 1 << 20;
    let backend = block_on(layer.open("fill", OpenOptions::image("qcow2", path)))??;
    let disk = backend.blocking();
    let mut random = Random::new(size, 0);
    let mut offset = 0;
    while offset < size {
        let length = CHUNK.min(size - offset);
        let mut data = IoBuffer::zeroed(length as usize);
        for word in data.chunks_mut(8) {
            let bytes = (random.bits() | 1).to_le_bytes();
            word.copy_from_slice(&bytes[..word.len()]);
        }
        disk.run(Request::write(offset, data))?;
        offset += length;
    }
    disk.flush()?;
    block_on(backend.close())??;
    Ok(())
}

/// Opens an image as the user named it. An image may name a local file below it, which is then
/// opened for reading in the format that the image states, and nothing else.
///
/// # Errors
/// It cannot be opened, or its format is not known for sure.
pub fn open(
    layer: &Blockplex,
    name: &str,
    source: &ImageSource,
    wish: Wish,
) -> Result<Backend, Box<dyn Error>> {
    let options = match source {
        ImageSource::Options(text) => OpenOptions::parse(text)?,
        ImageSource::File { path, format } => {
            let format = match format {
                Some(format) => format.clone(),
                None => format_of(path, wish.write)?,
            };
            OpenOptions::image(&format, path)
        }
    };
    let mut options =
        options.gate(OpenGate::deny_all().allow_directory("/")?.allow_block_devices());
    if !wish.write {
        options = options.read_only();
    }
    if wish.direct {
        options = options.set("cache.direct", true);
    }
    if options.tree().get("discard").is_none() {
        options = options.set("discard", "unmap");
    }
    Ok(block_on(layer.open(name, options))??)
}

/// The format of an image that was given without one: what its first bytes say, but never a guess
/// that it is raw when it is to be written.
fn format_of(path: &Path, write: bool) -> Result<String, Box<dyn Error>> {
    let describe = |error| format!("Could not open '{}': {error}", path.display());
    let mut first = Vec::new();
    let file = std::fs::File::open(path).map_err(describe)?;
    file.take(probe::PROBE_BYTES as u64).read_to_end(&mut first).map_err(describe)?;
    match probe::suggest_format(&first) {
        Suggestion::Supported(format) => Ok(format.to_owned()),
        Suggestion::Unsupported(format) => {
            Err(format!("'{}' looks like a {format} image, which is not supported", path.display())
                .into())
        }
        Suggestion::Raw if write => {
            Err(format!("the format of '{}' is not known; give -f raw to write it", path.display())
                .into())
        }
        Suggestion::Raw => Ok("raw".to_owned()),
    }
}
