//! Blocking calls (scenarios of test-thread-pool).

use super::*;
use crate::sync::Mutex;
use crate::sync::atomic::AtomicU32;
use std::sync::mpsc;

on_each_engine! {
    a_hundred_calls_all_run_off_the_loop
    a_dropped_call_never_starts_or_runs_to_its_end
    a_panicking_call_panics_in_its_task
    the_loop_waits_for_calls_that_have_started
}

fn a_hundred_calls_all_run_off_the_loop(config: LoopConfig) {
    let mut event_loop = new_loop(config);
    let local = event_loop.local();
    let home = std::thread::current().id();
    let sum = event_loop.block_on(async {
        let calls: Vec<_> = (0..100u32)
            .map(|number| {
                local.spawn(local.blocking(move || {
                    assert_ne!(std::thread::current().id(), home);
                    number
                }))
            })
            .collect();
        let mut sum = 0;
        for call in calls {
            sum += call.await.unwrap();
        }
        sum
    });
    assert_eq!(sum, 4950);
}

fn a_dropped_call_never_starts_or_runs_to_its_end(config: LoopConfig) {
    let mut event_loop = new_loop(LoopConfig { threads_max: 2, ..config });
    let local = event_loop.local();
    let (started, finished) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
    let gate = Arc::new(Mutex::new(()));
    let held = gate.lock();
    let (sender, receiver) = mpsc::channel();
    let calls: Vec<_> = (0..100)
        .map(|_| {
            let (started, finished) = (Arc::clone(&started), Arc::clone(&finished));
            let (gate, sender) = (Arc::clone(&gate), sender.clone());
            local.blocking(move || {
                started.fetch_add(1, Ordering::SeqCst);
                sender.send(()).unwrap();
                drop(gate.lock());
                finished.fetch_add(1, Ordering::SeqCst);
            })
        })
        .collect();
    // Both threads are at work; the other 98 calls wait.
    receiver.recv().unwrap();
    receiver.recv().unwrap();
    assert_eq!(calls.iter().filter(|call| call.has_started()).count(), 2);
    drop(calls);
    drop(held);
    let last = local.blocking(|| 5);
    assert_eq!(event_loop.block_on(last), 5);
    drop(event_loop);
    assert_eq!(started.load(Ordering::SeqCst), 2);
    assert_eq!(finished.load(Ordering::SeqCst), 2);
}

fn a_panicking_call_panics_in_its_task(config: LoopConfig) {
    let mut event_loop = new_loop(config);
    let local = event_loop.local();
    let task = local.spawn(local.blocking(|| panic!("a call's own fault")));
    let outcome: Result<(), Cancelled> = event_loop.block_on(task);
    assert_eq!(outcome, Err(Cancelled));
}

fn the_loop_waits_for_calls_that_have_started(config: LoopConfig) {
    let finished = Arc::new(AtomicBool::new(false));
    let (sender, receiver) = mpsc::channel();
    let thread = IoThread::spawn(LoopConfig { stop_grace: Duration::ZERO, ..config }).unwrap();
    let done = Arc::clone(&finished);
    let posted = thread.handle().post(move |local| {
        drop(local.spawn(local.blocking(move || {
            sender.send(()).unwrap();
            std::thread::sleep(Duration::from_millis(20));
            done.store(true, Ordering::SeqCst);
        })));
    });
    posted.unwrap();
    receiver.recv().unwrap();
    thread.join();
    assert!(finished.load(Ordering::SeqCst));
}
