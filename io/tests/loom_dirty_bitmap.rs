//! A model of the tree of a dirty bitmap: every interleaving of two threads, with at most three
//! preemptions, and every value a weakly ordered load may return.
//!
//! ```text
//! RUSTFLAGS="--cfg loom" cargo test -p blockplex-io --release --test loom_dirty_bitmap
//! ```
//!
//! The tree belongs to the drivers, which are not built for models; its file is taken in here as it
//! is. M1 and M2 are truths of `drivers/src/dirty_bitmap.rs`. The negative control clears and marks
//! the same chunk, which M2 leaves to a drain, and must find the mark lost.
#![cfg(loom)]
#![expect(dead_code, reason = "the model needs a part of the tree")]

#[path = "../../drivers/src/dirty_bitmap/tree.rs"]
mod tree;

use loom::thread;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use tree::Tree;

/// Bits of a leaf in the model.
const LEAF: u64 = 128;

fn model(body: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = builder.preemption_bound.or(Some(3));
    builder.check(body);
}

/// Runs both on a tree that `before` was done to; gives the tree. Its words are there before: that
/// one thread makes them and others find them whole is the standard library's `OnceLock`, which the
/// model does not know.
fn race(before: fn(&Tree), one: fn(&Tree), other: fn(&Tree)) -> Arc<Tree> {
    let tree = Arc::new(Tree::default());
    tree.set(0, 0);
    tree.clear(0, 0);
    before(&tree);
    let theirs = tree.clone();
    let thread = thread::spawn(move || other(&theirs));
    one(&tree);
    thread.join().unwrap();
    tree
}

#[test]
fn marks_of_two_threads_are_both_there() {
    model(|| {
        let tree = race(|_| (), |tree| tree.set(0, 1), |tree| tree.set(1, 2));
        assert_eq!(tree.word(0), 0b111, "M1");
    });
}

#[test]
fn a_mark_and_a_leaf_that_becomes_full_leave_it_full() {
    model(|| {
        let tree = race(|_| (), |tree| tree.set(0, LEAF - 1), |tree| tree.set(5, 5));
        assert_eq!((tree.word(0), tree.word(64)), (u64::MAX, u64::MAX), "M1");
    });
}

#[test]
fn clearing_a_part_of_a_full_leaf_keeps_the_marks_of_other_chunks() {
    model(|| {
        let tree =
            race(|tree| tree.set(0, LEAF - 1), |tree| tree.clear(0, 3), |tree| tree.set(4, 64));
        assert_eq!(tree.word(0), u64::MAX << 4, "M2");
        assert_eq!(tree.word(64), u64::MAX, "M2");
    });
}

#[test]
fn clearing_a_chunk_keeps_the_mark_of_its_neighbour() {
    model(|| {
        let tree = race(|tree| tree.set(0, 0), |tree| tree.clear(0, 0), |tree| tree.set(1, 1));
        assert_eq!(tree.word(0), 0b10, "M2");
    });
}

#[test]
fn clearing_what_is_being_marked_may_lose_the_mark() {
    let lost = Arc::new(AtomicBool::new(false));
    let seen = lost.clone();
    model(move || {
        let tree = race(|_| (), |tree| tree.set(0, 0), |tree| tree.clear(0, 0));
        if tree.word(0) == 0 {
            seen.store(true, SeqCst);
        }
    });
    assert!(lost.load(SeqCst), "the model finds what M2 excludes");
}
