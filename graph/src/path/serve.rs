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
use super::context::Context;
use super::erase;
use super::hold::SharedHolds;
use super::leaf::{Transfer, TransferFuture};
use super::view::NodeIndex;
use super::walk::{Reason, Step, rest_of, walk};
use crate::driver::LocalFuture;
use crate::error::Result;
use crate::request::{Outcome, Request, RequestKind};
use blockplex_io::buffer::IoVector;
use smallvec::SmallVec;
use std::rc::Rc;

/// Serves a request at `node` for the given reason. `holds` is what the walk to the node holds;
/// it is kept until the end.
pub(crate) async fn at_node(
    context: &Context,
    node: NodeIndex,
    reason: Reason,
    request: Request,
    holds: Rc<SharedHolds>,
) -> Result<Outcome> {
    let result = match reason {
        Reason::Prepare => align::prepare(context, node, request).await,
        Reason::Bounce => align::bounce(context, node, request, &holds).await,
        Reason::Driver => ask_driver(context, node, request).await,
    };
    drop(holds);
    result
}

/// Performs a request from `node` down. Boxed, since nodes nest.
pub(crate) fn perform<'a>(
    context: &'a Context,
    node: NodeIndex,
    request: Request,
) -> LocalFuture<'a, Result<Outcome>> {
    Box::pin(run(context, node, request, None))
}

/// As [`perform`], with `node` already prepared and `holds` to be kept as long as any transfer.
pub(crate) fn perform_prepared<'a>(
    context: &'a Context,
    node: NodeIndex,
    request: Request,
    holds: Rc<SharedHolds>,
) -> LocalFuture<'a, Result<Outcome>> {
    Box::pin(run(context, node, request, Some(holds)))
}

/// Transfers in flight, and the nodes whose files they go to.
type Transfers = SmallVec<[(NodeIndex, TransferFuture); 4]>;

/// With `held`, `node` is prepared, and `held` is kept by every transfer.
async fn run(
    context: &Context,
    node: NodeIndex,
    request: Request,
    held: Option<Rc<SharedHolds>>,
) -> Result<Outcome> {
    let mut transfers = Transfers::new();
    let mut outcome = Ok(Outcome::Done);
    let mut position = 0u64;
    loop {
        // Each piece has holds of its own, given back as it ends: a request that held one range
        // while it waited for the next could wait for itself.
        let holds = context.holds();
        let step = holds.with(|holds| {
            let mut rest = rest_of(&request, position, context.local.index());
            walk(&context.view, node, held.is_some(), &mut rest, holds)
        });
        let length = match step {
            Step::File { node, fd, offset, length } => {
                let place = Place { node, fd, offset, position, length };
                start(context, &request, place, (holds, held.clone()), &mut transfers);
                length
            }
            Step::Zero { length } => {
                if request.kind == RequestKind::Read {
                    request.vector.fill(position as usize, length as usize, 0);
                }
                length
            }
            Step::Done { length } => length,
            Step::Serve { node, reason, flags, offset, length } => {
                let part = Request { flags, ..part_of(&request, offset, position, length) };
                match at_node(context, node, reason, part, holds).await {
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
    settle(context, transfers, outcome).await
}

/// Waits for all transfers, whatever has failed: nothing may run on when the caller hears of the
/// end.
async fn settle(
    context: &Context,
    transfers: Transfers,
    mut outcome: Result<Outcome>,
) -> Result<Outcome> {
    for (node, transfer) in transfers {
        if let Err(error) = transfer.await
            && outcome.is_ok()
        {
            outcome = Err(error.at_node(context.view.node(node).view.name()));
        }
    }
    outcome
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

/// Where a piece of a request is.
struct Place {
    node: NodeIndex,
    fd: i32,
    offset: u64,
    position: u64,
    length: u64,
}

/// Starts the transfers of one piece, none longer than the node takes.
fn start(
    context: &Context,
    request: &Request,
    place: Place,
    holds: (Rc<SharedHolds>, Option<Rc<SharedHolds>>),
    transfers: &mut Transfers,
) {
    let writes = request.kind == RequestKind::Write;
    let durable = writes && request.flags.fua;
    let max = context.view.node(place.node).max_transfer;
    let mut done = 0;
    while done < place.length {
        let count = (place.length - done).min(max);
        let (offset, position) = (place.offset + done, (place.position + done) as usize);
        let transfer = Transfer::new(writes, durable, place.fd, offset, position, count as usize);
        let vector = request.vector.clone();
        let started = TransferFuture::start(context, transfer, vector, holds.clone());
        transfers.push((place.node, started));
        done += count;
    }
}

/// Tier 2.
async fn ask_driver(context: &Context, node: NodeIndex, request: Request) -> Result<Outcome> {
    let io = NodeIo::new(context.clone(), node);
    let result = if request.kind == RequestKind::WriteZeroes {
        erase::write_zeroes(context, &io, node, request).await
    } else {
        io.node().driver().serve(&io, request).await
    };
    result.map_err(|error| error.at_node(io.node().name()))
}
