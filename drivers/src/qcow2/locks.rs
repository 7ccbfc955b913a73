//! The locks of an open image, and the order in which they are taken.
//!
//! | rank | lock | who has the turn |
//! |---|---|---|
//! | 1 | [`RESIZE`] | changes the size of the disk, or does other management work |
//! | 2 | [`RANGE`] | changes the mapping of guest clusters |
//! | 3 | [`L1_ENTRY`] | gives an L1 entry a table of its own |
//! | 4 | [`SLICE`] | loads a slice |
//! | 5 | [`ROUND`] | writes metadata back |
//! | 6 | [`HEADER`] | changes the header |
//! | 7 | [`REFCOUNT_BLOCK`] | loads a refcount block |
//! | 8 | [`FILE_END`] | changes the length of the file |
//! | 9 | [`LEAF`] | changes the length of an external data file; changes key slots |
//!
//! All may be held across I/O on the children. Below them are mutexes that are held for some
//! instructions, and never across an await.
//!
//! - **LK1** A request waits for a lock only while all that it holds have lower ranks; so there is no
//!   circle of requests that wait for each other. The rank stands in the type of a lock, and debug
//!   builds check it whenever one is taken.
//! - **LK2** Looking up a guest offset in the caches takes none of them.

use blockplex_io::lock::{CoMutex, CoMutexGuard, RangeGuard, RangeLock, RangeMode};
use std::ops::{Deref, DerefMut, Range};

/// The turn to change the size, or to do other management work.
pub(super) const RESIZE: u8 = 1;
/// Guest clusters whose mapping is changed.
pub(super) const RANGE: u8 = 2;
/// An L1 entry that gets a table.
pub(super) const L1_ENTRY: u8 = 3;
/// A slice that is loaded.
pub(super) const SLICE: u8 = 4;
/// The turn to write back.
pub(super) const ROUND: u8 = 5;
/// The header.
pub(super) const HEADER: u8 = 6;
/// A refcount block that is loaded.
pub(super) const REFCOUNT_BLOCK: u8 = 7;
/// The length of the file.
pub(super) const FILE_END: u8 = 8;
/// What waits for nothing but I/O.
pub(super) const LEAF: u8 = 9;

/// A lock with a rank.
#[derive(Default)]
pub(super) struct Ranked<L, const RANK: u8>(L);

impl<L, const RANK: u8> Ranked<L, RANK> {
    pub(super) fn new(lock: L) -> Self {
        Ranked(lock)
    }
}

impl<T, const RANK: u8> Ranked<CoMutex<T>, RANK> {
    /// Waits for the lock.
    pub(super) async fn lock(&self) -> Held<CoMutexGuard<'_, T>> {
        order::check(RANK);
        let guard = self.0.lock().await;
        Held { guard, _note: order::Note::new(RANK) }
    }
}

impl<const RANK: u8> Ranked<RangeLock, RANK> {
    /// Waits for a range for oneself.
    pub(super) async fn lock(&self, range: Range<u64>) -> Held<RangeGuard<'_>> {
        order::check(RANK);
        let guard = self.0.lock(range, RangeMode::Exclusive).await;
        Held { guard, _note: order::Note::new(RANK) }
    }

    /// Waits for the turn of one number: whoever has another's keeps nobody waiting here.
    pub(super) async fn turn(&self, number: u64) -> Held<RangeGuard<'_>> {
        // Numbers are far below the largest: of slices, tables and blocks of a file.
        self.lock(number..number.saturating_add(1)).await
    }
}

/// A lock that is held.
#[must_use = "dropping it gives the lock back at once"]
pub(super) struct Held<G> {
    guard: G,
    _note: order::Note,
}

impl<G: Deref> Deref for Held<G> {
    type Target = G::Target;

    fn deref(&self) -> &G::Target {
        &self.guard
    }
}

impl<G: DerefMut> DerefMut for Held<G> {
    fn deref_mut(&mut self) -> &mut G::Target {
        &mut self.guard
    }
}

pub(super) use order::watched;

/// Which ranks a request holds: known while it is polled under [`watched`].
#[cfg(debug_assertions)]
mod order {
    use std::cell::RefCell;
    use std::pin::pin;
    use std::rc::Rc;

    type Ranks = Rc<RefCell<Vec<u8>>>;

    thread_local! {
        /// Those of the request that is polled now.
        static CURRENT: RefCell<Option<Ranks>> = const { RefCell::new(None) };
    }

    /// Watches the locks that `future` takes. Requests of other nodes below it have ranks of their own:
    /// a parent comes before its children.
    pub(crate) async fn watched<F: Future>(future: F) -> F::Output {
        let ranks = Ranks::default();
        let mut future = pin!(future);
        std::future::poll_fn(|context| {
            let _outer = Outer(CURRENT.replace(Some(ranks.clone())));
            future.as_mut().poll(context)
        })
        .await
    }

    /// Brings the request around back, also when the one within panics.
    struct Outer(Option<Ranks>);

    impl Drop for Outer {
        fn drop(&mut self) {
            CURRENT.set(self.0.take());
        }
    }

    /// LK1.
    pub(super) fn check(rank: u8) {
        CURRENT.with_borrow(|ranks| {
            let Some(ranks) = ranks else { return };
            let held = ranks.borrow();
            assert!(held.iter().all(|held| *held < rank), "LK1: {rank} after {held:?}");
        });
    }

    /// One rank that is held.
    pub(super) struct Note(Option<(Ranks, u8)>);

    impl Note {
        pub(super) fn new(rank: u8) -> Note {
            let ranks = CURRENT.with_borrow(Clone::clone);
            if let Some(ranks) = &ranks {
                ranks.borrow_mut().push(rank);
            }
            Note(ranks.map(|ranks| (ranks, rank)))
        }
    }

    impl Drop for Note {
        fn drop(&mut self) {
            if let Some((ranks, rank)) = &self.0 {
                let mut ranks = ranks.borrow_mut();
                if let Some(at) = ranks.iter().rposition(|held| held == rank) {
                    ranks.remove(at);
                }
            }
        }
    }
}

/// Nobody looks.
#[cfg(not(debug_assertions))]
mod order {
    pub(crate) async fn watched<F: Future>(future: F) -> F::Output {
        future.await
    }

    pub(super) fn check(_rank: u8) {}

    pub(super) struct Note;

    impl Note {
        pub(super) fn new(_rank: u8) -> Note {
            Note
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use blockplex_io::event_loop::block_on;

    /// LK1.
    #[test]
    #[should_panic(expected = "LK1")]
    fn a_lock_taken_after_one_of_higher_rank_is_found() {
        let (header, range) =
            (Ranked::<_, HEADER>::new(CoMutex::new(())), Ranked::<_, RANGE>::new(RangeLock::new()));
        let _ = block_on(watched(async {
            let _held = header.lock().await;
            let _wrong = range.lock(0..1).await;
        }));
    }

    /// LK1.
    #[test]
    fn locks_in_order_and_those_of_a_node_below_are_no_alarm() {
        let (header, range) =
            (Ranked::<_, HEADER>::new(CoMutex::new(5)), Ranked::<_, RANGE>::new(RangeLock::new()));
        let seen = block_on(watched(async {
            let first = range.lock(0..1).await;
            let second = header.lock().await;
            let below = watched(async { drop(range.lock(4..5).await) });
            below.await;
            drop(second);
            drop(first);
            let _again = range.lock(0..1).await;
            *header.lock().await
        }));
        assert_eq!(seen.unwrap(), 5);
    }
}
