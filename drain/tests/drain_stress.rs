//! Real threads, real membarrier: submitters never slip into a section. Two seconds.
#![cfg(not(any(loom, shuttle)))]

use blockplex_drain::{Gate, RequestRecord, Section, kind};
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;
use std::time::{Duration, Instant};

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

fn block_on<F: Future>(future: F) -> F::Output {
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut future = pin!(future);
    loop {
        match future.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(output) => return output,
            Poll::Pending => std::thread::park(),
        }
    }
}

/// Stores that miss the cache, so that the slot's increment behind them stays in the processor's
/// store buffer for a while. Without it a missing barrier would hardly ever show.
struct Delays {
    far: Vec<AtomicU64>,
    state: u64,
}

impl Delays {
    const WORDS: usize = 1 << 23;

    fn new(seed: u64) -> Self {
        Delays { far: (0..Self::WORDS as u64).map(AtomicU64::new).collect(), state: seed }
    }

    fn fill_store_buffer(&mut self) {
        for _ in 0..6 {
            self.state = self.state.wrapping_mul(6364136223846793005).wrapping_add(99991);
            let index = (self.state >> 33) as usize % Self::WORDS;
            self.far[index].store(self.state, Ordering::Relaxed);
        }
    }
}

#[derive(Default)]
struct World {
    stop: AtomicBool,
    drained: AtomicU64,
    slipped: AtomicU64,
    requests: AtomicU64,
    /// Written by the drainer inside of sections, in two steps that no request may see half done.
    halves: [AtomicU64; 2],
}

impl World {
    fn submit_until_stopped(&self, gate: &Arc<Gate>, index: u32) {
        let slot = gate.open_slot(format!("queue 'submitter {index}'"));
        let record =
            RequestRecord { kind: kind::READ, offset: 0, length: 512, started_ns: 0, node: index };
        let mut delays = Delays::new(u64::from(index));
        let mut ended = 0;
        while !self.stop.load(Ordering::Relaxed) {
            delays.fill_store_buffer();
            while !slot.try_enter() {
                block_on(poll_fn(|context| slot.poll_thawed(context)));
            }
            slot.record(0, record);
            for _ in 0..30 {
                // Relaxed throughout: the gate alone has to keep sections and requests apart.
                let first = self.halves[0].load(Ordering::Relaxed);
                let second = self.halves[1].load(Ordering::Relaxed);
                if first != second || self.drained.load(Ordering::Relaxed) != 0 {
                    self.slipped.fetch_add(1, Ordering::Relaxed);
                }
            }
            slot.clear_record(0);
            slot.exit();
            ended += 1;
        }
        self.requests.fetch_add(ended, Ordering::Relaxed);
    }

    fn drain_once(&self, gate: &Arc<Gate>) {
        let section = Section::freeze([gate.clone()]).announce();
        block_on(section.wait());
        self.drained.store(1, Ordering::Relaxed);
        for half in &self.halves {
            half.store(half.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
            std::hint::spin_loop();
        }
        assert_eq!(section.holders().iter().map(|holder| holder.requests.len()).sum::<usize>(), 0);
        self.drained.store(0, Ordering::Relaxed);
    }
}

#[test]
fn submitters_never_slip_into_a_section() {
    let (world, gate) = (World::default(), Gate::new("backend 'disk0'", None));
    let end = Instant::now() + Duration::from_secs(2);
    let mut drains = 0u64;
    std::thread::scope(|scope| {
        for index in 0..2 {
            let (world, gate) = (&world, &gate);
            scope.spawn(move || world.submit_until_stopped(gate, index));
        }
        // At least one, however slow the machine.
        while drains == 0 || Instant::now() < end {
            world.drain_once(&gate);
            drains += 1;
            std::thread::yield_now();
        }
        world.stop.store(true, Ordering::Relaxed);
    });
    let requests = world.requests.load(Ordering::Relaxed);
    println!("{drains} drains, {requests} requests");
    assert_eq!(world.slipped.load(Ordering::Relaxed), 0, "{drains} drains, {requests} requests");
    assert_eq!((gate.frozen_count(), gate.in_flight()), (0, 0));
}
