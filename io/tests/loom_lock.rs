//! Models of the coroutine locks: every interleaving of three threads with at most two
//! preemptions, and every value a weakly ordered load may return.
//!
//! ```text
//! RUSTFLAGS="--cfg loom" cargo test -p blockplex-io --release --test loom_lock
//! ```
//!
//! What a lock guards here are loom's atomics, accessed with `Relaxed` and in two steps: if two
//! holders overlapped, or if the second did not see the first's writes, some execution would lose
//! a count. A lost wake leaves a thread parked for ever, which loom reports as a deadlock.
//!
//! Two negative controls (`a_swallowed_…`) run locks whose cancelled waiters keep their wake to
//! themselves, and must fail: they show that the models see a lost wake. They look at the waiter's
//! waker instead of parking, because a deadlock found by loom may abort the whole process.
#![cfg(loom)]

use blockplex_io::lock::RangeMode::{self, Exclusive, Shared};
use blockplex_io::lock::{CoMutex, CoQueue, CoRwLock, RangeLock};
use loom::future::block_on;
use loom::sync::Mutex;
use loom::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use loom::thread;
use std::future::{Future, poll_fn};
use std::ops::Range;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::task::{Context, Poll, Wake, Waker};

/// Runs `body` under every schedule. `LOOM_MAX_PREEMPTIONS` overrides the bound of two.
fn model(body: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = builder.preemption_bound.or(Some(2));
    builder.check(body);
}

/// Shares a value with threads that loom cannot scope. A few hundred bytes per execution.
fn leak<T>(value: T) -> &'static T {
    Box::leak(Box::new(value))
}

/// Runs three bodies on three threads, the first on the model's own, and waits for all.
fn three<S: Sync>(shared: &'static S, [first, second, third]: [fn(&S); 3]) {
    let second = thread::spawn(move || second(shared));
    let third = thread::spawn(move || third(shared));
    first(shared);
    second.join().expect("no body panics");
    third.join().expect("no body panics");
}

/// A counter that loses counts unless its users exclude each other and see each other's writes.
#[derive(Default)]
struct Plain(AtomicUsize);

impl Plain {
    fn add(&self) {
        let value = self.0.load(Relaxed);
        self.0.store(value + 1, Relaxed);
    }

    fn get(&self) -> usize {
        self.0.load(Relaxed)
    }
}

/// Polls once, then drops: cancels a waiter that waits.
fn give_up_waiting<T>(future: impl Future<Output = T>) {
    let mut future = pin!(future);
    block_on(poll_fn(|cx| {
        drop(future.as_mut().poll(cx));
        Poll::Ready(())
    }));
}

/// Polls until woken `wakes` times, then drops: cancels a waiter that was told of its turn.
fn give_up_when_woken<T>(wakes: usize, future: impl Future<Output = T>) {
    let mut future = pin!(future);
    let mut polls = 0;
    block_on(poll_fn(|cx| {
        if polls == wakes {
            return Poll::Ready(());
        }
        polls += 1;
        future.as_mut().poll(cx).map(drop)
    }));
}

/// A waker that remembers that it was woken. std's atomic: the models need no view of it.
#[derive(Default)]
struct Flag(AtomicBool);

impl Wake for Flag {
    fn wake(self: Arc<Self>) {
        self.0.store(true, SeqCst);
    }
}

/// A future that is polled once, and whether it was woken since.
struct Queued<F> {
    future: Pin<Box<F>>,
    flag: Arc<Flag>,
}

impl<F: Future> Queued<F> {
    fn new(future: F) -> Self {
        let (future, flag) = (Box::pin(future), Arc::default());
        let mut queued = Queued { future, flag };
        assert!(queued.poll().is_pending());
        queued
    }

    fn poll(&mut self) -> Poll<F::Output> {
        let waker = Waker::from(Arc::clone(&self.flag));
        self.future.as_mut().poll(&mut Context::from_waker(&waker))
    }

    fn is_woken(&self) -> bool {
        self.flag.0.load(SeqCst)
    }
}

// ---- CoMutex ----

fn count(mutex: &CoMutex<Plain>) {
    block_on(async { mutex.lock().await.add() });
}

fn count_twice(mutex: &CoMutex<Plain>) {
    count(mutex);
    count(mutex);
}

fn count_if_free(mutex: &CoMutex<Plain>) {
    match mutex.try_lock() {
        Some(guard) => guard.add(),
        None => count(mutex),
    }
}

fn mutex_model(bodies: [fn(&CoMutex<Plain>); 3], counts: usize) {
    model(move || {
        let mutex = leak(CoMutex::new(Plain::default()));
        three(mutex, bodies);
        let last = mutex.try_lock().expect("nobody is left");
        assert_eq!(last.get(), counts);
    });
}

#[test]
fn mutex_excludes_and_wakes_everyone() {
    mutex_model([count, count, count], 3);
}

#[test]
fn mutex_excludes_those_who_only_try() {
    mutex_model([count, count_if_free, count_if_free], 3);
}

#[test]
fn mutex_forgets_a_waiter_that_gave_up() {
    mutex_model([count, count, |mutex| give_up_waiting(mutex.lock())], 2);
}

#[test]
fn mutex_passes_on_what_a_notified_waiter_gave_up() {
    mutex_model([count, count, |mutex| give_up_when_woken(1, mutex.lock())], 2);
}

#[test]
fn mutex_passes_on_what_a_granted_waiter_gave_up() {
    // The waiter must lose a race before it is granted, so somebody locks twice.
    mutex_model([count_twice, count, |mutex| give_up_when_woken(2, mutex.lock())], 3);
}

#[test]
fn mutex_guard_and_waiter_move_between_threads() {
    model(|| {
        let mutex = leak(CoMutex::new(Plain::default()));
        let guard = mutex.try_lock().expect("nobody else yet");
        let waiter = Queued::new(mutex.lock());
        let unlocker = thread::spawn(move || {
            guard.add();
            drop(guard);
        });
        let waiting = thread::spawn(move || block_on(waiter.future).add());
        unlocker.join().expect("no body panics");
        waiting.join().expect("no body panics");
        assert_eq!(mutex.try_lock().expect("nobody is left").get(), 2);
    });
}

#[test]
fn mutex_told_waiter_gives_up_beside_two_newcomers() {
    model(|| {
        let mutex = leak(CoMutex::new(Plain::default()));
        let guard = mutex.try_lock().expect("nobody else yet");
        let told = Queued::new(mutex.lock());
        drop(guard);
        assert!(told.is_woken());
        let newcomers = [(); 2].map(|()| thread::spawn(|| count(mutex)));
        drop(told);
        for newcomer in newcomers {
            newcomer.join().expect("no body panics");
        }
        assert_eq!(mutex.try_lock().expect("nobody is left").get(), 2);
    });
}

#[test]
fn mutex_waiters_give_up_while_the_lock_changes_hands() {
    model(|| {
        let mutex = leak(CoMutex::new(Plain::default()));
        let guard = mutex.try_lock().expect("nobody else yet");
        let first = Queued::new(mutex.lock());
        let second = Queued::new(mutex.lock());
        let holder = thread::spawn(move || {
            guard.add();
            drop(guard);
        });
        let newcomer = thread::spawn(|| count(mutex));
        drop(second);
        drop(first);
        holder.join().expect("no body panics");
        newcomer.join().expect("no body panics");
        assert_eq!(mutex.try_lock().expect("nobody is left").get(), 2);
    });
}

/// While a holder unlocks, the first of two waiters gives up: the second must be woken.
fn second_locker_is_woken(new: fn(Plain) -> CoMutex<Plain>) {
    model(move || {
        let mutex = leak(new(Plain::default()));
        let guard = mutex.try_lock().expect("nobody else yet");
        let first = Queued::new(mutex.lock());
        let mut second = Queued::new(mutex.lock());
        let unlocker = thread::spawn(move || drop(guard));
        drop(first);
        unlocker.join().expect("no body panics");
        assert!(second.is_woken(), "the wake was lost");
        assert!(second.poll().is_ready());
    });
}

#[test]
fn mutex_wakes_the_second_waiter_if_the_first_gives_up() {
    second_locker_is_woken(CoMutex::new);
}

#[test]
#[should_panic(expected = "the wake was lost")]
fn a_swallowed_mutex_wake_is_found() {
    second_locker_is_woken(CoMutex::new_without_pass_on);
}

// ---- CoRwLock ----

/// Two counters that a writer keeps equal, so that a reader beside it sees them differ. Readers
/// count themselves, so that a writer that does not see one leave finds the count too high.
#[derive(Default)]
struct Pair {
    first: Plain,
    second: Plain,
    readers: AtomicUsize,
}

impl Pair {
    fn add(&self) {
        let readers = self.readers.load(Relaxed);
        assert_eq!(readers, 0, "a reader was beside a writer");
        self.first.add();
        self.second.add();
    }

    fn check(&self) -> usize {
        self.readers.fetch_add(1, Relaxed);
        let first = self.first.get();
        assert_eq!(first, self.second.get(), "a writer was beside a reader");
        self.readers.fetch_sub(1, Relaxed);
        first
    }
}

fn read(lock: &CoRwLock<Pair>) {
    block_on(async { lock.read().await.check() });
}

fn write(lock: &CoRwLock<Pair>) {
    block_on(async { lock.write().await.add() });
}

fn upgrade(lock: &CoRwLock<Pair>) {
    block_on(async {
        let reading = lock.read().await;
        reading.check();
        reading.upgrade().await.add();
    });
}

fn downgrade(lock: &CoRwLock<Pair>) {
    block_on(async {
        let writing = lock.write().await;
        writing.add();
        let written = writing.check();
        assert_eq!(writing.downgrade().check(), written, "a writer came in between");
    });
}

fn rwlock_model(bodies: [fn(&CoRwLock<Pair>); 3], counts: usize) {
    model(move || {
        let lock = leak(CoRwLock::new(Pair::default()));
        three(lock, bodies);
        let last = lock.try_write().expect("nobody is left");
        assert_eq!(last.check(), counts);
    });
}

#[test]
fn rwlock_keeps_writers_from_each_other_and_from_a_reader() {
    rwlock_model([write, write, read], 2);
}

#[test]
fn rwlock_lets_two_readers_in_beside_no_writer() {
    rwlock_model([read, read, write], 1);
}

#[test]
fn rwlock_upgrades_race_without_deadlock() {
    rwlock_model([upgrade, upgrade, read], 2);
}

#[test]
fn rwlock_upgrade_meets_a_writer() {
    rwlock_model([upgrade, write, read], 2);
}

#[test]
fn rwlock_downgrade_lets_no_writer_in_between() {
    rwlock_model([downgrade, write, read], 2);
}

#[test]
fn rwlock_downgrade_meets_an_upgrade() {
    rwlock_model([downgrade, upgrade, read], 2);
}

#[test]
fn rwlock_shows_what_was_written_before_a_downgrade_whose_waiter_gave_up() {
    model(|| {
        let lock = leak(CoRwLock::new(Pair::default()));
        let writing = lock.try_write().expect("nobody else yet");
        let waiter = Queued::new(lock.write());
        let writer = thread::spawn(move || {
            writing.add();
            writing.downgrade().check()
        });
        let reader = thread::spawn(|| read(lock));
        drop(waiter);
        assert_eq!(writer.join().expect("no body panics"), 1);
        reader.join().expect("no body panics");
        assert!(lock.try_write().is_some());
    });
}

#[test]
fn rwlock_readers_pass_a_writer_that_gave_up() {
    rwlock_model([read, write, |lock| give_up_waiting(lock.write())], 1);
}

#[test]
fn rwlock_passes_on_what_a_granted_writer_gave_up() {
    rwlock_model([read, write, |lock| give_up_when_woken(1, lock.write())], 1);
}

#[test]
fn rwlock_passes_on_what_a_granted_reader_gave_up() {
    rwlock_model([write, write, |lock| give_up_when_woken(1, lock.read())], 2);
}

#[test]
fn rwlock_survives_an_upgrade_that_gave_up() {
    fn abandon(lock: &CoRwLock<Pair>) {
        give_up_waiting(async { lock.read().await.upgrade().await });
    }
    rwlock_model([read, write, abandon], 1);
}

// ---- CoQueue ----

/// Permits under a mutex of the caller, as the queue is meant to be used.
struct Permits {
    free: Mutex<usize>,
    freed: CoQueue,
}

impl Permits {
    fn new() -> &'static Self {
        leak(Permits { free: Mutex::new(0), freed: CoQueue::new() })
    }

    async fn take(&self) {
        loop {
            let wait = {
                let mut free = self.free.lock().expect("no body panics");
                if *free > 0 {
                    *free -= 1;
                    return;
                }
                self.freed.wait(free)
            };
            wait.await;
        }
    }

    fn give(&self, count: usize) {
        *self.free.lock().expect("no body panics") += count;
    }
}

fn take(permits: &Permits) {
    block_on(permits.take());
}

#[test]
fn queue_loses_no_single_wake() {
    model(|| {
        let give_two = |permits: &Permits| {
            for _ in 0..2 {
                permits.give(1);
                permits.freed.wake_one();
            }
        };
        let permits = Permits::new();
        three(permits, [give_two, take, take]);
        assert!(permits.freed.is_empty());
    });
}

#[test]
fn queue_wakes_all_who_wait() {
    model(|| {
        let give_all = |permits: &Permits| {
            permits.give(2);
            permits.freed.wake_all();
        };
        let permits = Permits::new();
        three(permits, [give_all, take, take]);
        assert!(permits.freed.is_empty());
    });
}

#[test]
fn queue_passes_on_the_wake_of_a_waiter_that_gave_up() {
    model(|| {
        let give_one = |permits: &Permits| {
            permits.give(1);
            permits.freed.wake_one();
        };
        // Queues without a look at the permits and takes none, so the other must get the wake,
        // passed on by the drop, or by hand if the poll has consumed it.
        let give_up = |permits: &Permits| {
            let mut wait = pin!(permits.freed.wait(permits.free.lock().expect("no body panics")));
            block_on(poll_fn(|cx| {
                if wait.as_mut().poll(cx).is_ready() {
                    permits.freed.wake_one();
                }
                Poll::Ready(())
            }));
        };
        three(Permits::new(), [give_one, take, give_up]);
    });
}

/// While one wake goes out, the first of two waiters gives up: the second must be woken.
fn second_in_queue_is_woken(new: fn() -> CoQueue) {
    model(move || {
        let queue = leak(new());
        let first = Queued::new(queue.wait(()));
        let mut second = Queued::new(queue.wait(()));
        let waker = thread::spawn(move || assert!(queue.wake_one()));
        drop(first);
        waker.join().expect("no body panics");
        assert!(second.is_woken(), "the wake was lost");
        assert!(second.poll().is_ready());
    });
}

#[test]
fn queue_wakes_the_second_waiter_if_the_first_gives_up() {
    second_in_queue_is_woken(CoQueue::new);
}

#[test]
#[should_panic(expected = "the wake was lost")]
fn a_swallowed_queue_wake_is_found() {
    second_in_queue_is_woken(CoQueue::new_without_pass_on);
}

// ---- RangeLock ----

/// Three bytes, each a counter under the lock of its range.
struct Bytes {
    ranges: RangeLock,
    bytes: [Pair; 3],
}

impl Bytes {
    fn new() -> &'static Self {
        leak(Bytes { ranges: RangeLock::new(), bytes: Default::default() })
    }

    fn visit(&self, range: Range<u64>, mode: RangeMode) {
        let _guard = block_on(self.ranges.lock(range.clone(), mode));
        self.touch(range, mode);
    }

    fn touch(&self, range: Range<u64>, mode: RangeMode) {
        for byte in &self.bytes[range.start as usize..range.end as usize] {
            match mode {
                Exclusive => byte.add(),
                Shared => drop(byte.check()),
            }
        }
    }
}

fn range_model(bodies: [fn(&Bytes); 3], counts: [usize; 3]) {
    model(move || {
        let bytes = Bytes::new();
        three(bytes, bodies);
        assert!(bytes.ranges.is_idle() && !bytes.ranges.has_waiters());
        let everything = bytes.ranges.try_lock(0..3, Exclusive);
        assert!(everything.is_some());
        assert_eq!(bytes.bytes.each_ref().map(Pair::check), counts);
    });
}

#[test]
fn range_excludes_overlapping_writers() {
    range_model(
        [
            |bytes| bytes.visit(0..2, Exclusive),
            |bytes| bytes.visit(1..3, Exclusive),
            |bytes| bytes.visit(0..1, Exclusive),
        ],
        [2, 2, 1],
    );
}

#[test]
fn range_keeps_a_writer_from_readers() {
    range_model(
        [
            |bytes| bytes.visit(0..2, Shared),
            |bytes| bytes.visit(1..3, Exclusive),
            |bytes| bytes.visit(1..2, Shared),
        ],
        [0, 1, 1],
    );
}

#[test]
fn range_waiter_that_gave_up_unblocks_those_behind_it() {
    range_model(
        [
            |bytes| bytes.visit(0..1, Exclusive),
            |bytes| bytes.visit(1..2, Exclusive),
            |bytes| give_up_waiting(bytes.ranges.lock(0..2, Exclusive)),
        ],
        [1, 1, 0],
    );
}

#[test]
fn range_grant_that_was_given_up_goes_to_the_next() {
    range_model(
        [
            |bytes| bytes.visit(0..1, Exclusive),
            |bytes| bytes.visit(0..1, Exclusive),
            |bytes| give_up_when_woken(1, bytes.ranges.lock(0..1, Exclusive)),
        ],
        [2, 0, 0],
    );
}

#[test]
fn range_tokens_exclude_like_guards() {
    fn by_token(bytes: &Bytes) {
        let token = bytes
            .ranges
            .try_acquire(0..1, Exclusive)
            .unwrap_or_else(|| block_on(bytes.ranges.lock(0..1, Exclusive)).into_token());
        bytes.touch(0..1, Exclusive);
        bytes.ranges.release(token);
    }
    range_model([by_token, by_token, |bytes| bytes.visit(0..2, Exclusive)], [3, 1, 0]);
}
