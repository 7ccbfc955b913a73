//! A model of the sequence count: every interleaving of a writer and two readers with at most two
//! preemptions, and every value a weakly ordered load may return.
//!
//! ```text
//! RUSTFLAGS="--cfg loom" cargo test -p blockplex-io --release --test loom_sequence
//! ```
//!
//! The words are changed and read with `Relaxed`: only the count makes them one value. The negative
//! control reads them without it and must find two that do not belong together.
#![cfg(loom)]

use blockplex_io::lock::SequenceCount;
use loom::sync::atomic::{AtomicU64, Ordering::Relaxed};
use loom::thread;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

#[derive(Default)]
struct Pair {
    count: SequenceCount,
    /// Written before the words of each change.
    data: AtomicU64,
    first: AtomicU64,
    second: AtomicU64,
}

impl Pair {
    fn set(&self, value: u64) {
        self.data.store(value, Relaxed);
        self.count.change(|| {
            self.first.store(value, Relaxed);
            self.second.store(value, Relaxed);
        });
    }

    fn load(&self) -> (u64, u64) {
        (self.first.load(Relaxed), self.second.load(Relaxed))
    }
}

fn model(body: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = builder.preemption_bound.or(Some(2));
    builder.check(body);
}

#[test]
fn a_pair_is_read_whole_and_after_what_came_before_it() {
    model(|| {
        let pair = Arc::new(Pair::default());
        let reader = |pair: Arc<Pair>| {
            move || {
                if let Some((first, second)) = pair.count.read(|| pair.load()) {
                    assert_eq!(first, second, "Q2: words of two moments");
                    assert!(pair.data.load(Relaxed) >= first, "Q2: what came before");
                }
            }
        };
        let other = thread::spawn(reader(pair.clone()));
        let writer = thread::spawn({
            let pair = pair.clone();
            move || {
                pair.set(1);
                pair.set(2);
            }
        });
        reader(pair.clone())();
        other.join().expect("no body panics");
        writer.join().expect("no body panics");
        assert_eq!(pair.count.read(|| pair.load()), Some((2, 2)));
    });
}

#[test]
fn without_the_count_the_words_come_apart() {
    let apart = Arc::new(AtomicBool::new(false));
    let seen = apart.clone();
    model(move || {
        let pair = Arc::new(Pair::default());
        let writer = thread::spawn({
            let pair = pair.clone();
            move || pair.set(1)
        });
        let (first, second) = pair.load();
        if first != second {
            seen.store(true, SeqCst);
        }
        writer.join().expect("no body panics");
    });
    assert!(apart.load(SeqCst), "the model sees torn pairs");
}
