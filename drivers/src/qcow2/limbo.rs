//! Freed host clusters on their way to being free.
//!
//! L1. A cluster enters after the last entry that names it has changed in memory.
//! L2. It leaves when (a) every request that may have been told of it has ended (its grace period
//!     is over), and (b) the changed entry is durable. Only then is it discarded in the file, its
//!     refcount lowered, and used again. So neither a late request nor a crash shows one guest
//!     cluster's data in another (Q02, Q03, Q08, Q25).
//! L3. It is bounded: after [`MANY`] new entries, whoever adds one starts a write-back; above
//!     [`TOO_MANY`], which takes a request that never ends, further clusters are lost to the image
//!     until a repair finds them.

use blockplex_drain::{Grace, GraceEpoch};
use parking_lot::Mutex;
use std::collections::VecDeque;

/// New entries that make a write-back worth its while.
const MANY: usize = 1024;
/// Entries that are kept at most.
const TOO_MANY: usize = 1 << 16;

/// Host clusters in a row that nothing refers to any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Freed {
    /// The first byte.
    pub(super) offset: u64,
    /// How many.
    pub(super) clusters: u64,
    /// Whether the file is told that they are not needed.
    pub(super) discard: bool,
}

/// See the page.
#[derive(Default)]
pub(super) struct Limbo {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<Waiting>,
    /// Entries added since clusters were last taken out. What stays for longer waits for a
    /// request, and another write-back would not help it.
    added: usize,
}

struct Waiting {
    freed: Freed,
    tag: GraceEpoch,
    /// The write-back that makes the change durable is a later one than this.
    round: u64,
}

impl Limbo {
    /// Adds clusters of 2^`cluster_bits` bytes. `round` is the number of the last write-back that
    /// had begun after the change.
    pub(super) fn push(&self, freed: Freed, cluster_bits: u32, grace: &Grace, round: u64) {
        let tag = grace.current();
        let mut state = self.state.lock();
        let State { waiting, added } = &mut *state;
        if let Some(last) = waiting.back_mut()
            && (last.tag, last.round, last.freed.discard) == (tag, round, freed.discard)
            && last.freed.offset + (last.freed.clusters << cluster_bits) == freed.offset
        {
            last.freed.clusters += freed.clusters;
            return;
        }
        if waiting.len() >= TOO_MANY {
            tracing::warn!(offset = freed.offset, "too many freed clusters wait: one is lost");
            return;
        }
        waiting.push_back(Waiting { freed, tag, round });
        debug_assert!(waiting.len() <= TOO_MANY, "L3");
        *added += 1;
    }

    /// Whether a write-back should be started to get clusters out.
    pub(super) fn is_large(&self) -> bool {
        self.state.lock().added >= MANY
    }

    /// Whether nothing waits.
    pub(super) fn is_empty(&self) -> bool {
        self.state.lock().waiting.is_empty()
    }

    /// Takes what may be used again. `durable` is the number of the last write-back that
    /// succeeded.
    pub(super) fn take_ready(&self, grace: &Grace, durable: u64) -> Vec<Freed> {
        let mut state = self.state.lock();
        state.added = 0;
        let waiting = &mut state.waiting;
        let is_ready = |entry: &Waiting| entry.round < durable && grace.elapsed(entry.tag);
        let ready = waiting.iter().take_while(|entry| is_ready(entry)).count();
        waiting.drain(..ready).map(|entry| entry.freed).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// L3.
    #[test]
    fn what_waits_is_bounded() {
        let (limbo, grace) = (Limbo::default(), Grace::new());
        for index in 0..TOO_MANY as u64 + 100 {
            // None of them are neighbours.
            let freed = Freed { offset: index << 17, clusters: 1, discard: false };
            limbo.push(freed, 16, &grace, 4);
            assert_eq!(limbo.is_large(), index + 1 >= MANY as u64, "{index}");
        }
        for _ in 0..5 {
            grace.try_advance();
        }
        assert_eq!(limbo.take_ready(&grace, 5).len(), TOO_MANY);
        assert!(!limbo.is_large() && limbo.is_empty());
    }

    #[test]
    fn a_cluster_waits_for_its_users_and_for_the_disk() {
        let (limbo, grace) = (Limbo::default(), Grace::new());
        let pin = grace.pin(0);
        let freed = Freed { offset: 65536, clusters: 2, discard: true };
        limbo.push(Freed { clusters: 1, ..freed }, 16, &grace, 4);
        limbo.push(Freed { offset: 131_072, clusters: 1, ..freed }, 16, &grace, 4);
        let steps = || {
            for _ in 0..5 {
                grace.try_advance();
            }
        };
        steps();
        assert!(limbo.take_ready(&grace, 5).is_empty(), "pinned");
        grace.unpin(0, pin);
        steps();
        assert!(limbo.take_ready(&grace, 4).is_empty(), "not durable");
        assert_eq!(limbo.take_ready(&grace, 5), [freed]);
        assert!(limbo.is_empty());
    }
}
