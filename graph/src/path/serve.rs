//! Serving what tier 1 does not answer: as a task of its own at the top, as part of the parent's
//! future below.
//!
//! ```text
//!   perform ──► walk ──► File: transfer          (all transfers of a request run at once)
//!                  ├───► Serve Prepare: align, order or turn into write-zeroes, then perform on
//!                  ├───► Serve Bounce: through memory that suits the node
//!                  └───► Serve Driver: the driver's future (tier 2)
//! ```

use super::align;
use super::children::NodeIo;
use super::erase;
use super::hold::SharedHolds;
use super::leaf::{Transfer, TransferFuture};
use super::queue::Ticket;
use super::view::{NodeIndex, QueueView};
use super::walk::{Reason, Step, walk};
use crate::driver::{LocalFuture, MapRequest};
use crate::error::{Error, Result};
use crate::request::{Outcome, Request, RequestKind};
use blockplex_io::buffer::IoVector;
use blockplex_io::event_loop::Local;
use smallvec::SmallVec;
use std::rc::Rc;

/// What everything that runs for one request shares. Cloning is three non-atomic counts.
#[derive(Clone)]
pub(crate) struct Context {
    pub(crate) view: Rc<QueueView>,
    pub(crate) local: Local,
    /// The request's admission; none for the control plane.
    pub(crate) ticket: Option<Rc<Ticket>>,
}

impl Context {
    pub(crate) fn holds(&self) -> Rc<SharedHolds> {
        SharedHolds::new(self.view.clone(), self.local.index())
    }
}

/// Serves a request at `node` for the given reason.
pub(crate) async fn at_node(
    context: &Context,
    node: NodeIndex,
    reason: Reason,
    request: Request,
) -> Result<Outcome> {
    match reason {
        Reason::Prepare => align::prepare(context, node, request).await,
        Reason::Bounce => align::bounce(context, node, request).await,
        Reason::Driver => ask_driver(context, node, request).await,
    }
}

/// Performs a request from `node` down. Boxed, since nodes nest.
pub(crate) fn perform<'a>(
    context: &'a Context,
    node: NodeIndex,
    request: Request,
) -> LocalFuture<'a, Result<Outcome>> {
    Box::pin(run(context, node, false, request, context.holds()))
}

/// As [`perform`], with `node` already prepared and `holds` to be kept as long as any transfer.
pub(crate) fn perform_prepared<'a>(
    context: &'a Context,
    node: NodeIndex,
    request: Request,
    holds: Rc<SharedHolds>,
) -> LocalFuture<'a, Result<Outcome>> {
    Box::pin(run(context, node, true, request, holds))
}

async fn run(
    context: &Context,
    node: NodeIndex,
    prepared: bool,
    request: Request,
    holds: Rc<SharedHolds>,
) -> Result<Outcome> {
    let mut transfers: SmallVec<[TransferFuture; 4]> = SmallVec::new();
    let mut outcome = Ok(Outcome::Done);
    let mut position = 0u64;
    loop {
        let step = holds.with(|holds| {
            let mut rest = rest_of(context, &request, position);
            walk(&context.view, node, prepared, &mut rest, holds)
        });
        let length = match step {
            Step::File { fd, offset, length, .. } => {
                let (at, length) = (position as usize, length as usize);
                let transfer = start(context, &request, fd, offset, at, length, &holds);
                transfers.push(transfer);
                length as u64
            }
            Step::Zero { length } => {
                if request.kind == RequestKind::Read {
                    request.vector.fill(position as usize, length as usize, 0);
                }
                length
            }
            Step::Done { length } => length,
            Step::Serve { node, reason, offset, length } => {
                let part = part_of(&request, offset, position, length);
                match at_node(context, node, reason, part).await {
                    Ok(answer) => outcome = Ok(answer),
                    Err(error) => {
                        outcome = Err(error);
                        break;
                    }
                }
                length
            }
            Step::Fail { node, error } => {
                outcome = Err(error.at_node(context.view.node(node).view.name()));
                break;
            }
        };
        position += length;
        if position >= request.length {
            break;
        }
    }
    // All of them, whatever has failed: nothing may run on when the caller hears of the end.
    for transfer in transfers {
        if let Err(error) = transfer.await
            && outcome.is_ok()
        {
            outcome = Err(error.at_node(context.view.node(node).view.name()));
        }
    }
    outcome
}

fn rest_of<'a>(context: &Context, request: &'a Request, position: u64) -> MapRequest<'a> {
    MapRequest {
        kind: request.kind,
        flags: request.flags,
        offset: request.offset + position,
        length: request.length - position,
        vector: &request.vector,
        position: position as usize,
        loop_index: context.local.index(),
    }
}

/// The part of a request that is served at another node, where it starts at `offset`.
pub(crate) fn part_of(request: &Request, offset: u64, position: u64, length: u64) -> Request {
    let vector = match request.kind {
        RequestKind::Read | RequestKind::Write => {
            request.vector.slice(position as usize, length as usize)
        }
        _ => IoVector::empty(),
    };
    Request { kind: request.kind, flags: request.flags, offset, length, vector }
}

fn start(
    context: &Context,
    request: &Request,
    fd: i32,
    offset: u64,
    position: usize,
    length: usize,
    holds: &Rc<SharedHolds>,
) -> TransferFuture {
    let writes = request.kind == RequestKind::Write;
    let durable = writes && request.flags.fua;
    let transfer = Transfer::new(writes, durable, fd, offset, position, length);
    TransferFuture::start(context, transfer, request.vector.clone(), holds.clone())
}

/// Tier 2.
async fn ask_driver(context: &Context, node: NodeIndex, request: Request) -> Result<Outcome> {
    let io = NodeIo::new(context.clone(), node);
    let driver = io.node().driver();
    let Request { kind, flags, offset, length, vector } = request;
    let result = match kind {
        RequestKind::Read => driver.read(&io, offset, vector).await,
        RequestKind::Write => driver.write(&io, offset, vector, flags).await,
        RequestKind::Flush => driver.flush(&io).await,
        RequestKind::Discard => driver.discard(&io, offset, length).await,
        RequestKind::WriteZeroes => erase::write_zeroes(context, &io, node, offset, length, flags).await,
        RequestKind::Truncate => driver.truncate(&io, offset).await,
        RequestKind::BlockStatus => {
            let status = driver.block_status(&io, offset, length).await;
            return status.map(Outcome::Status).map_err(|error| blame(error, &io));
        }
    };
    result.map(|()| Outcome::Done).map_err(|error| blame(error, &io))
}

fn blame(error: Error, io: &NodeIo) -> Error {
    error.at_node(io.node().name())
}
