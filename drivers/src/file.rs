//! `file`: a file or block device of the host, on the current loop's ring.
//!
//! Reads and writes are answered by [`Driver::map`] with the descriptor: the request path submits
//! them on whatever loop the request runs on. What the ring has no operation for (measuring,
//! finding holes, cutting) runs on the loop's worker threads.
//!
//! F1. A failed flush is final when the page cache lies between us and the storage: the kernel
//!     marks the pages clean, so a second flush could succeed with the data lost. Every later
//!     flush and FUA write fails with the same errno until the node is opened anew (promise P5).
//! F2. The locks are QEMU's, and follow what the node's parents need; see [`lock`].
//! F3. The cached length only grows, but for a truncation, which runs alone by permission.

pub mod lock;
mod preallocation;
pub mod sys;

use self::lock::{FileLock, LockError};
use self::sys::{AllocateMode, DirectAlignment, ExtentKind, FileKind};
use crate::open_gate::escape_bytes;
use blockplex_graph::driver::{
    AccessChange, Driver, LocalFuture, Map, MapRequest, Pin, PreparedReopen, Role,
};
use blockplex_graph::{
    Access, BlockStatus, Error, ErrorKind, Limits, NodeIo, NodeView, Outcome, Preallocation,
    Request, RequestFlags, RequestKind, Result,
};
use parking_lot::Mutex;
use std::any::Any;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, Ordering};

/// Whether image locks are taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Locking {
    /// Where the file system can.
    #[default]
    Auto,
    /// Always; opening fails where the file system cannot.
    On,
    /// Never.
    Off,
}

/// How a file is opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FileOptions {
    /// For writing too.
    pub write: bool,
    /// Past the page cache (`cache.direct`).
    pub direct: bool,
    /// Whether image locks are taken.
    pub locking: Locking,
    /// Lets other processes do anything with the file meanwhile (`force-share`).
    pub force_share: bool,
}

/// New options of an open file, for a reopen.
#[derive(Clone, Copy, Debug)]
pub struct FileReopen {
    /// Past the page cache or not.
    pub direct: bool,
}

/// The `file` driver.
pub struct File {
    path: PathBuf,
    kind: FileKind,
    writable: bool,
    locking: Locking,
    force_share: bool,
    /// None once closed.
    fd: Mutex<Option<Arc<OwnedFd>>>,
    /// The same, for `map`; -1 once closed.
    raw: AtomicI32,
    length: AtomicU64,
    lock: Mutex<Option<FileLock>>,
    mode: Arc<CacheMode>,
    /// The errno of the flush that failed (F1); 0: none.
    flush_failed: AtomicI32,
    cannot_zero: AtomicBool,
    cannot_punch: AtomicBool,
}

// Orderings: each of the atomics above stands for itself and guards no other memory, so Relaxed
// is enough: the graph's publication (or the request's own completion) orders what has to be.

impl File {
    /// Opens `path`, a name that the caller gave. Blocks as opening a file does.
    pub fn open(path: &Path, options: FileOptions) -> Result<File> {
        let FileOptions { write, direct, .. } = options;
        let fd = sys::open(path, sys::OpenOptions { write, direct, create: false })
            .map_err(|error| open_error(path, direct, error))?;
        File::from_fd(fd, path, options)
    }

    /// Takes over an open descriptor (the open gate's, or one that was passed to the process).
    /// `path` is for messages and for names that are relative to it.
    pub fn from_fd(fd: OwnedFd, path: &Path, options: FileOptions) -> Result<File> {
        let describe = |error| open_error(path, options.direct, error);
        let alignment = if options.direct {
            sys::set_direct(&fd, true).map_err(describe)?;
            Some(sys::direct_alignment(&fd).map_err(describe)?)
        } else {
            None
        };
        let lock = match options.locking {
            Locking::Off => None,
            _ => Some(FileLock::new(&fd).map_err(describe)?),
        };
        Ok(File {
            path: path.to_owned(),
            kind: sys::kind(&fd).map_err(describe)?,
            writable: options.write,
            locking: options.locking,
            force_share: options.force_share,
            raw: AtomicI32::new(fd.as_raw_fd()),
            length: AtomicU64::new(sys::length(&fd).map_err(describe)?),
            fd: Mutex::new(Some(Arc::new(fd))),
            lock: Mutex::new(lock),
            mode: Arc::new(CacheMode::new(options.direct, alignment)),
            flush_failed: AtomicI32::new(0),
            cannot_zero: AtomicBool::new(false),
            cannot_punch: AtomicBool::new(false),
        })
    }

    /// Where it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The open descriptor, until the node is closed.
    pub fn descriptor(&self) -> Result<Arc<OwnedFd>> {
        self.fd.lock().clone().ok_or_else(|| Error::new(ErrorKind::Gone, "the file is closed"))
    }

    /// The error of an earlier flush, if it is final (F1).
    fn sticky_error(&self) -> Option<Error> {
        match self.flush_failed.load(Ordering::Relaxed) {
            0 => None,
            errno => Some(Error::from_errno(errno)),
        }
    }

    async fn flush(&self, io: &NodeIo) -> Result<Outcome> {
        if let Some(error) = self.sticky_error() {
            return Err(error);
        }
        match io.local().fsync(self.descriptor()?, true).await {
            errno if errno < 0 => {
                if !self.mode.is_direct() {
                    self.flush_failed.store(-errno, Ordering::Relaxed);
                }
                Err(Error::from_errno(-errno))
            }
            // One that failed meanwhile may have taken our data's error with it.
            _ => self.sticky_error().map_or(Ok(Outcome::Done), Err),
        }
    }

    async fn allocate(
        &self,
        io: &NodeIo,
        mode: AllocateMode,
        offset: u64,
        length: u64,
    ) -> Result<()> {
        match io.local().fallocate(self.descriptor()?, mode.raw(), offset, length).await {
            0 => Ok(()),
            errno => Err(Error::from_errno(-errno)),
        }
    }

    async fn discard(&self, io: &NodeIo, offset: u64, length: u64) -> Result<Outcome> {
        if self.cannot_punch.load(Ordering::Relaxed) {
            return Ok(Outcome::Done);
        }
        match self.allocate(io, AllocateMode::PunchHole, offset, length).await {
            Err(error) if error.kind() == ErrorKind::NotSupported => {
                self.cannot_punch.store(true, Ordering::Relaxed);
            }
            result => result?,
        }
        Ok(Outcome::Done)
    }

    async fn write_zeroes(
        &self,
        io: &NodeIo,
        offset: u64,
        length: u64,
        flags: RequestFlags,
    ) -> Result<Outcome> {
        let end = offset + length;
        let within = end <= self.length.load(Ordering::Relaxed);
        if flags.may_unmap && within && !self.cannot_punch.load(Ordering::Relaxed) {
            match self.allocate(io, AllocateMode::PunchHole, offset, length).await {
                Err(error) if error.kind() == ErrorKind::NotSupported => {
                    self.cannot_punch.store(true, Ordering::Relaxed);
                }
                result => return result.map(|()| Outcome::Done),
            }
        }
        if !self.cannot_zero.load(Ordering::Relaxed) {
            match self.allocate(io, AllocateMode::ZeroRange, offset, length).await {
                Err(error) if error.kind() == ErrorKind::NotSupported => {
                    self.cannot_zero.store(true, Ordering::Relaxed);
                }
                result => {
                    result?;
                    self.length.fetch_max(end, Ordering::Relaxed);
                    return Ok(Outcome::Done);
                }
            }
        }
        Err(Error::new(ErrorKind::NotSupported, "the file system cannot zero a range"))
    }

    async fn block_status(&self, io: &NodeIo, offset: u64, length: u64) -> Result<Outcome> {
        let fd = self.descriptor()?;
        let end = offset + length;
        // lseek takes the inode's lock, which may be held for long: not on the loop.
        let extent = io.local().blocking(move || sys::next_extent(&*fd, offset, end)).await?;
        let data = extent.kind == ExtentKind::Data;
        Ok(Outcome::from(BlockStatus {
            length: extent.length,
            data,
            zero: !data,
            allocated: true,
            offset: Some(offset),
            file: Some(io.node().id()),
            ..BlockStatus::default()
        }))
    }

    async fn truncate(&self, io: &NodeIo, length: u64, mode: Preallocation) -> Result<Outcome> {
        if self.kind == FileKind::BlockDevice {
            let text = "the length of a block device is fixed";
            return Err(Error::new(ErrorKind::NotSupported, text));
        }
        let old = self.length.load(Ordering::Relaxed);
        preallocation::check(mode, old, length)?;
        let (fd, direct) = (self.descriptor()?, self.mode.is_direct());
        io.local().blocking(move || preallocation::resize(&fd, direct, old, length, mode)).await?;
        self.length.store(length, Ordering::Relaxed);
        Ok(Outcome::Done)
    }
}

impl std::fmt::Debug for File {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("File").field("path", &self.path).finish_non_exhaustive()
    }
}

impl Driver for File {
    fn driver_name(&self) -> &'static str {
        match self.kind {
            FileKind::Regular => "file",
            FileKind::BlockDevice => "host_device",
        }
    }

    fn length(&self, _node: &NodeView) -> u64 {
        self.length.load(Ordering::Relaxed)
    }

    fn allocated_bytes(&self, _node: &NodeView) -> Option<u64> {
        let stat = rustix::fs::fstat(&*self.descriptor().ok()?).ok()?;
        // In units of 512 bytes, whatever the file system's blocks are.
        u64::try_from(stat.st_blocks).ok()?.checked_mul(512)
    }

    fn limits(&self) -> Limits {
        Limits {
            request_alignment: self.mode.request_alignment.load(Ordering::Relaxed),
            memory_alignment: self.mode.memory_alignment.load(Ordering::Relaxed),
            ..Limits::UNLIMITED
        }
    }

    fn child_access(&self, _role: Role, parents: Access) -> Access {
        parents
    }

    fn access_changed(&self, change: AccessChange) -> Result<()> {
        let mut lock = self.lock.lock();
        let Some(held) = &mut *lock else { return Ok(()) };
        match change {
            AccessChange::Prepare(access) => {
                let shared = if self.force_share { lock::ALL } else { access.shared.bits() };
                match held.prepare(access.needed.bits(), shared) {
                    Err(error) if error.is_unsupported() && self.locking == Locking::Auto => {
                        tracing::debug!(path = %self.path.display(), %error, "no image locks");
                        *lock = None;
                    }
                    Err(error) => return Err(lock_error(&self.path, error)),
                    Ok(()) => {}
                }
            }
            AccessChange::Commit(_) => held.commit(),
            AccessChange::Abort(_) => held.abort(),
        }
        Ok(())
    }

    fn is_read_only(&self) -> bool {
        !self.writable
    }

    fn map(&self, _node: &NodeView, request: &MapRequest<'_>) -> Map {
        let MapRequest { offset, length, .. } = *request;
        match request.kind {
            RequestKind::Read => {}
            RequestKind::Write => {
                if request.flags.fua
                    && let Some(error) = self.sticky_error()
                {
                    return Map::Fail(error);
                }
                if offset + length > self.length.load(Ordering::Relaxed) {
                    self.length.fetch_max(offset + length, Ordering::Relaxed);
                }
            }
            _ => return Map::Async { length },
        }
        match self.raw.load(Ordering::Relaxed) {
            fd if fd >= 0 => Map::File { fd, offset, length },
            _ => Map::Fail(Error::new(ErrorKind::Gone, "the file is closed")),
        }
    }

    fn unpin(&self, _loop_index: usize, _pin: Pin) {}

    fn serve<'a>(&'a self, io: &'a NodeIo, request: Request) -> LocalFuture<'a, Result<Outcome>> {
        Box::pin(async move {
            let Request { kind, flags, offset, length, .. } = request;
            match kind {
                RequestKind::Flush => self.flush(io).await,
                RequestKind::Discard => self.discard(io, offset, length).await,
                RequestKind::WriteZeroes => self.write_zeroes(io, offset, length, flags).await,
                RequestKind::BlockStatus => self.block_status(io, offset, length).await,
                RequestKind::Truncate => self.truncate(io, offset, flags.preallocation).await,
                RequestKind::Read | RequestKind::Write => {
                    let text = "reads and writes of a file are mapped, not served";
                    Err(Error::new(ErrorKind::NotSupported, text))
                }
            }
        })
    }

    fn reopen<'a>(
        &'a self,
        _io: &'a NodeIo,
        options: Box<dyn Any>,
    ) -> LocalFuture<'a, Result<Box<dyn PreparedReopen>>> {
        Box::pin(async move {
            let Ok(options) = options.downcast::<FileReopen>() else {
                let text = "these are not options of a file";
                return Err(Error::new(ErrorKind::InvalidArgument, text));
            };
            let fd = self.descriptor()?;
            // Tried on a descriptor of its own, while it can still be refused.
            let alignment = if options.direct {
                let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
                let how = sys::OpenOptions { write: self.writable, direct: true, create: false };
                let trial = sys::open(Path::new(&path), how)
                    .map_err(|error| open_error(&self.path, true, error))?;
                Some(sys::direct_alignment(&trial)?)
            } else {
                None
            };
            let mode = self.mode.clone();
            Ok(Box::new(Reopen { fd, mode, alignment }) as Box<dyn PreparedReopen>)
        })
    }

    fn close<'a>(&'a self, _io: &'a NodeIo) -> LocalFuture<'a, Result<()>> {
        Box::pin(async move {
            self.raw.store(-1, Ordering::Relaxed);
            self.lock.lock().take();
            self.fd.lock().take();
            Ok(())
        })
    }
}

/// With or without the page cache, and what follows from it.
struct CacheMode {
    direct: AtomicBool,
    request_alignment: AtomicU32,
    memory_alignment: AtomicU32,
}

impl CacheMode {
    fn new(direct: bool, alignment: Option<DirectAlignment>) -> CacheMode {
        let mode = CacheMode {
            direct: AtomicBool::new(direct),
            request_alignment: AtomicU32::new(1),
            memory_alignment: AtomicU32::new(1),
        };
        mode.set(alignment);
        mode
    }

    fn is_direct(&self) -> bool {
        self.direct.load(Ordering::Relaxed)
    }

    /// None: through the page cache, where nothing needs to be aligned.
    fn set(&self, alignment: Option<DirectAlignment>) {
        self.direct.store(alignment.is_some(), Ordering::Relaxed);
        let alignment = alignment.unwrap_or(DirectAlignment { memory: 1, offset: 1 });
        self.request_alignment.store(alignment.offset.max(1), Ordering::Relaxed);
        self.memory_alignment.store(alignment.memory.max(1), Ordering::Relaxed);
    }
}

/// A change of the cache mode that has been tried. The descriptor stays: a new one would meet our
/// own locks.
struct Reopen {
    fd: Arc<OwnedFd>,
    mode: Arc<CacheMode>,
    alignment: Option<DirectAlignment>,
}

impl PreparedReopen for Reopen {
    fn commit(self: Box<Self>) {
        match sys::set_direct(&*self.fd, self.alignment.is_some()) {
            Ok(()) => self.mode.set(self.alignment),
            Err(error) => tracing::error!(%error, "a cache mode that was tried was refused"),
        }
    }
}

fn open_error(path: &Path, direct: bool, error: std::io::Error) -> Error {
    let kind = error.raw_os_error().map_or(ErrorKind::Io, ErrorKind::from_errno);
    let hint = if direct && kind == ErrorKind::InvalidArgument {
        " (does its file system support O_DIRECT?)"
    } else {
        ""
    };
    // The name may be an image's.
    let shown = escape_bytes(path.as_os_str().as_bytes());
    let text = format!("Could not open '{shown}': {error}{hint}");
    Error::new(kind, text).caused_by(error)
}

fn lock_error(path: &Path, error: LockError) -> Error {
    let text = format!("'{}': {error}", path.display());
    let kind = match &error {
        LockError::Conflict(_) => ErrorKind::Locked,
        LockError::Io(_) => ErrorKind::Io,
    };
    Error::new(kind, text).caused_by(error)
}

#[cfg(test)]
mod tests;
