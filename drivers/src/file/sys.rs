//! The system calls of the file driver that are not I/O: opening, measuring, mapping, allocating.
//!
//! All are thin, safe and blocking; the driver runs them where blocking is allowed (on open, or on
//! a worker thread). Errors are the kernel's own, as [`io::Error`]; what the kernel leaves out, a
//! fallback here answers: file systems without hole seeking are all data, kernels that do not
//! report O_DIRECT alignment are found out by trial reads.

use std::{io, os::fd::OwnedFd, path::Path};

use rustix::{
    fd::{AsFd, BorrowedFd},
    fs::{
        AtFlags, FallocateFlags, FileType, Mode, OFlags, SeekFrom, StatxFlags, fallocate,
        fcntl_getfl, fcntl_setfl, fstat, fstatvfs, ftruncate, ioctl_blksszget, seek, statx,
    },
    io::{Errno, pread},
};

/// How a file is opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpenOptions {
    /// For writing too.
    pub write: bool,
    /// Past the page cache. Buffers, offsets and lengths must then be aligned, see
    /// [`direct_alignment`].
    pub direct: bool,
    /// Create the file, for its owner and group to read, if it is not there. Needs `write`. An
    /// existing file is left as it is: cutting it comes after locking it.
    pub create: bool,
}

/// What kind of thing a descriptor has open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// A regular file: it may grow, and have holes.
    Regular,
    /// A block device: its length is fixed.
    BlockDevice,
}

/// Opens a file or block device by a name *the caller* gave. (Names found inside images go through
/// [`OpenGate`](crate::open_gate::OpenGate).) The descriptor is closed on exec, and never waits: a
/// FIFO is refused, not waited for.
///
/// # Errors
///
/// What `open` reports; `EINVAL` for O_DIRECT where the file system has none, or for anything but
/// a regular file or block device.
pub fn open(path: &Path, options: OpenOptions) -> io::Result<OwnedFd> {
    let mut flags = OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
    flags |= if options.write { OFlags::RDWR } else { OFlags::RDONLY };
    flags.set(OFlags::DIRECT, options.direct);
    flags.set(OFlags::CREATE, options.create);
    let mode = Mode::RUSR | Mode::WUSR | Mode::RGRP | Mode::ROTH;
    let fd = loop {
        match rustix::fs::open(path, flags, mode) {
            Err(Errno::INTR) => {}
            other => break other?,
        }
    };
    kind(&fd)?;
    // Only the open itself was to be kept from waiting. Left on, the flag would make a ring answer
    // EAGAIN to each read that misses the page cache.
    fcntl_setfl(&fd, fcntl_getfl(&fd)? - OFlags::NONBLOCK)?;
    Ok(fd)
}

/// What lies at `path`, as far as it is a file or block device.
///
/// # Errors
///
/// It cannot be looked at; as [`kind`] for everything else.
pub fn kind_at(path: &Path) -> io::Result<FileKind> {
    kind_of(rustix::fs::stat(path)?.st_mode)
}

/// What `fd` has open.
///
/// # Errors
///
/// `EISDIR` for a directory, `EINVAL` for anything else that is neither file nor block device.
pub fn kind(fd: impl AsFd) -> io::Result<FileKind> {
    kind_of(fstat(fd)?.st_mode)
}

fn kind_of(mode: u32) -> io::Result<FileKind> {
    match FileType::from_raw_mode(mode) {
        FileType::RegularFile => Ok(FileKind::Regular),
        FileType::BlockDevice => Ok(FileKind::BlockDevice),
        FileType::Directory => Err(Errno::ISDIR.into()),
        _ => Err(Errno::INVAL.into()),
    }
}

/// The length in bytes of a regular file or block device, as of now.
///
/// # Errors
///
/// What `fstat` or `lseek` report. Seeking moves the offset of the open file, which nothing in
/// this project uses.
pub fn length(fd: impl AsFd) -> io::Result<u64> {
    let fd = fd.as_fd();
    match kind(fd)? {
        FileKind::Regular => u64::try_from(fstat(fd)?.st_size).map_err(|_| Errno::OVERFLOW.into()),
        FileKind::BlockDevice => Ok(seek(fd, SeekFrom::End(0))?),
    }
}

/// Sets the length of a regular file; what is added reads as zeros.
///
/// # Errors
///
/// What `ftruncate` reports; `EINVAL` for devices, `EFBIG` beyond what the file system can hold.
pub fn truncate(fd: impl AsFd, length: u64) -> io::Result<()> {
    if length > i64::MAX as u64 {
        return Err(Errno::FBIG.into());
    }
    Ok(ftruncate(fd, length)?)
}

/// The unit in bytes in which the file system allocates, or the device addresses: holes smaller
/// than this, or across its multiples, are not made.
///
/// # Errors
///
/// What `fstatvfs` or `BLKSSZGET` report.
pub fn block_size(fd: impl AsFd) -> io::Result<u64> {
    let fd = fd.as_fd();
    let size = match kind(fd)? {
        FileKind::BlockDevice => u64::from(ioctl_blksszget(fd)?),
        FileKind::Regular => {
            let stat = fstatvfs(fd)?;
            if stat.f_frsize == 0 { stat.f_bsize } else { stat.f_frsize }
        }
    };
    Ok(size.max(1))
}

/// Switches O_DIRECT on or off on an open file description.
///
/// # Errors
///
/// `EINVAL` where the file system has no O_DIRECT.
pub fn set_direct(fd: impl AsFd, direct: bool) -> io::Result<()> {
    let fd = fd.as_fd();
    let mut flags = fcntl_getfl(fd)?;
    flags.set(OFlags::DIRECT, direct);
    Ok(fcntl_setfl(fd, flags)?)
}

/// What O_DIRECT asks of requests, in bytes; both are powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirectAlignment {
    /// Of the address of each buffer, and of the length of each piece of a vector.
    pub memory: u32,
    /// Of the file offset and the total length.
    pub offset: u32,
}

/// The largest alignment that is tried, and taken where nothing smaller is known to do: a page.
const LARGEST_ALIGNMENT: usize = 4096;

/// Finds out what O_DIRECT on `fd`, which must be open with it, asks of requests.
///
/// # Errors
///
/// `EINVAL` if the file cannot be read with O_DIRECT at all, or what trial reads report.
pub fn direct_alignment(fd: impl AsFd) -> io::Result<DirectAlignment> {
    let fd = fd.as_fd();
    match reported_alignment(fd)? {
        Some(alignment) => Ok(alignment),
        None => tried_alignment(fd),
    }
}

/// What the kernel says, if this kernel and file system say anything.
fn reported_alignment(fd: BorrowedFd<'_>) -> io::Result<Option<DirectAlignment>> {
    let stat = match statx(fd, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN) {
        Ok(stat) => stat,
        Err(Errno::NOSYS | Errno::INVAL | Errno::PERM) => return Ok(None),
        Err(errno) => return Err(errno.into()),
    };
    if stat.stx_mask & StatxFlags::DIOALIGN.bits() == 0 {
        return Ok(None);
    }
    let (memory, offset) = (stat.stx_dio_mem_align, stat.stx_dio_offset_align);
    if memory == 0 || offset == 0 {
        // It does know, and says that this file has no direct I/O.
        return Err(Errno::INVAL.into());
    }
    let plausible = memory.is_power_of_two() && offset.is_power_of_two();
    Ok(plausible.then_some(DirectAlignment { memory, offset }))
}

/// Reads at the start of the file with ever larger alignments until the kernel takes one.
fn tried_alignment(fd: BorrowedFd<'_>) -> io::Result<DirectAlignment> {
    let candidates = || [1, 512, 1024, 2048, LARGEST_ALIGNMENT].into_iter();
    let mut buffer = vec![0; 3 * LARGEST_ALIGNMENT];
    let aligned = buffer.as_ptr().align_offset(LARGEST_ALIGNMENT);
    let Some(buffer) = buffer.get_mut(aligned..aligned + 2 * LARGEST_ALIGNMENT) else {
        return Err(Errno::INVAL.into());
    };
    let mut accepts =
        |skew: usize, length: usize| match pread(fd, &mut buffer[skew..skew + length], 0) {
            Ok(_) => Ok(true),
            Err(Errno::INVAL) => Ok(false),
            Err(errno) => Err(errno),
        };
    let mut smallest = |by_memory: bool| -> io::Result<u32> {
        for candidate in candidates() {
            let accepted = if by_memory {
                accepts(candidate % LARGEST_ALIGNMENT, LARGEST_ALIGNMENT)?
            } else {
                accepts(0, candidate)?
            };
            if accepted {
                // A single byte is taken where the answer means nothing: an empty file, or a file
                // system that does not check. The safe choice then is the largest.
                let found = if candidate == 1 { LARGEST_ALIGNMENT } else { candidate };
                return u32::try_from(found).map_err(|_| Errno::OVERFLOW.into());
            }
        }
        Err(Errno::INVAL.into())
    };
    Ok(DirectAlignment { memory: smallest(true)?, offset: smallest(false)? })
}

/// Whether a range of a file has storage behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentKind {
    /// Data, as far as the file system tells; it may be zeros.
    Data,
    /// Nothing is stored: reads as zeros.
    Hole,
}

/// A range of one kind, from the offset that was asked about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// What it is.
    pub kind: ExtentKind,
    /// How long it is in bytes; never 0.
    pub length: u64,
}

/// What is at `offset`, and how far it goes, though not beyond `end`.
///
/// Past the end of the file is a hole. Where the file system cannot tell, or tells nonsense because
/// the file is changing, everything is data. Neighbouring extents may be of the same kind.
///
/// # Errors
///
/// `EINVAL` if the range is empty or goes beyond `i64::MAX`; `EBADF` and the like.
pub fn next_extent(fd: impl AsFd, offset: u64, end: u64) -> io::Result<Extent> {
    if offset >= end || end > i64::MAX as u64 {
        return Err(Errno::INVAL.into());
    }
    let fd = fd.as_fd();
    let until = |kind, stop: u64| Extent { kind, length: stop.min(end) - offset };
    let unknown = until(ExtentKind::Data, end);
    let data = match seek(fd, SeekFrom::Data(offset)) {
        Ok(data) => data,
        // No data from here on: a hole up to the end of the file, or past it already.
        Err(Errno::NXIO) => return Ok(until(ExtentKind::Hole, end)),
        Err(Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS) => return Ok(unknown),
        Err(errno) => return Err(errno.into()),
    };
    if data > offset {
        return Ok(until(ExtentKind::Hole, data));
    }
    match seek(fd, SeekFrom::Hole(offset)) {
        Ok(hole) if data == offset && hole > offset => Ok(until(ExtentKind::Data, hole)),
        // Cut off or punched between the two calls, or not what was asked for.
        Ok(_) | Err(Errno::NXIO | Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS) => Ok(unknown),
        Err(errno) => Err(errno.into()),
    }
}

/// What `fallocate` is to do with a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AllocateMode {
    /// Reserve storage; data stays, and the file grows to hold the range.
    Reserve,
    /// Give the storage back: the range reads as zeros. The length stays.
    PunchHole,
    /// Make it zeros while keeping storage; the file grows to hold the range.
    ZeroRange,
    /// Make it zeros while keeping storage; the length stays.
    ZeroRangeKeepSize,
}

impl AllocateMode {
    /// The mode as the kernel's number, as rings take it.
    #[must_use]
    pub const fn raw(self) -> i32 {
        // The flags are small positive numbers; the kernel's type for them is signed.
        self.flags().bits() as i32
    }

    const fn flags(self) -> FallocateFlags {
        match self {
            Self::Reserve => FallocateFlags::empty(),
            Self::PunchHole => FallocateFlags::PUNCH_HOLE.union(FallocateFlags::KEEP_SIZE),
            Self::ZeroRange => FallocateFlags::ZERO_RANGE,
            Self::ZeroRangeKeepSize => FallocateFlags::ZERO_RANGE.union(FallocateFlags::KEEP_SIZE),
        }
    }
}

/// Does `mode` to a range of the file, now, on this thread.
///
/// # Errors
///
/// What `fallocate` reports; `EOPNOTSUPP` where the file system cannot, `EINVAL` for an empty
/// range.
pub fn allocate(fd: impl AsFd, mode: AllocateMode, offset: u64, length: u64) -> io::Result<()> {
    let fd = fd.as_fd();
    loop {
        match fallocate(fd, mode.flags(), offset, length) {
            Err(Errno::INTR) => {}
            other => return Ok(other?),
        }
    }
}

#[cfg(test)]
mod tests;
