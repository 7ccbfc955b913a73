//! The walk: follows the drivers' `map` answers from a node down to a place.

use super::hold::Holds;
use super::view::{NodeIndex, QueueView};
use crate::driver::{Map, MapRequest};
use crate::error::{Error, ErrorKind};
use crate::node::NodeView;
use crate::request::{Request, RequestFlags, RequestKind};
use blockplex_io::lock::RangeMode;
use std::os::fd::RawFd;

/// Where the walk ended, for the first `length` bytes of what was asked.
pub(crate) enum Step {
    /// At an open file.
    File { node: NodeIndex, fd: RawFd, offset: u64, length: u64 },
    /// Nowhere: zeros, or nothing to do.
    Zero { length: u64 },
    /// It has been served.
    Done { length: u64 },
    /// At a node where it takes a future.
    Serve { node: NodeIndex, reason: Reason, flags: RequestFlags, offset: u64, length: u64 },
    /// At an error.
    Fail { node: NodeIndex, error: Error },
}

/// Why a request is served at a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reason {
    /// It has to be aligned, ordered or looked at before the driver is asked.
    Prepare,
    /// Its memory does not suit the node.
    Bounce,
    /// The driver's answer takes a future.
    Driver,
}

/// What is left of a request from byte `position` on, as drivers see it.
pub(crate) fn rest_of(request: &Request, position: u64, loop_index: usize) -> MapRequest<'_> {
    MapRequest {
        kind: request.kind,
        flags: request.flags,
        offset: request.offset + position,
        length: request.length - position,
        vector: &request.vector,
        position: position as usize,
        loop_index,
    }
}

/// Walks from `start`. `request` is narrowed as the walk goes on. With `prepared`, the start node
/// has been prepared by the caller: its alignment, ordering and zero detection are taken care of.
pub(crate) fn walk(
    view: &QueueView,
    start: NodeIndex,
    prepared: bool,
    request: &mut MapRequest<'_>,
    holds: &mut Holds,
) -> Step {
    let transfers = matches!(request.kind, RequestKind::Read | RequestKind::Write);
    // What is prepared is not passed by.
    let mut node = if transfers && !prepared { view.node(start).transfers_at } else { start };
    let mut prepared = prepared;
    loop {
        let local = view.node(node);
        let plain = prepared || (transfers && local.is_plain && !request.flags.compressed);
        if !plain && let Some(step) = before_map(view, node, request, holds) {
            return step;
        }
        prepared = false;
        match local.view.driver().map(&local.view, request) {
            Map::Child { edge, offset, length, pin } => {
                if let Some(pin) = pin {
                    holds.add_pin(node, pin);
                }
                let edge = local.edge(edge);
                node = if transfers { edge.transfers_at } else { edge.child };
                request.offset = offset;
                request.length = length;
                if edge.is_backing && request.kind == RequestKind::Read {
                    // A backing node may be shorter than its overlay: zeros lie beyond its end.
                    let rest = view.node(node).view.length().saturating_sub(offset);
                    if rest == 0 {
                        return Step::Zero { length };
                    }
                    request.length = length.min(rest);
                }
            }
            Map::File { fd, offset, length } => {
                if needs_bounce(local.memory_mask, local.max_segments, request) {
                    return serve(node, Reason::Bounce, request, length);
                }
                return Step::File { node, fd, offset, length };
            }
            Map::Zero { length } => return Step::Zero { length },
            Map::Done { length } => return Step::Done { length },
            Map::Async { length } => return serve(node, Reason::Driver, request, length),
            Map::Fail(error) => return Step::Fail { node, error },
        }
    }
}

/// What the path itself does at a node before the driver is asked. None: go on and ask.
#[inline(never)]
fn before_map(
    view: &QueueView,
    node: NodeIndex,
    request: &mut MapRequest<'_>,
    holds: &mut Holds,
) -> Option<Step> {
    let local = view.node(node);
    match request.kind {
        RequestKind::Discard if local.ignores_discard => {
            return Some(Step::Done { length: request.length });
        }
        RequestKind::WriteZeroes => {
            request.flags.may_unmap &= !local.ignores_discard;
            return None;
        }
        RequestKind::Flush if local.ignores_flush => return Some(Step::Done { length: 0 }),
        RequestKind::Read | RequestKind::Write => {}
        _ => return None,
    }
    if request.flags.compressed && local.view.edges().is_empty() {
        return Some(Step::Fail { node, error: cannot_compress(&local.view) });
    }
    let writes = request.kind == RequestKind::Write;
    let misaligned = (request.offset | request.length) & local.request_mask != 0;
    if misaligned || (writes && local.detects_zeroes) {
        return Some(serve(node, Reason::Prepare, request, request.length));
    }
    if writes && local.request_mask != 0 {
        let range = request.offset..request.offset + request.length;
        match local.view.node().writes.try_acquire(range, RangeMode::Shared) {
            Some(token) => holds.add_range(node, token),
            None => return Some(serve(node, Reason::Prepare, request, request.length)),
        }
    }
    None
}

fn serve(node: NodeIndex, reason: Reason, request: &MapRequest<'_>, length: u64) -> Step {
    Step::Serve { node, reason, flags: request.flags, offset: request.offset, length }
}

/// What has no node below it keeps bytes as they are.
fn cannot_compress(view: &NodeView) -> Error {
    let text = format!("a {} node cannot store data compressed", view.driver().driver_name());
    Error::new(ErrorKind::NotSupported, text)
}

/// Whether the memory does not suit the node.
pub(crate) fn needs_bounce(
    memory_mask: usize,
    max_segments: usize,
    request: &MapRequest<'_>,
) -> bool {
    let pieces = request.vector.iovecs();
    (memory_mask != 0
        && (request.position & memory_mask != 0 || !request.vector.is_aligned(memory_mask + 1)))
        || pieces.len() > max_segments
}
