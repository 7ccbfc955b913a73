//! The gate under loom: requests against sections, with the real code and fences for barriers.
//!
//! The oracle is `World`: requests only touch the graph version they were admitted under, and the
//! drainer touches both versions inside of its section. loom reports it as a race if a request's
//! access is not ordered before or after the section's, in whatever weak order.
#![cfg(loom)]

use blockplex_drain::{DrainHooks, Gate, Section, Slot};
use loom::cell::UnsafeCell;
use loom::future::block_on;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicUsize, Ordering};
use loom::thread;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::task::{Context, Waker};

fn model(preemptions: usize, body: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.max_branches = 50_000;
    builder.check(body);
}

/// Two versions of what a request uses. Version 0 is in force until the first change.
struct World {
    gate: std::sync::Arc<Gate>,
    versions: [UnsafeCell<()>; 2],
    /// 1: the version is gone.
    retired: [AtomicUsize; 2],
}

impl World {
    fn new(hooks: Option<Box<dyn DrainHooks>>) -> Arc<World> {
        Arc::new(World {
            gate: Gate::new("backend", hooks),
            versions: [UnsafeCell::new(()), UnsafeCell::new(())],
            retired: [AtomicUsize::new(0), AtomicUsize::new(0)],
        })
    }

    fn use_version(&self, version: usize) {
        self.versions[version].with(|_| {
            assert_eq!(self.retired[version].load(Ordering::Relaxed), 0, "a retired graph");
        });
    }

    fn request(&self, slot: &Slot) {
        enter(slot);
        // The generation after admission, never before.
        self.use_version(self.gate.generation() as usize);
        slot.exit();
    }

    fn drain(&self) -> Section {
        let section = Section::freeze([self.gate.clone()]).announce();
        block_on(section.wait());
        section
    }

    fn change_graph(&self) {
        let section = self.drain();
        self.gate.bump_generation();
        self.versions[0].with_mut(|_| self.retired[0].store(1, Ordering::Relaxed));
        drop(section);
    }
}

fn enter(slot: &Slot) {
    while !slot.try_enter() {
        block_on(poll_fn(|context| slot.poll_thawed(context)));
    }
}

#[test]
fn two_requesters_never_slip_into_a_section() {
    model(3, || {
        let world = World::new(None);
        let requesters: Vec<_> = (0..2)
            .map(|_| {
                let world = world.clone();
                thread::spawn(move || world.request(&world.gate.open_slot("queue")))
            })
            .collect();
        world.change_graph();
        for requester in requesters {
            requester.join().expect("no request fails");
        }
    });
}

#[test]
fn a_requester_coming_twice_never_slips_between_two_drainers() {
    model(3, || {
        let world = World::new(None);
        let requester = {
            let world = world.clone();
            thread::spawn(move || {
                let slot = world.gate.open_slot("queue");
                world.request(&slot);
                world.request(&slot);
            })
        };
        let drainer = {
            let world = world.clone();
            thread::spawn(move || drop(world.drain()))
        };
        world.change_graph();
        requester.join().expect("no request fails");
        drainer.join().expect("the other drain ends");
    });
}

#[test]
fn one_request_and_one_drain_in_every_order() {
    model(6, || {
        let world = World::new(None);
        let requester = {
            let world = world.clone();
            thread::spawn(move || world.request(&world.gate.open_slot("queue")))
        };
        world.change_graph();
        requester.join().expect("no request fails");
    });
}

#[test]
fn the_last_exit_or_back_out_always_wakes_the_wait() {
    model(6, || {
        let gate = Gate::new("backend", None);
        let requester = {
            let gate = gate.clone();
            thread::spawn(move || {
                let slot = gate.open_slot("queue");
                // Refused: the back-out has to wake the wait just as well.
                if slot.try_enter() {
                    slot.exit();
                }
                // Closing it would wake the wait, too, and hide a lost wake-up.
                std::mem::forget(slot);
            })
        };
        let section = Section::freeze([gate.clone()]).announce();
        block_on(section.wait());
        assert!(section.is_settled());
        requester.join().expect("the request ends");
    });
}

#[test]
fn a_cancelled_wait_leaves_the_gate_usable() {
    model(6, || {
        let world = World::new(None);
        let requester = {
            let world = world.clone();
            thread::spawn(move || world.request(&world.gate.open_slot("queue")))
        };
        let section = Section::freeze([world.gate.clone()]).announce();
        {
            let mut wait = pin!(section.wait());
            let _ = wait.as_mut().poll(&mut Context::from_waker(Waker::noop()));
        }
        drop(section);
        requester.join().expect("the request is admitted in the end");
    });
}

#[test]
fn what_drain_begin_stops_is_stopped_when_the_section_settles() {
    /// Counts what the hooks were told. Relaxed: only the section's own order makes it visible.
    struct Hooks(Arc<AtomicUsize>);
    impl DrainHooks for Hooks {
        fn drain_begin(&self) {
            assert_eq!(self.0.fetch_add(1, Ordering::Relaxed), 0, "begun twice");
        }
        fn drain_end(&self) {
            assert_eq!(self.0.fetch_sub(1, Ordering::Relaxed), 1, "ended twice");
        }
    }
    model(5, || {
        let begun = Arc::new(AtomicUsize::new(0));
        let world = World::new(Some(Box::new(Hooks(begun.clone()))));
        let drain = |world: &World, begun: &AtomicUsize| {
            let section = world.drain();
            assert_eq!(begun.load(Ordering::Relaxed), 1, "settled before begun");
            drop(section);
        };
        let other = {
            let (world, begun) = (world.clone(), begun.clone());
            thread::spawn(move || drain(&world, &begun))
        };
        drain(&world, &begun);
        other.join().expect("the other drain ends");
        assert_eq!(begun.load(Ordering::Relaxed), 0);
    });
}
