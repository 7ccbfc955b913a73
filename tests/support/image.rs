//! Images to damage: made by the peer, kept as bytes, patched, and judged by the peer again.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

/// Where things are in the base image: 64 MiB in clusters of 64 KiB, the first of them written.
pub const REFCOUNT_TABLE: u64 = 0x10000;
/// The only refcount block; entries of 16 bits.
pub const REFCOUNT_BLOCK: u64 = 0x20000;
/// The L1 table, of one entry.
pub const L1: u64 = 0x30000;
/// The only L2 table.
pub const L2: u64 = 0x40000;
/// The first guest cluster, full of [`FILL`].
pub const DATA: u64 = 0x50000;
/// The byte that fills the first guest cluster.
pub const FILL: u8 = 0x11;

/// One change to an image's bytes.
#[derive(Clone, Debug)]
pub enum Patch {
    /// These bytes at this offset; the file grows if need be.
    Bytes(u64, Vec<u8>),
    /// The file gets this length.
    Length(u64),
}

/// A big-endian number of 32 bits.
pub fn be32(at: u64, value: u32) -> Patch {
    Patch::Bytes(at, value.to_be_bytes().to_vec())
}

/// A big-endian number of 64 bits.
pub fn be64(at: u64, value: u64) -> Patch {
    Patch::Bytes(at, value.to_be_bytes().to_vec())
}

/// A big-endian number of 16 bits.
pub fn be16(at: u64, value: u16) -> Patch {
    Patch::Bytes(at, value.to_be_bytes().to_vec())
}

/// Header extensions instead of those that are there, with their end marker.
pub fn extensions(records: &[(u32, &[u8])]) -> Patch {
    let mut bytes = Vec::new();
    for (kind, data) in records {
        bytes.extend(kind.to_be_bytes());
        bytes.extend((data.len() as u32).to_be_bytes());
        bytes.extend(*data);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
    }
    bytes.extend([0; 8]);
    Patch::Bytes(112, bytes)
}

/// The number of the extension for the backing file's format.
pub const BACKING_FORMAT: u32 = 0xe279_2aca;
/// The number of the extension for the data file's name.
pub const DATA_FILE: u32 = 0x4441_5441;
/// Where [`backing`] puts the name.
const NAME_AT: u64 = 0x1000;

/// A backing file's name, and its format if it is to be stated.
pub fn backing(name: &[u8], format: Option<&str>) -> Vec<Patch> {
    let mut patches = vec![be64(8, NAME_AT), be32(16, name.len() as u32)];
    patches.push(Patch::Bytes(NAME_AT, name.to_vec()));
    patches.push(match format {
        Some(format) => extensions(&[(BACKING_FORMAT, format.as_bytes())]),
        None => extensions(&[]),
    });
    patches
}

/// `bytes` with the patches made.
pub fn patched(bytes: &[u8], patches: &[Patch]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for patch in patches {
        match patch {
            Patch::Bytes(at, new) => {
                let at = *at as usize;
                bytes.resize(bytes.len().max(at + new.len()), 0);
                bytes[at..at + new.len()].copy_from_slice(new);
            }
            Patch::Length(length) => bytes.resize(*length as usize, 0),
        }
    }
    bytes
}

/// The bytes of the base image.
pub fn base() -> &'static [u8] {
    static BASE: OnceLock<Vec<u8>> = OnceLock::new();
    BASE.get_or_init(|| made("cluster_size=64k", "64M", &["write -P 0x11 0 64k"]))
}

/// The bytes of a fresh image of the peer, after these commands of its I/O tool.
pub fn made(options: &str, size: &str, commands: &[&str]) -> Vec<u8> {
    let sandbox = Sandbox::in_memory();
    let path = sandbox.at("made.qcow2");
    sandbox.create(&path, options, size);
    qemu_io(&path, commands);
    fs::read(&path).expect("it was just made")
}

/// A directory of its own, gone at the end.
#[derive(Debug)]
pub struct Sandbox(tempfile::TempDir);

impl Default for Sandbox {
    fn default() -> Sandbox {
        Sandbox::in_memory()
    }
}

impl Sandbox {
    /// An empty one.
    pub fn new() -> Sandbox {
        Sandbox(tempfile::tempdir().expect("a directory for temporary files"))
    }

    /// An empty one in memory, if there is a place: where nothing depends on the file system, but
    /// flushes are many and would take most of the time.
    pub fn in_memory() -> Sandbox {
        tempfile::tempdir_in("/dev/shm").map_or_else(|_| Sandbox::in_memory(), Sandbox)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Where a file of that name is.
    pub fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Puts bytes into a file. Runs of zeros become holes.
    pub fn put(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.at(name);
        let mut file = fs::File::create(&path).expect("the directory is ours");
        file.set_len(bytes.len() as u64).expect("room for an image");
        for (number, piece) in bytes.chunks(0x10000).enumerate() {
            if piece.iter().any(|byte| *byte != 0) {
                let at = std::io::SeekFrom::Start(number as u64 * 0x10000);
                std::io::Seek::seek(&mut file, at).expect("seek");
                file.write_all(piece).expect("room for an image");
            }
        }
        path
    }

    /// An image of the peer.
    pub fn create(&self, path: &Path, options: &str, size: &str) {
        let path = text(path);
        let mut arguments = vec!["create", "-q", "-f", "qcow2"];
        if !options.is_empty() {
            arguments.extend(["-o", options]);
        }
        arguments.extend([path, size]);
        succeed(&qemu_img(&arguments), &format!("{arguments:?}"));
    }
}

/// A path as an argument.
pub fn text(path: &Path) -> &str {
    path.to_str().expect("temporary directories have plain names")
}

/// Runs `qemu-img`.
pub fn qemu_img(arguments: &[&str]) -> Output {
    Command::new("qemu-img").args(arguments).output().expect("qemu-img is installed")
}

/// Asserts that the peer succeeded.
pub fn succeed(output: &Output, what: &str) {
    assert!(
        output.status.success(),
        "{what}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Runs `qemu-io` commands on a qcow2 image.
pub fn qemu_io(path: &Path, commands: &[&str]) {
    let mut run = Command::new("qemu-io");
    run.args(["-f", "qcow2"]);
    for command in commands {
        run.args(["-c", command]);
    }
    let output = run.arg(path).output().expect("qemu-io is installed");
    succeed(&output, &format!("{commands:?}"));
}

/// What the peer's check found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Check {
    /// What is wrong.
    pub corruptions: u64,
    /// What could not be checked.
    pub errors: u64,
    /// Clusters that nobody uses.
    pub leaks: u64,
}

impl Check {
    /// Nothing at all.
    pub const CLEAN: Check = Check { corruptions: 0, errors: 0, leaks: 0 };

    /// Nothing wrong but clusters that nobody uses.
    pub fn is_sound(&self) -> bool {
        (self.corruptions, self.errors) == (0, 0)
    }
}

/// Checks an image; none when the peer does not even open it.
pub fn check(path: &Path) -> Option<Check> {
    let output = qemu_img(&["check", "--output=json", "-f", "qcow2", text(path)]);
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).ok()?;
    let count = |key: &str| report.get(key).and_then(serde_json::Value::as_u64).unwrap_or(0);
    Some(Check {
        corruptions: count("corruptions"),
        errors: count("check-errors"),
        leaks: count("leaks"),
    })
}

/// The guest's bytes as the peer reads them, of an internal snapshot if one is named.
pub fn guest_bytes(path: &Path, snapshot: Option<&str>) -> Vec<u8> {
    let sandbox = Sandbox::in_memory();
    let raw = sandbox.at("raw");
    let mut arguments = vec!["convert", "-q", "-f", "qcow2", "-O", "raw"];
    if let Some(snapshot) = snapshot {
        arguments.extend(["-l", snapshot]);
    }
    arguments.extend([text(path), text(&raw)]);
    succeed(&qemu_img(&arguments), &format!("{arguments:?}"));
    fs::read(&raw).expect("it was just made")
}
