//! The gate between what an image *says* and what is *opened*.
//!
//! An image may name other files: its backing file, its external data file. Those names are data
//! from an untrusted source, and following them blindly hands any file of the host to the guest.
//! Here a name is followed only as far as the caller has granted it: an [`OpenGate`] starts out
//! denying everything, and gets directories (and, if wanted, schemes and block devices) added.
//!
//! ```text
//!   name bytes ──▶ NUL, empty, too long? ──▶ scheme? ──▶ beneath a granted directory?
//!                     refuse                  refuse        │ openat2(RESOLVE_BENEATH), path only
//!                                                           ▼
//!                                     regular file (or granted block device)? ──▶ open for real
//! ```
//!
//! [`ChainGuard`] watches over the chain as a whole: no file twice, no endless depth.
//! [`escape_bytes`] is how any name from an image is shown.
//!
//! # Invariants
//!
//! * **G1** A file is opened only beneath a directory the caller granted. The kernel enforces it
//!   during the walk (`RESOLVE_BENEATH`), so neither `..` nor a link nor a rename under way gets
//!   out.
//! * **G2** A refusal is the same, byte for byte, whether or not the refused target exists. Only
//!   for names inside a grant does an error say more.
//! * **G3** Only regular files, and block devices if granted, are opened; anything else (FIFO,
//!   character device, socket) is looked at without being opened, as opening alone can block or
//!   act.
//! * **G4** No name from an image reaches the scheme interpreters (`json:`, `nbd:` …) unless the
//!   caller granted that very scheme; and schemes that lead back to host files cannot be granted.
//!
//! A caller that trusts its images as much as itself says so with [`OpenGate::trust_images`]; G1 to
//! G4 then do not hold.
//!
//! Drawbacks: absolute symbolic links inside a granted directory are refused even if they point
//! back into it (unless that is the root directory, out of which nothing leads), and a kernel without `openat2` (before 5.6) can open nothing through a gate.

use std::{
    collections::BTreeSet,
    ffi::OsStr,
    fmt, io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Component, Path, PathBuf},
    sync::Arc,
};

use rustix::{
    fs::{FileType, Mode, OFlags, ResolveFlags, fcntl_getfl, fcntl_setfl, fstat, open, openat2},
    io::Errno,
};

mod chain;
mod escape;

pub use self::{
    chain::{ChainError, ChainGuard, FileIdentity, MAX_CHAIN_DEPTH},
    escape::escape_bytes,
};

/// The longest name that is looked at, in bytes; the kernel takes no longer path either.
const MAX_NAME: usize = 4095;

/// How often a walk is tried again that a rename elsewhere disturbed.
const WALK_ATTEMPTS: usize = 32;

/// Schemes that lead to files of the host past the gate, and so cannot be granted (G4).
const NEVER_GRANTED: [&str; 8] =
    ["json", "file", "fat", "vvfat", "host_device", "host_cdrom", "blkdebug", "blkverify"];

/// What a named file is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reading alone, as backing files are.
    ReadOnly,
    /// Reading and writing.
    ReadWrite,
}

/// Why a name from an image was not followed. The text of each, with the name escaped, is made by
/// `Display`.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum GateError {
    /// The name is empty.
    Empty,
    /// The name is longer than any path can be; its length in bytes.
    TooLong(usize),
    /// The name holds a NUL byte, and would mean something shorter to the kernel.
    Nul(String),
    /// The name starts with a scheme that was not granted, or is one where a file is wanted.
    Scheme(String),
    /// The name is relative, and nothing says to what.
    NoBase(String),
    /// The name does not lie within a granted directory. Says nothing about what is there (G2).
    NotGranted(String),
    /// The name lies within a granted directory, and there is no such file.
    Missing(String),
    /// The name lies within a granted directory, and is not a regular file (or granted device).
    NotAFile(String),
    /// The name lies within a granted directory, and opening it failed for another reason.
    Failed(String, Errno),
}

impl fmt::Display for GateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => f.write_str("the image gives an empty file name"),
            Self::TooLong(length) => {
                write!(f, "the image gives a file name of {length} bytes (limit {MAX_NAME})")
            }
            Self::Nul(name) => write!(f, "'{name}': a file name cannot hold a NUL byte"),
            Self::Scheme(name) => write!(f, "'{name}': this protocol is not granted to the image"),
            Self::NoBase(name) => {
                write!(f, "'{name}': a relative name in an image that itself lies in no directory")
            }
            Self::NotGranted(name) => {
                write!(f, "'{name}': not within a directory granted to the image")
            }
            Self::Missing(name) => write!(f, "'{name}': no such file"),
            Self::NotAFile(name) => write!(f, "'{name}': not a regular file"),
            Self::Failed(name, errno) => write!(f, "'{name}': {errno}"),
        }
    }
}

impl std::error::Error for GateError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Failed(_, errno) => Some(errno),
            _ => None,
        }
    }
}

/// A directory the caller granted, held open since then.
#[derive(Debug)]
struct Grant {
    directory: OwnedFd,
    /// The directory as the caller wrote it, made absolute, and with its links resolved. Images
    /// may name it in either way.
    given: PathBuf,
    canonical: PathBuf,
    /// What files beneath it may be opened for.
    access: Access,
}

/// What files and protocols an image's own words may reach. Any thread may use it; it is cheap to
/// clone.
#[derive(Clone, Debug, Default)]
pub struct OpenGate {
    grants: Vec<Arc<Grant>>,
    schemes: BTreeSet<String>,
    block_devices: bool,
    trusted: bool,
    file_prefix: bool,
}

impl OpenGate {
    /// The gate that refuses every name; also the default.
    #[must_use]
    pub fn deny_all() -> Self {
        Self::default()
    }

    /// Grants the files beneath `directory`, which is opened now: what later takes its name is not
    /// granted.
    ///
    /// # Errors
    ///
    /// The directory cannot be opened, or is none.
    pub fn allow_directory(self, directory: impl AsRef<Path>) -> io::Result<Self> {
        self.grant(directory.as_ref(), Access::ReadWrite)
    }

    /// As [`OpenGate::allow_directory`], but for backing files only: for reading, and not for the
    /// data files of images.
    ///
    /// # Errors
    ///
    /// The directory cannot be opened, or is none.
    pub fn allow_reading(self, directory: impl AsRef<Path>) -> io::Result<Self> {
        self.grant(directory.as_ref(), Access::ReadOnly)
    }

    fn grant(mut self, directory: &Path, access: Access) -> io::Result<Self> {
        let given = std::path::absolute(directory)?;
        let canonical = std::fs::canonicalize(&given)?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        // The resolved name is the one opened, so that both fields and the descriptor agree even
        // if a link on the way has just been changed.
        let directory = open(&canonical, flags, Mode::empty())?;
        self.grants.push(Arc::new(Grant { directory, given, canonical, access }));
        Ok(self)
    }

    /// Grants names that start with `scheme:` (give it without the colon). The gate opens nothing
    /// for them; see [`OpenGate::granted_scheme`].
    ///
    /// # Errors
    ///
    /// Schemes that lead to host files past the gate (`json`, `file`, `fat` …), and texts that are
    /// no scheme.
    pub fn allow_protocol(mut self, scheme: &str) -> io::Result<Self> {
        let shaped = !scheme.is_empty() && !scheme.contains([':', '/', '\0']);
        if !shaped || NEVER_GRANTED.contains(&scheme) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!(
                    "protocol '{}' cannot be granted to images",
                    escape_bytes(scheme.as_bytes())
                ),
            ));
        }
        self.schemes.insert(scheme.to_owned());
        Ok(self)
    }

    /// Also lets block devices be opened, where they lie beneath a granted directory.
    #[must_use]
    pub fn allow_block_devices(mut self) -> Self {
        self.block_devices = true;
        self
    }

    /// Takes `file:PATH` for PATH, which has to lie within a granted directory as any path.
    #[must_use]
    pub fn allow_file_prefix(mut self) -> Self {
        self.file_prefix = true;
        self
    }

    /// The path that `name` is, where it has a prefix that this gate takes for nothing.
    #[must_use]
    pub fn without_prefix<'name>(&self, name: &'name [u8]) -> &'name [u8] {
        match name.strip_prefix(b"file:") {
            Some(path) if self.file_prefix => path,
            _ => name,
        }
    }

    /// The gate for data files: without the directories that are for backing files only.
    #[must_use]
    pub fn for_data_files(mut self) -> Self {
        self.grants.retain(|grant| grant.access == Access::ReadWrite);
        self
    }

    /// Lets images open whatever the caller itself could, by any name: protocols, `json:` and all.
    /// For images that the caller made.
    #[must_use]
    pub fn trust_images(mut self) -> Self {
        self.trusted = true;
        self
    }

    /// Whether images may open whatever the caller could.
    #[must_use]
    pub fn trusts_images(&self) -> bool {
        self.trusted
    }

    /// The scheme of `name` if it has one and that is granted: the name is then for that
    /// protocol's driver. `None` means a file name, for [`OpenGate::open_named`].
    ///
    /// # Errors
    ///
    /// A scheme that was not granted, or a name that could be nothing at all.
    pub fn granted_scheme<'name>(
        &self,
        name: &'name [u8],
    ) -> Result<Option<&'name str>, GateError> {
        check_shape(name)?;
        let Some(scheme) = scheme_of(name) else {
            return Ok(None);
        };
        match std::str::from_utf8(scheme) {
            Ok(scheme) if self.trusted || self.schemes.contains(scheme) => Ok(Some(scheme)),
            _ => Err(GateError::Scheme(escape_bytes(name))),
        }
    }

    /// Opens the file an image calls `name`. `base_directory` is the directory of that image, to
    /// which relative names refer.
    ///
    /// Returns the descriptor and the path it was reached by; that path's directory is the base
    /// for names found in the opened file. Touches the file system, and may block as any open of a
    /// file may.
    ///
    /// # Errors
    ///
    /// See [`GateError`].
    pub fn open_named(
        &self,
        base_directory: Option<&Path>,
        name: &[u8],
        access: Access,
    ) -> Result<(OwnedFd, PathBuf), GateError> {
        check_shape(name)?;
        if scheme_of(name).is_some() {
            return Err(GateError::Scheme(escape_bytes(name)));
        }
        let shown = || escape_bytes(name);
        let path = absolute_path(base_directory, Path::new(OsStr::from_bytes(name)))
            .ok_or_else(|| GateError::NoBase(shown()))?;

        let mut refusal = GateError::NotGranted(shown());
        for (grant, beneath) in self.grants_above(&path) {
            if access == Access::ReadWrite && grant.access == Access::ReadOnly {
                continue;
            }
            match self.open_beneath(grant, beneath, access) {
                Ok(fd) => return Ok((fd, grant.canonical.join(beneath))),
                // The walk left this grant; it may still be inside another.
                Err(Refusal::Escaped) => {}
                Err(Refusal::NotAFile) => return Err(GateError::NotAFile(shown())),
                Err(Refusal::Errno(Errno::NOENT)) => refusal = GateError::Missing(shown()),
                Err(Refusal::Errno(errno)) => refusal = GateError::Failed(shown(), errno),
            }
        }
        Err(refusal)
    }

    /// The grants whose directory `path` begins with, and what follows it.
    fn grants_above<'gate, 'path>(
        &'gate self,
        path: &'path Path,
    ) -> impl Iterator<Item = (&'gate Grant, &'path Path)> {
        self.grants.iter().filter_map(|grant| {
            let beneath = path
                .strip_prefix(&grant.given)
                .or_else(|_| path.strip_prefix(&grant.canonical))
                .ok()?;
            Some((&**grant, beneath))
        })
    }

    /// Opens `path` beneath a grant in two steps, as G3 asks: find it, look at it, open it.
    fn open_beneath(&self, grant: &Grant, path: &Path, access: Access) -> Result<OwnedFd, Refusal> {
        if path.as_os_str().is_empty() {
            return Err(Refusal::NotAFile);
        }
        let found = walk(grant, path, OFlags::PATH)?;
        self.check_type(found.as_fd())?;
        drop(found);

        let mode = match access {
            Access::ReadOnly => OFlags::RDONLY,
            Access::ReadWrite => OFlags::RDWR,
        };
        let fd = walk(grant, path, mode | OFlags::NONBLOCK | OFlags::NOCTTY)?;
        // Another file may have taken the name since the first look. NONBLOCK has kept the open
        // from waiting for a FIFO's other end.
        self.check_type(fd.as_fd())?;
        // It must not stay: with it, a ring answers reads that would have to wait with EAGAIN
        // instead of waiting.
        let flags = fcntl_getfl(&fd).map_err(Refusal::Errno)?;
        fcntl_setfl(&fd, flags - OFlags::NONBLOCK).map_err(Refusal::Errno)?;
        Ok(fd)
    }

    fn check_type(&self, fd: BorrowedFd<'_>) -> Result<(), Refusal> {
        let stat = fstat(fd).map_err(Refusal::Errno)?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => Ok(()),
            FileType::BlockDevice if self.block_devices => Ok(()),
            _ => Err(Refusal::NotAFile),
        }
    }
}

/// Why one grant did not yield the file.
enum Refusal {
    /// The name leads out of the grant.
    Escaped,
    NotAFile,
    Errno(Errno),
}

/// Walks `path` beneath a granted directory and opens its end with `flags`.
fn walk(grant: &Grant, path: &Path, flags: OFlags) -> Result<OwnedFd, Refusal> {
    let directory = grant.directory.as_fd();
    // Nothing leads out of the root directory, and its absolute links are meant as they stand.
    let is_root = grant.canonical == Path::new("/");
    let bound = if is_root { ResolveFlags::IN_ROOT } else { ResolveFlags::BENEATH };
    let resolve = bound | ResolveFlags::NO_MAGICLINKS;
    for _ in 0..WALK_ATTEMPTS {
        match openat2(directory, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve) {
            Ok(fd) => return Ok(fd),
            // The kernel could not tell whether `..` stayed inside while something was renamed.
            Err(Errno::AGAIN | Errno::INTR) => {}
            // LOOP is both a magic link and links in a circle; neither leads to a file inside.
            Err(Errno::XDEV | Errno::LOOP) => return Err(Refusal::Escaped),
            Err(errno) => return Err(Refusal::Errno(errno)),
        }
    }
    Err(Refusal::Errno(Errno::AGAIN))
}

/// Refuses what can be neither a file name nor a scheme.
fn check_shape(name: &[u8]) -> Result<(), GateError> {
    if name.is_empty() {
        Err(GateError::Empty)
    } else if name.len() > MAX_NAME {
        Err(GateError::TooLong(name.len()))
    } else if name.contains(&0) {
        Err(GateError::Nul(escape_bytes(name)))
    } else {
        Ok(())
    }
}

/// The scheme of a name: what stands before a colon that comes before any slash. This is the rule
/// other readers of such images follow; with a looser one here, they and we would disagree on
/// which names are files.
fn scheme_of(name: &[u8]) -> Option<&[u8]> {
    let end = name.iter().position(|byte| matches!(byte, b':' | b'/'))?;
    (name[end] == b':').then(|| &name[..end])
}

/// The absolute path `name` stands for. Leading `..` of a relative name are resolved here, against
/// a base without links, so that a grant further up or beside is recognised; any later ones are
/// left to the kernel's walk, which alone knows about links inside the name.
fn absolute_path(base_directory: Option<&Path>, name: &Path) -> Option<PathBuf> {
    if name.is_absolute() {
        return Some(name.to_owned());
    }
    // This looks at the base alone, never at what the name says, so G2 holds. A base that cannot
    // be resolved is as good as none.
    let base = base_directory?;
    let base = if base.as_os_str().is_empty() { Path::new(".") } else { base };
    let mut path = std::fs::canonicalize(base).ok()?;
    let mut components = name.components().peekable();
    while let Some(component) = components.peek() {
        match component {
            Component::CurDir => {}
            Component::ParentDir => {
                path.pop();
            }
            _ => break,
        }
        components.next();
    }
    path.extend(components);
    Some(path)
}

#[cfg(test)]
mod tests;
