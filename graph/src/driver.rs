//! The driver contract: what a node must be able to do, in two tiers.
//!
//! **Tier 1, [`Driver::map`]**, is synchronous, takes no lock that anybody holds across I/O and
//! allocates nothing. It says where a range is; the request path follows the answers down to a
//! leaf and submits on the current loop's ring. **Tier 2**, the futures, does what cannot be
//! answered at once. They run on the loop that submitted the request, they may await, and they
//! run to completion: a driver never sees one dropped half-way except when a loop is torn down
//! (its memory is then kept until the kernel is done with it).
//!
//! D1. `map` for a write answers only with places that may be overwritten *now*; an answer that
//!     names a place carries a [`Pin`], and the driver may not free or reuse the place before the
//!     pin came back through [`Driver::unpin`] (*map → pin → I/O → commit*).
//! D2. An allocating write becomes visible by commit, after its data is written; a failure before
//!     leaves the image as it was.
//! D3. Children are reached only through the [`NodeIo`] of the call: it carries the admission of
//!     the request at its origin, so nested I/O never meets a gate.
//! D4. `map`, `unpin`, `length` and `limits` are called from any thread at any time; the futures
//!     are polled only by the loop that made them.
//!
//! There is no default for anything that affects data.

use crate::debug_event::DebugListener;
use crate::error::{Error, ErrorKind, Result};
use crate::limits::Limits;
use crate::node::NodeView;
use crate::path::NodeIo;
use crate::permission::Access;
use crate::request::{Outcome, Request, RequestFlags, RequestKind};
use blockplex_io::buffer::IoVector;
use std::any::Any;
use std::future::Future;
use std::os::fd::RawFd;
use std::pin::Pin as StdPin;

/// A boxed future of tier 2. Not `Send`: it stays on its loop.
pub type LocalFuture<'a, T> = StdPin<Box<dyn Future<Output = T> + 'a>>;

/// What a child is to its parent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// The file that holds a format's data and metadata.
    File,
    /// The file that holds a format's data, and nothing else of it.
    Data,
    /// What is read where an overlay has nothing of its own.
    Backing,
    /// What a filter filters.
    Filtered,
}

impl Role {
    /// The name of the child in options and messages, unless the parent gives another.
    pub fn name(self) -> &'static str {
        match self {
            Role::File | Role::Filtered => "file",
            Role::Data => "data-file",
            Role::Backing => "backing",
        }
    }
}

/// A promise by a driver that the place it named stays what it was. Given back exactly once, on
/// the same loop. What it holds is the driver's business.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a pin that is never given back keeps its place from being reused for ever"]
pub struct Pin(pub u64);

/// A request, or the rest of one, as a driver's `map` sees it.
//
// In this order: what lies side by side in a `Request` and here is copied by one load, which waits
// for the two stores that made the request.
#[derive(Debug)]
#[repr(C)]
pub struct MapRequest<'a> {
    /// Start in bytes, within this node.
    pub offset: u64,
    /// The request's memory (all of it).
    pub vector: &'a IoVector,
    /// Length in bytes of what is still to be mapped; at least 1 for reads and writes.
    pub length: u64,
    /// What it does.
    pub kind: RequestKind,
    /// Its flags.
    pub flags: RequestFlags,
    /// Where in `vector` this range starts.
    pub position: usize,
    /// The index of the current loop ([`LoopHandle::index`](blockplex_io::event_loop::LoopHandle)),
    /// for counters that have one writer per loop.
    pub loop_index: usize,
}

/// Where a range is. Each answer is about the first `length` bytes of the request
/// (1 ≤ `length` ≤ the request's, unless the request has length 0).
#[derive(Debug)]
pub enum Map {
    /// In a child: go on there.
    Child {
        /// Index of the edge, in the order in which the node's children were attached.
        edge: usize,
        /// Start in the child.
        offset: u64,
        /// How far the answer holds.
        length: u64,
        /// Keeps the place from being reused until the request ends.
        pin: Option<Pin>,
    },
    /// In an open file: read or write there, on the current loop's ring. The descriptor stays
    /// open while the node exists.
    File {
        /// The descriptor.
        fd: RawFd,
        /// Start in the file.
        offset: u64,
        /// How far the answer holds.
        length: u64,
    },
    /// Nowhere: reads as zeros. For other kinds: nothing to do.
    Zero {
        /// How far the answer holds.
        length: u64,
    },
    /// The driver has served the range on the spot.
    Done {
        /// How much of it.
        length: u64,
    },
    /// Ask tier 2.
    Async {
        /// For how much of the range (one future is made for it).
        length: u64,
    },
    /// It failed.
    Fail(Error),
}

/// A change of permissions on a node as a whole, in three steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AccessChange {
    /// Take what is needed in addition; may fail, and then nothing has changed.
    Prepare(Access),
    /// The change happened: let go of what is not needed any more. May not fail.
    Commit(Access),
    /// The change did not happen: go back to what was last committed. May not fail.
    Abort(Access),
}

/// A prepared change of a driver's options; dropped without commit, it never happened.
pub trait PreparedReopen {
    /// Makes the change, inside the drained section. May not fail.
    fn commit(self: Box<Self>);
}

/// A driver instance: what makes a node what it is. See the page of this module for the rules.
pub trait Driver: Any + Send + Sync {
    /// The driver's name in options: `qcow2`, `file`, ….
    fn driver_name(&self) -> &'static str;

    /// Its length in bytes now. `node` gives access to the children's lengths.
    fn length(&self, node: &NodeView) -> u64;

    /// How much storage it takes, in bytes, if it can tell; less than its length where it is sparse.
    fn allocated_bytes(&self, _node: &NodeView) -> Option<u64> {
        None
    }

    /// Its own limits; the graph merges the children's into them ([`Limits::merge_child`]).
    fn limits(&self) -> Limits;

    /// What it needs of and shares on the child in `role`, given what all its parents together
    /// need and share.
    fn child_access(&self, role: Role, parents: Access) -> Access;

    /// Told about every change of what the parents need (file locks live here). Called by the
    /// control plane, one change at a time.
    fn access_changed(&self, change: AccessChange) -> Result<()>;

    /// Whether writes can succeed at all.
    fn is_read_only(&self) -> bool;

    /// Tier 1: where is this range?
    fn map(&self, node: &NodeView, request: &MapRequest<'_>) -> Map;

    /// Takes back a pin of [`Driver::map`], on the loop with that index, which is the same.
    fn unpin(&self, loop_index: usize, pin: Pin);

    /// Tier 2: serves a request, or the part of one that `map` answered with [`Map::Async`].
    ///
    /// * Reads fill the vector, writes take it; a write with `flags.fua` is durable on return.
    ///   `flags.compressed` is passed on, obeyed, or refused with `NotSupported`; nodes without
    ///   children are not asked.
    /// * Write-zeroes fails with `NotSupported` when the driver cannot do it better than by writing
    ///   zeros: the request path then does that, unless `flags.no_fallback`. `fua` is not set;
    ///   `may_unmap` only when the node passes discards on.
    /// * A discard is a hint. A flush makes durable what had completed before it, children
    ///   included.
    /// * Block-status (within the node, `length` ≥ 1) answers [`Outcome::Status`].
    /// * A truncation sets the length to `request.offset`; new space reads as zeros, and is taken
    ///   as `flags.preallocation` says, or the request fails with `NotSupported`.
    fn serve<'a>(&'a self, io: &'a NodeIo, request: Request) -> LocalFuture<'a, Result<Outcome>>;

    /// Prepares new options; `options` is what the driver's own constructor takes (the umbrella
    /// and the driver agree on the type). Children are still reachable. By default a driver has
    /// none that can be changed, and says so.
    fn reopen<'a>(
        &'a self,
        io: &'a NodeIo,
        options: Box<dyn Any>,
    ) -> LocalFuture<'a, Result<Box<dyn PreparedReopen>>> {
        let _ = (io, options);
        let text = format!("a {} node has no options that can be changed", self.driver_name());
        Box::pin(async move { Err(Error::new(ErrorKind::NotSupported, text)) })
    }

    /// The edge to which it passes every read and write on, as it is and without a pin. Read once
    /// for each version of the graph: such requests then go by the driver without asking it.
    fn passes_transfers(&self, _node: &NodeView) -> Option<usize> {
        None
    }

    /// The driver as a listener to its parents' debug events. Read once for each version of the
    /// graph; nearly no driver listens.
    fn debug_listener(&self) -> Option<&dyn DebugListener> {
        None
    }

    /// The last I/O before the node goes: write back, mark clean. Called once, after the drain
    /// that took away the last parent; `Drop` only frees memory.
    fn close<'a>(&'a self, io: &'a NodeIo) -> LocalFuture<'a, Result<()>>;
}
