//! Models of how other threads wake a loop up, over the very code that ships: the inbox (W01) and
//! the state word of bottom halves (W02).
//!
//! `RUSTFLAGS="--cfg loom" cargo test -p blockplex-io --release --test loom_wake`. The environment
//! variable LOOM_MAX_PREEMPTIONS widens the search.
#![cfg(loom)]

use blockplex_io::event_loop::notify::{Class, Gate, Inbox, Kick};
use blockplex_io::event_loop::pending::{Pending, Scheduled, Taken};
use loom::sync::atomic::{AtomicUsize, Ordering};
use loom::sync::{Arc, Condvar, Mutex};
use loom::thread;

fn model(f: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = builder.preemption_bound.or(Some(3));
    builder.check(f);
}

/// Stands for the eventfd: counts kicks, and lets the owner sleep until there is one.
struct Event {
    kicks: Mutex<usize>,
    changed: Condvar,
}

struct Loop {
    inbox: Inbox<usize>,
    event: Event,
}

impl Loop {
    fn new() -> Arc<Loop> {
        let event = Event { kicks: Mutex::new(0), changed: Condvar::new() };
        Arc::new(Loop { inbox: Inbox::new(), event })
    }

    fn push(&self, item: usize, class: Class) -> Result<(), usize> {
        if self.inbox.push(item, class)? == Kick::Due {
            *self.event.kicks.lock().expect("no model panics under it") += 1;
            self.event.changed.notify_all();
        }
        Ok(())
    }

    /// One turn of the owner: takes what is there, or sleeps if there is nothing.
    fn turn(&self, items: &mut Vec<usize>) {
        let mut batch = Vec::new();
        self.inbox.take(&mut batch);
        if !batch.is_empty() {
            items.append(&mut batch);
            return;
        }
        if self.inbox.prepare_sleep() {
            let mut kicks = self.event.kicks.lock().expect("no model panics under it");
            while *kicks == 0 {
                kicks = self.event.changed.wait(kicks).expect("no model panics under it");
            }
            *kicks = 0;
            drop(kicks);
            self.inbox.awake();
        }
    }
}

/// A lost wake-up shows as a deadlock: the owner sleeps and nobody is left to kick it.
#[test]
fn the_owner_gets_everything_from_two_pushers_and_loses_no_wake_up() {
    model(|| {
        let owner = Loop::new();
        let pushers = [1, 2].map(|item| {
            let target = Arc::clone(&owner);
            thread::spawn(move || target.push(item, Class::New))
        });
        let mut items = Vec::new();
        while items.len() < 2 {
            owner.turn(&mut items);
        }
        items.sort_unstable();
        assert_eq!(items, [1, 2]);
        for pusher in pushers {
            assert_eq!(pusher.join().unwrap(), Ok(()));
        }
    });
}

#[test]
fn one_pusher_keeps_its_order_across_sleeps() {
    model(|| {
        let owner = Loop::new();
        let target = Arc::clone(&owner);
        let pusher = thread::spawn(move || {
            assert_eq!(target.push(1, Class::New), Ok(()));
            assert_eq!(target.push(2, Class::Follow), Ok(()));
        });
        let mut items = Vec::new();
        while items.len() < 2 {
            owner.turn(&mut items);
        }
        assert_eq!(items, [1, 2]);
        pusher.join().unwrap();
    });
}

/// What is pushed while the loop closes comes out exactly once: at the owner, or back to the pusher.
#[test]
fn an_item_pushed_at_the_end_is_taken_or_given_back() {
    model(|| {
        let owner = Loop::new();
        let pushers = [Class::New, Class::Follow].map(|class| {
            let target = Arc::clone(&owner);
            thread::spawn(move || target.push(class as usize, class))
        });
        owner.inbox.narrow(Gate::Ending);
        let mut items = Vec::new();
        owner.inbox.take(&mut items);
        items.append(&mut owner.inbox.close());
        for (class, pusher) in [Class::New, Class::Follow].into_iter().zip(pushers) {
            let taken = items.contains(&(class as usize));
            assert_eq!(taken, pusher.join().unwrap().is_ok());
        }
    });
}

/// A thing that is scheduled: how often it is on the queue, how often asked for, what a run saw.
struct Thing {
    pending: Pending,
    queued: AtomicUsize,
    asked: AtomicUsize,
}

impl Thing {
    fn new() -> Arc<Thing> {
        let zero = || AtomicUsize::new(0);
        Arc::new(Thing { pending: Pending::new(), queued: zero(), asked: zero() })
    }

    fn schedule(&self, target: &Loop, idle: bool) {
        // Relaxed: that the run sees this is what is to be shown of the state word.
        self.asked.fetch_add(1, Ordering::Relaxed);
        let scheduled = if idle { self.pending.schedule_idle() } else { self.pending.schedule() };
        if scheduled == Scheduled::Enqueue {
            assert_eq!(self.queued.fetch_add(1, Ordering::AcqRel), 0, "queued twice");
            assert_eq!(target.push(0, Class::Follow), Ok(()));
        }
    }
}

#[test]
fn every_schedule_is_followed_by_a_run_that_sees_it() {
    model(|| {
        let (owner, thing) = (Loop::new(), Thing::new());
        let schedulers = [false, true].map(|idle| {
            let (target, thing) = (Arc::clone(&owner), Arc::clone(&thing));
            thread::spawn(move || thing.schedule(&target, idle))
        });
        // The last run must have seen both; if a schedule is lost, the owner sleeps for ever.
        let mut seen = 0;
        while seen < 2 {
            let mut items = Vec::new();
            owner.turn(&mut items);
            for _ in items {
                assert_eq!(thing.queued.fetch_sub(1, Ordering::AcqRel), 1);
                assert_ne!(thing.pending.take(), Taken::Leave);
                seen = thing.asked.load(Ordering::Relaxed);
            }
        }
        for scheduler in schedulers {
            scheduler.join().unwrap();
        }
    });
}

#[test]
fn a_schedule_after_a_cancel_runs() {
    model(|| {
        let (owner, thing) = (Loop::new(), Thing::new());
        thing.schedule(&owner, false);
        let (target, canceller) = (Arc::clone(&owner), Arc::clone(&thing));
        let other = thread::spawn(move || {
            canceller.pending.cancel();
            canceller.schedule(&target, false);
        });
        let mut ran_with = 0;
        while ran_with < 2 {
            let mut items = Vec::new();
            owner.turn(&mut items);
            for _ in items {
                thing.queued.fetch_sub(1, Ordering::AcqRel);
                if thing.pending.take() == Taken::Run {
                    ran_with = thing.asked.load(Ordering::Relaxed);
                }
            }
        }
        other.join().unwrap();
    });
}
