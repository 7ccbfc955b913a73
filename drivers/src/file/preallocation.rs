//! Files that grow with storage behind what is added. Everything here blocks.

use super::sys::{self, AllocateMode};
use blockplex_graph::{Error, ErrorKind, Preallocation, Result};
use rustix::fs::fdatasync;
use rustix::io::{Errno, pwrite};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

/// The zeros that are written at once.
const CHUNK: u64 = 1 << 20;
/// The block of a new file that is written.
const FIRST_BLOCK: usize = 4096;

/// Whether a file can go from `old` to `new` bytes in this way.
pub(super) fn check(mode: Preallocation, old: u64, new: u64) -> Result<()> {
    let text = match mode {
        Preallocation::Off => return Ok(()),
        Preallocation::Metadata => "a file has no preallocation mode 'metadata'",
        _ if new < old => "preallocation cannot be used for shrinking a file",
        _ => return Ok(()),
    };
    Err(Error::new(ErrorKind::NotSupported, text))
}

/// Gives the file its new length. A failure leaves it as it was.
pub(super) fn resize(
    fd: &OwnedFd,
    direct: bool,
    old: u64,
    new: u64,
    mode: Preallocation,
) -> io::Result<()> {
    let taken = match mode {
        Preallocation::Off | Preallocation::Metadata => {
            sys::truncate(fd, new)?;
            if old == 0 && new > 0 {
                allocate_first_block(fd, new);
            }
            return Ok(());
        }
        _ if new <= old => return sys::truncate(fd, new),
        Preallocation::Falloc => match sys::allocate(fd, AllocateMode::Reserve, old, new - old) {
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                write_zeros(fd, direct, old, new)
            }
            result => result,
        },
        Preallocation::Full => write_zeros(fd, direct, old, new),
    };
    if taken.is_err() {
        sys::truncate(fd, old)?;
    } else if old == 0 && mode == Preallocation::Falloc {
        allocate_first_block(fd, new);
    }
    taken
}

/// Gives a new file's first block a place, as the peer does: what alignment direct requests need
/// can be found out by reading there. A failure does no harm.
fn allocate_first_block(fd: &OwnedFd, length: u64) {
    let zeros = [0; FIRST_BLOCK];
    let count = if length < FIRST_BLOCK as u64 { length.min(512) } else { FIRST_BLOCK as u64 };
    let first = zeros.get(..count as usize).unwrap_or(&zeros);
    if let Err(error) = pwrite(fd, first, 0) {
        tracing::debug!(%error, "the first block of a new file was not written");
    }
}

/// Writes zeros and makes them durable, through the page cache in any case: the old length may
/// suit nothing else.
fn write_zeros(fd: &OwnedFd, direct: bool, start: u64, end: u64) -> io::Result<()> {
    let cached;
    let fd = if direct {
        let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
        let how = sys::OpenOptions { write: true, direct: false, create: false };
        cached = sys::open(Path::new(&path), how)?;
        &cached
    } else {
        fd
    };
    sys::truncate(fd, end)?;
    let zeros = vec![0; CHUNK as usize];
    let mut at = start;
    while at < end {
        let length = (end - at).min(CHUNK) as usize;
        match pwrite(fd, zeros.get(..length).unwrap_or(&zeros), at) {
            Ok(0) => return Err(Errno::IO.into()),
            Ok(count) => at += count as u64,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(fdatasync(fd)?)
}
