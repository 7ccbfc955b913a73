//! Several futures of one task at once.

use blockplex_graph::Result;
use blockplex_graph::driver::LocalFuture;
use std::future::poll_fn;
use std::task::Poll;

/// Waits until all of `futures` have ended, whatever fails: nothing goes on behind the caller's
/// back. Gives the first error in their order.
pub(crate) async fn join_all(futures: Vec<LocalFuture<'_, Result<()>>>) -> Result<()> {
    let mut waiting: Vec<_> = futures.into_iter().map(Some).collect();
    let mut results: Vec<Result<()>> = waiting.iter().map(|_| Ok(())).collect();
    poll_fn(|context| {
        let mut pending = false;
        for (slot, result) in waiting.iter_mut().zip(&mut results) {
            let Some(future) = slot else { continue };
            match future.as_mut().poll(context) {
                Poll::Ready(outcome) => (*slot, *result) = (None, outcome),
                Poll::Pending => pending = true,
            }
        }
        if pending { Poll::Pending } else { Poll::Ready(()) }
    })
    .await;
    results.into_iter().collect()
}
