//! Grace periods under loom: a pinned reader never sees the resource used again.
#![cfg(loom)]

use blockplex_drain::Grace;
use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicUsize, Ordering};
use loom::thread;

fn model(preemptions: usize, body: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.max_branches = 50_000;
    builder.check(body);
}

/// One resource, found as long as `linked`; loom reports a reader that overlaps with its reuse.
struct World {
    grace: Grace,
    linked: AtomicUsize,
    resource: UnsafeCell<()>,
}

impl World {
    fn new() -> Arc<World> {
        let grace = Grace::new();
        // The loops' counters come into being with their first pin, in a OnceLock that loom does
        // not know; made here, they happen before all threads.
        for loop_index in 0..2 {
            grace.unpin(loop_index, grace.pin(loop_index));
        }
        Arc::new(World { grace, linked: AtomicUsize::new(1), resource: UnsafeCell::new(()) })
    }

    fn read(&self, loop_index: usize) {
        let pin = self.grace.pin(loop_index);
        if self.linked.load(Ordering::Relaxed) == 1 {
            self.resource.with(|_| ());
        }
        self.grace.unpin(loop_index, pin);
    }

    /// Retires the resource and uses it again if the grace period has passed by `steps` steps. A
    /// model must not spin, so it just tries; loom finds the interleavings in which they suffice.
    fn retire(&self, steps: usize) {
        self.linked.store(0, Ordering::Relaxed);
        let tag = self.grace.current();
        for _ in 0..steps {
            self.grace.try_advance();
        }
        if self.grace.elapsed(tag) {
            self.resource.with_mut(|_| ());
        }
    }
}

#[test]
fn two_pinned_readers_never_see_the_resource_used_again() {
    model(4, || {
        let world = World::new();
        let readers: Vec<_> = (0..2)
            .map(|loop_index| {
                let world = world.clone();
                thread::spawn(move || world.read(loop_index))
            })
            .collect();
        world.retire(3);
        for reader in readers {
            reader.join().expect("no reader fails");
        }
    });
}

#[test]
fn a_reader_that_pins_again_and_again_is_protected_each_time() {
    model(6, || {
        let world = World::new();
        let reader = {
            let world = world.clone();
            thread::spawn(move || {
                world.read(0);
                world.read(0);
            })
        };
        world.retire(3);
        reader.join().expect("no reader fails");
    });
}

#[test]
fn steps_made_by_others_protect_as_well() {
    model(4, || {
        let world = World::new();
        let reader = {
            let world = world.clone();
            thread::spawn(move || world.read(0))
        };
        let helper = {
            let world = world.clone();
            thread::spawn(move || {
                world.grace.try_advance();
                world.grace.try_advance();
            })
        };
        world.retire(2);
        reader.join().expect("no reader fails");
        helper.join().expect("no step fails");
    });
}
