//! What is checked before a request runs, and what is said of it afterwards.

use crate::error::{Error, ErrorKind, Result};
use crate::limits::Limits;
use crate::path::view::{QueueView, ROOT};
use crate::permission::Permissions;
use crate::request::{BlockStatus, Outcome, Preallocation, Request, RequestFlags, RequestKind};
use blockplex_drain::RequestRecord;
use blockplex_io::event_loop::Local;

/// Whether it is a read or write of some bytes, about which [`check`] finds nothing: most are.
#[inline]
pub(super) fn is_plain_transfer(view: &QueueView, request: &Request) -> bool {
    let permitted = match request.kind {
        RequestKind::Read => true,
        RequestKind::Write => view.granted.contains(Permissions::WRITE),
        _ => false,
    };
    let RequestFlags { compressed, preallocation, .. } = request.flags;
    if !permitted || view.is_empty() || compressed || preallocation != Preallocation::Off {
        return false;
    }
    let length = request.length;
    let fits = request.vector.len() as u64 == length && length <= Limits::MAX_REQUEST;
    // As long as the root, and one question less.
    let node = &view.node(view.node(ROOT).transfers_at).view;
    let end = request.offset.checked_add(length);
    fits && length > 0 && end.is_some_and(|end| end <= node.length())
}

/// Whether the request may run at all.
pub(super) fn check(view: &QueueView, request: &Request) -> Result<()> {
    if view.is_empty() {
        return Err(Error::new(ErrorKind::NoMedium, "the backend has no root node"));
    }
    let root = &view.node(ROOT).view;
    if request.kind.writes() && !view.granted.contains(Permissions::WRITE) {
        return Err(Error::new(ErrorKind::ReadOnly, "the backend is read-only"));
    }
    if request.flags.compressed && request.kind != RequestKind::Write {
        let text = format!("a {} cannot be compressed", request.kind.name());
        return Err(Error::new(ErrorKind::InvalidArgument, text));
    }
    let preallocation = request.flags.preallocation;
    if preallocation != Preallocation::Off && request.kind != RequestKind::Truncate {
        let (mode, kind) = (preallocation.name(), request.kind.name());
        let text = format!("a {kind} has no preallocation ({mode})");
        return Err(Error::new(ErrorKind::InvalidArgument, text));
    }
    match request.kind {
        RequestKind::Flush => return Ok(()),
        RequestKind::Truncate => {
            if !view.granted.contains(Permissions::RESIZE) {
                let text = "the backend has no permission to resize";
                return Err(Error::new(ErrorKind::ReadOnly, text));
            }
            if request.offset > Limits::MAX_LENGTH {
                let text = format!("a length of {} bytes is too large", request.offset);
                return Err(Error::new(ErrorKind::InvalidArgument, text));
            }
            return Ok(());
        }
        RequestKind::Read | RequestKind::Write
            if request.vector.len() as u64 != request.length
                || request.length > Limits::MAX_REQUEST =>
        {
            let (memory, length) = (request.vector.len(), request.length);
            let max = Limits::MAX_REQUEST;
            let text =
                format!("{memory} bytes of memory for a transfer of {length} (at most {max})");
            return Err(Error::new(ErrorKind::InvalidArgument, text));
        }
        // Looks as far as there is something: see `outcome_of_nothing`.
        RequestKind::BlockStatus => return Ok(()),
        _ => {}
    }
    let length = root.length();
    match request.offset.checked_add(request.length) {
        Some(end) if end <= length => Ok(()),
        _ => {
            let text = format!("the range ends beyond the node's {length} bytes");
            Err(Error::new(ErrorKind::OutOfRange, text).at_node(root.name()))
        }
    }
}

/// Ends a checked request over no bytes, which concerns nobody. A block-status is cut at the node's
/// end first: there and beyond, it finds an empty extent.
pub(super) fn outcome_of_nothing(view: &QueueView, request: &mut Request) -> Option<Outcome> {
    match request.kind {
        RequestKind::Flush | RequestKind::Truncate => return None,
        RequestKind::BlockStatus => {
            let rest = view.node(ROOT).view.length().saturating_sub(request.offset);
            request.length = request.length.min(rest);
        }
        _ => {}
    }
    match request.kind {
        _ if request.length > 0 => None,
        RequestKind::BlockStatus => Some(BlockStatus::default().into()),
        _ => Some(Outcome::Done),
    }
}

/// Says what was being done.
pub(super) fn blame(error: Error, request: &Request) -> Error {
    error.during(request.kind.name()).at_range(request.offset, request.length)
}

pub(super) fn record_of(request: &Request, local: &Local, view: &QueueView) -> RequestRecord {
    RequestRecord {
        kind: record_kind(request.kind),
        offset: request.offset,
        length: request.length,
        started_ns: local.now_ns(),
        node: view.node(ROOT).view.id().number(),
    }
}

fn record_kind(kind: RequestKind) -> u8 {
    use blockplex_drain::kind;
    match kind {
        RequestKind::Read => kind::READ,
        RequestKind::Write => kind::WRITE,
        RequestKind::Flush => kind::FLUSH,
        RequestKind::Discard => kind::DISCARD,
        RequestKind::WriteZeroes => kind::WRITE_ZEROES,
        RequestKind::BlockStatus => kind::BLOCK_STATUS,
        RequestKind::Truncate => kind::TRUNCATE,
    }
}
