//! Turns by number: whoever has the turn of one number keeps nobody waiting who wants another's.
//!
//! What is loaded or made once for all (a slice, an L2 table, a refcount block) has the turn of its
//! number, so that a stuck load stalls those who need the same thing, and nobody else.

use blockplex_io::lock::{RangeGuard, RangeLock, RangeMode};

/// See the page.
pub(super) struct Turns(RangeLock);

impl Turns {
    pub(super) fn new() -> Turns {
        Turns(RangeLock::new())
    }

    /// Waits for the turn of `number`, in order of arrival.
    pub(super) async fn of(&self, number: u64) -> RangeGuard<'_> {
        // Numbers are far below the largest: of slices, tables and blocks of a file.
        self.0.lock(number..number.saturating_add(1), RangeMode::Exclusive).await
    }
}
