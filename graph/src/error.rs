//! The one public error: a small kind to match on, the context of the operation, and the source.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

/// Result of a block operation.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, to match on. Each kind has one errno ([`ErrorKind::errno`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// An argument or option is not valid.
    InvalidArgument,
    /// The request lies outside of the node.
    OutOfRange,
    /// A write to something that is open read-only.
    ReadOnly,
    /// The caller may not do this (a file's mode, the open gate, a missing permission).
    PermissionDenied,
    /// Two users of a node exclude each other.
    PermissionConflict,
    /// Another process holds a lock on the file.
    Locked,
    /// The storage is full.
    NoSpace,
    /// Not supported; the message names what.
    NotSupported,
    /// No such node, file, child or origin.
    NotFound,
    /// The name is taken.
    Exists,
    /// In use, or in a state that does not allow it.
    Busy,
    /// The image contradicts itself.
    Corrupt,
    /// The storage failed.
    Io,
    /// The node, queue, backend or loop is gone.
    Gone,
    /// The backend has no root node.
    NoMedium,
    /// Cancelled before it ended.
    Cancelled,
    /// The deadline passed.
    TimedOut,
    /// A blocking call on a thread that owns an event loop.
    OnLoopThread,
    /// A limit of this implementation or of the caller's budget.
    LimitExceeded,
}

impl ErrorKind {
    /// The errno that a frontend reports for it.
    pub fn errno(self) -> i32 {
        match self {
            ErrorKind::InvalidArgument => libc::EINVAL,
            ErrorKind::OutOfRange | ErrorKind::Corrupt | ErrorKind::Io => libc::EIO,
            ErrorKind::ReadOnly | ErrorKind::PermissionDenied => libc::EACCES,
            ErrorKind::PermissionConflict => libc::EPERM,
            ErrorKind::Locked => libc::EAGAIN,
            ErrorKind::NoSpace => libc::ENOSPC,
            ErrorKind::NotSupported => libc::ENOTSUP,
            ErrorKind::NotFound => libc::ENOENT,
            ErrorKind::Exists => libc::EEXIST,
            ErrorKind::Busy => libc::EBUSY,
            ErrorKind::Gone => libc::ENODEV,
            ErrorKind::NoMedium => libc::ENOMEDIUM,
            ErrorKind::Cancelled => libc::ECANCELED,
            ErrorKind::TimedOut => libc::ETIMEDOUT,
            ErrorKind::OnLoopThread => libc::EDEADLK,
            ErrorKind::LimitExceeded => libc::E2BIG,
        }
    }

    /// The kind that fits a system call's errno.
    pub fn from_errno(errno: i32) -> ErrorKind {
        match errno {
            libc::EINVAL => ErrorKind::InvalidArgument,
            libc::EROFS => ErrorKind::ReadOnly,
            libc::EACCES | libc::EPERM => ErrorKind::PermissionDenied,
            libc::ENOSPC | libc::EDQUOT | libc::EFBIG => ErrorKind::NoSpace,
            libc::EOPNOTSUPP | libc::ENOSYS => ErrorKind::NotSupported,
            libc::ENOENT => ErrorKind::NotFound,
            libc::EEXIST => ErrorKind::Exists,
            libc::EBUSY => ErrorKind::Busy,
            libc::ENODEV | libc::ENXIO => ErrorKind::Gone,
            libc::ENOMEDIUM => ErrorKind::NoMedium,
            libc::ECANCELED => ErrorKind::Cancelled,
            libc::ETIMEDOUT => ErrorKind::TimedOut,
            _ => ErrorKind::Io,
        }
    }
}

/// An error with its context. One pointer wide; cloning shares it.
#[derive(Clone)]
pub struct Error(Arc<Inner>);

#[derive(Clone)]
struct Inner {
    kind: ErrorKind,
    errno: Option<i32>,
    message: Cow<'static, str>,
    operation: Option<&'static str>,
    node: Option<String>,
    range: Option<(u64, u64)>,
    source: Option<Arc<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error of `kind` that says `message`.
    pub fn new(kind: ErrorKind, message: impl Into<Cow<'static, str>>) -> Error {
        Error(Arc::new(Inner {
            kind,
            errno: None,
            message: message.into(),
            operation: None,
            node: None,
            range: None,
            source: None,
        }))
    }

    /// The error of a system call, by its (positive) errno.
    pub fn from_errno(errno: i32) -> Error {
        let mut error = Error::new(ErrorKind::from_errno(errno), "");
        error.edit(|inner| {
            inner.errno = Some(errno);
            inner.message = std::io::Error::from_raw_os_error(errno).to_string().into();
        });
        error
    }

    /// Adds the operation, when none is known yet.
    #[must_use]
    pub fn during(mut self, operation: &'static str) -> Error {
        if self.0.operation.is_none() {
            self.edit(|inner| inner.operation = Some(operation));
        }
        self
    }

    /// Adds the node, when none is known yet: the innermost node is the one to blame.
    #[must_use]
    pub fn at_node(mut self, node: &str) -> Error {
        if self.0.node.is_none() {
            self.edit(|inner| inner.node = Some(node.to_owned()));
        }
        self
    }

    /// Adds the byte range, when none is known yet.
    #[must_use]
    pub fn at_range(mut self, offset: u64, length: u64) -> Error {
        if self.0.range.is_none() {
            self.edit(|inner| inner.range = Some((offset, length)));
        }
        self
    }

    /// Adds what caused it.
    #[must_use]
    pub fn caused_by(mut self, source: impl std::error::Error + Send + Sync + 'static) -> Error {
        self.edit(|inner| inner.source = Some(Arc::new(source)));
        self
    }

    /// What went wrong.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// What it says, without the operation, range and node.
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// The errno to report: the system call's own where there was one.
    pub fn errno(&self) -> i32 {
        self.0.errno.unwrap_or_else(|| self.0.kind.errno())
    }

    /// The node to blame.
    pub fn node(&self) -> Option<&str> {
        self.0.node.as_deref()
    }

    /// The operation that failed.
    pub fn operation(&self) -> Option<&'static str> {
        self.0.operation
    }

    /// Offset and length in bytes of the request, or of the part that failed.
    pub fn range(&self) -> Option<(u64, u64)> {
        self.0.range
    }

    fn edit(&mut self, change: impl FnOnce(&mut Inner)) {
        change(Arc::make_mut(&mut self.0));
    }
}

impl From<std::io::Error> for Error {
    fn from(error: std::io::Error) -> Error {
        match error.raw_os_error() {
            Some(errno) => Error::from_errno(errno),
            None => Error::new(ErrorKind::Io, error.to_string()).caused_by(error),
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(operation) = self.0.operation {
            write!(f, "{operation}")?;
            if let Some((offset, length)) = self.0.range {
                write!(f, " of {length} bytes at {offset}")?;
            }
            if let Some(node) = &self.0.node {
                write!(f, " on node '{node}'")?;
            }
            write!(f, ": ")?;
        } else if let Some(node) = &self.0.node {
            write!(f, "node '{node}': ")?;
        }
        f.write_str(&self.0.message)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}({self})", self.0.kind)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_deref().map(|source| source as _)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_names_operation_range_node_and_reason() {
        let error = Error::from_errno(libc::ENOSPC)
            .during("write")
            .at_node("disk0")
            .at_range(4096, 512)
            .at_node("outer nodes do not take the blame");
        assert_eq!(error.kind(), ErrorKind::NoSpace);
        assert_eq!(error.errno(), libc::ENOSPC);
        assert_eq!(
            error.to_string(),
            "write of 512 bytes at 4096 on node 'disk0': No space left on device (os error 28)"
        );
    }
}
