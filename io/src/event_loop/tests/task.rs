//! Tasks (scenarios of test-aio, test-aio-multithread and test-coroutine; W03–W06, C12).

use super::*;
use crate::sync::Mutex;
use crate::sync::atomic::{AtomicU32, AtomicU64};
use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::thread;

on_each_engine! {
    two_tasks_waking_each_other_use_no_stack
    a_task_woken_by_another_thread_runs_on_its_loop
    a_task_woken_by_many_threads_is_never_entered_twice
    a_wake_up_before_the_task_has_yielded_is_not_lost
    tasks_hop_between_five_loops_without_loss_or_double_entry
    only_a_task_spawned_by_handle_can_move
    a_move_to_a_loop_that_has_ended_fails_and_the_task_stays
    a_future_made_on_the_loop_need_not_be_send
    a_panicking_task_is_cancelled_and_the_others_go_on
    a_cancelled_task_is_dropped_on_its_loop
    yielding_lets_every_other_task_run
    steps_run_in_a_fixed_order
    blocking_on_a_loop_thread_is_an_error
    a_top_level_future_borrows_and_runs_with_the_loops_work
    a_sleep_ends_once_in_order_and_not_early
    a_dropped_sleep_leaves_no_timer
}

/// What other threads may hold is `Send` and `Sync`; this need only compile.
#[test]
fn handles_are_for_every_thread() {
    fn for_all<T: Send + Sync>() {}
    fn movable<T: Send>() {}
    for_all::<LoopHandle>();
    for_all::<BottomHalf>();
    for_all::<IoThread>();
    movable::<JoinHandle<u32>>();
    fn is_send(value: impl Send) -> bool {
        drop(value);
        true
    }
    let thread = IoThread::spawn(LoopConfig::default()).unwrap();
    assert!(is_send(move_to(thread.handle())));
}

/// A one-shot signal between tasks of one thread.
#[derive(Default)]
struct Baton {
    turns: Cell<u32>,
    wakers: RefCell<[Option<Waker>; 2]>,
}

fn two_tasks_waking_each_other_use_no_stack(config: LoopConfig) {
    const TURNS: u32 = 25_000;
    let mut event_loop = new_loop(config);
    let baton = Rc::new(Baton::default());
    let tasks = [0, 1].map(|side| {
        let baton = Rc::clone(&baton);
        event_loop.local().spawn(poll_fn(move |context| {
            if baton.turns.get() >= TURNS {
                return Poll::Ready(());
            }
            baton.wakers.borrow_mut()[side as usize] = Some(context.waker().clone());
            if baton.turns.get() % 2 == side {
                baton.turns.set(baton.turns.get() + 1);
                if let Some(peer) = baton.wakers.borrow_mut()[1 - side as usize].take() {
                    peer.wake();
                }
                if baton.turns.get() >= TURNS {
                    return Poll::Ready(());
                }
            }
            Poll::Pending
        }))
    });
    event_loop.block_on(async {
        for task in tasks {
            assert_eq!(task.await, Ok(()));
        }
    });
    assert_eq!(baton.turns.get(), TURNS);
}

fn a_task_woken_by_another_thread_runs_on_its_loop(config: LoopConfig) {
    let mut event_loop = new_loop(config);
    let home = thread::current().id();
    let local = event_loop.local();
    let task = local.spawn(async move {
        let mut worker = None;
        let ready = Arc::new(AtomicBool::new(false));
        poll_fn(|context| {
            assert_eq!(thread::current().id(), home);
            if ready.load(Ordering::SeqCst) {
                return Poll::Ready(());
            }
            worker.get_or_insert_with(|| {
                let (waker, ready) = (context.waker().clone(), Arc::clone(&ready));
                thread::spawn(move || {
                    ready.store(true, Ordering::SeqCst);
                    waker.wake();
                })
            });
            Poll::Pending
        })
        .await;
        worker.map(|worker| worker.join().is_ok())
    });
    assert_eq!(event_loop.block_on(task), Ok(Some(true)));
}

fn a_task_woken_by_many_threads_is_never_entered_twice(config: LoopConfig) {
    const WAKES: u64 = 2_000;
    let thread = IoThread::spawn(config).unwrap();
    let entered = Arc::new(AtomicBool::new(false));
    let done = Arc::new(AtomicU64::new(0));
    let waker = Arc::new(Mutex::new(None::<Waker>));
    let (inside, sum, slot) = (entered, Arc::clone(&done), Arc::clone(&waker));
    let task = thread.handle().spawn(poll_fn(move |context| {
        assert!(!inside.swap(true, Ordering::SeqCst), "entered twice");
        *slot.lock() = Some(context.waker().clone());
        let finished = sum.load(Ordering::SeqCst) == 2 * WAKES;
        assert!(inside.swap(false, Ordering::SeqCst));
        if finished { Poll::Ready(()) } else { Poll::Pending }
    }));
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                for _ in 0..WAKES {
                    done.fetch_add(1, Ordering::SeqCst);
                    let waker = waker.lock().clone();
                    if let Some(waker) = waker {
                        waker.wake();
                    }
                }
            });
        }
    });
    assert_eq!(block_on(task.unwrap()), Ok(Ok(())));
}

fn a_wake_up_before_the_task_has_yielded_is_not_lost(config: LoopConfig) {
    let mut event_loop = new_loop(config);
    let polls = Rc::new(Cell::new(0));
    let count = Rc::clone(&polls);
    let task = event_loop.local().spawn(poll_fn(move |context| {
        count.set(count.get() + 1);
        if count.get() == 10 {
            return Poll::Ready(());
        }
        // The other thread has woken us before this poll returns.
        let waker = context.waker().clone();
        thread::spawn(move || waker.wake()).join().unwrap();
        Poll::Pending
    }));
    assert_eq!(event_loop.block_on(task), Ok(()));
    assert_eq!(polls.get(), 10);
}

fn tasks_hop_between_five_loops_without_loss_or_double_entry(config: LoopConfig) {
    const HOPS: u32 = 300;
    let threads = io_threads(&config, 5);
    let handles: Arc<[LoopHandle]> = threads.iter().map(|t| t.handle().clone()).collect();
    let arrivals = Arc::new(AtomicU32::new(0));
    let tasks = (0..8u64).map(|seed| {
        let (handles, arrivals) = (Arc::clone(&handles), Arc::clone(&arrivals));
        handles[0].clone().spawn(async move {
            let inside = AtomicBool::new(false);
            let mut random = seed * 2 + 1;
            for _ in 0..HOPS {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let target = &handles[(random >> 33) as usize % handles.len()];
                move_to(target).await.unwrap();
                assert!(!inside.swap(true, Ordering::SeqCst));
                assert!(target.is_current());
                assert_eq!(current().map(|local| local.handle()).as_ref(), Some(target));
                arrivals.fetch_add(1, Ordering::SeqCst);
                inside.store(false, Ordering::SeqCst);
            }
        })
    });
    for task in tasks.collect::<Vec<_>>() {
        assert_eq!(block_on(task.unwrap()), Ok(Ok(())));
    }
    assert_eq!(arrivals.load(Ordering::SeqCst), 8 * HOPS);
}

fn only_a_task_spawned_by_handle_can_move(config: LoopConfig) {
    let other = IoThread::spawn(config.clone()).unwrap();
    let target = other.handle().clone();
    let mut event_loop = new_loop(config);
    let own = event_loop.handle();
    let task = event_loop.local().spawn(async move {
        assert_eq!(move_to(&own).await, Ok(()), "it is there already");
        move_to(&target).await
    });
    assert_eq!(event_loop.block_on(task), Ok(Err(MoveError::NotMovable)));
    assert_eq!(event_loop.block_on(move_to(other.handle())), Err(MoveError::NotMovable));
}

fn a_move_to_a_loop_that_has_ended_fails_and_the_task_stays(config: LoopConfig) {
    let thread = IoThread::spawn(config.clone()).unwrap();
    let gone = IoThread::spawn(config).unwrap();
    let target = gone.handle().clone();
    gone.join();
    let home = thread.handle().clone();
    let task = thread.handle().spawn(async move {
        let moved = move_to(&target).await;
        (moved, home.is_current())
    });
    assert_eq!(block_on(task.unwrap()), Ok(Ok((Err(MoveError::Closed), true))));
}

fn a_future_made_on_the_loop_need_not_be_send(config: LoopConfig) {
    let thread = IoThread::spawn(config).unwrap();
    let task = thread.handle().spawn_with(|local| async move {
        let shared = Rc::new(Cell::new(1));
        let inner = Rc::clone(&shared);
        local.spawn(async move { inner.set(2) }).await.unwrap();
        yield_now().await;
        shared.get()
    });
    assert_eq!(block_on(task.unwrap()), Ok(Ok(2)));
    let mut unwanted = thread.handle().spawn_with(|_| std::future::pending::<()>()).unwrap();
    unwanted.cancel();
    assert_eq!(block_on(unwanted), Ok(Err(Cancelled)));
}

fn a_panicking_task_is_cancelled_and_the_others_go_on(config: LoopConfig) {
    let thread = IoThread::spawn(config).unwrap();
    let bad = thread.handle().spawn(async {
        yield_now().await;
        panic!("a task's own fault");
    });
    let bad: JoinHandle<()> = bad.unwrap();
    let good = thread.handle().spawn(async { 7 }).unwrap();
    assert_eq!(block_on(bad), Ok(Err(Cancelled)));
    assert_eq!(block_on(good), Ok(Ok(7)));
    thread.handle().post(|_| panic!("a closure's own fault")).unwrap();
    let after = thread.handle().spawn(async { 8 }).unwrap();
    assert_eq!(block_on(after), Ok(Ok(8)));
}

/// Says on which thread it was dropped.
struct Tell(std::sync::mpsc::Sender<thread::ThreadId>);

impl Drop for Tell {
    fn drop(&mut self) {
        self.0.send(thread::current().id()).unwrap();
    }
}

fn a_cancelled_task_is_dropped_on_its_loop(config: LoopConfig) {
    let thread = IoThread::spawn(config).unwrap();
    let home = thread.handle().spawn(async { thread::current().id() }).unwrap();
    let home = block_on(home).unwrap().unwrap();
    let (sender, receiver) = std::sync::mpsc::channel();
    let tell = Tell(sender.clone());
    let mut task = thread.handle().spawn_with(move |_| async move {
        let _tell = tell;
        std::future::pending::<()>().await;
    });
    let task = task.as_mut().unwrap();
    // Let it be made and polled first.
    block_on(thread.handle().spawn(async { yield_now().await }).unwrap()).unwrap().unwrap();
    task.cancel();
    assert!(task.is_finished());
    assert_eq!(receiver.recv().unwrap(), home);
}

fn yielding_lets_every_other_task_run(config: LoopConfig) {
    let mut event_loop = new_loop(config);
    let local = event_loop.local();
    let ran = Rc::new(Cell::new(0));
    let task = {
        let (ran, local) = (Rc::clone(&ran), local.clone());
        local.clone().spawn(async move {
            for _ in 0..100 {
                let ran = Rc::clone(&ran);
                drop(local.spawn(async move { ran.set(ran.get() + 1) }));
            }
            yield_now().await;
            ran.get()
        })
    };
    assert_eq!(event_loop.block_on(task), Ok(100));
}

fn steps_run_in_a_fixed_order(config: LoopConfig) {
    let mut event_loop = new_loop(config);
    let local = event_loop.local();
    let steps = Rc::new(RefCell::new(Vec::new()));
    let task = {
        let (steps, local) = (Rc::clone(&steps), local.clone());
        local.clone().spawn(async move {
            steps.borrow_mut().push(1);
            let inner = Rc::clone(&steps);
            let child = local.spawn(async move {
                inner.borrow_mut().push(3);
                yield_now().await;
                inner.borrow_mut().push(5);
            });
            steps.borrow_mut().push(2);
            yield_now().await;
            steps.borrow_mut().push(4);
            child.await.unwrap();
            steps.borrow_mut().push(6);
        })
    };
    assert_eq!(event_loop.block_on(task), Ok(()));
    assert_eq!(*steps.borrow(), [1, 2, 3, 4, 5, 6]);
}

fn blocking_on_a_loop_thread_is_an_error(config: LoopConfig) {
    assert_eq!(block_on(async { 1 }), Ok(1));
    let event_loop = new_loop(config.clone());
    assert_eq!(block_on(async { 1 }), Err(OnLoopThread));
    assert_eq!(EventLoop::new(config).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
    drop(event_loop);
    assert_eq!(block_on(async { 1 }), Ok(1));
    assert!(current().is_none());
}

fn a_top_level_future_borrows_and_runs_with_the_loops_work(config: LoopConfig) {
    let mut event_loop = new_loop(config);
    let local = event_loop.local();
    let mut log = Vec::new();
    event_loop.block_on(async {
        let task = local.spawn({
            let local = local.clone();
            async move {
                local.sleep(Duration::from_millis(1)).await;
                2
            }
        });
        log.push(1);
        log.push(task.await.unwrap());
        let blocking = local.blocking(|| 3);
        log.push(blocking.await);
    });
    assert_eq!(log, [1, 2, 3]);
}

fn a_sleep_ends_once_in_order_and_not_early(config: LoopConfig) {
    let mut event_loop = new_loop(config);
    let local = event_loop.local();
    let ended = Rc::new(RefCell::new(Vec::new()));
    let start = local.refresh_now();
    let tasks: Vec<_> = [30u64, 10, 20]
        .into_iter()
        .map(|millis| {
            let (ended, local) = (Rc::clone(&ended), local.clone());
            local.clone().spawn(async move {
                local.sleep_until(start + millis * 1_000_000).await;
                assert!(local.refresh_now() >= start + millis * 1_000_000);
                ended.borrow_mut().push(millis);
                // Armed again, once.
                local.sleep(Duration::from_millis(1)).await;
            })
        })
        .collect();
    event_loop.block_on(async {
        for task in tasks {
            task.await.unwrap();
        }
        local.sleep(Duration::ZERO).await;
    });
    assert_eq!(*ended.borrow(), [10, 20, 30]);
}

fn a_dropped_sleep_leaves_no_timer(config: LoopConfig) {
    let mut event_loop = new_loop(config);
    let local = event_loop.local();
    event_loop.block_on(async {
        let mut sleep = local.sleep(Duration::from_secs(3600));
        poll_fn(|context| {
            assert!(std::pin::Pin::new(&mut sleep).poll(context).is_pending());
            Poll::Ready(())
        })
        .await;
    });
    assert_eq!(event_loop.core.timers.borrow().next(), None);
}
