//! Write-zeroes where the driver has no better way than writing zeros.

use super::children::NodeIo;
use super::context::Context;
use super::serve::perform;
use super::view::NodeIndex;
use crate::error::{ErrorKind, Result};
use crate::request::{Outcome, Request, RequestFlags};
use blockplex_io::buffer::IoVector;

/// The most zeros written at once.
const CHUNK: u64 = 1 << 20;

/// Asks the driver, falls back to writing zeros, and makes the result durable if asked to.
pub(super) async fn write_zeroes(
    context: &Context,
    io: &NodeIo,
    node: NodeIndex,
    request: Request,
) -> Result<Outcome> {
    let driver = context.view.node(node).view.driver();
    let Request { flags, offset, length, .. } = request;
    let wanted = RequestFlags { fua: false, ..flags };
    match driver.serve(io, Request { flags: wanted, ..request }).await {
        Err(error) if error.kind() == ErrorKind::NotSupported && !flags.no_fallback => {
            write_out(context, node, offset, length).await?;
        }
        result => drop(result?),
    }
    if flags.fua { driver.serve(io, Request::flush()).await } else { Ok(Outcome::Done) }
}

async fn write_out(context: &Context, node: NodeIndex, offset: u64, length: u64) -> Result<()> {
    let zeros = IoVector::zeroed(length.min(CHUNK) as usize);
    let mut done = 0;
    while done < length {
        let count = (length - done).min(CHUNK);
        let part = zeros.slice(0, count as usize);
        perform(context, node, Request::write(offset + done, part)).await?;
        done += count;
    }
    Ok(())
}
