//! Inheritance under shuttle: a graph changes under live sections, the way the graph crate does it
//! (freeze and commit under one master mutex, barrier, hooks and wait outside).
//!
//! Two origins, two nodes. Origin 0 moves between the nodes; each node is drained by others
//! meanwhile. Whoever has drained a node must not see a request reach it, even one of an origin
//! that did not reach it when the drain began.
#![cfg(shuttle)]

use blockplex_drain::{Gate, Section, SectionRef};
use shuttle::future::block_on;
use shuttle::sync::Mutex;
use shuttle::thread;
use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

struct Master {
    /// The node each origin reaches.
    reaches: [usize; 2],
    live: Vec<(usize, SectionRef)>,
}

struct World {
    gates: [Arc<Gate>; 2],
    /// What the origins' queues read: an image of `Master::reaches`.
    published: [AtomicUsize; 2],
    drained: [AtomicUsize; 2],
    master: Mutex<Master>,
    transaction: Mutex<()>,
    inherits: bool,
}

impl World {
    fn new(inherits: bool) -> Arc<World> {
        Arc::new(World {
            gates: [Gate::new("origin 0", None), Gate::new("origin 1", None)],
            published: [AtomicUsize::new(0), AtomicUsize::new(1)],
            drained: [AtomicUsize::new(0), AtomicUsize::new(0)],
            master: Mutex::new(Master { reaches: [0, 1], live: Vec::new() }),
            transaction: Mutex::new(()),
            inherits,
        })
    }

    fn requests(&self, origin: usize) {
        let slot = self.gates[origin].open_slot("queue");
        for _ in 0..2 {
            while !slot.try_enter() {
                block_on(poll_fn(|context| slot.poll_thawed(context)));
            }
            let node = self.published[origin].load(SeqCst);
            assert_eq!(self.drained[node].load(SeqCst), 0, "a request reached a drained node");
            thread::yield_now();
            assert_eq!(self.drained[node].load(SeqCst), 0, "drained under a request");
            slot.exit();
        }
    }

    fn drain_node(&self, node: usize) {
        let frozen = {
            let mut master = self.master.lock().expect("not poisoned");
            let origins = (0..2).filter(|origin| master.reaches[*origin] == node);
            let frozen = Section::freeze(origins.map(|origin| self.gates[origin].clone()));
            master.live.push((node, frozen.reference()));
            frozen
        };
        let section = frozen.announce();
        block_on(section.wait());
        self.drained[node].fetch_add(1, SeqCst);
        thread::yield_now();
        assert!(section.is_settled());
        self.drained[node].fetch_sub(1, SeqCst);
    }

    fn move_origin_0(&self, node: usize) {
        let _planning = self.transaction.lock().expect("not poisoned");
        let section = Section::freeze([self.gates[0].clone()]).announce();
        block_on(section.wait());
        {
            let mut master = self.master.lock().expect("not poisoned");
            master.reaches[0] = node;
            master.live.retain(|(_, section)| section.is_active());
            let reached = master.live.iter().filter(|(drained, _)| *drained == node);
            for (_, live) in reached.filter(|_| self.inherits) {
                live.adopt(self.gates[0].clone());
            }
            self.published[0].store(node, SeqCst);
            self.gates[0].bump_generation();
        }
        drop(section);
    }
}

fn graph_changes_under_live_sections(inherits: bool) {
    let world = World::new(inherits);
    let run = |body: fn(&World)| {
        let world = world.clone();
        thread::spawn(move || body(&world))
    };
    let threads = [
        run(|world| world.requests(0)),
        run(|world| world.requests(1)),
        run(|world| world.drain_node(0)),
        run(|world| world.drain_node(1)),
        run(|world| {
            world.move_origin_0(1);
            world.move_origin_0(0);
        }),
    ];
    for thread in threads {
        thread.join().expect("no thread fails");
    }
    assert!(world.gates.iter().all(|gate| gate.frozen_count() == 0));
}

#[test]
fn a_section_inherits_the_origins_that_a_commit_brings() {
    shuttle::check_random(|| graph_changes_under_live_sections(true), 5_000);
    shuttle::check_pct(|| graph_changes_under_live_sections(true), 5_000, 3);
}

/// The negative control.
#[test]
#[should_panic(expected = "drained")]
fn without_inheritance_a_request_reaches_a_drained_node() {
    shuttle::check_random(|| graph_changes_under_live_sections(false), 20_000);
}
