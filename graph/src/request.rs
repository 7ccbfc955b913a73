//! The vocabulary of requests: what can be asked of a node, and what comes back.

use crate::error::Result;
use crate::node::NodeId;
use blockplex_io::buffer::IoVector;

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum RequestKind {
    /// Reads into the vector.
    Read,
    /// Writes from the vector.
    Write,
    /// Makes all completed writes, zeroes and discards durable.
    Flush,
    /// Says that a range is not needed any more; what it reads as afterwards is not defined.
    Discard,
    /// Makes a range read as zeros.
    WriteZeroes,
    /// Asks where a range's data is.
    BlockStatus,
    /// Sets the length.
    Truncate,
}

impl RequestKind {
    /// All kinds, by their number.
    pub const ALL: [RequestKind; 7] = [
        RequestKind::Read,
        RequestKind::Write,
        RequestKind::Flush,
        RequestKind::Discard,
        RequestKind::WriteZeroes,
        RequestKind::BlockStatus,
        RequestKind::Truncate,
    ];

    /// Its name in messages.
    pub fn name(self) -> &'static str {
        match self {
            RequestKind::Read => "read",
            RequestKind::Write => "write",
            RequestKind::Flush => "flush",
            RequestKind::Discard => "discard",
            RequestKind::WriteZeroes => "write-zeroes",
            RequestKind::BlockStatus => "block-status",
            RequestKind::Truncate => "truncate",
        }
    }

    /// Whether it changes data and so needs the write permission.
    pub fn writes(self) -> bool {
        matches!(self, RequestKind::Write | RequestKind::Discard | RequestKind::WriteZeroes)
    }
}

/// What is done about the space that a truncation adds. It reads as zeros in any case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Preallocation {
    /// Nothing: storage is taken as data is written.
    #[default]
    Off,
    /// A format maps it; there is no storage yet. For formats only.
    Metadata,
    /// Storage is reserved.
    Falloc,
    /// Zeros are written.
    Full,
}

impl Preallocation {
    /// Its name in options and messages.
    pub fn name(self) -> &'static str {
        match self {
            Preallocation::Off => "off",
            Preallocation::Metadata => "metadata",
            Preallocation::Falloc => "falloc",
            Preallocation::Full => "full",
        }
    }

    /// The mode with that name.
    pub fn from_name(name: &str) -> Option<Preallocation> {
        use Preallocation::{Falloc, Full, Metadata, Off};
        [Off, Metadata, Falloc, Full].into_iter().find(|mode| mode.name() == name)
    }
}

/// Flags of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct RequestFlags {
    /// Force unit access: this write is durable when it completes.
    pub fua: bool,
    /// Write-zeroes may give the range back to the storage.
    pub may_unmap: bool,
    /// Write-zeroes fails with [`NotSupported`](crate::ErrorKind::NotSupported) rather than write
    /// zeros out.
    pub no_fallback: bool,
    /// The data of this write is stored compressed: whole clusters that nothing was written to.
    pub compressed: bool,
    /// What a truncation does about the space that it adds.
    pub preallocation: Preallocation,
}

/// One request. Offsets and lengths are in bytes.
#[derive(Clone, Debug)]
pub struct Request {
    /// What it does.
    pub kind: RequestKind,
    /// Its flags.
    pub flags: RequestFlags,
    /// Where it starts.
    pub offset: u64,
    /// How long it is; for a truncation, the new length is `offset` and this is 0.
    pub length: u64,
    /// The memory of a read or write; empty otherwise.
    pub vector: IoVector,
}

impl Request {
    fn new(kind: RequestKind, offset: u64, length: u64, vector: IoVector) -> Request {
        Request { kind, flags: RequestFlags::default(), offset, length, vector }
    }

    /// Reads the vector's length at `offset`.
    pub fn read(offset: u64, vector: impl Into<IoVector>) -> Request {
        let vector = vector.into();
        Request::new(RequestKind::Read, offset, vector.len() as u64, vector)
    }

    /// Writes the vector at `offset`.
    pub fn write(offset: u64, vector: impl Into<IoVector>) -> Request {
        let vector = vector.into();
        Request::new(RequestKind::Write, offset, vector.len() as u64, vector)
    }

    /// Makes what has completed durable.
    pub fn flush() -> Request {
        Request::new(RequestKind::Flush, 0, 0, IoVector::empty())
    }

    /// Discards a range.
    pub fn discard(offset: u64, length: u64) -> Request {
        Request::new(RequestKind::Discard, offset, length, IoVector::empty())
    }

    /// Makes a range read as zeros.
    pub fn write_zeroes(offset: u64, length: u64) -> Request {
        Request::new(RequestKind::WriteZeroes, offset, length, IoVector::empty())
    }

    /// Asks for the status of the extent that starts at `offset`, looking at most `length` far and
    /// no further than the end; there and beyond, the extent is empty.
    pub fn block_status(offset: u64, length: u64) -> Request {
        Request::new(RequestKind::BlockStatus, offset, length, IoVector::empty())
    }

    /// Sets the length of the node.
    pub fn truncate(length: u64) -> Request {
        Request::new(RequestKind::Truncate, length, 0, IoVector::empty())
    }

    /// Has a truncation take the space that it adds. A node that cannot fails it with
    /// [`NotSupported`](crate::ErrorKind::NotSupported).
    #[must_use]
    pub fn preallocated(mut self, mode: Preallocation) -> Request {
        self.flags.preallocation = mode;
        self
    }

    /// Sets force unit access (writes and write-zeroes).
    #[must_use]
    pub fn fua(mut self) -> Request {
        self.flags.fua = true;
        self
    }

    /// Lets write-zeroes deallocate.
    #[must_use]
    pub fn may_unmap(mut self) -> Request {
        self.flags.may_unmap = true;
        self
    }

    /// Keeps write-zeroes from writing zeros out.
    #[must_use]
    pub fn no_fallback(mut self) -> Request {
        self.flags.no_fallback = true;
        self
    }

    /// Has a write stored compressed. A node that cannot fails it with
    /// [`NotSupported`](crate::ErrorKind::NotSupported).
    #[must_use]
    pub fn compressed(mut self) -> Request {
        self.flags.compressed = true;
        self
    }
}

/// Where the data of an extent is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct BlockStatus {
    /// Length of the extent in bytes; 0 only at the end of the node.
    pub length: u64,
    /// There is data to be read.
    pub data: bool,
    /// It reads as zeros.
    pub zero: bool,
    /// It is allocated in the node asked, not in one that backs it.
    pub allocated: bool,
    /// It is allocated in a node that backs the one asked, or lies beyond the end of one. When
    /// neither this nor `allocated` is set, it reads as zeros because nothing holds it.
    pub backed: bool,
    /// It is stored compressed.
    pub compressed: bool,
    /// Where its place is, data or kept for data, where that is linear.
    pub offset: Option<u64>,
    /// The node in which `offset` counts; `None` when that is not known.
    pub file: Option<NodeId>,
    /// How many backing nodes down the data was found; 0 for the node asked.
    pub depth: u32,
    /// It is allocated in the backing node that is `depth` down.
    pub allocated_below: bool,
}

impl BlockStatus {
    /// Whether the node in which the search ended, `depth` down, has it: as data or as zeros.
    pub fn is_present(&self) -> bool {
        self.allocated || self.allocated_below
    }
}

/// What a request answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is done.
    Done,
    /// The answer to a block-status request. Boxed, since completions of all kinds are moved about.
    Status(Box<BlockStatus>),
}

impl From<BlockStatus> for Outcome {
    fn from(status: BlockStatus) -> Outcome {
        Outcome::Status(Box::new(status))
    }
}

/// A completed request, as the completion door hands it out.
#[derive(Debug)]
pub struct Completion {
    /// What the submitter gave with the request.
    pub cookie: u64,
    /// How it ended.
    pub result: Result<Outcome>,
    /// The request's memory, given back.
    pub vector: IoVector,
}
