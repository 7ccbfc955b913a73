//! Bottom halves (scenarios of test-aio; W01, W02).

use super::*;
use crate::sync::Mutex;
use crate::sync::atomic::AtomicU32;
use std::sync::mpsc;

on_each_engine! {
    a_scheduled_bottom_half_runs_once_and_an_idle_loop_does_nothing
    a_bottom_half_that_reschedules_itself_runs_once_a_turn
    a_cancelled_or_deleted_bottom_half_does_not_run
    bottom_halves_delete_themselves_in_their_callbacks
    any_thread_wakes_a_sleeping_loop_and_no_schedule_is_lost
    an_idle_bottom_half_runs_without_counting_as_progress
    a_panicking_callback_leaves_loop_and_bottom_half_alive
    posted_closures_run_in_order_on_the_loop
}

fn counter(event_loop: &EventLoop) -> (BottomHalf, Arc<AtomicU32>) {
    let count = Arc::new(AtomicU32::new(0));
    let runs = Arc::clone(&count);
    let half = event_loop.handle().bottom_half(move |_| {
        runs.fetch_add(1, Ordering::SeqCst);
    });
    (half, count)
}

fn a_scheduled_bottom_half_runs_once_and_an_idle_loop_does_nothing(config: LoopConfig) {
    let mut event_loop = new_loop(config);
    let (half, count) = counter(&event_loop);
    assert!(!event_loop.run_once(Some(Duration::ZERO)));
    half.schedule();
    half.schedule();
    assert!(half.is_scheduled());
    assert!(event_loop.run_once(None));
    assert!(!half.is_scheduled());
    assert_eq!(count.load(Ordering::SeqCst), 1);
    assert!(!event_loop.run_once(Some(Duration::ZERO)));
    assert_eq!(count.load(Ordering::SeqCst), 1);
}

/// A bottom half that its own callback can reach.
fn reflexive(
    event_loop: &EventLoop,
    mut callback: impl FnMut(&Mutex<Option<BottomHalf>>) + Send + 'static,
) -> Arc<Mutex<Option<BottomHalf>>> {
    let own = Arc::new(Mutex::new(None));
    let inner = Arc::clone(&own);
    *own.lock() = Some(event_loop.handle().bottom_half(move |_| callback(&inner)));
    own
}

fn schedule(half: &Mutex<Option<BottomHalf>>) {
    half.lock().as_ref().expect("it has not been deleted").schedule();
}

fn a_bottom_half_that_reschedules_itself_runs_once_a_turn(config: LoopConfig) {
    let mut event_loop = new_loop(config);
    let runs = Arc::new(AtomicU32::new(0));
    let count = Arc::clone(&runs);
    let half = reflexive(&event_loop, move |own| {
        if count.fetch_add(1, Ordering::SeqCst) < 9 {
            schedule(own);
        }
    });
    schedule(&half);
    for turn in 1..=10 {
        assert!(event_loop.run_once(None));
        assert_eq!(runs.load(Ordering::SeqCst), turn);
    }
    assert!(!event_loop.run_once(Some(Duration::ZERO)));
}

fn a_cancelled_or_deleted_bottom_half_does_not_run(config: LoopConfig) {
    let mut event_loop = new_loop(config);
    let (half, count) = counter(&event_loop);
    half.schedule();
    half.cancel();
    assert!(!event_loop.run_once(Some(Duration::ZERO)));
    half.schedule();
    drop(half);
    assert!(!event_loop.run_once(Some(Duration::ZERO)));
    assert_eq!(count.load(Ordering::SeqCst), 0);
    assert_eq!(Arc::strong_count(&count), 1, "the callback is gone");
}

fn bottom_halves_delete_themselves_in_their_callbacks(config: LoopConfig) {
    let mut event_loop = new_loop(config);
    let runs = Arc::new(AtomicU32::new(0));
    for last in 1..=5 {
        let count = Arc::clone(&runs);
        let mut left = last;
        let half = reflexive(&event_loop, move |own| {
            count.fetch_add(1, Ordering::SeqCst);
            left -= 1;
            schedule(own);
            if left == 0 {
                drop(own.lock().take());
            }
        });
        schedule(&half);
    }
    while event_loop.run_once(Some(Duration::ZERO)) {}
    assert_eq!(runs.load(Ordering::SeqCst), 1 + 2 + 3 + 4 + 5);
    assert_eq!(Arc::strong_count(&runs), 1, "all callbacks are gone");
}

fn any_thread_wakes_a_sleeping_loop_and_no_schedule_is_lost(config: LoopConfig) {
    const ROUNDS: u32 = 500;
    for poll_max in [Duration::ZERO, Duration::from_micros(32)] {
        let thread = IoThread::spawn(LoopConfig { poll_max, ..config.clone() }).unwrap();
        let (sender, receiver) = mpsc::channel();
        let half = thread.handle().bottom_half(move |_| sender.send(()).unwrap());
        for _ in 0..ROUNDS {
            half.schedule();
            // Hangs if the wake-up is lost.
            receiver.recv().unwrap();
        }
        thread.join();
        assert!(receiver.try_recv().is_err(), "one run a schedule");
    }
}

fn an_idle_bottom_half_runs_without_counting_as_progress(config: LoopConfig) {
    let mut event_loop = new_loop(config);
    let (half, count) = counter(&event_loop);
    half.schedule_idle();
    assert!(!event_loop.run_once(Some(Duration::ZERO)));
    assert_eq!(count.load(Ordering::SeqCst), 1);
    half.schedule_idle();
    half.schedule();
    assert!(event_loop.run_once(None));
    // It is idle again after each run, and nothing else would ever end this sleep.
    let restless = reflexive(&event_loop, |own| {
        own.lock().as_ref().expect("it has not been deleted").schedule_idle();
    });
    schedule(&restless);
    assert!(event_loop.run_once(None), "the first run was hurried");
    assert!(!event_loop.run_once(None));
    assert_eq!(count.load(Ordering::SeqCst), 2);
}

fn a_panicking_callback_leaves_loop_and_bottom_half_alive(config: LoopConfig) {
    let mut event_loop = new_loop(config);
    let runs = Arc::new(AtomicU32::new(0));
    let count = Arc::clone(&runs);
    let half = event_loop.handle().bottom_half(move |_| {
        assert!(count.fetch_add(1, Ordering::SeqCst) > 0, "the first run fails");
    });
    for run in 1..=2 {
        half.schedule();
        assert!(event_loop.run_once(None));
        assert_eq!(runs.load(Ordering::SeqCst), run);
    }
}

fn posted_closures_run_in_order_on_the_loop(config: LoopConfig) {
    let thread = IoThread::spawn(config).unwrap();
    let (sender, receiver) = mpsc::channel();
    for number in 0..100 {
        let sender = sender.clone();
        let posted = thread.handle().post(move |local| {
            assert!(local.handle().is_current());
            sender.send(number).unwrap();
        });
        assert_eq!(posted, Ok(()));
    }
    assert_eq!(receiver.iter().take(100).collect::<Vec<_>>(), (0..100).collect::<Vec<_>>());
    assert!(!thread.handle().is_current());
    let handle = thread.handle().clone();
    thread.join();
    assert_eq!(handle.post(|_| ()), Err(Closed));
}
