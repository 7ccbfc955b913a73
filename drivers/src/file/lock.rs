//! Image locks between processes, in the way QEMU takes them, so that both respect each other.
//!
//! The permissions a process holds on an image are shown as shared locks on single bytes of the
//! file. (The bytes need not exist, and nobody ever reads them.)
//!
//! | byte | a lock on it says |
//! |---|---|
//! | 100 + n | "I use permission n" |
//! | 200 + n | "I do not let others use permission n" |
//!
//! Shared locks never collide, so everyone can put up their signs. Whether two sets of signs
//! agree, each finds out by *asking* (never by taking) for an exclusive lock: to use n, nobody else
//! may hold 200 + n; to deny n to others, nobody else may hold 100 + n.
//!
//! The locks are those of the *open file description* (OFD): two opens of one file within a process
//! exclude each other like two processes do, and closing some other descriptor of the file releases
//! nothing.
//!
//! # States
//!
//! | state | locks held | left by |
//! |---|---|---|
//! | settled | those of `held` | `prepare` |
//! | prepared | those of `held` and of `prepared` | `commit` (to settled, new set), `abort` (to settled, old set) |
//!
//! # Invariants
//!
//! * **L1** Signs go up before the question is asked. Two processes that start together may both
//!   be refused; they can never both be let in.
//! * **L2** A change that fails leaves exactly the old set of signs.
//! * **L3** Between `prepare` and `commit` the old set is still up, so nobody can slip into a
//!   permission that `abort` has to give back.
//!
//! This file may use `unsafe`: no safe wrapper offers byte-range OFD locks.
#![expect(unsafe_code, reason = "fcntl(F_OFD_SETLK, F_OFD_GETLK) has no safe wrapper")]

use std::{
    fmt, io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
};

/// Read data and rely on it being consistent.
pub const CONSISTENT_READ: u64 = 1;
/// Write.
pub const WRITE: u64 = 2;
/// Write what does not change the visible data.
pub const WRITE_UNCHANGED: u64 = 4;
/// Change the length.
pub const RESIZE: u64 = 8;
/// All permissions there are.
pub const ALL: u64 = 15;

/// The permissions' names by bit number, as QEMU prints them.
const NAMES: [&str; 4] = ["consistent read", "write", "write unchanged", "resize"];

const USED_BASE: i64 = 100;
const DENIED_BASE: i64 = 200;

/// Which permission could not be had, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LockConflict {
    /// The permission's name.
    pub permission: &'static str,
    /// `false`: we wanted to use it and another process denies it. `true`: we wanted to deny it
    /// and another process uses it.
    pub shared: bool,
    /// The process in the way, where the kernel knows: not for OFD locks, which QEMU and this
    /// project take.
    pub holder: Option<u32>,
}

impl fmt::Display for LockConflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shared = if self.shared { "shared " } else { "" };
        write!(f, "Failed to get {shared}\"{}\" lock", self.permission)?;
        match self.holder {
            Some(pid) => write!(f, " (process {pid} is using the image)"),
            None => f.write_str(" (is another process using the image?)"),
        }
    }
}

/// Why the locks could not be changed.
#[derive(Debug)]
#[non_exhaustive]
pub enum LockError {
    /// Another opener's permissions and ours do not go together.
    Conflict(LockConflict),
    /// The kernel or the file system failed to lock.
    Io(io::Error),
}

impl LockError {
    /// Whether this file system or kernel has no such locks at all, so that `locking=auto` may go
    /// on without.
    #[must_use]
    pub fn is_unsupported(&self) -> bool {
        match self {
            Self::Conflict(_) => false,
            Self::Io(error) => matches!(
                error.raw_os_error(),
                Some(libc::EINVAL | libc::ENOLCK | libc::ENOSYS | libc::EOPNOTSUPP)
            ),
        }
    }
}

impl fmt::Display for LockError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Conflict(conflict) => conflict.fmt(f),
            Self::Io(error) => write!(f, "Failed to lock the image: {error}"),
        }
    }
}

impl std::error::Error for LockError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Conflict(_) => None,
            Self::Io(error) => Some(error),
        }
    }
}

/// What is used and what is denied to others, each as permission bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct LockSet {
    used: u64,
    denied: u64,
}

impl LockSet {
    const EMPTY: Self = Self { used: 0, denied: 0 };

    /// The bytes this set locks and `other` does not, as (byte, permission number, is it a denial).
    fn beyond(self, other: Self) -> impl Iterator<Item = (i64, usize, bool)> {
        let used = bits(self.used & !other.used).map(|n| (byte(USED_BASE, n), n, false));
        let denied = bits(self.denied & !other.denied).map(|n| (byte(DENIED_BASE, n), n, true));
        used.chain(denied)
    }
}

/// The lock on one open image. Use from one thread at a time; none of the calls waits for another
/// process. Dropping it releases every lock.
#[derive(Debug)]
pub struct FileLock {
    fd: OwnedFd,
    held: LockSet,
    prepared: Option<LockSet>,
}

impl FileLock {
    /// A lock for what `fd` has open, so far with nothing held.
    ///
    /// The descriptor is duplicated. Locks belong to the open file description, which both share:
    /// make one `FileLock` per open, and do not lock these bytes of it in another way.
    ///
    /// # Errors
    ///
    /// No more descriptors can be had.
    pub fn new(fd: impl AsFd) -> io::Result<Self> {
        Ok(Self { fd: fd.as_fd().try_clone_to_owned()?, held: LockSet::EMPTY, prepared: None })
    }

    /// Changes the locks to: use the permissions `perm`, let others use `shared` (bits of
    /// [`ALL`]; others are ignored).
    ///
    /// # Errors
    ///
    /// A conflict with another opener, or locking fails; the old locks are then as before.
    pub fn apply(&mut self, perm: u64, shared: u64) -> Result<(), LockError> {
        self.prepare(perm, shared)?;
        self.commit();
        Ok(())
    }

    /// The first half of [`FileLock::apply`]: makes sure of the new set without giving up the old.
    /// A change that was prepared before is aborted.
    ///
    /// # Errors
    ///
    /// As for `apply`; nothing is prepared then.
    pub fn prepare(&mut self, perm: u64, shared: u64) -> Result<(), LockError> {
        self.abort();
        let new = LockSet { used: perm & ALL, denied: !shared & ALL };
        // From here on `abort` takes back whatever had been taken (L2).
        self.prepared = Some(new);
        let result = self.put_up(new).and_then(|()| self.ask(new));
        if result.is_err() {
            self.abort();
        }
        result
    }

    /// The second half: gives up what only the old set needed. Nothing happens if nothing is
    /// prepared.
    pub fn commit(&mut self) {
        if let Some(new) = self.prepared.take() {
            self.take_down(self.held, new);
            self.held = new;
        }
    }

    /// Goes back to the old set. Nothing happens if nothing is prepared.
    pub fn abort(&mut self) {
        if let Some(new) = self.prepared.take() {
            self.take_down(new, self.held);
        }
    }

    /// Moves the locks to another open of the same file, as when it is reopened with other flags.
    /// At no moment are they not held.
    ///
    /// # Errors
    ///
    /// No more descriptors, or locking fails; the locks then stay where they are.
    pub fn move_to(&mut self, fd: impl AsFd) -> Result<(), LockError> {
        let mut moved = Self::new(fd).map_err(LockError::Io)?;
        moved.held = self.held;
        moved.prepared = self.prepared;
        // Should this fail, dropping `moved` takes down its part.
        moved.put_up(self.held)?;
        if let Some(prepared) = self.prepared {
            moved.put_up(prepared)?;
        }
        // No question needs asking: our own signs have kept every conflict away all along.
        *self = moved;
        Ok(())
    }

    /// Puts up all signs of `set`. Those that are up already stay; locking them again is harmless.
    fn put_up(&self, set: LockSet) -> Result<(), LockError> {
        for (byte, n, shared) in set.beyond(LockSet::EMPTY) {
            match self.set_lock(libc::F_RDLCK, byte) {
                Ok(()) => {}
                // Somebody holds it exclusively. No QEMU does that, but it is a clear answer.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
                    return Err(conflict(n, shared, None));
                }
                Err(error) => return Err(LockError::Io(error)),
            }
        }
        Ok(())
    }

    /// Asks whether somebody else's signs collide with `set`.
    fn ask(&self, set: LockSet) -> Result<(), LockError> {
        for n in bits(set.used) {
            self.ask_byte(byte(DENIED_BASE, n), n, false)?;
        }
        for n in bits(set.denied) {
            self.ask_byte(byte(USED_BASE, n), n, true)?;
        }
        Ok(())
    }

    fn ask_byte(&self, byte: i64, n: usize, shared: bool) -> Result<(), LockError> {
        let mut lock = record(libc::F_WRLCK, byte);
        // SAFETY: F_OFD_GETLK reads and writes one `flock`; `lock` is one, initialised and ours
        // alone for the call, and the descriptor is open as we own it.
        let result = unsafe { libc::fcntl(self.fd.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) };
        if result < 0 {
            return Err(LockError::Io(io::Error::last_os_error()));
        }
        if i32::from(lock.l_type) == libc::F_UNLCK {
            return Ok(());
        }
        // The kernel says -1 for a lock that belongs to a file description, not to a process.
        let holder = u32::try_from(lock.l_pid).ok().filter(|pid| *pid != 0);
        Err(conflict(n, shared, holder))
    }

    /// Takes down the signs of `set` that `keep` does not have.
    fn take_down(&self, set: LockSet, keep: LockSet) {
        for (byte, n, _) in set.beyond(keep) {
            if let Err(error) = self.set_lock(libc::F_UNLCK, byte) {
                // The lock stays until the file is closed: others are kept out for too long, which
                // is safe, and there is nobody who could do better.
                tracing::warn!(byte, permission = NAMES[n], %error, "could not release image lock");
            }
        }
    }

    fn set_lock(&self, kind: libc::c_int, byte: i64) -> io::Result<()> {
        let lock = record(kind, byte);
        // SAFETY: F_OFD_SETLK reads one `flock`; `lock` is one, initialised, and lives for the
        // call. The descriptor is open as we own it.
        let result =
            unsafe { libc::fcntl(self.fd.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

impl Drop for FileLock {
    /// Not left to closing the descriptor, since its duplicates keep the description alive.
    fn drop(&mut self) {
        self.abort();
        self.take_down(self.held, LockSet::EMPTY);
    }
}

fn conflict(n: usize, shared: bool, holder: Option<u32>) -> LockError {
    LockError::Conflict(LockConflict { permission: NAMES[n], shared, holder })
}

/// The numbers of the bits set in `permissions`.
fn bits(permissions: u64) -> impl Iterator<Item = usize> {
    (0..NAMES.len()).filter(move |n| permissions >> n & 1 == 1)
}

/// The byte that stands for permission `n`.
fn byte(base: i64, n: usize) -> i64 {
    base + n as i64
}

/// A lock record for a single byte. OFD locks want the process id to be 0.
fn record(kind: libc::c_int, byte: i64) -> libc::flock {
    libc::flock {
        // The kernel's own values for these, 0 to 2.
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    }
}

#[cfg(test)]
mod tests;
