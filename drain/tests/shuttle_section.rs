//! Sections under shuttle: many threads, random and PCT schedules, sequentially consistent memory
//! (weak memory is loom's part, next door). Scenario numbers are those of the fault catalogue.
#![cfg(shuttle)]

use blockplex_drain::{DrainHooks, Gate, Section, Slot};
use shuttle::future::block_on;
use shuttle::rand::{Rng, thread_rng};
use shuttle::thread;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::Arc;
// The oracles' own counters are std's: they must not add scheduling points.
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::task::{Context, Waker};

/// An origin with the oracles: who is inside, who believes it drained, what the hooks were told.
#[derive(Default)]
struct Oracle {
    active: AtomicUsize,
    drained: AtomicUsize,
    in_hook: AtomicBool,
    begun: AtomicBool,
    hook_calls: AtomicUsize,
}

struct Origin {
    gate: Arc<Gate>,
    oracle: Arc<Oracle>,
}

struct Hooks(Arc<Oracle>);

impl Hooks {
    fn call(&self, begun: bool) {
        assert!(!self.0.in_hook.swap(true, SeqCst), "two hook calls at once");
        assert_eq!(self.0.begun.swap(begun, SeqCst), !begun, "hooks must alternate");
        thread::yield_now();
        self.0.hook_calls.fetch_add(1, SeqCst);
        self.0.in_hook.store(false, SeqCst);
    }
}

impl DrainHooks for Hooks {
    fn drain_begin(&self) {
        self.call(true);
    }
    fn drain_end(&self) {
        self.call(false);
    }
}

fn origins(count: usize) -> Arc<Vec<Origin>> {
    let origins = (0..count).map(|index| {
        let oracle = Arc::<Oracle>::default();
        let gate = Gate::new(format!("origin {index}"), Some(Box::new(Hooks(oracle.clone()))));
        Origin { gate, oracle }
    });
    Arc::new(origins.collect())
}

impl Origin {
    fn request(&self, slot: &Slot) {
        while !slot.try_enter() {
            block_on(poll_fn(|context| slot.poll_thawed(context)));
        }
        self.oracle.active.fetch_add(1, SeqCst);
        for _ in 0..2 {
            assert_eq!(self.oracle.drained.load(SeqCst), 0, "a request inside a drained section");
            thread::yield_now();
        }
        self.oracle.active.fetch_sub(1, SeqCst);
        slot.exit();
    }

    fn assert_at_rest(&self) {
        assert_eq!(self.gate.frozen_count(), 0);
        assert_eq!(self.gate.in_flight(), 0);
        assert!(!self.oracle.begun.load(SeqCst), "the hooks' last call is drain_end");
    }
}

/// A settled section of some origins, which says so to their oracles.
struct Drained {
    section: Option<Section>,
    oracles: Vec<Arc<Oracle>>,
}

fn drain(origins: &[Origin], chosen: &[usize]) -> Drained {
    let gates = chosen.iter().map(|index| origins[*index].gate.clone());
    let section = Section::freeze(gates).announce();
    block_on(section.wait());
    let oracles: Vec<_> = chosen.iter().map(|index| origins[*index].oracle.clone()).collect();
    for oracle in &oracles {
        assert_eq!(oracle.active.load(SeqCst), 0, "settled over a request");
        assert!(oracle.begun.load(SeqCst) && !oracle.in_hook.load(SeqCst), "settled too early");
        oracle.drained.fetch_add(1, SeqCst);
    }
    Drained { section: Some(section), oracles }
}

impl Drop for Drained {
    fn drop(&mut self) {
        for oracle in &self.oracles {
            oracle.drained.fetch_sub(1, SeqCst);
        }
        let section = self.section.take();
        assert!(section.is_some_and(|section| section.is_settled()));
    }
}

fn some_of(count: usize) -> Vec<usize> {
    let mut chosen: Vec<_> = (0..count).collect();
    for index in 0..count {
        chosen.swap(index, thread_rng().gen_range(0..count));
    }
    chosen.truncate(thread_rng().gen_range(1..=count));
    chosen
}

fn both(body: fn(), iterations: usize) {
    shuttle::check_random(body, iterations);
    shuttle::check_pct(body, iterations, 3);
}

/// D04, D09: three threads drain overlapping sets in any order and end them in any order.
fn overlapping_sections() {
    let origins = origins(4);
    let mut threads = Vec::new();
    for _ in 0..3 {
        let origins = origins.clone();
        threads.push(thread::spawn(move || {
            let outer = drain(&origins, &some_of(4));
            thread::yield_now();
            let inner = drain(&origins, &some_of(4));
            if thread_rng().gen_bool(0.5) {
                drop(outer);
                thread::yield_now();
                drop(inner);
            } else {
                drop(inner);
                drop(outer);
            }
        }));
    }
    for index in 0..2 {
        let origins = origins.clone();
        threads.push(thread::spawn(move || {
            let slot = origins[index].gate.open_slot("queue");
            for _ in 0..2 {
                origins[index].request(&slot);
            }
        }));
    }
    for thread in threads {
        thread.join().expect("no thread fails");
    }
    origins.iter().for_each(Origin::assert_at_rest);
}

#[test]
fn overlapping_sections_of_three_threads_in_any_order_neither_slip_nor_hang() {
    both(overlapping_sections, 6_000);
}

/// D17: submitters that never pause do not keep a section from settling.
fn endless_submitters() {
    let origins = origins(1);
    let stop = Arc::new(AtomicBool::new(false));
    let submitters: Vec<_> = (0..3)
        .map(|_| {
            let (origins, stop) = (origins.clone(), stop.clone());
            thread::spawn(move || {
                let slot = origins[0].gate.open_slot("queue");
                while !stop.load(SeqCst) {
                    origins[0].request(&slot);
                }
            })
        })
        .collect();
    for _ in 0..3 {
        drop(drain(&origins, &[0]));
    }
    stop.store(true, SeqCst);
    for submitter in submitters {
        submitter.join().expect("no submitter fails");
    }
    origins[0].assert_at_rest();
}

#[test]
fn endless_submitters_do_not_starve_a_section() {
    // Random only: PCT may run one endless thread for ever.
    shuttle::check_random(endless_submitters, 6_000);
}

/// A wait given up at any point, with its section or before it, leaves the gate as it was.
fn cancelled_wait() {
    let origins = origins(1);
    let submitters: Vec<_> = (0..2)
        .map(|_| {
            let origins = origins.clone();
            thread::spawn(move || {
                let slot = origins[0].gate.open_slot("queue");
                for _ in 0..2 {
                    origins[0].request(&slot);
                }
            })
        })
        .collect();
    let section = Section::freeze([origins[0].gate.clone()]).announce();
    {
        let mut wait = pin!(section.wait());
        for _ in 0..thread_rng().gen_range(0..3) {
            let _ = wait.as_mut().poll(&mut Context::from_waker(Waker::noop()));
            thread::yield_now();
        }
    }
    drop(section);
    drop(drain(&origins, &[0]));
    for submitter in submitters {
        submitter.join().expect("every request is admitted in the end");
    }
    origins[0].assert_at_rest();
}

#[test]
fn a_cancelled_wait_thaws_and_loses_no_request() {
    both(cancelled_wait, 6_000);
}

/// Sections that come and go on three threads, waited for or not.
fn hooks_under_fire() {
    let origins = origins(2);
    let threads: Vec<_> = (0..3)
        .map(|_| {
            let origins = origins.clone();
            thread::spawn(move || {
                for _ in 0..2 {
                    let chosen = some_of(2);
                    if thread_rng().gen_bool(0.5) {
                        drop(drain(&origins, &chosen));
                    } else {
                        let gates = chosen.iter().map(|index| origins[*index].gate.clone());
                        drop(Section::freeze(gates).announce());
                    }
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().expect("no thread fails");
    }
    for origin in origins.iter() {
        origin.assert_at_rest();
        assert_eq!(origin.oracle.hook_calls.load(SeqCst) % 2, 0);
    }
}

#[test]
fn hooks_strictly_alternate_and_never_overlap() {
    both(hooks_under_fire, 6_000);
}
