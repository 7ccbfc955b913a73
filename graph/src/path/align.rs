//! Requests that do not suit a node: widened to its alignment (read-modify-write), passed through
//! memory that suits it, turned into write-zeroes, and ordered against overlapping writes.
//!
//! A1. Every write at a node whose request alignment is above 1 holds its range of the node's
//!     lock: shared when it is aligned, alone when it reads what it does not write. So no block is
//!     written from an old copy (W12, scenario "serialising").
//! A2. Memory is bounded: one block for each ragged end, [`CHUNK`] for a bounce.

use super::context::{Context, announce};
use super::hold::SharedHolds;
use super::serve::{part_of, perform, perform_prepared};
use super::view::NodeIndex;
use crate::debug_event::DebugEvent;
use crate::error::Result;
use crate::node::DetectZeroes;
use crate::request::{Outcome, Request, RequestFlags, RequestKind};
use blockplex_io::buffer::BufferPool;
use blockplex_io::lock::RangeMode;
use std::rc::Rc;
use std::sync::LazyLock;

/// The most memory that one bounced request takes at once.
const CHUNK: u64 = 1 << 20;

/// Memory for ragged ends and bounces.
static POOL: LazyLock<BufferPool> = LazyLock::new(|| BufferPool::new(8 << 20));

/// Does to a read or write at `node` what has to come before its driver is asked, then goes on.
pub(super) async fn prepare(
    context: &Context,
    node: NodeIndex,
    request: Request,
) -> Result<Outcome> {
    let local = context.view.node(node);
    let writes = request.kind == RequestKind::Write;
    if writes && local.detects_zeroes && request.vector.is_zero(0, request.vector.len()) {
        let may_unmap = local.view.options().detect_zeroes == DetectZeroes::Unmap;
        let flags = RequestFlags { may_unmap, compressed: false, ..request.flags };
        let zeroes = Request { flags, ..Request::write_zeroes(request.offset, request.length) };
        return perform(context, node, zeroes).await;
    }
    let mask = local.request_mask;
    let aligned = (request.offset | request.length) & mask == 0;
    let holds = context.holds();
    if writes && mask != 0 {
        let range =
            align_down(request.offset, mask)..align_up(request.offset + request.length, mask);
        let mode = if aligned { RangeMode::Shared } else { RangeMode::Exclusive };
        let guard = local.view.node().writes.lock(range, mode).await;
        holds.with(|holds| holds.add_range(node, guard.into_token()));
    }
    // What is compressed has another length than the data: alignment does not concern it.
    if aligned || request.flags.compressed {
        return perform_prepared(context, node, request, holds).await;
    }
    widen(context, node, request, holds).await
}

/// A misaligned transfer: ragged ends by way of a block each, the middle directly.
async fn widen(
    context: &Context,
    node: NodeIndex,
    request: Request,
    holds: Rc<SharedHolds>,
) -> Result<Outcome> {
    let mask = context.view.node(node).request_mask;
    let end = request.offset + request.length;
    let mut at = request.offset;
    while at < end {
        let block = align_down(at, mask);
        let middle_end = align_down(end, mask);
        let position = at - request.offset;
        if at == block && middle_end > at {
            let part = part_of(&request, at, position, middle_end - at);
            perform_prepared(context, node, part, holds.clone()).await?;
            at = middle_end;
        } else {
            let stop = end.min(block + mask + 1);
            let part = part_of(&request, at, position, stop - at);
            ragged_end(context, node, block, part, &holds).await?;
            at = stop;
        }
    }
    Ok(Outcome::Done)
}

/// The part of a transfer that lies within one block.
async fn ragged_end(
    context: &Context,
    node: NodeIndex,
    block: u64,
    part: Request,
    holds: &Rc<SharedHolds>,
) -> Result<()> {
    let size = context.view.node(node).request_mask as usize + 1;
    let memory = POOL.take(size).into_vector();
    let within = (part.offset - block) as usize;
    let length = part.length as usize;
    let (before, after) = steps_of(within);
    if part.kind == RequestKind::Write {
        announce(context, node, before).await;
    }
    let read = Request::read(block, memory.clone());
    perform_prepared(context, node, read, holds.clone()).await?;
    if part.kind == RequestKind::Read {
        part.vector.copy_from_vector(0, &memory, within, length);
        return Ok(());
    }
    announce(context, node, after).await;
    memory.copy_from_vector(within, &part.vector, 0, length);
    let write = Request { flags: part.flags, ..Request::write(block, memory) };
    perform_prepared(context, node, write, holds.clone()).await.map(drop)
}

/// What is announced before and after a block is read for a write into it: a write that begins
/// inside of the block is the head of a request, any other its tail.
fn steps_of(within: usize) -> (DebugEvent, DebugEvent) {
    if within > 0 {
        (DebugEvent::PwritevRmwHead, DebugEvent::PwritevRmwAfterHead)
    } else {
        (DebugEvent::PwritevRmwTail, DebugEvent::PwritevRmwAfterTail)
    }
}

/// A transfer whose memory does not suit the node; its offset and length do.
pub(super) async fn bounce(
    context: &Context,
    node: NodeIndex,
    request: Request,
    holds: &Rc<SharedHolds>,
) -> Result<Outcome> {
    let mut position = 0;
    while position < request.length {
        let length = (request.length - position).min(CHUNK);
        let part = part_of(&request, request.offset + position, position, length);
        let memory = POOL.take(length as usize).into_vector();
        if request.kind == RequestKind::Write {
            memory.copy_from_vector(0, &part.vector, 0, length as usize);
        }
        let bounced = Request { vector: memory.clone(), ..part.clone() };
        perform_prepared(context, node, bounced, holds.clone()).await?;
        if request.kind == RequestKind::Read {
            part.vector.copy_from_vector(0, &memory, 0, length as usize);
        }
        position += length;
    }
    Ok(Outcome::Done)
}

fn align_down(offset: u64, mask: u64) -> u64 {
    offset & !mask
}

fn align_up(offset: u64, mask: u64) -> u64 {
    (offset + mask) & !mask
}
